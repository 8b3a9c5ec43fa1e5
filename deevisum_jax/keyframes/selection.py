"""Differential keyframe selection (ViLaMP, Cheng et al. 2025), without an N x N matrix.

Frames are walked from the most relevant on (algorithm 1). One is kept unless it repeats a frame
that was kept before (their cosine passes tau), until K are kept. What is left of the budget is
spread over the gaps as the released `distribute_frames` does it (frame_selector.py).

Letters: `N` frames, `E` width of an embedding, `K` keyframes, `C` candidates of a block.

Chosen are the frames that float64 arithmetic chooses, at the price of float32:

1. One pass in float32 gives every frame's relevance to within a bound on rounding. The walk goes
   along the largest few: blocks of them are computed again in float64, and those that no other
   frame can precede are resolved in order.
2. If that is not enough, the walk is guessed: it goes on along the best frame of each part of the
   video. One product of all frames with those it keeps shows how far no other frame could have
   interfered, and so far the guess holds.
3. If that is not enough, a pass in float64 and one sort give the order of all that are left.

A block is resolved by a product with the kept frames, then one more with each frame that is kept.
A similarity that is within the bound on rounding of tau is computed again in float64, when the
candidate's turn comes.
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
from deevisum_jax.keyframes import cosines, filling
from deevisum_jax.typing import Array

REJECTS = (">", ">=")

_LONG = 16  # times a block that of the long walk, in which few candidates are kept


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
    rows = max(1, cosines.CHUNK_BYTES // (4 * embeddings.shape[1]))
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
    found = cosines.exact_pass(
        embeddings, cosines.query_or_mean(embeddings, query, valid), valid, None
    )
    return found.high


@functools.partial(jax.jit, static_argnames=("config", "block_size"))
def select(
    embeddings: Array,
    query: Array | None = None,
    valid: Array | None = None,
    *,
    config: SelectionConfig,
    block_size: int = 64,
) -> Keyframes:
    """The keyframes of a video; may be jitted, and mapped over videos with `vmap`.

    A frame whose embedding is zero has cosine 0 to everything. One whose embedding is not finite
    is no keyframe; `check_embeddings` refuses it. Of frames that are equally relevant the earlier
    comes first. If there are fewer than K frames, all of them are chosen when the budget is filled.
    `vmap` runs the passes of every case, so it saves no more than calls. Of bfloat16 XLA:CPU makes
    a copy in float32; of float32 and float16 there is none.

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
    query = cosines.query_or_mean(embeddings, query, valid)
    fast = cosines.fast_pass(embeddings, query, valid)
    is_safe = fast.relevance.max() < jnp.inf
    order_of = functools.partial(_order_of, embeddings, query, valid, config)

    def is_done(state: _State) -> jax.Array:
        least = -math.inf if config.floor is None else config.floor
        return (
            (state.kept.count == config.num_keyframes)
            | (state.limit == -jnp.inf)
            | (state.limit < least)
        )

    def go_on(state: _State) -> tuple[_Kept, jax.Array]:
        def guess(
            state: tuple[_State, jax.Array, jax.Array],
        ) -> tuple[_State, jax.Array, jax.Array]:
            before, struck, _ = state
            after, struck = _guess(embeddings, fast, struck, order_of, before, config, block_size)
            return after, struck, ~is_done(after) & (after.kept.count > before.kept.count)

        state, struck, _ = jax.lax.while_loop(
            lambda state: state[2], guess, (state, jnp.zeros_like(valid), is_safe)
        )

        def by_order_of_all(kept: _Kept) -> tuple[_Kept, jax.Array]:
            found = cosines.exact_pass(embeddings, query, valid, config.floor)
            is_left = found.is_eligible & (found.high <= state.limit) & ~struck
            order = _sort(found.high, found.low, jnp.arange(num_frames, dtype=jnp.int32), is_left)
            next_block = _slices(embeddings, order, _LONG * block_size)
            _, kept = _walk(next_block, jnp.int32(0), order.count > 0, kept, config)
            return kept, found.is_finite

        return jax.lax.cond(is_done(state), lambda kept: (kept, valid), by_order_of_all, state.kept)

    start = _Kept.none(config.num_keyframes, embeddings.shape[1])
    state = _State(start, jnp.float32(jnp.inf))
    state = _walk_first(embeddings, fast, order_of, state, config, block_size)
    kept, usable = jax.lax.cond(is_done(state), lambda state: (state.kept, valid), go_on, state)

    def relevance_of(index: jax.Array) -> jax.Array:
        rows = embeddings[jnp.minimum(index, num_frames - 1)]
        return cosines.exact(rows, query, index < num_frames, None).high

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
        query = cosines.query_or_mean(embeddings, query, valid, axes)
        found = cosines.exact_pass(embeddings, query, valid, config.floor)
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
        _, kept = _walk(next_block, position, left(position), start, config)
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


