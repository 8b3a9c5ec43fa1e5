"""An npz for big_vision of a run or of weights: `python scripts/export_big_vision.py --help`."""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence

import absl.logging

from deevisum_jax import weights
from deevisum_jax.errors import exits_cleanly
from deevisum_jax.models.pytree import DTYPES

_EXAMPLES = """\
example:
  python scripts/export_big_vision.py --checkpoint runs/student --out student.bf16.npz \\
      --dtype bfloat16

Then, in a config of big_vision: config.model_init = "./student.bf16.npz". Exit heads stay behind:
big_vision's PaliGemma has no place for them. Adapters are merged.

Exit status: 0 done, 2 a mistake in what was given (a message says which, and the next step).
"""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python scripts/export_big_vision.py",
        description="Writes a checkpoint that big_vision's PaliGemma loads. Adapters of a "
        "run that was trained with them are merged.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a run's workdir (its best checkpoint), converted weights, a folder of Hugging Face, "
        "or another .npz",
    )
    add("--out", required=True, type=pathlib.Path, metavar="FILE", help="a new file, .npz")
    add("--dtype", default="", choices=DTYPES, help="of the weights; default: as they are")
    args = parser.parse_args(argv)
    # Orbax warns of much that is as it should be.
    absl.logging.set_verbosity(absl.logging.ERROR)
    source = weights.open_source(args.checkpoint)
    weights.export_big_vision(source, args.out, dtype=args.dtype)
    left = " without its exit heads" if source.config.exit_layers else ""
    merged = ", its adapters merged" if source.config.lora else ""
    print(f"{args.out}{left}{merged}: load it with big_vision's models.proj.paligemma.paligemma")
    return 0


if __name__ == "__main__":
    sys.exit(main())
