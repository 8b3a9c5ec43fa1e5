"""How far numbers can be trusted, and whether one method is better than another.

Videos are what is sampled: a data set has few of them, and they differ more than methods do.
Intervals are percentile bootstraps over videos (Efron and Tibshirani 1993, chapter 13), tests of
two methods are paired by video. What varies between training runs is not in them: that is what
`paired_t` tells, of methods that were trained with several seeds each.

A mean may weigh videos differently: of folds that overlap, it counts some repeatedly.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from scipy import special

from deevisum_jax.errors import UserError

LEVEL = 0.95
_NUM_DRAWS = 10_000
_MOST_EXACT = 16  # videos of which all sign flips are tried: 65,536

INTERVAL = f"{100 * LEVEL:g} % interval, percentile bootstrap over videos, {_NUM_DRAWS:,} samples"
TEST = (
    f"sign-flip permutation test over videos, two-sided: all flips of up to {_MOST_EXACT} videos, "
    f"{_NUM_DRAWS:,} drawn ones of more"
)
INTERVAL_OVER_RUNS = f"{100 * LEVEL:g} % interval of the mean difference, Student's t over runs"
TEST_OVER_RUNS = "paired t-test over runs, two-sided"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Comparison:
    """The first method less the second on one metric, both on the same videos."""

    difference: float  # of the means
    low: float  # its interval
    high: float
    p: float  # of the sign-flip permutation test, two-sided
    exact: bool  # p is over all sign flips, not over drawn ones
    wins: int  # videos on which the first is better
    losses: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunsComparison:
    """The first method less the second on one metric, trained in pairs of one seed each."""

    difference: float  # of the means
    low: float  # its interval
    high: float
    p: float  # of the paired t-test, two-sided
    num_runs: int  # of each method


def intervals(
    values: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    seed: int,
    num_draws: int = _NUM_DRAWS,
) -> np.ndarray:
    """The 95 % intervals of means over videos, percentile bootstrap.

    Args:
      values: float[K, V], K numbers of V videos; all K see the same draws.
      weights: float[V], of the videos in the mean; None = the same for all.
      seed: of the draws.
      num_draws: samples of V videos with replacement.

    Returns:
      float64[K, 2], lower and upper end.

    Raises:
      UserError: there is no video, or shapes do not fit.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or not values.shape[1]:
        raise UserError(f"intervals want values [K, V] of at least one video, got {values.shape}")
    V = values.shape[1]
    weights = _checked_weights(weights, V)
    drawn = np.random.default_rng(seed).integers(V, size=(num_draws, V))
    drawn += V * np.arange(num_draws)[:, None]
    times = np.bincount(drawn.ravel(), minlength=num_draws * V).reshape(num_draws, V) * weights
    means = (times @ values.T) / times.sum(1, keepdims=True)
    tails = 100 * np.array([(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return np.percentile(means, tails, axis=0).T


def compare(
    first: np.ndarray,
    second: np.ndarray,
    weights: np.ndarray | None = None,
    *,
    seed: int,
    num_draws: int = _NUM_DRAWS,
) -> Comparison:
    """Two methods on the same videos: mean difference, its interval, p, wins and losses.

    p is how often a mean difference at least as far from 0 comes about when the two methods change
    places on each video by the toss of a coin. All tosses are tried with up to 16 videos, else
    they are drawn, the observed ones counting as one of them (so p is never 0).

    Args:
      first: float[V].
      second: float[V], the same videos in the same order.
      weights: float[V], as for `intervals`.
      seed: of the draws.
      num_draws: of the bootstrap and, if not all are tried, of tosses.

    Raises:
      UserError: shapes differ, or there is no video.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise UserError(
            f"a comparison wants both methods on the same videos, got {first.shape} and "
            f"{second.shape} values"
        )
    difference = first - second
    V = len(difference)
    weights = _checked_weights(weights, V)
    parts = difference * weights / weights.sum()
    low, high = intervals(difference[None], weights, seed=seed, num_draws=num_draws)[0]
    exact = V <= _MOST_EXACT
    if exact:
        flips = np.arange(2**V)[:, None] >> np.arange(V) & 1
    else:
        flips = np.random.default_rng(seed).integers(2, size=(num_draws, V))
    # What is equal up to rounding is as extreme.
    extreme = np.abs((1.0 - 2.0 * flips) @ parts) >= abs(parts.sum()) - 1e-12
    p = extreme.mean() if exact else (1 + extreme.sum()) / (1 + num_draws)
    return Comparison(
        difference=float(parts.sum()),
        low=float(low),
        high=float(high),
        p=float(p),
        exact=exact,
        wins=int((difference > 0).sum()),
        losses=int((difference < 0).sum()),
    )


def paired_t(first: np.ndarray, second: np.ndarray) -> RunsComparison:
    """Two methods trained with the same seeds: mean difference, its interval, p of the t-test.

    It takes differences to be normal, which few runs cannot show. Sign flips assume less and tell
    too little: five runs have 2**5 of them, so p would never be below 2 / 32 = 0.0625.

    Args:
      first: float[R], a number of each run.
      second: float[R], of the same seeds in the same order.

    Returns:
      If all runs differ by the same, the interval is that point, and p is 0, or 1 if nothing
      differs.

    Raises:
      UserError: shapes differ, or there are fewer than two runs.
    """
    first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if first.shape != second.shape or first.ndim != 1 or len(first) < 2:
        raise UserError(
            "a comparison over runs wants at least two of each method, of the same seeds, got "
            f"{first.shape} and {second.shape} values"
        )
    difference = first - second
    R = len(difference)
    mean = difference.mean()
    error = difference.std(ddof=1) / np.sqrt(R)  # standard error of the mean
    rounding = 1e-12 * max(abs(first).max(), abs(second).max())
    if error <= rounding:
        low, high, p = mean, mean, float(abs(mean) <= rounding)
    else:
        reach = special.stdtrit(R - 1, (1 + LEVEL) / 2) * error
        low, high = mean - reach, mean + reach
        p = 2 * special.stdtr(R - 1, -abs(mean) / error)
    return RunsComparison(
        difference=float(mean), low=float(low), high=float(high), p=float(p), num_runs=R
    )


def _checked_weights(weights: np.ndarray | None, V: int) -> np.ndarray:
    weights = np.ones(V) if weights is None else np.asarray(weights, np.float64)
    if weights.shape != (V,) or not (weights > 0).all():
        raise UserError(f"want a weight above 0 for each of {V} videos, got {weights}")
    return weights
