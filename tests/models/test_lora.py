"""Adapters: what they compute, what of a model trains with them, and a quantised base."""

import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
import scipy.stats
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from qwix import QArray

from deevisum_jax import checkpoints, optim, quantized, sharding, train_step
from deevisum_jax.config import CheckpointConfig, LoraConfig, LossConfig
from deevisum_jax.errors import UserError
from deevisum_jax.models import layers, lora, paligemma2
from deevisum_jax.models.paligemma2 import bind, get_config, init_params
from deevisum_jax.typing import Batch

BOTH = ("llm", "img")
FLOAT = LoraConfig(rank=2, alpha=6.0, towers=BOTH)
NF4 = LoraConfig(rank=2, alpha=6.0, towers=BOTH, base="nf4", tile=8)
INT8 = LoraConfig(rank=2, alpha=6.0, base="int8", tile=16)
PREFIX, SUFFIX = 5, 3


def tiny(config: LoraConfig | None, **kwargs):
    return get_config("tiny", exit_layers=(2, 4), lora=config, **kwargs)


def random_params(config, seed=0):
    """Parameters whose adapters do something."""
    params = flatten_dict(init_params(config, jax.random.key(seed)), sep="/")
    rng = np.random.default_rng(seed)
    for path, leaf in params.items():
        if path.endswith("_lora_b"):
            params[path] = jnp.asarray(0.2 * rng.normal(size=leaf.shape), leaf.dtype)
    return unflatten_dict(params, sep="/")


def make_batch(B=8):
    rng, position = np.random.default_rng(0), np.arange(PREFIX + SUFFIX)
    return Batch(
        frames=rng.integers(0, 256, (B, 1, 28, 28, 3)).astype(np.uint8),
        tokens=rng.integers(2, 512, (B, PREFIX + SUFFIX)).astype(np.int32),
        mask_ar=np.broadcast_to(position >= PREFIX, (B, PREFIX + SUFFIX)),
        mask_input=np.ones((B, PREFIX + SUFFIX), bool),
        mask_loss=np.broadcast_to(position >= PREFIX, (B, PREFIX + SUFFIX)),
        label=rng.integers(0, 2, B).astype(np.int32),
        score=rng.uniform(size=B).astype(np.float32),
        video_id=np.zeros(B, np.int32),
        segment=np.arange(B, dtype=np.int32),
        valid=np.ones(B, bool),
    )


def score(config, params):
    return jax.jit(lambda params, batch: bind(config, params).score(batch))(params, make_batch(2))


def run(config, params):
    """Every exit, and the logits of all positions."""

    def both(params, batch):
        model = bind(config, params)
        out = model(batch)
        return out.exits, model.logits(out.pre_logits)

    return jax.jit(both)(params, make_batch(2))


def assert_close(ours, theirs, atol):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), ours, theirs)


def assert_equal(ours, theirs):
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


# ---- Adapters ----


@pytest.mark.parametrize(
    ("name", "llm", "both"),
    [
        ("paligemma2_3b", 10_383_360, 11_876_352),
        ("paligemma2_10b", 27_009_024, 28_502_016),
        ("paligemma2_28b", 57_090_048, 58_583_040),
    ],
)
def test_adapters_of_the_full_sizes_have_the_published_number_of_parameters(name, llm, both):
    for towers, count in ((("llm",), llm), (BOTH, both)):
        config = get_config(name, lora=LoraConfig(rank=8, towers=towers))
        assert lora.num_params(paligemma2.abstract_params(config)) == count
        # A code is a number, a scale is none.
        quantized = get_config(name, lora=LoraConfig(rank=8, towers=towers, base="nf4"))
        plain = paligemma2.num_params(paligemma2.without_lora(config))
        assert paligemma2.num_params(config) == plain + count
        assert paligemma2.num_params(quantized) == plain + count


def test_fresh_adapters_change_nothing():
    plain, config = tiny(None), tiny(FLOAT)
    base, params = (init_params(c, jax.random.key(0)) for c in (plain, config))
    left = {path: leaf for path, leaf in flatten_dict(params, sep="/").items()}
    adapters = {path: left.pop(path) for path in list(left) if lora.is_adapter(path)}
    assert_equal(unflatten_dict(left, sep="/"), base)
    for path, leaf in adapters.items():
        assert leaf.dtype == jnp.float32
        assert np.any(leaf) == path.endswith("_lora_a")
    assert_equal(score(config, params), score(plain, base))


