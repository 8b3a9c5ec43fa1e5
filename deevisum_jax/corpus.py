"""Many videos, each cut by itself: a list of them, who takes which, what is done and what failed.

Processes share a folder, or a place in a bucket, and nothing else while they work. What is there is
all that a restart knows: a video is done when its folder is there whole, it has failed when
`failed/` holds its reason. So any process may be killed at any moment.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import dataclasses
import errno
import io
import json
import os
import pathlib
import re
import shutil
import threading
import time
from collections.abc import (
    Callable,
    Container,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Generic, Protocol, TypeVar

from etils import epath

from deevisum_jax import files, manifest
from deevisum_jax.errors import PreemptedError, UserError
from deevisum_jax.manifest import Item, printable
from deevisum_jax.summary import report

MARKER = "summary.json"  # the last file of a finished video
SETTINGS_FILE = "corpus.json"
INDEX_FILE, PAGE_FILE, FAILURES_FILE = "index.json", "index.html", "failures.csv"
_FAILED_FOLDER = "failed"
_FILES = (SETTINGS_FILE, INDEX_FILE, PAGE_FILE, FAILURES_FILE)
_RESERVED = (*_FILES, _FAILED_FOLDER)

# The other files of a finished video, and what a killed writer may have left in its place.
_PARTS = re.compile(
    r"report\.html|summary\.mp4|(keyframes|storyboard)(/[0-9]+_[0-9.]+s\.jpg)?|"
    r"storyboard/contact_sheet\.jpg|(storyboard/)?\.[^/]+\.partial(/.*)?"
)

# What settings come from; the others are called as their options are.
_OPTIONS = {
    "step": "the step of --checkpoint",
    "digest": "the digest of --checkpoint",
    "exit_policy": "--exit_threshold",
    "query_model": "the digest of --query_model",
}
_ALWAYS_SET = ("step", "digest", "budget", "exit_policy")

_NUM_REQUESTS = 16  # at a time, to a bucket
_NUM_ROUNDS = 5  # of writing the index while others change what it tells
# Videos decoded at a time, and written at a time; decoders and encoders have threads of their own.
_NUM_DECODERS = _NUM_WRITERS = max(1, min(4, (os.cpu_count() or 1) // 4))
# Of decoded pictures and sound, which lie in temporary files; more only for a video that is larger
# by itself.
_MAX_BYTES = 8 * 2**30
# That a video under way waits for others to fill batches with it; then it goes on without them.
_MAX_WAIT_S = 60.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class VideoError(Exception):
    """One video cannot be summarized, which says nothing about the others; why is its cause."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(str(cause))
        self.__cause__ = cause


# ---- The list ----


def read_manifest(path: epath.Path) -> list[Item]:
    """The videos that a CSV file lists, in its order; see `manifest.read`.

    Raises:
      UserError: it cannot be read, has other columns or no rows, or rows that cannot be; all of
        them are named.
    """
    return manifest.read(path, reserved=_RESERVED)


def share(items: Sequence[Item], index: int, count: int) -> list[Item]:
    """What process `index` of `count` takes: every `count`-th row, whatever is done already."""
    return list(items[index::count])


# ---- What is there ----


