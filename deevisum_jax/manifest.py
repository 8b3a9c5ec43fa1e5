"""A list of videos as a CSV file: which there are, and what is known of each.

One file serves all that works on many videos: `summarize` reads its videos, titles and subtitles,
and a data set of one's own (tfds_builders/video_folder) reads scores and splits besides.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import os
import re
import unicodedata
from collections.abc import Container, Iterator, Mapping, Sequence

from etils import epath

from deevisum_jax import files
from deevisum_jax.errors import UserError, closest

COLUMNS = ("video", "title", "subtitles", "id", "scores", "split")

_NUM_SHOWN = 10  # problems of a file
_MAX_ID_BYTES = 200
# What Linux and macOS take for a file.
_MAX_NAME_BYTES, _MAX_PATH_BYTES = 255, 1023
# Of paths on any system and of addresses of objects, and what `gcloud storage` takes for patterns.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|#\[\]]')


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A row of a manifest."""

    id: str  # names its folder
    video: epath.Path
    title: str | None = None
    subtitles: epath.Path | str | None = None  # "none" takes none, None looks beside and inside
    scores: epath.Path | None = None
    split: str | None = None

    @property
    def row(self) -> dict[str, str | None]:
        """What its summary is made of; the same wherever the manifest is read from."""
        words = self.subtitles
        return {
            "video": absolute(self.video),
            "title": self.title,
            "subtitles": words if words in (None, "none") else absolute(words),
        }


def absolute(path: epath.Path) -> str:
    """An address of a bucket as it is; a path of this machine from its root on."""
    return os.fspath(path) if files.in_bucket(path) else printable(os.path.abspath(path))


def printable(text: str) -> str:
    """What can be tokenized, printed and written: file names may hold bytes that are no text."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read(path: epath.Path, *, reserved: Container[str] = ()) -> list[Item]:
    """The videos that a CSV file lists, in its order.

    Its first row names the columns: `video` (a path, relative to the manifest's folder, or an
    address in a bucket) and, where wanted, `title`, `subtitles` ("none" takes none), `id` (else the
    name of the file without its ending), `scores` (the path of a file) and `split`.

    Args:
      path: the file.
      reserved: what no id may be, in lower case: files and folders beside those of the ids.

    Raises:
      UserError: it cannot be read, has other columns or no rows, or rows that cannot be; all of
        them are named.
    """
    header, rows, problems = read_table(path, COLUMNS, ("video",))
    if not rows and not problems:
        raise UserError(f"{path} lists no video; give it a row for each, below {','.join(header)}")
    items: dict[int, Item] = {}
    for line, cells in rows:
        try:
            items[line] = _item(path.parent, cells, reserved)
        except UserError as error:
            problems.append((line, f"line {line}: {error}"))
    refuse(path, [said for _, said in sorted(problems)] + _repeated(items))
    return list(items.values())


def read_table(
    path: epath.Path, columns: Sequence[str], required: Sequence[str]
) -> tuple[list[str], list[tuple[int, dict[str, str]]], list[tuple[int, str]]]:
    """A CSV file whose first row names its columns.

    Args:
      path: the file.
      columns: that it may have, in any order; small letters or capitals are the same.
      required: those that it must have.

    Returns:
      The columns that it has; the rows that are not empty, each with the number of its first line;
      and the rows that have too many cells or a NUL, as (line, what is said of it).

    Raises:
      UserError: it cannot be read, or its columns cannot be.
    """
    with files.open_binary(path) as stream:
        content = stream.read()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text; save the file as UTF-8") from error
    lines = _lines(path, text)
    _, header = next(lines, (0, []))
    if not header:
        raise UserError(f"{path} is empty; its first row names the columns: {', '.join(columns)}")
    while not header[-1]:  # spreadsheets write them
        header.pop()
    header = [name.lower() for name in header]
    _check_columns(path, header, columns, required)
    rows, problems = [], []
    for line, cells in lines:
        while len(cells) > len(header) and not cells[-1]:
            cells.pop()
        if len(cells) > len(header):
            told = f"line {line} has {len(cells)} cells for {len(header)} columns"
            problems.append((line, told))
        elif any("\0" in cell for cell in cells):
            told = f"line {line} has a NUL character, which no text has; save the file as UTF-8"
            problems.append((line, told))
        else:
            rows.append((line, dict(zip(header, cells, strict=False))))
    return header, rows, problems


def refuse(path: epath.Path, problems: Sequence[str]) -> None:
    """Ends on a file with problems.

    Raises:
      UserError: there are some; the first ones are named.
    """
    if problems:
        raise UserError(listing(f"{path} has rows to correct:", problems))


def listing(first: str, problems: Sequence[str], *last: str) -> str:
    """A message with a line for each problem, or for the first of them."""
    more = len(problems) - _NUM_SHOWN
    shown = [*problems[:_NUM_SHOWN], *([f"and {more} more"] if more > 0 else [])]
    return "\n".join([first, *(f"  {problem}" for problem in shown), *last])


def _lines(path: epath.Path, text: str) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not empty, each with the number of its first line."""
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = lines.line_num + 1
        try:
            cells = [cell.strip() for cell in next(lines)]
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(
                f"{path}, line {line}: no CSV ({error}); mend the quotes, or save it anew with "
                "commas between the cells"
            ) from error
        if any(cells):
            yield line, cells


