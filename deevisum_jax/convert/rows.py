"""The engine under every table of names: parameters from tensors, and tensors from parameters.

A table is a list of `Row`s, one per parameter. A row says of which tensors of the foreign
checkpoint a parameter is made, and how: split the source's dimensions, reorder them, stack the
parts. All of this can be turned around, so one table serves both directions.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from deevisum_jax.convert.tensors import STORED_DTYPES, Tensor, read, slab_bounds
from deevisum_jax.errors import UserError
from deevisum_jax.models.pytree import Params
from deevisum_jax.models.siglip import resample_pos_embedding

_NUM_FILLED = 2  # parameters on their way at a time: touching fresh memory is half of the work
_NUM_READERS = 4  # of their parts
_STRIP = 64  # columns that a transposing copy walks at a time: they stay in the cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """How one parameter and the tensors it is made of correspond.

    A source (or its rows `cut`) is reshaped to `split`, its axes are put in `order`, and the parts
    are stacked: over layers where the names hold `{i}`, and over `sources` where there are two.
    With 8 heads of 256 on a width of 2304, `q_proj [2048, 2304]` becomes `q_einsum/w [26, 8, 2304,
    256]` by `split=(8, 256, 2304), order=(0, 2, 1)` and `{i}` in its name.

    Attributes:
      target: path of the parameter.
      sources: one name, or the two that are stacked (k and v, gate and up).
      shape: of each source.
      split: of each source or cut, its dimensions split up; `()` = `shape`, or the cut's.
      order: which axis of `split` comes where; `()` = as they are.
      cut: half-open range of rows that is taken, others are for other parameters; None = all.
      max_padding: so many rows more than `shape` says the source may have; they are left.
      resample: the source may be position embeddings of another square number of patches.
    """

    target: str
    sources: tuple[str, ...]
    shape: tuple[int, ...]
    split: tuple[int, ...] = ()
    order: tuple[int, ...] = ()
    cut: tuple[int, int] | None = None
    max_padding: int = 0
    resample: bool = False

    def __post_init__(self):
        taken = (self.num_rows, *self.shape[1:])
        object.__setattr__(self, "split", self.split or taken)
        object.__setattr__(self, "order", self.order or tuple(range(len(self.split))))
        assert math.prod(self.split) == math.prod(taken), f"{self.target}: {self.split} of {taken}"
        assert len(self.sources) == 1 or "{i}" in self.sources[0], f"{self.target}: {self.sources}"

    @property
    def per_layer(self) -> bool:
        """Whether each layer has sources of its own."""
        return "{i}" in self.sources[0]

    @property
    def taken(self) -> tuple[int, int]:
        """Half-open range of the source's rows that go into the parameter."""
        return self.cut or (0, self.shape[0])

    @property
    def num_rows(self) -> int:
        """How many they are."""
        start, stop = self.taken
        return stop - start

    @property
    def unit(self) -> int:
        """Rows of the source that make one step of the first axis of `split`."""
        return self.num_rows // self.split[0]

    @property
    def transform(self) -> str:
        """What happens to a source, for the report."""
        steps = []
        if self.cut is not None or self.max_padding:
            start, stop = self.taken
            steps.append(f"rows [{start}, {stop})")
        if len(self.split) != len(self.shape):
            steps.append(f"reshape {self.split}")
        if self.order != tuple(range(len(self.order))):
            steps.append(f"transpose {self.order}")
        return ", ".join(steps) or "copy"

    def parts(self, shape: Sequence[int]) -> Iterator[tuple[tuple[int, ...], str]]:
        """The index of each part in the parameter of that shape, and its source's name."""
        for i in range(shape[0]) if self.per_layer else (None,):
            for j, source in enumerate(self.sources):
                index = () if i is None else (i,)
                index += (j,) if len(self.sources) > 1 else ()
                yield index, source.format(i=i)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """One line of the report: a source tensor and where it went."""

    source: str
    target: str  # path of the parameter; `[i]` or `[i, j]` = the part of it
    shape: tuple[int, ...]  # of the source
    dtype: str  # of the source
    transform: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layered:
    """A parameter stacked over layers, of which one layer is made at a time when it is read."""

    shape: tuple[int, ...]
    dtype: np.dtype
    layer: Callable[[int], np.ndarray]  # of the shape behind the first dimension

    def __getitem__(self, where: tuple[int | slice, ...]) -> np.ndarray:
        first, *others = where
        if isinstance(first, int):
            return self.layer(first)[tuple(others)]
        layers = range(self.shape[0])[first]
        return np.stack([self.layer(i)[tuple(others)] for i in layers])


