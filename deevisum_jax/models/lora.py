"""Low-rank adapters (Hu et al. 2021), over a base that may be quantised (Dettmers et al. 2023).

Beside a weight `<path>` stand `<path>_lora_a` and `<path>_lora_b`, stacked over layers as it is,
and `y = x W + (alpha / rank) (x a) b`. `a` is drawn, `b` begins as zeros, so that nothing changes
at first. Both are float32, whatever the weight is stored in: they are small, and they are trained.

A quantised weight is a `qwix.QArray` in the place of the array: a code for each number, and one
scale for `tile` of them in a row. The rows are along a dimension that is never split over `fsdp`,
so each device reads its own shard.

`qwix.apply_lora_to_model` is not used: it knows a weight by the parameter of the module that is
running, and in a scan over stacked layers what is multiplied is a gathered slice of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from qwix import QArray

from deevisum_jax import quantized
from deevisum_jax.config import LoraConfig
from deevisum_jax.errors import UserError
from deevisum_jax.models import layers
from deevisum_jax.models.pytree import Params

_A, _B = "_lora_a", "_lora_b"


class _Matrix(NamedTuple):
    """Einsum letters of a stacked weight and of its adapter; C is a pair, r the rank."""

    weight: str
    a: str
    b: str
    tiled: str = ""  # the dimension that tiles lie along, of a weight that can be quantised


_IMG = _Matrix("LDNH", "LDr", "LrNH")
_MATRICES = {
    "llm/layers/attn/q_einsum/w": _Matrix("LNDH", "LDr", "LrNH", "H"),
    "llm/layers/attn/kv_einsum/w": _Matrix("LCKDH", "LCDr", "LCrKH", "H"),
    "llm/layers/attn/attn_vec_einsum/w": _Matrix("LNHD", "LNHr", "LrD", "H"),
    "llm/layers/mlp/gating_einsum": _Matrix("LCDF", "LCDr", "LCrF", "F"),
    "llm/layers/mlp/linear": _Matrix("LFD", "LFr", "LrD", "F"),
    "img/Transformer/encoderblock/attn/query/kernel": _IMG,
    "img/Transformer/encoderblock/attn/key/kernel": _IMG,
    "img/Transformer/encoderblock/attn/value/kernel": _IMG,
}


def check(config: LoraConfig, *, head_dim: int, mlp_dim: int) -> None:
    """Refuses tiles that a language model of these sizes cannot have.

    What needs no sizes is checked with the config, and tiles against a mesh by `sharding.validate`.

    Raises:
      UserError: tiles do not fill rows.
    """
    if config.base is None:
        return
    for name, size in (("head_dim", head_dim), ("mlp_dim", mlp_dim)):
        if size % config.tile:
            raise UserError(
                f"model.lora.tile={config.tile} does not divide llm.{name}={size}, along which "
                f"numbers share a scale; set a divisor of both head_dim={head_dim} and "
                f"mlp_dim={mlp_dim} such as {math.gcd(64, head_dim, mlp_dim)}"
            )


def meaning(config: LoraConfig | None) -> tuple[Any, ...] | None:
    """What a checkpoint depends on: the same for configs whose adapters are the same."""
    if config is None or not config.rank:
        return None
    tile = config.tile if config.base else None
    return config.rank, config.alpha, frozenset(config.towers), config.base, tile


def is_adapter(path: str) -> bool:
    """Whether a parameter, `a/b/c`, is one of an adapter's two."""
    return path.endswith((_A, _B))


def beside(path: str) -> tuple[str, str]:
    """Where a weight's adapter is, if it has one."""
    return path + _A, path + _B


def num_params(params: Params) -> int:
    """How many numbers the adapters have; `params` may be abstract."""
    flat = flatten_dict(params, sep="/")
    return sum(math.prod(leaf.shape) for path, leaf in flat.items() if is_adapter(path))


def reserve(model: nnx.Module, config: LoraConfig) -> None:
    """Makes room in a model for its adapters, and tells its layers their scale.

    They are zeros, and `add` replaces all of them: only their shapes matter, which are the same.
    """
    for path, matrix in _adapted(config):
        *modules, name = path.split("/")
        module = functools.reduce(getattr, modules, model)
        shape_a, shape_b = _shapes(matrix, getattr(module, name).shape, config.rank)
        setattr(module, name + _A, nnx.Param(jnp.zeros(shape_a, jnp.float32)))
        setattr(module, name + _B, nnx.Param(jnp.zeros(shape_b, jnp.float32)))
        module.lora_scale = config.alpha / config.rank


