"""The one door to the data sets: by name, built on first use.

In a bucket they lie as TFDS lays them out, and records are read here and there in them, so every
host keeps a copy in its user's cache:

    gs://bucket/data/synthetic/tiny/1.0.0/...                           dataset_info.json comes last
    ~/.cache/deevisum_jax/<address>/<content>/synthetic/tiny/1.0.0/...  both names are digests
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import sys
import tempfile
from collections.abc import Mapping
from typing import Any

import tensorflow_datasets as tfds
from etils import epath

from deevisum_jax import distributed, files
from deevisum_jax.config import DataConfig
from deevisum_jax.errors import UserError, closest
from deevisum_jax.summary import folds
from tfds_builders import build as builders
from tfds_builders import records
from tfds_builders.annotated import AnnotatedBuilder

_MARKER = "dataset_info.json"  # whoever finds it knows that the other files are there

_OF_A_FOLD = ("train", "validation", "test")
_VALIDATION_SHARE = 0.1  # of a fold's training videos, at least one


@dataclasses.dataclass(frozen=True)
class _Wanted:
    """A data set by name, and where the files are that it is built from."""

    family: str
    config: str | tfds.core.BuilderConfig
    manual_dir: str

    def __str__(self) -> str:
        return f"{self.family}/{getattr(self.config, 'name', self.config)}"


class Dataset:
    """A built data set. Splits are random-access lists of video records.

    Attributes:
      folds: those that `data.folds` names, of all videos as published; none without it.
    """

    def __init__(self, data: DataConfig) -> None:
        """Opens `data.dataset`, such as "tvsum/1fps", and builds it where it is not there yet.

        Of several processes the first builds it; then one of every other host, where `data_dir` is
        not shared. In a bucket it is built once, and copied to every host.

        Raises:
          UserError: an unknown builder, config, fold or split; a `data_dir` that cannot be read or
            written, or that holds another version of the data on another host; too small a disk
            for the copy of what is in a bucket; nothing that it could be built from, or other
            files than it was built from.
        """
        family, config = builders.find(
            data.dataset, manual_dir=data.manual_dir, allow_missing=data.allow_missing
        )
        wanted = _Wanted(family, config, data.manual_dir)
        folder = files.locate(data.data_dir)

        def open_it() -> tfds.core.DatasetBuilder:
            return (_open_copy if files.in_bucket(folder) else _build)(wanted, folder)

        self._name = data.dataset
        self._builder = distributed.in_turns(open_it)
        splits = self._builder.info.splits.values()
        sizes = {split.name: [split.num_examples, split.num_bytes] for split in splits}
        distributed.check_same(f"data set {self._name}", json.dumps(sizes))
        self.folds = self._make_folds(data) if data.folds else ()
        self._fold = self._fold_of(data) if data.folds else None

    def split(self, name: str) -> records.Records:
        """The records of a split, pictures as JPEG bytes.

        With `data.folds` the splits are the train, validation and test videos of one fold.

        Raises:
          UserError: the data set has no such split.
        """
        if self._fold is None:
            if name in _OF_A_FOLD and self.in_one_piece:
                raise UserError(
                    f"data set {self._name} comes as one split, {records.ALL!r}, and {name!r} was "
                    "asked for; say which videos train and which test: --config.data.folds="
                    "partition (of TVSum and SumMe also community, the published folds), and "
                    "--config.data.fold=0"
                )
            return records.read(self._builder, name)
        if name not in self._fold:
            raise UserError(f"a fold has no split {name!r}; {closest(name, self._fold)}")
        return self.records().of(self._fold[name])

    def records(self) -> records.Records:
        """All records of a data set that is published in one piece, in its official order.

        Raises:
          UserError: this one comes in splits of its own.
        """
        return records.read(self._builder, records.ALL)

    @property
    def in_one_piece(self) -> bool:
        """Whether it is published without splits of its own."""
        return self.split_names == (records.ALL,)

    @property
    def split_names(self) -> tuple[str, ...]:
        """As it is published, whatever `data.folds` makes of it."""
        return tuple(self._builder.info.splits)

    @property
    def video_ids(self) -> tuple[str, ...]:
        """All videos of a data set in one piece, in its official order, also those not at hand.

        Raises:
          UserError: this one comes in splits of its own.
        """
        if isinstance(self._builder, AnnotatedBuilder):
            return self._builder.VIDEO_IDS
        if not self.in_one_piece:
            raise UserError(
                f"data set {self._name} comes in splits of its own "
                f"({', '.join(sorted(self._builder.info.splits))}), which nothing numbers through; "
                "ask for the records of one of them"
            )
        return records.video_ids(self._builder)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from others, as JSON: its full name and, by split, its videos.

        Videos by id where a fold chooses them, else by number: the name of people's own lists has
        a digest of what is in them.
        """
        if self._fold is not None:
            there = records.video_ids(self._builder)
            splits = {name: [there[k] for k in rows] for name, rows in self._fold.items()}
        else:
            splits = {name: split.num_examples for name, split in self._builder.info.splits.items()}
        return {"data_set": self._builder.info.full_name, "splits": splits}

    def _make_folds(self, data: DataConfig) -> tuple[folds.Fold, ...]:
        if not self.in_one_piece:
            raise UserError(
                f"data.folds={data.folds!r}, but data set {self._name} comes in splits of its own "
                f"({', '.join(sorted(self._builder.info.splits))}); set data.folds to ''"
            )
        return folds.make(data.folds, self._builder.name, self.video_ids, seed=data.folds_seed)

    def _fold_of(self, data: DataConfig) -> dict[str, list[int]]:
        """Which records, of all, are in which split."""
        there = {video: k for k, video in enumerate(records.video_ids(self._builder))}
        fold = folds.choose(self.folds, data.fold)
        train = [video for video in fold.train if video in there]
        test = [video for video in fold.test if video in there]
        if len(train) < 2 or not test:
            raise UserError(
                f"fold {data.fold} of data.folds={data.folds!r} trains on {len(train)} and tests "
                f"on {len(test)} of the {len(there)} videos of data set {self._name}; it takes 2 "
                "and 1 at least: give another fold, or get the missing videos"
            )
        count = max(1, round(_VALIDATION_SHARE * len(train)))
        validation = folds.validation(train, data.folds_seed, count)
        parts = {
            "train": [video for video in train if video not in validation],
            "validation": validation,
            "test": test,
        }
        return {name: sorted(there[video] for video in videos) for name, videos in parts.items()}


