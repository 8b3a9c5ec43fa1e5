"""What a student's loss takes over from its teachers: DEEVISum's multi-stage distillation.

A mentor's loss is CE + phi KL(teacher), a student's CE + phi KL(mentor) + psi KL(teacher), where
each KL has parts: the summary heads' classes, importance scores, tokens and hidden states. Besides,
the student's deepest exit may teach those before it (self-distillation: Zhang et al. 2019, "Be Your
Own Teacher"). What has no weight is not computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deevisum_jax import losses, optim
from deevisum_jax.config import Config
from deevisum_jax.distill import teachers
from deevisum_jax.distill.teachers import Asked, Teacher
from deevisum_jax.errors import UserError
from deevisum_jax.models import layers, paligemma2
from deevisum_jax.typing import Array, Batch

_EXITS = "exits"  # the student's own deepest exit, as a teacher's name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One term of the loss."""

    name: str  # of its metric, which is without the weight
    weight: float
    kind: str  # class, score, token or hidden
    teacher: str
    row: int = 0  # of the student's exits, or of the taught layers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distillation:
    """All that a student learns from others, or its exits from the deepest."""

    teachers: tuple[Teacher, ...]
    online: bool  # the teachers run within the step; else `Batch.teachers` has what they said
    parts: tuple[Part, ...]
    layers: tuple[int, ...]  # the student's, that are taught hidden states; empty = none
    direction: str
    temperature: float
    positions: str

    @property
    def of_tokens(self) -> tuple[str, ...]:
        """Teachers of tokens."""
        return tuple(part.teacher for part in self.parts if part.kind == "token")


def make(
    config: Config,
    model_config: paligemma2.PaliGemma2Config,
    teacher_configs: Mapping[str, paligemma2.PaliGemma2Config],
) -> Distillation | None:
    """What a stage learns from those before it; None if that is nothing.

    Args:
      config: of the stage.
      model_config: of its model.
      teacher_configs: of the models of all of `config.teachers`.

    Raises:
      UserError: a teacher has another vocabulary or, online, another size of pictures; `top_k`
        leaves no other token; `layer_map` names a layer that there is none of, or one of the
        student's twice; a single exit is to learn from itself; no part has weight.
    """
    distill = config.distill
    exits = model_config.exit_layers
    own_layers = tuple(row[0] for row in distill.layer_map) or exits
    if not distill.hidden or not config.teachers:
        own_layers = ()
    _check_layers("student", own_layers, model_config)
    if len(set(own_layers)) < len(own_layers):
        raise UserError(
            f"distill.layer_map={distill.layer_map} teaches a layer of the student twice; give "
            "each of its layers one row"
        )
    if distill.exits and not (distill.class_ or distill.score):
        raise UserError(
            f"distill.exits={distill.exits} has no part to learn: distill.class_ and "
            "distill.score are 0; give one of them weight, or set distill.exits=0"
        )
    if distill.exits and len(exits) == 1:
        raise UserError(
            f"distill.exits={distill.exits}: the model has one exit, at {exits[0]}, and none "
            "before it to learn; name more in model.exit_layers, or set distill.exits=0"
        )
    found = tuple(
        _teacher(config, model_config, name, weight, teacher_configs[name], own_layers)
        for name, weight in config.teachers.items()
    )
    weights = losses.exit_weights(config.loss, exits)
    parts = tuple(
        part
        for part in (
            *_parts_of_teachers(config, found, exits, weights, own_layers),
            *_parts_of_exits(config, exits, weights),
        )
        if part.weight
    )
    if not parts:
        if config.teachers or distill.exits:
            raise UserError(
                "distill.phi, psi or exits is above 0, and every part to learn has the weight 0; "
                "give one of distill.class_, score, token and hidden weight (exits: class_ or "
                "score), or set phi, psi and exits to 0"
            )
        return None
    return Distillation(
        teachers=found,
        online=bool(found) and distill.source == "online",
        parts=parts,
        layers=own_layers,
        direction=distill.direction,
        temperature=distill.temperature,
        positions=distill.positions,
    )


