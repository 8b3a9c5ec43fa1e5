"""Where arrays live: mesh axes, and the one table from a parameter's path to its axes.

A parameter's path matches exactly one row of `PARAM_AXES`, which names the meaning of each of its
dimensions (logical axes); `RULES` says over which mesh axes a logical axis is split. The model
names the same axes where it gathers a weight. Mesh axes: `data` (replicas), `fsdp` (parameter
shards), `tensor` (tensor parallelism). The batch is split over `data` and `fsdp` together.

On a TPU `fsdp` is up to three mesh axes, one for each ring of the chips' torus that it spans:
collectives over one ring at a time are native there (see `fsdp`).
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deevisum_jax.errors import UserError
from deevisum_jax.typing import Batch, TeacherOutputs

MESH_AXES = ("data", "fsdp", "tensor")  # as a config names them
FSDP_AXES = ("fsdp", "fsdp_y", "fsdp_z")  # as the mesh does; all but the first may be 1
BATCH_AXES = ("data", *FSDP_AXES)

# Nested dictionary with arrays, abstract arrays or shardings as leaves.
Tree = dict[str, Any]

# Logical axis -> mesh axes. Every logical axis in use has a row, so that a typing error is an
# error. Three kinds stay whole on every device: what a scan walks over (layers, exits), what is
# tiny (norm: vectors of a norm or a bias; patch: the 14 x 14 x 3 patch kernel and the position
# table, 3 MB together in the 3B model; classes), and what a norm or a softmax needs whole.
RULES: dict[str, tuple[str, ...]] = {
    # Parameters.
    "layers": (),
    "exits": (),
    "vocab": ("tensor",),
    "embed": FSDP_AXES,
    "mlp": ("tensor",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "qkv": (),  # the pair of key and value, or of gate and up
    "norm": (),
    "patch": (),
    "classes": (),
    "rank": (),  # of an adapter
    # Activations. `embed` is taken by the parameters' shards, hence a name of its own.
    "batch": BATCH_AXES,
    "lookup_batch": ("data",),  # of token embeddings that are still split over fsdp
    "seq": (),
    "act_embed": (),
}

_STORED = "(/(qvalue|scale))?"  # a quantised weight's codes and scales have the weight's axes
# Path regex (whole path, "/" between names) -> logical axes, one per dimension.
PARAM_AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"img/embedding/kernel", ("patch", "patch", "patch", "norm")),
    (r"(img|txt)/pos_embedding", ("patch", "patch", "norm")),
    (r"img/embedding/bias|(img|txt)/head/bias", ("norm",)),
    (r"(img|txt)/head/kernel", ("norm", "embed")),
    (r"(img|txt)/Transformer/encoder_norm/(scale|bias)", ("norm",)),
    (r"(img|txt)/Transformer/encoderblock/ln[12]/(scale|bias)", ("layers", "norm")),
    (r"(img|txt)/Transformer/encoderblock/mlp/fc1/kernel", ("layers", "embed", "mlp")),
    (r"(img|txt)/Transformer/encoderblock/mlp/fc1/bias", ("layers", "mlp")),
    (r"(img|txt)/Transformer/encoderblock/mlp/fc2/kernel", ("layers", "mlp", "embed")),
    (r"(img|txt)/Transformer/encoderblock/(mlp/fc2|attn/out)/bias", ("layers", "norm")),
    (
        r"(img|txt)/Transformer/encoderblock/attn/(query|key|value)/kernel",
        ("layers", "embed", "heads", "head_dim"),
    ),
    (
        r"(img|txt)/Transformer/encoderblock/attn/(query|key|value)/bias",
        ("layers", "heads", "head_dim"),
    ),
    (
        r"(img|txt)/Transformer/encoderblock/attn/out/kernel",
        ("layers", "heads", "head_dim", "embed"),
    ),
    # SigLIP's own: pooling, the text tower's tokens, the logits' scale and bias.
    (r"img/map_head/probe", ("patch", "patch", "norm")),
    (r"img/map_head/(ln1/(scale|bias)|(mlp/fc2|attn/out)/bias)", ("norm",)),
    (r"img/map_head/attn/(query|key|value)/kernel", ("embed", "heads", "head_dim")),
    (r"img/map_head/attn/(query|key|value)/bias", ("heads", "head_dim")),
    (r"img/map_head/attn/out/kernel", ("heads", "head_dim", "embed")),
    (r"img/map_head/mlp/fc1/kernel", ("embed", "mlp")),
    (r"img/map_head/mlp/fc1/bias", ("mlp",)),
    (r"img/map_head/mlp/fc2/kernel", ("mlp", "embed")),
    (r"txt/embed/embedding", ("vocab", "embed")),
    (r"t|b", ("norm",)),
    (r"llm/embedder/input_embedding", ("vocab", "embed")),
    (r"llm/final_norm/scale", ("norm",)),
    (r"llm/layers/(pre|post)_(attention|ffw)_norm/scale", ("layers", "norm")),
    ("llm/layers/attn/q_einsum/w" + _STORED, ("layers", "heads", "embed", "head_dim")),
    ("llm/layers/attn/kv_einsum/w" + _STORED, ("layers", "qkv", "kv_heads", "embed", "head_dim")),
    ("llm/layers/attn/attn_vec_einsum/w" + _STORED, ("layers", "heads", "head_dim", "embed")),
    ("llm/layers/mlp/gating_einsum" + _STORED, ("layers", "qkv", "embed", "mlp")),
    ("llm/layers/mlp/linear" + _STORED, ("layers", "mlp", "embed")),
    # Adapters: the model's width is split as the weight's is, the rank never.
    (r"llm/layers/attn/q_einsum/w_lora_a", ("layers", "embed", "rank")),
    (r"llm/layers/attn/q_einsum/w_lora_b", ("layers", "rank", "heads", "head_dim")),
    (
        r"llm/layers/(attn/kv_einsum/w|mlp/gating_einsum)_lora_a",
        ("layers", "qkv", "embed", "rank"),
    ),
    (r"llm/layers/attn/kv_einsum/w_lora_b", ("layers", "qkv", "rank", "kv_heads", "head_dim")),
    (r"llm/layers/attn/attn_vec_einsum/w_lora_a", ("layers", "heads", "head_dim", "rank")),
    (r"llm/layers/mlp/gating_einsum_lora_b", ("layers", "qkv", "rank", "mlp")),
    (r"llm/layers/mlp/linear_lora_a", ("layers", "mlp", "rank")),
    (
        r"llm/layers/(attn/attn_vec_einsum/w|mlp/linear)_lora_b",
        ("layers", "rank", "embed"),
    ),
    (
        r"img/Transformer/encoderblock/attn/(query|key|value)/kernel_lora_a",
        ("layers", "embed", "rank"),
    ),
    (
        r"img/Transformer/encoderblock/attn/(query|key|value)/kernel_lora_b",
        ("layers", "rank", "heads", "head_dim"),
    ),
    # Of merged frames; `whole` gathers them once for all chunks.
    (r"merge/(query|image_query|key|image_key)/kernel", ("norm", "embed")),
    (r"merge/((query|image_query|key|image_key)/bias|log_temperature)", ("norm",)),
    # From a student's hidden states to a teacher's.
    (r"distill/(teacher|mentor)/kernel", ("exits", "norm", "norm")),
    (r"exits/(norm/scale|prototype)", ("exits", "norm")),
    (r"exits/(classifier|importance)/kernel", ("exits", "norm", "classes")),
    (r"exits/(classifier|importance)/bias", ("exits", "classes")),
)


def make_mesh(*, data: int = 1, fsdp: int = -1, tensor: int = 1, devices=None) -> Mesh:
    """A mesh with axes `data`, `fsdp`, `tensor`; one of the sizes may be -1 (all that is left).

    Use it with `jax.set_mesh(mesh)`; `with mesh:` does not reach `constrain`.

    Raises:
      UserError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    if any(size < 1 and size != -1 for size in sizes.values()) or [*sizes.values()].count(-1) > 1:
        raise UserError(
            f"mesh sizes are at least 1, and at most one may be -1 (all that is left): got {sizes}"
        )
    left = len(devices) // math.prod(size for size in sizes.values() if size != -1)
    counts = tuple(left if size == -1 else size for size in sizes.values())
    if math.prod(counts) != len(devices):
        raise UserError(
            f"mesh sizes {sizes} do not multiply to the number of devices, {len(devices)}; choose "
            "sizes that do, of which one may be -1 to take what is left"
        )
    arranged = _on_torus(devices, *counts)
    # Auto: the compiler propagates shardings from the parameters and `constrain`. The default of
    # `jax.make_mesh` is Explicit, which would put shardings into every type.
    axis_types = (AxisType.Auto,) * (len(BATCH_AXES) + 1)
    if arranged is not None:
        return Mesh(arranged, (*BATCH_AXES, "tensor"), axis_types=axis_types)
    data, fsdp, tensor = counts
    return jax.make_mesh(
        (data, fsdp, 1, 1, tensor),
        (*BATCH_AXES, "tensor"),
        axis_types=axis_types,
        devices=devices,
    )


