"""The dimension legend and the containers that cross the package's rooms.

Legend (every einsum and shape comment uses these letters):
  B batch (segments)     I images = frames of a segment    P patches of a frame   H, W, C picture
  T query positions      S key positions                   D model width          F mlp width
  N query heads          K key/value heads                 G = N / K              H head width
  V vocabulary           L layers                          X exits                U annotators
  R token targets        Y taught layers
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np

Array = jax.Array | np.ndarray

INPUTS = ("picture", "text", "sound")  # what a segment is judged by
RESIZES = ("bilinear", "bicubic")  # how pictures come to the model's size, both with antialias
# How sure an exit is, in `inference.exit_policy`'s words, and the range of that.
CONFIDENCES: Mapping[str, tuple[float, float]] = {
    "max_probability": (0.5, 1.0),
    "entropy": (0.0, 1.0),
    "cosine": (0.0, 1.0),
    "agreement": (0.0, 1.0),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TeacherOutputs:
    """What a frozen teacher says of each segment, read at its deepest exit; None = not asked for.

    A cache stores the rows of these arrays; see `deevisum_jax.distill`.
    """

    class_logits: Array  # float32[B, 2], not-summary and summary
    importance: Array  # float32[B], logit of the importance score
    token_ids: Array | None = None  # int32[B, R, K], the K likeliest tokens at each target
    # float32[B, R, K + 1], at the distillation's temperature; last: all other tokens together.
    token_log_probs: Array | None = None
    hidden: Array | None = None  # float32[B, Y, D], taught layers at the last prefix position


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    r"""Segments ready for the model, padded to fixed shapes.

    Text is laid out as in big_vision: `[BOS prefix tokens]["\n"][suffix tokens EOS][pads]`; image
    tokens are put in front by the model. The masks cover text only.
    """

    frames: Array  # uint8[B, I, H, W, 3]
    tokens: Array  # int32[B, T]
    mask_ar: Array  # bool[B, T], 1 = causal boundary (suffix and pads), 0 = prefix
    mask_input: Array  # bool[B, T], 1 = real token
    mask_loss: Array  # bool[B, T], 1 = counted in the token loss (suffix and EOS)
    label: Array  # int32[B], 1 = belongs to the summary
    score: Array  # float32[B], importance in [0, 1]
    video_id: Array  # int32[B], row of the video in its source
    segment: Array  # int32[B], position of the segment in its video
    valid: Array  # bool[B], 0 = padding of an unfilled batch
    # By the name of the stage. Read from a cache, or added by `distill.teachers` within the step.
    teachers: Mapping[str, TeacherOutputs] = dataclasses.field(default_factory=dict)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitScores:
    """What the exit heads say of each segment, one row per exit, shallowest first."""

    class_logits: Array  # float32[X, B, 2], not-summary and summary
    importance: Array  # float32[X, B], logit of the importance score
    cosine: Array  # float32[X, B], of the row that is read and the summary class's prototype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentScores:
    """`ExitScores` as they are read: of one video's segments (or of many), or of a batch's.

    Where one exit alone is meant, the leading axis is not there.
    """

    importance: Array  # float32[X, M] in (0, 1)
    summary_prob: Array  # float32[X, M], probability that the segment belongs to the summary
    cosine: Array  # float32[X, M] in [-1, 1]

    def at(self, exit_: int) -> SegmentScores:
        """What one exit says, `float32[M]` each."""
        return jax.tree.map(lambda a: a[exit_], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitedScores:
    """What is said of each segment at the exit that it left at."""

    importance: Array  # float32[M] in (0, 1)
    summary_prob: Array  # float32[M]
    exit_index: Array  # int[M], row of the exit, 0 = the shallowest
