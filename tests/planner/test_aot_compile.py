"""The command's flags and endings, with nothing compiled."""

import dataclasses
import json

import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.planner import early_exit, environment, long_video, plan
from scripts import aot_compile
from tests.conftest import TINY_CONFIG
from tests.planner.test_early_exit import three_stages
from tests.planner.test_plan import made, refusal

CONFIG = ["--config", str(TINY_CONFIG)]


@pytest.fixture
def compiler(monkeypatch):
    """Sets what `plan.plan` gives for a slice and mode, without libtpu."""

    def install(gives):
        monkeypatch.setattr(environment, "prepare", lambda: None)
        monkeypatch.setattr(
            plan, "plan", lambda config, topology, mode, stages: gives(topology, mode)
        )

    return install


def run(*flags: str) -> int:
    return aot_compile.main([*CONFIG, *flags])


def test_what_fits_ends_with_0(compiler, capsys, tmp_path):
    compiler(lambda topology, mode: made(topology=topology, mode=mode))
    out = tmp_path / "plans.json"
    assert run("--topology", "v5e:4x4", "--topology", "v6e:4x4", "--json", str(out)) == 0
    assert [one["topology"] for one in json.loads(out.read_text())] == ["v5e:4x4", "v6e:4x4"]
    assert "tiny, full, on v6e:4x4: fits, 4.00 of 31.25 GiB" in capsys.readouterr().out


def test_what_does_not_fit_ends_with_1_and_what_would(compiler, capsys):
    def gives(topology, mode):
        changes = {"topology": topology, "mode": mode}
        return made(**changes) if topology.num_chips > 16 else refusal(20, **changes)

    compiler(gives)
    assert run("--topology", "v5e:4x4") == 1
    shown = capsys.readouterr().out
    assert "does not fit, 20.00 of 15.75 GiB, 4.25 GiB too much" in shown
    assert "take --topology v5e:4x8, the smallest listed that has room" in shown


def test_a_table_has_both_modes_and_ends_with_0_if_anything_fits(compiler, capsys):
    compiler(
        lambda topology, mode: (
            made(topology=topology, mode=mode)
            if mode == "score"
            else refusal(20, topology=topology, mode=mode)
        )
    )
    assert run("--all", "--topology", "v5e:4x4", "--topology", "v5e:8x8") == 0
    rows = capsys.readouterr().out.strip().splitlines()
    assert [row.split("|")[2].strip() for row in rows[2:]] == ["full", "full", "score", "score"]


def test_a_table_has_only_the_mode_that_is_named(compiler):
    compiled = []

    def gives(topology, mode):
        compiled.append(mode)
        return made(topology=topology, mode=mode)

    compiler(gives)
    assert run("--all", "--topology", "v5e:4x4", "--mode", "score") == 0
    assert compiled == ["score"]


def refuses(topology, mode):
    raise UserError(f"mesh.data=3 is none of {topology.name}")


def test_a_table_that_the_config_suits_nowhere_ends_with_2(compiler, capsys):
    compiler(refuses)
    assert run("--all", "--topology", "v5e:4x4") == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "not compiled: full, v5e:4x4: mesh.data=3 is none of v5e:4x4" in shown.err


def test_a_mistake_leaves_the_figures_of_before(compiler, tmp_path):
    compiler(refuses)
    out = tmp_path / "plans.json"
    out.write_text("[1]")
    assert run("--topology", "v5e:4x4", "--json", str(out)) == 2
    assert out.read_text() == "[1]"


@pytest.mark.parametrize("all_", [[], ["--all", "--mode", "full"]])
def test_figures_are_kept_though_a_later_plan_fails(compiler, tmp_path, all_):
    def gives(topology, mode):
        if topology.num_chips > 16:
            raise RuntimeError("of the compiler")
        return made(topology=topology, mode=mode)

    compiler(gives)
    out = tmp_path / "plans.json"
    with pytest.raises(RuntimeError):
        run("--topology", "v5e:4x4", "--topology", "v5e:8x8", "--json", str(out), *all_)
    assert [one["topology"] for one in json.loads(out.read_text())] == ["v5e:4x4"]


