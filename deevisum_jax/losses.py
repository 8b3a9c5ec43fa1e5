"""Masked losses. Each returns `(sum, count)`, so that microbatches and hosts add up exactly."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deevisum_jax import fsdp
from deevisum_jax.config import LossConfig
from deevisum_jax.models import layers
from deevisum_jax.typing import Array

_PROTOTYPE_SCALE = 10.0  # of cosines
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


def token_log_probs(
    rows: Array,
    table: Array,
    tokens: Array,
    chosen: Sequence[Array] = (),
    *,
    temperature: float = 1.0,
    logits_softcap: float = 0.0,
) -> tuple[Array, tuple[Array, ...]]:
    """What a model says of its targets, and of tokens that others chose, over the whole vocabulary.

    Logits are made once for all that is asked: for a few rows at a time and once more on the way
    back, never for all rows in float32, and inside of `fsdp.per_device` each device makes those of
    its part of the vocabulary.

    The probability of all other tokens together is summed up over these tokens alone, since 1 minus
    that of the chosen rounds to 0 where they have nearly all of it. By hand, for logits `[ln 2, 0,
    0]` at temperature 1: token 0 has `ln 1/2`; chosen `[0, 1]` give `[ln 1/2, ln 1/4, ln 1/4]`.

    Args:
      rows: `float[B, R, D]`, the model's output at the positions that predict the tokens.
      table: `float[V, D]`, the token table (this device's columns of it).
      tokens: `int32[B, R]`, the targets, at temperature 1.
      chosen: `int32[B, R, K]` each, different tokens of every row, at `temperature`.
      temperature: what capped logits are divided by for `chosen`.
      logits_softcap: cap of the logits, 0 = none.

    Returns:
      `float32[B, R]` of the targets, and of each of `chosen` `float32[B, R, K + 1]`, last all other
      tokens together; -inf if there are no others.
    """
    B, R, D = rows.shape
    of_targets, of_chosen = _vocab_log_probs(
        rows.reshape(B * R, D),
        fsdp.rows_of_columns(table, rows.dtype),
        tokens.reshape(B * R),
        tuple(ids.reshape(B * R, -1) for ids in chosen),
        temperature,
        table.shape[0],
        logits_softcap,
    )
    return of_targets.reshape(B, R), tuple(found.reshape(B, R, -1) for found in of_chosen)


def token_cross_entropy(log_probs: Array, mask: Array) -> Total:
    """Cross-entropy of the targets in nats, from `float32[B, R]` of `token_log_probs`."""
    return _masked(-log_probs, mask)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _vocab_log_probs(
    rows: Array,
    table: Array,
    tokens: Array,
    chosen: tuple[Array, ...],
    temperature: float,
    vocab_size: int,
    cap: float,
) -> tuple[Array, tuple[Array, ...]]:
    """As `token_log_probs`, of `float[n, D]`, and a device's W rows of the table `float[W, D]`."""
    return _vocab_log_probs_fwd(rows, table, tokens, chosen, temperature, vocab_size, cap)[0]


def _vocab_log_probs_fwd(
    rows: Array,
    table: Array,
    tokens: Array,
    chosen: tuple[Array, ...],
    temperature: float,
    vocab_size: int,
    cap: float,
) -> tuple[Any, Any]:
    first = fsdp.shard_index() * table.shape[0]

    def over_shard(_: None, chunk: tuple[Array, ...]) -> tuple[None, Any]:
        x, token, *asked = chunk
        logits = _vocab_logits(x, table, first, vocab_size, cap)
        at_target = _own_logits(logits, (token - first)[:, None])[:, 0]
        of_chosen = []
        for ids in asked:
            others = _put(logits, ids - first, -jnp.inf)
            of_chosen.append((*_exp_sums(others / temperature), _own_logits(logits, ids - first)))
        return None, (*_exp_sums(logits), at_target, of_chosen)

    gathered = tuple(fsdp.gather_rows(a) for a in (rows, tokens, *chosen))
    _, found = jax.lax.scan(over_shard, None, _in_chunks(gathered, table.shape[0]))
    found = jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), found)
    largest, sums, at_target, of_chosen = found
    log_sum = _log_sum(largest, sums)
    of_targets = fsdp.sum_over_shards(at_target) - log_sum
    log_others, log_probs = [], []
    for largest, sums, at_chosen in of_chosen:
        log_others.append(_log_sum(largest, sums))
        own_others = _own_rows(log_others[-1], rows.shape[0])
        own_chosen = fsdp.scatter_rows(at_chosen) / temperature
        log_probs.append(_with_others(own_chosen, own_others))
    given = (_own_rows(of_targets, rows.shape[0]), tuple(log_probs))
    return given, (rows, table, tokens, chosen, log_sum, log_others, log_probs)


