"""Exit heads, with scores that can be checked on paper."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deevisum_jax.models.exits import ExitHeads


def test_exit_scores_by_hand():
    heads = ExitHeads(2, 2, param_dtype="float32", rngs=nnx.Rngs(0))
    # Exit 0 reads (x0, x1) as the two class logits; exit 1 swaps them and adds (0, 1).
    heads.classifier.kernel[...] = jnp.array([[[1.0, 0], [0, 1]], [[0, 1], [1, 0]]])
    heads.classifier.bias[...] = jnp.array([[0.0, 0], [0, 1]])
    heads.importance.kernel[...] = jnp.array([[[1.0], [1]], [[1], [-1]]])
    heads.norm.scale[...] = jnp.array([[0.0, 0], [1, 1]])
    # (1, 7) has RMS 5 and becomes (0.2, 1.4); the second exit's norm doubles that.
    scores = heads(jnp.array([[[1.0, 7]], [[1, 7]]]))
    np.testing.assert_allclose(scores.class_logits, [[[0.2, 1.4]], [[2.8, 1.4]]], atol=1e-6)
    np.testing.assert_allclose(scores.importance, [[1.6], [-2.4]], atol=1e-6)


def test_cosines_by_hand():
    heads = ExitHeads(2, 2, param_dtype="float32", rngs=nnx.Rngs(0))
    heads.prototype[...] = jnp.array([[3.0, 4], [0, -2]])
    heads.norm.scale[...] = jnp.array([[0.0, 0], [0, 2]])
    rows = jnp.array([[[4.0, 3], [30, 40], [-4, 3]], [[4, 1], [0, -5], [0, 5]]])
    # The second exit's norm turns (4, 1) to (4, 3): three fifths.
    expected = [[24 / 25, 1, 0], [-3 / 5, 1, -1]]
    np.testing.assert_allclose(heads(rows).cosine, expected, atol=1e-6)


@pytest.mark.parametrize("nothing", ["row", "prototype"])
def test_what_has_no_direction_has_a_cosine_of_zero(nothing):
    heads = ExitHeads(1, 2, param_dtype="float32", rngs=nnx.Rngs(0))
    if nothing == "prototype":
        heads.prototype[...] = jnp.zeros((1, 2))
    row = jnp.zeros((1, 1, 2)) if nothing == "row" else jnp.ones((1, 1, 2))
    np.testing.assert_array_equal(heads(row).cosine, 0)


def test_cosines_of_bfloat16_are_float32():
    heads = ExitHeads(1, 2, param_dtype="bfloat16", rngs=nnx.Rngs(0))
    heads.prototype[...] = jnp.array([[3.0, 4]], jnp.bfloat16)
    found = heads(jnp.array([[[4.0, 3]]], jnp.bfloat16)).cosine
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 0.96, atol=2e-3)  # rows have 8 bits, and are rounded


def test_a_cosine_teaches_the_prototype_alone():
    heads = ExitHeads(2, 4, param_dtype="float32", rngs=nnx.Rngs(0))
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 4)), jnp.float32)
    graphdef, params = nnx.split(heads)

    def total(params, rows):
        return nnx.merge(graphdef, params)(rows).cosine.sum()

    to_heads, to_rows = jax.grad(total, (0, 1))(params, rows)
    to_heads = nnx.to_pure_dict(to_heads)
    assert (to_heads.pop("prototype") != 0).all()
    assert len(to_heads) == 3  # norm, classifier, importance
    for leaf in jax.tree.leaves((to_heads, to_rows)):
        np.testing.assert_array_equal(leaf, 0)


def test_one_exit_alone_gives_its_row():
    heads = ExitHeads(3, 4, param_dtype="float32", rngs=nnx.Rngs(0))
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4)), jnp.float32)
    jax.tree.map(
        lambda alone, whole: np.testing.assert_allclose(alone[0], whole[1], atol=1e-6),
        heads(rows[1:2], start=1),
        heads(rows),
    )
