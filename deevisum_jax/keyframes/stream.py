"""A long video to K keyframes and one token per frame, chunk by chunk of its frames.

Twice over the frames: embeddings first, of which the keyframes are chosen (`selection`), then
patches, of which tokens are merged (`merging`). A reference never comes behind the frame that is
compared with it, so the second time needs no look ahead: what is kept are the patches of the K
references that have passed. Memory does not grow with the video but for one embedding and one
merged token per frame.

`condense` takes frames from the host as they are made; `condense_on_device` is one function of
frames that are on the device already, to be differentiated or compiled by shape. Both merge a chunk
by the same function. Letters as in `merging`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from deevisum_jax.errors import UserError
from deevisum_jax.keyframes.merging import (
    MergingConfig,
    gather_references,
    merge,
    reference_frames,
    slots_of,
    sum_of_units,
)
from deevisum_jax.keyframes.selection import Keyframes, SelectionConfig, check_embeddings, select
from deevisum_jax.typing import Array

# Of a chunk of frames, uint8[C, H, W, 3]: float[C, E], or float[C, P, D].
Encode = Callable[[Array], jax.Array]
T = TypeVar("T")

# Embeddings are padded to a multiple of this: videos of about the same length compile once.
_FRAMES = 1024


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Condensed:
    """A video as K keyframes and one token per frame; `merging.interleave` puts them in order."""

    embeddings: Array  # float[N, E]
    keyframes: Keyframes
    key_patches: Array  # float[K, P, D], by slot; zeros where a slot is not used
    merged: Array  # float[N, D], of all frames, keyframes too


def condense(
    chunks: Callable[[], Iterable[np.ndarray]],
    embed: Encode,
    patches: Encode,
    *,
    query: Array | None = None,
    patch_query: Array | None = None,
    selection: SelectionConfig,
    merging: MergingConfig,
    params: Mapping[str, Any] | None = None,
) -> Condensed:
    """Condenses a video whose frames come from the host.

    While the device works on a chunk the next one is made.

    Args:
      chunks: begins the video anew and gives its frames in order, uint8[C, H, W, 3], each chunk an
        array of its own. The first chunk sets C; others may have fewer frames and are padded with
        their last. It is called twice and must give the same frames.
      embed: embeddings float[C, E] of a chunk, jitted.
      patches: patches float[C, P, D] of a chunk, jitted.
      query: float[E], what keyframes are to answer; None = the video's mean.
      patch_query: what patches are to answer, as `merging.merge` takes it; None = the mean of the
        video's unit patches. For these `patches` runs the first time, too: with None a video takes
        almost twice as long, where most of it is spent there.
      selection: how keyframes are chosen.
      merging: how patches are weighed.
      params: what merging has learned, as `merging.merge` takes it.

    Returns:
      Arrays of the host, but for `key_patches`.

    Raises:
      UserError: no frames, frames of several sizes, another number of frames the second time, a
        query that is of another width or not finite, or embeddings that are not finite. Queries
        are checked before the second chunk is asked for.
    """
    total = None

    def embedded() -> Iterator[tuple[int, jax.Array]]:
        nonlocal total
        for start, count, chunk in _padded(chunks):
            if start == 0:
                _check(chunk, embed, patches, query, patch_query, selection, merging, params)
            embeddings = embed(chunk)
            if patch_query is None:
                total = _add_units(total, patches(chunk), count)
            yield count, embeddings

    joined, num_frames = np.zeros((0, 0)), 0
    for count, embeddings in _one_late(embedded()):
        joined = _appended(joined, num_frames, np.asarray(embeddings)[:count])
        num_frames += count
    if not num_frames:
        raise UserError("the video has no frames; give at least one")
    check_embeddings(joined[:num_frames])
    # One copy of them, not one on the host beside the device's, where these are the same.
    embeddings = jnp.asarray(joined)
    del joined
    valid = np.arange(len(embeddings)) < num_frames
    keyframes = jax.device_get(select(embeddings, query, valid, config=selection))
    embeddings = np.asarray(embeddings)[:num_frames]
    keyframes = dataclasses.replace(
        keyframes,
        # An index behind the padding would be no frame's either, but not the documented one.
        index=np.where(keyframes.is_used, keyframes.index, num_frames).astype(np.int32),
    )
    asked = total if patch_query is None else patch_query

    def condensed() -> Iterator[tuple[int, int, jax.Array]]:
        nonlocal banks
        for start, count, chunk in _padded(chunks):
            found = patches(chunk)
            banks = banks or _empty_banks(found, keyframes, merging)
            banks, tokens = _step(
                banks, found, start, count, keyframes, asked, params, config=merging
            )
            yield start, count, tokens

    banks: dict[str, jax.Array] = {}
    merged, seen = None, 0
    for start, count, tokens in _one_late(condensed()):
        seen = start + count
        if seen > num_frames:
            break
        if merged is None:
            merged = np.empty((num_frames, tokens.shape[-1]), tokens.dtype)
        merged[start:seen] = np.asarray(tokens)[:count]
    if seen != num_frames:
        found = "more" if seen > num_frames else seen
        raise UserError(
            f"the video gave {num_frames} frames the first time and {found} the second; it must be "
            "the same both times"
        )
    return Condensed(
        embeddings=embeddings,
        keyframes=keyframes,
        key_patches=banks["keys"],
        merged=merged,
    )


def condense_on_device(
    frames: Array,
    embed: Encode,
    patches: Encode,
    *,
    chunk_size: int,
    query: Array | None = None,
    patch_query: Array | None = None,
    selection: SelectionConfig,
    merging: MergingConfig,
    params: Mapping[str, Any] | None = None,
) -> Condensed:
    """As `condense`, of frames that are on the device; to be jitted.

    Differentiable with respect to what `patches` closes over, to `patch_query` and to `params`:
    which frames are keyframes has no gradient. A chunk's activations are computed again in the
    backward pass. The K references are encoded once more, ahead of all others.

    Args:
      frames: uint8[N, H, W, 3], N at least 1.
      embed: as for `condense`.
      patches: as for `condense`.
      chunk_size: C, frames that are encoded at a time.
      query: as for `condense`.
      patch_query: as for `condense`.
      selection: as for `condense`.
      merging: as for `condense`.
      params: as for `condense`.
    """
    num_frames = frames.shape[0]
    if num_frames < 1:
        raise UserError("the video has no frames; give at least one")
    if chunk_size < 1:
        raise UserError(f"chunk_size={chunk_size} must be at least 1")
    each = functools.partial(_map_chunks, size=chunk_size)
    embeddings = each(lambda chunk, _: embed(chunk), frames)
    keyframes = select(*jax.lax.stop_gradient((embeddings, query)), config=selection)
    if patch_query is None:
        units = each(lambda chunk, _: jax.vmap(sum_of_units)(patches(chunk)), frames)
        patch_query = jnp.sum(units, axis=0)

    def bank(wanted: jax.Array) -> jax.Array:
        found = jnp.take(frames, wanted, axis=0, mode="clip")
        found = each(lambda chunk, _: patches(chunk), found)
        return jnp.where(keyframes.is_used[:, None, None], found, 0)

    references = keys = bank(keyframes.index)
    if merging.reference == "released":
        references = bank(reference_frames(keyframes, merging))
    return Condensed(
        embeddings=embeddings,
        keyframes=keyframes,
        key_patches=keys,
        merged=each(
            lambda chunk, numbers: _merge_chunk(
                patches(chunk), references, numbers, keyframes, patch_query, params, merging
            ),
            frames,
        ),
    )


# ---- What both do with a chunk ----


def _merge_chunk(
    patches: jax.Array,
    bank: jax.Array,
    frames: jax.Array,
    keyframes: Keyframes,
    query: Array,
    params: Mapping[str, Any] | None,
    config: MergingConfig,
) -> jax.Array:
    """float[C, D], of float[C, P, D] of the frames with these numbers, int32[C]."""
    references = gather_references(patches, bank, slots_of(keyframes, frames))
    return merge(patches, references, query, config=config, params=params)


# ---- From the host ----


@functools.partial(jax.jit, static_argnames="config", donate_argnames="banks")
def _step(
    banks: dict[str, jax.Array],
    patches: jax.Array,
    start: Array,
    count: Array,
    keyframes: Keyframes,
    query: Array,
    params: Mapping[str, Any] | None,
    config: MergingConfig,
) -> tuple[dict[str, jax.Array], jax.Array]:
    """Keeps those patches that are a keyframe's or a reference's, and merges all."""
    numbers = jnp.arange(patches.shape[0], dtype=jnp.int32)
    frames = jnp.where(numbers < count, start + numbers, -1)  # -1: padding
    wanted = {"keys": reference_frames(keyframes, MergingConfig())}
    if "references" in banks:
        wanted["references"] = reference_frames(keyframes, config)
    banks = {name: _keep(bank, patches, frames, wanted[name]) for name, bank in banks.items()}
    bank = banks.get("references", banks["keys"])
    return banks, _merge_chunk(patches, bank, frames, keyframes, query, params, config)


def _keep(bank: jax.Array, patches: jax.Array, frames: jax.Array, wanted: jax.Array) -> jax.Array:
    """The bank float[K, P, D] with those of float[C, P, D] that are wanted, int32[K], rising."""
    K = wanted.shape[0]
    slots = jnp.searchsorted(wanted, frames)
    is_wanted = wanted[jnp.minimum(slots, K - 1)] == frames
    return bank.at[jnp.where(is_wanted, slots, K)].set(patches, mode="drop")


def _empty_banks(
    patches: jax.Array, keyframes: Keyframes, config: MergingConfig
) -> dict[str, jax.Array]:
    """The patches of keyframes, and of references where these are others; of zeros."""
    shape = (keyframes.index.shape[0], *patches.shape[1:])
    names = ("keys", "references") if config.reference == "released" else ("keys",)
    return {name: jnp.zeros(shape, patches.dtype) for name in names}


@functools.partial(jax.jit, donate_argnums=0)
def _add_units(total: jax.Array | None, patches: jax.Array, count: Array) -> jax.Array:
    units = sum_of_units(patches, jnp.arange(patches.shape[0]) < count)
    return units if total is None else total + units


def _check(
    chunk: np.ndarray,
    embed: Encode,
    patches: Encode,
    query: Array | None,
    patch_query: Array | None,
    selection: SelectionConfig,
    merging: MergingConfig,
    params: Mapping[str, Any] | None,
) -> None:
    """Traces all that will be computed: a mistake is better known before a video was read."""
    for name, asked in (("query", query), ("patch_query", patch_query)):
        if asked is not None and not np.isfinite(np.asarray(asked, np.float32)).all():
            raise UserError(f"{name} is not finite; look for what its encoder was given")
    embeddings, found = jax.eval_shape(lambda chunk: (embed(chunk), patches(chunk)), chunk)
    jax.eval_shape(functools.partial(select, config=selection), embeddings, query)
    if patch_query is None:
        patch_query = jax.ShapeDtypeStruct(found.shape[-1:], jnp.float32)
    jax.eval_shape(
        functools.partial(merge, config=merging), found, found, patch_query, params=params
    )


def _padded(
    chunks: Callable[[], Iterable[np.ndarray]],
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Each chunk padded to the first's size, with its first frame's number and how many are real.

    Raises:
      UserError: frames of several sizes, or a chunk that is larger than the first.
    """
    start, shape = 0, None
    for chunk in chunks():
        shape = shape or chunk.shape
        count = len(chunk)
        if chunk.shape[1:] != shape[1:] or count > shape[0]:
            raise UserError(
                f"a chunk of frames has {chunk.shape=} where the first has {shape}; give frames of "
                "one size, and the largest chunk first"
            )
        if count == 0:
            continue
        if count < shape[0]:
            # Pictures as any other, in case an encoder minds blank ones.
            chunk = np.concatenate([chunk, np.repeat(chunk[-1:], shape[0] - count, axis=0)])
        yield start, count, chunk
        start += count


