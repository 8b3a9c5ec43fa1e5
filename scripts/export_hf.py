"""A Hugging Face folder of a run or of weights: `python scripts/export_hf.py --help`."""

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
  python scripts/export_hf.py --checkpoint runs/quickstart --out exported/quickstart
  python scripts/export_hf.py --checkpoint paligemma2-3b-pt-224.b16.npz \\
      --tokenizer paligemma_tokenizer.model --out exported/pt_3b_224
  python scripts/export_hf.py --checkpoint runs/lora --adapter --out exported/lora_adapter

In Python:
  PaliGemmaForConditionalGeneration.from_pretrained("exported/quickstart")
  AutoModel.from_pretrained("exported/quickstart", trust_remote_code=True)  # scores, leaves early
  PeftModel.from_pretrained(base_model, "exported/lora_adapter")

Exit status: 0 done, 2 a mistake in what was given (a message says which, and the next step).
"""


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python scripts/export_hf.py",
        description="Writes a checkpoint that transformers loads, exit heads included. Adapters of "
        "a run that was trained with them are merged, or with --adapter written by themselves, for "
        "peft.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        required=True,
        metavar="PATH",
        help="a run's workdir (its best checkpoint), converted weights, an .npz of big_vision, or "
        "another folder of Hugging Face",
    )
    add("--out", required=True, type=pathlib.Path, metavar="DIR", help="a folder, new or empty")
    add("--dtype", default="", choices=DTYPES, help="of the weights; default: as they are")
    add(
        "--tokenizer",
        default="",
        metavar="FILE",
        help="paligemma_tokenizer.model, for weights that bring none",
    )
    add("--title", default="", help="heading of the model card; default: the folder's name")
    add(
        "--max_shard_gb",
        type=float,
        metavar="GB",
        help="largest file of weights, in 10^9 bytes (5)",
    )
    add("--adapter", action="store_true", help="only the adapters and the exit heads of a run")
    add(
        "--base",
        default="",
        metavar="PATH_OR_NAME",
        help="with --adapter: the model that the adapters belong to, a folder of transformers or a "
        "name on the Hub; default: what the run started from",
    )
    args = parser.parse_args(argv)
    if args.adapter and args.max_shard_gb is not None:
        parser.error("--max_shard_gb goes with whole models; --adapter writes one small file")
    if args.base and not args.adapter:
        parser.error("--base goes with --adapter; without it the base is part of what is written")
    max_shard_gb = 5.0 if args.max_shard_gb is None else args.max_shard_gb
    if not 0 < max_shard_gb < 1e6:
        parser.error(f"--max_shard_gb {max_shard_gb} is no size of a file")
    # Orbax warns of much that is as it should be.
    absl.logging.set_verbosity(absl.logging.ERROR)
    source = weights.open_source(args.checkpoint, tokenizer_path=args.tokenizer)
    if args.adapter:
        base = weights.export_adapter(
            source, args.out, base=args.base, dtype=args.dtype, title=args.title
        )
        print(f"{args.out}: adapters for {base}; load them with peft, README.md there says how")
        return 0
    weights.export_hf(
        source,
        args.out,
        dtype=args.dtype,
        max_shard_bytes=int(max_shard_gb * 10**9),
        title=args.title,
    )
    print(f"{args.out}: load it with transformers; README.md there says how")
    return 0


if __name__ == "__main__":
    sys.exit(main())
