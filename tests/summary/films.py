"""Small synthetic films whose every frame and sample is known."""

from fractions import Fraction

import av
import numpy as np


def write_video(
    path,
    frames,  # uint8[N, H, W, 3]
    *,
    fps=25,
    times_s=None,  # start of each frame; None = steady
    codec="mpeg4",
    sound=None,  # float32[channels, n]
    sound_rate=48_000,
    sound_codec="flac",
    sound_start_s=0.0,
    container_options=None,
):
    """Writes frames and sound to a file, interleaved by half seconds."""
    with av.open(str(path), "w", options=container_options or {}) as out:
        video = out.add_stream(codec, rate=fps)
        video.width, video.height = frames.shape[2], frames.shape[1]
        video.pix_fmt = "yuv420p" if codec != "ffv1" else "yuv444p"
        video.bit_rate = 2_000_000
        tick = Fraction(1, 1000) if times_s is not None else Fraction(1, fps)
        video.codec_context.time_base = tick
        if codec == "libx264":
            video.options = {"crf": "10", "preset": "ultrafast", "bf": "2"}
        if sound is not None:
            layout = "mono" if len(sound) == 1 else "stereo"
            audio = out.add_stream(sound_codec, rate=sound_rate, layout=layout)
        done = 0

        def sound_until(sample):
            nonlocal done
            sample = min(sample, sound.shape[1])
            while done < sample:
                stop = min(sample, done + 1024)
                piece = np.ascontiguousarray(sound[:, done:stop], np.float32)
                frame = av.AudioFrame.from_ndarray(piece, format="fltp", layout=layout)
                frame.sample_rate, frame.time_base = sound_rate, Fraction(1, sound_rate)
                frame.pts = done + round(sound_start_s * sound_rate)
                out.mux(audio.encode(frame))
                done = stop

        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
            frame.pts = i if times_s is None else round(times_s[i] * 1000)
            frame.time_base = tick
            out.mux(video.encode(frame))
            if sound is not None:
                sound_until(round((i + 1) / fps * sound_rate))
        out.mux(video.encode(None))
        if sound is not None:
            sound_until(sound.shape[1])
            out.mux(audio.encode(None))
    return path


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
