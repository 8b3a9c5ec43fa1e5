"""The TPU compiler itself, asked for small programs; skipped where libtpu is not installed."""

import argparse
import dataclasses
import importlib.util
import os

import jax
import pytest

from deevisum_jax.keyframes.selection import SelectionConfig
from deevisum_jax.planner import chips, environment, long_video, plan
from deevisum_jax.planner.hlo import Program
from scripts import aot_compile, benchmark_keyframes
from tests.conftest import TINY_CONFIG
from tests.planner import small_programs
from tests.planner.test_made import planned

pytestmark = [
    pytest.mark.tpu_backend,
    pytest.mark.skipif(
        importlib.util.find_spec("libtpu") is None,
        reason="the TPU compiler is not installed: pip install -e '.[tpu]'",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def tpu_compiler():
    """Other tests start processes, which are to find themselves on no TPU."""
    before = dict(os.environ)
    environment.prepare()
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.parametrize("name", small_programs.ON_ONE_CHIP)
def test_flops_are_those_by_hand(name):
    *_, flops = small_programs.ON_ONE_CHIP[name]
    assert Program(small_programs.on_one_chip(name)).flops == flops


def test_the_compiler_still_writes_what_is_stored():
    """What the other tests read; where this fails, write `programs/` anew and look at them."""
    for name, text in (
        ("nested_scans", small_programs.on_one_chip("nested_scans")),
        ("collectives", small_programs.collectives()),
        ("windowed_einsum", small_programs.windowed_einsum()),
    ):
        found, stored = Program(text), Program(small_programs.stored(name))
        assert figures(found) == figures(stored), name


def figures(program):
    """What a plan takes from a program for v5e:4x4, in the order of the chips in its mesh."""
    topology = chips.topology("v5e:4x4")
    coords = [tuple(chip.coords) for chip in environment.devices(topology)]
    ring_s = sum(
        times * plan.ring_seconds(one, topology, coords) for one, times in program.collectives
    )
    return (
        *(program.flops, program.cycles, program.hbm_bytes, program.kernels, ring_s),
        *(program.traffic, program.notes),
    )


def test_a_planned_update_is_what_was_asked_for(tiny_config):
    config = tiny_config("batch_size=32", "mesh.data=1", "mesh.fsdp=4", "mesh.tensor=1")
    found = plan.plan(config, chips.topology("v5e:2x2"), "full")
    assert found.fits
    assert found.mesh == {"data": 1, "fsdp": 4, "tensor": 1}
    # Backward computes the layers anew, and not everything a second time.
    assert 1.0 < found.cost.flops / found.model_flops < 4 / 3 + 0.05
    assert found.memory.alias > 0.9 * found.state_bytes  # the state is updated in place
    assert found.memory.argument >= found.state_bytes
    assert found.cost.cycles > 0
    assert found.sent_bytes > 0
    # A quarter of the table on each chip: float32[512, 32 / 4], beside it two moments.
    tables = [one for one in found.largest if one.path.endswith("llm/embedder/input_embedding")]
    assert [(one.parts, one.num_bytes) for one in tables] == [((1, 4), 512 * 8 * 4)] * 3


def test_scoring_is_planned_on_every_kind_of_chip(tiny_config):
    for kind, chip in chips.CHIPS.items():
        [*_, dims] = [dims for dims in chip.slices if dims in ("2x2", "2x2x1")]
        topology = chips.topology(f"{kind}:{dims}")
        config = tiny_config("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=1")
        found = plan.plan(config, topology, "score")
        assert found.fits
        # Padding of the smallest products is not counted, so nothing is added to the model's.
        assert found.cost.flops == pytest.approx(found.model_flops, rel=0.05), kind


def test_an_early_exit_is_planned_stage_by_stage(tiny_config):
    config = tiny_config("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=1")
    *stages, gather = plan.plan_parts(config, chips.topology("v5e:2x2"))
    assert len(stages) == len(config.model.exit_layers)
    for one in stages:
        assert one.fits
        assert one.cost.flops == pytest.approx(one.model_flops, rel=0.05), one.part
    # Every device keeps its segments.
    assert (gather.cost.flops, gather.sent_bytes) == (0, 0)
    # From two batches to one.
    assert gather.memory.argument == pytest.approx(2 * gather.memory.output, rel=0.05)


def test_a_batch_without_room_is_an_answer(tiny_config):
    config = tiny_config("mesh.data=4", "mesh.fsdp=1", "mesh.tensor=1", f"eval.batch_size={2**24}")
    found = plan.plan(config, chips.topology("v5e:2x2"), "score")
    assert not found.fits
    assert found.needed_bytes > found.hbm_limit
    assert "too much" in plan.in_short(found)


def test_a_state_without_room_is_not_compiled(tiny_config):
    """28e9 parameters with two moments each, float32, on four chips: 83 GB a chip."""
    depth = "model.exit_layers=(23, 46)"
    config = tiny_config(
        "model.variant=paligemma2_28b", depth, "mesh.data=1", "mesh.fsdp=4", "mesh.tensor=1"
    )
    found = plan.plan(config, chips.topology("v5e:2x2"), "full")
    assert not found.fits
    assert found.state_bytes / 1e9 == pytest.approx(27.65 * 12 / 4, rel=0.01)
    assert "at least 77." in plan.in_short(found)


def test_devices_of_v4_have_both_cores():
    [first, *others] = environment.devices(chips.topology("v4:2x2x1"))
    assert len(others) == 3
    assert first.platform == "tpu"


def test_the_command_ends_with_a_page_and_the_figures(tmp_path, capfd):
    out = tmp_path / "plan.json"
    flags = ["--config", str(TINY_CONFIG), "--topology", "v5e:2x2", "--mode", "score"]
    assert aot_compile.main([*flags, "--json", str(out)]) == 0
    shown = capfd.readouterr()
    assert shown.out.startswith("tiny, score, on v5e:2x2: fits")
    assert shown.err == ""  # libtpu's start says much that is nobody's concern
    assert '"topology": "v5e:2x2"' in out.read_text()


def test_nothing_of_a_plan_is_on_the_chips(tiny_config):
    before = len(jax.live_arrays())
    config = tiny_config("mesh.data=4", "mesh.fsdp=1", "mesh.tensor=1")
    found = plan.plan(config, chips.topology("v5e:2x2"), "score")
    assert len(jax.live_arrays()) == before
    assert dataclasses.asdict(found)["mode"] == "score"


def test_a_long_video_is_compiled_for_one_chip():
    config = planned("eval.batch_size=4", "model.merge.num_keyframes=2", "data.num_frames=2")
    raw, learned = long_video.plan(config, chips.topology("v5e:1x1"), 10, lambda _: None)
    assert (raw.fits, learned.fits) == (True, True)
    assert raw.mesh == {"data": 1, "fsdp": 1, "tensor": 1}
    assert raw.sent_bytes == 0
    # Ten frames of 28 pixels are among the arguments.
    assert raw.memory.argument > 10 * 28 * 28 * 3
    # Frames are encoded in three chunks of four, two of them twice, and keyframes once more.
    assert raw.cost.flops > raw.model_flops


def test_the_choice_of_keyframes_is_estimated_for_one_chip(capsys):
    args = argparse.Namespace(num_frames=[262_144], width=512, dtype="float32")
    one = chips.topology("v5e:1x1")
    benchmark_keyframes.print_estimates(one, SelectionConfig(num_keyframes=8), args)
    row = capsys.readouterr().out.splitlines()[-1]
    frames, peak, features, hbm, compilers, one_pass = row.strip("| ").split(" | ")
    assert (frames, features) == ("262,144", "512")  # 262,144 * 512 * 4 bytes
    # At 819 GB/s; they are read at least once, and the program keeps no copy of them.
    assert float(one_pass) == pytest.approx(0.656, abs=5e-4)
    assert float(hbm) > float(one_pass)
    assert float(compilers) > 0
    assert 512 <= float(peak) < 600
