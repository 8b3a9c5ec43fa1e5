"""The summary as a film, and a still of each of its shots.

The source is read once from the start, so the frames are exactly those of the native timeline that
the scores refer to; pictures and sound are read in step from two handles on the file, so memory
does not grow with its length however it is interleaved. Time 0 is the first frame that decodes.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.stream import Stream
from av.video.frame import PictureType
from PIL import Image

from deevisum_jax import media
from deevisum_jax.errors import UserError
from deevisum_jax.files import replacing

_VIDEO_TICK = Fraction(1, 90_000)  # of the summary's pictures; the customary MPEG clock
# Borders are often written with three decimals and containers round to 1 ms: a frame that overlaps
# an interval by less than this is on the other side of the border. Shorter than any frame.
_SLACK_S = 2e-3
_SOUND_CHUNK_S = 0.5  # how far pictures run ahead of sound
_FADE_S = 5e-3  # at each join, so that the cut itself does not click
_CLOCK_JITTER_S = 0.03  # sound timestamps that differ by less are rounding, not gaps
_AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000)

_JPEG_QUALITY = 90


def render_summary(
    video_path: str | os.PathLike,
    intervals: Sequence[tuple[float, float]],
    out_path: str | os.PathLike,
) -> float:
    """Writes the given intervals of a video, in order of time, as one mp4.

    H.264 (yuv420p) and AAC, index in front. Pictures keep their source timing (variable rates too),
    size and pixel aspect; rotation and mirroring in the metadata are applied; an odd width or
    height loses its last column or row, because 4:2:0 needs even sizes. Sound keeps its sample rate
    and mono or stereo (more channels are mixed down), is cut at the same instants as the picture
    with 5 ms fades, and is silent where the source has none; without a sound stream there is none.
    What does not decode is left out and the last good picture stays on screen.

    Args:
      video_path: any file FFmpeg reads.
      intervals: `(start_s, end_s)`, half-open, in any order; overlapping and touching ones are
        joined, and what reaches past the end of the video is cut off.
      out_path: a `.mp4` file; it appears only when complete, replacing an older one.

    Returns:
      Seconds of picture written, at most the sum of the intervals.

    Raises:
      UserError: the video cannot be read, there is no valid interval inside it, or the target
        cannot be written.
    """
    wanted = _joined(intervals)
    video_path, out_path = Path(video_path), Path(out_path)
    if out_path.suffix.lower() != ".mp4":
        raise UserError(f"{out_path}: the summary is an mp4 file; end its name in .mp4")
    if not out_path.parent.is_dir():
        raise UserError(f"{out_path}: the folder {out_path.parent} does not exist; create it first")
    if out_path.exists() and video_path.exists() and out_path.samefile(video_path):
        raise UserError(f"{out_path}: is the video itself; choose another name for the summary")

    with replacing(out_path) as partial:
        with media.open_media(video_path) as pictures, media.open_media(video_path) as sounds:
            seconds = _Film(partial, pictures, sounds, wanted, video_path).write()
        if not seconds:
            raise UserError(
                f"{video_path}: no picture of it falls into the intervals {wanted[:3]}...; they "
                "must lie between 0 and the video's duration in seconds"
            )
    return seconds


def save_keyframes(
    video_path: str | os.PathLike, times_s: Sequence[float], folder: str | os.PathLike
) -> list[Path]:
    """Writes the picture on screen at each time as a JPEG, upright and in its native size.

    Args:
      video_path: any file FFmpeg reads.
      times_s: seconds, in any order; a time past the end takes the last frame.
      folder: created when absent. File k is `{k:03d}_{time}s.jpg`.

    Returns:
      The files, in the order of `times_s`.

    Raises:
      UserError: the video cannot be read, a time is negative, or nothing decodes.
    """
    [paths] = save_sets_of_keyframes(video_path, [(times_s, folder)])
    return paths


def save_sets_of_keyframes(
    video_path: str | os.PathLike, wanted: Sequence[tuple[Sequence[float], str | os.PathLike]]
) -> list[list[Path]]:
    """As `save_keyframes`, for several lists of times and their folders; the video is read once."""
    paths: list[list[Path]] = []
    waiting: list[tuple[float, Path]] = []
    for times_s, folder in wanted:
        if any(not (math.isfinite(t) and t >= 0) for t in times_s):
            raise UserError(f"keyframe times must be seconds from 0 on, got {list(times_s)}")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        paths.append([folder / f"{k:03d}_{time_s:.2f}s.jpg" for k, time_s in enumerate(times_s)])
        waiting += zip(times_s, paths[-1], strict=True)
    waiting.sort(key=lambda still: still[0], reverse=True)
    upright = _Upright("rgb24", even=False)
    with media.open_media(video_path) as container:
        on_screen = None
        stream = media.video_stream(container, video_path)
        for frame, time_s in media.FrameReader(container, stream):
            while waiting and on_screen and waiting[-1][0] < time_s - _SLACK_S:
                _save_jpeg(upright(on_screen), waiting.pop()[1])
            if not waiting:
                break
            on_screen = frame
        if waiting and on_screen is None:
            raise UserError(f"{video_path}: no picture decodes; play the file to check it")
        for _, path in waiting:
            _save_jpeg(upright(on_screen), path)
    return paths


def keyframe_times(
    intervals: Sequence[tuple[float, float]],
    segment_bounds: np.ndarray,
    segment_scores: np.ndarray,
) -> list[float]:
    """For each interval the middle of its best-scored part, in seconds.

    Args:
      intervals: `(start_s, end_s)` of the shots.
      segment_bounds: float[M, 2], seconds.
      segment_scores: float[M]; of equal scores the earliest counts. An interval that no segment
        touches gives its own middle.
    """
    times = []
    for start_s, end_s in intervals:
        first = np.maximum(segment_bounds[:, 0], start_s)
        last = np.minimum(segment_bounds[:, 1], end_s)
        inside = last - first > 1e-6
        if inside.any():
            best = int(np.argmax(np.where(inside, segment_scores, -np.inf)))
            start_s, end_s = first[best], last[best]
        times.append(float(start_s + end_s) / 2)
    return times


def _joined(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Ascending intervals with gaps between them."""
    if not len(intervals):
        raise UserError("no interval was given, the summary would be empty; raise the budget")
    joined: list[tuple[float, float]] = []
    for start_s, end_s in sorted((float(a), float(b)) for a, b in intervals):
        if not (0 <= start_s < end_s < math.inf):
            raise UserError(
                f"interval ({start_s}, {end_s}) is not 0 <= start < end; intervals are in seconds"
            )
        if joined and start_s <= joined[-1][1] + _SLACK_S:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end_s))
        else:
            joined.append((start_s, end_s))
    return joined


