"""What tests of the training program do to its runs, and read of them."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Iterator

import pytest

from deevisum_jax import training_log


class _KillError(Exception):
    """Stands in for a kill."""


@contextlib.contextmanager
def killed_at(step: int) -> Iterator[None]:
    """What is inside trains, and is killed when it comes to a step.

    The update of this step is done, but nothing of it logged or saved.
    """

    def advance(self):
        self._bar.update(1)
        if self._bar.n == step:
            raise _KillError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_log.TrainingLog, "advance", advance)
        with pytest.raises(_KillError):
            yield


def lines(workdir: pathlib.Path) -> list[dict[str, float]]:
    """What was logged, but for the speed."""
    logged = training_log.read_metrics(workdir / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "examples_per_s"} for line in logged]
