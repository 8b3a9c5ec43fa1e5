"""Exit thresholds with a promise: how much quality early exit may cost, and how sure that is.

Learn then Test along a frontier. The videos are split at random in two. On the search part many
policies are tried, and those that save the most for what they lose are put in a row, from off to
the cheapest. On the test part they are tested in this order, each against the hypothesis that it
breaks the promise; at the first that is not shown to keep it the testing stops, and the last one
that was is chosen. The row knows nothing of the test part, so no correction is paid for its length:
with a probability of at most `delta` is a policy chosen that breaks the promise.

A video's loss is the full model's metric less the policy's. It has a sign: gains count. Two bounds:

    exact    by betting: a player who has 1 and bets a fixed share that a video's loss is below
             `epsilon` does not, on average, get richer if the promise is broken. By Markov's
             inequality 1 / (what is won) is a p-value, for any distribution and any number of
             videos. A fixed share makes it the same in any order of the videos.
    normal   the one-sided t test: takes fewer videos, and is right for many of them only.

References:
  Angelopoulos et al. 2021, Learn then Test (arXiv 2110.01052): fixed-sequence testing.
  Laufer-Goldshtein et al. 2023, Efficiently Controlling Multiple Risks with Pareto Testing
    (arXiv 2210.07913): the order along a frontier that other data has shown.
  Waudby-Smith and Ramdas 2024, Estimating means of bounded random variables by betting
    (arXiv 2010.09686): the exact bound, and the size of the bet.
  Schuster et al. 2022, Confident Adaptive Language Modeling (arXiv 2207.07061): promises of this
    kind for early exit.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from scipy import stats

from deevisum_jax.errors import UserError, closest
from deevisum_jax.inference.exit_policy import ExitPolicy, confidence
from deevisum_jax.inference.speed import Speed
from deevisum_jax.typing import CONFIDENCES, SegmentScores

# Metric -> its reach: a video's loss lies in [-reach, reach].
METRICS: Mapping[str, float] = {"f1": 1.0, "tau": 2.0}
BOUNDS = ("exact", "normal")

# How much of its wealth a bet may risk: less than all, so that no single video ends the game.
_MAX_BET = 0.95
_MIN_NORMAL = 100  # test videos, below which a mean of skewed losses is not near enough to normal
_MIN_SEARCH = 2  # videos; of one there is no spread
_MAX_EVALUATIONS = 60_000  # of one video under one policy in the search; about 1 ms each
_POLICIES = (16, 256)  # per confidence, the fewest and the most that the search tries
_LEVELS = (4, 20)  # per exit, the fewest and the most thresholds, "all leave" and "none" included


@dataclasses.dataclass(frozen=True, kw_only=True)
class Promise:
    """The most that early exit may lose on average, and how sure that has to be.

    Raises:
      UserError: an unknown metric or bound, no metric, or a number out of range.
    """

    epsilons: Mapping[str, float]  # metric -> the most that may be lost on average
    delta: float  # probability, over calibrations, that the promise is broken
    bound: str = "exact"  # of BOUNDS

    def __post_init__(self) -> None:
        if not self.epsilons:
            raise UserError(f"a promise names what may be lost: of {', '.join(METRICS)}, or both")
        for metric, epsilon in self.epsilons.items():
            if metric not in METRICS:
                raise UserError(
                    f"nothing can be promised of the metric {metric!r}; {closest(metric, METRICS)}"
                )
            if not 0 < epsilon < METRICS[metric]:
                raise UserError(
                    f"the loss of {metric} that is allowed (epsilon) must be above 0 and below "
                    f"{METRICS[metric]:g}, the most that can be lost; got {epsilon}"
                )
        if not 0 < self.delta < 1:
            raise UserError(
                "the probability that a promise is broken (delta) must be between 0 and 1, such as "
                f"0.1; got {self.delta}"
            )
        if self.bound not in BOUNDS:
            raise UserError(f"there is no bound {self.bound!r}; {closest(str(self.bound), BOUNDS)}")

    @property
    def text(self) -> str:
        """What is promised, as "at most 0.5 points of F1 and 0.01 of tau"."""
        parts = {
            "f1": lambda epsilon: f"{100 * epsilon:g} points of F1",
            "tau": lambda epsilon: f"{epsilon:g} of tau",
        }
        return "at most " + " and ".join(parts[m](e) for m, e in sorted(self.epsilons.items()))

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return {"epsilons": dict(self.epsilons), "delta": self.delta, "bound": self.bound}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Promise:
        """Of `to_json`.

        Raises:
          UserError: as the class.
          KeyError: a field is missing.
        """
        return cls(epsilons=dict(found["epsilons"]), delta=found["delta"], bound=found["bound"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """A policy on the curve: what it costs and what it saves, on the test part."""

    policy: ExitPolicy
    metrics: Mapping[str, float]  # of METRICS -> mean over videos
    losses: Mapping[str, float]  # of METRICS -> mean over videos of full model less policy
    p_value: float | None  # of "breaks the promise"; None = the sequence had ended before
    passed: bool
    avg_depth: float  # layers per segment
    flops_saved: float  # share of the full model's, in [0, 1]
    exit_rate: tuple[float, ...]  # share of the segments that leave at each exit

    def to_json(self) -> dict[str, Any]:
        """For files."""
        return {
            **dataclasses.asdict(self),
            "policy": self.policy.to_json(),
            "exit_rate": list(self.exit_rate),
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Point:
        """Of `to_json`.

        Raises:
          UserError: as `ExitPolicy`.
          KeyError: a field is missing.
        """
        own = {field.name: found[field.name] for field in dataclasses.fields(cls)}
        own["policy"] = ExitPolicy.from_json(own["policy"])
        own["exit_rate"] = tuple(own["exit_rate"])
        return cls(**own)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """The chosen policy, what is promised of it, and the curve that it was chosen from."""

    promise: Promise
    num_search: int  # videos
    num_test: int  # videos
    curve: tuple[Point, ...]  # dearest first; the first is off
    chosen: int  # row of the curve
    # Where nothing that saves was shown: how many test videos would probably show something, by the
    # losses on this test part, and the row that takes the fewest. None = no number is likely to.
    videos_needed: tuple[int, int] | None = None
    videos: str = ""  # where they are from
    protocol: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # of the metrics
    speed: Speed | None = None  # of every point, once it was measured

    @property
    def policy(self) -> ExitPolicy:
        """The chosen one."""
        return self.curve[self.chosen].policy

    @property
    def time_saved(self) -> float | None:
        """Share of the time that the chosen policy saves; None where it was not measured."""
        return None if self.speed is None else self.speed.saved[self.chosen].median

    @property
    def _of_videos(self) -> str:
        return f" ({self.videos})" if self.videos else ""

    @property
    def text(self) -> str:
        """What is promised, of which videos and how surely, for a person."""
        sure = f"{100 * (1 - self.promise.delta):g} % confidence"
        kind = {
            "exact": "The bound is exact: it holds for any distribution of losses.",
            "normal": (
                "The bound is the normal approximation: it holds approximately, for many videos."
            ),
        }[self.promise.bound]
        if self.chosen:
            return (
                f"Early exit loses {self.promise.text} on average, with {sure}, for videos drawn "
                f"like the {self.num_test} it was tested on{self._of_videos}; there it saved "
                f"{100 * self.curve[self.chosen].flops_saved:.0f} % of the FLOPs. {kind}"
            )
        text = (
            f"Early exit is off: {self.num_test} test videos{self._of_videos} did not show of any "
            f"policy that saves time that it loses {self.promise.text} on average, with {sure}. "
            f"{kind}"
        )
        if len(self.curve) == 1:
            return f"{text} With the confidences that were searched no policy lets a segment leave."
        if self.videos_needed is None:
            return f"{text} More videos are not likely to show it: allow a larger loss."
        videos, row = self.videos_needed
        return (
            f"{text} By the spread of their losses about {videos} test videos would show it of a "
            f"policy that saves {100 * self.curve[row].flops_saved:.0f} % of the FLOPs."
        )

    def to_json(self) -> dict[str, Any]:
        """For files; `policy` and `text` are there to be read."""
        return {
            "policy": self.policy.to_json(),
            "promise": self.promise.to_json(),
            "num_search": self.num_search,
            "num_test": self.num_test,
            "curve": [point.to_json() for point in self.curve],
            "chosen": self.chosen,
            "videos_needed": None if self.videos_needed is None else list(self.videos_needed),
            "videos": self.videos,
            "protocol": dict(self.protocol),
            "speed": None if self.speed is None else dataclasses.asdict(self.speed),
            "text": self.text,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Calibration:
        """Of `to_json`.

        Raises:
          UserError: as `Promise` and `ExitPolicy`.
          KeyError: a field is missing.
        """
        needed, speed = found["videos_needed"], found["speed"]
        if not 0 <= found["chosen"] < len(found["curve"]):
            raise UserError(f"row {found['chosen']} is chosen of {len(found['curve'])}")
        return cls(
            promise=Promise.from_json(found["promise"]),
            num_search=found["num_search"],
            num_test=found["num_test"],
            curve=tuple(Point.from_json(point) for point in found["curve"]),
            chosen=found["chosen"],
            videos_needed=None if needed is None else tuple(needed),
            videos=found["videos"],
            protocol=found["protocol"],
            speed=None if speed is None else Speed.from_json(speed),
        )


def p_value(losses: np.ndarray, epsilon: float, *, reach: float, bet: float) -> float:
    """The exact p-value of "the mean loss is above epsilon": 1 / what betting against it wins.

    By hand: with epsilon 0.1, a reach of 1 and a bet of 0.9 a video that loses nothing multiplies
    the wealth by 1 + 0.9 * 0.1 / 0.9 = 1.1, one that loses all by 1 - 0.9 = 0.1.

    Args:
      losses: float[n], one per video, at most `reach` each.
      epsilon: what may be lost on average.
      reach: the most that a video can lose.
      bet: share of the wealth that a video which loses all takes, in [0, 1); chosen without a look
        at these losses.
    """
    assert 0 <= bet < 1, bet
    assert np.max(losses) <= reach + 1e-9, (np.max(losses), reach)
    won = np.log1p(bet * (epsilon - np.asarray(losses, np.float64)) / (reach - epsilon))
    return math.exp(min(0.0, -math.fsum(won)))  # fsum: the same in any order


def best_bet(
    losses: np.ndarray, epsilon: float, *, reach: float, delta: float, num_test: int
) -> float:
    """The bet that most probably wins 1 / delta in `num_test` videos.

    Wealth's logarithm is about normal. The bet that makes it most probably reach `ln(1 / delta)`
    depends on the spread of the losses and not on their mean (the same paper's sections on the
    predictable plug-in, and for a fixed number of videos), which suits a search part of some
    dozens: it tells the spread well and the mean badly. It is never more than 0.95.

    Args:
      losses: float[k], of the search part.
      epsilon: what may be lost on average.
      reach: the most that a video can lose.
      delta: the p-value that is to be reached.
      num_test: n, videos that will be bet on.
    """
    spread = float(np.std(losses, ddof=1))
    stake = (reach - epsilon) * math.sqrt(2 * math.log(1 / delta) / num_test)
    return _MAX_BET if stake >= _MAX_BET * spread else stake / spread


def normal_p_value(losses: np.ndarray, epsilon: float) -> float:
    """The p-value of the one-sided t test of "the mean loss is above epsilon".

    Right for many videos only. Where all lose the same it is 0 or 1.

    Args:
      losses: float[n], one per video, at least two.
      epsilon: what may be lost on average.
    """
    n, room = len(losses), epsilon - math.fsum(losses) / len(losses)
    spread = float(np.std(np.sort(losses), ddof=1))  # sorted: the same in any order
    if spread == 0:
        return float(room < 0)
    return float(stats.t.sf(room / spread * math.sqrt(n), n - 1))


def least_videos(promise: Promise) -> int:
    """Test videos below which a promise cannot be shown, even if nothing is lost on any.

    By hand: if 0.1 of F1 may be lost, a video that loses nothing multiplies the wealth by
    1 + 0.95 * 0.1 / 0.9 = 1.1056, and ln(10) / ln(1.1056) = 22.9: with delta = 0.1 it takes 23.
    """
    if promise.bound == "normal":
        return _MIN_NORMAL
    wins = (
        math.log1p(_MAX_BET * epsilon / (METRICS[metric] - epsilon))
        for metric, epsilon in promise.epsilons.items()
    )
    return math.ceil(math.log(1 / promise.delta) / min(wins))


def check_videos(num_videos: int, promise: Promise, search_share: float) -> tuple[int, int]:
    """How many videos are searched on, and tested on; needs no score.

    Raises:
      UserError: too few are left for the promise; says how many it takes.
    """
    num_search = _num_search(num_videos, search_share)
    num_test, least = num_videos - num_search, least_videos(promise)
    if num_test < least:
        raise UserError(
            f"{max(num_test, 0)} of {num_videos} calibration videos are left for the test, too "
            f"few to promise {promise.text} with {100 * (1 - promise.delta):g} % confidence by "
            f"the {promise.bound} bound: even if nothing were lost it takes {least}, "
            f"{_total(least, search_share)} in all with a search share of {search_share:g}. Give "
            "more videos"
            + (
                f', allow more loss (a larger epsilon or delta), or take the bound "normal", which '
                f"takes at least {_MIN_NORMAL}" * (promise.bound == "exact")
            )
        )
    return num_search, num_test


def calibrate(
    scores: Sequence[SegmentScores],
    evaluate: Callable[[int, np.ndarray], Mapping[str, float]],
    *,
    exit_layers: Sequence[int],
    flops: Sequence[float],
    promise: Promise,
    confidences: Sequence[str] = tuple(CONFIDENCES),
    search_share: float = 0.25,
    max_points: int = 16,
    seed: int,
) -> Calibration:
    """Chooses the exit policy that saves the most of those that are shown to keep the promise.

    Args:
      scores: of every video at every exit, float[X, M] of its M segments.
      evaluate: the METRICS of video v, from float[M] importances; the same every time.
      exit_layers: int[X], layers run by a segment that leaves at each exit.
      flops: float[X], FLOPs of a segment that leaves at each exit, image encoder included.
      promise: what may be lost.
      confidences: of `typing.CONFIDENCES`, those to choose from.
      search_share: share of the videos that the policies are searched on.
      max_points: the most points on the curve.
      seed: of the split, and of the policies tried if there are too many.

    Raises:
      UserError: too few videos for the promise, a model with a single exit, scores that are not
        finite, an unknown confidence, or a share outside (0, 1).
    """
    X = len(exit_layers)
    assert len(flops) == X
    assert max_points > 1
    _check(scores, exit_layers, confidences, search_share)
    num_search, num_test = check_videos(len(scores), promise, search_share)
    rng = np.random.default_rng(seed)
    videos = rng.permutation(len(scores))
    saved_at = 1 - np.asarray(flops, np.float64) / flops[-1]
    search = _Part(scores, videos[:num_search], evaluate)
    test = _Part(scores, videos[num_search:], evaluate)

    curve: list[Point] = []
    samples: list[np.ndarray] = []  # of each point: losses on the test part
    chosen, going = 0, True
    for policy in _frontier(search, promise, confidences, saved_at, max_points, rng):
        losses, exit_rate = test.run(policy)
        p = None
        if policy.is_off:
            p = 0.0  # it is the full model
        elif going:
            of_search = search.run(policy)[0]
            p = max(
                _p_value(promise, metric, losses[:, k], of_search[:, k])
                for k, metric in enumerate(METRICS)
                if metric in promise.epsilons
            )
        passed = p is not None and p <= promise.delta
        going = passed
        if passed:
            chosen = len(curve)
        curve.append(
            Point(
                policy=policy,
                metrics=_named((test.full - losses).mean(axis=0)),
                losses=_named(losses.mean(axis=0)),
                p_value=p,
                passed=passed,
                avg_depth=float(exit_rate @ np.asarray(exit_layers, np.float64)),
                flops_saved=float(exit_rate @ saved_at),
                exit_rate=tuple(map(float, exit_rate)),
            )
        )
        samples.append(losses)
    return Calibration(
        promise=promise,
        num_search=num_search,
        num_test=num_test,
        curve=tuple(curve),
        chosen=chosen,
        videos_needed=None if chosen else _videos_needed(promise, samples, num_test),
    )


def _check(
    scores: Sequence[SegmentScores],
    exit_layers: Sequence[int],
    confidences: Sequence[str],
    search_share: float,
) -> None:
    if len(exit_layers) == 1:
        raise UserError(
            f"the model's only exit is layer {exit_layers[0]}, its last, so there is nothing to "
            "calibrate; train one with more exit_layers"
        )
    if not confidences:
        raise UserError(f"name a confidence to calibrate: of {', '.join(CONFIDENCES)}")
    for kind in confidences:
        if kind not in CONFIDENCES:
            raise UserError(f"exit confidence {kind!r}; {closest(str(kind), CONFIDENCES)}")
    if not 0 < search_share < 1:
        raise UserError(
            f"the share of the videos that is searched on must be between 0 and 1; got "
            f"{search_share}"
        )
    for v, of_video in enumerate(scores):
        assert len(of_video.importance) == len(exit_layers)
        for x, layer in enumerate(exit_layers):
            row = of_video.at(x)
            if not all(np.isfinite(a).all() for a in jax.tree.leaves(row)):
                raise UserError(
                    f"scores of calibration video {v} at the exit after layer {layer} are not "
                    "finite; look for the cause in the model's weights before calibrating it"
                )


def _num_search(num_videos: int, share: float) -> int:
    return max(_MIN_SEARCH, math.ceil(share * num_videos))


def _total(num_test: int, share: float) -> int:
    """The least number of videos of which `num_test` are left for the test."""
    found = max(num_test + _MIN_SEARCH, int(num_test / (1 - share)) - 1)
    while found - _num_search(found, share) < num_test:
        found += 1
    return found


def _named(row: np.ndarray) -> dict[str, float]:
    return dict(zip(METRICS, map(float, row), strict=True))


class _Part:
    """Some of the videos, and what policies do to them."""

    def __init__(
        self,
        scores: Sequence[SegmentScores],
        videos: np.ndarray,
        evaluate: Callable[[int, np.ndarray], Mapping[str, float]],
    ):
        of_videos = [jax.tree.map(np.asarray, scores[v]) for v in videos]
        # Of all segments, behind each other.
        self.scores = jax.tree.map(lambda *rows: np.concatenate(rows, axis=1), *of_videos)
        self._videos, self._evaluate = videos, evaluate
        self._borders = np.cumsum([one.importance.shape[1] for one in of_videos])[:-1]
        # Many policies do the same to a video: (video, exits of its segments) -> metrics.
        self._known: dict[tuple[int, bytes], np.ndarray] = {}
        num_segments = self.scores.importance.shape[1]
        self.full = self._metrics(np.full(num_segments, self.num_exits - 1))  # float64[n, K]

    @property
    def num_exits(self) -> int:
        return len(self.scores.importance)

    def _metrics(self, exits: np.ndarray) -> np.ndarray:
        """float64[n, K] of the METRICS, from every segment's exit."""
        importance = self.scores.importance[exits, np.arange(len(exits))]
        found = []
        for i, (of_video, exits_of_video) in enumerate(
            zip(np.split(importance, self._borders), np.split(exits, self._borders), strict=True)
        ):
            key = i, exits_of_video.tobytes()
            if key not in self._known:
                metrics = self._evaluate(int(self._videos[i]), of_video)
                self._known[key] = np.array([metrics[metric] for metric in METRICS], np.float64)
            found.append(self._known[key])
        return np.array(found)

    def run(self, policy: ExitPolicy) -> tuple[np.ndarray, np.ndarray]:
        """Losses float64[n, K] per video and metric, and the share of segments at each exit."""
        exits = policy.exit_index(self.scores)
        exit_rate = np.bincount(exits, minlength=self.num_exits) / len(exits)
        return self.full - self._metrics(exits), exit_rate


