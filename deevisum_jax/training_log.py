"""What a person sees of a training run: progress bar, metrics.jsonl, TensorBoard event files."""

from __future__ import annotations

import contextlib
import json
import pathlib
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType

import jax
import tqdm
from etils import epath
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.record_writer import masked_crc32c

from deevisum_jax import distributed
from deevisum_jax.errors import UserError
from deevisum_jax.files import in_bucket, write_whole

METRICS_FILE = "metrics.jsonl"
EVENTS_FOLDER = "tensorboard"
_UPLOAD_S = 60.0


class TrainingLog:
    """Writes `metrics.jsonl` (a line per logged step) and `tensorboard/`; shows a progress bar.

    Of many processes only the first does so.
    """

    def __init__(
        self, workdir: epath.Path, *, first_step: int, total_steps: int, batch_size: int
    ) -> None:
        """Opens the files; lines of steps after `first_step` are dropped.

        Args:
          workdir: the run's folder.
          first_step: updates already done; a resumed run writes its later steps anew.
          total_steps: updates of the whole run.
          batch_size: examples per update, for examples/s.

        Raises:
          UserError: they cannot be written, as all that writes here.
        """
        self._metrics = self._events = None
        if distributed.is_main():
            self._metrics = _open_metrics(workdir / METRICS_FILE, first_step)
            self._events = _open_events(workdir / EVENTS_FOLDER, first_step)
        self._bar = tqdm.tqdm(
            initial=first_step,
            total=total_steps,
            unit="step",
            desc="train",
            dynamic_ncols=True,
            disable=not distributed.is_main(),
        )
        self._batch_size = batch_size
        self._begun_at, self._paused_s = time.monotonic(), 0.0
        self._last_step, self._last_s = first_step, 0.0

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        with contextlib.ExitStack() as files:
            for file in (self._metrics, self._events):
                if file is not None:
                    files.callback(file.close)
            # What ended the run is told, not what comes of it.
            with contextlib.suppress(*[UserError] if kind else []):
                self.flush()

    def advance(self) -> None:
        """One update is done."""
        self._bar.update(1)

    def trained_s(self) -> float:
        """Seconds that training has taken so far, without its pauses."""
        return time.monotonic() - self._begun_at - self._paused_s

    def train(self, step: int, metrics: Mapping[str, float], trained_s: float) -> None:
        """Logs a training step that was at `trained_s`, with the speed since the one before."""
        examples_per_s = (step - self._last_step) * self._batch_size / (trained_s - self._last_s)
        self._last_step, self._last_s = step, trained_s
        self.write(step, {**metrics, "examples_per_s": examples_per_s})
        self._bar.set_postfix_str(
            f"loss {metrics['loss/total']:.4f}, {examples_per_s:.0f} examples/s", refresh=False
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs named numbers of a step."""
        if self._metrics is None:
            return
        self._metrics.write((json.dumps({"step": step, **metrics}) + "\n").encode())
        values = [
            summary_pb2.Summary.Value(tag=name, simple_value=value)
            for name, value in metrics.items()
        ]
        self._events.write(_event(step=step, summary=summary_pb2.Summary(value=values)))

    def flush(self) -> None:
        """Brings into a bucket what is not there yet; a local file has all of it already."""
        for file in (self._metrics, self._events):
            if file is not None:
                file.flush()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count as training time."""
        start = time.monotonic()
        yield
        self._paused_s += time.monotonic() - start


class _Growing:
    """A file that is appended to; an object in a bucket cannot be, and is written anew.

    That is done now and then. A kill takes what is younger than a minute or the newest checkpoint.
    """

    def __init__(self, path: epath.Path, content: bytes = b"") -> None:
        """Begins the file with `content`, in place of what is there."""
        self._path, self._file = path, None
        with self._telling():
            write_whole(path, content)
            if not in_bucket(path):
                # Unbuffered: a line is there, for whoever looks, as soon as it is logged.
                self._file = pathlib.Path(path).open("ab", buffering=0)  # noqa: SIM115  closed by `close`
        self._content, self._uploaded_bytes = bytearray(content), len(content)
        self._uploaded_at = time.monotonic()

    def write(self, data: bytes) -> None:
        with self._telling():
            if self._file is not None:
                # A disk that is nearly full takes a part, and says why with the rest.
                while data:
                    data = data[self._file.write(data) :]
                return
        self._content += data
        if time.monotonic() - self._uploaded_at >= _UPLOAD_S:
            self.flush()

    def flush(self) -> None:
        if len(self._content) == self._uploaded_bytes:
            return
        with self._telling():
            write_whole(self._path, bytes(self._content))
        self._uploaded_bytes, self._uploaded_at = len(self._content), time.monotonic()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error.strerror or error}); make room or mend "
                "that, and give the same command again"
            ) from error


def _open_metrics(path: epath.Path, last: int) -> _Growing:
    """Without lines of steps that will be done again, and a line that a kill cut short."""
    kept = [line for line in read_metrics(path) if line["step"] <= last]
    return _Growing(path, "".join(json.dumps(line) + "\n" for line in kept).encode())


def _open_events(folder: epath.Path, last: int) -> _Growing:
    """A file of its own for every start; TensorBoard drops what it has of later steps.

    Not by tensorboardX's writer: its thread ends on a full disk, and whoever writes then waits for
    it for ever.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}); mend that") from error
    name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}"
    version = _event(file_version="brain.Event:2")
    begin = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    return _Growing(folder / name, version + _event(step=last + 1, session_log=begin))


def _event(**fields: object) -> bytes:
    """A record: length, its checksum, the event, its checksum."""
    event = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()
    length = struct.pack("<Q", len(event))
    checksums = [struct.pack("<I", masked_crc32c(part)) for part in (length, event)]
    return length + checksums[0] + event + checksums[1]


def say(text: str) -> None:
    """A line on stderr, above the progress bar if there is one; says which process it is of."""
    of_process = f"[process {jax.process_index()}] " if jax.process_count() > 1 else ""
    tqdm.tqdm.write(f"{of_process}warning: {text}", file=sys.stderr)


def read_metrics(path: epath.Path) -> list[dict[str, float]]:
    """The logged lines in order; a last line that is not whole is left out."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
