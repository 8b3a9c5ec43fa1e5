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
    values, weights = np.asarray(values, np.float64), np.asarray(weights)
    if values.ndim != 1 or values.shape != weights.shape:
        raise UserError(
            f"knapsack wants one weight per value, got {values.shape} and {weights.shape}"
        )
    return knapsack_rows(values[None], weights, capacity)[0]


def knapsack_rows(values: np.ndarray, weights: np.ndarray, capacity: int) -> np.ndarray:
    """`knapsack` of the same items valued by several people.

    Args:
      values: float[U, n], finite.
      weights: int[n], not negative.
      capacity: the greatest total weight.

    Returns:
      bool[U, n], 1 = taken.

    Raises:
      UserError: as `knapsack`.
    """
    values, weights = np.asarray(values, np.float64), np.asarray(weights)
    if values.ndim != 2 or values.shape[1:] != weights.shape:
        raise UserError(
            f"knapsack wants one weight per value, got {values.shape} and {weights.shape}"
        )
    if not np.isfinite(values).all():
        raise UserError(
            f"knapsack value {int(np.argwhere(~np.isfinite(values))[0][1])} is not a finite "
            "number; check the scores before selecting"
        )
    whole = weights.astype(np.int64)
    if (whole != weights).any() or (whole < 0).any():
        raise UserError("knapsack weights must be whole and not negative; give lengths in frames")

    U, n = values.shape
    capacity = int(min(capacity, whole.sum()))
    if capacity < 0:
        return np.zeros((U, n), bool)
    # Of no use anywhere: never better than what is there.
    gains = np.where(values > 0, values, -np.inf)
    useful = (values > 0).any(0) & (whole <= capacity)
    best = np.zeros((U, capacity + 1))  # best[u, c]: greatest value with total weight at most c
    better = np.zeros((U, capacity + 1), bool)
    taken = np.zeros((n, U, (capacity + 8) // 8), np.uint8)
    for i in np.flatnonzero(useful).tolist():
        weight = whole[i]
        with_item = best[:, : capacity + 1 - weight] + gains[:, i, None]
        better[:, :weight] = False
        np.greater(with_item, best[:, weight:], out=better[:, weight:])
        np.maximum(with_item, best[:, weight:], out=best[:, weight:])
        taken[i] = np.packbits(better, axis=1)

    chosen = np.zeros((U, n), bool)
    lengths = whole.tolist()
    for u in range(U):
        room = capacity
        for i in range(n - 1, -1, -1):
            if taken[i, u, room >> 3] >> (7 - (room & 7)) & 1:
                chosen[u, i] = True
                room -= lengths[i]
    return chosen
