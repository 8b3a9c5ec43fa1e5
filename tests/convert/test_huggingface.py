"""Every tensor of a checkpoint is used once, or nothing is."""

import jax
import numpy as np
import pytest

from deevisum_jax.convert.huggingface import from_huggingface
from deevisum_jax.errors import UserError
from deevisum_jax.models.paligemma2 import abstract_params, get_config
from tests.hf_reference import hf_tensors, reference

LAYER = "model.language_model.layers.2"


@pytest.fixture(scope="module")
def tensors():
    return hf_tensors(reference().theirs)


def test_the_report_has_one_line_per_tensor_and_every_parameter_is_filled(tensors):
    config = get_config("tiny")
    params, report = from_huggingface(tensors, config)
    assert sorted(line.source for line in report) == sorted(tensors)
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_params(config))
    [line] = [line for line in report if line.source == f"{LAYER}.self_attn.v_proj.weight"]
    assert line.target == "llm/layers/attn/kv_einsum/w[2, 1]"
    assert line.shape == (32, 32)
    assert line.dtype == "float32"
    assert line.transform == "split heads, transpose"


def test_weights_land_where_the_names_say(tensors):
    params, _ = from_huggingface(tensors, get_config("tiny"))
    # Head 3, width 5, head width 7 of layer 2; 16 is the head width.
    assert (
        params["llm"]["layers"]["attn"]["q_einsum"]["w"][2, 3, 5, 7]
        == tensors[f"{LAYER}.self_attn.q_proj.weight"][3 * 16 + 7, 5]
    )
    np.testing.assert_array_equal(
        params["llm"]["embedder"]["input_embedding"],
        tensors["model.language_model.embed_tokens.weight"][:512],
    )


def test_exit_heads_are_left_to_the_caller(tensors):
    params, _ = from_huggingface(tensors, get_config("tiny", exit_layers=(2,)))
    assert sorted(params) == ["img", "llm"]


def test_parameters_take_param_dtype(tensors):
    params, _ = from_huggingface(tensors, get_config("tiny", param_dtype="bfloat16"))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params)} == {"bfloat16"}


def test_all_offenders_are_listed_at_once(tensors):
    broken = dict(tensors)
    del broken[f"{LAYER}.mlp.up_proj.weight"]
    broken[f"{LAYER}.mlp.lora_A.weight"] = np.zeros((1, 1), np.float32)
    broken["model.language_model.norm.weight"] = np.zeros(31, np.float32)
    broken["lm_head.weight"] = broken["lm_head.weight"] + 1
    with pytest.raises(UserError) as error:
        from_huggingface(broken, get_config("tiny"))
    message = str(error.value)
    assert message.startswith("4 tensors do not fit")
    assert f"{LAYER}.mlp.up_proj.weight: missing, wanted for llm/layers/mlp/gating" in message
    assert f"{LAYER}.mlp.lora_A.weight: no parameter takes it" in message
    assert "model.language_model.norm.weight: shape (31,), wanted (32,)" in message
    assert "lm_head.weight: differs from model.language_model.embed_tokens.weight" in message


def test_a_vocabulary_smaller_than_ours_is_refused(tensors):
    with pytest.raises(UserError, match=r"embed_tokens.weight: shape \(576, 32\), wanted \(577"):
        from_huggingface(tensors, get_config("tiny", llm={"vocab_size": 577}))


def test_a_deeper_model_than_ours_is_refused(tensors):
    with pytest.raises(UserError, match=r"layers\.3\.mlp\.up_proj\.weight: no parameter takes it"):
        from_huggingface(tensors, get_config("tiny", llm={"depth": 3}))
