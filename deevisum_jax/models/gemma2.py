"""Gemma 2 (Gemma Team 2024) as the language tower of PaliGemma 2.

Parameter names and shapes are big_vision's `models/ppp/gemma.py`: layers stacked on axis 0, all of
them alike. Whether a layer is local is an array that is scanned beside the parameters, so layer 7
is row 7 and a truncated model is a slice of the stack.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deevisum_jax import fsdp
from deevisum_jax.errors import UserError
from deevisum_jax.models import layers
from deevisum_jax.sharding import constrain
from deevisum_jax.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gemma2Config:
    """Sizes and switches of the language tower.

    Raises:
      UserError: heads do not group evenly over key/value heads, or the window is no window.
    """

    vocab_size: int  # V
    width: int  # D
    depth: int  # L
    mlp_dim: int  # F
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H; N * H need not be D
    query_pre_attn_scalar: float  # queries are scaled by this ** -0.5
    attn_logits_softcap: float = 50.0  # 0 = none
    # 0 = none: big_vision's PaliGemma never caps the final logits, Hugging Face caps at 30. The
    # argmax is the same, likelihoods and distillation temperatures are not.
    final_logits_softcap: float = 0.0
    # None: every layer is global, as in big_vision. 4096: layers 0, 2, 4, ... see the newest 4096
    # positions only, as in Hugging Face; without effect up to 4096 tokens.
    sliding_window: int | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"llm.num_heads {self.num_heads} is no multiple of llm.num_kv_heads "
                f"{self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(f"llm.head_dim {self.head_dim} is odd; RoPE turns pairs")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise UserError(
                f"llm.sliding_window {self.sliding_window} is no window; None makes every layer "
                "global"
            )

    @property
    def is_local(self) -> np.ndarray:
        """bool[L], 1 = the layer sees the sliding window only: layers 0, 2, 4, ..."""
        even = np.arange(self.depth) % 2 == 0
        return even & (self.sliding_window is not None)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class KVCache:
    """Keys and values of the tokens so far; slot `i` holds the i-th token fed, pads included."""

    k: Array  # float[L, B, S, K, H], S slots
    v: Array  # float[L, B, S, K, H]
    positions: Array  # int32[B, S]
    mask_input: Array  # bool[B, S], 1 = a real token is in the slot
    end_index: Array  # int32[], the next free slot, the same for all rows


class Weight(nnx.Module):
    """One weight called `w`, as big_vision names it."""

    def __init__(self, shape: tuple[int, ...], *, fan_in: int, param_dtype: str, rngs: nnx.Rngs):
        self.w = layers.fan_in_init(rngs, shape, fan_in, param_dtype)


class Attention(nnx.Module):
    """Grouped-query attention with RoPE and capped logits."""

    def __init__(self, config: Gemma2Config, *, param_dtype: str, rngs: nnx.Rngs):
        D, N, K, H = config.width, config.num_heads, config.num_kv_heads, config.head_dim
        kwargs = {"param_dtype": param_dtype, "rngs": rngs}
        self.logits_softcap = config.attn_logits_softcap
        self.query_scale = config.query_pre_attn_scalar**-0.5
        self.q_einsum = Weight((N, D, H), fan_in=D, **kwargs)
        self.kv_einsum = Weight((2, K, D, H), fan_in=D, **kwargs)
        self.attn_vec_einsum = Weight((N, H, D), fan_in=N * H, **kwargs)

    def __call__(
        self,
        x: jax.Array,
        rotation: layers.Rotation,
        mask: Array,
        cached: tuple[jax.Array, jax.Array, Array] | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Attends from `x` to itself, or to a cache that `x` is written into first.

        Args:
          x: float[B, T, D].
          rotation: of the positions of `x`.
          mask: bool[B, T, S], S = T, or the slots of the cache.
          cached: this layer's k and v, float[B, S, K, H], and the first slot to write.

        Returns:
          float[B, T, D], and k and v with the new rows (None without a cache).
        """
        q = self.q_einsum
        q = layers.from_embed(
            x, q.w[...], "heads", "embed", "head_dim", adapter=layers.adapter(q, "w")
        )
        q = layers.rope(q, rotation)
        q = q * jnp.asarray(self.query_scale, q.dtype)
        k, v = (
            layers.from_embed(
                x,
                self.kv_einsum.w[half],
                *("kv_heads", "embed", "head_dim"),
                adapter=layers.adapter(self.kv_einsum, "w", half),
            )
            for half in range(2)
        )
        k = layers.rope(k, rotation)
        if cached is not None:
            cached_k, cached_v, start = cached
            k = jax.lax.dynamic_update_slice_in_dim(cached_k, k.astype(cached_k.dtype), start, 1)
            v = jax.lax.dynamic_update_slice_in_dim(cached_v, v.astype(cached_v.dtype), start, 1)
            cached = (k, v)
        out = layers.attend(q, k.astype(x.dtype), v.astype(x.dtype), mask, self.logits_softcap)
        o = self.attn_vec_einsum
        out = layers.to_embed(
            out, o.w[...], "heads", "head_dim", "embed", adapter=layers.adapter(o, "w")
        )
        return out, cached


