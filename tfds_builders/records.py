"""Video records on disk and back: the features that the builders share, and a view for readers.

    builder = build(Synthetic, data_dir, "quickstart")
    records = read(builder, "train")
    records[0]["title"], records[0]["frames"][0]  # str, JPEG bytes

Nothing here needs TensorFlow. A record is a dict with

    video_id, title, category: str
    transcript, captions: list of {"start": s, "end": s, "text": str}
    audio: int16[n], 16 kHz mono, sample 0 at the first frame; empty when the video has no sound
    frames: list of JPEG bytes;  frame_times: float32[n], seconds
    score_times: float32[N], centre of every annotated point in seconds
    user_scores: float32[U, N];  user_summary: uint8[U, n_frames], 1 = in the annotator's summary
    change_points: int32[S, 2], shots in native frames, half-open
    n_frames: int;  native_fps, duration_s: float

and, where the data set's config says so, in addition

    features: float16[T, D], gtscore: float32[T], picks: int32[T], native frames described
    n_steps: int;  n_frame_per_seg: int32[S]
"""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from deevisum_jax.errors import EXIT_USER_ERROR, UserError, closest, outcome


class EncodedImages(tfds.decode.SkipDecoding):
    """Leaves a sequence of images as their encoded bytes.

    `tfds.decode.SkipDecoding` does so for single images only when read without TensorFlow.
    """

    def decode_batch_example_np(self, serialized_images: Sequence[bytes]) -> list[bytes]:
        return list(serialized_images)


DECODERS = {"frames": EncodedImages()}

# Flags of the command that trains, and of the one that only builds.
MANUAL_DIR = "--config.data.manual_dir (--manual_dir of tfds_builders.build)"
ALLOW_MISSING = "--config.data.allow_missing (--allow_missing of tfds_builders.build)"

# The one split of a data set that others divide, by folds. TFDS keeps the name "all" for itself.
ALL = "videos"
_NUM_TOLD = 3  # of the files that differ
PARTIAL = "_partial"  # ends the name of a config that is built without the videos that are missing


def record_features(*, described: bool = False) -> tfds.features.FeaturesDict:
    """The features of a video record; raw bytes for the large arrays, as fast as they get.

    Args:
      described: with the fields of the community's HDF5 files (`features`, `picks`, ...).
    """

    def lines() -> tfds.features.Sequence:
        return tfds.features.Sequence(
            {"start": np.float32, "end": np.float32, "text": tfds.features.Text()}
        )

    def array(shape: tuple[int | None, ...], dtype: type, encoding: str = "bytes"):
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=encoding)

    extra = {
        "features": array((None, None), np.float16),
        "gtscore": array((None,), np.float32),
        "picks": array((None,), np.int32),
        "n_steps": np.int32,
        "n_frame_per_seg": array((None,), np.int32),
    }
    return tfds.features.FeaturesDict(
        {
            "video_id": tfds.features.Text(),
            "title": tfds.features.Text(),
            "category": tfds.features.Text(),
            "transcript": lines(),
            "captions": lines(),
            "audio": array((None,), np.int16),
            "frames": tfds.features.Sequence(tfds.features.Image(encoding_format="jpeg")),
            "frame_times": array((None,), np.float32),
            "score_times": array((None,), np.float32),
            "user_scores": array((None, None), np.float32),
            "user_summary": array((None, None), np.uint8, "zlib"),
            "change_points": array((None, 2), np.int32),
            "n_frames": np.int32,
            "native_fps": np.float32,
            "duration_s": np.float32,
            **(extra if described else {}),
        }
    )


def encoded(frames: Sequence[bytes]) -> list[io.BytesIO]:
    """Pictures as a builder gives them: their bytes are stored as they are, without TensorFlow."""
    return [io.BytesIO(frame) for frame in frames]


class Records(Sequence):
    """A data source read with `DECODERS`, its examples as the plain records described above."""

    def __init__(
        self, source: Sequence[Mapping[str, Any]], indices: Sequence[int] | None = None
    ) -> None:
        """Shows the examples at `indices` of the source, or all of them."""
        self._source = source
        self._indices = range(len(source)) if indices is None else indices

    def __len__(self) -> int:
        return len(self._indices)

    def of(self, indices: Sequence[int]) -> Records:
        """Only the records at these indices, in this order."""
        return Records(self._source, [self._indices[index] for index in indices])

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):  # the source's own error would not end an iteration
            raise IndexError(f"there are {len(self)} records, got index {index}")
        record = dict(self._source[self._indices[index]])
        for name in ("video_id", "title", "category"):
            record[name] = record[name].decode()
        for name in ("transcript", "captions"):
            columns = record[name]
            record[name] = [
                {"start": float(start), "end": float(end), "text": text.decode()}
                for start, end, text in zip(
                    columns["start"], columns["end"], columns["text"], strict=True
                )
            ]
        for name in {"n_frames", "n_steps"} & record.keys():
            record[name] = int(record[name])
        for name in ("native_fps", "duration_s"):
            record[name] = float(record[name])
        return record


def make_builder(
    builder_cls: type[tfds.core.GeneratorBasedBuilder],
    data_dir: str | os.PathLike,
    config: str | tfds.core.BuilderConfig,
) -> tfds.core.DatasetBuilder:
    """The builder of a data set, which may be under `data_dir` or not; nothing is written.

    Raises:
      UserError: the builder has no config of this name.
    """
    names = [known.name for known in builder_cls.BUILDER_CONFIGS]
    if isinstance(config, str) and config not in names:
        raise UserError(
            f"data set {builder_cls.name} has no config {config!r}; {closest(config, names)}"
        )
    return builder_cls(data_dir=os.fspath(data_dir), config=config, file_format="array_record")


