"""Reads a compiled TPU program: what runs how often, what it costs, what travels between chips.

`cost_analysis()` counts the body of a loop once, so it is no measure of a model that scans over
its layers. Here the text of the optimized program is walked from its entry, and what a loop's body
costs is multiplied by the loop's trips. What cannot be read is told in `Program.notes`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import re
from collections.abc import Iterator

from deevisum_jax.planner import collectives, products
from deevisum_jax.planner.collectives import Collective
from deevisum_jax.planner.instructions import Array, Computation, Instruction, parse

# Work of no kind: names for what is there already, or the waiting end of what was started.
_FREE = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional"}
_FREE |= {"after-all", "partition-id", "replica-id", "optimization-barrier", "call", "domain"}
# Custom calls of the same kind.
_FREE |= {"AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound"}
_KERNEL = "tpu_custom_call"  # what Pallas compiles to
_RUNS_IN_PLACE = ("while", "conditional", "call", "async-start")
_RENAMES = ("copy", "bitcast")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one chip sends to others by one kind of collective, in one step."""

    count: int  # executed
    num_bytes: int  # that leave the chip
    whole_bytes: int  # of the arrays while they are whole, twice for an all-reduce


class Program:
    """The text of `jax.stages.Compiled.as_text()`, parsed.

    Raises:
      ValueError: it is no such text.
    """

    def __init__(self, text: str) -> None:
        self.computations, self.entry, self.num_devices, not_understood = parse(text)
        self._notes: dict[str, None] = {}  # in order, each once
        if not_understood:
            self._notes[f"{len(not_understood)} lines are left out: {not_understood[0][:80]}"] = (
                None
            )

    @functools.cached_property
    def notes(self) -> tuple[str, ...]:
        """What the figures leave out or take for granted, for people to read."""
        _ = self.flops, self.collectives, self.hbm_bytes
        notes = list(self._notes)
        kernels = self.kernels
        if kernels:
            silent = sum(
                times
                for one, _, times in self.executed()
                if one.target == _KERNEL and '"cost_estimate"' not in one.rest
            )
            notes.append(
                f"{kernels} runs of Pallas kernels are not in the compute time"
                + (f"; {silent} of them tell no FLOPs" if silent else "")
            )
        for opcode, times in sorted(self._unread_collectives().items()):
            notes.append(f"{times} x {opcode} between chips are not in the bytes sent")
        if self.untimed_bytes > 0.02 * self.hbm_bytes:
            notes.append(
                f"{self.untimed_bytes / self.hbm_bytes:.0%} of the HBM bytes are moved by work, no "
                "collective, that the compiler gives no cycles for"
            )
        return tuple(notes)

    @functools.cached_property
    def times(self) -> dict[str, int]:
        """How often every computation runs in one step; fused ones as often as their fusion.

        Of a conditional every branch counts, as if it were taken.
        """
        times: collections.Counter[str] = collections.Counter()

        def visit(name: str, count: int) -> None:
            times[name] += count
            for one in self.computations[name].values():
                factor = 1
                if one.opcode == "while":
                    factor = self._trips_or_one(one)
                elif one.opcode == "conditional":
                    self._note("every branch of a conditional counts, as if it were taken")
                # An `async-start` runs what it calls; its end names that again.
                elif one.opcode.endswith(("-update", "-done")) or _wraps(one):
                    continue
                for called in one.called:
                    if called in self.computations:
                        visit(called, count * factor)
                    else:
                        self._note(f"computation {called} of {one.opcode} is missing")

        visit(self.entry, 1)
        return dict(times)

    def executed(self) -> Iterator[tuple[Instruction, Computation, int]]:
        """Every scheduled instruction, the computation it is in, and how often it runs."""
        for name, times in self.times.items():
            if name not in self._fused:
                for one in self.computations[name].values():
                    yield one, self.computations[name], times

    @functools.cached_property
    def _fused(self) -> set[str]:
        """Computations that run within one instruction, which is charged for all of them."""
        fused: set[str] = set()

        def add(name: str) -> None:
            if name not in fused and name in self.computations:
                fused.add(name)
                for one in self.computations[name].values():
                    for called in one.called:
                        add(called)

        for computation in self.computations.values():
            for one in computation.values():
                if one.opcode not in _RUNS_IN_PLACE:
                    for called in one.called:
                        add(called)
        return fused

    # ---- Costs ----

    @functools.cached_property
    def cycles(self) -> int:
        """The compiler's estimate of a step: compute and copies on the chip, no collectives."""
        return sum(one.cycles * times for one, _, times in self.executed())

    @functools.cached_property
    def kernels(self) -> int:
        """Pallas kernels run, of whose time the compiler says nothing."""
        return sum(times for one, _, times in self.executed() if one.target == _KERNEL)

    @functools.cached_property
    def flops(self) -> int:
        """Of matrix products, those recomputed in a backward pass included."""
        total = 0
        for name, times in self.times.items():
            computation = self.computations[name]
            for one in computation.values():
                try:
                    total += times * products.flops(one, computation)
                except ValueError as error:
                    self._note(f"FLOPs leave out what cannot be read: {error}")
        return total

    @functools.cached_property
    def collectives(self) -> list[tuple[Collective, int]]:
        """Every collective over more than one chip, and how often it runs.

        One that is fused with compute starts in one fusion, goes on in others and is done in a
        last: only its start counts.
        """
        found = []
        for name, times in self.times.items():
            if name in self._going_on:
                continue
            computation = self.computations[name]
            for one in computation.values():
                made = collectives.read(
                    one, computation, self.num_devices, scattered=_is_scattered(one, computation)
                )
                if made is not None:
                    found.append((made, times))
                    if made.group is None:
                        self._note(f"{made.kind}: devices cannot be read, so the whole counts")
        return found

    @functools.cached_property
    def traffic(self) -> dict[str, Traffic]:
        """What a chip sends, by kind of collective."""
        kinds = {}
        for kind in collectives.KINDS:
            those = [(one, times) for one, times in self.collectives if one.kind == kind]
            if those:
                kinds[kind] = Traffic(
                    count=sum(times for _, times in those),
                    num_bytes=round(sum(one.num_bytes * times for one, times in those)),
                    whole_bytes=sum(one.whole_bytes * times for one, times in those),
                )
        return kinds

    @functools.cached_property
    def hbm_bytes(self) -> int:
        """Bytes read from and written to HBM by what is scheduled.

        Of an array that a fusion only takes a slice of, the slice counts; of one that it updates in
        place, the update. What stays in VMEM costs nothing.
        """
        return sum(times * self._touched(one, within) for one, within, times in self.executed())

    @functools.cached_property
    def untimed_bytes(self) -> int:
        """Of `hbm_bytes`, those of work on the chip without an estimate of cycles.

        Copies that run beside the compute, and collectives, are no such work.
        """
        return sum(
            times * self._touched(one, within)
            for one, within, times in self.executed()
            if not one.cycles
            and not one.opcode.endswith("-start")
            and one.opcode not in collectives.KINDS
            and one.target != _KERNEL
            and not any(self._has_collective(called) for called in one.called)
        )

    def _has_collective(self, name: str) -> bool:
        return any(
            one.opcode.removesuffix("-start") in collectives.KINDS
            for one in self.computations.get(name, {}).values()
        )

    def _unread_collectives(self) -> dict[str, int]:
        found: collections.Counter[str] = collections.Counter()
        for one, _, times in self.executed():
            if one.opcode.removesuffix("-start") in collectives.UNKNOWN_KINDS:
                found[one.opcode] += times
        return dict(found)

    @functools.cached_property
    def _going_on(self) -> set[str]:
        """Computations of fusions in which a collective from elsewhere goes on or ends."""
        return {
            name
            for name in self._fused
            if name.startswith("async_collective_fusion")
            or any(one.target == "AsyncCollectiveDone" for one in self.computations[name].values())
        }

    def _touched(self, one: Instruction, within: Computation) -> int:
        if {one.opcode, one.target} & _FREE or one.opcode.endswith(("-done", "-update")):
            return 0
        if one.opcode.endswith("-start") and len(one.arrays) > 1:
            # Source and target lead the result's tuple; of a slice's source only so much is read.
            source, target, *_ = one.arrays
            size = min(source.num_bytes, target.num_bytes)
            return sum(size for array in (source, target) if array.in_hbm)
        inner = self.computations.get(one.called[0], {}) if one.opcode == "fusion" else {}
        inputs = {
            int(part.operands[0]): part for part in inner.values() if part.opcode == "parameter"
        }
        in_place, total = False, 0
        for index, name in enumerate(one.operands):
            if name in within:
                size = _in_hbm(within[name].arrays)
                if size and index in inputs:
                    size, updated = _used_of(inputs[index], inner, size)
                    in_place |= updated
                total += size
        if in_place:
            return total
        if one.opcode == "dynamic-update-slice" and one.operands[1] in within:
            return 2 * within[one.operands[1]].num_bytes
        if one.opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _in_hbm(one.arrays)
        return total + _in_hbm(one.arrays)

    def _note(self, text: str) -> None:
        self._notes[text] = None

    # ---- Loops ----

    def trips(self, loop: Instruction) -> int:
        """How often a `while` runs its body; of a data-dependent one the bound that it counts to.

        Raises:
          ValueError: no such bound is found.
        """
        found = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
        if found:
            return int(found[1])
        parts = [re.search(rf"\b{part}=%?([\w.\-]+)", loop.rest) for part in ("condition", "body")]
        if None in parts or any(part[1] not in self.computations for part in parts):
            raise ValueError(f"{loop.name} names no condition and body")
        condition, body = (part[1] for part in parts)
        bound, direction, index = self._bound(condition)
        start = self._start(loop, index)
        step = self._step(body, index)
        if (bound - start) * step < 0:
            raise ValueError(f"{loop.name} counts from {start} by {step}, not towards {bound}")
        count = -(-(bound - start) // step) if direction == "LT" else (bound - start) // step + 1
        return max(count, 0)

    def _trips_or_one(self, loop: Instruction) -> int:
        try:
            return self.trips(loop)
        except ValueError as error:
            self._note(f"a loop counts once, as its trips cannot be read: {error}")
            return 1

    def _bound(self, condition: str) -> tuple[int, str, int]:
        """Limit, direction and place in the loop's tuple of the number that a loop counts."""
        found = []
        for computation in self._with_fused(condition):
            for one in computation.values():
                direction = re.search(r"direction=(LT|LE|GT|GE)", one.rest)
                if one.opcode != "compare" or not direction:
                    continue
                counted, limit = one.operands
                way = direction[1]
                if way in ("GT", "GE"):  # limit > counted
                    counted, limit, way = limit, counted, way.replace("G", "L")
                if not _is_integer(counted, computation):
                    continue
                bound = _constant(limit, computation)
                if bound is None:  # within a fusion both are parameters
                    bound = self._only_constant(condition)
                if bound is not None:
                    place = _tuple_index(counted, computation)
                    found.append((bound, way, self._counter(condition, place)))
        if len(found) != 1:
            raise ValueError(f"condition {condition} has {len(found)} comparisons with a constant")
        if any(
            one.opcode in ("and", "or") for c in self._with_fused(condition) for one in c.values()
        ):
            self._note("a loop that may end early counts as if it ran to its bound")
        return found[0]

    def _counter(self, condition: str, place: int | None) -> int:
        """Place of what a loop counts; of a fused comparison it is the number that is passed on."""
        if place is not None:
            return place
        for one in self.computations[condition].values():
            if one.opcode == "fusion":
                for name in one.operands:
                    found = _tuple_index(name, self.computations[condition])
                    if found is not None:
                        return found
        return 0

    def _with_fused(self, name: str) -> Iterator[Computation]:
        yield self.computations[name]
        for one in self.computations[name].values():
            for called in one.called:
                yield from self._with_fused(called)

    def _only_constant(self, name: str) -> int | None:
        values = [
            _constant(one.name, self.computations[name])
            for one in self.computations[name].values()
            if one.opcode == "constant"
        ]
        return values[0] if len(values) == 1 else None

    def _start(self, loop: Instruction, index: int) -> int:
        """What a loop begins to count with; loops of `jax.lax` start at 0."""
        for computation in self.computations.values():
            if computation.get(loop.name) is loop:
                given = computation.get(loop.operands[0])
                if given is not None and given.opcode == "tuple":
                    return _constant(given.operands[index], computation) or 0
        return 0

    def _step(self, body: str, index: int) -> int:
        """What a loop's body adds to the number it counts."""
        computation = self.computations[body]
        root = next((one for one in computation.values() if one.is_root), None)
        if root is None or root.opcode != "tuple":
            return 1
        found = _resolved(root.operands[index], computation)
        if found is not None and found.opcode == "add":
            steps = [_constant(name, computation) for name in found.operands]
        elif found is not None and found.opcode == "fusion":
            inner = self.computations[found.called[0]]
            adds = [one for one in inner.values() if one.opcode == "add"]
            steps = [_constant(name, inner) for one in adds for name in one.operands]
            if not any(steps):
                steps = [_constant(name, computation) for name in found.operands]
        else:
            steps = []
        steps = [step for step in steps if step]
        return steps[0] if len(steps) == 1 else 1


def _wraps(one: Instruction) -> bool:
    """Whether it is another name for what it calls: `all-gather-start`, `slice-start`."""
    return one.opcode.endswith("-start") and one.opcode != "async-start"


def _resolved(name: str, computation: Computation) -> Instruction | None:
    found = computation.get(name)
    while found is not None and found.opcode in _RENAMES:
        found = computation.get(found.operands[0])
    return found


def _constant(name: str, computation: Computation) -> int | None:
    found = _resolved(name, computation)
    if found is None or found.opcode != "constant":
        return None
    value = found.operands[0]
    return int(value) if re.fullmatch(r"-?\d+", value) else None


def _is_integer(name: str, computation: Computation) -> bool:
    return name in computation and computation[name].arrays[0].dtype[0] in "su"


def _tuple_index(name: str, computation: Computation) -> int | None:
    found = _resolved(name, computation)
    if found is None or found.opcode != "get-tuple-element":
        return None
    return int(re.search(r"\bindex=(\d+)", found.rest)[1])


def _is_scattered(one: Instruction, computation: Computation) -> bool:
    """Whether of an all-reduce each device keeps a part: how a fused reduce-scatter is written."""
    if one.opcode != "all-reduce":
        return False
    root = next((part for part in computation.values() if part.is_root), None)
    if root is None or root.opcode != "dynamic-slice":
        return False
    return _resolved(root.operands[0], computation) is one


def _in_hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.num_bytes for array in arrays if array.in_hbm)


def _used_of(parameter: Instruction, inner: Computation, size: int) -> tuple[int, bool]:
    """Bytes that a fusion moves for one of its inputs, and whether it updates it in place."""
    names, users = {parameter.name}, []
    for one in inner.values():
        if names & set(one.operands):
            if one.opcode == "bitcast":
                names.add(one.name)
            else:
                users.append(one)
    if users and all(
        one.opcode in ("dynamic-slice", "slice", "gather") and one.operands[0] in names
        for one in users
    ):
        return min(size, sum(one.num_bytes for one in users)), False
    if len(users) == 1 and users[0].opcode == "dynamic-update-slice":
        update = inner.get(users[0].operands[1])
        if users[0].operands[0] in names and update is not None:
            return update.num_bytes, True
    return size, False
