"""HTML pages: for a summarized video, for many of them, a training run, evaluated predictions.

No script and no font is fetched, charts are inline SVG. All pages but that of many videos are
self-contained, thumbnails embedded; only the film beside a video's report is linked, by a relative
path. The page of many videos links theirs, and shows their stills from where they are.
"""

from __future__ import annotations

import base64
import colorsys
import dataclasses
import io
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from deevisum_jax.errors import UserError
from deevisum_jax.files import in_bucket, write_whole
from deevisum_jax.summary.protocols import Result, cautions

_THUMBNAIL_W = 400  # pixels
_CURVE_POINTS = 600  # a chart shows no more; more are averaged in equal groups
_PEOPLE = ("human", "oracle")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunReport:
    """What a training run has to show."""

    title: str
    models: Mapping[str, Result]  # name of the row -> its result
    baselines: Mapping[str, Result]  # as `protocols.baseline_rows` gives them
    exits: Sequence[Mapping[str, Any]] = ()  # one row per exit, the same columns in each
    ablation: Sequence[Mapping[str, Any]] = ()  # likewise, one row per variant
    losses: Mapping[str, tuple[Sequence[float], Sequence[float]]] = dataclasses.field(
        default_factory=dict
    )  # metric name -> (steps, values)
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # date, hardware, command
    notes: Sequence[str] = ()


def write_video_report(
    path: str | os.PathLike,
    summary: Mapping[str, Any],
    *,
    title: str | None = None,
    keyframes: Sequence[str | os.PathLike] = (),
    transcript: Sequence[tuple[float, float, str]] = (),
    notes: Sequence[str] = (),
    film: str | None = None,
    num_layers: int | None = None,
) -> None:
    """Writes the page of a summarized video.

    Args:
      path: the HTML file; it appears only when complete.
      summary: the content of summary.json: `video`, `duration_s`, `budget`, `selected_s`,
        `segments` (each `start_s, end_s, score, exit_layer, selected`; `exit_layer` may be None)
        and `shots` (each `start_s, end_s, score, selected`).
      title: heading; None = the name of the video file.
      keyframes: one picture file per selected shot, in order of time; or none at all.
      transcript: `(start_s, end_s, text)` lines.
      notes: plain sentences that a reader should know (a truncated file, no sound ...).
      film: the summary film, as a path relative to the page.
      num_layers: decoder layers of the model; with it the page tells how much depth was saved.

    Raises:
      UserError: a field of the summary is missing, or there are not as many keyframes as shots.
    """
    missing = {"video", "duration_s", "budget", "selected_s", "segments", "shots"} - set(summary)
    if missing:
        raise UserError(f"the summary lacks {sorted(missing)}; give the content of summary.json")
    chosen = [shot for shot in summary["shots"] if shot["selected"]]
    if keyframes and len(keyframes) != len(chosen):
        raise UserError(
            f"got {len(keyframes)} keyframes for {len(chosen)} selected shots; give one for each"
        )
    duration_s = float(summary["duration_s"])
    cards = [
        {
            "shot": shot,
            "image": _thumbnail(keyframe),
            "text": " ".join(
                text
                for start_s, end_s, text in transcript
                if start_s < shot["end_s"] and end_s > shot["start_s"]
            ),
        }
        for shot, keyframe in zip(chosen, keyframes, strict=False)
    ]
    lines = [
        {
            "start_s": start_s,
            "text": text,
            "kept": any(start_s < s["end_s"] and end_s > s["start_s"] for s in chosen),
        }
        for start_s, end_s, text in transcript
    ]
    depths = [s["exit_layer"] for s in summary["segments"] if s.get("exit_layer") is not None]
    best = max((shot["score"] for shot in summary["shots"]), default=0)
    _write(
        path,
        "video.html",
        title=title or Path(summary["video"]).name,
        summary=summary,
        share=summary["selected_s"] / duration_s if duration_s else 0.0,
        chosen=chosen,
        best=best if best > 0 else 1.0,
        timeline=_timeline(summary),
        cards=cards,
        lines=lines,
        notes=list(notes),
        film=film,
        num_layers=num_layers,
        mean_depth=float(np.mean(depths)) if depths else None,
    )


def write_run_report(path: str | os.PathLike, run: RunReport) -> None:
    """Writes the page of a training run.

    Raises:
      UserError: there is no result at all.
    """
    results = {**run.models, **run.baselines}
    if not results:
        raise UserError("a run report needs at least one result; evaluate before reporting")
    rows = []
    for kind, group in (("model", run.models), ("baseline", run.baselines)):
        for name, result in group.items():
            rows.append(
                {
                    "name": name,
                    "kind": "people" if kind == "baseline" and name in _PEOPLE else kind,
                    "result": result,
                    "meaning": result.protocols.get("row", ""),
                    "constant": sum(video.constant for video in result.per_video),
                }
            )
    protocols: dict[str, list[str]] = {}
    for result in results.values():
        for metric in ("tau", "rho", "f1"):
            text = result.protocols[metric]
            if text not in protocols.setdefault(metric, []):
                protocols[metric].append(text)
    _write(
        path,
        "run.html",
        run=run,
        rows=rows,
        rugs={metric: _rugs(rows, metric) for metric in ("tau", "f1")},
        protocols=protocols,
        cautions=cautions(run.models, run.baselines),
        charts=[_curve(name, *series) for name, series in run.losses.items()],
        config=_flat(run.config),
        number_of_videos=len(next(iter(results.values())).per_video),
    )


