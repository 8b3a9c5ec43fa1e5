"""How fast keyframes are selected, and in how much memory: `python scripts/benchmark_keyframes.py`.

Videos are random: scenes of unit length with noise, in which frames repeat each other. In one kind
a scene lasts 20 frames, and K keyframes are soon found; the other has 16 scenes in all, fewer than
K, so that the walk visits every frame and the budget is filled.

Each selection is timed between two passes over the features (one matrix-vector product in jax,
float32 result), round after round; the ratio is to the mean of these two. Up to --matrix frames the
N x N walk in numpy is timed too, in the same run: the matrix of all similarities, one product in
float32, then the published loop. Memory is the peak resident set of a process of its own that
makes the embeddings and selects once, everything included.

With --topology the selection is compiled for one TPU chip, too, by shape: what it needs in memory,
and how long the compiler's estimate and the bytes read and written make it, each branch taken and
loops of which nobody knows the trips run once. Needs the TPU compiler (docs/TPU.md) and no TPU.
"""

from __future__ import annotations

import argparse
import pathlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from deevisum_jax.errors import UserError, exits_cleanly
from deevisum_jax.keyframes import selection
from deevisum_jax.keyframes.selection import SelectionConfig
from deevisum_jax.planner import chips, environment
from deevisum_jax.planner.chips import Topology
from deevisum_jax.planner.hlo import Program