def _vocab_log_probs_bwd(
    temperature: float, vocab_size: int, cap: float, kept: Any, grads: Any
) -> tuple[Array, Array, None, None]:
    rows, table, tokens, chosen, log_sum, log_others, log_probs = kept
    grad, grads_chosen = grads
    first = fsdp.shard_index() * table.shape[0]

    # Of what is asked of a row: the gradient of the chosen tokens' logits, and that of the others'
    # in units of their share among the others, both without the cap.
    asked = []
    for ids, others, log_prob, to_log_prob in zip(
        chosen, log_others, log_probs, grads_chosen, strict=True
    ):
        all_together = to_log_prob.sum(axis=-1, keepdims=True)
        to_outcomes = (to_log_prob - jnp.exp(log_prob) * all_together) / temperature
        asked.append(
            (
                fsdp.gather_rows(ids),
                others,
                *map(fsdp.gather_rows, jnp.split(to_outcomes, [ids.shape[1]], axis=1)),
            )
        )

    def over_shard(to_table: Array, chunk: tuple[Array, ...]) -> tuple[Array, Array]:
        x, token, log_sum, grad, *asked = chunk
        logits = _vocab_logits(x, table, first, vocab_size, cap)
        target = jnp.arange(table.shape[0]) == (token - first)[:, None]
        to_logits = (target - jnp.exp(logits - log_sum[:, None])) * grad[:, None]
        for ids, others, to_chosen, to_others in zip(*[iter(asked)] * 4, strict=True):
            # Without others there is nothing to divide by; every logit is put in below.
            others = jnp.where(jnp.isfinite(others), others, 0.0)
            shares = jnp.exp(logits / temperature - others[:, None])
            to_logits += _put(shares * to_others, ids - first, to_chosen)
        if cap:
            to_logits *= 1.0 - jnp.square(logits / cap)
        # A padded row's logit is -inf; its probability is 0, and 0 * inf would not be.
        to_logits = jnp.where(jnp.isfinite(logits), to_logits, 0.0).astype(x.dtype)
        to_table += jnp.einsum("NW,ND->WD", to_logits, x, preferred_element_type=jnp.float32)
        return to_table, jnp.einsum("NW,WD->ND", to_logits, table)

    chunks = _in_chunks(
        (
            fsdp.gather_rows(rows),
            fsdp.gather_rows(tokens),
            log_sum,
            fsdp.gather_rows(grad),
            *itertools.chain.from_iterable(asked),
        ),
        table.shape[0],
    )
    zeros = jnp.zeros(table.shape, jnp.float32)
    to_table, to_rows = jax.lax.scan(over_shard, zeros, chunks)
    to_rows = fsdp.scatter_rows(to_rows.reshape(-1, rows.shape[1]))
    return to_rows, to_table.astype(table.dtype), None, None


_vocab_log_probs.defvjp(_vocab_log_probs_fwd, _vocab_log_probs_bwd)


