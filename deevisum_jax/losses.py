"""Masked losses. Each returns `(sum, count)`, so that microbatches and hosts add up exactly."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import optax

from deevisum_jax.typing import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Total:
    """A loss summed over what counted, and how much counted."""

    sum: Array  # float32[]
    count: Array  # float32[]

    @property
    def mean(self) -> Array:
        """`sum / count`; 0 where nothing counted."""
        return self.sum / jnp.maximum(self.count, 1.0)


def token_cross_entropy(logits: Array, tokens: Array, mask: Array) -> Total:
    """Next-token cross-entropy in nats.

    Args:
      logits: `float[B, T, V]`; position t predicts token t + 1.
      tokens: `int32[B, T]`.
      mask: `bool[B, T]`, 1 = the token is counted as a target (`mask_loss`).
    """
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits[:, :-1].astype(jnp.float32), tokens[:, 1:]
    )
    return _masked(losses, mask[:, 1:])


def class_cross_entropy(logits: Array, label: Array, valid: Array) -> Total:
    """Cross-entropy of the summary / not-summary head: `float[B, 2]`, `int32[B]`, `bool[B]`."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), label)
    return _masked(losses, valid)


def score_cross_entropy(logits: Array, score: Array, valid: Array) -> Total:
    """Binary cross-entropy of an importance logit `float[B]` with a score in [0, 1] `float[B]`.

    Its minimum is at `sigmoid(logit) = score`, as for the squared error, and its gradient
    `sigmoid(logit) - score` does not vanish where the sigmoid saturates.
    """
    losses = optax.sigmoid_binary_cross_entropy(logits.astype(jnp.float32), score)
    return _masked(losses, valid)


def _masked(losses: Array, mask: Array) -> Total:
    mask = mask.astype(jnp.float32)
    return Total(jnp.sum(losses * mask), jnp.sum(mask))