def test_a_file_that_cannot_be_written_is_known_before_anything_is_compiled(
    compiler, tmp_path, capsys
):
    compiler(lambda topology, mode: pytest.fail("compiled"))
    assert run("--topology", "v5e:4x4", "--json", str(tmp_path)) == 2
    assert f"--json {tmp_path} cannot be written (Is a directory)" in capsys.readouterr().err


def test_a_table_of_nothing_that_fits_ends_with_1(compiler):
    compiler(lambda topology, mode: refusal(20, topology=topology, mode=mode))
    assert run("--all", "--topology", "v5e:4x4") == 1


def test_a_table_tells_what_the_config_does_not_suit(compiler, capsys):
    def gives(topology, mode):
        if mode == "score":
            raise UserError("eval.batch_size=8 is not divisible")
        return made(topology=topology, mode=mode)

    compiler(gives)
    assert run("--all", "--topology", "v5e:4x4") == 0
    shown = capsys.readouterr().out
    assert "not compiled: score, v5e:4x4: eval.batch_size=8 is not divisible" in shown


def test_an_unknown_slice_ends_with_2(capsys):
    assert run("--topology", "v5e:3x3") == 2
    assert "v5e: 1x1, 2x2, 2x4, 4x4" in capsys.readouterr().err


def test_a_flag_that_is_none_ends_with_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        run("--topology", "v5e:4x4", "--config", "a", "--topologie", "b")
    assert "unrecognized arguments: --topologie b" in capsys.readouterr().err


def test_no_slice_ends_with_2(capsys):
    with pytest.raises(SystemExit, match="2"):
        run()
    assert "--topology is wanted, or --all; known slices: v4:2x2x1" in capsys.readouterr().err


def test_a_mesh_that_is_not_the_slice_ends_with_2(monkeypatch, capsys):
    """The mesh counts 8; a slice of 16 chips is made of what is at hand here, 8 devices twice."""
    import jax

    monkeypatch.setattr(environment, "prepare", lambda: None)
    monkeypatch.setattr(environment, "devices", lambda topology: jax.devices() * 2)
    assert run("--topology", "v5e:4x4", "--config.mesh.data=8", "--config.mesh.fsdp=1") == 2
    assert "do not multiply to the number of devices, 16" in capsys.readouterr().err


@pytest.mark.parametrize("found", [None, "0.0.51"])
def test_a_missing_or_unfit_libtpu_ends_with_2_and_the_command(monkeypatch, capsys, found):
    def version(name):
        if found is None:
            raise environment.importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(environment.importlib.metadata, "version", version)
    monkeypatch.setattr(environment, "wanted_libtpu", lambda: "libtpu==0.0.42.*")
    assert run("--topology", "v5e:4x4") == 2
    shown = capsys.readouterr().err
    assert "pip install 'libtpu==0.0.42.*'" in shown
    assert ("not installed" in shown) == (found is None)


def test_jax_itself_tells_which_libtpu_it_wants():
    assert environment.wanted_libtpu().startswith("libtpu==0.")


def test_what_native_code_says_is_shown_unless_it_is_dropped(capfd):
    with environment.held_stderr():
        environment.os.write(2, b"kept\n")
    with environment.held_stderr() as drop:
        environment.os.write(2, b"noise\n")
        drop()
        environment.os.write(2, b"later\n")
    assert capfd.readouterr().err == "kept\nlater\n"


@pytest.fixture
def stages(monkeypatch):
    """Sets what `early_exit.plan` gives, without libtpu."""

    def install(gives):
        monkeypatch.setattr(environment, "prepare", lambda: None)

        def fake(config, topology, keep):
            found = gives()
            for one in (*found.stages, found.gather, found.whole):
                keep(one)
            return found

        monkeypatch.setattr(early_exit, "plan", fake)

    return install