class Corpus:
    """The folder that all results go to."""

    def __init__(self, out: epath.Path) -> None:
        self.out = out
        # By id, what the index tells of a video that is done, and the row that it was made of.
        self._made: dict[str, tuple[Mapping[str, Any], Mapping[str, Any] | None]] = {}

    def claim(self, settings: Mapping[str, Any], items: Sequence[Item]) -> list[str]:
        """Makes the folder that of these settings, or makes sure that it is; one process does it.

        Args:
          settings: what results depend on, and `run`, which may have moved since.
          items: of all processes.

        Returns:
          The ids of what is done.

        Raises:
          UserError: it cannot be written, is in use for something else, or was filled with other
            settings or from other videos.
        """
        stored = self.out / SETTINGS_FILE
        done: set[str] = set()
        if files.exists(stored):
            done = self.done()
            there = files.read_json(stored, f"give --out a new folder, or restore {SETTINGS_FILE}")
            differing = _differences(there, settings)
            if differing and done:
                raise UserError(
                    f"{self.out} holds summaries made in another way ({'; '.join(differing)}; of "
                    f"{there.get('run')}); give --out a new folder, or go on with the options, and "
                    "the version, that it was begun with"
                )
            self._check_folders(items, done)
        elif files.exists(self.out) and not files.is_empty(self.out):
            raise UserError(
                f"{self.out} is no empty folder and holds no summaries of ours; give --out a new "
                "one"
            )
        with files.writing(self.out):
            if not files.in_bucket(self.out):
                self.out.mkdir(parents=True, exist_ok=True)
            # Again, where it is there: whoever may not write knows it before there is work.
            files.write_whole(stored, json.dumps(settings, indent=2) + "\n")
        return sorted(done)

    def _check_folders(self, items: Sequence[Item], done: Container[str]) -> None:
        """Makes sure that what has the name of an item was made of it.

        Raises:
          UserError: something was not.
        """
        self._read(item.id for item in items if item.id in done)
        problems = []
        for item in items:
            folder = self.out / item.id
            if item.id in done:
                _, row = self._made[item.id]
                problems += [
                    f"{folder}: its {name} is {row.get(name)} there and {value} in the manifest"
                    for name, value in item.row.items()
                    if row is not None and row.get(name) != value
                ]
            elif not files.in_bucket(folder) and _is_foreign(folder):
                problems.append(f"{folder}: holds something else than a summary")
        if problems:
            raise UserError(
                manifest.listing(
                    f"{self.out} holds what is not made of the manifest's videos:",
                    problems,
                    "delete those that are to be made anew, or give --out a new folder",
                )
            )

    def check_shared(self) -> None:
        """Makes sure that this process sees the folder that another has claimed.

        Raises:
          UserError: it does not.
        """
        if not files.is_shown(self.out / SETTINGS_FILE):
            raise UserError(
                f"{self.out} is not the same folder for all processes; give --out one that they "
                "share, or an address in a bucket"
            )

    def done(self) -> set[str]:
        """The ids whose folders are whole."""
        return files.whole_folders(self.out, MARKER)

    def failures(self, done: Container[str] | None = None) -> dict[str, str]:
        """The reason of each id that failed and was not done since.

        Args:
          done: the ids that are done; None looks.
        """
        folder = self.out / _FAILED_FOLDER
        if not files.exists(folder):
            return {}

        def read(path: epath.Path) -> dict[str, Any] | None:
            try:
                return files.read_json(path, "delete it")
            except UserError as error:
                if files.exists(path):
                    return {"id": path.name.removesuffix(".json"), "reason": str(error)}
                return None  # another process has just done better

        with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
            paths = [path for path in folder.iterdir() if not path.name.startswith(".")]
            found = [entry for entry in pool.map(read, paths) if entry is not None]
        done = self.done() if done is None else done
        return {entry["id"]: entry["reason"] for entry in found if entry["id"] not in done}

    def clear(self, items: Iterable[Item]) -> None:
        """Removes what killed processes have left half-written of these, and of the index."""
        names = {item.id for item in items}
        files.clear_unfinished(self.out, MARKER, names | set(_FILES))
        if files.in_bucket(self.out):
            return
        failed = self.out / _FAILED_FOLDER
        if failed.exists():
            files.clear_unfinished(failed, MARKER, {f"{name}.json" for name in names})
        for name in names:
            if _is_half_made(self.out / name):
                shutil.rmtree(self.out / name)

    @contextlib.contextmanager
    def folder(self, item: Item) -> Iterator[pathlib.Path]:
        """A local folder to write into, whose content becomes that of the item's own."""
        with files.whole_folder(self.out / item.id, MARKER) as folder:
            yield folder
        # What is done counts as done, also where an older failure cannot be removed.
        with contextlib.suppress(Exception):
            self._failed(item).unlink(missing_ok=True)

    def note_failure(self, item: Item, reason: str) -> None:
        """Keeps the reason, until a later start does better."""
        failed = self._failed(item)
        if not files.in_bucket(failed):
            failed.parent.mkdir(exist_ok=True)
        entry = {"id": item.id, "video": os.fspath(item.video), "reason": reason}
        files.write_whole(failed, json.dumps(entry, indent=2) + "\n")

    def _failed(self, item: Item) -> epath.Path:
        return self.out / _FAILED_FOLDER / f"{item.id}.json"

    def write_index(self, items: Sequence[Item]) -> set[str]:
        """Writes index.json, index.html and failures.csv of what is there.

        Every process does so when it is through; the last one to end has all before it.

        Returns:
          The ids of those whose summaries are there and damaged; they are listed as failed.
        """
        seen = None
        for _ in range(_NUM_ROUNDS):
            done = self.done()
            now = done, self.failures(done)
            if now == seen:  # else another process may have seen more, and have written it before
                break
            seen = now
            self._read(item.id for item in items if item.id in done)
            self._write_index([self._told(item, *now) for item in items])
        return {item.id for item in items if item.id in done and self._made[item.id][1] is None}

    def _told(
        self, item: Item, done: Container[str], failures: Mapping[str, str]
    ) -> Mapping[str, Any]:
        """A video of the index."""
        entry = {"id": item.id, "video": printable(os.fspath(item.video))}
        if item.id in done:
            return entry | self._made[item.id][0]
        if item.id in failures:
            return entry | {"state": "failed", "reason": failures[item.id]}
        return entry | {"state": "left"}

    def _write_index(self, entries: Sequence[Mapping[str, Any]]) -> None:
        states = collections.Counter(entry["state"] for entry in entries)
        totals = {
            "videos": len(entries),
            **{state: states[state] for state in ("done", "failed", "left")},
            "duration_s": sum(entry.get("duration_s", 0.0) for entry in entries),
            "selected_s": sum(entry.get("selected_s", 0.0) for entry in entries),
        }
        settings = files.read_json(self.out / SETTINGS_FILE)
        index = {"settings": settings, "totals": totals, "videos": entries}
        failed = [entry for entry in entries if entry["state"] == "failed"]
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, ("id", "video", "reason"), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(failed)
        files.write_whole(self.out / FAILURES_FILE, table.getvalue())
        files.write_whole(self.out / INDEX_FILE, json.dumps(index, indent=2) + "\n")
        report.write_corpus_index(self.out / PAGE_FILE, index)

    def _read(self, names: Iterable[str]) -> None:
        """Reads the summaries of these, which are done, but for what was read before."""
        new = [name for name in names if self._made.get(name, ({}, None))[1] is None]
        with ThreadPoolExecutor(_NUM_REQUESTS) as pool:
            self._made.update(zip(new, pool.map(self._summary, new), strict=True))

    def _summary(self, name: str) -> tuple[Mapping[str, Any], Mapping[str, Any] | None]:
        """What the index tells of a finished video, and its row; None where it is damaged."""
        path = self.out / name / MARKER
        advice = f"delete {path.parent}, and the same command makes it anew"
        try:
            found = files.read_json(path, advice)
            layers = [segment["exit_layer"] for segment in found["segments"]]
            chosen = [shot for shot in found["shots"] if shot["selected"]]
            scores = [shot["score"] for shot in chosen]
            told = {
                "state": "done",
                **{name: found[name] for name in ("title", "duration_s", "selected_s", "notes")},
                "shots": len(chosen),
                "mean_exit_layer": sum(layers) / len(layers),
                "still": found["keyframes"][scores.index(max(scores))],
            }
            return told, dict(found["row"])
        except UserError as error:
            reason = str(error)
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:
            reason = f"{path} is no summary of ours ({error!r}); {advice}"
        return {"state": "failed", "reason": reason}, None


