"""big_vision's names: its npz checkpoints to this package's parameters, and back.

Our parameter names and shapes are big_vision's but for linen's automatic names. From -> to, where
they differ (`models/vit.py`, `models/ppp/gemma.py`, `models/proj/paligemma/paligemma.py`):

    img/Transformer/encoderblock                        img/Transformer/encoderblock
      /LayerNorm_{0,1}/{scale,bias}                       /ln{1,2}/{scale,bias}
      /MlpBlock_0/Dense_{0,1}/{kernel,bias}               /mlp/fc{1,2}/{kernel,bias}
      /MultiHeadDotProductAttention_0/...                 /attn/...

Keys may carry a `params/` in front. A tower that was not scanned over its layers has
`encoderblock_{i}` instead of stacked arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from deevisum_jax.convert.rows import Row
from deevisum_jax.convert.tensors import Tensor
from deevisum_jax.models.paligemma2 import PaliGemma2Config, abstract_params, without_exits

PREFIX = "params/"
_OPTIMIZER = "opt/"
_LINEN_NAMES = (
    ("/ln1/", "/LayerNorm_0/"),
    ("/ln2/", "/LayerNorm_1/"),
    ("/mlp/fc1/", "/MlpBlock_0/Dense_0/"),
    ("/mlp/fc2/", "/MlpBlock_0/Dense_1/"),
    ("/attn/", "/MultiHeadDotProductAttention_0/"),
)


def without_prefix(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under the names that tables use.

    As in big_vision's own loader `params/` alone is a model's where there is one: an optimizer's
    state, `opt/`, is left.

    Returns:
      The tensors, and the file's own name of each.
    """
    own_names = {
        name.removeprefix(PREFIX): name
        for name in tensors
        if not (name.startswith(_OPTIMIZER) and any(n.startswith(PREFIX) for n in tensors))
    }
    return {new: tensors[name] for new, name in own_names.items()}, own_names


def with_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of a checkpoint, beside which an optimizer could stand."""
    return {PREFIX + name: tensor for name, tensor in tensors.items()}


def paligemma2_rows(config: PaliGemma2Config) -> list[Row]:
    """The table of a PaliGemma 2; exit heads and what merging learns are ours and not in it."""
    return renamed_rows(abstract_params(without_exits(config)), resample=("img/pos_embedding",))


def renamed_rows(
    abstract: Any, *, resample: Iterable[str], renames: Sequence[tuple[str, str]] = ()
) -> list[Row]:
    """One row per parameter, all of them copies under big_vision's name.

    Args:
      abstract: nested dictionary of anything with `shape`.
      resample: paths of position embeddings that may be resampled.
      renames: parts of a path, ours and theirs, besides those of the layers.
    """
    rows = []
    for path, leaf in flatten_dict(abstract, sep="/").items():
        source = path
        if "/encoderblock/" in path or "/map_head/" in path:
            for ours, theirs in _LINEN_NAMES:
                source = source.replace(ours, theirs)
        for ours, theirs in renames:
            source = source.replace(ours, theirs)
        rows.append(
            Row(target=path, sources=(source,), shape=leaf.shape, resample=path in resample)
        )
    return rows


def as_scanned(rows: Iterable[Row], names: Iterable[str]) -> list[Row]:
    """The table for towers as a checkpoint has them: stacked, or each layer on its own.

    Args:
      rows: of `renamed_rows`.
      names: of the checkpoint's tensors, without `params/`.
    """
    layer = "/encoderblock_0/"
    unscanned = {name.partition(layer)[0] for name in names if layer in name}
    found = []
    for row in rows:
        [source] = row.sources
        tower, block, rest = source.partition("/encoderblock/")
        if block and tower in unscanned:
            row = dataclasses.replace(
                row,
                sources=(f"{tower}/encoderblock_{{i}}/{rest}",),
                shape=row.shape[1:],
                split=(),
                order=(),
            )
        found.append(row)
    return found
