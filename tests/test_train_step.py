"""One update: what it counts, what moves, and that splitting a batch does not change it."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from deevisum_jax import optim, sharding, train_step
from deevisum_jax.config import LossConfig, OptimConfig
from deevisum_jax.models import paligemma2
from deevisum_jax.typing import Batch

MODEL = paligemma2.get_config("tiny", exit_layers=(2, 4))
LOSS = LossConfig(token=0.5, class_=2.0, score=3.0)
# Adds the gradient to the parameters, so that it can be read off.
GRADIENT = optax.scale(1.0)
B, T = 8, 10
NUM_TARGETS = 4  # the longest suffix


def make_batch(seed: int = 0) -> Batch:
    """Prefixes of 4 tokens, suffixes of 1 to 4, then pads; the last two rows are padding."""
    rng = np.random.default_rng(seed)
    ends = 4 + rng.integers(1, 5, (B, 1))
    position = np.arange(T)[None]
    return Batch(
        frames=rng.integers(0, 256, (B, 1, 28, 28, 3)).astype(np.uint8),
        tokens=rng.integers(2, 512, (B, T)).astype(np.int32),
        mask_ar=np.broadcast_to(position >= 4, (B, T)),
        mask_input=position < ends,
        mask_loss=(position >= 4) & (position < ends),
        label=rng.integers(0, 2, B).astype(np.int32),
        score=rng.uniform(size=B).astype(np.float32),
        video_id=np.zeros(B, np.int32),
        segment=np.arange(B, dtype=np.int32),
        valid=np.arange(B) < 6,
    )


@pytest.fixture(scope="module")
def params():
    return jax.jit(paligemma2.init_params, static_argnums=0)(MODEL, jax.random.key(0))


def step_fn(model=MODEL, tx=GRADIENT, **kwargs):
    return jax.jit(
        train_step.make_train_step(
            model, LOSS, tx, lambda _: 0.25, num_targets=NUM_TARGETS, **kwargs
        )
    )


@pytest.fixture(scope="module")
def plain():
    return step_fn()


def gradient(update, params, batch):
    state, metrics = update(train_step.init_state(params, GRADIENT), batch)
    return jax.tree.map(jnp.subtract, state.params, params), metrics


def test_metrics_name_every_part_and_the_total_is_their_weighted_sum(plain, params):
    state, metrics = plain(train_step.init_state(params, GRADIENT), make_batch())
    assert set(metrics) == {
        "loss/token",
        *(f"loss/{part}/exit_{layer}" for part in ("class", "score") for layer in (2, 4)),
        "loss/total",
        "grad_norm",
        "param_norm",
        "learning_rate",
    }
    # Exits weigh as their depth: 2 / 6 and 4 / 6.
    expected = 0.5 * metrics["loss/token"] + sum(
        weight * layer / 6 * metrics[f"loss/{part}/exit_{layer}"]
        for part, weight in (("class", 2.0), ("score", 3.0))
        for layer in (2, 4)
    )
    np.testing.assert_allclose(metrics["loss/total"], expected, rtol=1e-6)
    assert metrics["learning_rate"] == 0.25
    assert state.step == 1
    moved = jax.tree.map(jnp.subtract, state.params, params)
    np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(moved), rtol=1e-4)
    np.testing.assert_allclose(metrics["param_norm"], optax.tree.norm(state.params), rtol=1e-6)


def test_accumulation_gives_the_unsplit_gradient(plain, params):
    # The microbatches hold different numbers of target tokens and of valid rows.
    batch = dataclasses.replace(make_batch(), valid=np.array([1, 1, 1, 0, 1, 0, 1, 0], bool))
    expected, expected_metrics = gradient(plain, params, batch)
    found, metrics = gradient(step_fn(accumulate_steps=4), params, batch)
    scale = optax.tree.norm(expected, ord=jnp.inf)
    # In float32 either is within 2.1e-6 of the gradient in float64.
    for path, leaf in flatten_dict(found, sep="/").items():
        np.testing.assert_allclose(
            leaf / scale, flatten_dict(expected, sep="/")[path] / scale, atol=4.2e-6, err_msg=path
        )
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-5, err_msg=name)


def test_padding_rows_and_pads_change_nothing(plain, params):
    batch, other = make_batch(), make_batch(seed=1)
    pads = ~np.asarray(batch.mask_input)
    mixed = {
        field.name: np.where(
            batch.valid.reshape(-1, *[1] * (np.ndim(getattr(batch, field.name)) - 1)),
            getattr(batch, field.name),
            getattr(other, field.name),
        )
        for field in dataclasses.fields(Batch)
    }
    mixed["tokens"] = np.where(pads, 77, mixed["tokens"])
    expected, expected_metrics = gradient(plain, params, batch)
    found, metrics = gradient(plain, params, Batch(**mixed))
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_nothing_to_count_gives_a_loss_of_zero(plain, params):
    batch = dataclasses.replace(make_batch(), valid=np.zeros(B, bool))
    found, metrics = gradient(plain, params, batch)
    assert metrics["loss/total"] == 0
    assert metrics["grad_norm"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_frozen_parameters_do_not_move_and_have_no_optimizer_state(params):
    tx = optim.make_optimizer(OptimConfig(learning_rate=0.1, weight_decay=0.5), lambda _: 0.1)
    state = train_step.init_state(params, tx, frozen=("img/.*", "llm/.*"))
    assert set(state.params) == {"exits"}
    assert set(state.frozen) == {"img", "llm"}
    held = sum(leaf.size for leaf in jax.tree.leaves(state.opt_state))
    heads = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert held == pytest.approx(2 * heads, abs=2)  # two moments, and two counters
    new, metrics = step_fn(tx=tx)(state, make_batch())
    jax.tree.map(np.testing.assert_array_equal, new.frozen, state.frozen)
    for path, leaf in flatten_dict(new.params, sep="/").items():
        assert (leaf != flatten_dict(state.params, sep="/")[path]).any(), path
    assert metrics["grad_norm"] > 0


def total_loss(model, params):
    def loss(params, batch):
        parts, weights = train_step.compute_losses(
            paligemma2.bind(model, params), batch, LOSS, NUM_TARGETS
        )
        return sum(weights[name] * part.mean for name, part in parts.items())

    return jax.jit(loss)(params, make_batch())


def test_bfloat16_compute_gives_nearly_the_same_loss(params):
    expected = total_loss(MODEL, params)
    found = total_loss(dataclasses.replace(MODEL, dtype="bfloat16"), params)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, rtol=2e-2)
    assert found != expected  # it was switched on


def test_rematerialisation_gives_the_same_loss_and_gradient(plain, params):
    expected, expected_metrics = gradient(plain, params, make_batch())
    model = dataclasses.replace(MODEL, remat_policy="nothing_saveable")
    found, metrics = gradient(step_fn(model), params, make_batch())
    np.testing.assert_allclose(metrics["loss/total"], expected_metrics["loss/total"], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_exit_weights_by_hand():
    np.testing.assert_allclose(
        train_step.exit_weights(LossConfig(), (8, 13, 18, 26)), np.array([8, 13, 18, 26]) / 65
    )
    given = LossConfig(exit_weights=(1.0, 0.0, 3.0))
    np.testing.assert_allclose(train_step.exit_weights(given, (1, 2, 3)), [0.25, 0, 0.75])


def test_moments_live_beside_their_parameters():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    tx = optim.make_optimizer(OptimConfig(learning_rate=0.1), lambda _: 0.1)
    state = jax.eval_shape(
        lambda key: train_step.init_state(paligemma2.init_params(MODEL, key), tx, ("img/.*",)),
        jax.random.key(0),
    )
    where = train_step.state_shardings(state, tx, mesh)
    assert jax.tree.structure(where) == jax.tree.structure(state)
    moments = optax.tree.get(where.opt_state, "mu")
    assert flatten_dict(moments) == flatten_dict(where.params)
    embedding = where.params["llm"]["embedder"]["input_embedding"]
    assert embedding.spec == jax.sharding.PartitionSpec(("tensor",), sharding.FSDP_AXES)
    assert where.step.spec == jax.sharding.PartitionSpec()
    assert set(where.frozen) == {"img"}
