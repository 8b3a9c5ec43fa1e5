r"""Builds a data set, as training does on first use: `python -m tfds_builders.build tvsum/1fps`.

    python -m tfds_builders.build tvsum/1fps --manual_dir ydata-tvsum50-v1_1
    python -m tfds_builders.build synthetic/quickstart --data_dir /data
    python -m tfds_builders.build video_folder/1fps --manual_dir talks.csv

It prints what the data set holds. What is built already is only opened.

With --beam Apache Beam decodes the videos of a video_folder (pip install -e ".[beam]"), and all
further flags are the pipeline's:

    python -m tfds_builders.build video_folder/1fps --manual_dir talks.csv --data_dir /shared \
        --beam --runner=FlinkRunner --flink_master=host:8081

Every machine must see the videos and the data_dir under the same paths, and have this project
installed. Stopped and started again, a video_folder goes on: what is decoded is not decoded again.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow_datasets as tfds

from deevisum_jax import files
from deevisum_jax.errors import UserError, closest, exits_cleanly
from tfds_builders import records
from tfds_builders.summe.summe import SumMe
from tfds_builders.synthetic.synthetic import Synthetic
from tfds_builders.tvsum.tvsum import TVSum
from tfds_builders.video_folder.video_folder import VideoFolder

BUILDERS: Mapping[str, type[tfds.core.GeneratorBasedBuilder]] = {
    "summe": SumMe,
    "synthetic": Synthetic,
    "tvsum": TVSum,
    "video_folder": VideoFolder,
}


def find(
    name: str, *, manual_dir: str, allow_missing: bool
) -> tuple[str, str | tfds.core.BuilderConfig]:
    """The family and the config that a name such as "tvsum/1fps" stands for.

    Raises:
      UserError: there is no such family, or it has no config without the missing videos; or
        people's own videos cannot be listed.
    """
    family, _, config = name.partition("/")
    if family not in BUILDERS:
        raise UserError(f"data set {name!r} is unknown; {closest(family, BUILDERS)}")
    if allow_missing:
        config = records.partial_name(BUILDERS[family], config)
    if family == VideoFolder.name:
        return family, VideoFolder.config_of(config, manual_dir)
    return family, config


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    known = ", ".join(
        f"{family}/{config.name}"
        for family, builder in sorted(BUILDERS.items())
        for config in builder.BUILDER_CONFIGS
        if not config.name.endswith(records.PARTIAL)
    )
    parser = argparse.ArgumentParser(
        prog="python -m tfds_builders.build",
        description=__doc__,
        epilog=f"Data sets: {known}.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", help="such as tvsum/1fps")
    parser.add_argument("--manual_dir", default="", help="the data set's own files, as downloaded")
    parser.add_argument(
        "--data_dir",
        default="~/tensorflow_datasets",
        help="where built data sets live (%(default)s)",
    )
    parser.add_argument(
        "--allow_missing",
        action="store_true",
        help="build it also where some of its videos are not at hand, as NAME_partial",
    )
    parser.add_argument(
        "--beam", action="store_true", help="decode with Apache Beam; further flags are Beam's"
    )
    arguments, rest = parser.parse_known_args(argv)
    if rest and not arguments.beam:
        parser.error(f"unrecognized arguments: {' '.join(rest)}; Beam's follow --beam")
    data_dir = files.locate(arguments.data_dir)
    if files.in_bucket(data_dir):
        raise UserError(
            f"--data_dir {data_dir} is in a bucket; build in a local folder, and copy that "
            "(gcloud storage cp -r)"
        )
    family, config = find(
        arguments.name, manual_dir=arguments.manual_dir, allow_missing=arguments.allow_missing
    )
    download_config = tfds.download.DownloadConfig(
        beam_options=_beam_options(family, rest) if arguments.beam else None
    )
    builder = records.build(
        BUILDERS[family], data_dir, config,
        manual_dir=arguments.manual_dir, download_config=download_config,
    )  # fmt: skip
    print(f"{family}/{builder.builder_config.name} is in {builder.data_dir}")
    for name, split in builder.info.splits.items():
        print(f"{name}: {split.num_examples} videos, {split.num_bytes / 1e6:.1f} MB")
    metadata = builder.info.metadata or {}
    if "change_points" in metadata:
        print(f"shots: {metadata['change_points']}")
    if metadata.get("missing"):
        print(f"missing: {', '.join(metadata['missing'])}")
    for video_id, notes in metadata.get("notes", {}).items():
        print(f"{video_id}: {'; '.join(notes)}")
    return 0


def _beam_options(family: str, flags: Sequence[str]) -> Any:
    if family != VideoFolder.name:
        raise UserError(f"--beam builds {VideoFolder.name}, not {family}; leave it out")
    if importlib.util.find_spec("apache_beam") is None:
        raise UserError(
            '--beam wants Apache Beam, which is not installed; pip install -e ".[beam]"'
        )
    from apache_beam.options.pipeline_options import PipelineOptions, StandardOptions
    from apache_beam.runners import create_runner

    options = PipelineOptions(list(flags))
    known = options.get_all_options()
    # Beam itself passes over what it does not know.
    extra = options.get_all_options(retain_unknown_options=True).keys() - known.keys()
    unknown = [f"--{name}" for name in sorted(extra)]
    unknown += [flag for flag in flags if re.match("-[A-Za-z]", flag)]
    if unknown:
        near = difflib.get_close_matches(unknown[0], [f"--{name}" for name in known], n=1)
        advice = f"did you mean {near[0]}?" if near else "see its PipelineOptions"
        raise UserError(f"Apache Beam has no flag {', '.join(unknown)}; {advice}")
    if runner := options.view_as(StandardOptions).runner:
        try:
            create_runner(runner)
        except (AttributeError, ImportError, TypeError, ValueError) as error:
            told = " ".join(str(error).split())
            raise UserError(f"--runner={runner} is no runner of Apache Beam: {told}") from error
    return options


if __name__ == "__main__":
    sys.exit(main())
