"""Shot scores and the selection under a budget."""

import h5py
import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.summary.select import (
    annotator_summaries,
    budget_frames,
    select_summary,
    shot_scores,
)
from deevisum_jax.summary.shots import Shot


def test_shot_scores_are_means():
    frame_scores = np.array([1.0, 3.0, 0.0, 0.0, 6.0])
    shots = [Shot(0.0, 0.2, 0, 2), Shot(0.2, 0.5, 2, 5)]
    np.testing.assert_array_equal(shot_scores(frame_scores, shots), [2.0, 2.0])
    np.testing.assert_array_equal(shot_scores(frame_scores, np.array([[3, 5]])), [3.0])


def test_equal_scores_tie_whatever_the_rounding():
    shots = np.array([[0, 3], [3, 7], [7, 1000]])
    assert len(np.unique(shot_scores(np.full(1000, 0.1), shots))) == 1


def test_29_percent_of_a_hundred_frames_is_29():
    assert 0.29 * 100 < 29  # 28.999999999999996 in floating point
    assert budget_frames(100, 0.29) == 29
    np.testing.assert_array_equal(
        select_summary(np.array([1.0, 0.9]), np.array([29, 71]), 100, 0.29), [True, False]
    )


def test_two_short_shots_beat_one_better_long_one():
    chosen = select_summary(np.array([0.9, 0.5, 0.5]), np.array([15, 7, 8]), 100)
    np.testing.assert_array_equal(chosen, [False, True, True])


def test_annotators_summaries_by_hand():
    # 20 frames, 3 of them may be chosen: the first annotator's best shot fits alone, of the second
    # one's two do.
    shots = np.array([[0, 3], [3, 5], [5, 6], [6, 20]])
    scores = np.repeat([[5.0, 2, 2, 1], [2, 3, 3, 5]], [3, 2, 1, 14], axis=1)
    expected = np.zeros((2, 20), bool)
    expected[0, 0:3] = expected[1, 3:6] = True
    np.testing.assert_array_equal(annotator_summaries(scores, shots, 20), expected)
    as_shots = [Shot(start / 25, end / 25, start, end) for start, end in shots.tolist()]
    np.testing.assert_array_equal(annotator_summaries(scores, as_shots, 20), expected)


def test_annotators_summaries_are_select_summarys():
    rng = np.random.default_rng(0)
    ends = np.append(np.sort(rng.choice(np.arange(1, 900), 40, replace=False)), 900)
    shots = np.stack([np.insert(ends[:-1], 0, 0), ends], axis=1)
    scores = rng.integers(1, 6, (5, 60)).repeat(15, axis=1).astype(float)
    for row, summary in zip(scores, annotator_summaries(scores, shots, 900, 0.3), strict=True):
        chosen = select_summary(shot_scores(row, shots), np.diff(shots)[:, 0], 900, 0.3)
        np.testing.assert_array_equal(summary, chosen.repeat(np.diff(shots)[:, 0]))


def test_annotators_summaries_of_tvsum_are_worth_the_published_kind(shared_data):
    """Where a stored summary is another one, its shots' scores add up to exactly the same."""
    equal = 0
    with (
        h5py.File(shared_data / "features" / "tvsum_squeezenet_fire9.h5") as file,
        h5py.File(shared_data / "tvsum" / "matlab" / "ydata-tvsum50.mat") as annotations,
    ):
        references = annotations["tvsum50"]["user_anno"][()].ravel()
        for i, reference in enumerate(references, 1):
            stored = file[f"video_{i}"]["user_summary"][()]
            shots = file[f"video_{i}"]["change_points"][()] + [0, 1]  # ends are inclusive there
            scores = annotations[reference][()]
            summaries = annotator_summaries(scores, shots, stored.shape[1])
            values, first = shot_scores(scores, shots), shots[:, 0]
            for mine in (summaries, stored):
                assert (mine.sum(1) <= 0.15 * stored.shape[1]).all()
            np.testing.assert_allclose(
                (values * summaries[:, first]).sum(1), (values * stored[:, first]).sum(1), atol=1e-9
            )
            equal += (summaries == stored).all(1).sum()
    assert equal == 896  # of 1000; where two choices tie, solvers differ


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (np.ones((2, 5)), r"\[annotators, 6 frames\], got \[2, 5\]"),
        (np.ones(6), r"got \[6\]"),
        (np.full((1, 6), np.nan), "not a finite number"),
    ],
)
def test_annotators_score_every_frame(scores, message):
    with pytest.raises(UserError, match=message):
        annotator_summaries(scores, np.array([[0, 6]]), 6, 1.0)


@pytest.mark.parametrize("budget", [0.0, 1.2, -0.1])
def test_a_budget_is_a_share(budget):
    with pytest.raises(UserError, match="share of the video"):
        select_summary(np.ones(1), np.ones(1, int), 10, budget)


@pytest.mark.parametrize("bounds", [[[0, 6]], [[2, 2]], [[-1, 3]]])
def test_shots_lie_in_the_video(bounds):
    with pytest.raises(UserError, match="half-open"):
        shot_scores(np.zeros(5), np.array(bounds))
