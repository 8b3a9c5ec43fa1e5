"""The knapsack against all subsets, and its ties."""

import itertools
import time

import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.summary.knapsack import knapsack


@pytest.mark.parametrize("seed", range(40))
def test_as_good_as_the_best_of_all_subsets(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 10))
    values = rng.normal(0.5, 0.5, n)
    weights = rng.integers(0, 12, n)
    capacity = int(rng.integers(0, 40))
    best = max(
        values[list(chosen)].sum()
        for size in range(n + 1)
        for chosen in itertools.combinations(range(n), size)
        if weights[list(chosen)].sum() <= capacity
    )
    taken = knapsack(values, weights, capacity)
    assert weights[taken].sum() <= capacity
    assert values[taken].sum() == pytest.approx(best, abs=1e-12)


def test_by_hand():
    # 60 + 100 weigh 30, 100 + 120 weigh 50 exactly: the greedy choice by ratio (60 first) loses.
    taken = knapsack(np.array([60.0, 100.0, 120.0]), np.array([10, 20, 30]), 50)
    np.testing.assert_array_equal(taken, [False, True, True])


def test_ties_go_to_earlier_items_and_worthless_ones_stay():
    np.testing.assert_array_equal(
        knapsack(np.array([1.0, 1.0, 1.0, 0.0, -1.0]), np.array([2, 2, 2, 1, 1]), 4),
        [True, True, False, False, False],
    )


def test_items_without_weight_are_free():
    np.testing.assert_array_equal(knapsack(np.array([1.0, 2.0]), np.array([0, 3]), 0), [1, 0])
    np.testing.assert_array_equal(knapsack(np.array([1.0]), np.array([1]), -1), [0])
    assert knapsack(np.zeros(0), np.zeros(0, int), 5).shape == (0,)


def test_an_hour_of_video_is_quick_and_exactly_filled():
    rng = np.random.default_rng(0)
    weights = rng.multinomial(100_000 - 500, np.ones(500) / 500) + 1
    start = time.perf_counter()
    taken = knapsack(np.ones(500) + rng.random(500), weights, 15_000)
    assert time.perf_counter() - start < 5  # 0.05 s where this was written
    assert 14_500 < weights[taken].sum() <= 15_000


@pytest.mark.parametrize(
    ("values", "weights", "message"),
    [
        ([1.0, np.nan], [1, 1], "value 1"),
        ([1.0], [1, 2], "one weight per value"),
        ([1.0], [-1], "not negative"),
        ([1.0], [1.5], "whole"),
    ],
)
def test_says_what_is_wrong(values, weights, message):
    with pytest.raises(UserError, match=message):
        knapsack(np.array(values), np.array(weights), 3)