def match(
    tensors: Mapping[str, Tensor],
    rows: Sequence[Row],
    abstract: Params,
    *,
    path: str = "",
    spell: Callable[[str], str] = str,
) -> list[Converted]:
    """Compares names, shapes and dtypes, and reads no numbers.

    Args:
      tensors: all of a checkpoint's, under the names that `rows` use.
      rows: one per parameter.
      abstract: what is to be filled: nested dictionary of anything with `shape` and `dtype`.
      path: of the checkpoint, for messages.
      spell: the checkpoint's own spelling of a name of the table.

    Returns:
      The report, a line per tensor and parameter.

    Raises:
      UserError: tensors are missing, unknown, of another shape or no weights; lists all of them.
    """
    targets = flatten_dict(abstract, sep="/")
    filled = [row.target for row in rows]
    assert sorted(filled) == sorted(targets), f"{set(filled) ^ set(targets)} on one side only"
    offenders: dict[str, str] = {}
    report, taken = [], dict.fromkeys(tensors, 0)
    for row in rows:
        for index, source in row.parts(targets[row.target].shape):
            if source not in tensors:
                offenders[source] = f"missing, wanted for {row.target}"
                continue
            tensor = tensors[source]
            transform = row.transform
            if tensor.dtype not in STORED_DTYPES.values():
                wanted = ", ".join(STORED_DTYPES)
                offenders[source] = f"dtype {tensor.dtype}, wanted one of {wanted}"
            elif row.resample and _resamples(tensor.shape, row.shape):
                transform = f"resample from {tensor.shape}, {transform}"
            elif not _fits(tensor.shape, row):
                offenders[source] = f"shape {tensor.shape}, wanted {row.shape} for {row.target}"
            taken[source] += row.num_rows
            report.append(
                Converted(
                    source=spell(source),
                    target=row.target + (str(list(index)) if index else ""),
                    shape=tensor.shape,
                    dtype=tensor.dtype.name,
                    transform=transform,
                )
            )
    offenders |= {name: "no parameter takes it" for name, count in taken.items() if count == 0}
    if offenders:
        lines = [
            f"{spell(name)}: {reason}{_where(tensors.get(name))}"
            for name, reason in offenders.items()
        ]
        raise UserError(
            f"{len(offenders)} tensors{f' of {path}' if path else ''} do not fit the model; the "
            "file is not whole, or of another model:\n  " + "\n  ".join(lines)
        )
    return report


def fill(
    tensors: Mapping[str, Tensor],
    rows: Sequence[Row],
    abstract: Params,
    finish: Callable[[str, jax.Array], Any] | None = None,
) -> Params:
    """Makes parameters of a checkpoint's tensors, one after the other, where they are to live.

    Memory beyond the result: a few slabs; and where the result is not in the host's own memory,
    what its devices hold of two parameters.

    Every process walks over all of the checkpoint and keeps what its own devices hold.

    Args:
      tensors: all of a checkpoint's, under the names that `rows` use; those that `match` accepts.
      rows: one per parameter.
      abstract: shapes, dtypes and (if any) shardings of what is to be filled, as
        `sharding.abstract` makes it.
      finish: what is made of each parameter, given its path, as soon as it is filled; then they are
        filled one at a time, since what is made of one is meant to be smaller.

    Returns:
      Nested dictionary of jax arrays, or of what `finish` returns.

    Raises:
      UserError: a file is damaged, or holds numbers that are not finite.
    """
    targets = flatten_dict(abstract, sep="/")
    # The largest first, so that no one thread is left with it.
    rows = sorted(rows, key=lambda row: -math.prod(targets[row.target].shape))
    with (
        concurrent.futures.ThreadPoolExecutor(_NUM_READERS) as readers,
        concurrent.futures.ThreadPoolExecutor(1 if finish else _NUM_FILLED) as fillers,
    ):

        def fill_row(row: Row) -> Any:
            array = _fill_one(tensors, row, targets[row.target], readers)
            return finish(row.target, array) if finish else array

        arrays = list(fillers.map(fill_row, rows))
    filled = {row.target: array for row, array in zip(rows, arrays, strict=True)}
    return unflatten_dict(filled, sep="/")


