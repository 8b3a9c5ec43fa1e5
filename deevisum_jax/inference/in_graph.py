"""Early exits within one compiled function: for a single clip, and for `jax.export`.

A stage runs while one segment of the batch is not sure yet, so it saves time for a clip of a few
segments that agree, and none for many. There is nothing for a host to decide; `staged` has one
decide, and saves the time of every segment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deevisum_jax import fsdp
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.inference.scoring import read
from deevisum_jax.models import paligemma2
from deevisum_jax.models.paligemma2 import Embedded, PaliGemma2, PaliGemma2Config, Params
from deevisum_jax.sharding import batch_sharding
from deevisum_jax.typing import Batch, ExitedScores, SegmentScores


def make_score_fn(
    config: PaliGemma2Config, param_shardings: Any, mesh: jax.sharding.Mesh, policy: ExitPolicy
) -> Callable[[Params, Batch], ExitedScores]:
    """The compiled function; arguments as `scoring.make_score_fn`, and when a segment leaves."""

    def on_mesh(params: Params, batch: Batch) -> ExitedScores:
        return fsdp.per_device(
            lambda params, batch: score(paligemma2.bind(config, params), batch, policy),
            in_specs=(fsdp.param_specs(params), fsdp.BATCH_SPEC),
            out_specs=fsdp.BATCH_SPEC,
        )(params, batch)

    return jax.jit(
        on_mesh,
        in_shardings=(param_shardings, batch_sharding(mesh)),
        compiler_options=fsdp.compiler_options(mesh),
    )


def score(model: PaliGemma2, batch: Batch, policy: ExitPolicy) -> ExitedScores:
    """Every segment of a batch at the exit that it leaves at, float32[B] and int32[B].

    What is said of rows that fill the batch up means nothing.
    """
    assert len(policy.thresholds) == len(model.config.exit_layers) - 1
    embedded = model.embed(batch.frames, batch.tokens, batch.mask_ar, batch.mask_input)
    last = len(policy.thresholds)
    embedded, now = _run_exit(model, embedded, 0)
    sure = policy.is_sure(0, now, None) | ~batch.valid
    taken = ExitedScores(
        importance=now.importance,
        summary_prob=now.summary_prob,
        exit_index=jnp.zeros(sure.shape, jnp.int32),
    )
    for x in range(1, last + 1):

        def run(state: Any, x: int = x) -> Any:
            embedded, before, sure, taken = state
            embedded, now = _run_exit(model, embedded, x)
            here = ExitedScores(
                importance=now.importance,
                summary_prob=now.summary_prob,
                exit_index=jnp.full_like(taken.exit_index, x),
            )
            # Who was sure before has left: what deeper layers say of it is not read.
            taken = jax.tree.map(lambda old, new: jnp.where(sure, old, new), taken, here)
            return embedded, now, sure | policy.is_sure(x, now, before), taken

        # Weights that are split are gathered in a stage, so all devices take the same way.
        someone = fsdp.total(jnp.sum(~sure)) > 0
        embedded, now, sure, taken = jax.lax.cond(
            someone, run, lambda state: state, (embedded, now, sure, taken)
        )
    return taken


def _run_exit(model: PaliGemma2, embedded: Embedded, x: int) -> tuple[Embedded, SegmentScores]:
    embedded, scores = model.run_exits(embedded, start=x, stop=x + 1)
    return embedded, read(scores).at(0)
