"""The ablation runner: which runs it starts, what it does not run again, and its numbers.

A stand-in for the training program leaves the files that the script looks at. What it reports
follows from the config: tau is phi plus a tenth of psi plus a thousandth of the seed.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from etils import epath
from scipy import stats

from deevisum_jax import config as config_lib
from deevisum_jax import runs, stages
from deevisum_jax.errors import EXIT_PREEMPTED, EXIT_USER_ERROR
from scripts import ablate

REPO = pathlib.Path(__file__).resolve().parent.parent
THREE_STAGES = """
import ml_collections
def get_config():
    return ml_collections.ConfigDict({
        "initialization": "from_scratch", "seed": 7, "total_steps": 3, "batch_size": 8,
        "data": {"dataset": "synthetic/tiny", "text_len": 48, "num_frames": 1, "vocab_size": 400},
        "model": {"variant": "tiny", "exit_layers": (2, 4)},
        "optim": {"learning_rate": 1e-2},
        "mesh": {"data": -1, "fsdp": 1},
        "eval": {"batch_size": 8},
        "stages": {
            "teacher": {"total_steps": 4},
            "mentor": {"distill": {"phi": 0.5}},
            "student": {"distill": {"phi": 0.3, "psi": 0.2}},
        },
    })
"""
ARMS = ["--arm", "none: distill.phi=0 distill.psi=0", "--arm", "KD: distill.phi=0"]
ARMS += ["--arm", "MSKD:"]


class Program:
    """Stands in for the training program: over at once."""

    def __init__(self):
        self.commands = []
        self.fails = {}  # exit status by what the command contains
        self.videos = 4

    def __call__(self, command, *, stdout, **_):
        flags = command[len(ablate.PROGRAM) :]
        self.commands.append(flags)
        file, workdir, mode = (flag.split("=", 1)[1] for flag in flags[:3])
        config = config_lib.from_file(file, [flag.removeprefix("--config.") for flag in flags[3:]])
        status = next((s for text, s in self.fails.items() if text in " ".join(flags)), 0)
        home = stages.folder_of(config, epath.Path(workdir))
        if mode == "cache_teacher":
            assert (home / "report.json").exists()
        elif not status:
            folder = epath.Path(config.distill.folder or workdir)
            assert all((folder / name / "report.json").exists() for name in config.teachers)
            home.mkdir(parents=True, exist_ok=True)
            # What the config leaves open, the program settles.
            config = runs.with_settings(config, runs.settings_of(config))
            config_lib.save(config, home / "config.json")
            (home / "report.json").write_text(json.dumps(self.report(config)))
        return Over(status)

    def report(self, config):
        tau = config.distill.phi + config.distill.psi / 10 + config.seed / 1000
        # Videos differ by 0.1 from each other, and lie around the mean.
        middle = (self.videos - 1) / 2
        per_video = {
            f"v{k}": {"tau": tau + (k - middle) / 10, "rho": 0.5, "f1": tau / 2}
            for k in range(self.videos)
        }
        return {"tau": tau, "rho": 0.5, "f1": tau / 2, "per_video": per_video, "steps": 3}

    def told(self, text):
        """The commands that contain `text`."""
        return [" ".join(flags) for flags in self.commands if text in " ".join(flags)]


class Over:
    """A process that has ended."""

    def __init__(self, status):
        self.status = status

    def wait(self):
        return self.status


@pytest.fixture
def program(monkeypatch):
    found = Program()
    monkeypatch.setattr(ablate.subprocess, "Popen", found)
    return found


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "stages.py"
    path.write_text(THREE_STAGES)
    return path


@pytest.fixture
def run(program, file, tmp_path):
    """Runs the script; returns its status."""

    def start(*flags):
        program.commands.clear()
        return ablate.main(["--config", str(file), "--out", str(tmp_path / "out"), *flags])

    return start


@pytest.fixture
def found(tmp_path):
    """Reads what the script has written."""
    return lambda: json.loads((tmp_path / "out" / "ablation.json").read_text())


# ---- Which runs ----


def test_teachers_are_trained_once_and_before_all_students(run, program, file, tmp_path):
    assert run(*ARMS, "--seeds", "0:2", "--config.total_steps=5") == 0
    out = tmp_path / "out"
    teachers = out / "teachers"
    names = [flags[1].removeprefix(f"--workdir={out}/") for flags in program.commands]
    assert names == [
        "none/seed_0", "none/seed_1", "teachers", "KD/seed_0", "KD/seed_1", "teachers",
        "MSKD/seed_0", "MSKD/seed_1",
    ]  # fmt: skip
    assert program.commands[0] == [
        f"--config={file}", f"--workdir={out}/none/seed_0", "--mode=train",
        "--config.total_steps=5", "--config.stages.student.distill.phi=0",
        "--config.stages.student.distill.psi=0", "--config.stage=student", "--config.seed=0",
    ]  # fmt: skip
    assert program.commands[5:7] == [
        [
            f"--config={file}", f"--workdir={teachers}", "--mode=train", "--config.total_steps=5",
            "--config.stage=mentor",
        ],
        [
            f"--config={file}", f"--workdir={out}/MSKD/seed_0", "--mode=train",
            "--config.total_steps=5", "--config.stage=student",
            f"--config.distill.folder={teachers}", "--config.seed=0",
        ],
    ]  # fmt: skip


def test_teachers_of_an_arm_are_what_it_makes_them(run, program, tmp_path):
    arms = ["--arm", "all:", "--arm", 'no sound: data.left_out=("sound",)']
    assert run(*arms, "--seeds", "0", "--teachers", "per_arm") == 0
    folder = tmp_path / "out" / "per_arm" / "no_sound"
    config = runs.load_config(epath.Path(folder / "mentor"))
    assert (config.data.left_out, config.seed) == (("sound",), 7)
    assert [flags[1] for flags in program.commands[3:]] == [
        f"--workdir={folder}", f"--workdir={folder}", f"--workdir={folder}/seed_0",
    ]  # fmt: skip


def test_outputs_of_teachers_are_written_for_every_arm_that_reads_them(run, program):
    flags = [*ARMS, "--seeds", "0", "--config.distill.source=cache"]
    assert run(*flags) == 0
    what = [
        (of_run[-1].removeprefix("--config."), of_run[2].removeprefix("--mode="))
        for of_run in program.commands
    ]
    assert what == [
        ("seed=0", "train"),
        ("stage=teacher", "train"), ("stage=teacher", "cache_teacher"), ("seed=0", "train"),
        ("stage=teacher", "cache_teacher"),  # as MSKD asks, and before the mentor, who reads it
        ("stage=mentor", "train"), ("stage=mentor", "cache_teacher"), ("seed=0", "train"),
    ]  # fmt: skip
    assert "--config.stages.student.distill.phi=0" in program.commands[2]
    assert run(*flags) == 0
    assert program.commands == []


def test_a_grid_is_every_choice_of_values(run, found):
    grid = ["--grid", "distill.temperature=1,2", "--grid", "distill.direction=student_first"]
    assert run(*ARMS[:2], *grid, "--seeds", "1") == 0
    direction = "stages.student.distill.direction=student_first"
    assert {name: arm["overrides"] for name, arm in found()["arms"].items()} == {
        "none": ["stages.student.distill.phi=0", "stages.student.distill.psi=0"],
        "distill.temperature=1, distill.direction=student_first": [
            "stages.student.distill.temperature=1", direction,
        ],
        "distill.temperature=2, distill.direction=student_first": [
            "stages.student.distill.temperature=2", direction,
        ],
    }  # fmt: skip


def test_a_comma_within_brackets_does_not_end_a_value():
    assert ablate.grid(['data.left_out=(),("sound","text"),("text",)']) == [
        ("data.left_out=()", ("data.left_out=()",)),
        ('data.left_out=("sound","text")', ('data.left_out=("sound","text")',)),
        ('data.left_out=("text",)', ('data.left_out=("text",)',)),
    ]


def test_a_config_without_stages(run, program, file):
    text = THREE_STAGES.replace('"stages": {', '"unused": {')
    file.write_text(text[: text.index('"unused"')] + "})\n")
    arms = ["--arm", "full:", "--arm", "blind: data.left_out=('picture',)"]
    assert run(*arms, "--seeds", "0") == 0
    assert [flags[3:] for flags in program.commands] == [
        ["--config.seed=0"],
        ["--config.data.left_out=('picture',)", "--config.seed=0"],
    ]


# ---- The same command again ----


def test_what_is_finished_is_not_run_again_and_more_arms_and_seeds_add_to_it(run, program, found):
    assert run(*ARMS[:4], "--seeds", "0:2") == 0
    first = found()
    assert run(*ARMS[:4], "--seeds", "0:2") == 0
    assert (program.commands, found()) == ([], first)
    assert run(*ARMS, "--seeds", "0:3") == 0
    assert len(program.told("stage=mentor")) == 1
    assert len(program.told("stage=teacher")) == 0
    assert len(program.commands) == 1 + 2 + 3


def test_what_stopped_halfway_is_started_again(run, program, tmp_path):
    assert run(*ARMS[:2], "--seeds", "0:3") == 0
    (tmp_path / "out" / "none" / "seed_1" / "report.json").unlink()
    assert run(*ARMS[:2], "--seeds", "0:3") == 0
    assert [flags[-1] for flags in program.commands] == ["--config.seed=1"]


def test_only_another_way_to_evaluate_starts_a_finished_run_again(run, program):
    assert run(*ARMS[:2], "--seeds", "0") == 0
    assert run(*ARMS[:2], "--seeds", "0", "--config.log_every=9") == 0
    assert program.commands == []
    assert run(*ARMS[:2], "--seeds", "0", "--config.eval.budget=0.3") == 0
    assert len(program.commands) == 1


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--config.stages.teacher.batch_size=16", "/teachers/teacher holds the run of another "
         "config; give a new --out, or set back batch_size: 8 -> 16"),
        ("--config.stages.student.total_steps=9", "/KD/seed_0 holds the run of another config; "
         "give a new --out, or set back total_steps: 3 -> 9"),
    ],
)  # fmt: skip
def test_runs_of_another_config_are_left_alone(run, program, capsys, flag, said):
    assert run(*ARMS[2:4], "--seeds", "0") == 0
    assert run(*ARMS[2:4], "--seeds", "0:2", flag) == EXIT_USER_ERROR
    assert said in capsys.readouterr().err
    assert program.commands == []


# ---- What fails ----


def test_a_run_that_fails_ends_the_table_and_is_told(run, program, tmp_path, capsys):
    program.fails = {"KD/seed_1": 2}
    assert run(*ARMS, "--seeds", "0:2") == EXIT_USER_ERROR
    out = tmp_path / "out"
    said = capsys.readouterr().err.splitlines()
    names = [line.split(": ")[0] for line in said[:-1]]
    assert names == ["none, seed 0", "none, seed 1", "teacher", "KD, seed 0"]
    assert said[-1].startswith(f"error: KD, seed 1 ended with status 2; read {out}/KD/seed_1.log")
    assert (out / "KD" / "seed_1.log").exists()
    assert not (out / "ablation.json").exists()
    assert program.told("MSKD/") == []
    program.fails = {}
    assert run(*ARMS, "--seeds", "0:2") == 0
    assert [flags[1].partition("/out/")[2] for flags in program.commands] == [
        "KD/seed_1", "teachers", "MSKD/seed_0", "MSKD/seed_1",
    ]  # fmt: skip


def test_a_run_that_was_told_to_stop_stops_all(run, program, capsys):
    program.fails = {"KD/": EXIT_PREEMPTED}
    assert run(*ARMS, "--seeds", "0") == EXIT_PREEMPTED
    assert "KD, seed 0 was told to stop" in capsys.readouterr().err


SLEEPER = """
import pathlib, signal, sys, time
workdir = pathlib.Path(next(a for a in sys.argv if a.startswith("--workdir="))[10:])
def stop(*_):
    workdir.with_name(workdir.name + ".saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, stop)
workdir.with_name(workdir.name + ".begun").touch()
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("how", "status"), [(signal.SIGTERM, EXIT_PREEMPTED), (signal.SIGINT, 130)]
)
def test_the_run_under_way_saves_before_the_script_ends(file, tmp_path, how, status):
    text = pathlib.Path(ablate.__file__).read_text()
    copy = tmp_path / "ablate.py"
    program = '(sys.executable, "-m", "deevisum_jax.main")'
    assert text.count(program) == 1
    copy.write_text(text.replace(program, repr((sys.executable, "-c", SLEEPER))))
    home = tmp_path / "out" / "none"
    # A shell's background jobs ignore Ctrl-C, and what they start inherits that.
    begin = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    begin += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    script = subprocess.Popen(
        [sys.executable, "-c", begin, copy, "--config", file, "--out", tmp_path / "out", *ARMS[:2]],
        env=os.environ | {"PYTHONPATH": str(REPO)},
        stderr=subprocess.DEVNULL,
    )
    try:
        until = time.monotonic() + 60
        while not (home / "seed_0.begun").exists():
            assert time.monotonic() < until
            assert script.poll() is None
            time.sleep(0.05)
        script.send_signal(how)
        assert script.wait(60) == status
        left = sorted(path.name for path in home.iterdir())
        assert left == ["seed_0.begun", "seed_0.log", "seed_0.saved"]
    finally:
        script.terminate()
        script.wait()


