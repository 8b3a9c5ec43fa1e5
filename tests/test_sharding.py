"""Placement on eight simulated devices."""

import dataclasses

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deevisum_jax import sharding
from deevisum_jax.config import LoraConfig, MergeConfig
from deevisum_jax.errors import UserError
from deevisum_jax.models import two_towers
from deevisum_jax.models.paligemma2 import VARIANTS, abstract_params, bind, get_config, init_params
from deevisum_jax.typing import Batch

CONFIG = get_config("tiny", exit_layers=(2, 4), remat_policy="nothing_saveable")
QLORA = LoraConfig(rank=8, towers=("llm", "img"), base="nf4")


def make_batch(B=8, T=6):
    rng = np.random.default_rng(0)
    unread = dict.fromkeys(("mask_loss", "label", "score", "video_id", "segment", "valid"))
    return Batch(
        frames=rng.integers(0, 256, (B, 1, 28, 28, 3)).astype(np.uint8),
        tokens=rng.integers(2, 512, (B, T)).astype(np.int32),
        mask_ar=np.broadcast_to(np.arange(T) >= 4, (B, T)),
        mask_input=np.ones((B, T), bool),
        **unread,
    )


def loss(params, batch):
    """Touches everything: exits, tied logits, both towers."""
    model = bind(CONFIG, params)
    out = model(batch)
    suffix = model.logits(out.pre_logits[:, -2:])
    return (
        (out.exits.class_logits**2).mean()
        + (out.exits.importance**2).mean()
        + (out.exits.cosine**2).mean()
        + (jax.nn.logsumexp(suffix, axis=-1).mean())
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_matches_exactly_one_row(name):
    params = abstract_params(get_config(name, exit_layers=(1, 2)))
    paths = []
    for path, leaf in jax.tree.leaves_with_path(params):
        paths.append(jax.tree_util.keystr(path, simple=True, separator="/"))
        assert len(sharding.logical_axes(paths[-1], leaf.ndim)) == leaf.ndim
    assert len(paths) == 40


@pytest.mark.parametrize("base", [None, "int8", "nf4"])
def test_every_adapter_code_and_scale_matches_exactly_one_row(base):
    lora = dataclasses.replace(QLORA, base=base)
    params = abstract_params(get_config("paligemma2_3b", exit_layers=(1, 2), lora=lora))
    paths = [path for path, leaf in sharding._leaves(params)]
    for path, leaf in sharding._leaves(params):
        assert len(sharding.logical_axes(path, leaf.ndim)) == leaf.ndim
    # Of five arrays of the language model's and three of SigLIP's, two each; and five of scales.
    assert len(paths) == 40 + 2 * 8 + 5 * (base is not None)
    codes = [path for path in paths if path.endswith("/qvalue")]
    assert len(codes) == 5 * (base is not None)


def test_every_projection_of_merging_matches_exactly_one_row():
    merge = MergeConfig(num_keyframes=1, projections=True)
    params = abstract_params(get_config("paligemma2_3b", merge=merge))["merge"]
    axes = {
        name: sharding.logical_axes(f"merge/{name}", leaf.ndim)
        for name, leaf in sharding._leaves(params)
    }
    assert len(axes) == 4 * 2 + 1
    assert axes["image_key/kernel"] == ("norm", "embed")
    assert axes["image_key/bias"] == axes["log_temperature"] == ("norm",)


def test_every_row_is_used():
    siglip = two_towers.abstract_params(two_towers.get_config("siglip_tiny"))
    lora = abstract_params(get_config("paligemma2_3b", lora=QLORA))
    distill = {"distill": {"mentor": {"kernel": jax.ShapeDtypeStruct((2, 3, 4), "float32")}}}
    used = set()
    for params in (abstract_params(CONFIG), siglip, lora, distill):
        for path, leaf in jax.tree.leaves_with_path(params):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            used.add(sharding.logical_axes(name, leaf.ndim))
    assert used == {axes for _, axes in sharding.PARAM_AXES}
    assert {axis for axes in used for axis in axes} <= set(sharding.RULES)


def test_an_unknown_parameter_is_named():
    with pytest.raises(UserError, match=r"'llm/layers/attn/lora/w' must match exactly one.*none"):
        sharding.logical_axes("llm/layers/attn/lora/w", 2)
    with pytest.raises(UserError, match=r"'llm/final_norm/scale' has 2 dimensions.*names 1"):
        sharding.logical_axes("llm/final_norm/scale", 2)


def test_large_weights_are_split_and_small_ones_are_whole():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    specs = jax.tree.map(lambda s: s.spec, sharding.param_shardings(abstract_params(CONFIG), mesh))
    tensor, fsdp = ("tensor",), sharding.FSDP_AXES
    attn, mlp = specs["llm"]["layers"]["attn"], specs["llm"]["layers"]["mlp"]
    assert specs["llm"]["embedder"]["input_embedding"] == P(tensor, fsdp)
    assert attn["q_einsum"]["w"] == P(None, tensor, fsdp, None)
    assert attn["kv_einsum"]["w"] == P(None, None, tensor, fsdp, None)
    assert attn["attn_vec_einsum"]["w"] == P(None, tensor, None, fsdp)
    assert mlp["gating_einsum"] == P(None, None, fsdp, tensor)
    assert mlp["linear"] == P(None, tensor, fsdp)
    assert specs["llm"]["final_norm"]["scale"] == P(None)
    assert specs["img"]["embedding"]["kernel"] == P(None, None, None, None)
    assert sharding.batch_sharding(mesh).spec == P(sharding.BATCH_AXES)


def test_adapters_are_split_as_their_weights_are_and_codes_and_scales_too():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params = abstract_params(get_config("paligemma2_3b", lora=QLORA))
    specs = jax.tree.map(lambda s: s.spec, sharding.param_shardings(params, mesh))
    tensor, fsdp = ("tensor",), sharding.FSDP_AXES
    attn, mlp = specs["llm"]["layers"]["attn"], specs["llm"]["layers"]["mlp"]
    assert attn["q_einsum"]["w_lora_a"] == P(None, fsdp, None)
    assert attn["q_einsum"]["w_lora_b"] == P(None, None, tensor, None)
    assert attn["kv_einsum"]["w_lora_b"] == P(None, None, None, tensor, None)
    assert mlp["linear_lora_a"] == P(None, tensor, None)
    assert mlp["linear_lora_b"] == P(None, None, fsdp)
    assert mlp["linear"].qvalue == mlp["linear"].scale == P(None, tensor, fsdp)


def test_a_mesh_that_does_not_divide_names_all_offenders():
    mesh = sharding.make_mesh(fsdp=2, tensor=4)
    with pytest.raises(UserError) as error:
        sharding.param_shardings(abstract_params(CONFIG), mesh)
    message = str(error.value)
    assert "llm/layers/attn/kv_einsum/w (4, 2, 2, 32, 16): kv_heads = 2 over tensor = 4" in message
    assert "img/Transformer/encoderblock/attn/out/kernel" in message
    assert "q_einsum" not in message


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 3}, r"'data': 3, 'fsdp': -1, 'tensor': 1\} do not multiply to .* devices, 8"),
        ({"tensor": 16}, r"'fsdp': -1, 'tensor': 16\} do not multiply"),
        ({"data": 2, "fsdp": 2, "tensor": 1}, r"do not multiply"),
        ({"data": -1, "fsdp": -1}, r"at most one may be -1"),
        ({"data": 0}, r"at least 1"),
    ],
)
def test_mesh_sizes_are_checked(sizes, message):
    with pytest.raises(UserError, match=message):
        sharding.make_mesh(**sizes)