def _teacher(
    config: Config,
    model_config: paligemma2.PaliGemma2Config,
    name: str,
    weight: float,
    teacher_config: paligemma2.PaliGemma2Config,
    own_layers: tuple[int, ...],
) -> Teacher:
    distill = config.distill
    vocab, own_vocab = teacher_config.llm.vocab_size, model_config.llm.vocab_size
    if vocab != own_vocab:
        raise UserError(
            f"the {name} has a vocabulary of {vocab}, the {config.stage} one of {own_vocab}; a "
            "token must mean the same to both: train them with the same tokenizer"
        )
    if distill.token and distill.top_k >= vocab:
        raise UserError(
            f"distill.top_k={distill.top_k} must leave another token of the vocabulary of {vocab}; "
            f"at most {vocab - 1}"
        )
    size, own_size = teacher_config.img.image_size, model_config.img.image_size
    if distill.source == "online" and size != own_size:
        raise UserError(
            f"the {name} sees pictures of {size} pixels, the {config.stage} of {own_size}, and "
            "online both are given the same; set model.image_size, or distill.source=cache"
        )
    taught: tuple[int, ...] = ()
    if own_layers:
        earlier = config.stages[: config.stages.index(config.stage)][::-1]
        column = 1 + earlier.index(name)
        depth, own_depth = teacher_config.llm.depth, model_config.llm.depth
        taught = tuple(row[column] for row in distill.layer_map) or tuple(
            # The nearest layer, of two the deeper: 2 of 6 layers are 3 of 8.
            max(1, (2 * layer * depth + own_depth) // (2 * own_depth))
            for layer in own_layers
        )
        _check_layers(name, taught, teacher_config)
    # Where no tokens are asked for, neither their positions nor a temperature makes a difference.
    tokens = (
        {"positions": distill.positions, "top_k": distill.top_k, "temperature": distill.temperature}
        if distill.token
        else {"positions": "suffix", "top_k": 0, "temperature": 1.0}
    )
    asked = Asked(**tokens, layers=taught)
    return Teacher(name=name, weight=weight, model_config=teacher_config, asked=asked)


def _check_layers(
    whose: str, named: tuple[int, ...], model_config: paligemma2.PaliGemma2Config
) -> None:
    for layer in named:
        if layer > model_config.llm.depth:
            raise UserError(
                f"distill.layer_map names layer {layer} of the {whose}, which has "
                f"{model_config.llm.depth}; layers are counted from 1"
            )


def _parts_of_teachers(
    config: Config,
    found: tuple[Teacher, ...],
    exits: tuple[int, ...],
    exit_weights: np.ndarray,
    own_layers: tuple[int, ...],
) -> Iterator[Part]:
    distill = config.distill
    for teacher in found:
        of, weight = teacher.name, teacher.weight
        for kind, part_weight in (("class", distill.class_), ("score", distill.score)):
            for x, layer in enumerate(exits):
                yield Part(
                    name=f"loss/kl/{of}/{kind}/exit_{layer}",
                    weight=weight * part_weight * float(exit_weights[x]),
                    kind=kind,
                    teacher=of,
                    row=x,
                )
        yield Part(
            name=f"loss/kl/{of}/token", weight=weight * distill.token, kind="token", teacher=of
        )
        for y, layer in enumerate(own_layers):
            yield Part(
                name=f"loss/hidden/{of}/layer_{layer}",
                weight=weight * distill.hidden / len(own_layers),
                kind="hidden",
                teacher=of,
                row=y,
            )


def _parts_of_exits(
    config: Config, exits: tuple[int, ...], exit_weights: np.ndarray
) -> Iterator[Part]:
    distill = config.distill
    for kind, part_weight in (("class", distill.class_), ("score", distill.score)):
        for x, layer in enumerate(exits[:-1]):
            yield Part(
                name=f"loss/kl/exits/{kind}/exit_{layer}",
                weight=distill.exits * part_weight * float(exit_weights[x]),
                kind=kind,
                teacher=_EXITS,
                row=x,
            )


def init_projections(
    distill: Distillation, model_config: paligemma2.PaliGemma2Config, key: jax.Array
) -> paligemma2.Params:
    """Fresh projections of the student's hidden states to each teacher's width.

    Args:
      distill: of `make`.
      model_config: of the student.
      key: random.

    Returns:
      `{teacher: {"kernel": float[Y, D, D']}}`, to be `optim.PROJECTIONS` of the parameters; empty
      if no hidden states are taught.
    """
    if not distill.layers:
        return {}
    Y, D = len(distill.layers), model_config.llm.width
    rngs = nnx.Rngs(key)
    return {
        teacher.name: {
            "kernel": layers.fan_in_init(
                rngs, (Y, D, teacher.model_config.llm.width), D, model_config.param_dtype
            )[...]
        }
        for teacher in distill.teachers
    }


def with_projections(
    distill: Distillation | None,
    params: paligemma2.Params,
    model_config: paligemma2.PaliGemma2Config,
    key: jax.Array,
) -> paligemma2.Params:
    """A model's parameters and, if hidden states are taught, fresh projections beside them."""
    drawn = init_projections(distill, model_config, key) if distill else {}
    return params | {optim.PROJECTIONS: drawn} if drawn else params


def counts(distill: Distillation, batch: Batch) -> dict[str, Array]:
    """What each part of the loss counts in a batch; needs no model."""
    tokens = teachers.counted(batch, distill.positions)[:, 1:]
    of_kind = {"token": jnp.sum(tokens.astype(jnp.float32))}
    valid = jnp.sum(batch.valid.astype(jnp.float32))
    return {part.name: of_kind.get(part.kind, valid) for part in distill.parts}


def compute(
    distill: Distillation,
    output: paligemma2.Output,
    token_log_probs: Mapping[str, Array],
    batch: Batch,
    mask: Array,
    projections: paligemma2.Params,
) -> dict[str, losses.Total]:
    """Every part of the loss, by metric name, without its weight.

    Args:
      distill: of `make`.
      output: the student's; with `distill.layers`, it collected `teachers.last_prefix_row`.
      token_log_probs: by teacher, the student's `float32[B, R, K + 1]` of the teacher's tokens.
      batch: has what the teachers said.
      mask: `bool[B, R]`, tokens that count.
      projections: of `init_projections`.
    """
    said = {**batch.teachers, _EXITS: teachers.at_deepest_exit(output.exits)}
    how = {"temperature": distill.temperature, "direction": distill.direction}

    def loss(part: Part) -> losses.Total:
        teacher = said[part.teacher]
        match part.kind:
            case "class":
                own = output.exits.class_logits[part.row]
                return losses.class_kl(teacher.class_logits, own, batch.valid, **how)
            case "score":
                own = output.exits.importance[part.row]
                return losses.score_kl(teacher.importance, own, batch.valid, **how)
            case "token":
                own = token_log_probs[part.teacher]
                return losses.token_kl(teacher.token_log_probs, own, mask, **how)
            case "hidden":
                x = output.collected[distill.layers[part.row] - 1]
                kernel = projections[part.teacher]["kernel"][part.row].astype(x.dtype)
                own = jnp.einsum("BD,DE->BE", x, kernel, preferred_element_type=jnp.float32)
                return losses.hidden_distance(teacher.hidden[:, part.row], own, batch.valid)
        raise AssertionError(part.kind)

    return {part.name: loss(part) for part in distill.parts}
