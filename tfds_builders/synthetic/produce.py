"""Writes synthetic videos (MP4 and subtitles) and reads them back into records.

The work is shared among fresh processes, `python -m tfds_builders.synthetic.produce JOB`. Unlike
those of multiprocessing they neither fork a caller that may run JAX's threads nor import its main
module, and they import neither TFDS nor JAX.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
import PIL.Image

from deevisum_jax.data import audio, subtitles, video
from deevisum_jax.errors import UserError
from deevisum_jax.files import replacing, write_whole
from deevisum_jax.summary import select, shots
from tfds_builders.synthetic import annotators, paint, scenario, sound

_ROOT = pathlib.Path(__file__).resolve().parents[2]  # where the packages are imported from
_ARRAYS = ("audio", "frame_times", "score_times", "user_scores", "user_summary", "change_points")


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
      UserError: a worker failed, of a full disk for instance; what it printed to stderr says why.
    """
    pathlib.Path(job.folder).mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    num_workers = min(cores, job.num_videos)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(_ROOT), *sys.path])),
        "OPENBLAS_NUM_THREADS": "1",
    }
    workers = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for k in range(num_workers):
                share = {"job": dataclasses.asdict(job), "scratch": scratch}
                share |= {"first": k, "step": num_workers}
                command = [sys.executable, "-m", __name__, json.dumps(share)]
                workers.append(
                    subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True)
                )
            for index in range(job.num_videos):
                line = workers[index % num_workers].stdout.readline()
                if not line:
                    raise UserError(
                        f"the process that makes synthetic video {index} of split {job.split!r} "
                        f"in {job.folder} ended early; its own message is above"
                    )
                path = pathlib.Path(line.rstrip("\n"))
                yield _unpack(path)
                path.unlink()
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()


def main(argument: str) -> None:
    """A worker: makes every `step`-th video from `first` on and prints where each record lies."""
    share = json.loads(argument)
    rules = scenario.Rules(**share["job"].pop("rules"))
    job = Job(**share["job"], rules=rules)
    for index in range(share["first"], job.num_videos, share["step"]):
        path = pathlib.Path(share["scratch"]) / f"{index}.npz"
        _pack(path, make(job, index))
        print(path, flush=True)


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
    decoded = video.decode_video(path, frame_rate=frame_rate, size=(frame_size, frame_size))
    info = decoded.info
    assert info.n_frames == drawn.n_frames, (info.n_frames, drawn.n_frames)
    waveform = audio.decode_audio(path)
    found = shots.detect_shots(
        decoded.frames,
        decoded.frame_times,
        native_times=decoded.native_times,
        change=decoded.change,
        max_shot_s=shots.shot_limit_s(info.duration_s),
        duration_s=info.duration_s,
    )
    change_points = select.shot_bounds(found).astype(np.int32)
    user_scores = annotators.annotate(drawn)
    return {
        "video_id": drawn.video_id,
        "title": drawn.title,
        "category": drawn.category,
        "transcript": [
            {"start": cue.start_s, "end": cue.end_s, "text": cue.text}
            for cue in subtitles.load_subtitles(path)
        ],
        "captions": [
            {"start": c.start_s, "end": c.end_s, "text": c.text} for c in scenario.captions(drawn)
        ],
        # The decoder divides 16-bit samples by 32768: this stores those very samples.
        "audio": np.clip(np.round(waveform * 32768), -32768, 32767).astype(np.int16),
        "frames": [_jpeg(frame) for frame in decoded.frames],
        "frame_times": decoded.frame_times.astype(np.float32),
        "score_times": drawn.score_times.astype(np.float32),
        "user_scores": user_scores,
        "user_summary": summaries(user_scores, change_points, drawn.n_frames),
        "change_points": change_points,
        "n_frames": info.n_frames,
        "native_fps": info.native_fps,
        "duration_s": info.duration_s,
    }


def summaries(user_scores: np.ndarray, change_points: np.ndarray, n_frames: int) -> np.ndarray:
    """Every annotator's summary of 15 % by shot means and knapsack, uint8[U, n_frames].

    Args:
      user_scores: float[U, N], points of `POINT_S` seconds from the start on.
      change_points: int[S, 2], shots in native frames.
      n_frames: native frames at `FRAME_RATE`.
    """
    point = (np.arange(n_frames) / (scenario.POINT_S * scenario.FRAME_RATE)).astype(int)
    lengths = np.diff(change_points, axis=1)[:, 0]
    out = np.zeros((len(user_scores), n_frames), np.uint8)
    for row, scores in zip(out, user_scores[:, point], strict=True):
        chosen = select.select_summary(select.shot_scores(scores, change_points), lengths, n_frames)
        for start, end in change_points[chosen]:
            row[start:end] = 1
    return out


def _jpeg(frame: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(frame).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def _pack(path: pathlib.Path, record: dict[str, Any]) -> None:
    """Writes a record to one file that holds neither pickles nor code."""
    plain = {k: v for k, v in record.items() if k not in (*_ARRAYS, "frames")}
    np.savez(
        path,
        plain=np.frombuffer(json.dumps(plain).encode(), np.uint8),
        frames=np.frombuffer(b"".join(record["frames"]), np.uint8),
        frame_bytes=[len(frame) for frame in record["frames"]],
        **{name: record[name] for name in _ARRAYS},
    )


def _unpack(path: pathlib.Path) -> dict[str, Any]:
    with np.load(path) as stored:
        record = json.loads(stored["plain"].tobytes())
        ends = np.cumsum(stored["frame_bytes"])
        frames = stored["frames"].tobytes()
        record["frames"] = [
            frames[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        return record | {name: stored[name] for name in _ARRAYS}


if __name__ == "__main__":
    main(sys.argv[1])
