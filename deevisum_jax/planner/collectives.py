"""What one chip sends in a collective of a compiled program."""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from deevisum_jax.planner.instructions import Computation, Instruction

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# Others there are; none that this project's programs have shown so far.
UNKNOWN_KINDS = ("ragged-all-to-all", "collective-broadcast", "send", "recv")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
    """One collective, executed once."""

    kind: str  # of KINDS
    num_bytes: float  # a chip sends
    whole_bytes: int  # of the array while it is whole, twice for an all-reduce: a plain count
    group: tuple[int, ...] | None  # devices that take part with each other; None: cannot be read
    pairs: tuple[tuple[int, int], ...] = ()  # of a collective-permute: from, to


def read(
    one: Instruction, within: Computation, num_devices: int, *, scattered: bool = False
) -> Collective | None:
    """The collective that an instruction is or starts; None if it is none, or of one chip only.

    A ring, or any other way that wastes nothing, sends (n - 1) / n of the whole to gather or to
    scatter over n chips, twice that to reduce, and all of it to permute.

    Args:
      one: any instruction; of an unreadable group the whole array counts.
      within: its computation.
      num_devices: of the program, for groups that are all of them.
      scattered: whether of an all-reduce each device only keeps its own part, so that it is a
        reduce-scatter.
    """
    kind = one.opcode.removesuffix("-start")
    if kind not in KINDS:
        return None
    given = sum(within[name].num_bytes for name in one.operands if name in within)
    if kind == "collective-permute":
        found = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", one.rest)
        pairs = tuple(
            (int(a), int(b)) for a, b in re.findall(r"(\d+),(\d+)", found[1] if found else "")
        )
        if found and all(a == b for a, b in pairs):
            return None
        group = tuple(sorted({device for pair in pairs for device in pair})) or None
        return Collective(
            kind=kind,
            num_bytes=given,
            whole_bytes=given,
            group=group,
            pairs=pairs,
        )
    group = _group(one.rest, num_devices)
    if group is not None and len(group) == 1:
        return None
    size = len(group) if group is not None else None
    share = (size - 1) / size if size else 1.0
    if kind == "all-gather":
        whole = given * size if size else one.num_bytes
    elif kind == "all-reduce":
        # The result, since a conversion may be part of it: what travels has the result's type.
        whole = one.num_bytes
    else:
        whole = given
    if kind == "all-reduce" and scattered:
        kind = "reduce-scatter"
    times = 2 if kind == "all-reduce" else 1
    return Collective(
        kind=kind,
        num_bytes=times * share * whole,
        whole_bytes=times * whole,
        group=group,
    )


def _group(rest: str, num_devices: int) -> tuple[int, ...] | None:
    """The first of the groups of devices, in any of the three ways they are written."""
    if found := re.search(r"replica_groups=\{(?:\{([\d,]*)\})?", rest):
        if not found[1]:
            return tuple(range(num_devices))
        return tuple(int(device) for device in found[1].split(","))
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        devices = np.arange(math.prod(_ints(found[3]))).reshape(_ints(found[3]))
        if found[4]:
            devices = devices.transpose(_ints(found[4]))
        return tuple(devices.reshape(int(found[1]), int(found[2]))[0].tolist())
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest):
        axes = dict(re.findall(r"'([^']*)'=(\d+)", found[1]))
        names = re.findall(r"'([^']*)'", found[2])
        if ":" in found[2] or not set(names) <= set(axes):  # a part of an axis
            return None
        devices = np.arange(math.prod(map(int, axes.values()))).reshape(
            [int(size) for size in axes.values()]
        )
        first = tuple(slice(None) if name in names else 0 for name in axes)
        return tuple(devices[first].ravel().tolist())
    return None


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
