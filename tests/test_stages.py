"""Teacher, mentor and student end to end: in order, killed and resumed, cached and online, misused.

All stages here are tiny: four updates each, saved every second one, on a mesh of 2 x 2 x 2.
"""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from deevisum_jax import checkpoints, main, sharding, stages, training
from deevisum_jax import config as config_lib
from deevisum_jax.data import tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.models import paligemma2
from tests.training_runs import killed_at, lines

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({
        "initialization": "from_scratch", "seed": 0, "total_steps": 4, "batch_size": 8,
        "log_every": 1,
        "data": {"dataset": "synthetic/tiny", "text_len": 48, "num_frames": 1, "vocab_size": 400},
        "model": {"variant": "tiny", "exit_layers": (2, 4)},
        "optim": {"learning_rate": 1e-2, "warmup_steps": 2},
        "distill": {
            "phi": 0.5, "psi": 0.25, "source": "cache", "hidden": 0.1, "exits": 0.1, "top_k": 16,
        },
        "stages": {"teacher": {}, "mentor": {}, "student": {"seed": 1}},
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2},
        "checkpoint": {"every_steps": 2},
        "eval": {"every_steps": 4, "batch_size": 8, "ablate_inputs": False},
    })
"""
ALONE = ("distill.hidden=0", "distill.exits=0", "stages.student.distill.phi=0")


@pytest.fixture(scope="module")
def config_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("config") / "staged.py"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture(scope="module")
def command(config_file, data_dir):
    """Runs the program with overrides and flags; returns its exit status."""

    def run(workdir: pathlib.Path, *given: str) -> int:
        flags = [flag if flag.startswith("--") else f"--config.{flag}" for flag in given]
        data = f"--config.data.data_dir={data_dir}"
        return main.main(["--config", config_file, "--workdir", str(workdir), data, *flags])

    return run


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory) -> pathlib.Path:
    """The workdir of all three stages; not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    assert command(workdir) == 0
    return workdir


@pytest.fixture
def teachers_only(finished, tmp_path) -> pathlib.Path:
    """A copy of the teacher and the mentor, which may be changed."""
    for name in ("teacher", "mentor"):
        shutil.copytree(finished / name, tmp_path / "work" / name)
    return tmp_path / "work"


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """The stages whose training loop was entered."""
    entered, train = [], training.train

    def note(state, *, config, **kwargs):
        entered.append(config.stage)
        return train(state, config=config, **kwargs)

    monkeypatch.setattr(training, "train", note)
    return entered


def error_of(capsys) -> str:
    return " ".join(capsys.readouterr().err.split())


def test_every_stage_is_a_run_and_the_students_is_the_workdir_itself(finished):
    for folder in (finished, finished / "mentor", finished / "teacher"):
        assert (folder / "report.json").exists()
        assert checkpoints.complete_steps(epath.Path(folder / "checkpoints"))[-1] == 4
    learned = {
        name: {
            key.split("/")[2]
            for key in lines(folder)[0]
            if key.startswith(("loss/kl/", "loss/hidden/"))
        }
        for name, folder in {
            "teacher": finished / "teacher",
            "mentor": finished / "mentor",
            "student": finished,
        }.items()
    }
    assert learned == {
        "teacher": {"exits"},
        "mentor": {"exits", "teacher"},
        "student": {"exits", "mentor", "teacher"},
    }


def test_the_total_is_what_the_paper_adds_up(finished):
    first = lines(finished)[0]
    # Exits 2 and 4 of 4 layers weigh 1/3 and 2/3; each part as in the config.
    depth = {2: 1 / 3, 4: 2 / 3}
    expected = first["loss/token"]
    for layer, weight in depth.items():
        expected += weight * first[f"loss/prototype/exit_{layer}"]  # ours, beside the paper's
        for kind in ("class", "score"):
            expected += weight * first[f"loss/{kind}/exit_{layer}"]
            for teacher, of in {"mentor": 0.5, "teacher": 0.25}.items():
                expected += of * weight * first[f"loss/kl/{teacher}/{kind}/exit_{layer}"]
    for teacher, of in {"mentor": 0.5, "teacher": 0.25}.items():
        expected += of * first[f"loss/kl/{teacher}/token"]
        for layer in depth:
            expected += of * 0.1 / 2 * first[f"loss/hidden/{teacher}/layer_{layer}"]
    for kind in ("class", "score"):
        expected += 0.1 * depth[2] * first[f"loss/kl/exits/{kind}/exit_2"]
    assert first["loss/total"] == pytest.approx(expected, rel=1e-5)


