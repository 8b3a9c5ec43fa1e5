"""Differential feature merging (DFM): every frame that is no keyframe becomes one token.

ViLaMP (arXiv 2504.02438, its section on differential feature merging). Of a frame's patches p_m
those count that answer the query q and that the nearest preceding keyframe's patch r_m at the same
place does not show already:

    R_m = cos(p_m, q)     T_m = cos(p_m, r_m)     w = softmax_m((R - lambda T) / alpha)
    token = sum_m w_m p_m

Keyframes keep all their patches. A frame in front of the first keyframe is compared with itself, as
in the released code: raw patches are equal to themselves, so that relevance alone decides.

Two modes. The paper's, `projections=False`, takes the patches as they are. The released one learns
four linear layers and the temperature:

    score_m = (cos(W_q q, W_iq p_m) - lambda cos(W_k r_m, W_ik p_m)) / temperature

and sums the patches as they were all the same. The released code has lambda = 1. It also takes the
wrong reference, frame number i for the i-th keyframe in place of that keyframe
(`reference="released"`): weights that were trained so may want it.

A cosine with a patch or a query of zeros is 0, and so is its gradient.

In this room N counts frames of a video, K keyframes, C frames of a chunk, P patches of a frame, D
the patches' width and E that of what the query is given in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deevisum_jax.errors import UserError, closest
from deevisum_jax.keyframes.selection import Keyframes
from deevisum_jax.typing import Array

REFERENCES = ("fixed", "released")
# The learned linear layers, {name: {"kernel": float[in, out], "bias": float[out]}}, beside
# "temperature": float[1], above 0.
PROJECTIONS = ("query", "image_query", "key", "image_key")

# Of a frame that there is none of.
_NEVER = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergingConfig:
    """How patches are weighed.

    Raises:
      UserError: a value that is none of those below.
    """

    projections: bool = False  # False: the paper's raw patches; True: learned, as released
    reference: str = "fixed"  # of REFERENCES: the nearest preceding keyframe, or the released rule
    redundancy_weight: float = 1.0  # lambda, at least 0
    temperature: float = 0.01  # alpha, more than 0; where the learned one starts

    def __post_init__(self):
        if self.reference not in REFERENCES:
            raise UserError(
                f"merging.reference {self.reference!r} is unknown: "
                f"{closest(str(self.reference), REFERENCES)}"
            )
        if not 0 <= self.redundancy_weight < math.inf:
            raise UserError(
                f"merging.redundancy_weight={self.redundancy_weight} must be 0 or more; 0 leaves "
                "relevance alone, 1 is as released"
            )
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"merging.temperature={self.temperature} must be more than 0; 0.01 is as released"
            )


# ---- Which frame is compared with which ----


def reference_slots(keyframes: Keyframes, num_frames: int) -> jax.Array:
    """Whose reference each frame is compared with, as the slot of a keyframe.

    With keyframes 2 and 5 of 7 frames: -1, -1, 0, 0, 0, 1, 1.

    Args:
      keyframes: K slots.
      num_frames: N.

    Returns:
      int32[N], the slot of the nearest preceding keyframe, which for a keyframe is its own; -1 in
      front of the first: such a frame is compared with itself.
    """
    return slots_of(keyframes, jnp.arange(num_frames, dtype=jnp.int32))


def slots_of(keyframes: Keyframes, frames: Array) -> jax.Array:
    """As `reference_slots`, of frames by their numbers, int32[C]; below 0 is in front of all."""
    index = jnp.where(keyframes.is_used, keyframes.index, _NEVER)
    return jnp.searchsorted(index, frames, side="right").astype(jnp.int32) - 1


def reference_frames(keyframes: Keyframes, config: MergingConfig) -> jax.Array:
    """The frame that each slot stands for as a reference, int32[K].

    The keyframe itself, or with `reference="released"` the frame whose number is the slot's. It
    never comes behind the keyframe. Slots that are not used have a number that no frame has.
    """
    index = keyframes.index
    if config.reference == "released":
        index = jnp.arange(index.shape[0], dtype=jnp.int32)
    return jnp.where(keyframes.is_used, index, _NEVER)


def gather_references(patches: Array, bank: Array, slots: Array) -> jax.Array:
    """What each frame is compared with.

    Args:
      patches: float[C, P, D].
      bank: float[K, P, D], the references' patches by slot.
      slots: int32[C], of `reference_slots`.

    Returns:
      float[C, P, D]; for slots of -1 the frame's own patches.
    """
    found = jnp.take(bank, jnp.maximum(slots, 0), axis=0, mode="clip")
    return jnp.where((slots < 0)[:, None, None], patches, found)


# ---- One token of a frame ----


def merge(
    patches: Array,
    references: Array,
    query: Array,
    *,
    config: MergingConfig,
    params: Mapping[str, Any] | None = None,
) -> jax.Array:
    """One token of each frame.

    A video without a query is asked for the mean of its unit patches, as DKS does with embeddings:
    the caller, who sees the whole video, gives `sum_of_units` of all frames as the query (a cosine
    does not mind the length).

    Args:
      patches: float[..., P, D].
      references: float[..., P, D], of the same places of what each frame is compared with.
      query: float[E]. Without projections E = D.
      config: how patches are weighed.
      params: with projections, the learned linear layers (`PROJECTIONS`) and the temperature; they
        are applied in the dtype of the patches.

    Returns:
      float[..., D] in the dtype of the patches; cosines, weights and their sum are float32.

    Raises:
      UserError: a query of another width, projections without parameters or the other way round.
    """
    if config.projections != (params is not None):
        raise UserError(
            f"merging.projections={config.projections} with {'no ' * (params is None)}learned "
            "parameters; give `params` with projections, and only then"
        )
    width = params["query"]["kernel"].shape[0] if params else patches.shape[-1]
    if query.shape != (width,):
        raise UserError(
            f"the query of merging must be one vector of width {width}, got {query.shape=}; "
            + (
                "give an embedding of the width that the projections were made for"
                if params
                else "without projections it is compared with patches: give one of their width, or "
                "set merging.projections"
            )
        )
    if params is None:
        temperature = config.temperature
        relevance = _cosines(patches, query)
        redundancy = _cosines(patches, references)
    else:
        temperature = params["temperature"].astype(jnp.float32)
        asked, image_query, key, image_key = (
            _linear(params[name], x.astype(patches.dtype))
            for name, x in zip(PROJECTIONS, (query, patches, references, patches), strict=True)
        )
        relevance = _cosines(image_query, asked)
        redundancy = _cosines(image_key, key)
    scores = (relevance - config.redundancy_weight * redundancy) / temperature
    weights = jax.nn.softmax(scores, axis=-1)
    token = jnp.sum(weights[..., None] * patches.astype(jnp.float32), axis=-2)
    return token.astype(patches.dtype)


def sum_of_units(patches: Array, valid: Array | None = None) -> jax.Array:
    """The sum of all patches, each made one of length 1; it points where their mean does.

    Args:
      patches: float[..., P, D]; zeros add nothing, nor does what is not finite.
      valid: bool[...], 1 = a frame that counts; None = all do.

    Returns:
      float32[D].
    """
    x = patches.astype(jnp.float32)
    squares = jnp.sum(jnp.square(x), axis=-1)
    counts = (squares > 0) & jnp.isfinite(squares)
    if valid is not None:
        counts &= jnp.asarray(valid)[..., None]
    weights = jax.lax.rsqrt(jnp.where(counts, squares, 1.0))
    units = jnp.where(counts[..., None], weights[..., None] * x, 0.0)
    return jnp.sum(units, axis=tuple(range(x.ndim - 1)))


def _linear(params: Mapping[str, Any], x: jax.Array) -> jax.Array:
    """float[..., in] -> float[..., out], in the dtype of `x`."""
    kernel, bias = (params[name].astype(x.dtype) for name in ("kernel", "bias"))
    return jnp.einsum("...D,DE->...E", x, kernel) + bias


def _cosines(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32[...], of float[..., D] and what broadcasts to it."""
    # Products and sums, no matrix products: those of a TPU would round float32 to bfloat16, and a
    # cosine is about to be divided by 0.01. They also become one loop that reads its inputs once.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    product = jnp.sum(a * b, axis=-1)
    squares = [jnp.sum(jnp.square(x), axis=-1) for x in (a, b)]
    is_there = (squares[0] > 0) & (squares[1] > 0)
    # Two of them: the product of both squares may be more or less than float32 can tell. And no
    # root of a 0, whose gradient would not be finite.
    lengths = [jax.lax.rsqrt(jnp.where(is_there, square, 1.0)) for square in squares]
    return jnp.where(is_there, product * lengths[0] * lengths[1], 0.0)