class _Film:
    """Writes one summary: pictures as they come, sound in step behind them."""

    def __init__(
        self,
        target: Path,
        pictures: InputContainer,
        sounds: InputContainer,
        intervals: list[tuple[float, float]],
        name: Path,
    ):
        self._target = target
        self._source = media.video_stream(pictures, name)
        self._reader = media.FrameReader(pictures, self._source)
        self._sounds = sounds
        self._intervals = intervals
        lengths = np.array([end - start for start, end in intervals])
        self._offsets = np.concatenate([[0.0], np.cumsum(lengths)])  # in the summary, seconds
        self._upright = _Upright("yuv420p", even=True)
        self._out = None
        self._sound: _Sound | None = None
        self._video = None
        self._lasts: dict[int, int] = {}  # picture's time -> how long it stays, in ticks
        self._written_s = 0.0

    def write(self) -> float:
        try:
            try:
                self._run()
            finally:
                if self._out is not None:
                    self._out.close()
        except (av.FFmpegError, OSError) as error:
            raise UserError(
                f"{self._target.parent}: writing the summary there failed "
                f"[{media.reason(error)}]; check free space and permissions"
            ) from error
        return self._written_s

    def _run(self) -> None:
        held, held_s, stays_s, first = None, 0.0, 0.0, 0
        for frame, time_s in self._reader:
            if held is not None:
                stays_s = time_s - held_s
                first = self._show(held, held_s, time_s, first)
                if first == len(self._intervals):
                    break
            held, held_s = frame, time_s
        else:
            if held is not None:
                # A last frame without a duration stays as long as the one before it.
                stays_s = float((held.duration or 0) * held.time_base) or stays_s or 0.04
                self._show(held, held_s, held_s + stays_s, first)
        if self._out is not None:
            if self._sound is not None:
                self._sound.write(self._written_s, self._out)
                self._sound.flush(self._out)
            self._mux(self._video.encode(None))

    def _show(self, frame: av.VideoFrame, start_s: float, end_s: float, first: int) -> int:
        """Encodes a picture for every interval in which it is seen; the next interval to look at.

        `first`: the intervals before it are over. Times are those of the source.
        """
        while first < len(self._intervals):
            from_s, to_s = self._intervals[first]
            if end_s <= from_s + _SLACK_S:
                return first
            seen_s, gone_s = max(start_s, from_s), min(end_s, to_s)
            if gone_s - seen_s > _SLACK_S:
                fresh = seen_s - from_s <= _SLACK_S
                if fresh:
                    seen_s = from_s
                if to_s - gone_s <= _SLACK_S:
                    gone_s = to_s
                shift_s = self._offsets[first] - from_s
                self._encode(frame, seen_s + shift_s, gone_s + shift_s, fresh)
            if end_s < to_s - _SLACK_S:
                return first
            first += 1
        return first

    def _encode(self, frame: av.VideoFrame, start_s: float, end_s: float, fresh: bool) -> None:
        picture = self._upright(frame)
        if self._out is None:
            self._begin(picture, frame)
        start, end = round(start_s / _VIDEO_TICK), round(end_s / _VIDEO_TICK)
        picture.pts, picture.time_base = start, _VIDEO_TICK
        # The source's own picture types would bind the encoder; a new shot starts afresh.
        picture.pict_type = PictureType.I if fresh else PictureType.NONE
        self._lasts[start] = end - start
        self._mux(self._video.encode(picture))
        self._written_s = end_s
        if self._sound is not None and end_s - self._sound.written_s > _SOUND_CHUNK_S:
            self._sound.write(end_s, self._out)

    def _begin(self, picture: av.VideoFrame, frame: av.VideoFrame) -> None:
        self._out = av.open(
            str(self._target), "w", format="mp4", options={"movflags": "+faststart"}
        )
        rate = self._source.average_rate or self._source.guessed_rate or Fraction(25)
        self._video = self._out.add_stream("libx264", rate=rate)
        context = self._video.codec_context
        context.width, context.height = picture.width, picture.height
        context.pix_fmt = "yuv420p"
        context.time_base = self._video.time_base = _VIDEO_TICK
        # Without B-frames packets come in the order shown, so that an mp4 whose frames differ in
        # length keeps the length of each, the last included.
        context.options = {"crf": "20", "preset": "veryfast", "bf": "0"}
        aspect = self._source.sample_aspect_ratio
        if aspect:
            turned = media.upright_turn(frame)[0] % 2
            context.sample_aspect_ratio = 1 / aspect if turned else aspect
        context.color_range = picture.color_range
        context.colorspace = picture.colorspace
        context.color_primaries = picture.color_primaries
        context.color_trc = picture.color_trc
        stream = media.audio_stream(self._sounds)
        if stream is not None and stream.sample_rate:
            self._sound = _Sound(
                self._sounds,
                stream,
                self._out,
                self._intervals,
                self._offsets,
                self._reader.zero_s,
            )

    def _mux(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            # mp4 takes a frame's length from the next one's time; the last one needs this.
            packet.duration = round(
                self._lasts.pop(round(packet.pts * packet.time_base / _VIDEO_TICK))
                * _VIDEO_TICK
                / packet.time_base
            )
            self._out.mux(packet)


class _Sound:
    """The sound of the intervals, sample for sample, as AAC."""

    def __init__(
        self,
        container: InputContainer,
        stream: Stream,
        out,
        intervals: list[tuple[float, float]],
        offsets: np.ndarray,
        zero_s: float,
    ):
        self._rate = min(
            _AAC_RATES, key=lambda rate: (rate < stream.sample_rate, abs(rate - stream.sample_rate))
        )
        layout = "mono" if stream.channels == 1 else "stereo"
        self._encoder = out.add_stream("aac", rate=self._rate, layout=layout)
        channels = 1 if layout == "mono" else 2
        self._encoder.bit_rate = channels * min(96_000, 4 * self._rate)
        self._samples = _Samples(container, stream, self._rate, layout, channels, zero_s)
        self._layout = layout
        self._starts = [round(start_s * self._rate) for start_s, _ in intervals]
        self._ends = [round(offset * self._rate) for offset in offsets]  # [0] is 0
        self._interval = 0
        self._done = 0  # samples of the summary written
        self.written_s = 0.0

    def write(self, until_s: float, out) -> None:
        """Brings the sound up to this time of the summary."""
        until = round(until_s * self._rate)
        while self._done < until:
            begin, end = self._ends[self._interval : self._interval + 2]
            if self._done >= end:
                self._interval += 1
                continue
            # Whole seconds at most: a picture that stays for an hour is not an hour in memory.
            stop = min(until, end, self._done + self._rate)
            source = self._starts[self._interval] - begin
            sound = self._samples.read(source + self._done, source + stop)
            at = np.arange(self._done, stop)
            sound = sound * np.clip(
                np.minimum(at - begin, end - 1 - at) / (_FADE_S * self._rate), 0, 1
            ).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(
                np.ascontiguousarray(sound), format="fltp", layout=self._layout
            )
            frame.sample_rate, frame.pts = self._rate, self._done
            frame.time_base = Fraction(1, self._rate)
            out.mux(self._encoder.encode(frame))
            self._done = stop
        self.written_s = until_s

    def flush(self, out) -> None:
        out.mux(self._encoder.encode(None))


class _Samples:
    """Samples of a sound stream by their place on the video's timeline, read forwards."""

    def __init__(
        self,
        container: InputContainer,
        stream: Stream,
        rate: int,
        layout: str,
        channels: int,
        zero_s: float,
    ):
        self._rate, self._layout, self._zero_s = rate, layout, zero_s
        self._channels = channels
        self._pieces = self._decode(container, stream)
        self._at = 0  # place of the next sample in `_left`
        self._left = np.zeros((channels, 0), np.float32)
        self._over = False

    def read(self, start: int, stop: int) -> np.ndarray:
        """float32[channels, stop - start]; zeros where there is no sound. Never goes back."""
        found = np.zeros((self._channels, stop - start), np.float32)
        while True:
            first, last = max(start, self._at), min(stop, self._at + self._left.shape[1])
            if first < last:
                found[:, first - start : last - start] = self._left[
                    :, first - self._at : last - self._at
                ]
            if self._over or self._at + self._left.shape[1] >= stop:
                return found
            try:
                self._at, self._left = next(self._pieces)
            except StopIteration:
                self._over = True

    def _decode(
        self, container: InputContainer, stream: Stream
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(place of the first sample, float32[channels, n]), ascending and not overlapping."""
        resamplers: dict[tuple[str, str, int], av.AudioResampler] = {}
        expected = None
        for frame, time_s in media.read_sound(container, stream):
            key = (frame.format.name, frame.layout.name, frame.sample_rate)
            if key not in resamplers:
                resamplers[key] = av.AudioResampler("fltp", self._layout, self._rate)
            stamp = None if time_s is None else round((time_s - self._zero_s) * self._rate)
            jitter = _CLOCK_JITTER_S * self._rate
            if expected is None or (stamp is not None and abs(stamp - expected) > jitter):
                at = stamp or 0
            else:
                at = expected
            for piece in resamplers[key].resample(frame):
                sound = piece.to_ndarray()
                late = max(0, (expected or at) - at)  # a clock that jumps back repeats itself
                if late < sound.shape[1]:
                    yield at + late, sound[:, late:]
                at += sound.shape[1]
            expected = max(at, expected or at)


class _Upright:
    """Turns, mirrors and converts frames; every one gets the size of the first."""

    def __init__(self, pixel_format: str, *, even: bool):
        self._format, self._even = pixel_format, even
        self._size: tuple[int, int] | None = None
        self._graphs: dict[tuple, av.filter.Graph] = {}

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        turn, mirrored = media.upright_turn(frame)
        if self._size is None:
            self._size = (frame.height, frame.width) if turn % 2 else (frame.width, frame.height)
        key = (frame.width, frame.height, frame.format.name, turn, mirrored)
        if key not in self._graphs:
            self._graphs[key] = self._graph(frame, turn, mirrored)
        graph = self._graphs[key]
        graph.push(frame)
        return graph.pull()

    def _graph(self, frame: av.VideoFrame, turn: int, mirrored: bool) -> av.filter.Graph:
        w, h = self._size
        steps = [("hflip", "")] if mirrored else []
        steps += [
            [],
            [("transpose", "cclock")],
            [("hflip", ""), ("vflip", "")],
            [("transpose", "clock")],
        ][turn]
        if (frame.width, frame.height) != ((h, w) if turn % 2 else (w, h)):
            steps.append(("scale", f"{w}:{h}"))
        if self._even and (w % 2 or h % 2):
            steps.append(("crop", f"{w - w % 2}:{h - h % 2}:0:0"))
        steps.append(("format", self._format))
        graph = av.filter.Graph()
        nodes = [
            graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=frame.time_base,
            )
        ]
        nodes += [graph.add(name, options) for name, options in steps]
        nodes.append(graph.add("buffersink"))
        for before, after in itertools.pairwise(nodes):
            before.link_to(after)
        graph.configure()
        return graph


def _save_jpeg(picture: av.VideoFrame, path: Path) -> None:
    Image.fromarray(picture.to_ndarray(format="rgb24")).save(path, quality=_JPEG_QUALITY)