def _one_late(items: Iterable[T]) -> Iterator[T]:
    """Each item once the next one is there: what is read of an item no longer holds the next up."""
    items = iter(items)
    for waiting in items:
        for item in items:
            yield waiting
            waiting = item
        yield waiting


def _appended(joined: np.ndarray, num_frames: int, rows: np.ndarray) -> np.ndarray:
    """The array with rows behind its first `num_frames`; of a multiple of `_FRAMES`, with zeros.

    It grows in place: the system gives large blocks new pages rather than copy them.
    """
    if not num_frames:
        joined = np.zeros((0, *rows.shape[1:]), rows.dtype)
    end = num_frames + len(rows)
    if end > len(joined):
        padded = -(-end // _FRAMES) * _FRAMES
        joined.resize((padded, *rows.shape[1:]), refcheck=False)
    joined[num_frames:end] = rows
    return joined


# ---- On the device ----


def _map_chunks(
    fn: Callable[[jax.Array, jax.Array], jax.Array], frames: Array, *, size: int
) -> jax.Array:
    """`fn` of each chunk of frames and their numbers, one after the other; its rows joined.

    The last chunk begins early enough to be full, and what it does twice is left: frames are never
    copied to be padded.
    """
    num_frames = frames.shape[0]
    size = min(size, num_frames)
    num_chunks = -(-num_frames // size)

    @functools.partial(jax.checkpoint, prevent_cse=False)  # within a scan there is none
    def one(start: jax.Array) -> jax.Array:
        chunk = jax.lax.dynamic_slice_in_dim(frames, start, size)
        return fn(chunk, start + jnp.arange(size, dtype=jnp.int32))

    starts = jnp.minimum(jnp.arange(num_chunks, dtype=jnp.int32) * size, num_frames - size)
    rows = jax.lax.map(one, starts)
    left = num_frames - (num_chunks - 1) * size  # rows of the last chunk that are new
    rest = rows[:-1].reshape(-1, *rows.shape[2:])
    return jnp.concatenate([rest, rows[-1, size - left :]])
