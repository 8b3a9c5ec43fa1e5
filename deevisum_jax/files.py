"""Files and folders that are there whole or not at all, on this machine and in buckets.

In a bucket an object appears when its upload ends, and there are no folders to rename: a folder is
made here, and its objects are uploaded with the one that marks it as whole behind all others.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import json
import logging
import os
import pathlib
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any, BinaryIO

import fsspec
from etils import epath

from deevisum_jax.errors import UserError

_UNFINISHED = ".partial"
_NUM_TRIES, _TRY_AGAIN_S = 20, 0.1
_BUCKETS = ("gs", "s3")
_MADE_HERE = "deevisum-"  # begins the names of temporary folders of what goes to a bucket
_NUM_TRANSFERS = 8  # at a time
_TOLD_S = 10.0  # between two lines on how far a transfer is
_SHOWN_S = 10.0  # until a file that one host has written is seen by another
_NUM_UPLOADS = 3  # of what disappears again
_LEFT_S = 3600.0  # after which nobody is still writing a small file


@contextlib.contextmanager
def replacing(path: pathlib.Path | epath.Path) -> Iterator[pathlib.Path]:
    """A temporary file to write; it becomes `path` when all went well.

    It lies in the same folder, or among this machine's temporary files if `path` is in a bucket.

    Raises:
      UserError: the bucket does not take it.
    """
    if in_bucket(path):
        with _temporary_folder() as folder:
            yield folder / path.name
            with _reaching(path, "written"):
                _client(path).put_file(str(folder / path.name), os.fspath(path))
        return
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{_UNFINISHED}")
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream)  # else a crash of the machine may leave the new name to an empty file
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_whole(path: pathlib.Path | epath.Path, content: str | bytes) -> None:
    """Writes `content` to `path`, replacing what is there.

    Raises:
      UserError: `path` is in a bucket that does not take it.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def whole_folder(
    out: pathlib.Path | epath.Path, marker: str | None = None
) -> Iterator[pathlib.Path]:
    """A local folder to write into; its content becomes that of `out` only when all went well.

    Args:
      out: a new or empty folder, or address in a bucket.
      marker: the file in it that comes last, where files come one after the other: whoever finds
        it knows that the others are there.

    Raises:
      UserError: `out` is a file, holds something, or cannot be written.
    """
    if in_bucket(out):
        with _whole_in_bucket(out, marker) as folder:
            yield folder
        return
    check_local(out)
    target = pathlib.Path(out).resolve()
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
                for made in sorted(unfinished.iterdir(), key=lambda path: path.name == marker):
                    made.rename(target / made.name)
            else:
                target.parent.mkdir(parents=True, exist_ok=True)
                unfinished.rename(target)
    finally:
        _remove(unfinished)


