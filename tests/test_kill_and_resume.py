"""The script that kills a run and compares its end, on the smallest run."""

import contextlib
import io
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest

from deevisum_jax.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, UserError
from scripts import kill_and_resume

CONFIG = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny.py")


# Stands for the training program: makes the files that the script looks at, a step in 20 ms.
STAND_IN = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--workdir") + 1])
steps = folder / "checkpoints"
steps.mkdir(parents=True, exist_ok=True)
(folder / "pid").write_text(str(os.getpid()))
time.sleep(float(os.environ.get("STARTS_S", "0")))
first = max([int(path.name) for path in steps.iterdir() if path.name.isdigit()], default=0)
log = folder / "metrics.jsonl"
log.with_suffix(".new").write_text(json.dumps({"step": first}) + chr(10))
log.with_suffix(".new").rename(log)
for path in steps.glob("*tmp*"):
    path.rmdir()
if "FAILS" in os.environ:
    sys.exit("no room for it")
for step in range(first + 1, int(os.environ["STEPS"]) + 1):
    time.sleep(0.02)
    with log.open("a") as file:
        file.write(json.dumps({"step": step}) + chr(10))
    if step % 5 == 0:
        half = steps / f"{step}.orbax-checkpoint-tmp"
        half.mkdir()
        time.sleep(0.2)
        half.rename(steps / str(step))
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """The folder of a run of 1000 steps of the stand-in."""
    monkeypatch.setattr(kill_and_resume, "PROGRAM", (sys.executable, "-c", STAND_IN))
    monkeypatch.setattr(kill_and_resume, "differences", lambda *_: [])
    monkeypatch.setenv("STEPS", "1000")
    return tmp_path / "run"


@pytest.fixture(scope="module")
def ended(data_dir, tmp_path_factory):
    """A run that was killed twice, and one that was not."""
    out = tmp_path_factory.mktemp("kills") / "out"
    fields = ["total_steps=16", "optim.warmup_steps=2", f"data.data_dir={data_dir}"]
    fields += ["checkpoint.every_steps=2", "eval.every_steps=16"]
    argv = ["--config", CONFIG, "--out", str(out), "--kills", "2", "--seed", "1"]
    argv += [f"--config.{field}" for field in fields]
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.redirect_stdout(io.StringIO()) as said,
    ):
        patch.delenv("XLA_FLAGS")  # eight devices take longer, and are no part of this
        patch.setattr(kill_and_resume, "KINDS", {"saving": 1, "training": 0, "starting": 0})
        status = kill_and_resume.main(argv)
    return types.SimpleNamespace(status=status, said=said.getvalue().splitlines(), out=out)


def test_a_run_that_was_killed_ends_as_one_that_was_not(ended):
    assert ended.status == 0
    assert ended.said[-1].startswith("equal to the bit after 2 kills (")
    assert ended.said[-1].endswith("): all that step 16 holds, log, report")
    assert [line.split()[0] for line in ended.said[2:4]] == ["1", "2"]
    assert {line.split()[1] for line in ended.said[2:4]} <= {"saving", "training"}


def test_a_start_is_killed_only_after_steps_of_its_own(stand_in):
    kill = lambda: kill_and_resume.kill(stand_in, [], "training", 7, random.Random(0))
    assert kill() in ("training", "saving")
    first = kill_and_resume.newest_step(stand_in)
    assert kill_and_resume.logged_step(stand_in) >= 7
    # The log of the start before is long enough already.
    assert kill() in ("training", "saving")
    assert kill_and_resume.logged_step(stand_in) >= first + 7


def test_a_kill_during_a_save_leaves_a_step_of_that_start_half_written(stand_in):
    kill = lambda: kill_and_resume.kill(stand_in, [], "saving", 1, random.Random(0))
    assert kill() == "saving"
    assert kill_and_resume.half_written(stand_in) == {"5.orbax-checkpoint-tmp"}
    (stand_in / "checkpoints" / "5").mkdir()
    # What is there half-written is of the start before.
    assert kill() == "saving"
    assert kill_and_resume.half_written(stand_in) == {"10.orbax-checkpoint-tmp"}


