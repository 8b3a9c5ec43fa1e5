"""The training program end to end: on many devices and on one, killed and resumed, misused.

All runs here are the one of configs/tiny.py: six updates, saved every second one, validated
after the fourth and the last.
"""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from etils import epath

from deevisum_jax import (
    checkpoints,
    datasets,
    main,
    preemption,
    sharding,
    summarize,
    training_log,
)
from deevisum_jax import config as config_lib
from deevisum_jax.data import tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.models import paligemma2
from deevisum_jax.summary import folds
from tests.media import solid_frames, write_video
from tests.training_runs import killed_at, lines
from tfds_builders import records

REPO = pathlib.Path(__file__).parent.parent
CONFIG = str(REPO / "configs" / "tiny.py")
MESH = [f"--config.mesh.{axis}=2" for axis in sharding.MESH_AXES]


@pytest.fixture(autouse=True)
def handler_as_before():
    """A process that was told to stop ignores what is told it later."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def command(data_dir):
    """Runs the program in `workdir`; returns its exit status."""

    def run(workdir: pathlib.Path, *flags: str) -> int:
        data = f"--config.data.data_dir={data_dir}"
        return main.main(["--config", CONFIG, "--workdir", str(workdir), data, *MESH, *flags])

    return run


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory) -> pathlib.Path:
    """The workdir of a run on a mesh of 2 x 2 x 2; not to be changed."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    assert command(workdir) == 0
    return workdir


def final_params(workdir: pathlib.Path, step: int = 6):
    config = config_lib.load(workdir / "config.json")
    with jax.set_mesh(sharding.make_mesh(**dataclasses.asdict(config.mesh))):
        run = main.Run(config, epath.Path(workdir), None, preemption.Notice())
        with checkpoints.Checkpoints(workdir / "checkpoints") as saved:
            return saved.restore_params(step, main._of_model(run.abstract))


def saved_steps(workdir: pathlib.Path) -> set[int]:
    return {int(path.name) for path in (workdir / "checkpoints").iterdir()}


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_run_leaves_what_it_promises(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json", "data.json", "tokenizer.model", "template.txt", "metrics.jsonl",
        "tensorboard", "checkpoints", "report.json", "report.html", "origin.json",
        "predictions.npz",
    }  # fmt: skip
    logged = lines(finished)
    assert [line["step"] for line in logged] == [1, 2, 3, 4, 4, 5, 6, 6]
    assert [line["step"] for line in logged if "validation/tau" in line] == [4, 6]
    losses = [line["loss/total"] for line in logged if "loss/total" in line]
    assert min(losses[3:]) < losses[0]  # it learns
    report = json.loads((finished / "report.json").read_text())
    assert set(report) >= {
        "f1", "tau", "rho", "f1_early_exit", "tau_early_exit", "avg_depth", "compute_saved",
        "wall_saved", "protocols",
    }  # fmt: skip
    assert set(report["left_out"]) == {"picture", "text", "sound"}
    assert 2 <= report["avg_depth"] <= 4
    page = (finished / "report.html").read_text()
    assert "early_exit" in page
    assert "loss/total" in page


def test_a_runs_predictions_are_evaluated_as_anybodys(finished, command, tmp_path):
    predictions = ("--mode", "evaluate", "--predictions", str(finished / "predictions.npz"))
    assert command(tmp_path / "table", *predictions) == 0
    report = json.loads((finished / "report.json").read_text())
    table = json.loads((tmp_path / "table" / "evaluation.json").read_text())
    for row, other in (("predictions.npz", "exit_4"), ("human", "human"), ("time", "time")):
        for metric in ("f1", "tau", "rho"):
            found = table["rows"][row][metric]["mean"]
            assert found == pytest.approx(report["rows"][other][metric]), (row, metric)


class OnePiece(datasets.Dataset):
    """The same videos without splits of their own, in two folds."""

    in_one_piece = True

    def __init__(self, data):
        super().__init__(dataclasses.replace(data, folds=""))
        splits = (records.read(self._builder, name) for name in ("train", "validation", "test"))
        self._records = [record for split in splits for record in split]
        self.folds = folds.partition(self.video_ids, data.folds_seed, 2)
        fold = self.folds[data.fold]
        self._videos = {"train": fold.train[1:], "validation": fold.train[:1], "test": fold.test}

    @property
    def video_ids(self):
        return tuple(record["video_id"] for record in self._records)

    def records(self):
        return self._records

    def split(self, name):
        return [record for record in self._records if record["video_id"] in self._videos[name]]