_SCENES = {"scenes of 20": None, "16 scenes": 16}  # how many, None: one per 20 frames


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--num_frames", type=int, nargs="+", default=[1000, 10_000, 100_000, 1_000_000]
    )
    parser.add_argument("--width", type=int, default=512, help="of an embedding")
    parser.add_argument("--num_keyframes", type=int, default=32)
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--matrix", type=int, default=10_000, help="most frames of the N x N walk")
    parser.add_argument("--topology", default="", help="one chip of a known kind: v5e:1x1, v6e:1x1")
    parser.add_argument("--memory_of", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    for name in ("rounds", "width"):
        if getattr(args, name) < 2:
            parser.error(f"--{name} {getattr(args, name)}: give 2 or more")
    if min(args.num_frames) < 1:
        parser.error(f"--num_frames {min(args.num_frames)}: give 1 or more")
    config = SelectionConfig(num_keyframes=args.num_keyframes)
    topology = chips.topology(args.topology) if args.topology else None
    if topology:
        environment.prepare()

    if args.memory_of:
        [num_frames] = args.num_frames
        frames, query = make_video(num_frames, args.width, _SCENES[args.memory_of], args.dtype)
        jax.block_until_ready(selection.select(frames, query, config=config))
        print(own_peak_kib())
        return 0

    device = jax.devices()[0]
    print(
        f"{args.dtype}, E = {args.width}, K = {config.num_keyframes}, on {device.device_kind}; "
        f"medians and quartiles of {args.rounds} interleaved rounds\n"
    )
    titles = ("N", "video", "select", "one pass", "select / pass", "N x N walk", "walk / select")
    print(f"| {' | '.join((*titles, 'peak memory'))} |\n|{'---|' * (len(titles) + 1)}", flush=True)
    for num_frames in args.num_frames:
        for kind, scenes in _SCENES.items():
            frames, query = make_video(num_frames, args.width, scenes, args.dtype)
            cells = [f"{num_frames:,}", kind, *timed(frames, query, config, args)]
            print(f"| {' | '.join((*cells, peak_memory(num_frames, kind, args)))} |", flush=True)
    if topology:
        print_estimates(topology, config, args)
    return 0


def print_estimates(topology: Topology, config: SelectionConfig, args: argparse.Namespace) -> None:
    """A table of what one chip of a slice takes, a row for each length.

    Raises:
      UserError: the compiler does not know the slice.
    """
    chip = topology.chip
    where = SingleDeviceSharding(environment.devices(topology)[0])
    print(f"\none chip of {topology.name}, compiled for by shape\n")
    titles = ("N", "peak MiB", "of these features", "HBM ms", "compiler's ms", "one pass, HBM ms")
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    for num_frames in args.num_frames:
        shape = (num_frames, args.width)
        frames = jax.ShapeDtypeStruct(shape, jnp.dtype(args.dtype), sharding=where)
        query = jax.ShapeDtypeStruct(shape[1:], jnp.float32, sharding=where)
        with environment.uncached():
            compiled = selection.select.lower(frames, query, config=config).compile()
        program = Program(compiled.as_text())
        features = frames.size * frames.dtype.itemsize
        cells = (
            f"{num_frames:,}",
            f"{compiled.memory_analysis().peak_memory_in_bytes / 2**20:,.0f}",
            f"{features / 2**20:,.0f}",
            f"{1e3 * program.hbm_bytes / chip.hbm_bytes_per_s:.3f}",
            f"{1e3 * program.cycles / chip.clock_hz:.3f}",
            f"{1e3 * features / chip.hbm_bytes_per_s:.3f}",
        )
        print(f"| {' | '.join(cells)} |", flush=True)


def make_video(
    num_frames: int, width: int, scenes: int | None, dtype: str
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [N, E] of that dtype and a query float32[E], without a float32 copy of all."""
    rng = np.random.default_rng(0)
    scenes = scenes or -(-num_frames // 20)
    centres = rng.standard_normal((scenes, width), np.float32) / np.float32(width**0.5)
    frames = np.empty((num_frames, width), jnp.dtype(dtype))
    for start in range(0, num_frames, 4096):
        stop = min(start + 4096, num_frames)
        noise = rng.standard_normal((stop - start, width), np.float32)
        scene = np.arange(start, stop) * scenes // num_frames
        frames[start:stop] = centres[scene] + np.float32(0.3 / width**0.5) * noise
    return frames, rng.standard_normal(width, np.float32)


def timed(
    frames: np.ndarray, query: np.ndarray, config: SelectionConfig, args: argparse.Namespace
) -> list[str]:
    """Cells: of the selection, of one pass, of the N x N walk, and their ratios."""
    on_device, vector = jnp.asarray(frames), jnp.asarray(query)
    product = jax.jit(
        lambda x, q: jnp.dot(x, q.astype(x.dtype), preferred_element_type=jnp.float32)
    )

    def one_pass() -> None:
        jax.block_until_ready(product(on_device, vector))

    def select() -> None:
        jax.block_until_ready(selection.select(on_device, vector, config=config))

    for run in (one_pass, select):
        run()  # compiles
    passes, selects = [seconds(one_pass)], []
    for _ in range(args.rounds):
        selects.append(seconds(select))
        passes.append(seconds(one_pass))
    over = [2 * t / (a + b) for t, a, b in zip(selects, passes, passes[1:], strict=False)]
    cells = [milliseconds(selects), milliseconds(passes), spread(over)]
    if len(frames) > args.matrix:
        return [*cells, "-", "-"]
    found = np.asarray(selection.select(on_device, vector, config=config).index)
    floats = frames.astype(np.float32)
    walks = []
    for _ in range(min(args.rounds, 3)):
        start = time.perf_counter()
        kept = matrix_walk(floats, query, config)
        walks.append(time.perf_counter() - start)
        selects.append(seconds(select))
    if not set(kept) <= set(found.tolist()):
        print(f"(the float32 N x N walk kept {len(set(kept) - set(found.tolist()))} other frames)")
    ratio = statistics.median(walks) / statistics.median(selects)
    return [*cells, milliseconds(walks), f"{ratio:.0f}"]


def matrix_walk(frames: np.ndarray, query: np.ndarray, config: SelectionConfig) -> list[int]:
    """The walk as released, by a matrix of all similarities in float32; without filling."""
    units = frames / np.linalg.norm(frames, axis=1, keepdims=True)
    relevance = units @ (query / np.linalg.norm(query))
    similarity = units @ units.T
    visited = np.zeros(len(frames), bool)
    kept: list[int] = []
    for frame in np.argsort(-relevance, kind="stable"):
        if len(kept) == config.num_keyframes:
            break
        if not visited[frame]:
            kept.append(int(frame))
            visited |= similarity[frame] > config.tau
    return kept


def own_peak_kib() -> int:
    """Of this process; `ru_maxrss` would begin with what the process that started it had."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s*(\d+) kB", status)[1])


def peak_memory(num_frames: int, kind: str, args: argparse.Namespace) -> str:
    """Of a process that does nothing else."""
    flags = ["--num_frames", num_frames, "--memory_of", kind, "--dtype", args.dtype]
    flags += ["--width", args.width, "--num_keyframes", args.num_keyframes]
    command = [sys.executable, __file__, *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{' '.join(command)} failed: {done.stderr.strip()[-300:]}")
    return f"{int(done.stdout) / 2**10:,.0f} MiB"


def seconds(run: Callable[[], None]) -> float:
    """Of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def milliseconds(times: Sequence[float]) -> str:
    """The median, and the shortest."""
    return f"{1e3 * statistics.median(times):.2f} ms (least {1e3 * min(times):.2f})"


def spread(ratios: Sequence[float]) -> str:
    """The median and the quartiles."""
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{median:.1f} [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    sys.exit(main())
