"""How predictions are held against people, with the name of the protocol on every number.

The field reports the same three letters for different sums (see PROTOCOLS); a number is only
comparable with another of the same protocol. Model and baseline rows go through the same functions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import numpy as np

from deevisum_jax.errors import UserError
from deevisum_jax.summary import metrics
from deevisum_jax.summary.select import DEFAULT_BUDGET, select_summary, shot_scores

F1Kind = Literal["avg", "max"]

_CORRELATION = "each annotator's scores at the annotated points; mean over annotators, then videos"
PROTOCOLS: Mapping[str, str] = MappingProxyType(
    {
        "tau": f"Kendall tau-b with {_CORRELATION}; a constant prediction counts as 0",
        "rho": f"Spearman rho with {_CORRELATION}; a constant prediction counts as 0",
        "f1/avg": (
            "F1 of the knapsack summary (mean score per shot, shots by KTS) with each annotator's "
            "summary; mean over annotators, then videos (usual for TVSum)"
        ),
        "f1/max": (
            "F1 of the knapsack summary (mean score per shot, shots by KTS) with each annotator's "
            "summary; best annotator, then mean over videos (usual for SumMe)"
        ),
        "row/random": (
            "uniform random score per annotated point, mean over draws; the knapsack counts mean "
            "scores per shot and so prefers short shots even here"
        ),
        "row/constant": (
            "the same score everywhere: tau and rho are 0 by decision; the knapsack then takes as "
            "many shots as fit, the shortest ones, of equal ones the earlier: what a collapsed "
            "model gets"
        ),
        "row/time": (
            "cubic regression of the mean annotator's score on relative time alone, every training "
            "video weighing the same"
        ),
        "row/human": (
            "each annotator against every other one: tau and rho over all pairs; F1 of the "
            "annotator's summary with those of the others (mean or best of them), mean over "
            "annotators"
        ),
        "row/oracle": (
            "the mean annotator's score as the prediction; each annotator is part of that mean, so "
            "this is a ceiling and not a left-out estimate"
        ),
    }
)

_TIME_DEGREE = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoGroundTruth:
    """What people said of one video. U annotators, N annotated points, S shots."""

    video_id: str
    n_frames: int  # native frames
    native_fps: float
    duration_s: float
    score_times: np.ndarray  # float[N], centre of each annotated point, seconds, ascending
    user_scores: np.ndarray  # float[U, N], importance in any one scale
    user_summary: np.ndarray  # bool[U, n_frames], 1 = frame is in the annotator's summary
    shots: np.ndarray  # int[S, 2], native frames, half-open


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoResult:
    """One prediction held against one video's annotators."""

    video_id: str
    f1: float
    tau: float
    rho: float
    constant: bool = False  # the prediction was the same everywhere: tau and rho are 0 by decision


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Means over videos, the videos themselves, and what the numbers mean."""

    f1: float
    tau: float
    rho: float
    per_video: tuple[VideoResult, ...]
    protocols: Mapping[str, str]  # metric name (and "row" for a baseline) -> its protocol


def evaluate_video(
    gt: VideoGroundTruth,
    segment_bounds: np.ndarray,
    segment_scores: np.ndarray,
    *,
    budget: float = DEFAULT_BUDGET,
    f1: F1Kind = "avg",
) -> VideoResult:
    """Segment scores held against the annotators of a video.

    A segment's score holds from its start to the next segment's start (the first also before, the
    last also after), at the annotated points for tau and rho and at the centre of every native
    frame for the summary.

    Args:
      gt: the annotations.
      segment_bounds: float[M, 2], start and end in seconds, ascending, not overlapping.
      segment_scores: float[M], any monotone scale for tau and rho; F1 depends on the scale, since
        the knapsack adds scores, and takes no shot whose score is 0 or less.
      budget: share of the video that the summary may fill.
      f1: "avg" over annotators (TVSum) or "max" (SumMe).

    Raises:
      UserError: bounds and scores do not fit, or are not finite or ascending.
    """
    bounds = np.asarray(segment_bounds, np.float64)
    scores = np.asarray(segment_scores, np.float64)
    if bounds.ndim != 2 or bounds.shape[1:] != (2,) or scores.shape != bounds.shape[:1]:
        raise UserError(
            f"{gt.video_id}: want segment bounds [M, 2] and M scores, got {bounds.shape} and "
            f"{scores.shape}"
        )
    if not len(scores) or not (np.isfinite(bounds).all() and np.isfinite(scores).all()):
        raise UserError(f"{gt.video_id}: segments must be at least one and finite throughout")
    starts, ends = bounds.T
    # Bounds are times in float: neighbours may overlap by rounding.
    if (ends <= starts).any() or (starts[1:] < ends[:-1] - 1e-3).any():
        raise UserError(
            f"{gt.video_id}: segments must be in order, non-empty and not overlap; sort them by "
            "start time"
        )
    # A point on a border belongs to the later segment, rounding or not.
    hold = lambda times: scores[np.maximum(np.searchsorted(starts - 1e-6, times, "right") - 1, 0)]
    return _evaluate(gt, hold(gt.score_times), hold(_frame_centres(gt)), budget=budget, f1=f1)


def summarize_results(
    results: Sequence[VideoResult], *, f1: F1Kind = "avg", row: str | None = None
) -> Result:
    """The mean over videos, with the protocols spelled out.

    Args:
      results: one per video.
      f1: the kind that `evaluate_video` was called with.
      row: name of a baseline row, whose protocol is then carried too.

    Raises:
      UserError: there is no video, or one appears twice.
    """
    if not results:
        raise UserError("there is no video to average over; the test split is empty")
    ids = [result.video_id for result in results]
    if len(set(ids)) != len(ids):
        raise UserError("a video appears twice among the results; evaluate every video once")
    protocols = {"f1": PROTOCOLS[f"f1/{f1}"], "tau": PROTOCOLS["tau"], "rho": PROTOCOLS["rho"]}
    if row is not None:
        protocols["row"] = PROTOCOLS[f"row/{row}"]
    mean = lambda name: float(np.mean([getattr(result, name) for result in results]))
    return Result(
        f1=mean("f1"),
        tau=mean("tau"),
        rho=mean("rho"),
        per_video=tuple(results),
        protocols=protocols,
    )


def paired(
    a: Result, b: Result, metric: Literal["f1", "tau", "rho"]
) -> tuple[tuple[str, ...], np.ndarray]:
    """Two results video by video, for paired tests of significance.

    Returns:
      The video ids in a's order and float64[V, 2], a's and b's value of the metric.

    Raises:
      UserError: the two do not cover the same videos or follow different protocols.
    """
    if a.protocols[metric] != b.protocols[metric]:
        raise UserError(f"the two {metric} follow different protocols and cannot be paired")
    other = {result.video_id: result for result in b.per_video}
    ids = tuple(result.video_id for result in a.per_video)
    if set(ids) != set(other):
        raise UserError(
            f"the two results differ in videos: {sorted(set(ids) ^ set(other))}; evaluate both on "
            "the same split"
        )
    values = [(getattr(r, metric), getattr(other[r.video_id], metric)) for r in a.per_video]
    return ids, np.asarray(values, np.float64)


def baseline_rows(
    train: Sequence[VideoGroundTruth],
    test: Sequence[VideoGroundTruth],
    *,
    seed: int,
    random_draws: int = 20,
    budget: float = DEFAULT_BUDGET,
    f1: F1Kind = "avg",
) -> dict[str, Result]:
    """What needs no model: rows random, constant, time, human and oracle (see PROTOCOLS).

    Args:
      train: videos on which the time row is fitted.
      test: videos evaluated.
      seed: of the random row.
      random_draws: predictions drawn per video for the random row.
      budget: share of the video that the summary may fill.
      f1: "avg" over annotators (TVSum) or "max" (SumMe).

    Raises:
      UserError: a split is empty, the two share a video, or a video has fewer than two annotators.
    """
    shared = {gt.video_id for gt in train} & {gt.video_id for gt in test}
    if not train or not test or shared or random_draws < 1:
        raise UserError(
            f"baselines need a training and a test split without common videos and at least one "
            f"random draw, got {len(train)} and {len(test)} videos, common: {sorted(shared)}, "
            f"{random_draws=}"
        )
    rng = np.random.default_rng(seed)
    time_weights = _fit_time(train)
    rows: dict[str, list[VideoResult]] = {
        name: [] for name in ("random", "constant", "time", "human", "oracle")
    }
    for gt in test:
        N = len(gt.score_times)
        predictions = {
            "constant": np.full(N, 0.5),
            "time": _time_features(gt) @ time_weights,
            "oracle": gt.user_scores.mean(0),
        }
        for name, scores in predictions.items():
            per_frame = _hold_points(gt, scores)
            rows[name].append(_evaluate(gt, scores, per_frame, budget=budget, f1=f1))
        rows["random"].append(_random_row(gt, rng.random((random_draws, N)), budget=budget, f1=f1))
        rows["human"].append(human_agreement(gt, f1=f1))
    return {name: summarize_results(row, f1=f1, row=name) for name, row in rows.items()}


def human_agreement(gt: VideoGroundTruth, *, f1: F1Kind = "avg") -> VideoResult:
    """Each annotator against every other: the mean tau and rho over pairs, F1 left-one-out.

    Raises:
      UserError: there are fewer than two annotators.
    """
    U = len(gt.user_scores)
    if U < 2 or len(gt.user_summary) < 2:
        raise UserError(f"{gt.video_id}: agreement needs at least two annotators, got {U}")
    agreement = metrics.f1_matrix(gt.user_summary, gt.user_summary)
    others = ~np.eye(len(agreement), dtype=bool)
    if _checked(f1) == "avg":
        value = agreement[others].mean()
    else:
        value = np.where(others, agreement, -1.0).max(1).mean()
    pairs = np.triu_indices(U, 1)
    return VideoResult(
        video_id=gt.video_id,
        f1=float(value),
        tau=float(metrics.kendall_tau_matrix(gt.user_scores, gt.user_scores)[pairs].mean()),
        rho=float(metrics.spearman_rho_matrix(gt.user_scores, gt.user_scores)[pairs].mean()),
    )


def _checked(f1: str) -> F1Kind:
    if f1 not in ("avg", "max"):
        raise UserError(f"f1 must be 'avg' (TVSum) or 'max' (SumMe), got {f1!r}")
    return f1


def _evaluate(
    gt: VideoGroundTruth, at_points: np.ndarray, per_frame: np.ndarray, *, budget: float, f1: F1Kind
) -> VideoResult:
    """A prediction at the annotated points, float[N], and for every native frame."""
    return VideoResult(
        video_id=gt.video_id,
        f1=_summary_f1(gt, per_frame, budget=budget, f1=f1),
        tau=float(metrics.kendall_tau_matrix(at_points[None], gt.user_scores).mean()),
        rho=float(metrics.spearman_rho_matrix(at_points[None], gt.user_scores).mean()),
        constant=bool(at_points.min() == at_points.max()),
    )


def _random_row(
    gt: VideoGroundTruth, draws: np.ndarray, *, budget: float, f1: F1Kind
) -> VideoResult:
    """The mean over draws, float[R, N], each evaluated as a prediction."""
    per_frame = [_hold_points(gt, scores) for scores in draws]
    return VideoResult(
        video_id=gt.video_id,
        f1=float(np.mean([_summary_f1(gt, f, budget=budget, f1=f1) for f in per_frame])),
        tau=float(metrics.kendall_tau_matrix(draws, gt.user_scores).mean()),
        rho=float(metrics.spearman_rho_matrix(draws, gt.user_scores).mean()),
    )


def _summary_f1(gt: VideoGroundTruth, per_frame: np.ndarray, *, budget: float, f1: F1Kind) -> float:
    """F1 of the knapsack summary of float[n_frames] with the annotators' summaries."""
    lengths = gt.shots[:, 1] - gt.shots[:, 0]
    chosen = select_summary(shot_scores(per_frame, gt.shots), lengths, gt.n_frames, budget)
    summary = np.zeros(gt.n_frames, bool)
    for start, end in gt.shots[chosen]:
        summary[start:end] = True
    values = metrics.f1_matrix(summary[None], gt.user_summary)[0]
    return float(values.mean() if _checked(f1) == "avg" else values.max())


def _frame_centres(gt: VideoGroundTruth) -> np.ndarray:
    """float64[n_frames]: the centre of every native frame, clear of rounding at borders."""
    return (np.arange(gt.n_frames) + 0.5) / gt.native_fps


def _hold_points(gt: VideoGroundTruth, scores: np.ndarray) -> np.ndarray:
    """float64[n_frames]: the score of the annotated point nearest to each native frame."""
    halfway = (gt.score_times[1:] + gt.score_times[:-1]) / 2
    return scores[np.searchsorted(halfway, _frame_centres(gt), "right")]


def _time_features(gt: VideoGroundTruth) -> np.ndarray:
    """float64[N, 4]: powers 0..3 of relative time."""
    return (gt.score_times / gt.duration_s)[:, None] ** np.arange(_TIME_DEGREE + 1)


def _fit_time(train: Sequence[VideoGroundTruth]) -> np.ndarray:
    """float64[4]: least squares, each video weighing the same whatever its length."""
    features = [_time_features(gt) / len(gt.score_times) ** 0.5 for gt in train]
    targets = [gt.user_scores.mean(0) / len(gt.score_times) ** 0.5 for gt in train]
    return np.linalg.lstsq(np.concatenate(features), np.concatenate(targets), rcond=None)[0]