def spill(params: Params, rows: Sequence[Row]) -> dict[str, Tensor]:
    """The tensors that a foreign checkpoint is made of, read from the parameters when walked over.

    Args:
      params: nested dictionary of arrays, on any devices of this process, or of `Layered`.
      rows: the table of that checkpoint.
    """
    leaves = flatten_dict(params, sep="/")
    assert sorted(row.target for row in rows) == sorted(leaves), "a table of another model"
    pieces: dict[str, list[_Piece]] = {}
    for row in rows:
        leaf = leaves[row.target]
        for index, source in row.parts(leaf.shape):
            pieces.setdefault(source, []).append(_Piece(leaf, index, row))
    for found in pieces.values():
        found.sort(key=lambda piece: piece.row.taken)
    return {source: _Spilled(tuple(found)) for source, found in pieces.items()}


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Rows of a foreign tensor, as a part of a parameter."""

    leaf: Any
    index: tuple[int, ...]
    row: Row

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Steps `start` to `stop` of the first axis of `split`, in the foreign layout."""
        axis = self.row.order.index(0)
        leaf = self.leaf
        if isinstance(leaf, jax.Array) and not _on_this_host(leaf):
            # Only what is asked for leaves the device.
            for i in self.index:
                leaf = jax.lax.dynamic_index_in_dim(leaf, i, keepdims=False)
            part = np.asarray(jax.lax.dynamic_slice_in_dim(leaf, start, stop - start, axis))
        else:
            where = (*self.index, *(slice(None),) * axis, slice(start, stop))
            part = leaf[where] if isinstance(leaf, Layered) else np.asarray(leaf)[where]
        foreign = part.transpose(np.argsort(self.row.order))
        out = np.empty(foreign.shape, foreign.dtype)
        _copy(out, foreign)
        return out.reshape(-1, *self.row.shape[1:])


@dataclasses.dataclass(frozen=True)
class _Spilled:
    """A foreign tensor, in the order of its rows."""

    pieces: tuple[_Piece, ...]
    file: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pieces[0].row.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self.pieces[0].leaf.dtype)

    def slabs(self, unit: int = 1) -> Iterator[np.ndarray]:
        for piece in self.pieces:
            step = piece.row.unit
            shape = (piece.row.num_rows, *self.shape[1:])
            for start, stop in slab_bounds(shape, self.dtype, math.lcm(unit, step)):
                yield piece.rows(start // step, stop // step)


def _on_this_host(leaf: jax.Array) -> bool:
    """Whether the array as a whole lies in memory of this process already."""
    return leaf.is_fully_addressable and {d.platform for d in leaf.devices()} == {"cpu"}


def _where(tensor: Tensor | None) -> str:
    return f" (in {tensor.file})" if tensor is not None and tensor.file else ""


def _fits(given: tuple[int, ...], row: Row) -> bool:
    return given == row.shape or (
        len(given) == len(row.shape)
        and given[1:] == row.shape[1:]
        and 0 <= given[0] - row.shape[0] <= row.max_padding
    )


def _resamples(given: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    """Whether these are position embeddings of another square grid, [P, D] or [1, P, D]."""
    if given == wanted or len(given) != len(wanted) or given[-1] != wanted[-1]:
        return False
    grids = math.isqrt(given[-2]), math.isqrt(wanted[-2])
    return given[-2] > 0 and grids[0] ** 2 == given[-2] and grids[1] ** 2 == wanted[-2]


def _fill_one(
    tensors: Mapping[str, Tensor],
    row: Row,
    leaf: Any,
    pool: concurrent.futures.Executor,
) -> jax.Array:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(
        jax.devices()[0]
    )
    # Devices that hold the same part of the parameter share a buffer.
    buffers: dict[tuple, np.ndarray] = {}
    holders = []
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.shape, strict=True))
        if bounds not in buffers:
            shape = tuple(stop - start for start, stop in bounds)
            buffers[bounds] = _aligned(shape, np.dtype(leaf.dtype))
        holders.append((device, bounds))

    def fill_part(part: tuple[tuple[int, ...], str]) -> None:
        index, source = part
        for start, slab in _slabs(tensors[source], source, row):
            for bounds, buffer in buffers.items():
                _place(buffer, bounds, index, slab, start, row)

    # Listing them raises what a thread raised.
    list(pool.map(fill_part, row.parts(leaf.shape)))
    placed = jax.make_array_from_single_device_arrays(
        leaf.shape,
        sharding,
        [jax.device_put(buffers[bounds], device) for device, bounds in holders],
    )
    return jax.block_until_ready(placed)


