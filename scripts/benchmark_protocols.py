"""What segmenting and evaluating cost: `python scripts/benchmark_protocols.py --data DIR`.

KTS against a plain dynamic programme that tries every number of changes, in turns, on features of
TVSum and on noise; KTS of a video of 10,000 frames in a process of its own, for its peak memory;
every annotator's summary of TVSum by the knapsack; and the whole evaluation of random predictions,
through the functions that `--mode evaluate` calls, against a loop over videos and annotators with
scipy's tau-b and rho. The loop has the same knapsack, so the ratio is of the measures alone.

DIR holds the download of TVSum as `tvsum/` and the community's HDF5 file of its features, in it or
as `features/*tvsum*.h5` beside it. Times are CPU times of the process, all threads together.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import os
import pathlib
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from scipy import stats

from deevisum_jax.errors import UserError, exits_cleanly
from deevisum_jax.summary import kts, metrics, protocols, select
from deevisum_jax.summary.protocols import VideoGroundTruth
from tfds_builders import community_features, downloads
from tfds_builders.community_features import Described
from tfds_builders.tvsum import annotations

_RATE = 15  # native frames per row of features
_LONG = 10_000


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status, 1 where results differ from the references'."""
    parser = argparse.ArgumentParser(
        prog="python scripts/benchmark_protocols.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--data", metavar="DIR", default=os.environ.get("DEEVISUM_DATA"),
        help="(default: the environment's DEEVISUM_DATA)")  # fmt: skip
    add("--repeats", type=int, default=5, help="of both, in turns (default: %(default)s)")
    add("--frames", type=int, nargs="+", default=[700, 1300], metavar="N",
        help="lengths of KTS against the plain programme (default: 700 1300)")  # fmt: skip
    add("--long", type=int, default=_LONG, metavar="N", help="of KTS alone (default: %(default)s)")
    args = parser.parse_args(argv)
    if args.data is None:
        raise UserError("which data? give --data, or set DEEVISUM_DATA")
    folder = pathlib.Path(args.data) / "tvsum"
    annotated, described, features = read(folder)
    truths = [truth(video, described[video.video_id]) for video in annotated]

    equal = True
    for n in args.frames:
        noise = np.random.default_rng(0).normal(size=(n, features.shape[1]))
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        for name, rows in (("TVSum", features[:n].astype(np.float64)), ("noise", noise)):
            found = in_turn(
                args.repeats,
                plain=lambda rows=rows: plain_kts(rows, len(rows) - 1, 1.0, _RATE)[0],
                ours=lambda rows=rows: segment(rows),
            )
            same = np.array_equal(*(found[way][1] for way in found))
            equal &= same
            print(
                f"KTS, {n} frames of {name}: {len(found['ours'][1])} changes, "
                f"{'the same' if same else 'NOT THE SAME'}; {_times(found)}"
            )

    context = multiprocessing.get_context("spawn")  # a process with a memory of its own
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        cpu_s, changes, peak_gib = pool.submit(long_video, folder, args.long).result()
    print(
        f"KTS, {args.long:,} frames: {changes} changes, {cpu_s:.1f} s, peak {peak_gib:.2f} GiB of "
        "the whole process"
    )

    found = in_turn(args.repeats, knapsack=lambda: summarize(annotated, truths))
    summaries = sum(len(gt.user_scores) for gt in truths)
    print(f"Knapsack, {summaries} summaries of TVSum: {_seconds(found['knapsack'][0])}")

    rng = np.random.default_rng(0)
    predictions = [rng.random(len(gt.score_times)) for gt in truths]
    found = in_turn(
        args.repeats,
        plain=lambda: evaluate_plainly(truths, predictions),
        ours=lambda: evaluate(truths, predictions),
    )
    off = np.abs(found["plain"][1] - found["ours"][1]).max()
    equal &= bool(off <= 1e-12)
    print(f"Evaluation of {len(truths)} videos: greatest difference {off:.1e}; {_times(found)}")
    found = in_turn(args.repeats, human=lambda: [protocols.human_agreement(gt) for gt in truths])
    print(f"Human row: {_seconds(found['human'][0])}")
    return 0 if equal else 1


def read(
    folder: pathlib.Path,
) -> tuple[list[annotations.VideoAnnotation], Mapping[str, Described], np.ndarray]:
    """The annotations, the community's file, and float16[T, D], the features of all its videos.

    Raises:
      UserError: they are not there, or not what they should be.
    """
    annotated = annotations.load(folder)
    path = downloads.features_file(folder, "tvsum")
    if path is None:
        raise UserError(
            f"{folder}: no HDF5 file of features in it or in ../features; put one there"
        )
    described = community_features.read(path, annotations.VIDEO_IDS)
    if missing := [v.video_id for v in annotated if v.video_id not in described]:
        raise UserError(f"{path} lacks {', '.join(missing)}; take a file of all videos")
    rows = [described[video.video_id].features for video in annotated]
    return annotated, described, np.concatenate(rows)


def truth(video: annotations.VideoAnnotation, described: Described) -> VideoGroundTruth:
    """A video as the evaluation has it."""
    return VideoGroundTruth(
        video_id=video.video_id,
        n_frames=video.n_frames,
        native_fps=video.n_frames / video.length_s,
        duration_s=video.length_s,
        score_times=video.point_times,
        user_scores=video.point_scores,
        user_summary=described.user_summary > 0,
        shots=described.change_points,
    )