# ---- Numbers ----


def test_the_numbers_of_the_table(run, found, tmp_path, capsys):
    assert run(*ARMS, "--seeds", "0:5", "--baseline", "none", "--baseline", "KD") == 0
    numbers = found()
    # tau: 0, 0.02 and 0.32, and up to 0.004 more by seed: 0.002 on average, sd sqrt(10 / 4) / 1000.
    mskd = numbers["arms"]["MSKD"]
    assert mskd["tau"] == pytest.approx({"mean": 0.322, "sd": 2.5**0.5 / 1000})
    assert mskd["f1"]["mean"] == pytest.approx(0.161)
    assert numbers["learned_from"]["teacher"]["tau"] == {"mean": 0.007}
    pairs = [(pair["arm"], pair["baseline"]) for pair in numbers["comparisons"]]
    assert pairs == [("KD", "none"), ("MSKD", "none"), ("MSKD", "KD")]
    over_videos = numbers["comparisons"][1]["tau"]["over_videos"]
    assert over_videos["difference"] == pytest.approx(0.32)
    # All four videos differ by the same: two of 16 sign flips are as far from 0.
    assert (over_videos["p"], over_videos["exact"]) == (2 / 16, True)
    page = (tmp_path / "out" / "ablation.md").read_text()
    assert capsys.readouterr().out == page
    assert page.startswith("| arm | runs | tau | rho | F1 |\n| --- | --- | --- | --- | --- |\n")
    assert "| MSKD | 5 | 0.322 ± 0.002 | 0.500 ± 0.000 | 16.10 ± 0.08 |\n" in page
    assert "| teacher | 1 | 0.007 | 0.500 | 0.35 |\n" in page
    assert "| MSKD less none | F1 | +16.00 [+16.00, +16.00] | 0 | 0.12 |\n" in page
    assert "Student's t over runs. p over runs: paired t-test over runs, two-sided" in page
    assert "All seeds learn from the same teachers" in page


