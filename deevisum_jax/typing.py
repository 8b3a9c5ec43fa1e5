"""The dimension legend and the containers that cross the package's rooms.

Legend (every einsum and shape comment uses these letters):
  B batch (segments)     I images = frames of a segment    P patches of a frame   H, W, C picture
  T query positions      S key positions                   D model width          F mlp width
  N query heads          K key/value heads                 G = N / K              H head width
  V vocabulary           L layers                          X exits                U annotators
"""

from __future__ import annotations

import dataclasses

import jax
import numpy as np

Array = jax.Array | np.ndarray

INPUTS = ("picture", "text", "sound")  # what a segment is judged by
RESIZES = ("bilinear", "bicubic")  # how pictures come to the model's size, both with antialias


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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitScores:
    """What the exit heads say of each segment, one row per exit, shallowest first."""

    class_logits: Array  # float32[X, B, 2], not-summary and summary
    importance: Array  # float32[X, B], logit of the importance score
