"""FLOPs of the matrix products that a function asks for, with nothing recomputed or padded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core

from deevisum_jax.keyframes import selection

# Of these compiled functions nothing is counted: how far DKS walks depends on the frames, and the
# cosines of one vector per frame are nothing beside an image tower.
_LEFT_OUT = (selection.select.__name__,)


def count(fn: Callable[..., Any], *args: Any) -> int:
    """FLOPs of `fn` on arrays or abstract arrays: two per multiply-add of every matrix product.

    A loop's body counts as often as it runs, of a `cond` the branch with most. How keyframes are
    chosen is left out.

    Raises:
      NotImplementedError: a `while` without a known number of trips has matrix products; or a
        `shard_map` has, whose shapes are those of one device.
    """
    return _of(jax.make_jaxpr(fn)(*args).jaxpr)


def _of(jaxpr: core.Jaxpr) -> int:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * equation.outvars[0].aval.size * math.prod(left[dim] for dim in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        features = params["dimension_numbers"].rhs_spec[0]
        return 2 * equation.outvars[0].aval.size * math.prod(kernel) // kernel[features]
    if name == "jit" and params["name"] in _LEFT_OUT:
        return 0
    inner = list(_inner(params))
    if name == "cond":
        return max(map(_of, inner))
    total = sum(map(_of, inner))
    if name == "while" and total:
        raise NotImplementedError(f"matrix products in a loop of unknown length: {equation}")
    if name == "shard_map" and total:
        raise NotImplementedError(f"matrix products of one device's shapes: {equation}")
    if name == "pallas_call":
        return total * math.prod(params["grid_mapping"].grid)
    return total * params["length"] if name == "scan" else total


def _inner(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """The jaxprs that an equation runs; of a function with a gradient of its own, the function."""
    for value in params.values():
        for one in value if isinstance(value, list | tuple) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                yield one.jaxpr
            elif isinstance(one, core.Jaxpr):
                yield one