def _frontier(
    part: _Part,
    promise: Promise,
    confidences: Sequence[str],
    saved_at: np.ndarray,
    max_points: int,
    rng: np.random.Generator,
) -> list[ExitPolicy]:
    """Policies that nothing beats on the search part, off first, then from dear to cheap.

    Each saves more than the one before and seems riskier. So one that looks bad does not stand
    before one that saves more and looks better, and those that seem to break the promise come last.
    Risk is the loss in units of what may be lost, by the worst metric, plus a standard error: a few
    videos know little of the mean, and of two equal means the one of less spread is shown sooner.
    """
    asked = [k for k, metric in enumerate(METRICS) if metric in promise.epsilons]
    epsilons = np.array(
        [promise.epsilons[metric] for metric in METRICS if metric in promise.epsilons]
    )
    tried = []
    for policy in _policies(part, confidences, rng):
        losses, exit_rate = part.run(policy)
        error = losses.std(axis=0, ddof=1) / math.sqrt(len(losses))
        risk = float(np.max((losses.mean(axis=0) + error)[asked] / epsilons))
        tried.append((float(exit_rate @ saved_at), risk, policy))
    best: list[tuple[float, ExitPolicy]] = []  # cheapest first
    least = math.inf
    for saved, risk, policy in sorted(tried, key=lambda one: (-one[0], one[1])):
        if saved > 0 and risk < least:
            best.append((saved, policy))
            least = risk
    best.reverse()
    if len(best) >= max_points:  # evenly over what they save
        saved = np.array([one[0] for one in best])
        wanted = np.linspace(saved[0], saved[-1], max_points - 1)
        best = [best[i] for i in np.unique(np.abs(saved - wanted[:, None]).argmin(axis=1))]
    return [ExitPolicy.off(part.num_exits), *(policy for _, policy in best)]


