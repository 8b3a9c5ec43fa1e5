"""Cosines of frames to a query: by float64 arithmetic, or in float32 with a bound on the error.

Letters: `N` frames, `E` width of an embedding, `C` frames of few.

Of a float64 number that outlives a function the float32 parts are kept, the number rounded and what
remains: 48 bits, and nothing around has to know that type.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

# Relevance is rounded to this. What is equal on paper (two scenes as far from the mean of both) and
# unequal by how float64 rounds is equal then, and the earlier frame comes first.
_GRID = 2.0**-40
CHUNK_BYTES = 2**22  # of float32, that a pass holds at a time
UNIT_ROUNDOFF = 2.0**-24
# Squared lengths whose square root and products float32 holds without loss.
_SAFE = (1e-30, 1e30)


class Double(NamedTuple):
    """float64 numbers: rounded to float32, and the rest."""

    high: jax.Array
    low: jax.Array

    @classmethod
    def of(cls, x: jax.Array) -> Double:
        high = x.astype(jnp.float32)
        return cls(high, (x - high.astype(jnp.float64)).astype(jnp.float32))

    def value(self) -> jax.Array:
        return self.high.astype(jnp.float64) + self.low.astype(jnp.float64)


class Exact(NamedTuple):
    """Relevance of rows, by float64 arithmetic."""

    high: jax.Array  # float32[C], 0 where it is not finite or the row not valid
    low: jax.Array  # float32[C]
    is_finite: jax.Array  # bool[C], valid and finite
    is_eligible: jax.Array  # bool[C], and not under the floor


def row_sums(x: jax.Array) -> jax.Array:
    """Sums over the last dimension.

    No matrix product: a library sums the rows at the edge of its tiles in another order, and equal
    frames would not be equally relevant.
    """
    return x.sum(-1)


def cosine(dot: jax.Array, square: jax.Array, other: jax.Array) -> jax.Array:
    """Of a product and two squared lengths; 0 where one of these is."""
    # The root of a number's square is that number: a row's cosine to itself is 1.
    root = jnp.sqrt(square * other)
    return jnp.where(root == 0, 0, dot / jnp.where(root == 0, 1, root))


def exact(rows: jax.Array, query: Double, valid: jax.Array, floor: float | None) -> Exact:
    """Of rows float[C, E], all at once."""
    with jax.enable_x64(True):
        rows, q = rows.astype(jnp.float32).astype(jnp.float64), query.value()
        squares = row_sums(rows * rows)
        found = cosine(row_sums(rows * q), squares, row_sums(q * q))
        is_finite = valid & jnp.isfinite(squares) & jnp.isfinite(found)
        found = jnp.where(is_finite, found, 0)
        is_eligible = is_finite if floor is None else is_finite & (found >= floor)
        found = jnp.round(found / _GRID) * _GRID
        return Exact(*Double.of(found), is_finite, is_eligible)


def exact_pass(
    embeddings: jax.Array, query: Double, valid: jax.Array, floor: float | None
) -> Exact:
    """Of all frames, in chunks."""

    def of(rows: jax.Array, valid: jax.Array, _: jax.Array) -> Exact:
        return exact(rows, query, valid, floor)

    return _by_chunks(of, embeddings, valid)


class Fast(NamedTuple):
    """Of every frame, in float32."""

    relevance: jax.Array  # float32[N], off by no more than `fast_error`
    inverse: jax.Array  # float32[N], 1 / length


def fast_pass(embeddings: jax.Array, query: Double, valid: jax.Array) -> Fast:
    """Relevance is -inf for frames that are not valid, and inf where float32 will not do."""
    with jax.enable_x64(True):
        q = query.value()
        square = row_sums(q * q)
        has_length = (square > 0) & jnp.isfinite(square)
        unit = jnp.where(has_length, q / jnp.sqrt(square), jnp.nan).astype(jnp.float32)

    def of(rows: jax.Array, valid: jax.Array) -> Fast:
        # Products: any order of summing will do here.
        dot = jnp.dot(rows, unit, precision=jax.lax.Precision.HIGHEST)
        square = jnp.einsum("NE,NE->N", rows, rows, precision=jax.lax.Precision.HIGHEST)
        is_safe = (square > _SAFE[0]) & (square < _SAFE[1]) & jnp.isfinite(dot)
        inverse = jax.lax.rsqrt(square)
        relevance = jnp.where(valid, jnp.where(is_safe, dot * inverse, jnp.inf), -jnp.inf)
        return Fast(relevance, inverse)

    return in_float32(of, embeddings, valid)


def in_float32(fn: Callable[[jax.Array, Any], Any], embeddings: jax.Array, given: Any) -> Any:
    """`fn(rows, given)` of all frames; only what has to be converted is taken in chunks."""
    if embeddings.dtype == jnp.float32:
        return fn(embeddings, given)
    return _by_chunks(lambda rows, given, _: fn(rows.astype(jnp.float32), given), embeddings, given)


def fast_error(width: int) -> float:
    """Bound on a cosine's error in float32: of sums in any order, and a few operations more."""
    return (2 * width + 32) * UNIT_ROUNDOFF


def query_or_mean(
    embeddings: jax.Array, query: jax.Array | None, valid: jax.Array, axes: Sequence[str] = ()
) -> Double:
    """The query, float[E]; if there is none, the sum of the unit embeddings, over `axes`."""
    if query is not None:
        query = jnp.asarray(query, jnp.float32)
        return Double(query, jnp.zeros_like(query))

    def of(rows: jax.Array, valid: jax.Array, is_new: jax.Array) -> Double:
        with jax.enable_x64(True):
            rows = rows.astype(jnp.float32).astype(jnp.float64)
            square = row_sums(rows * rows)
            is_in = valid & is_new & (square > 0) & jnp.isfinite(square)
            unit = rows / jnp.sqrt(jnp.where(is_in, square, 1))[:, None]
            return Double.of(jnp.where(is_in[:, None], unit, 0).sum(0))

    parts = _by_chunks(of, embeddings, valid, is_sum=True)
    if axes:
        parts = jax.tree.map(lambda x: jax.lax.all_gather(x, axes, tiled=True), parts)
    with jax.enable_x64(True):
        return Double.of(parts.value().sum(0))


def _by_chunks(
    fn: Callable[[jax.Array, Any, jax.Array], Any],
    embeddings: jax.Array,
    given: Any,
    *,
    is_sum: bool = False,
) -> Any:
    """`fn(rows, given, is_new)` of chunks of frames, so that no copy of all is ever made.

    The last chunk reaches back into the one before, to be as long; its rows that have been there
    are not new.

    Returns:
      What `fn` gives of each row, of all rows; with `is_sum`, what it gives of each chunk.
    """
    num_frames, width = embeddings.shape
    rows = min(num_frames, max(1, CHUNK_BYTES // (4 * width)))
    chunks = -(-num_frames // rows)

    def of(chunk: jax.Array) -> tuple[jax.Array, Any]:
        start = jnp.minimum(chunk * rows, num_frames - rows)
        part, of_part = jax.tree.map(
            lambda x: jax.lax.dynamic_slice_in_dim(x, start, rows), (embeddings, given)
        )
        is_new = start + jnp.arange(rows) >= chunk * rows
        return start, fn(part, of_part, is_new)

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
