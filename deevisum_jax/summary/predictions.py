"""Predictions of any method, from files: JSON, NPZ or HDF5, told apart by content, not by name.

    {"AwmHb44_ouw": [0.1, 0.7, ...], "video_2": {"scores": [...], "bounds": [[0, 2], [2, 4], ...]}}

Per video there are `scores`, and possibly either `bounds` (seconds, start and end of the segment of
each score) or `picks` (the native frame of each score, which holds until the next pick). Without
them the scores are one per native frame, or one per 15th frame (0, 15, 30, ...). In NPZ the keys
are `ID` or `ID/scores`, `ID/bounds`, `ID/picks`; in HDF5 there is a data set `ID` or a group of
that name. An id is the data set's, or the community's `video_i`, counted from 1.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import lzma
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import h5py
import numpy as np
from etils import epath

from deevisum_jax.errors import UserError, closest
from deevisum_jax.files import local_copy, locate, replacing
from deevisum_jax.summary import folds, protocols
from deevisum_jax.summary.protocols import Protocol, VideoGroundTruth, VideoResult

PICK_STEP = 15  # native frames between two picks of the community's features

_FIELDS = ("scores", "bounds", "picks")
_NAMED = 8  # ids that a message lists before it counts the rest
# Segments that end before half of the video, or after twice its length, are in another unit than
# seconds. (A file may last a little longer than what was annotated of it.)
_UNIT_FACTOR = 2.0
_GREATEST = 1e100  # of a score's amount; far greater ones cannot be added up


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """What one file says of one video; checked only where it meets the video."""

    path: str
    video_id: str
    scores: np.ndarray  # float64[M]
    bounds: np.ndarray | None = None  # float64[M, 2], seconds
    picks: np.ndarray | None = None  # float64[M], native frames

    @property
    def where(self) -> str:
        """File and video, for messages."""
        return f"{self.path}, {self.video_id}"


def read(
    path: str | os.PathLike,
    video_ids: Sequence[str],
    wanted: Iterable[str],
    *,
    numbered: bool = True,
) -> dict[str, Prediction]:
    """The predictions of a file, here or in a bucket.

    Args:
      path: of the file.
      video_ids: of the whole data set in its official order; what else the file names is an error.
      numbered: that order is one that all know, so videos may go by their numbers (`video_1`).
      wanted: those that must be there. Others may be, and are not read.

    Returns:
      Of every wanted video, in the order of `wanted`.

    Raises:
      UserError: the file is none of the three kinds or damaged; it names an unknown video or field,
        a video twice, or lacks a wanted one or its scores; something is no array of numbers.
    """
    path = os.fspath(path)
    wanted = list(wanted)
    with local_copy(locate(path)) as local, _open(path, local) as arrays:
        found = _by_video(path, arrays, video_ids, numbered)
        missing = [video for video in wanted if video not in found]
        if missing:
            raise UserError(
                f"{path} lacks {len(missing)} of {len(wanted)} videos that are evaluated: "
                f"{_some(missing)}; add their scores"
            )
        return {video: _prediction(path, video, found[video]) for video in wanted}


def names(path: str | os.PathLike, video_ids: Sequence[str], *, numbered: bool = True) -> set[str]:
    """The videos that a file has predictions of; as `read`, which reads them, too."""
    path = os.fspath(path)
    with local_copy(locate(path)) as local, _open(path, local) as arrays:
        return set(_by_video(path, arrays, video_ids, numbered))


def evaluate(
    prediction: Prediction, gt: VideoGroundTruth, protocol: Protocol = protocols.TVSUM
) -> VideoResult:
    """A prediction held against the annotators of its video.

    Raises:
      UserError: scores, bounds or picks do not fit the video, or a number is not finite; file and
        video are named.
    """
    scores, where = prediction.scores, prediction.where
    if not len(scores):
        raise UserError(f"{where}: there is no score; give at least one")
    if not np.isfinite(scores).all():
        first = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise UserError(
            f"{where}: score {first} of {len(scores)} is {scores[first]}; give finite scores only"
        )
    if np.abs(scores).max() > _GREATEST:
        first = int(np.abs(scores).argmax())
        raise UserError(
            f"{where}: score {first} of {len(scores)} is {scores[first]:g}; give scores of at most "
            f"{_GREATEST:g}, such as within [0, 1]"
        )
    if prediction.bounds is not None:
        bounds, scores = protocols.check_segments(where, prediction.bounds, scores)
        start, end = bounds[-1]
        if not 1 / _UNIT_FACTOR <= end / gt.duration_s <= _UNIT_FACTOR:
            raise UserError(
                f"{where}: the last segment is from {start:g} to {end:g}, and the video "
                f"lasts {gt.duration_s:g} s; give bounds in seconds over the whole video"
            )
        return protocols.evaluate_video(gt, bounds, scores, protocol)
    every = np.arange(0, gt.n_frames, PICK_STEP)
    if prediction.picks is not None:
        picks = _checked_picks(prediction, gt)
    elif len(scores) == gt.n_frames:
        return protocols.evaluate_frames(gt, scores, protocol)
    elif len(scores) == len(every):
        picks = every
    else:
        raise UserError(
            f"{where}: got {len(scores)} scores, which are neither {gt.n_frames} (one per native "
            f"frame) nor {len(every)} (one per {PICK_STEP}th frame); give as many, or bounds or "
            "picks with them"
        )
    lengths = np.diff(picks[1:], prepend=0, append=gt.n_frames)
    return protocols.evaluate_frames(gt, np.repeat(scores, lengths), protocol)


def write_npz(
    path: pathlib.Path | epath.Path, of_videos: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Writes segments and their scores as an NPZ file that `read` understands.

    Args:
      path: of the file, here or in a bucket; it appears only when complete.
      of_videos: video id -> bounds float[M, 2] in seconds, and scores float[M].
    """
    arrays = {}
    for video_id, (bounds, scores) in of_videos.items():
        arrays[f"{video_id}/scores"] = np.asarray(scores)
        arrays[f"{video_id}/bounds"] = np.asarray(bounds)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        np.savez(stream, **arrays)


