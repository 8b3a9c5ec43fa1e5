"""Hugging Face's names: PaliGemma 2 tensors to this package's parameters, and back.

Tables are written in the names of transformers 5; `canonical` brings those of 4.47, which Google's
released files have, to them, and `released_name` turns them back. From -> to, `{i}` a
layer, d and D the widths of image and language tower:

    model.vision_tower.embeddings
      .patch_embedding.weight [d, 3, p, p]        img/embedding/kernel [p, p, 3, d]
      .patch_embedding.bias [d]                   img/embedding/bias [d]
      .position_embedding.weight [P, d]           img/pos_embedding [1, P, d]
    model.vision_tower.encoder.layers.{i}         img/Transformer/encoderblock
      .layer_norm{1,2}.{weight,bias} [d]          /ln{1,2}/{scale,bias} [L, d]
      .self_attn.{q,k,v}_proj.weight [NH, d]      /attn/{query,key,value}/kernel [L, d, N, H]
      .self_attn.{q,k,v}_proj.bias [NH]           /attn/{query,key,value}/bias [L, N, H]
      .self_attn.out_proj.weight [d, NH]          /attn/out/kernel [L, N, H, d]
      .self_attn.out_proj.bias [d]                /attn/out/bias [L, d]
      .mlp.fc{1,2}.weight [out, in]               /mlp/fc{1,2}/kernel [L, in, out]
      .mlp.fc{1,2}.bias [out]                     /mlp/fc{1,2}/bias [L, out]
    model.vision_tower.post_layernorm.{weight,bias} [d]
                                                  img/Transformer/encoder_norm/{scale,bias} [d]
    model.multi_modal_projector.linear.weight [D, d]  img/head/kernel [d, D]
    model.multi_modal_projector.linear.bias [D]   img/head/bias [D]
    model.language_model
      .embed_tokens.weight [V or more, D]         llm/embedder/input_embedding [V, D]
      .norm.weight [D]                            llm/final_norm/scale [D]
    model.language_model.layers.{i}               llm/layers
      .self_attn.q_proj.weight [NH, D]            /attn/q_einsum/w [L, N, D, H]
      .self_attn.{k,v}_proj.weight [KH, D]        /attn/kv_einsum/w [L, 2, K, D, H]
      .self_attn.o_proj.weight [D, NH]            /attn/attn_vec_einsum/w [L, N, H, D]
      .mlp.{gate,up}_proj.weight [F, D]           /mlp/gating_einsum [L, 2, D, F]
      .mlp.down_proj.weight [D, F]                /mlp/linear [L, F, D]
      .input_layernorm.weight [D]                 /pre_attention_norm/scale [L, D], no +1
      .post_attention_layernorm.weight [D]        /post_attention_norm/scale [L, D]
      .pre_feedforward_layernorm.weight [D]       /pre_ffw_norm/scale [L, D]
      .post_feedforward_layernorm.weight [D]      /post_ffw_norm/scale [L, D]
    lm_head.weight                                the same as embed_tokens, checked

The names of 4.47: `vision_tower.vision_model.*`, `multi_modal_projector.*`,
`language_model.model.*`, `language_model.lm_head.weight`. Hugging Face pads the token table for its
image token; our vocabulary ends before that.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from deevisum_jax.convert.rows import Row
from deevisum_jax.convert.tensors import Tensor
from deevisum_jax.errors import UserError
from deevisum_jax.models.paligemma2 import PaliGemma2Config, Params, abstract_params
from deevisum_jax.models.siglip import EncoderConfig, SiglipConfig

LM_HEAD = "lm_head.weight"
EMBED_TOKENS = "model.language_model.embed_tokens.weight"
# Rows behind the vocabulary, for the image token and to a round number.
MAX_PADDING = 128

# Any generation's beginning of a name -> that of transformers 5.
_CANONICAL = (
    (r"(model\.)?vision_tower\.(vision_model\.)?", "model.vision_tower."),
    (r"(model\.)?multi_modal_projector\.", "model.multi_modal_projector."),
    (r"model\.language_model\.|language_model\.model\.", "model.language_model."),
    (r"(language_model\.)?lm_head\.", "lm_head."),
)
# That of transformers 5 -> that of 4.47.
_RELEASED = (
    ("model.vision_tower.", "vision_tower.vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.language_model.", "language_model.model."),
)


def canonical(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under the names of transformers 5, which tables use.

    Returns:
      The tensors, and the file's own name of each.

    Raises:
      UserError: two tensors are the same one under names of two generations.
    """
    renamed: dict[str, Tensor] = {}
    own_names: dict[str, str] = {}
    offenders = []
    for name, tensor in tensors.items():
        new = name
        for pattern, prefix in _CANONICAL:
            if found := re.match(pattern, name):
                new = prefix + name[found.end() :]
                break
        if new in renamed:
            offenders.append(f"{own_names[new]} and {name}")
        renamed[new], own_names[new] = tensor, name
    if offenders:
        raise UserError(
            "the checkpoint names the same tensors twice, in two generations' words; keep one of "
            "each:\n  " + "\n  ".join(offenders)
        )
    return renamed, own_names


