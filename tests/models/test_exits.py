"""Exit heads, with a decision that can be checked on paper."""

import jax.numpy as jnp
import numpy as np
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


def test_one_exit_alone_gives_its_row():
    heads = ExitHeads(3, 4, param_dtype="float32", rngs=nnx.Rngs(0))
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 4)), jnp.float32)
    whole, alone = heads(rows), heads(rows[1:2], start=1)
    np.testing.assert_allclose(alone.class_logits[0], whole.class_logits[1], atol=1e-6)
    np.testing.assert_allclose(alone.importance[0], whole.importance[1], atol=1e-6)
