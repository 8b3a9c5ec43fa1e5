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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Targets:
    """The few tokens per example that the token loss counts, R of them at most."""

    positions: Array  # int32[B, R], the position whose output predicts the token
    tokens: Array  # int32[B, R]
    mask: Array  # bool[B, R], 0 = nothing to count in this place


def find_targets(tokens: Array, mask_loss: Array, num_targets: int) -> Targets:
    """Gathers the counted tokens, so that logits are needed for them alone.

    A vocabulary has 257,152 columns; the logits of every position of a prompt would outweigh all
    other activations. By hand: tokens `[7, 8, 9, 0]` with `mask_loss` `[0, 1, 1, 0]` and
    `num_targets` 3 give positions `[0, 1, 2]`, tokens `[8, 9, 0]`, mask `[1, 1, 0]`.

    Args:
      tokens: `int32[B, T]`.
      mask_loss: `bool[B, T]`, 1 = counted. The first token is never a target.
      num_targets: R, at least the most that any row counts; what is beyond it is not counted.
    """
    counted = mask_loss[:, 1:].astype(bool)
    positions = jnp.argsort(~counted, axis=1, stable=True)[:, :num_targets]
    return Targets(
        positions=positions,
        tokens=jnp.take_along_axis(tokens[:, 1:], positions, axis=1),
        mask=jnp.take_along_axis(counted, positions, axis=1),
    )


def token_cross_entropy(logits: Array, targets: Targets) -> Total:
    """Cross-entropy of `float[B, R, V]` logits at `targets.positions`, in nats."""
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits.astype(jnp.float32), targets.tokens
    )
    return _masked(losses, targets.mask)


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
