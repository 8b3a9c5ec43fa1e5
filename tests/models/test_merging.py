"""What merging learns: its size, how it starts, and that all of it is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deevisum_jax.keyframes import merging
from deevisum_jax.keyframes.merging import MergingConfig
from deevisum_jax.models import pytree
from deevisum_jax.models.merging import DifferentialMerging
from tests.keyframes import merging_reference
from tests.keyframes.merging_reference import random

P, D, E = 4, 6, 5
LEARNED = MergingConfig(projections=True)


def module(config=LEARNED, *, width=D, query_width=E, param_dtype="float32"):
    return DifferentialMerging(
        config, width=width, query_width=query_width, param_dtype=param_dtype, rngs=nnx.Rngs(0)
    )


def params_of(made):
    return nnx.to_pure_dict(nnx.state(made))


def stored(params):
    """What `merging.merge` takes as it is learned: of the temperature the logarithm."""
    learned = {name: params[name] for name in merging.PROJECTIONS}
    return {**learned, "log_temperature": np.log(params["temperature"])}


def test_it_has_the_size_of_the_released_one():
    # Width 3584 and a query of 512: three layers of 3584 x 3584 and one of 512 x 3584, biases and
    # the temperature.
    made = nnx.eval_shape(lambda: module(width=3584, query_width=512))
    assert pytree.num_params(params_of(made)) == 40_384_513


def test_it_starts_as_the_released_one():
    params = params_of(module(width=200, query_width=100, param_dtype="bfloat16"))
    assert sorted(params) == sorted([*merging.PROJECTIONS, "log_temperature"])
    assert params["query"]["kernel"].shape == (100, 200)
    for name in merging.PROJECTIONS:
        kernel, bias = params[name]["kernel"], params[name]["bias"]
        assert (kernel.dtype, bias.dtype) == (jnp.bfloat16, jnp.bfloat16)
        assert float(jnp.std(kernel.astype(jnp.float32))) == pytest.approx(0.02, rel=0.05)
        assert not bias.any()
    assert params["log_temperature"].dtype == jnp.float32
    np.testing.assert_allclose(module().whole("bfloat16")["temperature"], [0.01], rtol=1e-6)
    other = MergingConfig(projections=True, temperature=0.1)
    np.testing.assert_allclose(module(other).whole("float32")["temperature"], [0.1], rtol=1e-6)


def test_no_step_takes_the_temperature_to_zero_or_below():
    graph, params = nnx.split(module())
    given = random(2, P, D), random(2, P, D, seed=1), random(E, seed=3)
    for step, left in ((0.02, 0.0098), (1.0, 0.003679), (5.0, 6.738e-5)):
        # 0.02 is twice the temperature, and ten steps of Adam at a rate of 2e-3.
        moved = nnx.to_pure_dict(params)
        moved["log_temperature"] -= step
        made = nnx.merge(graph, moved)
        np.testing.assert_allclose(made.whole("float32")["temperature"], [left], rtol=1e-3)
        assert np.isfinite(made(*given)).all()


def test_tokens_are_those_of_the_transcription():
    made = module()
    nnx.update(made, stored(merging_reference.params(D, E)))
    patches, references, query = random(2, P, D), random(2, P, D, seed=1), random(E, seed=3)
    with jax.default_matmul_precision("highest"):
        got = made(patches, references, query)
    want = [
        merging_reference.token(*given, query, LEARNED, merging_reference.params(D, E))
        for given in zip(patches, references, strict=True)
    ]
    np.testing.assert_allclose(got, np.stack(want), atol=1e-5)


def test_everything_that_is_learned_has_a_gradient():
    graph, params = nnx.split(module())
    given = random(2, P, D), random(2, P, D, seed=1), random(E, seed=3)
    params = stored(merging_reference.params(D, E))

    def loss(params):
        return jnp.vdot(nnx.merge(graph, params)(*given), random(2, D, seed=5))

    for grad in jax.tree.leaves(jax.jit(jax.grad(loss))(params)):
        assert np.isfinite(grad).all()
        assert np.abs(grad).max() > 1e-6


def test_raw_patches_have_nothing_to_learn():
    made = module(MergingConfig(), query_width=D)
    assert params_of(made) == {}
    assert made.whole("float32") is None
    patches, query = random(2, P, D), random(D, seed=3)
    want = merging.merge(patches, patches, query, config=MergingConfig())
    np.testing.assert_array_equal(made(patches, patches, query), want)