def test_a_folds_numbers_are_the_same_from_the_run_and_from_its_predictions(
    command, tmp_path, monkeypatch
):
    monkeypatch.setattr(datasets, "Dataset", OnePiece)
    fold = ("--config.data.folds=partition", "--config.data.fold=1", "--config.total_steps=1")
    fold += ("--config.optim.warmup_steps=0", "--config.eval.ablate_inputs=False")
    assert command(tmp_path / "run", *fold) == 0
    predictions = str(tmp_path / "run" / "predictions.npz")
    assert command(tmp_path / "table", *fold, "--mode=evaluate", "--predictions", predictions) == 0
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    table = json.loads((tmp_path / "table" / "evaluation.json").read_text())
    assert table["per_video"].keys() == report["per_video"].keys()
    for row, other in (("predictions.npz", "exit_4"), ("human", "human"), ("time", "time")):
        for metric in ("f1", "tau", "rho"):
            found = table["rows"][row][metric]["mean"]
            assert found == pytest.approx(report["rows"][other][metric]), (row, metric)


def test_what_is_validated_is_saved_and_the_best_of_it_kept(command, tmp_path, monkeypatch):
    taus = iter([0.9, 0.1])  # at steps 3 and 6; saved are 3 and 4 and 6
    monkeypatch.setattr(main.Run, "_validate", lambda *_, **__: {"tau": next(taus)})
    flags = ("eval.every_steps=3", "checkpoint.every_steps=4", "checkpoint.keep=1")
    flags = (*flags, "eval.ablate_inputs=False")
    assert command(tmp_path / "run", *(f"--config.{flag}" for flag in flags)) == 0
    assert saved_steps(tmp_path / "run") == {3, 6}
    assert json.loads((tmp_path / "run" / "report.json").read_text())["steps"] == 3


def test_one_device_gives_the_same_losses(finished, command, tmp_path, monkeypatch):
    one = functools.partial(sharding.make_mesh, devices=jax.devices()[:1])
    monkeypatch.setattr(sharding, "make_mesh", one)
    flags = [f"--config.mesh.{axis}=1" for axis in sharding.MESH_AXES]
    assert command(tmp_path / "run", *flags) == 0
    found, expected = lines(tmp_path / "run"), lines(finished)
    assert [line.keys() for line in found] == [line.keys() for line in expected]
    for line, other in zip(found, expected, strict=True):
        for name, value in line.items():
            if name.startswith("loss/"):
                assert value == pytest.approx(other[name], abs=1e-4), (line["step"], name)


def test_a_killed_run_goes_on_to_the_same_numbers_to_the_bit(finished, command, tmp_path):
    workdir = tmp_path / "run"
    with killed_at(5):
        command(workdir)
    assert saved_steps(workdir) == {2, 4}
    # Had the kill come later, in the middle of a line:
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss/total": 0.0}\n{"step": 6, "loss/to')
    assert command(workdir) == 0
    assert lines(workdir) == lines(finished)
    jax.tree.map(np.testing.assert_array_equal, final_params(workdir), final_params(finished))
    assert json.loads((workdir / "report.json").read_text()) == json.loads(
        (finished / "report.json").read_text()
    )


@pytest.fixture
def tell_at(monkeypatch):
    """A preemption notice comes when the update of this step is done."""

    def arm(step: int) -> None:
        advance = training_log.TrainingLog.advance

        def told(self):
            advance(self)
            if self._bar.n == step:
                signal.raise_signal(signal.SIGTERM)

        monkeypatch.setattr(training_log.TrainingLog, "advance", told)

    yield arm
    monkeypatch.undo()


def test_a_run_that_gets_a_notice_goes_on_to_the_same_numbers(
    finished, command, tell_at, tmp_path, monkeypatch, capfd
):
    workdir = tmp_path / "run"
    tell_at(2)  # which is saved; the notice is heeded at the next
    assert command(workdir) == 75
    assert capfd.readouterr().err.splitlines()[-1] == (
        "stopped by a preemption notice: step 3 of 6 is done and saved; the same command again "
        "goes on"
    )
    assert saved_steps(workdir) == {2, 3}
    monkeypatch.undo()
    assert command(workdir) == 0
    assert lines(workdir) == lines(finished)
    jax.tree.map(np.testing.assert_array_equal, final_params(workdir), final_params(finished))
    assert (workdir / "report.json").read_text() == (finished / "report.json").read_text()


