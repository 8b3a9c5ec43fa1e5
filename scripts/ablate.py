r"""What each part of an experiment is worth: arms trained with several seeds each, and one table.

    python scripts/ablate.py --config configs/distillation.py --out runs/ablation --seeds 0:5 \
        --arm "none: distill.phi=0 distill.psi=0" --arm "KD: distill.phi=0 distill.psi=1" \
        --arm "MSKD:" --baseline none --baseline KD

An arm is a name and what it sets in the config. `--grid FIELD=A,B` makes an arm of each value, and
of each pair of values if it is given twice:

    --grid distill.temperature=1,2,4 --grid distill.direction=teacher_first,student_first
    --teachers per_arm --arm "all:" --arm "no title: data.template=no_title" \
        --arm "no transcript: data.template=no_transcript" --arm "no sound: data.template=no_sound"

The stages that an arm learns from are trained before it, with the config's own seed:
  --teachers shared    once for all arms, which then change the last stage only (default)
  --teachers per_arm   once for every arm, which changes all stages

Runs are of `python -m deevisum_jax.main`, one at a time; what OUT/ARM/seed_S says goes to
OUT/ARM/seed_S.log. The same command goes on where it was stopped: what is finished is not run
again, and more arms or seeds only add runs. Prints the table, and writes it to OUT/ablation.md and
all numbers to OUT/ablation.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import numpy as np
from etils import epath

from deevisum_jax import config as config_lib
from deevisum_jax import runs, stages
from deevisum_jax.config import Config
from deevisum_jax.errors import EXIT_PREEMPTED, PreemptedError, UserError, closest, exits_cleanly
from deevisum_jax.files import check_local, read_json, write_whole
from deevisum_jax.summary import comparison
from deevisum_jax.summary.report import thousandths

PROGRAM = (sys.executable, "-m", "deevisum_jax.main")
RULE = "| --- " * 5 + "|"  # in Markdown, below the heads of five columns
TITLES = {"tau": "tau", "rho": "rho", "f1": "F1"}
OURS = ("seed", "stage", "distill.folder")  # set for each run by this script
TEACHERS, PER_ARM = "teachers", "per_arm"  # folders in OUT
# What a learner and its teachers have to have in common.
EXAMPLES = tuple(f"data.{name}:" for name in (*stages.ROW_FIELDS, "template", "tokenizer"))


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    begin = time.monotonic()
    args = parse(argv)
    arms = plan(args)
    carry_out(args, arms)
    found = summarize(args, arms)
    write_whole(args.out / "ablation.json", json.dumps(found, indent=2) + "\n")
    write_whole(args.out / "ablation.md", markdown(found))
    print(markdown(found), end="")
    print(f"all of it: {time.monotonic() - begin:.0f} s", file=sys.stderr)
    return 0


# ---- What is asked for ----


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The flags; `overrides` are those of every run."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="an experiment in configs/")
    parser.add_argument("--out", required=True, metavar="OUT", help="gets a folder per arm")
    parser.add_argument("--seeds", default="0:5", help="0:5 for 0 to 4, or 0,3,7 (default: 0:5)")
    for flag, metavar, what in (
        ("--arm", "'NAME: FIELD=VALUE ...'", "repeatable"),
        ("--grid", "FIELD=VALUE,VALUE", "repeatable"),
        ("--baseline", "NAME", "an arm to compare others with; repeatable (default: the first)"),
    ):
        parser.add_argument(flag, action="append", default=[], metavar=metavar, help=what)
    parser.add_argument("--teachers", choices=("shared", "per_arm"), default="shared")
    parser.add_argument(
        # Shown in the help only; the overrides are what argparse does not know.
        "--config.FIELD=VALUE",
        action="store_true",
        help="override a field of the config in every run; repeatable",
    )
    args, rest = parser.parse_known_args(argv)
    if unknown := [flag for flag in rest if not flag.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if not args.arm and not args.grid:
        parser.error("there is nothing to compare; give --arm or --grid")
    check_local(epath.Path(args.out))
    args.out = pathlib.Path(args.out).resolve()
    args.overrides = tuple(flag.removeprefix("--config.") for flag in rest)
    args.seeds = seeds(args.seeds)
    args.arms = [*map(arm, args.arm), *grid(args.grid)]
    return args


def arm(text: str) -> tuple[str, tuple[str, ...]]:
    """The name and the overrides of `NAME: FIELD=VALUE ...`; no value contains a space."""
    name, colon, overrides = text.partition(":")
    if not colon or not name.strip():
        raise UserError(f"--arm {text!r} has no name; write 'NAME: FIELD=VALUE ...'")
    return name.strip(), tuple(overrides.split())


def grid(texts: Sequence[str]) -> list[tuple[str, tuple[str, ...]]]:
    """An arm for every choice of one value each of `FIELD=VALUE,VALUE`, named after it."""
    axes = []
    for text in texts:
        field, equals, values = text.partition("=")
        # Commas within brackets belong to a value.
        choices = re.split(r",(?![^(\[]*[)\]])", values)
        if not equals or not all(choices):
            raise UserError(f"--grid {text!r} names no values; write FIELD=VALUE,VALUE")
        axes.append([f"{field}={choice}" for choice in choices])
    return [(", ".join(chosen), chosen) for chosen in itertools.product(*axes)] if axes else []


def seeds(text: str) -> list[int]:
    """Those of `0:5` (0 to 4) or `0,3,7`."""
    found: list[int] = []
    if match := re.fullmatch(r"(\d+):(\d+)", text):
        found = list(range(int(match[1]), int(match[2])))
    elif re.fullmatch(r"\d+(,\d+)*", text):
        found = [int(part) for part in text.split(",")]
    if not found or len(set(found)) < len(found):
        raise UserError(f"--seeds {text!r} are no different seeds; write 0:5 for 0 to 4, or 0,3,7")
    return found


# ---- From that to runs of the training program ----


@dataclasses.dataclass(frozen=True)
class Run:
    """One run of the training program."""

    name: str  # for people
    workdir: pathlib.Path
    overrides: tuple[str, ...]
    config: Config  # what comes of them
    mode: str = "train"  # or cache_teacher: a trained stage's outputs are written down

    @property
    def home(self) -> epath.Path:
        """Where its files are."""
        return stages.folder_of(self.config, epath.Path(self.workdir))

    def is_done(self) -> bool:
        """Whether it was trained, and evaluated as its config says.

        Raises:
          UserError: what is there is the run of another config.
        """
        finished = (self.home / runs.REPORT_FILE).exists()
        if not finished and not runs.has_checkpoint(self.home):
            return False
        if refused := runs.refused(self.home, self.config):
            raise UserError(
                f"{self.home} holds the run of another config; give a new --out, or set back "
                + "; ".join(refused)
            )
        return finished and runs.load_config(self.home).eval == self.config.eval


@dataclasses.dataclass(frozen=True)
class Arm:
    """All runs of an arm."""

    overrides: tuple[str, ...]
    before: list[Run]  # of those that it learns from, in order
    runs: list[Run]  # one per seed

    @property
    def all(self) -> list[Run]:
        """In the order to run them in."""
        return [*self.before, *self.runs]


def plan(args: argparse.Namespace) -> dict[str, Arm]:
    """The arms by name, checked as far as they can be before the first run.

    Raises:
      UserError: names the arm and what is wrong with it, or a baseline that is no arm.
    """
    base = config_lib.from_file(args.config, args.overrides)
    arms: dict[str, Arm] = {}
    folders = ["", TEACHERS, PER_ARM]
    for name, overrides in args.arms:
        folder = re.sub(r"[^\w.=+-]+", "_", name).strip("._")
        if folder.lower() in folders:  # some disks do not tell capitals from small letters
            raise UserError(f"arm {name!r}: folder {folder!r} is taken; give it another name")
        folders.append(folder.lower())
        try:
            arms[name] = _arm(args, base, name, folder, overrides)
        except UserError as error:
            raise UserError(f"arm {name!r}: {error}") from None
    for name in args.baseline:
        if name not in arms:
            raise UserError(f"--baseline {name!r} is no arm; {closest(name, arms)}")
    return arms


def _arm(
    args: argparse.Namespace, base: Config, name: str, folder: str, own: tuple[str, ...]
) -> Arm:
    for override in (*args.overrides, *own):
        field = re.sub(r"^stages\.\w+\.", "", override).partition("=")[0]
        if field in OURS:
            raise UserError(f"{field} is set for each run by this script; leave it out")
    shared = args.teachers == "shared"
    home = args.out / folder if shared else args.out / PER_ARM / folder
    teachers = args.out / TEACHERS if shared else home
    if shared and base.stage:
        last = f"stages.{base.stage}."
        own = tuple(field if field.startswith("stages.") else last + field for field in own)
    overrides = (*args.overrides, *own)
    *earlier, student = stages.needed(config_lib.stages_from_file(args.config, overrides))
    if shared and earlier:
        changed = [field for field in own if not field.startswith(last)]
        seen = config_lib.differences(base, student)
        changed += [line for line in seen if line.startswith(EXAMPLES)]
        if changed:
            raise UserError(
                f"it changes its teachers or what they have to see, too ({'; '.join(changed)}), "
                "and shares them with other arms; give --teachers per_arm"
            )
    before = []
    for config in earlier:
        told = config.stage if shared else f"{config.stage} of {name}"
        run = Run(told, teachers, (*overrides, f"stage={config.stage}"), config)
        before.append(run)
        learners = stages.learners_of(config, [*earlier, student])
        if any(learner.distill.source == "cache" for learner in learners):
            told = f"outputs of the {config.stage} for {name}"
            before.append(dataclasses.replace(run, name=told, mode="cache_teacher"))
    overrides += (f"stage={student.stage}",) if student.stage else ()
    overrides += (f"distill.folder={teachers}",) if earlier else ()
    of_seeds = []
    for seed in args.seeds:
        fields = (*overrides, f"seed={seed}")
        config = config_lib.from_file(args.config, fields)
        of_seeds.append(Run(f"{name}, seed {seed}", home / f"seed_{seed}", fields, config))
    return Arm(own, before, of_seeds)


# ---- Running them ----


def carry_out(args: argparse.Namespace, arms: Mapping[str, Arm]) -> None:
    """Runs what is not done yet, arm by arm.

    Raises:
      UserError: there is a run of another config, or one failed.
      PreemptedError: this script or a run was told to stop.
    """
    # Asked of all before the first one starts.
    done = {run.home: run.is_done() for arm in arms.values() for run in arm.all}
    for arm in arms.values():
        if all(done[run.home] for run in arm.all):
            continue  # nobody reads its caches any more
        for run in arm.all:
            if run.mode == "cache_teacher" or not done[run.home]:
                execute(args, run)
                done[run.home] = True


def execute(args: argparse.Namespace, run: Run) -> None:
    """Runs the training program to its end; it is told to stop if we are.

    Raises:
      UserError: it failed; names it and its log.
      PreemptedError: it was told to stop.
    """
    begin = time.monotonic()
    flags = [f"--config={args.config}", f"--workdir={run.workdir}", f"--mode={run.mode}"]
    flags += [f"--config.{override}" for override in run.overrides]
    log = pathlib.Path(f"{run.home}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    if run.mode == "train":
        (run.home / runs.REPORT_FILE).unlink(missing_ok=True)  # of another evaluation
    with log.open("ab") as said:
        process = subprocess.Popen(
            [*PROGRAM, *flags],
            stdout=said,
            stderr=said,
            # What one run compiled, the next one has.
            env={"JAX_COMPILATION_CACHE_DIR": str(args.out / ".compiled"), **os.environ},
            start_new_session=True,  # Ctrl-C is for us, who then tell it once
        )
    try:
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()  # it saves
        raise
    if status == EXIT_PREEMPTED:
        raise PreemptedError(f"{run.name} was told to stop; {log} says where")
    if status:
        raise UserError(f"{run.name} ended with status {status}; read {log}, mend it and repeat")
    print(f"{run.name}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)


# ---- What came of it ----


def summarize(args: argparse.Namespace, arms: Mapping[str, Arm]) -> dict[str, Any]:
    """All numbers, as in ablation.json; F1 as a share, not in points.

    Raises:
      UserError: a report is damaged, or runs were evaluated on different videos.
    """
    reports = {}
    for run in itertools.chain(*(arm.all for arm in arms.values())):
        report = read_json(run.home / runs.REPORT_FILE, "delete it and give the same command again")
        reports[run.home] = {name: report[name] for name in (*TITLES, "per_video")}
    first = next(iter(reports))
    for home, report in reports.items():
        if report["per_video"].keys() != reports[first]["per_video"].keys():
            raise UserError(f"{home} was tested on other videos than {first}; give a new --out")
    of_arms = {name: [reports[run.home] for run in arm.runs] for name, arm in arms.items()}
    before = {run.name: run for arm in arms.values() for run in arm.before if run.mode == "train"}
    pairs: list[tuple[str, str]] = []
    for base, name in itertools.product(args.baseline or list(arms)[:1], arms):
        if name != base and (base, name) not in pairs:
            pairs.append((name, base))
    return {
        "config": args.config,
        "overrides": args.overrides,
        "teachers": args.teachers,
        "seeds": args.seeds,
        "arms": {
            name: {"overrides": arm.overrides, **_statistics(of_arms[name]), "runs": of_arms[name]}
            for name, arm in arms.items()
        },
        "learned_from": {n: _statistics([reports[run.home]]) for n, run in before.items()},
        "comparisons": [
            {"arm": name, "baseline": base, **_compare(of_arms[name], of_arms[base])}
            for name, base in pairs
        ],
    }


def _statistics(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {"num_runs": len(reports)}
    for metric in TITLES:
        values = [report[metric] for report in reports]
        found[metric] = {"mean": statistics.fmean(values)}
        if len(values) > 1:
            found[metric]["sd"] = statistics.stdev(values)
    return found


def _compare(*arms: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The first of two arms less the second; reports are in the order of seeds."""
    videos = sorted(arms[0][0]["per_video"])
    found = {}
    for metric in TITLES:
        of_runs = [[report[metric] for report in arm] for arm in arms]
        over_runs = comparison.paired_t(*of_runs) if len(arms[0]) > 1 else None
        of_videos = [[[r["per_video"][v][metric] for v in videos] for r in arm] for arm in arms]
        found[metric] = {
            "over_runs": over_runs and dataclasses.asdict(over_runs),
            "over_videos": dataclasses.asdict(comparison.compare(*np.mean(of_videos, 1), seed=0)),
        }
    return found