def write_evaluation_report(
    path: str | os.PathLike, found: Mapping[str, Any], *, titles: Mapping[str, str]
) -> None:
    """Writes the page of evaluated predictions.

    Args:
      path: the HTML file, in a bucket or not; it appears only when complete.
      found: the content of evaluation.json.
      titles: what each metric is called, in the order of columns.
    """
    scales = {}
    for metric in titles:
        ends = [row[metric][end] for row in found["rows"].values() for end in ("low", "high")]
        low, high = min(0.0, *ends), max(0.1, *ends)
        place = lambda value, low=low, high=high: 100 * (value - low) / (high - low)
        scales[metric] = {
            "low": low,
            "high": high,
            "zero": place(0.0),
            "rows": {
                name: {key: place(row[metric][key]) for key in ("mean", "low", "high")}
                for name, row in found["rows"].items()
            },
        }
    methods = [name for name, row in found["rows"].items() if row["kind"] == "method"]
    _write(
        path,
        "evaluation.html",
        found=found,
        titles=titles,
        scales=scales,
        methods=methods,
        differs=means_differ(found["rows"], titles),
        shown=[*methods, *(name for name in ("human",) if name in found["rows"])],
        ranked=sorted(
            found["per_video"].items(), key=lambda item: item[1][methods[0]]["tau"], reverse=True
        ),
    )


def means_differ(rows: Mapping[str, Mapping[str, Any]], metrics: Iterable[str]) -> bool:
    """Whether the mean over folds' means is, as printed, not the mean over videos.

    Args:
      rows: of evaluation.json.
      metrics: of each row.
    """
    return any(
        thousandths(row[metric]["mean"]) != thousandths(row[metric]["mean_of_videos"])
        for metric in metrics
        for row in rows.values()
    )


def thousandths(value: float, sign: str = "") -> str:
    """Without the sign of what is rounded to 0; with `sign="+"` also the other numbers' plus."""
    return f"{round(value, 3) + 0.0:{sign}.3f}"


def _rugs(rows: list[dict], metric: str) -> dict[str, Any]:
    """Every video's value as a tick, all rows on one scale; places in percent."""
    values = [getattr(v, metric) for row in rows for v in row["result"].per_video]
    low, high = min(0.0, *values), max(0.1, *values)
    place = lambda value: 100 * (value - low) / (high - low)
    return {
        "low": low,
        "high": high,
        "zero": place(0.0),
        "ticks": [
            [
                {"at": place(getattr(v, metric)), "name": v.video_id, "value": getattr(v, metric)}
                for v in row["result"].per_video
            ]
            for row in rows
        ],
        "means": [place(getattr(row["result"], metric)) for row in rows],
    }


