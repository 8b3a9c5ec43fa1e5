"""The knapsack against all subsets, and its ties."""

import itertools

import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.summary.knapsack import knapsack, knapsack_rows


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


def plain(values, weights, capacity):
    """The whole table, best[i, c] of items 0..i - 1 with weight at most c, and the way back."""
    best = np.zeros((len(values) + 1, capacity + 1))
    for i, (value, weight) in enumerate(zip(values, weights, strict=True)):
        for c in range(capacity + 1):
            take = best[i, c - weight] + value if weight <= c else -np.inf
            best[i + 1, c] = max(best[i, c], take)
    taken, room = np.zeros(len(values), bool), capacity
    for i in range(len(values) - 1, -1, -1):
        if best[i + 1, room] > best[i, room]:
            taken[i] = True
            room -= weights[i]
    return taken


@pytest.mark.parametrize("levels", [2, 5, 1000])
def test_every_row_as_the_plain_table_has_it_ties_included(levels):
    rng = np.random.default_rng(levels)
    weights = rng.integers(1, 40, 25)
    values = rng.integers(-1, levels, (6, 25)) / 7
    taken = knapsack_rows(values, weights, 120)
    for row, mine in zip(values, taken, strict=True):
        np.testing.assert_array_equal(mine, plain(row, weights, 120))
        np.testing.assert_array_equal(mine, knapsack(row, weights, 120))


def test_an_hour_of_video_is_filled():
    rng = np.random.default_rng(0)
    weights = rng.multinomial(100_000 - 500, np.ones(500) / 500) + 1
    taken = knapsack(np.ones(500) + rng.random(500), weights, 15_000)
    assert 14_500 < weights[taken].sum() <= 15_000


def test_rows_share_their_items():
    with pytest.raises(UserError, match=r"one weight per value, got \(2, 3\) and \(2,\)"):
        knapsack_rows(np.ones((2, 3)), np.ones(2, int), 3)
    assert knapsack_rows(np.ones((2, 3)), np.ones(3, int), -1).tolist() == [[False] * 3] * 2


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
