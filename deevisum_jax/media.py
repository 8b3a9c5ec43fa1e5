"""Media files as they come: opened with clear errors, on one timeline, past damaged data.

FFmpeg (through PyAV) does the work. Everybody who reads pictures or sound goes through here, so
that scores, shots, subtitles and the summary film agree on which stream is meant, which way is up,
and when time 0 is: the instant of the first video frame that decodes.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.stream import VideoStream

from deevisum_jax.errors import UserError

# Stamps this far beyond the declared end of the file are taken for broken, in seconds.
_STRAY_STAMP_S = 60.0


def open_media(path: str | os.PathLike) -> InputContainer:
    """Opens a media file for reading.

    Raises:
      UserError: the file is missing, empty, a folder, not readable, or not media.
    """
    file = Path(path)
    if not file.exists():
        raise UserError(f"{path}: no such file; check the path")
    if file.is_dir():
        raise UserError(f"{path}: a folder, wanted one video file; give the path of a file in it")
    if not os.access(file, os.R_OK):
        raise UserError(f"{path}: cannot be read; check the file's permissions")
    if file.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty (0 bytes); copy or download it again")
    try:
        # Only local bytes: a playlist must not make FFmpeg fetch what it names.
        container = av.open(os.path.abspath(file), options={"protocol_whitelist": "file"})
    except (av.FFmpegError, OSError, ValueError) as error:
        boxes = _top_level_boxes(file)
        if "ftyp" in boxes and "moov" not in boxes:
            raise UserError(
                f"{path}: the index of this mp4 file is missing (no 'moov' box), as after a "
                "recording or download that stopped midway; fetch the file again, or rebuild the "
                f"index with a repair tool such as untrunc [{reason(error)}]"
            ) from error
        raise UserError(
            f"{path}: not a video file that FFmpeg can read; give an mp4, mkv, webm or avi file "
            f"[{reason(error)}]"
        ) from error
    if container.format.name == "tty":  # FFmpeg plays any .txt as terminal art
        container.close()
        raise UserError(f"{path}: a text file, not a video; give an mp4, mkv, webm or avi file")
    return container


def video_stream(container: InputContainer, path: str | os.PathLike) -> VideoStream:
    """The video stream a player would show: the first one marked default, cover pictures aside.

    Raises:
      UserError: there is none, or none that this FFmpeg decodes; `path` is named in the message.
    """
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise UserError(
            f"{path}: has no video stream (it holds {', '.join(kinds)}); give a file with pictures"
        )
    stream = first_default(streams)
    if stream is None:
        raise UserError(
            f"{path}: this FFmpeg has no decoder for its video stream; convert it to H.264 first"
        )
    return stream


def audio_stream(container: InputContainer) -> Stream | None:
    """The first audio stream marked default, or None where no stream can be decoded."""
    return first_default(container.streams.audio)


def first_default(streams: Iterable[Stream]) -> Stream | None:
    """Of the streams that can be decoded the first one marked default, else the first one.

    Nearest to what players pick; FFmpeg's own rule (most pixels) would take any extra track.
    """
    usable = [s for s in streams if s.codec_context is not None]
    marked = [s for s in usable if s.disposition & Disposition.default]
    return next(iter(marked or usable), None)


class FrameReader:
    """Iterates (frame, seconds since the first frame) in the order shown, past damaged data.

    Times ascend strictly: where a timestamp is missing, does not ascend or lies far beyond the
    file's end, the frame follows the one before at the stream's rate. What was amiss is counted on
    the way, and complete after the last frame.
    """

    def __init__(self, container: InputContainer, stream: VideoStream, *, one_thread: bool = False):
        self._container = container
        self._stream = stream
        stream.thread_type = "NONE" if one_thread else "AUTO"
        rate = stream.average_rate or stream.guessed_rate or 25
        self.period_s = float(1 / rate)
        self.zero_s: float | None = None  # container time of the first frame, once it was read
        self.errors: list[str] = []  # one for each packet that does not decode
        self.damaged_frames = 0
        self.untimed_frames = 0
        self.packets_end_s = -math.inf  # of any stream, container time

    def __iter__(self) -> Iterator[tuple[av.VideoFrame, float]]:
        latest_s = _latest_stamp_s(self._container)
        previous_s = None
        for frame in self._frames():
            self.damaged_frames += bool(frame.is_corrupt)
            stamp = frame.pts if frame.pts is not None else frame.dts
            time_s = None if stamp is None else float(stamp * frame.time_base)
            if previous_s is None:
                self.zero_s = time_s = 0.0 if time_s is None else time_s
            elif time_s is None or not previous_s < time_s <= latest_s:
                # The decoder hands frames out in the order they are shown; the stamp is at fault.
                self.untimed_frames += 1
                time_s = previous_s + self.period_s
            previous_s = time_s
            yield frame, time_s - self.zero_s

    def _frames(self) -> Iterator[av.VideoFrame]:
        # Sound is read beside the pictures only to learn where the file really ends.
        streams = [self._stream, *self._container.streams.audio]
        for packet in read_packets(self._container, streams, self.errors):
            if packet.pts is not None:
                end_s = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                self.packets_end_s = max(self.packets_end_s, end_s)
            if packet.stream is not self._stream:
                continue
            try:
                yield from packet.decode()
            except av.FFmpegError as error:
                self.errors.append(reason(error))


def read_sound(
    container: InputContainer, stream: Stream
) -> Iterator[tuple[av.AudioFrame, float | None]]:
    """(frame, container time in seconds) of a sound stream, past damaged packets.

    The time is None where the frame has no stamp, or one far beyond the file's end. Times may have
    gaps (a damaged packet leaves one) and may jump back.
    """
    latest_s = _latest_stamp_s(container)
    for packet in read_packets(container, [stream], []):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            continue
        for frame in frames:
            time_s = None if frame.pts is None else float(frame.pts * frame.time_base)
            yield frame, None if time_s is not None and time_s > latest_s else time_s


def read_packets(
    container: InputContainer, streams: Sequence[Stream], errors: list[str]
) -> Iterator[av.Packet]:
    """Packets of `streams`; where reading itself fails, `errors` grows and the decoders flush."""
    try:
        yield from container.demux(streams)
    except av.FFmpegError as error:
        errors.append(reason(error))
        for stream in streams:
            flush = av.Packet()
            flush.stream = stream
            yield flush


def presentation_start_s(path: str | os.PathLike) -> float | None:
    """Container time of the first video frame that decodes, in seconds; None without pictures."""
    with open_media(path) as container:
        if all(s.disposition & Disposition.attached_pic for s in container.streams.video):
            return None
        reader = FrameReader(container, video_stream(container, path))
        next(iter(reader), None)
        return reader.zero_s


def upright_turn(frame: av.VideoFrame) -> tuple[int, bool]:
    """(quarter turns counter-clockwise, mirror left-right first) that put `frame` upright.

    The display matrix maps a stored point (x right, y down) to the screen by the row vector rule
    x' = a x + c y, y' = b x + d y, in 16.16 fixed point (libavutil/display.h). Mirroring first
    turns (a, b) into (-a, -b) and leaves a pure rotation.
    """
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 0, False
    a, b, _, c, d = struct.unpack("<5i", bytes(matrix)[:20])
    mirrored = a * d - b * c < 0
    if mirrored:
        a, b = -a, -b
    # The stored x axis lands on (a, b), y down: counter-clockwise by atan2(-b, a).
    return round(math.atan2(-b, a) / (math.pi / 2)) % 4, mirrored


def reason(error: Exception) -> str:
    """What FFmpeg says, without its error number and file name."""
    return getattr(error, "strerror", None) or str(error)


def _latest_stamp_s(container: InputContainer) -> float:
    """Container time after which a timestamp cannot be right, for it would ask for endless filling.

    A broken stamp can lie years ahead; the declared length, where there is one, bounds it.
    """
    if container.duration is None:
        return math.inf
    return ((container.start_time or 0) + container.duration) / av.time_base + _STRAY_STAMP_S


def _top_level_boxes(path: Path) -> set[str]:
    """Names of the outermost boxes of an ISO media file (ISO/IEC 14496-12, 4.2)."""
    names: set[str] = set()
    with path.open("rb") as file:
        at = 0
        while True:
            file.seek(at)
            header = file.read(16)
            if len(header) < 8:
                return names
            size, name = struct.unpack(">I4s", header[:8])
            names.add(name.decode("latin-1"))
            if size == 1 and len(header) == 16:
                size = struct.unpack(">Q", header[8:])[0]
            if size < 8:  # 0: the box runs to the end of the file
                return names
            at += size
