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

_THUMBNAIL_W, _BOARD_W = 400, 240  # pixels, of a shot's still and of one on the storyboard
_CURVE_POINTS = 600  # a chart shows no more; more are averaged in equal groups
_PEOPLE = ("human", "oracle")
# DEEVISum's early exit as its abstract has it (arXiv 2504.21831).
_PUBLISHED = {"name": "DEEVISum, as published (TVSum)", "time_saved": 0.21, "f1_loss": 0.013}
_TEXT_COLUMNS = ("confidence", "thresholds", "promise")  # of a trade-off; the others hold numbers
# The charts of a trade-off, in units of their viewBox, which CSS scales as a whole.
_PLOT_LEFT, _PLOT_RIGHT, _PLOT_TOP, _PLOT_BOTTOM = 44, 344, 12, 192
_CHART_SIZE = (360, 232)
_CHAR_W = 6.2  # of a label, on average, in a wide font


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
    # What leaving early saves and costs, None where nobody has calibrated:
    #   points       from off to the cheapest, each `confidence, thresholds` (one per exit but the
    #                last; None: nobody leaves there), `f1, tau`, `f1_loss, tau_loss` (the full
    #                model's less the point's), `avg_depth`, `flops_saved` (0..1), `time_saved`
    #                (None, or `median, low, high`, 0..1), `p_value` (or None), `passed`, `chosen`
    #   num_layers   of the decoder
    #   epsilons     metric -> the loss that is tolerated
    #   promise      a plain sentence
    #   num_videos   that the metrics are means over
    #   machine      where time was measured, in a line
    tradeoff: Mapping[str, Any] | None = None


