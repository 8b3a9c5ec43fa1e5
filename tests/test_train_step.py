"""One update: what it counts, what moves, and that splitting a batch does not change it."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from deevisum_jax import config as config_lib
from deevisum_jax import optim, sharding, train_step
from deevisum_jax.config import DistillConfig, LossConfig, OptimConfig
from deevisum_jax.distill import objective, teachers
from deevisum_jax.models import paligemma2
from deevisum_jax.typing import TeacherOutputs
from tests.batches import B, make_batch

MODEL = paligemma2.get_config("tiny", exit_layers=(2, 4))
LOSS = LossConfig(token=0.5, class_=2.0, score=3.0, prototype=4.0)
# Of what exits learn from labels.
WEIGHTS = {"class": 2.0, "score": 3.0, "prototype": 4.0}
# Adds the gradient to the parameters, so that it can be read off.
GRADIENT = optax.scale(1.0)
NUM_TARGETS = 4  # the longest suffix


@pytest.fixture(scope="module")
def params():
    return jax.jit(paligemma2.init_params, static_argnums=0)(MODEL, jax.random.key(0))


def step_fn(model=MODEL, tx=GRADIENT, loss=LOSS, **kwargs):
    return jax.jit(
        train_step.make_train_step(
            model, loss, tx, lambda _: 0.25, num_targets=NUM_TARGETS, **kwargs
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
        *(f"loss/{part}/exit_{layer}" for part in WEIGHTS for layer in (2, 4)),
        "loss/total",
        "grad_norm",
        "param_norm",
        "learning_rate",
    }
    # Exits weigh as their depth: 2 / 6 and 4 / 6.
    expected = 0.5 * metrics["loss/token"] + sum(
        weight * layer / 6 * metrics[f"loss/{part}/exit_{layer}"]
        for part, weight in WEIGHTS.items()
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
    mixed = jax.tree.map(
        lambda ours, theirs: np.where(
            batch.valid.reshape(-1, *[1] * (ours.ndim - 1)), ours, theirs
        ),
        batch,
        dataclasses.replace(other, valid=batch.valid),
    )
    mixed = dataclasses.replace(mixed, tokens=np.where(pads, 77, mixed.tokens))
    expected, expected_metrics = gradient(plain, params, batch)
    found, metrics = gradient(plain, params, mixed)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_nothing_to_count_gives_a_loss_of_zero(plain, params):
    batch = dataclasses.replace(make_batch(), valid=np.zeros(B, bool))
    found, metrics = gradient(plain, params, batch)
    assert metrics["loss/total"] == 0
    assert metrics["grad_norm"] == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))


def test_prototypes_learn_and_move_nothing_else(params):
    alone = LossConfig(token=0.0, class_=0.0, score=0.0, prototype=1.0)
    found, _ = gradient(step_fn(loss=alone), params, make_batch())
    found = flatten_dict(found, sep="/")
    for row in found.pop("exits/prototype"):
        assert (row != 0).all()
    for path, leaf in found.items():
        np.testing.assert_array_equal(leaf, 0, err_msg=path)


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


# ---- With teachers ----

REPO = pathlib.Path(__file__).resolve().parent.parent
TEACHERS = {
    "mentor": paligemma2.get_config("tiny", exit_layers=(3,), llm={"depth": 3, "width": 48}),
    "teacher": paligemma2.get_config("tiny", exit_layers=(1, 2), llm={"depth": 2, "width": 64}),
}


def make_distill(**fields) -> objective.Distillation:
    """All that can be learned, from two teachers."""
    everything = {"phi": 0.5, "psi": 0.25, "hidden": 0.3, "exits": 0.2, "top_k": 8}
    config = dataclasses.replace(
        config_lib.from_file(str(REPO / "configs" / "tiny.py")),
        stages=("teacher", "mentor", "student"),
        stage="student",
        distill=DistillConfig(**everything | fields),
    )
    return objective.make(config, MODEL, TEACHERS)


@pytest.fixture(scope="module")
def teacher_params():
    init = jax.jit(paligemma2.init_params, static_argnums=0)
    return {name: init(config, jax.random.key(7)) for name, config in TEACHERS.items()}


@pytest.fixture(scope="module")
def student(params):
    """A student's parameters, with projections to its teachers' widths."""
    projections = objective.init_projections(make_distill(), MODEL, jax.random.key(1))
    return params | {optim.PROJECTIONS: projections}


def online_step(**kwargs):
    return step_fn(distill=make_distill(source="online"), **kwargs)


@pytest.fixture(scope="module")
def online(student, teacher_params):
    """Gradient and metrics of a student whose teachers run beside it."""
    state, metrics = online_step()(
        train_step.init_state(student, GRADIENT), make_batch(), teacher_params
    )
    return jax.tree.map(jnp.subtract, state.params, student), metrics


def assert_same(found, expected):
    """Both gradient and metrics."""
    (gradient, metrics), (expected_gradient, expected_metrics) = found, expected
    assert metrics.keys() == expected_metrics.keys()
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=1e-5, err_msg=name)
    scale = optax.tree.norm(expected_gradient, ord=jnp.inf)
    for path, leaf in flatten_dict(gradient, sep="/").items():
        theirs = flatten_dict(expected_gradient, sep="/")[path]
        np.testing.assert_allclose(leaf / scale, theirs / scale, atol=1e-5, err_msg=path)


def test_the_total_is_the_weighted_sum_of_all_that_is_learned(online):
    gradient, metrics = online
    parts = make_distill().parts
    assert {part.name for part in parts} < set(metrics)
    expected = 0.5 * metrics["loss/token"] + sum(
        weight * layer / 6 * metrics[f"loss/{part}/exit_{layer}"]
        for part, weight in WEIGHTS.items()
        for layer in (2, 4)
    )
    expected += sum(part.weight * metrics[part.name] for part in parts)
    np.testing.assert_allclose(metrics["loss/total"], expected, rtol=1e-6)
    assert all(metrics[part.name] > 0 for part in parts)
    for name in TEACHERS:
        assert (gradient["distill"][name]["kernel"] != 0).all()


def test_cached_teachers_give_the_losses_of_those_online(student, teacher_params, online):
    distill = make_distill(source="cache")
    batch = make_batch()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    said = {}
    for teacher in distill.teachers:
        params = teacher_params[teacher.name]
        with jax.set_mesh(mesh):
            ask = teachers.make_teacher_fn(
                teacher.model_config,
                sharding.param_shardings(params, mesh),
                mesh,
                teacher.asked,
                num_targets=NUM_TARGETS,
            )
            said[teacher.name] = jax.device_get(ask(params, batch))
    cached = step_fn(distill=distill)
    with_said = dataclasses.replace(batch, teachers=said)
    found = gradient(cached, student, with_said)
    assert_same(found, online)

    # Rows that fill up a batch: a cache knows nothing of them.
    blank = jax.tree.map(
        lambda a: np.where(batch.valid.reshape(-1, *[1] * (a.ndim - 1)), a, 0), said
    )
    assert_same(gradient(cached, student, dataclasses.replace(batch, teachers=blank)), online)


def test_teachers_of_microbatches_on_eight_devices_give_the_whole_gradient(
    student, teacher_params, online
):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    state = train_step.init_state(student, GRADIENT)
    shardings = train_step.state_shardings(state, GRADIENT, mesh)
    of_teachers = {
        name: sharding.param_shardings(params, mesh) for name, params in teacher_params.items()
    }
    step = train_step.make_train_step(
        MODEL,
        LOSS,
        GRADIENT,
        lambda _: 0.25,
        num_targets=NUM_TARGETS,
        accumulate_steps=2,
        distill=make_distill(source="online"),
    )
    with jax.set_mesh(mesh):
        update = train_step.jit(step, shardings, mesh, of_teachers)
        new, metrics = update(
            jax.device_put(jax.tree.map(np.asarray, state), shardings),
            jax.device_put(make_batch(), sharding.batch_sharding(mesh)),
            jax.device_put(teacher_params, of_teachers),
        )
    moved = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), new.params, student)
    assert_same((moved, metrics), online)


def test_all_positions_leave_the_token_loss_as_it_is(plain, params, teacher_params):
    distill = make_distill(positions="all", psi=0.0, hidden=0.0, exits=0.0)
    batch = make_batch()

    def parts(params, teacher_params):
        batch = teachers.ask(
            distill.teachers, teacher_params, make_batch(), num_targets=NUM_TARGETS
        )
        model = paligemma2.bind(MODEL, params)
        return train_step.compute_losses(model, batch, LOSS, NUM_TARGETS, distill)[0]

    found = jax.jit(parts)(params, {"mentor": teacher_params["mentor"]})
    _, metrics = gradient(plain, params, batch)
    np.testing.assert_allclose(found["loss/token"].mean, metrics["loss/token"], rtol=1e-5)
    assert found["loss/token"].count == batch.mask_loss[:6].sum()
    # Of 6 rows all real tokens but the first.
    assert found["loss/kl/mentor/token"].count == batch.mask_input[:6].sum() - 6


def test_cached_teachers_add_no_matrix_product(plain, params):
    """Both share the student's one pass over the vocabulary."""
    shape = jax.ShapeDtypeStruct
    said = TeacherOutputs(
        class_logits=shape((B, 2), jnp.float32),
        importance=shape((B,), jnp.float32),
        token_ids=shape((B, NUM_TARGETS, 8), jnp.int32),
        token_log_probs=shape((B, NUM_TARGETS, 9), jnp.float32),
    )
    distill = make_distill(source="cache", hidden=0.0)
    batch = dataclasses.replace(make_batch(), teachers=dict.fromkeys(TEACHERS, said))
    state = train_step.init_state(params, GRADIENT)
    with_teachers = step_fn(distill=distill).lower(state, batch).as_text()
    without = plain.lower(state, make_batch()).as_text()
    assert with_teachers.count("dot_general") == without.count("dot_general") > 0