# ---- Files: names of arrays, each read when it is asked for ----

_Arrays = Mapping[str, Callable[[], Any]]
# What the readers raise on files that are cut short, overwritten, of pickled objects or of other
# types, nested without end, or that tell a size beyond all memory.
_DAMAGED = (
    OSError, ValueError, TypeError, OverflowError, RuntimeError, EOFError, KeyError, MemoryError,
    struct.error, zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip


@contextlib.contextmanager
def _open(path: str, local: pathlib.Path) -> Iterator[_Arrays]:
    """The arrays of a file by name; JSON's objects and HDF5's groups become `ID/field`."""
    try:
        with local.open("rb") as stream:
            begin = stream.read(2)
    except (OSError, ValueError) as error:  # a path with a NUL is a ValueError
        why = getattr(error, "strerror", None) or error
        raise UserError(f"predictions {path} cannot be read ({why}); check the path") from None
    with contextlib.ExitStack() as stack:
        try:
            if h5py.is_hdf5(local):  # which need not begin the file
                arrays = _hdf5(path, stack.enter_context(h5py.File(local)))
            elif begin.startswith(b"PK"):
                stream = stack.enter_context(local.open("rb"))  # numpy would leave it open
                file = stack.enter_context(np.load(stream, allow_pickle=False))
                if twice := _repeated(file.files):
                    raise UserError(f"{path} names {_some(twice)} twice; name each once")
                arrays = {name: lambda name=name: file[name] for name in file.files}
            else:
                arrays = _json(path, local.read_text(encoding="utf-8"))
        except UserError:
            raise
        except _DAMAGED as error:
            raise UserError(
                f"predictions {path} cannot be read as JSON, NPZ or HDF5 ({error}); write one of "
                "these"
            ) from None
        yield arrays


def _hdf5(path: str, file: h5py.File) -> _Arrays:
    """All that the names lead to; `visititems` leaves out links and second names."""
    arrays: dict[str, Callable[[], Any]] = {}

    def walk(group: h5py.Group, start: str, above: tuple[h5py.Group, ...]) -> None:
        for name in group:
            item = group.get(name)
            if not isinstance(item, h5py.Group):
                # None: a link that leads nowhere; read, it says why.
                arrays[f"{start}{name}"] = lambda name=name: group[name][()]
            elif item in above:
                raise UserError(f"{path}: group {start}{name} contains itself; take the link out")
            elif not len(item):
                raise UserError(f"{path}, {start}{name} has no scores; give it a data set 'scores'")
            else:
                walk(item, f"{start}{name}/", (*above, item))

    walk(file, "", (file["/"],))
    return arrays


def _json(path: str, text: str) -> _Arrays:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if twice := _repeated(name for name, _ in pairs):
            raise UserError(f"{path} names {_some(twice)} twice; name each once")
        return dict(pairs)

    content = json.loads(text, object_pairs_hook=unique)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; write {{video id: scores, ...}}")
    values = []
    for video, value in content.items():
        if isinstance(value, dict):
            if not value:
                raise UserError(f"{path}, {video} has no scores; give it a field 'scores'")
            values += [(f"{video}/{field}", v) for field, v in value.items()]
        else:
            values.append((video, value))
    if twice := _repeated(name for name, _ in values):
        raise UserError(f"{path} gives {_some(twice)} twice; give each once")
    return {name: lambda value=value: value for name, value in values}


def _repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in collections.Counter(names).items() if count > 1]


