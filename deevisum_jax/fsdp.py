"""Fully sharded data parallelism by hand: weights are gathered where they are used.

Left to itself the compiler reduces whole gradients over all chips (twice the bytes of a
reduce-scatter) and gathers weights once per use. Inside of `per_device` a function sees what one
device holds: its rows of the batch and its shards of the parameters. `matrix` makes a weight whole
in the compute dtype, and its gradient comes back as a shard. Outside of `per_device` these
functions move nothing (or leave it to the compiler), so that a model is written once.

The axis `tensor` stays with the compiler.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from qwix import QArray

from deevisum_jax import quantized, sharding
from deevisum_jax.sharding import BATCH_AXES, FSDP_AXES, constrain
from deevisum_jax.typing import Array

# Chips that libtpu 0.0.42 has a gather of its own for, over several rings, of whatever size.
_GATHERED_AT_ONCE = 32


def per_device(fn: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """`fn` on every device's own part, on the current mesh; `fn` itself when there is none.

    Args:
      fn: sees local arrays; may call what is below.
      in_specs: of `jax.shard_map`; `param_specs` makes them.
      out_specs: the same of the results.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return fn
    return jax.shard_map(
        fn,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=frozenset(BATCH_AXES),
        # Gradients are summed where `sum_gradients` says so, not wherever a parameter is used.
        check_vma=False,
    )


def param_specs(params: Any) -> Any:
    """How `per_device` splits parameters: by `sharding.PARAM_AXES`, without the axis `tensor`."""
    return sharding.param_specs(params, without=("tensor",))


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What the compiler must be told of a step that is made of these functions."""
    if mesh.devices.flat[0].platform != "tpu":
        return {}
    # It would take matrix products apart to hide what they wait for, which costs a step half as
    # much again; gathers run behind the products before them as it is.
    options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}
    if mesh.devices.flat[0].device_kind in ("TPU v5 lite", "TPU v6 lite"):
        # Half of their VMEM for one product and what is fused to it, instead of an eighth: larger
        # tiles, a tenth less time.
        options["xla_tpu_scoped_vmem_limit_kib"] = str(64 * 2**10)
    return options


BATCH_SPEC = P(BATCH_AXES)  # dimension 0 over all devices along `data` and `fsdp`
WHOLE = P()


def is_manual() -> bool:
    """Whether this is traced inside of `per_device`."""
    return bool(set(BATCH_AXES) & set(jax.sharding.get_abstract_mesh().manual_axes))


def num_shards() -> int:
    """Devices that share one copy of the parameters; 1 outside of `per_device`."""
    return math.prod(size for _, size in _axes())


def total(tree: Any) -> Any:
    """The sum over the devices' parts of the batch."""
    return jax.lax.psum(tree, BATCH_AXES) if is_manual() else tree


def sum_gradients(grads: Any) -> Any:
    """Gradients of every device's own rows, summed over the devices that hold the same parameters.

    Once for all, behind the last layer and the last microbatch.
    """
    if not is_manual():
        return grads

    def one(grad: Array, spec: P) -> Array:
        split = {axis for axes in spec for axis in axes or ()}
        return jax.lax.psum(grad, tuple(axis for axis in BATCH_AXES if axis not in split))

    return jax.tree.map(one, grads, param_specs(grads))


def matrix(weight: Array | QArray, *axes: str, dtype: Any) -> Array:
    """A whole weight as a matrix, in the compute dtype; its gradient is summed and scattered.

    What travels has the compute dtype both ways: half the bytes of float32.

    Args:
      weight: a parameter, of which each device holds a shard. A quantised one is never
        differentiated; `optim.split_frozen` sees to it.
      *axes: logical axis of each dimension, as in `sharding.PARAM_AXES`; one is `embed`.
      dtype: of the result.

    Returns:
      [D, E]: `embed` in front, all other dimensions in order behind.
    """
    assert len(axes) == weight.ndim, f"{axes=} for a weight of shape {weight.shape}"
    is_coded = isinstance(weight, QArray)
    shard = quantized.decode(weight, dtype) if is_coded else weight.astype(dtype)
    shard = jnp.moveaxis(shard, axes.index("embed"), 0)
    return _gather(shard.reshape(shard.shape[0], -1))


