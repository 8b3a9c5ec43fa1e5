"""SumMe's annotations, from the GT/*.mat of the official download (MATLAB 5).

    videos = load(pathlib.Path("SumMe"))
    videos[0].video_id, videos[0].user_summary.shape   # "Air_Force_One", (15, 4494)

Every person cut a summary of 5 to 15 % of the video (Gygli et al., "Creating Summaries from User
Videos", ECCV 2014). `user_score` numbers the parts in the order in which they were chosen, so that
whatever is above 0 is in the summary.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
import scipy.io
import scipy.sparse

from deevisum_jax.errors import UserError
from tfds_builders import downloads

# As the community numbers them (the first is `video_1`): by name, capitals first.
VIDEO_IDS = (
    "Air_Force_One",
    "Base jumping",
    "Bearpark_climbing",
    "Bike Polo",
    "Bus_in_Rock_Tunnel",
    "Car_railcrossing",
    "Cockpit_Landing",
    "Cooking",
    "Eiffel Tower",
    "Excavators river crossing",
    "Fire Domino",
    "Jumps",
    "Kids_playing_in_leaves",
    "Notre_Dame",
    "Paintball",
    "Playing_on_water_slide",
    "Saving dolphines",
    "Scuba",
    "St Maarten Landing",
    "Statue of Liberty",
    "Uncut_Evening_Flight",
    "Valparaiso_Downhill",
    "car_over_camera",
    "paluma_jump",
    "playing_ball",
)

_GT_FOLDERS = ("GT", "SumMe/GT")
_VIDEO_FOLDERS = ("videos", "SumMe/videos")
_MAT = (".mat",)
_FIELDS = ("user_score", "FPS", "nFrames", "video_duration")
_ADVICE = "give the official file of SumMe.zip"


@dataclasses.dataclass(frozen=True)
class VideoAnnotation:
    """Which frames people put into their summaries of one video."""

    video_id: str
    native_fps: float
    video_duration_s: float  # of the file that people saw, which may end after its pictures do
    n_frames: int  # native
    user_summary: np.ndarray  # uint8[U, n_frames], 1 = in the summary

    @property
    def length_s(self) -> float:
        """How long the annotated frames last.

        Not `video_duration_s`, which is up to 1.4 s more: frame k was shown at k / native_fps.
        """
        return self.n_frames / self.native_fps

    @property
    def frame_times(self) -> np.ndarray:
        """float64[n_frames]: the middle of every frame in seconds."""
        return (np.arange(self.n_frames) + 0.5) / self.native_fps


def load(manual_dir: pathlib.Path) -> list[VideoAnnotation]:
    """The annotations of all 25 videos in the community's order.

    Raises:
      UserError: some are not there, or one is not an official file.
    """
    return read(find(manual_dir))


def read(paths: Sequence[pathlib.Path]) -> list[VideoAnnotation]:
    """The annotations of the files that `find` gives.

    Raises:
      UserError: as `read_mat`.
    """
    return [read_mat(path) for path in paths]


def find(manual_dir: pathlib.Path) -> list[pathlib.Path]:
    """The 25 .mat files of a download, in the community's order.

    Raises:
      UserError: they are not all there, or there are others.
    """
    folder = gt_folder(manual_dir)
    if folder is None:
        raise UserError(
            f"{manual_dir}: SumMe's annotations, GT/*.mat, are not there; give the folder that "
            f"SumMe.zip was unpacked in{downloads.another_level(manual_dir, gt_folder)}"
        )
    there = downloads.by_stem(downloads.list_files(folder, _MAT))
    if missing := [video_id for video_id in VIDEO_IDS if video_id not in there]:
        raise UserError(
            f"{folder} has no annotations of {', '.join(missing)}; unpack SumMe.zip again"
        )
    if others := sorted(there.keys() - set(VIDEO_IDS)):
        raise UserError(f"{there[others[0]]} is of no video of SumMe; move it elsewhere")
    return [there[video_id] for video_id in VIDEO_IDS]


def gt_folder(manual_dir: pathlib.Path) -> pathlib.Path | None:
    """Where the annotations of a download are, or None."""
    return downloads.first_folder(manual_dir, _GT_FOLDERS, _MAT)


def video_folder(manual_dir: pathlib.Path) -> pathlib.Path | None:
    """Where the videos of a download are, or None."""
    return downloads.first_folder(manual_dir, _VIDEO_FOLDERS, downloads.VIDEO_ENDINGS)


def read_mat(path: pathlib.Path) -> VideoAnnotation:
    """The annotations of one video; the file is called as it is.

    Raises:
      UserError: it is another kind of file, lacks a field, or holds something else there.
    """
    try:
        content: Mapping[str, np.ndarray] = scipy.io.loadmat(path, variable_names=_FIELDS)
    except NotImplementedError:
        raise UserError(
            f"{path} is a MATLAB 7.3 file, and SumMe's are MATLAB 5; {_ADVICE}"
        ) from None
    except Exception as error:  # scipy raises whatever it stumbles over in a damaged file
        raise UserError(f"{path} is no MATLAB file that can be read ({error}); {_ADVICE}") from None
    if missing := [name for name in _FIELDS if name not in content]:
        raise UserError(f"{path}: there is no {missing[0]!r} in it; {_ADVICE}")
    scores = content["user_score"]
    try:
        n_frames, fps, duration_s = (
            float(content[name].item()) for name in ("nFrames", "FPS", "video_duration")
        )
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: nFrames, FPS or video_duration: {error}; {_ADVICE}") from None
    if not all(0 < value < np.inf for value in (n_frames, fps, duration_s)):
        raise UserError(
            f"{path}: nFrames is {n_frames:g}, FPS {fps:g} and video_duration {duration_s:g}, "
            f"wanted numbers above 0; {_ADVICE}"
        )
    if scores.ndim != 2 or scores.shape[0] != n_frames or 0 in scores.shape:
        raise UserError(
            f"{path}: user_score is of shape {list(scores.shape)} and nFrames {n_frames:g}, wanted "
            f"[{n_frames:g}, annotators]; {_ADVICE}"
        )
    if scipy.sparse.issparse(scores):
        scores = scores.toarray()
    if scores.dtype.kind not in "buif":
        raise UserError(f"{path}: user_score holds {scores.dtype}, wanted numbers; {_ADVICE}")
    if not np.isfinite(scores).all():
        frame, user = (int(k) for k in np.argwhere(~np.isfinite(scores))[0])
        raise UserError(
            f"{path}: the score of annotator {user + 1} for frame {frame} of video {path.stem} is "
            f"{scores[frame, user]}; {_ADVICE}"
        )
    summary = np.ascontiguousarray((scores > 0).T, np.uint8)
    return VideoAnnotation(path.stem, fps, duration_s, int(n_frames), summary)
