"""Kernel Temporal Segmentation (Potapov et al., ECCV 2014) with a linear kernel.

The result is that of the field's published `cpd_auto` on the same kernel: of all segmentations into
m + 1 pieces the one of least within-piece scatter S(m), for the m that minimises S(m) / N +
penalty(m). Scatters, and sums along a segmentation, are formed in the same order, and of equal
segmentations the same one is kept, so that ties and rounding fall the same way.

The published programme computes S(m) for every m, O(N³). Here the best m is found without:

1. With a price p on every change, the best segmentation into any number of pieces takes O(N²). Its
   value v(p) bounds every S(m) >= v(p) - p m, and is reached at a corner of the lower convex hull
   of S. The penalty is concave in m, so its sum with S is least at such a corner. Prices are tried
   until no lower cost is possible: of an edge of the hull above which one is, the slope of the
   penalty there, then the slope of the edge.
2. What remains is a choice within rounding, of one segmentation or few. The published programme
   runs on the pieces that these are made of.

A limit on m may fall inside an edge of the hull and leave a gap between S and its bound; then the
second step runs on all pieces of segmentations within the gap.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from deevisum_jax.errors import UserError

# Rows, columns and inner length of products that BLAS computes without waking its threads: these
# spin for longer than a short video takes. Videos of more rows than `_LONG` gain by them.
_ROWS, _INNER, _LONG = 32, 256, 2000
_ROWS_PER_BLOCK = 64  # scatters computed at once: a block stays in the processor's cache

# Parts of a gap under a limit on m that are searched first: what is found in one narrows the gap.
_SHARES = (1 / 64, 1 / 8, 1.0)


def change_points(
    features: np.ndarray,
    *,
    max_change_points: int,
    penalty: float = 1.0,
    descriptor_rate: float = 1.0,
) -> np.ndarray:
    """Where the content changes: KTS with a linear kernel and the number of changes chosen.

    Args:
      features: float[N, D], one row per sampled frame; L2-normalised rows are usual. Computed with
        in float64, whatever their type.
      max_change_points: the largest number of changes considered, at most N - 1 are used.
      penalty: the field's `vmax`; larger gives fewer changes.
      descriptor_rate: native frames per row (the field's `desc_rate`), at least 1; it only
        weakens the penalty.

    Returns:
      int64[m], ascending, each in [1, N - 1]: row c begins a new piece.

    Raises:
      UserError: the features are not a finite, non-empty [N, D] or an option is out of range.

    Time is O(N² D) for the kernel and O(N²) for each price, of which there are about ten; memory is
    one float64[N, N], 0.8 GB at N = 10,000. Where pictures repeat exactly, segmentations tie in so
    many ways that it is O(N³), as the published programme always is: all frames equal and no
    penalty, or two pictures in turns and a `max_change_points` that is reached.
    """
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or not len(features) or not np.isfinite(features).all():
        raise UserError(
            f"KTS features must be finite and of shape [N, D] with N >= 1, got shape "
            f"{features.shape}; drop the rows that could not be computed"
        )
    if not (max_change_points >= 0 and 0 <= penalty < np.inf and 1 <= descriptor_rate < np.inf):
        raise UserError(
            f"KTS wants max_change_points >= 0, penalty >= 0 and descriptor_rate >= 1, got "
            f"{max_change_points=}, {penalty=}, {descriptor_rate=}"
        )
    most = int(min(max_change_points, len(features) - 1))
    if not most:
        return np.zeros(0, np.int64)
    scatters = _scatters(features)
    return _Search(scatters, _penalties(len(features), most, penalty, descriptor_rate)).best()


def _penalties(N: int, most: int, penalty: float, descriptor_rate: float) -> np.ndarray:
    """float64[most + 1]: what m changes cost, concave and never falling in m."""
    native = N * descriptor_rate
    count = np.arange(1, most + 1)
    penalties = np.zeros(most + 1)
    penalties[1:] = (penalty * count / (2.0 * native)) * (np.log(native / count) + 1)
    return penalties


def _scatters(features: np.ndarray) -> np.ndarray:
    """float64[N, N]: row j, column i <= j = squared distance to their mean, summed over rows i..j.

    What is right of the diagonal has no meaning.
    """
    N = len(features)
    square = _kernel(features)
    diagonal = np.concatenate([[0.0], np.cumsum(np.diag(square))])
    # Sums from the corner, in place: square[j, i] = sum of the kernel over rows 0..j, columns 0..i.
    for above, row in itertools.pairwise(square):
        row += above
    np.cumsum(square, axis=1, out=square)
    corner = np.concatenate([[0.0], np.diag(square)])
    position = np.arange(N)
    for a in range(0, N, _ROWS_PER_BLOCK):
        b = min(a + _ROWS_PER_BLOCK, N)
        # (sum over the square i..j) = S[j+1, j+1] + S[i, i] - S[j+1, i] - S[i, j+1]
        inside = corner[a + 1 : b + 1, None] + corner[None, :b]
        inside[:, 1:] -= square[a:b, : b - 1]
        inside[:, 1:] -= square[: b - 1, a:b].T
        inside /= np.maximum(position[a:b, None] + 1 - position[None, :b], 1)
        # The part read above the diagonal is never of a column already written.
        np.subtract(diagonal[a + 1 : b + 1, None], diagonal[None, :b], out=square[a:b, :b])
        square[a:b, :b] -= inside
    return square


def _kernel(features: np.ndarray) -> np.ndarray:
    """float64[N, N]: `features @ features.T`."""
    N, D = features.shape
    if N > _LONG:
        return features @ features.T
    parts = np.array_split(features, max(1, -(-D // _INNER)), axis=1)
    kernel = np.empty((N, N))
    for a in range(0, N, _ROWS):
        b = min(a + _ROWS, N)
        for c in range(0, b, _ROWS):
            d = min(c + _ROWS, b)
            product = parts[0][a:b] @ parts[0][c:d].T
            for part in parts[1:]:
                product += part[a:b] @ part[c:d].T
            kernel[a:b, c:d] = product
        kernel[:a, a:b] = kernel[a:b, :a].T
    return kernel


@dataclasses.dataclass(frozen=True)
class _Priced:
    """The best segmentation when every change costs `price`."""

    price: float
    value: float  # its scatter plus price times changes
    changes: int
    forward: np.ndarray  # float64[N + 1]: the same of the first l rows, price times pieces instead

    @property
    def scatter(self) -> float:
        return self.value - self.price * self.changes


class _Search:
    """For the segmentation of least cost; costs are times N here, on the scale of scatters."""

    def __init__(self, scatters: np.ndarray, penalties: np.ndarray) -> None:
        N = len(scatters)
        self._pieces = [row[: j + 1] for j, row in enumerate(scatters)]  # those that end at row j
        self._per_row, self._penalties = penalties, N * penalties
        self._counts = np.arange(len(penalties))
        whole, single = scatters[:, 0], np.diag(scatters)
        # What sums of up to N terms can be off by. Single rows scatter by rounding only.
        scale = np.abs(whole).max() + N * np.abs(single).max() + self._penalties[-1]
        self._margin = 8 * np.finfo(np.float64).eps * N * scale
        self._corners = {0: float(whole[-1]), N - 1: float(single.sum())}  # changes -> scatter
        self._bound = np.full(len(penalties), -np.inf)  # each count's cost is at least this
        self._whose = np.zeros(len(penalties), np.intp)  # by which of these
        self._priced: list[_Priced] = []

    def best(self) -> np.ndarray:
        """int64[m]: the changes."""
        slopes = np.gradient(self._penalties)
        self._try(float(slopes[len(slopes) // 8]))
        guessed: set[tuple[int, int]] = set()
        tried: set[tuple[int, int]] = set()
        while found := self._open_edge(tried):
            (a, b), m = found
            if (a, b) not in guessed:
                guessed.add((a, b))
                self._try(float(slopes[m]))  # finds a corner near the best, if there is one
            else:
                tried.add((a, b))  # a corner is found between its ends, or it is an edge for good
                self._try((self._corners[a] - self._corners[b]) / (b - a))
        return self._choose()

    def _try(self, price: float) -> None:
        """Bounds every cost by the best segmentation at this price, and notes that."""
        priced = _priced(self._pieces, price)
        self._corners.setdefault(priced.changes, priced.scatter)
        bound = priced.value - price * self._counts + self._penalties
        higher = bound > self._bound
        self._bound[higher], self._whose[higher] = bound[higher], len(self._priced)
        self._priced.append(priced)

    def _least(self) -> float:
        """The least cost that a corner has."""
        costs = (S + self._penalties[m] for m, S in self._corners.items() if m < len(self._counts))
        return min(costs)

    def _open_edge(self, tried: set[tuple[int, int]]) -> tuple[tuple[int, int], int] | None:
        """Where the cost may be lowest and is not known: an edge of the hull, and changes above it.

        Args:
          tried: edges to leave out.
        """
        corners = np.array(sorted(self._corners))
        bound = self._bound.copy()
        bound[corners[corners < len(bound)]] = np.inf
        below = np.flatnonzero(bound <= self._least() + self._margin)
        for m in below[np.argsort(bound[below], kind="stable")].tolist():
            end = np.searchsorted(corners, m)
            if (edge := (int(corners[end - 1]), int(corners[end]))) not in tried:
                return edge, m
        return None

    def _choose(self) -> np.ndarray:
        """What the published programme chooses of the numbers of changes still open."""
        least = self._least()
        found: dict[int, tuple[float, np.ndarray]] = {}
        for share in _SHARES:
            limit, missed = least + self._margin, False
            left = np.flatnonzero(self._bound <= limit)
            for index in np.unique(self._whose[left]).tolist():
                counts, priced = left[self._whose[left] == index], self._priced[index]
                # How much above its value at this price a segmentation within the limit may lie.
                gap = float((limit - self._bound[counts]).max())
                slack = gap * share + self._margin
                found |= _published(self._pieces, priced, priced.value + slack, counts)
                missed |= slack < gap
            least = min([least, *(S + self._penalties[m] for m, (S, _) in found.items())])
            if not missed:
                break
        cost = lambda m: found[m][0] / len(self._pieces) + self._per_row[m]
        return found[min(sorted(found), key=cost)][1]


def _priced(pieces: Sequence[np.ndarray], price: float) -> _Priced:
    forward = np.empty(len(pieces) + 1)
    forward[0] = -price  # of k pieces only k - 1 begin with a change
    start = [0]
    for end, scatters in enumerate(pieces, 1):
        sums = forward[:end] + scatters
        best = sums.argmin()
        start.append(best)
        forward[end] = sums[best] + price
    at, changes = start[-1], 0
    while at:
        at, changes = start[at], changes + 1
    return _Priced(price, float(forward[-1]), changes, forward)


def _published(
    pieces: Sequence[np.ndarray], priced: _Priced, limit: float, counts: np.ndarray
) -> dict[int, tuple[float, np.ndarray]]:
    """The published programme, on the pieces of segmentations whose value is within the limit.

    Returns:
      Number of changes -> least scatter and changes, for those of `counts` that there are.
    """
    N, forward = len(pieces), priced.forward
    backward = np.full(N + 1, np.inf)  # the best value of the rows from here on
    backward[N] = 0.0
    starts: dict[int, list[int]] = {}
    for end in range(N, 0, -1):
        if forward[end] + backward[end] > limit:
            continue
        sums = pieces[end - 1] + (backward[end] + priced.price)
        np.minimum(backward[:end], sums, out=backward[:end])
        starts[end] = np.flatnonzero(forward[:end] + sums <= limit).tolist()

    # Of the rows before a border: the fewest pieces they are cut into and, for every number of
    # pieces from there on, the least scatter and the border before it, the first of equal ones.
    table = {0: (0, np.zeros(1), [0])}
    for end in reversed(starts):
        reached = [start for start in starts[end] if start in table]
        if not reached:
            continue
        fewest = min(table[start][0] for start in reached)
        most = max(table[start][0] + len(table[start][1]) for start in reached)
        if len(reached) == 1:
            least = table[reached[0]][1] + pieces[end - 1][reached[0]]
            table[end] = fewest + 1, least, reached * len(least)
            continue
        sums = np.full((len(reached), most - fewest), np.inf)
        for row, start in zip(sums, reached, strict=True):
            first, least, _ = table[start]
            row[first - fewest : first - fewest + len(least)] = least + pieces[end - 1][start]
        table[end] = fewest + 1, sums.min(0), [reached[best] for best in sums.argmin(0)]

    fewest, least, _ = table[N]
    found = {}
    for m in counts.tolist():
        pieces_off = m + 1 - fewest
        if not 0 <= pieces_off < len(least) or least[pieces_off] == np.inf:
            continue
        border, changes = N, np.empty(m + 1, np.int64)
        for number in range(m + 1, 0, -1):
            first, _, before = table[border]
            border = changes[number - 1] = before[number - first]
        found[m] = float(least[pieces_off]), changes[1:]
    return found
