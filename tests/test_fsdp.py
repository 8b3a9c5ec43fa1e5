"""Parameters in shards: the same numbers as whole ones, and what travels between devices."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from deevisum_jax import fsdp, losses, optim, sharding, train_step
from deevisum_jax.config import LossConfig
from deevisum_jax.models import paligemma2
from deevisum_jax.typing import Batch

AXES = (*sharding.BATCH_AXES, "tensor")
# Devices along data, along the up to three rings of fsdp, and along tensor.
MESHES = [(1, 8, 1, 1, 1), (1, 2, 4, 1, 1), (2, 2, 2, 1, 1), (1, 2, 2, 2, 1), (2, 2, 1, 1, 2)]
SHARDED = P(sharding.FSDP_AXES)


def make_mesh(sizes):
    axis_types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return Mesh(np.array(jax.devices()).reshape(sizes), AXES, axis_types=axis_types)


@pytest.fixture(params=MESHES, ids=lambda sizes: "x".join(map(str, sizes)))
def mesh(request):
    return make_mesh(request.param)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def on(mesh, fn, in_specs, out_specs, *args):
    with jax.set_mesh(mesh):
        return jax.jit(lambda *args: fsdp.per_device(fn, in_specs, out_specs)(*args))(*args)


def test_the_axes_that_the_model_gathers_by_are_those_of_the_table(monkeypatch):
    """Every weight that a step gathers, against its row of `sharding.PARAM_AXES`."""
    rows = {axes for _, axes in sharding.PARAM_AXES}
    # Halves of a pair, and layers of a stack, are gathered one at a time.
    rows |= {tuple(a for a in axes if a not in ("layers", "qkv")) for axes in rows}
    seen = set()
    matrix = fsdp.matrix

    def spy(weight, *axes, dtype):
        seen.add(axes)
        return matrix(weight, *axes, dtype=dtype)

    monkeypatch.setattr(fsdp, "matrix", spy)
    params = paligemma2.abstract_params(MODEL)
    jax.eval_shape(lambda p, b: paligemma2.bind(MODEL, p).score(b), params, make_batch())
    assert len(seen) >= 6
    assert seen <= rows


def test_rings_are_gathered_together_up_to_a_number_of_chips():
    axes = [("z", 4), ("y", 4), ("x", 4)]
    assert fsdp._rings(axes, at_once=32) == [axes[:2], axes[2:]]
    assert fsdp._rings(axes, at_once=64) == [axes]
    assert fsdp._rings(axes, at_once=8) == [[axis] for axis in axes]
    assert fsdp._rings([], at_once=32) == []


@pytest.mark.parametrize(
    ("axes", "shape", "spec"),
    [
        (("heads", "embed", "head_dim"), (2, 16, 3), P(None, sharding.FSDP_AXES)),
        (("mlp", "embed"), (6, 16), P(None, sharding.FSDP_AXES)),
        (("embed", "mlp"), (16, 6), SHARDED),
    ],
)
@pytest.mark.parametrize("at_once", [1, 4, 32])
def test_a_gathered_weight_is_whole_with_embed_in_front(
    mesh, axes, shape, spec, at_once, monkeypatch
):
    monkeypatch.setattr(fsdp, "_GATHERED_AT_ONCE", at_once)
    weight = normal(0, *shape)
    gather = lambda weight: fsdp.matrix(weight, *axes, dtype=jnp.float32)
    expected = np.moveaxis(weight, axes.index("embed"), 0).reshape(16, -1)
    np.testing.assert_array_equal(gather(weight), expected)  # outside of any mesh
    np.testing.assert_array_equal(on(mesh, gather, (spec,), P(), weight), expected)


def test_the_gradient_of_a_gathered_weight_is_the_sum_over_all_rows(mesh):
    x, weight = normal(0, 8, 16), normal(1, 16, 6)

    def loss(weight, x):
        return jnp.sum(jnp.sin(x @ fsdp.matrix(weight, "embed", "mlp", dtype=jnp.float32)))

    def gradient(weight, x):
        # As `llm/layers/mlp/linear`'s are: split over fsdp, one and the same along data.
        return jax.lax.psum(jax.grad(loss)(weight, x), "data")

    found = on(mesh, gradient, (SHARDED, fsdp.BATCH_SPEC), SHARDED, weight, x)
    np.testing.assert_allclose(found, jax.grad(loss)(weight, x), rtol=1e-5, atol=1e-5)


def test_gathered_weights_travel_in_the_compute_dtype():
    weight, x = normal(0, 16, 6), normal(1, 8, 16).astype(jnp.bfloat16)

    def loss(weight, x):
        y = x @ fsdp.matrix(weight, "embed", "mlp", dtype=jnp.bfloat16)
        return jnp.sum(y.astype(jnp.float32))

    with jax.set_mesh(make_mesh(MESHES[0])):
        gradient = fsdp.per_device(jax.grad(loss), (SHARDED, fsdp.BATCH_SPEC), SHARDED)
        program = str(jax.make_jaxpr(gradient)(weight, x))
    assert re.findall(r"(\w+)\[16,6\]\S* = all_gather", program) == ["bf16"]
    assert re.findall(r"(\w+)\[2,6\]\S* = reduce_scatter", program) == ["bf16"]


def test_lookup_gives_rows_of_the_table_and_adds_their_gradients(mesh):
    table, tokens = normal(0, 11, 16), np.arange(16).reshape(8, 2) % 11

    def loss(table, tokens):
        return jnp.sum(jnp.sin(fsdp.lookup(table, tokens, jnp.float32)))

    split = (P(None, sharding.FSDP_AXES), fsdp.BATCH_SPEC)
    look = lambda table, tokens: fsdp.lookup(table, tokens, jnp.float32)
    np.testing.assert_array_equal(
        on(mesh, look, split, fsdp.BATCH_SPEC, table, tokens), np.asarray(table)[tokens]
    )
    gradient = lambda *args: jax.lax.psum(jax.grad(loss)(*args), "data")
    np.testing.assert_allclose(
        on(mesh, gradient, split, split[0], table, tokens),
        jax.grad(loss)(table, tokens),
        rtol=1e-5,
        atol=1e-6,
    )


def test_columns_of_a_table_become_rows_and_the_last_are_filled_up():
    table = normal(0, 11, 16)  # 11 rows on 8 devices: 2 each, 5 of nothing
    rows = lambda table: fsdp.rows_of_columns(table, jnp.float32)
    np.testing.assert_array_equal(rows(table), table)
    for sizes in MESHES[:2]:
        found = on(make_mesh(sizes), rows, (P(None, sharding.FSDP_AXES),), SHARDED, table)
        np.testing.assert_array_equal(found, np.pad(table, [(0, 5), (0, 0)]))


@pytest.mark.parametrize("cap", [0.0, 3.0])
# Neither is divided by any mesh; of 5 tokens some devices have none.
@pytest.mark.parametrize("V", [37, 5])
def test_token_loss_with_a_split_vocabulary_is_that_of_the_whole(mesh, V, cap):
    rows, table = normal(0, 8, 3, 16), normal(1, V, 16)
    tokens = np.random.default_rng(2).integers(0, V, (8, 3))
    mask = np.arange(24).reshape(8, 3) % 4 > 0

    def loss(rows, table, tokens, mask):
        log_probs, _ = losses.token_log_probs(rows, table, tokens, logits_softcap=cap)
        return losses.token_cross_entropy(log_probs, mask).sum

    def parts(rows, table, tokens, mask):
        value, (to_rows, to_table) = jax.value_and_grad(loss, (0, 1))(rows, table, tokens, mask)
        return fsdp.total(value), to_rows, jax.lax.psum(to_table, "data")

    batch, columns = fsdp.BATCH_SPEC, P(None, sharding.FSDP_AXES)
    value, to_rows, to_table = on(
        mesh,
        parts,
        (batch, columns, batch, batch),
        (P(), batch, columns),
        rows,
        table,
        tokens,
        mask,
    )
    expected, gradients = jax.value_and_grad(loss, (0, 1))(rows, table, tokens, mask)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for found, gradient in zip((to_rows, to_table), gradients, strict=True):
        np.testing.assert_allclose(found, gradient, rtol=1e-5, atol=1e-6)


# ---- The whole step ----

MODEL = paligemma2.get_config("tiny", exit_layers=(2, 4), remat_policy="nothing_saveable")
PLAIN = optax.sgd(1.0)  # the update is the gradient


def make_batch(B=16, T=7):
    rng, position = np.random.default_rng(0), np.arange(T)
    return Batch(
        frames=rng.integers(0, 256, (B, 1, 28, 28, 3)).astype(np.uint8),
        tokens=rng.integers(2, 512, (B, T)).astype(np.int32),
        mask_ar=np.broadcast_to(position >= 4, (B, T)),
        mask_input=np.ones((B, T), bool),
        mask_loss=np.broadcast_to(position >= 4, (B, T)),
        label=rng.integers(0, 2, B).astype(np.int32),
        score=rng.uniform(size=B).astype(np.float32),
        video_id=np.zeros(B, np.int32),
        segment=np.arange(B, dtype=np.int32),
        valid=np.arange(B) < 13,
    )


def step_of(**kwargs):
    return train_step.make_train_step(
        MODEL, LossConfig(), PLAIN, lambda _: 1.0, num_targets=4, **kwargs
    )


@pytest.fixture(scope="module")
def state():
    params = jax.jit(paligemma2.init_params, static_argnums=0)(MODEL, jax.random.key(0))
    return jax.tree.map(np.asarray, train_step.init_state(params, PLAIN, ("llm/embedder/.*",)))


@pytest.fixture(scope="module")
def plain(state):
    return jax.jit(step_of())(state, make_batch())


@pytest.mark.parametrize("accumulate_steps", [1, 2])
@pytest.mark.parametrize("sizes", MESHES[1:], ids=lambda sizes: "x".join(map(str, sizes)))
def test_a_step_on_any_mesh_is_the_step_on_one_device(state, plain, sizes, accumulate_steps):
    mesh = make_mesh(sizes)
    shardings = train_step.state_shardings(state, PLAIN, mesh)
    step = train_step.jit(step_of(accumulate_steps=accumulate_steps), shardings, mesh)
    with jax.set_mesh(mesh):
        batch = jax.device_put(make_batch(), sharding.batch_sharding(mesh))
        found, metrics = step(jax.device_put(state, shardings), batch)
    expected, expected_metrics = plain
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=2e-5, err_msg=name)
    before = optim.merge(state.params, state.frozen)
    for ours, theirs, old in zip(
        jax.tree.leaves(optim.merge(found.params, found.frozen)),
        jax.tree.leaves(optim.merge(expected.params, expected.frozen)),
        jax.tree.leaves(before),
        strict=True,
    ):
        np.testing.assert_allclose(ours - old, theirs - old, rtol=1e-4, atol=1e-5)


def test_gradients_of_weights_are_scattered_and_never_reduced_whole(state):
    mesh = make_mesh((1, 2, 4, 1, 1))
    shardings = train_step.state_shardings(state, PLAIN, mesh)
    with jax.set_mesh(mesh):
        text = train_step.jit(step_of(), shardings, mesh).lower(state, make_batch()).as_text()
    assert text.count("stablehlo.reduce_scatter") > 20
    reduced = re.findall(r'"stablehlo\.all_reduce".*?\) -> tensor<([\dx]*)f32>', text, re.DOTALL)
    sizes = [np.prod([int(n) for n in dims.split("x") if n] or [1]) for dims in reduced]
    # The largest of what every device holds: position table and patch kernel, 14 * 14 * 3 * 16.
    assert max(sizes) <= 14 * 14 * 3 * 16
