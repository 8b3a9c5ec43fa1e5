r"""PaliGemma 2 with exit heads: SigLIP, Gemma 2, and the segment scorer that they make.

A segment's frames are folded into the batch for the image tower and their tokens concatenated, no
separators between, in front of the text (big_vision's `pp/proj/paligemma/video.py`). With `merge`
K keyframes of a segment keep their tokens and each other frame becomes one (`keyframes`). Scoring
is one pass over `[frames][BOS prompt]["\n"]`: the class is read at the last prefix position.

Parameters travel as a nested dictionary of arrays with big_vision's names; `init_params` makes one,
`bind` turns one into a model whose methods can be called under `jax.jit` and `jax.grad`:

    params = init_params(config, jax.random.key(0))
    scores = jax.jit(lambda params, batch: bind(config, params).score(batch))(params, batch)
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deevisum_jax.config import LoraConfig, MergeConfig
from deevisum_jax.errors import UserError
from deevisum_jax.keyframes import merging, selection
from deevisum_jax.models import layers, lora, masks, pytree
from deevisum_jax.models.exits import ExitHeads
from deevisum_jax.models.gemma2 import Gemma2, Gemma2Config, KVCache
from deevisum_jax.models.merging import DifferentialMerging
from deevisum_jax.models.pytree import Params
from deevisum_jax.models.siglip import Siglip, SiglipConfig
from deevisum_jax.sharding import constrain
from deevisum_jax.typing import Array, Batch, ExitScores

# Frames of a row that go through the image tower, or are merged, together: a segment with more of
# them takes no more memory for it than one with as many.
_FRAMES_AT_ONCE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class PaliGemma2Config:
    """A model's sizes, exits and numbers.

    Raises:
      UserError: exits out of order or out of range, an unknown dtype or rematerialisation policy,
        adapters or a merging of frames that it cannot have.
    """

    img: SiglipConfig
    llm: Gemma2Config
    # Layers to leave after, counted from 1: exit 8 has run 8 layers. Empty: no exit heads.
    exit_layers: tuple[int, ...] = ()
    dtype: str = "float32"  # of activations and matrix products
    param_dtype: str = "float32"  # of stored parameters
    remat_policy: str | None = None  # None keeps all activations for the backward pass
    lora: LoraConfig | None = None  # adapters; rank 0 becomes None
    merge: MergeConfig | None = None  # of a segment's frames; num_keyframes 0 becomes None

    def __post_init__(self):
        # Configuration files hold lists.
        object.__setattr__(self, "exit_layers", tuple(self.exit_layers))
        exits, L = self.exit_layers, self.llm.depth
        if any(not 1 <= layer <= L for layer in exits):
            raise UserError(
                f"exit_layers {exits} must lie within 1 and the depth of the language model, {L}; "
                f"out of range: {[layer for layer in exits if not 1 <= layer <= L]}"
            )
        if any(after <= before for before, after in itertools.pairwise(exits)):
            raise UserError(
                f"exit_layers {exits} must be strictly increasing; try {tuple(sorted(set(exits)))}"
            )
        for field in ("dtype", "param_dtype"):
            pytree.check_dtype(field, getattr(self, field))
        layers.check_remat_policy(self.remat_policy)
        if self.lora is not None:
            lora.check(self.lora, head_dim=self.llm.head_dim, mlp_dim=self.llm.mlp_dim)
            if not self.lora.rank:
                object.__setattr__(self, "lora", None)
        if self.merge is not None:
            if self.merge.num_keyframes:
                _selection_config(self.merge)  # both check their values
                _merging_config(self.merge)
            else:
                object.__setattr__(self, "merge", None)

    @property
    def has_merge_params(self) -> bool:
        """Whether frames are merged with learned projections, which are parameters."""
        return self.merge is not None and self.merge.projections

    def image_tokens(self, num_frames: int) -> int:
        """M, the soft tokens of a segment, in front of its text.

        P of each frame; with merging P of each keyframe and one of each other: of 8 frames of 256
        patches, 2 of them keyframes, 2 * 256 + 6 instead of 2048.

        Args:
          num_frames: I, frames of the segment.

        Raises:
          UserError: more keyframes than frames.
        """
        P = self.img.num_patches
        if self.merge is None:
            return num_frames * P
        K = self.merge.num_keyframes
        if num_frames < K:
            raise UserError(
                f"a segment of {num_frames} frames has no {K} keyframes; give it more frames "
                "(data.num_frames), or set model.merge.num_keyframes lower"
            )
        return merging.num_tokens(K, num_frames, P)


def _selection_config(merge: MergeConfig) -> selection.SelectionConfig:
    # Filled up always: what a segment costs does not depend on what it shows.
    return selection.SelectionConfig(
        num_keyframes=merge.num_keyframes,
        tau=merge.tau,
        reject=merge.reject,
        floor=merge.floor,
        fill=True,
    )


def _merging_config(merge: MergeConfig) -> merging.MergingConfig:
    return merging.MergingConfig(
        projections=merge.projections,
        reference=merge.reference,
        redundancy_weight=merge.redundancy_weight,
        temperature=merge.temperature,
    )


_SO400M = SiglipConfig(
    image_size=224, patch_size=14, width=1152, depth=27, mlp_dim=4304, num_heads=16
)
_VOCAB_SIZE = 257_152  # 256,000 pieces, 1,024 <loc>, 128 <seg>

# Named sizes. The quickstart trio is for one CPU and trains from scratch; its vocabulary must be
# set to the tokenizer's (`get_config(name, llm={"vocab_size": ...})`).
VARIANTS: dict[str, PaliGemma2Config] = {
    "paligemma2_3b": PaliGemma2Config(
        img=_SO400M,
        llm=Gemma2Config(
            vocab_size=_VOCAB_SIZE,
            width=2304,
            depth=26,
            mlp_dim=9216,
            num_heads=8,
            num_kv_heads=4,
            head_dim=256,
            query_pre_attn_scalar=256,
        ),
    ),
    "paligemma2_10b": PaliGemma2Config(
        img=_SO400M,
        llm=Gemma2Config(
            vocab_size=_VOCAB_SIZE,
            width=3584,
            depth=42,
            mlp_dim=14336,
            num_heads=16,
            num_kv_heads=8,
            head_dim=256,
            query_pre_attn_scalar=256,
        ),
    ),
    "paligemma2_28b": PaliGemma2Config(
        img=_SO400M,
        llm=Gemma2Config(
            vocab_size=_VOCAB_SIZE,
            width=4608,
            depth=46,
            mlp_dim=36864,
            num_heads=32,
            num_kv_heads=16,
            head_dim=128,
            query_pre_attn_scalar=4608 / 32,  # width over heads, not the head width
        ),
    ),
    "tiny": PaliGemma2Config(
        img=SiglipConfig(image_size=28, patch_size=14, width=16, depth=2, mlp_dim=32, num_heads=2),
        llm=Gemma2Config(
            vocab_size=512,
            width=32,
            depth=4,
            mlp_dim=64,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            query_pre_attn_scalar=16,
        ),
    ),
    "quickstart_student": PaliGemma2Config(
        img=SiglipConfig(image_size=64, patch_size=16, width=64, depth=2, mlp_dim=192, num_heads=4),
        llm=Gemma2Config(
            vocab_size=1024,
            width=96,
            depth=6,
            mlp_dim=256,
            num_heads=4,
            num_kv_heads=2,
            head_dim=24,
            query_pre_attn_scalar=24,
        ),
    ),
    "quickstart_mentor": PaliGemma2Config(
        img=SiglipConfig(image_size=64, patch_size=16, width=80, depth=3, mlp_dim=240, num_heads=4),
        llm=Gemma2Config(
            vocab_size=1024,
            width=128,
            depth=7,
            mlp_dim=384,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            query_pre_attn_scalar=32,
        ),
    ),
    "quickstart_teacher": PaliGemma2Config(
        img=SiglipConfig(image_size=64, patch_size=16, width=96, depth=3, mlp_dim=288, num_heads=4),
        llm=Gemma2Config(
            vocab_size=1024,
            width=192,
            depth=8,
            mlp_dim=576,
            num_heads=6,
            num_kv_heads=2,
            head_dim=32,
            query_pre_attn_scalar=32,
        ),
    ),
}


def get_config(
    name: str,
    *,
    img: Mapping[str, Any] | None = None,
    llm: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> PaliGemma2Config:
    """A variant by name, with fields replaced.

    Args:
      name: key of `VARIANTS`.
      img: fields of `SiglipConfig` to replace, for instance `{"image_size": 448}`.
      llm: fields of `Gemma2Config` to replace, for instance `{"sliding_window": 4096}`.
      **overrides: fields of `PaliGemma2Config` to replace, for instance `exit_layers=(8, 13)`.

    Raises:
      UserError: an unknown name or field (with the closest that exists), or a value that the
        config refuses.
    """
    return pytree.vary(VARIANTS, name, "model", {"img": img, "llm": llm}, overrides)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Embedded:
    """Image and text tokens on their way through the layers, image first.

    The rows of a batch are independent: an executor may gather some of them with `jax.tree.map`.
    """

    x: Array  # float[B, S, D], S = image tokens + T
    mask_ar: Array  # bool[B, S], 1 = causal boundary
    mask_input: Array  # bool[B, S], 1 = real token
    positions: Array  # int32[B, S]
    rotation: layers.Rotation  # of the positions; made once, for all layers and stages

    def last_prefix_row(self, x: Array) -> jax.Array:
        """float[B, S, D] -> float[B, D], the row at the last prefix position."""
        last = masks.last_prefix_position(self.mask_ar, self.mask_input)
        return jnp.take_along_axis(x, last[:, None, None], axis=1, mode="clip")[:, 0]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Output:
    """What a full pass gives."""

    pre_logits: Array  # float[B, S, D], final norm applied; see `PaliGemma2.logits`
    collected: Any  # what `collect` picked of each layer's output, leading axis L; or None
    exits: ExitScores | None  # None without exit heads


class PaliGemma2(nnx.Module):
    """The model.

    `img`, `llm`, `exits` and `merge` hold the parameters: `exits` only with exit layers, `merge`
    only where frames are merged with learned projections.
    """

    def __init__(self, config: PaliGemma2Config, *, rngs: nnx.Rngs):
        self.config = config
        kwargs = {"param_dtype": config.param_dtype, "rngs": rngs}
        self.img = Siglip(config.img, out_width=config.llm.width, **kwargs)
        self.llm = Gemma2(config.llm, **kwargs)
        if config.exit_layers:
            self.exits = ExitHeads(len(config.exit_layers), config.llm.width, **kwargs)
        # Behind the others: they are drawn as without.
        if config.merge is not None and config.merge.projections:
            self.merge = DifferentialMerging(
                _merging_config(config.merge),
                width=config.llm.width,
                query_width=config.llm.width,
                **kwargs,
            )
        if config.lora is not None:
            lora.reserve(self, config.lora)

    def encode_frames(self, frames: Array) -> jax.Array:
        """Frames to soft tokens, zimg.

        Args:
          frames: uint8[B, I, H, W, 3].

        Returns:
          float[B, M, D], frame after frame, patches row by row: M = I * P. With `config.merge` a
          frame that is no keyframe has one token, M = `config.image_tokens(I)`.

        Raises:
          UserError: frames of another size, or fewer than keyframes.
        """
        size = self.config.img.image_size
        if frames.shape[2:] != (size, size, 3):
            raise UserError(
                f"frames must be {size} x {size} with 3 channels for this model, got "
                f"{frames.shape=}; resize them, or change img.image_size"
            )
        if self.config.merge is None:
            zimg = self._encode(frames)
            return zimg.reshape(frames.shape[0], -1, zimg.shape[-1])
        M = self.config.image_tokens(frames.shape[1])  # refuses too few frames
        zimg = self._in_chunks(self._encode, jnp.asarray(frames))
        merged = self._merge(constrain(zimg, "batch", "seq", "seq", "act_embed"))
        assert merged.shape[1] == M
        return merged

    def _encode(self, frames: Array) -> jax.Array:
        """uint8[B, I, H, W, 3] -> float[B, I, P, D]."""
        pixels = jnp.asarray(frames, jnp.float32).reshape(-1, *frames.shape[2:]) / 127.5 - 1.0
        pixels = constrain(pixels.astype(self.config.dtype), "batch", "seq", "seq", "seq")
        zimg = self.img(pixels, remat_policy=self.config.remat_policy)
        return zimg.reshape(*frames.shape[:2], *zimg.shape[1:])

    def _merge(self, zimg: jax.Array) -> jax.Array:
        """float[B, I, P, D] -> float[B, M, D]: DKS keeps K frames, DFM merges the others."""
        merge = self.config.merge
        assert merge is not None
        chosen_by, config = _selection_config(merge), _merging_config(merge)
        params = self.merge.whole(zimg.dtype) if merge.projections else None
        take = functools.partial(jnp.take, axis=0, mode="clip")

        @jax.vmap
        def choose(zimg: jax.Array) -> tuple[Any, ...]:
            # Which frames are kept has no gradient; what is made of all of them has.
            means = jnp.mean(jax.lax.stop_gradient(zimg), axis=1, dtype=jnp.float32)
            keyframes = selection.select(means, config=chosen_by)
            slots = merging.reference_slots(keyframes, zimg.shape[0])
            bank = take(zimg, merging.reference_frames(keyframes, config))
            return keyframes, take(zimg, keyframes.index), slots, bank, merging.sum_of_units(zimg)

        keyframes, key_patches, slots, bank, query = choose(zimg)

        @jax.vmap
        def one_token_each(
            patches: jax.Array, slots: jax.Array, bank: jax.Array, query: jax.Array
        ) -> jax.Array:
            references = merging.gather_references(patches, bank, slots)
            return merging.merge(patches, references, query, config=config, params=params)

        merged = self._in_chunks(
            lambda patches, slots: one_token_each(patches, slots, bank, query), zimg, slots
        )
        return jax.vmap(merging.interleave)(key_patches, merged, keyframes)[0]

    def _in_chunks(self, fn: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
        """`fn` of some frames of every row at a time, [B, I, ...] -> [B, I, ...].

        Where the backward pass computes again what is within a layer, it computes a whole chunk
        again: what is kept of a frame is what goes in and what comes out.
        """
        B, num_frames = arrays[0].shape[:2]
        count = -(-num_frames // _FRAMES_AT_ONCE)
        if count == 1:
            return fn(*arrays)
        size = -(-num_frames // count)
        none = count * size - num_frames  # frames that fill up the last chunk, fewer than `count`

        def split(array: jax.Array) -> jax.Array:
            padded = jnp.pad(array, [(0, 0), (0, none), *[(0, 0)] * (array.ndim - 2)])
            return jnp.moveaxis(padded.reshape(B, count, size, *array.shape[2:]), 1, 0)

        policy = self.config.remat_policy and "nothing_saveable"
        body = layers.remat(lambda _, chunk: (None, fn(*chunk)), policy)
        _, found = jax.lax.scan(body, None, tuple(map(split, arrays)))
        found = jnp.moveaxis(found, 0, 1).reshape(B, count * size, *found.shape[3:])
        return found[:, :num_frames]

    def embed(self, frames: Array, tokens: Array, mask_ar: Array, mask_input: Array) -> Embedded:
        """`encode_frames`, then `join`; shapes as there."""
        return self.join(self.encode_frames(frames), tokens, mask_ar, mask_input)

    def join(self, zimg: Array, tokens: Array, mask_ar: Array, mask_input: Array) -> Embedded:
        """Puts image tokens in front of text.

        Args:
          zimg: float[B, M, D], any number of soft tokens; not scaled, unlike text.
          tokens: int32[B, T], padded on the right or on the left.
          mask_ar: bool[B, T], 1 = causal boundary.
          mask_input: bool[B, T], 1 = real token.
        """
        B, M, _ = zimg.shape
        ztxt = self.llm.embedder.encode(tokens, self.config.dtype)
        mask_input = jnp.concatenate(
            [jnp.ones((B, M), bool), jnp.asarray(mask_input, bool)], axis=1
        )
        positions = masks.token_positions(mask_input)
        return Embedded(
            x=jnp.concatenate([zimg.astype(self.config.dtype), ztxt], axis=1),
            mask_ar=jnp.concatenate([jnp.zeros((B, M), bool), jnp.asarray(mask_ar, bool)], axis=1),
            mask_input=mask_input,
            positions=positions,
            rotation=layers.rotation(positions, self.config.llm.head_dim),
        )

    def run_layers(
        self,
        embedded: Embedded,
        *,
        start: int = 0,
        stop: int | None = None,
        collect: Callable[[jax.Array], Any] | None = None,
    ) -> tuple[Embedded, Any]:
        """Runs the layers `start` to `stop` (half-open) of the language model.

        Args:
          embedded: what `embed` gives, or what an earlier call has left.
          start: first layer to run.
          stop: layer to stop in front of; None = all.
          collect: what to keep of each layer's output, from float[B, S, D]; nothing else is kept.

        Returns:
          `embedded` with the new `x`, and what was collected with a leading axis of layers.
        """
        mask, local_mask = self._attn_masks(embedded)
        x, collected = self.llm.run_layers(
            embedded.x,
            embedded.rotation,
            mask,
            local_mask,
            start=start,
            stop=stop,
            collect=collect,
            remat_policy=self.config.remat_policy,
        )
        return dataclasses.replace(embedded, x=x), collected

    def __call__(
        self, batch: Batch, *, collect: Callable[[jax.Array], Any] | None = None
    ) -> Output:
        """One pass over frames and text, for training: everything that a loss may ask for.

        Args:
          batch: `frames`, `tokens`, `mask_ar` and `mask_input` are read.
          collect: what else to keep of each layer's output, from float[B, S, D].
        """
        embedded = self.embed(batch.frames, batch.tokens, batch.mask_ar, batch.mask_input)
        embedded, (rows, collected) = self.run_layers(
            embedded,
            collect=lambda x: (
                embedded.last_prefix_row(x) if self.config.exit_layers else None,
                collect(x) if collect else None,
            ),
        )
        return Output(
            pre_logits=self.llm.final_norm(embedded.x),
            collected=collected,
            exits=self._exit_scores(rows) if self.config.exit_layers else None,
        )

    def score(self, batch: Batch) -> ExitScores:
        """The exit heads' scores; layers behind the last exit are not run.

        Args:
          batch: `frames`, `tokens`, `mask_ar` and `mask_input` are read. The suffix may be there
            or not: the prefix does not see it.
        """
        assert self.config.exit_layers, "a model without exit_layers has no scores"
        embedded = self.embed(batch.frames, batch.tokens, batch.mask_ar, batch.mask_input)
        return self.run_exits(embedded)[1]

    def run_exits(
        self, embedded: Embedded, *, start: int = 0, stop: int | None = None
    ) -> tuple[Embedded, ExitScores]:
        """Runs the layers from one exit to another, and reads those passed.

        Args:
          embedded: what `embed` gives, or what an earlier call has left.
          start: number of the first exit to read; the one before it was passed already.
          stop: number of the exit to stop in front of; None = all.

        Returns:
          `embedded` behind the last exit that was read, and the scores of `stop - start` exits.
        """
        layers = self.config.exit_layers[:stop]
        first = layers[start - 1] if start else 0
        embedded, rows = self.run_layers(
            embedded, start=first, stop=layers[-1], collect=embedded.last_prefix_row
        )
        rows = jnp.stack([rows[layer - first - 1] for layer in layers[start:]])
        return embedded, self.exits(rows, start=start)

    def logits(self, pre_logits: jax.Array) -> jax.Array:
        """float[..., D] -> float32[..., V]. Take the rows you need first: V is large."""
        return self.llm.logits(pre_logits)

    def prefill(self, embedded: Embedded, *, max_decode_len: int) -> tuple[jax.Array, KVCache]:
        """Runs the prompt and keeps its keys and values, with room for what will be decoded.

        Args:
          embedded: the prompt, from `embed`.
          max_decode_len: number of tokens that `decode_step` may be called for.

        Returns:
          pre_logits float[B, S, D] and the cache, in the compute dtype.
        """
        B, S = embedded.mask_input.shape
        cache = self.llm.init_cache(B, S + max_decode_len, self.config.dtype)
        mask, local_mask = jax.tree.map(
            lambda m: jnp.pad(m, ((0, 0), (0, 0), (0, max_decode_len))),
            self._attn_masks(embedded),
        )
        x, cache = self.llm.extend(
            embedded.x, embedded.positions, embedded.mask_input, mask, local_mask, cache
        )
        return self.llm.final_norm(x), cache

    def decode_step(self, tokens: Array, cache: KVCache) -> tuple[jax.Array, KVCache]:
        """Feeds one more token of each row.

        Args:
          tokens: int32[B].
          cache: from `prefill` or the last step; a free slot must be left.

        Returns:
          pre_logits float[B, D] and the cache.
        """
        position = jnp.sum(cache.mask_input, axis=1, keepdims=True, dtype=jnp.int32)  # [B, 1]
        x = self.llm.embedder.encode(tokens[:, None], self.config.dtype)
        new = jnp.ones_like(position, bool)
        # The new token sees itself, too.
        write = functools.partial(
            jax.lax.dynamic_update_slice_in_dim, start_index=cache.end_index, axis=1
        )
        mask = write(cache.mask_input, new)[:, None]
        local_mask = None
        if self.config.llm.sliding_window is not None:
            # A decoded token is behind the prefix, so the prefix's exemption is not its own.
            local_mask = mask & masks.sliding_window_mask(
                position,
                write(cache.positions, position),
                ~new,
                jnp.zeros_like(cache.mask_input),
                self.config.llm.sliding_window,
            )
        x, cache = self.llm.extend(x, position, new, mask, local_mask, cache)
        return self.llm.final_norm(x)[:, 0], cache

    def _attn_masks(self, embedded: Embedded) -> tuple[jax.Array, jax.Array | None]:
        mask = masks.make_attn_mask(embedded.mask_ar, embedded.mask_input)
        if self.config.llm.sliding_window is None:
            return mask, None
        prefix = masks.in_prefix(embedded.mask_ar, embedded.mask_input)
        window = masks.sliding_window_mask(
            embedded.positions,
            embedded.positions,
            prefix,
            prefix,
            self.config.llm.sliding_window,
        )
        return mask, mask & window

    def _exit_scores(self, rows: jax.Array) -> ExitScores:
        """From float[L, B, D], the layers' outputs at the last prefix position."""
        return self.exits(jnp.stack([rows[layer - 1] for layer in self.config.exit_layers]))