def released_name(name: str) -> str:
    """The name in Google's released files, which every transformers since 4.47 reads."""
    for ours, theirs in _RELEASED:
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name  # an exit head's


def tie(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], Tensor | None]:
    """Takes a separate output table out; `check_tied` compares it with the input table.

    Args:
      tensors: under the names of transformers 5.

    Returns:
      The tensors without `lm_head`, and that one, if both are there.
    """
    if LM_HEAD not in tensors:
        return dict(tensors), None
    rest = {name: tensor for name, tensor in tensors.items() if name != LM_HEAD}
    if EMBED_TOKENS not in tensors:
        # Of tensors that share memory only one is stored.
        return rest | {EMBED_TOKENS: tensors[LM_HEAD]}, None
    return rest, tensors[LM_HEAD]


def check_tied(head: Tensor, table: Tensor) -> None:
    """Reads both tables.

    Raises:
      UserError: they differ.
    """
    same = head.shape == table.shape and head.dtype == table.dtype
    if not same or not all(
        np.array_equal(a.view(np.uint8), b.view(np.uint8))
        for a, b in zip(head.slabs(), table.slabs(), strict=True)
    ):
        raise UserError(
            f"{LM_HEAD}{f' (in {head.file})' if head.file else ''} differs from {EMBED_TOKENS}, "
            "but PaliGemma 2 ties the two; this is another model, or one that was trained with the "
            "tie cut, which cannot be loaded"
        )


def padding_rows(tensors: Mapping[str, Tensor], config: PaliGemma2Config) -> np.ndarray | None:
    """What stands behind the vocabulary in the token table, [rows, D]; None if nothing.

    The model never reads it. It is kept to be exported again with the weights.

    Args:
      tensors: under the names of transformers 5.
      config: of a model that they fit.
    """
    table, V = tensors[EMBED_TOKENS], config.llm.vocab_size
    found, done = [], 0
    for slab in table.slabs():
        if done + len(slab) > V:
            found.append(slab[max(0, V - done) :].copy())
        done += len(slab)
    return np.concatenate(found) if found else None


def mean_rows(params: Params, count: int) -> np.ndarray:
    """Rows to stand behind a vocabulary that came without any, [count, D].

    Hugging Face's own conversion draws them close around the mean row. The mean row itself has the
    mean of all logits, so that greedy decoding never picks it.
    """
    table = params["llm"]["embedder"]["input_embedding"]
    mean = jnp.mean(jnp.asarray(table), axis=0, dtype=jnp.float32).astype(table.dtype)
    return np.tile(np.asarray(mean), (count, 1))


def padded(tensors: Mapping[str, Tensor], rows: np.ndarray) -> dict[str, Tensor]:
    """The tensors with `rows` behind the token table."""
    return {**tensors, EMBED_TOKENS: _Padded(tensors[EMBED_TOKENS], rows)}


@dataclasses.dataclass(frozen=True)
class _Padded:
    """A tensor with more rows behind it."""

    tensor: Tensor
    rows: np.ndarray
    file: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.tensor.shape[0] + len(self.rows), *self.tensor.shape[1:])

    @property
    def dtype(self) -> np.dtype:
        return self.tensor.dtype

    def slabs(self, unit: int = 1) -> Iterator[np.ndarray]:
        assert self.tensor.shape[0] % unit == len(self.rows) % unit == 0, f"{unit=}"
        yield from self.tensor.slabs(unit)
        yield np.ascontiguousarray(self.rows.astype(self.dtype))


