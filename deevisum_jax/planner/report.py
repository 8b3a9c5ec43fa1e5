"""Plans as people and programs read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from deevisum_jax.planner.early_exit import EarlyExit, examples
from deevisum_jax.planner.plan import Advice, Placed, Plan, in_short

_GIB = 2**30
_COLUMNS = (
    "model", "mode", "slice", "batch", "peak GiB", "of GiB", "model TF", "compiled TF", "ideal ms",
    "compute ms", "HBM ms", "links ms", "step ms", "MFU", "sent GB", "compile CPU-s",
)  # fmt: skip
_STAGE_COLUMNS = (
    "part", "TF by formula", "compiled TF", "HBM GB", "sent GB", "peak GiB", "compute ms", "HBM ms",
    "links ms", "step ms", "of the full pass", "compile CPU-s",
)  # fmt: skip
_SAVED_COLUMNS = ("who leaves", "FLOPs saved", "time saved, all overlaps to nothing does")


def text(variant: str, plan: Plan) -> str:
    """A page on one plan, all figures of one chip and one step."""
    chip = plan.topology.chip
    mesh = ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    adapters = ""
    if plan.num_adapter_params:
        adapters = f" (of them {plan.num_adapter_params / 1e6:.3f}e6 in adapters)"
    what = f"{plan.mode}, {plan.part}" if plan.part else plan.mode
    lines = [
        f"{variant}, {what}, on {plan.topology.name}: {in_short(plan)} per chip",
        f"  {plan.num_params / 1e9:.3f}e9 parameters{adapters}, batch {plan.batch_size}, "
        f"mesh {mesh}",
    ]
    if plan.fits:
        memory, cost = plan.memory, plan.cost
        recomputed = f"{cost.flops / plan.model_flops:.2f} times the model's"
        lines += [
            f"  memory     arguments {_gib(memory.argument)}, temporary {_gib(memory.temporary)}, "
            f"output {_gib(memory.output)} ({_gib(memory.alias)} in place), "
            f"peak {_gib(memory.peak)} GiB",
            f"  FLOPs      model {_tera(plan.model_flops)} TF, {_ms(plan.ideal_s)} at the peak; "
            f"compiled {_tera(cost.flops)} TF, {recomputed}",
            f"  compute    {_ms(plan.compute_s)}: {cost.cycles / 1e6:.4g} Mcycles by the compiler, "
            f"clock assumed {chip.clock_hz / 1e9:g} GHz",
            f"  HBM        {_ms(plan.hbm_s)}: {cost.hbm_bytes / 1e9:.4g} GB",
            f"  links      {_ms(plan.ici_s)}: {plan.sent_bytes / 1e9:.4g} GB sent over all "
            f"{chip.links}; {_ms(cost.ring_s)} if each collective has only its own axes' "
            "and waits for the last",
            f"  step       {_ms(plan.step_s)} if all three overlap, MFU {plan.mfu:.1%}; "
            f"{_ms(plan.step_sum_s)} if nothing does, MFU {plan.mfu_sum:.1%}",
        ]
        for kind, traffic in sorted(cost.traffic.items(), key=lambda item: -item[1].num_bytes):
            lines.append(
                f"    {kind:<19} {traffic.count:>6} x {traffic.num_bytes / 1e9:>9.4g} GB sent "
                f"(whole arrays {traffic.whole_bytes / 1e9:.4g} GB)"
            )
    if plan.is_compiled:
        lines.append(
            f"  compiled in {plan.compile_cpu_s:.0f} CPU-seconds; "
            f"{plan.process_rss_bytes / _GIB:.1f} GiB of this machine's memory at most so far"
        )
    lines.append(
        f"  state between steps {_gib(plan.state_bytes)} GiB; largest tensors (8/4: split in 4):"
    )
    lines += [f"    {_placed(one)}" for one in plan.largest]
    lines += [f"  note: {note}" for note in plan.notes]
    return "\n".join(lines)


def table(rows: Sequence[tuple[str, Plan]]) -> str:
    """Plans side by side as a Markdown table.

    Args:
      rows: names of models and their plans.
    """
    return _markdown(_COLUMNS, [_row(variant, plan) for variant, plan in rows])


def _markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [columns, ["---"] * len(columns), *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(columns))]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    )


def _row(variant: str, plan: Plan) -> list[str]:
    start = [variant, plan.mode, plan.topology.name, str(plan.batch_size)]
    limit = f"{plan.topology.chip.hbm_gib:g}"
    if not plan.fits:
        needed = "-" if plan.needed_bytes is None else _gib(plan.needed_bytes)
        return [*start, f"{needed} (no)", limit, *["-"] * (len(_COLUMNS) - 7), _seconds(plan)]
    return [
        *start,
        _gib(plan.memory.peak),
        limit,
        _tera(plan.model_flops),
        _tera(plan.cost.flops),
        _ms(plan.ideal_s, ""),
        _ms(plan.compute_s, ""),
        _ms(plan.hbm_s, ""),
        f"{_ms(plan.ici_s, '')} to {_ms(plan.cost.ring_s, '')}",
        f"{_ms(plan.step_s, '')} to {_ms(plan.step_sum_s, '')}",
        f"{plan.mfu:.0%} to {plan.mfu_sum:.0%}",
        f"{plan.sent_bytes / 1e9:.1f} ({plan.whole_bytes / 1e9:.1f})",
        _seconds(plan),
    ]


def advice_text(plan: Plan, advice: Advice) -> str:
    """What to do about a plan that does not fit."""
    name = "batch_size" if plan.mode == "full" else "eval.batch_size"
    found = []
    if advice.topology:
        found.append(f"take --topology {advice.topology.name}, the smallest listed that has room")
    if advice.batch_size:
        found.append(f"give --config.{name}={advice.batch_size} on {plan.topology.name}")
    words = "; or ".join(found) or "nothing that was tried fits"
    copies = plan.mesh["data"]
    if copies > 1:
        words += (
            f"; mesh.data={copies} keeps {copies} copies of the state, which "
            "--config.mesh.data=1 --config.mesh.fsdp=-1 would split instead"
        )
    return "\n".join([words, *(f"  tried {line}" for line in advice.tried)])


def early_exit(variant: str, found: EarlyExit) -> str:
    """A table of what scoring with an early exit is made of, and one of what that might save.

    Figures are those of one chip and one full batch, but for the FLOPs, which are one segment's.
    """
    whole, gather = found.whole, found.gather
    mesh = ", ".join(f"{axis} {size}" for axis, size in whole.mesh.items())
    parts = {one.part: one for one in (*found.stages, gather)} | {"full pass": whole}
    lines = [
        f"{variant}, early exit, on {whole.topology.name}: batch {whole.batch_size}, mesh {mesh}; "
        "per chip and batch, FLOPs per segment",
        _markdown(_STAGE_COLUMNS, [_stage_row(name, one, whole) for name, one in parts.items()]),
    ]
    if found.fits:
        rows = [
            [words, f"{saved.flops:.1%}", f"{saved.time:.1%} to {saved.time_sum:.1%}"]
            for words, saved in (
                (words, found.saved(rates)) for words, rates in examples(len(found.stages)).items()
            )
        ]
        lines += [
            "",
            _markdown(_SAVED_COLUMNS, rows),
            f"  a batch between two stages has {gather.memory.output / 2**20:.1f} MiB on a chip",
        ]
    lines += [f"  note: {name}: {note}" for name, one in parts.items() for note in one.notes]
    return "\n".join(lines)


def _stage_row(name: str, one: Plan, whole: Plan) -> list[str]:
    if not one.fits:
        return [name, in_short(one), *["-"] * (len(_STAGE_COLUMNS) - 3), _seconds(one)]
    segments = one.batch_size / one.topology.num_chips  # on one chip
    share = "-"
    if whole.fits:
        share = f"{one.step_s / whole.step_s:.1%} to {one.step_sum_s / whole.step_sum_s:.1%}"
    return [
        name,
        _tera(one.model_flops / segments),
        _tera(one.cost.flops / segments),
        f"{one.cost.hbm_bytes / 1e9:.3g}",
        f"{one.sent_bytes / 1e9:.3g}",
        _gib(one.memory.peak),
        _ms(one.compute_s, ""),
        _ms(one.hbm_s, ""),
        f"{_ms(one.ici_s, '')} to {_ms(one.cost.ring_s, '')}",
        f"{_ms(one.step_s, '')} to {_ms(one.step_sum_s, '')}",
        share,
        _seconds(one),
    ]


def as_json(variant: str, plan: Plan) -> dict[str, Any]:
    """Every figure of a plan, seconds and bytes, with those that follow from others."""
    values = dataclasses.asdict(plan)
    values["topology"] = plan.topology.name
    values["chip"] = dataclasses.asdict(plan.topology.chip)
    derived = ("ideal_s",)
    if plan.fits:
        derived += ("compute_s", "hbm_s", "ici_s", "step_s", "step_sum_s", "mfu", "mfu_sum")
        derived += ("sent_bytes", "whole_bytes")
    values |= {name: getattr(plan, name) for name in derived}
    return {"model": variant, "fits": plan.fits, **values}


def _placed(one: Placed) -> str:
    dims = (
        f"{size}/{parts}" if parts > 1 else f"{size}"
        for size, parts in zip(one.shape, one.parts, strict=True)
    )
    return f"{one.num_bytes / 2**20:>9.1f} MiB  {one.path}  {one.dtype}[{', '.join(dims)}]"


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / _GIB:.2f}"


def _tera(flops: float) -> str:
    return f"{flops / 1e12:.3g}"


def _ms(seconds: float, unit: str = " ms") -> str:
    return f"{seconds * 1e3:.3g}{unit}" if seconds < 1 else f"{seconds * 1e3:.0f}{unit}"


def _seconds(plan: Plan) -> str:
    return f"{plan.compile_cpu_s:.0f}"
