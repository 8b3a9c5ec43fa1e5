"""The one door to the data sets: by name, built on first use."""

from __future__ import annotations

import pathlib

from deevisum_jax.errors import UserError, closest
from tfds_builders import records
from tfds_builders.synthetic.synthetic import Synthetic

BUILDERS = {"synthetic": Synthetic}


class Dataset:
    """A built data set. Splits are random-access lists of video records."""

    def __init__(self, name: str, data_dir: str) -> None:
        """Opens `name`, such as "synthetic/quickstart", and builds it where it is not there yet.

        Raises:
          UserError: an unknown builder or config, or a `data_dir` that cannot be written.
        """
        family, _, config = name.partition("/")
        if family not in BUILDERS:
            raise UserError(f"data.dataset={name!r} is unknown; {closest(family, BUILDERS)}")
        folder = pathlib.Path(data_dir).expanduser()
        try:
            self._builder = records.build(BUILDERS[family], folder, config)
        except OSError as error:
            # Another run may have built the same in the meantime; then it is only opened.
            try:
                self._builder = records.build(BUILDERS[family], folder, config)
            except OSError:
                raise UserError(
                    f"data set {name} cannot be built in data.data_dir={data_dir} ({error}); give "
                    "a folder that can be written"
                ) from None

    def split(self, name: str) -> records.Records:
        """The records of a split, pictures as JPEG bytes.

        Raises:
          UserError: the data set has no such split.
        """
        return records.read(self._builder, name)
