"""Which videos a data set of one's own is made of: those of a folder, or of a CSV manifest.

Everything that can be wrong without decoding a video is found here, and told at once.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import hashlib
import json
import math
import os
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath

from deevisum_jax import files, manifest
from deevisum_jax.data import subtitles
from deevisum_jax.errors import UserError, closest
from tfds_builders import downloads
from tfds_builders.records import MANUAL_DIR

_SAMPLE_BYTES = 2**16  # of a file's beginning and end: containers keep their index in one of them
_NUM_SAMPLES, _INNER_BYTES = 16, 2**12  # in between
_LARGEST = float(np.finfo(np.float32).max)  # of a number that can be stored
_SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A video, and what is known of it. Paths are absolute."""

    id: str
    video: str
    title: str
    subtitles: str | None  # "none" takes none, None looks beside the video and inside
    scores: str | None
    split: str | None
    content: str  # digest of the video file and its subtitles
    scores_content: str | None


def read(path: str | os.PathLike[str]) -> list[Source]:
    """The videos of a folder and the folders in it, by name; or of a manifest, in its order.

    Raises:
      UserError: there is no such folder or file, or no video in it; or videos, subtitles or scores
        that it names cannot be. All of them are named.
    """
    if files.in_bucket(path):
        raise UserError(
            f"{os.fspath(path)} is in a bucket, and a data set is built of files of this machine "
            "only; copy them here (gcloud storage cp -r, for instance), or mount the bucket"
        )
    home = epath.Path(path).expanduser()
    if not home.exists():
        raise UserError(f"{home}: no such folder and no such manifest; check {MANUAL_DIR}")
    items = _of_folder(home) if home.is_dir() else manifest.read(home)
    problems = [*_same_file(items), *_bad_splits(items)]
    found, beside = [], _Beside()
    for item in items:
        try:
            found.append(_source(item, beside))
        except UserError as error:
            problems.append(f"{manifest.printable(item.id)}: {error}")
        except OSError as error:
            problems.append(f"{manifest.printable(item.id)}: cannot be read ({error})")
    if problems:
        raise UserError(manifest.listing(f"{home} lists what cannot be used:", problems))
    return found


def digest(sources: Sequence[Source]) -> str:
    """Twelve hexadecimal digits of all that the records depend on, wherever the files lie."""
    told = [
        [source.id, source.title, source.split, source.content, source.scores_content]
        for source in sources
    ]
    return _digest(json.dumps(told).encode())[:12]


def read_scores(path: str | os.PathLike[str]) -> tuple[np.ndarray, np.ndarray]:
    """What people gave a video: `float64[N]` times in seconds, and `float32[U, N]` scores.

    The file is a CSV with the columns `time_s`, `score` and, if several people scored the video,
    `annotator`. A score holds around its time, as far as no other is nearer. Any scale from 0 up
    will do; 0 means that a summary gains nothing.

    Raises:
      UserError: it has another form, or scores that cannot be; the lines are named.
    """
    file = epath.Path(path)
    _, rows, problems = manifest.read_table(
        file, ("time_s", "score", "annotator"), ("time_s", "score")
    )
    given: dict[str, dict[float, float]] = collections.defaultdict(dict)
    for line, cells in rows:
        values = {name: _number(cells.get(name, "")) for name in ("time_s", "score")}
        bad = [name for name, value in values.items() if value is None]
        if bad:
            told = " and ".join(f"{name} {cells.get(name, '')!r}" for name in bad)
            problems.append((line, f"line {line}: {told} cannot be: wanted a number"))
            continue
        time_s, of_annotator = values["time_s"], given[cells.get("annotator", "")]
        if min(values.values()) < 0:
            negative = " and ".join(f"{name} {v:g}" for name, v in values.items() if v < 0)
            problems.append((line, f"line {line}: {negative} is below 0"))
        elif time_s in of_annotator:
            problems.append((line, f"line {line}: a second score at {time_s:g} s"))
        of_annotator[time_s] = values["score"]
    manifest.refuse(file, [told for _, told in sorted(problems)])
    if not given:
        raise UserError(f"{file} has no scores; give it a row for each, below time_s,score")
    times = sorted(set().union(*given.values()))
    for annotator, scores in given.items():
        if missing := [time_s for time_s in times if time_s not in scores]:
            raise UserError(
                f"{file}: annotator {annotator!r} gave no score at {missing[0]:g} s, where another "
                "did; all must score the same times"
            )
    rows_of = [[scores[time_s] for time_s in times] for _, scores in sorted(given.items())]
    return np.asarray(times), np.asarray(rows_of, np.float32)