def test_a_notice_while_it_validates_loses_neither_the_step_nor_its_scores(
    finished, command, tmp_path, monkeypatch, capfd
):
    workdir, validate = tmp_path / "run", main.Run._validate

    def told(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return validate(*args, **kwargs)

    monkeypatch.setattr(main.Run, "_validate", told)
    assert command(workdir) == 75
    assert "step 4 of 6 is done and saved" in capfd.readouterr().err
    assert not any("validation/tau" in line for line in lines(workdir))
    monkeypatch.undo()
    assert command(workdir) == 0
    assert lines(workdir) == lines(finished)
    assert (workdir / "report.json").read_text() == (finished / "report.json").read_text()


def test_a_notice_in_the_final_evaluation_leaves_it_to_the_next_start(
    finished, command, tmp_path, monkeypatch, capfd
):
    workdir, predict = tmp_path / "run", main.Run._predict
    shutil.copytree(finished, workdir)
    (workdir / "report.json").unlink()

    def told(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return predict(*args, **kwargs)

    monkeypatch.setattr(main.Run, "_predict", told)
    assert command(workdir) == 75
    assert "all that is trained is saved, and not evaluated yet" in capfd.readouterr().err
    assert not (workdir / "report.json").exists()


def test_a_notice_while_data_is_built_is_heeded_at_once_and_leaves_nothing_half_done(
    command, tmp_path, monkeypatch, capfd
):
    train = tokenizer.train_tokenizer

    def told(texts, path, **kwargs):
        def some():
            yield "text"
            signal.raise_signal(signal.SIGTERM)

        return train(some(), path, **kwargs)

    monkeypatch.setattr(tokenizer, "train_tokenizer", told)
    assert command(tmp_path / "run") == 75
    assert "there was nothing to save" in capfd.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "template.txt"}


def test_a_process_that_dies_while_it_saves_goes_on_to_the_same_numbers(
    finished, command, data_dir, tmp_path
):
    workdir = tmp_path / "run"
    script = (
        "import os, sys\n"
        "from deevisum_jax import checkpoints, main\n"
        "save = checkpoints.Checkpoints.save\n"
        "def save_and_die(self, step, *rest):\n"
        "    save(self, step, *rest)\n"
        "    if step == 4:\n"
        "        os._exit(137)\n"
        "checkpoints.Checkpoints.save = save_and_die\n"
        "main.main(sys.argv[1:])\n"
    )
    data = f"--config.data.data_dir={data_dir}"
    killed = subprocess.run(
        [sys.executable, "-c", script, "--config", CONFIG, "--workdir", workdir, data, *MESH],
        env=os.environ
        | {
            "PYTHONPATH": str(REPO),
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        check=False,
    )
    assert killed.returncode == 137
    assert (workdir / "checkpoints" / "2").is_dir()
    assert not (workdir / "report.json").exists()
    assert command(workdir) == 0
    assert lines(workdir) == lines(finished)
    assert json.loads((workdir / "report.json").read_text()) == json.loads(
        (finished / "report.json").read_text()
    )


def test_a_finished_run_is_evaluated_again_and_not_trained(finished, command, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    before = contents(workdir / "checkpoints") | {"log": (workdir / "metrics.jsonl").read_bytes()}
    assert command(workdir, "--config.eval.ablate_inputs=False") == 0
    assert "early_exit" in capsys.readouterr().out
    after = contents(workdir / "checkpoints") | {"log": (workdir / "metrics.jsonl").read_bytes()}
    assert after == before
    report = json.loads((workdir / "report.json").read_text())
    assert report["left_out"] == {}
    expected = json.loads((finished / "report.json").read_text())
    assert report | {"left_out": 0} == expected | {"left_out": 0}


CALIBRATE = (
    "--mode=calibrate", "--config.eval.ablate_inputs=False", "--config.calibration.rounds=2",
    "--config.calibration.dataset=synthetic/tiny_calibration",
    "--config.calibration.split=calibration",
)  # fmt: skip


def test_calibrating_keeps_thresholds_promise_and_curve_with_the_run(
    finished, command, tmp_path, capsys
):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    before = contents(workdir)
    loose = ("--config.calibration.f1=0.9", "--config.calibration.tau=1.9")
    assert command(workdir, *CALIBRATE, *loose, "--config.calibration.delta=0.4") == 0
    calibration = json.loads((workdir / "calibration.json").read_text())
    assert (calibration["num_search"], calibration["num_test"]) == (2, 4)
    assert calibration["promise"]["epsilons"] == {"f1": 0.9, "tau": 1.9}
    # Almost anything may be lost: everybody leaves at the first of two exits.
    assert calibration["chosen"] == len(calibration["curve"]) - 1 > 0
    assert calibration["curve"][-1]["exit_rate"] == [1.0, 0.0]
    assert len(calibration["speed"]["saved"]) == len(calibration["curve"])
    report = json.loads((workdir / "report.json").read_text())
    assert report["exit_policy"] == calibration["policy"]
    assert report["avg_depth"] == 2.0
    assert report["rows"]["early_exit"] == report["rows"]["exit_2"]
    assert isinstance(report["wall_saved"], float)
    assert calibration["text"] in capsys.readouterr().out
    assert "What leaving early saves" in (workdir / "report.html").read_text()
    # Nothing that is trained is touched; evaluating again finds the same thresholds.
    after = contents(workdir)
    changed = {pathlib.Path(path).name for path in after if after[path] != before.get(path)}
    assert changed == {"calibration.json", "report.json", "report.html"}
    assert command(workdir, "--mode", "evaluate", "--config.eval.ablate_inputs=False") == 0
    assert json.loads((workdir / "report.json").read_text()) == report


def test_too_few_videos_for_a_promise_are_counted_before_anything_is_written(
    finished, command, tmp_path, capfd
):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    before = contents(workdir)
    assert command(workdir, *CALIBRATE) == 2
    said = capfd.readouterr().err
    # ln(1 / 0.1) / ln(1 + 0.95 * 0.01 / 1.99) = 483.6 of tau; of F1 as many.
    assert "even if nothing were lost it takes 484" in said
    assert "646 in all with a search share of 0.25" in said
    assert contents(workdir) == before


@pytest.mark.parametrize("split", ["train", "test"])
def test_videos_that_train_or_test_the_model_do_not_calibrate_it(command, tmp_path, split, capfd):
    flags = ("--mode=calibrate", f"--config.calibration.split={split}")
    assert command(tmp_path / "run", *flags) == 2
    assert f"split '{split}' of synthetic/tiny is what the model is" in capfd.readouterr().err


def test_a_run_that_is_not_finished_is_not_calibrated(finished, command, tmp_path, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "report.json").unlink()
    assert command(workdir, *CALIBRATE) == 2
    assert "is not trained to its end" in capfd.readouterr().err


def test_a_calibration_of_other_weights_is_refused(finished, command, tmp_path, capfd):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    (workdir / "calibration.json").write_text('{"weights": "those of another run"}')
    assert command(workdir, "--mode", "evaluate") == 2
    said = capfd.readouterr().err
    assert "is of other weights than the best checkpoint beside it" in said
    assert "--mode calibrate" in said


def test_evaluation_alone(finished, command, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    before = contents(workdir)
    flags = ["--config.eval.ablate_inputs=False", "--config.eval.exit_threshold=0.5"]
    assert command(workdir, "--mode", "evaluate", *flags) == 0
    after = contents(workdir)
    assert after.keys() == before.keys()
    changed = {pathlib.Path(path).name for path in after if after[path] != before[path]}
    assert changed == {"report.json", "report.html"}
    report = json.loads((workdir / "report.json").read_text())
    assert report["avg_depth"] == 2.0  # every segment is sure enough at the first exit
    assert report["tau_early_exit"] == report["rows"]["exit_2"]["tau"]


def test_a_run_that_merges_frames_goes_on_after_a_kill_and_summarizes(command, tmp_path):
    workdir, film = tmp_path / "run", tmp_path / "slides.mkv"
    merge = [
        f"--config.{field}"
        for field in (
            "data.num_frames=3",
            "model.merge.num_keyframes=1",
            "model.merge.projections=True",
            "eval.ablate_inputs=False",
        )
    ]
    with killed_at(3):
        command(workdir, *merge)
    before = final_params(workdir, 2)["merge"]
    assert command(workdir, *merge) == 0
    learned = final_params(workdir)["merge"]
    assert all(
        np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (before, learned)), strict=True)
    )
    assert "f1" in json.loads((workdir / "report.json").read_text())
    write_video(film, solid_frames([0, 200, 90]), times_s=[0, 5, 10])
    out = tmp_path / "out"
    given = [str(film), "--checkpoint", str(workdir), "--out", str(out), "--budget", "0.5"]
    assert summarize.main(given) == 0
    assert (out / "summary.json").exists()


def test_a_run_can_start_from_the_parameters_of_another(finished, command, tmp_path):
    workdir = tmp_path / "run"
    with killed_at(2):
        command(workdir, f"--config.initialization={finished}")
    [first] = lines(workdir)
    best = json.loads((finished / "report.json").read_text())["steps"]
    # The first update of the warm-up has rate 0: the parameters are still the other run's.
    expected = optax.tree.norm(final_params(finished, best))
    assert first["param_norm"] == pytest.approx(float(expected), rel=1e-6)
    assert first["param_norm"] != pytest.approx(lines(finished)[0]["param_norm"], rel=1e-6)
    assert (workdir / "tokenizer.model").read_bytes() == (finished / "tokenizer.model").read_bytes()


def test_numbers_that_are_not_finite_are_never_saved_and_their_batch_is_told(
    command, tmp_path, monkeypatch, capfd
):
    place, placed = sharding.place_batch, []

    def poisoned(fields, mesh):
        placed.append(fields)
        return place(
            fields | {"score": fields["score"] * np.nan} if len(placed) > 2 else fields, mesh
        )

    monkeypatch.setattr(sharding, "place_batch", poisoned)
    workdir = tmp_path / "run"
    assert command(workdir, "--config.log_every=100") == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ")
    assert "loss/total" in last
    assert "not finite at step 3, the first" in last
    assert saved_steps(workdir) == {2}
    told = json.loads((workdir / "nonfinite.json").read_text())
    assert told["step"] == 3
    assert told["metrics"]["loss/total"] == "nan"
    assert told["metrics"]["loss/token"] > 0
    records = datasets.Dataset(config_lib.load(workdir / "config.json").data).split("train")
    for row, video, segment in zip(
        told["batch"], placed[2]["video_id"], placed[2]["segment"], strict=True
    ):
        assert row["video_id"] == records[int(video)]["video_id"]
        assert row["segment"] == segment
        assert row["start_s"] == 2 * segment


def test_a_run_never_begins_from_scratch_where_it_was_to_begin_elsewhere(finished):
    config = config_lib.load(finished / "config.json")
    config = dataclasses.replace(config, initialization="another")
    with jax.set_mesh(sharding.make_mesh(**dataclasses.asdict(config.mesh))):
        run = main.Run(config, epath.Path(finished), None, preemption.Notice())
        with pytest.raises(UserError, match="holds no complete checkpoint to go on from; delete"):
            run._first_state()


def refused(capfd, status: int) -> str:
    """Checks that a command ended on a message and no traceback, and returns it."""
    captured = capfd.readouterr()
    assert status == 2
    assert captured.out == ""
    first, *listed = captured.err.splitlines()
    assert first.startswith("error: ")
    # Below it stands nothing but what it lists.
    assert all(line.startswith("  ") for line in listed)
    assert not listed or first.endswith(":")
    return captured.err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["batch_size=6"], "batch_size / optim.accumulate_steps=6 is not divisible by the mesh's"),
        (["optim.accumulate_steps=4"], "accumulate_steps=2 is not divisible by the mesh's data x"),
        (["batch_size=7", "optim.accumulate_steps=2"], "batch_size=7 is not divisible by optim."),
        (["eval.batch_size=6"], "eval.batch_size=6 is not divisible"),
        (["batch_size=32"], "batch_size=32 exceeds the 17 segments"),
        (["mesh.data=3"], "do not multiply to the number of devices, 8"),
        (["mesh.fsdp=1", "mesh.data=1", "mesh.tensor=8"], "does not divide these parameters"),
        (["model.exit_layers=(2, 3)"], "must end with the depth of tiny, 4"),
        (["model.exit_layers=(2, 7)"], "out of range: [7]"),
        (["model.exit_layers=(4, 2)"], "strictly increasing"),
        (["model.variant=tnny"], "did you mean 'tiny'"),
        (["data.text_len=9"], "data.text_len=9 cannot hold the empty prompt"),
        (["data.vocab_size=10"], "raise data.vocab_size"),
        (["data.template=deevisun"], "did you mean 'deevisum'"),
        (["data.dataset=synthetic/tinny"], "did you mean 'tiny'"),
        (["data.dataset=sinthetic/tiny"], "did you mean 'synthetic'"),
        (["data.left_out=('images',)"], "data.left_out names 'images'"),
        (["eval.test_split=tset"], "has no split 'tset'; did you mean 'test'"),
        (["optim.frozen=('image/.*',)"], "matches no parameter"),
        (["optim.learning_rat=1"], "did you mean 'learning_rate'"),
        (["initialization=elsewhere"], "there is no such file or folder"),
    ],
)
def test_mistakes_are_a_message_and_status_2_and_can_be_mended(
    command, tmp_path, capfd, flags, message
):
    workdir = tmp_path / "run"
    status = command(workdir, *(f"--config.{flag}" for flag in flags))
    assert message in refused(capfd, status)
    assert not (workdir / "metrics.jsonl").exists()
    assert not (workdir / "report.json").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["model.variant=tnny"], "did you mean 'tiny'"),
        (["model.exit_layers=(2, 7)"], "out of range: [7]"),
        (["mesh.fsdp=1", "mesh.data=1", "mesh.tensor=8"], "does not divide these parameters"),
        (["optim.frozen=('image/.*',)"], "matches no parameter"),
        (["data.template=deevisun"], "did you mean 'deevisum'"),
        (["data.tokenizer=absent.model"], "tokenizer absent.model is not a file"),
        (["initialization=elsewhere"], "there is no such file or folder"),
    ],
)
def test_mistakes_that_need_no_data_are_found_before_it_is_built(
    command, tmp_path, capfd, flags, message
):
    flags = (f"data.data_dir={tmp_path / 'data'}", *flags)
    status = command(tmp_path / "run", *(f"--config.{flag}" for flag in flags))
    assert message in refused(capfd, status)
    assert not (tmp_path / "data").exists()