def markdown(found: Mapping[str, Any]) -> str:
    """Means, differences, and what they are."""
    lines = ["| arm | runs | tau | rho | F1 |", RULE]
    for name, row in {**found["arms"], **found["learned_from"]}.items():
        means = (
            " ± ".join(_written(metric, number) for number in row[metric].values())
            for metric in TITLES
        )
        lines.append(f"| {name} | {row['num_runs']} | {' | '.join(means)} |")
    if found["comparisons"]:
        lines += ["", "|  | metric | difference | p over runs | p over videos |", RULE]
    for pair, metric in itertools.product(found["comparisons"], TITLES):
        runs_, videos = pair[metric]["over_runs"], pair[metric]["over_videos"]
        name = f"{pair['arm']} less {pair['baseline']} | {TITLES[metric]}"
        numbers = [(runs_ or videos)[key] for key in ("difference", "low", "high")]
        mean, low, high = (_written(metric, number, "+") for number in numbers)
        p = f"{runs_['p']:.2g}" if runs_ else "-"
        lines.append(f"| {name} | {mean} [{low}, {high}] | {p} | {videos['p']:.2g} |")
    interval = comparison.INTERVAL_OVER_RUNS if len(found["seeds"]) > 1 else comparison.INTERVAL
    notes = (
        "Mean ± standard deviation over seeds (of n - 1) of the deepest exit on the test split; F1 "
        f"in points of 100. Differences are paired by seed; in brackets the {interval}. p over "
        f"runs: {comparison.TEST_OVER_RUNS}: whether other seeds would differ, too, on these "
        f"videos. p over videos: {comparison.TEST}, of each video's mean over seeds: whether these "
        "runs would differ, too, on other videos. Neither is corrected for the number of "
        "comparisons."
    )
    if found["learned_from"]:
        notes += " All seeds learn from the same teachers: how much these vary is not in it."
    return "\n".join([*lines, "", notes]) + "\n"


def _written(metric: str, value: float, sign: str = "") -> str:
    points = f"{round(100 * value, 2) + 0.0:{sign}.2f}"
    return points if metric == "f1" else thousandths(value, sign)


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise PreemptedError("what was under way has saved where it stands")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    sys.exit(main())
