"""A checkpoint as both formats and both directions see it: named tensors, read slab by slab.

Whatever is read (an npz, safetensors) and whatever is to be written is a mapping from names to
`Tensor`s. A tensor's numbers are only touched when `slabs` walks over them, a few megabytes at a
time, so that a checkpoint of any size goes from one form into another without ever being in memory
as a file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, Protocol

import ml_dtypes
import numpy as np

from deevisum_jax.errors import UserError

# What weights may be stored in, by the names that reports and configs use.
STORED_DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}

SLAB_BYTES = 4 * 2**20  # stays in the processor's cache from the file to where it goes
_CHUNK_BYTES = 2**20  # read at a time; small enough to stay in the processor's cache


class Tensor(Protocol):
    """One named tensor of a checkpoint."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As stored."""

    @property
    def dtype(self) -> np.dtype:
        """As stored; one of `STORED_DTYPES`, or another that `fill` will refuse by name."""

    @property
    def file(self) -> str:
        """Where it lies, for messages; empty in memory."""

    def slabs(self, unit: int = 1) -> Iterator[np.ndarray]:
        """Consecutive parts along the first axis, in order, each C-contiguous.

        May be called again, and from several threads at a time.

        Args:
          unit: every slab holds a multiple of so many rows; divides the first dimension. A slab has
            about `SLAB_BYTES`, and at least `unit` rows. A slab is only valid until the next is
            asked for. A tensor without dimensions or elements comes as one slab of its
            shape.

        Raises:
          UserError: the file is damaged, named with the tensor.
        """


@dataclasses.dataclass(frozen=True)
class ArrayTensor:
    """A tensor that is in memory."""

    array: np.ndarray
    file: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.array.shape

    @property
    def dtype(self) -> np.dtype:
        """Of the array."""
        return self.array.dtype

    def slabs(self, unit: int = 1) -> Iterator[np.ndarray]:
        """As `Tensor.slabs`."""
        if not self.shape or 0 in self.shape:
            yield self.array
            return
        for start, stop in slab_bounds(self.shape, self.dtype, unit):
            yield np.ascontiguousarray(self.array[start:stop])


def slab_bounds(shape: tuple[int, ...], dtype: np.dtype, unit: int) -> Iterator[tuple[int, int]]:
    """Half-open ranges of rows, each a multiple of `unit` and of about `SLAB_BYTES`.

    `slab_bounds((5, 2**20), float32, 1)`, 4 MiB a row, gives (0, 4) and (4, 5).
    """
    num_rows = shape[0]
    assert num_rows % unit == 0, f"{unit=} does not divide the rows of {shape}"
    unit_bytes = max(1, unit * math.prod(shape[1:]) * dtype.itemsize)
    step = unit * max(1, SLAB_BYTES // unit_bytes)
    for start in range(0, num_rows, step):
        yield start, min(start + step, num_rows)


def read(tensor: Tensor) -> np.ndarray:
    """The whole of a small tensor."""
    slabs = [slab.copy() for slab in tensor.slabs()]
    return np.concatenate(slabs) if tensor.shape else slabs[0]


def num_bytes(tensor: Tensor) -> int:
    """What its numbers take."""
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def cast(tensor: Tensor, dtype: np.dtype) -> Tensor:
    """The tensor in another dtype."""
    return tensor if tensor.dtype == dtype else _Cast(tensor, dtype)


@dataclasses.dataclass(frozen=True)
class _Cast:
    tensor: Tensor
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensor.shape

    @property
    def file(self) -> str:
        return self.tensor.file

    def slabs(self, unit: int = 1) -> Iterator[np.ndarray]:
        for slab in self.tensor.slabs(unit):
            yield slab.astype(self.dtype)


def named_dtype(name: str) -> np.dtype:
    """A dtype of `STORED_DTYPES` by name.

    Raises:
      UserError: weights are not stored in it.
    """
    if name not in STORED_DTYPES:
        raise UserError(f"dtype {name!r} is none that weights come in: {', '.join(STORED_DTYPES)}")
    return STORED_DTYPES[name]


def is_shape(shape: Sequence[Any]) -> bool:
    """Whether these are dimensions that numpy can make an array of."""
    return (
        len(shape) <= 64
        and all(type(size) is int and size >= 0 for size in shape)
        and math.prod(max(size, 1) for size in shape) < 2**56
    )


def read_slabs(
    stream: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, unit: int
) -> Iterator[np.ndarray]:
    """Slabs as `Tensor.slabs` gives them, of the bytes that come next; all in one buffer.

    The last byte is read before the last slab is given. A tensor without elements comes as one
    slab without elements.

    Raises:
      EOFError: the bytes end before the tensor.
    """
    if not shape or 0 in shape:
        bounds = [(0, 1)]
        shapes = [shape]
    else:
        bounds = list(slab_bounds(shape, dtype, unit))
        shapes = [(stop - start, *shape[1:]) for start, stop in bounds]
    buffer = np.empty(math.prod(shapes[0]) * dtype.itemsize, np.uint8)
    for slab_shape in shapes:
        content = buffer[: math.prod(slab_shape) * dtype.itemsize]
        view = memoryview(content)
        while view:
            # Not readinto, which not everything has that opens a bucket.
            chunk = stream.read(min(len(view), _CHUNK_BYTES))
            if not chunk:
                raise EOFError(f"{len(view)} bytes of a slab are missing")
            view[: len(chunk)] = chunk
            view = view[len(chunk) :]
        yield content.view(dtype).reshape(slab_shape)


def write_slabs(stream: BinaryIO, tensor: Tensor) -> None:
    """Writes the bytes of a tensor."""
    count = 0
    for slab in tensor.slabs():
        content = slab.reshape(-1).view(np.uint8)
        stream.write(content.data)
        count += content.nbytes
    assert count == num_bytes(tensor), f"{count} bytes for {tensor.dtype} {tensor.shape}"
