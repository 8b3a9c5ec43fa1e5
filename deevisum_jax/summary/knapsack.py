"""The exact 0/1 knapsack that turns shot scores into a summary of bounded length."""

from __future__ import annotations

import numpy as np

from deevisum_jax.errors import UserError


def knapsack(values: np.ndarray, weights: np.ndarray, capacity: int) -> np.ndarray:
    """The set of items with the greatest total value whose weights fit the capacity.

    Ties are settled the same way every time: item i is taken only where that makes the best total
    of items 0..i strictly greater, so an item is never swapped in for earlier ones of equal value,
    and items of value 0 or less are never taken.

    Args:
      values: float[n], finite.
      weights: int[n], not negative.
      capacity: the greatest total weight; 0 or less takes only items without weight.

    Returns:
      bool[n], 1 = taken.

    Raises:
      UserError: shapes differ, a value is not finite, or a weight is negative or not whole.

    Dynamic programming over capacity, O(n · capacity) time, one bit per cell of memory.
    """
    values = np.asarray(values, np.float64)
    weights = np.asarray(weights)
    if values.ndim != 1 or values.shape != weights.shape:
        raise UserError(
            f"knapsack wants one weight per value, got {values.shape} and {weights.shape}"
        )
    if not np.isfinite(values).all():
        raise UserError(
            f"knapsack value {int(np.flatnonzero(~np.isfinite(values))[0])} is not a finite "
            "number; check the scores before selecting"
        )
    whole = weights.astype(np.int64)
    if (whole != weights).any() or (whole < 0).any():
        raise UserError("knapsack weights must be whole and not negative; give lengths in frames")

    capacity = int(min(capacity, whole.sum()))
    if capacity < 0:
        return np.zeros(len(values), bool)
    best = np.zeros(capacity + 1)  # best[c]: greatest value with total weight at most c
    better = np.zeros(capacity + 1, bool)
    taken = np.zeros((len(values), (capacity + 8) // 8), np.uint8)
    for i, (value, weight) in enumerate(zip(values, whole, strict=True)):
        if weight > capacity or value <= 0:
            continue
        with_item = best[: capacity + 1 - weight] + value
        better[:weight] = False
        np.greater(with_item, best[weight:], out=better[weight:])
        np.maximum(with_item, best[weight:], out=best[weight:])
        taken[i] = np.packbits(better)

    chosen = np.zeros(len(values), bool)
    room = capacity
    for i in range(len(values) - 1, -1, -1):
        if taken[i, room >> 3] >> (7 - (room & 7)) & 1:
            chosen[i] = True
            room -= whole[i]
    return chosen
