"""SigLIP's tensors, in both namings: every one used once, there and back to the bit."""

import json
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from deevisum_jax import sharding
from deevisum_jax.convert import two_towers as convert
from deevisum_jax.convert.npz import write_npz
from deevisum_jax.convert.rows import fill, match, spill
from deevisum_jax.convert.tensors import ArrayTensor, read
from deevisum_jax.errors import UserError
from deevisum_jax.models.two_towers import abstract_params, get_config
from tests.hf_reference import hf_tensors
from tests.siglip_reference import hf_config, reference

TINY = get_config("siglip_tiny")

MHA = "MultiHeadDotProductAttention_0"
# What is not a layer's, of a SigLIP B/16 at 224 pixels, as big_vision's own model makes it.
LEAVES = {
    "img/embedding/kernel": (16, 16, 3, 768),
    "img/embedding/bias": (768,),
    "img/pos_embedding": (1, 196, 768),
    "img/Transformer/encoder_norm/scale": (768,),
    "img/Transformer/encoder_norm/bias": (768,),
    "img/MAPHead_0/probe": (1, 1, 768),
    f"img/MAPHead_0/{MHA}/query/kernel": (768, 12, 64),
    f"img/MAPHead_0/{MHA}/query/bias": (12, 64),
    f"img/MAPHead_0/{MHA}/key/kernel": (768, 12, 64),
    f"img/MAPHead_0/{MHA}/key/bias": (12, 64),
    f"img/MAPHead_0/{MHA}/value/kernel": (768, 12, 64),
    f"img/MAPHead_0/{MHA}/value/bias": (12, 64),
    f"img/MAPHead_0/{MHA}/out/kernel": (12, 64, 768),
    f"img/MAPHead_0/{MHA}/out/bias": (768,),
    "img/MAPHead_0/LayerNorm_0/scale": (768,),
    "img/MAPHead_0/LayerNorm_0/bias": (768,),
    "img/MAPHead_0/MlpBlock_0/Dense_0/kernel": (768, 3072),
    "img/MAPHead_0/MlpBlock_0/Dense_0/bias": (3072,),
    "img/MAPHead_0/MlpBlock_0/Dense_1/kernel": (3072, 768),
    "img/MAPHead_0/MlpBlock_0/Dense_1/bias": (768,),
    "txt/Embed_0/embedding": (32_000, 768),
    "txt/pos_embedding": (1, 64, 768),
    "txt/Encoder_0/encoder_norm/scale": (768,),
    "txt/Encoder_0/encoder_norm/bias": (768,),
    "txt/head/kernel": (768, 768),
    "txt/head/bias": (768,),
    "t": (1,),
    "b": (1,),
}
# Of each layer.
LAYER = {
    "LayerNorm_0/scale": (768,),
    "LayerNorm_0/bias": (768,),
    "LayerNorm_1/scale": (768,),
    "LayerNorm_1/bias": (768,),
    "MlpBlock_0/Dense_0/kernel": (768, 3072),
    "MlpBlock_0/Dense_0/bias": (3072,),
    "MlpBlock_0/Dense_1/kernel": (3072, 768),
    "MlpBlock_0/Dense_1/bias": (768,),
    f"{MHA}/query/kernel": (768, 12, 64),
    f"{MHA}/query/bias": (12, 64),
    f"{MHA}/key/kernel": (768, 12, 64),
    f"{MHA}/key/bias": (12, 64),
    f"{MHA}/value/kernel": (768, 12, 64),
    f"{MHA}/value/bias": (12, 64),
    f"{MHA}/out/kernel": (12, 64, 768),
    f"{MHA}/out/bias": (768,),
}
TOWERS = ("img/Transformer", "txt/Encoder_0")
# What a big_vision model tells of itself when its layers are not scanned.
UNSTACKED = [f"{tower}/encoderblock_0/LayerNorm_0/bias" for tower in TOWERS]


