"""Safetensors files and folders of shards, read and written tensor by tensor.

A file is the length N of the header (8 bytes, little-endian), the header (N bytes of JSON: name ->
dtype, shape and place of every tensor) and the numbers. The safetensors library maps whole files
into memory and cannot read from a bucket; here a slab at a time is read, from whatever
`etils.epath` opens.

References:
  https://huggingface.co/docs/safetensors/index#format
"""

from __future__ import annotations

import collections
import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath

from deevisum_jax.convert.tensors import Tensor, is_shape, num_bytes, read_slabs, write_slabs
from deevisum_jax.errors import UserError
from deevisum_jax.files import exists, locate, open_binary, replacing, write_whole

# In the order of the library, which puts the last of these first in a file: the widest numbers
# begin the data, so that all are aligned.
_DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I16": np.dtype(np.int16),
    "U16": np.dtype(np.uint16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I32": np.dtype(np.int32),
    "U32": np.dtype(np.uint32),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "I64": np.dtype(np.int64),
    "U64": np.dtype(np.uint64),
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}

_METADATA_KEY = "__metadata__"
_PT_METADATA = {"format": "pt"}  # transformers refuses files that do not say it
_FIELDS = {"dtype", "shape", "data_offsets"}
_MAX_JSON_BYTES = 100_000_000  # as the library has it
_AGAIN = "download or write it again"

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# What other files begin with.
_STRANGERS = {
    b"version ": "a pointer of git-lfs and not the file itself; run git lfs pull",
    b"GGUF": "a GGUF file and no safetensors; give the checkpoint that it was made of",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Stored:
    """A tensor in a file, as its header tells. Every walk over it opens the file anew."""

    path: epath.Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    begin: int  # bytes from the start of the file
    end: int

    @property
    def file(self) -> str:
        return os.fspath(self.path)

    def slabs(self, unit: int = 1) -> Iterator[np.ndarray]:
        with open_binary(self.path) as stream:
            try:
                stream.seek(self.begin)
                yield from read_slabs(stream, self.shape, self.dtype, unit)
            except (EOFError, OSError) as error:
                raise UserError(
                    f"{self.file}: tensor {self.name!r} cannot be read to its end ({error}); the "
                    f"file changed or the disk fails, {_AGAIN}"
                ) from error


def open_safetensors(folder_or_file: str | os.PathLike) -> dict[str, Tensor]:
    """All tensors of a .safetensors file, or of a folder as transformers writes it.

    Only headers are read, and checked to the last byte: whatever opens is complete. In a folder
    that has both, `model.safetensors` goes before `model.safetensors.index.json`, as in
    transformers.

    Args:
      folder_or_file: local, or any address that `etils.epath` opens, such as gs://.

    Raises:
      UserError: something is missing, damaged or contradicts itself; names file and tensor.
    """
    path = locate(folder_or_file)
    if path.suffix == ".safetensors":
        return _open_file(path)
    if exists(path / SINGLE_FILE):
        return _open_file(path / SINGLE_FILE)
    if exists(path / INDEX_FILE):
        return _open_shards(path)
    raise UserError(
        f"{os.fspath(path)} holds neither {SINGLE_FILE} nor {INDEX_FILE}; "
        + (
            "its pytorch_model.bin is a pickle, which is not read: load it with transformers and "
            "save_pretrained it again"
            if exists(path / "pytorch_model.bin")
            else "download them, too"
        )
    )


def _open_file(path: epath.Path) -> dict[str, Tensor]:
    file = os.fspath(path)
    with open_binary(path) as stream:
        try:
            header, begin, data_bytes = _read_header(stream, file)
        except (EOFError, OSError) as error:
            raise UserError(f"{file} cannot be read ({error}); {_AGAIN}") from error
    metadata = header.pop(_METADATA_KEY, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise UserError(f"{file}: {_METADATA_KEY} is no map of strings to strings; {_AGAIN}")

    stored = []
    for name, entry in header.items():
        try:
            dtype, shape, (start, stop) = _checked(entry, data_bytes)
        except ValueError as error:
            raise UserError(f"{file}: tensor {name!r} {error}; {_AGAIN}") from error
        stored.append(
            _Stored(
                path=path,
                name=name,
                shape=shape,
                dtype=dtype,
                begin=begin + start,
                end=begin + stop,
            )
        )

    place, previous = begin, "the header"
    for tensor in sorted(stored, key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin < place:
            raise UserError(f"{file}: tensor {tensor.name!r} overlaps {previous}; {_AGAIN}")
        if tensor.begin > place:
            raise UserError(
                f"{file}: the {tensor.begin - place} bytes between {previous} and tensor "
                f"{tensor.name!r} belong to none; {_AGAIN}"
            )
        place, previous = tensor.end, f"tensor {tensor.name!r}"
    if place != begin + data_bytes:
        raise UserError(
            f"{file}: the {begin + data_bytes - place} bytes behind {previous} belong to no "
            f"tensor; {_AGAIN}"
        )
    return {tensor.name: tensor for tensor in stored}


def _read_header(stream: BinaryIO, file: str) -> tuple[dict[str, Any], int, int]:
    """The header, where the data begin, and how many bytes of data there are."""
    stream.seek(0, os.SEEK_END)
    file_bytes = stream.tell()
    stream.seek(0)
    if file_bytes < 8:
        raise UserError(f"{file} has {file_bytes} bytes and no safetensors header; {_AGAIN}")
    start = stream.read(8)
    for beginning, what in _STRANGERS.items():
        if start.startswith(beginning):
            raise UserError(f"{file} is {what}")
    length = int.from_bytes(start, "little")
    if length > min(file_bytes - 8, _MAX_JSON_BYTES):
        raise UserError(
            f"{file} claims a header of {length} bytes, in a file of {file_bytes} (and at most "
            f"{_MAX_JSON_BYTES} are read); it is no safetensors file or not complete, {_AGAIN}"
        )
    content = stream.read(length)
    if len(content) < length:
        raise EOFError(f"{length - len(content)} bytes of the header are missing")
    return _json_object(content, f"{file}: the header"), 8 + length, file_bytes - 8 - length


def _json_object(content: bytes, what: str) -> dict[str, Any]:
    try:
        decoded = json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} is no JSON ({error}); {_AGAIN}") from error
    if not isinstance(decoded, dict):
        raise UserError(f"{what} is no JSON object; {_AGAIN}")
    return decoded


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        [(name, count)] = collections.Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{name!r} is in it {count} times")
    return content


def _checked(entry: Any, data_bytes: int) -> tuple[np.dtype, tuple[int, ...], tuple[int, int]]:
    """Dtype, shape and place in the data of a tensor; `ValueError` completes "tensor 'x' ..."."""
    if not isinstance(entry, dict):
        raise ValueError("is described by no JSON object")
    if entry.keys() != _FIELDS:
        raise ValueError(f"is described by {sorted(entry)}, not by {sorted(_FIELDS)}")
    name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"has dtype {name!r}, which is none of {', '.join(_DTYPES)}")
    if not isinstance(shape, list) or not is_shape(shape):
        raise ValueError(f"has no possible shape: {shape}")
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or not all(type(offset) is int for offset in offsets)
        or not 0 <= offsets[0] <= offsets[1]
    ):
        raise ValueError(f"has data_offsets {offsets}, not a begin and an end")
    begin, end = offsets
    wanted = math.prod(shape) * _DTYPES[name].itemsize
    if end - begin != wanted:
        raise ValueError(f"has {end - begin} bytes, but {name} {shape} takes {wanted}")
    if end > data_bytes:
        raise ValueError(
            f"should end at byte {end} of the data, but the file ends at {data_bytes}; the "
            "download may not be complete"
        )
    return _DTYPES[name], tuple(shape), (begin, end)


