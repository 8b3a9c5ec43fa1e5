"""All folds of an experiment, one after the other, and one table over their test videos.

    python scripts/cross_validate.py --config configs/tvsum.py --workdir runs/tvsum \
        --config.data.manual_dir=DOWNLOADED

Trains fold k in WORKDIR/fold_k, as `python -m deevisum_jax.main` with data.fold=k does, then holds
what each predicts of its own test videos against people (docs/EVALUATION.md): evaluation.json and
evaluation.html in WORKDIR. The same command again goes on where it was stopped. On a pod give each
fold to `main` by itself, then this script on one host: what is trained is only evaluated again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence

from deevisum_jax import config as config_lib
from deevisum_jax import datasets
from deevisum_jax.errors import UserError, exits_cleanly


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="an experiment in configs/")
    parser.add_argument("--workdir", required=True, metavar="DIR", help="gets a folder per fold")
    args, overrides = parser.parse_known_args(argv)
    unknown = [flag for flag in overrides if not flag.startswith("--config.")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    config = config_lib.from_file(args.config, [o.removeprefix("--config.") for o in overrides])
    if not config.data.folds:
        raise UserError(
            f"{args.config} has no folds: data.folds is empty; set --config.data.folds=partition, "
            "or train once with python -m deevisum_jax.main"
        )
    num_folds = len(datasets.Dataset(config.data).folds)
    program = [sys.executable, "-m", "deevisum_jax.main", "--config", args.config, *overrides]
    for fold in range(num_folds):
        print(f"fold {fold}", file=sys.stderr, flush=True)
        # A process each: what one has compiled and cached is gone when the next begins.
        status = subprocess.call(
            [*program, f"--config.data.fold={fold}", f"--workdir={args.workdir}/fold_{fold}"]
        )
        if status:
            return status
    predictions = f"{args.workdir}/fold_{{fold}}/predictions.npz"
    return subprocess.call(
        [*program, "--mode=evaluate", "--workdir", args.workdir, "--predictions", predictions]
    )


if __name__ == "__main__":
    sys.exit(main())