def test_a_is_drawn_with_the_variance_of_a_weight():
    config = get_config("quickstart_teacher", lora=LoraConfig(rank=32))
    params = lora.add(paligemma2.abstract_params(config), config.lora, jax.random.key(0))
    llm = config.llm
    attn, mlp = params["llm"]["layers"]["attn"], params["llm"]["layers"]["mlp"]
    for drawn, inputs in (
        (attn["q_einsum"]["w_lora_a"], llm.width),
        (attn["attn_vec_einsum"]["w_lora_a"], llm.num_heads * llm.head_dim),
        (mlp["linear_lora_a"], llm.mlp_dim),
    ):
        np.testing.assert_allclose(np.std(drawn) * inputs**0.5, 1, rtol=0.02)


@pytest.mark.parametrize("adapted", [FLOAT, NF4, INT8], ids=["float", "nf4", "int8"])
def test_the_factored_form_is_that_of_merged_weights(adapted):
    config = tiny(adapted)
    params = random_params(config)
    merged = lora.merge(params, adapted, "float32")
    plain = paligemma2.without_lora(config)
    shapes = paligemma2.abstract_params(plain)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), merged) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), shapes
    )
    found, expected = run(config, params), run(plain, merged)
    assert_close(found, expected, 1e-5)
    without = lora.add(params, adapted, jax.random.key(1))
    far = np.abs(run(config, without)[1] - expected[1]).max()
    assert far > 0.1  # the adapters are no rounding error
    # Layers picked one at a time, in front of the last.
    embed = lambda model, batch: model.embed(
        batch.frames, batch.tokens, batch.mask_ar, batch.mask_input
    )
    part = lambda config: jax.jit(
        lambda params, batch: (
            lambda model: model.run_layers(embed(model, batch), start=1, stop=3)[0].x
        )(bind(config, params))
    )
    assert_close(part(config)(params, make_batch(2)), part(plain)(merged, make_batch(2)), 1e-5)


