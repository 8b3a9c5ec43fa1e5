"""Whether calibration keeps its promise: `python scripts/recalibrate.py --workdir RUN`.

Scores all videos that a run's config calibrates on once. Then, time after time with a fresh seed,
some of them are drawn at random and calibrate early exit from the start, search and test; what the
chosen policy loses on average over all the others tells whether the promise was kept. That mean has
an error of its own, which is printed: with it a promise that is just kept may look broken, and the
other way round.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import math
import sys

import jax
import numpy as np

from deevisum_jax import datasets, evaluation, experiment
from deevisum_jax.data import pipeline
from deevisum_jax.errors import exits_cleanly
from deevisum_jax.files import locate
from deevisum_jax.inference import exit_policy, scoring
from deevisum_jax.inference.calibration import METRICS
from deevisum_jax.summarize import Student


@exits_cleanly
def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, metavar="RUN", help="a trained run")
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--videos", type=int, default=400, help="drawn each time")
    parser.add_argument("--bound", choices=("exact", "normal"), help="default: the config's")
    parser.add_argument("--f1", type=float, help="the F1 that may be lost; default: the config's")
    parser.add_argument("--tau", type=float, help="likewise")
    args = parser.parse_args()

    student = Student(locate(args.workdir))
    config = student.config
    changed = {name: getattr(args, name) for name in ("bound", "f1", "tau")}
    changed = {name: value for name, value in changed.items() if value is not None}
    config = dataclasses.replace(
        config, calibration=dataclasses.replace(config.calibration, **changed)
    )
    data, split = config.calibrated_on
    records = datasets.Dataset(data).split(split)
    if not 1 <= args.videos < len(records):
        parser.error(f"--videos must leave some of the {len(records)} that there are")
    if args.times < 1:
        parser.error("--times must be at least 1")
    truths = evaluation.ground_truths(records, evaluation.protocol_of(config.eval))
    of_data = dataclasses.replace(config, data=data)
    source = experiment.make_source(of_data, records, student.encoder)
    with jax.set_mesh(student.mesh):
        score_fn = scoring.make_score_fn(
            student.model_config, student.param_shardings, student.mesh
        )
        found = scoring.score_videos(
            functools.partial(score_fn, student.params),
            pipeline.in_order(source, batch_size=config.eval.batch_size),
            student.mesh,
        )

    settings = config.calibration
    print(
        f"{args.times} calibrations on {args.videos} of {len(truths)} videos each; bound "
        f"{settings.bound}, delta {settings.delta:g}, F1 {settings.f1}, tau {settings.tau}"
    )
    broken, saved = 0, []
    for seed in range(args.times):
        order = np.random.default_rng(seed).permutation(len(truths))
        drawn, others = (
            _some(order[part], truths, source.bounds, found)
            for part in (slice(args.videos), slice(args.videos, None))
        )
        calibration = evaluation.calibrate(
            *drawn, dataclasses.replace(config, seed=seed), student.model_config
        )
        policy = calibration.policy
        leave = lambda scores, policy=policy: scoring.at_exit(scores, policy).importance
        full, early = (
            evaluation.evaluate(*others, choose, config) for choose in (evaluation.deepest, leave)
        )
        told, kept = [], True
        for metric in METRICS:
            losses = [
                getattr(a, metric) - getattr(b, metric)
                for a, b in zip(full.per_video, early.per_video, strict=True)
            ]
            mean, error = np.mean(losses), np.std(losses, ddof=1) / math.sqrt(len(losses))
            kept &= mean <= calibration.promise.epsilons.get(metric, math.inf)
            told.append(f"{metric} lost {mean:+.4f} (standard error {error:.4f})")
        cost = evaluation.early_exit_cost(others[1], config, student.model_config, policy)
        broken += not kept
        saved.append(cost["compute_saved"])
        print(
            f"{seed:3d} {'kept  ' if kept else 'BROKEN'} FLOPs saved {saved[-1]:.3f}, "
            f"{', '.join(told)}: {exit_policy.describe(policy, student.model_config.exit_layers)}"
        )
    low, middle, high = np.percentile(saved, (25, 50, 75))
    print(
        f"kept {args.times - broken} of {args.times} times; promised is at least "
        f"{100 * (1 - settings.delta):g} %. FLOPs saved: median {middle:.3f}, quartiles {low:.3f} "
        f"and {high:.3f}"
    )
    return 0


def _some(rows, truths, bounds, found):
    """Annotations and scores of some of the videos."""
    prediction = evaluation.Prediction(
        bounds=[bounds[row] for row in rows], scores=[found[row] for row in rows]
    )
    return [truths[row] for row in rows], prediction


if __name__ == "__main__":
    sys.exit(main())
