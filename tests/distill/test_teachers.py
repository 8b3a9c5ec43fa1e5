"""What a teacher answers, where, and that nothing flows back to it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deevisum_jax import sharding
from deevisum_jax.distill import teachers
from deevisum_jax.models import masks, paligemma2
from deevisum_jax.typing import Batch
from tests.batches import B, make_batch

MODEL = paligemma2.get_config("tiny", exit_layers=(1, 2), llm={"depth": 2})
R = 3
T = R + 6  # of tests.batches
ALL = teachers.Asked(positions="suffix", top_k=5, temperature=2.0, layers=(2, 1, 2))
SCORES_ALONE = teachers.Asked(positions="suffix", top_k=0, temperature=2.0, layers=())


@pytest.fixture(scope="module")
def params():
    return jax.jit(paligemma2.init_params, static_argnums=0)(MODEL, jax.random.key(0))


@pytest.fixture(scope="module")
def answer(params):
    ask = lambda params, batch: teachers.outputs(
        paligemma2.bind(MODEL, params), batch, ALL, num_targets=R
    )
    return jax.jit(ask)(params, make_batch(longest=R))


def test_positions_are_the_suffix_or_all_real_tokens_that_something_predicts():
    # [BOS, 7, "\n", yes, EOS, pad], and a row that fills up the batch.
    fields = {field.name: None for field in dataclasses.fields(Batch)}
    batch = Batch(
        **fields
        | {
            "tokens": jnp.array([[2, 7, 3, 8, 1, 0]] * 2),
            "mask_input": jnp.array([[True, True, True, True, True, False]] * 2),
            "mask_loss": jnp.array([[False, False, False, True, True, False]] * 2),
            "valid": jnp.array([True, False]),
        }
    )
    suffix = teachers.find_targets(batch, "suffix", 3)
    np.testing.assert_array_equal(suffix.positions[0, :2], [2, 3])
    np.testing.assert_array_equal(suffix.tokens[0, :2], [8, 1])
    np.testing.assert_array_equal(suffix.mask, [[1, 1, 0], [0, 0, 0]])
    everything = teachers.find_targets(batch, "all", 3)
    np.testing.assert_array_equal(everything.positions[0], [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(everything.tokens[0, :4], [7, 3, 8, 1])
    np.testing.assert_array_equal(everything.mask, [[1, 1, 1, 1, 0], [0, 0, 0, 0, 0]])


def test_the_answer_is_what_the_model_says_at_its_depth(params, answer):
    batch = make_batch(longest=R)

    @jax.jit
    def plainly(params):
        model = paligemma2.bind(MODEL, params)
        embedded = model.embed(batch.frames, batch.tokens, batch.mask_ar, batch.mask_input)
        embedded, hidden = model.run_layers(embedded, collect=lambda x: x)
        logits = model.logits(model.llm.final_norm(embedded.x))
        last = masks.last_prefix_position(embedded.mask_ar, embedded.mask_input)
        return model.score(batch), logits, hidden, last

    scores, logits, hidden, last = plainly(params)
    np.testing.assert_allclose(answer.class_logits, scores.class_logits[-1], atol=1e-5)
    np.testing.assert_allclose(answer.importance, scores.importance[-1], atol=1e-5)
    own = np.stack([hidden[layer - 1, np.arange(B), last] for layer in (2, 1, 2)], axis=1)
    np.testing.assert_allclose(answer.hidden, own, atol=1e-5)

    # Row b's suffix starts at text position 4, which position 3 predicts.
    of_text = np.asarray(logits[:, -T:])
    for b in range(6):
        for r in range(batch.mask_loss[b].sum()):
            probs = np.asarray(jax.nn.softmax(of_text[b, 3 + r] / 2.0))
            order = np.argsort(-probs)
            np.testing.assert_array_equal(answer.token_ids[b, r], order[:5])
            expected = [*probs[order[:5]], probs[order[5:]].sum()]
            np.testing.assert_allclose(np.exp(answer.token_log_probs[b, r]), expected, rtol=1e-4)
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(answer))


def test_what_is_not_asked_for_is_not_there(params, answer):
    ask = jax.jit(
        lambda params, batch: teachers.outputs(
            paligemma2.bind(MODEL, params), batch, SCORES_ALONE, num_targets=R
        )
    )
    found = ask(params, make_batch(longest=R))
    assert (found.token_ids, found.token_log_probs, found.hidden) == (None, None, None)
    np.testing.assert_allclose(found.class_logits, answer.class_logits, atol=1e-5)


def test_no_gradient_reaches_a_teacher(params):
    def loss(params):
        said = teachers.outputs(
            paligemma2.bind(MODEL, params), make_batch(longest=R), ALL, num_targets=R
        )
        return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(said))

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert value != 0
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize("sizes", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 8}])
def test_eight_devices_answer_as_one_does(params, answer, sizes):
    mesh = sharding.make_mesh(**sizes)
    shardings = sharding.param_shardings(params, mesh)
    with jax.set_mesh(mesh):
        ask = teachers.make_teacher_fn(MODEL, shardings, mesh, ALL, num_targets=R)
        batch = jax.device_put(make_batch(longest=R), sharding.batch_sharding(mesh))
        found = ask(jax.device_put(params, shardings), batch)
    np.testing.assert_array_equal(found.token_ids, answer.token_ids)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), found, answer)
