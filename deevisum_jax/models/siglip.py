"""SigLIP So400m-style image tower (Zhai et al. 2023), as in PaliGemma: no pooling, no MAP head.

Parameter names and shapes are big_vision's `models/vit.py` with scanned blocks; linen's automatic
names are renamed (`LayerNorm_0` -> `ln1`, `MlpBlock_0/Dense_0` -> `mlp/fc1`,
`MultiHeadDotProductAttention_0` -> `attn`). D, F, N, H and L are the image tower's own here.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from deevisum_jax.errors import UserError
from deevisum_jax.models import layers
from deevisum_jax.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig:
    """Sizes of the image tower.

    Raises:
      UserError: the image is no whole number of patches, the width no whole number of heads.
    """

    image_size: int  # pixels, height and width
    patch_size: int  # pixels
    width: int  # D
    depth: int  # L
    mlp_dim: int  # F
    num_heads: int  # N

    def __post_init__(self):
        if self.image_size % self.patch_size:
            raise UserError(
                f"img.image_size {self.image_size} is no multiple of img.patch_size "
                f"{self.patch_size}; take {self.image_size // self.patch_size * self.patch_size} "
                "or another patch size"
            )
        if self.width % self.num_heads:
            raise UserError(
                f"img.width {self.width} is no multiple of img.num_heads {self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def num_patches(self) -> int:
        """Tokens of one frame: 256 at 224 pixels with patches of 14."""
        return (self.image_size // self.patch_size) ** 2


class Attention(nnx.Module):
    """Multi-head attention with biases, everything sees everything."""

    def __init__(self, config: SiglipConfig, *, param_dtype: str, rngs: nnx.Rngs):
        D, N, H = config.width, config.num_heads, config.head_dim
        kwargs = {"param_dtype": param_dtype, "rngs": rngs}
        self.query = layers.Projection("BTD,DNH->BTNH", (D,), (N, H), **kwargs)
        self.key = layers.Projection("BSD,DNH->BSNH", (D,), (N, H), **kwargs)
        self.value = layers.Projection("BSD,DNH->BSNH", (D,), (N, H), **kwargs)
        self.out = layers.Projection("BTNH,NHD->BTD", (N, H), (D,), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        q = self.query(x)
        q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
        return self.out(layers.attend(q, self.key(x), self.value(x), mask=None))


class Mlp(nnx.Module):
    """Two layers with the tanh approximation of GELU between."""

    def __init__(self, config: SiglipConfig, *, param_dtype: str, rngs: nnx.Rngs):
        D, F = config.width, config.mlp_dim
        kwargs = {"param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = layers.Projection("BTD,DF->BTF", (D,), (F,), **kwargs)
        self.fc2 = layers.Projection("BTF,FD->BTD", (F,), (D,), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class EncoderBlock(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: SiglipConfig, *, param_dtype: str, rngs: nnx.Rngs):
        self.ln1 = layers.LayerNorm(config.width, param_dtype=param_dtype)
        self.attn = Attention(config, param_dtype=param_dtype, rngs=rngs)
        self.ln2 = layers.LayerNorm(config.width, param_dtype=param_dtype)
        self.mlp = Mlp(config, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = constrain(x, "batch", "seq", "act_embed")
        out = x + self.attn(self.ln1(x))
        out = out + self.mlp(self.ln2(out))
        assert out.dtype == x.dtype
        return out


class Transformer(nnx.Module):
    """The stack of blocks, parameters stacked on axis 0, and the norm after it."""

    def __init__(self, config: SiglipConfig, *, param_dtype: str, rngs: nnx.Rngs):
        self.encoderblock = nnx.vmap(
            lambda r: EncoderBlock(config, param_dtype=param_dtype, rngs=r)
        )(rngs.split(config.depth))
        self.encoder_norm = layers.LayerNorm(config.width, param_dtype=param_dtype)

    def __call__(self, x: jax.Array, *, remat_policy: str | None = None) -> jax.Array:
        body = layers.remat(lambda x, block: (block(x), None), remat_policy)
        x, _ = jax.lax.scan(body, x, self.encoderblock)
        return self.encoder_norm(x)


class Siglip(nnx.Module):
    """Frames to tokens of the language model's width.

    Args:
      config: sizes.
      out_width: width of the language model, where `head` projects to.
      param_dtype: storage dtype.
      rngs: stream `params`.
    """

    def __init__(self, config: SiglipConfig, *, out_width: int, param_dtype: str, rngs: nnx.Rngs):
        D, p = config.width, config.patch_size
        self.patch_size = p
        self.embedding = layers.Projection(
            "BhpwqC,pqCD->BhwD", (p, p, 3), (D,), param_dtype=param_dtype, rngs=rngs
        )
        self.pos_embedding = layers.fan_in_init(
            rngs, (1, config.num_patches, D), fan_in=D, dtype=param_dtype
        )
        self.Transformer = Transformer(config, param_dtype=param_dtype, rngs=rngs)
        self.head = layers.Projection(
            "BPD,DE->BPE", (D,), (out_width,), param_dtype=param_dtype, rngs=rngs
        )

    def __call__(self, pixels: jax.Array, *, remat_policy: str | None = None) -> jax.Array:
        """Encodes frames.

        Args:
          pixels: float[B, H, W, 3] in [-1, 1], in the compute dtype.
          remat_policy: as `layers.remat`.

        Returns:
          float[B, P, E], one token per patch in row-major order, E = out_width.
        """
        return self.head(self.encode(pixels, remat_policy=remat_policy))

    def encode(self, pixels: jax.Array, *, remat_policy: str | None = None) -> jax.Array:
        """float[B, P, D], the patch tokens before the projection to the language model."""
        B, height, width, C = pixels.shape
        p = self.patch_size
        # A convolution whose stride is its kernel is one matrix product per patch.
        patches = pixels.reshape(B, height // p, p, width // p, p, C)
        x = self.embedding(patches)
        x = x.reshape(B, -1, x.shape[-1])
        x = x + self.pos_embedding[...].astype(x.dtype)
        return self.Transformer(x, remat_policy=remat_policy)