def top_tokens(
    rows: Array, table: Array, top_k: int, *, temperature: float, logits_softcap: float = 0.0
) -> tuple[Array, Array]:
    """The likeliest tokens and what `token_log_probs` says of them; made to be read, not trained.

    Each device finds the likeliest of its part of the vocabulary, a few rows at a time; those alone
    travel.

    Args:
      rows: `float[B, R, D]`.
      table: `float[V, D]` (this device's columns of it).
      top_k: K, below V.
      temperature: what capped logits are divided by.
      logits_softcap: cap of the logits, 0 = none.

    Returns:
      `int32[B, R, K]`, likeliest first, and `float32[B, R, K + 1]`, last all other tokens together.
    """
    B, R, D = rows.shape
    V = table.shape[0]
    shard = fsdp.rows_of_columns(table, rows.dtype)
    first = fsdp.shard_index() * shard.shape[0]

    def over_shard(_: None, x: Array) -> tuple[None, tuple[Array, ...]]:
        logits = _vocab_logits(x, shard, first, V, logits_softcap)
        best, ids = jax.lax.top_k(logits, min(top_k, shard.shape[0]))
        others = _put(logits, ids, -jnp.inf)
        largest, sums = _exp_sums(others / temperature)
        return None, (best, first + ids, largest[:, None], sums[:, None])

    [chunks] = _in_chunks((fsdp.gather_rows(rows.reshape(B * R, D)),), shard.shape[0])
    _, found = jax.lax.scan(over_shard, None, chunks)
    # From all rows of a device's part of the vocabulary to the device's rows of the whole.
    best, ids, largest, sums = (
        fsdp.rows_of_columns(part.reshape(-1, part.shape[-1]), part.dtype) for part in found
    )
    chosen, places = jax.lax.top_k(best, top_k)
    # Good enough for its part of the vocabulary, but not for the whole: one more of the others.
    left = _put(best, places, -jnp.inf) / temperature
    log_others = jax.nn.logsumexp(jnp.concatenate([left, largest + jnp.log(sums)], axis=1), axis=1)
    log_probs = _with_others(chosen / temperature, log_others)
    ids = jnp.take_along_axis(ids, places, axis=1)
    return ids.reshape(B, R, top_k), log_probs.reshape(B, R, top_k + 1)


def _exp_sums(logits: Array) -> tuple[Array, Array]:
    """The largest of a device's logits `float32[N, W]`, and the sum of their exponentials to it."""
    # Finite, too, where a device has nothing of the vocabulary: its sum is then 0, no NaN.
    largest = jnp.maximum(logits.max(axis=-1), jnp.finfo(jnp.float32).min)
    return largest, jnp.exp(logits - largest[:, None]).sum(axis=-1)


def _log_sum(largest: Array, sums: Array) -> Array:
    """The logarithm of the sum of exponentials over all devices, from each one's `_exp_sums`."""
    top = fsdp.max_over_shards(largest)
    return top + jnp.log(fsdp.sum_over_shards(sums * jnp.exp(largest - top)))


def _with_others(chosen: Array, log_others: Array) -> Array:
    """`float32[n, K + 1]` log-probabilities, from `float32[n, K]` and `float32[n]` off by a sum."""
    outcomes = jnp.concatenate([chosen, log_others[:, None]], axis=1)
    return outcomes - jax.nn.logsumexp(outcomes, axis=1, keepdims=True)


def _own_rows(x: Array, rows: int) -> Array:
    """This device's of all devices' rows."""
    return jax.lax.dynamic_slice_in_dim(x, fsdp.shard_index() * rows, rows)


def _own_logits(logits: Array, places: Array) -> Array:
    """`float32[N, W]` at `int32[N, K]`; 0 outside, where another device has the token."""
    inside = (places >= 0) & (places < logits.shape[1])
    return jnp.where(inside, jnp.take_along_axis(logits, places, axis=1, mode="clip"), 0.0)


def _put(logits: Array, places: Array, values: Array | float) -> Array:
    """`float32[N, W]` with `values` at `int32[N, K]`; what is outside is left out."""
    inside = (places >= 0) & (places < logits.shape[1])
    places = jnp.where(inside, places, logits.shape[1])  # -1 would be the last column
    return logits.at[jnp.arange(logits.shape[0])[:, None], places].set(values, mode="drop")


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


def prototype_cross_entropy(cosine: Array, label: Array, valid: Array) -> Total:
    """Cross-entropy of the summary class, by the cosine `float[B]` to its prototype.

    The logit is ten times the cosine, of temperature 0.1 as is usual for cosines (Chen et al. 2020,
    SimCLR): the prototype is drawn to the summary's segments and away from the others.
    """
    logits = _PROTOTYPE_SCALE * cosine.astype(jnp.float32)
    return _masked(optax.sigmoid_binary_cross_entropy(logits, label), valid)


