"""Text from frames and a prompt, token by token, with a key/value cache.

Only captions need this: segments are scored in one pass (`PaliGemma2.score`).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from deevisum_jax.data.tokenizer import EOS, PAD
from deevisum_jax.errors import UserError
from deevisum_jax.models.paligemma2 import PaliGemma2Config, Params, bind
from deevisum_jax.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    Raises:
      UserError: a value out of range.
    """

    max_new_tokens: int = 64
    stop_tokens: tuple[int, ...] = (EOS,)
    temperature: float = 0.0  # logits are divided by it; 0 takes the likeliest token
    top_p: float = 1.0  # nucleus: sample among the likeliest tokens that hold this much; 1 = all

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens must be at least 1, got {self.max_new_tokens}")
        if self.temperature < 0:
            raise UserError(f"temperature must not be negative, got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must lie in (0, 1], got {self.top_p}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Generated:
    """The new tokens, without the prompt."""

    tokens: Array  # int32[B, max_new_tokens], PAD behind the stop token
    length: Array  # int32[B], number of tokens in front of the stop token


def next_token(logits: jax.Array, sampling: Sampling, key: jax.Array) -> jax.Array:
    """Chooses a token of each row: greedily at temperature 0, else by (nucleus) sampling.

    Args:
      logits: float32[B, V].
      sampling: `temperature` and `top_p` are read.
      key: randomness, not used at temperature 0.

    Returns:
      int32[B].
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = logits / sampling.temperature
    if sampling.top_p < 1:
        logits = nucleus(logits, sampling.top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: float) -> jax.Array:
    """Sets all but the nucleus to -inf (Holtzman et al. 2020).

    The nucleus is the smallest set of likeliest tokens whose probabilities sum to `top_p` or more;
    the likeliest is always in it. With probabilities 0.5, 0.3, 0.2 and `top_p` 0.6 the first two
    stay. Tokens as likely as the last one in stay too.

    Args:
      logits: float32[B, V].
      top_p: in (0, 1].
    """
    ordered = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities  # held by the likelier ones
    smallest = jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= smallest, logits, -jnp.inf)


@functools.partial(jax.jit, static_argnames=("config", "sampling"))
def generate(
    config: PaliGemma2Config,
    params: Params,
    frames: Array,
    tokens: Array,
    mask_input: Array,
    *,
    sampling: Sampling,
    key: jax.Array,
) -> Generated:
    r"""Continues prompts.

    Stops when every row has met a stop token, or after `max_new_tokens`.

    Args:
      config: of the model; the exit heads, if any, are not used.
      params: of the model.
      frames: uint8[B, I, H, W, 3].
      tokens: int32[B, T], prompts only (`[BOS prompt]["\n"]`), padded on either side.
      mask_input: bool[B, T], 1 = real token.
      sampling: how to choose, when to stop.
      key: randomness.
    """
    model = bind(config, params)
    embedded = model.embed(frames, tokens, jnp.zeros_like(mask_input), mask_input)
    # The last chosen token is never fed, hence one slot less.
    prefilled, cache = model.prefill(embedded, max_decode_len=sampling.max_new_tokens - 1)
    key, first_key = jax.random.split(key)
    first = next_token(model.logits(embedded.last_prefix_row(prefilled)), sampling, first_key)

    B = tokens.shape[0]
    stop_tokens = jnp.asarray(sampling.stop_tokens, jnp.int32)
    stopped = jnp.isin(first, stop_tokens)
    out = jnp.full((B, sampling.max_new_tokens), PAD, jnp.int32).at[:, 0].set(first)

    def not_done(state):
        step, _, _, stopped, _, _ = state
        return (step < sampling.max_new_tokens) & ~jnp.all(stopped)

    def advance(state):
        step, token, cache, stopped, out, key = state
        key, step_key = jax.random.split(key)
        pre_logits, cache = model.decode_step(token, cache)
        token = jnp.where(stopped, PAD, next_token(model.logits(pre_logits), sampling, step_key))
        out = jax.lax.dynamic_update_slice_in_dim(out, token[:, None], step, 1)
        return step + 1, token, cache, stopped | jnp.isin(token, stop_tokens), out, key

    state = (jnp.int32(1), first, cache, stopped, out, key)
    *_, out, _ = jax.lax.while_loop(not_done, advance, state)
    is_stop = jnp.isin(out, stop_tokens)
    length = jnp.where(is_stop.any(axis=1), jnp.argmax(is_stop, axis=1), out.shape[1])
    return Generated(tokens=out, length=length.astype(jnp.int32))