def _timeline(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Geometry of the strip: x in 0..1000 over the duration, the score's y in 0..100 downwards."""
    segments = summary["segments"]
    x = lambda time_s: round(1000 * time_s / max(summary["duration_s"], 1e-9), 2)
    scores = np.array([segment["score"] for segment in segments], float)
    low, high = min(0.0, *scores, 0.0), max(*scores, 1e-9) if len(scores) else 1.0
    y = lambda score: round(100 - 94 * (score - low) / (high - low), 2)

    groups = _groups(len(segments))
    points = []
    for group in groups:
        left, right = x(segments[group[0]]["start_s"]), x(segments[group[-1]]["end_s"])
        level = y(scores[group].mean())
        points += [f"{left},{level}", f"{right},{level}"]
    layers = sorted({s["exit_layer"] for s in segments if s.get("exit_layer") is not None})
    colours = dict(zip(layers, _depth_colours(len(layers)), strict=True))
    exits: list[dict[str, Any]] = []
    for segment in segments:
        layer = segment.get("exit_layer")
        if layer is None:
            continue
        if exits and exits[-1]["layer"] == layer and exits[-1]["end_s"] == segment["start_s"]:
            exits[-1]["end_s"] = segment["end_s"]  # one rectangle for a run of equal exits
        else:
            run = {"layer": layer, "start_s": segment["start_s"], "end_s": segment["end_s"]}
            exits.append(run)
    counts = {layer: sum(s.get("exit_layer") == layer for s in segments) for layer in layers}
    return {
        "line": " ".join(points),
        "area": " ".join(
            [f"{points[0].split(',')[0]},100", *points, f"{points[-1].split(',')[0]},100"]
        )
        if points
        else "",
        "low": low,
        "high": high,
        "kept": [
            {"x": x(s["start_s"]), "w": x(s["end_s"] - s["start_s"]), **s}
            for s in summary["shots"]
            if s["selected"]
        ],
        "exits": [
            {"x": x(e["start_s"]), "w": x(e["end_s"] - e["start_s"]), "colour": colours[e["layer"]]}
            | e
            for e in exits
        ],
        "legend": [
            {"layer": k, "colour": colours[k], "share": counts[k] / len(segments)} for k in layers
        ],
        "hours": [{"at": 100 * k / 4, "time_s": summary["duration_s"] * k / 4} for k in range(5)],
    }


def write_corpus_index(path: str | os.PathLike, index: Mapping[str, Any]) -> None:
    """Writes the page of many summarized videos, to lie in the folder that holds theirs.

    Args:
      path: the HTML file, in a bucket or not.
      index: the content of index.json: `settings` (`run, step, budget, exit_threshold`), `totals`
        (`videos, done, failed, left, duration_s, selected_s`) and `videos` (each `id, video,
        state`; a done one also `title, duration_s, selected_s, shots, mean_exit_layer, still,
        notes`, a failed one `reason`).
    """
    groups = {
        state: [entry for entry in index["videos"] if entry["state"] == state]
        for state in ("done", "failed", "left")
    }
    _write(path, "corpus.html", **index, groups=groups)


def _curve(name: str, steps: Sequence[float], values: Sequence[float]) -> dict[str, Any]:
    """Geometry of one chart: x in 0..1000, y in 0..100 downwards; mean line and min-max band."""
    steps, values = np.asarray(steps, float), np.asarray(values, float)
    finite = np.isfinite(values)
    dropped = int((~finite).sum())
    steps, values = steps[finite], values[finite]
    if not len(values):
        return {"name": name, "empty": True, "dropped": dropped}
    low, high = float(values.min()), float(values.max())
    span, reach = (high - low) or 1.0, (steps[-1] - steps[0]) or 1.0
    x = lambda step: round(1000 * (step - steps[0]) / reach, 2)
    y = lambda value: round(96 - 92 * (value - low) / span, 2)
    groups = _groups(len(values))
    at = [x(steps[g].mean()) for g in groups]
    upper = [f"{a},{y(values[g].max())}" for a, g in zip(at, groups, strict=True)]
    lower = [f"{a},{y(values[g].min())}" for a, g in zip(at, groups, strict=True)]
    return {
        "name": name,
        "empty": False,
        "dropped": dropped,
        "line": " ".join(f"{a},{y(values[g].mean())}" for a, g in zip(at, groups, strict=True)),
        "band": " ".join(upper + lower[::-1]),
        "low": low,
        "high": high,
        "first_step": steps[0],
        "last_step": steps[-1],
        "last": float(values[-1]),
    }


def _groups(count: int) -> list[np.ndarray]:
    """Indices 0..count-1 in at most `_CURVE_POINTS` runs of nearly equal length."""
    return np.array_split(np.arange(count), min(count, _CURVE_POINTS)) if count else []


def _depth_colours(count: int) -> list[str]:
    """From a light green for the first exit to a dark blue for the last."""
    colours = []
    for k in range(count):
        t = k / max(count - 1, 1)
        rgb = colorsys.hls_to_rgb(0.44 + 0.16 * t, 0.74 - 0.44 * t, 0.48)
        colours.append("#" + "".join(f"{round(255 * c):02x}" for c in rgb))
    return colours


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", json.dumps(value, default=str, ensure_ascii=False)))
    return rows


def _thumbnail(path: str | os.PathLike) -> str:
    """A small copy of a picture file as a data URI."""
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: the keyframe cannot be read; write the keyframes first"
        ) from error
    small.thumbnail((_THUMBNAIL_W, 2 * _THUMBNAIL_W))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _clock(seconds: float) -> str:
    """`1:02:03`, `2:03.4`: tenths only below an hour."""
    tenths = round(seconds * 10)
    hours, rest = divmod(tenths, 36_000)
    minutes, rest = divmod(rest, 600)
    if hours:
        return f"{hours}:{minutes:02d}:{rest // 10:02d}"
    return f"{minutes}:{rest // 10:02d}.{rest % 10}"


def _number(value: Any) -> str:
    """Numbers short enough for a table; anything else as it is."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return "-" if value is None else str(value)
    if isinstance(value, int | np.integer):
        return str(value)
    if not math.isfinite(value):
        return "not finite"
    return f"{value:.3f}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def _write(path: str | os.PathLike, template: str, **values: Any) -> None:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"clock": _clock, "number": _number, "thousandths": thousandths}
    page = environment.get_template(template).render(**values)
    if not in_bucket(path):
        path = Path(path)
        if not path.parent.is_dir():
            raise UserError(f"{path}: the folder {path.parent} does not exist; create it first")
    write_whole(path, page)
