"""Video decoding: the pictures on screen at a steady rate, by timestamps, in one pass.

FFmpeg (through PyAV) does the work. Time 0 is the instant of the first video frame that decodes;
`audio` and `subtitles` count from the same zero. Pixels are taken as stored: a sample aspect ratio
other than 1 is not corrected, a rotation or mirroring in the display matrix is.
"""

from __future__ import annotations

import dataclasses
import math
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Disposition, Stream
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from deevisum_jax.errors import UserError

# `change` compares thumbnails of this width and height: small enough to cost little beside
# decoding, large enough that a cut between two dark scenes still differs in layout.
THUMBNAIL_W, THUMBNAIL_H = 32, 18

# swscale's BILINEAR widens its triangle by the reduction factor, as big_vision's and PIL's bilinear
# with antialias do; FAST_BILINEAR does not.
_RESIZE = Interpolation.BILINEAR

# Timestamps are rounded to the container's tick (1 ms in Matroska); a picture counts as on screen
# this much before its own timestamp, so that frame k of a 24 fps file is met at k / 24 s.
_MAX_SLACK_S = 1e-3

# Stamps this far beyond the declared end of the file are taken for broken, in seconds.
_STRAY_STAMP_S = 60.0

# Frames missing at the end before we say that the file ends early, in seconds.
_EARLY_END_S = 0.5


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoInfo:
    """What the file holds, on the upright picture and the native timeline."""

    path: str
    duration_s: float  # from the first frame's start to the last frame's end
    native_fps: float  # n_frames / duration_s, the average rate
    n_frames: int  # frames that decode
    width: int  # pixels, after rotation
    height: int
    has_audio: bool
    notes: tuple[str, ...]  # plain sentences on what is unusual about the file


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodedVideo:
    """Frames sampled at a steady rate, with the native timeline beside them."""

    info: VideoInfo
    frames: np.ndarray  # uint8[N, H, W, 3], RGB
    frame_times: np.ndarray  # float64[N], seconds: k / frame_rate
    native_times: np.ndarray  # float64[n_frames], start of every native frame in seconds
    change: np.ndarray  # float32[n_frames] in [0, 1], difference to the frame before; 0 first


def decode_video(
    path: str | os.PathLike, *, frame_rate: float = 2.0, size: tuple[int, int] | None = None
) -> DecodedVideo:
    """Decodes the default video stream once and keeps the frames on screen at k / frame_rate.

    Only sampled frames stay in memory, so an hour of video streams through. A damaged packet is
    skipped and the file goes on; `info.notes` says so.

    Args:
      path: the video file (mp4, mkv, webm, avi, and whatever else FFmpeg reads).
      frame_rate: sampled frames per second; above the native rate pictures repeat.
      size: `(height, width)` in pixels of the upright frames, resized by bilinear with antialias
        without keeping the aspect; None keeps the native size.

    Returns:
      The sampled frames; N = ceil(duration_s * frame_rate), at least 1. `change[i]` is the mean
      absolute difference of 32 x 18 RGB thumbnails of frames i - 1 and i, 1 = black to white.

    Raises:
      UserError: the file is missing, empty, a folder, not a video, without a video stream, or
        nothing of it decodes; or `frame_rate` or `size` is not positive.
    """
    if not (math.isfinite(frame_rate) and frame_rate > 0):
        raise UserError(
            f"frame_rate must be a positive number of frames per second, got {frame_rate}"
        )
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise UserError(f"size must be (height, width) in pixels, both at least 1, got {size}")

    sampler = _Sampler(frame_rate, size)
    native_times: list[float] = []
    change: list[float] = []
    shrink = VideoReformatter()
    thumbnail = None
    last_duration_s = 0.0
    with open_media(path) as container:
        stream = video_stream(container, path)
        reader = _FrameReader(container, stream)
        slack_s = min(float(stream.time_base), _MAX_SLACK_S)
        for frame, time_s in reader:
            if not native_times:
                zero_s = time_s
            time_s -= zero_s
            small = shrink.reformat(
                frame, THUMBNAIL_W, THUMBNAIL_H, "rgb24", interpolation=Interpolation.AREA
            ).to_ndarray()
            small = small.astype(np.int16)
            change.append(0.0 if thumbnail is None else np.abs(small - thumbnail).mean() / 255)
            thumbnail = small
            sampler.show(frame, time_s, slack_s)
            native_times.append(time_s)
            last_duration_s = float((frame.duration or 0) * (frame.time_base or 0))
        if not native_times:
            raise UserError(
                f"{path}: no frame of its {stream.codec_context.name} video stream decodes"
                f"{reader.reason()}; play the file to check it, then convert or download it again"
            )
        times = np.asarray(native_times, np.float64)
        gaps = np.diff(times)
        if last_duration_s <= 0:
            last_duration_s = float(np.median(gaps)) if gaps.size else reader.period_s
        duration_s = float(times[-1]) + last_duration_s
        frames = sampler.finish(duration_s, slack_s)
        info = VideoInfo(
            path=os.fspath(path),
            duration_s=duration_s,
            native_fps=len(times) / duration_s,
            n_frames=len(times),
            width=sampler.upright_w,
            height=sampler.upright_h,
            has_audio=audio_stream(container) is not None,
            notes=(
                *reader.notes(duration_s),
                *sampler.notes(),
                *_rate_notes(gaps, float(stream.time_base)),
            ),
        )
    return DecodedVideo(
        info=info,
        frames=frames,
        frame_times=np.arange(len(frames)) / frame_rate,
        native_times=times,
        change=np.asarray(change, np.float32),
    )


