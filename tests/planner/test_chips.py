"""The list of chips and slices."""

import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.planner import chips


def test_a_slice_by_its_name():
    found = chips.topology("v5p:2x4x4")
    assert (found.chip.kind, found.dims, found.num_chips, found.name) == (
        "v5p",
        (2, 4, 4),
        32,
        "v5p:2x4x4",
    )


def test_every_listed_slice_has_a_link_along_each_of_its_axes():
    for name in chips.known():
        found = chips.topology(name)
        links = list(map(found.links_along, range(len(found.dims))))
        assert [count > 0 for count in links] == [size > 1 for size in found.dims], name
        assert sum(links) <= found.chip.links, name


@pytest.mark.parametrize(
    ("name", "links"),
    [
        ("v5e:4x4", [1, 1]),  # lines: rings need 16
        ("v5e:8x16", [1, 2]),
        ("v5e:1x1", [0, 0]),
        ("v5p:2x4x4", [1, 1, 1]),  # not made of whole cubes
        ("v5p:2x2x1", [1, 1, 0]),
        ("v5p:4x4x8", [2, 2, 2]),
    ],
)
def test_links_along_an_axis(name, links):
    found = chips.topology(name)
    assert [found.links_along(axis) for axis in range(len(found.dims))] == links


def test_an_unknown_slice_names_those_of_its_kind():
    with pytest.raises(UserError, match=r"v5e:4x5.*2x2, 2x4, 4x4, 4x8"):
        chips.topology("v5e:4x5")


def test_an_unknown_kind_names_the_closest():
    with pytest.raises(UserError, match=r"'v7e:4x4' is not known.*did you mean 'v\de:4x4'"):
        chips.topology("v7e:4x4")


def test_larger_slices_come_smallest_first():
    names = [one.name for one in chips.larger(chips.topology("v6e:8x8"))]
    assert names == ["v6e:8x16", "v6e:16x16"]


def test_the_clock_is_that_of_the_published_peak():
    """FLOP/s = units x rows x columns x 2 x clock."""
    units = {"v4": 8 * 128**2, "v5e": 4 * 128**2, "v5p": 8 * 128**2, "v6e": 4 * 256**2}
    for kind, chip in chips.CHIPS.items():
        assert chip.peak_flops == pytest.approx(units[kind] * 2 * chip.clock_hz, rel=0.01), kind
