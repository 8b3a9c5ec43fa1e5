"""Archives of arrays as `numpy.savez` writes them, read and written member by member.

big_vision's checkpoints are such archives. `numpy.load` would bring whole arrays into memory; here
a slab at a time is read, from whatever `etils.epath` opens, and nothing is ever unpickled. numpy
knows no bfloat16 and stores its bits as two-byte void, which comes back as bfloat16 here and in
big_vision's `recover_dtype`.

References:
  https://numpy.org/doc/stable/reference/generated/numpy.lib.format.html
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import pathlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping

import ml_dtypes
import numpy as np
from etils import epath
from numpy.lib import format as npy

from deevisum_jax.convert.tensors import ArrayTensor, Tensor, is_shape, read_slabs, write_slabs
from deevisum_jax.errors import UserError
from deevisum_jax.files import locate, open_binary, replacing

_SUFFIX = ".npy"
_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED}  # savez, savez_compressed
_ENCRYPTED = 0x1  # of a member's flags
_MAX_HEADER_BYTES = 10_000  # numpy's own limit; more than any array needs
_AGAIN = "download or write it again"

# What reading a damaged archive ends in, besides numpy's complaints about a header.
_DAMAGE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    OverflowError,
    NotImplementedError,
    ValueError,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Member:
    """A tensor in an archive, as its header tells. Every walk over it opens the file anew."""

    path: epath.Path
    info: zipfile.ZipInfo
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool
    begin: int  # bytes from the start of the member

    @property
    def file(self) -> str:
        return os.fspath(self.path)

    def slabs(self, unit: int = 1) -> Iterator[np.ndarray]:
        if self.fortran_order:
            # Rows do not lie together: the whole tensor is needed for the first.
            [reverse] = self._walk(self.shape[::-1], self.shape[-1])
            yield from ArrayTensor(reverse.T, self.file).slabs(unit)
        else:
            yield from self._walk(self.shape, unit)

    def _walk(self, shape: tuple[int, ...], unit: int) -> Iterator[np.ndarray]:
        # zipfile holds the content against its CRC as soon as the last byte is read.
        with (
            open_binary(self.path) as stream,
            _naming(self.file, self.name),
            zipfile.ZipFile(stream) as archive,
            archive.open(self.info) as member,
        ):
            if len(member.read(self.begin)) < self.begin:
                raise EOFError("the member ends in its header")
            yield from read_slabs(member, shape, self.dtype, unit)


def open_npz(path: str | os.PathLike) -> dict[str, Tensor]:
    """All arrays of a .npz file, by their names without ".npy".

    Only headers are read, and held against the size of what follows. The content's CRC is checked
    by every walk over a tensor, before its last slab. An array in Fortran order is in memory as a
    whole while it is walked.

    Args:
      path: local, or any address that `etils.epath` opens, such as gs://.

    Raises:
      UserError: the file is missing or damaged, or holds something else than plain arrays; names
        file and member.
    """
    path = locate(path)
    file = os.fspath(path)
    tensors = {}
    with open_binary(path) as stream:
        try:
            archive = zipfile.ZipFile(stream)
        except _DAMAGE as error:
            raise UserError(
                f"{file} is no .npz archive, or not complete ({error}); {_AGAIN}"
            ) from error
        with archive:
            for info in archive.infolist():
                name = info.filename.removesuffix(_SUFFIX)
                if name in tensors:
                    raise UserError(f"{file}: tensor {name!r} is in it twice; {_AGAIN}")
                if name == info.filename:
                    raise UserError(
                        f"{file}: {name!r} is no {_SUFFIX} array; give an archive as numpy.savez "
                        "writes it"
                    )
                if info.flag_bits & _ENCRYPTED or info.compress_type not in _METHODS:
                    raise UserError(
                        f"{file}: tensor {name!r} is encrypted or compressed in another way than "
                        "numpy does; write the archive with numpy.savez"
                    )
                with _naming(file, name), archive.open(info) as member:
                    header = io.BytesIO(member.read(_MAX_HEADER_BYTES))
                    tensors[name] = _checked(path, name, info, header)
    return tensors


def _checked(path: epath.Path, name: str, info: zipfile.ZipInfo, header: io.BytesIO) -> _Member:
    """The tensor of a member that begins like this; `ValueError` says what is wrong with it."""
    try:
        version = npy.read_magic(header)
        if version == (1, 0):
            read = npy.read_array_header_1_0
        elif version == (2, 0):
            read = npy.read_array_header_2_0
        else:
            raise ValueError(f"version {version}, which arrays of numbers do not need")
        shape, fortran_order, dtype = read(header, max_header_size=_MAX_HEADER_BYTES)
    except Exception as error:  # numpy reads it as a Python literal, which fails in many ways
        raise ValueError(f"no header of an array: {error}") from error
    if dtype.hasobject:
        raise ValueError("holds pickled objects, which are never loaded")
    if dtype == np.dtype("V2"):
        dtype = _BFLOAT16
    if dtype.type is np.void or not dtype.itemsize or not dtype.isnative:
        raise ValueError(f"holds {dtype.str}, no numbers in this machine's byte order")
    if not is_shape(shape):
        raise ValueError(f"has no possible shape: {shape}")
    begin = header.tell()
    wanted = math.prod(shape) * dtype.itemsize
    if info.file_size - begin != wanted:
        raise ValueError(f"has {info.file_size - begin} bytes, but {dtype} {shape} takes {wanted}")
    return _Member(
        path=path,
        info=info,
        name=name,
        shape=shape,
        dtype=dtype,
        fortran_order=fortran_order and len(shape) > 1,
        begin=begin,
    )


@contextlib.contextmanager
def _naming(file: str, name: str) -> Iterator[None]:
    """What goes wrong in here goes wrong with this tensor."""
    try:
        yield
    except _DAMAGE as error:
        raise UserError(
            f"{file}: tensor {name!r} cannot be read ({error or type(error).__name__}); {_AGAIN}"
        ) from error


def write_npz(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a local archive as `numpy.savez` would; it appears when it is whole.

    The same tensors give the same bytes on any day: members carry no time. bfloat16 goes in as
    numpy has it, two-byte void.

    Raises:
      UserError: what walking a tensor raises.
    """
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, tensor in tensors.items():
            assert not tensor.dtype.hasobject, name
            # The size is known only to us: room for more than 4 GiB is asked for beforehand.
            with archive.open(zipfile.ZipInfo(name + _SUFFIX), "w", force_zip64=True) as member:
                header = {
                    "descr": npy.dtype_to_descr(tensor.dtype),
                    "fortran_order": False,
                    "shape": tensor.shape,
                }
                npy.write_array_header_1_0(member, header)
                write_slabs(member, tensor)
