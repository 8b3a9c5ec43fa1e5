"""Protocols on a video small enough for paper, and on the published annotations."""

import dataclasses

import h5py
import numpy as np
import pytest
import scipy.io

from deevisum_jax.errors import UserError
from deevisum_jax.summary import metrics, protocols
from deevisum_jax.summary.protocols import VideoGroundTruth, VideoResult


def small_video(video_id="v", user_scores=((1, 2, 3, 4), (1, 3, 2, 3))):
    """8 frames at 2 per second, annotated every second, four shots of two frames."""
    return VideoGroundTruth(
        video_id=video_id,
        n_frames=8,
        native_fps=2.0,
        duration_s=4.0,
        score_times=np.array([0.5, 1.5, 2.5, 3.5]),
        user_scores=np.array(user_scores, float),
        user_summary=np.array([[0, 0, 0, 0, 0, 0, 1, 1], [0, 0, 1, 1, 0, 0, 0, 0]], bool),
        shots=np.array([[0, 2], [2, 4], [4, 6], [6, 8]]),
    )


SECONDS = np.stack([np.arange(4.0), np.arange(1.0, 5.0)], 1)


def test_one_video_by_hand():
    result = protocols.evaluate_video(small_video(), SECONDS, np.arange(1.0, 5.0), budget=0.25)
    # The prediction 1 2 3 4 is the first annotator (tau 1, rho 1); the second is 1 3 2 3.
    assert result.tau == pytest.approx((1 + 3 / 30**0.5) / 2)
    assert result.rho == pytest.approx((1 + 3 / 22.5**0.5) / 2)
    # A quarter of 8 frames is one shot, the last: all of the first summary, none of the second.
    assert result.f1 == 0.5
    best = protocols.evaluate_video(
        small_video(), SECONDS, np.arange(1.0, 5.0), budget=0.25, f1="max"
    )
    assert best.f1 == 1.0


def test_scores_hold_across_gaps_and_past_the_ends():
    gt = small_video()
    # Segments at [1, 2) and [3, 3.2): everything before 3 s has the first score.
    result = protocols.evaluate_video(gt, np.array([[1, 2], [3, 3.2]]), np.array([0.2, 0.9]))
    same = np.array([0.2, 0.2, 0.2, 0.9])
    assert result.tau == pytest.approx(
        np.mean([metrics.kendall_tau(same, u) for u in gt.user_scores])
    )


def test_a_point_on_a_border_belongs_to_the_later_segment():
    gt = dataclasses.replace(small_video(), score_times=np.array([0.0, 1.0, 2.0, 3.0]))
    bounds = SECONDS + np.array([1e-9, -1e-9, 1e-9, 0])[:, None]  # borders written with rounding
    result = protocols.evaluate_video(gt, bounds, np.arange(1.0, 5.0))
    assert result.tau == pytest.approx((1 + 3 / 30**0.5) / 2)


def test_a_constant_prediction_counts_as_zero_and_says_so():
    result = protocols.evaluate_video(small_video(), SECONDS, np.full(4, 0.7), budget=0.25)
    assert (result.tau, result.rho, result.constant) == (0.0, 0.0, True)


def test_means_carry_their_protocols():
    results = [VideoResult(video_id=str(i), f1=i / 10, tau=i / 5, rho=0.0) for i in range(3)]
    mean = protocols.summarize_results(results, f1="max")
    assert (mean.f1, mean.tau) == pytest.approx((0.1, 0.2))
    assert "SumMe" in mean.protocols["f1"]
    assert "annotators" in mean.protocols["tau"]
    assert mean.per_video == tuple(results)


def test_paired_values_line_up_by_video():
    a = [VideoResult(video_id=v, f1=0.5, tau=t, rho=0) for v, t in [("x", 0.1), ("y", 0.2)]]
    b = [VideoResult(video_id=v, f1=0.5, tau=t, rho=0) for v, t in [("y", 0.4), ("x", 0.3)]]
    first, second = protocols.summarize_results(a), protocols.summarize_results(b)
    ids, values = protocols.paired(first, second, "tau")
    assert ids == ("x", "y")
    np.testing.assert_array_equal(values, [[0.1, 0.3], [0.2, 0.4]])
    with pytest.raises(UserError, match="differ in videos"):
        protocols.paired(first, protocols.summarize_results(b[:1]), "tau")
    with pytest.raises(UserError, match="different protocols"):
        protocols.paired(first, protocols.summarize_results(b, f1="max"), "f1")


def test_baselines_of_a_small_video():
    train = [small_video("a", [[1, 2, 3, 4], [1, 2, 3, 4]])]
    rows = protocols.baseline_rows(train, [small_video()], seed=0, random_draws=400, budget=0.25)
    assert set(rows) == {"random", "constant", "time", "human", "oracle"}
    assert abs(rows["random"].tau) < 0.1  # 400 draws of 4 points: standard error 0.03
    assert rows["random"].f1 == pytest.approx(0.25, abs=0.05)  # one of four shots, two wanted
    # Constant: equal shots, so the knapsack takes the first one, which nobody chose.
    assert (rows["constant"].tau, rows["constant"].f1) == (0.0, 0.0)
    # The training scores rise with time: so does the prediction, as in the hand-made case above.
    assert rows["time"].tau == pytest.approx((1 + 3 / 30**0.5) / 2)
    # Two annotators: one pair. Their summaries share no frame.
    assert rows["human"].tau == pytest.approx(3 / 30**0.5)
    assert rows["human"].f1 == 0.0
    # Mean annotator: 1, 2.5, 2.5, 3.5.
    expected = [metrics.kendall_tau([1, 2.5, 2.5, 3.5], u) for u in small_video().user_scores]
    assert rows["oracle"].tau == pytest.approx(np.mean(expected))
    assert all("row" in result.protocols for result in rows.values())