def test_an_early_exit_is_a_table_of_its_stages(stages, capsys, tmp_path):
    stages(three_stages)
    out = tmp_path / "plans.json"
    flags = ["--topology", "v5e:4x4", "--mode", "early_exit", "--json", str(out)]
    assert run(*flags) == 0
    assert "tiny, early exit, on v5e:4x4" in capsys.readouterr().out
    parts = [one["part"] for one in json.loads(out.read_text())]
    assert parts == ["pictures, layers 1 to 2", "layers 3 to 4", "layers 5 to 6", "gather", ""]


def test_an_early_exit_without_room_ends_with_1_and_what_would_fit(stages, monkeypatch, capsys):
    stages(lambda: dataclasses.replace(three_stages(), whole=refusal(20, mode="score")))
    monkeypatch.setattr(
        plan, "plan", lambda config, topology, mode, stages: made(topology=topology, mode=mode)
    )
    assert run("--topology", "v5e:4x4", "--mode", "early_exit") == 1
    assert "take --topology v5e:4x8, the smallest listed" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["early_exit", "long_video"])
def test_what_is_many_programs_has_no_table_of_all_slices(capsys, mode):
    with pytest.raises(SystemExit, match="2"):
        run("--all", "--mode", mode)
    assert f"--mode {mode} has its own output: name slices, without" in capsys.readouterr().err


def test_a_long_video_has_a_page_for_each_way_of_merging(monkeypatch, capsys, tmp_path):
    def fake(config, topology, num_frames, keep):
        assert num_frames == 500
        found = [made(topology=topology, mode="long_video", part=part) for part in ("one", "two")]
        for one in found:
            keep(one)
        return found

    monkeypatch.setattr(environment, "prepare", lambda: None)
    monkeypatch.setattr(long_video, "plan", fake)
    out = tmp_path / "plans.json"
    flags = ["--topology", "v5e:1x1", "--mode", "long_video", "--num_frames", "500"]
    assert run(*flags, "--json", str(out)) == 0
    shown = capsys.readouterr().out
    assert "tiny, long_video, one, on v5e:1x1: fits" in shown
    assert "tiny, long_video, two, on v5e:1x1: fits" in shown
    assert [one["part"] for one in json.loads(out.read_text())] == ["one", "two"]


def test_a_long_video_on_many_chips_ends_with_2(monkeypatch, capsys):
    monkeypatch.setattr(environment, "prepare", lambda: None)
    assert run("--topology", "v5e:2x2", "--mode", "long_video") == 2
    assert "planned for one chip, v5e:2x2 has 4" in capsys.readouterr().err


def test_a_stage_is_planned_with_all_stages_at_hand(monkeypatch, tmp_path):
    """The models of those that it learns from are described there."""
    file = tmp_path / "stages.py"
    file.write_text(
        "import runpy\n"
        "def get_config():\n"
        f"    config = runpy.run_path({str(TINY_CONFIG)!r})['get_config']()\n"
        "    config.stages = {'teacher': {}, 'student': {'distill': {'phi': 1.0}}}\n"
        "    return config\n"
    )
    planned = []

    def fake(config, topology, mode, stages):
        planned.append((config.stage, mode, [stage.stage for stage in stages]))
        return made(topology=topology, mode=mode)

    monkeypatch.setattr(environment, "prepare", lambda: None)
    monkeypatch.setattr(plan, "plan", fake)
    flags = ["--config", str(file), "--topology", "v5e:4x4"]
    assert aot_compile.main(flags) == 0
    assert aot_compile.main([*flags, "--config.stage=teacher", "--mode", "cache_teacher"]) == 0
    both = ["teacher", "student"]
    assert planned == [("student", "full", both), ("teacher", "cache_teacher", both)]