def _check_columns(
    path: epath.Path, header: Sequence[str], columns: Sequence[str], required: Sequence[str]
) -> None:
    for mark, name in ((";", "semicolons"), ("\t", "tabs")):
        if mark in header[0]:
            raise UserError(f"{path} has {name} between the cells; save it with commas")
    unknown = [name for name in header if name not in columns]
    if unknown:
        advice = "; ".join(f"{name!r}: {closest(name, columns)}" for name in unknown)
        raise UserError(f"{path} has columns that are not known ({advice})")
    for name in required:
        if name not in header:
            raise UserError(f"{path} has no column {name}; it has {', '.join(header)}")
    if len(set(header)) < len(header):
        raise UserError(f"{path} names a column twice ({', '.join(header)}); remove one")


def _item(home: epath.Path, cells: Mapping[str, str], reserved: Container[str]) -> Item:
    if not cells.get("video"):
        raise UserError("the column video is empty")
    subtitles = cells.get("subtitles") or None
    if subtitles is not None:
        subtitles = "none" if subtitles.lower() == "none" else _within(home, subtitles)
    video = _within(home, cells["video"])
    name = cells.get("id") or video.stem
    check_id(name)
    if _folded(name) in reserved:
        raise UserError(f"id {name!r} is a file or folder of its own in --out; choose another id")
    return Item(
        id=name,
        video=video,
        title=cells.get("title") or None,
        subtitles=subtitles,
        scores=_within(home, cells["scores"]) if cells.get("scores") else None,
        split=cells.get("split") or None,
    )


def check_id(name: str) -> None:
    """Makes sure that a folder, a file or an object can have this name, on any system.

    Raises:
      UserError: it cannot.
    """
    fits = len(name.encode("utf-8", "surrogateescape")) <= _MAX_ID_BYTES
    if not name or _UNSAFE.search(name) or name[0] == "." or name[-1] in ". " or not fits:
        raise UserError(
            f"id {name!r} is no good name of a folder; give it one in the column id, of letters, "
            "digits, spaces, - and _"
        )


def _within(home: epath.Path, text: str) -> epath.Path:
    path = files.locate(text)
    if files.in_bucket(path):
        return path
    num_bytes = [len(part.encode()) for part in path.parts]
    if max(num_bytes, default=0) > _MAX_NAME_BYTES or len(text.encode()) > _MAX_PATH_BYTES:
        raise UserError(
            f"{text[:60]}...: no file has so long a name ({len(text.encode())} bytes); are the "
            "cells in their columns?"
        )
    return path if path.is_absolute() else home / path


def _folded(name: str) -> str:
    """Equal for names that some file systems cannot tell apart, such as a and A."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def _repeated(items: Mapping[int, Item]) -> list[str]:
    lines = collections.defaultdict(list)
    for line, item in items.items():
        lines[_folded(item.id)].append(line)
    return [
        f"lines {', '.join(map(str, where))} have the same id {items[where[0]].id!r}; tell them "
        "apart in the column id"
        for where in lines.values()
        if len(where) > 1
    ]
