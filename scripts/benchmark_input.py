r"""How many segments a second training can be fed with: `python scripts/benchmark_input.py`.

Pictures are decoded and changed every time, prompts are made once per video that stays in memory
(data.cache_mib). So the first pass over the data, which also reads the records, describes sounds
and makes prompts, is timed apart from the passes after it; both through the very iterator that
training reads.

    python scripts/benchmark_input.py                                     # generated videos
    python scripts/benchmark_input.py --config configs/tvsum.py \
        --config.data.data_dir=/data --config.data.augment=True          # a built data set

Where the time goes is CPU time of the threads that did the work, measured in the same run.
"Everything else" is what is left of the process's: Grain, Python between the parts, and the reader.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import functools
import io
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import numpy as np
import PIL.Image
import PIL.ImageFile
from etils import epath

from deevisum_jax import config as config_lib
from deevisum_jax import datasets, experiment
from deevisum_jax.config import Config, DataConfig, ModelConfig, OptimConfig
from deevisum_jax.data import pipeline
from deevisum_jax.data.segments import SegmentEncoder
from deevisum_jax.errors import exits_cleanly

_MIN_BATCHES = 30
_STORED_SIZE = 256  # pixels, of the generated pictures
_WORDS = ("the", "a", "and", "of", "red", "green", "ball", "house", "dog", "street", "talk")

# What is timed, as (name, owner, attribute). Pictures are decoded within `frames`.
_PARTS = (
    ("decode pictures", PIL.ImageFile.ImageFile, "load"),
    ("crop, resize, tint", SegmentEncoder, "frames"),
    ("describe sounds", SegmentEncoder, "sound"),
    ("tokens", SegmentEncoder, "text"),
    ("stack rows", pipeline, "_stack"),
    ("read records", pipeline, "video_from_record"),
)


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python scripts/benchmark_input.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--config", metavar="FILE", help="an experiment in configs/ (default: generated videos)")
    add("--image_size", type=int, help="pixels (default: as the model; 224 if generated)")
    add("--videos", type=int, default=40, help="generated videos of a minute (%(default)s)")
    add("--repeats", type=int, default=5, help="passes after the first (%(default)s)")
    args, rest = parser.parse_known_args(argv)
    for name in ("image_size", "videos", "repeats"):
        if (given := getattr(args, name)) is not None and given < 1:
            parser.error(f"--{name} {given}: give 1 or more")
    unknown = [flag for flag in rest if not flag.startswith("--config.")]
    if unknown or (rest and args.config is None):
        parser.error(f"unrecognized arguments: {' '.join(unknown or rest)}")
    if args.config is None:
        config, records = _generated_config(), generated_records(args.videos)
    else:
        config = config_lib.from_file(
            args.config, [flag.removeprefix("--config.") for flag in rest]
        )
        records = datasets.Dataset(config.data).split("train")
    with tempfile.TemporaryDirectory() as folder:
        source = make_source(config, records, epath.Path(folder), args.image_size)
    data = config.data
    # Threads read some batches ahead; much shorter passes would only meet what is ready.
    batches = max(_MIN_BATCHES, len(source) // config.batch_size)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(
        f"{len(source)} segments of {len(records)} videos, {data.num_frames} pictures each, "
        f"augment={data.augment}, batches of {config.batch_size}, {data.num_threads} threads, "
        f"{cores} cores"
    )
    iterator = pipeline.train_iterator(
        source, batch_size=config.batch_size, seed=config.seed, num_threads=data.num_threads
    )
    report("first pass", [timed(iterator, batches)])
    report(
        f"passes 2 to {args.repeats + 1}", [timed(iterator, batches) for _ in range(args.repeats)]
    )
    return 0


def make_source(
    config: Config, records: Sequence[pipeline.Record], folder: epath.Path, image_size: int | None
) -> pipeline.SegmentSource:
    """As training makes it."""
    template = experiment.make_template(config, folder)
    given = experiment.given_tokenizer(config, folder, None)
    tokens = experiment.make_tokenizer(config, folder, template, records, given)
    size = image_size or experiment.model_config(config, tokens).img.image_size
    encoder = experiment.make_encoder(config, tokens, template, size, captions=True)
    return experiment.make_source(config, records, encoder)


def timed(iterator: Iterator[Any], batches: int) -> dict[str, float]:
    """Seconds of a pass: `wall`, `cpu` and CPU seconds of each part; and `segments` worked on."""
    with contextlib.ExitStack() as stack:
        clock = _Clock()
        for name, owner, attribute in _PARTS:
            inner = getattr(owner, attribute)
            stack.enter_context(mock.patch.object(owner, attribute, clock.around(name, inner)))
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(batches):
            next(iterator)
        spent = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}
    return spent | clock.spent | {"segments": clock.calls["crop, resize, tint"]}


class _Clock:
    """CPU seconds by part, of all threads; a part within another counts for itself alone."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = collections.defaultdict(float)
        self.calls: dict[str, int] = collections.defaultdict(int)
        self._lock, self._open = threading.Lock(), threading.local()

    def around(self, name: str, inner: Any) -> Any:
        @functools.wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            within = getattr(self._open, "inner_s", 0.0)
            self._open.inner_s = 0.0
            began = time.thread_time()
            try:
                return inner(*args, **kwargs)
            finally:
                whole = time.thread_time() - began
                with self._lock:
                    self.spent[name] += whole - self._open.inner_s
                    self.calls[name] += 1
                self._open.inner_s = within + whole

        return call


