"""AdamW with warm-up and cosine, gradient clipping, freezing by path."""

from __future__ import annotations

import re
from typing import Any

import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from deevisum_jax.config import OptimConfig
from deevisum_jax.errors import UserError
from deevisum_jax.models import lora

Params = dict[str, Any]

# Among a state's parameters: what distillation trains beside the model, and is no part of it.
PROJECTIONS = "distill"

# Norms, biases, position embeddings and the temperature of merging are not decayed, whatever their
# rank in the stacked layout.
_NO_DECAY = re.compile(r"(^|/)(scale|bias|pos_embedding|log_temperature)$")
# What trains beside the adapters of a model that has some.
_HEADS = ("exits/", "merge/", f"{PROJECTIONS}/")


def make_schedule(config: OptimConfig, total_steps: int) -> optax.Schedule:
    """Linear warm-up to the peak, then half a cosine down to `end_fraction` of it."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=total_steps,
        end_value=config.learning_rate * config.end_fraction,
    )


def make_optimizer(config: OptimConfig, schedule: optax.Schedule) -> optax.GradientTransformation:
    """AdamW over the trainable parameters."""
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    return optax.chain(
        clip,
        optax.adamw(
            schedule,
            b1=config.b1,
            b2=config.b2,
            weight_decay=config.weight_decay,
            mask=_decays,
        ),
    )


def _decays(params: Params) -> Params:
    flat = flatten_dict(params, sep="/")
    return unflatten_dict({path: not _NO_DECAY.search(path) for path in flat}, sep="/")


def split_frozen(params: Params, patterns: tuple[str, ...]) -> tuple[Params, Params]:
    """Trainable and frozen parts of a tree of parameters, both nested as the tree is.

    Of a model with adapters they train, the exit heads, what merging learns and the projections of
    distillation; the weights that the adapters are for, and all others, are frozen.

    Args:
      params: arrays, abstract ones or shardings; a quantised weight is one of them.
      patterns: regular expressions of whole paths that are frozen besides.

    Raises:
      UserError: a pattern that is no regular expression or matches no parameter; nothing trains,
        or no adapter of a tower that has some.
    """
    flat = flatten_dict(params, sep="/")
    matched: set[str] = set()
    for pattern in patterns:
        try:
            hits = {path for path in flat if re.fullmatch(pattern, path)}
        except re.error as error:
            raise UserError(
                f"optim.frozen: {pattern!r} is no regular expression ({error})"
            ) from None
        if not hits:
            raise UserError(
                f"optim.frozen: {pattern!r} matches no parameter; paths look like "
                f"{next(iter(flat))}"
            )
        matched |= hits
    every = "every parameter"
    adapters = {path for path in flat if lora.is_adapter(path)}
    if adapters:
        every = "every adapter and head, and they alone train"
        matched |= {path for path in flat if path not in adapters and not path.startswith(_HEADS)}
    if len(matched) == len(flat):
        raise UserError(f"optim.frozen matches {every}, so nothing would train; free some")
    for tower in sorted({path.split("/")[0] for path in adapters}):
        if all(path in matched for path in adapters if path.startswith(f"{tower}/")):
            raise UserError(
                f"optim.frozen matches every adapter of {tower}, which would stay as if there were "
                f"none; leave {tower} out of model.lora.towers, or free them"
            )
    trainable = {path: leaf for path, leaf in flat.items() if path not in matched}
    frozen = {path: leaf for path, leaf in flat.items() if path in matched}
    return unflatten_dict(trainable, sep="/"), unflatten_dict(frozen, sep="/")


def of_model(params: Params) -> Params:
    """Without what is trained beside the model; of arrays, or of what stands for them."""
    return {name: part for name, part in params.items() if name != PROJECTIONS}


def merge(trainable: Params, frozen: Params) -> Params:
    """The whole tree of `split_frozen`'s two parts."""
    return unflatten_dict(flatten_dict(trainable) | flatten_dict(frozen))
