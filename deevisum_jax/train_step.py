"""One update as a pure function `(state, batch) -> (state, metrics)`.

With teachers that run beside the student it is `(state, batch, their parameters)`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deevisum_jax import fsdp, losses, optim, sharding
from deevisum_jax.config import LossConfig
from deevisum_jax.distill import objective, teachers
from deevisum_jax.distill.objective import Distillation
from deevisum_jax.models import paligemma2
from deevisum_jax.optim import Params
from deevisum_jax.typing import Array, Batch

Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """All that changes, or must travel with what changes. Nothing random is drawn in training."""

    step: Array  # int32[], updates done
    params: Params  # trainable
    frozen: Params  # the rest of the model's parameters
    opt_state: Any


def init_state(
    params: Params, tx: optax.GradientTransformation, frozen: tuple[str, ...] = ()
) -> TrainState:
    """A state at step 0 of the given parameters; `frozen` as in `OptimConfig`."""
    trainable, rest = optim.split_frozen(params, frozen)
    return TrainState(
        step=jnp.zeros((), jnp.int32), params=trainable, frozen=rest, opt_state=tx.init(trainable)
    )


def state_shardings(
    state: TrainState, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> TrainState:
    """Where every leaf of an (abstract) state lives: moments beside their parameters."""
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = sharding.param_shardings(state.params, mesh)
    return TrainState(
        step=whole,
        params=params,
        frozen=sharding.param_shardings(state.frozen, mesh),
        opt_state=optax.tree.map_params(
            tx,
            lambda _, where: where,
            state.opt_state,
            params,
            transform_non_params=lambda _: whole,
        ),
    )


def compute_losses(
    model: paligemma2.PaliGemma2,
    batch: Batch,
    config: LossConfig,
    num_targets: int,
    distill: Distillation | None = None,
    projections: Params | None = None,
) -> tuple[dict[str, losses.Total], dict[str, float]]:
    """Every part of the loss and its weight, by metric name; `num_targets` as `find_targets`.

    With `distill` the batch has what the teachers said; `projections` are
    `objective.init_projections`.
    """
    exit_layers = model.config.exit_layers
    taught = distill.of_tokens if distill else ()
    positions = distill.positions if taught else "suffix"
    hidden = distill.layers if distill else ()
    output = model(batch, collect=teachers.last_prefix_row(batch) if hidden else None)
    targets = teachers.find_targets(batch, positions, num_targets)
    # One pass over the vocabulary for all that is asked of these rows.
    at_targets, at_chosen = losses.token_log_probs(
        teachers.target_rows(output, targets, batch.tokens.shape[1]),
        model.llm.embedder.input_embedding[...],
        targets.tokens,
        [batch.teachers[name].token_ids for name in taught],
        temperature=distill.temperature if taught else 1.0,
        logits_softcap=model.config.llm.final_logits_softcap,
    )
    mask = targets.mask
    if positions != "suffix":
        mask &= jnp.take_along_axis(teachers.counted(batch)[:, 1:], targets.positions, axis=1)
    parts = {"loss/token": losses.token_cross_entropy(at_targets, mask)}
    weights = {"loss/token": config.token}
    for x, (layer, weight) in enumerate(
        zip(exit_layers, losses.exit_weights(config, exit_layers), strict=True)
    ):
        parts[f"loss/class/exit_{layer}"] = losses.class_cross_entropy(
            output.exits.class_logits[x], batch.label, batch.valid
        )
        parts[f"loss/score/exit_{layer}"] = losses.score_cross_entropy(
            output.exits.importance[x], batch.score, batch.valid
        )
        parts[f"loss/prototype/exit_{layer}"] = losses.prototype_cross_entropy(
            output.exits.cosine[x], batch.label, batch.valid
        )
        weights[f"loss/class/exit_{layer}"] = config.class_ * weight
        weights[f"loss/score/exit_{layer}"] = config.score * weight
        weights[f"loss/prototype/exit_{layer}"] = config.prototype * weight
    if distill:
        at_chosen = dict(zip(taught, at_chosen, strict=True))
        parts |= objective.compute(
            distill, output, at_chosen, batch, targets.mask, projections or {}
        )
        weights |= {part.name: part.weight for part in distill.parts}
    return parts, weights


def make_train_step(
    model_config: paligemma2.PaliGemma2Config,
    loss_config: LossConfig,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    num_targets: int,
    accumulate_steps: int = 1,
    distill: Distillation | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The update, for `jit`.

    `num_targets` is the most tokens that the token loss counts in one example.

    With `accumulate_steps` > 1 the batch is worked off in that many microbatches. Each part of the
    loss is divided by its count over the *whole* batch, so the gradient is the unsplit one.

    Teachers of `distill` that are online run on every microbatch; their parameters, by name, are
    the update's third argument. What others said comes in `Batch.teachers`.
    """

    def loss_fn(trainable: Params, frozen: Params, batch: Batch, counts: dict[str, Array]):
        params = optim.merge(trainable, frozen)
        projections = params.pop(optim.PROJECTIONS, None)
        model = paligemma2.bind(model_config, params)
        parts, weights = compute_losses(
            model, batch, loss_config, num_targets, distill, projections
        )
        means = {name: part.sum / jnp.maximum(counts[name], 1.0) for name, part in parts.items()}
        total = sum(weights[name] * mean for name, mean in means.items())
        return total, means | {"loss/total": total}

    def grads_of(
        params: Params, frozen: Params, batch: Batch, teacher_params: Mapping[str, Params]
    ) -> tuple[Params, Metrics]:
        """Of every device's own rows, summed over devices; each keeps its shard."""
        counts = fsdp.total(_counts(batch, model_config.exit_layers, distill))

        def grad_fn(params, frozen, batch, counts):
            if distill and distill.online:
                batch = teachers.ask(
                    distill.teachers, teacher_params, batch, num_targets=num_targets
                )
            return jax.grad(loss_fn, has_aux=True)(params, frozen, batch, counts)

        if accumulate_steps == 1:
            grads, metrics = grad_fn(params, frozen, batch, counts)
        else:

            def add(total, microbatch):
                part = grad_fn(params, frozen, microbatch, counts)
                return jax.tree.map(jnp.add, total, part), None

            microbatches = jax.tree.map(lambda a: _split(a, accumulate_steps), batch)
            first = jax.tree.map(lambda a: a[0], microbatches)
            zeros = jax.tree.map(
                lambda a: jnp.zeros(a.shape, a.dtype),
                jax.eval_shape(grad_fn, params, frozen, first, counts),
            )
            (grads, metrics), _ = jax.lax.scan(add, zeros, microbatches)
        return fsdp.sum_gradients(grads), fsdp.total(metrics)

    def train_step(
        state: TrainState, batch: Batch, teacher_params: Mapping[str, Params] | None = None
    ) -> tuple[TrainState, Metrics]:
        teacher_params = teacher_params or {}
        specs = fsdp.param_specs(state.params)
        teacher_specs = {name: fsdp.param_specs(of) for name, of in teacher_params.items()}
        grads, metrics = fsdp.per_device(
            grads_of,
            in_specs=(specs, fsdp.param_specs(state.frozen), fsdp.BATCH_SPEC, teacher_specs),
            out_specs=(specs, fsdp.WHOLE),
        )(state.params, state.frozen, batch, teacher_params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics |= {
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(params),
            "learning_rate": schedule(state.step),
        }
        new_state = TrainState(
            step=state.step + 1, params=params, frozen=state.frozen, opt_state=opt_state
        )
        return new_state, metrics

    return train_step


def jit(
    step: Callable[..., tuple[TrainState, Metrics]],
    shardings: TrainState,
    mesh: jax.sharding.Mesh,
    teacher_shardings: Mapping[str, Any] | None = None,
) -> Callable[..., tuple[TrainState, Metrics]]:
    """The compiled update, which takes its state over; what a run trains with and a plan compiles.

    Args:
      step: of `make_train_step`.
      shardings: of `state_shardings`.
      mesh: the current one, `jax.set_mesh(mesh)`.
      teacher_shardings: of the parameters of teachers that are online, by name; they stay theirs.
    """
    of_teachers = (teacher_shardings,) if teacher_shardings else ()
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh), *of_teachers),
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options=fsdp.compiler_options(mesh),
    )


def _counts(
    batch: Batch, exit_layers: tuple[int, ...], distill: Distillation | None
) -> dict[str, Array]:
    """What each part of the loss counts in the whole batch; needs no model."""
    valid = jnp.sum(batch.valid.astype(jnp.float32))
    counts = {"loss/token": jnp.sum(teachers.counted(batch)[:, 1:].astype(jnp.float32))}
    for layer in exit_layers:
        for kind in ("class", "score", "prototype"):
            counts[f"loss/{kind}/exit_{layer}"] = valid
    return counts | (objective.counts(distill, batch) if distill else {})


def _split(a: Array, parts: int) -> Array:
    """`[B, ...] -> [parts, B / parts, ...]`, strided: the same microbatches on any mesh."""
    return a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1)
