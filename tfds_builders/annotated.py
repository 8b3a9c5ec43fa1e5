"""What TVSum and SumMe have in common: videos of a download, and annotations made on them.

People saw the original files. The files at hand may have been cut out of other containers or
encoded again, at another frame rate even, so that nothing here counts their frames: pictures lie on
the file's timeline, annotations on that of the original, and both are in seconds from the first
picture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from deevisum_jax.errors import UserError
from deevisum_jax.summary import select
from tfds_builders import community_features, downloads, media_record
from tfds_builders.community_features import Described
from tfds_builders.records import (
    ALL,
    ALLOW_MISSING,
    MANUAL_DIR,
    PARTIAL,
    encoded,
    record_features,
)

# Half of the two seconds for which TVSum's annotators gave one score. Files that were encoded again
# end up to a sampled frame off (0.18 s at 3 frames per second), and containers round and pad by
# less; another cut or upload of a video is off by seconds.
_TOLERANCE_S = 1.0


@dataclasses.dataclass(kw_only=True)
class VideosConfig(tfds.core.BuilderConfig):
    """What is stored of a data set."""

    frame_rate: float | None  # stored pictures per second; None: features instead of videos
    sound: bool
    allow_missing: bool  # build it of the videos that are there


def configs() -> list[VideosConfig]:
    """1fps, 2fps, 1fps_silent, 2fps_silent and features, and each without the missing videos."""
    made = []
    for ending, missing in (("", False), (PARTIAL, True)):
        without = " Of the videos that were there." if missing else ""
        for frame_rate in (1.0, 2.0):
            for silent in (False, True):
                made.append(
                    VideosConfig(
                        name=f"{frame_rate:.0f}fps{'_silent' if silent else ''}{ending}",
                        description=f"{frame_rate:.0f} pictures of 256 x 256 per second, "
                        f"with{'out' if silent else ''} sound.{without}",
                        frame_rate=frame_rate,
                        sound=not silent,
                        allow_missing=missing,
                    )
                )
        made.append(
            VideosConfig(
                name=f"features{ending}",
                description=f"Features of an HDF5 file, no pictures and no sound.{without}",
                frame_rate=None,
                sound=False,
                allow_missing=missing,
            )
        )
    return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Annotated:
    """What is known of a video without its file, on the timeline of the original."""

    video_id: str
    title: str
    category: str
    n_frames: int
    length_s: float
    longest_s: float  # of the original's file, which may end after its pictures
    score_times: np.ndarray  # float[N], seconds
    user_scores: np.ndarray  # float32[U, N]
    # One of the two, [U, n_frames]: scores, of which a knapsack over shots makes summaries, or the
    # summaries, where people gave those.
    frame_scores: np.ndarray | None
    user_summary: np.ndarray | None

    def fields(
        self, change_points: np.ndarray, user_summary: np.ndarray | None = None
    ) -> dict[str, Any]:
        """The fields of a record (`records.py`) but those that only files give.

        Args:
          change_points: int[S, 2], native frames.
          user_summary: [U, n_frames], summaries that somebody has made of the scores; taken where
            people gave none, and before those of our knapsack, which differ by ties.
        """
        summary = user_summary if self.user_summary is None else self.user_summary
        if summary is None:
            summary = select.annotator_summaries(
                self.frame_scores, change_points, self.n_frames, select.DEFAULT_BUDGET
            )
        return {
            "video_id": self.video_id,
            "title": self.title,
            "category": self.category,
            "captions": [],
            "score_times": self.score_times.astype(np.float32),
            "user_scores": self.user_scores,
            "user_summary": summary.astype(np.uint8),
            "change_points": change_points.astype(np.int32),
            "n_frames": self.n_frames,
            "native_fps": self.n_frames / self.length_s,
            "duration_s": self.length_s,
        }


class AnnotatedBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set in one split, `ALL`, in its official order."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = configs()
    VIDEO_IDS: tuple[str, ...]  # all, in the official order, by which the community numbers them
    DESCRIPTION: str
    HOMEPAGE: str
    LICENSE: str
    CITATION: str
    annotations: types.ModuleType  # has `find` and `video_folder` of a download, and `read`

    @staticmethod
    def annotated(video: Any) -> Annotated:
        """One of the videos that `annotations.read` gives."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=self.DESCRIPTION,
            homepage=self.HOMEPAGE,
            citation=self.CITATION,
            license=self.LICENSE,
            features=record_features(described=self.builder_config.frame_rate is None),
            metadata=tfds.core.MetadataDict(),  # filled in while it is built
            disable_shuffling=True,  # the official order; training shuffles by its own seed
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        folder = pathlib.Path(dl_manager.manual_dir)
        paths = self.annotations.find(folder)
        return _split_generators(
            self,
            folder,
            [self.annotated(video) for video in self.annotations.read(paths)],
            paths,
            self.annotations.video_folder(folder),
        )

    def differences(self, folder: pathlib.Path) -> list[str]:
        """How a download differs from that which a built data set was made of.

        Annotations and features are compared by content, videos by name and size. Videos that were
        all moved away are no difference, nor is a folder without annotations.

        Raises:
          UserError: there are several files of features, or several of one video.
        """
        try:
            paths = self.annotations.find(folder)
        except UserError:
            return []  # no download, or one that was tidied up
        metadata = self.info.metadata
        features = downloads.features_file(folder, self.name)
        was = {entry["file"]: entry["sha256"] for entry in metadata["annotations"]}
        if metadata["features"]:
            was[metadata["features"]["file"]] = metadata["features"]["sha256"]
        now = {
            path.name: downloads.fingerprint(path)["sha256"]
            for path in (*paths, *([features] if features else []))
        }
        videos = self.annotations.video_folder(folder)
        if self.builder_config.frame_rate is not None and videos is not None:
            was |= {entry["file"]: entry["bytes"] for entry in metadata["videos"].values()}
            now |= {
                path.name: path.stat().st_size
                for path in downloads.list_files(videos, downloads.VIDEO_ENDINGS)
            }
        return [
            *(f"{name} is new" for name in now if name not in was),
            *(f"{name} is gone" for name in was if name not in now),
            *(f"{name} is another" for name in was if name in now and was[name] != now[name]),
        ]

    def _generate_examples(self) -> None:
        """TFDS wants it; `_split_generators` gives the generators themselves."""
        raise AssertionError


