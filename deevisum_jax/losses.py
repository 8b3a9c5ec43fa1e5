"""Masked losses. Each returns `(sum, count)`, so that microbatches and hosts add up exactly."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deevisum_jax import fsdp
from deevisum_jax.models import layers
from deevisum_jax.typing import Array

_CHUNK = 128 * 2**20  # bytes of logits that are there at a time


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


def token_cross_entropy(
    rows: Array, table: Array, targets: Targets, *, logits_softcap: float = 0.0
) -> Total:
    """Cross-entropy of the tokens at `targets.positions` over the whole vocabulary, in nats.

    Logits are made for a few rows at a time and once more on the way back: never for all rows in
    float32, and inside of `fsdp.per_device` each device makes those of its part of the vocabulary.

    Args:
      rows: `float[B, R, D]`, the model's output at `targets.positions`.
      table: `float[V, D]`, the token table (this device's columns of it).
      targets: as `find_targets` gives them.
      logits_softcap: cap of the logits, 0 = none.
    """
    B, R, D = rows.shape
    V = table.shape[0]
    losses = _vocab_cross_entropy(
        rows.reshape(B * R, D),
        fsdp.rows_of_columns(table, rows.dtype),
        targets.tokens.reshape(B * R),
        V,
        logits_softcap,
    )
    return _masked(losses.reshape(B, R), targets.mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _vocab_cross_entropy(
    rows: Array, table: Array, tokens: Array, vocab_size: int, cap: float
) -> Array:
    """`float[n, D]`, a device's W rows of the table `float[W, D]`, `int32[n]` -> `float32[n]`."""
    return _vocab_cross_entropy_fwd(rows, table, tokens, vocab_size, cap)[0]


def _vocab_cross_entropy_fwd(
    rows: Array, table: Array, tokens: Array, vocab_size: int, cap: float
) -> tuple[Array, Any]:
    first = fsdp.shard_index() * table.shape[0]

    def over_shard(_: None, chunk: tuple[Array, Array]) -> tuple[None, tuple[Array, ...]]:
        x, token = chunk
        logits = _vocab_logits(x, table, first, vocab_size, cap)
        # Finite, too, where a device has nothing of the vocabulary: its sum is then 0, no NaN.
        largest = jnp.maximum(logits.max(axis=-1), jnp.finfo(jnp.float32).min)
        own = token - first  # place of the target, if it is among this device's
        inside = (own >= 0) & (own < table.shape[0])
        at_target = jnp.take_along_axis(logits, own[:, None], axis=1, mode="clip")[:, 0]
        sums = jnp.exp(logits - largest[:, None]).sum(axis=-1)
        return None, (largest, sums, jnp.where(inside, at_target, 0.0))

    chunks = _in_chunks((fsdp.gather_rows(rows), fsdp.gather_rows(tokens)), table.shape[0])
    _, found = jax.lax.scan(over_shard, None, chunks)
    largest, sums, at_target = (part.reshape(-1) for part in found)
    top = fsdp.max_over_shards(largest)
    log_sum = top + jnp.log(fsdp.sum_over_shards(sums * jnp.exp(largest - top)))
    losses = log_sum - fsdp.sum_over_shards(at_target)
    own_losses = jax.lax.dynamic_slice_in_dim(
        losses, fsdp.shard_index() * rows.shape[0], rows.shape[0]
    )
    return own_losses, (rows, table, tokens, log_sum)


def _vocab_cross_entropy_bwd(
    vocab_size: int, cap: float, kept: Any, grad: Array
) -> tuple[Array, Array, None]:
    rows, table, tokens, log_sum = kept
    first = fsdp.shard_index() * table.shape[0]

    def over_shard(to_table: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        x, token, log_sum, grad = chunk
        logits = _vocab_logits(x, table, first, vocab_size, cap)
        target = jnp.arange(table.shape[0]) == (token - first)[:, None]
        to_logits = (jnp.exp(logits - log_sum[:, None]) - target) * grad[:, None]
        if cap:
            to_logits *= 1.0 - jnp.square(logits / cap)
        # A padded row's logit is -inf; its probability is 0, and 0 * inf would not be.
        to_logits = jnp.where(jnp.isfinite(logits), to_logits, 0.0).astype(x.dtype)
        to_table += jnp.einsum("NW,ND->WD", to_logits, x, preferred_element_type=jnp.float32)
        return to_table, jnp.einsum("NW,WD->ND", to_logits, table)

    chunks = _in_chunks(
        (fsdp.gather_rows(rows), fsdp.gather_rows(tokens), log_sum, fsdp.gather_rows(grad)),
        table.shape[0],
    )
    zeros = jnp.zeros(table.shape, jnp.float32)
    to_table, to_rows = jax.lax.scan(over_shard, zeros, chunks)
    to_rows = fsdp.scatter_rows(to_rows.reshape(-1, rows.shape[1]))
    return to_rows, to_table.astype(table.dtype), None


_vocab_cross_entropy.defvjp(_vocab_cross_entropy_fwd, _vocab_cross_entropy_bwd)


def _vocab_logits(x: Array, table: Array, first: Array, vocab_size: int, cap: float) -> Array:
    """`float32[N, W]` of a device's part of the vocabulary; -inf for rows that fill it up."""
    logits = jnp.einsum("ND,WD->NW", x, table, preferred_element_type=jnp.float32)
    logits = layers.softcap(logits, cap)
    real = first + jnp.arange(table.shape[0]) < vocab_size
    return jnp.where(real, logits, -jnp.inf)


def _in_chunks(arrays: tuple[Array, ...], width: int) -> tuple[Array, ...]:
    """`[N, ...]` -> `[C, N / C, ...]`, so that logits of N / C rows are not too large."""
    N = arrays[0].shape[0]
    chunks = next(
        c for c in range(1, N + 1) if N % c == 0 and (N // c == 1 or N // c * width * 4 <= _CHUNK)
    )
    return tuple(a.reshape(chunks, N // chunks, *a.shape[1:]) for a in arrays)


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