def _build(wanted: _Wanted, folder: pathlib.Path | epath.Path) -> tfds.core.DatasetBuilder:
    family = builders.BUILDERS[wanted.family]
    was_there = records.make_builder(family, folder, wanted.config).data_path.exists()
    builder = records.build(family, folder, wanted.config, manual_dir=wanted.manual_dir)
    metadata = builder.info.metadata or {}
    if not was_there and "change_points" in metadata:
        print(f"data set {wanted} is built; shots: {metadata['change_points']}", file=sys.stderr)
    return builder


# ---- In a bucket ----


def _open_copy(wanted: _Wanted, folder: epath.Path) -> tfds.core.DatasetBuilder:
    """The data set that is in a bucket, copied here, after building it if it is nowhere."""
    cache = files.user_copy(folder)
    builder = records.make_builder(builders.BUILDERS[wanted.family], cache, wanted.config)
    inside = pathlib.Path(builder.data_dir).relative_to(cache)
    remote = folder / inside
    if remote.name not in files.whole_folders(remote.parent, _MARKER):
        _build_into(wanted, folder, inside)
    found = files.contents(remote)
    # Named by their content: what is there is whole, and what a run reads stays as it is.
    here = cache / files.digest(json.dumps(found, sort_keys=True))
    if not here.exists():
        _check_whole(remote, found)
        try:
            _fetch(remote, {name: size for name, (size, _) in found.items()}, here, inside)
        except OSError as error:
            raise UserError(
                f"{here}, the copy of {remote}, cannot be written ({error}); set XDG_CACHE_HOME "
                "to a folder that can"
            ) from error
    opened = records.build(builders.BUILDERS[wanted.family], here, wanted.config)
    records.check_sources(opened, wanted.manual_dir, remote)
    return opened


def _build_into(wanted: _Wanted, folder: epath.Path, inside: pathlib.Path) -> None:
    """Builds a data set here and uploads it; runs that do so at a time upload the same."""
    files.write_whole(  # also finds out, before any work, whether it may be written
        folder / inside.parent / "README.txt",
        f"Data set {wanted} of deevisum_jax. A version of it, such as "
        f"{inside.name}, is whole when its {_MARKER} is there.\n",
    )
    with tempfile.TemporaryDirectory(prefix="deevisum-") as made:
        _build(wanted, pathlib.Path(made))
        sizes = {
            path.relative_to(made).as_posix(): path.stat().st_size
            for path in pathlib.Path(made, inside.parent).rglob("*")
            if path.is_file()
        }

        def upload(name: str) -> None:
            with files.replacing(folder / name) as temporary:
                shutil.copyfile(pathlib.Path(made, name), temporary)

        marker = (inside / _MARKER).as_posix()
        sizes.pop(marker)
        files.transfer(upload, sizes, f"uploaded to {folder}")
        upload(marker)


def _check_whole(remote: epath.Path, names: Mapping[str, object]) -> None:
    """Finds what lacks records, as while others upload it with tools that know no order."""
    advice = "upload it again, or remove it to have it built anew"
    info = files.read_json(remote / _MARKER, advice)
    wanted = sum(len(split.get("shardLengths", [])) for split in info.get("splits", []))
    there = sum(".array_record-" in name for name in names)
    if there < wanted or not wanted:
        raise UserError(
            f"{remote} holds {there} of {wanted} files of records; wait until all are uploaded, "
            f"else {advice}"
        )


def _fetch(
    remote: epath.Path, sizes: Mapping[str, int], here: pathlib.Path, inside: pathlib.Path
) -> None:
    """Downloads files into `here / inside`; goes on where an earlier run was stopped."""
    unfinished = here.with_name(f"{here.name}.partial")
    try:
        files.fetch(remote, sizes, unfinished / inside)
        unfinished.rename(here)
    except OSError:
        if not here.exists():  # else another run was faster
            raise
