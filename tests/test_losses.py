"""Loss values that can be checked on paper, and what padding may not do to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deevisum_jax import losses

LN2 = np.log(2)


def test_targets_by_hand():
    tokens = jnp.array([[7, 8, 9, 0], [5, 6, 0, 0]])
    counted = jnp.array([[False, True, True, False], [True, True, False, False]])
    found = losses.find_targets(tokens, counted, 3)
    np.testing.assert_array_equal(found.positions, [[0, 1, 2], [0, 1, 2]])
    np.testing.assert_array_equal(found.tokens, [[8, 9, 0], [6, 0, 0]])
    # The first token of the second row is marked, but nothing comes before it to predict it.
    np.testing.assert_array_equal(found.mask, [[True, True, False], [True, False, False]])


def of_logits(logits, targets, **kwargs):
    """Token loss of given logits: the table is the identity."""
    table = jnp.eye(logits.shape[-1], dtype=logits.dtype)
    return losses.token_cross_entropy(logits, table, targets, **kwargs)


def test_token_cross_entropy_by_hand():
    # Softmax of [ln 2, 0, 0] is [1/2, 1/4, 1/4].
    logits = jnp.array([[[LN2, 0, 0], [0, 0, LN2], [9, 0, 0]]])
    targets = losses.Targets(
        positions=jnp.array([[0, 1, 2]]),
        tokens=jnp.array([[0, 1, 1]]),
        mask=jnp.array([[True, True, False]]),
    )
    total = of_logits(logits, targets)
    np.testing.assert_allclose(total.sum, LN2 + 2 * LN2, rtol=1e-6)  # 1/2 for 0, 1/4 for 1
    assert total.count == 2
    np.testing.assert_allclose(total.mean, 1.5 * LN2, rtol=1e-6)


def test_capped_logits_by_hand():
    # 2 tanh(atanh(ln 2 / 2)) is ln 2, whose softmax with two zeros is [1/2, 1/4, 1/4].
    logits = jnp.array([[[2 * np.arctanh(LN2 / 2), 0, 0]]])
    targets = losses.Targets(jnp.array([[0]]), jnp.array([[0]]), jnp.array([[True]]))
    total = of_logits(logits, targets, logits_softcap=2.0)
    np.testing.assert_allclose(total.sum, LN2, rtol=1e-6)


@pytest.fixture
def problem():
    """Rows and a table of 37 tokens in 8 columns, 24 targets of which some do not count."""
    rng = np.random.default_rng(0)
    rows, table = rng.normal(size=(6, 4, 8)), rng.normal(size=(37, 8))
    tokens, mask = rng.integers(0, 37, (6, 4)), rng.uniform(size=(6, 4)) < 0.7
    to = functools.partial(jnp.asarray, dtype=jnp.float32)
    targets = losses.Targets(jnp.zeros((6, 4), int), jnp.asarray(tokens), jnp.asarray(mask))
    return to(rows), to(table), targets


def by_optax(rows, table, targets, cap):
    logits = jnp.einsum("BRD,VD->BRV", rows, table, precision="highest")
    if cap:
        logits = cap * jnp.tanh(logits / cap)
    found = optax.softmax_cross_entropy_with_integer_labels(logits, targets.tokens)
    return jnp.sum(found * targets.mask)


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("chunk_bytes", [2**20, 37 * 4 * 5, 1])
def test_loss_and_gradients_in_chunks_are_those_of_the_whole(
    problem, cap, chunk_bytes, monkeypatch
):
    monkeypatch.setattr(losses, "_CHUNK", chunk_bytes)
    rows, table, targets = problem
    ours = jax.value_and_grad(
        lambda *args: losses.token_cross_entropy(*args, targets, logits_softcap=cap).sum, (0, 1)
    )
    theirs = jax.value_and_grad(lambda *args: by_optax(*args, targets, cap), (0, 1))
    for found, expected in zip(
        jax.tree.leaves(ours(rows, table)), jax.tree.leaves(theirs(rows, table)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-6)


def test_chunks_are_as_large_as_allowed_and_leave_no_row_over():
    [chunks] = losses._in_chunks((jnp.zeros((24, 3)),), losses._CHUNK // 4 // 8)
    assert chunks.shape == (3, 8, 3)  # at most 8 rows of that width
    [chunks] = losses._in_chunks((jnp.zeros((24, 3)),), losses._CHUNK)
    assert chunks.shape == (24, 1, 3)  # not even one row: one at a time


def test_class_cross_entropy_by_hand():
    # Softmax of [ln 3, 0] is [3/4, 1/4].
    logits = jnp.array([[np.log(3.0), 0], [np.log(3.0), 0], [0, 0]])
    total = losses.class_cross_entropy(logits, jnp.array([0, 1, 1]), jnp.array([True, True, False]))
    np.testing.assert_allclose(total.sum, np.log(4 / 3) + np.log(4), rtol=1e-6)
    assert total.count == 2


def test_score_cross_entropy_by_hand():
    # sigmoid(ln 3) = 3/4: -(s ln 3/4 + (1 - s) ln 1/4).
    total = losses.score_cross_entropy(
        jnp.array([np.log(3.0), 0.0, 5.0]),
        jnp.array([0.5, 0.2, 1.0]),
        jnp.array([True, True, False]),
    )
    np.testing.assert_allclose(total.sum, 0.5 * np.log(16 / 3) + LN2, rtol=1e-6)
    assert total.count == 2


def test_score_loss_is_least_where_the_sigmoid_is_the_score():
    gradient = jax.grad(
        lambda logit: losses.score_cross_entropy(logit, jnp.array([0.75]), jnp.array([True])).sum
    )
    np.testing.assert_allclose(gradient(jnp.array([np.log(3.0)])), 0, atol=1e-6)
    np.testing.assert_allclose(gradient(jnp.array([40.0])), 0.25, rtol=1e-6)  # does not vanish


def test_nothing_counted_gives_zero_and_no_nan():
    total = losses.class_cross_entropy(jnp.zeros((2, 2)), jnp.zeros(2, int), jnp.zeros(2, bool))
    assert (total.sum, total.count, total.mean) == (0, 0, 0)


@pytest.mark.parametrize("pads", [1, 3])
def test_padding_rows_and_pads_change_nothing(pads):
    rng = np.random.default_rng(0)
    logits, tokens = rng.normal(size=(2, 4, 5)), rng.integers(0, 5, (2, 4))
    mask = np.array([[0, 0, 1, 1], [0, 1, 1, 0]], bool)

    def total(logits, tokens, mask, num_targets):
        targets = losses.find_targets(jnp.array(tokens), jnp.array(mask), num_targets)
        rows = jnp.take_along_axis(jnp.array(logits), targets.positions[..., None], axis=1)
        return of_logits(rows, targets)

    plain = total(logits, tokens, mask, 2)
    padded = total(
        np.pad(logits, [(0, pads), (0, pads), (0, 0)], constant_values=7.0),
        np.pad(tokens, [(0, pads), (0, pads)]),
        np.pad(mask, [(0, pads), (0, pads)]),
        2 + pads,
    )
    np.testing.assert_allclose(padded.sum, plain.sum, rtol=1e-6)
    assert padded.count == plain.count == 4


def test_logits_in_bfloat16_are_summed_in_float32():
    targets = losses.Targets(jnp.array([[0]]), jnp.array([[3]]), jnp.array([[True]]))
    total = of_logits(jnp.zeros((1, 1, 4), jnp.bfloat16), targets)
    assert total.sum.dtype == jnp.float32
    np.testing.assert_allclose(total.sum, np.log(4), rtol=1e-6)
