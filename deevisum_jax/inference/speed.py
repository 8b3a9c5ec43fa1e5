"""How much time one way of doing something saves over another, on a machine that does more."""

from __future__ import annotations

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from deevisum_jax.inference.exit_policy import ExitPolicy

# Wall time is what a user waits for; the time of the process's threads is disturbed less.
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """Share of the time that is saved: the median over rounds, and their quartiles."""

    median: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speed:
    """What policies save on one machine, pictures encoded and all, nothing decoded."""

    machine: str  # and how often, in words
    seconds: float  # median, of the full model
    saved: tuple[Saved, ...]  # by policy

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Speed:
        """Of `dataclasses.asdict`."""
        return cls(**{**found, "saved": tuple(Saved(**one) for one in found["saved"])})


def of_policies(
    plain: Callable[[], object],
    under: Callable[[ExitPolicy], object],
    policies: Sequence[ExitPolicy],
    *,
    rounds: int,
) -> Speed:
    """Times every policy against the full model, in turn.

    Args:
      plain: scores all segments with the full model, in one compiled function.
      under: scores the same segments under a policy.
      policies: to be timed.
      rounds: how often, at least 2.
    """
    ways = {str(row): functools.partial(under, policy) for row, policy in enumerate(policies)}
    seconds, saved = time_saved(plain, ways, rounds=rounds)
    devices = jax.devices()
    return Speed(
        machine=f"{len(devices)} x {devices[0].device_kind} ({os.cpu_count()} CPU cores), medians "
        f"and quartiles of {rounds} interleaved runs",
        seconds=seconds["wall"],
        saved=tuple(saved["wall"][name] for name in ways),
    )


def time_saved(
    plain: Callable[[], object],
    others: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
) -> tuple[dict[str, float], dict[str, dict[str, Saved]]]:
    """Times each of `others` between two runs of `plain`, round after round.

    What the machine is busy with otherwise changes slowly, and is cancelled by the neighbours: a
    round's share is 1 less its time over the mean of the two plain runs around it. Everything runs
    once before, untimed, to be compiled.

    Args:
      plain: what the others are held against; returns when all is done.
      others: by name.
      rounds: how often, at least 2.

    Returns:
      The median time of `plain` in seconds by clock of `CLOCKS`; and by clock, by name, what is
      saved.
    """
    assert rounds >= 2, rounds
    for run in (plain, *others.values()):
        run()
    plains, times = [_timed(plain)], {name: [] for name in others}
    for _ in range(rounds):
        for name, run in others.items():
            taken = _timed(run)
            plains.append(_timed(plain))
            around = {clock: (plains[-2][clock] + plains[-1][clock]) / 2 for clock in CLOCKS}
            times[name].append({clock: 1 - taken[clock] / around[clock] for clock in CLOCKS})
    middle = {clock: statistics.median(t[clock] for t in plains) for clock in CLOCKS}
    return middle, {
        clock: {name: _spread([t[clock] for t in of]) for name, of in times.items()}
        for clock in CLOCKS
    }


def _timed(run: Callable[[], object]) -> dict[str, float]:
    start = {clock: now() for clock, now in CLOCKS.items()}
    run()
    return {clock: now() - start[clock] for clock, now in CLOCKS.items()}


def _spread(shares: list[float]) -> Saved:
    low, median, high = statistics.quantiles(shares, n=4, method="inclusive")
    return Saved(median=median, low=low, high=high)
