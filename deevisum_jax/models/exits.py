"""Exit heads: what a segment's summary class and importance look like after a few layers.

DEEVISum's early exit (its section on early exits; the released code has no heads) is realised with
heads of our own design: per exit a norm, a linear layer to two class logits, a linear layer to the
logit of the importance score and a prototype of the summary class. An exit at layer `k` reads the
output of the first `k` layers at the last prefix position.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from deevisum_jax.models import layers
from deevisum_jax.typing import ExitScores

NUM_CLASSES = 2  # not in the summary, in the summary


class _Linear(nnx.Module):
    """One linear layer per exit, to float32."""

    def __init__(self, X: int, D: int, C: int, *, param_dtype: str, rngs: nnx.Rngs):
        self.kernel = layers.fan_in_init(rngs, (X, D, C), fan_in=D, dtype=param_dtype)
        self.bias = layers.zeros((X, C), param_dtype)

    def __call__(self, rows: jax.Array, exits: slice) -> jax.Array:
        kernel, bias = self.kernel[exits].astype(rows.dtype), self.bias[exits]
        out = jnp.einsum("XBD,XDC->XBC", rows, kernel, preferred_element_type=jnp.float32)
        return out + bias.astype(jnp.float32)[:, None]


class ExitHeads(nnx.Module):
    """All exit heads, parameters stacked on axis 0, shallowest first."""

    def __init__(self, num_exits: int, width: int, *, param_dtype: str, rngs: nnx.Rngs):
        X, kwargs = num_exits, {"param_dtype": param_dtype, "rngs": rngs}
        self.norm = nnx.vmap(lambda _: layers.RMSNorm(width, param_dtype=param_dtype))(
            jnp.arange(X)
        )
        self.classifier = _Linear(X, width, NUM_CLASSES, **kwargs)
        self.importance = _Linear(X, width, 1, **kwargs)
        # Of the summary class; the other class has the opposite direction.
        self.prototype = layers.fan_in_init(rngs, (X, width), fan_in=width, dtype=param_dtype)

    def __call__(self, rows: jax.Array, *, start: int = 0) -> ExitScores:
        """Reads the scores of consecutive exits.

        Args:
          rows: float[X, B, D], layer outputs at the last prefix position, one per exit.
          start: number of the exit that the first row belongs to; a staged executor passes one
            row at a time.
        """
        exits = slice(start, start + rows.shape[0])
        rows = layers.rms_norm(rows, self.norm.scale[exits][:, None])
        return ExitScores(
            class_logits=self.classifier(rows, exits),
            importance=self.importance(rows, exits)[..., 0],
            cosine=_cosine(rows, self.prototype[exits]),
        )


def _cosine(rows: jax.Array, prototypes: jax.Array) -> jax.Array:
    """float32[X, B], from float[X, B, D] and float[X, D].

    A prototype learns from the rows, and moves nothing else: a model that is trained with it says
    what it would say without.
    """
    rows = jax.lax.stop_gradient(rows).astype(jnp.float32)
    prototypes = prototypes.astype(jnp.float32)
    products = jnp.einsum("XBD,XD->XB", rows, prototypes)
    squares = [jnp.sum(jnp.square(a), axis=-1) for a in (rows, prototypes)]
    # Under the root: the gradient at 0 is finite then.
    return products * jax.lax.rsqrt(jnp.maximum(squares[0] * squares[1][:, None], 1e-24))