def _order_of(
    embeddings: jax.Array,
    query: cosines.Double,
    valid: jax.Array,
    config: SelectionConfig,
    places: jax.Array,
    is_in: Callable[[jax.Array], jax.Array],
) -> _Order:
    """Of few frames, int32[C], those whose relevance, float32[C], is in."""
    # Gathered within the loops that compute in float64, rows would be read number by number.
    rows = jax.lax.optimization_barrier(embeddings[places].astype(jnp.float32))
    found = cosines.exact(rows, query, valid[places], config.floor)
    return _sort(found.high, found.low, places, found.is_eligible & is_in(found.high))


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


class _State(NamedTuple):
    """How far the walk has come."""

    kept: _Kept
    limit: jax.Array  # float32; what is more relevant has had its turn, all else has not


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
) -> tuple[Any, _Kept]:
    """Keeps candidates that repeat none of the kept ones, until K are kept or no more come.

    Args:
      next_block: from a cursor to the next one, whether there is more, and a block.
      cursor: where to begin.
      is_more: whether there is a block.
      kept: so far.
      config: the rule.

    Returns:
      The cursor, and what is kept.
    """

    def is_on(state: tuple[Any, jax.Array, _Kept]) -> jax.Array:
        _, is_more, kept = state
        return is_more & (kept.count < config.num_keyframes)

    def resolve(state: tuple[Any, jax.Array, _Kept]) -> tuple[Any, jax.Array, _Kept]:
        cursor, _, kept = state
        cursor, is_more, block = next_block(cursor)
        return cursor, is_more, _resolve(block, kept, config)

    cursor, _, kept = jax.lax.while_loop(is_on, resolve, (cursor, is_more, kept))
    return cursor, kept


