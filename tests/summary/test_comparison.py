"""Intervals and paired tests: by hand where few videos allow it, by their rates where not."""

import itertools

import numpy as np
import pytest
from scipy import stats

from deevisum_jax.errors import UserError
from deevisum_jax.summary import comparison


def test_an_interval_of_two_videos_is_known():
    # Both videos drawn twice each with probability 1/4: the mean is 0, 1/2 or 1.
    [[low, high]] = comparison.intervals(np.array([[0.0, 1.0]]), seed=0)
    assert (low, high) == (0.0, 1.0)


def test_intervals_agree_with_a_plain_bootstrap():
    values = np.random.default_rng(1).normal(size=(2, 30))
    found = comparison.intervals(values, seed=0)
    rng = np.random.default_rng(99)
    for row, (low, high) in zip(values, found, strict=True):
        means = [rng.choice(row, 30).mean() for _ in range(4000)]
        # Their standard error at the 2.5th of 4000 samples is about 0.009.
        assert np.percentile(means, [2.5, 97.5]) == pytest.approx([low, high], abs=0.04)
    np.testing.assert_array_equal(found, comparison.intervals(values, seed=0))


def test_intervals_hold_what_they_promise():
    rng = np.random.default_rng(2)
    samples = rng.normal(size=(400, 40))  # of mean 0
    ends = comparison.intervals(samples, seed=0, num_draws=1000)
    held = ((ends[:, 0] <= 0) & (ends[:, 1] >= 0)).mean()
    assert 0.90 < held < 0.98


def test_a_video_that_counts_twice_is_drawn_as_one():
    # The mean is (2 * 1 + 0) / 3; samples of one video alone give 0 or 1.
    weights = np.array([2.0, 1.0])
    [[low, high]] = comparison.intervals(np.array([[1.0, 0.0]]), weights, seed=0)
    assert (low, high) == (0.0, 1.0)
    pair = comparison.compare(np.array([1.0, 0.0]), np.zeros(2), weights, seed=0)
    assert pair.difference == pytest.approx(2 / 3)


def test_the_exact_test_by_hand():
    # Of 8 sign flips of 3, 2, 1 a sum of at least 4 away from 0 (3 + 2 - 1) comes about in 4.
    pair = comparison.compare(np.array([3.0, 2.0, 0.0]), np.array([0.0, 0.0, 1.0]), seed=0)
    assert (pair.p, pair.exact) == (0.5, True)
    assert (pair.wins, pair.losses) == (2, 1)
    assert pair.difference == pytest.approx(4 / 3)
    sums = [abs(np.dot(signs, [3, 2, -1])) for signs in itertools.product([1, -1], repeat=3)]
    assert np.mean(np.array(sums) >= 4) == 0.5


def test_drawn_flips_agree_with_all_of_them():
    rng = np.random.default_rng(3)
    first, second = rng.normal(0.3, 1, 16), np.zeros(16)
    exact = comparison.compare(first, second, seed=0)
    # One more video, on which both are the same, changes nothing but that flips are drawn.
    drawn = comparison.compare(np.append(first, 0), np.append(second, 0), seed=0)
    assert (exact.exact, drawn.exact) == (True, False)
    assert drawn.p == pytest.approx(exact.p, abs=0.02)


def test_p_is_never_0_and_1_where_nothing_differs():
    better = comparison.compare(np.arange(1.0, 31), np.zeros(30), seed=0)
    assert better.p == pytest.approx(1 / 10_001)
    same = comparison.compare(np.arange(30.0), np.arange(30.0), seed=0)
    assert (same.p, same.difference, same.wins, same.losses) == (1.0, 0.0, 0, 0)
    swapped = comparison.compare(np.zeros(30), np.arange(1.0, 31), seed=0)
    assert (swapped.difference, swapped.low) == (-better.difference, -better.high)


def test_the_paired_t_test_by_hand():
    # Differences 1, 2, 3: mean 2, standard error 1 / sqrt(3), so t = 2 sqrt(3) with 2 degrees of
    # freedom, where P(T > t) = 1/2 - t / (2 sqrt(t**2 + 2)): p = 1 - sqrt(12 / 14).
    pair = comparison.paired_t(np.array([2.0, 4.0, 4.0]), np.array([1.0, 2.0, 1.0]))
    assert (pair.difference, pair.num_runs) == (2.0, 3)
    assert pair.p == pytest.approx(1 - (12 / 14) ** 0.5)
    # The 97.5th percentile of that distribution is 0.95 sqrt(2 / (1 - 0.95**2)).
    reach = 0.95 * (2 / (1 - 0.95**2)) ** 0.5 / 3**0.5
    assert (pair.low, pair.high) == pytest.approx((2 - reach, 2 + reach))


def test_the_paired_t_test_agrees_with_scipys():
    rng = np.random.default_rng(4)
    for shift in (0.0, 0.3, -2.0):
        first, second = rng.normal(shift, 1, 5), rng.normal(size=5)
        wanted = stats.ttest_rel(first, second)
        pair = comparison.paired_t(first, second)
        assert pair.p == pytest.approx(wanted.pvalue)
        assert (pair.low, pair.high) == pytest.approx(tuple(wanted.confidence_interval(0.95)))


def test_runs_that_all_differ_by_the_same():
    # In float64, 0.3 - 0.2, 0.4 - 0.3 and 0.5 - 0.4 are not equal.
    pair = comparison.paired_t(np.array([0.3, 0.4, 0.5]), np.array([0.2, 0.3, 0.4]))
    assert (pair.p, pair.low, pair.high) == (0.0, pair.difference, pair.difference)
    assert comparison.paired_t(np.ones(5), np.ones(5)).p == 1.0
    assert comparison.paired_t(np.zeros(5), np.zeros(5)).p == 1.0


def test_says_what_is_wrong():
    with pytest.raises(
        UserError, match=r"at least two of each method, of the same seeds, got \(1,"
    ):
        comparison.paired_t(np.zeros(1), np.zeros(1))
    with pytest.raises(UserError, match=r"of the same seeds, got \(3,\) and \(2,\) values"):
        comparison.paired_t(np.zeros(3), np.zeros(2))
    with pytest.raises(UserError, match=r"same videos, got \(2,\) and \(3,\)"):
        comparison.compare(np.zeros(2), np.zeros(3), seed=0)
    with pytest.raises(UserError, match="at least one video"):
        comparison.intervals(np.zeros((1, 0)), seed=0)
    with pytest.raises(UserError, match="a weight above 0 for each of 2 videos"):
        comparison.intervals(np.zeros((1, 2)), np.array([1.0, 0.0]), seed=0)
