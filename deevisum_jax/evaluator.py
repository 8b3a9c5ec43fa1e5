"""Predictions of any method held against people: the table, its intervals, two methods paired.

    python -m deevisum_jax.main --config configs/tvsum.py --mode evaluate --predictions FILE [FILE]

Needs neither a model nor a device. docs/EVALUATION.md explains files, protocols and the table.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from deevisum_jax import datasets, evaluation
from deevisum_jax.config import Config
from deevisum_jax.data.pipeline import Record
from deevisum_jax.errors import UserError
from deevisum_jax.files import in_bucket, write_whole
from deevisum_jax.summary import comparison, folds, predictions, protocols, report
from deevisum_jax.summary.folds import Fold
from deevisum_jax.summary.protocols import Result, VideoGroundTruth, VideoResult, counted
from deevisum_jax.summary.report import thousandths

TITLES = {"f1": "F1", "tau": "tau", "rho": "rho"}
METRICS = tuple(TITLES)
OF_FOLD = "{fold}"  # in a path: a file for every fold


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """What predictions are asked for."""

    truths: Mapping[str, VideoGroundTruth]  # by id, in the official order
    video_ids: tuple[str, ...]  # of the whole data set in that order, also those not at hand
    # Which videos are tested, and which the time row is fitted on; none: on all others.
    folds: tuple[Fold, ...]
    first_fold: int = 0  # number of the first of `folds`
    numbered: bool = True  # videos may go by their place in `video_ids`, as "video_1"
    coverage: str = ""  # what the folds test, in words
    notes: tuple[str, ...] = ()


def run(config: Config, paths: Sequence[str], workdir: epath.Path | None = None) -> None:
    """Prints the table of one or two files of predictions.

    Args:
      config: names the data set, its folds and the protocol.
      paths: one or two files; `{fold}` in a path stands for the number of the fold.
      workdir: gets evaluation.json and evaluation.html, if given.

    Raises:
      UserError: as `evaluate`, or the data set cannot be opened.
    """
    task = make_task(config, datasets.Dataset(config.data))
    found = evaluate(config, task, paths)
    if workdir is not None:
        try:
            if not in_bucket(workdir):
                workdir.mkdir(parents=True, exist_ok=True)
            write_whole(workdir / "evaluation.json", json.dumps(found, indent=2) + "\n")
            report.write_evaluation_report(workdir / "evaluation.html", found, titles=TITLES)
        except OSError as error:
            raise UserError(
                f"workdir {workdir} cannot be written ({error.strerror}); give --workdir a folder "
                "that can"
            ) from error
    print(table(found))


def make_task(config: Config, dataset: datasets.Dataset) -> Task:
    """The videos of a data set that predictions are asked for.

    With `data.folds` the test videos of every fold; else all videos of a data set that comes in
    one piece, or the test split of one that comes in splits.

    Raises:
      UserError: there is no such split or fold, or a fold tests no video that is at hand.
    """
    protocol = evaluation.protocol_of(config.eval)

    def read(records: Iterable[Record]) -> dict[str, VideoGroundTruth]:
        return {gt.video_id: gt for gt in evaluation.ground_truths(records, protocol)}

    if not dataset.in_one_piece:
        train, test = read(dataset.split("train")), read(dataset.split(config.eval.test_split))
        others = [
            record["video_id"]
            for name in dataset.split_names
            if name not in ("train", config.eval.test_split)
            for record in dataset.split(name)
        ]
        return Task(
            truths=train | test,
            video_ids=tuple(dict.fromkeys((*train, *others, *test))),
            folds=(Fold(tuple(train), tuple(test)),),
            numbered=False,  # nobody has said in which order the splits follow each other
        )
    truths, video_ids = read(dataset.records()), dataset.video_ids
    absent = [video for video in video_ids if video not in truths]
    notes = []
    if absent:
        are = "is" if len(absent) == 1 else "are"
        notes.append(
            f"{len(absent)} of {counted(len(video_ids), 'video')} {are} not at hand and left out: "
            "these numbers are not comparable with those of the whole data set."
        )
    if not config.data.folds:
        fold = Fold((), tuple(truths))
        return Task(truths=truths, video_ids=video_ids, folds=(fold,), notes=tuple(notes))
    kept = []
    for index, fold in enumerate(dataset.folds):
        train, test = (
            tuple(video for video in videos if video in truths)
            for videos in (fold.train, fold.test)
        )
        if not train or not test:
            raise UserError(
                f"fold {index} of data.folds={config.data.folds!r} has no video at hand to "
                f"{'test' if train else 'train'} on; get the missing videos, or set data.folds=''"
            )
        kept.append(Fold(train, test))
    return Task(
        truths=truths,
        video_ids=video_ids,
        folds=tuple(kept),
        coverage=folds.coverage_sentence(dataset.folds),
        notes=tuple(notes),
    )


def evaluate(config: Config, task: Task, paths: Sequence[str]) -> dict[str, Any]:
    """All numbers of one or two files of predictions, the content of evaluation.json.

    A file of one fold's test videos, as a run leaves it, is evaluated on that fold alone.

    Raises:
      UserError: there are not one or two different files, what is in them does not fit the data
        set (see `summary.predictions`), or a path is of a file per fold and there are no folds.
    """
    if not 1 <= len(paths) <= 2 or len(set(paths)) != len(paths):
        raise UserError(
            f"got {len(paths)} files of predictions ({', '.join(paths)}); give one, or two "
            "different ones to compare"
        )
    protocol = evaluation.protocol_of(config.eval)
    for path in paths:
        if OF_FOLD in path and not config.data.folds:
            raise UserError(
                f"{path} stands for a file per fold, and there are no folds; set data.folds, or "
                "give one file"
            )
    task = _of_one_fold(task, paths)
    names = _row_names(paths)
    rows: dict[str, list[list[VideoResult]]] = {
        name: evaluate_file(path, task, protocol) for name, path in zip(names, paths, strict=True)
    }
    baselines = _baselines(task, protocol, config.seed)
    assert not rows.keys() & baselines.keys()
    rows |= baselines

    # ---- One value per video and row; a video that several folds test weighs more ----
    entries = [
        (video, 1 / len(task.folds) / len(fold.test)) for fold in task.folds for video in fold.test
    ]
    tested = {video for video, _ in entries}
    ids = [video for video in task.truths if video in tested]
    place = {video: k for k, video in enumerate(ids)}
    weights = np.bincount([place[v] for v, _ in entries], [w for _, w in entries], len(ids))
    values = np.zeros((len(rows), len(METRICS), len(ids)))
    for row, of_folds in zip(values, rows.values(), strict=True):
        in_turn = (result for fold in of_folds for result in fold)
        for (video, weight), result in zip(entries, in_turn, strict=True):
            share = weight / weights[place[video]]
            row[:, place[video]] += share * np.array([getattr(result, m) for m in METRICS])
    spread = comparison.intervals(values.reshape(-1, len(ids)), weights, seed=config.seed)
    spread = spread.reshape(len(rows), len(METRICS), 2)

    results = {}
    for row, (name, of_folds) in zip(values, rows.items(), strict=True):
        constant = {result.video_id for fold in of_folds for result in fold if result.constant}
        results[name] = Result(
            **dict(zip(METRICS, (row @ weights).tolist(), strict=True)),
            per_video=tuple(
                VideoResult(
                    video_id=video,
                    constant=video in constant,
                    **dict(zip(METRICS, of_video, strict=True)),
                )
                for video, of_video in zip(ids, row.T.tolist(), strict=True)
            ),
            protocols=protocol.texts(None if name in names else name),
        )
    found = {
        "data_set": config.data.dataset,
        "num_videos": len(ids),
        "num_folds": len(task.folds) if config.data.folds else 0,
        "protocol": dataclasses.asdict(protocol),
        "protocols": protocol.texts(),
        "rows": {
            name: {
                "kind": "method" if name in names else "baseline",
                "about": result.protocols.get("row") or paths[k],
                "num_constant": sum(video.constant for video in result.per_video),
                **{
                    metric: {
                        "mean": getattr(result, metric),
                        "low": float(spread[k, m, 0]),
                        "high": float(spread[k, m, 1]),
                        "mean_of_videos": float(values[k, m].mean()),
                    }
                    for m, metric in enumerate(METRICS)
                },
            }
            for k, (name, result) in enumerate(results.items())
        },
        "per_video": {
            video: {
                name: {metric: getattr(result.per_video[v], metric) for metric in METRICS}
                for name, result in results.items()
            }
            for v, video in enumerate(ids)
        },
        "comparison": None,
        "statistics": {"In brackets": comparison.INTERVAL},
    }
    if len(paths) == 2:
        found["statistics"]["p"] = comparison.TEST
        found["comparison"] = {
            metric: dataclasses.asdict(
                comparison.compare(values[0, m], values[1, m], weights, seed=config.seed)
            )
            for m, metric in enumerate(METRICS)
        }
    found["notes"] = [
        *([task.coverage] if task.coverage else ()),
        *task.notes,
        *protocols.cautions(
            {name: results[name] for name in names}, {name: results[name] for name in baselines}
        ),
        *protocols.notes_on([task.truths[video] for video in ids], protocol),
    ]
    return found


def evaluate_file(path: str, task: Task, protocol: protocols.Protocol) -> list[list[VideoResult]]:
    """The results of a file of predictions, or of one per fold: per fold, per test video.

    Raises:
      UserError: as `summary.predictions` has it.
    """

    def read(path: str, videos: Sequence[str]) -> dict[str, predictions.Prediction]:
        return predictions.read(path, task.video_ids, videos, numbered=task.numbered)

    if OF_FOLD in path:
        found = []
        for index, fold in enumerate(task.folds, task.first_fold):
            of_fold = read(path.replace(OF_FOLD, str(index)), fold.test)
            found.append([_evaluate(of_fold[video], task, protocol) for video in fold.test])
        return found
    wanted = {video for fold in task.folds for video in fold.test}
    whole = read(path, [video for video in task.truths if video in wanted])
    results = {video: _evaluate(one, task, protocol) for video, one in whole.items()}
    return [[results[video] for video in fold.test] for fold in task.folds]


def _of_one_fold(task: Task, paths: Sequence[str]) -> Task:
    """Only the fold whose test videos are all that a file has, if there is such a file and fold."""
    wanted = {video for fold in task.folds for video in fold.test}
    for path in paths:
        if OF_FOLD in path or len(task.folds) < 2:
            continue
        there = predictions.names(path, task.video_ids, numbered=task.numbered)
        alone = [k for k, fold in enumerate(task.folds) if set(fold.test) == there]
        if len(alone) == 1 and there != wanted:
            [index] = alone
            note = (
                f"{path} has the test videos of fold {index} only: that fold alone, of "
                f"{len(task.folds)}, is evaluated. Write {OF_FOLD} for its number in the path to "
                "evaluate a file of each."
            )
            fold = task.folds[index]
            return dataclasses.replace(task, folds=(fold,), first_fold=index, coverage=note)
    return task


def table(found: Mapping[str, Any]) -> str:
    """What `evaluate` has found, for a terminal."""
    rows, protocol = found["rows"], found["protocol"]
    width = 2 + max(len(name) for name in (*rows, "method"))
    line = lambda name, cells: f"{name:<{width}}" + "".join(f"{c:<25}" for c in cells).rstrip()
    about = f"{found['data_set']}: {counted(found['num_videos'], 'video')}"
    if found["num_folds"] > 1:
        about += f", mean over {found['num_folds']} folds of the mean over test videos"
    lines = [
        about,
        f"protocol: F1 {protocol['f1']}, tau and rho {protocol['correlation']}, shots "
        f"{protocol['shots']}, budget {100 * protocol['budget']:g} %",
        "",
        line(
            "method", (f"F1 (constant {thousandths(rows['constant']['f1']['mean'])})", "tau", "rho")
        ),
    ]
    for name, row in rows.items():
        lines.append(line(name, (_spread(row[m], "mean") for m in METRICS)))
    if report.means_differ(rows, METRICS):
        videos = counted(found["num_videos"], "video")
        lines += ["", f"Instead, the mean over the {videos}, each once:"]
        for name, row in rows.items():
            cells = (thousandths(row[m]["mean_of_videos"]) for m in METRICS)
            lines.append(line(name, cells))
    if found["comparison"]:
        first, second = (name for name, row in rows.items() if row["kind"] == "method")
        lines += ["", f"{first} less {second}, paired by video:"]
        for metric, pair in found["comparison"].items():
            lines.append(
                f"  {TITLES[metric]:<5}{_spread(pair, 'difference', '+')}  p = {pair['p']:.2g}  "
                f"better on {counted(pair['wins'], 'video')}, worse on {pair['losses']}"
            )
    lines += ["", *found["notes"], ""]
    lines += [f"{TITLES[metric]}: {text}." for metric, text in found["protocols"].items()]
    lines += [f"{name}: {text}." for name, text in found["statistics"].items()]
    return "\n".join(lines)


def _spread(number: Mapping[str, float], name: str, sign: str = "") -> str:
    mean, low, high = (thousandths(number[key], sign) for key in (name, "low", "high"))
    return f"{mean} [{low}, {high}]"


def _evaluate(
    prediction: predictions.Prediction, task: Task, protocol: protocols.Protocol
) -> VideoResult:
    return predictions.evaluate(prediction, task.truths[prediction.video_id], protocol)


def _row_names(paths: Sequence[str]) -> list[str]:
    """The files' names, or where these tell too little their paths."""
    names = [pathlib.PurePath(path).name for path in paths]
    if len(set(names)) == len(names) and not set(names) & protocols.ROWS.keys():
        return names
    names = []
    for path in paths:
        while path in protocols.ROWS or path in names:
            path = f"./{path}"
        names.append(path)
    return names


def _baselines(
    task: Task, protocol: protocols.Protocol, seed: int
) -> dict[str, list[list[VideoResult]]]:
    """Per row of `protocols.ROWS`, per fold, per test video."""
    tested = {video for fold in task.folds for video in fold.test}
    once = protocols.untrained_rows(
        [gt for video, gt in task.truths.items() if video in tested], seed=seed, protocol=protocol
    )
    rows = {
        name: [[by_id[video] for video in fold.test] for fold in task.folds]
        for name, results in once.items()
        for by_id in [{result.video_id: result for result in results}]
    }
    get = lambda videos: [task.truths[video] for video in videos]
    rows["time"] = [
        protocols.time_row(get(fold.train), get(fold.test), protocol) for fold in task.folds
    ]
    return {name: rows[name] for name in protocols.ROWS if name in rows}