def class_kl(
    teacher: Array, student: Array, valid: Array, *, temperature: float, direction: str
) -> Total:
    """`T^2 KL` of the classes' probabilities `softmax(logits / T)`, in nats.

    As Hinton et al. 2015: the factor `T^2` keeps the gradient's size for every temperature T. By
    hand: teacher `[ln 3, 0]` and student `[0, 0]` are (3/4, 1/4) and (1/2, 1/2), so that
    `teacher_first`, KL(teacher || student), is 3/4 ln 3/2 + 1/4 ln 1/2 at T = 1, and
    `student_first`, KL(student || teacher), 1/2 ln 2/3 + 1/2 ln 2.

    Args:
      teacher: `float[B, C]` logits.
      student: `float[B, C]` logits.
      valid: `bool[B]`, 1 = counted.
      temperature: T, of both.
      direction: `teacher_first`, as DEEVISum's code has it, or `student_first`, as its paper.
    """
    teacher, student = (
        jax.nn.log_softmax(logits.astype(jnp.float32) / temperature)
        for logits in (teacher, student)
    )
    return _masked(_kl(teacher, student, temperature, direction), valid)


def score_kl(
    teacher: Array, student: Array, valid: Array, *, temperature: float, direction: str
) -> Total:
    """`class_kl` of importance scores: of the two outcomes of `sigmoid(logit / T)`, `float[B]`."""
    teacher, student = (
        jnp.stack([logit, jnp.zeros_like(logit)], -1) for logit in (teacher, student)
    )
    return class_kl(teacher, student, valid, temperature=temperature, direction=direction)


def token_kl(
    teacher: Array, student: Array, mask: Array, *, temperature: float, direction: str
) -> Total:
    """`T^2 KL` over a teacher's likeliest tokens and, as one more outcome, all others.

    Joining outcomes can only take from a KL (Cover and Thomas 2006, section 2.8): this is a lower
    bound of the KL over the whole vocabulary, and equal to it for K = V - 1.

    Args:
      teacher: `float32[B, R, K + 1]` log-probabilities at temperature T, of `top_tokens`.
      student: the same of the same tokens, of `token_log_probs`.
      mask: `bool[B, R]`, 1 = counted.
      temperature: T, of both.
      direction: as `class_kl`.
    """
    return _masked(_kl(teacher, student, temperature, direction), mask)


def hidden_distance(teacher: Array, student: Array, valid: Array) -> Total:
    """Mean squared difference of two vectors `float[B, D]`, each divided by its root mean square.

    That is `2 (1 - cosine)`: 0 for the same direction, 2 for a right angle, 4 for the opposite.
    What a norm in front of the next layer takes away is not compared.
    """
    teacher, student = (
        layers.rms_norm(x.astype(jnp.float32), jnp.zeros(x.shape[-1])) for x in (teacher, student)
    )
    return _masked(jnp.mean(jnp.square(teacher - student), axis=-1), valid)


def exit_weights(config: LossConfig, exit_layers: tuple[int, ...]) -> np.ndarray:
    """`float32[X]`, sums to 1. By default an exit weighs as its depth, so the deepest leads."""
    weights = np.asarray(config.exit_weights or exit_layers, np.float32)
    return weights / weights.sum()


def _kl(teacher: Array, student: Array, temperature: float, direction: str) -> Array:
    """`T^2 KL` along the last axis, of log-probabilities."""
    p, q = {"teacher_first": (teacher, student), "student_first": (student, teacher)}[direction]
    # An outcome that cannot be adds nothing; -inf - -inf would, and so would its gradient.
    possible = jnp.isfinite(p)
    p, q = jnp.where(possible, p, 0.0), jnp.where(possible, q, 0.0)
    return temperature**2 * jnp.sum(jnp.where(possible, jnp.exp(p) * (p - q), 0.0), axis=-1)


def _masked(losses: Array, mask: Array) -> Total:
    mask = mask.astype(jnp.float32)
    return Total(jnp.sum(losses * mask), jnp.sum(mask))
