"""Hugging Face PaliGemma 2 tensors (names of transformers 5) to this package's parameters.

Every source tensor is matched exactly once and every parameter filled, or nothing is loaded and
all offenders are listed. From -> to, `{i}` a layer, d and D the widths of image and language tower:

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

Hugging Face pads the token table for its image token; rows from V on are dropped.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from deevisum_jax.errors import UserError
from deevisum_jax.models.paligemma2 import PaliGemma2Config, Params, abstract_params

LM_HEAD = "lm_head.weight"
EMBED_TOKENS = "model.language_model.embed_tokens.weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Converted:
    """One line of the report: a source tensor and where it went."""

    source: str
    target: str  # path of the parameter; `[i]` or `[i, j]` = the part of it
    shape: tuple[int, ...]  # of the source
    dtype: str  # of the source
    transform: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Row:
    """How one parameter is made. With `{i}` in the sources, once per layer, stacked."""

    target: str
    sources: tuple[str, ...]  # one, or the two that are stacked in front (k and v, gate and up)
    shape: tuple[int, ...]  # wanted of each source
    transform: str
    convert: Callable[[np.ndarray], np.ndarray]


def from_huggingface(
    tensors: Mapping[str, np.ndarray], config: PaliGemma2Config
) -> tuple[Params, list[Converted]]:
    """Makes parameters of a Hugging Face checkpoint's tensors.

    Args:
      tensors: by name, all of the checkpoint's.
      config: the model that they are meant for. Hugging Face has no exit heads: the result holds
        `img` and `llm` only, whatever `config.exit_layers`.

    Returns:
      Nested dictionary of numpy arrays in `config.param_dtype`, and the report, a line per tensor.

    Raises:
      UserError: tensors are missing, unknown or of another shape; lists all of them.
    """
    rows = _rows(config)
    config = dataclasses.replace(config, exit_layers=())
    offenders: list[str] = []
    report: list[Converted] = []
    params: Params = {}
    for row in rows:
        tower = config.img if row.target.startswith("img/") else config.llm
        stacked = "{i}" in row.sources[0]
        parts = []
        for i in range(tower.depth if stacked else 1):
            for j, template in enumerate(row.sources):
                source = template.format(i=i)
                part = _take(tensors, source, row, offenders)
                index = ([i] if stacked else []) + ([j] if len(row.sources) > 1 else [])
                if part is not None:
                    parts.append(part)
                    tensor = tensors[source]
                    report.append(
                        Converted(
                            source=source,
                            target=row.target + (str(index) if index else ""),
                            shape=tensor.shape,
                            dtype=str(tensor.dtype),
                            transform=row.transform,
                        )
                    )
        if not offenders:
            _put(params, row.target, parts, config)
    if LM_HEAD in tensors:
        report.append(_check_lm_head(tensors, offenders))
    matched = {line.source for line in report}
    assert len(matched) == len(report), "two rows read the same tensor"
    known_bad = {offender.split(":")[0] for offender in offenders}
    offenders += [
        f"{name}: no parameter takes it" for name in sorted(set(tensors) - matched - known_bad)
    ]
    if offenders:
        raise UserError(
            f"{len(offenders)} tensors do not fit the model; check that the variant is the "
            "checkpoint's, and that it is a PaliGemma 2 saved by transformers 5:\n  "
            + "\n  ".join(offenders)
        )
    assert jax.tree.structure(params) == jax.tree.structure(abstract_params(config))
    return params, report


def _take(
    tensors: Mapping[str, np.ndarray], source: str, row: _Row, offenders: list[str]
) -> np.ndarray | None:
    """The converted tensor; or None, and a line of offence."""
    if source not in tensors:
        offenders.append(f"{source}: missing, wanted for {row.target}")
        return None
    given, wanted = tensors[source].shape, row.shape
    # The token table may be padded.
    fits = given == wanted or (
        source == EMBED_TOKENS and given[1:] == wanted[1:] and given[0] > wanted[0]
    )
    if not fits:
        offenders.append(f"{source}: shape {given}, wanted {wanted} for {row.target}")
        return None
    return row.convert(tensors[source])


def _put(params: Params, target: str, parts: list[np.ndarray], config: PaliGemma2Config) -> None:
    """Stacks the parts into the shape of the target and hangs it into the tree."""
    *branches, name = target.split("/")
    node, abstract = params, abstract_params(config)
    for branch in branches:
        node, abstract = node.setdefault(branch, {}), abstract[branch]
    leaf = abstract[name]
    assert name not in node, f"two rows fill {target}"
    node[name] = np.stack(parts).reshape(leaf.shape).astype(jnp.dtype(leaf.dtype))


def _check_lm_head(tensors: Mapping[str, np.ndarray], offenders: list[str]) -> Converted:
    """PaliGemma ties the output table to the input table: a copy is matched by being equal."""
    head, table = tensors[LM_HEAD], tensors.get(EMBED_TOKENS)
    if table is None or head.shape != table.shape or not np.array_equal(head, table):
        offenders.append(f"{LM_HEAD}: differs from {EMBED_TOKENS}, but the two are tied here")
    return Converted(
        source=LM_HEAD,
        target="llm/embedder/input_embedding",
        shape=head.shape,
        dtype=str(head.dtype),
        transform="equal to embed_tokens, not stored twice",
    )


def _rows(config: PaliGemma2Config) -> list[_Row]:
    img, llm = config.img, config.llm
    d, D, p = img.width, llm.width, img.patch_size

    def copy(target: str, source: str, shape: tuple[int, ...]) -> _Row:
        return _Row(
            target=target, sources=(source,), shape=shape, transform="copy", convert=lambda w: w
        )

    def transposed(target: str, sources: tuple[str, ...], shape: tuple[int, int]) -> _Row:
        return _Row(
            target=target, sources=sources, shape=shape, transform="transpose", convert=np.transpose
        )

    rows = [
        _Row(
            target="img/embedding/kernel",
            sources=("model.vision_tower.embeddings.patch_embedding.weight",),
            shape=(d, 3, p, p),
            transform="transpose (2, 3, 1, 0)",
            convert=lambda w: w.transpose(2, 3, 1, 0),
        ),
        copy("img/embedding/bias", "model.vision_tower.embeddings.patch_embedding.bias", (d,)),
        copy(
            "img/pos_embedding",
            "model.vision_tower.embeddings.position_embedding.weight",
            (img.num_patches, d),
        ),
        transposed("img/head/kernel", ("model.multi_modal_projector.linear.weight",), (D, d)),
        copy("img/head/bias", "model.multi_modal_projector.linear.bias", (D,)),
        copy("llm/final_norm/scale", "model.language_model.norm.weight", (D,)),
        _Row(
            target="llm/embedder/input_embedding",
            sources=(EMBED_TOKENS,),
            shape=(llm.vocab_size, D),
            transform=f"rows [0, {llm.vocab_size})",
            convert=lambda w: w[: llm.vocab_size],
        ),
    ]
    for ours, theirs in (("scale", "weight"), ("bias", "bias")):
        rows.append(
            copy(
                f"img/Transformer/encoder_norm/{ours}",
                f"model.vision_tower.post_layernorm.{theirs}",
                (d,),
            )
        )
        rows += [
            copy(
                f"img/Transformer/encoderblock/ln{n}/{ours}",
                f"model.vision_tower.encoder.layers.{{i}}.layer_norm{n}.{theirs}",
                (d,),
            )
            for n in (1, 2)
        ]

    block, layer = "img/Transformer/encoderblock", "model.vision_tower.encoder.layers.{i}"
    N, H, F = img.num_heads, img.head_dim, img.mlp_dim
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        rows += [
            _Row(
                target=f"{block}/attn/{ours}/kernel",
                sources=(f"{layer}.self_attn.{theirs}.weight",),
                shape=(N * H, d),
                transform="transpose, split heads",
                convert=lambda w: w.T.reshape(d, N, H),
            ),
            _Row(
                target=f"{block}/attn/{ours}/bias",
                sources=(f"{layer}.self_attn.{theirs}.bias",),
                shape=(N * H,),
                transform="split heads",
                convert=lambda b: b.reshape(N, H),
            ),
        ]
    rows += [
        _Row(
            target=f"{block}/attn/out/kernel",
            sources=(f"{layer}.self_attn.out_proj.weight",),
            shape=(d, N * H),
            transform="transpose, split heads",
            convert=lambda w: w.T.reshape(N, H, d),
        ),
        copy(f"{block}/attn/out/bias", f"{layer}.self_attn.out_proj.bias", (d,)),
        transposed(f"{block}/mlp/fc1/kernel", (f"{layer}.mlp.fc1.weight",), (F, d)),
        copy(f"{block}/mlp/fc1/bias", f"{layer}.mlp.fc1.bias", (F,)),
        transposed(f"{block}/mlp/fc2/kernel", (f"{layer}.mlp.fc2.weight",), (d, F)),
        copy(f"{block}/mlp/fc2/bias", f"{layer}.mlp.fc2.bias", (d,)),
    ]

    block, layer = "llm/layers", "model.language_model.layers.{i}"

    def split_heads(w: np.ndarray) -> np.ndarray:
        """[N * H, D] -> [N, D, H]."""
        return w.reshape(-1, llm.head_dim, D).transpose(0, 2, 1)

    rows += [
        _Row(
            target=f"{block}/attn/q_einsum/w",
            sources=(f"{layer}.self_attn.q_proj.weight",),
            shape=(llm.num_heads * llm.head_dim, D),
            transform="split heads, transpose",
            convert=split_heads,
        ),
        _Row(
            target=f"{block}/attn/kv_einsum/w",
            sources=(f"{layer}.self_attn.k_proj.weight", f"{layer}.self_attn.v_proj.weight"),
            shape=(llm.num_kv_heads * llm.head_dim, D),
            transform="split heads, transpose",
            convert=split_heads,
        ),
        _Row(
            target=f"{block}/attn/attn_vec_einsum/w",
            sources=(f"{layer}.self_attn.o_proj.weight",),
            shape=(D, llm.num_heads * llm.head_dim),
            transform="transpose, split heads",
            convert=lambda w: w.T.reshape(llm.num_heads, llm.head_dim, D),
        ),
        transposed(
            f"{block}/mlp/gating_einsum",
            (f"{layer}.mlp.gate_proj.weight", f"{layer}.mlp.up_proj.weight"),
            (llm.mlp_dim, D),
        ),
        transposed(f"{block}/mlp/linear", (f"{layer}.mlp.down_proj.weight",), (D, llm.mlp_dim)),
    ]
    rows += [
        copy(f"{block}/{ours}/scale", f"{layer}.{theirs}.weight", (D,))
        for ours, theirs in (
            ("pre_attention_norm", "input_layernorm"),
            ("post_attention_norm", "post_attention_layernorm"),
            ("pre_ffw_norm", "pre_feedforward_layernorm"),
            ("post_ffw_norm", "post_feedforward_layernorm"),
        )
    ]
    return rows
