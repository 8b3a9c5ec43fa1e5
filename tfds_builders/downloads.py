"""Finds the parts of a download, at whichever level and under whichever name it was unpacked."""

from __future__ import annotations

import collections
import hashlib
import itertools
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from deevisum_jax.errors import UserError

VIDEO_ENDINGS = (
    ".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts",
    ".ogv", ".ts", ".webm", ".wmv",
)  # fmt: skip
_FEATURE_ENDINGS = (".h5", ".hdf5")
_CHUNK = 2**20  # bytes read at a time


def list_files(
    folder: pathlib.Path, endings: Sequence[str], *, inside: bool = False
) -> list[pathlib.Path]:
    """The files of a folder that end so, in small letters or capitals, by name.

    What begins with a dot is left out: other systems keep there what they know about a file.

    Args:
      folder: which; one that does not exist holds nothing.
      endings: in small letters, such as ".mp4".
      inside: whether to look into the folders in it, too, and those that links there lead to.
    """
    if not folder.is_dir():
        return []
    return [
        path
        for path in sorted(_below(folder) if inside else folder.iterdir())
        if path.suffix.lower() in endings and not path.name.startswith(".") and path.is_file()
    ]


def _below(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """The files of a folder and of those in it; each folder once, by its own name first."""
    seen: set[str] = set()
    waiting = collections.deque([folder])  # the folder, then what links lead to
    while waiting:
        for home, folders, names in os.walk(waiting.popleft()):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            real = os.path.realpath(home)
            if real in seen:
                folders.clear()
                continue
            seen.add(real)
            for name in names:
                yield pathlib.Path(home, name)
            for name in folders:
                if os.path.islink(os.path.join(home, name)):
                    waiting.append(pathlib.Path(home, name))


def by_stem(paths: Iterable[pathlib.Path]) -> dict[str, pathlib.Path]:
    """Files by their names without endings.

    Raises:
      UserError: two have the same.
    """
    found: dict[str, pathlib.Path] = {}
    for path in paths:
        if other := found.get(path.stem):
            raise UserError(f"{other} and {path} are of the same video; keep one of them there")
        found[path.stem] = path
    return found


def first_file(folder: pathlib.Path, names: Iterable[str]) -> pathlib.Path | None:
    """The first of these files that exists under `folder`."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def first_folder(
    folder: pathlib.Path, names: Iterable[str], endings: Sequence[str]
) -> pathlib.Path | None:
    """The first of these folders under `folder` that holds files which end so."""
    return next((folder / name for name in names if list_files(folder / name, endings)), None)


def another_level(folder: pathlib.Path, is_right: Callable[[pathlib.Path], object]) -> str:
    """A half-sentence that names the folder around or in `folder` which is right; "" if none is."""
    inside = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for path in itertools.chain(inside, itertools.islice(folder.parents, 2)):
        if is_right(path):
            return f"; did you mean {path}?"
    return ""


def features_file(manual_dir: pathlib.Path, name: str) -> pathlib.Path | None:
    """The HDF5 file of the community's layout in a download, or in a folder `features` beside it.

    Args:
      manual_dir: the download.
      name: of the data set; beside the download its file says so, in it only if there are several.

    Raises:
      UserError: there are several.
    """

    def named(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
        return [path for path in paths if name in path.name.lower()]

    found = [
        path
        for folder in (manual_dir, manual_dir / "features")
        for path in list_files(folder, _FEATURE_ENDINGS)
    ]
    if len(found) > 1:
        found = named(found) or found
    # Beside a link as beside what it leads to.
    for folder in {manual_dir.absolute().parent.resolve(): None, manual_dir.resolve().parent: None}:
        found += named(list_files(folder / "features", _FEATURE_ENDINGS))
    if len(found) > 1:
        names = ", ".join(sorted(map(str, found)))
        raise UserError(f"there are several files of features, {names}; keep one of them there")
    return found[0] if found else None


def fingerprint(path: pathlib.Path) -> dict[str, Any]:
    """Name, size and SHA-256 of a file, for people who want to know what a build was made of."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return {"file": path.name, "bytes": path.stat().st_size, "sha256": digest.hexdigest()}
