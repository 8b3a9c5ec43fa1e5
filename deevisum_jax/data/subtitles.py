"""Subtitles as plain cues, from .srt and .vtt files or a text stream inside the video."""

from __future__ import annotations

import codecs
import dataclasses
import html
import itertools
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import av

from deevisum_jax.errors import UserError
from deevisum_jax.media import first_default, open_media, presentation_start_s, read_packets

SUFFIXES = (".vtt", ".srt")

# FFmpeg's names of subtitle codecs that carry text; the others are pictures of text.
_TEXT_CODECS = frozenset({"ass", "mov_text", "srt", "ssa", "subrip", "text", "webvtt"})

_ARROW = "-->"
_TIME = r"(?:(\d+):)?([0-5]?\d):([0-5]?\d)[.,](\d{1,3})"
_TIMING = re.compile(rf"\s*{_TIME}\s*{_ARROW}\s*{_TIME}(?:\s.*)?")
# <i>, </v>, <v Roger>, <font color=...>, <00:00:01.000>, {\an8}; "a < b" and "<3" are text.
_TAG = re.compile(r"</?[A-Za-z][^<>]*>|<[\d:.]+>|\{\\[^}]*\}")
_DIRECTION_MARKS = re.compile("[\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]")


@dataclasses.dataclass(frozen=True)
class Cue:
    """One piece of text on screen from `start_s` to `end_s`, in seconds of the video."""

    start_s: float
    end_s: float
    text: str  # one line, without tags


