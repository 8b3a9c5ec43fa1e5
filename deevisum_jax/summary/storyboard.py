"""A video on one sheet: its keyframes as small pictures in rows, each with its time."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from deevisum_jax.errors import UserError
from deevisum_jax.files import replacing
from deevisum_jax.summary.report import clock

CONTACT_SHEET = "contact_sheet.jpg"

_CELL_W, _SMALL_CELL_W, _LEAST_CELL_W = 320, 160, 96  # pixels; a small video has small cells
_MAX_SHEET_W = 9600  # pixels; more columns have narrower cells
_MIN_COLUMNS = 4
_GAP, _TEXT_H, _FONT_SIZE = 10, 26, 17  # pixels
_MAX_ASPECT = 4.0  # height over width of a cell; a picture that is taller is shown smaller
_PAPER, _INK, _SOFT, _BAR, _RAIL = "#faf8f4", "#1d232b", "#66707c", "#c2551b", "#e4dfd5"
_JPEG_QUALITY = 88
_MAX_SIDE = 65_500  # pixels, of a JPEG


def write_contact_sheet(
    stills: Sequence[str | os.PathLike],
    entries: Sequence[Mapping[str, Any]],
    path: str | os.PathLike,
) -> None:
    """Writes all keyframes on one picture, in order of time.

    Below each stand its time and its relevance, with a bar that is full for the most relevant and
    empty for the least; those that only fill the number asked for are in grey.

    Args:
      stills: picture files, at least one.
      entries: one for each, with `time_s`, `relevance` and `filled`, as in summary.json.
      path: the JPEG; it appears only when complete.

    Raises:
      UserError: there is none, or a picture cannot be read.
    """
    if not stills:
        raise UserError("a contact sheet needs at least one keyframe")
    columns = min(len(stills), max(_MIN_COLUMNS, math.ceil(math.sqrt(len(stills)))))
    width, height = _size(stills[0])
    cell_w = max(_SMALL_CELL_W, min(_CELL_W, width))
    cell_w = max(_LEAST_CELL_W, min(cell_w, _MAX_SHEET_W // columns))
    rows = math.ceil(len(stills) / columns)
    aspect = min(_MAX_ASPECT, height / width, (_MAX_SIDE / rows - _GAP - _TEXT_H) / cell_w)
    cell_h = max(1, round(cell_w * aspect))
    size = (_GAP + columns * (cell_w + _GAP), _GAP + rows * (cell_h + _TEXT_H + _GAP))
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=_FONT_SIZE * min(1.0, cell_w / 200))
    values = [entry["relevance"] for entry in entries]
    low, spread = min(values), (max(values) - min(values)) or 1.0
    for k, (still, entry) in enumerate(zip(stills, entries, strict=True)):
        left = _GAP + k % columns * (cell_w + _GAP)
        top = _GAP + k // columns * (cell_h + _TEXT_H + _GAP)
        picture = _small(still, (cell_w, cell_h))
        sheet.paste(
            picture, (left + (cell_w - picture.width) // 2, top + (cell_h - picture.height) // 2)
        )
        ink = _SOFT if entry["filled"] else _INK
        base = top + cell_h + _TEXT_H - 6
        told = f"{entry['relevance']:.3f}"
        draw.text((left, base), clock(entry["time_s"]), fill=ink, font=font, anchor="ls")
        draw.text((left + cell_w, base), told, fill=ink, font=font, anchor="rs")
        share = (entry["relevance"] - low) / spread
        draw.rectangle((left, base + 4, left + cell_w - 1, base + 5), fill=_RAIL)
        if share > 0:
            end = left + max(1, round(share * cell_w)) - 1
            draw.rectangle((left, base + 4, end, base + 5), fill=_SOFT if entry["filled"] else _BAR)
    with replacing(Path(path)) as partial:
        sheet.save(partial, "JPEG", quality=_JPEG_QUALITY, subsampling=0)


def _size(path: str | os.PathLike) -> tuple[int, int]:
    """Width and height."""
    with _opened(path) as picture:
        return picture.size


def _small(path: str | os.PathLike, size: tuple[int, int]) -> Image.Image:
    """A copy within (width, height), its aspect kept."""
    with _opened(path) as picture:
        picture.draft("RGB", (2 * size[0], 2 * size[1]))  # what is not shown is not decoded
        small = picture.convert("RGB")
    small.thumbnail(size)
    return small


def _opened(path: str | os.PathLike) -> Image.Image:
    try:
        return Image.open(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: the keyframe cannot be read; write the keyframes first"
        ) from error
