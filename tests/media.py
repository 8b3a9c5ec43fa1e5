"""Small video files whose every frame and sample is known: written, and read back, with PyAV."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

_TICKS = Fraction(1, 12_000)  # 24, 25 and 30 fps and whole milliseconds are exact in it


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    fps: float = 24,
    times_s: Sequence[float] | None = None,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    rotation: int = 0,
    mirrored: bool = False,
    audio: np.ndarray | None = None,
    audio_rate: int = 16_000,
    audio_start_s: float = 0.0,
    audio_codec: str | None = None,
    cues: Sequence[tuple[float, float, str]] = (),
    container_options: dict[str, str] | None = None,
) -> Path:
    """Writes uint8[N, H, W, 3] frames, and whatever else is asked for, as `path`.

    Args:
      path: the file; its ending chooses the container (.mp4, .mkv, .webm, .avi).
      frames: RGB pictures as stored; odd sizes need `pix_fmt="yuv444p"`.
      fps: frames per second where `times_s` is not given.
      times_s: start of every frame in seconds, increasing, for variable rate and late starts.
      codec: video encoder.
      pix_fmt: pixel format handed to the encoder.
      options: encoder options.
      rotation: a player turns the stored picture by this many degrees counter-clockwise.
      mirrored: a player mirrors the stored picture left to right, and then turns it.
      audio: float[n] or float[2, n] in [-1, 1] at `audio_rate`.
      audio_rate: samples per second.
      audio_start_s: timestamp of the first sample.
      audio_codec: sound encoder; None = AAC in mp4, 16-bit PCM elsewhere.
      cues: (start_s, end_s, text) for a SubRip stream (.mkv).
      container_options: muxer options, such as `{"movflags": "faststart"}`.

    Returns:
      `path`.
    """
    with av.open(str(path), "w", container_options=container_options or {}) as out:
        video = out.add_stream(codec, rate=Fraction(fps).limit_denominator(1001))
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = pix_fmt
        video.options = options if options is not None else _quality(codec)
        if times_s is not None:
            video.codec_context.time_base = _TICKS
        if rotation or mirrored:
            turn = np.deg2rad(rotation)
            a, b = round(np.cos(turn)), -round(np.sin(turn))  # the stored x axis; y points down
            c, d = -b, a
            if mirrored:
                a, b = -a, -b
            matrix = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
            video.set_display_matrix(matrix)
        if audio is not None:
            audio_codec = audio_codec or ("aac" if path.suffix == ".mp4" else "pcm_s16le")
            layout = "mono" if audio.ndim == 1 or len(audio) == 1 else "stereo"
            sound = out.add_stream(audio_codec, rate=audio_rate, layout=layout)
            blocks = _blocks(audio, audio_rate, audio_start_s, layout)
        if cues:
            text = out.add_mux_stream("subrip")
            text.time_base = Fraction(1, 1000)

        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            if times_s is None:
                frame.pts, frame.time_base = i, 1 / Fraction(fps).limit_denominator(1001)
            else:
                frame.pts, frame.time_base = round(times_s[i] / _TICKS), _TICKS
            out.mux(video.encode(frame))
            while audio is not None and blocks and blocks[0].time <= frame.time:
                out.mux(sound.encode(blocks.popleft()))
        out.mux(video.encode())
        if audio is not None:
            for block in blocks:
                out.mux(sound.encode(block))
            out.mux(sound.encode())
        for start_s, end_s, line in cues:
            packet = av.Packet(line.encode())
            packet.stream = text
            packet.time_base = Fraction(1, 1000)
            packet.pts = packet.dts = round(1000 * start_s)
            packet.duration = round(1000 * (end_s - start_s))
            out.mux(packet)
    return path


def solid_frames(levels: Sequence[float], height: int = 48, width: int = 64) -> np.ndarray:
    """Grey pictures uint8[N, height, width, 3], one per brightness in [0, 255]."""
    levels = np.asarray(levels, np.uint8)[:, None, None, None]
    return np.broadcast_to(levels, (len(levels), height, width, 3)).copy()


def quadrants(height: int = 48, width: int = 64) -> np.ndarray:
    """One picture uint8[height, width, 3]: red, green / blue, white corners."""
    picture = np.zeros((height, width, 3), np.uint8)
    top, left = slice(height // 2), slice(width // 2)
    bottom, right = slice(height // 2, None), slice(width // 2, None)
    picture[top, left] = 255, 0, 0
    picture[top, right] = 0, 255, 0
    picture[bottom, left] = 0, 0, 255
    picture[bottom, right] = 255, 255, 255
    return picture


def decode(path):
    """`(frames uint8[N, H, W, 3], times float[N], sound float32[channels, n] | None, rate)`.

    Sound is placed by its timestamps, sample 0 at the time 0 of the container.
    """
    with av.open(str(path)) as film:
        pictures = list(film.decode(video=0))
        frames = np.stack([p.to_ndarray(format="rgb24") for p in pictures])
        times = np.array([p.time for p in pictures])
    with av.open(str(path)) as film:
        if not film.streams.audio:
            return frames, times, None, 0
        pieces = [
            (round(p.time * p.sample_rate), p.to_ndarray().astype(np.float32), p.sample_rate)
            for p in film.decode(audio=0)
        ]
    rate = pieces[0][2]
    sound = np.zeros((len(pieces[0][1]), max(at + p.shape[1] for at, p, _ in pieces)), np.float32)
    for at, piece, _ in pieces:
        sound[:, max(at, 0) : at + piece.shape[1]] = piece[:, max(-at, 0) :]
    return frames, times, sound, rate


def stream_durations(path):
    """Seconds by kind of stream, as the file's index says."""
    with av.open(str(path)) as film:
        return {s.type: float(s.duration * s.time_base) for s in film.streams}


def numbered_frames():
    """uint8[100, 48, 64, 3]: frame i shows the bits of i as eight bars, dark and bright."""
    bits = np.arange(100)[:, None] >> np.arange(8) & 1
    bars = np.repeat(40 + 170 * bits, 8, axis=1).astype(np.uint8)
    return np.broadcast_to(bars[:, None, :, None], (100, 48, 64, 3))


def frame_numbers(frames):
    """Undoes `numbered_frames`, whatever the codec changed a little."""
    bars = frames.reshape(len(frames), frames.shape[1], 8, -1, 3).mean((1, 3, 4))
    return (bars > 125) @ (1 << np.arange(8))


def _blocks(audio: np.ndarray, rate: int, start_s: float, layout: str) -> deque[av.AudioFrame]:
    pcm = np.round(np.clip(np.atleast_2d(audio), -1, 1) * 32767).astype(np.int16)
    blocks = deque()
    for at in range(0, pcm.shape[1], 1024):
        interleaved = np.ascontiguousarray(pcm[:, at : at + 1024].T).reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(interleaved, format="s16", layout=layout)
        frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
        frame.pts = round(start_s * rate) + at
        blocks.append(frame)
    return blocks


def _quality(codec: str) -> dict[str, str]:
    if codec == "libx264":
        return {"crf": "8", "preset": "ultrafast"}
    return {"b": "2000000"} if codec in ("mpeg4", "libvpx") else {}
