"""Who may look at whom: prefix-LM masks, sliding windows and positions.

Dimensions as in `deevisum_jax.typing`. In every mask 1 (True) means yes: `mask_input` marks real
tokens, `mask_ar` marks causal boundaries, an attention mask marks the keys that a query may see.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from deevisum_jax.typing import Array


def make_attn_mask(mask_ar: Array, mask_input: Array) -> jax.Array:
    r"""The prefix-LM attention mask.

    A query sees a key if no causal boundary lies between them on the key's side: with
    `c = cumsum(mask_ar)`, query `i` sees key `j` where `c[j] <= c[i]`. Zeros in front form the
    prefix, which sees itself whole; each 1 opens a step that only later tokens see.

    For `[image, image, bos, "\n", yes, eos, pad]`, `mask_ar = [0, 0, 0, 0, 1, 1, 1]` and
    `mask_input = [1, 1, 1, 1, 1, 1, 0]` this gives, queries down and keys across:

        image  1 1 1 1 0 0 0
        image  1 1 1 1 0 0 0
        bos    1 1 1 1 0 0 0
        "\n"   1 1 1 1 0 0 0
        yes    1 1 1 1 1 0 0
        eos    1 1 1 1 1 1 0
        pad    1 1 1 1 1 1 0

    A boundary on a token that is not real does not count: pads carry `mask_ar = 1`, and in front
    of the text (left padding) they would cut the image off from it.

    Args:
      mask_ar: bool[B, T], 1 = causal boundary.
      mask_input: bool[B, T], 1 = real token.

    Returns:
      bool[B, T, T], queries x keys.
    """
    step = _causal_step(mask_ar, mask_input)
    return (step[:, None, :] <= step[:, :, None]) & jnp.asarray(mask_input, bool)[:, None, :]


def sliding_window_mask(
    q_positions: Array, k_positions: Array, q_in_prefix: Array, k_in_prefix: Array, window: int
) -> jax.Array:
    """What a local layer may see at most, to be joined (and) with the attention mask.

    A query sees the `window` newest positions, its own included. Prefix to prefix is exempt, as in
    Hugging Face transformers 5: the prefix is seen whole by itself, only suffix rows are limited.
    With window 2, positions 0..4 and a prefix of 3:

        prefix 1 1 1 1 1     (the causal mask hides the last two)
        prefix 1 1 1 1 1
        prefix 1 1 1 1 1
        suffix 0 0 1 1 1
        suffix 0 0 0 1 1

    Positions, not array indices, are compared: pads do not use up the window.

    Args:
      q_positions: int32[B, T].
      k_positions: int32[B, S].
      q_in_prefix: bool[B, T].
      k_in_prefix: bool[B, S].
      window: number of positions, at least 1.

    Returns:
      bool[B, T, S].
    """
    near = q_positions[:, :, None] - k_positions[:, None, :] < window
    return near | (q_in_prefix[:, :, None] & k_in_prefix[:, None, :])


def in_prefix(mask_ar: Array, mask_input: Array) -> jax.Array:
    """bool[B, T], real tokens in front of the first causal boundary."""
    return (_causal_step(mask_ar, mask_input) == 0) & jnp.asarray(mask_input, bool)


def last_prefix_position(mask_ar: Array, mask_input: Array) -> jax.Array:
    """The index of the last prefix token of each row, where the class is read.

    With `mask_ar = [0, 0, 0, 1, 1]` it is 2 for `mask_input = [1, 1, 1, 1, 0]`; with left padding,
    `mask_ar = [1, 0, 0, 0, 1]` and `mask_input = [0, 1, 1, 1, 1]`, it is 3.

    Args:
      mask_ar: bool[B, T], 1 = causal boundary.
      mask_input: bool[B, T], 1 = real token. A row with no prefix gives 0; with image tokens in
        front this does not happen.

    Returns:
      int32[B], an index into T (not a position: pads are counted).
    """
    prefix = in_prefix(mask_ar, mask_input)
    return jnp.max(jnp.where(prefix, jnp.arange(prefix.shape[1], dtype=jnp.int32), 0), axis=1)


def token_positions(mask_input: Array) -> jax.Array:
    """int32[B, T], the position of each real token among the real ones: `[0, 1, 1] -> [0, 0, 1]`.

    Pads get the position of the real token before them (0 if there is none); they are masked.
    """
    return jnp.maximum(jnp.cumsum(mask_input, axis=1, dtype=jnp.int32) - 1, 0)


def _causal_step(mask_ar: Array, mask_input: Array) -> jax.Array:
    boundary = jnp.asarray(mask_ar, bool) & jnp.asarray(mask_input, bool)
    return jnp.cumsum(boundary, axis=1, dtype=jnp.int32)