def init_params(config: PaliGemma2Config, key: jax.Array) -> Params:
    """Fresh parameters, each weight with the variance that keeps activations at unit scale.

    To have them placed on a mesh as they are made, jit this with `static_argnums=0` and
    `out_shardings=param_shardings(abstract_params(config), mesh)`.
    """
    params = pytree.init(PaliGemma2, config, key)
    if config.lora is None:
        return params
    # A key of their own: the weights are those of the model without adapters.
    params = lora.add(params, config.lora, jax.random.fold_in(key, 1))
    return lora.quantize(params, config.lora)


def abstract_params(config: PaliGemma2Config) -> Params:
    """Shapes and dtypes of `init_params`, computed without memory or time."""
    params = pytree.abstract(PaliGemma2, config)
    if config.lora is None:
        return params
    return jax.eval_shape(functools.partial(lora.quantize, config=config.lora), params)


def table_rows(num_pieces: int) -> int:
    """Rows of the token table for a tokenizer: a multiple of 128, which any tensor axis divides.

    PaliGemma's own 257,152 is one.
    """
    return -(-num_pieces // 128) * 128


def without_exits(config: PaliGemma2Config) -> PaliGemma2Config:
    """The same model without exit heads and merging: what PaliGemma 2's own checkpoints hold."""
    return dataclasses.replace(config, exit_layers=(), merge=None)


def without_merging(config: PaliGemma2Config) -> PaliGemma2Config:
    """The same model, whose frames keep all their tokens."""
    return dataclasses.replace(config, merge=None)


def without_lora(config: PaliGemma2Config) -> PaliGemma2Config:
    """The same model without adapters, nothing quantised."""
    return dataclasses.replace(config, lora=None)


def num_params(config: PaliGemma2Config) -> int:
    """How many numbers the model has, exit heads and adapters included."""
    return pytree.num_params(abstract_params(config))


def bind(config: PaliGemma2Config, params: Params) -> PaliGemma2:
    """A model over `params`, to call methods of; nothing is copied.

    Call it inside the function that is jitted or differentiated: gradients are taken with respect
    to the dictionary.
    """
    return pytree.bind(PaliGemma2, config, params)