class FeedForward(nnx.Module):
    """`gelu(x W_gate) * (x W_up)`, then down; no biases."""

    def __init__(self, config: Gemma2Config, *, param_dtype: str, rngs: nnx.Rngs):
        D, F = config.width, config.mlp_dim
        self.gating_einsum = layers.fan_in_init(rngs, (2, D, F), fan_in=D, dtype=param_dtype)
        self.linear = layers.fan_in_init(rngs, (F, D), fan_in=F, dtype=param_dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up = (
            layers.from_embed(
                x,
                self.gating_einsum[half],
                *("embed", "mlp"),
                adapter=layers.adapter(self, "gating_einsum", half),
            )
            for half in range(2)
        )
        x = layers.gated_gelu(gate, up)
        return layers.to_embed(
            x, self.linear[...], "mlp", "embed", adapter=layers.adapter(self, "linear")
        )


class Block(nnx.Module):
    """Transformer block with a norm before and after each half."""

    def __init__(self, config: Gemma2Config, *, param_dtype: str, rngs: nnx.Rngs):
        norm = functools.partial(layers.RMSNorm, config.width, param_dtype=param_dtype)
        self.pre_attention_norm = norm()
        self.attn = Attention(config, param_dtype=param_dtype, rngs=rngs)
        self.post_attention_norm = norm()
        self.pre_ffw_norm = norm()
        self.mlp = FeedForward(config, param_dtype=param_dtype, rngs=rngs)
        self.post_ffw_norm = norm()

    def __call__(
        self,
        x: jax.Array,
        rotation: layers.Rotation,
        mask: Array,
        cached: tuple[jax.Array, jax.Array, Array] | None = None,
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Arguments and results as `Attention`."""
        x = constrain(x, "batch", "seq", "act_embed")
        attended, cached = self.attn(self.pre_attention_norm(x), rotation, mask, cached)
        out = x + self.post_attention_norm(attended)
        out = out + self.post_ffw_norm(self.mlp(self.pre_ffw_norm(out)))
        assert out.dtype == x.dtype
        return out, cached


class Embedder(nnx.Module):
    """The token table, used on the way in and, transposed, on the way out."""

    def __init__(self, config: Gemma2Config, *, param_dtype: str, rngs: nnx.Rngs):
        # The scale of encode() is sqrt(D): text tokens start with unit RMS like image tokens, and
        # the first logits have unit variance.
        self.input_embedding = layers.fan_in_init(
            rngs, (config.vocab_size, config.width), fan_in=config.width, dtype=param_dtype
        )

    def encode(self, tokens: Array, dtype: str) -> jax.Array:
        """int32[B, T] -> float[B, T, D], times sqrt(D) rounded to `dtype` as the authors do."""
        x = fsdp.lookup(self.input_embedding[...], tokens, dtype)
        return x * jnp.asarray(x.shape[-1] ** 0.5, dtype)

    def decode(self, pre_logits: jax.Array) -> jax.Array:
        """float[..., D] -> float32[..., V]."""
        table = self.input_embedding[...].astype(pre_logits.dtype)
        return jnp.einsum("...D,VD->...V", pre_logits, table, preferred_element_type=jnp.float32)


class Gemma2(nnx.Module):
    """The language tower, from embedded tokens to `pre_logits` and logits."""

    def __init__(self, config: Gemma2Config, *, param_dtype: str, rngs: nnx.Rngs):
        self.config = config
        self.embedder = Embedder(config, param_dtype=param_dtype, rngs=rngs)
        self.layers = nnx.vmap(lambda r: Block(config, param_dtype=param_dtype, rngs=r))(
            rngs.split(config.depth)
        )
        self.final_norm = layers.RMSNorm(config.width, param_dtype=param_dtype)

    def run_layers(
        self,
        x: jax.Array,
        rotation: layers.Rotation,
        mask: Array,
        local_mask: Array | None = None,
        *,
        start: int = 0,
        stop: int | None = None,
        collect: Callable[[jax.Array], jax.Array] | None = None,
        remat_policy: str | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Runs the layers `start` to `stop` (half-open).

        Args:
          x: float[B, T, D].
          rotation: `layers.rotation` of the positions of `x`.
          mask: bool[B, T, T].
          local_mask: bool[B, T, T] of local layers; wanted with `config.sliding_window`.
          start: first layer to run.
          stop: layer to stop in front of; None = all.
          collect: what to keep of each layer's output, from float[B, T, D].
          remat_policy: as `layers.remat`.

        Returns:
          float[B, T, D], and what `collect` returned with a leading axis of `stop - start` (None
          without `collect`).
        """
        stop = self.config.depth if stop is None else stop
        assert 0 <= start < stop <= self.config.depth, f"{start=} {stop=}"
        assert (local_mask is None) == (self.config.sliding_window is None)

        def body(x, layer):
            block, is_local = layer
            x, _ = block(x, rotation, _choose(is_local, local_mask, mask))
            return x, None if collect is None else collect(x)

        stack = (self.layers, jnp.asarray(self.config.is_local))
        if (start, stop) == (0, self.config.depth):
            return jax.lax.scan(layers.remat(body, remat_policy), x, stack)

        if any(leaf.dtype != x.dtype for leaf in jax.tree.leaves(self.layers)):
            # Weights in another dtype than they are used in are converted in front of the loop, all
            # of a stack if all of it is there: cut off the layers that are not run.
            stack = jax.tree.map(lambda a: a[start:stop], stack)
            return jax.lax.scan(layers.remat(body, remat_policy), x, stack)

        # Scanning over a slice would copy the weights of all its layers first: pick one at a time.
        # (Only here: the gradient of picking adds up a whole stack in every layer.)
        def pick_and_run(x, index):
            pick = functools.partial(jax.lax.dynamic_index_in_dim, index=index, keepdims=False)
            return body(x, jax.tree.map(pick, stack))

        if stop - start == 1:
            # A loop that the compiler does not know to turn once: what it makes of one that it
            # takes apart is slower by a seventh on a CPU.
            end = jax.lax.optimization_barrier(jnp.int32(stop))
            kept = jax.eval_shape(lambda x: pick_and_run(x, start)[1], x)
            kept = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), kept)
            turn = lambda index, state: pick_and_run(state[0], index)
            x, kept = jax.lax.fori_loop(start, end, turn, (x, kept))
            return x, jax.tree.map(lambda a: a[None], kept)

        return jax.lax.scan(layers.remat(pick_and_run, remat_policy), x, jnp.arange(start, stop))

    def init_cache(self, batch_size: int, cache_size: int, dtype: str) -> KVCache:
        """An empty cache of `cache_size` slots."""
        c = self.config
        shape = (c.depth, batch_size, cache_size, c.num_kv_heads, c.head_dim)
        return KVCache(
            k=jnp.zeros(shape, dtype),
            v=jnp.zeros(shape, dtype),
            positions=jnp.zeros((batch_size, cache_size), jnp.int32),
            mask_input=jnp.zeros((batch_size, cache_size), bool),
            end_index=jnp.zeros((), jnp.int32),
        )

    def extend(
        self,
        x: jax.Array,
        positions: Array,
        mask_input: Array,
        mask: Array,
        local_mask: Array | None,
        cache: KVCache,
    ) -> tuple[jax.Array, KVCache]:
        """Runs all layers on new tokens that see the cache, and writes them into it.

        Args:
          x: float[B, T, D], T new tokens.
          positions: int32[B, T].
          mask_input: bool[B, T], 1 = real token.
          mask: bool[B, T, S], over the slots of the cache, the new tokens' included.
          local_mask: the same of local layers; wanted with `config.sliding_window`.
          cache: has room for T more tokens.

        Returns:
          float[B, T, D] and the cache.
        """
        start = cache.end_index
        rotation = layers.rotation(positions, self.config.head_dim)

        # The cache rides in the carry, and each layer reads, changes and writes back its own part:
        # compiled for TPU this updates it in place, while scanning over it copies all of it.
        def body(carry, layer):
            x, all_k, all_v = carry
            block, is_local, index = layer
            k = jax.lax.dynamic_index_in_dim(all_k, index, keepdims=False)
            v = jax.lax.dynamic_index_in_dim(all_v, index, keepdims=False)
            x, (k, v) = block(x, rotation, _choose(is_local, local_mask, mask), (k, v, start))
            all_k = jax.lax.dynamic_update_index_in_dim(all_k, k, index, 0)
            all_v = jax.lax.dynamic_update_index_in_dim(all_v, v, index, 0)
            return (x, all_k, all_v), None

        stack = (self.layers, jnp.asarray(self.config.is_local), jnp.arange(self.config.depth))
        (x, k, v), _ = jax.lax.scan(body, (x, cache.k, cache.v), stack)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=start, axis=1)
        return x, KVCache(
            k=k,
            v=v,
            positions=write(cache.positions, positions),
            mask_input=write(cache.mask_input, mask_input),
            end_index=start + x.shape[1],
        )

    def logits(self, pre_logits: jax.Array) -> jax.Array:
        """float[..., D] -> float32[..., V], capped if `config.final_logits_softcap`."""
        return layers.softcap(self.embedder.decode(pre_logits), self.config.final_logits_softcap)


def _choose(is_local: jax.Array, local_mask: Array | None, mask: Array) -> Array:
    return mask if local_mask is None else jnp.where(is_local, local_mask, mask)
