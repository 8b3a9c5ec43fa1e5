"""Decoding with a cache: the same numbers as without, the same words as Hugging Face."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from deevisum_jax.errors import UserError
from deevisum_jax.inference.generation import Sampling, generate, next_token, nucleus
from deevisum_jax.models.paligemma2 import bind
from tests.hf_reference import hf_inputs, reference

NEW = 32


def prompts(B=2, T=5):
    rng = np.random.default_rng(3)
    return {
        "frames": rng.integers(0, 256, (B, 1, 28, 28, 3)).astype(np.uint8),
        "tokens": rng.integers(2, 512, (B, T)).astype(np.int32),
        "mask_ar": np.zeros((B, T), bool),
        "mask_input": np.ones((B, T), bool),
    }


def greedy(ref, prompt, **options):
    options = {"max_new_tokens": NEW, "stop_tokens": ()} | options
    return generate(
        ref.config,
        ref.params,
        prompt["frames"],
        prompt["tokens"],
        prompt["mask_input"],
        sampling=Sampling(**options),
        key=jax.random.key(0),
    )


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("window", [4096, 3])
def test_greedy_tokens_are_hugging_faces(window):
    ref, prompt = reference(window), prompts()
    with torch.no_grad():
        theirs = ref.theirs.generate(
            **hf_inputs(**prompt),
            max_new_tokens=NEW,
            do_sample=False,
            eos_token_id=None,
            # Placeholder rows of the padded token table, which are no words.
            suppress_tokens=list(range(512, 576)),
        )
    got = greedy(ref, prompt)
    np.testing.assert_array_equal(got.tokens, theirs[:, -NEW:])
    assert got.length.tolist() == [NEW, NEW]
    assert len(set(got.tokens[0].tolist())) >= 5, "one repeated word would prove little"


@pytest.mark.parametrize("window", [4096, 3])
@pytest.mark.parametrize("pad", ["left", "right"])
def test_cached_decoding_equals_one_full_pass(window, pad):
    ref, prompt = reference(window), prompts()
    suffix = np.random.default_rng(4).integers(2, 512, (2, 4)).astype(np.int32)
    # The first row has two pads beside its prompt.
    prompt["mask_input"][0, [0, 1] if pad == "left" else [-2, -1]] = False

    @jax.jit
    def whole(params):
        model = bind(ref.config, params)
        causal = np.ones_like(suffix, bool)
        embedded = model.embed(
            prompt["frames"],
            np.concatenate([prompt["tokens"], suffix], axis=1),
            np.concatenate([prompt["mask_ar"], causal], axis=1),
            np.concatenate([prompt["mask_input"], causal], axis=1),
        )
        embedded, _ = model.run_layers(embedded)
        return model.llm.final_norm(embedded.x)

    @jax.jit
    def cached(params):
        model = bind(ref.config, params)
        embedded = model.embed(**prompt)
        prefilled, cache = model.prefill(embedded, max_decode_len=4)
        rows = []
        for step in range(4):
            row, cache = model.decode_step(suffix[:, step], cache)
            rows.append(row)
        return prefilled, jnp.stack(rows, axis=1), cache.end_index

    want = whole(ref.params)
    prefilled, decoded, end_index = cached(ref.params)
    real = np.concatenate([np.ones((2, 4), bool), prompt["mask_input"]], axis=1)
    np.testing.assert_allclose(prefilled[real], want[:, :9][real], atol=1e-5)
    np.testing.assert_allclose(decoded, want[:, 9:], atol=1e-5)
    assert end_index == 13


def test_rows_stop_by_themselves_and_the_rest_is_padding():
    ref, prompt = reference(), prompts()
    free = np.asarray(greedy(ref, prompt, max_new_tokens=8).tokens)
    # The first token of row 0 that is not its first one.
    at = int(np.argmax(free[0] != free[0, 0]))
    stop = int(free[0, at])
    assert at > 0
    got = greedy(ref, prompt, max_new_tokens=8, stop_tokens=(stop,))
    assert got.length[0] == at
    np.testing.assert_array_equal(got.tokens[0], [*free[0, : at + 1], *[0] * (7 - at)])
    n = int(got.length[1])
    np.testing.assert_array_equal(got.tokens[1, :n], free[1, :n])


def test_nucleus_by_hand():
    logits = jnp.log(jnp.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]))
    kept = np.isfinite(nucleus(logits, 0.6))
    np.testing.assert_array_equal(kept, [[False, True, True], [False, False, True]])
    assert np.isfinite(nucleus(logits, 1e-6)).sum() == 2, "the likeliest always stays"


def test_sampling_follows_the_probabilities():
    logits = jnp.tile(jnp.log(jnp.array([[0.1, 0.6, 0.3]])), (4000, 1))
    draw = lambda **options: np.bincount(
        next_token(logits, Sampling(**options), jax.random.key(0)), minlength=3
    )
    np.testing.assert_allclose(draw(temperature=1.0) / 4000, [0.1, 0.6, 0.3], atol=0.03)
    # At temperature 0.5 probabilities are squared: 0.01, 0.36, 0.09 of 0.46.
    np.testing.assert_allclose(draw(temperature=0.5) / 4000, [0.022, 0.783, 0.196], atol=0.03)
    np.testing.assert_allclose(
        draw(temperature=1.0, top_p=0.7) / 4000, [0, 2 / 3, 1 / 3], atol=0.03
    )
    np.testing.assert_array_equal(draw(temperature=0.0), [0, 4000, 0])


def test_sampled_text_depends_on_the_key_alone():
    ref, prompt = reference(), prompts()
    sampling = Sampling(max_new_tokens=8, stop_tokens=(), temperature=1.0, top_p=0.9)
    run = lambda seed: (
        generate(
            ref.config,
            ref.params,
            prompt["frames"],
            prompt["tokens"],
            prompt["mask_input"],
            sampling=sampling,
            key=jax.random.key(seed),
        ).tokens
    )
    np.testing.assert_array_equal(run(0), run(0))
    assert np.any(run(0) != run(1))


@pytest.mark.parametrize(
    "options", [{"max_new_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_sampling_values_are_checked(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)
