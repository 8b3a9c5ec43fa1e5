"""Decoded pictures and sound in a temporary file instead of in memory, read back piece by piece.

The file has no name: it is gone with the last reference to it and with the process, however that
ends. It lies where this machine keeps temporary files (TMPDIR).
"""

from __future__ import annotations

import contextlib
import operator
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence

import numpy as np

from deevisum_jax.errors import UserError

_FULL_SCALE = 32_768  # int16 -> [-1, 1)


class _File:
    """A file without a name. Several threads may read while one writes."""

    def __init__(self) -> None:
        with _writing():
            file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115  closed with this object
        self._fd = file.fileno()
        weakref.finalize(self, file.close)

    def write(self, data: memoryview, offset: int) -> None:
        """Bytes at a place; what lies between it and the end so far are zeros."""
        with _writing():
            while data:
                count = os.pwrite(self._fd, data, offset)
                data, offset = data[count:], offset + count

    def read(self, num_bytes: int, offset: int) -> bytes:
        """By a copy: pages of a mapped file that were read once would count as this process's."""
        found = os.pread(self._fd, num_bytes, offset)
        assert len(found) == num_bytes, f"{len(found)} bytes of {num_bytes}"
        return found


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            "what is decoded waits in a temporary file, and that cannot be written "
            f"({error.strerror or error}); make room in {tempfile.tempdir or '/tmp'}, or set "
            "TMPDIR to a folder on another disk"
        ) from error


class PictureSpool(Sequence[np.ndarray]):
    """Pictures of one size, in a temporary file."""

    def __init__(self) -> None:
        """Makes the file.

        Raises:
          UserError: it cannot be made.
        """
        self._file = _File()
        self._places: list[int] = []  # of each picture, counted in pictures
        self._num_stored = 0
        self._last: np.ndarray | None = None
        self._shape: tuple[int, ...] = ()

    def append(self, picture: np.ndarray) -> None:
        """Writes one more.

        Args:
          picture: uint8[H, W, 3]; the same object as the one before is stored once.

        Raises:
          UserError: the disk is full, or not to be written.
        """
        if picture is not self._last:
            assert picture.dtype == np.uint8, picture.dtype
            assert self._shape in ((), picture.shape), f"{picture.shape=}, {self._shape} before"
            self._shape = picture.shape
            data = np.ascontiguousarray(picture).data.cast("B")
            self._file.write(data, self._num_stored * data.nbytes)
            self._num_stored, self._last = self._num_stored + 1, picture
        self._places.append(self._num_stored - 1)

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> np.ndarray:
        """uint8[H, W, 3], not to be written to."""
        place, size = self._places[operator.index(index)], int(np.prod(self._shape))
        return np.frombuffer(self._file.read(size, place * size), np.uint8).reshape(self._shape)

    @property
    def nbytes(self) -> int:
        """On disk."""
        return self._num_stored * int(np.prod(self._shape))


class SoundSpool:
    """16-bit samples of one channel, in a temporary file; slices of it are float32 in [-1, 1)."""

    def __init__(self) -> None:
        """Makes the file.

        Raises:
          UserError: it cannot be made.
        """
        self._file = _File()
        self._length = 0
        self.is_silent = True  # whether all samples are 0

    def write(self, start: int, samples: np.ndarray) -> None:
        """Puts samples at a place, over what is there; places that nothing is put at are silent.

        Args:
          start: of the first of them, at least 0.
          samples: int16[n].

        Raises:
          UserError: the disk is full, or not to be written.
        """
        assert samples.dtype == np.int16, samples.dtype
        self._file.write(np.ascontiguousarray(samples).data.cast("B"), 2 * start)
        self._length = max(self._length, start + len(samples))
        self.is_silent &= not samples.any()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> np.ndarray:
        """float32[n], 16 kHz where `audio.hear_audio` wrote them."""
        start, stop, step = part.indices(self._length)
        assert step == 1, "samples in a row"
        data = self._file.read(2 * max(0, stop - start), 2 * start)
        return np.frombuffer(data, np.int16).astype(np.float32) / _FULL_SCALE

    @property
    def nbytes(self) -> int:
        """On disk."""
        return 2 * self._length
