"""Small programs whose cost is known by hand, and what the TPU compiler made of them.

`programs/*.hlo` are its output for v5e:4x4 (libtpu 0.0.42), without metadata and most of what is
the backend's own. `python tests/planner/small_programs.py` writes them anew; it needs libtpu.
"""

from __future__ import annotations

import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deevisum_jax.planner import chips, environment

FOLDER = pathlib.Path(__file__).parent / "programs"


def _abstract(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _nested(x, w):
    def outer(x, _):
        inner = lambda x, _: (jnp.tanh(x @ w), None)
        return jax.lax.scan(inner, x, None, length=5)[0] * 2, None

    return jax.lax.scan(outer, x, None, length=3)[0]


def _until(x, w):
    go_on = lambda state: (state[0] < 26) & (jnp.sum(state[1]).astype(jnp.float32) < 1e3)
    return jax.lax.while_loop(go_on, lambda state: (state[0] + 1, state[1] @ w), (0, x))[1]


def _convolution(**options):
    layout = ("NHWC", "HWIO", "NHWC")
    return lambda x, w: jax.lax.conv_general_dilated(x, w, dimension_numbers=layout, **options)


def _pallas(x):
    def kernel(x_ref, o_ref):
        o_ref[...] = x_ref[...] * 2

    block = pl.BlockSpec((128, 512), lambda i: (i, 0))
    cost = pl.CostEstimate(flops=512 * 512, bytes_accessed=0, transcendentals=0)
    once = pl.pallas_call(
        kernel, out_shape=x, grid=(4,), in_specs=[block], out_specs=block, cost_estimate=cost
    )
    return jax.lax.scan(lambda x, _: (once(x), None), x, None, length=7)[0]


# name: function, its arguments, FLOPs by hand. All on one chip.
ON_ONE_CHIP = {
    "matmul": (
        lambda a, b: a @ b,
        (_abstract(512, 1024), _abstract(1024, 256)),
        2 * 512 * 1024 * 256,
    ),
    "attention_logits": (
        lambda q, k: jnp.einsum("BTKGH,BSKH->BKGTS", q, k),
        (_abstract(4, 384, 4, 2, 256), _abstract(4, 384, 4, 256)),
        2 * 4 * 4 * 2 * 384 * 384 * 256,
    ),
    "nested_scans": (_nested, (_abstract(512, 512), _abstract(512, 512)), 3 * 5 * 2 * 512**3),
    "while_until": (_until, (_abstract(512, 512), _abstract(512, 512)), 26 * 2 * 512**3),
    "conditional": (
        lambda p, x, w: jax.lax.cond(p, lambda: jnp.tanh(x @ w), lambda: x),
        (_abstract(dtype=jnp.bool_), _abstract(512, 512), _abstract(512, 512)),
        2 * 512**3,
    ),
    "patches": (
        _convolution(window_strides=(14, 14), padding="VALID"),
        (_abstract(4, 224, 224, 3), _abstract(14, 14, 3, 1152)),
        2 * 4 * 16 * 16 * (14 * 14 * 3) * 1152,
    ),
    # 32 + 31 + 31 pairs of rows: of three rows of the kernel, two meet padding once.
    "grouped_convolution": (
        _convolution(window_strides=(1, 1), padding="SAME", feature_group_count=4),
        (_abstract(4, 32, 32, 128), _abstract(3, 3, 32, 256)),
        2 * 4 * (94 * 94) * 32 * 256,
    ),
    "batch_grouped_convolution": (
        _convolution(window_strides=(1, 1), padding="SAME", batch_group_count=4),
        (_abstract(16, 32, 32, 32), _abstract(3, 3, 32, 256)),
        2 * 4 * (94 * 94) * 32 * 256,
    ),
    "pallas": (_pallas, (_abstract(512, 512),), 7 * 512 * 512),
}


def on_one_chip(name: str) -> str:
    """The compiled text of one of `ON_ONE_CHIP`."""
    fn, args, _ = ON_ONE_CHIP[name]
    [chip, *_] = environment.devices(chips.topology("v5e:4x4"))
    where = NamedSharding(Mesh(np.array([chip]), "x"), P())
    lowered = jax.jit(fn, in_shardings=where, out_shardings=where).lower(*args)
    with environment.uncached():
        return lowered.compile().as_text()


def _mesh() -> Mesh:
    chip_grid = np.array(environment.devices(chips.topology("v5e:4x4"))).reshape(4, 4)
    return Mesh(chip_grid, ("x", "y"), axis_types=(AxisType.Auto,) * 2)


def collectives() -> str:
    """Each kind once, over rows or columns of the 4 x 4 chips or all of them."""

    def per_chip(x, w):  # bf16[1024, 512] each
        return (
            jax.lax.all_gather(w, "x", axis=0, tiled=True),
            jax.lax.psum(x, ("x", "y")),
            jax.lax.psum_scatter(x.reshape(4, 256, 512), "y", scatter_dimension=0),
            jax.lax.all_to_all(x, "x", 0, 0, tiled=True),
            jax.lax.ppermute(x, "x", [(i, (i + 1) % 4) for i in range(4)]),
        )

    mesh, rows = _mesh(), P(("x", "y"))
    fn = jax.shard_map(
        per_chip,
        mesh=mesh,
        in_specs=(rows, P("x")),
        out_specs=(P(), P(), rows, rows, rows),
        check_vma=False,
    )
    args = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, spec))
        for shape, spec in (((16 * 1024, 512), rows), ((4 * 1024, 512), P("x")))
    ]
    with jax.set_mesh(mesh), environment.uncached():
        return jax.jit(fn).lower(*args).compile().as_text()


def windowed_einsum() -> str:
    """[16 * 4096, 4096] x [4096, 4096], rows of both split over 16 chips: weights go round."""
    mesh, rows = _mesh(), P(("x", "y"))
    args = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, rows))
        for shape in ((16 * 4096, 4096), (4096, 4096))
    ]
    fn = jax.jit(lambda x, w: jnp.tanh(x @ w), out_shardings=NamedSharding(mesh, rows))
    with jax.set_mesh(mesh), environment.uncached():
        options = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1"}
        return fn.lower(*args).compile(options).as_text()


def stored(name: str) -> str:
    """One of `programs/*.hlo`."""
    return (FOLDER / f"{name}.hlo").read_text()


def trimmed(text: str) -> str:
    """What the planner reads of a compiled text, with the rest left out."""
    lines = []
    for line in text.splitlines():
        if line.startswith("HloModule"):
            counts = re.findall(r"(?:num_partitions|replica_count)=\d+", line)
            lines.append(", ".join(["HloModule small", *counts]))
            continue
        if not re.match(r"(ENTRY )?%|  |\}", line):  # names of files and functions
            continue
        kept = re.findall(r'"estimated_cycles":"\d+"|"cost_estimate":\{[^}]*\}', line)
        line = re.sub(r", (metadata|sharding|frontend_attributes)=\{.*", "", line)
        line = line.split(", backend_config=")[0]
        lines.append(line + (f", backend_config={{{','.join(kept)}}}" if kept else ""))
    return "\n".join(lines) + "\n"


def main() -> None:
    """Writes `programs/`."""
    environment.prepare()
    FOLDER.mkdir(exist_ok=True)
    texts = {name: on_one_chip(name) for name in ON_ONE_CHIP}
    texts |= {"collectives": collectives(), "windowed_einsum": windowed_einsum()}
    for name, text in texts.items():
        (FOLDER / f"{name}.hlo").write_text(trimmed(text))


if __name__ == "__main__":
    main()