def _open_shards(folder: epath.Path) -> dict[str, Tensor]:
    index_file = os.fspath(folder / INDEX_FILE)
    with open_binary(folder / INDEX_FILE) as stream:
        try:
            content = stream.read(_MAX_JSON_BYTES)
        except OSError as error:
            raise UserError(f"{index_file} cannot be read ({error}); {_AGAIN}") from error
    index = _json_object(content, index_file)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index_file} has no weight_map from tensors to files; {_AGAIN}")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or set(shard) & set("/\\\0"):
            raise UserError(
                f"{index_file}: tensor {name!r} is in {shard!r}, which points outside its folder "
                f"or is no file name; {_AGAIN}"
            )

    tensors = {}
    for shard in sorted(set(weight_map.values())):
        path = folder / shard
        if not exists(path):
            count = sum(other == shard for other in weight_map.values())
            raise UserError(
                f"{os.fspath(path)} does not exist, but {count} tensors should be in it according "
                f"to {INDEX_FILE}; download it into the same folder"
            )
        for name, tensor in _open_file(path).items():
            if weight_map.get(name) != shard:
                place = f"in {weight_map[name]}" if name in weight_map else "in no file"
                raise UserError(
                    f"{os.fspath(path)}: tensor {name!r} is {place} according to {INDEX_FILE}; "
                    "index and files are not of one checkpoint, download all of them again"
                )
            tensors[name] = tensor
    for name, shard in weight_map.items():
        if name not in tensors:
            raise UserError(
                f"{os.fspath(folder / shard)}: tensor {name!r} is missing, which is in it "
                f"according to {INDEX_FILE}; index and files are not of one checkpoint, download "
                "all of them again"
            )
    return {name: tensors[name] for name in weight_map}


