"""TVSum's annotations, from the .mat or the two .tsv files of the official download.

    videos = load(pathlib.Path("ydata-tvsum50-v1_1"))
    videos[0].video_id, videos[0].user_scores.shape   # "AwmHb44_ouw", (20, 10597)

Annotators scored shots of two seconds from 1 to 5; the files repeat a shot's score for all of its
frames (Song et al., "TVSum: Summarizing Web Videos Using Titles", CVPR 2015).
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import warnings
from collections.abc import Iterator, Sequence

import h5py
import numpy as np

from deevisum_jax.errors import UserError
from tfds_builders import downloads

# In the order of the .mat, by which the community numbers them (the first is `video_1`): id, native
# frames, seconds. The .tsv files tell lengths in whole seconds only, which would put the frames of
# a video in the wrong place by up to half a second.
_VIDEOS = (
    ("AwmHb44_ouw", 10597, 353.593),
    ("98MoyGZKHXc", 4688, 187.524),
    ("J0nA4VgnoCo", 14019, 584.725),
    ("gzDbaEs1Rlg", 7210, 288.415),
    ("XzYM3PfTM4w", 3327, 111.015),
    ("HT5vyqe0Xaw", 9671, 322.711),
    ("sTEELN-vY30", 4468, 148.956),
    ("vdmoEJ5YbrQ", 9870, 329.352),
    ("xwqBXPGE9pQ", 7010, 233.918),
    ("akI8YFjEmUw", 3995, 133.306),
    ("i3wAGJaaktw", 4700, 156.828),
    ("Bhxk-O1Y7Ho", 13511, 450.839),
    ("0tmA_C6XwfM", 3532, 141.293),
    ("3eYKfiOEJNs", 4853, 194.142),
    ("xxdtq8mxegs", 4324, 144.149),
    ("WG0MBPpPC6I", 9534, 397.689),
    ("Hl-__g2gn_A", 5846, 243.833),
    ("Yi4Ij2NM7U4", 9731, 405.467),
    ("37rzWOQsNIw", 5742, 191.611),
    ("LRw_obCPUt0", 6241, 260.319),
    ("cjibtmSLxQ4", 19406, 647.535),
    ("b626MiF1ew4", 5661, 235.891),
    ("XkqCExn6_Us", 5631, 187.896),
    ("GsAD1KT1xo8", 4356, 145.357),
    ("PJrm840pAUI", 6580, 274.181),
    ("91IHQYk1IQM", 3312, 110.527),
    ("RBCABdttQmI", 10917, 364.275),
    ("z_6gVvQb2d0", 8281, 276.317),
    ("fWutDQy1nnY", 17527, 585.863),
    ("4wU_LUjG5Ic", 4005, 167.044),
    ("VuWGsYPqAX8", 5412, 216.503),
    ("JKpqYvAdIsw", 3802, 152.091),
    ("xmEERLqJ2kU", 13365, 445.962),
    ("byxOvuiIJV0", 3705, 154.552),
    ("_xMr-HKMfVA", 4463, 148.933),
    ("WxtbjNsCQ8A", 7959, 265.567),
    ("uGu_10sucQo", 4009, 167.044),
    ("EE-bNr36nyA", 2941, 98.151),
    ("Se3oxnaPsz0", 4165, 138.867),
    ("oDXZc0tZe04", 11414, 380.854),
    ("qqR6AEXwxoQ", 8073, 269.375),
    ("EYqVtI9YWJA", 5939, 198.182),
    ("eQu1rNs0an0", 4931, 164.537),
    ("JgHubY5Vw3Y", 4304, 143.615),
    ("iVt07TCkFM0", 2500, 104.281),
    ("E11zDS9XGzg", 15307, 510.235),
    ("NyBmCxDoHJU", 4740, 189.614),
    ("kLxoNp-UchI", 3896, 130.008),
    ("jcoYJXDG9sw", 5971, 199.25),
    ("-esJrBWj2d8", 6912, 230.412),
)
VIDEO_IDS = tuple(video_id for video_id, _, _ in _VIDEOS)
_LENGTHS_S = {(video_id, n_frames): length_s for video_id, n_frames, length_s in _VIDEOS}

POINT_FRAMES = 15  # the field compares scores at every 15th native frame

_FOLDERS = ("", "ydata-tvsum50-v1_1/", "tvsum50_ver_1_1/ydata-tvsum50-v1_1/")
_MATS = tuple(
    f"{folder}{name}/ydata-tvsum50.mat"
    for folder in _FOLDERS
    for name in ("matlab", "ydata-tvsum50-matlab/matlab", "ydata-tvsum50-matlab")
)
_TSV_FOLDERS = tuple(
    f"{folder}{name}"
    for folder in _FOLDERS
    for name in ("data", "ydata-tvsum50-data/data", "ydata-tvsum50-data")
)
_VIDEO_FOLDERS = tuple(
    f"{folder}{name}"
    for folder in _FOLDERS
    for name in ("video", "ydata-tvsum50-video/video", "ydata-tvsum50-video")
)
_ANNO, _INFO = "ydata-tvsum50-anno.tsv", "ydata-tvsum50-info.tsv"
# What h5py raises of a damaged file, and Python of cells that hold something else.
_UNREADABLE = (
    OSError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, OverflowError,
)  # fmt: skip
_ADVICE = "give the official file of tvsum50_ver_1_1.tgz"


@dataclasses.dataclass(frozen=True)
class VideoAnnotation:
    """What people said of one video, on the timeline of the video that they saw."""

    video_id: str
    title: str
    category: str  # two letters, such as "VT" (changing a vehicle's tire)
    length_s: float
    n_frames: int  # native
    user_scores: np.ndarray  # float32[U, n_frames], 1 to 5

    @property
    def point_scores(self) -> np.ndarray:
        """float32[U, N]: the scores at frames 0, 15, 30, ..."""
        return self.user_scores[:, ::POINT_FRAMES]

    @property
    def point_times(self) -> np.ndarray:
        """float64[N]: the middle of frames 0, 15, 30, ... in seconds."""
        frames = np.arange(0, self.n_frames, POINT_FRAMES)
        return (frames + 0.5) * self.length_s / self.n_frames


def load(manual_dir: pathlib.Path) -> list[VideoAnnotation]:
    """The annotations of all 50 videos in the official order.

    Raises:
      UserError: there are none, they are not the official ones, or scores are not numbers.
    """
    return read(find(manual_dir))


def read(paths: Sequence[pathlib.Path]) -> list[VideoAnnotation]:
    """The annotations of the files that `find` gives.

    Raises:
      UserError: as `load`.
    """
    found = read_mat(paths[0]) if len(paths) == 1 else read_tsv(*paths)
    return _official(found, paths[0])


def find(manual_dir: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """The .mat, or else the two .tsv files (scores, what is scored) of a download.

    Raises:
      UserError: neither is there.
    """
    found = _find(manual_dir)
    if not found:
        raise UserError(
            f"{manual_dir}: TVSum's annotations are not there, neither matlab/ydata-tvsum50.mat "
            f"nor data/{_ANNO} and data/{_INFO}; give the folder that tvsum50_ver_1_1.tgz and the "
            f"archives in it were unpacked in{downloads.another_level(manual_dir, _find)}"
        )
    return found


def _find(manual_dir: pathlib.Path) -> tuple[pathlib.Path, ...]:
    if mat := downloads.first_file(manual_dir, _MATS):
        return (mat,)
    for folder in _TSV_FOLDERS:
        pair = (manual_dir / folder / _ANNO, manual_dir / folder / _INFO)
        if all(path.is_file() for path in pair):
            return pair
    return ()


def video_folder(manual_dir: pathlib.Path) -> pathlib.Path | None:
    """Where the videos of a download are, or None."""
    return downloads.first_folder(manual_dir, _VIDEO_FOLDERS, downloads.VIDEO_ENDINGS)


def read_mat(path: pathlib.Path) -> list[VideoAnnotation]:
    """The annotations of ydata-tvsum50.mat (MATLAB 7.3, which is HDF5), in its order.

    Raises:
      UserError: it is another kind of file, lacks a field, or a video's scores are not right.
    """
    with path.open("rb") as file:
        if file.read(20).startswith(b"MATLAB 5.0"):
            raise UserError(f"{path} is a MATLAB 5 file, and TVSum's is MATLAB 7.3; {_ADVICE}")
    try:
        file = h5py.File(path)
    except OSError as error:
        raise UserError(f"{path} is not the HDF5 file that TVSum's .mat is ({error})") from None
    with file:
        table = file.get("tvsum50")
        names = ("video", "title", "category", "length", "nframes", "user_anno")
        if not isinstance(table, h5py.Group):
            holds = ", ".join(file) or "nothing"
            raise UserError(
                f"{path} is HDF5 without a struct 'tvsum50' (it holds {holds}); {_ADVICE}"
            )
        if missing := [name for name in names if name not in table]:
            raise UserError(f"{path}: tvsum50 lacks the field {missing[0]!r}; {_ADVICE}")
        try:
            columns = {name: table[name][()].ravel() for name in names}
        except _UNREADABLE as error:
            raise UserError(f"{path}: tvsum50 cannot be read ({error}); {_ADVICE}") from None
        found = []
        for row in range(len(columns["video"])):
            try:
                cells = {name: file[column[row]][()] for name, column in columns.items()}
                video_id, title, category = (
                    "".join(map(chr, cells[name].ravel()))
                    for name in ("video", "title", "category")
                )
                length_s, n_frames = float(cells["length"].item()), int(cells["nframes"].item())
                scores = np.asarray(cells["user_anno"], np.float32)
            except _UNREADABLE as error:
                raise UserError(
                    f"{path}: row {row + 1} of tvsum50 cannot be read ({error}); {_ADVICE}"
                ) from None
            found.append(_checked(path, video_id, title, category, length_s, n_frames, scores))
    return found


def read_tsv(anno: pathlib.Path, info: pathlib.Path) -> list[VideoAnnotation]:
    """The annotations of ydata-tvsum50-anno.tsv and -info.tsv, in the order of the latter.

    Rows of the first: video id, category, comma-separated scores of all frames; one for each
    annotator. Of the second: category, video id, title, address, length as minutes:seconds.

    Raises:
      UserError: a row is of another form, a video is in one of them only, or its scores are not
        right.
    """
    scores: dict[str, list[np.ndarray]] = {}
    for number, row in _rows(anno, 3):
        video_id, _, values = row
        scores.setdefault(video_id, []).append(_numbers(values, f"{anno}, line {number}"))
    found = []
    for number, row in _rows(info, 5):
        category, video_id, title, _, length = row
        if (category, video_id) == ("category", "video_id"):
            continue  # the head of the table
        minutes, colon, seconds = length.partition(":")
        if not (colon and minutes.isdecimal() and seconds.isdecimal()):
            raise UserError(
                f"{info}, line {number}: the length of {video_id} is {length!r}, wanted "
                f"minutes:seconds; {_ADVICE}"
            )
        rows = scores.pop(video_id, [])
        if not rows:
            raise UserError(f"{anno} has no scores of video {video_id} of {info}; {_ADVICE}")
        if len({len(row) for row in rows}) > 1:
            counts = sorted({len(row) for row in rows})
            raise UserError(
                f"{anno}: annotators scored {counts[0]} and {counts[-1]} frames of the same video, "
                f"{video_id}; {_ADVICE}"
            )
        n_frames, length_s = len(rows[0]), 60.0 * int(minutes) + int(seconds)
        exact_s = _LENGTHS_S.get((video_id, n_frames), length_s)
        length_s = exact_s if abs(exact_s - length_s) <= 1 else length_s
        found.append(_checked(anno, video_id, title, category, length_s, n_frames, np.stack(rows)))
    if scores:
        raise UserError(f"{info} does not know video {next(iter(scores))} of {anno}; {_ADVICE}")
    return found


def _rows(path: pathlib.Path, num_columns: int) -> Iterator[tuple[int, list[str]]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is no text ({error}); {_ADVICE}") from None
    # Titles may hold what `splitlines` takes for ends of lines.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        row = line.removesuffix("\r").split("\t")
        if len(row) != num_columns:
            raise UserError(
                f"{path}, line {number}: {len(row)} columns between tabs, wanted {num_columns}; "
                f"{_ADVICE}"
            )
        yield number, row


def _numbers(text: str, where: str) -> np.ndarray:
    """float32[n] of comma-separated numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # numpy only warns of what it cannot read
        try:
            return np.fromstring(text, np.float32, sep=",")
        except (ValueError, DeprecationWarning):
            raise UserError(f"{where}: the scores are no list of numbers; {_ADVICE}") from None