def open_media(path: str | os.PathLike) -> InputContainer:
    """Opens a media file for reading; whatever stands in the way is a `UserError`."""
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
                f"index with a repair tool such as untrunc [{_averror(error)}]"
            ) from error
        raise UserError(
            f"{path}: not a video file that FFmpeg can read; give an mp4, mkv, webm or avi file "
            f"[{_averror(error)}]"
        ) from error
    if container.format.name == "tty":  # FFmpeg plays any .txt as terminal art
        container.close()
        raise UserError(f"{path}: a text file, not a video; give an mp4, mkv, webm or avi file")
    return container


def video_stream(container: InputContainer, path: str | os.PathLike) -> VideoStream:
    """The video stream a player would show: the first one marked default, cover pictures aside."""
    streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not streams:
        kinds = sorted({s.type for s in container.streams}) or ["nothing"]
        raise UserError(
            f"{path}: has no video stream (it holds {', '.join(kinds)}); give a file with pictures"
        )
    stream = _first_default(streams)
    if stream is None:
        raise UserError(
            f"{path}: this FFmpeg has no decoder for its video stream; convert it to H.264 first"
        )
    return stream


def audio_stream(container: InputContainer) -> Stream | None:
    """The first audio stream marked default, or None where no stream can be decoded."""
    return _first_default(container.streams.audio)


def presentation_start_s(path: str | os.PathLike) -> float | None:
    """Container time of the first video frame that decodes, in seconds; None without pictures."""
    with open_media(path) as container:
        if all(s.disposition & Disposition.attached_pic for s in container.streams.video):
            return None
        stream = video_stream(container, path)
        return next((time_s for _, time_s in _FrameReader(container, stream)), None)


def read_packets(
    container: InputContainer, streams: Sequence[Stream], errors: list[str]
) -> Iterator[av.Packet]:
    """Packets of `streams`; where reading itself fails, `errors` grows and the decoders flush."""
    try:
        yield from container.demux(streams)
    except av.FFmpegError as error:
        errors.append(_averror(error))
        for stream in streams:
            flush = av.Packet()
            flush.stream = stream
            yield flush


def latest_stamp_s(container: InputContainer) -> float:
    """Container time after which a timestamp cannot be right, for it would ask for endless filling.

    A broken stamp can lie years ahead; the declared length, where there is one, bounds it.
    """
    if container.duration is None:
        return math.inf
    return ((container.start_time or 0) + container.duration) / av.time_base + _STRAY_STAMP_S


class _FrameReader:
    """Iterates (frame, container time in seconds) in presentation order, past damaged data."""

    def __init__(self, container: InputContainer, stream: VideoStream):
        self._container = container
        self._stream = stream
        stream.thread_type = "AUTO"
        rate = stream.average_rate or stream.guessed_rate or 25
        self.period_s = float(1 / rate)
        self._errors: list[str] = []
        self._damaged_frames = 0
        self._untimed_frames = 0
        self._latest_s = latest_stamp_s(container)
        self._packets_end_s = -math.inf  # of any stream, container time

    def __iter__(self) -> Iterator[tuple[av.VideoFrame, float]]:
        previous_s = None
        for frame in self._frames():
            self._damaged_frames += bool(frame.is_corrupt)
            stamp = frame.pts if frame.pts is not None else frame.dts
            time_s = None if stamp is None else float(stamp * frame.time_base)
            if previous_s is None:
                time_s = 0.0 if time_s is None else time_s
            elif time_s is None or not previous_s < time_s <= self._latest_s:
                # The decoder hands frames out in the order they are shown; the stamp is at fault.
                self._untimed_frames += 1
                time_s = previous_s + self.period_s
            previous_s = time_s
            yield frame, time_s

    def _frames(self) -> Iterator[av.VideoFrame]:
        # Sound is read beside the pictures only to learn where the file really ends.
        streams = [self._stream, *self._container.streams.audio]
        for packet in read_packets(self._container, streams, self._errors):
            if packet.pts is not None:
                end_s = float((packet.pts + (packet.duration or 0)) * packet.time_base)
                self._packets_end_s = max(self._packets_end_s, end_s)
            if packet.stream is not self._stream:
                continue
            try:
                yield from packet.decode()
            except av.FFmpegError as error:
                self._errors.append(_averror(error))

    def reason(self) -> str:
        return f" [{self._errors[-1]}]" if self._errors else ""

    def notes(self, duration_s: float) -> Iterator[str]:
        if self._stream.duration is not None:
            wanted_s, got_s = float(self._stream.duration * self._stream.time_base), duration_s
        elif self._container.duration is not None:
            wanted_s = self._container.duration / av.time_base
            got_s = self._packets_end_s - (self._container.start_time or 0) / av.time_base
        else:
            wanted_s = got_s = duration_s
        if wanted_s - got_s > _EARLY_END_S:
            yield f"the file ends early: {got_s:.1f} s of {wanted_s:.1f} s decode"
        if self._errors:
            n = len(self._errors)
            packets = "1 damaged packet was" if n == 1 else f"{n} damaged packets were"
            yield f"{packets} skipped{self.reason()}"
        if self._damaged_frames:
            n = self._damaged_frames
            yield f"{n} {'frame shows' if n == 1 else 'frames show'} damage from broken data"
        if self._untimed_frames:
            n = self._untimed_frames
            yield (
                f"{n} {'frame has' if n == 1 else 'frames have'} no usable timestamp; "
                f"spaced at {1 / self.period_s:.3g} frames per second"
            )


