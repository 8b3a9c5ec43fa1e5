"""Figures that follow from others, and the search for what fits, with a made-up compiler."""

import dataclasses
import json

import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.planner import chips, plan, report
from deevisum_jax.planner.collectives import Collective
from deevisum_jax.planner.hlo import Traffic
from deevisum_jax.planner.plan import Cost, Memory, Placed, Plan

GIB = 2**30
V5E = chips.topology("v5e:4x4")
GRID = [(x, y, 0) for x in range(4) for y in range(4)]


def made(**changes) -> Plan:
    """A plan of round figures on a v5e: 100 ms of FLOPs, 200 ms compute, 100 ms HBM."""
    values = {
        "topology": V5E,
        "mode": "full",
        "part": "",
        "mesh": {"data": 1, "fsdp": 16, "tensor": 1},
        "batch_size": 64,
        "num_params": 3_000_000_000,
        "num_adapter_params": 0,
        "state_bytes": 2 * GIB,
        "model_flops": round(197e12 / 10),
        "needed_bytes": 4 * GIB,
        "refused": "",
        "memory": Memory(argument=2 * GIB, temporary=GIB, output=GIB, alias=GIB, peak=4 * GIB),
        "cost": Cost(
            flops=round(197e12 / 8),
            cycles=300_000_000,
            kernels=0,
            hbm_bytes=round(81.9e9),
            traffic={"all-gather": Traffic(count=7, num_bytes=10**10, whole_bytes=2 * 10**10)},
            ring_s=0.2,
        ),
        "largest": (
            Placed(
                path="params/w",
                shape=(26, 2304),
                dtype="float32",
                parts=(1, 16),
                num_bytes=26 * 144 * 4,
            ),
        ),
        "compile_cpu_s": 1.0,
        "process_rss_bytes": GIB,
        "notes": ("a note",),
    }
    return Plan(**{**values, **changes})


def refusal(needed_gib: float, **changes) -> Plan:
    return made(
        memory=None, cost=None, refused="no room", needed_bytes=round(needed_gib * GIB), **changes
    )


def test_times_and_mfu():
    found = made()
    assert (found.ideal_s, found.compute_s, found.hbm_s) == pytest.approx((0.1, 0.2, 0.1))
    assert found.ici_s == pytest.approx(10e9 / (4 * 50e9))
    assert found.step_s == pytest.approx(0.2)  # the largest
    assert found.step_sum_s == pytest.approx(0.2 + 0.1 + 0.2)  # the rings' 200 ms, not 50
    assert (found.mfu, found.mfu_sum) == pytest.approx((0.5, 0.2))


@pytest.mark.parametrize(
    ("group", "links"),
    [
        (tuple(range(16)), 2),  # both axes, one link along each
        ((0, 4, 8, 12), 1),  # the first axis
        ((0, 1), 1),  # a part of the second
    ],
)
def test_a_collective_has_the_links_along_its_axes(group, links):
    one = Collective(kind="all-gather", num_bytes=50e9, whole_bytes=1, group=group)
    assert plan.ring_seconds(one, V5E, GRID) == pytest.approx(1 / links)


def test_a_group_with_gaps_waits_for_those_in_its_gaps():
    """Chips 0 and 2 of a line of four, and 1 and 3: both ways cross the link between 1 and 2."""
    one = Collective(kind="all-gather", num_bytes=50e9, whole_bytes=1, group=(0, 2))
    assert plan.ring_seconds(one, V5E, GRID) == pytest.approx(2)


@pytest.mark.parametrize(
    ("slice_", "pairs", "hops"),
    [
        ("v5e:4x4", [(0, 1), (1, 0)], 1),
        ("v5e:4x4", [(0, 1), (1, 2), (2, 3), (3, 0)], 3),  # a line's end has no way round
        ("v5e:4x4", [(0, 15), (15, 0)], 3 + 3),
        ("v5e:16x16", [(0, 15), (15, 0)], 1),  # a ring has
        ("v5e:16x16", [(0, 6), (6, 0)], 6),
    ],
)
def test_a_permute_takes_as_long_as_its_longest_way(slice_, pairs, hops):
    topology = chips.topology(slice_)
    group = tuple(sorted({device for pair in pairs for device in pair}))
    one = Collective(
        kind="collective-permute", num_bytes=50e9, whole_bytes=1, group=group, pairs=tuple(pairs)
    )
    places = [(x, y, 0) for x in range(topology.dims[0]) for y in range(topology.dims[1])]
    assert plan.ring_seconds(one, topology, places) == pytest.approx(hops)


