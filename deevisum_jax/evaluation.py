"""The student held against people: every exit, early exit, baselines, inputs left out."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import PIL.Image

from deevisum_jax.config import Config, EvalConfig
from deevisum_jax.data.pipeline import Record
from deevisum_jax.errors import UserError
from deevisum_jax.inference import calibration, exit_policy, scoring
from deevisum_jax.inference.calibration import Calibration
from deevisum_jax.inference.cost import exit_flops
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.models.paligemma2 import PaliGemma2Config
from deevisum_jax.summary import kts, protocols, select
from deevisum_jax.summary import shots as shots_lib
from deevisum_jax.summary.protocols import Protocol, Result, VideoGroundTruth
from deevisum_jax.summary.report import RunReport, thousandths
from deevisum_jax.typing import SegmentScores

_NOT_CALIBRATED = (
    "The thresholds of early exit are those of the config: what they cost was not promised, nor "
    "their time measured (--mode calibrate does both)."
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """The scores of a split's videos, in the order of its records."""

    bounds: list[np.ndarray]  # float[M, 2] per video, seconds
    scores: list[SegmentScores]


def deepest(scores: SegmentScores) -> np.ndarray:
    """`float[M]` importance at the last exit, the full model's."""
    return scores.importance[-1]


def protocol_of(config: EvalConfig) -> Protocol:
    """The protocol that a config names."""
    return Protocol(
        f1=config.f1, correlation=config.correlation, shots=config.shots, budget=config.budget
    )


def ground_truths(
    records: Iterable[Record], protocol: Protocol = protocols.TVSUM
) -> list[VideoGroundTruth]:
    """What people said of every record's video.

    Raises:
      UserError: as `ground_truth`.
    """
    return [ground_truth(record, protocol) for record in records]


def ground_truth(record: Record, protocol: Protocol = protocols.TVSUM) -> VideoGroundTruth:
    """What people said of a record's video.

    With shots by our KTS or another budget the annotators' summaries are made anew of these, too,
    where they follow from their scores (TVSum), of which a record has those of the annotated
    points. What people chose themselves stays as it is (SumMe).

    Args:
      record: with annotations; for shots of ours also with features or frames.
      protocol: says whose shots, and what part of the video a summary may fill.

    Raises:
      UserError: shots of ours are wanted, and the record has nothing to find them in; summaries
        are made anew, and scores, points and shots do not fit each other.
    """
    truth = VideoGroundTruth(
        video_id=record["video_id"],
        n_frames=int(record["n_frames"]),
        native_fps=float(record["native_fps"]),
        duration_s=float(record["duration_s"]),
        score_times=np.asarray(record["score_times"]),
        user_scores=np.asarray(record["user_scores"]),
        user_summary=np.asarray(record["user_summary"]).astype(bool),
        shots=np.asarray(record["change_points"]),
    )
    if protocol.as_stored:
        return truth
    if protocol.shots == "kts":
        truth = dataclasses.replace(truth, shots=_shots_by_kts(record))
    chosen = np.array_equal(truth.user_scores, truth.user_summary)
    if chosen or not truth.user_scores.size:
        return truth
    summaries = select.annotator_summaries(
        protocols.hold_points(truth, truth.user_scores),
        truth.shots,
        truth.n_frames,
        protocol.budget,
    )
    return dataclasses.replace(truth, user_summary=np.asarray(summaries, bool))


def _shots_by_kts(record: Record) -> np.ndarray:
    """int64[S, 2]: by the community's settings on the record's features, else on its frames."""
    n_frames = int(record["n_frames"])
    if len(record.get("features", ())):
        features, picks = np.asarray(record["features"]), np.asarray(record["picks"])
        changes = kts.change_points(
            features,
            max_change_points=len(features) - 1,
            descriptor_rate=float(np.median(np.diff(picks))) if len(picks) > 1 else 1.0,
        )
        borders = np.concatenate([[0], picks[changes], [n_frames]])
        return np.stack([borders[:-1], borders[1:]], 1).astype(np.int64)
    if not len(record["frames"]):
        raise UserError(
            f"{record['video_id']} has neither features nor frames to find shots in; set "
            "eval.shots='data_set'"
        )
    found = shots_lib.shots_of(
        # One picture at a time: decoded, an hour of them takes gigabytes.
        np.stack([_descriptor(frame) for frame in record["frames"]]),
        np.asarray(record["frame_times"], np.float64),
        native_times=np.arange(n_frames) / record["native_fps"],
        change=np.zeros(n_frames),  # not stored: borders stay on the sampled frames
        max_shot_s=None,
        duration_s=record["duration_s"],
    )
    return select.shot_bounds(found)


def _descriptor(frame: np.ndarray | bytes) -> np.ndarray:
    """float32[264]: what a stored picture looks like, for shots."""
    if isinstance(frame, bytes):
        with PIL.Image.open(io.BytesIO(frame)) as picture:
            frame = np.asarray(picture.convert("RGB"))
    return shots_lib.frame_descriptors(frame[None])[0]


