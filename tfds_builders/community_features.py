"""Features in the HDF5 layout that the field's papers share since 2016.

One group for each video, `video_1`, `video_2`, ... (Zhang et al., "Video Summarization with Long
Short-term Memory", ECCV 2016; published so by Zhou et al., AAAI 2018):

    features [T, D], gtscore [T], picks [T]           T frames described, by native frame number
    user_summary [U, n_frames], n_frames, n_steps = T
    change_points [S, 2], n_frame_per_seg [S]         last frames included
    video_name                                        not in every file
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import h5py
import numpy as np

from deevisum_jax.errors import UserError, closest

_DIMENSIONS = {
    "features": 2, "gtscore": 1, "user_summary": 2, "change_points": 2, "n_frames": 0,
    "n_frame_per_seg": 1, "picks": 1, "n_steps": 0,
}  # fmt: skip
_WHOLE = ("change_points", "n_frames", "n_frame_per_seg", "picks", "n_steps")
_SHAPES = {0: "one number", 1: "a list", 2: "a table"}
_ADVICE = "take another file of features"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Described:
    """One group of such a file."""

    features: np.ndarray  # float16[T, D]
    gtscore: np.ndarray  # float32[T]
    picks: np.ndarray  # int32[T], ascending native frames
    user_summary: np.ndarray  # uint8[U, n_frames]
    change_points: np.ndarray  # int32[S, 2], half-open, without gaps from 0 to n_frames
    n_frames: int

    def fields(self) -> dict[str, Any]:
        """The fields of a record (`records.py`) that only such a file gives."""
        return {
            "features": self.features,
            "gtscore": self.gtscore,
            "picks": self.picks,
            "n_steps": len(self.picks),
            "n_frame_per_seg": np.diff(self.change_points, axis=1)[:, 0].astype(np.int32),
        }


def read(path: pathlib.Path, video_ids: Sequence[str]) -> dict[str, Described]:
    """All videos of a file by their ids.

    Args:
      path: the file.
      video_ids: of the data set in its official order: without `video_name`, `video_1` is the
        first.

    Raises:
      UserError: it is no such file, is damaged, lacks a field, names unknown videos, or its arrays
        do not fit each other.
    """
    try:
        file = h5py.File(path)
    except OSError as error:
        raise UserError(f"{path} is not an HDF5 file ({error}); download it again") from None
    found: dict[str, Described] = {}
    with file:
        try:
            groups = dict(file.items())
        except (OSError, RuntimeError, KeyError) as error:
            raise UserError(f"{path} is damaged ({error}); download it again") from None
        for key, group in groups.items():
            where = f"{path}, group {key!r}"
            if not isinstance(group, h5py.Group):
                raise UserError(f"{where} is no group of a video; {_ADVICE}")
            video_id = _video_id(where, key, group, video_ids)
            if video_id in found:
                raise UserError(f"{where}: {video_id} is in the file twice; take one out")
            found[video_id] = _described(f"{where} ({video_id})", group)
    if not found:
        raise UserError(f"{path} holds no videos; download it again")
    return found


def _video_id(where: str, key: str, group: h5py.Group, video_ids: Sequence[str]) -> str:
    if "video_name" in group:
        name = _value(where, group, "video_name")
        name = name.item() if name.size == 1 else None
        with contextlib.suppress(UnicodeDecodeError):
            name = name.decode() if isinstance(name, bytes) else name
        if not isinstance(name, str):
            raise UserError(f"{where}: video_name is no text; {_ADVICE}")
        if name not in video_ids:
            raise UserError(
                f"{where}: its video_name is {name!r}, no video of this data set; "
                f"{closest(name, video_ids)}"
            )
        return name
    number = key.removeprefix("video_")
    if not (number.isdecimal() and 1 <= int(number) <= len(video_ids)):
        raise UserError(
            f"{where}: groups are called video_1 to video_{len(video_ids)}, or have a video_name"
        )
    return video_ids[int(number) - 1]


def _described(where: str, group: h5py.Group) -> Described:
    values = {name: _numbers(where, group, name) for name in _DIMENSIONS}
    n_frames, n_steps = values["n_frames"].item(), values["n_steps"].item()
    features, picks = values["features"], values["picks"]
    if values["change_points"].shape[1] != 2:
        shape = list(values["change_points"].shape)
        raise UserError(f"{where}: change_points is of shape {shape}, wanted [S, 2]; {_ADVICE}")
    bounds = values["change_points"] + np.array([0, 1])  # ends are included in the file
    lengths = bounds[:, 1] - bounds[:, 0]
    problem = ""
    if not len(bounds) or bounds[0, 0] or bounds[-1, 1] != n_frames or (lengths < 1).any():
        problem = f"change_points do not lead from frame 0 to the last of {n_frames} frames"
    elif (bounds[1:, 0] != bounds[:-1, 1]).any():
        problem = "change_points leave out frames between shots, or overlap"
    elif not np.array_equal(values["n_frame_per_seg"], lengths):
        problem = "n_frame_per_seg are not the lengths of change_points"
    elif not len(features) == len(picks) == len(values["gtscore"]) == n_steps:
        problem = (
            f"{len(features)} features, {len(picks)} picks, {len(values['gtscore'])} gtscores and "
            f"n_steps={n_steps}, wanted as many of each"
        )
    elif not len(picks) or picks[0] < 0 or picks[-1] >= n_frames or (np.diff(picks) <= 0).any():
        problem = f"picks do not ascend within {n_frames} frames"
    elif values["user_summary"].shape[1] != n_frames:
        problem = (
            f"user_summary is of shape {list(values['user_summary'].shape)}, wanted "
            f"[annotators, {n_frames}]"
        )
    elif np.abs(features).max(initial=0) > np.finfo(np.float16).max:
        problem = (
            f"features go up to {np.abs(features).max():g}, and float16, as which they are stored, "
            "to 65504; scale them down"
        )
    if problem:
        raise UserError(f"{where}: {problem}; {_ADVICE}")
    return Described(
        features=features.astype(np.float16),
        gtscore=values["gtscore"].astype(np.float32),
        picks=picks.astype(np.int32),
        user_summary=(values["user_summary"] > 0).astype(np.uint8),
        change_points=bounds.astype(np.int32),
        n_frames=n_frames,
    )


def _value(where: str, group: h5py.Group, name: str) -> np.ndarray:
    """What a field holds, whatever it is."""
    if name not in group:
        raise UserError(f"{where}: there is no field {name!r}; add it, or {_ADVICE}")
    try:
        field = group[name]
        if isinstance(field, h5py.Dataset):
            return np.asarray(field[()])
    except (OSError, RuntimeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{where}: {name} cannot be read ({error}); download the file again"
        ) from None
    raise UserError(f"{where}: {name} is a group, wanted an array; {_ADVICE}")


def _numbers(where: str, group: h5py.Group, name: str) -> np.ndarray:
    """A field of finite numbers with as many dimensions as it should have.

    One number may lie in an array, and a list in a table of one row or column, as MATLAB has them.
    """
    value, ndim = _value(where, group, name), _DIMENSIONS[name]
    if value.dtype.kind not in "biuf":
        raise UserError(f"{where}: {name} holds {value.dtype}, wanted numbers; {_ADVICE}")
    if ndim == 0 and value.size == 1:
        value = value.reshape(())
    elif ndim == 1 and value.ndim == 2 and 1 in value.shape:
        value = value.ravel()
    if value.ndim != ndim:
        raise UserError(
            f"{where}: {name} is of shape {list(value.shape)}, wanted {_SHAPES[ndim]}; {_ADVICE}"
        )
    if not np.isfinite(value).all():
        raise UserError(f"{where}: {name} holds what is not a finite number; {_ADVICE}")
    if name not in _WHOLE:
        return value
    if (value != np.round(value)).any() or (np.abs(value.astype(float)) >= 2**31).any():
        raise UserError(f"{where}: {name} holds what is no whole number of frames; {_ADVICE}")
    return value.astype(np.int64)
