"""Files and folders that are there whole or not at all, and files in buckets."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

from etils import epath

from deevisum_jax.errors import UserError

_UNFINISHED = ".partial"
_NUM_TRIES, _TRY_AGAIN_S = 20, 0.1
# ImportError: no client for this kind of bucket; ValueError: no possible file name.
_NO_ACCESS = (OSError, ImportError, ValueError)
_BUCKETS = ("gs", "s3")


@contextlib.contextmanager
def replacing(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary name in the same folder to write to; it becomes `path` when all went well."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_UNFINISHED}")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: pathlib.Path, content: str | bytes) -> None:
    """Writes `content` to `path`, replacing what is there."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_folder(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """A folder to write into, whose content becomes that of `out` only when all went well.

    Raises:
      UserError: `out` is a file, holds something, or cannot be written.
    """
    check_local(out)
    target = out.resolve()
    with writing(out):
        # An empty folder is filled from within: it may be mounted, or its parent not ours. A new
        # one grows beside the nearest folder there is, so that a failure leaves no parents behind.
        home = _nearest_there_is(target)
        if home == target and not _is_empty(target):
            raise UserError(f"{out} exists and is not an empty folder; give --out a new one")
        # A name of its own: other runs may be at work in the same place.
        unfinished = home / f".{target.name}.{uuid.uuid4().hex[:8]}{_UNFINISHED}"
        unfinished.mkdir()
    try:
        yield unfinished
        with writing(out):
            if home == target:
                if not _is_empty(target):
                    raise UserError(f"{out} was filled in the meantime; give --out a new folder")
                for made in unfinished.iterdir():
                    made.rename(target / made.name)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                unfinished.rename(target)
    finally:
        _remove(unfinished)


def check_room(out: pathlib.Path, num_bytes: int) -> None:
    """Refuses a disk that cannot hold what is to be written.

    Raises:
      UserError: it has too little room.
    """
    free = shutil.disk_usage(_nearest_there_is(out.resolve())).free
    if free < num_bytes:
        raise UserError(
            f"{out} wants {num_bytes / 1e9:.3g} GB and its disk has {free / 1e9:.3g} GB left; make "
            "room, or give --out another disk"
        )


def _nearest_there_is(path: pathlib.Path) -> pathlib.Path:
    """The path itself, or the nearest folder above it that exists."""
    while not path.exists():
        path = path.parent
    return path


def _remove(folder: pathlib.Path) -> None:
    """Also what threads are still writing into, such as Orbax's after Ctrl-C."""
    for _ in range(_NUM_TRIES):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_TRY_AGAIN_S)


def check_local(out: pathlib.Path) -> None:
    """Refuses the address of a bucket, which would become a folder called `gs:`.

    Raises:
      UserError: this is one.
    """
    if found := re.match(r"[a-z][a-z0-9]+:/", str(out)):
        raise UserError(
            f"{out} is in a bucket, and only local folders are written, whole or not at all; write "
            f"a local one and copy it ({'gcloud storage' if found[0] == 'gs:/' else 'aws s3'} cp)"
        )


def _is_empty(folder: pathlib.Path) -> bool:
    """Whether nothing is in it but unfinished work, of others or of a run that was killed."""
    return folder.is_dir() and all(path.name.endswith(_UNFINISHED) for path in folder.iterdir())


@contextlib.contextmanager
def writing(out: pathlib.Path) -> Iterator[None]:
    """What the file system refuses inside becomes a `UserError` about `out`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{out} cannot be written ({error.strerror or error}); give --out a folder that can"
        ) from error


def locate(path: str | os.PathLike[str]) -> epath.Path:
    """A path of this machine, `~` included, or of a bucket.

    Raises:
      UserError: an address of another kind.
    """
    text = os.fspath(path)
    scheme, colon, _ = text.partition("://")
    if colon and scheme not in _BUCKETS:
        raise UserError(
            f"{text} is neither a path nor in a bucket ({', '.join(_BUCKETS)}); download it, and "
            "give the path of the download"
        )
    return epath.Path(text).expanduser()


def exists(path: epath.Path) -> bool:
    """Whether there is such a file or folder, in a bucket or not.

    Raises:
      UserError: nobody can tell; for want of a client for that kind of bucket, for instance.
    """
    try:
        return path.exists()
    except _NO_ACCESS as error:
        raise UserError(
            f"{os.fspath(path)!r} cannot be looked for: {error}{_extra(error)}"
        ) from error


@contextlib.contextmanager
def open_binary(path: epath.Path) -> Iterator[BinaryIO]:
    """A file to read from, local or not.

    Raises:
      UserError: it does not exist or cannot be opened.
    """
    try:
        stream = path.open("rb")
    except FileNotFoundError as error:
        raise UserError(f"{os.fspath(path)} does not exist; check the path") from error
    except _NO_ACCESS as error:
        raise UserError(f"{os.fspath(path)} cannot be opened: {error}{_extra(error)}") from error
    with stream:
        yield stream


def read_json(path: pathlib.Path | epath.Path, advice: str = "download it again") -> dict[str, Any]:
    """The JSON object that a file holds, in a bucket or not.

    Args:
      path: of the file.
      advice: the next step if it is damaged.

    Raises:
      UserError: it cannot be read or holds no such thing.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no JSON ({error}); {advice}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; {advice}")
    return content


def _extra(error: Exception) -> str:
    return ' (pip install -e ".[gcs]")' if "gcsfs" in str(error) else ""
