"""Writes small video files for tests with PyAV."""

from __future__ import annotations

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
      audio: float[n] or float[n, 2] in [-1, 1] at `audio_rate`.
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
            audio = audio[:, None] if audio.ndim == 1 else audio
            layout = {1: "mono", 2: "stereo"}[audio.shape[1]]
            sound = out.add_stream(audio_codec, rate=audio_rate, layout=layout)
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
        out.mux(video.encode())
        if audio is not None:
            pcm = np.round(np.clip(audio, -1, 1) * 32767).astype(np.int16)
            for at in range(0, len(pcm), 1024):
                block = pcm[at : at + 1024].reshape(1, -1)
                frame = av.AudioFrame.from_ndarray(block, format="s16", layout=layout)
                frame.sample_rate = audio_rate
                frame.pts = round(audio_start_s * audio_rate) + at
                frame.time_base = Fraction(1, audio_rate)
                out.mux(sound.encode(frame))
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


def _quality(codec: str) -> dict[str, str]:
    return {"crf": "8", "preset": "ultrafast"} if codec == "libx264" else {}
