"""A tiny model whose segments leave at all exits, and what a pass through all layers says."""

from __future__ import annotations

import math

import jax
import numpy as np

from deevisum_jax import sharding
from deevisum_jax.data import pipeline
from deevisum_jax.inference import exit_policy, scoring
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.models import paligemma2
from deevisum_jax.typing import SegmentScores

CONFIG = paligemma2.get_config("tiny", exit_layers=(1, 2, 3, 4))
X = len(CONFIG.exit_layers)
VIDEO = 20  # segments
TEXT_LEN = 8
INF = math.inf
# Devices along data, fsdp and tensor.
MESHES = {"1": (1, 1, 1), "8": (8, 1, 1), "2x4": (2, 4, 1), "2x2x2": (2, 2, 2)}


def make_rows(count: int, seed: int = 0) -> list[dict[str, np.ndarray]]:
    """Unbatched fields of segments, prompts of 4 to 8 tokens; videos of 20, numbered from 3."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        real = np.arange(TEXT_LEN) < rng.integers(4, TEXT_LEN + 1)
        rows.append(
            {
                "frames": rng.integers(0, 256, (1, 28, 28, 3)).astype(np.uint8),
                "tokens": np.where(real, rng.integers(4, 500, TEXT_LEN), 0).astype(np.int32),
                "mask_ar": ~real,
                "mask_input": real,
                "mask_loss": np.zeros(TEXT_LEN, bool),
                "label": np.int32(0),
                "score": np.float32(0),
                "video_id": np.int32(3 + i // VIDEO),
                "segment": np.int32(i % VIDEO),
                "valid": np.True_,
            }
        )
    return rows


def make_mesh(name: str) -> jax.sharding.Mesh:
    data, fsdp, tensor = MESHES[name]
    devices = jax.devices()[: data * fsdp * tensor]
    return sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor, devices=devices)


def make_params() -> paligemma2.Params:
    """On the host. Exits of unit size are sure of nothing; these are, some more than others."""
    params = jax.jit(paligemma2.init_params, static_argnums=0)(CONFIG, jax.random.key(0))
    params = jax.device_get(params)
    return params | {"exits": jax.tree.map(lambda leaf: 3 * leaf, params["exits"])}


def full_scores(rows, params, batch_size: int = 16) -> dict[int, SegmentScores]:
    """On one device."""
    mesh = make_mesh("1")
    with jax.set_mesh(mesh):
        where = sharding.param_shardings(params, mesh)
        score = scoring.make_score_fn(CONFIG, where, mesh)
        placed = jax.device_put(params, where)
        return scoring.score_videos(
            lambda batch: score(placed, batch), pipeline.in_order(rows, batch_size=batch_size), mesh
        )


def confidences(scores: SegmentScores, kind: str) -> np.ndarray:
    """float32[X, M]."""
    exits = [scores.at(x) for x in range(X)]
    before = [None, *exits[:-1]]
    return np.stack(
        [exit_policy.confidence(kind, *pair) for pair in zip(exits, before, strict=True)]
    )


def make_policy(full: dict[int, SegmentScores], kind: str, shares) -> ExitPolicy:
    """A policy under which about these shares of an exit's segments leave, one per exit.

    None: nobody may, as at the first exit by agreement. Thresholds are in the middle between two
    confidences that differ more than their neighbours do: how a sum is rounded decides nothing.
    """
    values = confidences(whole(full), kind)
    left = np.ones(values.shape[1], bool)
    thresholds = []
    for here, share in zip(values, shares, strict=False):
        if share is None or here[0] == -1:  # agreement with nobody
            thresholds.append(INF)
            continue
        found = np.sort(here[left])
        near = round(len(found) * (1 - share))
        low, high = max(near - 2, 1), min(near + 3, len(found))
        cut = low + int(np.argmax(np.diff(found[low - 1 : high])))
        assert found[cut] - found[cut - 1] > 1e-4
        thresholds.append(float(found[cut - 1] + found[cut]) / 2)
        left &= here < thresholds[-1]
    return ExitPolicy(confidence=kind, thresholds=tuple(thresholds))


def whole(full: dict[int, SegmentScores]) -> SegmentScores:
    """All videos' segments, one after another."""
    return jax.tree.map(lambda *a: np.concatenate(a, axis=-1), *full.values())