def test_random_rows_repeat_with_their_seed():
    train, test = [small_video("a")], [small_video("b")]
    one, two, other = (
        protocols.baseline_rows(train, test, seed=s, random_draws=3)["random"].tau
        for s in (1, 1, 2)
    )
    assert one == two
    assert one != other


def test_human_f1_is_leave_one_out():
    gt = small_video(user_scores=[[1, 2, 3, 4]] * 3)
    summary = np.zeros((3, 8), bool)
    summary[0, :2] = summary[1, :2] = summary[2, 1:3] = True
    gt = dataclasses.replace(gt, user_summary=summary)
    # Pairs agree by 1, 1/2, 1/2. Mean over annotators of the mean (best) over the others.
    assert protocols.human_agreement(gt).f1 == pytest.approx((0.75 + 0.75 + 0.5) / 3)
    assert protocols.human_agreement(gt, f1="max").f1 == pytest.approx((1 + 1 + 0.5) / 3)


def test_human_row_of_tvsum_is_the_published_one(shared_data):
    """Kendall 0.1774 and Spearman 0.2042 (Otani et al., CVPR 2019), every 15th frame."""
    results = []
    with h5py.File(shared_data / "tvsum" / "matlab" / "ydata-tvsum50.mat") as file:
        for row in range(50):
            scores = file[file["tvsum50"]["user_anno"][row, 0]][()][:, ::15]
            n_frames = int(file[file["tvsum50"]["nframes"][row, 0]][0, 0])
            results.append(
                protocols.human_agreement(
                    VideoGroundTruth(
                        video_id=str(row),
                        n_frames=n_frames,
                        native_fps=30.0,
                        duration_s=n_frames / 30,
                        score_times=np.arange(scores.shape[1]) / 2,
                        user_scores=scores,
                        user_summary=np.ones((20, 1), bool),
                        shots=np.array([[0, n_frames]]),
                    )
                )
            )
    human = protocols.summarize_results(results, row="human")
    assert round(human.tau, 4) == 0.1774
    assert round(human.rho, 4) == 0.2042


def test_human_f1_of_summe_is_the_known_one(shared_data):
    """Mean pairwise F 0.3107, best annotator of each video 0.4086."""
    mean, best = [], []
    for path in sorted((shared_data / "summe" / "GT").glob("*.mat")):
        chosen = scipy.io.loadmat(path)["user_score"].T > 0
        n_frames = chosen.shape[1]
        picks = np.arange(0, n_frames, 15)
        video = protocols.VideoGroundTruth(
            video_id=path.stem,
            n_frames=n_frames,
            native_fps=1.0,
            duration_s=float(n_frames),
            score_times=picks + 0.5,
            user_scores=chosen[:, picks].astype(float),
            user_summary=chosen,
            shots=np.array([[0, n_frames]]),
        )
        mean.append(protocols.human_agreement(video).f1)
        agreement = metrics.f1_matrix(chosen, chosen)
        np.fill_diagonal(agreement, 0)
        best.append(agreement.sum(1).max() / (len(chosen) - 1))
    assert len(mean) == 25
    assert round(np.mean(mean), 4) == 0.3107
    assert round(np.mean(best), 4) == 0.4086


@pytest.mark.parametrize(
    ("bounds", "scores", "message"),
    [
        (SECONDS, np.ones(3), "M scores"),
        (SECONDS[::-1], np.ones(4), "in order"),
        (np.array([[0, 2], [1, 3]]), np.ones(2), "not overlap"),
        (SECONDS, np.array([1, 2, np.nan, 1]), "finite"),
        (np.zeros((0, 2)), np.zeros(0), "at least one"),
    ],
)
def test_segments_must_make_sense(bounds, scores, message):
    with pytest.raises(UserError, match=message):
        protocols.evaluate_video(small_video(), bounds, scores)


def test_says_what_is_wrong():
    gt = small_video()
    with pytest.raises(UserError, match="without common videos"):
        protocols.baseline_rows([gt], [gt], seed=0)
    with pytest.raises(UserError, match="at least two annotators"):
        protocols.human_agreement(small_video(user_scores=[[1, 2, 3, 4]]))
    with pytest.raises(UserError, match="'avg'"):
        protocols.evaluate_video(gt, SECONDS, np.ones(4), f1="mean")
    with pytest.raises(UserError, match="appears twice"):
        protocols.summarize_results([VideoResult(video_id="a", f1=0, tau=0, rho=0)] * 2)
    with pytest.raises(UserError, match="no video"):
        protocols.summarize_results([])
