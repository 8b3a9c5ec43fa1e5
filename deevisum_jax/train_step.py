"""One update as a pure function `(state, batch) -> (state, metrics)`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from deevisum_jax import fsdp, losses, optim, sharding
from deevisum_jax.config import LossConfig
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


def exit_weights(config: LossConfig, exit_layers: tuple[int, ...]) -> np.ndarray:
    """`float32[X]`, sums to 1. By default an exit weighs as its depth, so the deepest leads."""
    weights = np.asarray(config.exit_weights or exit_layers, np.float32)
    return weights / weights.sum()


def compute_losses(
    model: paligemma2.PaliGemma2, batch: Batch, config: LossConfig, num_targets: int
) -> tuple[dict[str, losses.Total], dict[str, float]]:
    """Every part of the loss and its weight, by metric name; `num_targets` as `find_targets`."""
    exit_layers = model.config.exit_layers
    outputs = model(batch)
    targets = losses.find_targets(batch.tokens, _counted(batch), num_targets)
    # Text comes behind the image tokens, which have no target.
    pre_logits = outputs.pre_logits[:, -batch.tokens.shape[1] :]
    rows = jnp.take_along_axis(pre_logits, targets.positions[..., None], axis=1)
    parts = {
        "loss/token": losses.token_cross_entropy(
            rows,
            model.llm.embedder.input_embedding[...],
            targets,
            logits_softcap=model.config.llm.final_logits_softcap,
        )
    }
    weights = {"loss/token": config.token}
    for x, (layer, weight) in enumerate(
        zip(exit_layers, exit_weights(config, exit_layers), strict=True)
    ):
        parts[f"loss/class/exit_{layer}"] = losses.class_cross_entropy(
            outputs.exits.class_logits[x], batch.label, batch.valid
        )
        parts[f"loss/score/exit_{layer}"] = losses.score_cross_entropy(
            outputs.exits.importance[x], batch.score, batch.valid
        )
        weights[f"loss/class/exit_{layer}"] = config.class_ * weight
        weights[f"loss/score/exit_{layer}"] = config.score * weight
    return parts, weights


def make_train_step(
    model_config: paligemma2.PaliGemma2Config,
    loss_config: LossConfig,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    num_targets: int,
    accumulate_steps: int = 1,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The update, for `jit`.

    `num_targets` is the most tokens that the token loss counts in one example.

    With `accumulate_steps` > 1 the batch is worked off in that many microbatches. Each part of the
    loss is divided by its count over the *whole* batch, so the gradient is the unsplit one.
    """

    def loss_fn(trainable: Params, frozen: Params, batch: Batch, counts: dict[str, Array]):
        model = paligemma2.bind(model_config, optim.merge(trainable, frozen))
        parts, weights = compute_losses(model, batch, loss_config, num_targets)
        means = {name: part.sum / jnp.maximum(counts[name], 1.0) for name, part in parts.items()}
        total = sum(weights[name] * mean for name, mean in means.items())
        return total, means | {"loss/total": total}

    def grads_of(params: Params, frozen: Params, batch: Batch) -> tuple[Params, Metrics]:
        """Of every device's own rows, summed over devices; each keeps its shard."""
        counts = fsdp.total(_counts(batch, model_config.exit_layers))
        grad_fn = jax.grad(loss_fn, has_aux=True)
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

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        specs = fsdp.param_specs(state.params)
        grads, metrics = fsdp.per_device(
            grads_of,
            in_specs=(specs, fsdp.param_specs(state.frozen), fsdp.BATCH_SPEC),
            out_specs=(specs, fsdp.WHOLE),
        )(state.params, state.frozen, batch)
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
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]],
    shardings: TrainState,
    mesh: jax.sharding.Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """The compiled update, which takes its state over; what a run trains with and a plan compiles.

    Args:
      step: of `make_train_step`.
      shardings: of `state_shardings`.
      mesh: the current one, `jax.set_mesh(mesh)`.
    """
    return jax.jit(
        step,
        in_shardings=(shardings, sharding.batch_sharding(mesh)),
        out_shardings=(shardings, None),
        donate_argnums=0,
        compiler_options=fsdp.compiler_options(mesh),
    )


def _counts(batch: Batch, exit_layers: tuple[int, ...]) -> dict[str, Array]:
    """What each part of the loss counts in the whole batch; needs no model."""
    valid = jnp.sum(batch.valid.astype(jnp.float32))
    counts = {"loss/token": jnp.sum(_counted(batch)[:, 1:].astype(jnp.float32))}
    for layer in exit_layers:
        counts |= {f"loss/class/exit_{layer}": valid, f"loss/score/exit_{layer}": valid}
    return counts


def _counted(batch: Batch) -> Array:
    """`bool[B, T]`: tokens of the token loss; rows that fill up a batch have none."""
    return batch.mask_loss & batch.valid[:, None]


def _split(a: Array, parts: int) -> Array:
    """`[B, ...] -> [parts, B / parts, ...]`, strided: the same microbatches on any mesh."""
    return a.reshape(a.shape[0] // parts, parts, *a.shape[1:]).swapaxes(0, 1)