@jax.custom_vjp
def _gather(shard: Array) -> Array:
    # A matrix that is split along its rows: of arrays of more dimensions, or split otherwise, the
    # compiler makes copies. Over as many rings at once as it has a gather for; over more chips it
    # falls back to an all-reduce.
    for group in _rings(_axes()[::-1], at_once=_GATHERED_AT_ONCE):
        names = tuple(axis for axis, _ in reversed(group))
        shard = jax.lax.all_gather(shard, names, axis=0, tiled=True)
    return shard


def _gather_fwd(shard: Array) -> tuple[Array, None]:
    return _gather(shard), None


def _gather_bwd(_: None, grad: Array) -> tuple[Array]:
    for axis, size in _axes():
        grad = grad.reshape(size, grad.shape[0] // size, *grad.shape[1:])
        # Untiled, and ring by ring: otherwise a scatter becomes an all-reduce.
        grad = jax.lax.psum_scatter(grad, axis, scatter_dimension=0, tiled=False)
    return (grad,)


_gather.defvjp(_gather_fwd, _gather_bwd)


def _rings(axes: list[tuple[str, int]], at_once: int) -> list[list[tuple[str, int]]]:
    """Neighbouring axes in groups of at most `at_once` devices."""
    groups: list[list[tuple[str, int]]] = []
    for axis, size in axes:
        if groups and size * math.prod(n for _, n in groups[-1]) <= at_once:
            groups[-1].append((axis, size))
        else:
            groups.append([(axis, size)])
    return groups


def lookup(table: Array, tokens: Array, dtype: Any) -> Array:
    """Rows of an embedding table whose columns are split: the table itself does not travel.

    Every device looks up all tokens in its columns, and one all-to-all hands out the rows.

    Args:
      table: float[V, D], this device's columns of it.
      tokens: int32[B, T], this device's.
      dtype: of the result.

    Returns:
      [B, T, D].
    """
    x = jnp.take(table, gather_rows(tokens), axis=0, mode="clip").astype(dtype)
    if names := _names():
        return jax.lax.all_to_all(x, names, split_axis=0, concat_axis=2, tiled=True)
    # The same, told to the compiler: without this stop it replicates the gradient on its way back
    # ("Involuntary full rematerialization").
    x = constrain(x, "lookup_batch", "seq", "embed")
    return constrain(x, "batch", "seq", "act_embed")


def rows_of_columns(table: Array, dtype: Any) -> Array:
    """From a device's columns of a table to its rows, the last ones filled up with zeros.

    Args:
      table: float[V, D / n], n devices.
      dtype: of the result.

    Returns:
      [ceil(V / n), D].
    """
    n = num_shards()
    table = table.astype(dtype)
    if n == 1:
        return table
    table = jnp.pad(table, ((0, -table.shape[0] % n), (0, 0)))
    return jax.lax.all_to_all(table, _names(), split_axis=0, concat_axis=1, tiled=True)


def shard_index() -> Array:
    """int32[], which of the parameters' shards this device has; 0 outside of `per_device`."""
    names = _names()
    return jax.lax.axis_index(names) if names else np.int32(0)


def gather_rows(x: Array) -> Array:
    """All rows of the devices that share one copy of the parameters, from each one's own."""
    names = _names()
    return jax.lax.all_gather(x, names, axis=0, tiled=True) if names else x


def scatter_rows(x: Array) -> Array:
    """Sums rows over those devices and gives each its own; the way back of `gather_rows`."""
    names = _names()
    return jax.lax.psum_scatter(x, names, scatter_dimension=0, tiled=True) if names else x


def sum_over_shards(x: Array) -> Array:
    names = _names()
    return jax.lax.psum(x, names) if names else x


def max_over_shards(x: Array) -> Array:
    names = _names()
    return jax.lax.pmax(x, names) if names else x


def _axes() -> list[tuple[str, int]]:
    """Mesh axes that the parameters are split over, slowest first, and their sizes."""
    if not is_manual():
        return []
    shape = jax.sharding.get_abstract_mesh().shape
    return [(axis, shape[axis]) for axis in FSDP_AXES if shape[axis] > 1]


def _names() -> tuple[str, ...]:
    return tuple(axis for axis, _ in _axes())