def test_tests_pair_what_has_the_same_seed(run, program, found, monkeypatch):
    gains = {0: 0.01, 1: 0.03, 2: 0.02, 3: 0.05, 4: 0.01}

    def report(config):
        tau = config.seed + (gains[config.seed] if config.teachers else 0.0)
        per_video = {
            name: {"tau": tau + sign * bool(config.teachers), "rho": 0, "f1": 0}
            for name, sign in (("a", 1), ("b", -1))
        }
        return {"tau": tau, "rho": 0, "f1": 0, "per_video": per_video}

    monkeypatch.setattr(program, "report", report)
    assert run(*ARMS[:4], "--seeds", "0:5") == 0
    [pair] = found()["comparisons"]
    wanted = stats.ttest_1samp(list(gains.values()), 0)
    assert pair["tau"]["over_runs"]["p"] == pytest.approx(wanted.pvalue)
    assert pair["tau"]["over_runs"]["difference"] == pytest.approx(0.024)
    # One video gains 1.024 and the other loses 0.976: every flip is at least as far from 0.
    over_videos = pair["tau"]["over_videos"]
    assert (over_videos["p"], over_videos["wins"], over_videos["losses"]) == (1.0, 1, 1)


def test_one_seed_is_compared_over_videos_alone(run, capsys):
    assert run(*ARMS[:4], "--seeds", "2") == 0
    page = capsys.readouterr().out
    assert "| none | 1 | 0.002 | 0.500 | 0.10 |\n" in page
    assert "| KD less none | tau | +0.020 [+0.020, +0.020] | - | 0.12 |\n" in page
    assert "percentile bootstrap over videos" in page