def test_a_kill_before_any_update_is_no_kill_during_a_save(stand_in, monkeypatch):
    monkeypatch.setenv("STARTS_S", "60")
    (stand_in / "checkpoints" / "5.orbax-checkpoint-tmp").mkdir(parents=True)
    soon = types.SimpleNamespace(uniform=lambda *_: 0.5)
    assert kill_and_resume.kill(stand_in, [], "starting", 0, soon) == "starting"
    assert kill_and_resume.half_written(stand_in) == {"5.orbax-checkpoint-tmp"}


def test_a_program_that_fails_by_itself_was_not_killed(stand_in, monkeypatch):
    monkeypatch.setenv("FAILS", "yes")
    with pytest.raises(UserError, match=r"by itself with status 1; .*run.log ends with:\nno room"):
        kill_and_resume.kill(stand_in, [], "training", 7, random.Random(0))


def test_a_run_that_ended_is_not_killed_and_not_equal_after_all_kills(
    stand_in, monkeypatch, capsys
):
    monkeypatch.setenv("STEPS", "5")
    monkeypatch.setattr(kill_and_resume, "KINDS", {"starting": 0, "saving": 0, "training": 1})
    # Far enough to be over before the kill.
    monkeypatch.setattr(random.Random, "uniform", lambda self, low, high: 9)
    out = stand_in.parent / "out"
    assert kill_and_resume.main(["--out", str(out), "--kills", "3"]) == EXIT_USER_ERROR
    said = capsys.readouterr()
    assert "equal to the bit after 0 kills" in said.out
    assert "the run ended after 0 of 3 kills; make it longer" in said.err


def test_what_is_not_equal_has_a_status_of_its_own(stand_in, monkeypatch, capsys):
    monkeypatch.setenv("STEPS", "5")
    monkeypatch.setattr(kill_and_resume, "differences", lambda *_: ["params: a, 1 bytes"])
    out = stand_in.parent / "out"
    assert kill_and_resume.main(["--out", str(out), "--kills", "0"]) == 3
    assert capsys.readouterr().out.endswith(
        "differs: params: a, 1 bytes\nnot equal after 0 kills (0 training, 0 saving, 0 starting)\n"
    )


def test_a_folder_that_is_there_is_refused(tmp_path, capsys):
    assert kill_and_resume.main(["--out", str(tmp_path)]) == EXIT_USER_ERROR
    assert (
        capsys.readouterr().err == f"error: --out {tmp_path} is there already; give a new folder\n"
    )


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_the_training_program_ends_with_the_script(tmp_path, how):
    path = pathlib.Path(kill_and_resume.__file__)
    # The script as it is, but for the program.
    text = path.read_text().replace(
        '(sys.executable, "-m", "deevisum_jax.main")', repr((sys.executable, "-c", STAND_IN))
    )
    copy = tmp_path / "kill_and_resume.py"
    copy.write_text(text)
    pid_file = tmp_path / "out" / "reference" / "pid"
    script = subprocess.Popen(
        [sys.executable, str(copy), "--out", str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(path.parent.parent), "STARTS_S": "600", "STEPS": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while not (pid_file.exists() and pid_file.read_text()):
            assert time.monotonic() < until
            assert script.poll() is None
            time.sleep(0.05)
        script.send_signal(how)
        assert script.wait(30) == EXIT_INTERRUPTED
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid_file.read_text()), 0)
    finally:
        script.kill()
        script.wait()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            os.kill(int(pid_file.read_text()), signal.SIGKILL)


def test_what_differs_is_named(ended, tmp_path):
    shutil.copytree(ended.out / "killed", tmp_path / "killed")
    log = tmp_path / "killed" / "metrics.jsonl"
    log.write_text(log.read_text().replace('"step": 3', '"step": 4'))
    other = tmp_path / "killed" / "checkpoints" / "16"
    shutil.rmtree(other / "params")
    shutil.copytree(tmp_path / "killed" / "checkpoints" / "14" / "params", other / "params")
    found = kill_and_resume.differences(ended.out / "reference", tmp_path / "killed", 16)
    assert found[-1] == "metrics.jsonl"
    assert any(line.startswith("params: llm/final_norm/scale, ") for line in found)
    assert not any(line.startswith("train_state") for line in found)


def test_a_number_that_is_none_is_equal_to_itself():
    values = np.array([np.nan, 0.0, -0.0], np.float32)
    assert np.array_equal(kill_and_resume.bits(values), kill_and_resume.bits(values.copy()))
    assert not np.array_equal(kill_and_resume.bits(values[1]), kill_and_resume.bits(values[2]))
