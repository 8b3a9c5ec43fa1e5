"""What the training loop costs over its bare jitted step: `python scripts/benchmark_loop.py`.

Trains the quickstart's student at a batch size of steps around 100 ms. After every block of steps
of the loop (input, placing, update, check of every number, log, watchdog, notice) as many bare
updates are timed on the same state, in the same process; the ratio of neighbours cancels what the
machine is busy with otherwise. On a CPU the input is decoded by the cores that also compute, so the
loop is timed a second time on batches that are ready, as they are where a TPU computes.

The host's own time per step is measured with an update that computes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import absl.logging
import jax
from etils import epath

from deevisum_jax import config as config_lib
from deevisum_jax import main as program
from deevisum_jax import preemption, runs, sharding, training

REPO = pathlib.Path(__file__).resolve().parent.parent
_NUM_READY = 8  # batches that are kept for bare updates


class Alternating:
    """An update that after every block of steps times a block of its own, outside of the loop."""

    def __init__(self, update: Callable[..., Any], block: int) -> None:
        self._update, self._block = update, block
        self._ready: list[Any] = []
        self._steps, self._since = 0, 0.0
        self.loop_s: list[float] = []
        self.bare_s: list[float] = []

    def __call__(self, state: Any, batch: Any) -> Any:
        if len(self._ready) < _NUM_READY:
            self._ready.append(batch)  # and warm up
            return self._update(state, batch)
        if self._steps % self._block == 0:
            jax.block_until_ready(state)
            now = time.perf_counter()
            if self._steps:
                self.loop_s.append(now - self._since)
            for ready in itertools.islice(itertools.cycle(self._ready), self._block):
                state, _ = self._update(state, ready)
            jax.block_until_ready(state)
            self._since = time.perf_counter()
            self.bare_s.append(self._since - now)
        self._steps += 1
        return self._update(state, batch)


class Ready:
    """The same few batches for ever, as fast as they are asked for."""

    def __init__(self, batches: Iterator[Any]) -> None:
        self._batches = [next(batches) for _ in range(_NUM_READY)]
        self._next = 0

    def __next__(self) -> Any:
        self._next += 1
        return self._batches[self._next % _NUM_READY]

    def get_state(self) -> dict[str, int]:
        """Nothing to go on from."""
        return {}


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data_dir", default="~/tensorflow_datasets")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=40)
    parser.add_argument("--block", type=int, default=10, help="steps per block")
    args = parser.parse_args()
    absl.logging.set_verbosity(absl.logging.ERROR)

    for name, is_ready in (("real input", False), ("ready input", True)):
        timed = run(args, lambda update: Alternating(update, args.block), is_ready)
        ratios = sorted(
            loop_s / ((before + after) / 2)
            for loop_s, before, after in zip(
                timed.loop_s, timed.bare_s[:-1], timed.bare_s[1:], strict=True
            )
        )
        low, middle, high = statistics.quantiles(ratios, n=4)
        bare_ms = statistics.median(timed.bare_s) / args.block * 1e3
        print(
            f"{name}: bare step {bare_ms:.1f} ms; loop / bare - 1: median {middle - 1:+.2%}, "
            f"quartiles {low - 1:+.2%} and {high - 1:+.2%}, {len(ratios)} blocks of {args.block}"
        )
    host_s = run(args, Nothing, is_ready=True).per_step_s()
    print(f"host's own time: {host_s * 1e3:.2f} ms per step, {host_s / 0.1:.2%} of 100 ms")
    return 0


class Nothing:
    """An update that computes nothing but has numbers to show."""

    def __init__(self, update: Callable[..., Any]) -> None:
        self._update, self._metrics, self._times = update, None, []

    def __call__(self, state: Any, batch: Any) -> Any:
        if self._metrics is None:
            state, self._metrics = jax.block_until_ready(self._update(state, batch))
        self._times.append(time.perf_counter())
        # New arrays, since one whose number is on the host is not fetched again.
        return state, jax.tree.map(lambda leaf: leaf.copy(), self._metrics)

    def per_step_s(self) -> float:
        """The median of steps one after the other."""
        return statistics.median(b - a for a, b in itertools.pairwise(self._times))


def run(args: argparse.Namespace, wrap: Callable[..., Any], is_ready: bool) -> Any:
    """Trains as the program does, with its update wrapped; returns the wrapper."""
    steps = _NUM_READY + args.blocks * args.block + 1
    config = config_lib.from_file(
        str(REPO / "configs" / "quickstart.py"),
        [
            f"total_steps={steps}",
            f"batch_size={args.batch_size}",
            "optim.warmup_steps=1",
            f"checkpoint.every_steps={steps}",
            f"eval.every_steps={steps}",
            f"data.data_dir={args.data_dir}",
        ],
    )
    train, wrapped = training.train, []

    def measured(state: Any, *, update: Any, data_iter: Any, validate: Any, **parts: Any) -> None:
        wrapped.append(wrap(update))
        # An epoch: prompts and descriptions of the sound are made once for every segment.
        for _ in range(-(-data_iter.get_state()["segments"] // args.batch_size)):
            next(data_iter)
        train(
            state,
            update=wrapped[0],
            data_iter=Ready(data_iter) if is_ready else data_iter,
            validate=lambda state: {"tau": 0.0},
            **parts,
        )

    with (
        tempfile.TemporaryDirectory() as folder,
        preemption.Notice() as notice,
        jax.set_mesh(sharding.make_mesh(**dataclasses.asdict(config.mesh))),
        mock.patch.object(training, "train", measured),
    ):
        workdir = epath.Path(folder)
        runs.claim(workdir, config)
        program.Run(config, workdir, None, notice).train()
    return wrapped[0]


if __name__ == "__main__":
    sys.exit(main())
