"""The text of a compiled program (HLO), line by line."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[([\d,<=]*)\](\{[^{}]*\})?")
_CALLED = re.compile(r"\b(?:condition|body|calls|to_apply)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_EITHER = re.compile(r"\b(?:true|false)_computation=%?([\w.\-]+)")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape: `bf16[4,384,2304]{2,1,0:T(8,128)(2,1)S(1)}`."""

    dtype: str
    dims: tuple[int, ...]  # of a dynamic one, the bound
    layout: str

    @property
    def num_bytes(self) -> int:
        """Without the padding of its tiles; 0 of a token, which is no data."""
        if self.dtype == "pred":
            return math.prod(self.dims)
        bits = re.search(r"\d+", self.dtype)  # bf16, f32, s4, u64, f8e4m3fn
        return math.prod(self.dims) * int(bits[0]) // 8 if bits else 0

    @property
    def in_hbm(self) -> bool:
        """Memory space 0; others are named in the layout: `S(1)` is VMEM, `S(6)` scalars."""
        return "S(" not in self.layout


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]  # of its result, a tuple's flattened
    operands: tuple[str, ...]  # names of instructions; of a constant its value
    rest: str  # what follows the operands: attributes, metadata, the backend's own
    is_root: bool

    @property
    def called(self) -> list[str]:
        """Computations it names."""
        names = _CALLED.findall(self.rest) + _EITHER.findall(self.rest)
        for group in _BRANCHES.findall(self.rest):
            names += re.findall(r"%?([\w.\-]+)", group)
        return names

    @property
    def cycles(self) -> int:
        """The compiler's own estimate; 0 where it makes none, as for collectives and Pallas."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.rest)
        return int(found[1]) if found else 0

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.rest)
        return found[1] if found else ""

    @property
    def num_bytes(self) -> int:
        """Of all arrays of the result."""
        return sum(array.num_bytes for array in self.arrays)


Computation = dict[str, Instruction]  # by name, in the order of the text


class Text(NamedTuple):
    """What `parse` finds."""

    computations: dict[str, Computation]
    entry: str
    num_devices: int
    not_understood: list[str]  # lines


def parse(text: str) -> Text:
    """The computations of `jax.stages.Compiled.as_text()`.

    Raises:
      ValueError: there is no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, current, not_understood = "", None, []
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            current = computations[found[2]] = {}
            entry = found[2] if found[1] else entry
        elif line.startswith("}"):
            current = None
        elif current is not None and " = " in line:
            try:
                made = _instruction(line)
            except ValueError:
                not_understood.append(line.strip())
            else:
                current[made.name] = made
    if not entry:
        raise ValueError("no HLO text with an entry computation")
    header = text[: text.find("\n")]
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", header)
    return Text(computations, entry, math.prod(map(int, counts)), not_understood)


def _instruction(line: str) -> Instruction:
    left, _, right = line.strip().partition(" = ")
    shape, rest = _shape(right)
    opcode, bracket, rest = rest.partition("(")
    if not bracket:
        raise ValueError(f"no operands: {line[:80]}")
    inside, rest = _until_closed(rest)
    return Instruction(
        name=left.removeprefix("ROOT ").removeprefix("%"),
        opcode=opcode.strip(),
        arrays=tuple(
            Array(dtype, tuple(int(n.lstrip("<=")) for n in dims.split(",") if n), layout)
            for dtype, dims, layout in _ARRAY.findall(shape)
        ),
        operands=tuple(part.strip().split(" ")[-1].removeprefix("%") for part in _split(inside)),
        rest=rest,
        is_root=left.startswith("ROOT "),
    )


def _shape(text: str) -> tuple[str, str]:
    if not text.startswith("("):
        shape, _, rest = text.partition(" ")
        return shape, rest
    shape, rest = _until_closed(text[1:])
    return shape, rest.strip()


def _until_closed(text: str) -> tuple[str, str]:
    """Splits at the parenthesis that closes what was open before `text`."""
    depth = 1
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[:place], text[place + 1 :]
    raise ValueError(f"parentheses do not close: {text[:80]}")


def _split(text: str) -> list[str]:
    """At commas outside of any parentheses, braces and brackets."""
    parts, depth, start = [], 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and not depth:
            parts.append(text[start:place])
            start = place + 1
    return [part for part in (*parts, text[start:]) if part.strip()]