def _policies(
    part: _Part, confidences: Sequence[str], rng: np.random.Generator
) -> list[ExitPolicy]:
    """Policies to try: quantiles of each exit's confidence as thresholds, in all combinations.

    "All leave" and "none leaves" are among the thresholds of every exit. Where the combinations are
    too many, some are drawn.
    """
    # Entropy orders segments as max_probability does.
    twice = "max_probability" in confidences
    kinds = [k for k in dict.fromkeys(confidences) if not (twice and k == "entropy")]
    exits = part.num_exits - 1
    limit = int(np.clip(_MAX_EVALUATIONS // (len(part.full) * len(kinds)), *_POLICIES))
    levels = max(
        (n for n in range(_LEVELS[0], _LEVELS[1] + 1) if n**exits <= limit), default=_LEVELS[0]
    )
    policies = []
    for kind in kinds:
        thresholds = [_thresholds(part.scores, kind, x, levels) for x in range(exits)]
        sizes = [len(of_exit) for of_exit in thresholds]
        if math.prod(sizes) > limit:
            drawn = np.unique(rng.integers(sizes, size=(limit, exits)), axis=0)
            chosen = [tuple(map(list.__getitem__, thresholds, row)) for row in drawn.tolist()]
        else:
            chosen = list(itertools.product(*thresholds))
        policies += [ExitPolicy(confidence=kind, thresholds=row) for row in chosen]
    return policies


def _thresholds(scores: SegmentScores, kind: str, exit_: int, levels: int) -> list[float]:
    """Ascending; at the first all segments leave, at the last, infinity, none does."""
    found = np.asarray(confidence(kind, scores.at(exit_), scores.at(exit_ - 1) if exit_ else None))
    low, high = CONFIDENCES[kind]
    if found.max() < low:  # this exit can say nothing
        return [math.inf]
    inner = np.quantile(found, np.arange(1, levels - 1) / (levels - 1))
    return [*map(float, np.unique([low, *np.clip(inner, low, high)])), math.inf]


def _p_value(promise: Promise, metric: str, losses: np.ndarray, of_search: np.ndarray) -> float:
    epsilon, reach = promise.epsilons[metric], METRICS[metric]
    if promise.bound == "normal":
        return normal_p_value(losses, epsilon)
    bet = best_bet(of_search, epsilon, reach=reach, delta=promise.delta, num_test=len(losses))
    return p_value(losses, epsilon, reach=reach, bet=bet)


def _videos_needed(
    promise: Promise, samples: Sequence[np.ndarray], num_test: int
) -> tuple[int, int] | None:
    """About how many test videos would show a point, and which point takes the fewest.

    Args:
      promise: that was not shown.
      samples: float[n, K], losses of each point of the curve, off first.
      num_test: n.
    """
    needed = []
    for row, losses in enumerate(samples[1:], start=1):
        per_metric = [
            _videos_for(promise, metric, losses[:, k])
            for k, metric in enumerate(METRICS)
            if metric in promise.epsilons
        ]
        needed.append((max(per_metric), row))
    fewest, row = min(needed, default=(math.inf, 0))
    if fewest == math.inf:
        return None
    # With these it was not shown, whatever they say of themselves. Two digits: it is an estimate.
    fewest = max(fewest, num_test + 1)
    digits = 10 ** max(0, int(math.log10(fewest)) - 1)
    return math.ceil(fewest / digits) * digits, row


def _videos_for(promise: Promise, metric: str, losses: np.ndarray) -> float:
    """Test videos after which losses like these reach delta, every other time."""
    epsilon, reach = promise.epsilons[metric], METRICS[metric]
    if promise.bound == "normal":
        room = epsilon - float(losses.mean())
        if room <= 0:
            return math.inf
        return (float(stats.norm.isf(promise.delta) * losses.std(ddof=1)) / room) ** 2
    bets = np.linspace(0.01, 1, 100)[:, None] * _MAX_BET
    growth = np.log1p(bets * (epsilon - losses) / (reach - epsilon)).mean(axis=1).max()
    return math.log(1 / promise.delta) / growth if growth > 0 else math.inf
