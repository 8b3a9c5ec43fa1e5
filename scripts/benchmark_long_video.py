"""A long video to keyframes and merged tokens: `python scripts/benchmark_long_video.py`.

Generated frames of 224 px go through encode, keyframe selection (DKS) and merging (DFM) as they are
made (`keyframes.stream.condense`), at several lengths. Each run is a process of its own, lengths
take turns, and what is compiled for all lengths is compiled before the clock starts. The encoder is
a small SigLIP of random weights whose 256 patches of a frame have the width of So400m's, 1152.

Shown per length are the medians of all rounds [least, most]: wall time and CPU time of both passes,
and the most memory that the process held, beside what it hands over: an embedding and a merged
token of each frame and the patches of the keyframes. Then a line is fitted to time over frames.
"""

from __future__ import annotations

import argparse
import functools
import json
import pathlib
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deevisum_jax.errors import exits_cleanly
from deevisum_jax.keyframes import stream
from deevisum_jax.keyframes.merging import MergingConfig
from deevisum_jax.keyframes.selection import SelectionConfig
from deevisum_jax.models.merging import DifferentialMerging
from deevisum_jax.models.siglip import Siglip, SiglipConfig

_SIZE, _PATCH, _WIDTH = 224, 14, 1152
_SCENE = 50  # frames
_MIB = 2**20


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args = _parse(argv)
    if args.one:
        print(json.dumps(_measure(args, args.one)))
        return 0
    found = {num_frames: [] for num_frames in args.frames}
    for number in range(args.rounds):
        for num_frames in args.frames:
            command = [sys.executable, __file__, *(argv or sys.argv[1:]), "--one", str(num_frames)]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if run.returncode:
                return run.returncode
            found[num_frames].append(json.loads(run.stdout.splitlines()[-1]))
            print(f"round {number + 1}: {run.stdout.strip()}", file=sys.stderr, flush=True)
    print(_table(found))
    for clock in ("wall_s", "cpu_s"):
        print(_line(found, clock))
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--frames", type=int, nargs="+", default=[2000, 5000, 10_000], help="lengths")
    add("--rounds", type=int, default=3)
    add("--chunk_size", type=int, default=16, help="frames encoded at a time")
    add("--num_keyframes", type=int, default=32)
    add("--projections", action="store_true", help="merge in the released mode")
    add("--width", type=int, default=128, help="of the encoder, inside")
    add("--depth", type=int, default=1, help="layers of the encoder")
    add("--one", type=int, default=0, help="measure one length in this process, as JSON")
    args = parser.parse_args(argv)
    counts = (*args.frames, args.rounds, args.chunk_size, args.num_keyframes, args.depth)
    if min(counts) < 1:
        parser.error("lengths, rounds, sizes and depth must be at least 1")
    return args


def _measure(args: argparse.Namespace, num_frames: int) -> dict[str, float]:
    """Seconds, bytes, by their names in the table."""
    config = SiglipConfig(
        image_size=_SIZE,
        patch_size=_PATCH,
        width=args.width,
        depth=args.depth,
        mlp_dim=4 * args.width,
        num_heads=max(args.width // 64, 1),
    )
    rngs = nnx.Rngs(0)
    encoder = nnx.split(Siglip(config, out_width=_WIDTH, param_dtype="float32", rngs=rngs))
    merging = MergingConfig(projections=args.projections)
    merger = DifferentialMerging(
        merging, width=_WIDTH, query_width=_WIDTH, param_dtype="float32", rngs=rngs
    )

    @functools.partial(jax.jit, static_argnums=0)
    def patches(graph, params, frames):
        return nnx.merge(graph, params)(frames.astype(jnp.float32) / 127.5 - 1.0)

    @functools.partial(jax.jit, static_argnums=0)
    def embed(graph, params, frames):
        return jnp.mean(patches(graph, params, frames), axis=1)

    # A query that is a frame of the video.
    query = embed(*encoder, next(_chunks(1, 1)))[0]
    condense = functools.partial(
        stream.condense,
        embed=functools.partial(embed, *encoder),
        patches=functools.partial(patches, *encoder),
        query=query,
        patch_query=query,
        selection=SelectionConfig(num_keyframes=args.num_keyframes),
        merging=merging,
        params=merger.whole("float32"),
    )
    # Compiles, but for the choice among so many embeddings.
    condense(functools.partial(_chunks, 2 * args.chunk_size, args.chunk_size))
    before = _resident("VmRSS")
    start, cpu = time.monotonic(), time.process_time()
    made = condense(functools.partial(_chunks, num_frames, args.chunk_size))
    jax.block_until_ready(made)
    return {
        "frames": num_frames,
        "wall_s": time.monotonic() - start,
        "cpu_s": time.process_time() - cpu,
        "before_bytes": before,
        "peak_bytes": _resident("VmHWM"),
        "output_bytes": made.embeddings.nbytes + made.merged.nbytes + made.key_patches.nbytes,
    }


def _chunks(num_frames: int, size: int) -> Iterator[np.ndarray]:
    """uint8[C, H, W, 3]: scenes of blocks of colour, under noise."""
    noise = np.random.default_rng(0).integers(0, 32, (size, _SIZE, _SIZE, 3), np.uint8)
    for start in range(0, num_frames, size):
        scenes = np.arange(start, min(start + size, num_frames)) // _SCENE
        blocks = np.stack(
            [np.random.default_rng(scene).integers(0, 224, (8, 8, 3), np.uint8) for scene in scenes]
        )
        times = _SIZE // 8
        frames = blocks.repeat(times, axis=1).repeat(times, axis=2)
        # Other noise on each frame of a scene.
        yield frames + np.roll(noise[: len(frames)], start // size * 7, axis=2)


def _resident(name: str) -> int:
    """Bytes of this process's memory by a name in /proc (Linux); VmHWM is the most so far.

    The figure of `getrusage` begins with that of the process which started this one.
    """
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+) kB", status)[1]) * 2**10


def _table(found: dict[int, list[dict[str, float]]]) -> str:
    titles = (
        "frames",
        "wall s",
        "CPU s",
        "ms per frame",
        "peak MiB",
        "outputs MiB",
        "peak - outputs",
    )
    rows = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for num_frames, runs in found.items():
        of = lambda name, runs=runs: np.array([run[name] for run in runs])
        cells = (
            str(num_frames),
            _spread(of("wall_s"), ".1f"),
            _spread(of("cpu_s"), ".1f"),
            f"{np.median(of('wall_s')) / num_frames * 1e3:.2f}",
            _spread(of("peak_bytes") / _MIB, ".0f"),
            f"{np.median(of('output_bytes')) / _MIB:.0f}",
            _spread((of("peak_bytes") - of("output_bytes")) / _MIB, ".0f"),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _spread(values: np.ndarray, form: str) -> str:
    return f"{np.median(values):{form}} [{values.min():{form}}, {values.max():{form}}]"


def _line(found: dict[int, list[dict[str, float]]], clock: str) -> str:
    """A line through the medians, and how far they are from it."""
    if len(found) < 2:
        return f"{clock}: one length gives no line"
    frames = np.array(list(found), float)
    seconds = np.array([np.median([run[clock] for run in runs]) for runs in found.values()])
    slope, rest = np.polyfit(frames, seconds, 1)
    apart = np.abs(seconds - (slope * frames + rest)) / seconds
    return (
        f"{clock} = {rest:.2f} + {slope * 1e3:.3f} ms per frame; medians are at most "
        f"{apart.max():.1%} away from the line"
    )


if __name__ == "__main__":
    sys.exit(main())
