"""Scores of every segment at every exit, and the exit that a segment would leave at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from deevisum_jax import fsdp
from deevisum_jax.errors import UserError
from deevisum_jax.models import paligemma2
from deevisum_jax.sharding import batch_sharding, on_host, place_batch
from deevisum_jax.typing import Batch, ExitScores


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentScores:
    """Scores of the segments of one video (or many), one row per exit, shallowest first."""

    importance: np.ndarray  # float32[X, M] in (0, 1)
    summary_prob: np.ndarray  # float32[X, M], probability that the segment belongs to the summary


def make_score_fn(
    config: paligemma2.PaliGemma2Config, param_shardings: Any, mesh: jax.sharding.Mesh
) -> Callable[[paligemma2.Params, Batch], ExitScores]:
    """The compiled scoring pass: one prefill, no token is generated.

    Args:
      config: of the model.
      param_shardings: where its parameters are.
      mesh: the current one, `jax.set_mesh(mesh)`.
    """

    def score(params: paligemma2.Params, batch: Batch) -> ExitScores:
        return fsdp.per_device(
            lambda params, batch: paligemma2.bind(config, params).score(batch),
            in_specs=(fsdp.param_specs(params), fsdp.BATCH_SPEC),
            out_specs=P(None, *fsdp.BATCH_SPEC),  # exits in front
        )(params, batch)

    return jax.jit(
        score,
        in_shardings=(param_shardings, batch_sharding(mesh)),
        compiler_options=fsdp.compiler_options(mesh),
    )


def score_videos(
    score_fn: Callable[[Batch], ExitScores],
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: jax.sharding.Mesh,
) -> dict[int, SegmentScores]:
    """Scores every valid row; by `video_id`, segments in order.

    Args:
      score_fn: `make_score_fn`'s, with the parameters bound.
      batches: host batches, as `pipeline.in_order` gives them.
      mesh: where they are scored.
    """
    rows: dict[int, list[tuple[int, np.ndarray, np.ndarray]]] = {}
    for fields in batches:
        batch = place_batch(fields, mesh)
        found = (score_fn(batch), batch.video_id, batch.segment, batch.valid)
        scores, video_id, segment, valid = on_host(found, mesh)
        importance = np.asarray(jax.nn.sigmoid(scores.importance))
        summary_prob = np.asarray(jax.nn.softmax(scores.class_logits)[..., 1])
        for b in np.flatnonzero(valid):
            rows.setdefault(int(video_id[b]), []).append(
                (int(segment[b]), importance[:, b], summary_prob[:, b])
            )
    return {video: _stack(sorted(found, key=lambda row: row[0])) for video, found in rows.items()}


def _stack(rows: list[tuple[int, np.ndarray, np.ndarray]]) -> SegmentScores:
    _, importance, summary_prob = zip(*rows, strict=True)
    return SegmentScores(
        importance=np.stack(importance, axis=1), summary_prob=np.stack(summary_prob, axis=1)
    )


def exit_index(summary_prob: np.ndarray, threshold: float) -> np.ndarray:
    """The first exit that is sure enough, else the last.

    An exit is as sure as its likelier class: `exit_index([[0.95], [0.5]], 0.9)` is `[0]`, since a
    sure "no" leaves as early as a sure "yes".

    Args:
      summary_prob: `float[X, M]`.
      threshold: of the likelier class's probability, within [0.5, 1].

    Returns:
      `int[M]` row of the exit taken.

    Raises:
      UserError: the threshold is outside the range.
    """
    if not 0.5 <= threshold <= 1:
        raise UserError(
            f"exit threshold {threshold} is not within [0.5, 1]: it is the probability of the "
            "likelier of two classes"
        )
    summary_prob = np.asarray(summary_prob)
    sure = np.maximum(summary_prob, 1 - summary_prob) >= threshold
    sure[-1] = True
    return sure.argmax(axis=0)


def at_exit(scores: SegmentScores, exits: np.ndarray) -> np.ndarray:
    """`float32[M]` importance of every segment at its own exit."""
    return np.take_along_axis(scores.importance, exits[None], axis=0)[0]
