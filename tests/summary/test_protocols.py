"""Protocols on a video small enough for paper, and on the published annotations."""

import dataclasses

import numpy as np
import pytest
import scipy.io
import scipy.stats

from deevisum_jax import config
from deevisum_jax.errors import UserError
from deevisum_jax.summary import metrics, protocols
from deevisum_jax.summary.protocols import Protocol, VideoGroundTruth, VideoResult
from tfds_builders.summe import annotations as summe
from tfds_builders.tvsum import annotations as tvsum

QUARTER = Protocol(budget=0.25)


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
    result = protocols.evaluate_video(small_video(), SECONDS, np.arange(1.0, 5.0), QUARTER)
    # The prediction 1 2 3 4 is the first annotator (tau 1, rho 1); the second is 1 3 2 3.
    assert result.tau == pytest.approx((1 + 3 / 30**0.5) / 2)
    assert result.rho == pytest.approx((1 + 3 / 22.5**0.5) / 2)
    # A quarter of 8 frames is one shot, the last: all of the first summary, none of the second.
    assert result.f1 == 0.5
    best = protocols.evaluate_video(
        small_video(), SECONDS, np.arange(1.0, 5.0), Protocol(budget=0.25, f1="max")
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
    result = protocols.evaluate_video(small_video(), SECONDS, np.full(4, 0.7), QUARTER)
    assert (result.tau, result.rho, result.constant) == (0.0, 0.0, True)


def test_means_carry_their_protocols():
    results = [VideoResult(video_id=str(i), f1=i / 10, tau=i / 5, rho=0.0) for i in range(3)]
    mean = protocols.summarize_results(results, Protocol(f1="max"))
    assert (mean.f1, mean.tau) == pytest.approx((0.1, 0.2))
    assert "SumMe" in mean.protocols["f1"]
    assert "annotators" in mean.protocols["tau"]
    assert mean.per_video == tuple(results)


def test_baselines_of_a_small_video():
    train = [small_video("a", [[1, 2, 3, 4], [1, 2, 3, 4]])]
    rows = protocols.baseline_rows(
        train, [small_video()], seed=0, random_draws=400, protocol=QUARTER
    )
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
    assert protocols.human_agreement(gt, Protocol(f1="max")).f1 == pytest.approx((1 + 1 + 0.5) / 3)


def test_the_time_row_never_sees_the_video_that_it_predicts():
    rising, falling = [[1, 2, 3, 4]] * 2, [[4, 3, 2, 1]] * 2
    videos = [small_video("a", rising), small_video("b", rising), small_video("c", falling)]
    left_out = protocols.time_row([], videos, QUARTER)
    # a and b see one rising and one falling video, which cancel; c sees two that rise.
    assert [row.constant or round(row.tau, 6) for row in left_out] == [True, True, -1.0]
    fitted = protocols.time_row(videos[:2], videos[2:], QUARTER)
    assert fitted == left_out[2:]
    with pytest.raises(UserError, match="a video to fit on beside"):
        protocols.time_row([], videos[:1])


def test_scores_of_frames_are_those_at_the_points_they_hold():
    gt = small_video()  # points at 0.5, 1.5, ... s are frames 1, 3, 5, 7
    frames = np.array([9, 1, 9, 2, 9, 3, 9, 4.0])
    result = protocols.evaluate_frames(gt, frames, QUARTER)
    assert result.tau == pytest.approx((1 + 3 / 30**0.5) / 2)
    # The shots' means are 5, 5.5, 6, 6.5: the last is chosen, as the first annotator has it.
    assert result.f1 == 0.5


def test_a_binary_summary_is_correlated_with_the_mean_of_summaries():
    summe_like = Protocol(budget=0.25, correlation="summe_binary_summary")
    gt = small_video()
    result = protocols.evaluate_video(gt, SECONDS, np.arange(1.0, 5.0), summe_like)
    chosen, mean = np.repeat([0, 0, 0, 1], 2), np.repeat([0, 0.5, 0, 0.5], 2)
    assert result.tau == pytest.approx(scipy.stats.kendalltau(chosen, mean).statistic)
    assert result.rho == pytest.approx(scipy.stats.spearmanr(chosen, mean).statistic)
    # Of 28 pairs 12 differ in `chosen` and 16 in `mean`; 8 of both, all the same way.
    assert result.tau == pytest.approx(8 / (12 * 16) ** 0.5)
    # A constant score still gives a summary, the first shot, and that disagrees.
    flat = protocols.evaluate_video(gt, SECONDS, np.ones(4), summe_like)
    assert flat.tau == pytest.approx(-8 / (12 * 16) ** 0.5)
    assert not flat.constant
    # An empty one is the same everywhere.
    empty = protocols.evaluate_video(gt, SECONDS, np.zeros(4), summe_like)
    assert (empty.tau, empty.f1, empty.constant) == (0.0, 0.0, True)


def test_frame_scores_are_correlated_with_every_summary():
    otani = Protocol(budget=0.25, correlation="summe_scores")
    gt = small_video()
    result = protocols.evaluate_video(gt, SECONDS, np.arange(1.0, 5.0), otani)
    frames = np.repeat(np.arange(1.0, 5.0), 2)
    for name, by_scipy in (("tau", scipy.stats.kendalltau), ("rho", scipy.stats.spearmanr)):
        expected = [by_scipy(frames, user).statistic for user in gt.user_summary]
        assert getattr(result, name) == pytest.approx(np.mean(expected), abs=1e-12)
    # 24 pairs differ in score and 12 in each summary. With the first all 12 agree; the second chose
    # frames 2 and 3, which are above two frames and below four: 4 agree and 8 do not.
    assert result.tau == pytest.approx((12 + 4 - 8) / (24 * 12) ** 0.5 / 2)


def test_the_human_row_follows_the_correlation():
    gt = small_video()
    # Two summaries, each held against the other. 2 of 8 frames each, none common: phi is -1 / 3.
    for correlation in ("summe_scores", "summe_binary_summary"):
        human = protocols.human_agreement(gt, Protocol(correlation=correlation))
        assert (human.tau, human.rho) == (pytest.approx(-1 / 3), pytest.approx(-1 / 3))
    texts = {
        name: Protocol(correlation=name).texts("human")["row"] for name in protocols.CORRELATIONS
    }
    assert len(set(texts.values())) == 3


def test_whoever_says_the_same_throughout_counts_as_zero_and_is_told():
    gt = small_video(user_scores=[[1, 2, 3, 4], [2, 2, 2, 2]])
    result = protocols.evaluate_video(gt, SECONDS, np.arange(1.0, 5.0))
    assert (result.tau, result.rho) == (0.5, 0.5)
    assert not result.constant
    [note] = protocols.notes_on([gt, small_video("w")], QUARTER)
    assert note.startswith("1 annotator is the same throughout a video; with it tau")
    assert note.endswith("count as 0: 1 of v.")
    [note] = protocols.notes_on([gt, dataclasses.replace(gt, video_id="w")], QUARTER)
    assert note.startswith("2 annotators are the same throughout a video; with them tau")
    quarter = dataclasses.replace(QUARTER, correlation="summe_scores")
    assert protocols.notes_on([gt], quarter) == ()


def test_videos_in_which_no_shot_fits_are_named():
    gt, long = small_video(), np.array([[0, 3], [3, 8]])  # of 8 frames a quarter are 2
    without = dataclasses.replace(gt, video_id="w", shots=long)
    assert protocols.evaluate_video(without, SECONDS, np.arange(1.0, 5.0), QUARTER).f1 == 0
    [note] = protocols.notes_on([gt, without], QUARTER)
    assert note.startswith("No shot fits into 25 % of w: every summary made of shots is empty")
    assert "F1 is 0 whatever is predicted" in note
    binary = dataclasses.replace(QUARTER, correlation="summe_binary_summary")
    assert "F1, tau and rho are 0 whatever" in protocols.notes_on([without], binary)[0]


def test_points_in_the_first_frame_begin_what_they_stand_for():
    """At frames 0 and 5 of 8 the first holds for five; as centres the nearer one counts."""
    gt = dataclasses.replace(small_video(), user_scores=np.array([[1, 2], [2, 1]]))
    begins = dataclasses.replace(gt, score_times=np.array([0.5, 5.5], np.float32) / 2)
    assert begins.point_of_frame.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    centres = dataclasses.replace(gt, score_times=np.array([1.5, 5.5], np.float32) / 2)
    # Halfway lies 1.75 s, the centre of frame 3.
    assert centres.point_of_frame.tolist() == [0, 0, 0, 1, 1, 1, 1, 1]
    alone = dataclasses.replace(gt, user_scores=gt.user_scores[:, :1], score_times=np.array([3.0]))
    assert alone.point_of_frame.tolist() == [0] * 8


def test_the_time_row_reckons_in_float64():
    times = np.array([0.5, 1.5, 2.5, 3.5], np.float32) / 7
    train = dataclasses.replace(small_video("a", [[1, 3, 4, 2]] * 2), score_times=times)
    test = dataclasses.replace(small_video("b"), score_times=times)
    doubles = [dataclasses.replace(gt, score_times=times.astype(float)) for gt in (train, test)]
    assert protocols._time_features(test).dtype == np.float64
    np.testing.assert_array_equal(
        protocols._time_features(test), protocols._time_features(doubles[1])
    )
    assert protocols.time_row([train], [test]) == protocols.time_row(doubles[:1], doubles[1:])


def test_the_config_offers_what_protocols_know():
    offered = {
        "eval.f1": tuple(protocols.F1_KINDS),
        "eval.correlation": tuple(protocols.CORRELATIONS),
        "eval.shots": tuple(protocols.SHOTS),
    }
    assert offered == {name: config._CHOICES[name] for name in offered}


def test_the_whole_evaluation_equals_plain_loops_with_scipy():
    rng = np.random.default_rng(0)
    gt = VideoGroundTruth(
        video_id="v",
        n_frames=200,
        native_fps=25.0,
        duration_s=8.0,
        score_times=(np.arange(0, 200, 15) + 0.5) / 25,
        user_scores=rng.integers(1, 6, (5, 14)).astype(float),
        user_summary=rng.random((5, 200)) < 0.2,
        shots=np.array([[0, 30], [30, 45], [45, 110], [110, 125], [125, 200]]),
    )
    scores = rng.random(200)
    result = protocols.evaluate_frames(gt, scores, Protocol(budget=0.25))
    for name, by_scipy in (("tau", scipy.stats.kendalltau), ("rho", scipy.stats.spearmanr)):
        expected = np.mean([by_scipy(scores[::15], user).statistic for user in gt.user_scores])
        assert getattr(result, name) == pytest.approx(expected, abs=1e-12)
    # 50 frames: of the sets of shots that fit, the one with the greatest sum of means.
    means = [scores[a:b].mean() for a, b in gt.shots]
    sets = [[k for k in range(5) if bits >> k & 1] for bits in range(32)]
    fitting = [s for s in sets if sum(np.diff(gt.shots[k])[0] for k in s) <= 50]
    best = max(fitting, key=lambda s: sum(means[k] for k in s))
    summary = np.zeros(200, bool)
    for k in best:
        summary[slice(*gt.shots[k])] = True
    assert result.f1 == pytest.approx(np.mean([metrics.f1(summary, u) for u in gt.user_summary]))


def test_human_row_of_tvsum_is_the_published_one(shared_data):
    """Kendall 0.177 and Spearman 0.204 (Otani et al., CVPR 2019), every 15th frame."""
    results = [
        protocols.human_agreement(
            VideoGroundTruth(
                video_id=video.video_id,
                n_frames=video.n_frames,
                native_fps=video.n_frames / video.length_s,
                duration_s=video.length_s,
                score_times=video.point_times,
                user_scores=video.point_scores,
                user_summary=np.ones((20, 1), bool),
                shots=np.array([[0, video.n_frames]]),
            )
        )
        for video in tvsum.load(shared_data / "tvsum")
    ]
    human = protocols.summarize_results(results, row="human")
    assert len(results) == 50
    assert (f"{human.tau:.3f}", f"{human.rho:.3f}") == ("0.177", "0.204")


def summe_truth(video):
    return VideoGroundTruth(
        video_id=video.video_id,
        n_frames=video.n_frames,
        native_fps=video.native_fps,
        duration_s=video.length_s,
        score_times=video.frame_times,
        user_scores=video.user_summary.astype(np.float32),
        user_summary=video.user_summary.astype(bool),
        shots=np.array([[0, video.n_frames]]),
    )


def test_human_rows_of_summe(shared_data):
    """Mean F 0.311 of an annotator with the others; of each video's best annotator 0.409.

    The published tau 0.205 and rho 0.213 are of pairs of annotators by the raw numbers, which
    also tell in which order somebody chose. Of what they chose alone it is another number.
    """
    pairs, left_out, best, raw = [], [], [], []
    for video in summe.load(shared_data / "summe"):
        gt = summe_truth(video)
        pairs.append(protocols.human_agreement(gt, Protocol(correlation="summe_scores")))
        left_out.append(protocols.human_agreement(gt, Protocol(correlation="summe_binary_summary")))
        agreement = metrics.f1_matrix(gt.user_summary, gt.user_summary)
        np.fill_diagonal(agreement, 0)
        best.append(agreement.sum(1).max() / (len(agreement) - 1))
        path = shared_data / "summe" / "GT" / f"{video.video_id}.mat"
        order = scipy.io.loadmat(path, variable_names=["user_score"])["user_score"].T
        U = np.triu_indices(len(order), 1)
        both = (metrics.kendall_tau_matrix, metrics.spearman_rho_matrix)
        raw.append([correlate(order, order)[U].mean() for correlate in both])
    assert len(pairs) == 25
    mean = protocols.summarize_results(pairs)
    assert (f"{mean.f1:.3f}", f"{np.mean(best):.3f}") == ("0.311", "0.409")
    assert (f"{mean.tau:.3f}", f"{mean.rho:.3f}") == ("0.212", "0.212")
    mean = protocols.summarize_results(left_out)
    assert (f"{mean.tau:.3f}", f"{mean.rho:.3f}") == ("0.296", "0.329")
    assert [f"{value:.3f}" for value in np.mean(raw, 0)] == ["0.205", "0.213"]


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"user_scores": np.ones((2, 3))},
            r"v: user_scores must be \[2, 4\] for 2 .* got \[2, 3\]",
        ),
        ({"user_scores": np.ones(4)}, r"v: user_scores must be \[4, 4\] .* got \[4\]"),
        ({"user_scores": np.full((2, 4), np.nan)}, "v: user_scores must be finite"),
        ({"user_summary": np.ones((2, 7), bool)}, r"v: user_summary must be \[2, 8\] .* \[2, 7\]"),
        ({"user_summary": np.ones((3, 8), bool)}, r"v: user_summary must be \[2, 8\] .* \[3, 8\]"),
        ({"score_times": np.array([0.5, 2.5, 1.5, 3.5])}, "v: .* score_times in order"),
        ({"score_times": np.array([0.5, 1.5, np.nan, 3.5])}, "v: .* score_times in order"),
        ({"shots": np.array([[0, 4], [4, 9]])}, "v: shots must be .* within 0 to 8 frames"),
        ({"shots": np.array([[0, 4], [4, 4]])}, "v: shots must be"),
        ({"shots": np.zeros((0, 2), int)}, "v: shots must be"),
        ({"shots": np.arange(4)}, "v: shots must be"),
    ],
)
def test_annotations_that_do_not_fit_their_video_are_named(changes, message):
    gt = dataclasses.replace(small_video(), **changes)
    with pytest.raises(UserError, match=message):
        gt.check()


def test_says_what_is_wrong():
    gt = small_video()
    with pytest.raises(UserError, match="without common videos"):
        protocols.baseline_rows([gt], [gt], seed=0)
    with pytest.raises(UserError, match="at least two annotators"):
        protocols.human_agreement(small_video(user_scores=[[1, 2, 3, 4]]))
    with pytest.raises(UserError, match="no f1='men'; choose one of avg, max"):
        Protocol(f1="men")
    with pytest.raises(UserError, match="did you mean 'summe_scores'"):
        Protocol(correlation="sume_scores")
    with pytest.raises(UserError, match="share of the video"):
        Protocol(budget=0.0)
    with pytest.raises(UserError, match="v: nobody has annotated"):
        protocols.evaluate_video(small_video(user_scores=np.zeros((0, 4))), SECONDS, np.ones(4))
    with pytest.raises(UserError, match="v: want 8 finite scores, one per native frame"):
        protocols.evaluate_frames(gt, np.ones(7))
    with pytest.raises(UserError, match="appears twice"):
        protocols.summarize_results([VideoResult(video_id="a", f1=0, tau=0, rho=0)] * 2)
    with pytest.raises(UserError, match="no video"):
        protocols.summarize_results([])