def evaluate(
    truths: Sequence[VideoGroundTruth],
    prediction: Prediction,
    choose: Callable[[SegmentScores], np.ndarray],
    config: Config,
) -> Result:
    """F1, tau and rho of one way to read a prediction.

    Args:
      truths: the videos' annotations.
      prediction: their scores.
      choose: picks `float[M]` of a video's `SegmentScores`.
      config: names the protocol.
    """
    protocol = protocol_of(config.eval)
    results = [
        protocols.evaluate_video(truth, bounds, choose(scores), protocol)
        for truth, bounds, scores in zip(truths, prediction.bounds, prediction.scores, strict=True)
    ]
    return protocols.summarize_results(results, protocol)


def of_videos(
    truths: Sequence[VideoGroundTruth],
    prediction: Prediction,
    choose: Callable[[SegmentScores], np.ndarray],
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Bounds and chosen scores by video id, as `predictions.write_npz` takes them."""
    return {
        truth.video_id: (bounds, choose(scores))
        for truth, bounds, scores in zip(truths, prediction.bounds, prediction.scores, strict=True)
    }


def evaluate_exits(
    truths: Sequence[VideoGroundTruth],
    prediction: Prediction,
    config: Config,
    model: PaliGemma2Config,
    policy: ExitPolicy,
) -> dict[str, Result]:
    """A row per exit, `exit_2` to the deepest, and `early_exit`, each segment at its own exit."""
    rows = {
        f"exit_{layer}": evaluate(truths, prediction, lambda s, x=x: s.importance[x], config)
        for x, layer in enumerate(model.exit_layers)
    }
    leave = lambda s: scoring.at_exit(s, policy).importance
    return rows | {"early_exit": evaluate(truths, prediction, leave, config)}


def early_exit_cost(
    prediction: Prediction, config: Config, model: PaliGemma2Config, policy: ExitPolicy
) -> dict[str, Any]:
    """Mean depth of the exits taken, the share of FLOPs they save, and how many leave where."""
    taken = np.concatenate([policy.exit_index(scores) for scores in prediction.scores])
    layers, flops = np.asarray(model.exit_layers), exit_flops(model, config.data)
    shares = np.bincount(taken, minlength=len(layers)) / len(taken)
    return {
        "exit_policy": policy.to_json(),
        "avg_depth": float(layers[taken].mean()),
        "compute_saved": float(1 - (shares @ flops) / flops[-1]),
        "exit_rate": {
            str(layer): float(share) for layer, share in zip(layers, shares, strict=True)
        },
    }


def calibration_promise(config: Config) -> calibration.Promise:
    """What a config allows early exit to cost.

    Raises:
      UserError: as `Promise`.
    """
    settings = config.calibration
    asked = {metric: getattr(settings, metric) for metric in calibration.METRICS}
    return calibration.Promise(
        epsilons={metric: most for metric, most in asked.items() if most is not None},
        delta=settings.delta,
        bound=settings.bound,
    )


def calibrate(
    truths: Sequence[VideoGroundTruth],
    prediction: Prediction,
    config: Config,
    model: PaliGemma2Config,
) -> Calibration:
    """Chooses when segments leave, so that what is lost stays within the config's promise.

    Args:
      truths: the annotations of the videos that it is tried on.
      prediction: their scores.
      config: has the promise and the protocol.
      model: has the exits.

    Raises:
      UserError: as `calibration.calibrate`.
    """
    settings, protocol = config.calibration, protocol_of(config.eval)

    def measure(video: int, importance: np.ndarray) -> dict[str, float]:
        bounds = prediction.bounds[video]
        result = protocols.evaluate_video(truths[video], bounds, importance, protocol)
        return {metric: getattr(result, metric) for metric in calibration.METRICS}

    data, split = config.calibrated_on
    found = calibration.calibrate(
        prediction.scores,
        measure,
        exit_layers=model.exit_layers,
        flops=exit_flops(model, config.data),
        promise=calibration_promise(config),
        confidences=settings.confidences,
        search_share=settings.search_share,
        seed=config.seed,
    )
    return dataclasses.replace(
        found,
        videos=f"{data.dataset}, split {split}",
        protocol=dataclasses.asdict(protocol),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """All that is known of one student on one split."""

    exit_layers: tuple[int, ...]
    models: Mapping[str, Result]  # of `evaluate_exits`
    baselines: Mapping[str, Result]  # of `protocols.baseline_rows`
    left_out: Mapping[str, Result]  # without one input, by input
    cost: Mapping[str, Any]  # of `early_exit_cost`
    calibration: Calibration | None = None  # where the thresholds of `early_exit` are from
    notes: Sequence[str] = ()  # what a reader of the numbers should know

    @property
    def headline(self) -> str:
        """Row of the deepest exit, the full model's."""
        return f"exit_{self.exit_layers[-1]}"


def report_json(found: Evaluation, *, steps: int) -> dict[str, Any]:
    """The content of report.json; `steps` are the updates that the parameters have seen."""
    model, early = found.models[found.headline], found.models["early_exit"]
    numbers = lambda result: {name: getattr(result, name) for name in ("tau", "rho", "f1")}
    return {
        **numbers(model),
        "f1_early_exit": early.f1,
        "tau_early_exit": early.tau,
        **found.cost,
        # Here all exits are read off one full pass. Calibrating has run the model in stages, on its
        # own videos: what it saved there of FLOPs is in its curve.
        "wall_saved": found.calibration and found.calibration.time_saved,
        "calibration": found.calibration and found.calibration.to_json(),
        "steps": steps,
        "protocols": dict(model.protocols),
        "notes": list(found.notes),
        "rows": {
            name: numbers(result) for name, result in {**found.models, **found.baselines}.items()
        },
        "row_protocols": {name: row.protocols["row"] for name, row in found.baselines.items()},
        "left_out": {name: numbers(result) for name, result in found.left_out.items()},
        "per_video": {result.video_id: numbers(result) for result in model.per_video},
    }


def report_page(
    found: Evaluation, *, config: Config, history: Sequence[Mapping[str, float]]
) -> RunReport:
    """The content of report.html; `history` are the logged lines of metrics.jsonl."""
    full = found.models[found.headline]
    losses = {
        name: zip(*((line["step"], line[name]) for line in history if name in line), strict=True)
        for name in ("loss/total", "validation/tau")
    }
    return RunReport(
        title=f"{config.model.variant} on {config.data.dataset}",
        models={found.headline: full, **found.models},  # the headline comes first
        baselines=found.baselines,
        exits=[
            {
                "layer": layer,
                "tau": found.models[f"exit_{layer}"].tau,
                "rho": found.models[f"exit_{layer}"].rho,
                "F1": found.models[f"exit_{layer}"].f1,
                "share that leaves here": found.cost["exit_rate"][str(layer)],
            }
            for layer in found.exit_layers
        ],
        ablation=[
            {"left out": name, "tau": row.tau, "rho": row.rho, "F1": row.f1}
            for name, row in {"nothing": full, **found.left_out}.items()
        ],
        losses={name: tuple(map(list, curve)) for name, curve in losses.items()},
        config=dataclasses.asdict(config),
        facts={
            "layers up to the exits taken": (
                f"{found.cost['avg_depth']:.2f} of {found.exit_layers[-1]} on average"
            ),
            "FLOPs that leaving there saves": f"{100 * found.cost['compute_saved']:.1f} %",
            "leaving early": exit_policy.describe(
                ExitPolicy.from_json(found.cost["exit_policy"]), found.exit_layers
            ),
        },
        tradeoff=found.calibration and _tradeoff(found.calibration, found.exit_layers[-1]),
        notes=[
            *found.notes,
            "Every row reads the same trained parameters: what is left out is withheld at "
            "evaluation, not in training.",
            *([] if found.calibration else [_NOT_CALIBRATED]),
        ],
    )


def _tradeoff(found: Calibration, num_layers: int) -> dict[str, Any]:
    """The curve of a calibration, as `RunReport.tradeoff` takes it."""
    times = found.speed.saved if found.speed else [None] * len(found.curve)
    return {
        "points": [
            {
                **point.policy.to_json(),
                **{metric: point.metrics[metric] for metric in calibration.METRICS},
                **{f"{metric}_loss": point.losses[metric] for metric in calibration.METRICS},
                "avg_depth": point.avg_depth,
                "flops_saved": point.flops_saved,
                "time_saved": time and dataclasses.asdict(time),
                "p_value": point.p_value,
                "passed": point.passed,
                "chosen": row == found.chosen,
            }
            for row, (point, time) in enumerate(zip(found.curve, times, strict=True))
        ],
        "num_layers": num_layers,
        "epsilons": dict(found.promise.epsilons),
        "promise": found.text,
        "num_videos": found.num_test,
        "machine": found.speed.machine if found.speed else "",
    }


def table(report: Mapping[str, Any]) -> str:
    """The rows of a report for a terminal; rank correlation is the headline, F1 stands beside."""
    lines = [f"{'row':<20}{'tau':>8}{'rho':>8}{'F1':>8}"]
    left_out = {f"without {name}": row for name, row in report["left_out"].items()}
    for name, row in {**report["rows"], **left_out}.items():
        tau, rho = thousandths(row["tau"]), thousandths(row["rho"])
        lines.append(f"{name:<20}{tau:>8}{rho:>8}{100 * row['f1']:>8.1f}")
    lines.append(
        f"early exit: {report['avg_depth']:.2f} layers on average, which saves "
        f"{100 * report['compute_saved']:.0f} % of the FLOPs"
    )
    if report["calibration"]:
        lines.append(report["calibration"]["text"])
    lines += report["notes"]
    return "\n".join(lines)