def add(params: Params, config: LoraConfig, key: jax.Array) -> Params:
    """Parameters with fresh adapters, in place of those that there are.

    Args:
      params: of the whole model; weights may be quantised.
      config: names the towers and the rank.
      key: `a` is drawn from it, a normal of variance one over its inputs.
    """
    flat = flatten_dict(params, sep="/")
    for index, (path, matrix) in enumerate(_adapted(config)):
        shape_a, shape_b = _shapes(matrix, flat[path].shape, config.rank)
        sizes = dict(zip(matrix.a, shape_a, strict=True))
        fan_in = math.prod(size for letter, size in sizes.items() if letter not in "LCr")
        rngs = nnx.Rngs(jax.random.fold_in(key, index))
        flat[path + _A] = layers.fan_in_init(rngs, shape_a, fan_in, "float32")[...]
        flat[path + _B] = jnp.zeros(shape_b, jnp.float32)
    return unflatten_dict(flat, sep="/")


def quantize(params: Params, config: LoraConfig) -> Params:
    """Parameters with the language model's matrices as `config.base` says; others as they are.

    The same numbers give the same codes, on any mesh. A matrix is quantised layer by layer, but is
    there as a whole, and so are all that are in `params`: a large model is handed over leaf by leaf
    while it is read (`initialization`).

    Args:
      params: also a part of a model; what is quantised stays.
      config: names the codes (`quantized.encode`).
    """
    if config.base is None:
        return params
    flat = flatten_dict(params, sep="/")
    for path, matrix in _MATRICES.items():
        if matrix.tiled and path in flat and not isinstance(flat[path], QArray):
            axis = matrix.weight.index(matrix.tiled)
            flat[path] = _quantized(flat[path], config.base, axis, config.tile)
    return unflatten_dict(flat, sep="/")


def merge(params: Params, config: LoraConfig | None, dtype: str) -> Params:
    """Plain parameters of the same model: adapters added to their weights, codes made numbers.

    Args:
      params: of a model with `config`; also a part of one.
      config: None = without adapters, which changes nothing.
      dtype: of weights that are quantised, the model's `param_dtype`; others keep their own.

    Returns:
      Without adapters' leaves.
    """
    if config is None:
        return params
    merged = {}
    flat = flatten_dict(params, sep="/")
    for path, leaf in flat.items():
        if is_adapter(path):
            continue
        stored = dtype if isinstance(leaf, QArray) else leaf.dtype
        if path + _A in flat:
            matrix = _MATRICES[path]
            scale = config.alpha / config.rank
            leaf = _merged(leaf, flat[path + _A], flat[path + _B], matrix, scale, str(stored))
        elif isinstance(leaf, QArray):
            leaf = quantized.decode(leaf, stored)
        merged[path] = leaf
    return unflatten_dict(merged, sep="/")


def base_of(params: Params, dtype: str) -> Params:
    """What `quantize` and `add` were given, from abstract parameters: no adapters, plain arrays.

    Args:
      params: with shardings.
      dtype: of weights that are quantised.
    """

    def plain(leaf):
        if not isinstance(leaf, QArray):
            return leaf
        where = leaf.qvalue.sharding
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(dtype), sharding=where)

    flat = flatten_dict(params, sep="/")
    return unflatten_dict(
        {path: plain(leaf) for path, leaf in flat.items() if not is_adapter(path)}, sep="/"
    )


def _adapted(config: LoraConfig) -> Iterator[tuple[str, _Matrix]]:
    for path, matrix in _MATRICES.items():
        if path.split("/")[0] in config.towers:
            yield path, matrix


def _shapes(
    matrix: _Matrix, weight: tuple[int, ...], rank: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    sizes = dict(zip(matrix.weight, weight, strict=True)) | {"r": rank}
    shape_a, shape_b = (
        tuple(sizes[letter] for letter in letters) for letters in (matrix.a, matrix.b)
    )
    return shape_a, shape_b


@functools.partial(jax.jit, static_argnames=("matrix", "scale", "dtype"))
def _merged(
    weight: jax.Array | QArray,
    a: jax.Array,
    b: jax.Array,
    matrix: _Matrix,
    scale: float,
    dtype: str,
) -> jax.Array:
    letters = [of[1:] for of in (matrix.a, matrix.b, matrix.weight)]

    def layer(parts: tuple[jax.Array | QArray, jax.Array, jax.Array]) -> jax.Array:
        weight, a, b = parts
        if isinstance(weight, QArray):
            weight = quantized.decode(weight, jnp.float32)
        # float32: what an adapter adds may be less than a bfloat16 weight can tell.
        added = jnp.einsum("{},{}->{}".format(*letters), a, b)
        return (weight.astype(jnp.float32) + scale * added).astype(dtype)

    return jax.lax.map(layer, (weight, a, b))


@functools.partial(jax.jit, static_argnames=("base", "axis", "tile"))
def _quantized(weight: jax.Array, base: str, axis: int, tile: int) -> QArray:
    # Layer by layer: what is computed on the way is larger than the codes.
    encode = functools.partial(quantized.encode, base=base, axis=axis - 1, tile=tile)
    return jax.lax.map(encode, weight)
