"""The one door to the TFDS builders: a data set by name, built on first use."""

from __future__ import annotations

import pathlib

from deevisum_jax.errors import UserError, closest
from tfds_builders.records import DECODERS, Records
from tfds_builders.synthetic.synthetic import Synthetic

BUILDERS = {"synthetic": Synthetic}


class Dataset:
    """A built data set. Splits are random-access lists of video records."""

    def __init__(self, name: str, data_dir: str) -> None:
        """Opens `name`, such as "synthetic/quickstart", and builds it where it is not there yet.

        Raises:
          UserError: an unknown builder or config, or a `data_dir` that cannot be written.
        """
        family, _, variant = name.partition("/")
        if family not in BUILDERS:
            raise UserError(f"data.dataset={name!r} is unknown; {closest(family, BUILDERS)}")
        variants = [config.name for config in BUILDERS[family].BUILDER_CONFIGS]
        if variant not in variants:
            raise UserError(f"data.dataset={name!r}: no such config; {closest(variant, variants)}")
        self.name = name
        self._builder = BUILDERS[family](
            config=variant,
            data_dir=str(pathlib.Path(data_dir).expanduser()),
            file_format="array_record",
        )
        try:
            self._builder.download_and_prepare()
        except OSError as error:
            raise UserError(
                f"data set {name} cannot be built in data.data_dir={data_dir} ({error}); give a "
                "folder that can be written"
            ) from None

    def split(self, name: str) -> Records:
        """The records of a split, pictures as JPEG bytes.

        Raises:
          UserError: the data set has no such split.
        """
        splits = self._builder.info.splits
        if name not in splits:
            raise UserError(f"data set {self.name} has no split {name!r}; {closest(name, splits)}")
        return Records(self._builder.as_data_source(name, decoders=DECODERS))
