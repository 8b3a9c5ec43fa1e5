"""big_vision's names and the loader's view of them."""

import jax
import numpy as np

from deevisum_jax.convert import big_vision
from deevisum_jax.convert.rows import fill, spill
from deevisum_jax.convert.tensors import ArrayTensor
from deevisum_jax.models.paligemma2 import abstract_params, get_config, init_params

# The 34 leaves of a PaliGemma 2 3B at 224 pixels, as big_vision's own model makes them.
BLOCK = "img/Transformer/encoderblock"
LEAVES = {
    "img/embedding/kernel": (14, 14, 3, 1152),
    "img/embedding/bias": (1152,),
    "img/pos_embedding": (1, 256, 1152),
    f"{BLOCK}/LayerNorm_0/scale": (27, 1152),
    f"{BLOCK}/LayerNorm_0/bias": (27, 1152),
    f"{BLOCK}/LayerNorm_1/scale": (27, 1152),
    f"{BLOCK}/LayerNorm_1/bias": (27, 1152),
    f"{BLOCK}/MlpBlock_0/Dense_0/kernel": (27, 1152, 4304),
    f"{BLOCK}/MlpBlock_0/Dense_0/bias": (27, 4304),
    f"{BLOCK}/MlpBlock_0/Dense_1/kernel": (27, 4304, 1152),
    f"{BLOCK}/MlpBlock_0/Dense_1/bias": (27, 1152),
    f"{BLOCK}/MultiHeadDotProductAttention_0/query/kernel": (27, 1152, 16, 72),
    f"{BLOCK}/MultiHeadDotProductAttention_0/query/bias": (27, 16, 72),
    f"{BLOCK}/MultiHeadDotProductAttention_0/key/kernel": (27, 1152, 16, 72),
    f"{BLOCK}/MultiHeadDotProductAttention_0/key/bias": (27, 16, 72),
    f"{BLOCK}/MultiHeadDotProductAttention_0/value/kernel": (27, 1152, 16, 72),
    f"{BLOCK}/MultiHeadDotProductAttention_0/value/bias": (27, 16, 72),
    f"{BLOCK}/MultiHeadDotProductAttention_0/out/kernel": (27, 16, 72, 1152),
    f"{BLOCK}/MultiHeadDotProductAttention_0/out/bias": (27, 1152),
    "img/Transformer/encoder_norm/scale": (1152,),
    "img/Transformer/encoder_norm/bias": (1152,),
    "img/head/kernel": (1152, 2304),
    "img/head/bias": (2304,),
    "llm/embedder/input_embedding": (257_152, 2304),
    "llm/final_norm/scale": (2304,),
    "llm/layers/attn/q_einsum/w": (26, 8, 2304, 256),
    "llm/layers/attn/kv_einsum/w": (26, 2, 4, 2304, 256),
    "llm/layers/attn/attn_vec_einsum/w": (26, 8, 256, 2304),
    "llm/layers/mlp/gating_einsum": (26, 2, 2304, 9216),
    "llm/layers/mlp/linear": (26, 9216, 2304),
    "llm/layers/pre_attention_norm/scale": (26, 2304),
    "llm/layers/post_attention_norm/scale": (26, 2304),
    "llm/layers/pre_ffw_norm/scale": (26, 2304),
    "llm/layers/post_ffw_norm/scale": (26, 2304),
}


def table(config):
    return big_vision.paligemma2_rows(config)


def test_the_3b_s_tensors_are_big_vision_s():
    config = get_config("paligemma2_3b", exit_layers=(8, 26))
    shapes = abstract_params(config)
    del shapes["exits"]
    theirs = spill(shapes, table(config))
    assert {name: tensor.shape for name, tensor in theirs.items()} == LEAVES


def test_keys_may_carry_a_prefix():
    plain = {"img/head/bias": ArrayTensor(np.zeros(1)), "llm/x": ArrayTensor(np.zeros(1))}
    prefixed = {f"params/{name}": tensor for name, tensor in plain.items()}
    assert big_vision.without_prefix(plain)[0] == plain
    assert big_vision.without_prefix(prefixed)[0] == plain
    assert big_vision.without_prefix(prefixed)[1]["llm/x"] == "params/llm/x"


def test_an_optimizer_s_state_beside_params_is_left():
    params = {"params/x": ArrayTensor(np.zeros(1))}
    optimizer = {"opt/0/mu/x": ArrayTensor(np.ones(1))}
    assert big_vision.without_prefix(params | optimizer)[0] == {"x": params["params/x"]}
    assert big_vision.without_prefix(optimizer)[0] == optimizer


def test_pictures_of_another_size_resample_the_position_embeddings():
    at_28, at_56 = (get_config("tiny", img={"image_size": size}) for size in (28, 56))
    params = init_params(at_28, jax.random.key(0))
    larger = fill(spill(params, table(at_28)), table(at_56), abstract_params(at_56))
    assert larger["img"]["pos_embedding"].shape == (1, 16, 16)
    # The corners of the grid stay where they are.
    old = np.asarray(params["img"]["pos_embedding"])[0]
    np.testing.assert_allclose(larger["img"]["pos_embedding"][0, [0, 3, 12, 15]], old, atol=1e-6)
    del params["img"]["pos_embedding"], larger["img"]["pos_embedding"]
    jax.tree.map(np.testing.assert_array_equal, larger, params)
