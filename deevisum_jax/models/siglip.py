"""SigLIP So400m-style image tower (Zhai et al. 2023), as in PaliGemma: no pooling, no MAP head.

Parameter names and shapes are big_vision's `models/vit.py` with scanned blocks; linen's automatic
names are renamed (`LayerNorm_0` -> `ln1`, `MlpBlock_0/Dense_0` -> `mlp/fc1`,
`MultiHeadDotProductAttention_0` -> `attn`). D, F, N, H and L are the tower's own here. What SigLIP
itself has on top, pooling and the text tower, is in `two_towers`, of the same parts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.ndimage
from flax import nnx

from deevisum_jax.errors import UserError
from deevisum_jax.models import layers
from deevisum_jax.sharding import constrain


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Sizes of a tower's layers.

    Raises:
      UserError: the width is no whole number of heads.
    """

    WHERE: ClassVar[str]  # where a config holds the tower, for messages

    width: int  # D
    depth: int  # L
    mlp_dim: int  # F
    num_heads: int  # N

    def __post_init__(self):
        if self.width % self.num_heads:
            raise UserError(
                f"{self.WHERE}.width {self.width} is no multiple of {self.WHERE}.num_heads "
                f"{self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiglipConfig(EncoderConfig):
    """Sizes of the image tower.

    Raises:
      UserError: the image is no whole number of patches, the width no whole number of heads.
    """

    WHERE: ClassVar[str] = "img"

    image_size: int  # pixels, height and width
    patch_size: int  # pixels
    # Pixels at the right and the bottom that fill no patch are left, as SigLIP So400m/14 does with
    # 6 of its 384.
    crop_to_patches: bool = False

    def __post_init__(self):
        super().__post_init__()
        if self.image_size < self.patch_size:
            raise UserError(
                f"img.image_size {self.image_size} is less than one patch of img.patch_size "
                f"{self.patch_size}; take a multiple of it"
            )
        if self.image_size % self.patch_size and not self.crop_to_patches:
            raise UserError(
                f"img.image_size {self.image_size} is no multiple of img.patch_size "
                f"{self.patch_size}; take {self.image_size // self.patch_size * self.patch_size} "
                "or another patch size"
            )

    @property
    def num_patches(self) -> int:
        """Tokens of one frame: 256 at 224 pixels with patches of 14."""
        return (self.image_size // self.patch_size) ** 2


class Attention(nnx.Module):
    """Multi-head attention with biases, everything sees everything."""

    def __init__(self, config: EncoderConfig, *, param_dtype: str, rngs: nnx.Rngs):
        D, N, H = config.width, config.num_heads, config.head_dim
        kwargs = {"param_dtype": param_dtype, "rngs": rngs}
        inwards = {"axes": ("embed", "heads", "head_dim"), **kwargs}
        self.query = layers.Projection((D,), (N, H), **inwards)
        self.key = layers.Projection((D,), (N, H), **inwards)
        self.value = layers.Projection((D,), (N, H), **inwards)
        self.out = layers.Projection((N, H), (D,), axes=("heads", "head_dim", "embed"), **kwargs)

    def __call__(self, x: jax.Array, seen: jax.Array) -> jax.Array:
        """float[B, T, D] that look at float[B, S, D], of the width that went in."""
        q = self.query(x)
        q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
        return self.out(layers.attend(q, self.key(seen), self.value(seen), mask=None))


class Mlp(nnx.Module):
    """Two layers with the tanh approximation of GELU between."""

    def __init__(self, config: EncoderConfig, *, param_dtype: str, rngs: nnx.Rngs):
        D, F = config.width, config.mlp_dim
        kwargs = {"param_dtype": param_dtype, "rngs": rngs}
        self.fc1 = layers.Projection((D,), (F,), axes=("embed", "mlp"), **kwargs)
        self.fc2 = layers.Projection((F,), (D,), axes=("mlp", "embed"), **kwargs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.fc2(jax.nn.gelu(self.fc1(x), approximate=True))


class EncoderBlock(nnx.Module):
    """Pre-norm transformer block."""

    def __init__(self, config: EncoderConfig, *, param_dtype: str, rngs: nnx.Rngs):
        self.ln1 = layers.LayerNorm(config.width, param_dtype=param_dtype)
        self.attn = Attention(config, param_dtype=param_dtype, rngs=rngs)
        self.ln2 = layers.LayerNorm(config.width, param_dtype=param_dtype)
        self.mlp = Mlp(config, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = constrain(x, "batch", "seq", "act_embed")
        y = self.ln1(x)
        out = x + self.attn(y, y)
        out = out + self.mlp(self.ln2(out))
        assert out.dtype == x.dtype
        return out


class Transformer(nnx.Module):
    """The stack of blocks, parameters stacked on axis 0, and the norm after it."""

    def __init__(self, config: EncoderConfig, *, param_dtype: str, rngs: nnx.Rngs):
        self.encoderblock = nnx.vmap(
            lambda r: EncoderBlock(config, param_dtype=param_dtype, rngs=r)
        )(rngs.split(config.depth))
        self.encoder_norm = layers.LayerNorm(config.width, param_dtype=param_dtype)

    def __call__(self, x: jax.Array, *, remat_policy: str | None = None) -> jax.Array:
        body = layers.remat(lambda x, block: (block(x), None), remat_policy)
        x, _ = jax.lax.scan(body, x, self.encoderblock)
        return self.encoder_norm(x)


class ImageEncoder(nnx.Module):
    """Frames to patch tokens of the tower's own width, D.

    Args:
      config: sizes.
      param_dtype: storage dtype.
      rngs: stream `params`.
    """

    def __init__(self, config: SiglipConfig, *, param_dtype: str, rngs: nnx.Rngs):
        D, p = config.width, config.patch_size
        self.patch_size = p
        self.embedding = layers.Projection(
            (p, p, 3),
            (D,),
            axes=("patch", "patch", "patch", "norm"),
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.pos_embedding = layers.fan_in_init(
            rngs, (1, config.num_patches, D), fan_in=D, dtype=param_dtype
        )
        self.Transformer = Transformer(config, param_dtype=param_dtype, rngs=rngs)

    def encode(self, pixels: jax.Array, *, remat_policy: str | None = None) -> jax.Array:
        """Encodes frames.

        Args:
          pixels: float[B, H, W, 3] in [-1, 1], in the compute dtype. What fills no patch at the
            right and the bottom is left.
          remat_policy: as `layers.remat`.

        Returns:
          float[B, P, D], one token per patch in row-major order.
        """
        B, height, width, C = pixels.shape
        p = self.patch_size
        rows, columns = height // p, width // p
        # A convolution whose stride is its kernel is one matrix product per patch.
        patches = pixels[:, : rows * p, : columns * p].reshape(B, rows, p, columns, p, C)
        x = self.embedding(patches.swapaxes(2, 3))
        x = x.reshape(B, -1, x.shape[-1])
        x = x + self.pos_embedding[...].astype(x.dtype)
        return self.Transformer(x, remat_policy=remat_policy)


class Siglip(ImageEncoder):
    """Frames to tokens of the language model's width.

    Args:
      config: sizes.
      out_width: width of the language model, where `head` projects to.
      param_dtype: storage dtype.
      rngs: stream `params`.
    """

    def __init__(self, config: SiglipConfig, *, out_width: int, param_dtype: str, rngs: nnx.Rngs):
        super().__init__(config, param_dtype=param_dtype, rngs=rngs)
        self.head = layers.Projection(
            (config.width,),
            (out_width,),
            axes=("norm", "embed"),
            param_dtype=param_dtype,
            rngs=rngs,
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


def resample_pos_embedding(embedding: np.ndarray, num_patches: int) -> np.ndarray:
    """Position embeddings for another picture size, as big_vision's `resample_posemb` makes them.

    Linear between the four nearest of the old grid, whose corners stay corners: of a 2 x 2 grid
    with 0, 2 / 4, 6 the middle of the 3 x 3 grid is 3.

    Args:
      embedding: float32[P, D], P square, patches row by row.
      num_patches: P of the result, square.

    Returns:
      float32[num_patches, D].
    """
    old, new = math.isqrt(embedding.shape[0]), math.isqrt(num_patches)
    assert (old**2, new**2) == (embedding.shape[0], num_patches), "grids must be square"
    grid = embedding.reshape(old, old, -1)
    return scipy.ndimage.zoom(grid, (new / old, new / old, 1), order=1).reshape(num_patches, -1)
