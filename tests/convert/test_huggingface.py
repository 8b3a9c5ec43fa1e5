"""Hugging Face's names of both generations, and the table that they go through."""

import jax
import numpy as np
import pytest

from deevisum_jax.convert import huggingface
from deevisum_jax.convert.rows import fill, match, spill
from deevisum_jax.convert.tensors import ArrayTensor, read
from deevisum_jax.errors import UserError
from deevisum_jax.models.paligemma2 import (
    VARIANTS,
    abstract_params,
    get_config,
    init_params,
    num_params,
)
from tests.hf_reference import hf_tensors, reference

LAYER = "model.language_model.layers.2"
CONFIG = get_config("tiny")


@pytest.fixture(scope="module")
def tensors():
    """A tiny model of transformers 5, its head tied."""
    tied, _ = huggingface.tie(hf_tensors(reference().theirs))
    return tied


def table(config=CONFIG):
    return huggingface.paligemma2_rows(config)


def test_the_report_has_one_line_per_tensor_and_every_parameter_is_filled(tensors):
    report = match(tensors, table(), abstract_params(CONFIG))
    assert sorted(line.source for line in report) == sorted(tensors)
    params = fill(tensors, table(), abstract_params(CONFIG))
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), params)
    assert shapes == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), abstract_params(CONFIG))
    [line] = [line for line in report if line.source == f"{LAYER}.self_attn.v_proj.weight"]
    assert line.target == "llm/layers/attn/kv_einsum/w[2, 1]"
    assert line.shape == (32, 32)
    assert line.dtype == "float32"
    assert line.transform == "reshape (2, 16, 32), transpose (0, 2, 1)"


def test_weights_land_where_the_names_say(tensors):
    params = fill(tensors, table(), abstract_params(CONFIG))
    # Head 3, width 5, head width 7 of layer 2; 16 is the head width.
    assert (
        params["llm"]["layers"]["attn"]["q_einsum"]["w"][2, 3, 5, 7]
        == tensors[f"{LAYER}.self_attn.q_proj.weight"].array[3 * 16 + 7, 5]
    )
    np.testing.assert_array_equal(
        params["llm"]["embedder"]["input_embedding"],
        tensors[huggingface.EMBED_TOKENS].array[:512],
    )


@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("paligemma2")])
def test_the_full_sizes_tables_hold_every_parameter_once(name):
    config = VARIANTS[name]
    shapes = abstract_params(config)
    theirs = spill(shapes, table(config))
    assert sum(np.prod(tensor.shape) for tensor in theirs.values()) == num_params(config)
    # 9 tensors outside of the layers, 16 per layer of the image tower, 11 of the language model.
    assert len(theirs) == 9 + 16 * 27 + 11 * config.llm.depth


def old_names(tensors):
    return {huggingface.released_name(name): tensor for name, tensor in tensors.items()}


def test_the_names_of_released_files_are_known(tensors):
    released = old_names(tensors)
    assert "language_model.model.layers.2.mlp.up_proj.weight" in released
    assert "vision_tower.vision_model.post_layernorm.bias" in released
    assert "multi_modal_projector.linear.weight" in released
    assert huggingface.canonical(released)[0] == tensors
    # transformers 5 saves the image tower without `vision_model`.
    between = {name.replace("vision_model.", ""): tensor for name, tensor in released.items()}
    renamed, own_names = huggingface.canonical(between)
    assert renamed == tensors
    assert own_names["model.vision_tower.post_layernorm.bias"] == "vision_tower.post_layernorm.bias"


def test_a_tensor_under_two_generations_names_is_refused(tensors):
    both = {
        **tensors,
        "language_model.model.norm.weight": tensors["model.language_model.norm.weight"],
    }
    with pytest.raises(
        UserError, match=r"model\.language_model\.norm\.weight and language_model\.model\.norm"
    ):
        huggingface.canonical(both)


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight"])
def test_a_separate_head_must_equal_the_token_table(tensors, name):
    table_ = tensors[huggingface.EMBED_TOKENS]
    tied, head = huggingface.tie(huggingface.canonical({**tensors, name: table_})[0])
    assert tied == tensors
    huggingface.check_tied(head, table_)
    changed = table_.array.copy()
    changed[-1, -1] += 1
    with pytest.raises(
        UserError, match=r"lm_head.weight .*b.safetensors.* differs from .*embed_tok"
    ):
        huggingface.check_tied(ArrayTensor(changed, "b.safetensors"), table_)


def test_a_head_alone_is_the_token_table(tensors):
    only = {**tensors, "lm_head.weight": tensors[huggingface.EMBED_TOKENS]}
    del only[huggingface.EMBED_TOKENS]
    assert huggingface.tie(only) == (tensors, None)


def test_rows_behind_the_vocabulary_are_kept_for_the_way_back(tensors):
    whole = tensors[huggingface.EMBED_TOKENS].array
    padding = huggingface.padding_rows(tensors, CONFIG)
    np.testing.assert_array_equal(padding, whole[512:])
    params = fill(tensors, table(), abstract_params(CONFIG))
    there = huggingface.padded(spill(params, table()), padding)
    np.testing.assert_array_equal(read(there[huggingface.EMBED_TOKENS]), whole)
    assert there[huggingface.EMBED_TOKENS].shape == whole.shape


def test_without_padding_of_its_own_a_table_is_padded_with_its_mean():
    params = init_params(CONFIG, jax.random.key(0))
    rows = huggingface.mean_rows(params, 3)
    table_ = np.asarray(params["llm"]["embedder"]["input_embedding"])
    np.testing.assert_allclose(rows, np.tile(table_.mean(0), (3, 1)), atol=1e-6)


@pytest.mark.parametrize(("vocab_size", "wanted"), [(577, 577), (400, 400)])
def test_a_vocabulary_of_another_size_is_refused(tensors, vocab_size, wanted):
    config = get_config("tiny", llm={"vocab_size": vocab_size})
    with pytest.raises(
        UserError, match=rf"embed_tokens.weight: shape \(576, 32\), wanted \({wanted}"
    ):
        match(tensors, table(config), abstract_params(config))


def test_a_deeper_model_than_ours_is_refused(tensors):
    config = get_config("tiny", llm={"depth": 3})
    with pytest.raises(UserError, match=r"layers\.3\.mlp\.up_proj\.weight: no parameter takes it"):
        match(tensors, table(config), abstract_params(config))
