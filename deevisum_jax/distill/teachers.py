"""What a frozen teacher is asked for, and its answer: the one place where gradients stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from deevisum_jax import fsdp, losses
from deevisum_jax.models import masks, paligemma2
from deevisum_jax.sharding import batch_sharding
from deevisum_jax.typing import Array, Batch, ExitScores, TeacherOutputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """What a teacher is asked for besides its classes and scores; a cache is of one such."""

    positions: str  # of the tokens: suffix, or all real tokens of the text
    top_k: int  # its likeliest tokens at each position; 0 = none
    temperature: float  # of the tokens' probabilities
    layers: tuple[int, ...]  # whose hidden states are taught, counted from 1; empty = none


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teacher:
    """One of those that a student learns from."""

    name: str  # of its stage
    weight: float  # of all that is learned from it
    model_config: paligemma2.PaliGemma2Config
    asked: Asked


def find_targets(batch: Batch, positions: str, num_targets: int) -> losses.Targets:
    """The tokens that are predicted: of the suffix, or all real ones of the text.

    With `all` these are the prompt's, too, but the first, which nothing predicts; never pads or
    image tokens.

    Args:
      batch: `tokens`, `mask_input`, `mask_loss` and `valid` are read.
      positions: suffix or all.
      num_targets: R of the suffix, as `losses.find_targets`; all tokens of a text of T are T - 1.
    """
    most = {"suffix": num_targets, "all": batch.tokens.shape[1] - 1}
    return losses.find_targets(batch.tokens, counted(batch, positions), most[positions])


def counted(batch: Batch, positions: str = "suffix") -> Array:
    """`bool[B, T]`: tokens that count; rows that fill up a batch have none."""
    tokens = {"suffix": batch.mask_loss, "all": batch.mask_input}[positions]
    return tokens & batch.valid[:, None]


def target_rows(output: paligemma2.Output, targets: losses.Targets, text_len: int) -> Array:
    """`float[B, R, D]`, the model's output where the targets are predicted."""
    # Text comes behind the image tokens, which have no target.
    pre_logits = output.pre_logits[:, -text_len:]
    return jnp.take_along_axis(pre_logits, targets.positions[..., None], axis=1)


def last_prefix_row(batch: Batch) -> Callable[[Array], Array]:
    """What to `collect` of each layer for the hidden loss: `float[B, S, D] -> float[B, D]`."""
    last = masks.last_prefix_position(batch.mask_ar, batch.mask_input)
    T = batch.tokens.shape[1]
    return lambda x: jnp.take_along_axis(x, (x.shape[1] - T + last)[:, None, None], axis=1)[:, 0]


def outputs(
    model: paligemma2.PaliGemma2, batch: Batch, asked: Asked, *, num_targets: int
) -> TeacherOutputs:
    """What a teacher says of a batch, to which no gradient flows.

    Args:
      model: with exit heads, the last one at its depth.
      batch: as of the student.
      asked: what for.
      num_targets: R of the suffix, as `losses.find_targets`.
    """
    if not (asked.top_k or asked.layers):
        return at_deepest_exit(model.score(batch))
    output = model(batch, collect=last_prefix_row(batch) if asked.layers else None)
    token_ids = token_log_probs = hidden = None
    if asked.top_k:
        targets = find_targets(batch, asked.positions, num_targets)
        token_ids, token_log_probs = losses.top_tokens(
            target_rows(output, targets, batch.tokens.shape[1]),
            model.llm.embedder.input_embedding[...],
            asked.top_k,
            temperature=asked.temperature,
            logits_softcap=model.config.llm.final_logits_softcap,
        )
    if asked.layers:
        taught = [output.collected[layer - 1] for layer in asked.layers]
        hidden = jnp.stack(taught, axis=1).astype(jnp.float32)
    return at_deepest_exit(
        output.exits, token_ids=token_ids, token_log_probs=token_log_probs, hidden=hidden
    )


def at_deepest_exit(exits: ExitScores, **more: Array | None) -> TeacherOutputs:
    """A model as a teacher: its deepest exit, and `more` fields; no gradient flows to it."""
    said = TeacherOutputs(
        class_logits=exits.class_logits[-1], importance=exits.importance[-1], **more
    )
    return jax.lax.stop_gradient(said)


def ask(
    teachers: tuple[Teacher, ...], params: Mapping[str, Any], batch: Batch, *, num_targets: int
) -> Batch:
    """The batch with what every teacher says of it.

    Args:
      teachers: all of them.
      params: of each by its name; inside of `fsdp.per_device`, this device's shards.
      batch: as of the student.
      num_targets: R of the suffix, as `losses.find_targets`.
    """
    said = {
        teacher.name: outputs(
            paligemma2.bind(teacher.model_config, params[teacher.name]),
            batch,
            teacher.asked,
            num_targets=num_targets,
        )
        for teacher in teachers
    }
    return dataclasses.replace(batch, teachers=said)


def make_teacher_fn(
    model_config: paligemma2.PaliGemma2Config,
    param_shardings: Any,
    mesh: jax.sharding.Mesh,
    asked: Asked,
    *,
    num_targets: int,
) -> Callable[[paligemma2.Params, Batch], TeacherOutputs]:
    """The compiled `outputs` alone: for a cache, or a look at them before training.

    Args:
      model_config: of the teacher.
      param_shardings: where its parameters are.
      mesh: the current one, `jax.set_mesh(mesh)`.
      asked: what for.
      num_targets: R of the suffix, as `losses.find_targets`.
    """

    def answer(params: paligemma2.Params, batch: Batch) -> TeacherOutputs:
        return fsdp.per_device(
            lambda params, batch: outputs(
                paligemma2.bind(model_config, params), batch, asked, num_targets=num_targets
            ),
            in_specs=(fsdp.param_specs(params), fsdp.BATCH_SPEC),
            out_specs=fsdp.BATCH_SPEC,
        )(params, batch)

    return jax.jit(
        answer,
        in_shardings=(param_shardings, batch_sharding(mesh)),
        compiler_options=fsdp.compiler_options(mesh),
    )