def partial_name(builder_cls: type[tfds.core.GeneratorBasedBuilder], config: str) -> str:
    """The config that is built without the videos that are missing, a data set of its own on disk.

    Raises:
      UserError: this data set has no such config.
    """
    names = {known.name for known in builder_cls.BUILDER_CONFIGS}
    if config.endswith(PARTIAL) or config not in names:
        return config  # as it is, or an error of `make_builder`
    if config + PARTIAL not in names:
        raise UserError(
            f"{builder_cls.name}/{config} is not built from videos that could be missing; leave "
            f"out {ALLOW_MISSING}"
        )
    return config + PARTIAL


def build(
    builder_cls: type[tfds.core.GeneratorBasedBuilder],
    data_dir: str | os.PathLike,
    config: str | tfds.core.BuilderConfig,
    *,
    manual_dir: str | os.PathLike = "",
    download_config: tfds.download.DownloadConfig | None = None,
) -> tfds.core.DatasetBuilder:
    """Opens a data set under `data_dir`, preparing it first if it is not there.

    Args:
      builder_cls: whose data set.
      data_dir: where built data sets live.
      config: which of its configs.
      manual_dir: the files as downloaded, for a builder that wants some. Where the data set is
        built, they need not be there.
      download_config: TFDS's further options.

    Raises:
      UserError: the builder has no config of this name, or wants files that are not there; the
        data set was built of others than are there; `data_dir` cannot be written.
    """
    builder = make_builder(builder_cls, data_dir, config)
    if builder.data_path.exists():
        check_sources(builder, manual_dir)
        return builder
    options = download_config or tfds.download.DownloadConfig()
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        folder = _manual_folder(builder, manual_dir)
        options = dataclasses.replace(options, manual_dir=folder)
    try:
        builder.download_and_prepare(download_config=options)
    except OSError as error:
        # Another process may have built the same in the meantime; the first one stays.
        if not builder.data_path.exists():
            if not _is_of_writing(error, data_dir):
                raise
            raise UserError(
                f"data set {builder.name}/{builder.builder_config.name} cannot be built in "
                f"{os.fspath(data_dir)} ({error}); give a folder that can be written: "
                "--config.data.data_dir (--data_dir of tfds_builders.build), or TMPDIR for a data "
                "set in a bucket"
            ) from None
    return make_builder(builder_cls, data_dir, config)


def _is_of_writing(error: OSError, data_dir: str | os.PathLike) -> bool:
    """Whether the disk of `data_dir` is at fault, and not a file that is read."""
    if error.filename is None:
        return outcome(error)[0] == EXIT_USER_ERROR  # a disk that is full, for instance
    file, folder = (os.path.abspath(os.fspath(path)) for path in (error.filename, data_dir))
    return os.path.commonpath([file, folder]) in (file, folder)


def check_sources(
    builder: tfds.core.DatasetBuilder,
    manual_dir: str | os.PathLike,
    where: str | os.PathLike | None = None,
) -> None:
    """Finds a data set that was built of other files than are there now.

    Args:
      builder: of a data set that is built. If it wants files, it has a method `differences`.
      manual_dir: its files; "" or a folder that does not exist says nothing about it.
      where: the data set to remove, if that is not where the builder reads it.

    Raises:
      UserError: it was built of others.
    """
    if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS or not os.fspath(manual_dir):
        return
    folder = _absolute(manual_dir)
    if not folder.is_dir():
        return
    if found := builder.differences(folder):
        more = f" and {len(found) - _NUM_TOLD} more" if len(found) > _NUM_TOLD else ""
        where = where or builder.data_path
        raise UserError(
            f"{where} was built of other files than are in {folder} now: "
            f"{', '.join(found[:_NUM_TOLD])}{more}; remove the former to build it anew, or leave "
            f"out {MANUAL_DIR} to take it as it is"
        )


def _absolute(folder: str | os.PathLike) -> pathlib.Path:
    # Links stay: what lies beside a link belongs to it.
    return pathlib.Path(os.path.abspath(pathlib.Path(folder).expanduser()))


def _manual_folder(
    builder: tfds.core.DatasetBuilder, manual_dir: str | os.PathLike
) -> pathlib.Path:
    what = f"data set {builder.name}/{builder.builder_config.name}"
    steps = f"\n{builder.MANUAL_DOWNLOAD_INSTRUCTIONS.strip()}\nThen give the folder: {MANUAL_DIR}"
    if not os.fspath(manual_dir):
        raise UserError(f"{what} is not built yet, and is built from files that you get.{steps}")
    if "://" in os.fspath(manual_dir):
        raise UserError(
            f"{os.fspath(manual_dir)} is no folder of this machine, and {what} is built from local "
            "files only; copy it here (gcloud storage cp -r, for instance), and give that folder: "
            f"{MANUAL_DIR}"
        )
    folder = _absolute(manual_dir)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder, and {what} is built from it.{steps}")
    return folder


def read(builder: tfds.core.DatasetBuilder, split: str) -> Records:
    """The records of a split, in the order of the videos, with frames as JPEG bytes.

    Raises:
      UserError: there is no split of this name.
    """
    splits = builder.info.splits
    if split not in splits:
        raise UserError(
            f"data set {builder.info.full_name} has no split {split!r}; {closest(split, splits)}"
        )
    return Records(builder.as_data_source(split, decoders=DECODERS))


def video_ids(builder: tfds.core.DatasetBuilder) -> tuple[str, ...]:
    """Ids of the videos of split `ALL`, in the order of its records.

    Builders keep them in their metadata, since to read all records for them would take long.
    """
    return tuple(builder.info.metadata["video_ids"])
