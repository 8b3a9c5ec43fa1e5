"""Loss values that can be checked on paper, and what padding may not do to them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from jax.sharding import PartitionSpec as P

from deevisum_jax import fsdp, losses, sharding
from deevisum_jax.config import LossConfig

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
    return token_loss(logits, table, targets, **kwargs)


def token_loss(rows, table, targets, **kwargs):
    log_probs, _ = losses.token_log_probs(rows, table, targets.tokens, **kwargs)
    return losses.token_cross_entropy(log_probs, targets.mask)


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
        lambda *args: token_loss(*args, targets, logits_softcap=cap).sum, (0, 1)
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


# ---- Chosen tokens, and all others together ----


def of_chosen(logits, chosen, **kwargs):
    """Log-probabilities `[K + 1]` of one row of logits: the table is the identity."""
    logits = jnp.asarray(logits, jnp.float32)[None, None]
    table = jnp.eye(logits.shape[-1])
    tokens = jnp.zeros((1, 1), int)
    _, [found] = losses.token_log_probs(logits, table, tokens, [jnp.array([[chosen]])], **kwargs)
    return found[0, 0]


def test_chosen_tokens_and_all_others_by_hand():
    # Softmax of [ln 2, 0, 0] is [1/2, 1/4, 1/4].
    np.testing.assert_allclose(np.exp(of_chosen([LN2, 0, 0], [0])), [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(np.exp(of_chosen([LN2, 0, 0], [2])), [0.25, 0.75], rtol=1e-6)
    of_two = of_chosen([LN2, 0, 0], [1, 0])
    np.testing.assert_allclose(np.exp(of_two), [0.25, 0.5, 0.25], rtol=1e-6)


def test_temperature_divides_logits_behind_the_cap_and_leaves_the_target_alone():
    # 4 tanh(atanh(2 ln 2 / 4)) is 2 ln 2, of which T = 2 makes ln 2.
    logits = jnp.array([[[4 * np.arctanh(2 * LN2 / 4), 0, 0]]])
    of_target, [of_chosen] = losses.token_log_probs(
        logits,
        jnp.eye(3),
        jnp.array([[0]]),
        [jnp.array([[[0]]])],
        temperature=2.0,
        logits_softcap=4.0,
    )
    np.testing.assert_allclose(np.exp(of_chosen[0, 0]), [0.5, 0.5], rtol=1e-6)
    np.testing.assert_allclose(np.exp(of_target), [[4 / 6]], rtol=1e-6)  # softmax of [ln 4, 0, 0]


def test_others_are_exact_where_the_chosen_have_all_but_nothing():
    # 1 - sigmoid would be 0 in float32 already at 18 nats.
    found = of_chosen([200, 0, 0], [0])
    np.testing.assert_allclose(found, [0, LN2 - 200], rtol=1e-6)
    to_logits = jax.grad(lambda logits: of_chosen(logits, [0])[1])(jnp.array([200.0, 0, 0]))
    np.testing.assert_allclose(to_logits, [-1, 0.5, 0.5], atol=1e-6)


def test_without_others_their_probability_is_0_and_the_gradient_finite():
    found = of_chosen([LN2, 0, 0], [2, 0, 1])
    np.testing.assert_allclose(np.exp(found), [0.25, 0.5, 0.25, 0], rtol=1e-6)
    # Of KL from (1/4, 1/2, 1/4): the student has the same, so that nothing pulls.
    teacher = jnp.log(jnp.array([0.25, 0.5, 0.25, 0]))

    def kl(logits, direction):
        student = of_chosen(logits, [2, 0, 1])
        mask = jnp.array(True)
        return losses.token_kl(teacher, student, mask, temperature=1.0, direction=direction).sum

    for direction in ("teacher_first", "student_first"):
        value, to_logits = jax.value_and_grad(kl)(jnp.array([LN2, 0, 0]), direction)
        np.testing.assert_allclose(value, 0, atol=1e-6)
        np.testing.assert_allclose(to_logits, 0, atol=1e-6)


def by_formula(rows, table, tokens, chosen, temperature, cap):
    """`losses.token_log_probs` of the whole vocabulary at once."""
    logits = jnp.einsum("BRD,VD->BRV", rows, table, precision="highest")
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    at = lambda log_probs, ids: jnp.take_along_axis(log_probs, ids, axis=-1)
    of_chosen = []
    for ids in chosen:
        log_probs = jax.nn.log_softmax(logits / temperature)
        is_chosen = (jnp.arange(table.shape[0]) == ids[..., None]).any(axis=-2)
        others = jnp.sum(jnp.where(is_chosen, 0, jnp.exp(log_probs)), axis=-1, keepdims=True)
        of_chosen.append(jnp.concatenate([at(log_probs, ids), jnp.log(others)], axis=-1))
    return at(jax.nn.log_softmax(logits), tokens[..., None])[..., 0], tuple(of_chosen)


def chosen_of(seed, shape, vocab_size, top_k):
    """Different tokens in every row."""
    ids = np.tile(np.arange(vocab_size), (*shape, 1))
    order = np.random.default_rng(seed).permuted(ids, axis=-1)
    return jnp.asarray(order[..., :top_k])


def weighted(found, seed=3):
    """A number to differentiate, in which every element has another weight."""
    rng = np.random.default_rng(seed)
    return sum(jnp.sum(leaf * rng.normal(size=leaf.shape)) for leaf in jax.tree.leaves(found))


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("chunk_bytes", [2**20, 37 * 4 * 5])
def test_log_probabilities_and_gradients_are_those_of_the_formula(
    problem, cap, chunk_bytes, monkeypatch
):
    monkeypatch.setattr(losses, "_CHUNK", chunk_bytes)
    rows, table, targets = problem
    chosen = [chosen_of(1, (6, 4), 37, 5), chosen_of(2, (6, 4), 37, 36)]
    ours = lambda *args: losses.token_log_probs(
        *args, targets.tokens, chosen, temperature=2.5, logits_softcap=cap
    )
    theirs = lambda *args: by_formula(*args, targets.tokens, chosen, 2.5, cap)

    def both(log_probs):
        gradient = jax.grad(lambda *args: weighted(log_probs(*args)), (0, 1))
        return jax.jit(lambda *args: (log_probs(*args), gradient(*args)))(rows, table)

    for found, expected in zip(
        jax.tree.leaves(both(ours)), jax.tree.leaves(both(theirs)), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5)


def test_the_top_tokens_are_the_likeliest_and_their_log_probabilities_the_formulas(problem):
    rows, table, targets = problem
    top = functools.partial(losses.top_tokens, top_k=5, temperature=2.0, logits_softcap=3.0)
    ids, log_probs = jax.jit(top)(rows, table)
    assert log_probs.dtype == jnp.float32
    logits = np.einsum("BRD,VD->BRV", rows, table)
    np.testing.assert_array_equal(ids, np.argsort(-logits, axis=-1)[..., :5])
    _, [expected] = by_formula(rows, table, targets.tokens, [ids], 2.0, 3.0)
    np.testing.assert_allclose(log_probs, expected, rtol=1e-5, atol=1e-6)


SHARDED = P(None, sharding.FSDP_AXES)


def on(mesh, fn, in_specs, out_specs, *args):
    with jax.set_mesh(mesh):
        return jax.jit(lambda *args: fsdp.per_device(fn, in_specs, out_specs)(*args))(*args)


# 37 is divided by no mesh; of 5 tokens some devices have none, and 4 are more than any has.
@pytest.mark.parametrize(("V", "top_k"), [(37, 6), (5, 4)])
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_split_vocabulary_gives_the_same_top_tokens_log_probabilities_and_gradients(
    sizes, V, top_k
):
    mesh = sharding.make_mesh(**sizes)
    rng = np.random.default_rng(0)
    to = functools.partial(jnp.asarray, dtype=jnp.float32)
    rows, table = to(rng.normal(size=(8, 3, 16))), to(rng.normal(size=(V, 16)))
    tokens = jnp.asarray(rng.integers(0, V, (8, 3)))
    weights = to(rng.normal(size=(8, 3, top_k + 1)))
    batch = fsdp.BATCH_SPEC

    top = functools.partial(losses.top_tokens, top_k=top_k, temperature=2.0, logits_softcap=3.0)
    ids, log_probs = jax.jit(top)(rows, table)
    found_ids, found = on(mesh, top, (batch, SHARDED), batch, rows, table)
    np.testing.assert_array_equal(found_ids, ids)
    np.testing.assert_allclose(found, log_probs, rtol=1e-5, atol=1e-6)

    def loss(rows, table, tokens, ids, weights):
        of_target, [of_chosen] = losses.token_log_probs(
            rows, table, tokens, [ids], temperature=2.0, logits_softcap=3.0
        )
        return jnp.sum(of_target) + jnp.sum(of_chosen * weights)

    def parts(*args):
        value, (to_rows, to_table) = jax.value_and_grad(loss, (0, 1))(*args)
        return fsdp.total(value), to_rows, jax.lax.psum(to_table, "data")

    given = (rows, table, tokens, ids, weights)
    value, to_rows, to_table = on(
        mesh, parts, (batch, SHARDED, batch, batch, batch), (P(), batch, SHARDED), *given
    )
    expected, gradients = jax.jit(jax.value_and_grad(loss, (0, 1)))(*given)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(to_rows, gradients[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(to_table, gradients[1], rtol=1e-4, atol=1e-5)


# ---- KL ----

# Probabilities (3/4, 1/4) and (1/2, 1/2).
TEACHER, STUDENT = jnp.array([[np.log(3.0), 0]]), jnp.zeros((1, 2))
BOTH = ("teacher_first", "student_first")
BY_HAND = {
    "teacher_first": 0.75 * np.log(1.5) + 0.25 * np.log(0.5),
    "student_first": 0.5 * np.log(2 / 3) + 0.5 * np.log(2),
}


@pytest.mark.parametrize("direction", BOTH)
def test_class_and_score_kl_by_hand(direction):
    how = {"temperature": 1.0, "direction": direction}
    valid = jnp.array([True])
    of_classes = losses.class_kl(TEACHER, STUDENT, valid, **how)
    np.testing.assert_allclose(of_classes.sum, BY_HAND[direction], rtol=1e-6)
    assert of_classes.count == 1
    # sigmoid(ln 3) is 3/4.
    of_scores = losses.score_kl(TEACHER[:, 0], STUDENT[:, 0], valid, **how)
    np.testing.assert_allclose(of_scores.sum, BY_HAND[direction], rtol=1e-6)


@pytest.mark.parametrize("direction", BOTH)
def test_temperature_divides_logits_and_its_square_multiplies_the_kl(direction):
    valid = jnp.array([True])
    found = losses.class_kl(3 * TEACHER, STUDENT, valid, temperature=3.0, direction=direction)
    np.testing.assert_allclose(found.sum, 9 * BY_HAND[direction], rtol=1e-6)


def test_token_kl_of_three_outcomes_by_hand():
    teacher = jnp.log(jnp.array([[0.5, 0.25, 0.25]]))
    student = jnp.log(jnp.array([[0.25, 0.25, 0.5]]))
    for direction in BOTH:  # 1/2 ln 2 + 0 - 1/4 ln 2, either way
        found = losses.token_kl(
            teacher, student, jnp.array([True]), temperature=2.0, direction=direction
        )
        np.testing.assert_allclose(found.sum, 4 * 0.25 * LN2, rtol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("direction", BOTH)
def test_kl_and_its_gradient_are_those_of_torch(direction, temperature):
    rng = np.random.default_rng(0)
    teacher, student = (rng.normal(size=(6, 4, 5)).astype(np.float32) * 3 for _ in range(2))
    theirs = torch.tensor(student, requires_grad=True)
    p, q = torch.tensor(teacher) / temperature, theirs / temperature
    if direction == "student_first":
        p, q = q, p
    # torch's first argument is the second of KL(p || q).
    expected = temperature**2 * torch.nn.functional.kl_div(
        q.log_softmax(-1), p.log_softmax(-1), reduction="sum", log_target=True
    )
    expected.backward()

    def ours(student):
        mask = jnp.ones((6, 4), bool)
        how = {"temperature": temperature, "direction": direction}
        return losses.class_kl(jnp.asarray(teacher), student, mask, **how).sum

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(student))
    np.testing.assert_allclose(value, expected.item(), rtol=1e-5)
    np.testing.assert_allclose(gradient, theirs.grad, rtol=1e-4, atol=1e-5)


def kl_over(problem, top_k, direction):
    """Token KL of a teacher with 37 tokens that gives its `top_k`, and that of the whole."""
    how = {"temperature": 2.0, "direction": direction}

    @jax.jit
    def both(rows, table, targets):
        taught = jnp.roll(rows, 1, axis=0)
        ids, teacher = losses.top_tokens(taught, table, top_k, temperature=2.0)
        _, [student] = losses.token_log_probs(rows, table, targets.tokens, [ids], temperature=2.0)
        full = losses.class_kl(taught @ table.T, rows @ table.T, targets.mask, **how)
        return losses.token_kl(teacher, student, targets.mask, **how), full

    return both(*problem)


@pytest.mark.parametrize("direction", BOTH)
def test_all_tokens_but_one_give_the_kl_of_the_whole_vocabulary_and_fewer_less(problem, direction):
    found, full = kl_over(problem, 36, direction)
    np.testing.assert_allclose(found.sum, full.sum, rtol=1e-4)
    assert found.count == full.count == targets_of(problem)
    few, _ = kl_over(problem, 4, direction)
    fewer, _ = kl_over(problem, 2, direction)
    assert 0 < fewer.sum < few.sum < full.sum


def targets_of(problem):
    return problem[2].mask.sum()


def test_the_directions_of_a_kl_differ(problem):
    one, other = (kl_over(problem, 8, direction)[0].sum for direction in BOTH)
    assert abs(one - other) > 0.01 * one


def test_hidden_distance_is_twice_one_minus_the_cosine_whatever_the_lengths():
    x = jnp.array([[3.0, 0], [3, 0], [3, 0], [1, 1], [9, 9]])
    y = jnp.array([[7.0, 0], [0, 0.5], [-2, 0], [1, 0], [-9, 9]])
    valid = jnp.array([True, True, True, True, False])
    each = [0, 2, 4, 2 - np.sqrt(2)]
    total = losses.hidden_distance(x, y, valid)
    np.testing.assert_allclose(total.sum, sum(each), rtol=1e-5)
    assert total.count == 4


@pytest.mark.parametrize("direction", BOTH)
def test_what_is_masked_adds_nothing_to_a_kl(direction):
    how = {"temperature": 2.0, "direction": direction}
    teacher = jnp.concatenate([TEACHER, jnp.array([[50.0, -50]])])
    student = jnp.concatenate([STUDENT, jnp.array([[-50.0, 50]])])
    valid = jnp.array([True, False])
    alone = losses.class_kl(TEACHER, STUDENT, valid[:1], **how)
    found = losses.class_kl(teacher, student, valid, **how)
    assert (found.sum, found.count) == (alone.sum, alone.count)
    of_scores = losses.score_kl(teacher[:, 0], student[:, 0], valid, **how)
    np.testing.assert_allclose(
        of_scores.sum, losses.score_kl(TEACHER[:, 0], STUDENT[:, 0], valid[:1], **how).sum
    )
    nothing = losses.token_kl(teacher, student, jnp.zeros(2, bool), **how)
    assert (nothing.sum, nothing.count, nothing.mean) == (0, 0, 0)


def test_exit_weights_by_hand():
    np.testing.assert_allclose(
        losses.exit_weights(LossConfig(), (8, 13, 18, 26)), np.array([8, 13, 18, 26]) / 65
    )
    given = LossConfig(exit_weights=(1.0, 0.0, 3.0))
    np.testing.assert_allclose(losses.exit_weights(given, (1, 2, 3)), [0.25, 0, 0.75])


# ---- Labels and scores ----


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


def test_prototype_cross_entropy_by_hand():
    # Ten times the cosine is the logit: ln 3 has 3/4, for the summary and against it.
    cosine = jnp.array([np.log(3.0) / 10, np.log(3.0) / 10, 0.0, -1.0])
    total = losses.prototype_cross_entropy(
        cosine, jnp.array([1, 0, 1, 1]), jnp.array([True, True, True, False])
    )
    np.testing.assert_allclose(total.sum, np.log(4 / 3) + np.log(4) + LN2, rtol=1e-6)
    assert total.count == 3


def test_a_prototype_is_drawn_to_the_summary_and_away_from_the_others():
    def loss(cosine):
        return losses.prototype_cross_entropy(cosine, jnp.array([1, 0]), jnp.ones(2, bool)).sum

    # 10 (1/2 - 1) and 10 (1/2 - 0).
    np.testing.assert_allclose(jax.grad(loss)(jnp.zeros(2)), [-5, 5], rtol=1e-6)


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