def _split_generators(
    builder: tfds.core.DatasetBuilder,
    manual_dir: pathlib.Path,
    annotated: Sequence[Annotated],
    annotation_files: Sequence[pathlib.Path],
    video_folder: pathlib.Path | None,
) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    """The generator of the one split; whatever can be checked without decoding is checked first.

    Raises:
      UserError: files are missing, or do not belong to the annotations.
    """
    config = builder.builder_config
    name = builder.name
    h5 = downloads.features_file(manual_dir, name)
    described: Mapping[str, Described] = {}
    if h5 is not None:
        described = community_features.read(h5, [video.video_id for video in annotated])
        for video in annotated:
            _check_described(h5, video, described.get(video.video_id))
    elif config.frame_rate is None:
        raise UserError(
            f"{manual_dir}: there is no HDF5 file of features, which {name}/features is built "
            "from; put it there, or into a folder 'features' there"
        )
    if config.frame_rate is None:
        there: Mapping[str, object] = described
        where = h5
    else:
        if video_folder is None:
            raise UserError(
                f"{manual_dir}: the annotations are there, but no videos; unpack the videos beside "
                f"them, or give the folder of both: {MANUAL_DIR}"
            )
        there = _videos(video_folder, [video.video_id for video in annotated])
        where = video_folder
    missing = [video.video_id for video in annotated if video.video_id not in there]
    if missing and not config.allow_missing:
        raise UserError(
            f"{where} lacks {len(missing)} of the {len(annotated)} videos of {name}: "
            f"{', '.join(missing)}; get them, or build {name}/{config.name} without them: "
            f"{ALLOW_MISSING}"
        )
    lacking = [video_id for video_id in there if described and video_id not in described]
    if lacking:
        raise UserError(
            f"{h5} has no change points of {', '.join(lacking)}; give a file of all videos, or "
            "move it away to have shots found here"
        )
    kept = [video for video in annotated if video.video_id in there]
    builder.info.metadata.update(
        {
            "video_ids": [video.video_id for video in kept],
            "missing": missing,
            "change_points": f"of {h5.name}" if h5 else "KTS of deevisum_jax on the videos",
            "annotations": [downloads.fingerprint(path) for path in annotation_files],
            "features": downloads.fingerprint(h5) if h5 else None,
            "videos": {},
            "notes": {},
        }
    )
    if config.frame_rate is None:
        return {ALL: _feature_examples(kept, described)}
    paths = [there[video.video_id] for video in kept]
    return {ALL: _video_examples(builder, kept, paths, described)}