def test_runs_on_different_videos_are_not_compared(run, program, capsys):
    assert run(*ARMS[:2], "--seeds", "0") == 0
    program.videos = 3
    assert run(*ARMS[:2], "--arm", "half: distill.phi=0 distill.psi=0", "--seeds", "0") == 2
    assert "half/seed_0 was tested on other videos than " in capsys.readouterr().err


# ---- Mistakes ----


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--arm", "hot: distill.temprature=4"],
         "arm 'hot': config field distill.temprature does not exist; did you mean 'temperature'?"),
        (["--arm", "hot: distill.temperature"], "arm 'hot': override 'stages.student.distill."
         "temperature' has no value"),
        (["--arm", "a b:", "--arm", "A_b:"], "arm 'A_b': folder 'A_b' is taken; give it "
         "another name"),
        (["--arm", "teachers:"], "arm 'teachers': folder 'teachers' is taken"),
        (["--arm", "no name"], "--arm 'no name' has no name; write 'NAME: FIELD=VALUE ...'"),
        (["--arm", "a: seed=3"], "arm 'a': seed is set for each run by this script; leave it out"),
        (["--arm", "a: stages.student.distill.folder=x"], "arm 'a': distill.folder is set for"),
        (["--arm", "a:", "--config.stage=mentor"], "stage is set for each run"),
        (["--arm", "KD:", "--baseline", "K"], "--baseline 'K' is no arm; did you mean 'KD'?"),
        (["--arm", "a:", "--seeds", "5-7"], "--seeds '5-7' are no different seeds; write 0:5"),
        (["--arm", "a:", "--seeds", "3:3"], "--seeds '3:3' are no"),
        (["--arm", "a:", "--seeds", "1,1"], "--seeds '1,1' are no"),
        (["--grid", "distill.temperature"], "--grid 'distill.temperature' names no values"),
        (["--grid", "distill.temperature=1,,2"], "names no values"),
        (["--grid", "distill.direction=forward"], "distill.direction='forward'; choose one of"),
        (["--arm", "a: stages.mentor.batch_size=16"], "arm 'a': it changes its teachers or what "
         "they have to see, too (stages.mentor.batch_size=16), and shares them with other arms; "
         "give --teachers per_arm"),
        (["--arm", 'a: data.left_out=("text",)'], "(data.left_out: () -> ('text',)), and "),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_runs(run, program, capsys, flags, said):
    assert run(*flags) == EXIT_USER_ERROR
    assert said in capsys.readouterr().err
    assert program.commands == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "there is nothing to compare; give --arm or --grid"),
        (["--arm", "a:", "--sead", "0"], "unrecognized arguments: --sead 0"),
    ],
)
def test_flags_that_make_no_sense(run, capsys, flags, said):
    with pytest.raises(SystemExit, match="2"):
        run(*flags)
    assert said in capsys.readouterr().err