def _by_video(
    path: str, arrays: _Arrays, video_ids: Sequence[str], numbered: bool
) -> dict[str, dict[str, Callable[[], Any]]]:
    """The fields of every video that a file names, by the data set's own ids."""
    found: dict[str, dict[str, Callable[[], Any]]] = {}
    named: dict[str, str] = {}  # by what a video is called in the file
    for name, array in arrays.items():
        key, field = name, "scores"
        if folds.resolve(name, video_ids, numbered=numbered) is None and "/" in name:
            key, _, field = name.rpartition("/")
        video = folds.resolve(key, video_ids, numbered=numbered)
        if video is None:
            raise UserError(
                f"{path} names {key!r}, which is {folds.unknown(key, video_ids, numbered=numbered)}"
            )
        if named.setdefault(video, key) != key or field in found.get(video, {}):
            raise UserError(
                f"{path} gives {video} twice, as {named[video]!r} and as {name!r}; name it once"
            )
        found.setdefault(video, {})[field] = array
    for video, fields in found.items():
        if "scores" not in fields:
            raise UserError(
                f"{path}, {named[video]} lacks the field 'scores', it has {_some(sorted(fields))}; "
                "add the scores"
            )
        for field in sorted(fields.keys() - set(_FIELDS)):
            raise UserError(
                f"{path}, {named[video]} has an unknown field {field!r}; {closest(field, _FIELDS)}"
            )
        if {"bounds", "picks"} <= fields.keys():
            raise UserError(f"{path}, {named[video]} has both bounds and picks; give one of them")
    return found


def _prediction(path: str, video: str, fields: Mapping[str, Callable[[], Any]]) -> Prediction:
    arrays = {field: _numbers(f"{path}, {video}: {field}", fields[field]) for field in fields}
    for field, ndim, shape in (("scores", 1, "[M]"), ("picks", 1, "[M]"), ("bounds", 2, "[M, 2]")):
        if field in arrays and arrays[field].ndim != ndim:
            raise UserError(
                f"{path}, {video}: {field} must have the shape {shape}, got "
                f"{list(arrays[field].shape)}"
            )
    return Prediction(path=path, video_id=video, **arrays)


def _numbers(where: str, array: Callable[[], Any]) -> np.ndarray:
    """float64 of whatever shape."""
    try:
        values = np.asarray(array())
    except _DAMAGED as error:
        raise UserError(f"{where} cannot be read ({error}); write plain arrays") from None
    if values.dtype.kind not in "biuf":
        raise UserError(
            f"{where} must be numbers, got values of type {values.dtype}; write plain arrays"
        )
    with np.errstate(over="ignore"):  # long double; what becomes infinite is refused as such
        return values.astype(np.float64)


def _checked_picks(prediction: Prediction, gt: VideoGroundTruth) -> np.ndarray:
    """int64[M], ascending native frames."""
    picks = prediction.picks
    if len(picks) != len(prediction.scores):
        raise UserError(
            f"{prediction.where}: got {len(prediction.scores)} scores and {len(picks)} picks; give "
            "one pick per score"
        )
    inside = (picks >= 0) & (picks < gt.n_frames)  # not of NaN
    if not inside.all() or (picks % 1 != 0).any() or (np.diff(picks) <= 0).any():
        raise UserError(
            f"{prediction.where}: picks must be native frames, ascending within 0 to "
            f"{gt.n_frames - 1}, got {picks.min():g} to {picks.max():g}; sort them"
        )
    return picks.astype(np.int64)


def _some(names: Sequence[str]) -> str:
    listed = ", ".join(names[:_NAMED])
    return listed if len(names) <= _NAMED else f"{listed} and {len(names) - _NAMED} more"
