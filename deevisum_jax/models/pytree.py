"""Models as plain pytrees: what every model's `init_params`, `abstract_params` and `bind` share.

Parameters travel as a nested dictionary of arrays. flax.nnx builds the structure and nothing else.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
from flax import nnx
from flax.traverse_util import flatten_dict

from deevisum_jax.errors import UserError, closest

Params = dict[str, Any]  # nested, arrays as leaves, big_vision's names
Config = TypeVar("Config")
Model = TypeVar("Model", bound=nnx.Module)

DTYPES = ("float32", "bfloat16")  # of activations, and of stored parameters


def check_dtype(field: str, given: str) -> None:
    """Raises a `UserError` for a dtype that models are not computed or stored in."""
    if given not in DTYPES:
        raise UserError(f"{field} {given!r} is unknown: {closest(str(given), DTYPES)}")


def vary(
    variants: Mapping[str, Config],
    name: str,
    what: str,
    towers: Mapping[str, Mapping[str, Any] | None],
    fields: Mapping[str, Any],
) -> Config:
    """A variant by name, with fields replaced.

    Args:
      variants: configs by name.
      name: one of them.
      what: they are, for messages.
      towers: fields of the configs within, by their name there.
      fields: of the config itself.

    Raises:
      UserError: an unknown name or field (with the closest that exists), or a value that the
        config refuses.
    """
    if name not in variants:
        raise UserError(f"{what} variant {name!r} is unknown: {closest(name, variants)}")
    config = variants[name]
    changed = {
        tower: replace_fields(getattr(config, tower), tower, given or {})
        for tower, given in towers.items()
    }
    return replace_fields(config, "model", {**fields, **changed})


def replace_fields(config: Config, where: str, fields: Mapping[str, Any]) -> Config:
    """A config with fields replaced.

    Raises:
      UserError: a field that there is none of (names the closest), or a value that is refused.
    """
    known = [field.name for field in dataclasses.fields(config)]
    for field in fields:
        if field not in known:
            raise UserError(f"{where} has no field {field!r}: {closest(field, known)}")
    return dataclasses.replace(config, **fields)


def init(make: Callable[..., nnx.Module], config: Any, key: jax.Array) -> Params:
    """Fresh parameters of `make(config, rngs=...)`."""
    return nnx.to_pure_dict(nnx.state(make(config, rngs=nnx.Rngs(key))))


def abstract(make: Callable[..., nnx.Module], config: Any) -> Params:
    """Shapes and dtypes of `init`, computed without memory or time."""
    return jax.tree.map(lambda leaf: leaf, _split(make, config)[1])


def num_params(params: Params) -> int:
    """How many numbers a model has; scales of quantised ones are not counted."""
    return sum(math.prod(leaf.shape) for leaf in flatten_dict(params).values())


def bind(make: Callable[..., Model], config: Any, params: Params) -> Model:
    """A model over `params`, to call methods of; nothing is copied."""
    graphdef, shapes = _split(make, config)
    ours, theirs = flatten_dict(shapes, sep="/"), flatten_dict(params, sep="/")
    assert ours.keys() == theirs.keys(), (
        f"parameters of another model: {sorted(ours.keys() ^ theirs.keys())} are on one side only"
    )
    return nnx.merge(graphdef, params)


@functools.cache
def _split(make: Callable[..., nnx.Module], config: Any) -> tuple[nnx.GraphDef, Params]:
    graphdef, state = nnx.split(nnx.eval_shape(lambda: make(config, rngs=nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)
