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
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from deevisum_jax.errors import UserError, closest


class EncodedImages(tfds.decode.SkipDecoding):
    """Leaves a sequence of images as their encoded bytes.

    `tfds.decode.SkipDecoding` does so for single images only when read without TensorFlow.
    """

    def decode_batch_example_np(self, serialized_images: Sequence[bytes]) -> list[bytes]:
        return list(serialized_images)


DECODERS = {"frames": EncodedImages()}


def record_features() -> tfds.features.FeaturesDict:
    """The features of a video record; raw bytes for the large arrays, as fast as they get."""

    def lines() -> tfds.features.Sequence:
        return tfds.features.Sequence(
            {"start": np.float32, "end": np.float32, "text": tfds.features.Text()}
        )

    def array(shape: tuple[int | None, ...], dtype: type, encoding: str = "bytes"):
        return tfds.features.Tensor(shape=shape, dtype=dtype, encoding=encoding)

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
        }
    )


class Records(Sequence):
    """A data source read with `DECODERS`, its examples as the plain records described above."""

    def __init__(self, source: Sequence[Mapping[str, Any]]) -> None:
        self._source = source

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):  # the source's own error would not end an iteration
            raise IndexError(f"there are {len(self)} records, got index {index}")
        record = dict(self._source[index])
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
        record["n_frames"] = int(record["n_frames"])
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


def build(
    builder_cls: type[tfds.core.GeneratorBasedBuilder],
    data_dir: str | os.PathLike,
    config: str | tfds.core.BuilderConfig,
) -> tfds.core.DatasetBuilder:
    """Opens a data set under `data_dir`, preparing it first if it is not there.

    Raises:
      UserError: the builder has no config of this name.
    """
    builder = make_builder(builder_cls, data_dir, config)
    builder.download_and_prepare()
    return builder


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
