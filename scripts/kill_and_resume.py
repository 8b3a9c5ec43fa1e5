"""Kills a training run with -9 at random moments, resumes it each time, and compares the end.

A run that was never interrupted is the reference: parameters, optimizer state, where the data
stands, what was logged and the report have to be equal, to the bit.

    python scripts/kill_and_resume.py --kills 20 --out killed --config.data.data_dir=DIR

Exit status: 0 equal after all kills; 3 not equal; 2 it could not be tried so: a mistake in what was
given, a training program that failed by itself, or a run that ended before the last kill.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from deevisum_jax.errors import UserError, exits_cleanly

REPO = pathlib.Path(__file__).resolve().parent.parent
PROGRAM = (sys.executable, "-m", "deevisum_jax.main")
EXIT_DIFFERENT = 3  # Python's own for a crash is 1
# A step that is being written: Orbax's name for it holds this until all of it is there.
UNFINISHED = ".orbax-checkpoint-tmp"
KINDS = {"training": 0.5, "saving": 0.35, "starting": 0.15}  # moments of a kill, and their shares
POLL_S = 0.002
# As quick as the quickstart allows, with many saves; a line for every step tells how far it is.
OVERRIDES = ("total_steps=120", "checkpoint.every_steps=4", "eval.every_steps=40", "log_every=1")
OVERRIDES += ("optim.warmup_steps=20", "eval.ablate_inputs=False")
OVERRIDES += ("distill.phi=0", "distill.psi=0")  # one run, of the last stage


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args, overrides = parse(argv)
    out = args.out.resolve()
    if out.exists():
        raise UserError(f"--out {out} is there already; give a new folder")
    out.mkdir(parents=True)
    flags = ["--config", args.config, *(f"--config.{text}" for text in OVERRIDES), *overrides]
    reference, killed = out / "reference", out / "killed"
    begin = time.monotonic()
    finish(reference, flags)
    last = newest_step(reference)
    print(f"uninterrupted: {last} steps in {time.monotonic() - begin:.0f} s", flush=True)

    rng = random.Random(args.seed)
    counts = dict.fromkeys(KINDS, 0)
    print("kill  moment    step   whole  half-written", flush=True)
    for number in range(1, args.kills + 1):
        # Shares of what is left, so that it does not end before the last kill.
        most = 1.2 * (last - (newest_step(killed) or 0)) / (args.kills - number + 2)
        wanted = rng.choices(list(KINDS), list(KINDS.values()))[0]
        moment = kill(killed, flags, wanted, rng.uniform(0, most), rng)
        if moment is None:
            break
        counts[moment] += 1
        whole = newest_step(killed)
        print(
            f"{number:4}  {moment:9} {logged_step(killed):4}  {'-' if whole is None else whole:>6}"
            f"  {', '.join(sorted(half_written(killed))) or '-'}",
            flush=True,
        )
    finish(killed, flags)
    wrong = differences(reference, killed, last)
    for line in wrong:
        print(f"differs: {line}")
    kills = sum(counts.values())
    after = f"after {kills} kills ({', '.join(f'{counts[kind]} {kind}' for kind in KINDS)})"
    if wrong:
        print(f"not equal {after}")
        return EXIT_DIFFERENT
    print(f"equal to the bit {after}: all that step {last} holds, log, report")
    if kills < args.kills:
        raise UserError(
            f"the run ended after {kills} of {args.kills} kills; make it longer with "
            "--config.total_steps"
        )
    return 0


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Flags of ours, and overrides of the config's fields."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(REPO / "configs" / "quickstart.py"))
    parser.add_argument("--out", required=True, type=pathlib.Path, help="a new folder")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args, overrides = parser.parse_known_args(argv)
    if unknown := [flag for flag in overrides if not flag.startswith("--config.")]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    return args, overrides


@contextlib.contextmanager
def started(workdir: pathlib.Path, flags: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The training program, never left behind; what it says goes to a file beside `workdir`."""
    with workdir.with_suffix(".log").open("ab") as log:
        run = subprocess.Popen(
            [*PROGRAM, "--workdir", str(workdir), *flags],
            stdout=log,
            stderr=log,
            env=os.environ
            | {
                "PYTHONPATH": str(REPO),
                # What one start compiled, the next one has.
                "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            },
        )
    try:
        yield run
    finally:
        run.kill()
        run.wait()


def finish(workdir: pathlib.Path, flags: list[str]) -> None:
    """Starts the program, and waits for its end, which has to be a good one."""
    with started(workdir, flags) as run:
        if status := run.wait():
            raise failed(workdir, status)


def failed(workdir: pathlib.Path, status: int) -> UserError:
    """Of a program that nobody killed: its status, and the last that it said."""
    said = workdir.with_suffix(".log")
    lines = said.read_text(errors="replace").replace("\r", "\n").splitlines()
    return UserError(
        f"the training program ended by itself with status {status}; {said} ends with:\n"
        + "\n".join(lines[-20:])
    )


def kill(
    workdir: pathlib.Path, flags: list[str], wanted: str, steps: float, rng: random.Random
) -> str | None:
    """Starts the program and kills it.

    Args:
      workdir: its folder.
      flags: its others.
      wanted: of `KINDS`, when to kill: some time before its first update; after `steps` updates; in
        the first save after those.
      steps: updates, of this start.
      rng: of the moments.

    Returns:
      Which of `KINDS` the moment really was; None if the run ended well before it came.

    Raises:
      UserError: it ended by itself, and not well.
    """
    target = (newest_step(workdir) or 0) + steps
    log_before, left_before = log_inode(workdir), half_written(workdir)
    trains = lambda: log_inode(workdir) != log_before

    def saves() -> bool:
        left_before.intersection_update(half_written(workdir))  # this start removes them
        return bool(half_written(workdir) - left_before)

    due = time.monotonic() + rng.uniform(0, 10) if wanted == "starting" else None
    with started(workdir, flags) as run:
        while run.poll() is None and (due is None or time.monotonic() < due):
            is_saving, is_training = saves(), trains()
            if wanted == "starting":
                if is_training:
                    break
            elif due is None and is_training and logged_step(workdir) >= target:
                if wanted == "training":
                    due = time.monotonic() + rng.uniform(0, 0.3)
                elif is_saving:
                    due = time.monotonic() + rng.uniform(0, 0.1)
            time.sleep(POLL_S)
        status = run.poll()
        if status is None:
            run.kill()
            status = run.wait()
            if status == -signal.SIGKILL:
                return "saving" if saves() else "training" if trains() else "starting"
        if status:
            raise failed(workdir, status)
        return None


def log_inode(workdir: pathlib.Path) -> int | None:
    """Changes when a start begins to train, since each begins its log as a new file."""
    path = workdir / "metrics.jsonl"
    return path.stat().st_ino if path.exists() else None


def half_written(workdir: pathlib.Path) -> set[str]:
    """Names of the steps that are not saved whole."""
    return {path.name for path in (workdir / "checkpoints").glob(f"*{UNFINISHED}*")}


def logged_step(workdir: pathlib.Path) -> int:
    """The last step in its log; 0 = none."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    for line in reversed(lines):
        try:
            return json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError):
            continue  # a kill cut it short
    return 0


def newest_step(workdir: pathlib.Path) -> int | None:
    """The newest step that is saved whole."""
    steps = [int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=None)


def differences(reference: pathlib.Path, killed: pathlib.Path, step: int) -> list[str]:
    """What the two runs do not have in common at their end."""
    wrong = []
    for item in ("params", "train_state"):
        one, other = (load(run, step, item) for run in (reference, killed))
        if one.keys() != other.keys():
            wrong.append(f"{item}: {sorted(one.keys() ^ other.keys())}")
            continue
        wrong += [
            f"{item}: {path}, {np.sum(bits(one[path]) != bits(other[path]))} bytes"
            for path in one
            if not np.array_equal(bits(one[path]), bits(other[path]))
        ]
    for what, read in {
        "data_iter": lambda run: (run / f"checkpoints/{step}/data_iter/metadata").read_text(),
        "metrics.jsonl": logged,
        "report.json": lambda run: (run / "report.json").read_text(),
    }.items():
        if read(reference) != read(killed):
            wrong.append(what)
    return wrong


def load(run: pathlib.Path, step: int, item: str) -> dict[str, np.ndarray]:
    """Arrays of an item of a checkpoint, by path."""
    folder = epath.Path(run.absolute()) / "checkpoints" / str(step) / item
    with ocp.PyTreeCheckpointer() as loader:
        names = loader.metadata(folder).item_metadata.tree
        # As numpy's arrays; Orbax would look for the devices that they were on.
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names)
        tree = loader.restore(folder, restore_args=as_numpy)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): array
        for path, array in jax.tree.leaves_with_path(tree)
    }


def bits(array: np.ndarray) -> np.ndarray:
    """Its bytes, in which no number is unequal to itself."""
    return np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)


def logged(run: pathlib.Path) -> list[dict[str, float]]:
    """What was logged, but for the speed."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "examples_per_s"} for line in lines]


if __name__ == "__main__":
    # As an interruption from the keyboard, so that the training program ends with this one.
    for how in (signal.SIGTERM, signal.SIGINT):  # a shell makes background jobs deaf to the second
        signal.signal(how, signal.default_int_handler)
    sys.exit(main())
