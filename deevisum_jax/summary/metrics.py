"""How a summary and its scores are compared with people's: F1, Kendall's tau, Spearman's rho.

Correlations with a constant sequence are undefined (scipy gives nan). Here they are 0.0, "no
agreement beyond chance", so that a model that answers the same everywhere gets the value of a coin
and not a hole in the mean; `protocols` flags such videos.
"""

from __future__ import annotations

import numpy as np
from scipy import stats

from deevisum_jax.errors import UserError

# Tables of levels take time in proportion to their rows times columns squared; up to this many
# times the number of points they beat scipy's sorting.
_MOST_WORK = 64
_MOST_CELLS = 1 << 21  # of such tables at once, 16 MB
_FEW_LEVELS = 64  # up to which rows share their levels, though one may lack some


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
    """float64[U, V]: `f1` of every row of bool[U, n] with every row of bool[V, n].

    Raises:
      UserError: the lengths differ, or a value is not a finite number.
    """
    a, b = np.asarray(summaries), np.asarray(references)
    _check_rows(a, b)
    a, b = _packed(a), _packed(b)
    count = lambda words: np.bitwise_count(words).sum(1, dtype=np.int64)
    common = np.array([count(row & b) for row in a]).reshape(len(a), len(b))
    return 2.0 * common / np.maximum(count(a)[:, None] + count(b)[None], 1)


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

    Quick where the rows of one side take few distinct values, as annotators' scores do: a table
    counts how often each value of x meets each of y, and running sums over x give, for every two
    values of y, how many pairs of points rise and how many fall with x. Counts are exact.

    Raises:
      UserError: the lengths differ, or a value is not a finite number.
    """
    a, b = _same_length(a, b)
    a, b = _levels(a), _levels(b)  # tau knows no more than the order
    return _tau(a, b) if b.max() <= a.max() else _tau(b, a).T


def spearman_rho_matrix(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64[U, V]: `spearman_rho` of every row of float[U, n] with every row of float[V, n]."""
    a, b = _same_length(a, b)
    a = stats.rankdata(a, axis=1)
    b = stats.rankdata(b, axis=1)
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    norm = np.sqrt((a**2).sum(1)[:, None] * (b**2).sum(1)[None])
    return np.where(norm > 0, a @ b.T / np.where(norm > 0, norm, 1), 0.0)


def _tau(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """float64[U, V]: tau-b of levels, int[U, n] and int[V, n]; quick where the latter are few."""
    (V, n), L = b.shape, int(b.max()) + 1
    untied_b = _untied_pairs(np.stack([np.bincount(row, minlength=L) for row in b]))
    tau = np.zeros((len(a), V))
    for u, x in enumerate(a):
        occurs = np.bincount(x)
        R = len(occurs)
        work = R * L**2
        if work > _MOST_WORK * n:
            tau[u] = [kendall_tau(x, y) for y in b]
            continue
        above = np.sign(np.arange(L)[:, None] - np.arange(L)[None])
        norm = np.sqrt(_untied_pairs(occurs[None]) * untied_b)
        group = max(1, _MOST_CELLS // (R * L))
        for first in range(0, V, group):
            y = b[first : first + group]
            cells = (np.arange(len(y))[:, None] * R + x) * L + y
            table = np.bincount(cells.ravel(), minlength=len(y) * R * L).reshape(len(y), R, L)
            table = table.astype(np.float64)  # for BLAS; whole numbers below 2**53 all the same
            smaller = table.cumsum(1) - table
            # pairs[v, k, l]: points at y-level k and points at l that have a smaller x.
            pairs = table.transpose(0, 2, 1) @ smaller
            tau[u, first : first + group] = (pairs * above).sum((1, 2))
        np.divide(tau[u], norm, out=tau[u], where=norm > 0)
    return tau


def _levels(rows: np.ndarray) -> np.ndarray:
    """int[V, n]: numbers from 0 in the order of the values, equal for equal values of a row."""
    values, levels = np.unique(rows, return_inverse=True)
    if len(values) <= _FEW_LEVELS or len(rows) == 1:
        return levels.reshape(rows.shape)
    return np.stack([np.unique(row, return_inverse=True)[1] for row in rows])


def _untied_pairs(counts: np.ndarray) -> np.ndarray:
    """float64[V]: pairs of different value, from int[V, L] how often each value occurs."""
    n = counts.sum(1, dtype=np.float64)
    return (n * (n - 1) - (counts * (counts - 1.0)).sum(1)) / 2


def _constant(rows: np.ndarray) -> np.ndarray:
    return rows.min(1) == rows.max(1)


def _pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = _same_length(np.asarray(x)[None], np.asarray(y)[None])
    return a[0], b[0]


def _packed(rows: np.ndarray) -> np.ndarray:
    """uint64[U, words]: the bits of [U, n] of any type, 1 = not 0, padded with 0."""
    bits = np.packbits(rows if rows.dtype in (np.bool_, np.uint8) else rows != 0, axis=1)
    padded = np.zeros((len(bits), -(-bits.shape[1] // 8) * 8), np.uint8)
    padded[:, : bits.shape[1]] = bits
    return padded.view(np.uint64)


def _same_length(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    _check_rows(a, b)
    return a, b


def _check_rows(a: np.ndarray, b: np.ndarray) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or not a.shape[1]:
        raise UserError(
            f"rows to compare must have one common length of at least 1, got {a.shape} and "
            f"{b.shape}; sample both at the same times"
        )
    if not all(np.isfinite(rows).all() for rows in (a, b) if rows.dtype.kind == "f"):
        raise UserError("scores to compare hold a value that is not a finite number")
