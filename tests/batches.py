"""Batches that a tiny model can be trained on."""

from __future__ import annotations

import numpy as np

from deevisum_jax.typing import Batch

B = 8  # examples


def make_batch(seed: int = 0, longest: int = 4) -> Batch:
    """Prefixes of 4 tokens, suffixes of 1 to `longest`, then pads; the last two rows are none."""
    T = longest + 6
    rng = np.random.default_rng(seed)
    ends = 4 + rng.integers(1, longest + 1, (B, 1))
    position = np.arange(T)[None]
    return Batch(
        frames=rng.integers(0, 256, (B, 1, 28, 28, 3)).astype(np.uint8),
        tokens=rng.integers(2, 512, (B, T)).astype(np.int32),
        mask_ar=np.broadcast_to(position >= 4, (B, T)),
        mask_input=position < ends,
        mask_loss=(position >= 4) & (position < ends),
        label=rng.integers(0, 2, B).astype(np.int32),
        score=rng.uniform(size=B).astype(np.float32),
        video_id=np.zeros(B, np.int32),
        segment=np.arange(B, dtype=np.int32),
        valid=np.arange(B) < 6,
    )