def sizes(mesh: Mesh) -> dict[str, int]:
    """Devices along `data`, `fsdp` and `tensor`, as a config counts them."""
    fsdp = math.prod(mesh.shape[axis] for axis in FSDP_AXES)
    return {"data": mesh.shape["data"], "fsdp": fsdp, "tensor": mesh.shape["tensor"]}


def _on_torus(
    devices: Sequence[jax.Device], data: int, fsdp: int, tensor: int
) -> np.ndarray | None:
    """Devices with whole rings of a TPU's torus along every mesh axis; None if it does not fit.

    Slices come first and go to `data`, since they are joined by a slower network.
    """
    if not all(hasattr(device, "coords") for device in devices):
        return None
    places = [
        (getattr(device, "slice_index", 0), *device.coords, device.core_on_chip)
        for device in devices
    ]
    low = np.min(places, axis=0)
    dims = np.max(places, axis=0) - low + 1
    if math.prod(dims) != len(devices):
        return None
    grid = np.empty(dims, object)
    for place, device in zip(places, devices, strict=True):
        grid[tuple(place - low)] = device
    rings = [dim for dim, size in enumerate(dims) if size > 1]
    # The last rings first: cores of a chip and neighbours of a host are closest.
    for tensor_rings in _choices(rings[::-1], dims, tensor):
        left = [ring for ring in rings if ring not in tensor_rings]
        for fsdp_rings in _choices(left[::-1], dims, fsdp):
            if len(fsdp_rings) > len(FSDP_AXES):
                continue
            data_rings = [ring for ring in left if ring not in fsdp_rings]
            split = [int(dims[ring]) for ring in sorted(fsdp_rings)]
            order = (*data_rings, *sorted(fsdp_rings), *sorted(tensor_rings))
            others = [dim for dim in range(grid.ndim) if dim not in order]
            split += [1] * (len(FSDP_AXES) - len(split))
            return grid.transpose(*order, *others).reshape(data, *split, tensor)
    return None


