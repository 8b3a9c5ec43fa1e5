"""The TFDS builder of the synthetic videos.

    builder = build(data_dir, "quickstart")   # generates on the first call, then only opens
    train = read(builder, "train")            # random access, see tfds_builders/records.py

or in TFDS's own terms, with `Synthetic(config="quickstart", data_dir=..., file_format=
"array_record")`, `download_and_prepare()` and `as_data_source("train")`. Neither writing nor
reading needs TensorFlow.

The videos stay beside the records as ordinary files, to be watched or summarized:
`<data_dir>/synthetic/<config>/videos/<split>/<video_id>.mp4`, with their subtitles in
`<video_id>.vtt`. What the videos show, and why it takes picture, text and sound to tell which
moments matter, is said in `scenario.py`.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from tfds_builders.records import encoded, record_features
from tfds_builders.synthetic import produce, scenario


@dataclasses.dataclass(kw_only=True)
class SyntheticConfig(tfds.core.BuilderConfig):
    """How many videos of what kind; the same config gives the same records, byte for byte."""

    num_videos: dict[str, int]  # per split
    # A typical draw: in each split of `quickstart` two annotators agree within 0.01 of tau 0.18.
    seed: int = 7
    rules: scenario.Rules = dataclasses.field(default_factory=scenario.Rules)
    frame_rate: float = 2.0  # stored frames per second
    frame_size: int = 96  # height and width of the stored frames, pixels


_TINY = scenario.Rules(min_duration_s=8.0, max_duration_s=10.0, mean_shot_s=2.0)

CONFIGS = [
    SyntheticConfig(
        name="quickstart",
        description="Enough to train a small model from scratch on a CPU: about 3,500 segments.",
        num_videos={"train": 160, "validation": 16, "test": 40},
    ),
    SyntheticConfig(
        name="calibration",
        description="Many more videos like those of quickstart, to promise what early exit costs.",
        num_videos={"calibration": 600},
    ),
    SyntheticConfig(
        name="tiny",
        description="A few seconds of video, for tests.",
        num_videos={"train": 4, "validation": 2, "test": 2},
        rules=_TINY,
    ),
    SyntheticConfig(
        name="tiny_calibration",
        description="More videos like those of tiny, for tests.",
        num_videos={"calibration": 6},
        rules=_TINY,
    ),
]


class Synthetic(tfds.core.GeneratorBasedBuilder):
    """Generated videos with simulated annotators."""

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = CONFIGS

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=scenario.__doc__,
            features=record_features(),
            disable_shuffling=True,  # record k is video k; training shuffles by its own seed
        )

    def _split_generators(
        self, dl_manager: tfds.download.DownloadManager
    ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # nothing to download
        return {split: self._generate_examples(split) for split in self.builder_config.num_videos}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        config = self.builder_config
        job = produce.Job(
            seed=config.seed,
            split=split,
            num_videos=config.num_videos[split],
            rules=config.rules,
            frame_rate=config.frame_rate,
            frame_size=config.frame_size,
            folder=str(videos_folder(self) / split),
        )
        for index, record in enumerate(produce.records(job)):
            yield index, record | {"frames": encoded(record["frames"])}


def videos_folder(builder: Synthetic) -> pathlib.Path:
    """Where the MP4 files of a builder's config are, one folder per split."""
    return pathlib.Path(builder.data_dir).parent / "videos"
