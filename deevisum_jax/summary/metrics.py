"""How a summary and its scores are compared with people's: F1, Kendall's tau, Spearman's rho.

Correlations with a constant sequence are undefined (scipy gives nan). Here they are 0.0, "no
agreement beyond chance", so that a model that answers the same everywhere gets the value of a coin
and not a hole in the mean; `protocols` flags such videos.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from deevisum_jax.errors import UserError

_MOST_LEVELS = 64  # distinct values up to which counting level by level beats scipy's sorting


def f1(summary: np.ndarray, reference: np.ndarray) -> float:
    """Harmonic mean of precision and recall of the frames of `summary`, in [0, 1].

    Args:
      summary: bool[n], 1 = frame is in the summary.
      reference: bool[n], likewise.

    Nothing in common, or either of them empty, gives 0.0.

    Raises:
      UserError: the lengths differ.
    """
    summary, reference = np.asarray(summary, bool), np.asarray(reference, bool)
    if summary.shape != reference.shape or summary.ndim != 1:
        raise UserError(
            f"F1 compares two summaries of one video frame by frame, got {summary.shape} and "
            f"{reference.shape} frames"
        )
    common = np.count_nonzero(summary & reference)
    if not common:
        return 0.0
    return 2.0 * common / (np.count_nonzero(summary) + np.count_nonzero(reference))


def f1_matrix(summaries: np.ndarray, references: np.ndarray) -> np.ndarray:
    """float64[U, V]: `f1` of every row of bool[U, n] with every row of bool[V, n]."""
    a, b = _same_length(summaries, references, np.float64)
    a, b = a != 0, b != 0
    common = a.astype(np.float64) @ b.T.astype(np.float64)
    total = a.sum(1)[:, None] + b.sum(1)[None]
    return 2.0 * common / np.maximum(total, 1)


def kendall_tau(x: np.ndarray, y: np.ndarray) -> float:
    """Kendall's tau-b of two float[n]; 0.0 where either is constant."""
    x, y = _pair(x, y)
    if _constant(x[None])[0] or _constant(y[None])[0]:
        return 0.0
    return float(stats.kendalltau(x, y, variant="b").statistic)


def spearman_rho(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rho of two float[n], tied values share their mean rank; 0.0 where constant."""
    x, y = _pair(x, y)
    if _constant(x[None])[0] or _constant(y[None])[0]:
        return 0.0
    return float(stats.spearmanr(x, y).statistic)


def kendall_tau_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64[U, V]: `kendall_tau` of every row of float[U, n] with every row of float[V, n].

    Quick when rows of `b` take few distinct values, as annotators' scores do: with x sorted, the
    pairs (i, j), x_j < x_i, are counted level by level of y in O(n levels) for all of `b` at once.
    """
    a, b = _same_length(a, b, np.float64)
    level = np.stack([np.unique(row, return_inverse=True)[1] for row in b])
    L = int(level.max()) + 1
    if L > _MOST_LEVELS:
        return np.array([[kendall_tau(x, y) for y in b] for x in a])
    at_level = level[:, None] == np.arange(L)[None, :, None]  # bool[V, L, n]
    untied_b = _untied_pairs(at_level.sum(2))
    tau = np.zeros((len(a), len(b)))
    for u, x in enumerate(a):
        order = np.argsort(x)
        smaller = np.searchsorted(x[order], x[order])  # how many x_j are below x_i
        # below[v, l, i]: how many j with x_j < x_i have y_j at level l or lower.
        below = at_level[:, :, order].cumsum(2, dtype=np.int32)
        below = np.where(smaller > 0, below[:, :, smaller - 1], 0).cumsum(1)
        own = level[:, None, order]
        up_to_own = np.take_along_axis(below, own, 1)
        lower = np.where(own > 0, np.take_along_axis(below, np.maximum(own - 1, 0), 1), 0)
        agree = (lower - (below[:, -1:] - up_to_own)).sum((1, 2))
        norm = np.sqrt(_untied_pairs(np.unique(x, return_counts=True)[1][None]) * untied_b)
        tau[u] = np.where(norm > 0, agree / np.where(norm > 0, norm, 1), 0.0)
    return tau


def spearman_rho_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64[U, V]: `spearman_rho` of every row of float[U, n] with every row of float[V, n]."""
    a, b = _same_length(a, b, np.float64)
    a = stats.rankdata(a, axis=1)
    b = stats.rankdata(b, axis=1)
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    norm = np.sqrt((a**2).sum(1)[:, None] * (b**2).sum(1)[None])
    return np.where(norm > 0, a @ b.T / np.where(norm > 0, norm, 1), 0.0)


def _untied_pairs(counts: np.ndarray) -> np.ndarray:
    """float64[V]: pairs of different value, from int[V, L] how often each value occurs."""
    n = counts.sum(1, dtype=np.float64)
    return (n * (n - 1) - (counts * (counts - 1.0)).sum(1)) / 2


def _constant(rows: np.ndarray) -> np.ndarray:
    return rows.min(1) == rows.max(1)


def _pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = _same_length(np.asarray(x)[None], np.asarray(y)[None], np.float64)
    return a[0], b[0]


def _same_length(a: np.ndarray, b: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, dtype), np.asarray(b, dtype)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.shape[1]:
        raise UserError(
            f"rows to compare must have one common length of at least 1, got {a.shape} and "
            f"{b.shape}; sample both at the same times"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise UserError("scores to compare hold a value that is not a finite number")
    return a, b
