"""The training loop: update, check, log, validate, save, until all is done or a notice comes."""

from __future__ import annotations

import collections
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NoReturn, Protocol

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from deevisum_jax import distributed, training_log
from deevisum_jax.checkpoints import Checkpoints, DataIterator
from deevisum_jax.config import Config
from deevisum_jax.errors import PreemptedError, UserError
from deevisum_jax.files import write_whole
from deevisum_jax.preemption import Notice
from deevisum_jax.train_step import Metrics, TrainState
from deevisum_jax.training_log import TrainingLog
from deevisum_jax.typing import Batch
from deevisum_jax.watchdog import Watchdog

NONFINITE_FILE = "nonfinite.json"

# Updates that are on their way while the numbers of the one before them are read. Every step is
# checked, and no device waits for its host.
_LAG = 2


class TrainIterator(DataIterator, Iterator[dict[str, np.ndarray]], Protocol):
    """Endless batches of this process's rows, from any place."""


def train(
    state: TrainState,
    *,
    config: Config,
    workdir: epath.Path,
    data_iter: TrainIterator,
    place: Callable[[dict[str, np.ndarray]], Batch],
    update: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    validate: Callable[[TrainState], Mapping[str, float]],
    describe: Callable[[int, int], Mapping[str, Any]],
    saved: Checkpoints,
    notice: Notice,
) -> None:
    """Trains from where `state` stands to `config.total_steps`; all is saved when it returns.

    Args:
      state: given away to the first update.
      config: how long, and how often to log, validate and save.
      workdir: the run's folder.
      data_iter: stands where `state` does.
      place: puts the rows of all processes onto the mesh as one batch.
      update: one step; does not wait for the device.
      validate: the scores that a checkpoint is judged by; may raise `PreemptedError`.
      describe: what the segment (`Batch.video_id`, `Batch.segment`) is, for people.
      saved: where checkpoints go.
      notice: tells when to stop.

    Raises:
      PreemptedError: a notice came; the step was finished and saved.
      UserError: a number is not finite (`nonfinite.json` then tells the batch), or something
        cannot be written.
    """
    first_step, total = int(state.step), config.total_steps
    validates = lambda step: step % config.eval.every_steps == 0 or step == total
    # Whatever is validated may be the best, so it is saved.
    saves = lambda step: step % config.checkpoint.every_steps == 0 or validates(step)
    # A notice may have come between the update and its validation.
    unjudged = first_step > 0 and validates(first_step) and saved.scores(first_step) is None
    if first_step >= total and not unjudged:
        return
    with (
        notice.deferred(),
        Watchdog(training_log.say) as watchdog,
        TrainingLog(
            workdir, first_step=first_step, total_steps=total, batch_size=config.batch_size
        ) as log,
    ):

        def judge(step: int) -> Mapping[str, float]:
            with log.paused(), watchdog.watching("validation", step):
                scores = validate(state)
            log.write(step, {f"validation/{name}": value for name, value in scores.items()})
            return scores

        before_s = 0.0  # when the update before was done

        def read(one: _InFlight) -> None:
            nonlocal before_s
            metrics = jax.device_get(one.metrics)
            metrics = {name: float(value) for name, value in metrics.items()}
            if not all(math.isfinite(value) for value in metrics.values()):
                _stop_at(one, metrics, workdir, describe)
            log.advance()
            # When the device began with it: its host may be ahead of it, or behind.
            begun_s = max(one.given_s, before_s)
            before_s = log.trained_s() if one.done_s is None else one.done_s
            step = one.step
            if step % config.log_every == 0 or step == first_step + 1 or saves(step):
                log.train(step, metrics, begun_s)

        if unjudged:
            saved.add_scores(first_step, judge(first_step))
        in_flight: collections.deque[_InFlight] = collections.deque()
        for step in range(first_step + 1, total + 1):
            with watchdog.watching("input", step):
                fields = next(data_iter)
            for earlier in in_flight:
                earlier.look(log.trained_s())
            with watchdog.watching("update", step):
                batch = place(fields)
                state, metrics = update(state, batch)
                in_flight.append(
                    _InFlight(step, metrics, batch.video_id, batch.segment, log.trained_s())
                )
                stops = notice.reached()
                # What is saved is checked first: nothing that is not finite ever is.
                while len(in_flight) > (0 if stops or saves(step) else _LAG):
                    read(in_flight.popleft())
            if not (stops or saves(step)):
                continue
            scores = None
            if validates(step) and not stops:
                try:
                    scores = judge(step)
                except PreemptedError:
                    stops = True
            with log.paused(), watchdog.watching("save", step):
                log.flush()
                saved.save(step, state, data_iter, scores)
                if stops or step == total:
                    saved.wait()
            if stops:
                raise PreemptedError(f"step {step} of {total} is done and saved")
    # Of an earlier start; this one came to the end.
    distributed.on_main(lambda: (workdir / NONFINITE_FILE).unlink(missing_ok=True))


@dataclasses.dataclass
class _InFlight:
    """An update whose numbers were not looked at yet."""

    step: int
    metrics: Metrics
    video_id: jax.Array  # int32[B]
    segment: jax.Array  # int32[B]
    given_s: float  # to the device, by `TrainingLog.trained_s`
    done_s: float | None = None  # the same; when it was found done before it was waited for

    def __post_init__(self) -> None:
        for value in self.metrics.values():
            value.copy_to_host_async()

    def look(self, now_s: float) -> None:
        """Notes the time, if the update is done and was not before."""
        if self.done_s is None and all(value.is_ready() for value in self.metrics.values()):
            self.done_s = now_s


def _stop_at(
    broken: _InFlight,
    metrics: Mapping[str, float],
    workdir: epath.Path,
    describe: Callable[[int, int], Mapping[str, Any]],
) -> NoReturn:
    """Writes down what was trained on if it can, and raises; every process calls it."""
    video_ids, segments = multihost_utils.process_allgather(
        (broken.video_id, broken.segment), tiled=True
    )
    found = {
        "step": broken.step,
        # JSON has no NaN.
        "metrics": {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()},
        "batch": [
            describe(int(video), int(segment))
            for video, segment in zip(video_ids, segments, strict=True)
        ],
    }
    path = workdir / NONFINITE_FILE

    def keep() -> str:
        try:
            write_whole(path, json.dumps(found, indent=2) + "\n")
        except (OSError, UserError) as error:
            return f"its batch could not be written down ({error})"
        return f"{path} tells the batch"

    told = distributed.on_main(keep)
    names = [name for name, value in metrics.items() if not math.isfinite(value)]
    raise UserError(
        f"{', '.join(names)} not finite at step {broken.step}, the first; {told}. "
        "If its videos are sound, start again in a new --workdir with a lower "
        "optim.learning_rate or optim.clip_norm, from this run's best checkpoint with "
        "--config.initialization if it has one"
    )
