"""FLOPs by hand, and against the sizes of the parameters themselves."""

import jax
import numpy as np
import pytest

from deevisum_jax.config import DataConfig, MergeConfig
from deevisum_jax.inference.cost import exit_flops, score_flops
from deevisum_jax.models.paligemma2 import VARIANTS, abstract_params, get_config

TINY = VARIANTS["tiny"]


def test_tiny_by_hand():
    # Image: 4 patches, width 16, 2 layers, mlp 32. Patches and projection: 2 * 4 * 16 * 588 and
    # 2 * 4 * 16 * 32. A layer: 2 * 4 * (4 * 256 + 2 * 512) of weights, 4 * 4 * 4 * 16 of attention.
    image = 2 * 4 * 16 * 588 + 2 * 4 * 16 * 32 + 2 * (2 * 4 * 2048 + 1024)
    assert image == 75_264 + 4_096 + 34_816
    assert score_flops(TINY, num_frames=1, text_len=6, depth=0) == image
    # Language: 10 tokens, width 32, 4 heads and 2 key/value heads of 16, mlp 64.
    # q and output 2 * 32 * 64, k and v 2 * 32 * 32, mlp 3 * 32 * 64; attention 4 * 100 * 64.
    layer = 2 * 10 * (4096 + 2048 + 6144) + 25_600
    assert score_flops(TINY, num_frames=1, text_len=6, depth=3) == image + 3 * layer


def test_exits_by_hand():
    # As above: two frames in 8 image tokens and 4 of text are 12; a layer costs 2 * 12 * 12288 of
    # weights and 4 * 144 * 64 of attention.
    config = get_config("tiny", exit_layers=(1, 4))
    found = exit_flops(config, DataConfig(dataset="synthetic/tiny", num_frames=2, text_len=4))
    image, layer = 2 * 114_176, 294_912 + 36_864
    np.testing.assert_array_equal(found, [image + layer, image + 4 * layer])
    assert found.dtype == np.int64


def test_merged_frames_by_hand():
    # Of three frames one keeps its 4 tokens, two have one each: 6 image tokens instead of 12, and
    # 10 with text. The image tower sees all three.
    merge = MergeConfig(num_keyframes=1)
    config = get_config("tiny", merge=merge)
    image, layer = 3 * 114_176, 2 * 10 * 12_288 + 4 * 100 * 64
    flops = lambda config: score_flops(config, num_frames=3, text_len=4, depth=4)
    assert flops(config) == image + 4 * layer
    # Learned projections: three of all 12 patches, and one of the query, 32 x 32 each.
    learned = get_config("tiny", merge=MergeConfig(num_keyframes=1, projections=True))
    assert flops(learned) == flops(config) + 2 * 37 * 1024


@pytest.mark.parametrize("name", ["paligemma2_3b", "quickstart_student"])
def test_weights_cost_two_flops_per_token(name):
    config = get_config(name)
    params, P = abstract_params(config), config.img.num_patches
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    layers = params["llm"]["layers"]
    matrices = size(layers["attn"]) + size(layers["mlp"])
    T = 64
    S = 2 * P + T
    N, H, L = config.llm.num_heads, config.llm.head_dim, config.llm.depth
    attention = 4 * S * S * N * H * L
    flops = lambda depth: score_flops(config, num_frames=2, text_len=T, depth=depth)
    assert flops(L) - flops(0) == 2 * S * matrices + attention


def test_depth_and_frames_add_up():
    flops = lambda **kwargs: score_flops(TINY, **{"num_frames": 2, "text_len": 8} | kwargs)
    assert flops(depth=4) - flops(depth=2) == flops(depth=2) - flops(depth=0)
    assert flops(depth=0) == 2 * flops(depth=0, num_frames=1)


def test_a_3b_student_that_leaves_at_half_depth_saves_less_than_half():
    config = get_config("paligemma2_3b")
    flops = lambda depth: score_flops(config, num_frames=2, text_len=64, depth=depth)
    assert 0.55 < flops(13) / flops(26) < 0.75  # the image tower is paid in full
