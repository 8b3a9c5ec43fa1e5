"""SigLIP with both its towers (Zhai et al. 2023): how well a picture and a text go together.

The image tower is PaliGemma's, with an attention-pooling (MAP) head on top; the text tower has the
same layers, no mask, and is read at its last position. Both end in embeddings of length 1 and of
the same width E, which is the image tower's. Parameters travel as in `paligemma2`:

    params = init_params(config, jax.random.key(0))
    zimg = jax.jit(lambda params, frames: bind(config, params).encode_image(frames))(params, frames)

Names and shapes are big_vision's `models/proj/image_text/two_towers.py` and what it is made of;
linen's automatic names are renamed (`MAPHead_0` -> `map_head`, `Embed_0` -> `embed`, `Encoder_0`
-> `Transformer`, and those of the layers as in `siglip`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import nnx

from deevisum_jax import fsdp
from deevisum_jax.errors import UserError
from deevisum_jax.models import layers, pytree
from deevisum_jax.models.pytree import Params
from deevisum_jax.models.siglip import (
    Attention,
    EncoderConfig,
    ImageEncoder,
    Mlp,
    SiglipConfig,
    Transformer,
)
from deevisum_jax.sharding import constrain
from deevisum_jax.typing import Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextConfig(EncoderConfig):
    """Sizes of the text tower.

    Raises:
      UserError: the width is no whole number of heads.
    """

    WHERE: ClassVar[str] = "txt"

    vocab_size: int = 32_000  # V; 256,000 in SigLIP 2
    text_len: int = 64  # tokens, pads included


@dataclasses.dataclass(frozen=True, kw_only=True)
class TwoTowersConfig:
    """A model's sizes and numbers.

    Raises:
      UserError: an unknown dtype or rematerialisation policy.
    """

    img: SiglipConfig
    txt: TextConfig
    dtype: str = "float32"  # of activations and matrix products
    param_dtype: str = "float32"  # of stored parameters, but for the logits' scale and bias
    remat_policy: str | None = None  # None keeps all activations for the backward pass

    def __post_init__(self):
        for field in ("dtype", "param_dtype"):
            pytree.check_dtype(field, getattr(self, field))
        layers.check_remat_policy(self.remat_policy)


_B = {"width": 768, "depth": 12, "mlp_dim": 3072, "num_heads": 12}
_SO400M = {"width": 1152, "depth": 27, "mlp_dim": 4304, "num_heads": 16}

# Named sizes. SigLIP 2 at a fixed resolution has the same but for its vocabulary, and 64 tokens in
# all sizes: `get_config(name, txt={"vocab_size": 256_000, "text_len": 64})`.
VARIANTS: dict[str, TwoTowersConfig] = {
    **{
        f"siglip_b16_{size}": TwoTowersConfig(
            img=SiglipConfig(image_size=size, patch_size=16, **_B), txt=TextConfig(**_B)
        )
        for size in (224, 256, 384, 512)
    },
    "siglip_so400m14_224": TwoTowersConfig(
        img=SiglipConfig(image_size=224, patch_size=14, **_SO400M),
        txt=TextConfig(text_len=16, **_SO400M),  # as released
    ),
    "siglip_so400m14_384": TwoTowersConfig(
        # 27 x 27 patches on 378 pixels.
        img=SiglipConfig(image_size=384, patch_size=14, crop_to_patches=True, **_SO400M),
        txt=TextConfig(**_SO400M),
    ),
    "siglip_tiny": TwoTowersConfig(
        img=SiglipConfig(image_size=28, patch_size=14, width=16, depth=2, mlp_dim=32, num_heads=2),
        txt=TextConfig(width=32, depth=3, mlp_dim=64, num_heads=4, vocab_size=256, text_len=8),
    ),
}


def get_config(
    name: str,
    *,
    img: Mapping[str, Any] | None = None,
    txt: Mapping[str, Any] | None = None,
    **overrides: Any,
) -> TwoTowersConfig:
    """A variant by name, with fields replaced.

    Args:
      name: key of `VARIANTS`.
      img: fields of `SiglipConfig` to replace.
      txt: fields of `TextConfig` to replace, for instance `{"vocab_size": 256_000}`.
      **overrides: fields of `TwoTowersConfig` to replace, for instance `dtype="bfloat16"`.

    Raises:
      UserError: an unknown name or field (with the closest that exists), or a value that the
        config refuses.
    """
    return pytree.vary(VARIANTS, name, "SigLIP", {"img": img, "txt": txt}, overrides)


class MapHead(nnx.Module):
    """Multi-head attention pooling (Lee et al. 2019): a learned query looks at all patches."""

    def __init__(self, config: EncoderConfig, *, param_dtype: str, rngs: nnx.Rngs):
        D = config.width
        self.probe = layers.fan_in_init(rngs, (1, 1, D), fan_in=D, dtype=param_dtype)
        self.attn = Attention(config, param_dtype=param_dtype, rngs=rngs)
        self.ln1 = layers.LayerNorm(D, param_dtype=param_dtype)
        self.mlp = Mlp(config, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """float[B, P, D] -> float[B, D]."""
        probe = self.probe[...].astype(x.dtype)
        x = self.attn(jnp.broadcast_to(probe, (x.shape[0], 1, x.shape[2])), x)
        # No residual around the attention, and its query is not normed.
        return (x + self.mlp(self.ln1(x)))[:, 0]


class ImageTower(ImageEncoder):
    """Frames to one embedding each."""

    def __init__(self, config: SiglipConfig, *, param_dtype: str, rngs: nnx.Rngs):
        super().__init__(config, param_dtype=param_dtype, rngs=rngs)
        self.map_head = MapHead(config, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, pixels: jax.Array, *, remat_policy: str | None = None) -> jax.Array:
        """float[B, H, W, 3] in [-1, 1] -> float[B, D], not normalised."""
        return self.map_head(self.encode(pixels, remat_policy=remat_policy))


class TokenTable(nnx.Module):
    """The text tower's token embeddings."""

    def __init__(self, config: TextConfig, *, param_dtype: str, rngs: nnx.Rngs):
        D = config.width
        self.embedding = layers.fan_in_init(
            rngs, (config.vocab_size, D), fan_in=D, dtype=param_dtype
        )

    def __call__(self, tokens: Array, dtype: str) -> jax.Array:
        """int32[B, T] -> float[B, T, D]."""
        return fsdp.lookup(self.embedding[...], tokens, dtype)