def test_a_data_folder_that_cannot_be_written(tmp_path, capfd):
    (tmp_path / "file").touch()
    flag = f"--config.data.data_dir={tmp_path / 'file' / 'below'}"
    status = main.main(["--config", CONFIG, "--workdir", str(tmp_path / "run"), flag])
    captured = capfd.readouterr()  # TFDS has told what it is about to build
    assert status == 2
    assert captured.err.splitlines()[-1].startswith(
        "error: data set synthetic/tiny cannot be built"
    )


def test_a_run_of_another_config_is_left_alone(finished, command, capfd):
    before = contents(finished)
    for mode in ("train", "evaluate"):
        line = refused(capfd, command(finished, "--mode", mode, "--config.seed=1"))
        assert "holds a run of another config" in line
        assert "seed: 0 -> 1" in line
    assert contents(finished) == before


def test_folders_that_are_not_for_us(command, tmp_path, capfd):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").write_text("text")
    assert "holds no run of ours" in refused(capfd, command(tmp_path / "theirs"))
    assert "cannot be written" in refused(capfd, command(tmp_path / "theirs" / "file" / "run"))
    status = command(tmp_path / "nothing", "--mode", "evaluate")
    assert "holds no run to evaluate" in refused(capfd, status)
    assert [path.name for path in tmp_path.rglob("*")] == ["theirs", "file"]


def test_a_run_of_another_width_is_nothing_to_start_from(
    finished, command, tmp_path, monkeypatch, capfd
):
    before = contents(finished)
    wider = paligemma2.get_config("tiny", llm={"mlp_dim": 128})
    monkeypatch.setitem(paligemma2.VARIANTS, "wider", wider)
    flags = (f"--config.initialization={finished}", "--config.model.variant=wider")
    status = command(tmp_path / "run", *flags)
    line = refused(capfd, status)
    assert "is a tiny, not model.variant=wider" in line
    assert contents(finished) == before
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_flags_of_no_meaning_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as caught:
        main.main(["--config", CONFIG, "--workdir", str(tmp_path / "run"), "--sead=1"])
    assert caught.value.code == 2
    assert "unrecognized arguments: --sead=1" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_from_the_shell(tmp_path):
    shell = subprocess.run(
        [sys.executable, "-m", "deevisum_jax.main", "--config", "missing.py", "--workdir", "run"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(REPO)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert shell.returncode == 2
    assert shell.stdout == ""
    assert shell.stderr == (
        "error: config file missing.py does not exist; give a file such as configs/quickstart.py\n"
    )
    assert not list(tmp_path.iterdir())
