"""SigLIP's two towers: against Hugging Face transformers, by hand, and over a mesh."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from deevisum_jax import sharding
from deevisum_jax.config import LoraConfig, MergeConfig
from deevisum_jax.errors import UserError
from deevisum_jax.models import paligemma2
from deevisum_jax.models.two_towers import (
    VARIANTS,
    abstract_params,
    bind,
    get_config,
    init_params,
    num_params,
)
from tests.siglip_reference import hf_config, reference

SIMPLE, COMPOSITE = 1e-5, 1e-4


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models():
    ref = reference()
    return bind(ref.config, ref.params), ref.theirs


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def pictures(B=3, size=28):
    return np.random.default_rng(1).integers(0, 256, (B, size, size, 3)).astype(np.uint8)


def texts(B=5, T=8):
    """Rows of tokens with ends behind, as the tokenizer makes them."""
    tokens = np.random.default_rng(2).integers(2, 256, (B, T)).astype(np.int32)
    tokens[:, -1] = 1
    tokens[1, 3:] = 1
    return tokens


def as_pixels(frames):
    pixels = (frames / 127.5 - 1).astype(np.float32)
    return pixels, torch.from_numpy(pixels.transpose(0, 3, 1, 2))


def test_tokens_and_positions(models):
    ours, theirs = models
    got = ours.txt.embed(texts(), "float32") + ours.txt.pos_embedding[...]
    want = theirs.text_model.embeddings(torch.from_numpy(texts()))
    np.testing.assert_allclose(got, want, atol=SIMPLE)


def test_text_block(models):
    ours, theirs = models
    x = random(2, 8, 32)
    block = jax.tree.map(lambda a: a[1], ours.txt.Transformer.encoderblock)
    want = theirs.text_model.encoder.layers[1](torch.from_numpy(x), None)
    np.testing.assert_allclose(block(x), want, atol=COMPOSITE)


def test_map_head(models):
    ours, theirs = models
    x = random(2, 4, 16)
    want = theirs.vision_model.head(torch.from_numpy(x))
    np.testing.assert_allclose(ours.img.map_head(x), want, atol=SIMPLE)


def test_text_tower(models):
    ours, theirs = models
    want = theirs.text_model(torch.from_numpy(texts()))
    np.testing.assert_allclose(
        ours.txt.encode(texts(), dtype="float32"), want.last_hidden_state, atol=COMPOSITE
    )
    np.testing.assert_allclose(
        ours.txt(texts(), dtype="float32"), want.pooler_output, atol=COMPOSITE
    )


@pytest.mark.parametrize("size", [28, 34])
def test_image_tower_leaves_pixels_that_fill_no_patch(size):
    ref = reference(size)
    ours = bind(ref.config, ref.params)
    pixels, theirs = as_pixels(pictures(size=size))
    want = ref.theirs.vision_model(theirs)
    np.testing.assert_allclose(ours.img.encode(pixels), want.last_hidden_state, atol=COMPOSITE)
    np.testing.assert_allclose(ours.img(pixels), want.pooler_output, atol=COMPOSITE)


def test_embeddings_and_logits_of_the_full_model():
    ref = reference()

    @jax.jit
    def run(params, frames, tokens):
        model = bind(ref.config, params)
        zimg, ztxt = model.encode_image(frames), model.encode_text(tokens)
        return zimg, ztxt, model.logits(zimg, ztxt)

    zimg, ztxt, logits = run(ref.params, pictures(), texts())
    want = ref.theirs(
        pixel_values=as_pixels(pictures())[1], input_ids=torch.from_numpy(texts()).long()
    )
    np.testing.assert_allclose(zimg, want.image_embeds, atol=COMPOSITE)
    np.testing.assert_allclose(ztxt, want.text_embeds, atol=COMPOSITE)
    np.testing.assert_allclose(logits, want.logits_per_image, atol=COMPOSITE)
    assert logits.shape == (3, 5)
    # Pictures and texts differ among themselves by far more than the tolerance.
    assert min(logits.std(axis=0).min(), logits.std(axis=1).min()) > 100 * COMPOSITE


def test_scale_and_bias_by_hand():
    ref = reference()
    params = ref.params | {"t": jnp.log(jnp.array([20.0])), "b": jnp.array([-3.0])}
    zimg, ztxt = np.eye(16)[:2], np.stack([np.eye(16)[0], np.full(16, 0.25), -np.eye(16)[1]])
    np.testing.assert_allclose(
        bind(ref.config, params).logits(zimg, ztxt), [[17, 2, -3], [-3, 2, -23]], rtol=1e-5
    )


def test_fresh_logits_start_as_in_the_paper():
    config = get_config("siglip_tiny")
    model = bind(config, init_params(config, jax.random.key(0)))
    zimg = model.encode_image(pictures())
    # A picture and itself have the cosine 1: 10 * 1 - 10.
    np.testing.assert_allclose(jnp.diag(model.logits(zimg, zimg)), np.zeros(3), atol=1e-5)


def test_pictures_may_be_bytes_or_numbers(models):
    ours, _ = models
    pixels, _ = as_pixels(pictures())
    np.testing.assert_allclose(
        ours.encode_image(pixels), ours.encode_image(pictures()), atol=SIMPLE
    )


def test_every_token_is_seen_at_the_last_position(models):
    ours, _ = models
    tokens = texts(B=2)
    changed = tokens.copy()
    changed[:, 0] = tokens[:, 0] % 200 + 2
    moved = np.abs(ours.encode_text(tokens) - ours.encode_text(changed)).max(axis=1)
    assert moved.min() > 1e-3


def test_bfloat16_ends_in_float32_of_length_one():
    ref = reference()
    config = get_config("siglip_tiny", dtype="bfloat16", param_dtype="bfloat16")
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(abstract_params(config)["img"])}
    assert dtypes == {jnp.dtype("bfloat16")}
    assert abstract_params(config)["t"].dtype == jnp.float32
    ours, exact = bind(config, ref.params), bind(ref.config, ref.params)
    for got, want in (
        (ours.encode_image(pictures()), exact.encode_image(pictures())),
        (ours.encode_text(texts()), exact.encode_text(texts())),
    ):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, rtol=1e-6)
        np.testing.assert_allclose(got, want, atol=0.05)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("siglip_b16_224", 203_155_970),
        # Its texts have 16 tokens; all others 64.
        ("siglip_so400m14_224", 877_360_306),
        ("siglip_so400m14_384", 877_960_498),
    ],
)
def test_sizes_are_the_released_ones(name, count):
    config = get_config(name)
    with torch.device("meta"):
        theirs = transformers.SiglipModel(hf_config(config))
    assert num_params(config) == sum(p.numel() for p in theirs.parameters()) == count


def test_a_larger_picture_and_vocabulary_add_rows_only():
    b224 = num_params(get_config("siglip_b16_224"))
    assert num_params(get_config("siglip_b16_512")) - b224 == (32**2 - 14**2) * 768
    siglip2 = get_config("siglip_b16_224", txt={"vocab_size": 256_000})
    assert num_params(siglip2) - b224 == (256_000 - 32_000) * 768


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_matches_exactly_one_row(name):
    leaves = jax.tree.leaves_with_path(abstract_params(get_config(name)))
    for path, leaf in leaves:
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        assert len(sharding.logical_axes(path, leaf.ndim)) == leaf.ndim
    # Two stacks of 18, 18 more of the image tower, 4 of the text tower, t and b.
    assert len(leaves) == 60


def test_every_row_is_used_by_one_model_or_the_other():
    adapters = LoraConfig(rank=2, towers=("llm", "img"))
    merge = MergeConfig(num_keyframes=1, projections=True)
    paligemma = paligemma2.get_config("tiny", exit_layers=(2, 4), lora=adapters, merge=merge)
    paths = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for params in (paligemma2.abstract_params(paligemma), reference().params)
        for path, _ in jax.tree.leaves_with_path(params)
    ]
    paths.append("distill/teacher/kernel")  # of distillation, beside either
    for regex, _ in sharding.PARAM_AXES:
        assert any(re.fullmatch(regex, path) for path in paths), regex


def test_embeddings_do_not_depend_on_the_mesh(capfd):
    ref = reference()
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    shardings = sharding.param_shardings(abstract_params(ref.config), mesh)
    frames, tokens = pictures(B=8), texts(B=8)

    def run(params, frames, tokens):
        model = bind(ref.config, params)
        zimg, ztxt = model.encode_image(frames), model.encode_text(tokens)
        return zimg, ztxt, model.logits(zimg, ztxt)

    want = jax.jit(run)(ref.params, frames, tokens)
    capfd.readouterr()
    with jax.set_mesh(mesh):
        placed = jax.device_put(ref.params, shardings)
        batch = jax.device_put((frames, tokens), sharding.batch_sharding(mesh))
        got = jax.jit(run)(placed, *batch)
    logged = capfd.readouterr()
    assert "Involuntary full rematerialization" not in logged.err + logged.out
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    query = placed["img"]["map_head"]["attn"]["query"]["kernel"]
    assert query.addressable_shards[0].data.shape == (16 // 2, 2 // 2, 8)
    assert got[0].addressable_shards[0].data.shape == (2, 16)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "siglip_b16_225"}, "'siglip_b16_225' is unknown: did you mean 'siglip_b16_2"),
        ({"img": {"image_size": 30}}, "image_size 30 is no multiple of img.patch_size 14"),
        ({"txt": {"num_heads": 3}}, "txt.width 32 is no multiple of txt.num_heads 3"),
        ({"txt": {"vocabsize": 7}}, "txt has no field 'vocabsize': did you mean 'vocab_size'"),
        ({"dtyp": "float32"}, "model has no field 'dtyp': did you mean 'dtype'"),
        ({"dtype": "bfloat"}, "dtype 'bfloat' is unknown: did you mean 'bfloat16'"),
        ({"remat_policy": "nothing"}, "did you mean 'nothing_saveable'"),
    ],
)
def test_mistakes_in_a_config_are_named(change, message):
    with pytest.raises(UserError, match=message):
        get_config(**{"name": "siglip_tiny"} | change)


def test_inputs_of_another_shape_or_kind_are_refused(models):
    ours, _ = models
    with pytest.raises(UserError, match=r"frames must be 28 x 28 .* got .*\(1, 30, 28, 3\)"):
        ours.encode_image(np.zeros((1, 30, 28, 3), np.uint8))
    with pytest.raises(UserError, match=r"uint8, or floating-point .* got .*int32"):
        ours.encode_image(np.zeros((1, 28, 28, 3), np.int32))
    with pytest.raises(UserError, match=r"padded or cut to 8 tokens .* got .*\(2, 64\)"):
        ours.encode_text(np.zeros((2, 64), np.int32))
