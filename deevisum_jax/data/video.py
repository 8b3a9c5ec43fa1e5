"""Video decoding: the pictures on screen at a steady rate, by timestamps, in one pass.

Time 0 is the instant of the first video frame that decodes; `audio` and `subtitles` count from the
same zero. Pixels are taken as stored: a sample aspect ratio other than 1 is not corrected, a
rotation or mirroring in the display matrix is.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Sequence

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from deevisum_jax.data.spool import PictureSpool
from deevisum_jax.errors import UserError
from deevisum_jax.media import FrameReader, audio_stream, open_media, upright_turn, video_stream

# `change` compares thumbnails of this width and height: small enough to cost little beside
# decoding, large enough that a cut between two dark scenes still differs in layout.
THUMBNAIL_W, THUMBNAIL_H = 32, 18

# swscale's BILINEAR and BICUBIC widen their kernels by the reduction factor, as big_vision's and
# PIL's do with antialias; FAST_BILINEAR does not.
_RESIZES = {"bilinear": Interpolation.BILINEAR, "bicubic": Interpolation.BICUBIC}

# Timestamps are rounded to the container's tick (1 ms in Matroska); a picture counts as on screen
# this much before its own timestamp, so that frame k of a 24 fps file is met at k / 24 s.
_MAX_SLACK_S = 1e-3

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
class View:
    """How somebody wants to see the sampled frames of a video."""

    see: Callable[[np.ndarray], object]  # is given each in order, uint8[H, W, 3], RGB
    size: tuple[int, int] | None = None  # (height, width) in pixels; None = the native size
    resize: str = "bilinear"  # or bicubic


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodedVideo:
    """Frames sampled at a steady rate, with the native timeline beside them."""

    info: VideoInfo
    frames: PictureSpool  # N of uint8[H, W, 3], RGB; on disk until nothing refers to them
    frame_times: np.ndarray  # float64[N], seconds: k / frame_rate
    native_times: np.ndarray  # float64[n_frames], start of every native frame in seconds
    change: np.ndarray  # float32[n_frames] in [0, 1], difference to the frame before; 0 first


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """A video that was shown frame by frame."""

    info: VideoInfo
    frame_times: np.ndarray  # float64[N], seconds: k / frame_rate
    native_times: np.ndarray  # float64[n_frames], start of every native frame in seconds
    change: np.ndarray  # float32[n_frames] in [0, 1], difference to the frame before; 0 first


def decode_video(
    path: str | os.PathLike,
    *,
    frame_rate: float = 2.0,
    size: tuple[int, int] | None = None,
    resize: str = "bilinear",
    others: Sequence[View] = (),
) -> DecodedVideo:
    """Decodes the default video stream once and keeps the frames on screen at k / frame_rate.

    They are kept in a temporary file, so that memory does not grow with the video's length but for
    some numbers per native frame.

    Returns:
      The sampled frames; N = ceil(duration_s * frame_rate), at least 1.

    Raises:
      UserError: the disk of temporary files is full; or as `show_video`, whose the arguments and
        the timeline are, too.
    """
    pictures = PictureSpool()
    timeline = show_video(
        path, pictures.append, frame_rate=frame_rate, size=size, resize=resize, others=others
    )
    return DecodedVideo(
        info=timeline.info,
        frames=pictures,
        frame_times=timeline.frame_times,
        native_times=timeline.native_times,
        change=timeline.change,
    )


def show_video(
    path: str | os.PathLike,
    see: Callable[[np.ndarray], object],
    *,
    frame_rate: float = 2.0,
    size: tuple[int, int] | None = None,
    resize: str = "bilinear",
    others: Sequence[View] = (),
    one_thread: bool = False,
) -> Timeline:
    """Decodes the default video stream once and hands over the frames on screen at k / frame_rate.

    No frame is kept, so hours of video stream through. A damaged packet is skipped and the file
    goes on; `info.notes` says so.

    Args:
      path: the video file (mp4, mkv, webm, avi, and whatever else FFmpeg reads).
      see: is given each sampled frame in order, uint8[H, W, 3], RGB; a frame that is on screen for
        several samples is the same object each time.
      frame_rate: sampled frames per second; above the native rate pictures repeat.
      size: `(height, width)` in pixels of the upright frames, whose aspect is not kept; None keeps
        the native size.
      resize: bilinear or bicubic, with antialias.
      others: who sees the same frames beside `see`, in another size perhaps.
      one_thread: costs a tenth less CPU time, for whoever decodes a video on every core at once.

    Returns:
      When what was on screen. `change[i]` is the mean absolute difference of 32 x 18 RGB thumbnails
      of frames i - 1 and i, 1 = black to white.

    Raises:
      UserError: the file is missing, empty, a folder, not a video, without a video stream, or
        nothing of it decodes; or `frame_rate` or `size` is not positive.
    """
    if not (math.isfinite(frame_rate) and frame_rate > 0):
        raise UserError(
            f"frame_rate must be a positive number of frames per second, got {frame_rate}"
        )
    views = (View(see=see, size=size, resize=resize), *others)
    for size in (view.size for view in views):
        if size is not None and (len(size) != 2 or min(size) < 1):
            raise UserError(f"size must be (height, width) in pixels, both at least 1, got {size}")

    sampler = _Sampler(frame_rate, views)
    native_times: list[float] = []
    change: list[float] = []
    shrink = VideoReformatter()
    thumbnail = None
    last_duration_s = 0.0
    with open_media(path) as container:
        stream = video_stream(container, path)
        reader = FrameReader(container, stream, one_thread=one_thread)
        slack_s = min(float(stream.time_base), _MAX_SLACK_S)
        for frame, time_s in reader:
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
                f"{_last_error(reader)}; play the file to check it, then convert it or download it "
                "again"
            )
        times = np.asarray(native_times, np.float64)
        gaps = np.diff(times)
        if last_duration_s <= 0:
            last_duration_s = float(np.median(gaps)) if gaps.size else reader.period_s
        duration_s = float(times[-1]) + last_duration_s
        sampler.finish(duration_s, slack_s)
        info = VideoInfo(
            path=os.fspath(path),
            duration_s=duration_s,
            native_fps=len(times) / duration_s,
            n_frames=len(times),
            width=sampler.upright_w,
            height=sampler.upright_h,
            has_audio=audio_stream(container) is not None,
            notes=(
                *_damage_notes(reader, container, stream, duration_s),
                *sampler.notes(),
                *_rate_notes(gaps, float(stream.time_base)),
            ),
        )
    return Timeline(
        info=info,
        frame_times=np.arange(sampler.num_shown) / frame_rate,
        native_times=times,
        change=np.asarray(change, np.float32),
    )


def _damage_notes(
    reader: FrameReader, container: InputContainer, stream: VideoStream, duration_s: float
) -> Iterator[str]:
    if stream.duration is not None:
        wanted_s, got_s = float(stream.duration * stream.time_base), duration_s
    elif container.duration is not None:
        wanted_s = container.duration / av.time_base
        got_s = reader.packets_end_s - (container.start_time or 0) / av.time_base
    else:
        wanted_s = got_s = duration_s
    if wanted_s - got_s > _EARLY_END_S:
        yield f"the file ends early: {got_s:.1f} s of {wanted_s:.1f} s decode"
    if reader.errors:
        n = len(reader.errors)
        packets = "1 damaged packet was" if n == 1 else f"{n} damaged packets were"
        yield f"{packets} skipped{_last_error(reader)}"
    if reader.damaged_frames:
        n = reader.damaged_frames
        yield f"{n} {'frame shows' if n == 1 else 'frames show'} damage from broken data"
    if reader.untimed_frames:
        n = reader.untimed_frames
        yield (
            f"{n} {'frame has' if n == 1 else 'frames have'} no usable timestamp; "
            f"spaced at {1 / reader.period_s:.3g} frames per second"
        )


def _last_error(reader: FrameReader) -> str:
    return f" [{reader.errors[-1]}]" if reader.errors else ""


class _Sampler:
    """Hands over the picture on screen at each k / frame_rate while frames pass by once."""

    def __init__(self, frame_rate: float, views: Sequence[View]):
        self._frame_rate = frame_rate
        self._views = views
        # One for each way of seeing a frame, since it keeps what it has prepared for it.
        self._reformatters = {(view.size, view.resize): VideoReformatter() for view in views}
        self._on_screen: av.VideoFrame | None = None
        self.num_shown = 0
        self._stored_size: tuple[int, int] | None = None  # (width, height) before rotation
        self._size_changes = False

    def show(self, frame: av.VideoFrame, time_s: float, slack_s: float) -> None:
        if self._on_screen is None:
            self._stored_size = frame.width, frame.height
            self._turn = upright_turn(frame)
            w, h = self._stored_size
            self.upright_w, self.upright_h = (h, w) if self._turn[0] % 2 else (w, h)
        else:
            self._size_changes |= (frame.width, frame.height) != self._stored_size
            self._emit_until(time_s - slack_s)
        self._on_screen = frame

    def finish(self, duration_s: float, slack_s: float) -> None:
        self._emit_until(max(duration_s - slack_s, slack_s))

    def _emit_until(self, end_s: float) -> None:
        """Hands over the picture on screen for every sample instant before `end_s`."""
        pictures = None
        while self.num_shown / self._frame_rate < end_s:
            if pictures is None:
                pictures = {key: self._upright_rgb(*key) for key in self._reformatters}
            for view in self._views:
                view.see(pictures[view.size, view.resize])
            self.num_shown += 1

    def _upright_rgb(self, size: tuple[int, int] | None, resize: str) -> np.ndarray:
        """The frame on screen, turned and resized."""
        quarter_turns, mirrored = self._turn
        height, width = size or (self.upright_h, self.upright_w)
        if quarter_turns % 2:
            height, width = width, height
        rgb = self._reformatters[size, resize].reformat(
            self._on_screen, width, height, "rgb24", interpolation=_RESIZES[resize]
        )
        rgb = rgb.to_ndarray()
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
