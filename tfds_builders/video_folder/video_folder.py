"""The TFDS builder of people's own videos, in a folder or a CSV manifest (docs/OWN_VIDEOS.md).

    config = VideoFolder.config_of("1fps", "talks/")
    builder = records.build(VideoFolder, data_dir, config)

Every list of videos is a data set of its own: `config.name` is "1fps_" and a digest of the videos,
their words and scores. Under `data_dir` there are

    video_folder/1fps_3f2a9c01d4e7/1.0.0/...         the data set
    video_folder/1fps_3f2a9c01d4e7/failures.json     videos that it lacks, and why
    video_folder/decoded/                            videos that need not be decoded again
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from deevisum_jax import files, manifest
from deevisum_jax.errors import UserError, closest
from tfds_builders.records import ALL, MANUAL_DIR, encoded, record_features
from tfds_builders.video_folder import prepare, sources
from tfds_builders.video_folder.prepare import Store
from tfds_builders.video_folder.sources import Source

FAILURES_FILE = "failures.json"
_DECODED_FOLDER = "decoded"


@dataclasses.dataclass(kw_only=True)
class VideoFolderConfig(tfds.core.BuilderConfig):
    """What is stored of which videos."""

    frame_rate: float  # stored pictures per second
    videos: Sequence[Source] = dataclasses.field(default=(), repr=False)


CONFIGS = [
    VideoFolderConfig(
        name=f"{frame_rate}fps",
        description=f"{frame_rate} pictures of 256 x 256 per second, with sound.",
        frame_rate=float(frame_rate),
    )
    for frame_rate in (1, 2)
]


class VideoFolder(tfds.core.GeneratorBasedBuilder):
    """People's own videos, with scores or without."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = CONFIGS

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        file = self._failures_file()
        if self.builder_config.videos and self.data_path.exists() and file.exists():
            _tell_failures(file, len(self.builder_config.videos), file.stat().st_mtime_ns)

    @classmethod
    def config_of(cls, name: str, manual_dir: str | os.PathLike[str]) -> VideoFolderConfig:
        """The config of the videos that a folder or a manifest lists.

        Args:
          name: "1fps" or "2fps"; or the whole name of a data set that is built, such as
            "1fps_3f2a9c01d4e7", whose videos need not be there.
          manual_dir: the folder, or the path of the manifest.

        Raises:
          UserError: an unknown name, or as `sources.read`.
        """
        kinds = {config.name: config for config in cls.BUILDER_CONFIGS}
        kind, _, digest = name.partition("_")
        if kind in kinds and re.fullmatch(r"[0-9a-f]{12}", digest):
            return dataclasses.replace(kinds[kind], name=name)
        if name not in kinds:
            raise UserError(f"data set {cls.name} has no config {name!r}; {closest(name, kinds)}")
        if not os.fspath(manual_dir):
            raise UserError(
                f"data set {cls.name}/{name} is built of your own videos; say where they are, a "
                f"folder or a manifest: {MANUAL_DIR}; docs/OWN_VIDEOS.md says more"
            )
        videos = sources.read(manual_dir)
        return dataclasses.replace(
            kinds[name], name=f"{name}_{sources.digest(videos)}", videos=videos
        )

    def _info(self) -> tfds.core.DatasetInfo:
        features = dict(record_features().items())
        # Nobody's scores are an array without numbers, which TFDS 4.9.10 cannot read as "bytes".
        features["user_scores"] = tfds.features.Tensor(
            shape=(None, None), dtype=np.float32, encoding="zlib"
        )
        return tfds.core.DatasetInfo(
            builder=self,
            description="Videos of one's own.",
            features=tfds.features.FeaturesDict(features),
            metadata=tfds.core.MetadataDict(),
            disable_shuffling=True,  # the manifest's order; training shuffles by its own seed
        )

    def download_and_prepare(
        self, *, download_config: tfds.download.DownloadConfig | None = None, **kwargs: Any
    ) -> None:
        """As every builder's; with `beam_options` or a `beam_runner` given, Apache Beam works."""
        config = download_config or tfds.download.DownloadConfig()
        self._beam = (config.beam_options, config.beam_runner)
        super().download_and_prepare(download_config=config, **kwargs)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        del dl_manager  # nothing to download
        videos = self.builder_config.videos
        if not videos:
            raise UserError(
                f"data set {self.name}/{self.builder_config.name} is not in {self.data_dir}, and "
                "it is not known which videos it is of: name the kind alone, such as "
                f"{self.name}/1fps, and give {MANUAL_DIR}"
            )
        family = pathlib.Path(self.data_dir).parents[1]
        store = Store(str(family / _DECODED_FOLDER), self.builder_config.frame_rate)
        pathlib.Path(store.folder).mkdir(parents=True, exist_ok=True)
        if any(self._beam):
            prepare.with_beam(store, videos, *self._beam)
        else:
            prepare.with_processes(store, videos)
        splits = self._good(store, videos)
        self.info.metadata["video_ids"] = [
            video.id for good in splits.values() for _, video in good
        ]
        return {
            split: _written_by_beam(store, good) if any(self._beam) else _examples(store, good)
            for split, good in splits.items()
        }

    def _good(self, store: Store, videos: Sequence[Source]) -> dict[str, list[tuple[int, Source]]]:
        """By split, the videos that are done, each with its place; the others are written down."""
        splits: dict[str, list[tuple[int, Source]]] = {}
        failures = []
        for place, video in enumerate(videos):
            good = splits.setdefault(video.split or ALL, [])
            if reason := store.failure(video):
                failures.append({"id": video.id, "video": video.video, "reason": reason})
            else:
                good.append((place, video))
        if empty := [split for split, good in splits.items() if not good]:
            first = f"no video of split {empty[0]!r} can be used:"
            raise UserError(manifest.listing(first, _lines(failures)))
        if failures:
            files.write_whole(self._failures_file(), json.dumps(failures, indent=2) + "\n")
        else:
            self._failures_file().unlink(missing_ok=True)
        return splits

    def _failures_file(self) -> pathlib.Path:
        return pathlib.Path(self.data_dir).parent / FAILURES_FILE

    def _generate_examples(self) -> Iterator[tuple[int, dict[str, Any]]]:
        raise AssertionError("splits have generators of their own")


def _lines(failures: Sequence[dict[str, str]]) -> list[str]:
    return [f"{failure['id']}: {failure['reason']}" for failure in failures]


@functools.cache  # a command opens a data set several times
def _tell_failures(file: pathlib.Path, num_videos: int, stamp_ns: int) -> None:
    """Names on stderr the videos that a data set lacks."""
    del stamp_ns  # a list that is written anew is told anew
    failures = json.loads(file.read_text())
    first = f"{len(failures)} of {num_videos} videos are left out, see {file}:"
    last = f"once they are mended, delete {file.parent} to try again"
    print(manifest.listing(first, _lines(failures), last), file=sys.stderr)


def _example(store: Store, placed: tuple[int, Source]) -> tuple[int, dict[str, Any]]:
    place, video = placed
    record = store.record(video)
    return place, record | {"frames": encoded(record["frames"])}


def _examples(
    store: Store, good: Sequence[tuple[int, Source]]
) -> Iterator[tuple[int, dict[str, Any]]]:
    return map(functools.partial(_example, store), good)


def _written_by_beam(store: Store, good: Sequence[tuple[int, Source]]) -> Any:
    import apache_beam as beam

    return beam.Create(list(good)) | beam.Reshuffle() | beam.Map(functools.partial(_example, store))
