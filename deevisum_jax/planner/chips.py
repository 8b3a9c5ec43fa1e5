"""TPU chips as Google publishes them, and the slices one can rent of each kind.

Figures per chip are from the pages https://cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, read in
November 2026. `hbm_gib` is what the compiler (libtpu 0.0.42) lets a program have: it refuses one
that needs more. `hbm_bytes_per_s` is the page's decimal figure where it gives two.

The pages name no clock. The one here is that at which the matrix units reach the published peak:
v5e 4 units of 128 x 128, 197e12 / (4 * 128 * 128 * 2) = 1.50 GHz; v5p 8 of them, 1.75 GHz; v4 8 of
them, 1.05 GHz; v6e 4 units of 256 x 256, 1.75 GHz (its page says 4 in some editions and 2 in
others, and 2 would mean 3.5 GHz).

Which axes of a slice are rings is not on these pages but in https://jax-ml.github.io/scaling-book:
v5e and v6e close an axis of 16 chips, v4 and v5p every axis of a slice made of 4 x 4 x 4 cubes.

TPU7x is left out: its two devices per chip and its clock are not known well enough here.
"""

from __future__ import annotations

import dataclasses
import math

from deevisum_jax.errors import UserError, closest


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One kind of chip."""

    kind: str
    peak_flops: float  # FLOP/s, bfloat16
    hbm_gib: float  # that a program may have
    hbm_bytes_per_s: float
    links: int  # to other chips
    link_bytes_per_s: float  # one link, one direction
    clock_hz: float  # assumed, see above
    full_ring: int  # chips along an axis of the slice from which on its ends are joined
    slices: tuple[str, ...]  # one can rent, smallest first

    @property
    def ici_bytes_per_s(self) -> float:
        """That the chip sends when all its links are busy."""
        return self.links * self.link_bytes_per_s


_2D = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_3D = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8")

# Interconnect: the pages give both directions of all links together, v5e 400 GB/s, so each of four
# links has 50 GB/s one way; v5p 1200 GB/s over six, v6e 800 GB/s over four. For v4 they give none:
# 50 GB/s per link is from https://arxiv.org/abs/2304.01433.
_CHIPS = (
    Chip(
        kind="v4",
        peak_flops=275e12,
        hbm_gib=30.75,  # of 32
        hbm_bytes_per_s=1200e9,
        links=6,
        link_bytes_per_s=50e9,
        clock_hz=1.05e9,
        full_ring=4,
        slices=_3D,
    ),
    Chip(
        kind="v5e",
        peak_flops=197e12,
        hbm_gib=15.75,  # of 16
        hbm_bytes_per_s=819e9,
        links=4,
        link_bytes_per_s=50e9,
        clock_hz=1.5e9,
        full_ring=16,
        slices=_2D,
    ),
    Chip(
        kind="v5p",
        peak_flops=459e12,
        hbm_gib=95.74,
        hbm_bytes_per_s=2765e9,
        links=6,
        link_bytes_per_s=100e9,
        clock_hz=1.75e9,
        full_ring=4,
        slices=_3D,
    ),
    Chip(
        kind="v6e",
        peak_flops=918e12,
        hbm_gib=31.25,  # of 32
        hbm_bytes_per_s=1638e9,
        links=4,
        link_bytes_per_s=100e9,
        clock_hz=1.75e9,
        full_ring=16,
        slices=_2D,
    ),
)
CHIPS = {chip.kind: chip for chip in _CHIPS}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A slice of chips of one kind."""

    chip: Chip
    dims: tuple[int, ...]  # chips along each axis

    @property
    def name(self) -> str:
        return f"{self.chip.kind}:{'x'.join(map(str, self.dims))}"

    @property
    def num_chips(self) -> int:
        return math.prod(self.dims)

    def links_along(self, axis: int) -> int:
        """Links that a chip has along an axis of the slice, for a ring over that axis.

        Two where the ends of the axis are joined. Else the axis is a line, and the chips at its
        ends, which have one link, keep the others waiting.
        """
        size, ring = self.dims[axis], self.chip.full_ring
        if size == 1:
            return 0
        if len(self.dims) == 3:  # joined by optical switches, in cubes of 4 x 4 x 4
            return 2 if all(dim % ring == 0 for dim in self.dims) else 1
        return 2 if size == ring else 1


def known() -> list[str]:
    """Names of all slices in the list, by kind and size."""
    return [f"{chip.kind}:{dims}" for chip in CHIPS.values() for dims in chip.slices]


def topology(name: str) -> Topology:
    """A listed slice by its name, for instance `v5e:4x4`.

    Raises:
      UserError: it is not in the list.
    """
    if name not in known():
        kind, _, _ = name.partition(":")
        chip = CHIPS.get(kind)
        shown = f"{kind}: {', '.join(chip.slices)}" if chip else closest(name, known())
        raise UserError(
            f"topology {name!r} is not known here; {shown}"
            + ("" if chip else f" (kinds: {', '.join(CHIPS)})")
        )
    kind, _, dims = name.partition(":")
    return Topology(CHIPS[kind], tuple(map(int, dims.split("x"))))


def larger(than: Topology) -> list[Topology]:
    """Listed slices of the same kind with more chips, smallest first."""
    names = [f"{than.chip.kind}:{dims}" for dims in than.chip.slices]
    return [made for made in map(topology, names) if made.num_chips > than.num_chips]