# ---- A long video as a sequence of tokens ----


def num_tokens(num_keyframes: int, num_frames: int, num_patches: int) -> int:
    """Tokens of a video: K P + N - K, of which all are used if all K slots are."""
    return num_keyframes * num_patches + num_frames - num_keyframes


def interleave(
    key_patches: Array, merged: Array, keyframes: Keyframes
) -> tuple[jax.Array, jax.Array]:
    """A video's tokens in time order: all patches of keyframes, one token of other frames.

    With keyframes 0 and 2 of 4 frames of two patches: a0 b0 t1 a2 b2 t3.

    Args:
      key_patches: float[K, P, D], by slot.
      merged: float[N, D]; those of keyframes are left out.
      keyframes: K slots.

    Returns:
      float[K * P + N - K, D], and the frame that each token is of, int32 of that length, in rising
      order. Where slots are not used there are fewer tokens; behind them are zeros, with N as
      their frame. Frames that pad a video at its end have their tokens at the end, too: what is
      real has a frame less than the video's length.
    """
    K, P, D = key_patches.shape
    N = merged.shape[0]
    places = jnp.arange(num_tokens(K, N, P), dtype=jnp.int32)
    # Where the patches of each keyframe begin.
    starts = keyframes.index + (P - 1) * jnp.arange(K, dtype=jnp.int32)
    starts = jnp.where(keyframes.is_used, starts, _NEVER)
    slots = jnp.searchsorted(starts, places, side="right").astype(jnp.int32) - 1
    slot = jnp.maximum(slots, 0)
    patch = places - starts[slot]
    is_key = (slots >= 0) & (patch < P)
    frames = jnp.where(is_key, keyframes.index[slot], places - (P - 1) * (slots + 1))
    frames = jnp.minimum(frames, N)
    # Behind the last frame a row is asked for that is not there.
    rows = jnp.where(is_key, slot * P + patch, K * P + frames)
    source = jnp.concatenate([key_patches.reshape(K * P, D), merged.astype(key_patches.dtype)])
    return jnp.take(source, rows, axis=0, mode="fill", fill_value=0), frames