@pytest.mark.parametrize("adapted", [FLOAT, NF4], ids=["float", "nf4"])
def test_decoding_sees_what_the_whole_pass_sees(adapted):
    config = tiny(adapted)
    params, batch = random_params(config), make_batch(2)

    @jax.jit
    def decode(params):
        model = bind(config, params)
        prompt = model.embed(
            batch.frames,
            batch.tokens[:, :PREFIX],
            batch.mask_ar[:, :PREFIX],
            batch.mask_input[:, :PREFIX],
        )
        found, cache = model.prefill(prompt, max_decode_len=SUFFIX)
        rows = [found[:, -1]]
        for i in range(PREFIX, PREFIX + SUFFIX):
            row, cache = model.decode_step(batch.tokens[:, i], cache)
            rows.append(row)
        return jnp.stack(rows, axis=1), model(batch).pre_logits[:, -SUFFIX - 1 :]

    assert_close(*decode(params), 1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # flax's, of what qwix calls
def test_one_layer_is_that_of_qwix():
    """Its provider draws the adapter; ours computes with the same one."""
    x, w = (np.random.default_rng(0).normal(size=size) for size in ((2, 3, 8), (4, 8, 5)))
    x, w = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32)

    class Layer(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(w)

        def __call__(self, x):
            return jnp.einsum("BTD,NDH->BTNH", x, self.w[...])

    provider = qwix.LoraProvider(
        module_path=".*", rank=2, alpha=6.0, lora_b_initializer=jax.nn.initializers.normal()
    )
    theirs = qwix.apply_lora_to_model(Layer(), provider, x, rngs=nnx.Rngs(1))
    a, b = theirs.w_lora_a[...], theirs.w_lora_b[...]
    assert (a.shape, b.shape) == ((8, 2), (2, 4, 5))
    assert np.any(b)
    ours = layers.from_embed(
        x, w, "heads", "embed", "head_dim", adapter=layers.Adapter(a, b, 6.0 / 2)
    )
    np.testing.assert_allclose(ours, theirs(x), atol=1e-5)


# ---- A quantised base ----


def normal_float_4():
    """Quantiles of the normal distribution, as bitsandbytes' `create_normal_map` takes them."""
    above = scipy.stats.norm.ppf(np.linspace(0.9677083, 0.5, 9)[:-1])
    below = -scipy.stats.norm.ppf(np.linspace(0.9677083, 0.5, 8)[:-1])
    levels = np.sort(np.concatenate([below, [0.0], above]))
    return levels / levels.max()


def test_levels_are_those_of_the_paper():
    np.testing.assert_allclose(quantized.NF4, normal_float_4(), atol=1e-6)


# Where a tile lies: along H of [L, N, D, H] and along F of [L, F, D].
@pytest.mark.parametrize(("path", "axis"), [("attn/q_einsum/w", 3), ("mlp/linear", 1)])
def test_nf4_is_the_nearest_level_of_a_table(path, axis):
    full = f"llm/layers/{path}"
    weight = flatten_dict(init_params(tiny(None), jax.random.key(0)), sep="/")[full]
    params = lora.quantize(unflatten_dict({full: weight}, sep="/"), NF4)
    found = flatten_dict(params, sep="/")[full]
    # By numpy alone: eight numbers in a row share the largest of them.
    rows = np.moveaxis(np.asarray(weight), axis, -1).astype(np.float64)
    tiles = rows.reshape(*rows.shape[:-1], -1, 8)
    scale = np.abs(tiles).max(-1, keepdims=True)
    level = normal_float_4()
    codes = np.abs(tiles[..., None] / scale[..., None] - level).argmin(-1)
    expected = np.moveaxis((level[codes] * scale).reshape(rows.shape), -1, axis)
    np.testing.assert_array_equal(
        np.moveaxis(np.asarray(found.qvalue, np.int32), axis, -1), codes.reshape(rows.shape)
    )
    assert found.qvalue.dtype == jnp.uint4
    np.testing.assert_allclose(quantized.decode(found, jnp.float32), expected, atol=1e-6)
    np.testing.assert_array_equal(quantized.decode(found, jnp.float32), qwix.dequantize(found))
    theirs = qwix.quantize(
        weight, "nf4", channelwise_axes=set(range(weight.ndim)) - {axis}, tiled_axes={axis: 8}
    )
    assert_equal((found.qvalue, found.scale), (theirs.qvalue, theirs.scale))


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
def test_int8_is_off_by_at_most_half_a_step(param_dtype):
    before = init_params(tiny(None, param_dtype=param_dtype), jax.random.key(0))
    after = lora.quantize(before, INT8)
    count = 0
    for path, leaf in flatten_dict(after).items():
        weight = flatten_dict(before)[path]
        if not isinstance(leaf, QArray):
            assert leaf is weight
            continue
        count += 1
        assert (leaf.qvalue.dtype, leaf.scale.dtype) == (jnp.int8, jnp.float32)
        found = quantized.decode(leaf, jnp.float32)
        np.testing.assert_array_equal(found, qwix.dequantize(leaf))
        tile = [size // tiles for size, tiles in zip(leaf.shape, leaf.scale.shape, strict=True)]
        assert sorted(tile)[-2:] == [1, 16]
        step = np.kron(leaf.scale, np.ones(tile))
        off = np.abs(found - np.asarray(weight, np.float32))
        assert np.all(off <= 0.5001 * step)
        np.testing.assert_allclose(quantized.reach(leaf), step / 2, rtol=1e-6)
    assert count == 5  # of seven matrices two pairs are one array each


def test_a_number_is_no_farther_from_its_level_than_half_way_to_the_next():
    """-1, 0 and 1 of nf4 and the gaps beside them, of a tile whose largest number is 2."""
    row = jnp.asarray([[2.0, -2.0, 0.0, 0.01]], jnp.float32)
    found = quantized.reach(quantized.encode(row, "nf4", axis=1, tile=4))
    at_1, at_minus_1, at_0 = (1 - 0.722957) / 2, (1 - 0.696193) / 2, 0.09105 / 2
    np.testing.assert_allclose(found, [[2 * at_1, 2 * at_minus_1, 2 * at_0, 2 * at_0]], rtol=1e-5)
    far = np.linspace(-1, 1, 4001, dtype=np.float32)[None]
    coded = quantized.encode(jnp.asarray(far), "nf4", axis=1, tile=4001)
    off = np.abs(quantized.decode(coded, jnp.float32) - far)
    assert np.all(off <= quantized.reach(coded) + 1e-6)
    assert np.max(off / quantized.reach(coded)) > 0.99


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (LoraConfig(), None, True),  # no rank
        (LoraConfig(rank=2, tile=8), LoraConfig(rank=2, tile=16), True),  # nothing in tiles
        (NF4, LoraConfig(**{**vars(NF4), "towers": BOTH[::-1]}), True),
        (NF4, LoraConfig(**{**vars(NF4), "tile": 16}), False),
        (FLOAT, LoraConfig(**{**vars(FLOAT), "alpha": 1.0}), False),
    ],
)
def test_adapters_are_the_same_by_what_a_checkpoint_depends_on(one, other, same):
    assert (lora.meaning(one) == lora.meaning(other)) == same


