"""What scoring a segment costs: matrix-product FLOPs, by depth."""

from __future__ import annotations

import numpy as np

from deevisum_jax.config import DataConfig
from deevisum_jax.models.paligemma2 import PaliGemma2Config


def exit_flops(config: PaliGemma2Config, data: DataConfig) -> np.ndarray:
    """`int64[X]`: FLOPs of a segment that leaves at each exit."""
    return np.array(
        [
            score_flops(config, num_frames=data.num_frames, text_len=data.text_len, depth=layer)
            for layer in config.exit_layers
        ]
    )


def score_flops(config: PaliGemma2Config, *, num_frames: int, text_len: int, depth: int) -> int:
    """FLOPs of one segment's scoring pass that leaves after `depth` layers.

    Counts two per multiply-add of every matrix product, image tower included; norms, softmax and
    the exit heads (two vectors of width D) are left out, and so are the cosines that keyframes are
    chosen by. Of merged frames the learned projections count.

    Args:
      config: the model.
      num_frames: I, frames of the segment.
      text_len: T, text tokens.
      depth: layers run, 0 for the image tower alone.
    """
    img, llm = config.img, config.llm
    P, D, F = img.num_patches, img.width, img.mlp_dim
    img_layer = 2 * P * (4 * D * D + 2 * D * F) + 4 * P * P * D
    frame = 2 * P * D * (3 * img.patch_size**2) + img.depth * img_layer + 2 * P * D * llm.width
    S, D, F = config.image_tokens(num_frames) + text_len, llm.width, llm.mlp_dim
    merging = 0
    if config.has_merge_params:
        # Of every frame's patches, and of those that they are compared with; of the query once.
        merging = 2 * (3 * num_frames * P + 1) * D * D
    N, K, H = llm.num_heads, llm.num_kv_heads, llm.head_dim
    llm_layer = 2 * S * (2 * D * N * H + 2 * D * K * H + 3 * D * F) + 4 * S * S * N * H
    return num_frames * frame + merging + depth * llm_layer
