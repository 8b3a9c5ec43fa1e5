"""The one door to the data sets: by name, built on first use.

In a bucket they lie as TFDS lays them out, and records are read here and there in them, so every
host keeps a copy in its user's cache:

    gs://bucket/data/synthetic/tiny/1.0.0/...                           dataset_info.json comes last
    ~/.cache/deevisum_jax/<address>/<content>/synthetic/tiny/1.0.0/...  both names are digests
"""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent import futures

import tensorflow_datasets as tfds
from etils import epath

from deevisum_jax import distributed, files
from deevisum_jax.errors import UserError, closest
from tfds_builders import records
from tfds_builders.synthetic.synthetic import Synthetic

BUILDERS = {"synthetic": Synthetic}

_MARKER = "dataset_info.json"  # whoever finds it knows that the other files are there
_NUM_TRANSFERS = 8  # at a time
_SHOWN_S = 10.0  # between two lines on how far a transfer is


class Dataset:
    """A built data set. Splits are random-access lists of video records."""

    def __init__(self, name: str, data_dir: str) -> None:
        """Opens `name`, such as "synthetic/quickstart", and builds it where it is not there yet.

        Of several processes the first builds it; then one of every other host, where `data_dir` is
        not shared. In a bucket it is built once, and copied to every host.

        Raises:
          UserError: an unknown builder or config; a `data_dir` that cannot be read or written, or
            that holds another version of the data on another host; too small a disk for the copy
            of what is in a bucket.
        """
        family, _, config = name.partition("/")
        if family not in BUILDERS:
            raise UserError(f"data.dataset={name!r} is unknown; {closest(family, BUILDERS)}")
        folder = files.locate(data_dir)

        def open_it() -> tfds.core.DatasetBuilder:
            here = _copy_of(family, config, folder) if files.in_bucket(folder) else folder
            return _build(family, config, here)

        self._builder = distributed.in_turns(open_it)
        splits = self._builder.info.splits.values()
        sizes = {split.name: [split.num_examples, split.num_bytes] for split in splits}
        distributed.check_same(f"data set {name}", json.dumps(sizes))

    def split(self, name: str) -> records.Records:
        """The records of a split, pictures as JPEG bytes.

        Raises:
          UserError: the data set has no such split.
        """
        return records.read(self._builder, name)


def _build(family: str, config: str, folder: pathlib.Path | epath.Path) -> tfds.core.DatasetBuilder:
    try:
        return records.build(BUILDERS[family], folder, config)
    except OSError as error:
        # Another run may have built the same in the meantime; then it is only opened.
        try:
            return records.build(BUILDERS[family], folder, config)
        except OSError:
            raise UserError(
                f"data set {family}/{config} cannot be built in {folder} ({error}); give a folder "
                "that can be written (data.data_dir; for one in a bucket, TMPDIR)"
            ) from None


# ---- In a bucket ----


def _copy_of(family: str, config: str, folder: epath.Path) -> pathlib.Path:
    """A local folder with the data set that is in a bucket, after building it if it is nowhere."""
    cache = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    cache = cache / "deevisum_jax" / _digest(os.fspath(folder))
    builder = records.make_builder(BUILDERS[family], cache, config)
    inside = pathlib.Path(builder.data_dir).relative_to(cache)
    remote = folder / inside
    if remote.name not in files.whole_folders(remote.parent, _MARKER):
        _build_into(family, config, folder, inside)
    found = files.contents(remote)
    # Named by their content: what is there is whole, and what a run reads stays as it is.
    here = cache / _digest(json.dumps(found, sort_keys=True))
    if not here.exists():
        _check_whole(remote, found)
        try:
            _fetch(remote, {name: size for name, (size, _) in found.items()}, here, inside)
        except OSError as error:
            raise UserError(
                f"{here}, the copy of {remote}, cannot be written ({error}); set XDG_CACHE_HOME "
                "to a folder that can"
            ) from error
    return here


def _build_into(family: str, config: str, folder: epath.Path, inside: pathlib.Path) -> None:
    """Builds a data set here and uploads it; runs that do so at a time upload the same."""
    files.write_whole(  # also finds out, before any work, whether it may be written
        folder / inside.parent / "README.txt",
        f"Data set {family}/{config} of deevisum_jax. A version of it, such as {inside.name}, is "
        f"whole when its {_MARKER} is there.\n",
    )
    with tempfile.TemporaryDirectory(prefix="deevisum-") as made:
        _build(family, config, pathlib.Path(made))
        sizes = {
            path.relative_to(made).as_posix(): path.stat().st_size
            for path in pathlib.Path(made).rglob("*")
            if path.is_file()
        }

        def upload(name: str) -> None:
            with files.replacing(folder / name) as temporary:
                shutil.copyfile(pathlib.Path(made, name), temporary)

        marker = (inside / _MARKER).as_posix()
        sizes.pop(marker)
        _transfer(upload, sizes, f"uploaded to {folder}")
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
    to = unfinished / inside
    to.mkdir(parents=True, exist_ok=True)
    sizes = {name: size for name, size in sizes.items() if not (to / name).exists()}
    files.check_room(to, sum(sizes.values()), advice="set XDG_CACHE_HOME to")

    def download(name: str) -> None:
        with files.local_copy(remote / name) as copy, files.replacing(to / name) as temporary:
            shutil.copyfile(copy, temporary)

    try:
        _transfer(download, sizes, f"of {remote} downloaded")
        unfinished.rename(here)
    except OSError:
        if not here.exists():  # else another run was faster
            raise


def _transfer(copy: Callable[[str], None], sizes: Mapping[str, int], done: str) -> None:
    """Copies files, and says now and then how many bytes are `done`."""
    num_bytes, shown = 0, time.monotonic()
    with futures.ThreadPoolExecutor(_NUM_TRANSFERS) as pool:
        for size, _ in zip(sizes.values(), pool.map(copy, sizes), strict=True):
            num_bytes += size
            if time.monotonic() > shown + _SHOWN_S:
                shown = time.monotonic()
                whole = sum(sizes.values())
                print(f"{num_bytes / 1e9:.3g} of {whole / 1e9:.3g} GB {done}", file=sys.stderr)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