def _differences(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs in settings, in terms of the command's options."""
    told = []
    for name, after in now.items():
        before, option = there.get(name), _OPTIONS.get(name, f"--{name}")
        if name == "run" or before == after:
            continue
        if before is None and name in _ALWAYS_SET:
            told.append(f"{option} was noted otherwise by the older version that began it")
        else:
            told.append(f"{option} is {_shown(before)} there and {_shown(after)} now")
    return told


def _shown(setting: Any) -> str:
    """As an option has it."""
    match setting:
        case None:
            return "not given"
        case {"confidence": confidence, "thresholds": thresholds}:
            each = ("off" if threshold is None else str(threshold) for threshold in thresholds)
            return f"{','.join(each)} by {confidence}"
    return str(setting)


def _is_foreign(folder: epath.Path) -> bool:
    return files.exists(folder) and not files.is_empty(folder) and not _is_half_made(folder)


def _is_half_made(folder: epath.Path) -> bool:
    """Whether parts of a summary and nothing else are in a local folder, the marker not yet."""
    folder = pathlib.Path(folder)
    if folder.is_symlink() or not folder.is_dir():
        return False
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    return bool(names) and all(_PARTS.fullmatch(name) for name in names)


# ---- The work ----


class Held(Protocol):
    """Something with files behind it that are only needed for a while."""

    def close(self) -> None:
        """Removes them."""


class Decoded(Held, Protocol):
    """What `Steps.read` gives."""

    num_bytes: int  # in temporary files


D = TypeVar("D", bound=Decoded)
S = TypeVar("S", bound=Held)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Steps(Generic[D, S]):
    """What is done with every video, one after the other.

    `read` and `write` are called in the background, for several videos at a time, and whatever they
    raise is the video's failure. `score` is called here; it takes videos as they come and gives
    back all of them, in their order, at the latest when no more come. It may ask for more before it
    gives back what it has. What it raises is not a video's fault and ends the work.
    """

    read: Callable[[Item], D]
    # A video that is given back is closed in the place of what was taken. A `VideoError` stands for
    # one that failed, its cause for the reason.
    score: Callable[[Iterator[D]], Generator[S | VideoError, None, None]]
    write: Callable[[Item, S], str]  # returns what is worth saying of it


def work(
    corpus: Corpus, items: Sequence[Item], steps: Steps[D, S], say: Callable[[str], None]
) -> int:
    """Does all `items`: while some are scored, the next are decoded and those before written.

    Args:
      corpus: where reasons of failures go.
      items: what is left of this process's share.
      steps: what is done with each.
      say: gets a line for each when it is finished.

    Returns:
      How many failed.

    Raises:
      PreemptedError, KeyboardInterrupt: as they come; nothing is begun any more, and what is being
        written is whole or not there.
      Exception: of `score`; or a disk is full, or a failure cannot be noted.
    """
    log = _Log(corpus, len(items), say)
    behind: collections.deque[tuple[S, Future[None]]] = collections.deque()

    def write(video: _Video, scored: S) -> None:
        with contextlib.closing(scored):
            try:
                said = video.spend(steps.write, video.item, scored)
            except Exception as error:
                log.failed(video, error)
            else:
                log.done(video, said)

    with (
        ThreadPoolExecutor(_NUM_DECODERS) as decoders,
        ThreadPoolExecutor(_NUM_WRITERS) as writers,
    ):
        reading = _Reading(items, steps.read, decoders, log)
        try:
            while reading.is_any_left:
                with contextlib.closing(steps.score(reading.stretch())) as results:
                    for result in results:
                        if isinstance(result, VideoError):
                            log.failed(reading.failed(), result.__cause__)
                            continue
                        video = reading.scored()
                        behind.append((result, writers.submit(write, video, result)))
                        while len(behind) > _NUM_WRITERS + 1:
                            behind.popleft()[1].result()
            while behind:
                behind.popleft()[1].result()
        except BaseException as error:
            reading.close()
            for scored, future in behind:
                if future.cancel():
                    scored.close()
            if isinstance(error, PreemptedError):
                raise PreemptedError(
                    f"{len(items) - log.count} of the {len(items)} videos that this process had "
                    "before it are left"
                ) from None
            raise
    return log.num_failed


class _Reading(Generic[D]):
    """Videos until they are scored, in order: not begun, decoded ahead, and under way."""

    def __init__(
        self,
        items: Iterable[Item],
        read: Callable[[Item], D],
        decoders: ThreadPoolExecutor,
        log: _Log,
    ) -> None:
        self._read, self._decoders, self._log = read, decoders, log
        self._waiting = collections.deque(items)
        self._ahead: collections.deque[tuple[_Video, Future[D]]] = collections.deque()
        # Taken by who scores and not given back, and since when.
        self._under_way: collections.deque[tuple[_Video, D, float]] = collections.deque()
        self._largest = 0  # bytes of a decoded video, so far
        self._given_back = 0.0  # when the last one was

    @property
    def is_any_left(self) -> bool:
        """Whether there is something for another stretch."""
        return bool(self._waiting or self._ahead)

    def stretch(self) -> Iterator[D]:
        """Videos as they are decoded, as long as those under way can wait for them.

        Segments wait for those of later videos until they make a batch, and at the end of a stretch
        they go without. So it ends when the oldest video under way has waited for `_MAX_WAIT_S`, be
        it that the next is slow to decode, or that many come and few of their segments are as
        unsure as its own; and when what is under way takes all the room there is for it.
        """
        assert not self._under_way, "a stretch has not given back what it took"
        while self.is_any_left:
            self._read_ahead()
            if not self._ahead:
                return
            left_s = None
            if self._under_way:
                left_s = self._under_way[0][2] + _MAX_WAIT_S - time.monotonic()
                if left_s <= 0:
                    return
            video, future = self._ahead[0]
            if not wait([future], left_s).done:  # may be interrupted, as all below
                return
            try:
                self._under_way.append((video, future.result(), time.monotonic()))
            except Exception as error:
                self._ahead.popleft()
                self._log.failed(video, error)
                continue
            self._ahead.popleft()
            del future  # it holds the pictures
            self._read_ahead()
            yield self._under_way[-1][1]

    def _read_ahead(self) -> None:
        """Keeps all decoders busy and one video ready, as far as there is room."""
        ready = [future.result().num_bytes for _, future in self._ahead if _succeeded(future)]
        ready += [decoded.num_bytes for _, decoded, _ in self._under_way]
        self._largest = max([self._largest, *ready])
        num_decoding = len(self._ahead) + len(self._under_way) - len(ready)
        # What is being decoded is taken to be as large as the largest so far.
        held = sum(ready) + self._largest * num_decoding
        while self._waiting and len(self._ahead) <= _NUM_DECODERS:
            if (self._ahead or self._under_way) and (
                not self._largest or held + self._largest > _MAX_BYTES
            ):
                return
            video = _Video(self._waiting.popleft())
            future = self._decoders.submit(video.spend, self._read, video.item)
            self._ahead.append((video, future))
            held += self._largest

    def scored(self) -> _Video:
        """The oldest under way, which was given back.

        Its time has passed while no older one was under way: that of all of them adds up.
        """
        video, _, since = self._under_way.popleft()
        now = time.monotonic()
        video.seconds += now - max(since, self._given_back)
        self._given_back = now
        return video

    def failed(self) -> _Video:
        """As `scored`, where nothing was given back for it."""
        self._under_way[0][1].close()
        return self.scored()

    def close(self) -> None:
        """Closes what is decoded, or will be, and was not given back."""
        for _, future in self._ahead:
            if not future.cancel():
                future.add_done_callback(_close)
        for _, decoded, _ in self._under_way:
            decoded.close()


def _succeeded(future: Future[Any]) -> bool:
    return future.done() and not future.cancelled() and future.exception() is None


def _close(future: Future[Held]) -> None:
    if _succeeded(future):
        future.result().close()


class _Video:
    """An item, and the time that it has taken."""

    def __init__(self, item: Item) -> None:
        self.item, self.seconds = item, 0.0

    def spend(self, do: Callable[..., Any], *args: Any) -> Any:
        began = time.monotonic()
        try:
            return do(*args)
        finally:
            self.seconds += time.monotonic() - began


class _Log:
    """What became of the videos; told and noted from several threads."""

    def __init__(self, corpus: Corpus, total: int, say: Callable[[str], None]) -> None:
        self._corpus, self._total, self._say = corpus, total, say
        self._lock = threading.Lock()
        self.count = self.num_failed = 0

    def done(self, video: _Video, said: str) -> None:
        self._finish(video, said)

    def failed(self, video: _Video, error: BaseException) -> None:
        if _is_full(error):
            raise error  # the next would not fare better
        reason = _reason(error)
        self._corpus.note_failure(video.item, reason)
        self._finish(video, f"failed: {reason}", failed=True)

    def _finish(self, video: _Video, said: str, *, failed: bool = False) -> None:
        with self._lock:
            self.count += 1
            self.num_failed += failed
            self._say(
                f"[{self.count}/{self._total}] {printable(video.item.id)}: {said} "
                f"({video.seconds:.1f} s)"
            )


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return printable(text if isinstance(error, UserError) else f"{type(error).__name__}: {text}")


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if getattr(error, "errno", None) in _FULL:
            return True
        error = error.__cause__ or error.__context__
    return False