def _checked(
    path: pathlib.Path,
    video_id: str,
    title: str,
    category: str,
    length_s: float,
    n_frames: int,
    scores: np.ndarray,
) -> VideoAnnotation:
    if (
        scores.ndim != 2
        or scores.shape[1] != n_frames
        or not scores.size
        or not 0 < length_s < np.inf
    ):
        raise UserError(
            f"{path}: video {video_id} has {n_frames} frames in {length_s} s and scores of shape "
            f"{list(scores.shape)}, wanted [annotators, {n_frames}]; {_ADVICE}"
        )
    if not np.isfinite(scores).all():
        user, frame = (int(k) for k in np.argwhere(~np.isfinite(scores))[0])
        raise UserError(
            f"{path}: the score of annotator {user + 1} for frame {frame} of video {video_id} is "
            f"{scores[user, frame]}; {_ADVICE}"
        )
    return VideoAnnotation(video_id, _plain(title), category, length_s, n_frames, scores)


def _plain(title: str) -> str:
    """A title as its video had it.

    Some are in quotation marks, and in the .mat every byte of what was UTF-8 became a letter.
    """
    with contextlib.suppress(UnicodeError):
        title = title.encode("latin-1").decode("utf-8")
    return title.strip('"')


def _official(found: Sequence[VideoAnnotation], path: pathlib.Path) -> list[VideoAnnotation]:
    by_id = {video.video_id: video for video in found}
    if missing := [video_id for video_id in VIDEO_IDS if video_id not in by_id]:
        raise UserError(
            f"{path} annotates {len(by_id)} videos, of TVSum's 50 not {', '.join(missing)}; "
            f"{_ADVICE}"
        )
    if others := sorted(by_id.keys() - set(VIDEO_IDS)):
        raise UserError(f"{path}: {others[0]} is no video of TVSum; {_ADVICE}")
    return [by_id[video_id] for video_id in VIDEO_IDS]
