"""Decodes videos into files of their own, so that none is decoded twice; what failed says why.

    <folder>/<content>.npz    a video that is done
    <folder>/<content>.json   why one failed, until it is tried again

Names are digests of what is in the video and how it is stored. Processes share nothing but the
folder: any may be killed at any moment, and the next run goes on.

The work is done by processes of this machine, `python -m tfds_builders.video_folder.prepare PLAN`,
or by Apache Beam on any machines that see the same files.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import pathlib
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from deevisum_jax import files
from deevisum_jax.errors import UserError
from deevisum_jax.summary import protocols, select
from tfds_builders import workers
from tfds_builders.media_record import read_media
from tfds_builders.video_folder import sources
from tfds_builders.video_folder.sources import Source

_VERSION = 1  # of what is stored; what has another one is decoded anew
_DIED = "the process that read it ended, as broken files or too little memory make it"
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # the next video would not fare better
_SHOWN_S = 10.0  # between two lines on how far it is


class Store:
    """The folder of decoded videos. Small, and known to every process by its fields."""

    def __init__(self, folder: str, frame_rate: float) -> None:
        self.folder, self.frame_rate = folder, frame_rate

    def prepare(self, source: Source) -> None:
        """Decodes a video that is not done; a failure is noted and not raised.

        Raises:
          OSError: the folder cannot be written.
        """
        done, failed = self._path(source, ".npz"), self._path(source, ".json")
        if done.exists():
            return
        # Stands if the process dies of the file.
        files.write_whole(failed, json.dumps({"reason": _DIED}))
        try:
            self._decode(source, done)
            failed.unlink(missing_ok=True)
        except Exception as error:
            if getattr(error, "errno", None) in _FULL:
                raise
            reason = str(error)
            if not isinstance(error, UserError):
                reason = f"{source.video}: {type(error).__name__}: {error}"
            files.write_whole(failed, json.dumps({"reason": " ".join(reason.split())}))

    def _decode(self, source: Source, done: pathlib.Path) -> None:
        media = read_media(
            source.video, frame_rate=self.frame_rate, subtitles_path=source.subtitles
        )
        stored = media.fields() | {
            "change_points": select.shot_bounds(media.shots).astype(np.int32),
            "n_frames": media.info.n_frames,
            "native_fps": media.info.native_fps,
            "duration_s": media.info.duration_s,
        }
        with files.replacing(done) as temporary, temporary.open("wb") as stream:
            workers.pack(stream, stored)

    def failure(self, source: Source) -> str | None:
        """Why a video gives no record; None if it gives one."""
        if not self._path(source, ".npz").exists():
            with contextlib.suppress(FileNotFoundError):
                return json.loads(self._path(source, ".json").read_text())["reason"]
            return f"{source.video}: was not read"
        try:
            if source.scores is not None:
                self.record(source)
        except UserError as error:
            return str(error)
        return None

    def record(self, source: Source) -> dict[str, Any]:
        """The record of a video that is done.

        Raises:
          UserError: its scores go beyond it.
        """
        record = workers.unpack(self._path(source, ".npz"))
        scores = _scores(source, record) | {
            "video_id": source.id,
            "title": source.title,
            "category": "",
            "captions": [],
        }
        return record | scores

    def _path(self, source: Source, ending: str) -> pathlib.Path:
        told = json.dumps([_VERSION, self.frame_rate, source.content])
        return pathlib.Path(self.folder, hashlib.sha256(told.encode()).hexdigest()[:32] + ending)


def _scores(source: Source, record: dict[str, Any]) -> dict[str, np.ndarray]:
    """The fields of a record that people gave; of nobody, where there are no scores."""
    if source.scores is None:
        return {
            "score_times": np.zeros(0, np.float32),
            "user_scores": np.zeros((0, 0), np.float32),
            "user_summary": np.zeros((0, record["n_frames"]), np.uint8),
        }
    times, scores = sources.read_scores(source.scores)
    if times[-1] > record["duration_s"]:
        raise UserError(
            f"{source.scores}: scores at {times[-1]:g} s, and {source.video} ends at "
            f"{record['duration_s']:.2f} s; are they of another video?"
        )
    n_frames = record["n_frames"]
    point = protocols.point_of_frame(times, n_frames, n_frames / record["duration_s"])
    summary = select.annotator_summaries(
        scores[:, point], record["change_points"], n_frames, select.DEFAULT_BUDGET
    )
    return {
        "score_times": times.astype(np.float32),
        "user_scores": scores,
        "user_summary": summary.astype(np.uint8),
    }


# ---- On this machine ----


def with_processes(store: Store, videos: Sequence[Source]) -> None:
    """Prepares videos with a process for each CPU core.

    A process that dies costs the video that it read, and no other.

    Raises:
      UserError: the folder cannot be written.
    """
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index in range(len(videos)):
        left.put(index)
    progress = _Progress(len(videos))
    errors: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        plan = pathlib.Path(scratch, "plan.json")
        plan.write_text(json.dumps([vars(store), [vars(video) for video in videos]]))
        threads = [
            threading.Thread(target=_feed, args=(plan, left, progress, errors))
            for _ in range(min(workers.num_cores(), len(videos)))
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:
            errors.append("interrupted")  # ends the threads after what they are at
            raise
    if errors:
        raise UserError(errors[0])


class _Progress:
    """Says now and then how many videos are done."""

    def __init__(self, total: int) -> None:
        self._total, self._count, self._shown = total, 0, time.monotonic()
        self._lock = threading.Lock()

    def one(self) -> None:
        with self._lock:
            self._count += 1
            if time.monotonic() > self._shown + _SHOWN_S:
                self._shown = time.monotonic()
                print(f"{self._count} of {self._total} videos read", file=sys.stderr)


def _feed(
    plan: pathlib.Path, left: queue.SimpleQueue[int], progress: _Progress, errors: list[str]
) -> None:
    """Hands one process after another what is left, index by index."""
    process = None
    try:
        while not errors:
            try:
                index = left.get_nowait()
            except queue.Empty:
                return
            if process is None:
                process = workers.start(__name__, str(plan))
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(f"{index}\n")
                process.stdin.flush()
            answer = process.stdout.readline()
            progress.one()
            if not answer:  # it died; its note says so
                process.communicate()
                process = None
            elif error := json.loads(answer):
                errors.append(error)
    finally:
        if process is not None:
            process.kill()
            process.communicate()


def main(plan: str) -> None:
    """A worker: reads indices of videos from stdin, answers each with an error or null."""
    fields, videos = json.loads(pathlib.Path(plan).read_text())
    store = Store(**fields)
    with contextlib.suppress(KeyboardInterrupt):  # whoever started it tells
        for line in sys.stdin:
            try:
                store.prepare(Source(**videos[int(line)]))
                answer = None
            except OSError as error:
                answer = f"{store.folder} cannot be written ({error})"
            print(json.dumps(answer), flush=True)


# ---- With Apache Beam ----


def with_beam(store: Store, videos: Sequence[Source], options: Any, runner: Any) -> None:
    """Prepares videos on whatever machines the options of a Beam pipeline name.

    Args:
      store: in a folder that all of them see under the same path, as they must the videos.
      videos: which.
      options: `apache_beam.options.pipeline_options.PipelineOptions`, or None.
      runner: a Beam runner or its name, or None for that of the options.

    Raises:
      Exception: of the runner, among others where the folder cannot be written.
    """
    import apache_beam as beam

    with beam.Pipeline(runner=runner, options=options) as pipeline:
        _ = (
            pipeline
            | beam.Create(list(videos))
            | beam.Reshuffle()
            | beam.Map(functools.partial(_prepare, store))
        )


def _prepare(store: Store, source: Source) -> None:
    store.prepare(source)


if __name__ == "__main__":
    main(sys.argv[1])
