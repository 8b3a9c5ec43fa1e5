"""FLOPs of what was traced."""

import jax
import jax.numpy as jnp
import pytest

from deevisum_jax.inference import cost
from deevisum_jax.models import paligemma2
from deevisum_jax.planner import model_flops, plan
from deevisum_jax.planner.model_flops import count

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 16), jnp.float32)


def test_a_scan_multiplies_and_a_branch_is_the_dearest():
    def fn(x, w):
        def step(x, _):
            return jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), None

        return jax.lax.scan(step, x, None, length=3)[0]

    assert count(fn, X, W) == 3 * 2 * (2 * 8 * 16 * 16)


def test_remat_and_functions_with_their_own_gradient_count_once():
    @jax.custom_vjp
    def own(x, w):
        return x @ w

    own.defvjp(lambda x, w: (own(x, w), (x, w)), lambda saved, g: (g @ saved[1].T, saved[0].T @ g))
    fn = lambda x, w: jax.jit(jax.checkpoint(lambda x: own(x, w)))(x)
    assert count(fn, X, W) == 2 * 8 * 16 * 16


def test_a_loop_of_unknown_length_is_refused():
    fn = lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] > 0, lambda x: x @ w, x)
    with pytest.raises(NotImplementedError, match="unknown length"):
        count(fn, X, W)


def test_shapes_of_one_device_are_refused():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.PartitionSpec("x")
    spread = lambda fn: jax.shard_map(fn, mesh=mesh, in_specs=(rows, None), out_specs=rows)
    with pytest.raises(NotImplementedError, match="one device's shapes"):
        count(spread(lambda x, w: x @ w), X, W)
    assert count(spread(lambda x, w: x + w[0]), X, W) == 0


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("model.merge.num_keyframes=1",),
        ("model.merge.num_keyframes=2", "model.merge.projections=True"),
    ],
)
def test_scoring_takes_what_the_formula_says(tiny_config, overrides):
    """The formula leaves out what is read at each exit, from D: classes (2), score, cosine."""
    config = tiny_config("data.num_frames=3", *overrides)
    model_config, _ = plan._model(config)
    batch = plan._batch(config, model_config, 8, captions=False)
    score = lambda params, batch: paligemma2.bind(model_config, params).score(batch)
    found = count(score, paligemma2.abstract_params(model_config), batch)
    one = cost.score_flops(
        model_config, num_frames=3, text_len=config.data.text_len, depth=model_config.llm.depth
    )
    heads = len(model_config.exit_layers) * 2 * model_config.llm.width * (2 + 1 + 1)
    assert found == 8 * (one + heads)


def test_convolutions_in_groups():
    x, w = jax.ShapeDtypeStruct((4, 9, 9, 8), jnp.float32), jnp.zeros((3, 3, 2, 16))
    fn = lambda x, w: jax.lax.conv_general_dilated(
        x, w, (3, 3), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=4
    )
    assert model_flops.count(fn, x, w) == 2 * (4 * 3 * 3 * 16) * (3 * 3 * 2)