def write_safetensors(
    folder: pathlib.Path,
    tensors: Mapping[str, Tensor],
    *,
    max_shard_bytes: int = 5 * 10**9,
    stem: str = "model",
    metadata: Mapping[str, str] = _PT_METADATA,
) -> list[str]:
    """Writes shards and their index as transformers names and fills them.

    `model.safetensors` when all fits into one; else `model-00001-of-00002.safetensors` and so on,
    filled in the order given, and `model.safetensors.index.json`.

    Args:
      folder: a local folder, for the caller to rename when everything in it is whole.
      tensors: each is walked once.
      max_shard_bytes: of numbers in a file. A tensor that is larger has a shard of its own.
      stem: what names begin with.
      metadata: of every file.

    Returns:
      Names of the files written.

    Raises:
      UserError: a dtype that the format does not have; or what walking a tensor raises.
    """
    shards: list[dict[str, Tensor]] = []
    open_shard: dict[str, Tensor] = {}
    open_bytes = 0
    for name, tensor in tensors.items():
        size = num_bytes(tensor)
        if size > max_shard_bytes:
            shards.append({name: tensor})
            continue
        if open_bytes + size > max_shard_bytes:
            shards.append(open_shard)
            open_shard, open_bytes = {}, 0
        open_shard[name] = tensor
        open_bytes += size
    if open_shard:
        shards.append(open_shard)

    if len(shards) <= 1:
        write_safetensors_file(folder / f"{stem}.safetensors", tensors, metadata)
        return [f"{stem}.safetensors"]
    weight_map, names = {}, []
    for number, shard in enumerate(shards, start=1):
        names.append(f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors")
        write_safetensors_file(folder / names[-1], shard, metadata)
        weight_map |= dict.fromkeys(shard, names[-1])
    index = {
        "metadata": {"total_size": sum(map(num_bytes, tensors.values()))},
        "weight_map": weight_map,
    }
    names.append(f"{stem}.safetensors.index.json")
    write_whole(folder / names[-1], json.dumps(index, indent=2, sort_keys=True) + "\n")
    return names


def write_safetensors_file(
    path: pathlib.Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] = _PT_METADATA
) -> None:
    """Writes one local file, byte for byte as the library does; it appears when it is whole.

    Raises:
      UserError: a dtype that the format does not have; or what walking a tensor raises.
    """
    assert _METADATA_KEY not in tensors
    for name, tensor in tensors.items():
        if tensor.dtype not in _NAMES:
            raise UserError(
                f"{path}: tensor {name!r} is {tensor.dtype}, which a safetensors file cannot hold; "
                f"convert it to one of {', '.join(map(str, _NAMES))}"
            )
    names = sorted(tensors, key=lambda name: (-_RANK[tensors[name].dtype], name))
    header: dict[str, Any] = {_METADATA_KEY: dict(metadata)} if metadata else {}
    begin = 0
    for name in names:
        end = begin + num_bytes(tensors[name])
        header[name] = {
            "dtype": _NAMES[tensors[name].dtype],
            "shape": tensors[name].shape,
            "data_offsets": [begin, end],
        }
        begin = end
    content = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    content += b" " * (-len(content) % 8)
    with replacing(path) as temporary, temporary.open("wb") as stream:
        stream.write(len(content).to_bytes(8, "little"))
        stream.write(content)
        for name in names:
            write_slabs(stream, tensors[name])