def paligemma2_rows(config: PaliGemma2Config) -> list[Row]:
    """The table of a PaliGemma 2, in the names of transformers 5; without exit heads."""
    img, llm = config.img, config.llm
    d, D, N, K, H = img.width, llm.width, llm.num_heads, llm.num_kv_heads, llm.head_dim
    tower, projector = "model.vision_tower", "model.multi_modal_projector.linear"
    block, layer = "llm/layers", "model.language_model.layers.{i}"

    def heads(target: str, names: tuple[str, ...], num_heads: int) -> Row:
        return Row(
            target=f"{block}/attn/{target}/w",
            sources=tuple(f"{layer}.self_attn.{name}.weight" for name in names),
            shape=(num_heads * H, D),
            split=(num_heads, H, D),
            order=(0, 2, 1),
        )

    rows = [
        *image_rows("img", tower, img),
        transposed("img/head/kernel", f"{projector}.weight", (D, d)),
        Row(target="img/head/bias", sources=(f"{projector}.bias",), shape=(D,)),
        Row(
            target="llm/embedder/input_embedding",
            sources=(EMBED_TOKENS,),
            shape=(llm.vocab_size, D),
            max_padding=MAX_PADDING,
        ),
        Row(
            target="llm/final_norm/scale", sources=("model.language_model.norm.weight",), shape=(D,)
        ),
        heads("q_einsum", ("q_proj",), N),
        heads("kv_einsum", ("k_proj", "v_proj"), K),
        Row(
            target=f"{block}/attn/attn_vec_einsum/w",
            sources=(f"{layer}.self_attn.o_proj.weight",),
            shape=(D, N * H),
            split=(D, N, H),
            order=(1, 2, 0),
        ),
        Row(
            target=f"{block}/mlp/gating_einsum",
            sources=(f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"),
            shape=(llm.mlp_dim, D),
            order=(1, 0),
        ),
        transposed(f"{block}/mlp/linear", f"{layer}.mlp.down_proj.weight", (D, llm.mlp_dim)),
    ]
    for ours, theirs in (
        ("pre_attention_norm", "input_layernorm"),
        ("post_attention_norm", "post_attention_layernorm"),
        ("pre_ffw_norm", "pre_feedforward_layernorm"),
        ("post_ffw_norm", "post_feedforward_layernorm"),
    ):
        rows.append(
            Row(target=f"{block}/{ours}/scale", sources=(f"{layer}.{theirs}.weight",), shape=(D,))
        )
    return rows


def exit_rows(config: PaliGemma2Config) -> list[Row]:
    """The table of our exit heads as exports carry them: our own layout, dots for slashes.

    `exits.norm.scale [X, D]`, `exits.{classifier,importance}.{kernel,bias}` and
    `exits.prototype [X, D]`.
    """
    return [
        Row(target=path, sources=(path.replace("/", "."),), shape=leaf.shape)
        for path, leaf in flatten_dict(abstract_params(config), sep="/").items()
        if path.startswith("exits/")
    ]


def image_rows(target: str, source: str, config: SiglipConfig) -> list[Row]:
    """Patches, positions and layers of a SigLIP image tower."""
    D, p = config.width, config.patch_size
    return [
        Row(
            target=f"{target}/embedding/kernel",
            sources=(f"{source}.embeddings.patch_embedding.weight",),
            shape=(D, 3, p, p),
            order=(2, 3, 1, 0),
        ),
        Row(
            target=f"{target}/embedding/bias",
            sources=(f"{source}.embeddings.patch_embedding.bias",),
            shape=(D,),
        ),
        Row(
            target=f"{target}/pos_embedding",
            sources=(f"{source}.embeddings.position_embedding.weight",),
            shape=(config.num_patches, D),
            split=(1, config.num_patches, D),
            resample=True,
        ),
        *encoder_rows(f"{target}/Transformer", source, "post_layernorm", config),
    ]


def encoder_rows(target: str, source: str, last_norm: str, config: EncoderConfig) -> list[Row]:
    """The layers of a SigLIP tower and the norm behind them, called `last_norm` there."""
    D, N, H, F = config.width, config.num_heads, config.head_dim, config.mlp_dim
    block, layer = f"{target}/encoderblock", f"{source}.encoder.layers.{{i}}"
    rows = []
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        norms = {
            f"{target}/encoder_norm/{ours}": f"{source}.{last_norm}.{theirs}",
            f"{block}/ln1/{ours}": f"{layer}.layer_norm1.{theirs}",
            f"{block}/ln2/{ours}": f"{layer}.layer_norm2.{theirs}",
        }
        rows += [Row(target=path, sources=(name,), shape=(D,)) for path, name in norms.items()]
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        path, name = f"{block}/attn/{ours}", f"{layer}.self_attn.{theirs}"
        rows += [
            Row(
                target=f"{path}/kernel",
                sources=(f"{name}.weight",),
                shape=(N * H, D),
                split=(N, H, D),
                order=(2, 0, 1),
            ),
            Row(target=f"{path}/bias", sources=(f"{name}.bias",), shape=(N * H,), split=(N, H)),
        ]
    return [
        *rows,
        Row(
            target=f"{block}/attn/out/kernel",
            sources=(f"{layer}.self_attn.out_proj.weight",),
            shape=(D, N * H),
            split=(D, N, H),
            order=(1, 2, 0),
        ),
        Row(
            target=f"{block}/attn/out/bias",
            sources=(f"{layer}.self_attn.out_proj.bias",),
            shape=(D,),
        ),
        transposed(f"{block}/mlp/fc1/kernel", f"{layer}.mlp.fc1.weight", (F, D)),
        Row(target=f"{block}/mlp/fc1/bias", sources=(f"{layer}.mlp.fc1.bias",), shape=(F,)),
        transposed(f"{block}/mlp/fc2/kernel", f"{layer}.mlp.fc2.weight", (D, F)),
        Row(target=f"{block}/mlp/fc2/bias", sources=(f"{layer}.mlp.fc2.bias",), shape=(D,)),
    ]


def transposed(target: str, source: str, shape: tuple[int, int]) -> Row:
    """A torch linear layer [out, in] and a kernel [in, out]."""
    return Row(target=target, sources=(source,), shape=shape, order=(1, 0))