def write_video_report(
    path: str | os.PathLike,
    summary: Mapping[str, Any],
    *,
    title: str | None = None,
    keyframes: Sequence[str | os.PathLike] = (),
    storyboard: Sequence[str | os.PathLike] = (),
    contact_sheet: str | None = None,
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
        and `shots` (each `start_s, end_s, score, selected`). With a query also `query`,
        `query_weight` and each segment's `relevance`; with keyframes `storyboard` (each `time_s,
        relevance, filled`).
      title: heading; None = the name of the video file.
      keyframes: one picture file per selected shot, in order of time; or none at all.
      storyboard: one picture file per entry of the summary's storyboard.
      contact_sheet: all of these on one picture, as a path relative to the page.
      transcript: `(start_s, end_s, text)` lines.
      notes: plain sentences that a reader should know (a truncated file, no sound ...).
      film: the summary film, as a path relative to the page.
      num_layers: decoder layers of the model; with it the page tells how much depth was saved.

    Raises:
      UserError: a field of the summary is missing, or there are not as many pictures as shots, or
        as entries of the storyboard.
    """
    missing = {"video", "duration_s", "budget", "selected_s", "segments", "shots"} - set(summary)
    if missing:
        raise UserError(f"the summary lacks {sorted(missing)}; give the content of summary.json")
    chosen = [shot for shot in summary["shots"] if shot["selected"]]
    if keyframes and len(keyframes) != len(chosen):
        raise UserError(
            f"got {len(keyframes)} keyframes for {len(chosen)} selected shots; give one for each"
        )
    board = summary.get("storyboard", ())
    if len(storyboard) != len(board):
        raise UserError(
            f"got {len(storyboard)} pictures for the {len(board)} keyframes of the storyboard; "
            "give one for each"
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
        query=summary.get("query"),
        board=[
            {"image": _thumbnail(picture, _BOARD_W), **entry}
            for picture, entry in zip(storyboard, board, strict=True)
        ],
        contact_sheet=contact_sheet,
        lines=lines,
        notes=list(notes),
        film=film,
        num_layers=num_layers,
        mean_depth=float(np.mean(depths)) if depths else None,
    )


def write_run_report(path: str | os.PathLike, run: RunReport) -> None:
    """Writes the page of a training run.

    Raises:
      UserError: there is no result at all, or a trade-off without points.
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
        tradeoff=run.tradeoff and _tradeoff(run.tradeoff),
        config=_flat(run.config),
        number_of_videos=len(next(iter(results.values())).per_video),
    )


def tradeoff_table(tradeoff: Mapping[str, Any]) -> str:
    """What leaving early saves and costs, as a table in GitHub's Markdown.

    Args:
      tradeoff: as `RunReport.tradeoff`.

    Returns:
      A line per point, the chosen one's in bold, and last what DEEVISum publishes. Columns are
      padded, so that the table can also be read in a terminal.

    Raises:
      UserError: there are no points.
    """
    columns, points = _tradeoff_cells(tradeoff)
    rows = [
        [f"**{cell}**" if point["chosen"] else cell for cell in cells.values()]
        for cells, point in zip(points, tradeoff["points"], strict=True)
    ]
    published = dict.fromkeys(columns, "-") | {
        "confidence": _PUBLISHED["name"],
        "time saved": f"{100 * _PUBLISHED['time_saved']:.0f} %",
        "F1 lost": f"{100 * _PUBLISHED['f1_loss']:.1f}",
        "promise": "not measured here",
    }
    rows.append(list(published.values()))
    texts = [k for k, name in enumerate(columns) if name in _TEXT_COLUMNS]
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    line = lambda cells: "| " + " | ".join(cells) + " |"
    pad = lambda cells: line(
        cell.ljust(width) if k in texts else cell.rjust(width)
        for k, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    rule = line("-" * w if k in texts else "-" * (w - 1) + ":" for k, w in enumerate(widths))
    return "\n".join([pad(columns), rule, *map(pad, rows)])


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
    return _fixed(value, 3, sign)


def _fixed(value: float, decimals: int, sign: str = "") -> str:
    """Without the sign of what is rounded to 0."""
    return f"{round(value, decimals) + 0.0:{sign}.{decimals}f}"


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

    groups = _groups(len(segments))

    def steps(levels: np.ndarray) -> list[str]:
        """Corners of a line over the groups' means, from levels in 0..100."""
        points = []
        for group in groups:
            left, right = x(segments[group[0]]["start_s"]), x(segments[group[-1]]["end_s"])
            level = round(levels[group].mean(), 2)
            points += [f"{left},{level}", f"{right},{level}"]
        return points

    points = steps(100 - 94 * (scores - low) / (high - low))
    asked = np.array([segment.get("relevance", np.nan) for segment in segments], float)
    relevance = None
    if len(segments) and np.isfinite(asked).all():
        least, spread = asked.min(), np.ptp(asked) or 1.0
        line = " ".join(steps(100 - 94 * (asked - least) / spread))
        relevance = {"line": line, "low": float(least), "high": float(asked.max())}
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
        "relevance": relevance,
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
      index: the content of index.json: `settings` (`run, step, budget, exit_policy`; `query` if
        there is one), `totals`
        (`videos, done, failed, left, duration_s, selected_s`) and `videos` (each `id, video,
        state`; a done one also `title, duration_s, selected_s, shots, mean_exit_layer, still,
        notes`, a failed one `reason`).
    """
    groups = {
        state: [entry for entry in index["videos"] if entry["state"] == state]
        for state in ("done", "failed", "left")
    }
    _write(path, "corpus.html", **index, groups=groups, exits=_exits(index["settings"]))


def _exits(settings: Mapping[str, Any]) -> str:
    """When segments leave, for the page of many videos."""
    policy = settings["exit_policy"]
    thresholds = policy["thresholds"]
    if all(threshold is None for threshold in thresholds):
        return "every layer"
    shown = ["-" if threshold is None else f"{threshold:.4g}" for threshold in thresholds]
    return f"exits by {policy['confidence']} from {' / '.join(shown)} on"


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


def _tradeoff_cells(tradeoff: Mapping[str, Any]) -> tuple[list[str], list[dict[str, str]]]:
    """Names of columns, and each point's texts under them; F1 in points, that is times 100."""
    if not tradeoff["points"]:
        raise UserError(
            "a trade-off needs at least one point; evaluate at least the model with exits off"
        )
    rows = []
    for point in tradeoff["points"]:
        time, p = point["time_saved"], point["p_value"]
        saved = {key: _fixed(value, 1) for key, value in _saved(point).items()}
        verdict = "not tested" if p is None else "not shown"
        row = {
            "confidence": "off" if _is_off(point) else point["confidence"],
            "thresholds": _thresholds(point),
            f"layers of {tradeoff['num_layers']}": f"{point['avg_depth']:.2f}",
            "FLOPs saved": f"{_fixed(100 * point['flops_saved'], 1)} %",
            "time saved": "{median} % [{low}, {high}]".format(**saved) if time else "-",
            "F1": _fixed(100 * point["f1"], 2),
            "tau": thousandths(point["tau"]),
            "F1 lost": _fixed(100 * point["f1_loss"], 2),
            "tau lost": thousandths(point["tau_loss"]),
            "p": "-" if p is None else f"{p:.2g}",
            "promise": "shown" if point["passed"] else verdict,
        }
        rows.append(row)
    return list(rows[0]), rows


def _tradeoff(tradeoff: Mapping[str, Any]) -> dict[str, Any]:
    """What the page shows of a trade-off: two charts, of F1 and of tau, and the table."""
    columns, rows = _tradeoff_cells(tradeoff)
    points = tradeoff["points"]
    published = {key: 100 * _PUBLISHED[key] for key in ("time_saved", "f1_loss")}
    places = [_saved(point) for point in points]
    ends = [value for place in places for value in place.values()]
    x_axis = _Axis.over([*ends, published["time_saved"]], _PLOT_LEFT, _PLOT_RIGHT)

    # With exits off nothing is saved, of time or FLOPs, whether or not that was measured.
    timed = [point["time_saved"] is not None or _is_off(point) for point in points]
    measured = any(point["time_saved"] is not None for point in points)
    if not measured:
        x_title = "FLOPs saved, % (time was not measured)"
    elif all(timed):
        x_title = "time saved, %"
    else:
        x_title = "time saved, % (hollow: FLOPs saved, not timed)"
    charts = []
    for metric, name, unit, scale in (
        ("f1", "F1 lost", ", in points", 100),
        ("tau", "tau lost", "", 1),
    ):
        losses = [scale * point[f"{metric}_loss"] for point in points]
        tolerated = [scale * tradeoff["epsilons"][metric]] if metric in tradeoff["epsilons"] else []
        signs = [published["f1_loss"]] if metric == "f1" else []
        y_axis = _Axis.over([*losses, *tolerated, *signs], _PLOT_BOTTOM, _PLOT_TOP)
        marks = [
            {
                "x": x_axis(place["median"]),
                "low": x_axis(place["low"]),
                "high": x_axis(place["high"]),
                "y": y_axis(loss),
                "chosen": point["chosen"],
                "off": _is_off(point),
                "hollow": measured and not known,
                "text": f"{row['confidence']} {row['thresholds']}: {place['median']:.1f} % of the "
                f"{'time' if known else 'FLOPs'} saved, {name} {row[name]}",
            }
            for point, place, known, loss, row in zip(
                points, places, timed, losses, rows, strict=True
            )
        ]
        chart = {
            "title": name + unit,
            "x_title": x_title,
            "x_ticks": x_axis.ticks,
            "y_ticks": y_axis.ticks,
            "line": " ".join(f"{mark['x']},{mark['y']}" for mark in marks),
            "marks": marks,
            "tolerance": y_axis(tolerated[0]) if tolerated else None,
            "published": (x_axis(published["time_saved"]), y_axis(signs[0])) if signs else None,
            "aria": "; ".join(
                [f"{name}{unit} over {x_title}, {len(points)} settings of the exits"]
                + [f"tolerance {value:g}" for value in tolerated]
                + [f"chosen {mark['text']}" for mark in marks if mark["chosen"]]
            ),
        }
        chart["labels"] = _labels(chart, *(f"tolerance {value:g}" for value in tolerated))
        charts.append(chart)
    return {
        **tradeoff,
        "measured": measured,
        "charts": charts,
        "columns": columns,
        "rows": rows,
        "text_columns": _TEXT_COLUMNS,
        "published": {
            "name": _PUBLISHED["name"],
            "time": f"{published['time_saved']:.0f} %",
            "f1": f"{published['f1_loss']:.1f}",
        },
        "plot": {
            "left": _PLOT_LEFT,
            "right": _PLOT_RIGHT,
            "top": _PLOT_TOP,
            "bottom": _PLOT_BOTTOM,
            "size": _CHART_SIZE,
        },
    }


def _saved(point: Mapping[str, Any]) -> dict[str, float]:
    """`median, low, high` in percent: of time, or of FLOPs where time was not measured."""
    keys = ("median", "low", "high")
    saved = point["time_saved"] or dict.fromkeys(keys, point["flops_saved"])
    return {key: 100 * saved[key] for key in keys}


@dataclasses.dataclass(frozen=True)
class _Axis:
    """Places of values on a straight scale."""

    low: float
    high: float
    start: float  # place of `low`
    end: float  # place of `high`

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float) -> _Axis:
        """From the least value to the largest and a twentieth further; from 0 if it is the end."""
        values = [0.0, *values]
        low, high = min(values), max(values)
        margin = (high - low) / 20 or 0.5
        return cls(low - margin * (low < 0), high + margin, start, end)

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return round(self.start + share * (self.end - self.start), 2)

    @property
    def ticks(self) -> list[dict[str, Any]]:
        """At multiples of 1, 2 or 5 times a power of ten, at most eight."""
        least = (self.high - self.low) / 7
        power = math.floor(math.log10(least))
        factor = next(k for k in (1, 2, 5, 10) if k * 10.0**power >= least)
        step, decimals = factor * 10.0**power, max(0, -power - (factor == 10))
        multiples = range(math.ceil(self.low / step), math.floor(self.high / step) + 1)
        return [{"at": self(k * step), "text": f"{k * step:.{decimals}f}"} for k in multiples]


def _labels(chart: Mapping[str, Any], *tolerance: str) -> list[dict[str, Any]]:
    """Texts beside the marks of a chart, each where it covers the least of what is there.

    Args:
      chart: with `marks`, and places of `tolerance` and `published` or None.
      tolerance: the text at its line, if there is one.
    """
    marks, boxes = chart["marks"], []  # boxes: what is drawn
    for before, mark in zip([marks[0], *marks], marks, strict=False):
        boxes.append((mark["x"] - 5, mark["y"] - 5, mark["x"] + 5, mark["y"] + 5))
        boxes.append((mark["low"], mark["y"] - 3, mark["high"], mark["y"] + 3))
        for x, y in np.linspace((before["x"], before["y"]), (mark["x"], mark["y"]), 30):
            boxes.append((x - 1, y - 1, x + 1, y + 1))

    wanted = []  # kind, text, where it could stand: x, base line, text-anchor
    for mark in marks:
        if mark["chosen"] or mark["off"]:
            text = ", ".join(name for name in ("off", "chosen") if mark[name])
            kind = "chosen" if mark["chosen"] else "off"
            wanted.append((kind, text, _around(mark["x"], mark["y"])))
    for text in tolerance:
        y = chart["tolerance"]
        boxes.append((_PLOT_LEFT, y - 1, _PLOT_RIGHT, y + 1))
        ends = ((_PLOT_LEFT + 4, "start"), (_PLOT_RIGHT - 2, "end"), (190, "middle"))
        spots = [(x, base, anchor) for base in (y - 4, y + 13) for x, anchor in ends]
        wanted.append(("tolerance", text, spots))
    if chart["published"]:
        x, y = chart["published"]
        boxes.append((x - 6, y - 6, x + 6, y + 6))
        wanted.append(("published", _PUBLISHED["name"], _around(x, y)))

    labels, texts = [], []  # texts: their boxes, that no other text may cover
    for kind, text, spots in wanted:
        costs = []
        for spot in spots:
            box = left, top, right, bottom = _text_box(text, *spot)
            inside = left >= _PLOT_LEFT and right <= _CHART_SIZE[0]
            inside = inside and top >= 0 and bottom <= _PLOT_BOTTOM
            costs.append((not inside, _overlaps(box, texts), _overlaps(box, boxes)))
        x, y, anchor = spots[costs.index(min(costs))]
        texts.append(_text_box(text, x, y, anchor))
        labels.append(
            {"kind": kind, "text": text, "x": round(x, 2), "y": round(y, 2), "anchor": anchor}
        )
    return labels


_Box = tuple[float, float, float, float]  # left, top, right, bottom


def _overlaps(box: _Box, others: Iterable[_Box]) -> int:
    """How many of the others it covers in part."""
    left, top, right, bottom = box
    return sum(o[0] < right and left < o[2] and o[1] < bottom and top < o[3] for o in others)


def _text_box(text: str, x: float, y: float, anchor: str) -> _Box:
    """Nearly what a label covers whose base line is at y."""
    width = _CHAR_W * len(text)
    left = x - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[anchor]
    return left, y - 10, left + width, y + 3


def _around(x: float, y: float) -> list[tuple[float, float, str]]:
    """Where a label of a mark could stand, the best first."""
    return [
        spot
        for far in (0, 6, 14, 24)
        for spot in (
            (x + 9 + far, y + 4, "start"),
            (x, y - 9 - far, "middle"),
            (x + 5, y - 8 - far, "start"),
            (x - 5, y - 8 - far, "end"),
            (x - 9 - far, y + 4, "end"),
            (x + 5, y + 15 + far, "start"),
            (x, y + 17 + far, "middle"),
            (x - 5, y + 15 + far, "end"),
        )
    ]


def _is_off(point: Mapping[str, Any]) -> bool:
    return all(threshold is None for threshold in point["thresholds"])


def _thresholds(point: Mapping[str, Any]) -> str:
    """One per exit; three decimals, or so many that one just below 1 does not read as 1."""
    texts = []
    for threshold in point["thresholds"]:
        if threshold is None:
            texts.append("-")
            continue
        rest = 1 - threshold
        decimals = max(3, 1 - math.floor(math.log10(rest))) if rest > 0 else 3
        text = f"{threshold:.{decimals}f}".rstrip("0")
        texts.append(text.removesuffix("."))
    return " / ".join(texts) or "-"


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


def _thumbnail(path: str | os.PathLike, width: int = _THUMBNAIL_W) -> str:
    """A small copy of a picture file as a data URI."""
    try:
        with Image.open(path) as picture:
            small = picture.convert("RGB")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: the keyframe cannot be read; write the keyframes first"
        ) from error
    small.thumbnail((width, 2 * width))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def clock(seconds: float) -> str:
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
    environment.filters |= {"clock": clock, "number": _number, "thousandths": thousandths}
    page = environment.get_template(template).render(**values)
    if not in_bucket(path):
        path = Path(path)
        if not path.parent.is_dir():
            raise UserError(f"{path}: the folder {path.parent} does not exist; create it first")
    write_whole(path, page)
