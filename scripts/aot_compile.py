"""What an experiment takes on a TPU slice, without one: `python scripts/aot_compile.py --help`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence

from deevisum_jax import config as config_lib
from deevisum_jax.config import Config
from deevisum_jax.errors import UserError, exits_cleanly
from deevisum_jax.files import locate, write_whole
from deevisum_jax.planner import chips, early_exit, environment, long_video, plan, report
from deevisum_jax.planner.plan import Plan

_EXAMPLES = """\
examples:
  python scripts/aot_compile.py --config configs/paligemma2_3b.py --topology v5e:4x4
  python scripts/aot_compile.py --config configs/paligemma2_3b.py --topology v5e:4x4 --mode score \\
      --config.eval.batch_size=256
  python scripts/aot_compile.py --config configs/tvsum_3b.py --topology v5e:2x2 --mode early_exit
  python scripts/aot_compile.py --config configs/tvsum_3b.py --topology v5e:1x1 --mode long_video \\
      --num_frames 10000 --config.eval.batch_size=16 --config.model.param_dtype=bfloat16
  python scripts/aot_compile.py --config configs/paligemma2_3b.py --all --json plans.json \\
      --config.model.variant=paligemma2_10b "--config.model.exit_layers=(12, 21, 30, 42)"

Of a config with stages --config.stage says which is planned, else it is the last one.

Needs the TPU compiler, libtpu, and no TPU (docs/TPU.md). One compilation of the released models
takes half a minute to five minutes of CPU. All figures are estimates, for one chip and one step.

Exit status: 0 it fits; 1 it does not, and what would; 2 a mistake in what was given (a message says
which, and the next step). With --all: 1 if nothing in the table fits, 2 if there is nothing in it.
"""
# What --all compiles for if no slice is named.
_ALL = ("v5e:4x4", "v5e:8x8", "v5p:2x2x4", "v5p:4x4x4", "v6e:4x4", "v6e:8x8")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args, config, stages = _parse(argv)
    slices = [chips.topology(name) for name in args.topology or _ALL]
    environment.prepare()
    out = locate(args.json) if args.json else None
    if out is not None:
        # A mistake here is better known before the minutes than after.
        try:
            write_whole(out, out.read_bytes() if out.exists() else "[]\n")
        except OSError as error:
            raise UserError(
                f"--json {out} cannot be written ({error.strerror}); give another file"
            ) from error
    made: list[Plan] = []

    def keep(found: Plan) -> None:
        made.append(found)
        if out is not None:
            values = [report.as_json(config.model.variant, one) for one in made]
            write_whole(out, json.dumps(values, indent=2) + "\n")

    if args.mode == "early_exit":
        _early_exit(config, slices, keep)
    elif args.mode == "long_video":
        _long_video(config, slices, args.num_frames, keep)
    elif args.all:
        _table(config, stages, slices, [args.mode] if args.mode else ("full", "score"), keep)
    else:
        _pages(config, stages, slices, args.mode or "full", keep)
    fits = [one.fits for one in made]
    return 0 if (any(fits) if args.all else all(fits)) else 1


def _pages(
    config: Config,
    stages: Sequence[Config],
    slices: Sequence[chips.Topology],
    mode: str,
    keep: Callable[[Plan], None],
) -> None:
    """A page for each slice, and advice where it does not fit."""
    for topology in slices:
        found = plan.plan(config, topology, mode, stages)
        keep(found)
        print(report.text(config.model.variant, found), flush=True)
        if not found.fits:
            print("looking for what fits ...", file=sys.stderr, flush=True)
            print(report.advice_text(found, plan.advise(config, found, stages)), flush=True)


def _early_exit(
    config: Config, slices: Sequence[chips.Topology], keep: Callable[[Plan], None]
) -> None:
    """A table of stages for each slice, and advice where the full pass does not fit."""
    for topology in slices:
        found = early_exit.plan(config, topology, keep)
        print(report.early_exit(config.model.variant, found), flush=True)
        if not found.whole.fits:
            print("looking for what fits ...", file=sys.stderr, flush=True)
            advice = plan.advise(config, found.whole)
            print(report.advice_text(found.whole, advice), flush=True)


def _long_video(
    config: Config,
    slices: Sequence[chips.Topology],
    num_frames: int,
    keep: Callable[[Plan], None],
) -> None:
    """A page for each slice and each way of merging."""
    for topology in slices:
        for found in long_video.plan(config, topology, num_frames, keep):
            print(report.text(config.model.variant, found), flush=True)


def _table(
    config: Config,
    stages: Sequence[Config],
    slices: Sequence[chips.Topology],
    modes: Sequence[str],
    keep: Callable[[Plan], None],
) -> None:
    """A row for each mode and slice.

    Raises:
      UserError: the config suits none of them.
    """
    variant, rows, refused = config.model.variant, [], []
    for mode in modes:
        for topology in slices:
            print(f"{variant}, {mode}, {topology.name} ...", file=sys.stderr, flush=True)
            try:
                found = plan.plan(config, topology, mode, stages)
            except UserError as error:
                refused.append(f"not compiled: {mode}, {topology.name}: {error}")
            else:
                keep(found)
                rows.append((variant, found))
    if not rows:
        raise UserError("\n".join(["the config suits no slice", *refused]))
    print("\n".join([report.table(rows), *refused]))


def _parse(
    argv: Sequence[str] | None,
) -> tuple[argparse.Namespace, Config, tuple[Config, ...]]:
    """Flags, the config to plan, and those of all stages of its file."""
    parser = argparse.ArgumentParser(
        prog="python scripts/aot_compile.py",
        description="Compiles an experiment's step for a slice of TPUs and prints, per chip, the "
        "memory it needs and a model of its time. Nothing is run.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, metavar="FILE", help="an experiment in configs/")
    add(
        "--topology",
        action="append",
        default=[],
        metavar="KIND:DIMS",
        help="a slice, such as v5e:4x4; repeatable",
    )
    add(
        "--mode",
        choices=plan.MODES,
        help="full: an update of training at batch_size (default); score: the scoring pass at "
        "eval.batch_size; cache_teacher: what a stage that others learn from does once for every "
        "batch of that size; early_exit: scoring in stages, one by one; "
        "long_video: a video of --num_frames on one chip to keyframes and merged tokens, "
        "eval.batch_size frames at a time; --all has the first two unless another is named",
    )
    add("--num_frames", type=int, default=10_000, help="of --mode long_video (default: 10000)")
    add(
        "--all",
        action="store_true",
        help=f"a table of the slices given, by default {', '.join(_ALL)}",
    )
    add("--json", default="", metavar="FILE", help="write every figure there, too")
    add(
        # Shown in the help only; the overrides are what argparse does not know.
        "--config.FIELD=VALUE",
        action="store_true",
        help="override a field of the config, such as --config.batch_size=128; repeatable",
    )
    args, rest = parser.parse_known_args(argv)
    unknown = [flag for flag in rest if not flag.startswith("--config.")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if not args.topology and not args.all:
        parser.error(f"--topology is wanted, or --all; known slices: {', '.join(chips.known())}")
    if args.all and args.mode in ("early_exit", "long_video"):
        parser.error(f"--mode {args.mode} has its own output: name slices, without --all")
    overrides = [flag.removeprefix("--config.") for flag in rest]
    stages = config_lib.described_stages(args.config, overrides)
    return args, config_lib.from_file(args.config, overrides), stages


if __name__ == "__main__":
    sys.exit(main())