def report(what: str, passes: Sequence[dict[str, float]]) -> None:
    """Prints the medians over some passes, and the range of the rates."""
    rates = [spent["segments"] / spent["wall"] for spent in passes]
    per_cpu = [spent["segments"] / spent["cpu"] for spent in passes]
    line = f"{what}: {statistics.median(rates):.0f} segments/s"
    if len(passes) > 1:
        line += f" ({min(rates):.0f} to {max(rates):.0f})"
    print(f"{line}; {statistics.median(per_cpu):.0f} per second of CPU time")
    of = lambda name: statistics.median(
        1e3 * spent.get(name, 0.0) / spent["segments"] for spent in passes
    )
    parts = {name: of(name) for name, _, _ in _PARTS}
    parts["everything else"] = of("cpu") - sum(parts.values())
    for name, ms in parts.items():
        print(f"  {name:<20}{ms:7.3f} ms of CPU per segment  {ms / of('cpu'):6.1%}")


def _generated_config() -> Config:
    return Config(
        initialization=config_lib.FROM_SCRATCH,
        seed=0,
        total_steps=1,
        batch_size=32,
        data=DataConfig(
            dataset="generated", num_frames=1, augment=True, vocab_size=400, text_len=128,
            transcript_context_s=30.0,
        ),
        model=ModelConfig(variant="tiny", exit_layers=(4,), image_size=224),
        optim=OptimConfig(learning_rate=1e-3),
    )  # fmt: skip


def generated_records(count: int) -> list[dict[str, Any]]:
    """Videos of a minute at one picture per second, with noise in them as films have, and words."""
    rng = np.random.default_rng(0)
    n = 60
    made = []
    for index in range(count):
        cues = [
            {"start": 3.0 * k, "end": 3.0 * k + 2.5, "text": " ".join(rng.choice(_WORDS, 8))}
            for k in range(n // 3)
        ]
        made.append(
            {
                "video_id": f"generated_{index}",
                "title": " ".join(rng.choice(_WORDS, 4)),
                "duration_s": float(n),
                "transcript": cues,
                "captions": [],
                "audio": (3000 * rng.standard_normal(16_000 * n)).astype(np.int16),
                "frames": [_jpeg(rng) for _ in range(n)],
                "frame_times": np.arange(n, dtype=np.float32),
                "score_times": np.arange(n, dtype=np.float32) + 0.5,
                "user_scores": rng.random((3, n), np.float32),
            }
        )
    return made


def _jpeg(rng: np.random.Generator) -> bytes:
    """About 28 kB: smooth shapes, and grain over them."""
    shapes = PIL.Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8))
    smooth = np.asarray(
        shapes.resize((_STORED_SIZE, _STORED_SIZE), PIL.Image.Resampling.BICUBIC), np.int16
    )
    grainy = smooth + rng.integers(-12, 13, smooth.shape, dtype=np.int16)
    stored = io.BytesIO()
    PIL.Image.fromarray(np.clip(grainy, 0, 255).astype(np.uint8)).save(stored, "JPEG", quality=90)
    return stored.getvalue()


if __name__ == "__main__":
    sys.exit(main())
