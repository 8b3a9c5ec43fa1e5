"""What overlapping buys: `python scripts/benchmark_corpus.py --checkpoint RUN --videos DIR`.

Summarizes the videos of a folder one step after the other, each by itself, and as `summarize
--manifest` does: the next are decoded and those before written while some are scored, and batches
are filled over the borders of videos. In turns, so that other load on the machine meets both.

Where the model runs on this machine's processor, everything competes for it. `--device_ms` stands
for an accelerator: scores are computed once, and from then on a batch is waited for that long,
whoever leaves early.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Any

import absl.logging
import jax
from etils import epath

from deevisum_jax import corpus, files, summarize
from deevisum_jax.corpus import Corpus, Item
from deevisum_jax.data.segments import Video
from deevisum_jax.errors import UserError, exits_cleanly
from deevisum_jax.inference.exit_policy import ExitPolicy
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
        student.score_all = waited_for(student, args.device_ms / 1000)
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
        f"{most:.2f} x is the most without shared batches, were "
        f"{' + '.join(f'{spent[s]:.2f} s {s}' for s in _STEPS)} to overlap fully"
    )
    return 0


def measure(
    way: Callable[..., dict[str, float]], items: Sequence[Item], student: summarize.Student
) -> tuple[float, dict[str, float]]:
    """Seconds in all, and in every step where `way` says so, into a folder that is removed again.

    Raises:
      UserError: a video failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = summarize.Task(
            corpus=Corpus(epath.Path(folder)), items=items, mine=items, left=items,
            student=student, policy=ExitPolicy.of(
                student.config.eval.exit_threshold, len(student.model_config.exit_layers),
                student.config.eval.exit_confidence,
            ),
        )  # fmt: skip
        began = time.monotonic()
        spent = way(task, summarize.make_steps(task, budget=select.DEFAULT_BUDGET))
        wall = time.monotonic() - began
        if failures := task.corpus.failures():
            raise UserError(f"videos failed, move them away: {failures}")
    return wall, spent


def in_turn(task: summarize.Task, steps: corpus.Steps) -> dict[str, float]:
    """One video after the other, one step after the other; seconds in each step."""
    spent = dict.fromkeys(_STEPS, 0.0)
    for item in task.items:
        with _timed("read", spent):
            decoded = steps.read(item)
        with _timed("score", spent):
            [scored] = steps.score(iter([decoded]))
        if isinstance(scored, corpus.VideoError):
            raise scored.__cause__
        with contextlib.closing(scored), _timed("write", spent):
            steps.write(item, scored)
    return spent


def overlapped(task: summarize.Task, steps: corpus.Steps) -> dict[str, float]:
    """As the command does."""
    corpus.work(task.corpus, task.items, steps, lambda line: None)
    return {}


def waited_for(student: summarize.Student, batch_s: float) -> Callable[..., Any]:
    """`student.score_all`, computed once for every video and waited for from then on."""
    score_all, known, size = student.score_all, {}, student.config.eval.batch_size

    def wait(videos: Iterable[Video], policy: ExitPolicy) -> Generator[Any, None, None]:
        under_way, num_rows, num_run = collections.deque(), 0, 0
        for video in videos:
            key = (video.title, video.duration_s)
            if key not in known:
                [known[key]] = score_all([video], policy)
            num_rows += len(known[key][0])
            under_way.append((num_rows, known[key]))
            while num_rows - num_run >= size:
                time.sleep(batch_s)
                num_run += size
            while under_way and under_way[0][0] <= num_run:
                yield under_way.popleft()[1]
        if num_rows > num_run:
            time.sleep(batch_s)
        yield from (scored for _, scored in under_way)

    return wait


@contextlib.contextmanager
def _timed(name: str, spent: dict[str, float]) -> Iterator[None]:
    began = time.monotonic()
    yield
    spent[name] += time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
