"""Weights stored as codes of 8 or 4 bits, `qwix.QArray`: from numbers to codes, and back.

Numbers of one tile, in a row along one dimension, share a scale. `encode` and `decode` know no
other layout, and keep whatever sharding an array has, if each device holds whole tiles.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import qwix
from qwix import QArray

# The 16 levels of NormalFloat4 (Dettmers et al. 2023, appendix E).
NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip
# Numbers up to here have the level before.
_BORDERS = (NF4[1:] + NF4[:-1]) / 2
# From each level to the farther end of what has its code.
_REACH = np.maximum(np.append(_BORDERS - NF4[:-1], 0), np.append(0, NF4[1:] - _BORDERS))


def encode(weight: jax.Array, base: str, *, axis: int, tile: int) -> QArray:
    """The codes of a weight, computed in float32.

    Args:
      weight: of any float dtype.
      base: "int8": round(w / s), s = the tile's largest number by size / 127.5, float32. "nf4":
        the nearest of 16 levels of w / s, s = the tile's largest number by size, in the weight's
        own dtype (Dettmers et al. 2023, appendix E).
      axis: the dimension that tiles lie along.
      tile: how many numbers share a scale.
    """
    assert base in ("int8", "nf4"), base
    if base == "nf4":
        return _nf4(weight, axis, tile)
    others = [dim for dim in range(weight.ndim) if dim != axis]
    exact = weight.astype(jnp.float32)
    return qwix.quantize(exact, jnp.int8, channelwise_axes=others, tiled_axes={axis: tile})


def decode(weight: QArray, dtype: Any) -> jax.Array:
    """The numbers that codes stand for: `qwix.dequantize` number by number, on any sharding.

    Args:
      weight: int8 or nf4.
      dtype: of the result; computed in float32.
    """
    values = _level(weight.qvalue) if weight.qtype == "nf4" else weight.qvalue
    return (values.astype(jnp.float32) * _scales(weight)).astype(dtype)


def reach(weight: QArray) -> jax.Array:
    """float32, of the weight's shape: how far from its code's number one lies at most.

    Half a step of int8; half the wider gap to the neighbours of a level of nf4.
    """
    if weight.qtype == "nf4":
        return jnp.asarray(_REACH)[weight.qvalue.astype(jnp.int32)] * _scales(weight)
    return 0.5 * _scales(weight)


def _nf4(weight: jax.Array, axis: int, tile: int) -> QArray:
    """As `qwix.quantize`, which flattens an array to find levels: no sharding survives that."""
    shape = weight.shape
    tiles = weight.reshape(*shape[:axis], shape[axis] // tile, tile, *shape[axis + 1 :])
    largest = jnp.max(jnp.abs(tiles), axis=axis + 1)
    scale = jnp.where(largest < np.finfo(np.float32).tiny ** 0.5, 1, largest)
    repeated = jnp.repeat(scale.astype(jnp.float32), tile, axis=axis)
    ratio = weight.astype(jnp.float32) / repeated
    codes = sum((ratio > border).astype(jnp.uint8) for border in _BORDERS)
    return QArray(codes.astype(jnp.uint4), scale, None, "nf4")


def _level(codes: jax.Array) -> jax.Array:
    """The levels of 4-bit codes, by choosing half of what is left with each bit.

    Looking them up in a table would be a gather of single numbers, which a TPU is slow at.
    """
    codes = codes.astype(jnp.uint8)
    left = [jnp.float32(level) for level in NF4]
    for bit in range(4):
        is_one = (codes >> bit) & 1 == 1
        left = [
            jnp.where(is_one, one, zero) for zero, one in zip(left[::2], left[1::2], strict=True)
        ]
    return left[0]


def _scales(weight: QArray) -> jax.Array:
    """float32, the scale of every number."""
    scale = weight.scale.astype(jnp.float32)
    for dim, (size, tiles) in enumerate(zip(weight.shape, scale.shape, strict=True)):
        if size != tiles:
            scale = jnp.repeat(scale, size // tiles, axis=dim)
    return scale