def test_what_is_left_goes_to_fsdp():
    assert sharding.sizes(sharding.make_mesh(tensor=2)) == {"data": 1, "fsdp": 4, "tensor": 2}


@pytest.mark.parametrize(
    ("count", "data", "fsdp"), [(1, 1, 1), (2, 1, 2), (5, 5, 1), (6, 1, 6), (7, 7, 1), (8, 1, 8)]
)
def test_parameters_are_split_over_as_many_devices_as_divide_them(count, data, fsdp):
    shapes = abstract_params(get_config("paligemma2_3b"))
    mesh = sharding.fitting_mesh(shapes, jax.devices()[:count])
    assert sharding.sizes(mesh) == {"data": data, "fsdp": fsdp, "tensor": 1}


def test_six_devices_hold_three_pairs_of_the_tiny_model():
    shapes = abstract_params(get_config("tiny"))  # widths 16 and 32
    mesh = sharding.fitting_mesh(shapes, jax.devices()[:6])
    assert sharding.sizes(mesh) == {"data": 3, "fsdp": 2, "tensor": 1}


@dataclasses.dataclass(frozen=True)
class Chip:
    """A TPU as far as its place tells."""

    coords: tuple[int, ...]
    slice_index: int = 0
    core_on_chip: int = 0


def slice_of(*dims, slice_index=0):
    return [Chip(place[::-1], slice_index) for place in np.ndindex(*dims[::-1])]