@pytest.mark.parametrize(
    ("slice_", "size", "seconds"),
    [
        # Ways from 0: 1, 2, 3; from 1: 1, 1, 2; the other two alike: 20 / 12 hops, one link.
        ("v5e:4x4", 4, 5 / 3),
        # 32 / 15 along each axis: 16 * 20 of the 16 * 15 pairs, / 12 * 12.
        ("v5e:4x4", 16, 2 * 4 / 3),
        # A ring's: 1 to 7 twice, and 8: 64 / 15 hops, two links.
        ("v5e:16x16", 16, 64 / 15 / 2),
    ],
)
def test_an_all_to_all_takes_the_links_between_all_pairs(slice_, size, seconds):
    topology = chips.topology(slice_)
    one = Collective(kind="all-to-all", num_bytes=50e9, whole_bytes=1, group=tuple(range(size)))
    places = [(x, y, 0) for x in range(topology.dims[0]) for y in range(topology.dims[1])]
    assert plan.ring_seconds(one, topology, places) == pytest.approx(seconds)


def test_rings_have_two_links_along_an_axis():
    cube = chips.topology("v5p:4x4x4")
    places = [(x, y, z) for x in range(4) for y in range(4) for z in range(4)]
    one = Collective(kind="all-reduce", num_bytes=200e9, whole_bytes=1, group=(0, 1, 2, 3))
    assert plan.ring_seconds(one, cube, places) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("words", "needed"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
            "temporaries (24.00G) exceeds available HBM (15.75G).",
            24 * GIB,
        ),
        ("Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm.", 20.5 * GIB),
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space vmem.", None),
    ],
)
def test_what_a_refused_program_would_need(words, needed):
    assert plan.needed_bytes(words) == needed


def compiler(monkeypatch, gib_of) -> list[tuple[str, int]]:
    """Has `plan.plan` take `gib_of(chips, batch)` of memory; returns what is compiled."""
    compiled = []

    def fake(config, topology, mode, stages):
        needed = gib_of(topology.num_chips, config.batch_size)
        compiled.append((topology.name, config.batch_size))
        changes = {"topology": topology, "batch_size": config.batch_size}
        if needed > topology.chip.hbm_gib:
            return refusal(needed, **changes)
        memory = dataclasses.replace(made().memory, peak=round(needed * GIB))
        return made(memory=memory, needed_bytes=memory.peak, **changes)

    monkeypatch.setattr(plan, "plan", fake)
    return compiled


def test_advice_is_the_smallest_slice_and_the_largest_batch_that_fit(monkeypatch, tiny_config):
    """State 2 GiB on 16 chips, 0.25 GiB for a row of each chip: (15.75 - 2) / 0.25 = 55 rows."""
    compiled = compiler(monkeypatch, lambda num, batch: 32 / num + 0.25 * batch / num)
    config = tiny_config("batch_size=1600")
    found = plan.advise(config, refusal(27, batch_size=1600))
    assert found.topology.name == "v5e:4x8"
    assert found.batch_size == 55 * 16
    assert compiled == [("v5e:4x8", 1600), ("v5e:4x4", 880), ("v5e:4x4", 1232), ("v5e:4x4", 1056)]
    assert "batch 1232: does not fit, 21.25 of 15.75 GiB, 5.50 GiB too much" in found.tried[2]


def test_advice_skips_slices_with_too_few_chips(monkeypatch, tiny_config):
    compiled = compiler(monkeypatch, lambda num, batch: 16 * 100 / num)
    found = plan.advise(tiny_config("batch_size=16"), refusal(100, batch_size=16))
    assert found.topology.name == "v5e:8x16"
    assert [name for name, _ in compiled] == ["v5e:8x16"]
    assert found.tried[:2] == (
        "v5e:4x8: too few chips for it",
        "v5e:8x8: too few chips for it",
    )


def test_advice_compiles_only_so_many_candidates(monkeypatch, tiny_config):
    compiled = compiler(monkeypatch, lambda num, batch: 20)
    found = plan.advise(tiny_config("batch_size=1600"), refusal(20, batch_size=1600))
    assert (found.topology, found.batch_size) == (None, None)
    assert len(compiled) == 3 + 3
    assert "nothing that was tried fits" in report.advice_text(refusal(20), found)


def test_advice_compiles_nothing_with_more_rows_than_the_compiler_can_take(
    monkeypatch, tiny_config
):
    """2**22 rows on 16 chips are 2**18 on each, and 2**14 on each of the 256 that there are."""
    compiled = compiler(monkeypatch, lambda num, batch: 1 + 0.001 * batch / num)
    found = plan.advise(tiny_config(f"batch_size={2**22}"), refusal(200, batch_size=2**22))
    assert (found.topology, found.batch_size) == (None, 1024 * 16)
    assert compiled == [("v5e:4x4", 1024 * 16)]
    assert found.tried[-3:] == (
        "v5e:16x16: not compiled, 16384 rows on a chip would take long",
        "v5e:4x4: not more than 1024 rows on a chip",
        "v5e:4x4, batch 16384: fits, 2.02 of 15.75 GiB",
    )


