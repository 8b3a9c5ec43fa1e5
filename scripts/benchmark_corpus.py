"""What overlapping buys: `python scripts/benchmark_corpus.py --checkpoint RUN --videos DIR`.

Summarizes the videos of a folder one step after the other, and as `summarize --manifest` does, the
next decoded and the one before written while one is scored; in turns, so that other load on the
machine meets both. Both do the same work on the same threads' code.

Where the model runs on this machine's processor, everything competes for it. `--device_ms` stands
for an accelerator: scores are computed once, and from then on a batch is waited for that long.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import absl.logging
import jax
from etils import epath

from deevisum_jax import corpus, files, summarize
from deevisum_jax.corpus import Corpus, Item
from deevisum_jax.errors import UserError, exits_cleanly
from deevisum_jax.summary import select

_STEPS = ("read", "score", "write")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python scripts/benchmark_corpus.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="RUN", help="workdir of a training run")
    add("--videos", required=True, type=pathlib.Path, metavar="DIR", help="all files in it")
    add("--repeats", type=int, default=5, help="of both, in turns (default: %(default)s)")
    add("--device_ms", type=float, help="what a batch takes on the accelerator to stand for")
    args = parser.parse_args(argv)
    absl.logging.set_verbosity(absl.logging.ERROR)
    endings = (".mp4", ".mkv", ".webm", ".avi")
    videos = sorted(path for path in args.videos.glob("*") if path.suffix in endings)
    if not videos:
        raise UserError(f"{args.videos} holds no file that ends in {', '.join(endings)}")
    items = [Item(id=path.name, video=epath.Path(path)) for path in videos]
    student = summarize.Student(files.locate(args.checkpoint))
    run = lambda way: measure(way, items, student)
    _, spent = run(in_turn)  # compiles
    if args.device_ms is not None:
        student.score = waited_for(student, args.device_ms / 1000)
        run(in_turn)  # computes what is waited for later
    seconds: dict[str, list[float]] = {"in turn": [], "overlapped": []}
    for _ in range(args.repeats):
        for name, way in (("in turn", in_turn), ("overlapped", overlapped)):
            wall, of_steps = run(way)
            seconds[name].append(wall)
            if way is in_turn:
                spent = of_steps
    print(f"{len(items)} videos, {jax.default_backend()}, {args.repeats} repeats in turns")
    for name, found in seconds.items():
        print(
            f"{name:<11}{statistics.median(found):8.2f} s  ({min(found):.2f} to {max(found):.2f})"
        )
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    most = sum(spent.values()) / max(spent.values())
    print(
        f"faster by {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f}); "
        f"{most:.2f} x is the most, were {' + '.join(f'{spent[s]:.2f} s {s}' for s in _STEPS)} "
        "to overlap fully"
    )
    return 0


def measure(
    way: Callable[..., None], items: Sequence[Item], student: summarize.Student
) -> tuple[float, dict[str, float]]:
    """Seconds in all, and in every step, into a folder that is removed again.

    Raises:
      UserError: a video failed.
    """
    spent = dict.fromkeys(_STEPS, 0.0)
    with tempfile.TemporaryDirectory() as folder:
        task = summarize.Task(
            corpus=Corpus(epath.Path(folder)), items=items, mine=items, left=items,
            student=student, threshold=student.config.eval.exit_threshold,
        )  # fmt: skip
        steps = summarize.make_steps(task, budget=select.DEFAULT_BUDGET)
        timed = {name: _timed(getattr(steps, name), name, spent) for name in _STEPS}
        began = time.monotonic()
        way(task, corpus.Steps(**timed))
        wall = time.monotonic() - began
        if failures := task.corpus.failures():
            raise UserError(f"videos failed, move them away: {failures}")
    return wall, spent


def in_turn(task: summarize.Task, steps: corpus.Steps) -> None:
    """One video after the other, one step after the other."""
    for item in task.items:
        with contextlib.closing(steps.score(steps.read(item))) as scored:
            steps.write(item, scored)


def overlapped(task: summarize.Task, steps: corpus.Steps) -> None:
    """As the command does."""
    corpus.work(task.corpus, task.items, steps, lambda line: None)


def waited_for(student: summarize.Student, batch_s: float) -> Callable[..., Any]:
    """`student.score`, computed once for every length of video and waited for from then on."""
    score, known = student.score, {}

    def wait(video: Any, **kwargs: Any) -> Any:
        key = (video.title, video.duration_s)
        if key not in known:
            known[key] = score(video, **kwargs)
            return known[key]
        time.sleep(batch_s * math.ceil(len(known[key][0]) / student.config.eval.batch_size))
        return known[key]

    return wait


def _timed(step: Callable[..., Any], name: str, spent: dict[str, float]) -> Callable[..., Any]:
    @contextlib.contextmanager
    def noted() -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            spent[name] += time.monotonic() - began

    return noted()(step)


if __name__ == "__main__":
    sys.exit(main())
