"""How predictions are held against people, with the name of the protocol on every number.

The field reports the same three letters for different sums; a number is only comparable with
another of the same `Protocol`. Model and baseline rows go through the same functions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Literal

import numpy as np

from deevisum_jax.errors import UserError, closest
from deevisum_jax.summary import metrics
from deevisum_jax.summary.select import DEFAULT_BUDGET, annotator_summaries, budget_frames

F1Kind = Literal["avg", "max"]
Correlation = Literal["tvsum_per_annotator", "summe_binary_summary", "summe_scores"]
Shots = Literal["data_set", "kts"]

# What tau and rho correlate; the rest of the sentence is in `Protocol.texts`.
CORRELATIONS: Mapping[str, str] = MappingProxyType(
    {
        "tvsum_per_annotator": (
            "the prediction at every annotated point (of TVSum every 15th frame) with each "
            "annotator's scores there; mean over annotators, then videos (usual for TVSum)"
        ),
        "summe_binary_summary": (
            "the prediction's knapsack summary, 0 or 1 per native frame, with the mean of the "
            "annotators' summaries; mean over videos (for SumMe in CSTA and LLMVS)"
        ),
        "summe_scores": (
            "the predicted score of every native frame with each annotator's summary, 0 or 1; mean "
            "over annotators, then videos (for SumMe in the manner of Otani et al. 2019)"
        ),
    }
)
F1_KINDS: Mapping[str, str] = MappingProxyType(
    {
        "avg": "mean over annotators, then videos (usual for TVSum)",
        "max": "best annotator, then mean over videos (usual for SumMe)",
    }
)
SHOTS: Mapping[str, str] = MappingProxyType(
    {"data_set": "the data set's shots", "kts": "shots by our KTS"}
)
ROWS: Mapping[str, str] = MappingProxyType(
    {
        "random": (
            "uniform random score per annotated point, mean over draws; the knapsack counts mean "
            "scores per shot and so prefers short shots even here"
        ),
        "constant": (
            "the same score everywhere: the knapsack takes as many shots as fit, the shortest "
            "ones, of equal ones the earlier: what a collapsed model gets"
        ),
        "time": (
            "cubic regression of the mean annotator's score on relative time alone, every training "
            "video (of a fold, those that validate too) weighing the same; without a training "
            "split it is fitted on all other videos"
        ),
        "human": (
            "each annotator against the others: F1 of the annotator's summary with those of the "
            "others (mean or best of them), mean over annotators; tau and rho of {pairs}"
        ),
        "oracle": (
            "the mean annotator's score as the prediction; each annotator is part of that mean, so "
            "this is a ceiling and not a left-out estimate"
        ),
    }
)
_PAIRS = {
    "tvsum_per_annotator": "the scores of all pairs of annotators",
    # As the model's own: a summary with a mean of summaries.
    "summe_binary_summary": (
        "the annotator's summary with the mean of the others'. (Published tables print 0.205 and "
        "0.213 for SumMe: all pairs of annotators, by the raw selection order of its files)"
    ),
    "summe_scores": "the summaries of all pairs of annotators, of which tau and rho are equal",
}

_TIME_DEGREE = 3
_FEW = 10  # videos below which a difference means nothing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Protocol:
    """All that decides what F1, tau and rho of a prediction are.

    Raises:
      UserError: a name that is not known, or a budget outside (0, 1].
    """

    f1: F1Kind = "avg"  # over annotators
    correlation: Correlation = "tvsum_per_annotator"
    shots: Shots = "data_set"  # where `VideoGroundTruth.shots` are from
    budget: float = DEFAULT_BUDGET  # share of the video that a summary may fill

    def __post_init__(self) -> None:
        for name, choices in (("f1", F1_KINDS), ("correlation", CORRELATIONS), ("shots", SHOTS)):
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"there is no {name}={value!r}; {closest(str(value), choices)}")
        if not 0 < self.budget <= 1:
            raise UserError(f"the budget is a share of the video in (0, 1], got {self.budget}")

    @property
    def as_stored(self) -> bool:
        """Whether shots and budget are those that stored summaries of annotators were made for."""
        return self.shots == "data_set" and self.budget == DEFAULT_BUDGET

    def texts(self, row: str | None = None) -> dict[str, str]:
        """What F1, tau and rho are, and the row of `ROWS`, in plain words."""
        undefined = "where one of the two is the same everywhere they count as 0"
        made = ""
        if not self.as_stored:
            made = " (where it follows from scores, made of these shots for this budget)"
        texts = {
            "f1": (
                f"overlap of the knapsack summary (mean score per shot, {SHOTS[self.shots]}, "
                f"{100 * self.budget:g} % of the frames) with each annotator's summary{made}; "
                f"{F1_KINDS[self.f1]}"
            ),
            "tau": f"Kendall tau-b of {CORRELATIONS[self.correlation]}; {undefined}",
            "rho": f"Spearman rho of {CORRELATIONS[self.correlation]}; {undefined}",
        }
        if row is not None:
            texts["row"] = ROWS[row].format(pairs=_PAIRS[self.correlation])
        return texts


TVSUM = Protocol()


def point_frames(score_times: np.ndarray, n_frames: int, native_fps: float) -> np.ndarray:
    """int64[N]: the native frame of each annotated point, from float[N] seconds."""
    frames = np.floor(np.asarray(score_times, np.float64) * native_fps + 1e-3)
    return np.clip(frames.astype(np.int64), 0, n_frames - 1)


def point_of_frame(score_times: np.ndarray, n_frames: int, native_fps: float) -> np.ndarray:
    """int64[n_frames]: the annotated point whose score each native frame has.

    Where the first point lies in frame 0, points begin what they stand for, as TVSum's frames 0,
    15, 30, ... do: each holds until the next. Else they are centres, and the nearest counts.

    Args:
      score_times: float[N], seconds, ascending.
      n_frames: of the video.
      native_fps: its frames per second.
    """
    first_frames = point_frames(score_times, n_frames, native_fps)
    frames = np.arange(n_frames)
    if first_frames[0] == 0:
        return np.searchsorted(first_frames, frames, "right") - 1
    times = np.asarray(score_times, np.float64)
    return np.searchsorted((times[1:] + times[:-1]) / 2, (frames + 0.5) / native_fps, "right")


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoGroundTruth:
    """What people said of one video. U annotators, N annotated points, S shots.

    What predictions are held against again and again is worked out once, at first use.
    """

    video_id: str
    n_frames: int  # native frames
    native_fps: float
    duration_s: float
    score_times: np.ndarray  # float[N], annotated points, seconds, ascending
    user_scores: np.ndarray  # float[U, N], importance in any one scale
    user_summary: np.ndarray  # bool[U, n_frames], 1 = frame is in the annotator's summary
    shots: np.ndarray  # int[S, 2], native frames, half-open

    @functools.cached_property
    def frame_centres(self) -> np.ndarray:
        """float64[n_frames]: seconds; clear of rounding at borders."""
        return (np.arange(self.n_frames) + 0.5) / self.native_fps

    @functools.cached_property
    def point_frames(self) -> np.ndarray:
        """int64[N]: the native frame of each annotated point."""
        return point_frames(self.score_times, self.n_frames, self.native_fps)

    @functools.cached_property
    def point_of_frame(self) -> np.ndarray:
        """int64[n_frames]: the annotated point whose score each native frame has."""
        return point_of_frame(self.score_times, self.n_frames, self.native_fps)

    @functools.cached_property
    def chosen_per_shot(self) -> np.ndarray:
        """float64[U, S]: how many frames of each shot are in each annotator's summary."""
        before = np.zeros((len(self.user_summary), self.user_summary.shape[1] + 1), np.int32)
        np.cumsum(self.user_summary, axis=1, out=before[:, 1:])
        return (before[:, self.shots[:, 1]] - before[:, self.shots[:, 0]]).astype(np.float64)

    @functools.cached_property
    def chosen_frames(self) -> np.ndarray:
        """float64[U]: the length of each annotator's summary in frames."""
        return self.user_summary.sum(1, dtype=np.float64)

    def check(self) -> None:
        """Finds a video without annotations, or whose annotations do not fit it.

        Raises:
          UserError: nobody has annotated it; scores are not finite or not one per annotated point,
            points are not in order, summaries do not tell every frame; shots are none, empty or not
            inside the video.
        """
        if not len(self.user_scores) or not len(self.user_summary):
            raise UserError(
                f"{self.video_id}: nobody has annotated this video; leave it out of the evaluation"
            )
        U, N = len(self.user_scores), len(self.score_times)
        for name, wanted in (("user_scores", (U, N)), ("user_summary", (U, self.n_frames))):
            if (shape := getattr(self, name).shape) != wanted or not N:
                raise UserError(
                    f"{self.video_id}: {name} must be {list(wanted)} for {U} annotators, {N} "
                    f"annotated points and {self.n_frames} frames, got {list(shape)}; mend the "
                    "record"
                )
        if not np.isfinite(self.user_scores).all() or not (np.diff(self.score_times) >= 0).all():
            raise UserError(
                f"{self.video_id}: user_scores must be finite and score_times in order; mend the "
                "record"
            )
        shots = self.shots
        if (
            shots.ndim != 2
            or shots.shape[1:] != (2,)
            or not len(shots)
            or shots.min() < 0
            or shots.max() > self.n_frames
            or (shots[:, 0] >= shots[:, 1]).any()
        ):
            raise UserError(
                f"{self.video_id}: shots must be at least one, [S, 2], not empty and within 0 to "
                f"{self.n_frames} frames, half-open; mend the record's change_points"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoResult:
    """One prediction held against one video's annotators."""

    video_id: str
    f1: float
    tau: float
    rho: float
    # What tau and rho correlate was the same everywhere: they are 0 by decision.
    constant: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Means over videos, the videos themselves, and what the numbers mean."""

    f1: float
    tau: float
    rho: float
    per_video: tuple[VideoResult, ...]
    protocols: Mapping[str, str]  # as `Protocol.texts` says it


def evaluate_video(
    gt: VideoGroundTruth,
    segment_bounds: np.ndarray,
    segment_scores: np.ndarray,
    protocol: Protocol = TVSUM,
) -> VideoResult:
    """Segment scores held against the annotators of a video.

    A segment's score holds from its start to the next segment's start (the first also before, the
    last also after), at the annotated points and at the centre of every native frame.

    Args:
      gt: the annotations.
      segment_bounds: float[M, 2], start and end in seconds, ascending, not overlapping.
      segment_scores: float[M], any monotone scale for tau and rho of scores; what knows the
        knapsack depends on the scale, since it adds scores, and takes no shot whose score is 0 or
        less.
      protocol: what is computed.

    Raises:
      UserError: bounds and scores do not fit, or are not finite or ascending; a video without
        annotators.
    """
    bounds, scores = check_segments(gt.video_id, segment_bounds, segment_scores)
    # A point on a border belongs to the later segment, rounding or not.
    starts = bounds[1:, 0] - 1e-6

    def hold(times: np.ndarray) -> np.ndarray:
        first = np.searchsorted(times, starts)
        return np.repeat(scores, np.diff(first, prepend=0, append=len(times)))

    return _evaluate(gt, hold(gt.score_times), hold(gt.frame_centres), protocol)


def evaluate_frames(
    gt: VideoGroundTruth, frame_scores: np.ndarray, protocol: Protocol = TVSUM
) -> VideoResult:
    """As `evaluate_video`, with float[n_frames], a score for every native frame.

    Raises:
      UserError: there is another number of scores, one is not finite, or the video has no
        annotators.
    """
    scores = np.asarray(frame_scores, np.float64)
    if scores.shape != (gt.n_frames,) or not np.isfinite(scores).all():
        raise UserError(
            f"{gt.video_id}: want {gt.n_frames} finite scores, one per native frame, got shape "
            f"{scores.shape}"
        )
    return _evaluate(gt, scores[gt.point_frames], scores, protocol)


def check_segments(
    where: str, segment_bounds: np.ndarray, segment_scores: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """float64[M, 2] and float64[M]: segments that make sense.

    Args:
      where: the video, and perhaps its file, for messages.
      segment_bounds: seconds.
      segment_scores: one of each segment.

    Raises:
      UserError: they do not.
    """
    bounds = np.asarray(segment_bounds, np.float64)
    scores = np.asarray(segment_scores, np.float64)
    if bounds.ndim != 2 or bounds.shape[1:] != (2,) or scores.shape != bounds.shape[:1]:
        raise UserError(
            f"{where}: want segment bounds [M, 2] and M scores, got {bounds.shape} and "
            f"{scores.shape}"
        )
    if not len(scores) or not (np.isfinite(bounds).all() and np.isfinite(scores).all()):
        raise UserError(f"{where}: segments must be at least one and finite throughout")
    starts, ends = bounds.T
    # Bounds are times in float: neighbours may overlap by rounding.
    if (ends <= starts).any() or (starts[1:] < ends[:-1] - 1e-3).any():
        raise UserError(
            f"{where}: segments must be in order, non-empty and not overlap; sort them by start "
            "time"
        )
    return bounds, scores


def summarize_results(
    results: Sequence[VideoResult], protocol: Protocol = TVSUM, *, row: str | None = None
) -> Result:
    """The mean over videos, with the protocol spelled out.

    Args:
      results: one per video.
      protocol: what `evaluate_video` was called with.
      row: name of a baseline row, whose meaning is then carried too.

    Raises:
      UserError: there is no video, or one appears twice.
    """
    if not results:
        raise UserError("there is no video to average over; the test split is empty")
    ids = [result.video_id for result in results]
    if len(set(ids)) != len(ids):
        raise UserError("a video appears twice among the results; evaluate every video once")
    mean = lambda name: float(np.mean([getattr(result, name) for result in results]))
    return Result(
        f1=mean("f1"),
        tau=mean("tau"),
        rho=mean("rho"),
        per_video=tuple(results),
        protocols=protocol.texts(row),
    )


def baseline_rows(
    train: Sequence[VideoGroundTruth],
    test: Sequence[VideoGroundTruth],
    *,
    seed: int,
    random_draws: int = 20,
    protocol: Protocol = TVSUM,
) -> dict[str, Result]:
    """What needs no model: rows random, constant, time, human and oracle (see ROWS).

    There is no human row where a test video has one annotator only.

    Args:
      train: videos on which the time row is fitted.
      test: videos evaluated.
      seed: of the random row.
      random_draws: predictions drawn per video for the random row.
      protocol: what is computed.

    Raises:
      UserError: a split is empty, the two share a video, or a video has no annotator.
    """
    shared = {gt.video_id for gt in train} & {gt.video_id for gt in test}
    if not train or not test or shared or random_draws < 1:
        raise UserError(
            f"baselines need a training and a test split without common videos and at least one "
            f"random draw, got {len(train)} and {len(test)} videos, common: {sorted(shared)}, "
            f"{random_draws=}"
        )
    rows = untrained_rows(test, seed=seed, random_draws=random_draws, protocol=protocol)
    rows["time"] = time_row(train, test, protocol)
    return {
        name: summarize_results(rows[name], protocol, row=name) for name in ROWS if name in rows
    }


def untrained_rows(
    test: Sequence[VideoGroundTruth],
    *,
    seed: int,
    random_draws: int = 20,
    protocol: Protocol = TVSUM,
) -> dict[str, list[VideoResult]]:
    """The rows random, constant, human and oracle of `baseline_rows`, video by video.

    Raises:
      UserError: a video has no annotator.
    """
    for gt in test:
        gt.check()
    rng = np.random.default_rng(seed)
    rows: dict[str, list[VideoResult]] = {name: [] for name in ("random", "constant", "oracle")}
    if all(len(gt.user_summary) > 1 for gt in test):
        rows["human"] = [human_agreement(gt, protocol) for gt in test]
    for gt in test:
        N = len(gt.score_times)
        draws = rng.random((random_draws, N))
        f1, tau, rho, _ = _measure(gt, draws, hold_points(gt, draws), protocol)
        rows["random"].append(
            VideoResult(
                video_id=gt.video_id,
                f1=float(f1.mean()),
                tau=float(tau.mean()),
                rho=float(rho.mean()),
            )
        )
        rows["constant"].append(_evaluate_points(gt, np.full(N, 0.5), protocol))
        mean = gt.user_scores.mean(0, dtype=np.float64)
        rows["oracle"].append(_evaluate_points(gt, mean, protocol))
    return rows


def time_row(
    train: Sequence[VideoGroundTruth],
    test: Sequence[VideoGroundTruth],
    protocol: Protocol = TVSUM,
) -> list[VideoResult]:
    """What relative time alone predicts of each test video.

    Args:
      train: videos to fit on; if empty, every test video is predicted from all others.
      test: videos evaluated.
      protocol: what is computed.

    Raises:
      UserError: there is nothing to fit on.
    """
    if not train and len(test) < 2:
        raise UserError("the time row needs a video to fit on beside the one that is evaluated")
    moments = [_time_moments(gt) for gt in (train or test)]
    whole, rows = sum(moments), []
    for k, gt in enumerate(test):
        known = whole if train else whole - moments[k]
        weights = np.linalg.lstsq(known[:, :-1], known[:, -1], rcond=None)[0]
        predicted = (_time_features(gt) @ weights).round(9)  # no ranks out of rounding
        rows.append(_evaluate_points(gt, predicted, protocol))
    return rows


def human_agreement(gt: VideoGroundTruth, protocol: Protocol = TVSUM) -> VideoResult:
    """Each annotator against the others (see ROWS).

    Raises:
      UserError: there are fewer than two annotators.
    """
    U = len(gt.user_summary)
    if len(gt.user_scores) < 2 or U < 2:
        raise UserError(f"{gt.video_id}: agreement needs at least two annotators, got {U}")
    agreement = metrics.f1_matrix(gt.user_summary, gt.user_summary)
    others = ~np.eye(U, dtype=bool)
    if protocol.f1 == "avg":
        value = agreement[others].mean()
    else:
        value = np.where(others, agreement, -1.0).max(1).mean()
    if protocol.correlation == "summe_binary_summary":
        votes = gt.user_summary.sum(0, dtype=np.float64)
        tau, rho = (
            np.mean([f(one[None], (votes - one)[None])[0, 0] for one in gt.user_summary])
            for f in (metrics.kendall_tau_matrix, metrics.spearman_rho_matrix)
        )
    else:
        rows = _people(gt, protocol)
        pairs = np.triu_indices(len(rows), 1)
        tau = metrics.kendall_tau_matrix(rows, rows)[pairs].mean()
        rho = metrics.spearman_rho_matrix(rows, rows)[pairs].mean()
    return VideoResult(video_id=gt.video_id, f1=float(value), tau=float(tau), rho=float(rho))


def notes_on(truths: Sequence[VideoGroundTruth], protocol: Protocol = TVSUM) -> tuple[str, ...]:
    """What a reader should know of the annotations: often nothing.

    Whose tau and rho are undefined, since they said the same throughout; of which videos every
    summary is empty; why there is no human row.
    """
    same = {}
    for gt in truths:
        people = _people(gt, protocol)
        if count := int((people.min(1) == people.max(1)).sum()):
            same[gt.video_id] = count
    notes = []
    if same:
        whom = ", ".join(f"{count} of {video_id}" for video_id, count in same.items())
        one = "mean summary" if protocol.correlation == "summe_binary_summary" else "annotator"
        many = "mean summaries" if protocol.correlation == "summe_binary_summary" else "annotators"
        who = counted(sum(same.values()), one, many)
        are, them = ("is", "it") if sum(same.values()) == 1 else ("are", "them")
        notes.append(
            f"{who} {are} the same throughout a video; with {them} tau and rho are undefined and "
            f"count as 0: {whom}."
        )
    empty = [
        gt.video_id
        for gt in truths
        if np.diff(gt.shots).min() > budget_frames(gt.n_frames, protocol.budget)
    ]
    if empty:
        zero = "F1, tau and rho are" if protocol.correlation == "summe_binary_summary" else "F1 is"
        notes.append(
            f"No shot fits into {100 * protocol.budget:g} % of {', '.join(empty)}: every summary "
            f"made of shots is empty there, and {zero} 0 whatever is predicted."
        )
    if alone := [gt.video_id for gt in truths if len(gt.user_summary) < 2]:
        notes.append(
            f"There is no human row: {counted(len(alone), 'video')} with one annotator only, such "
            f"as {alone[0]}."
        )
    return tuple(notes)


def cautions(methods: Mapping[str, Result], baselines: Mapping[str, Result]) -> list[str]:
    """What the numbers themselves say against a hasty reading.

    Args:
      methods: by the name of the row, all of the same videos.
      baselines: those that there are of `ROWS`, of these videos.
    """
    found = []
    if constant := baselines.get("constant"):
        note = f"A constant score reaches F1 {constant.f1:.3f} in these very settings"
        if human := baselines.get("human"):
            note += (
                f", more than people among themselves ({human.f1:.3f}): F1 alone proves nothing "
                "here, read tau and rho"
                if constant.f1 > human.f1
                else f", people among themselves {human.f1:.3f}"
            )
        found.append(f"{note}.")
        if beaten := [name for name, result in methods.items() if result.f1 <= constant.f1]:
            found.append(f"F1 of {_listed(beaten)} is no better than that of a constant score.")
    time = baselines.get("time")
    if beaten := [name for name, result in methods.items() if time and result.tau <= time.tau]:
        found.append(
            f"tau of {_listed(beaten)} is no better than that of relative time alone "
            f"({time.tau:.3f})."
        )
    for name, result in methods.items():
        if flat := sum(video.constant for video in result.per_video):
            found.append(
                f"{name} is the same throughout {flat} of "
                f"{counted(len(result.per_video), 'video')}, counted as tau 0 and rho 0."
            )
    few = min(len(result.per_video) for result in [*methods.values(), *baselines.values()])
    if few < _FEW:
        found.append(f"Only {counted(few, 'video')}: small differences mean nothing here.")
    return found


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 video`, `2 videos`."""
    return f"{number} {one if number == 1 else many or f'{one}s'}"


def _listed(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def hold_points(gt: VideoGroundTruth, scores: np.ndarray) -> np.ndarray:
    """float[..., n_frames]: of float[..., N], each native frame's own (`point_of_frame`).

    Raises:
      UserError: the video's annotations do not fit it (`VideoGroundTruth.check`).
    """
    gt.check()
    return np.asarray(scores)[..., gt.point_of_frame]


def _people(gt: VideoGroundTruth, protocol: Protocol) -> np.ndarray:
    """float[V, K]: what tau and rho of a prediction correlate it with."""
    if protocol.correlation == "tvsum_per_annotator":
        return gt.user_scores
    if protocol.correlation == "summe_scores":
        return gt.user_summary
    # Votes, not their mean: equal ones are equal numbers.
    return gt.user_summary.sum(0, dtype=np.float64)[None]


def _measure(
    gt: VideoGroundTruth, at_points: np.ndarray, per_frame: np.ndarray, protocol: Protocol
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """F1, tau and rho of R predictions, and whether tau and rho are 0 by decision: each [R].

    Args:
      gt: the annotations.
      at_points: float[R, N], at the annotated points.
      per_frame: float[R, n_frames].
      protocol: what is computed.
    """
    gt.check()
    summaries = annotator_summaries(per_frame, gt.shots, gt.n_frames, protocol.budget)
    # As metrics.f1_matrix, from counts per shot.
    chosen = summaries[:, gt.shots[:, 0]].astype(np.float64)
    common = chosen @ gt.chosen_per_shot.T
    lengths = chosen @ (gt.shots[:, 1] - gt.shots[:, 0])
    f1 = 2.0 * common / np.maximum(lengths[:, None] + gt.chosen_frames, 1)
    f1 = f1.mean(1) if protocol.f1 == "avg" else f1.max(1)
    given = {
        "tvsum_per_annotator": at_points,
        "summe_binary_summary": summaries,
        "summe_scores": per_frame,
    }[protocol.correlation]
    people = _people(gt, protocol)
    tau = metrics.kendall_tau_matrix(given, people).mean(1)
    rho = metrics.spearman_rho_matrix(given, people).mean(1)
    return f1, tau, rho, given.min(1) == given.max(1)


def _evaluate(
    gt: VideoGroundTruth, at_points: np.ndarray, per_frame: np.ndarray, protocol: Protocol
) -> VideoResult:
    """A prediction at the annotated points, float[N], and for every native frame."""
    f1, tau, rho, constant = _measure(gt, at_points[None], per_frame[None], protocol)
    return VideoResult(
        video_id=gt.video_id,
        f1=float(f1[0]),
        tau=float(tau[0]),
        rho=float(rho[0]),
        constant=bool(constant[0]),
    )


def _evaluate_points(gt: VideoGroundTruth, scores: np.ndarray, protocol: Protocol) -> VideoResult:
    """A prediction at the annotated points only, float[N]."""
    return _evaluate(gt, scores, hold_points(gt, scores), protocol)


def _time_features(gt: VideoGroundTruth) -> np.ndarray:
    """float64[N, 4]: powers 0..3 of relative time."""
    times = np.asarray(gt.score_times, np.float64) / gt.duration_s
    return times[:, None] ** np.arange(_TIME_DEGREE + 1)


def _time_moments(gt: VideoGroundTruth) -> np.ndarray:
    """float64[4, 5]: one video's normal equations, which weigh the same whatever its length."""
    gt.check()
    features = _time_features(gt)
    target = gt.user_scores.mean(0, dtype=np.float64)
    return features.T @ np.column_stack([features, target]) / len(features)