def _walk_first(
    embeddings: jax.Array,
    fast: cosines.Fast,
    order_of: Callable[..., _Order],
    state: _State,
    config: SelectionConfig,
    size: int,
) -> _State:
    """Along the most relevant frames, as long as float32 can tell which are next."""
    num_frames, error = len(embeddings), jnp.float32(cosines.fast_error(embeddings.shape[1]))
    window = size * -(-max(8 * size, 16 * config.num_keyframes) // size)
    values, places = jax.lax.top_k(fast.relevance, min(window + 1, num_frames))
    filling = (0, window + 1 - len(values))
    values = jnp.pad(values, filling, constant_values=-jnp.inf)
    # Seen through, slices of the result would make the compiler sort all frames instead.
    values, places = jax.lax.optimization_barrier((values, jnp.pad(places, filling)))

    def next_block(
        cursor: tuple[jax.Array, jax.Array],
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array, _Block]:
        position, limit = cursor
        few = jax.lax.dynamic_slice_in_dim(values, position, size)
        # No frame behind these has more than that, and each that has is among those so far.
        bound = values[position + size] + error
        order = order_of(
            jax.lax.dynamic_slice_in_dim(places, position, size),
            lambda high: (high > bound) & (high <= limit) & (few > -jnp.inf),
        )
        *_, block = _slices(embeddings, order, size)(jnp.int32(0))
        step = jnp.sum(few > bound + error, dtype=jnp.int32)
        position += step
        is_more = (step > 0) & (position + size <= window) & (bound > -jnp.inf)
        return (position, bound), is_more, block

    is_safe = fast.relevance.max() < jnp.inf
    (_, limit), kept = _walk(next_block, (jnp.int32(0), state.limit), is_safe, state.kept, config)
    return _State(kept, limit)


def _guess(
    embeddings: jax.Array,
    fast: cosines.Fast,
    struck: jax.Array,
    order_of: Callable[..., _Order],
    state: _State,
    config: SelectionConfig,
    size: int,
) -> tuple[_State, jax.Array]:
    """Goes on along the best frame of each part of the video, as far as that proves right.

    A frame is proved not to interfere if it surely repeats one that was kept and surely precedes
    it. The walk is right down to the most relevant frame of which that is not so.

    Returns:
      How far the walk has come now, and bool[N], 1 = surely repeats what is kept.
    """
    num_frames, error = len(embeddings), jnp.float32(cosines.fast_error(embeddings.shape[1]))
    is_left = (fast.relevance <= state.limit + error) & ~struck
    left = jnp.where(is_left, fast.relevance, -jnp.inf)
    parts = min(2 * size, num_frames)
    length = -(-num_frames // parts)
    filled = jnp.pad(left, (0, parts * length - num_frames), constant_values=-jnp.inf)
    filled = filled.reshape(parts, length)
    is_there = filled.max(-1) > -jnp.inf
    places = jnp.argmax(filled, -1) + length * jnp.arange(parts)
    places = jnp.where(is_there, places, 0).astype(jnp.int32)
    order = order_of(places, lambda high: (high <= state.limit) & is_there)
    next_block = _slices(embeddings, order, parts)
    _, guess = _walk(next_block, jnp.int32(0), order.count > 0, state.kept, config)

    slots = jnp.arange(config.num_keyframes, dtype=jnp.int32)
    # What is less relevant than this comes behind the kept frame.
    reach = jnp.where(slots < state.kept.count, jnp.inf, guess.relevance - error)
    reach = jnp.where(slots < guess.count, reach, -jnp.inf)
    sure = jnp.float32(config.tau) + error

    def first_repeated(rows: jax.Array, fast: cosines.Fast) -> jax.Array:
        dots = jnp.dot(rows, guess.units.T, precision=jax.lax.Precision.HIGHEST)
        repeats = (dots * fast.inverse[:, None] > sure) & (fast.relevance[:, None] < reach)
        return jnp.where(repeats, slots, config.num_keyframes).min(-1)

    first = cosines.in_float32(first_repeated, embeddings, fast)
    interferes = first == config.num_keyframes
    interferes = interferes.at[jnp.where(is_there, places, num_frames)].set(False, mode="drop")
    limit = jnp.where(interferes, left, -jnp.inf).max() + error
    limit = jnp.minimum(limit, state.limit)
    is_right = (slots < state.kept.count) | (guess.relevance > limit)
    count = jnp.sum((slots < guess.count) & is_right, dtype=jnp.int32)
    return _State(guess._replace(count=count), limit), first < count


def _resolve(block: _Block, kept: _Kept, config: SelectionConfig) -> _Kept:
    """One block, in as many steps as candidates are kept."""
    # Of the product of two unit vectors that were rounded to float32.
    error = (block.rows.shape[1] + 16) * cosines.UNIT_ROUNDOFF
    sure, unsure = jnp.float32(config.tau + error), jnp.float32(config.tau - error)
    with jax.enable_x64(True):
        rows = block.rows.astype(jnp.float64)
        squares = cosines.row_sums(rows * rows)
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
        found = cosines.cosine(
            cosines.row_sums(rows * row), cosines.row_sums(rows * rows), cosines.row_sums(row * row)
        )
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
            return filling.fill(index, kept.count, jnp.int32(num_frames), num_frames)

        def among_some() -> jax.Array:
            number = jnp.cumsum(usable, dtype=jnp.int32)
            ranks = number[jnp.minimum(index, num_frames - 1)] - 1
            ranks = jnp.where(is_kept, ranks, num_frames)
            ranks = filling.fill(ranks, kept.count, number[-1], num_frames)
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