def _feature_examples(
    videos: Sequence[Annotated], described: Mapping[str, Described]
) -> Iterator[tuple[int, dict[str, Any]]]:
    nothing = {
        "transcript": [],
        "audio": np.zeros(0, np.int16),
        "frames": [],
        "frame_times": np.zeros(0, np.float32),
    }
    for index, video in enumerate(videos):
        group = described[video.video_id]
        fields = video.fields(group.change_points, group.user_summary)
        yield index, fields | group.fields() | nothing


def _video_examples(
    builder: tfds.core.DatasetBuilder,
    videos: Sequence[Annotated],
    paths: Sequence[pathlib.Path],
    described: Mapping[str, Described],
) -> Iterator[tuple[int, dict[str, Any]]]:
    config, metadata = builder.builder_config, builder.info.metadata
    read = media_record.read_many(paths, frame_rate=config.frame_rate, sound=config.sound)
    with contextlib.closing(read):  # whatever is wrong with one video ends the processes at once
        for index, (video, path, media) in enumerate(zip(videos, paths, read, strict=True)):
            _check_length(path, video, media.pop("duration_s"))
            metadata["videos"][video.video_id] = media.pop("source")
            if notes := media.pop("notes"):
                metadata["notes"][video.video_id] = notes
            shot_times = media.pop("shot_times")
            if described:
                group = described[video.video_id]
                fields = video.fields(group.change_points, group.user_summary)
            else:
                fields = video.fields(native_shots(shot_times, video.n_frames, video.length_s))
            yield index, fields | media | {"frames": encoded(media["frames"])}


def native_shots(shot_times: np.ndarray, n_frames: int, length_s: float) -> np.ndarray:
    """Shots of a file in the frames of the original, int32[S, 2], without gaps from 0 to n_frames.

    Args:
      shot_times: float[S, 2], seconds.
      n_frames: of the original.
      length_s: of the original.
    """
    inner = np.round(shot_times[1:, 0] * n_frames / length_s).astype(np.int32)
    inner = np.unique(inner[(inner > 0) & (inner < n_frames)])
    edges = np.concatenate([[0], inner, [n_frames]]).astype(np.int32)
    return np.stack([edges[:-1], edges[1:]], axis=1)


def _videos(folder: pathlib.Path, video_ids: Sequence[str]) -> dict[str, pathlib.Path]:
    """The files of the videos, by id."""
    found = downloads.by_stem(downloads.list_files(folder, downloads.VIDEO_ENDINGS))
    for stem, path in found.items():
        if stem not in video_ids:
            raise UserError(
                f"{path} is a video that nobody has annotated; move it elsewhere, or rename it to "
                "the video's official name"
            )
    return found


def _check_length(path: pathlib.Path, video: Annotated, duration_s: float) -> None:
    shortest_s = min(video.length_s, video.longest_s) - _TOLERANCE_S
    longest_s = max(video.length_s, video.longest_s) + _TOLERANCE_S
    if not shortest_s <= duration_s <= longest_s:
        kind = "longer" if duration_s < shortest_s else "shorter"
        raise UserError(
            f"{path}: the annotations of video {video.video_id} are {kind} than the video: they "
            f"last {video.length_s:.2f} s and the video {duration_s:.2f} s; get the file again, "
            f"whole and uncut (up to {_TOLERANCE_S:g} s are passed over)"
        )


def _check_described(path: pathlib.Path, video: Annotated, described: Described | None) -> None:
    if described is None:
        return
    if described.n_frames != video.n_frames:
        raise UserError(
            f"{path}: video {video.video_id} has n_frames={described.n_frames}, and its "
            f"annotations are of {video.n_frames} frames; take features of the official videos"
        )
    num_users = len(video.user_scores)
    if len(described.user_summary) != num_users:
        raise UserError(
            f"{path}: video {video.video_id} has summaries of {len(described.user_summary)} "
            f"people, and {num_users} annotated it; take another file of features"
        )
