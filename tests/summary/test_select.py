"""Shot scores and the selection under a budget."""

import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.summary.select import select_summary, shot_scores
from deevisum_jax.summary.shots import Shot


def test_shot_scores_are_means():
    frame_scores = np.array([1.0, 3.0, 0.0, 0.0, 6.0])
    shots = [Shot(0.0, 0.2, 0, 2), Shot(0.2, 0.5, 2, 5)]
    np.testing.assert_array_equal(shot_scores(frame_scores, shots), [2.0, 2.0])
    np.testing.assert_array_equal(shot_scores(frame_scores, np.array([[3, 5]])), [3.0])


def test_equal_scores_tie_whatever_the_rounding():
    shots = np.array([[0, 3], [3, 7], [7, 1000]])
    assert len(np.unique(shot_scores(np.full(1000, 0.1), shots))) == 1


def test_fifteen_percent_of_a_hundred_frames_is_fifteen():
    # 0.15 * 100 is 14.999... in floating point.
    np.testing.assert_array_equal(
        select_summary(np.array([1.0, 0.9]), np.array([15, 85]), 100, 0.15), [True, False]
    )


def test_two_short_shots_beat_one_better_long_one():
    chosen = select_summary(np.array([0.9, 0.5, 0.5]), np.array([15, 7, 8]), 100)
    np.testing.assert_array_equal(chosen, [False, True, True])


@pytest.mark.parametrize("budget", [0.0, 1.2, -0.1])
def test_a_budget_is_a_share(budget):
    with pytest.raises(UserError, match="share of the video"):
        select_summary(np.ones(1), np.ones(1, int), 10, budget)


@pytest.mark.parametrize("bounds", [[[0, 6]], [[2, 2]], [[-1, 3]]])
def test_shots_lie_in_the_video(bounds):
    with pytest.raises(UserError, match="half-open"):
        shot_scores(np.zeros(5), np.array(bounds))
