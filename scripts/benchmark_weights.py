"""Weights in and out at full size: `python scripts/benchmark_weights.py --scratch DIR`.

Writes random weights as big_vision releases them, takes them through every form and back, and
holds each step's peak memory against the model's own size and each import's speed against `cat`.
Needs about three times the model on disk (19 GB for the 3B in bfloat16), and removes it at the end.
"""

from __future__ import annotations

import argparse
import dataclasses
import glob
import math
import os
import pathlib
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence

import absl.logging
import numpy as np
import sentencepiece.sentencepiece_model_pb2 as spm

from deevisum_jax import weights
from deevisum_jax.convert import big_vision, npz
from deevisum_jax.convert.npz import open_npz
from deevisum_jax.convert.rows import spill
from deevisum_jax.convert.safetensors import open_safetensors
from deevisum_jax.convert.tensors import STORED_DTYPES, Tensor, num_bytes, slab_bounds
from deevisum_jax.data.tokenizer import LOC_SEG, train_tokenizer
from deevisum_jax.models import paligemma2

_STEPS = ("read", "import", "to_hugging_face", "to_big_vision", "to_weights")


@dataclasses.dataclass(frozen=True)
class RandomTensor:
    """Numbers of visible scale in any dtype, the same at every walk."""

    shape: tuple[int, ...]
    dtype: np.dtype
    seed: int
    file: str = ""

    def slabs(self, unit: int = 1) -> Iterator[np.ndarray]:
        """As `Tensor.slabs`."""
        bits = np.dtype(f"u{self.dtype.itemsize}")
        # Sign and mantissa at random, the exponent that of 2 ** -6.
        mantissa = 7 if self.dtype == STORED_DTYPES["bfloat16"] else 23
        keep = bits.type(1 << (8 * bits.itemsize - 1) | ((1 << mantissa) - 1))
        exponent = bits.type((127 - 6) << mantissa)
        rng = np.random.default_rng(self.seed)
        for start, stop in slab_bounds(self.shape, self.dtype, unit):
            shape = (stop - start, *self.shape[1:])
            drawn = np.frombuffer(rng.bytes(math.prod(shape) * bits.itemsize), bits)
            yield (drawn & keep | exponent).view(self.dtype).reshape(shape)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python scripts/benchmark_weights.py", description=__doc__, allow_abbrev=False
    )
    add = parser.add_argument
    add("--scratch", required=True, type=pathlib.Path, help="a new folder on the disk to measure")
    add("--variant", default="paligemma2_3b", choices=paligemma2.VARIANTS)
    add("--dtype", default="bfloat16", choices=paligemma2.pytree.DTYPES)
    add("--repeats", type=int, default=3, help="of every import, interleaved with cat")
    add("--step", choices=_STEPS, help=argparse.SUPPRESS)  # this script's own children
    add("--source", default="", help=argparse.SUPPRESS)
    add("--tokenizer", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    absl.logging.set_verbosity(absl.logging.ERROR)
    if args.step:
        run_step(args.step, args.source, args.tokenizer, args.scratch)
        return 0
    args.scratch.mkdir(parents=True)
    try:
        benchmark(args.scratch, args.variant, args.dtype, args.repeats)
    finally:
        shutil.rmtree(args.scratch)
    return 0


def benchmark(scratch: pathlib.Path, variant: str, dtype: str, repeats: int) -> None:
    """Prints a line per measurement."""
    config = paligemma2.get_config(variant, param_dtype=dtype)
    model_bytes = paligemma2.num_params(config) * STORED_DTYPES[dtype].itemsize
    print(f"{variant} in {dtype}: {model_bytes / 1e9:.2f} GB", flush=True)
    tokenizer = make_tokenizer(scratch / "tokenizer.model", config.llm.vocab_size)
    released = scratch / "released.npz"
    shapes = spill(paligemma2.abstract_params(config), big_vision.paligemma2_rows(config))
    npz.write_npz(
        released,
        {
            f"params/{name}": RandomTensor(tensor.shape, tensor.dtype, seed)
            for seed, (name, tensor) in enumerate(shapes.items())
        },
    )

    def step(name: str, source: pathlib.Path, out: pathlib.Path) -> float:
        command = [sys.executable, __file__, "--step", name, "--source", str(source),
                   "--scratch", str(out), "--tokenizer", str(tokenizer)]  # fmt: skip
        found = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.split()
        seconds, peak = float(found[0]), float(found[1])
        what = f"{name} {source.name}"
        what += f" -> {out.name}" if name not in ("read", "import") else ""
        print(f"{what}: {seconds:.1f} s, peak memory {peak / 1e9:.2f} GB, "
              f"{peak / model_bytes:.2f} of the model", flush=True)  # fmt: skip
        return seconds

    def timed_import(source: pathlib.Path) -> None:
        """The import's speed beside cat's, and beside a plain read into memory, from cold caches.

        They take turns. cat keeps nothing; a read must touch as much fresh memory as an import.
        """
        files = [source] if source.is_file() else sorted(source.glob("*.safetensors"))
        seconds: dict[str, list[float]] = {"cat": [], "read": [], "import": []}
        for _ in range(repeats):
            forget(files)
            start = time.perf_counter()
            with open(os.devnull, "wb") as sink:
                subprocess.run(["cat", *map(str, files)], check=True, stdout=sink)
            seconds["cat"].append(time.perf_counter() - start)
            for name in ("read", "import"):
                forget(files)
                seconds[name].append(step(name, source, scratch / "unused"))
        speeds = {
            name: f"{name} {model_bytes / statistics.median(found) / 1e9:.2f} GB/s"
            for name, found in seconds.items()
        }
        print(f"{source.name}, medians of {repeats}: {', '.join(speeds.values())}")
        for name in ("cat", "read"):
            ratios = [a / b for a, b in zip(seconds[name], seconds["import"], strict=True)]
            print(
                f"import {source.name}: {statistics.median(ratios):.2f} of {name}'s speed "
                f"({min(ratios):.2f} to {max(ratios):.2f})",
                flush=True,
            )

    hugging_face, again = scratch / "hugging_face", scratch / "again.npz"
    timed_import(released)
    step("to_hugging_face", released, hugging_face)
    timed_import(hugging_face)
    step("to_big_vision", hugging_face, again)
    print(f"npz -> ours -> HF -> ours -> npz: {compare(open_npz(released), open_npz(again))}")
    again.unlink()
    back = scratch / "hugging_face_again"
    step("to_hugging_face", hugging_face, back)
    found = compare(open_safetensors(hugging_face), open_safetensors(back))
    print(f"HF -> ours -> HF: {found}", flush=True)
    shutil.rmtree(back)
    shutil.rmtree(hugging_face)
    weights = scratch / "weights"
    step("to_weights", released, weights)
    step("to_big_vision", weights, again)
    print(f"npz -> weights -> npz: {compare(open_npz(released), open_npz(again))}", flush=True)


def run_step(step: str, source: str, tokenizer: str, out: pathlib.Path) -> None:
    """Runs one step in this process and prints its seconds and the process's peak memory."""
    import jax  # starting it is not the import's time

    jax.devices()
    start = time.perf_counter()
    if step == "read":
        files = (
            [source] if source.endswith(".npz") else sorted(glob.glob(f"{source}/*.safetensors"))
        )
        kept = [read_plainly(file) for file in files]
        assert sum(map(len, kept))
        print(time.perf_counter() - start, peak_memory())
        return
    tokens = tokenizer if source.endswith(".npz") else ""
    opened = weights.open_source(source, tokenizer_path=tokens)
    if step == "import":
        jax.block_until_ready(opened.load())
    elif step == "to_hugging_face":
        weights.export_hf(opened, out)
    elif step == "to_big_vision":
        weights.export_big_vision(opened, out)
    else:
        weights.convert(opened, out)
    print(time.perf_counter() - start, peak_memory())


def peak_memory() -> int:
    """Most bytes that this process has held at a time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_plainly(file: str) -> np.ndarray:
    """The bytes of a file in fresh memory."""
    content = np.empty(os.path.getsize(file), np.uint8)
    with open(file, "rb", buffering=0) as stream:
        view = memoryview(content)
        while view:
            view = view[stream.readinto(view[: 2**20]) :]
    return content


def forget(files: Sequence[pathlib.Path]) -> None:
    """Has the operating system drop the files from its cache."""
    for file in files:
        with open(file, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compare(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> str:
    """Whether two checkpoints hold the same names and bits."""
    if sorted(before) != sorted(after):
        return f"DIFFERENT names: {sorted(before.keys() ^ after.keys())}"
    different = [
        name
        for name, tensor in before.items()
        if tensor.dtype != after[name].dtype
        or tensor.shape != after[name].shape
        or any(
            a.tobytes() != b.tobytes()
            for a, b in zip(tensor.slabs(), after[name].slabs(), strict=True)
        )
    ]
    if different:
        return f"DIFFERENT: {different}"
    size = sum(map(num_bytes, before.values()))
    return f"{len(before)} tensors, {size / 1e9:.2f} GB, equal to the bit"


def make_tokenizer(path: pathlib.Path, vocab_size: int) -> pathlib.Path:
    """A tokenizer of so many pieces in PaliGemma's layout, most of them never met in a text."""
    train_tokenizer(["yes", "no", "a title and what is said"], path, vocab_size=300)
    model = spm.ModelProto.FromString(path.read_bytes())
    loc_seg = [model.pieces.pop() for _ in LOC_SEG][::-1]
    known = {piece.piece for piece in model.pieces}
    letters = [piece for piece in known if len(piece) == 1 and piece.isalpha()]
    # A piece that is there and a letter behind it, as byte-pair encoding makes them.
    made = list(letters)
    for first in made:
        for letter in letters:
            if len(model.pieces) + len(loc_seg) < vocab_size and first + letter not in known:
                known.add(first + letter)
                made.append(first + letter)
                model.pieces.add(piece=first + letter, score=-float(len(model.pieces)))
        if len(model.pieces) + len(loc_seg) == vocab_size:
            break
    model.pieces.extend(loc_seg)
    model.trainer_spec.vocab_size = len(model.pieces)
    path.write_bytes(model.SerializeToString())
    return path


if __name__ == "__main__":
    sys.exit(main())