@pytest.mark.parametrize(
    ("devices", "sizes", "shape"),
    [
        (slice_of(4, 4, 1), {}, (1, 4, 4, 1, 1)),
        (slice_of(2, 4, 4), {}, (1, 2, 4, 4, 1)),
        (slice_of(2, 4, 4), {"tensor": 4}, (1, 2, 4, 1, 4)),
        (slice_of(2, 4, 4), {"data": 2}, (2, 4, 4, 1, 1)),
        (slice_of(4, 4, 1), {"data": -1, "fsdp": 1}, (16, 1, 1, 1, 1)),
        # Two slices: copies of the parameters, not parts, are on either side of the network.
        (slice_of(4, 4, 1) + slice_of(4, 4, 1, slice_index=1), {"data": 2}, (2, 4, 4, 1, 1)),
    ],
)
def test_every_mesh_axis_is_made_of_whole_rings_of_a_torus(devices, sizes, shape):
    mesh = sharding.make_mesh(**sizes, devices=devices)
    assert mesh.devices.shape == shape
    places = [(chip.slice_index, *chip.coords) for chip in mesh.devices.flat]
    places = np.array(places).reshape(*shape, 4)
    for axis in (1, 2, 3, 4):  # the rings of fsdp, and tensor
        moved = np.diff(places, axis=axis) != 0
        if shape[axis] > 1:  # along it one coordinate changes, always the same one
            assert moved.any(axis=tuple(range(moved.ndim - 1))).sum() == 1


def test_devices_that_fill_no_torus_are_not_taken_for_one():
    assert sharding._on_torus(slice_of(4, 4, 1)[:10], 1, 10, 1) is None
    assert sharding._on_torus(slice_of(4, 4, 1), 1, 8, 2) is None  # half a ring
    assert sharding._on_torus(jax.devices(), 1, 8, 1) is None  # no TPU


def test_abstract_arrays_say_where_they_will_live():
    shapes = abstract_params(CONFIG)
    shardings = sharding.param_shardings(shapes, sharding.make_mesh())
    made = sharding.abstract(shapes, shardings)
    assert jax.tree.map(lambda leaf: leaf.sharding, made) == shardings
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), made) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )


def test_constrain_without_a_mesh_does_nothing():
    x = np.ones((2, 3))
    assert sharding.constrain(x, "batch", "seq") is x


def test_loss_and_gradients_do_not_depend_on_the_mesh(capfd):
    """One program on 2 x 2 x 2 devices and on one: parameters, loss, gradients, placement."""
    key, batch = jax.random.key(0), make_batch()
    params = jax.jit(init_params, static_argnums=0)(CONFIG, key)
    want_loss, want = jax.jit(jax.value_and_grad(loss))(params, batch)

    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = sharding.param_shardings(abstract_params(CONFIG), mesh)
    capfd.readouterr()
    with jax.set_mesh(mesh):
        placed = jax.jit(init_params, static_argnums=0, out_shardings=shardings)(CONFIG, key)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), jax.device_get(placed), params
        )
        placed_batch = jax.device_put(batch, sharding.batch_sharding(mesh))
        step = jax.jit(jax.value_and_grad(loss), out_shardings=(None, shardings))
        got_loss, got = step(placed, placed_batch)
    logged = capfd.readouterr()
    assert "Involuntary full rematerialization" not in logged.err + logged.out

    np.testing.assert_allclose(got_loss, want_loss, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jax.device_get(got), want
    )
    linear = got["llm"]["layers"]["mlp"]["linear"]
    assert linear.sharding.spec == P(None, ("tensor",), sharding.FSDP_AXES)
    assert linear.addressable_shards[0].data.shape == (4, 64 // 2, 32 // 2)


def test_constrain_splits_the_batch_inside_of_jit():
    mesh = sharding.make_mesh(data=2, fsdp=4)
    config = dataclasses.replace(CONFIG, remat_policy=None)
    params = init_params(config, jax.random.key(0))
    batch = make_batch()
    with jax.set_mesh(mesh):
        zimg = jax.jit(lambda params, frames: bind(config, params).encode_frames(frames))(
            params, batch.frames
        )
    assert zimg.addressable_shards[0].data.shape == (1, 4, 32)