def test_cached_and_online_teachers_give_equal_losses(finished, command, teachers_only):
    assert command(teachers_only, "distill.source=online") == 0
    for found, expected in zip(lines(teachers_only), lines(finished), strict=True):
        assert found.keys() == expected.keys()
        for name, value in found.items():
            if name.startswith("loss/"):
                assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-6), name


def test_a_finished_stage_is_not_trained_again(finished, command, tmp_path, trained):
    shutil.copytree(finished, tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run" / "teacher").rglob("*.json")}
    assert command(tmp_path / "run", "eval.budget=0.3") == 0
    assert trained == []
    assert json.loads((tmp_path / "run" / "config.json").read_text())["eval"]["budget"] == 0.3
    assert before == {path: path.read_bytes() for path in before}


def test_a_killed_stage_goes_on_and_ends_as_if_it_had_not_been(
    finished, command, teachers_only, trained
):
    shutil.rmtree(teachers_only / "mentor")
    with killed_at(3):
        command(teachers_only)
    assert command(teachers_only) == 0
    assert trained == ["mentor", "mentor", "student"]
    assert lines(teachers_only / "mentor") == lines(finished / "mentor")
    assert lines(teachers_only) == lines(finished)


def test_a_stage_that_nobody_learns_from_is_not_trained(command, tmp_path, trained):
    assert command(tmp_path / "plain", *ALONE, "distill.psi=0") == 0
    assert trained == ["student"]
    assert not (tmp_path / "plain" / "teacher").exists()
    assert not any(name.startswith("loss/kl") for name in lines(tmp_path / "plain")[0])


def test_students_may_share_teachers_of_another_folder(finished, command, tmp_path, trained):
    shared = f"distill.folder={finished}"
    assert command(tmp_path / "other", shared, "stage=student", "seed=5") == 0
    assert trained == ["student"]
    assert not (tmp_path / "other" / "teacher").exists()


def test_outputs_are_written_by_a_command_of_their_own(finished, command, teachers_only, capsys):
    kept = {path: path.read_bytes() for path in teachers_only.glob("*/outputs/*/*.array_record")}
    for name in ("teacher", "mentor"):
        shutil.rmtree(teachers_only / name / "outputs")
    assert command(teachers_only, "stage=student") == 2
    said = error_of(capsys)
    assert "holds no outputs of the mentor" in said
    assert "--config.stage=mentor --mode cache_teacher" in said
    assert not (teachers_only / "metrics.jsonl").exists()  # before the first step
    for name in ("teacher", "mentor"):
        assert command(teachers_only, f"stage={name}", "--mode=cache_teacher") == 0
    assert len(kept) == 2
    assert kept == {path: path.read_bytes() for path in kept}


def test_a_cache_is_only_of_a_stage_that_teaches(command, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(tmp_path, "--mode=cache_teacher", "stage=student")
    assert "of a stage that another learns from" in error_of(capsys)


def test_a_mentor_without_a_teacher_is_refused(command, tmp_path, capsys):
    assert command(tmp_path / "run", "stage=mentor") == 2
    said = error_of(capsys)
    assert "the mentor learns from a teacher, and there is none in" in said
    assert "the same command with --config.stage=teacher" in said


def test_a_teacher_that_is_not_trained_to_its_end_is_refused(command, teachers_only, capsys):
    (teachers_only / "teacher" / "report.json").unlink()
    shutil.rmtree(teachers_only / "mentor")
    assert command(teachers_only, "stage=mentor") == 2
    assert "train it first, or go on with it" in error_of(capsys)


def test_a_teacher_with_another_tokenizer_is_refused(finished, command, tmp_path, capsys):
    tokens = finished / "tokenizer.model"
    shared = (f"distill.folder={finished}", "stage=student")
    assert command(tmp_path / "same", *shared, f"data.tokenizer={tokens}", "total_steps=3") == 0
    other = tmp_path / "other.model"
    tokenizer.train_tokenizer(["quite", "another"], epath.Path(other), vocab_size=280)
    assert command(tmp_path / "run", *shared, f"data.tokenizer={other}") == 2
    said = error_of(capsys)
    assert "the mentor in" in said
    assert "reads with another tokenizer" in said


def test_a_teacher_with_another_prompt_is_refused(finished, command, tmp_path, capsys):
    template = tmp_path / "template.txt"
    template.write_text((finished / "template.txt").read_text() + "Now.")
    shared = (f"distill.folder={finished}", "stage=student")
    assert command(tmp_path / "run", *shared, f"data.template={template}") == 2
    assert "another prompt template" in error_of(capsys)


def test_teachers_of_other_examples_are_refused(finished, command, tmp_path, capsys):
    shared = (f"distill.folder={finished}", "stage=student")
    assert command(tmp_path / "run", *shared, "data.segment_s=3.0", "data.num_frames=2") == 2
    said = error_of(capsys)
    assert "data.segment_s: 2.0 there, 3.0 here" in said
    assert "data.num_frames: 1 there, 2 here" in said


def test_a_cache_for_another_question_is_not_taken(finished, command, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    warmer = "stages.student.distill.temperature=3"
    assert command(tmp_path / "run", warmer, "stage=student") == 2
    assert "classes_suffix_top16_T3_layers2-4 holds no outputs of the mentor" in error_of(capsys)
    # Nor is it lost: another question has a folder of its own.
    teach = [f"{name}/outputs" for name in ("teacher", "mentor")]
    for name in ("mentor", "teacher"):
        assert command(tmp_path / "run", warmer, f"stage={name}", "--mode=cache_teacher") == 0
    assert [len(list((tmp_path / "run" / folder).iterdir())) for folder in teach] == [2, 2]
    assert command(tmp_path / "run", warmer, "stage=student") == 0


@pytest.mark.parametrize(
    ("part", "told"),
    [
        ("weights", "weights: "),
        ("data", "data.num_frames: 7 -> 1"),
        ("prompt", "prompt.template: "),
        ("asked", "asked.top_k: 7 -> 16"),
    ],
)
def test_a_cache_that_does_not_match_is_refused(
    command, teachers_only, trained, capsys, part, told
):
    [meta] = teachers_only.glob("mentor/outputs/*/cache.json")
    content = json.loads(meta.read_text())
    changes = {"data": {"num_frames": 7}, "prompt": {"template": "0"}, "asked": {"top_k": 7}}
    content["identity"][part] = (
        {**content["identity"][part], **changes[part]} if part in changes else "0"
    )
    meta.write_text(json.dumps(content))
    assert command(teachers_only, "stage=student") == 2
    assert told in error_of(capsys)
    assert trained == []


def test_a_cache_that_is_not_complete_is_refused(command, teachers_only, trained, capsys):
    [meta] = teachers_only.glob("teacher/outputs/*/cache.json")
    [file] = teachers_only.glob("teacher/outputs/*/*.array_record")
    file.unlink()
    meta.write_text(meta.read_text().replace('"complete": true', '"complete": false'))
    assert command(teachers_only, "stage=student") == 2
    said = error_of(capsys)
    assert "outputs for 0 of" in said
    assert "--config.stage=teacher --mode cache_teacher" in said
    assert trained == []
    assert command(teachers_only) == 0  # writes what is missing


def test_what_is_not_trained_to_its_end_is_not_written_down(command, teachers_only, capsys):
    (teachers_only / "teacher" / "report.json").unlink()
    assert command(teachers_only, "stage=teacher", "--mode=cache_teacher") == 2
    assert "is not trained to its end, and what it says would change" in error_of(capsys)


def test_a_student_is_evaluated_without_its_teachers(finished, command, tmp_path):
    """Trained, it is a run like any other."""
    left = shutil.ignore_patterns("teacher", "mentor")
    shutil.copytree(finished, tmp_path / "moved", ignore=left)
    (tmp_path / "moved" / "report.json").unlink()
    assert command(tmp_path / "moved", "--mode=evaluate") == 0
    found = json.loads((tmp_path / "moved" / "report.json").read_text())
    assert found["tau"] == json.loads((finished / "report.json").read_text())["tau"]


def test_a_student_may_go_on_with_its_teachers_beside_it(finished, command, tmp_path):
    shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    for name in ("teacher", "mentor"):
        shutil.copytree(finished / name / "checkpoints", tmp_path / "run" / name / "checkpoints")
    with killed_at(3):
        command(tmp_path / "run", "stage=student")
    assert command(tmp_path / "run", "stage=student", "distill.source=online") == 0
    for found, expected in zip(lines(tmp_path / "run"), lines(finished), strict=True):
        assert found["step"] == expected["step"]
        if "loss/total" in found:
            assert found["loss/total"] == pytest.approx(expected["loss/total"], rel=1e-5)


def test_adapters_may_teach(finished, command, tmp_path):
    """A mentor of low rank over 8-bit weights, from the teacher's, whose variant is its own."""
    shutil.copytree(finished / "teacher", tmp_path / "run" / "teacher")
    adapters = [
        f"stages.mentor.{flag}"
        for flag in (
            f"initialization={finished / 'teacher'}", "model.lora.rank=2", "model.lora.base=int8",
            "model.lora.tile=8",
        )
    ]  # fmt: skip
    assert command(tmp_path / "run", *adapters) == 0
    first = lines(tmp_path / "run" / "mentor")[0]
    # It begins as the teacher, but for the rounding.
    assert first["loss/kl/teacher/class/exit_4"] == pytest.approx(0, abs=1e-3)
    assert lines(tmp_path / "run")[0]["loss/kl/mentor/class/exit_4"] > 0


def test_changed_pictures_cannot_be_learned_from_a_cache(finished, command, tmp_path, capsys):
    shared = (f"distill.folder={finished}", "stage=student")
    assert command(tmp_path / "run", *shared, "data.augment=True") == 2
    assert "set data.augment=False, or distill.source=online" in error_of(capsys)


@pytest.mark.parametrize("source", ["cache", "online"])
def test_numbers_that_are_not_finite_are_not_taught(
    command, teachers_only, monkeypatch, capsys, source
):
    load = stages.Earlier.load

    def broken(self, abstract):
        params = load(self, abstract)
        kernel = params["exits"]["classifier"]["kernel"]
        params["exits"]["classifier"]["kernel"] = jax.jit(
            lambda a: jnp.full_like(a, jnp.nan), out_shardings=kernel.sharding
        )(kernel)
        return params

    monkeypatch.setattr(stages.Earlier, "load", broken)
    for name in ("teacher", "mentor"):
        shutil.rmtree(teachers_only / name / "outputs")
    assert command(teachers_only, f"distill.source={source}") == 2
    said = error_of(capsys)
    assert "class_logits" in said
    assert "not finite" in said
    assert not (teachers_only / "metrics.jsonl").exists()  # before the first step


def test_a_student_that_has_begun_keeps_its_teachers(finished, command, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()  # as if it was stopped in front of it
    (tmp_path / "run" / "teachers.json").write_text(json.dumps({"mentor": "0", "teacher": "0"}))
    assert command(tmp_path / "run") == 2
    assert "began with other weights of its mentor and teacher" in error_of(capsys)


def test_projections_are_trained_and_are_no_part_of_the_model(finished):
    config = config_lib.load(epath.Path(finished / "config.json"))
    assert config.stage == "student"
    student = stages.Earlier("student", epath.Path(finished))
    abstract = paligemma2.abstract_params(student.model_config)
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        params = student.load(sharding.abstract(abstract, sharding.param_shardings(abstract, mesh)))
    assert set(params) == {"img", "llm", "exits"}


def test_only_stages_that_matter_are_asked_for(config_file):
    configs = config_lib.stages_from_file(config_file)
    assert [c.stage for c in stages.needed(configs)] == ["teacher", "mentor", "student"]
    no_mentor = config_lib.stages_from_file(config_file, ["stages.student.distill.phi=0"])
    assert [c.stage for c in stages.needed(no_mentor)] == ["teacher", "student"]
    # The teacher of a mentor that teaches, though the student does not look at it.
    no_teacher = config_lib.stages_from_file(config_file, ["stages.student.distill.psi=0"])
    assert [c.stage for c in stages.needed(no_teacher)] == ["teacher", "mentor", "student"]
    nobody = config_lib.stages_from_file(config_file, ["distill.phi=0", "distill.psi=0"])
    assert [c.stage for c in stages.needed(nobody)] == ["student"]


def test_a_stage_must_be_described(config_file):
    with pytest.raises(UserError, match="stage='tutor'"):
        config_lib.stages_from_file(config_file, ["stage=tutor"])
