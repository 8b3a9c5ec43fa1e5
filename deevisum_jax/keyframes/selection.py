"""Differential keyframe selection (ViLaMP, Cheng et al. 2025), without an N x N matrix.

Frames are walked from the most relevant on (algorithm 1). One is kept unless it repeats a frame
that was kept before (their cosine passes tau), until K are kept. What is left of the budget is
spread over the gaps as the released `distribute_frames` does it (frame_selector.py).

Letters: `N` frames, `E` width of an embedding, `K` keyframes, `C` candidates of a block.

Chosen are the frames that float64 arithmetic chooses, at the price of float32:

1. One pass in float32 gives every frame's relevance to within a bound on rounding. The largest few
   are computed again in float64, and those that no other frame can precede are put in order. If
   the walk needs more than these, a pass in float64 and one sort give the order of all.
2. Candidates are resolved in blocks: a product with the kept frames, then one product more with
   each frame that is kept. A similarity that is within the bound on rounding of tau is computed
   again in float64, when the candidate's turn comes.

Of a float64 number that outlives a function the float32 parts are kept, the number rounded and what
remains: 48 bits, and nothing around has to know that type.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from deevisum_jax.errors import UserError, closest
from deevisum_jax.typing import Array

REJECTS = (">", ">=")

# Relevance is rounded to this. What is equal on paper (two scenes as far from the mean of both) and
# unequal by how float64 rounds is equal then, and the earlier frame comes first.
_GRID = 2.0**-40
_CHUNK_BYTES = 2**22  # of float32, that a pass holds at a time
_UNIT_ROUNDOFF = 2.0**-24
# Squared lengths whose square root and products float32 holds without loss.
_SAFE = (1e-30, 1e30)
_LONG = 8  # times a block that of the long walk, in which few candidates are kept
_FAN = 64  # values tried at a time by the search in `_spread`


@dataclasses.dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which frames are keyframes.

    Raises:
      UserError: a number out of its range, or an unknown rule.
    """

    num_keyframes: int = 32  # K, at least 1
    tau: float = 0.85  # cosine in [-1, 1] from which on a frame repeats another
    # A frame repeats a kept one if their cosine is > tau (as released) or >= tau (as in the paper).
    reject: str = ">"
    floor: float | None = None  # least relevance of a keyframe, a cosine; 0.2 as released
    fill: bool = True  # whether unused budget is spread over the video, as released

    def __post_init__(self) -> None:
        if not isinstance(self.num_keyframes, numbers.Integral) or self.num_keyframes < 1:
            raise UserError(f"num_keyframes {self.num_keyframes!r}: give a whole number from 1 on")
        for name in ("tau", "floor"):
            value = getattr(self, name)
            if name == "floor" and value is None:
                continue
            if not isinstance(value, numbers.Real) or not -1 <= value <= 1:
                raise UserError(f"{name} {value!r} is no cosine; give a number from -1 to 1")
        if self.reject not in REJECTS:
            raise UserError(f"reject {self.reject!r}; {closest(str(self.reject), REJECTS)}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Keyframes:
    """The frames that were chosen of a video, in K slots."""

    index: Array  # int32[K], in the order of time; N in slots that are not used, which come last
    is_used: Array  # bool[K]
    is_filled: Array  # bool[K], taken to use the budget, not by the walk
    relevance: Array  # float32[K], cosine to the query; 0 in slots that are not used


def check_embeddings(embeddings: Array) -> None:
    """Refuses embeddings that no keyframes can be chosen of; reads them, on the host.

    Args:
      embeddings: float[N, E].

    Raises:
      UserError: another rank, no frame, no width, no float, or a number that is not finite (the
        message names the first frame that has one).
    """
    _check_shapes(embeddings, None, None)
    rows = max(1, _CHUNK_BYTES // (4 * embeddings.shape[1]))
    for start in range(0, len(embeddings), rows):
        part = np.asarray(embeddings[start : start + rows]).astype(np.float32)
        finite = np.isfinite(part).all(-1)
        if not finite.all():
            raise UserError(
                f"the embedding of frame {start + int(np.argmin(finite))} is not finite; mark such "
                "frames as not valid, or look for what the encoder was given"
            )


@jax.jit
def relevance(
    embeddings: Array, query: Array | None = None, valid: Array | None = None
) -> jax.Array:
    """How near each frame comes to the query.

    Args:
      embeddings: float[N, E], of any length; float64 is rounded to float32.
      query: float[E], of a text or a picture; None: the mean of the frames' unit embeddings.
      valid: bool[N], 1 = a frame of the video; None: all are.

    Returns:
      float32[N], cosines; 0 for an embedding that is zero, not finite, or of no frame.

    Raises:
      UserError: shapes that do not go together, or no frame.
    """
    _check_shapes(embeddings, query, valid)
    valid = _all_valid(embeddings, valid)
    found = _exact_pass(embeddings, _query(embeddings, query, valid), valid, None)
    return found.high


@functools.partial(jax.jit, static_argnames=("config", "block_size"))
def select(
    embeddings: Array,
    query: Array | None = None,
    valid: Array | None = None,
    *,
    config: SelectionConfig,
    block_size: int = 128,
) -> Keyframes:
    """The keyframes of a video; may be jitted, and mapped over videos with `vmap`.

    A frame whose embedding is zero has cosine 0 to everything. One whose embedding is not finite
    is no keyframe; `check_embeddings` refuses it. Of frames that are equally relevant the earlier
    comes first. If there are fewer than K frames, all of them are chosen when the budget is filled.
    `vmap` runs the passes of every case, so it saves no more than calls.

    Args:
      embeddings: float[N, E], of any length; float64 is rounded to float32.
      query: float[E], of a text or a picture; None: the mean of the frames' unit embeddings.
      valid: bool[N], 1 = a frame of the video; None: all are. Gaps are filled as if the others
        were not there.
      config: the rule.
      block_size: C, candidates resolved at a time; changes the time it takes, nothing else.

    Raises:
      UserError: shapes that do not go together, or no frame.
    """
    _check_shapes(embeddings, query, valid)
    num_frames = len(embeddings)
    valid = _all_valid(embeddings, valid)
    query = _query(embeddings, query, valid)
    start = _Kept.none(config.num_keyframes, embeddings.shape[1])

    def walk(order: _Order, position: jax.Array, kept: _Kept, size: int) -> _Kept:
        next_block = _slices(embeddings, order, size)
        return _walk(next_block, position, position < order.count, kept, config)

    # First the few that are most relevant, if a pass in float32 can tell which these are.
    window = min(num_frames, max(4 * block_size, 16 * config.num_keyframes))
    fast = _fast_pass(embeddings, query, valid)
    # Seen through, slices of the result would make the compiler sort all frames instead.
    values, places = jax.lax.optimization_barrier(jax.lax.top_k(fast, min(window + 1, num_frames)))
    some = _exact(embeddings[places[:window]], query, valid[places[:window]], config.floor)
    is_safe = values[0] < jnp.inf
    rest = values[window] if window < num_frames else jnp.float32(-jnp.inf)
    bound = rest + jnp.float32(_fast_error(embeddings.shape[1]))
    is_first = some.is_eligible & (some.high > bound) & is_safe
    first = _sort(some.high, some.low, places[:window], is_first)
    kept = walk(first, jnp.int32(0), start, block_size)
    least = -math.inf if config.floor is None else config.floor
    is_done = is_safe & (
        (kept.count == config.num_keyframes) | (rest == -jnp.inf) | (bound < least)
    )

    def go_on(kept: _Kept) -> tuple[_Kept, jax.Array]:
        found = _exact_pass(embeddings, query, valid, config.floor)
        order = _sort(
            found.high, found.low, jnp.arange(num_frames, dtype=jnp.int32), found.is_eligible
        )
        # What has been walked so far is the front of this order.
        return walk(order, first.count, kept, _LONG * block_size), found.is_finite

    kept, usable = jax.lax.cond(is_done, lambda kept: (kept, valid), go_on, kept)

    def relevance_of(index: jax.Array) -> jax.Array:
        rows = embeddings[jnp.minimum(index, num_frames - 1)]
        return _exact(rows, query, index < num_frames, None).high

    return _finish(kept, usable, relevance_of, config)


@functools.partial(jax.jit, static_argnames=("config", "mesh", "axes", "block_size"))
def select_sharded(
    embeddings: Array,
    query: Array | None = None,
    valid: Array | None = None,
    *,
    config: SelectionConfig,
    mesh: Mesh,
    axes: Sequence[str],
    block_size: int = 128,
) -> Keyframes:
    """`select` with every device holding a part of the frames; the same result.

    Each device sorts its own. In each round all of them offer the next of theirs, the best C of all
    are resolved everywhere alike, and each goes on behind what was taken of its own. What travels
    per round is C rows and C offers per device.

    Args:
      embeddings: float[N, E], split over `axes` along N.
      query: as in `select`.
      valid: as in `select`.
      config: the rule.
      mesh: that the embeddings are on.
      axes: of the mesh, a tuple; their sizes' product must divide N.
      block_size: C.

    Raises:
      UserError: shapes that do not go together, an unknown axis, or N that the devices do not
        divide.
    """
    _check_shapes(embeddings, query, valid)
    axes = tuple(axes)
    for axis in axes:
        if axis not in mesh.shape:
            raise UserError(f"mesh axis {axis!r}; {closest(axis, mesh.shape)}")
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if len(embeddings) % devices:
        raise UserError(
            f"{len(embeddings)} frames cannot be split over {devices} devices; add frames that are "
            f"not valid, up to {-(-len(embeddings) // devices) * devices}"
        )

    def on_device(embeddings: jax.Array, query: jax.Array | None, valid: jax.Array) -> Any:
        local = len(embeddings)
        first = jax.lax.axis_index(axes).astype(jnp.int32) * local
        query = _query(embeddings, query, valid, axes)
        found = _exact_pass(embeddings, query, valid, config.floor)
        places = first + jnp.arange(local, dtype=jnp.int32)
        order = _sort(found.high, found.low, places, found.is_eligible)

        def left(position: jax.Array) -> jax.Array:
            return jax.lax.psum(order.count - position, axes) > 0

        def next_block(position: jax.Array) -> tuple[jax.Array, jax.Array, _Block]:
            mine = order.part(position, block_size)
            is_there = position + jnp.arange(block_size) < order.count
            offers = (mine.high, mine.low, mine.index, is_there)
            best = _sort(*(jax.lax.all_gather(x, axes, tiled=True) for x in offers))
            best = best.part(jnp.int32(0), block_size)
            alive = jnp.arange(block_size) < best.count
            is_mine = (best.index >= first) & (best.index < first + local) & alive
            rows = embeddings[jnp.where(is_mine, best.index - first, 0)].astype(jnp.float32)
            rows = jax.lax.psum(jnp.where(is_mine[:, None], rows, 0), axes)
            position += jnp.sum(is_mine, dtype=jnp.int32)
            return position, left(position), _Block(best.index, best.high, rows, alive)

        start = _Kept.none(config.num_keyframes, embeddings.shape[1])
        position = jnp.int32(0)
        kept = _walk(next_block, position, left(position), start, config)
        return kept, found.is_finite, found.high

    split = P(axes)
    kept, usable, relevances = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=(split, P(), split),
        out_specs=(P(), split, split),
        check_vma=False,
    )(embeddings, query, _all_valid(embeddings, valid))

    def relevance_of(index: jax.Array) -> jax.Array:
        there = index < len(embeddings)
        return jnp.where(there, relevances[jnp.where(there, index, 0)], 0)

    return _finish(kept, usable, relevance_of, config)


def _check_shapes(embeddings: Array, query: Array | None, valid: Array | None) -> None:
    shape = np.shape(embeddings)
    if len(shape) != 2 or not jnp.issubdtype(embeddings.dtype, jnp.floating):
        raise UserError(
            f"embeddings are {getattr(embeddings, 'dtype', type(embeddings))}{list(shape)}; give "
            "float[N, E], one row per frame"
        )
    if 0 in shape:
        raise UserError(
            f"embeddings are of shape {shape}; give at least one frame, one number wide"
        )
    if query is not None and np.shape(query) != shape[1:]:
        raise UserError(
            f"the query is of shape {np.shape(query)} and the frames' embeddings of width "
            f"{shape[1]}; give the embedding that the same model makes of it, float[{shape[1]}]"
        )
    if valid is not None and np.shape(valid) != shape[:1]:
        raise UserError(f"valid is of shape {np.shape(valid)}; give bool[{shape[0]}]")


def _all_valid(embeddings: jax.Array, valid: jax.Array | None) -> jax.Array:
    return jnp.ones(len(embeddings), bool) if valid is None else jnp.asarray(valid, bool)


# Relevance.


class _Double(NamedTuple):
    """float64 numbers: rounded to float32, and the rest."""

    high: jax.Array
    low: jax.Array

    @classmethod
    def of(cls, x: jax.Array) -> _Double:
        high = x.astype(jnp.float32)
        return cls(high, (x - high.astype(jnp.float64)).astype(jnp.float32))

    def value(self) -> jax.Array:
        return self.high.astype(jnp.float64) + self.low.astype(jnp.float64)


class _Exact(NamedTuple):
    """Relevance of rows, by float64 arithmetic."""

    high: jax.Array  # float32[C], 0 where it is not finite or the row not valid
    low: jax.Array  # float32[C]
    is_finite: jax.Array  # bool[C], valid and finite
    is_eligible: jax.Array  # bool[C], and not under the floor


def _row_sums(x: jax.Array) -> jax.Array:
    """Sums over the last dimension.

    No matrix product: a library sums the rows at the edge of its tiles in another order, and equal
    frames would not be equally relevant.
    """
    return x.sum(-1)


def _cosine(dot: jax.Array, square: jax.Array, other: jax.Array) -> jax.Array:
    """Of a product and two squared lengths; 0 where one of these is."""
    # The root of a number's square is that number: a row's cosine to itself is 1.
    root = jnp.sqrt(square * other)
    return jnp.where(root == 0, 0, dot / jnp.where(root == 0, 1, root))


def _exact(rows: jax.Array, query: _Double, valid: jax.Array, floor: float | None) -> _Exact:
    """Of rows float[C, E], all at once."""
    with jax.enable_x64(True):
        rows, q = rows.astype(jnp.float32).astype(jnp.float64), query.value()
        squares = _row_sums(rows * rows)
        found = _cosine(_row_sums(rows * q), squares, _row_sums(q * q))
        is_finite = valid & jnp.isfinite(squares) & jnp.isfinite(found)
        found = jnp.where(is_finite, found, 0)
        is_eligible = is_finite if floor is None else is_finite & (found >= floor)
        found = jnp.round(found / _GRID) * _GRID
        return _Exact(*_Double.of(found), is_finite, is_eligible)


def _exact_pass(
    embeddings: jax.Array, query: _Double, valid: jax.Array, floor: float | None
) -> _Exact:
    """Of all frames, in chunks."""

    def of(rows: jax.Array, valid: jax.Array, _: jax.Array) -> _Exact:
        return _exact(rows, query, valid, floor)

    return _by_chunks(of, embeddings, valid)


def _fast_pass(embeddings: jax.Array, query: _Double, valid: jax.Array) -> jax.Array:
    """Relevance in float32, float32[N], off by no more than `_fast_error`.

    -inf for frames that are not valid, inf for those whose squares leave the range of float32.
    """
    with jax.enable_x64(True):
        q = query.value()
        square = _row_sums(q * q)
        has_length = (square > 0) & jnp.isfinite(square)
        unit = jnp.where(has_length, q / jnp.sqrt(square), jnp.nan).astype(jnp.float32)

    def of(rows: jax.Array, valid: jax.Array, _: jax.Array) -> jax.Array:
        rows = rows.astype(jnp.float32)
        # Products: any order of summing will do here.
        dot = jnp.dot(rows, unit, precision=jax.lax.Precision.HIGHEST)
        square = jnp.einsum("NE,NE->N", rows, rows, precision=jax.lax.Precision.HIGHEST)
        is_safe = (square > _SAFE[0]) & (square < _SAFE[1]) & jnp.isfinite(dot)
        return jnp.where(valid, jnp.where(is_safe, dot * jax.lax.rsqrt(square), jnp.inf), -jnp.inf)

    # In float32 nothing is converted, and the compiler keeps no copy of the features.
    at_once = embeddings.dtype == jnp.float32
    return of(embeddings, valid, None) if at_once else _by_chunks(of, embeddings, valid)


def _fast_error(width: int) -> float:
    """Bound on the error of `_fast_pass`: of sums in any order, and a few operations more."""
    return (2 * width + 32) * _UNIT_ROUNDOFF


def _query(
    embeddings: jax.Array, query: jax.Array | None, valid: jax.Array, axes: Sequence[str] = ()
) -> _Double:
    """The query, float[E]; if there is none, the sum of the unit embeddings, over `axes`."""
    if query is not None:
        query = jnp.asarray(query, jnp.float32)
        return _Double(query, jnp.zeros_like(query))

    def of(rows: jax.Array, valid: jax.Array, is_new: jax.Array) -> _Double:
        with jax.enable_x64(True):
            rows = rows.astype(jnp.float32).astype(jnp.float64)
            square = _row_sums(rows * rows)
            is_in = valid & is_new & (square > 0) & jnp.isfinite(square)
            unit = rows / jnp.sqrt(jnp.where(is_in, square, 1))[:, None]
            return _Double.of(jnp.where(is_in[:, None], unit, 0).sum(0))

    parts = _by_chunks(of, embeddings, valid, is_sum=True)
    if axes:
        parts = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), parts)
    with jax.enable_x64(True):
        return _Double.of(parts.value().sum(0))