def _choices(rings: Sequence[int], dims: np.ndarray, size: int) -> Iterator[tuple[int, ...]]:
    """Rings that together have `size` devices."""
    for count in range(len(rings) + 1):
        for chosen in itertools.combinations(rings, count):
            if math.prod(int(dims[ring]) for ring in chosen) == size:
                yield chosen


def fitting_mesh(abstract_params: Tree, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """All devices, of which as many as divide the parameters share one copy of them.

    For a machine that no config was written for. The batch is split over every device whatever
    their number, and parameters over the most that divide them: a model of width 2304 on 8 devices
    is split 8 ways, on 6 devices 6 ways, on 5 devices each has a copy.

    Args:
      abstract_params: nested dictionary of anything with `shape` and `ndim`.
      devices: None = all.
    """
    count = len(jax.devices() if devices is None else devices)
    for fsdp in range(count, 0, -1):
        if count % fsdp == 0:
            mesh = make_mesh(data=count // fsdp, fsdp=fsdp, devices=devices)
            try:
                validate(abstract_params, mesh)
            except UserError:
                continue
            return mesh
    raise AssertionError("one shard divides everything")


def logical_axes(path: str, ndim: int) -> tuple[str, ...]:
    """The logical axes of the parameter at `path`, for instance `llm/layers/mlp/linear`.

    Raises:
      UserError: no row of `PARAM_AXES` matches the path, or more than one does, or the row has
        another number of dimensions.
    """
    rows = [(regex, axes) for regex, axes in PARAM_AXES if re.fullmatch(regex, path)]
    if len(rows) != 1:
        found = ", ".join(repr(regex) for regex, _ in rows) or "none"
        raise UserError(
            f"parameter {path!r} must match exactly one row of sharding.PARAM_AXES, got {found}; "
            "give it a row of its own"
        )
    [(regex, axes)] = rows
    if len(axes) != ndim:
        raise UserError(
            f"parameter {path!r} has {ndim} dimensions, but its row {regex!r} of "
            f"sharding.PARAM_AXES names {len(axes)}: {axes}"
        )
    return axes


def partition_spec(axes: Sequence[str], without: Container[str] = ()) -> P:
    """Logical axes -> the mesh axes of each dimension, by `RULES`, some of them left out."""
    return P(*(tuple(a for a in RULES[axis] if a not in without) or None for axis in axes))


def param_specs(params: Tree, without: Container[str] = ()) -> Tree:
    """`partition_spec` of every parameter; anything with `ndim` is one.

    Raises:
      UserError: as `logical_axes`.
    """
    return jax.tree.map_with_path(
        lambda path, leaf: partition_spec(logical_axes(_name(path), leaf.ndim), without), params
    )


def validate(abstract_params: Tree, mesh: Mesh) -> None:
    """Refuses a mesh that does not divide the parameters, naming all of them at once.

    Nothing is replicated silently instead: the memory plan of a run would not hold any more.

    Raises:
      UserError: a dimension is not a multiple of the mesh axes that split it.
    """
    offenders = []
    for path, leaf in _leaves(abstract_params):
        for dim, axis in enumerate(logical_axes(path, leaf.ndim)):
            split = 1
            for mesh_axis in RULES[axis]:
                split *= mesh.shape[mesh_axis]
            if leaf.shape[dim] % split:
                offenders.append(
                    f"{path} {leaf.shape}: {axis} = {leaf.shape[dim]} over "
                    f"{RULES[axis][0]} = {split}"
                )
    if offenders:
        raise UserError(
            f"the mesh {sizes(mesh)} does not divide these parameters; choose sizes of fsdp "
            "and tensor that do, and give the rest to data:\n  " + "\n  ".join(offenders)
        )


def param_shardings(abstract_params: Tree, mesh: Mesh) -> Tree:
    """The sharding of every parameter, as a tree of the same shape.

    Args:
      abstract_params: nested dictionary of anything with `shape` and `ndim`.
      mesh: a mesh of `make_mesh`.

    Raises:
      UserError: as `logical_axes` and `validate`.
    """
    validate(abstract_params, mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(abstract_params))


def abstract(shapes: Any, shardings: Any) -> Any:
    """Shapes and dtypes with where they are to live: what a checkpoint is restored onto.

    Args:
      shapes: tree of anything with `shape` and `dtype`.
      shardings: tree of the same structure.
    """
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        shardings,
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a `Batch` is placed: the first dimension over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, P(RULES["batch"]))


def place_batch(fields: Mapping[str, Any], mesh: Mesh) -> Batch:
    """A global `Batch` on the mesh, of this process's own rows; every process calls it.

    Args:
      fields: host arrays, as `data.pipeline` stacks them; of cached teachers by name and field.
      mesh: where they go.
    """
    where = batch_sharding(mesh)
    placed = jax.tree.map(
        lambda rows: jax.make_array_from_process_local_data(where, rows), dict(fields)
    )
    teachers = placed.pop("teachers", {})
    return Batch(
        **placed, teachers={name: TeacherOutputs(**said) for name, said in teachers.items()}
    )


def on_host(arrays: Any, mesh: Mesh) -> Any:
    """Whole arrays in this process, of a tree of those on the mesh; every process calls it.

    A process may also be alone with its mesh, beside others.
    """
    if mesh.is_multi_process:
        return multihost_utils.process_allgather(arrays, tiled=True)
    return jax.device_get(arrays)


def check_batch(name: str, size: int, mesh: Mesh) -> None:
    """Refuses a global batch that the mesh does not divide.

    Raises:
      UserError: `size` is no multiple of the devices along `data` and `fsdp`.
    """
    split = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if size % split:
        raise UserError(
            f"{name}={size} is not divisible by the mesh's data x fsdp = {split}; use a multiple "
            f"of {split}, or give more devices to tensor"
        )


def constrain(x: jax.Array, *axes: str) -> jax.Array:
    """Tells the compiler how an activation is split; does nothing when no mesh is set.

    Args:
      x: an activation under `jax.jit`, or any array outside of a mesh.
      *axes: logical axis of each dimension of `x`, for instance `"batch", "seq", "act_embed"`.
    """
    assert len(axes) == x.ndim, f"{axes=} for an array of shape {x.shape}"
    # What `jax.set_mesh` sets. A legacy `with mesh:` leaves it empty.
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    # Inside of `fsdp.per_device` the arrays are local: there is nothing to say of their batch.
    spec = partition_spec(axes, mesh.manual_axes)
    if mesh.manual_axes and not any(spec):
        return x
    return jax.lax.with_sharding_constraint(x, spec)


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _leaves(params: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for path, leaf in jax.tree.leaves_with_path(params):
        yield _name(path), leaf
