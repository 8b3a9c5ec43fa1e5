"""Files of every size's tree, there and back to the bit, at small widths."""

import jax
import numpy as np
import pytest
import torch
import transformers

from deevisum_jax.convert import big_vision, huggingface
from deevisum_jax.convert.npz import open_npz, write_npz
from deevisum_jax.convert.rows import fill, spill
from deevisum_jax.convert.safetensors import open_safetensors, write_safetensors
from deevisum_jax.models.paligemma2 import VARIANTS, abstract_params, init_params
from tests.checkpoint_files import hugging_face_model, small, write_big_vision

SIZES = [name for name in VARIANTS if name.startswith("paligemma2")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SIZES)
def test_an_npz_of_big_vision(name, dtype, tmp_path):
    config = small(name, param_dtype=dtype)
    table = big_vision.paligemma2_rows(config)
    before = write_big_vision(
        tmp_path / "before.npz", init_params(config, jax.random.key(0)), config
    )
    tensors, _ = big_vision.without_prefix(open_npz(before))
    params = fill(tensors, table, abstract_params(config))
    write_npz(tmp_path / "after.npz", big_vision.with_prefix(spill(params, table)))
    before, after = np.load(before), np.load(tmp_path / "after.npz")
    assert sorted(before) == sorted(after)
    assert len(before) == 34
    for key in before:
        assert before[key].dtype == after[key].dtype
        assert before[key].tobytes() == after[key].tobytes(), key


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", SIZES)
def test_a_folder_of_hugging_face(name, dtype, tmp_path):
    transformers.utils.logging.set_verbosity_error()
    config = small(name, param_dtype=dtype)
    table = huggingface.paligemma2_rows(config)
    before = hugging_face_model(init_params(config, jax.random.key(0)), config)
    before.save_pretrained(tmp_path / "before", max_shard_size="100KB")
    tensors, _ = huggingface.canonical(open_safetensors(tmp_path / "before"))
    params = fill(tensors, table, abstract_params(config))
    there = huggingface.padded(spill(params, table), huggingface.padding_rows(tensors, config))
    there = {huggingface.released_name(key): tensor for key, tensor in there.items()}
    (tmp_path / "after").mkdir()
    write_safetensors(tmp_path / "after", there, max_shard_bytes=100_000)
    before.config.save_pretrained(tmp_path / "after")
    after, info = type(before).from_pretrained(
        tmp_path / "after", dtype="auto", output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    before, after = before.state_dict(), after.state_dict()
    assert sorted(before) == sorted(after)
    for key, tensor in before.items():
        assert tensor.dtype == getattr(torch, dtype)
        assert torch.equal(tensor, after[key]), key
