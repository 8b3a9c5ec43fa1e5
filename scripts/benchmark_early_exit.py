"""What leaving early saves and costs: `python scripts/benchmark_early_exit.py --workdir RUN`.

Takes a calibrated run (--mode calibrate) and scores a split under every policy of its curve, in
stages, as `summarize` does. Time is that of one pass over all segments, pictures encoded and all,
nothing decoded: each policy is timed between two runs of the full model in one compiled function,
round after round, and the share that it saves is against the mean of these two. Quality is that of
the split. The line "off" is the staged executor with nobody leaving.
"""

from __future__ import annotations

import argparse
import functools
import sys

import jax
import numpy as np

from deevisum_jax import datasets, evaluation, experiment, runs, sharding
from deevisum_jax.data import pipeline
from deevisum_jax.errors import UserError, exits_cleanly
from deevisum_jax.files import locate
from deevisum_jax.inference import exit_policy, scoring, speed
from deevisum_jax.inference.cost import exit_flops
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.summarize import Student


@exits_cleanly
def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, metavar="RUN", help="a calibrated run")
    parser.add_argument("--split", default="", help="default: eval.test_split")
    parser.add_argument("--batch_size", type=int, default=0, help="default: eval.batch_size")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--repeat",
        type=int,
        default=1,
        help="times the split is scored in one stream; with more of them its end weighs less",
    )
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")

    run = locate(args.workdir)
    calibration = runs.load_calibration(run)
    if calibration is None:
        raise UserError(
            f"{run} was not calibrated; first python -m deevisum_jax.main ... --mode calibrate"
        )
    student = Student(run)
    config, model = student.config, student.model_config
    records = datasets.Dataset(config.data).split(args.split or config.eval.test_split)
    truths = evaluation.ground_truths(records, evaluation.protocol_of(config.eval))
    source = experiment.make_source(config, records, student.encoder)
    batch_size = args.batch_size or config.eval.batch_size
    sharding.check_batch("--batch_size", batch_size, student.mesh)
    batches = list(pipeline.in_order(source, batch_size=batch_size))
    policies = [point.policy for point in calibration.curve]
    with jax.set_mesh(student.mesh):
        score_fn = functools.partial(
            scoring.make_score_fn(model, student.param_shardings, student.mesh), student.params
        )
        stream = batches * args.repeat
        full = functools.partial(scoring.score_videos, score_fn, stream, student.mesh)
        staged = functools.partial(student.scorer.score_videos, student.params, stream)
        ways = {str(k): functools.partial(staged, policy) for k, policy in enumerate(policies)}
        seconds, saved = speed.time_saved(full, ways, rounds=args.rounds)
        found = scoring.score_videos(score_fn, batches, student.mesh)
        off = ExitPolicy.off(len(model.exit_layers))
        of_stages = student.scorer.score_videos(student.params, batches, off)
    prediction = evaluation.Prediction(
        bounds=source.bounds, scores=[found[row] for row in range(len(truths))]
    )
    apart = max(
        np.abs(found[row].importance[-1] - of_stages[row].importance).max() for row in found
    )

    print(
        f"{args.repeat} x {len(source)} segments in batches of {batch_size} on "
        f"{jax.device_count()} x {jax.devices()[0].device_kind}; the full model takes "
        f"{seconds['wall']:.3f} s (CPU time {seconds['cpu']:.3f} s), median; {args.rounds} rounds\n"
        f"scores at the last exit, staged and not, differ by {apart:.1e} at most\n"
    )
    titles = ("leaves", "depth", "FLOPs saved", "time saved", "CPU time saved", "time / FLOPs")
    print(f"| {' | '.join((*titles, 'F1', 'tau', 'F1 lost', 'tau lost'))} |")
    print(f"|{'---|' * (len(titles) + 4)}")
    flops = exit_flops(model, config.data)
    layers = np.asarray(model.exit_layers)
    base = evaluation.evaluate(truths, prediction, evaluation.deepest, config)
    for k, policy in enumerate(policies):
        exits = np.concatenate([policy.exit_index(scores) for scores in prediction.scores])
        less = 1 - flops[exits].mean() / flops[-1]
        leave = lambda scores, policy=policy: scoring.at_exit(scores, policy).importance
        result = evaluation.evaluate(truths, prediction, leave, config)
        times = [saved[clock][str(k)] for clock in ("wall", "cpu")]
        chosen = " (chosen)" if k == calibration.chosen else ""
        cells = (
            exit_policy.describe(policy, model.exit_layers) + chosen,
            f"{layers[exits].mean():.2f}",
            f"{100 * less:.1f} %",
            *(f"{100 * t.median:.1f} % [{100 * t.low:.1f}, {100 * t.high:.1f}]" for t in times),
            f"{times[0].median / less:.2f}" if less else "-",
            f"{100 * result.f1:.2f}",
            f"{result.tau:.4f}",
            f"{100 * (base.f1 - result.f1):+.2f}",
            f"{base.tau - result.tau:+.4f}",
        )
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
