"""Released PaliGemma 2 weights into our own form: `python scripts/convert_weights.py --help`."""

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
examples:
  python scripts/convert_weights.py --source paligemma2-3b-pt-224.b16.npz --out weights/pt_3b_224 \\
      --tokenizer paligemma_tokenizer.model
  python scripts/convert_weights.py --source downloads/paligemma2-3b-pt-448 --out weights/pt_3b_448
  python scripts/convert_weights.py --source downloads/paligemma2-3b-pt-448 --dry_run

Then train with --config.initialization=weights/pt_3b_224. The source itself can be named there,
too, and loads sooner on one host; of converted weights each of many hosts reads its own part only.

Exit status: 0 done, 2 a mistake in what was given (a message says which, and the next step).
"""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python scripts/convert_weights.py",
        description="Converts released PaliGemma 2 weights: every tensor is matched exactly once "
        "and every parameter filled, or nothing is written.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--source",
        required=True,
        metavar="PATH",
        help="an .npz of big_vision or a folder of Hugging Face, local or gs://",
    )
    add("--out", type=pathlib.Path, metavar="DIR", help="a folder to write, new or empty")
    add("--dry_run", action="store_true", help="only print what would become of every tensor")
    add(
        "--tokenizer",
        default="",
        metavar="FILE",
        help="paligemma_tokenizer.model, to keep beside weights that bring none",
    )
    add(
        "--image_size",
        type=int,
        metavar="PIXELS",
        help="resample the position embeddings, such as 224 to 448; default: as the source",
    )
    add(
        "--dtype",
        default="",
        choices=DTYPES,
        help="of the parameters; default: bfloat16 if all of the source is, else float32",
    )
    args = parser.parse_args(argv)
    if args.out is None and not args.dry_run:
        parser.error("--out is wanted, or --dry_run")
    # Orbax warns of much that is as it should be.
    absl.logging.set_verbosity(absl.logging.ERROR)
    source = weights.open_source(
        args.source, tokenizer_path=args.tokenizer, image_size=args.image_size, dtype=args.dtype
    )
    report = weights.report_of(source) if args.dry_run else weights.convert(source, args.out)
    for line in report:
        print(f"{line.source} {line.dtype} {list(line.shape)} -> {line.target}: {line.transform}")
    img, llm = source.config.img, source.config.llm
    print(
        f"{len(report)} tensors; image_size {img.image_size}, final_logits_softcap "
        f"{llm.final_logits_softcap:g}, sliding_window {llm.sliding_window or 0}, resize "
        f"{source.resize}" + ("" if args.dry_run else f"; written to {args.out}")
    )
    if source.tokens is None and not args.dry_run:
        print("without a tokenizer: training will want data.tokenizer; or convert with --tokenizer")
    return 0


if __name__ == "__main__":
    sys.exit(main())