def read_subtitles(path: str | os.PathLike) -> list[Cue]:
    """Reads an .srt or .vtt file into cues ordered by start; cues without words are left out.

    WebVTT is known by its first line whatever the ending. Text is UTF-8, or UTF-16 with its byte
    order mark. An empty file has no cues.

    Raises:
      UserError: no such file, another kind of file, not UTF-8, or a line that cannot be a part of
        subtitles; the message names the line.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such subtitle file; give the path of an .srt or .vtt file")
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{path}: subtitles of kind {file.suffix or 'without an ending'!r} are not read; "
            "convert them to .srt or .vtt"
        )
    try:
        text = _decode(file.read_bytes(), path)
    except OSError as error:
        raise UserError(f"{path}: the subtitles cannot be read ({error.strerror})") from None
    lines = re.split(r"\r\n|\r|\n", text)
    cues = _parse_vtt(lines, path) if _is_vtt_header(lines[0]) else _parse_srt(lines, path)
    return sorted((cue for cue in cues if cue.text), key=lambda cue: (cue.start_s, cue.end_s))


def load_subtitles(
    video_path: str | os.PathLike, subtitles_path: str | os.PathLike | None = None
) -> list[Cue]:
    """Finds the subtitles of a video, on the clock whose 0 is the first video frame.

    In this order: `subtitles_path` ("none" takes none); a file beside the video named like it
    (`talk.vtt`, `talk.srt`, then with a language, `talk.en.vtt`, English first); the first text
    stream inside the container, default ones first (pictures of text, as on DVDs, are passed over);
    else no cues.

    Raises:
      UserError: the file found or given cannot be read (see `read_subtitles`), or the video cannot
        be opened.
    """
    if subtitles_path == "none":
        return []
    if subtitles_path is not None:
        return read_subtitles(subtitles_path)
    sidecar = find_sidecar(Path(video_path))
    if sidecar is not None:
        return read_subtitles(sidecar)
    return _read_stream(video_path)


def text_between(cues: Sequence[Cue], start_s: float, end_s: float) -> str:
    """Joins the words on screen at any moment of [start_s, end_s), each repeated cue once."""
    return " ".join(_once(cue.text for cue in cues if _is_on(cue, start_s, end_s)))


def lines_around(
    cues: Sequence[Cue], start_s: float, end_s: float, context_s: float
) -> tuple[list[str], list[str]]:
    """What is said within `context_s` seconds before and after [start_s, end_s), but not in it.

    Returns:
      The lines before and those after, each in the order of time. A line that rolling captions
      show again is there once, and not at all if `text_between` has it next to it.
    """
    before = [
        cue.text
        for cue in cues
        if _is_on(cue, start_s - context_s, start_s) and not _is_on(cue, start_s, end_s)
    ]
    after = [
        cue.text
        for cue in cues
        if _is_on(cue, end_s, end_s + context_s) and not _is_on(cue, start_s, end_s)
    ]
    within = [cue.text for cue in cues if _is_on(cue, start_s, end_s)]
    while before and within and before[-1] == within[0]:
        before.pop()
    before = _once(before)
    latest = within[-1:] or before[-1:]
    return before, _once([*latest, *after])[len(latest) :]


def _is_on(cue: Cue, start_s: float, end_s: float) -> bool:
    return cue.start_s < end_s and (cue.end_s > start_s or cue.start_s == cue.end_s == start_s)


def _once(lines: Iterable[str]) -> list[str]:
    """Without lines that repeat the one before them, as rolling captions do."""
    return [line for line, _ in itertools.groupby(lines)]


def find_sidecar(video: Path, names: Iterable[str] | None = None) -> Path | None:
    """The subtitle file beside a video that is named like it, as `load_subtitles` takes it.

    Args:
      video: the video's path.
      names: of files beside it, all that begin like it, where they are known; None looks.
    """
    pattern = re.compile(
        rf"{re.escape(video.stem)}(\.[A-Za-z]{{2,3}}(?:-\w+)*)?(\.vtt|\.srt)", re.I
    )
    if names is None:
        names = os.listdir(video.parent) if video.parent.is_dir() else ()
    found = []
    for name in names:
        match = pattern.fullmatch(name)
        if match and (video.parent / name).is_file():
            language, suffix = (match[1] or "").lower(), match[2].lower()
            is_english = re.match(r"\.eng?\b", language) is not None
            rank = (bool(language), not is_english, language, SUFFIXES.index(suffix), name)
            found.append((rank, video.parent / name))
    return min(found)[1] if found else None


def _read_stream(video_path: str | os.PathLike) -> list[Cue]:
    with open_media(video_path) as container:
        stream = first_default(
            s
            for s in container.streams.subtitles
            if s.codec_context is not None and s.codec_context.name in _TEXT_CODECS
        )
        if stream is None:
            return []
        zero_s = presentation_start_s(video_path) or 0.0
        cues = []
        for packet in read_packets(container, [stream], []):
            if packet.pts is None or not packet.size:
                continue
            start_s = float(packet.pts * packet.time_base) - zero_s
            end_s = start_s + float((packet.duration or 0) * packet.time_base)
            try:
                parts = [part for part in packet.decode() if part.type == b"ass"]
            except av.FFmpegError:
                continue  # one damaged cue; the others stand
            text = _plain(" ".join(part.dialogue.decode("utf-8", "replace") for part in parts))
            if text and end_s > 0:
                cues.append(Cue(max(start_s, 0.0), end_s, text))
    return sorted(cues, key=lambda cue: (cue.start_s, cue.end_s))


def _decode(data: bytes, path: str | os.PathLike) -> str:
    is_utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    encoding, name = ("utf-16", "UTF-16") if is_utf16 else ("utf-8-sig", "UTF-8")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(
            f"{path}, line {line}: not {name} text (byte 0x{data[error.start]:02x}); save the file "
            "as UTF-8, for example with: iconv -f WINDOWS-1252 -t UTF-8"
        ) from error


def _is_vtt_header(line: str) -> bool:
    return re.match(r"WEBVTT(\s|$)", line) is not None


def _parse_vtt(lines: list[str], path: str | os.PathLike) -> list[Cue]:
    """Blocks between blank lines: the header, NOTE, STYLE, REGION, or a cue with optional id."""
    cues = []
    at = 0
    while at < len(lines) and lines[at].strip():  # the header's own block
        at += 1
    while at < len(lines):
        if not lines[at].strip():
            at += 1
            continue
        end = at
        while end < len(lines) and lines[end].strip():
            end += 1
        if re.match(r"(NOTE|STYLE|REGION)(\s|$)", lines[at]) is None:
            timing = at if _ARROW in lines[at] else at + 1
            if timing >= end or _ARROW not in lines[timing]:
                raise UserError(
                    f"{path}, line {at + 1}: expected a cue timing such as 00:01.000 --> 00:04.000,"
                    f" got {lines[at][:60]!r}; mend or delete that block"
                )
            start_s, end_s = _parse_timing(lines[timing], timing + 1, path)
            cues.append(Cue(start_s, end_s, _plain(" ".join(lines[timing + 1 : end]))))
        at = end
    return cues


def _parse_srt(lines: list[str], path: str | os.PathLike) -> list[Cue]:
    """Everything from one timing line to the next, less the next cue's number, is a cue's text."""
    timings = [i for i, line in enumerate(lines) if _ARROW in line]
    first = timings[0] if timings else len(lines)
    for i, line in enumerate(lines[:first]):
        if line.strip() and not line.strip().isdigit():
            raise UserError(
                f"{path}, line {i + 1}: expected a cue number or a timing such as "
                f"00:00:01,000 --> 00:00:04,000, got {line[:60]!r}; give an .srt or .vtt file"
            )
    cues = []
    for timing, following in itertools.pairwise([*timings, None]):
        start_s, end_s = _parse_timing(lines[timing], timing + 1, path)
        body = lines[timing + 1 : following]
        # The number of the next cue stands alone between a blank line and the next timing line.
        is_number = following is not None and body and body[-1].strip().isdigit()
        if is_number and (len(body) == 1 or not body[-2].strip()):
            body = body[:-1]
        cues.append(Cue(start_s, end_s, _plain(" ".join(body))))
    return cues


def _parse_timing(line: str, number: int, path: str | os.PathLike) -> tuple[float, float]:
    match = _TIMING.fullmatch(line)
    if match is None:
        raise UserError(
            f"{path}, line {number}: cannot read the timing {line[:60]!r}; "
            "wanted hours:minutes:seconds,milliseconds --> the same"
        )
    fields = match.groups()
    start_s, end_s = _seconds(fields[:4]), _seconds(fields[4:])
    if end_s < start_s:
        raise UserError(f"{path}, line {number}: the cue ends before it starts: {line[:60]!r}")
    return start_s, end_s


def _seconds(fields: Sequence[str | None]) -> float:
    hours, minutes, seconds, fraction = fields
    whole = 3600 * int(hours or 0) + 60 * int(minutes) + int(seconds)
    return whole + int(fraction.ljust(3, "0")) / 1000


def _plain(text: str) -> str:
    """Drops tags, decodes entities and puts the text on one line."""
    text = _TAG.sub("", text).replace("\\N", " ").replace("\\n", " ").replace("\\h", " ")
    text = _DIRECTION_MARKS.sub("", html.unescape(text))
    return " ".join(text.split())