def test_no_batch_makes_room_for_the_state(monkeypatch, tiny_config):
    compiled = compiler(monkeypatch, lambda num, batch: 400 / num)
    refused = refusal(25, batch_size=64, state_bytes=20 * GIB)
    found = plan.advise(tiny_config("batch_size=64"), refused)
    assert (found.topology.name, found.batch_size) == ("v5e:4x8", None)
    assert [name for name, _ in compiled] == ["v5e:4x8"]
    assert "the state alone is 20.00 GiB" in found.tried[-1]


def test_advice_passes_over_slices_that_the_config_does_not_suit(monkeypatch, tiny_config):
    def fake(config, topology, mode, stages):
        if topology.num_chips == 32:
            raise UserError("batch_size=48 is not divisible by 32\nmore")
        return made(topology=topology)

    monkeypatch.setattr(plan, "plan", fake)
    found = plan.advise(tiny_config("batch_size=48"), refusal(16, batch_size=16))
    assert found.topology.name == "v5e:8x8"
    assert found.tried[0] == "v5e:4x8: batch_size=48 is not divisible by 32"


def test_a_page_says_what_was_planned():
    page = report.text("paligemma2_3b", made())
    for words in (
        "paligemma2_3b, full, on v5e:4x4: fits, 4.00 of 15.75 GiB per chip",
        "arguments 2.00, temporary 1.00, output 1.00 (1.00 in place), peak 4.00 GiB",
        "model 19.7 TF, 100 ms at the peak; compiled 24.6 TF, 1.25 times the model's",
        "300 Mcycles by the compiler, clock assumed 1.5 GHz",
        "200 ms if all three overlap, MFU 50.0%; 500 ms if nothing does, MFU 20.0%",
        "all-gather               7 x        10 GB sent (whole arrays 20 GB)",
        "params/w  float32[26, 2304/16]",
        "note: a note",
    ):
        assert words in page


def test_a_page_says_how_many_numbers_adapters_have():
    page = report.text("paligemma2_3b", made(num_adapter_params=10_383_360))
    assert "3.000e9 parameters (of them 10.383e6 in adapters), batch 64" in page
    assert "in adapters" not in report.text("paligemma2_3b", made())


def test_a_page_on_what_does_not_fit_has_the_reason():
    page = report.text("paligemma2_3b", refusal(20))
    assert "does not fit, 20.00 of 15.75 GiB, 4.25 GiB too much" in page
    page = report.text("paligemma2_3b", dataclasses.replace(refusal(20), needed_bytes=None))
    assert "does not fit: no room" in page


def test_copies_of_the_state_are_pointed_out():
    refused = refusal(20, mesh={"data": 4, "fsdp": 4, "tensor": 1})
    advice = plan.Advice(topology=None, batch_size=16, tried=())
    words = report.advice_text(refused, advice)
    assert "give --config.batch_size=16 on v5e:4x4; mesh.data=4 keeps 4 copies" in words


def test_a_table_has_a_row_for_each_plan():
    lines = report.table([("3b", made()), ("3b", refusal(20, mode="score"))]).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert len({len(line) for line in lines}) == 1  # one width: it is read in terminals, too
    assert cells[0][:6] == ["model", "mode", "slice", "batch", "peak GiB", "of GiB"]
    assert cells[2] == [
        *("3b", "full", "v5e:4x4", "64", "4.00", "15.75", "19.7", "24.6", "100", "200", "100"),
        *("50 to 200", "200 to 500", "50% to 20%", "10.0 (20.0)", "1"),
    ]
    assert cells[3][:6] == ["3b", "score", "v5e:4x4", "64", "20.00 (no)", "15.75"]


def test_json_has_what_was_found_and_what_follows():
    found = json.loads(json.dumps(report.as_json("3b", made())))
    assert (found["model"], found["topology"], found["fits"]) == ("3b", "v5e:4x4", True)
    assert found["memory"]["peak"] == 4 * GIB
    assert found["cost"]["traffic"]["all-gather"]["num_bytes"] == 10**10
    assert (found["mfu"], found["sent_bytes"]) == pytest.approx((0.5, 10**10))
    assert json.loads(json.dumps(report.as_json("3b", refusal(20))))["fits"] is False