def test_a_tile_of_zeros_stays_zeros():
    weight = {"llm": {"layers": {"mlp": {"linear": jnp.zeros((1, 16, 2))}}}}
    for config in (NF4, INT8):
        found = lora.merge(lora.quantize(weight, config), config, "float32")
        assert_equal(found, weight)


def test_bfloat16_weights_keep_their_dtype_and_adapters_have_their_own():
    config = tiny(NF4, param_dtype="bfloat16", dtype="bfloat16")
    params = init_params(config, jax.random.key(0))
    mlp = params["llm"]["layers"]["mlp"]
    assert mlp["linear"].dtype == jnp.bfloat16
    assert mlp["linear_lora_a"].dtype == jnp.float32
    merged = lora.merge(params, NF4, "bfloat16")["llm"]["layers"]["mlp"]["linear"]
    assert merged.dtype == jnp.bfloat16
    assert np.isfinite(score(config, params).importance).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"base": "int8", "tile": 64},
            r"model\.lora\.tile=64 does not divide llm\.head_dim=16, .* such as 16",
        ),
        ({"base": "nf4", "tile": 48}, r"does not divide llm\.head_dim=16"),
    ],
)
def test_tiles_that_a_model_cannot_have_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        tiny(LoraConfig(**{"rank": 2, **fields}))


def test_rank_0_is_a_model_without():
    assert tiny(LoraConfig(rank=0)) == tiny(None)


# ---- Training ----

TX = optax.adam(3e-3)


def make_step(config):
    return train_step.make_train_step(config, LossConfig(), TX, lambda _: 1.0, num_targets=SUFFIX)


def paths(tree):
    return set(flatten_dict(tree, sep="/"))


@pytest.mark.parametrize("adapted", [FLOAT, NF4], ids=["float", "nf4"])
def test_training_moves_adapters_and_heads_alone(adapted):
    config = tiny(adapted, remat_policy="nothing_saveable")
    state = first = train_step.init_state(init_params(config, jax.random.key(0)), TX)
    trained = paths(state.params)
    assert {path for path in trained if not path.startswith("exits/")} == {
        path for path in trained | paths(state.frozen) if lora.is_adapter(path)
    }
    # Two moments of each, and nothing of what is frozen.
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert len(moments) == 2 * len(trained)
    assert sum(leaf.size for leaf in moments) == 2 * (
        lora.num_params(state.params)
        + sum(leaf.size for leaf in jax.tree.leaves(first.params["exits"]))
    )
    step, totals = jax.jit(make_step(config)), []
    for _ in range(8):
        state, metrics = step(state, make_batch())
        totals.append(float(metrics["loss/total"]))
    assert totals[-1] < totals[0] - 0.05
    assert all(after < before for before, after in itertools.pairwise(totals))
    assert_equal(state.frozen, first.frozen)
    for path, leaf in flatten_dict(state.params, sep="/").items():
        assert np.any(leaf != flatten_dict(first.params, sep="/")[path]), path


@pytest.mark.parametrize(
    ("adapted", "sizes"),
    [(FLOAT, {"data": 2, "fsdp": 2, "tensor": 2}), (NF4, {"fsdp": 4, "tensor": 2})],
    ids=["float", "nf4"],
)
def test_a_step_on_a_mesh_is_the_step_on_one_device(adapted, sizes, capfd):
    config = tiny(adapted, remat_policy="nothing_saveable")
    plain = optax.sgd(1.0)  # the update is the gradient
    step = train_step.make_train_step(
        config, LossConfig(), plain, lambda _: 1.0, num_targets=SUFFIX
    )
    params = random_params(config)
    state = train_step.init_state(params, plain)
    expected, expected_metrics = jax.jit(step)(state, make_batch())
    score = jax.jit(lambda params, batch: bind(config, params).score(batch))
    expected_scores = score(params, make_batch())

    mesh = sharding.make_mesh(**sizes)
    shardings = train_step.state_shardings(state, plain, mesh)
    capfd.readouterr()
    with jax.set_mesh(mesh):
        placed = jax.device_put(state, shardings)
        scores = score(optim.merge(placed.params, placed.frozen), make_batch())
        batch = jax.device_put(make_batch(), sharding.batch_sharding(mesh))
        before = jax.device_get(placed.frozen)
        found, metrics = train_step.jit(step, shardings, mesh)(placed, batch)
    logged = capfd.readouterr()
    assert "Involuntary full rematerialization" not in logged.err + logged.out
    assert_close(scores, expected_scores, 1e-5)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, expected_metrics[name], rtol=2e-5, err_msg=name)
    assert_close(jax.device_get(found.params), expected.params, 1e-5)
    assert_equal(jax.device_get(found.frozen), before)
    linear = found.params["llm"]["layers"]["mlp"]["linear_lora_a"]
    assert linear.sharding.spec[1] in ("tensor", ("tensor",))


