"""PEFT's names and files: low-rank adapters to what `peft.PeftModel.from_pretrained` loads.

From -> to, `{i}` a layer, r the rank, the other letters as in `huggingface`; a weight `<path>` has
the adapters `<path>_lora_a` and `<path>_lora_b`, and PEFT has `<module>.lora_A.weight` and
`<module>.lora_B.weight`, each name with `base_model.model.` in front. The modules are those of
transformers 5:

    llm/layers                                  model.language_model.layers.{i}
      /attn/q_einsum/w_lora_a [L, D, r]           .self_attn.q_proj.lora_A [r, D]
      /attn/q_einsum/w_lora_b [L, r, N, H]        .self_attn.q_proj.lora_B [NH, r]
      /attn/kv_einsum/w_lora_a [L, 2, D, r]       .self_attn.{k,v}_proj.lora_A [r, D]
      /attn/kv_einsum/w_lora_b [L, 2, r, K, H]    .self_attn.{k,v}_proj.lora_B [KH, r]
      /attn/attn_vec_einsum/w_lora_a [L, N, H, r] .self_attn.o_proj.lora_A [r, NH]
      /attn/attn_vec_einsum/w_lora_b [L, r, D]    .self_attn.o_proj.lora_B [D, r]
      /mlp/gating_einsum_lora_a [L, 2, D, r]      .mlp.{gate,up}_proj.lora_A [r, D]
      /mlp/gating_einsum_lora_b [L, 2, r, F]      .mlp.{gate,up}_proj.lora_B [F, r]
      /mlp/linear_lora_a [L, F, r]                .mlp.down_proj.lora_A [r, F]
      /mlp/linear_lora_b [L, r, D]                .mlp.down_proj.lora_B [D, r]
    img/Transformer/encoderblock                model.vision_tower.encoder.layers.{i}
      /attn/{query,key,value}/kernel_lora_a [L, d, r]     .self_attn.{q,k,v}_proj.lora_A [r, d]
      /attn/{query,key,value}/kernel_lora_b [L, r, N, H]  .self_attn.{q,k,v}_proj.lora_B [NH, r]

Both add `(alpha / r) B A x`.
"""

from __future__ import annotations

from typing import Any

from deevisum_jax.convert.rows import Row
from deevisum_jax.models.paligemma2 import PaliGemma2Config

ADAPTER_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
HEADS_FILE = "exits.safetensors"  # exit heads, which PEFT has no place for
SECTION_FILE = "deevisum.json"  # what modeling_deevisum.py needs to know; there is no config.json

_PREFIX = "base_model.model."
_LLM_LAYERS = "model.language_model.layers"
_IMG_LAYERS = "model.vision_tower.encoder.layers"
# A string is a regular expression of whole names; a list of their ends would also hit the other
# tower's q_proj.
_TARGETS = {
    "llm": r"model\.language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
    "img": r"model\.vision_tower\.encoder\.layers\.\d+\.self_attn\.[qkv]_proj",
}


def adapter_rows(config: PaliGemma2Config) -> list[Row]:
    """The table of a model's adapters, in the names of a PEFT file; `config.lora` says which."""
    rows = []
    if "llm" in config.lora.towers:
        rows += _llm_rows(config)
    if "img" in config.lora.towers:
        rows += _img_rows(config)
    return rows


def adapter_config(config: PaliGemma2Config, base: str) -> dict[str, Any]:
    """The content of adapter_config.json.

    Args:
      config: the model's; `config.lora` is there.
      base: path or name on the Hub of the model that the adapter belongs to.
    """
    lora = config.lora
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": alpha,
        "target_modules": "|".join(_TARGETS[tower] for tower in _TARGETS if tower in lora.towers),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "inference_mode": True,
    }


def _llm_rows(config: PaliGemma2Config) -> list[Row]:
    llm, r = config.llm, config.lora.rank
    D, N, K, H, F = llm.width, llm.num_heads, llm.num_kv_heads, llm.head_dim, llm.mlp_dim
    rows: list[Row] = []
    for path, modules, num_heads in (
        ("attn/q_einsum/w", ("self_attn.q_proj",), N),
        ("attn/kv_einsum/w", ("self_attn.k_proj", "self_attn.v_proj"), K),
    ):
        rows += _into_heads(f"llm/layers/{path}", _names(_LLM_LAYERS, modules), D, num_heads, H, r)
    target, (a, b) = "llm/layers/attn/attn_vec_einsum/w", _names(_LLM_LAYERS, ("self_attn.o_proj",))
    rows += [
        Row(
            target=f"{target}_lora_a",
            sources=a,
            shape=(r, N * H),
            split=(r, N, H),
            order=(1, 2, 0),
        ),
        Row(target=f"{target}_lora_b", sources=b, shape=(D, r), order=(1, 0)),
    ]
    for path, modules, width, out in (
        ("mlp/gating_einsum", ("mlp.gate_proj", "mlp.up_proj"), D, F),
        ("mlp/linear", ("mlp.down_proj",), F, D),
    ):
        target, (a, b) = f"llm/layers/{path}", _names(_LLM_LAYERS, modules)
        rows += [
            Row(target=f"{target}_lora_a", sources=a, shape=(r, width), order=(1, 0)),
            Row(target=f"{target}_lora_b", sources=b, shape=(out, r), order=(1, 0)),
        ]
    return rows


def _img_rows(config: PaliGemma2Config) -> list[Row]:
    img, rows = config.img, []
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        rows += _into_heads(
            f"img/Transformer/encoderblock/attn/{ours}/kernel",
            _names(_IMG_LAYERS, (f"self_attn.{theirs}",)),
            img.width,
            img.num_heads,
            img.head_dim,
            config.lora.rank,
        )
    return rows


def _into_heads(
    target: str, names: tuple[tuple[str, ...], tuple[str, ...]], D: int, N: int, H: int, r: int
) -> list[Row]:
    """Both adapters of a weight from the width D to N heads of H."""
    a, b = names
    return [
        Row(target=f"{target}_lora_a", sources=a, shape=(r, D), order=(1, 0)),
        Row(
            target=f"{target}_lora_b", sources=b, shape=(N * H, r), split=(N, H, r), order=(2, 0, 1)
        ),
    ]


def _names(layers: str, modules: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """PEFT's names of the two matrices of each module, in every layer."""
    return tuple(
        tuple(f"{_PREFIX}{layers}.{{i}}.{module}.{matrix}.weight" for module in modules)
        for matrix in ("lora_A", "lora_B")
    )
