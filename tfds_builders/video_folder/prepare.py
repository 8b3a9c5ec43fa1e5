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
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
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
_DAMAGED = (zipfile.BadZipFile, EOFError, LookupError, ValueError)  # of NumPy's files
_MAX_UNSCORED_S = 2.0  # at the end of a video, however dense its scores are
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
        if _is_whole(done):
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

    def forget(self, source: Source) -> None:
        """Removes the note of why a video failed, before it is tried again."""
        self._path(source, ".json").unlink(missing_ok=True)

    def is_noted(self, source: Source) -> bool:
        """Whether a process has begun with a video, and has not ended well."""
        return self._path(source, ".json").exists()

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
        done = self._path(source, ".npz")
        if not done.exists():
            with contextlib.suppress(FileNotFoundError):
                return json.loads(self._path(source, ".json").read_text())["reason"]
            return f"{source.video}: was not read"
        if source.scores is not None:
            try:
                _fitting_scores(source, workers.unpack_plain(done)["duration_s"])
            except UserError as error:
                return str(error)
        return None

    def record(self, source: Source) -> dict[str, Any]:
        """The record of a video that is done.

        Raises:
          UserError: its scores are not of its length, or what was decoded is damaged.
        """
        done = self._path(source, ".npz")
        try:
            record = workers.unpack(done)
        except _DAMAGED as error:
            done.unlink()
            raise UserError(
                f"{done}, decoded of {source.video}, was damaged ({error}) and is gone; give the "
                "same command again"
            ) from error
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


def _is_whole(done: pathlib.Path) -> bool:
    """Whether a decoded video is there; what a full disk or a copy has cut off is removed."""
    try:
        workers.unpack_plain(done)
    except FileNotFoundError:
        return False
    except _DAMAGED:
        done.unlink()
        return False
    return True


def _fitting_scores(source: Source, duration_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Times and scores as `sources.read_scores`, of a video that is so long.

    Raises:
      UserError: they go beyond it, or end long before it.
    """
    times, scores = sources.read_scores(source.scores)
    if times[-1] > duration_s:
        raise UserError(
            f"{source.scores}: scores at {times[-1]:g} s, and {source.video} ends at "
            f"{duration_s:.2f} s; are they of another video?"
        )
    # The last score holds until the end, whatever is there.
    if len(times) > 1:
        unscored_s, usual_s = duration_s - times[-1], 2 * float(np.median(np.diff(times)))
    else:
        unscored_s, usual_s = duration_s, 0.0
    if unscored_s > max(usual_s, _MAX_UNSCORED_S):
        raise UserError(
            f"{source.scores}: the last of {len(times)} scores is at {times[-1]:g} s, and "
            f"{source.video} ends at {duration_s:.2f} s; score all of it"
        )
    return times, scores


def _scores(source: Source, record: dict[str, Any]) -> dict[str, np.ndarray]:
    """The fields of a record that people gave; of nobody, where there are no scores."""
    if source.scores is None:
        return {
            "score_times": np.zeros(0, np.float32),
            "user_scores": np.zeros((0, 0), np.float32),
            "user_summary": np.zeros((0, record["n_frames"]), np.uint8),
        }
    times, scores = _fitting_scores(source, record["duration_s"])
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
      UserError: the folder cannot be written, or processes cannot be started.
    """
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for index, video in enumerate(videos):
        store.forget(video)
        left.put(index)
    progress = _Progress(len(videos))
    errors: list[BaseException] = []
    with tempfile.TemporaryDirectory() as scratch:
        plan = pathlib.Path(scratch, "plan.json")
        plan.write_text(json.dumps([vars(store), [vars(video) for video in videos]]))
        threads = [
            threading.Thread(target=_feed, args=(store, videos, plan, left, progress, errors))
            for _ in range(min(workers.num_cores(), len(videos)))
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException as error:
            errors.append(error)  # ends the threads after what they are at
            raise
    if errors:
        raise errors[0]


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
    store: Store,
    videos: Sequence[Source],
    plan: pathlib.Path,
    left: queue.SimpleQueue[int],
    progress: _Progress,
    errors: list[BaseException],
) -> None:
    """Hands one process after another what is left, index by index; `errors` has what it raises."""
    process, answered = None, False
    try:
        while not errors:
            try:
                index = left.get_nowait()
            except queue.Empty:
                return
            if process is None:
                process, answered = _start(plan), False
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(f"{index}\n")
                process.stdin.flush()
            answer = process.stdout.readline()
            if not answer:  # it died
                process.communicate()
                process = None
                if not store.is_noted(videos[index]):  # and not of the video, which it never began
                    if not answered:
                        raise UserError(
                            "the process that reads videos ended before it began; its own message "
                            "is above"
                        )
                    left.put(index)
                    continue
            elif error := json.loads(answer):
                raise UserError(error)
            answered = True
            progress.one()
    except Exception as error:
        errors.append(error)
    finally:
        if process is not None:
            process.kill()
            process.communicate()


def _start(plan: pathlib.Path) -> subprocess.Popen[str]:
    try:
        return workers.start(__name__, str(plan))
    except OSError as error:
        raise UserError(
            f"a process that reads videos cannot be started ({error}); end other programs, and "
            "give the same command again"
        ) from error


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