class _Sampler:
    """Keeps the picture on screen at each k / frame_rate while frames pass by once."""

    def __init__(self, frame_rate: float, size: tuple[int, int] | None):
        self._frame_rate = frame_rate
        self._size = size
        self._reformatter = VideoReformatter()
        self._on_screen: av.VideoFrame | None = None
        self._pictures: list[np.ndarray | None] = []  # a repeated picture is stored once
        self._stored_size: tuple[int, int] | None = None  # (width, height) before rotation
        self._size_changes = False

    def show(self, frame: av.VideoFrame, time_s: float, slack_s: float) -> None:
        if self._on_screen is None:
            self._stored_size = frame.width, frame.height
            self._turn = _upright_turn(frame)
            swap = self._turn[0] % 2 == 1
            w, h = self._stored_size
            self.upright_w, self.upright_h = (h, w) if swap else (w, h)
            height, width = self._size or (self.upright_h, self.upright_w)
            self._target_w, self._target_h = (height, width) if swap else (width, height)
        else:
            self._size_changes |= (frame.width, frame.height) != self._stored_size
            self._emit_until(time_s - slack_s)
        self._on_screen = frame

    def finish(self, duration_s: float, slack_s: float) -> np.ndarray:
        self._emit_until(max(duration_s - slack_s, slack_s))
        out = np.empty((len(self._pictures), *self._pictures[0].shape), np.uint8)
        for k in range(len(out)):
            out[k] = self._pictures[k]
            self._pictures[k] = None  # given back at once: the peak stays near one copy
        return out

    def _emit_until(self, end_s: float) -> None:
        """Stores the picture on screen for every sample instant before `end_s`."""
        picture = None
        while len(self._pictures) / self._frame_rate < end_s:
            if picture is None:
                picture = self._upright_rgb(self._on_screen)
            self._pictures.append(picture)

    def _upright_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        rgb = self._reformatter.reformat(
            frame, self._target_w, self._target_h, "rgb24", interpolation=_RESIZE
        ).to_ndarray()
        quarter_turns, mirrored = self._turn
        if mirrored:
            rgb = rgb[:, ::-1]
        return np.rot90(rgb, quarter_turns)

    def notes(self) -> Iterator[str]:
        quarter_turns, mirrored = self._turn
        if quarter_turns:
            yield f"turned {90 * quarter_turns} degrees counter-clockwise as its metadata says"
        if mirrored:
            yield "mirrored as its metadata says"
        if self._size_changes:
            w, h = self._stored_size
            yield f"the picture size changes midway; every frame is scaled to {w} x {h}"


def _upright_turn(frame: av.VideoFrame) -> tuple[int, bool]:
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


def _rate_notes(gaps: np.ndarray, tick_s: float) -> Iterator[str]:
    if gaps.size < 2:
        return
    median_s = float(np.median(gaps))
    uneven = np.abs(gaps - median_s) > 0.25 * median_s + 2 * tick_s
    if uneven.mean() > 0.02:
        yield (
            f"variable frame rate: frames last {1e3 * gaps.min():.0f} to {1e3 * gaps.max():.0f} ms"
        )
    elif uneven.any():
        n = int(uneven.sum())
        yield (
            f"frames are missing or held in {n} {'place' if n == 1 else 'places'}, "
            f"for up to {gaps.max():.2f} s"
        )


def _first_default(streams) -> Stream | None:
    """Nearest to what players pick; FFmpeg's own rule (most pixels) would take any extra track."""
    usable = [s for s in streams if s.codec_context is not None]
    marked = [s for s in usable if s.disposition & Disposition.default]
    return next(iter(marked or usable), None)


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


def _averror(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
