"""Scores of every segment at every exit, from one pass through all layers.

What a policy would have said can be read off them (`at_exit`); `staged` saves the time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from deevisum_jax import fsdp
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.models import paligemma2
from deevisum_jax.sharding import batch_sharding, on_host, place_batch
from deevisum_jax.typing import Batch, ExitedScores, ExitScores, SegmentScores

T = TypeVar("T")  # a tree of arrays


def read(scores: ExitScores) -> SegmentScores:
    """Logits as probabilities; of one exit or of all."""
    return SegmentScores(
        importance=jax.nn.sigmoid(scores.importance),
        summary_prob=jax.nn.softmax(scores.class_logits)[..., 1],
        cosine=scores.cosine,
    )


def make_score_fn(
    config: paligemma2.PaliGemma2Config, param_shardings: Any, mesh: jax.sharding.Mesh
) -> Callable[[paligemma2.Params, Batch], SegmentScores]:
    """The compiled scoring pass: one prefill, no token is generated.

    Args:
      config: of the model.
      param_shardings: where its parameters are.
      mesh: the current one, `jax.set_mesh(mesh)`.
    """

    def score(params: paligemma2.Params, batch: Batch) -> SegmentScores:
        return fsdp.per_device(
            lambda params, batch: read(paligemma2.bind(config, params).score(batch)),
            in_specs=(fsdp.param_specs(params), fsdp.BATCH_SPEC),
            out_specs=P(None, *fsdp.BATCH_SPEC),  # exits in front
        )(params, batch)

    return jax.jit(
        score,
        in_shardings=(param_shardings, batch_sharding(mesh)),
        compiler_options=fsdp.compiler_options(mesh),
    )


def score_videos(
    score_fn: Callable[[Batch], SegmentScores],
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: jax.sharding.Mesh,
) -> dict[int, SegmentScores]:
    """Scores every valid row; by `video_id`, segments in order.

    Args:
      score_fn: `make_score_fn`'s, with the parameters bound.
      batches: host batches, as `pipeline.in_order` gives them.
      mesh: where they are scored.
    """
    found, asked = [], None

    def read_last() -> None:
        if asked is not None:
            scores, video_id, segment, valid = on_host(asked, mesh)
            rows = jax.tree.map(lambda a: a[:, valid], scores)
            found.append((video_id[valid], segment[valid], rows))

    for fields in batches:
        batch = place_batch(fields, mesh)
        said = (score_fn(batch), batch.video_id, batch.segment, batch.valid)
        read_last()  # while the device works
        asked = said
    read_last()
    return by_video(found)


def by_video(found: Sequence[tuple[np.ndarray, np.ndarray, T]]) -> dict[int, T]:
    """What was found of segments, put in order: by video, segment after segment.

    Args:
      found: videos int[k], segments int[k], and a tree of arrays with k as their last axis, of any
        number of groups of segments.
    """
    if not sum(len(rows[0]) for rows in found):
        return {}
    video_id, segment = (np.concatenate([rows[i] for rows in found]) for i in range(2))
    whole = jax.tree.map(lambda *a: np.concatenate(a, axis=-1), *(rows[2] for rows in found))
    order = np.lexsort((segment, video_id))
    videos, starts = np.unique(video_id[order], return_index=True)
    ends = [*starts[1:], len(order)]
    return {
        int(video): jax.tree.map(lambda a, rows=order[start:end]: a[..., rows], whole)
        for video, start, end in zip(videos, starts, ends, strict=True)
    }


def at_exit(scores: SegmentScores, policy: ExitPolicy) -> ExitedScores:
    """Every segment of a video at the exit that it would leave at."""
    exits = policy.exit_index(scores)
    taken = jax.tree.map(lambda a: np.take_along_axis(np.asarray(a), exits[None], 0)[0], scores)
    return ExitedScores(
        importance=taken.importance, summary_prob=taken.summary_prob, exit_index=exits
    )
