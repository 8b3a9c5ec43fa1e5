"""The small parts, with numbers that can be checked on paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deevisum_jax.models import layers


def test_rms_norm_multiplies_by_one_plus_scale():
    norm = layers.RMSNorm(2, param_dtype="float32")
    # RMS of (3, 4) is sqrt(12.5) = 3.53553.
    np.testing.assert_allclose(norm(jnp.array([3.0, 4.0])), [0.848528, 1.131371], atol=1e-6)
    norm.scale[...] = jnp.array([1.0, -0.5])
    np.testing.assert_allclose(norm(jnp.array([3.0, 4.0])), [1.697056, 0.565685], atol=1e-6)


def test_rms_norm_of_bfloat16_is_computed_in_float32():
    norm = layers.RMSNorm(256, param_dtype="bfloat16")
    x = jax.random.normal(jax.random.key(0), (256,)).astype(jnp.bfloat16)
    exact = x.astype(jnp.float32) / np.sqrt(np.mean(np.square(x.astype(np.float32))) + 1e-6)
    got = norm(x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(got, exact.astype(jnp.bfloat16))


def test_layer_norm():
    norm = layers.LayerNorm(2, param_dtype="float32")
    norm.bias[...] = jnp.array([0.0, 10.0])
    np.testing.assert_allclose(norm(jnp.array([1.0, 5.0])), [-1, 11], atol=1e-6)


def rope_at(x, positions):
    return layers.rope(x, layers.rotation(np.array([positions]), x.shape[-1]))


def test_rope_at_two_positions():
    # H = 4: the pairs (x0, x2) and (x1, x3) turn by 1 and by 10000 ** -0.5 = 0.01 a position.
    x = jnp.broadcast_to(jnp.array([1.0, 1.0, 0.0, 0.0]), (1, 2, 1, 4))
    turned = rope_at(x, [0, 3])[0, :, 0]
    np.testing.assert_allclose(turned[0], [1, 1, 0, 0], atol=1e-7)
    np.testing.assert_allclose(
        turned[1], [np.cos(3), np.cos(0.03), np.sin(3), np.sin(0.03)], atol=1e-6
    )


def test_rope_tells_257_from_256_in_bfloat16():
    x = jnp.zeros((1, 2, 1, 2), jnp.bfloat16).at[..., 0].set(1)
    turned = rope_at(x, [256, 257])
    np.testing.assert_allclose(
        turned[0, :, 0, 0].astype(np.float32), np.cos([256.0, 257.0]), atol=4e-3
    )


def test_rope_is_relative():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))
    at = lambda i, j: jnp.sum(rope_at(q, [i]) * rope_at(k, [j]))
    np.testing.assert_allclose(at(5, 2), at(105, 102), atol=1e-4)


def test_softcap():
    # 50 * tanh(1) = 38.0797; small values pass, large ones stop at the cap.
    np.testing.assert_allclose(
        layers.softcap(jnp.array([0.0, 0.5, 50.0, 1e6]), 50.0),
        [0, 0.499983, 38.0797, 50],
        rtol=1e-5,
    )
    np.testing.assert_array_equal(layers.softcap(jnp.array([7.0, 1e6]), 0.0), [7, 1e6])


def test_attend_groups_query_heads():
    # All logits are zero: head n gets the mean of v of key/value head n // 2 over what it sees.
    q = jnp.zeros((1, 2, 4, 2))
    k = jnp.zeros((1, 2, 2, 2))
    v = jnp.arange(8.0).reshape(1, 2, 2, 2)  # [[0 1] [2 3]], then [[4 5] [6 7]]
    mask = np.array([[[True, False], [True, True]]])
    out = layers.attend(q, k, v, mask)
    np.testing.assert_allclose(out[0, 0], [[0, 1], [0, 1], [2, 3], [2, 3]])
    np.testing.assert_allclose(out[0, 1], [[2, 3], [2, 3], [4, 5], [4, 5]])


def test_attend_with_nothing_to_see_stays_finite():
    q = k = v = jnp.ones((1, 1, 1, 2))
    np.testing.assert_allclose(layers.attend(q, k, v, np.zeros((1, 1, 1), bool)), v)


def test_attend_caps_logits_before_masking():
    # Logits 1000 and 0 become 50 and 0 with a cap of 50; with a cap of 1 they are 1 and 0.
    q = jnp.array([1000.0, 0.0]).reshape(1, 1, 1, 2)
    k = jnp.array([[1.0, 0.0], [0.0, 1.0]]).reshape(1, 2, 1, 2)
    out = layers.attend(q, k, k, None, logits_softcap=1.0)
    np.testing.assert_allclose(out[0, 0, 0], np.exp([1, 0]) / (np.e + 1), atol=1e-6)


@pytest.mark.parametrize("fan_in", [64, 1024])
def test_fan_in_init_keeps_unit_variance(fan_in):
    w = layers.fan_in_init(nnx.Rngs(0), (fan_in, 256), fan_in, "float32")[...]
    np.testing.assert_allclose(np.std(w) * fan_in**0.5, 1, atol=0.02)
    assert np.abs(w).max() * fan_in**0.5 < 2.28  # cut at two deviations of the uncut normal
