"""How fast a data set is built: seconds of video per second of CPU, whole builds.

    python scripts/benchmark_build.py --manual_dir ydata-tvsum50-v1_1
    python scripts/benchmark_build.py --clip film.webm --repeats 5

Builds tvsum/1fps in a new folder again and again: decoding, sound, JPEG, shots, every annotator's
summary, checksums, writing, and the start of the worker processes. CPU time is that of this process
and its workers together, so that it is per core whatever their number.

`--manual_dir` is a download of TVSum. `--clip` is any film: it is encoded as H.264 with AAC,
640 x 360 at 30 frames per second (about what YouTube gave when TVSum was collected), and stands for
four videos with made-up annotations. With both, builds of the two take turns.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import pathlib
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction

import av
import numpy as np

from deevisum_jax import media
from deevisum_jax.errors import UserError, exits_cleanly
from tfds_builders import records
from tfds_builders.tvsum import annotations
from tfds_builders.tvsum.tvsum import TVSum

_FPS, _WIDTH, _HEIGHT = 30, 640, 360
_COPIES = 4


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--manual_dir", default="", help="a download of TVSum")
    parser.add_argument("--clip", default="", help="a film to encode as people upload them")
    parser.add_argument("--config", default="1fps_partial", help="of the builder (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args(argv)
    if not arguments.manual_dir and not arguments.clip:
        raise UserError("nothing to build; give --manual_dir, --clip or both")
    if arguments.repeats < 1:
        raise UserError(f"--repeats {arguments.repeats}: nothing to measure; give 1 or more")
    with tempfile.TemporaryDirectory() as scratch:
        sources = {"tvsum": arguments.manual_dir} if arguments.manual_dir else {}
        if arguments.clip:
            sources["clip"] = _download_of(arguments.clip, pathlib.Path(scratch))
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in sources}
        for _ in range(arguments.repeats):
            for name, folder in sources.items():
                found[name].append(_build(folder, arguments.config))
    for name, rows in found.items():
        video_s, cpu_s, wall_s = np.array(rows).T
        rate = video_s / cpu_s
        print(
            f"{name}: {video_s[0]:.0f} s of video in {cpu_s.mean():.2f} s of CPU "
            f"({wall_s.mean():.2f} s of time): {np.median(rate):.0f} x real time per core, "
            f"{rate.min():.0f} to {rate.max():.0f} in {len(rate)} builds"
        )
    return 0


def _build(manual_dir: str, config: str) -> tuple[float, float, float]:
    """Seconds of video, of CPU and of time of one build."""
    with tempfile.TemporaryDirectory() as data_dir, contextlib.redirect_stderr(io.StringIO()):
        before, start = _cpu_s(), time.perf_counter()
        builder = records.build(TVSum, data_dir, config, manual_dir=manual_dir)
        cpu_s, wall_s = _cpu_s() - before, time.perf_counter() - start
        video_s = sum(record["duration_s"] for record in records.read(builder, records.ALL))
    return video_s, cpu_s, wall_s


def _cpu_s() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _download_of(clip: str, scratch: pathlib.Path) -> str:
    """A folder as TVSum is downloaded, whose first few videos are the clip."""
    (scratch / "video").mkdir()
    (scratch / "data").mkdir()
    path = scratch / "clip.mp4"
    n_frames = _encode(clip, path)
    rng = np.random.default_rng(0)
    scored, known = [], []
    for k, video_id in enumerate(annotations.VIDEO_IDS):
        real = k < _COPIES
        if real:
            (scratch / "video" / f"{video_id}.mp4").symlink_to(path)
        seconds = round(n_frames / _FPS) if real else 2
        for _ in range(20):
            points = rng.integers(1, 6, -(-seconds // 2)).repeat(2 * _FPS)
            scores = points[: n_frames if real else 2 * _FPS]
            scores = np.pad(scores, (0, (n_frames if real else 2 * _FPS) - len(scores)), "edge")
            scored.append(f"{video_id}\tVT\t{','.join(map(str, scores))}\n")
        known.append(f"VT\t{video_id}\tA film\t-\t{seconds // 60}:{seconds % 60:02}\n")
    (scratch / "data" / "ydata-tvsum50-anno.tsv").write_text("".join(scored))
    (scratch / "data" / "ydata-tvsum50-info.tsv").write_text("".join(known))
    return str(scratch)


def _encode(clip: str, path: pathlib.Path) -> int:
    """Writes the clip as H.264 and AAC; returns the number of frames."""
    with media.open_media(clip) as film, av.open(str(path), "w") as out:
        shown, sound = media.video_stream(film, clip), media.audio_stream(film)
        picture = out.add_stream("libx264", rate=_FPS, options={"preset": "medium", "crf": "23"})
        picture.width, picture.height, picture.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        heard = out.add_stream("aac", rate=44_100, layout="stereo") if sound else None
        n_frames = 0
        for frame in _steady(media.FrameReader(film, shown)):
            frame.pts, frame.time_base = n_frames, Fraction(1, _FPS)
            out.mux(picture.encode(frame))
            n_frames += 1
        out.mux(picture.encode(None))
        if heard is not None:
            film.seek(0)
            resampler = av.AudioResampler("fltp", "stereo", 44_100)
            for frame, _ in media.read_sound(film, sound):
                for piece in resampler.resample(frame):
                    out.mux(heard.encode(piece))
            out.mux(heard.encode(None))
    return n_frames


def _steady(film: media.FrameReader) -> Iterator[av.VideoFrame]:
    """The film's pictures at the steady rate, repeated or left out."""
    n = 0
    for frame, time_s in film:
        while n / _FPS <= time_s:
            yield frame.reformat(_WIDTH, _HEIGHT, "yuv420p")
            n += 1


if __name__ == "__main__":
    sys.exit(main())