def _by_chunks(
    fn: Callable[[jax.Array, jax.Array, jax.Array], Any],
    embeddings: jax.Array,
    valid: jax.Array,
    *,
    is_sum: bool = False,
) -> Any:
    """`fn(rows, valid, is_new)` of chunks of frames, so that no copy of all is ever made.

    The last chunk reaches back into the one before, to be as long; its rows that have been there
    are not new.

    Returns:
      What `fn` gives of each row, of all rows; with `is_sum`, what it gives of each chunk.
    """
    num_frames, width = embeddings.shape
    rows = min(num_frames, max(1, _CHUNK_BYTES // (4 * width)))
    chunks = -(-num_frames // rows)

    def of(chunk: jax.Array) -> tuple[jax.Array, Any]:
        start = jnp.minimum(chunk * rows, num_frames - rows)
        part = jax.lax.dynamic_slice_in_dim(embeddings, start, rows)
        is_new = start + jnp.arange(rows) >= chunk * rows
        return start, fn(part, jax.lax.dynamic_slice_in_dim(valid, start, rows), is_new)

    def write(chunk: jax.Array, out: Any) -> Any:
        start, found = of(chunk)

        def put(out: jax.Array, x: jax.Array) -> jax.Array:
            if is_sum:
                return out.at[chunk].set(x)
            return jax.lax.dynamic_update_slice_in_dim(out, x, start, 0)

        return jax.tree.map(put, out, found)

    def empty(x: jax.ShapeDtypeStruct) -> jax.Array:
        return jnp.zeros((chunks, *x.shape) if is_sum else (num_frames, *x.shape[1:]), x.dtype)

    shapes = jax.eval_shape(of, jax.ShapeDtypeStruct((), jnp.int32))[1]
    return jax.lax.fori_loop(0, chunks, write, jax.tree.map(empty, shapes))


# The walk.


class _Order(NamedTuple):
    """Frames from the most relevant on; those behind `count` do not take part."""

    index: jax.Array  # int32[M]
    high: jax.Array  # float32[M], relevance
    low: jax.Array  # float32[M]
    count: jax.Array  # int32

    def part(self, position: jax.Array, size: int) -> _Order:
        """So many from there; behind the end there are zeros."""
        at = position + jnp.arange(size)
        at = jnp.minimum(at, len(self.index) - 1)
        return _Order(self.index[at], self.high[at], self.low[at], self.count)


def _sort(high: jax.Array, low: jax.Array, index: jax.Array, is_eligible: jax.Array) -> _Order:
    """By relevance, then by index; what is not eligible last."""
    keys = (jnp.where(is_eligible, -high, jnp.inf), -low, index.astype(jnp.int32))
    high, low, index = jax.lax.sort(keys, num_keys=3)
    return _Order(index, -high, -low, jnp.sum(is_eligible, dtype=jnp.int32))


class _Block(NamedTuple):
    """Candidates, from the most relevant on."""

    index: jax.Array  # int32[C]
    relevance: jax.Array  # float32[C]
    rows: jax.Array  # float32[C, E], as they were given
    alive: jax.Array  # bool[C], 0 = no candidate


class _Kept(NamedTuple):
    """What the walk has kept so far, in the order in which it was."""

    count: jax.Array  # int32
    index: jax.Array  # int32[K]
    relevance: jax.Array  # float32[K]
    rows: jax.Array  # float32[K, E], as they were given
    units: jax.Array  # float32[K, E], of length 1

    @classmethod
    def none(cls, num_keyframes: int, width: int) -> _Kept:
        rows = jnp.zeros((num_keyframes, width), jnp.float32)
        slots = jnp.zeros(num_keyframes, jnp.float32)
        return cls(jnp.int32(0), slots.astype(jnp.int32), slots, rows, rows)

    def with_(self, block: _Block, units: jax.Array, place: jax.Array) -> _Kept:
        """And a candidate."""
        at = self.count
        return _Kept(
            at + 1,
            self.index.at[at].set(block.index[place]),
            self.relevance.at[at].set(block.relevance[place]),
            self.rows.at[at].set(block.rows[place]),
            self.units.at[at].set(units[place]),
        )


def _slices(
    embeddings: jax.Array, order: _Order, size: int
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array, _Block]]:
    """`next_block` of `_walk` along an order; the cursor is a position in it."""

    def next_block(position: jax.Array) -> tuple[jax.Array, jax.Array, _Block]:
        part = order.part(position, size)
        alive = position + jnp.arange(size) < order.count
        rows = embeddings[part.index].astype(jnp.float32)
        position += size
        return position, position < order.count, _Block(part.index, part.high, rows, alive)

    return next_block


def _walk(
    next_block: Callable[[Any], tuple[Any, jax.Array, _Block]],
    cursor: Any,
    is_more: jax.Array,
    kept: _Kept,
    config: SelectionConfig,
) -> _Kept:
    """Keeps candidates that repeat none of the kept ones, until K are kept or no more come.

    Args:
      next_block: from a cursor to the next one, whether there is more, and a block.
      cursor: where to begin.
      is_more: whether there is a block.
      kept: so far.
      config: the rule.
    """

    def is_on(state: tuple[Any, jax.Array, _Kept]) -> jax.Array:
        _, is_more, kept = state
        return is_more & (kept.count < config.num_keyframes)

    def resolve(state: tuple[Any, jax.Array, _Kept]) -> tuple[Any, jax.Array, _Kept]:
        cursor, _, kept = state
        cursor, is_more, block = next_block(cursor)
        return cursor, is_more, _resolve(block, kept, config)

    return jax.lax.while_loop(is_on, resolve, (cursor, is_more, kept))[2]


def _resolve(block: _Block, kept: _Kept, config: SelectionConfig) -> _Kept:
    """One block, in as many steps as candidates are kept."""
    # Of the product of two unit vectors that were rounded to float32.
    error = (block.rows.shape[1] + 16) * _UNIT_ROUNDOFF
    sure, unsure = jnp.float32(config.tau + error), jnp.float32(config.tau - error)
    with jax.enable_x64(True):
        rows = block.rows.astype(jnp.float64)
        squares = _row_sums(rows * rows)
        lengths = jnp.sqrt(jnp.where(squares > 0, squares, 1))
        units = (rows / lengths[:, None]).astype(jnp.float32)

    def similarity(others: jax.Array) -> jax.Array:
        return jnp.dot(units, others, precision=jax.lax.Precision.HIGHEST)

    # Slots that are not used are zero, and must not stand for a cosine of 0.
    used = jnp.arange(config.num_keyframes) < kept.count
    nearest = jnp.where(used, similarity(kept.units.T), -2).max(-1)

    def is_on(state: tuple[jax.Array, jax.Array, _Kept]) -> jax.Array:
        alive, _, kept = state
        return alive.any() & (kept.count < config.num_keyframes)

    def step(state: tuple[jax.Array, jax.Array, _Kept]) -> tuple[jax.Array, jax.Array, _Kept]:
        alive, nearest, kept = state
        place = jnp.argmax(alive)  # the first of those left
        repeats = jax.lax.cond(
            nearest[place] >= unsure,
            lambda: _repeats(block.rows[place], kept, config),
            lambda: jnp.bool(False),
        )
        alive = alive.at[place].set(False)

        def keep() -> tuple[jax.Array, jax.Array, _Kept]:
            closer = jnp.maximum(nearest, similarity(units[place]))
            return alive & (closer <= sure), closer, kept.with_(block, units, place)

        return jax.lax.cond(repeats, lambda: (alive, nearest, kept), keep)

    return jax.lax.while_loop(is_on, step, (block.alive & (nearest <= sure), nearest, kept))[2]


def _repeats(row: jax.Array, kept: _Kept, config: SelectionConfig) -> jax.Array:
    """Whether a frame repeats a kept one, by float64 arithmetic; bool."""
    with jax.enable_x64(True):
        row, rows = row.astype(jnp.float64), kept.rows.astype(jnp.float64)
        found = _cosine(_row_sums(rows * row), _row_sums(rows * rows), _row_sums(row * row))
        passes = found > config.tau if config.reject == ">" else found >= config.tau
        return (passes & (jnp.arange(config.num_keyframes) < kept.count)).any()


# The budget that is left.


def _finish(
    kept: _Kept,
    usable: jax.Array,
    relevance_of: Callable[[jax.Array], jax.Array],
    config: SelectionConfig,
) -> Keyframes:
    """The kept frames in the order of time, with what fills the budget.

    Args:
      kept: by the walk.
      usable: bool[N], frames that may be keyframes.
      relevance_of: float32[K] of int32[K], 0 for N.
      config: the rule.
    """
    num_frames, slots = len(usable), jnp.arange(config.num_keyframes, dtype=jnp.int32)
    is_kept = slots < kept.count
    index = jnp.where(is_kept, kept.index, num_frames)
    by_walk = (index, jnp.zeros_like(is_kept), jnp.where(is_kept, kept.relevance, 0))

    def filled() -> tuple[jax.Array, jax.Array, jax.Array]:
        # Frames are numbered as if there were no others than the usable ones.
        def among_all() -> jax.Array:
            return _fill(index, kept.count, jnp.int32(num_frames), num_frames)

        def among_some() -> jax.Array:
            number = jnp.cumsum(usable, dtype=jnp.int32)
            ranks = number[jnp.minimum(index, num_frames - 1)] - 1
            ranks = jnp.where(is_kept, ranks, num_frames)
            ranks = _fill(ranks, kept.count, number[-1], num_frames)
            return jnp.searchsorted(number, ranks + 1).astype(jnp.int32)

        chosen = jax.lax.cond(usable.all(), among_all, among_some)
        is_filled = (chosen < num_frames) & ~(chosen[:, None] == index).any(1)
        return chosen, is_filled, relevance_of(chosen)

    if config.fill:
        is_full = kept.count == config.num_keyframes
        chosen = jax.lax.cond(is_full, lambda: by_walk, filled)
    else:
        chosen = by_walk
    index, is_filled, relevances = jax.lax.sort(chosen, num_keys=1)
    return Keyframes(
        index=index,
        is_used=index < num_frames,
        is_filled=is_filled,
        relevance=relevances,
    )


def _fill(kept: jax.Array, count: jax.Array, total: jax.Array, most: int) -> jax.Array:
    """The released `distribute_frames`: unused budget spread over the gaps between kept frames.

    Every gap gets a frame at each D-th place or sooner, for the least D that the budget allows;
    what is left goes to the last frames that were not chosen. Of 40 frames, 8 to be chosen and 10
    and 25 kept, D is 5: 5 | 16, 21 | 31, 36, and 39 is left.

    Args:
      kept: int32[K], `most` where unused, in any order.
      count: how many are used.
      total: of how many frames.
      most: these at most, a number that no frame has.

    Returns:
      int32[K], `most` where unused, in any order; the kept ones first.
    """
    slots = len(kept)
    slot = jnp.arange(slots, dtype=jnp.int32)
    kept = jnp.sort(kept)
    # Gap number g is in front of kept frame g; behind the last there is one, and all others are
    # empty, for they begin and end with the video.
    begin = jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.minimum(kept + 1, total)])
    end = jnp.concatenate([jnp.minimum(kept, total), total[None]])
    length = end - begin
    budget = slots - count

    every = _spread(length, budget, most)
    extra = _extra(length, every)  # int32[K + 1]
    until = jnp.cumsum(extra, dtype=jnp.int32)
    # No step passes the end of its gap: extra * step <= extra * every < length.
    step = -(-length // (extra + 1))
    # Slots behind the kept ones, in the order of gaps.
    number = slot - count
    gap = jnp.minimum(jnp.searchsorted(until, number, side="right"), slots)
    place = begin[gap] + step[gap] * (number - (until - extra)[gap] + 1)
    chosen = jnp.where((number >= 0) & (number < until[-1]), place, kept)
    chosen = jnp.where(slot < count, kept, chosen)

    # The rest, from the end of the video backwards; it lies within the last K frames.
    used = count + until[-1]
    last = total - 1 - slot
    is_free = (last >= 0) & ~(last[:, None] == chosen).any(1)
    order = jnp.cumsum(is_free, dtype=jnp.int32) - 1
    target = jnp.where(is_free, used + order, slots)
    return chosen.at[target].set(last, mode="drop")


def _extra(length: jax.Array, every: jax.Array) -> jax.Array:
    """Frames that a gap gets."""
    return jnp.where(length > 0, -(-length // every) - 1, 0)


def _spread(length: jax.Array, budget: jax.Array, most: int) -> jax.Array:
    """The least D from 1 on for which the gaps get no more than the budget, int32."""
    low, high = jnp.int32(1), jnp.int32(most)
    tries = jnp.arange(1, _FAN + 1, dtype=jnp.int32)
    left = most
    while left > 1:
        # The last try is never refused: it is at or behind `high`.
        every = jnp.minimum(low - 1 + tries * (-(-left // _FAN)), high)
        fits = _extra(length, every[:, None]).sum(-1) <= budget
        first = jnp.argmax(fits)
        low = jnp.where(first > 0, every[jnp.maximum(first - 1, 0)] + 1, low)
        high = every[first]
        left = -(-left // _FAN)
    return high
