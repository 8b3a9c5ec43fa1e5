"""The ladder: every part against Hugging Face transformers, random tiny weights, float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deevisum_jax.models import layers, masks
from deevisum_jax.models.layers import K_MASK
from deevisum_jax.models.paligemma2 import bind, get_config
from deevisum_jax.typing import Batch
from tests.hf_reference import hf_inputs, reference

SIMPLE, COMPOSITE = 1e-5, 1e-4


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def models():
    """The reference and our model, all layers global in effect."""
    ref = reference()
    return ref, bind(ref.config, ref.params), ref.theirs.model.language_model


def first(stack, i=0):
    """Layer `i` of stacked layers."""
    return jax.tree.map(lambda a: a[i], stack)


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def prefix_lm(T=7, prefix=4):
    """A mask and positions for one sequence, ours and in their form."""
    mask_ar = (np.arange(T) >= prefix)[None]
    mask = masks.make_attn_mask(mask_ar, np.ones((1, T), bool))
    added = torch.from_numpy(np.where(mask, 0, K_MASK).astype(np.float32))[:, None]
    return mask, added, np.arange(T)[None]


def text_batch(B=2, num_frames=2, T=9):
    """Prompts of 5 tokens and suffixes of 4, the second row with two pads behind."""
    rng = np.random.default_rng(1)
    mask_input = np.ones((B, T), bool)
    mask_input[1, -2:] = False
    return {
        "frames": rng.integers(0, 256, (B, num_frames, 28, 28, 3)).astype(np.uint8),
        "tokens": rng.integers(2, 512, (B, T)).astype(np.int32),
        "mask_ar": np.broadcast_to(np.arange(T) >= 5, (B, T)),
        "mask_input": mask_input,
    }


def as_batch(text):
    unread = dict.fromkeys(("mask_loss", "label", "score", "video_id", "segment", "valid"))
    return Batch(**text, **unread)


def test_rms_norm(models):
    _, ours, theirs = models
    x = random(2, 3, 32)
    np.testing.assert_allclose(
        first(ours.llm.layers).pre_attention_norm(x),
        theirs.layers[0].input_layernorm(torch.from_numpy(x)),
        atol=SIMPLE,
    )


def test_feed_forward(models):
    _, ours, theirs = models
    x = random(2, 3, 32)
    np.testing.assert_allclose(
        first(ours.llm.layers).mlp(x), theirs.layers[0].mlp(torch.from_numpy(x)), atol=SIMPLE
    )


def test_grouped_query_attention(models):
    _, ours, theirs = models
    mask, added, positions = prefix_lm()
    x = random(1, 7, 32)
    rotary = theirs.rotary_emb(torch.from_numpy(x), torch.from_numpy(positions))
    want, _ = theirs.layers[1].self_attn(torch.from_numpy(x), rotary, added)
    got, _ = first(ours.llm.layers, 1).attn(x, layers.rotation(positions, 16), mask)
    np.testing.assert_allclose(got, want, atol=SIMPLE)


def test_block(models):
    _, ours, theirs = models
    mask, added, positions = prefix_lm()
    x = random(1, 7, 32)
    rotary = theirs.rotary_emb(torch.from_numpy(x), torch.from_numpy(positions))
    want = theirs.layers[0](torch.from_numpy(x), rotary, added)
    got, _ = first(ours.llm.layers)(x, layers.rotation(positions, 16), mask)
    np.testing.assert_allclose(got, want, atol=COMPOSITE)


def test_image_tower(models):
    ref, ours, _ = models
    frames = text_batch()["frames"][0]
    pixels = (frames / 127.5 - 1).astype(np.float32)
    want = ref.theirs.model.get_image_features(torch.from_numpy(pixels.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(ours.img.encode(pixels), want.last_hidden_state, atol=COMPOSITE)
    # Frames side by side in the sequence, each one's patches row by row.
    np.testing.assert_allclose(
        ours.encode_frames(frames[None])[0], want.pooler_output.reshape(8, 32), atol=COMPOSITE
    )


@pytest.mark.parametrize("window", [4096, 6, 3])
def test_full_model_with_local_layers(window):
    ref = reference(window)
    text = text_batch()
    got = jax.jit(lambda params, batch: _logits(ref.config, params, batch))(
        ref.params, as_batch(text)
    )
    want = ref.theirs(**hf_inputs(**text)).logits.numpy()[:, :, :512]
    real = np.concatenate([np.ones((2, 8), bool), text["mask_input"]], axis=1)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got[real], want[real], atol=COMPOSITE)
    # The cap moves a logit of 1 by 4e-4: more than the tolerance.
    assert np.abs(want).max() > 1


def test_a_small_window_changes_the_suffix_only():
    text = text_batch()
    wide, narrow = (
        np.asarray(_logits(ref.config, ref.params, as_batch(text)))
        for ref in (reference(4096), reference(3))
    )
    prefix = 8 + 5
    np.testing.assert_allclose(narrow[:, :prefix], wide[:, :prefix], atol=COMPOSITE)
    assert np.abs(narrow[:, prefix] - wide[:, prefix]).max() > 0.1


def test_big_vision_does_not_cap_the_final_logits():
    ref = reference()
    text = as_batch(text_batch())
    uncapped = _logits(get_config("tiny", llm={"sliding_window": 4096}), ref.params, text)
    capped = _logits(ref.config, ref.params, text)
    np.testing.assert_allclose(30 * np.tanh(uncapped / 30), capped, atol=SIMPLE)


def _logits(config, params, batch):
    model = bind(config, params)
    return model.logits(model(batch).pre_logits)