def random_params(config, seed=0):
    """Parameters without a zero or a one anywhere, so that no two can be mixed up."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), abstract_params(config)
    )


def tables(config):
    return {
        "huggingface": convert.huggingface_rows(config),
        "stacked": convert.big_vision_rows(config),
        "unstacked": convert.big_vision_rows(config, UNSTACKED),
        "mixed": convert.big_vision_rows(config, UNSTACKED[1:]),
    }


def assert_equal(got, want):
    jax.tree.map(np.testing.assert_array_equal, got, want)


def hf_folder(folder, theirs):
    theirs.save_pretrained(folder)
    return folder


def edit_config(folder, **fields):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return hf_folder(tmp_path_factory.mktemp("siglip"), reference().theirs)


def test_stacked_tensors_are_big_vision_s():
    config = get_config("siglip_b16_224")
    theirs = spill(abstract_params(config), convert.big_vision_rows(config))
    stacked = {
        f"{tower}/encoderblock/{name}": (12, *shape)
        for tower in TOWERS
        for name, shape in LAYER.items()
    }
    assert {name: tensor.shape for name, tensor in theirs.items()} == LEAVES | stacked


def test_unstacked_tensors_are_big_vision_s():
    config = get_config("siglip_b16_224")
    theirs = spill(abstract_params(config), convert.big_vision_rows(config, UNSTACKED))
    layers = {
        f"{tower}/encoderblock_{i}/{name}": shape
        for tower in TOWERS
        for i in range(12)
        for name, shape in LAYER.items()
    }
    assert {name: tensor.shape for name, tensor in theirs.items()} == LEAVES | layers


@pytest.mark.parametrize("name", ["siglip_b16_224", "siglip_so400m14_384"])
def test_hugging_face_s_tensors_are_transformers_s(name):
    config = get_config(name)
    with torch.device("meta"):
        theirs = transformers.SiglipModel(hf_config(config)).state_dict()
    ours = spill(abstract_params(config), convert.huggingface_rows(config))
    assert {name: tensor.shape for name, tensor in ours.items()} == {
        name: tuple(tensor.shape) for name, tensor in theirs.items()
    }


@pytest.mark.parametrize("table", ["huggingface", "stacked", "unstacked", "mixed"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parameters_go_there_and_back_to_the_bit(table, dtype):
    config = get_config("siglip_tiny", param_dtype=dtype)
    rows = tables(config)[table]
    params = random_params(config)
    there = spill(params, rows)
    back = fill(there, rows, abstract_params(config))
    assert_equal(back, params)
    again = spill(back, rows)
    assert again.keys() == there.keys()
    for name, tensor in there.items():
        assert tensor.dtype == again[name].dtype
        np.testing.assert_array_equal(read(again[name]), read(tensor))


def test_hugging_face_s_tensors_come_back_to_the_bit():
    ref = reference()
    theirs = hf_tensors(ref.theirs)
    ours = spill(ref.params, convert.huggingface_rows(ref.config))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        np.testing.assert_array_equal(read(ours[name]), tensor.array)


def test_in_proj_is_query_key_and_value_in_this_order():
    ref = reference()
    in_proj = hf_tensors(ref.theirs)["vision_model.head.attention.in_proj_weight"].array
    attn = ref.params["img"]["map_head"]["attn"]
    # Width 5 of head 1's third channel; heads are 8 wide, the three parts 16.
    for i, name in enumerate(("query", "key", "value")):
        assert attn[name]["kernel"][5, 1, 2] == in_proj[16 * i + 8 + 2, 5]


@pytest.mark.parametrize("table", ["stacked", "unstacked", "mixed"])
@pytest.mark.parametrize("prefix", ["", "params/"])
def test_an_npz_is_loaded_with_and_without_prefix_stacked_or_not(tmp_path, table, prefix):
    params = random_params(TINY)
    tensors = spill(params, tables(TINY)[table])
    write_npz(tmp_path / "siglip.npz", {prefix + name: tensor for name, tensor in tensors.items()})
    got, report = convert.load(tmp_path / "siglip.npz", TINY)
    assert_equal(got, params)
    assert sorted(line.source for line in report) == sorted(tensors)


def test_a_hugging_face_folder_is_loaded(folder):
    ref = reference()
    params, report = convert.load(folder, TINY)
    assert_equal(params, ref.params)
    [line] = [line for line in report if line.target == "img/map_head/attn/key/kernel"]
    assert line.source == "vision_model.head.attention.in_proj_weight"
    assert line.transform == "rows [16, 32), reshape (2, 8, 16), transpose (2, 0, 1)"
    alone, _ = convert.load(folder / "model.safetensors", TINY)
    assert_equal(alone, ref.params)


def test_parameters_are_read_onto_the_mesh(folder):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = sharding.param_shardings(abstract_params(TINY), mesh)
    params, _ = convert.load(folder, TINY, shardings)
    assert_equal(params, reference().params)
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == shardings


def test_positions_of_pictures_are_resampled_and_those_of_texts_are_not(folder):
    larger = get_config("siglip_tiny", img={"image_size": 56})
    params, report = convert.load(folder, larger)
    # The corners of the grid stay where they are.
    np.testing.assert_allclose(
        params["img"]["pos_embedding"][0, [0, 3, 12, 15]],
        reference().params["img"]["pos_embedding"][0],
        atol=1e-6,
    )
    [line] = [line for line in report if line.target == "img/pos_embedding"]
    assert line.transform.startswith("resample from (4, 16)")
    with pytest.raises(UserError, match=r"position_embedding.weight: shape \(8, 32\), wanted \(4"):
        convert.load(folder, get_config("siglip_tiny", txt={"text_len": 4}))


def test_buffers_that_count_positions_are_told_and_left(tmp_path):
    ref, name = reference(), "text_model.embeddings.position_ids"
    arrays = {name: tensor.array for name, tensor in hf_tensors(ref.theirs).items()}
    path = tmp_path / "old.safetensors"
    safetensors.numpy.save_file({**arrays, name: np.arange(8)[None]}, path)
    params, report = convert.load(path, TINY)
    assert_equal(params, ref.params)
    [line] = [line for line in report if line.source == name]
    assert (line.dtype, line.transform) == ("int64", "counts from 0, not stored")
    safetensors.numpy.save_file({**arrays, name: np.arange(8)[None] + 2}, path)
    with pytest.raises(UserError, match=r"position_ids \(in .*old\.safetensors\) does not count"):
        convert.load(path, TINY)


@pytest.mark.parametrize("table", ["huggingface", "stacked", "unstacked"])
def test_all_tensors_that_do_not_fit_are_listed_at_once(table):
    rows = tables(TINY)[table]
    tensors = dict(spill(random_params(TINY), rows))
    missing, misshapen = {
        "huggingface": ("logit_bias", "vision_model.head.attention.in_proj_bias"),
        "stacked": ("b", f"img/MAPHead_0/{MHA}/query/bias"),
        "unstacked": ("txt/Encoder_0/encoderblock_2/LayerNorm_1/bias", "t"),
    }[table]
    del tensors[missing]
    tensors[misshapen] = ArrayTensor(np.zeros(7, np.float32))
    tensors["img/head/kernel"] = ArrayTensor(np.zeros((16, 16), np.float32))
    with pytest.raises(UserError) as error:
        match(tensors, rows, abstract_params(TINY))
    message = str(error.value)
    assert message.startswith("3 tensors do not fit")
    assert f"{missing}: missing, wanted for" in message
    assert f"{misshapen}: shape (7,), wanted" in message
    assert "img/head/kernel: no parameter takes it" in message


def test_another_depth_is_refused_in_towers_that_are_not_stacked():
    tensors = spill(random_params(TINY), tables(TINY)["unstacked"])
    for depth, message in (
        (2, "txt/Encoder_0/encoderblock_2/LayerNorm_0/bias: no parameter takes it"),
        (4, "txt/Encoder_0/encoderblock_3/LayerNorm_0/bias: missing"),
    ):
        config = get_config("siglip_tiny", txt={"depth": depth})
        with pytest.raises(UserError, match=message):
            match(tensors, convert.big_vision_rows(config, tensors), abstract_params(config))


def test_another_vocabulary_is_refused(folder):
    with pytest.raises(UserError, match=r"token_embedding.weight: shape \(256, 32\), wanted \(99"):
        convert.load(folder, get_config("siglip_tiny", txt={"vocab_size": 99}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "siglip2"}, "model_type 'siglip2', wanted 'siglip' .* not NaFlex"),
        ({"model_type": "siglip_vision_model"}, "model_type 'siglip_vision_model', wanted"),
        (
            {"vision_config": {"num_attention_heads": 4}},
            r"vision_config.num_attention_heads: 4, wanted 2",
        ),
        ({"text_config": {}}, r"text_config.num_attention_heads: 12, wanted 4"),
        (
            {"text_config": {"num_attention_heads": 4, "hidden_act": "gelu"}},
            r"text_config.hidden_act: 'gelu', wanted 'gelu_pytorch_tanh'",
        ),
    ],
)
def test_other_models_are_refused_by_their_config(tmp_path, fields, message):
    folder = hf_folder(tmp_path, reference().theirs)
    edit_config(folder, **fields)
    for path in (folder, folder / "model.safetensors"):
        with pytest.raises(UserError, match=message):
            convert.load(path, TINY)


def test_a_folder_needs_its_config(tmp_path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        convert.load(tmp_path, TINY)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is no JSON"):
        convert.load(tmp_path, TINY)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"weights\.bin is no SigLIP checkpoint: give"):
        convert.load(tmp_path / "weights.bin", TINY)


# ---- What a folder tells of itself ----


@pytest.mark.parametrize("name", ["siglip_b16_256", "siglip_so400m14_224", "siglip_so400m14_384"])
def test_sizes_are_read_from_transformers_config(tmp_path, name):
    hf_config(get_config(name)).save_pretrained(tmp_path)
    assert convert.read_config(tmp_path) == get_config(name)
    assert convert.read_config(tmp_path, dtype="bfloat16").dtype == "bfloat16"


def test_sizes_that_a_config_leaves_out_are_transformers_defaults(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "siglip", "text_config": {}, "vision_config": {"image_size": 256}}'
    )
    assert convert.read_config(tmp_path) == get_config("siglip_b16_256")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "siglip2"}, "model_type 'siglip2', wanted 'siglip' .* not NaFlex"),
        ({"model_type": "clip"}, "model_type 'clip', wanted 'siglip'"),
        ({"text_config": {"hidden_size": 0}}, "text_config.hidden_size is 0, no size"),
        ({"text_config": {"vocab_size": "x"}}, "text_config.vocab_size is 'x', no size"),
        ({"vision_config": 3}, "vision_config.hidden_size is None, no size"),
        ({"vision_config": {"num_hidden_layers": True}}, "num_hidden_layers is True, no size"),
        ({"text_config": {"hidden_act": "relu"}}, r"text_config.hidden_act: 'relu', wanted"),
    ],
)
def test_a_config_of_no_siglip_is_refused(tmp_path, fields, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip"} | fields))
    with pytest.raises(UserError, match=message):
        convert.read_config(tmp_path)


def test_a_folder_without_a_config_is_no_siglip(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"no folder with a SigLIP: config\.json is missing"):
            convert.read_config(folder)


def test_pictures_are_resized_as_the_folder_says(tmp_path):
    assert convert.read_resize(tmp_path, 28) == "bicubic"  # transformers' default
    processor = transformers.SiglipImageProcessor(size={"height": 28, "width": 28}, resample=2)
    processor.save_pretrained(tmp_path)
    assert convert.read_resize(tmp_path, 28) == "bilinear"
    with pytest.raises(UserError, match=r"size: .*28.*, wanted .*56"):
        convert.read_resize(tmp_path, 56)
    path = tmp_path / "preprocessor_config.json"
    path.write_text('{"resample": 0, "image_std": [1, 1, 1]}')
    with pytest.raises(UserError, match=r"(?s)image_std: .*resample: 0, wanted 2"):
        convert.read_resize(tmp_path, 28)


def test_a_fingerprint_is_of_the_content(folder, tmp_path):
    here = tmp_path / "here"
    shutil.copytree(folder, here)
    (here / "spiece.model").write_bytes(b"pieces")
    before = convert.fingerprint(here, ["spiece.model"])
    assert len(before) == 16
    moved = here.rename(tmp_path / "moved")
    assert convert.fingerprint(moved, ["spiece.model"]) == before
    for k, name in enumerate(("config.json", "spiece.model", "model.safetensors")):
        other = shutil.copytree(moved, tmp_path / str(k))
        content = bytearray((other / name).read_bytes())
        content[-1 if name == "model.safetensors" else 0] ^= 1
        (other / name).write_bytes(content)
        assert convert.fingerprint(other, ["spiece.model"]) != before
    with pytest.raises(UserError, match=r"absent\.model does not exist"):
        convert.fingerprint(moved, ["absent.model"])
