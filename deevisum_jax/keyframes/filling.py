"""The budget of keyframes that the walk leaves, spread over the video (ViLaMP's frame_selector.py).

`K` is the budget.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

_FAN = 64  # values tried at a time by the search in `_spread`


def fill(kept: jax.Array, count: jax.Array, total: jax.Array, most: int) -> jax.Array:
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