class TextTower(nnx.Module):
    """Tokens to one embedding per text."""

    def __init__(self, config: TextConfig, *, out_width: int, param_dtype: str, rngs: nnx.Rngs):
        D = config.width
        kwargs = {"param_dtype": param_dtype, "rngs": rngs}
        self.embed = TokenTable(config, **kwargs)
        self.pos_embedding = layers.fan_in_init(
            rngs, (1, config.text_len, D), fan_in=D, dtype=param_dtype
        )
        self.Transformer = Transformer(config, **kwargs)
        self.head = layers.Projection((D,), (out_width,), axes=("norm", "embed"), **kwargs)

    def __call__(self, tokens: Array, *, dtype: str, remat_policy: str | None = None) -> jax.Array:
        """int32[B, T] -> float[B, E], not normalised."""
        return self.head(self.encode(tokens, dtype=dtype, remat_policy=remat_policy)[:, -1])

    def encode(self, tokens: Array, *, dtype: str, remat_policy: str | None = None) -> jax.Array:
        """int32[B, T] -> float[B, T, D]. Every token sees every other, pads included."""
        x = self.embed(tokens, dtype)
        x = x + self.pos_embedding[...].astype(x.dtype)
        return self.Transformer(x, remat_policy=remat_policy)


class TwoTowers(nnx.Module):
    """The model. `img`, `txt`, `t` and `b` hold the parameters."""

    def __init__(self, config: TwoTowersConfig, *, rngs: nnx.Rngs):
        self.config = config
        kwargs = {"param_dtype": config.param_dtype, "rngs": rngs}
        self.img = ImageTower(config.img, **kwargs)
        self.txt = TextTower(config.txt, out_width=config.img.width, **kwargs)
        # Always float32, as in big_vision: bfloat16 would move a scale of 117 by up to 1.6 %. They
        # start as in the paper: 10 and -10.
        self.t = nnx.Param(jnp.full((1,), math.log(10.0), jnp.float32))
        self.b = nnx.Param(jnp.full((1,), -10.0, jnp.float32))

    def encode_image(self, frames: Array) -> jax.Array:
        """Pictures to embeddings, zimg.

        Args:
          frames: uint8[B, H, W, 3], or float[B, H, W, 3] in [-1, 1]; H = W = `img.image_size`.

        Returns:
          float32[B, E] of length 1.

        Raises:
          UserError: pictures of another size or of another dtype.
        """
        size = self.config.img.image_size
        if frames.ndim != 4 or frames.shape[1:] != (size, size, 3):
            raise UserError(
                f"frames must be {size} x {size} with 3 channels for this model, got "
                f"{frames.shape=}; resize them, or change img.image_size"
            )
        if frames.dtype == jnp.uint8:
            frames = jnp.asarray(frames, jnp.float32) / 127.5 - 1.0
        elif not jnp.issubdtype(frames.dtype, jnp.floating):
            raise UserError(
                f"frames must be uint8, or floating-point in [-1, 1], got {frames.dtype=}"
            )
        pixels = jnp.asarray(frames, self.config.dtype)
        pixels = constrain(pixels, "batch", "seq", "seq", "seq")
        return _normalised(self.img(pixels, remat_policy=self.config.remat_policy))

    def encode_text(self, tokens: Array) -> jax.Array:
        """Texts to embeddings, ztxt.

        Args:
          tokens: int32[B, T], T = `txt.text_len`, padded as `data.siglip_text` does it. There is
            no mask, pads count.

        Returns:
          float32[B, E] of length 1.

        Raises:
          UserError: texts of another length.
        """
        T = self.config.txt.text_len
        if tokens.ndim != 2 or tokens.shape[1] != T:
            raise UserError(
                f"texts must be padded or cut to {T} tokens for this model, got {tokens.shape=}"
            )
        return _normalised(
            self.txt(tokens, dtype=self.config.dtype, remat_policy=self.config.remat_policy)
        )

    def logits(self, zimg: Array, ztxt: Array) -> jax.Array:
        """How well each picture and each text go together; a sigmoid makes probabilities.

        Args:
          zimg: float[I, E], I pictures.
          ztxt: float[T, E], T texts.

        Returns:
          float32[I, T], `exp(t) * zimg . ztxt + b`.
        """
        # Cosines differ in the third digit and are multiplied by about 100.
        cosines = jnp.einsum(
            "IE,TE->IT",
            jnp.asarray(zimg, jnp.float32),
            jnp.asarray(ztxt, jnp.float32),
            precision=jax.lax.Precision.HIGHEST,
        )
        return jnp.exp(self.t[...]) * cosines + self.b[...]


def _normalised(x: jax.Array) -> jax.Array:
    """float[B, E] -> float32[B, E] of length 1."""
    x = constrain(x.astype(jnp.float32), "batch", "act_embed")
    return x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)


def init_params(config: TwoTowersConfig, key: jax.Array) -> Params:
    """Fresh parameters, each weight with the variance that keeps activations at unit scale."""
    return pytree.init(TwoTowers, config, key)


def abstract_params(config: TwoTowersConfig) -> Params:
    """Shapes and dtypes of `init_params`, computed without memory or time."""
    return pytree.abstract(TwoTowers, config)


def num_params(config: TwoTowersConfig) -> int:
    """How many numbers the model has."""
    return pytree.num_params(abstract_params(config))


def bind(config: TwoTowersConfig, params: Params) -> TwoTowers:
    """A model over `params`, to call methods of; nothing is copied.

    Call it inside the function that is jitted or differentiated.
    """
    return pytree.bind(TwoTowers, config, params)