def _number(text: str) -> float | None:
    try:
        value = math.nan if "_" in text else float(text)  # 1_0 is a number in Python alone
    except ValueError:
        return None
    return value if abs(value) <= _LARGEST else None


def _of_folder(home: epath.Path) -> list[manifest.Item]:
    paths = downloads.list_files(pathlib.Path(home), downloads.VIDEO_ENDINGS, inside=True)
    if not paths:
        raise UserError(
            f"{home} holds no videos (files that end in {', '.join(downloads.VIDEO_ENDINGS)}); "
            "give a folder that does, or a manifest"
        )
    return [
        manifest.Item(
            id="_".join(path.relative_to(home).with_suffix("").parts), video=epath.Path(path)
        )
        for path in paths
    ]


def _same_file(items: Sequence[manifest.Item]) -> Iterator[str]:
    shown_id = lambda item: manifest.printable(item.id)  # what tells records apart
    for name, key in (("id", shown_id), ("file", lambda item: _real(item.video))):
        rows = collections.defaultdict(list)
        for item in items:
            rows[key(item)].append(item)
        for same in rows.values():
            if len(same) > 1:
                told = ", ".join(f"{shown_id(item)} ({item.video})" for item in same)
                yield f"{told}: the same {name}; keep one, or tell them apart in a manifest"


def _real(path: epath.Path) -> str:
    return os.fspath(path) if files.in_bucket(path) else os.path.realpath(path)


def _bad_splits(items: Sequence[manifest.Item]) -> Iterator[str]:
    names = {item.split for item in items}
    if None in names and len(names) > 1:
        without = next(item.id for item in items if item.split is None)
        yield f"{without}: has no split, and others have; fill in the column split, or remove it"
    for name in sorted(names - {None}):
        if name not in _SPLITS:
            yield f"split {name!r} is none of {', '.join(_SPLITS)}; {closest(name, _SPLITS)}"


class _Beside:
    """The names of the files in folders of any size, each listed once."""

    def __init__(self) -> None:
        self._names: dict[pathlib.Path, list[tuple[str, str]]] = {}

    def begin_like(self, video: pathlib.Path) -> Iterator[str]:
        """Names of what lies beside a video and begins with its name and a dot, in any case."""
        if video.parent not in self._names:
            listed = os.listdir(video.parent)
            self._names[video.parent] = sorted((name.lower(), name) for name in listed)
        names, begin = self._names[video.parent], f"{video.stem.lower()}."
        for lower, name in names[bisect.bisect_left(names, (begin, "")) :]:
            if not lower.startswith(begin):
                return
            yield name


def _source(item: manifest.Item, beside: _Beside) -> Source:
    manifest.check_id(item.id)
    for path in (item.video, item.subtitles, item.scores):
        if path is not None and files.in_bucket(path):
            raise UserError(f"{os.fspath(path)} is in a bucket; copy it to this machine")
    video = pathlib.Path(item.video)
    if not video.is_file():
        what = "is a folder" if video.is_dir() else "no such file"
        raise UserError(f"{video}: {what}; check the path")
    words = None if item.subtitles is None else os.fspath(item.subtitles)
    if words is None:
        spoken = subtitles.find_sidecar(video, beside.begin_like(video))
    else:
        spoken = None if words == "none" else pathlib.Path(words)
    if spoken is not None:
        subtitles.read_subtitles(spoken)
    if item.scores is not None:
        if not item.scores.is_file():
            raise UserError(f"{item.scores}: no such file of scores; check the path")
        read_scores(item.scores)
    told = [_sample(video), words if spoken is None else _digest(spoken.read_bytes())]
    title = item.title or video.stem.replace("_", " ")
    return Source(
        id=manifest.printable(item.id),
        video=str(video.absolute()),
        title=manifest.printable(title),
        subtitles=words if words in (None, "none") else os.path.abspath(words),
        scores=None if item.scores is None else os.path.abspath(item.scores),
        split=item.split,
        content=_digest(json.dumps(told).encode()),
        scores_content=None if item.scores is None else _digest(item.scores.read_bytes()),
    )


def _sample(path: pathlib.Path) -> str:
    """Tells files apart by size, both ends and samples; to read all of them would take long."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        read = [stream.read(_SAMPLE_BYTES)]
        for k in range(1, _NUM_SAMPLES + 1):
            stream.seek(size * k // (_NUM_SAMPLES + 1))
            read.append(stream.read(_INNER_BYTES))
        stream.seek(max(0, size - _SAMPLE_BYTES))
        read.append(stream.read(_SAMPLE_BYTES))
        return f"{size} {_digest(b''.join(read))}"


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