@contextlib.contextmanager
def _whole_in_bucket(out: epath.Path, marker: str | None) -> Iterator[pathlib.Path]:
    with _reaching(out, "written"):
        client = _client(out)
        # Written and taken back, which are the rights that are needed, before any work is done.
        probe = f"{os.fspath(out)}/.{uuid.uuid4().hex[:8]}{_UNFINISHED}"
        client.pipe_file(probe, b"")
        client.rm_file(probe)
        if not is_empty(out):
            raise UserError(f"{out} holds something already; give --out a new folder")
    with _temporary_folder() as folder:
        yield folder
        made = {
            path.relative_to(folder).as_posix(): str(path)
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        last = made.pop(str(marker), None)
        with _reaching(out, "written"):
            try:
                _upload(made, out)
                if last is not None:
                    client.put_file(last, f"{os.fspath(out)}/{marker}")
            except BaseException:
                with contextlib.suppress(Exception):  # the first reason is the one to tell
                    # Where the marker is there, what was to be written is, by another's hand.
                    if last is None or not client.exists(f"{os.fspath(out)}/{marker}"):
                        client.rm([f"{os.fspath(out)}/{name}" for name in made])
                raise


def _upload(made: Mapping[str, str], out: epath.Path) -> None:
    """Uploads local files, by their names in `out`, until all are seen there.

    Another start of the same command may take them for what a killed one has left, and clear them.
    """
    client, missing = _client(out), sorted(made)
    for _ in range(_NUM_UPLOADS):
        if missing:
            addresses = [f"{os.fspath(out)}/{name}" for name in missing]
            client.put([made[name] for name in missing], addresses)
            missing = sorted(made.keys() - _objects(out))
    if missing:
        raise UserError(
            f"{out} loses what is written there ({', '.join(missing)}), as if another command "
            "cleared it; stop the other, and start this one again"
        )


def check_room(out: pathlib.Path | epath.Path, num_bytes: int, advice: str = "give --out") -> None:
    """Refuses a disk that cannot hold what is to be written.

    What goes to a bucket is made among this machine's temporary files first.

    Args:
      out: where it is to be written.
      num_bytes: that it has.
      advice: how another disk is named, for the message.

    Raises:
      UserError: it has too little room.
    """
    home = pathlib.Path(tempfile.gettempdir() if in_bucket(out) else out).resolve()
    free = shutil.disk_usage(_nearest_there_is(home)).free
    if free < num_bytes:
        where = "the disk of temporary files" if in_bucket(out) else "its disk"
        advice = "set TMPDIR to" if in_bucket(out) else advice
        raise UserError(
            f"{out} wants {num_bytes / 1e9:.3g} GB and {where} has {free / 1e9:.3g} GB left; make "
            f"room, or {advice} another disk"
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


@contextlib.contextmanager
def _temporary_folder() -> Iterator[pathlib.Path]:
    folder = pathlib.Path(tempfile.mkdtemp(prefix=_MADE_HERE))
    try:
        yield folder
    finally:
        _remove(folder)


def check_local(out: pathlib.Path | epath.Path) -> None:
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
def writing(out: pathlib.Path | epath.Path) -> Iterator[None]:
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
      UserError: an address of another kind, or one that lacks a slash.
    """
    text = os.fspath(path)
    if found := re.match(rf"({'|'.join(_BUCKETS)}):/(?!/)", text):
        raise UserError(f"{text} lacks a slash; write {found[0]}/{text[found.end() :]}")
    scheme, colon, _ = text.partition("://")
    if colon and scheme not in _BUCKETS:
        raise UserError(
            f"{text} is neither a path nor in a bucket ({', '.join(_BUCKETS)}); download it, and "
            "give the path of the download"
        )
    if colon:
        _set_clients_up()
    return epath.Path(text).expanduser()


def in_bucket(path: str | os.PathLike[str]) -> bool:
    """Whether this is an address such as gs://bucket/folder."""
    return os.fspath(path).partition("://")[0] in _BUCKETS


@functools.cache
def _set_clients_up() -> None:
    """Once, before the first client is made."""
    # Zonal buckets need another protocol. Without the right to look which kind a bucket is, the
    # client would ask again, and warn, at every access.
    os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    # It logs every error that it raises, with a traceback.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    for scheme in _BUCKETS:
        # A kept listing would hide what other processes have written since.
        fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False


def _client(path: epath.Path) -> fsspec.AbstractFileSystem:
    _set_clients_up()
    return fsspec.filesystem(os.fspath(path).partition("://")[0])


@contextlib.contextmanager
def _reaching(path: pathlib.Path | epath.Path, done: str) -> Iterator[None]:
    """What the client of a bucket raises inside, of whatever type, becomes a `UserError`.

    Args:
      path: what is reached for.
      done: what cannot be done to it, as a participle.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not in_bucket(path) and not isinstance(error, OSError | ValueError):
            raise  # ValueError: no possible file name
        raise UserError(f"{os.fspath(path)} cannot be {done}: {_why(path, error)}") from error


def _why(path: pathlib.Path | epath.Path, error: Exception) -> str:
    """The reason, and the next step."""
    said = str(error).strip().replace("\n", ": ") or type(error).__name__
    if not in_bucket(path):
        return said
    scheme, _, rest = os.fspath(path).partition("://")
    bucket = f"{scheme}://{rest.partition('/')[0]}"
    if isinstance(error, ImportError):
        extra = '-e ".[gcs]"' if scheme == "gs" else "s3fs"
        return f"no client for such buckets is installed; pip install {extra}"
    if isinstance(error, FileNotFoundError):
        create = (
            f"gcloud storage buckets create {bucket}" if scheme == "gs" else f"aws s3 mb {bucket}"
        )
        return f"there is no bucket {bucket}; correct the address, or create it ({create})"
    if (
        isinstance(error, PermissionError)
        or str(error).startswith("Forbidden")
        or str(getattr(error, "code", "")) in ("401", "403")
    ):
        login = "gcloud auth application-default login" if scheme == "gs" else "aws configure"
        return (
            f"you have no right to ({said}); log in ({login}), or ask the owner of {bucket} for "
            "the right to read and write objects"
        )
    return f"{said}; check the address, the network and the login"


def exists(path: epath.Path) -> bool:
    """Whether there is such a file or folder, in a bucket or not.

    Raises:
      UserError: nobody can tell; for want of a client for that kind of bucket, for instance.
    """
    with _reaching(path, "looked for"):
        return path.exists()


def is_shown(path: epath.Path) -> bool:
    """Whether this host sees what another has written; where folders are shared that takes a while.

    Raises:
      UserError: as `exists`.
    """
    deadline = time.monotonic() + _SHOWN_S
    while not exists(path):
        if time.monotonic() > deadline:
            return False
        time.sleep(_TRY_AGAIN_S)
    return True


def is_empty(folder: pathlib.Path | epath.Path) -> bool:
    """Whether this folder, in a bucket or not, holds nothing but unfinished work.

    Raises:
      UserError: it is in a bucket, and cannot be listed.
    """
    if not in_bucket(folder):
        return _is_empty(pathlib.Path(folder))
    return all(name.endswith(_UNFINISHED) for name in _objects(folder))


def whole_folders(home: epath.Path, marker: str) -> set[str]:
    """Names of the folders in `home` that `whole_folder` has finished there.

    Raises:
      UserError: they are in a bucket, and cannot be listed.
    """
    if in_bucket(home):
        return _marked(_objects(home), marker)
    return {
        folder.name
        for folder in home.iterdir()
        if not folder.name.endswith(_UNFINISHED) and (folder / marker).exists()
    }


def _marked(objects: Iterable[str], marker: str) -> set[str]:
    """Those folders, of objects as seen from above them, that have the marker."""
    names = (name.partition("/") for name in objects)
    return {folder for folder, _, file in names if file == marker}


def clear_unfinished(home: epath.Path, marker: str, names: Container[str]) -> None:
    """Removes what killed writers of `whole_folder(home / name, marker)` have left there.

    And what those of `write_whole(home / name)` have left, an hour ago or more.

    Args:
      home: where the folders and files are.
      marker: the file that comes last in a folder.
      names: of folders that nobody is writing now, and of files.

    Raises:
      UserError: they are in a bucket, and cannot be listed or removed.
    """
    if in_bucket(home):
        objects = _objects(home)
        whole = _marked(objects, marker)
        left = collections.defaultdict(list)
        for name in objects:
            folder, slash, _ = name.partition("/")
            if slash and folder in names and folder not in whole:
                left[folder].append(name)
        with _reaching(home, "cleared"):
            client = _client(home)
            for folder, found in left.items():
                # Somebody may be writing it after all, and have finished since.
                if not client.exists(f"{os.fspath(home)}/{folder}/{marker}"):
                    for name in found:
                        client.rm_file(f"{os.fspath(home)}/{name}")
        return
    unfinished = re.compile(rf"\.(.+)\.[0-9a-f]{{8}}{re.escape(_UNFINISHED)}")
    for path in pathlib.Path(home).iterdir():
        found = unfinished.fullmatch(path.name)
        if not found or found[1] not in names:
            continue
        if path.is_dir():
            _remove(path)
            continue
        with contextlib.suppress(FileNotFoundError):  # others clear up, too
            if time.time() - path.stat().st_mtime > _LEFT_S:
                path.unlink()


def _objects(folder: epath.Path) -> list[str]:
    """Names of all objects under an address, as seen from there."""
    with _reaching(folder, "listed"):
        client = _client(folder)
        start = os.fspath(folder).partition("://")[2].rstrip("/") + "/"
        return [name.removeprefix(start) for name in client.find(os.fspath(folder))]


def contents(folder: epath.Path) -> dict[str, tuple[int, str]]:
    """Size and checksum of every file in a folder of a bucket, by name.

    Raises:
      UserError: it cannot be listed.
    """
    with _reaching(folder, "listed"):
        return {
            about["name"].rpartition("/")[2]: (about["size"], about.get("crc32c") or about["ETag"])
            for about in _client(folder).ls(os.fspath(folder), detail=True)
            if about["type"] == "file" and not about["name"].endswith("/")
        }


@contextlib.contextmanager
def open_binary(path: epath.Path) -> Iterator[BinaryIO]:
    """A file to read from, local or not.

    Raises:
      UserError: it does not exist or cannot be opened.
    """
    with _reaching(path, "opened"):
        try:
            stream = path.open("rb")
        except FileNotFoundError as error:
            raise UserError(f"{os.fspath(path)} does not exist; check the path") from error
    with stream:
        yield stream


@contextlib.contextmanager
def local_copy(path: epath.Path, beside: Sequence[str] = ()) -> Iterator[pathlib.Path]:
    """The file itself, or while it is needed a copy of what is in a bucket, of the same name.

    Args:
      path: of the file.
      beside: endings, such as ".srt". Of files in a bucket, those that have one and are called
        alike (for a.mp4: a.srt, a.en.srt) are copied, too.

    Raises:
      UserError: it is in a bucket, and does not exist or cannot be read.
    """
    if not in_bucket(path):
        yield pathlib.Path(path)
        return
    with _temporary_folder() as folder:
        with _reaching(path, "read"):
            client = _client(path)
            try:
                client.get_file(os.fspath(path), str(folder / path.name))
            except FileNotFoundError as error:
                raise UserError(f"{os.fspath(path)} does not exist; check the path") from error
            if beside:
                start = f"{path.stem}."
                home = os.fspath(path.parent).partition("://")[2] + "/"
                for other in client.find(os.fspath(path.parent), prefix=start):
                    name = other.removeprefix(home)
                    # Also listed is what lies deeper, in a.d/ for instance.
                    if "/" not in name and name.lower().endswith(tuple(beside)):
                        client.get_file(other, str(folder / name))
        yield folder / path.name


def user_copy(folder: epath.Path) -> pathlib.Path:
    """Where this user keeps copies of what is in a folder of a bucket; it need not be there."""
    home = pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return home / "deevisum_jax" / digest(os.fspath(folder))


def digest(text: str) -> str:
    """16 hexadecimal digits, for names that follow from a content."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fetch(remote: epath.Path, sizes: Mapping[str, int], to: pathlib.Path) -> None:
    """Copies files of a bucket into a folder here; those that are there stay as they are.

    Args:
      remote: a folder of the bucket.
      sizes: bytes of every file wanted, by name.
      to: in the user's cache; made.

    Raises:
      UserError: the disk has too little room, or a file cannot be read.
      OSError: a file cannot be written.
    """
    to.mkdir(parents=True, exist_ok=True)
    sizes = {name: size for name, size in sizes.items() if not (to / name).exists()}
    check_room(to, sum(sizes.values()), advice="set XDG_CACHE_HOME to")

    def download(name: str) -> None:
        with local_copy(remote / name) as copy, replacing(to / name) as temporary:
            shutil.copyfile(copy, temporary)

    transfer(download, sizes, f"of {remote} downloaded")


def transfer(copy: Callable[[str], None], sizes: Mapping[str, int], done: str) -> None:
    """Copies files by name, and says now and then how many bytes are `done`."""
    num_bytes, told_s = 0, time.monotonic()
    with futures.ThreadPoolExecutor(_NUM_TRANSFERS) as pool:
        for size, _ in zip(sizes.values(), pool.map(copy, sizes), strict=True):
            num_bytes += size
            if time.monotonic() > told_s + _TOLD_S:
                told_s = time.monotonic()
                whole = sum(sizes.values())
                print(f"{num_bytes / 1e9:.3g} of {whole / 1e9:.3g} GB {done}", file=sys.stderr)


def read_json(path: pathlib.Path | epath.Path, advice: str = "download it again") -> dict[str, Any]:
    """The JSON object that a file holds, in a bucket or not.

    Args:
      path: of the file.
      advice: the next step if it is damaged.

    Raises:
      UserError: it cannot be read or holds no such thing.
    """
    with _reaching(path, "read"):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} is no JSON ({error}); {advice}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no JSON object; {advice}")
    return content
