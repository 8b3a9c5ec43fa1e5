"""What scoring with an early exit takes on a slice that is not there, stage by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from deevisum_jax.config import Config
from deevisum_jax.planner import plan as plans
from deevisum_jax.planner.chips import Topology
from deevisum_jax.planner.plan import Plan


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """Shares of the full pass that are saved."""

    flops: float
    time: float  # where compute, memory and links overlap
    time_sum: float  # where nothing overlaps


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyExit:
    """The fused pass through all layers, and what takes its place; all at one batch size."""

    whole: Plan
    stages: tuple[Plan, ...]  # one per exit, the first with the pictures
    gather: Plan  # fills a batch from two

    @property
    def fits(self) -> bool:
        return all(one.fits for one in (self.whole, *self.stages, self.gather))

    def saved(self, rates: Sequence[float]) -> Saved:
        """What is saved if so many leave at each exit.

        Batches are full, as they are behind pools. Every batch that comes out of a stage is one
        gather, unless all of it leaves or all of it stays: where the pool is empty there is less
        to do.

        Args:
          rates: share of the segments that leaves at each exit; they add up to 1.
        """
        assert abs(sum(rates) - 1) < 1e-9, rates
        flops = seconds = seconds_sum = 0.0
        there = 1.0  # share of the segments that gets to a stage
        for stage, rate in zip(self.stages, rates, strict=True):
            flops += there * stage.model_flops
            is_parted = 1e-9 < rate < there - 1e-9
            for one in (stage, self.gather) if is_parted else (stage,):
                seconds += there * one.step_s
                seconds_sum += there * one.step_sum_s
            there -= rate
        return Saved(
            flops=1 - flops / sum(stage.model_flops for stage in self.stages),
            time=1 - seconds / self.whole.step_s,
            time_sum=1 - seconds_sum / self.whole.step_sum_s,
        )


def plan(config: Config, topology: Topology, keep: Callable[[Plan], None]) -> EarlyExit:
    """Compiles the fused pass, every stage and the gather.

    Args:
      config: an experiment, or one of its stages.
      topology: the slice.
      keep: is given each plan as it is made; a compilation may take minutes.

    Raises:
      UserError: as `plan.plan` and `plan.plan_parts`.
    """
    made: list[Plan] = []
    # The stages first: they refuse what has none before anything is compiled.
    for one in plans.plan_parts(config, topology):
        keep(one)
        made.append(one)
    whole = plans.plan(config, topology, "score")
    keep(whole)
    return EarlyExit(whole=whole, stages=tuple(made[:-1]), gather=made[-1])


def examples(num_exits: int) -> dict[str, tuple[float, ...]]:
    """Shares that might leave at each exit, by what they are in words."""
    last = (0.0,) * (num_exits - 2)
    halves = tuple(0.5**exit_ for exit_ in range(1, num_exits))
    return {
        "half at the first exit, the others at the last": (0.5, *last, 0.5),
        "half of those that are there at every exit": (*halves, halves[-1]),
        "equal shares at all exits": (1 / num_exits,) * num_exits,
        "all at the first exit": (1.0, *last, 0.0),
    }
