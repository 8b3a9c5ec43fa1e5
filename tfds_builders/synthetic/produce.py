"""Writes synthetic videos (MP4 and subtitles) and reads them back into records.

The work is shared among processes, `python -m tfds_builders.synthetic.produce JOB`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import av
import numpy as np

from deevisum_jax.files import replacing, write_whole
from deevisum_jax.summary import select
from tfds_builders import workers
from tfds_builders.media_record import read_media
from tfds_builders.synthetic import annotators, paint, scenario, sound


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """The videos of one split, and how they are stored."""

    seed: int
    split: str
    num_videos: int
    rules: scenario.Rules
    frame_rate: float  # stored frames per second
    frame_size: int  # height and width of the stored frames, pixels
    folder: str  # the MP4 and VTT files go here


def records(job: Job) -> Iterator[dict[str, Any]]:
    """Makes all videos of a job, one process per CPU core, and yields their records in order.

    Raises:
      UserError: a worker failed (see `workers.records`).
    """
    pathlib.Path(job.folder).mkdir(parents=True, exist_ok=True)

    def name(index: int) -> str:
        return f"synthetic video {index} of split {job.split!r} in {job.folder}"

    yield from workers.records(__name__, dataclasses.asdict(job), job.num_videos, name)


def main(argument: str) -> None:
    """A worker."""

    def make_one(fields: dict[str, Any], index: int) -> dict[str, Any]:
        return make(Job(**{**fields, "rules": scenario.Rules(**fields["rules"])}), index)

    workers.serve(argument, make_one)


def make(job: Job, index: int) -> dict[str, Any]:
    """Writes one video and its subtitles, reads both back, and returns the record."""
    drawn = scenario.draw_scenario(seed=job.seed, split=job.split, index=index, rules=job.rules)
    path = pathlib.Path(job.folder) / f"{drawn.video_id}.mp4"
    write_subtitles(drawn, path.with_suffix(".vtt"))
    write_video(drawn, path)
    return read_back(drawn, path, frame_rate=job.frame_rate, frame_size=job.frame_size)


def write_subtitles(drawn: scenario.Scenario, path: pathlib.Path) -> None:
    """Writes the spoken lines as WebVTT."""
    cues = "".join(
        f"\n{_timestamp(line.start_s)} --> {_timestamp(line.end_s)}\n{line.text}\n"
        for line in drawn.lines
    )
    write_whole(path, f"WEBVTT\n{cues}")


def _timestamp(time_s: float) -> str:
    """`_timestamp(62.5)` is `"00:01:02.500"`."""
    ms = round(1000 * time_s)
    return f"{ms // 3600000:02}:{ms // 60000 % 60:02}:{ms // 1000 % 60:02}.{ms % 1000:03}"


def write_video(drawn: scenario.Scenario, path: pathlib.Path) -> None:
    """Writes picture and sound as H.264 and AAC in MP4."""
    with replacing(path) as temporary:
        _encode(drawn, temporary)


def _encode(drawn: scenario.Scenario, path: pathlib.Path) -> None:
    track = sound.waveform(drawn)
    with av.open(str(path), "w", format="mp4") as container:
        # One thread: the same bytes on every machine, and the processes already fill the cores.
        picture = container.add_stream(
            "libx264",
            rate=scenario.FRAME_RATE,
            options={"preset": "ultrafast", "crf": "20", "threads": "1"},
        )
        picture.width, picture.height = scenario.WIDTH, scenario.HEIGHT
        picture.pix_fmt = "yuv420p"
        heard = container.add_stream(
            "aac", rate=sound.SAMPLE_RATE, layout="mono", options={"aac_coder": "fast"}
        )
        heard.bit_rate = 48_000
        sent = 0  # samples
        for k, image in enumerate(paint.frames(drawn)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = k
            container.mux(picture.encode(frame))
            while sent < min((k + 1) * sound.SAMPLE_RATE // scenario.FRAME_RATE, len(track)):
                chunk = track[None, sent : sent + 1024]
                samples = av.AudioFrame.from_ndarray(chunk, format="fltp", layout="mono")
                samples.sample_rate = sound.SAMPLE_RATE
                samples.pts = sent
                sent += chunk.shape[1]
                container.mux(heard.encode(samples))
        container.mux(picture.encode(None))
        container.mux(heard.encode(None))


def read_back(
    drawn: scenario.Scenario, path: pathlib.Path, *, frame_rate: float, frame_size: int
) -> dict[str, Any]:
    """The record of a written video: what any decoder finds in the file, and the annotations."""
    media = read_media(path, frame_rate=frame_rate, frame_size=frame_size)
    info = media.info
    assert info.n_frames == drawn.n_frames, (info.n_frames, drawn.n_frames)
    change_points = select.shot_bounds(media.shots).astype(np.int32)
    user_scores = annotators.annotate(drawn)
    return {
        "video_id": drawn.video_id,
        "title": drawn.title,
        "category": drawn.category,
        "captions": [
            {"start": c.start_s, "end": c.end_s, "text": c.text} for c in scenario.captions(drawn)
        ],
        "score_times": drawn.score_times.astype(np.float32),
        "user_scores": user_scores,
        "user_summary": summaries(user_scores, change_points, drawn.n_frames),
        "change_points": change_points,
        "n_frames": info.n_frames,
        "native_fps": info.native_fps,
        "duration_s": info.duration_s,
        **media.fields(),
    }


def summaries(user_scores: np.ndarray, change_points: np.ndarray, n_frames: int) -> np.ndarray:
    """Every annotator's summary of 15 % by shot means and knapsack, uint8[U, n_frames].

    Args:
      user_scores: float[U, N], points of `POINT_S` seconds from the start on.
      change_points: int[S, 2], shots in native frames.
      n_frames: native frames at `FRAME_RATE`.
    """
    point = (np.arange(n_frames) / (scenario.POINT_S * scenario.FRAME_RATE)).astype(int)
    found = select.annotator_summaries(user_scores[:, point], change_points, n_frames)
    return found.astype(np.uint8)


if __name__ == "__main__":
    main(sys.argv[1])