def test_a_bucket_is_no_place_for_it(file, capsys):
    assert ablate.main(["--config", str(file), "--out", "gs://b/c", "--arm", "a:"]) == 2
    assert "gs://b/c is in a bucket, and only local folders are written" in capsys.readouterr().err


def test_a_damaged_report_is_named(run, tmp_path, capsys):
    assert run(*ARMS[:2], "--seeds", "0") == 0
    report = tmp_path / "out" / "none" / "seed_0" / "report.json"
    report.write_text('{"tau": ')
    assert run(*ARMS[:2], "--seeds", "0") == EXIT_USER_ERROR
    said = capsys.readouterr().err
    assert f"{report} is no JSON" in said
    assert "delete it and give the same command again" in said


# ---- The training program itself ----


@pytest.mark.skipif("DEEVISUM_LONG" not in os.environ, reason="takes long: set DEEVISUM_LONG")
@pytest.mark.parametrize("source", ["online", "cache"])
def test_three_stages_are_trained_and_compared(file, tmp_path, data_dir, monkeypatch, source):
    monkeypatch.delenv("XLA_FLAGS")  # one device
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    out = tmp_path / "out"
    flags = ["--config", str(file), "--out", str(out), *ARMS, "--seeds", "0:2"]
    flags += [f"--config.data.data_dir={data_dir}", f"--config.distill.source={source}"]
    flags += ["--config.eval.ablate_inputs=False"]
    assert ablate.main(flags) == 0
    found = json.loads((out / "ablation.json").read_text())
    assert {name: arm["num_runs"] for name, arm in found["arms"].items()} == {
        "none": 2, "KD": 2, "MSKD": 2,
    }  # fmt: skip
    assert {name: row["num_runs"] for name, row in found["learned_from"].items()} == {
        "teacher": 1, "mentor": 1,
    }  # fmt: skip
    pair = found["comparisons"][1]["tau"]
    assert pair["over_runs"]["difference"] == pytest.approx(pair["over_videos"]["difference"])
    # Nothing is left to do.
    before = (out / "ablation.json").read_text()
    monkeypatch.setattr(ablate, "PROGRAM", ("false",))
    assert ablate.main(flags) == 0
    assert (out / "ablation.json").read_text() == before