def in_turn(repeats: int, **ways: Callable[[], object]) -> dict[str, tuple[list[float], object]]:
    """CPU seconds of every repeat, and the last result, by name; once before to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    results = {name: way() for name, way in ways.items()}
    for _ in range(repeats):
        for name, way in ways.items():
            began = time.process_time()
            results[name] = way()
            seconds[name].append(time.process_time() - began)
    return {name: (seconds[name], results[name]) for name in ways}


def segment(features: np.ndarray) -> np.ndarray:
    """KTS as the field calls it: any number of changes, vmax 1."""
    return kts.change_points(features, max_change_points=len(features) - 1, descriptor_rate=_RATE)


def plain_kts(
    features: np.ndarray, most: int, penalty: float, rate: float
) -> tuple[np.ndarray, np.ndarray]:
    """The published programme with its inner loop in numpy, for every number of changes.

    Args:
      features: float64[n, D].
      most: the greatest number of changes tried, at most n - 1.
      penalty: as `kts.change_points`.
      rate: its `descriptor_rate`.

    Returns:
      int64[m], the changes, and float64[most + 1], the cost of every number of changes.
    """
    n, kernel = len(features), features @ features.T
    diagonal = np.concatenate([[0.0], np.cumsum(np.diag(kernel))])
    square = np.zeros((n + 1, n + 1))
    square[1:, 1:] = kernel.cumsum(0).cumsum(1)
    corner, row = np.diag(square), np.arange(n)
    inside = corner[None, 1:] + corner[:-1, None] - square[1:, :-1].T - square[:-1, 1:]
    inside /= np.maximum(row[None] + 1 - row[:, None], 1)
    scatters = diagonal[None, 1:] - diagonal[:-1, None] - inside  # of rows i..j
    table = np.full((most + 1, n + 1), np.inf)
    before = np.zeros((most + 1, n + 1), np.int64)
    table[0, 1:] = scatters[0]
    for k in range(1, most + 1):
        for end in range(k + 1, n + 1):
            sums = table[k - 1, k:end] + scatters[k:end, end - 1]
            best = sums.argmin()
            table[k, end], before[k, end] = sums[best], best + k
    count, native = np.arange(1, most + 1), n * rate
    costs = table[:, n] / n
    costs[1:] += (penalty * count / (2.0 * native)) * (np.log(native / count) + 1)
    changes, end = np.empty(int(costs.argmin()), np.int64), n
    for k in range(len(changes), 0, -1):
        end = changes[k - 1] = before[k, end]
    return changes, costs


def long_video(folder: pathlib.Path, n: int) -> tuple[float, int, float]:
    """CPU seconds, changes, and peak GiB of this process, of KTS on n rows of features.

    They are TVSum's, again and again, with a little noise so that no two are equal.
    """
    _, _, known = read(folder)
    features = np.resize(known, (n, known.shape[1])).astype(np.float32)
    features += 0.003 * np.random.default_rng(0).standard_normal(features.shape, np.float32)
    began = time.process_time()
    changes = segment(features)
    cpu_s = time.process_time() - began
    return cpu_s, len(changes), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def summarize(
    annotated: Sequence[annotations.VideoAnnotation], truths: Sequence[VideoGroundTruth]
) -> list[np.ndarray]:
    """Every annotator's summary of every video."""
    return [
        select.annotator_summaries(video.user_scores, gt.shots, gt.n_frames)
        for video, gt in zip(annotated, truths, strict=True)
    ]


def evaluate(truths: Sequence[VideoGroundTruth], predictions: Sequence[np.ndarray]) -> np.ndarray:
    """float64[videos, 3]: F1, tau and rho."""
    found = [
        protocols.evaluate_frames(gt, protocols.hold_points(gt, scores))
        for gt, scores in zip(truths, predictions, strict=True)
    ]
    return np.array([(result.f1, result.tau, result.rho) for result in found])


def evaluate_plainly(
    truths: Sequence[VideoGroundTruth], predictions: Sequence[np.ndarray]
) -> np.ndarray:
    """The same, one annotator after the other."""
    rows = []
    for gt, scores in zip(truths, predictions, strict=True):
        (summary,) = select.annotator_summaries(
            protocols.hold_points(gt, scores)[None], gt.shots, gt.n_frames
        )
        people = list(zip(gt.user_summary, gt.user_scores, strict=True))
        rows.append(
            (
                np.mean([metrics.f1(summary, person) for person, _ in people]),
                np.mean([stats.kendalltau(scores, person).statistic for _, person in people]),
                np.mean([stats.spearmanr(scores, person).statistic for _, person in people]),
            )
        )
    return np.array(rows)


def _seconds(found: Sequence[float]) -> str:
    return f"{statistics.median(found):.3f} s ({min(found):.3f} to {max(found):.3f})"


def _times(found: Mapping[str, tuple[list[float], object]]) -> str:
    plain, ours = (found[way][0] for way in ("plain", "ours"))
    ratios = [a / b for a, b in zip(plain, ours, strict=True)]
    return (
        f"plain {_seconds(plain)}, ours {_seconds(ours)}, ratio {statistics.median(ratios):.1f} "
        f"({min(ratios):.1f} to {max(ratios):.1f})"
    )


if __name__ == "__main__":
    sys.exit(main())
