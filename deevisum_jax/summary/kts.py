"""Kernel Temporal Segmentation (Potapov et al., ECCV 2014) with a linear kernel.

The result is that of the field's published `cpd_auto`: the segmentation into m + 1 pieces with the
least within-piece scatter, for the m that minimises scatter / N plus a penalty that grows with m.
Sums are formed in the same order, so that ties and rounding fall the same way.
"""

from __future__ import annotations

import numpy as np

from deevisum_jax.errors import UserError

_ROWS_PER_BLOCK = 64  # start positions handled at once: a block stays in the processor's cache


def _scatters(features: np.ndarray) -> np.ndarray:
    """float64[N, N]: row i, column j = squared distance to their mean, summed over items i..j.

    A piece does not end before it begins: infinite where j < i.
    """
    N = len(features)
    kernel = features @ features.T
    diagonal = np.concatenate([[0.0], np.cumsum(np.diag(kernel))])
    square = np.zeros((N + 1, N + 1))
    square[1:, 1:] = kernel.cumsum(0).cumsum(1)
    corner = np.diag(square)
    # (sum over the square i..j) = S[j+1, j+1] + S[i, i] - S[j+1, i] - S[i, j+1]
    inside = corner[None, 1:] + corner[:-1, None] - square[1:, :-1].T - square[:-1, 1:]
    length = np.maximum(np.arange(1, N + 1)[None] - np.arange(N)[:, None], 1)
    scatters = diagonal[None, 1:] - diagonal[:-1, None] - inside / length
    scatters[np.tril_indices(N, -1)] = np.inf
    return scatters


def change_points(
    features: np.ndarray,
    *,
    max_change_points: int,
    penalty: float = 1.0,
    descriptor_rate: float = 1.0,
) -> np.ndarray:
    """Where the content changes: KTS with a linear kernel and the number of changes chosen.

    Args:
      features: float[N, D], one row per sampled frame; L2-normalised rows are usual.
      max_change_points: the largest number of changes considered, at most N - 1 are used.
      penalty: the field's `vmax`; larger gives fewer changes.
      descriptor_rate: native frames per row (the field's `desc_rate`), at least 1; it only
        weakens the penalty.

    Returns:
      int64[m], ascending, each in [1, N - 1]: row c begins a new piece.

    Raises:
      UserError: the features are not a finite, non-empty [N, D] or an option is out of range.

    Time is O(N² m) with m the changes that had to be tried, memory O(N²).
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not len(features) or not np.isfinite(features).all():
        raise UserError(
            f"KTS features must be finite and of shape [N, D] with N >= 1, got shape "
            f"{features.shape}; drop the rows that could not be computed"
        )
    if max_change_points < 0 or penalty < 0 or descriptor_rate < 1:
        raise UserError(
            f"KTS wants max_change_points >= 0, penalty >= 0 and descriptor_rate >= 1, got "
            f"{max_change_points=}, {penalty=}, {descriptor_rate=}"
        )
    N = len(features)
    most = min(int(max_change_points), N - 1)
    scatters = _scatters(features)

    native = N * descriptor_rate
    count = np.arange(1, most + 1)
    penalties = np.zeros(most + 1)
    penalties[1:] = (penalty * count / (2.0 * native)) * (np.log(native / count) + 1)

    # table[k][l]: least scatter of the first l rows cut into k + 1 pieces.
    table = [np.concatenate([[np.inf], scatters[0]])]
    costs = [table[0][N] / N]
    block = np.empty((_ROWS_PER_BLOCK, N))
    for k in range(1, most + 1):
        # The penalty grows with k and no scatter is negative (up to rounding), so once the penalty
        # alone exceeds the best cost, no later k can win. The margin covers the rounding.
        if penalties[k] > min(costs) + 1e-9:
            break
        before, row = table[-1], np.full(N + 1, np.inf)
        for t in range(k, N, _ROWS_PER_BLOCK):
            stop = min(t + _ROWS_PER_BLOCK, N)
            sums = np.add(before[t:stop, None], scatters[t:stop, t:], out=block[: stop - t, t:])
            np.minimum(row[t + 1 :], sums.min(0), out=row[t + 1 :])
        table.append(row)
        costs.append(row[N] / N + penalties[k])

    best = int(np.argmin(costs))
    found, end = np.empty(best, np.int64), N
    for k in range(best, 0, -1):
        end = k + int(np.argmin(table[k - 1][k:end] + scatters[k:end, end - 1]))
        found[k - 1] = end
    return found