def _slabs(tensor: Tensor, name: str, row: Row) -> Iterator[tuple[int, np.ndarray]]:
    """Parts of the source in the layout of the parameter, each with the step of `split`'s first
    axis that it begins at.
    """
    if row.resample and tensor.shape != row.shape:
        whole = resample_pos_embedding(
            read(tensor).astype(np.float32).reshape(-1, row.shape[-1]), row.shape[-2]
        )
        _check_finite(whole, name, tensor)
        yield 0, whole.reshape(row.split).transpose(row.order)
        return
    first, last = row.taken
    done = 0  # rows of the source
    for slab in tensor.slabs(row.unit):
        _check_finite(slab, name, tensor)
        start, stop = max(first, done), min(last, done + len(slab))
        if start < stop:
            taken = slab[start - done : stop - done].reshape(-1, *row.split[1:])
            yield (start - first) // row.unit, taken.transpose(row.order)
        done += len(slab)


def _place(
    buffer: np.ndarray,
    bounds: tuple[tuple[int, int], ...],
    index: tuple[int, ...],
    slab: np.ndarray,
    start: int,
    row: Row,
) -> None:
    """Copies what a slab and a shard have in common.

    Args:
      buffer: the shard.
      bounds: half-open range of the shard in each dimension of the parameter.
      index: where the slab's part stands in the parameter's first dimensions.
      slab: of the part, whole in all dimensions but one.
      start: where it begins in that one.
      row: of the table.
    """
    for i, (first, last) in zip(index, bounds[: len(index)], strict=True):
        if not first <= i < last:
            return
    buffer = buffer[tuple(i - first for i, (first, _) in zip(index, bounds, strict=False))]
    axis = row.order.index(0)
    here, there = [], []
    for dim, (first, last) in enumerate(bounds[len(index) :]):
        offset = start if dim == axis else 0
        low, high = max(first, offset), min(last, offset + slab.shape[dim])
        if low >= high:
            return
        here.append(slice(low - first, high - first))
        there.append(slice(low - offset, high - offset))
    _copy(buffer[tuple(here)], slab[tuple(there)])


def _copy(out: np.ndarray, x: np.ndarray) -> None:
    """`out[...] = x`, at the speed of memory for transposed views and for bfloat16."""
    if out.dtype == x.dtype:
        # Bits are bits; numpy has no fast path for a dtype that is not its own.
        bits = np.dtype(f"u{out.dtype.itemsize}")
        out, x = out.view(bits), x.view(bits)
    elif (x.dtype, out.dtype) == (STORED_DTYPES["bfloat16"], STORED_DTYPES["float32"]):
        # bfloat16 is the upper half of float32.
        bits = np.dtype(np.uint32)
        _in_strips(
            lambda out, x: np.left_shift(x, 16, out=out, dtype=bits),
            out.view(bits),
            x.view(np.uint16),
        )
        return
    _in_strips(lambda out, x: np.copyto(out, x, casting="unsafe"), out, x)


def _in_strips(copy: Any, out: np.ndarray, x: np.ndarray) -> None:
    if x.ndim < 2 or x.strides[-1] == x.itemsize:
        copy(out, x)
        return
    for start in range(0, out.shape[-1], _STRIP):
        columns = (..., slice(start, start + _STRIP))
        copy(out[columns], x[columns])


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Memory that a CPU device takes over as it is, not copying it: XLA wants 64 bytes."""
    num_bytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(num_bytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + num_bytes].view(dtype).reshape(shape)


def _check_finite(slab: np.ndarray, name: str, tensor: Tensor) -> None:
    if slab.dtype == STORED_DTYPES["bfloat16"]:
        # The largest exponent means infinity or NaN.
        finite = not slab.size or np.bitwise_and(slab.view(np.uint16), 0x7FFF).max() < 0x7F80
    else:
        finite = np.isfinite(slab).all()
    if not finite:
        raise UserError(
            f"tensor {name}{_where(tensor)} holds numbers that are not finite, so the file is "
            "damaged or was saved by a run that had diverged; download or export it again"
        )
