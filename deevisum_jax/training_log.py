"""What a person sees of a training run: progress bar, metrics.jsonl, TensorBoard event files."""

from __future__ import annotations

import contextlib
import json
import math
import pathlib
import time
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any

import tensorboardX
import tqdm

from deevisum_jax.errors import UserError
from deevisum_jax.files import write_whole

METRICS_FILE = "metrics.jsonl"


class TrainingLog:
    """Writes `metrics.jsonl` (a line per logged step) and `tensorboard/`; shows a progress bar."""

    def __init__(
        self, workdir: pathlib.Path, *, first_step: int, total_steps: int, batch_size: int
    ) -> None:
        """Opens the files for appending; lines of steps after `first_step` are dropped.

        Args:
          workdir: the run's folder.
          first_step: updates already done; a resumed run writes its later steps anew.
          total_steps: updates of the whole run.
          batch_size: examples per update, for examples/s.
        """
        self._path = workdir / METRICS_FILE
        self._keep_up_to(first_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=first_step + 1
        )
        self._bar = tqdm.tqdm(
            initial=first_step, total=total_steps, unit="step", desc="train", dynamic_ncols=True
        )
        self._batch_size = batch_size
        self._last_step, self._last_time = first_step, time.monotonic()

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.close()
        self._events.close()
        self._file.close()

    def advance(self) -> None:
        """One update is done."""
        self._bar.update(1)

    def train(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs a training step, with the speed since the last logged one.

        Raises:
          UserError: a metric is not finite; names it, and the steps between which it happened.
        """
        metrics = {name: float(value) for name, value in metrics.items()}  # waits for the device
        broken = [name for name, value in metrics.items() if not math.isfinite(value)]
        if broken:
            raise UserError(
                f"{', '.join(broken)} not finite at step {step}, after step {self._last_step}, "
                "which was sound; start again in a new --workdir with a lower "
                "optim.learning_rate or optim.clip_norm, from this run's best checkpoint with "
                "--config.initialization if it has one"
            )
        now = time.monotonic()
        examples_per_s = (step - self._last_step) * self._batch_size / (now - self._last_time)
        self._last_step, self._last_time = step, now
        self.write(step, {**metrics, "examples_per_s": examples_per_s})
        self._bar.set_postfix_str(
            f"loss {metrics['loss/total']:.4f}, {examples_per_s:.0f} examples/s", refresh=False
        )

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs named numbers of a step."""
        self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._file.flush()
        for name, value in metrics.items():
            self._events.add_scalar(name, value, step)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside does not count as training time."""
        start = time.monotonic()
        yield
        self._last_time += time.monotonic() - start

    def _keep_up_to(self, last: int) -> None:
        """Drops lines of steps that will be done again, and a line that a kill cut short."""
        kept = [line for line in read_metrics(self._path) if line["step"] <= last]
        write_whole(self._path, "".join(json.dumps(line) + "\n" for line in kept))


def read_metrics(path: pathlib.Path) -> list[dict[str, float]]:
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