@pytest.mark.parametrize("adapted", [NF4, INT8], ids=["nf4", "int8"])
def test_codes_do_not_depend_on_the_mesh(adapted):
    plain = init_params(tiny(None), jax.random.key(0))
    expected = lora.quantize(plain, adapted)
    mesh = sharding.make_mesh(fsdp=4, tensor=2)
    shardings = sharding.param_shardings(jax.eval_shape(lambda: expected), mesh)
    placed = jax.device_put(plain, sharding.param_shardings(plain, mesh))
    quantize = lambda params: lora.quantize(params, adapted)
    found = jax.jit(quantize, out_shardings=shardings)(placed)
    linear = found["llm"]["layers"]["mlp"]["linear"]
    assert linear.qvalue.addressable_shards[0].data.shape == (4, 64 // 2, 32 // 4)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    assert_equal(jax.device_get(found), expected)
    # Each shard is made of its own numbers alone.
    text = jax.jit(quantize, out_shardings=shardings).lower(placed).compile().as_text()
    assert not re.findall(r"all-gather|all-to-all|all-reduce|collective-permute", text)


def test_no_gradient_of_a_frozen_weight_is_computed():
    """What is scattered over the shards has the adapters' rank as a dimension."""
    config = tiny(LoraConfig(rank=5, towers=BOTH), remat_policy="nothing_saveable")
    mesh = sharding.make_mesh(fsdp=8)
    state = jax.eval_shape(
        lambda: train_step.init_state(init_params(config, jax.random.key(0)), TX)
    )
    shardings = train_step.state_shardings(state, TX, mesh)
    with jax.set_mesh(mesh):
        step = train_step.jit(make_step(config), shardings, mesh)
        text = step.lower(state, make_batch()).as_text()
    found = re.findall(r"stablehlo\.reduce_scatter.*?\) -> tensor<([\dx]+)xf32>", text, re.DOTALL)
    others = [dims for dims in found if "5" not in dims.split("x")]
    assert len(found) >= 10
    assert others == ["3x32"]  # rows of the token loss: three targets of a segment


def test_a_mesh_that_does_not_divide_tiles_is_refused():
    # F = 64 in two tiles of 32, over four devices.
    config = get_config(
        "tiny",
        llm={"head_dim": 32, "num_heads": 4, "num_kv_heads": 4},
        img={"num_heads": 4},
        lora=LoraConfig(rank=2, base="nf4", tile=32),
    )
    with pytest.raises(UserError, match=r"mlp/linear/scale \(4, 2, 32\): mlp = 2 over tensor = 4"):
        sharding.validate(paligemma2.abstract_params(config), sharding.make_mesh(tensor=4, fsdp=2))


class Numbers:
    def get_state(self):
        return {}

    def set_state(self, state):
        pass


def test_a_checkpoint_of_codes_resumes_exactly(tmp_path):
    config = tiny(NF4)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    make = lambda key: train_step.init_state(init_params(config, key), TX)
    shapes = jax.eval_shape(make, jax.random.key(0))
    shardings = train_step.state_shardings(shapes, TX, mesh)
    abstract = sharding.abstract(shapes, shardings)
    with jax.set_mesh(mesh):
        step = train_step.jit(make_step(config), shardings, mesh)
        batch = jax.device_put(make_batch(), sharding.batch_sharding(mesh))
        state, _ = step(jax.jit(make, out_shardings=shardings)(jax.random.key(0)), batch)
        with checkpoints.Checkpoints(tmp_path / "c", CheckpointConfig()) as saved:
            saved.save(1, state, Numbers(), None)
        want, want_metrics = step(state, batch)
        with checkpoints.Checkpoints(tmp_path / "c", CheckpointConfig()) as saved:
            restored = saved.restore_latest(abstract, Numbers())
        assert jax.tree.structure(restored) == jax.tree.structure(shapes)
        assert jax.tree.map(lambda a: (a.dtype, a.sharding), restored) == jax.tree.map(
            lambda a: (a.dtype, a.sharding), abstract
        )
        found, metrics = step(restored, batch)
    assert_equal(jax.device_get(found), jax.device_get(want))
    assert_equal(metrics, want_metrics)
