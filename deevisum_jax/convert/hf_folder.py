"""What lies around the weights in a Hugging Face folder of PaliGemma 2, written and read.

Written are config.json, generation_config.json, preprocessor_config.json, the tokenizer's files and
a model card, so that transformers (from 4.47, the first with PaliGemma 2; `layer_types` from 4.53)
builds this package's model, images and prompts included. Read are config.json and
preprocessor_config.json of any folder, of which 4.47 left most out and 5 leaves little; what is not
said has the default of transformers' `Gemma2Config` and `SiglipVisionConfig`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jinja2

from deevisum_jax.convert import tokenizer_json
from deevisum_jax.data.tokenizer import BOS, EOS, PAD, UNK, Tokenizer, save_tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.files import write_whole
from deevisum_jax.models.paligemma2 import PaliGemma2Config

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
PREPROCESSOR_CONFIG = "preprocessor_config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_MODEL = "tokenizer.model"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
PROCESSOR_CONFIG = "processor_config.json"  # what transformers 5 writes instead
MODEL_CARD = "README.md"
HEADS_FILE = "deevisum_heads.safetensors"  # exit heads, beside the weights and not among them
MODELING_FILE = "modeling_deevisum.py"

DEEVISUM_FORMAT = 2  # of config.json's section and of HEADS_FILE
NOTICE = "NOTICE"

GEMMA_TERMS_URL = "https://ai.google.dev/gemma/terms"
# Section 3.1 of the terms asks for this sentence, in a text file beside the weights.
GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms"
)

# How model cards call the confidences of `inference.exit_policy`.
_CONFIDENCE_WORDS = {
    "max_probability": "the probability of the likelier of the two classes",
    "entropy": "1 less the entropy of the two classes in bits",
    "cosine": "the cosine to the prototype of the summary class, without its sign",
    "agreement": "1 less what the probability of the summary class or the importance, the more of "
    "the two, has changed since the exit before",
}

# PIL's codes of the ways to resize that the data pipeline has.
RESAMPLE = {"bilinear": 2, "bicubic": 3}

_MASK = "<mask>"
_ACTIVATION = "gelu_pytorch_tanh"
_EPS = 1e-6
_ROPE_THETA = 10_000.0
_WINDOW = 4096  # Gemma 2's, as a number; whether layers use it is said by `layer_types`
_LOCAL, _GLOBAL = "sliding_attention", "full_attention"

# Our field -> theirs, with the default of the class of transformers (4.57 and 5.23 agree).
_LLM_SIZES = {  # models/gemma2/configuration_gemma2.py, Gemma2Config
    "width": ("hidden_size", 2304),
    "depth": ("num_hidden_layers", 26),
    "mlp_dim": ("intermediate_size", 9216),
    "num_heads": ("num_attention_heads", 8),
    "num_kv_heads": ("num_key_value_heads", 4),
    "head_dim": ("head_dim", 256),
    "query_pre_attn_scalar": ("query_pre_attn_scalar", 256),
}
_IMG_SIZES = {  # models/siglip/configuration_siglip.py, SiglipVisionConfig
    "patch_size": ("patch_size", 16),
    "width": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "mlp_dim": ("intermediate_size", 3072),
    "num_heads": ("num_attention_heads", 12),
}
_REALS = ("query_pre_attn_scalar",)  # sizes that need not be whole
_IMAGE_SIZE = 224
_IMAGE_TOKEN = 256_000  # models/paligemma/configuration_paligemma.py, PaliGemmaConfig
_PADDED_VOCAB = 256_000
_FINAL_SOFTCAP = 30.0
_ATTN_SOFTCAP = 50.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Facts:
    """What a folder says of its model."""

    sizes: Mapping[str, float]  # as `sizes_of` gives them
    image_size: int  # pixels, height and width
    final_logits_softcap: float  # 0 = none
    sliding_window: int | None  # of layers 0, 2, 4, ...; None = every layer is global
    resize: str  # key of `RESAMPLE`
    padded_vocab: int  # rows of the token table
    image_token: int  # id of `<image>`: 257152, the first behind PaliGemma's pieces


def sizes_of(config: PaliGemma2Config) -> dict[str, float]:
    """The sizes that weights are bound to, for comparing with `Facts.sizes`.

    `llm.width`, `img.depth` and so on; not the image size, for position embeddings can be
    resampled, and not the vocabulary, which is padded.
    """
    return {
        f"{tower}.{field}": getattr(getattr(config, tower), field)
        for tower, fields in (("img", _IMG_SIZES), ("llm", _LLM_SIZES))
        for field in fields
    }


def hf_config(
    config: PaliGemma2Config,
    *,
    image_token: int,
    padded_vocab: int,
    dtype: str,
    deevisum: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The content of config.json.

    Args:
      config: sizes and switches.
      image_token: id of `<image>`.
      padded_vocab: rows of the token table as it is written, `<image>` among them.
      dtype: of the weights as they are written, such as `bfloat16`.
      deevisum: what modeling_deevisum.py needs to know; None = an export without exit heads.
    """
    img, llm = config.img, config.llm
    assert image_token < padded_vocab, f"{image_token=} has no row among {padded_vocab}"
    local = [_LOCAL if is_local else _GLOBAL for is_local in llm.is_local]
    written = {
        "architectures": ["PaliGemmaForConditionalGeneration"],
        "model_type": "paligemma",
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "hidden_size": llm.width,
        "projection_dim": llm.width,
        "image_token_index": image_token,
        "vocab_size": padded_vocab,
        "tie_word_embeddings": True,
        "torch_dtype": dtype,  # both 4 and 5 read it; 5 calls it dtype
        "text_config": {
            "model_type": "gemma2",
            "vocab_size": padded_vocab,
            **{theirs: _number(getattr(llm, ours)) for ours, (theirs, _) in _LLM_SIZES.items()},
            "hidden_activation": _ACTIVATION,
            "rms_norm_eps": _EPS,
            "rope_theta": _ROPE_THETA,
            "attention_bias": False,
            "attn_logit_softcapping": llm.attn_logits_softcap or None,
            "final_logit_softcapping": llm.final_logits_softcap or None,
            "sliding_window": llm.sliding_window or _WINDOW,
            "layer_types": local,
            "num_image_tokens": img.num_patches,
            "tie_word_embeddings": True,
            "torch_dtype": dtype,
        },
        "vision_config": {
            "model_type": "siglip_vision_model",
            "image_size": img.image_size,
            **{theirs: getattr(img, ours) for ours, (theirs, _) in _IMG_SIZES.items()},
            "hidden_act": _ACTIVATION,
            "layer_norm_eps": _EPS,
            "num_channels": 3,
            "num_image_tokens": img.num_patches,
            "projection_dim": llm.width,
            "vision_use_head": False,
            "torch_dtype": dtype,
        },
    }
    if deevisum is not None:
        written["auto_map"] = {"AutoModel": "modeling_deevisum.DeevisumModel"}
        written["deevisum"] = dict(deevisum)
    return written


def config_facts(
    config_json: Mapping[str, Any],
    preprocessor: Mapping[str, Any] | None,
    folder: str | os.PathLike[str] = "",
) -> Facts:
    """Reads config.json, and how images are prepared.

    Args:
      config_json: content of config.json, as transformers 4.47 or any later wrote it.
      preprocessor: content of preprocessor_config.json, or of processor_config.json, where
        transformers 5 puts the same; None = there is neither.
      folder: where they lie, for messages.

    Raises:
      UserError: this is no PaliGemma 2, or one that computes what our model does not; names the
        file, the field and what it should be.
    """
    top = _Section(pathlib.Path(folder) / CONFIG, "", config_json)
    for field in ("model_type", "text_config", "vision_config"):
        if config_json.get(field) is None:
            raise UserError(f"{top.file} has no {field}; use the folder of a PaliGemma 2")
    top.demand("model_type", "paligemma")
    text, vision = top.section("text_config"), top.section("vision_config")
    if text.get("model_type", "gemma") == "gemma":
        raise UserError(
            f"{top.file}: text_config.model_type is gemma, so this is the first PaliGemma, whose "
            "language model is another; use a PaliGemma 2, for instance google/paligemma2-3b-pt-224"
        )
    text.demand("model_type", "gemma2")
    text.demand("hidden_activation", _ACTIVATION)
    text.demand("rms_norm_eps", _EPS)
    text.demand("attn_logit_softcapping", _ATTN_SOFTCAP)
    text.demand("attention_bias", False)
    text.demand("rope_scaling", None)
    # Version 5 has put it into a section of its own.
    rope = text.section("rope_parameters")
    rope.demand("rope_type", "default")
    rope.demand("rope_theta", _ROPE_THETA)
    text.demand("rope_theta", _ROPE_THETA)
    if text.get("use_bidirectional_attention", None) is not None:  # None: PaliGemma sets it
        text.demand("use_bidirectional_attention", True)
    vision.demand("model_type", "siglip_vision_model")
    vision.demand("hidden_act", _ACTIVATION)
    vision.demand("layer_norm_eps", _EPS)
    vision.demand("num_channels", 3)
    sizes = {
        f"{tower}.{ours}": (section.number if ours in _REALS else section.count)(theirs, default)
        for tower, section, fields in (("img", vision, _IMG_SIZES), ("llm", text, _LLM_SIZES))
        for ours, (theirs, default) in fields.items()
    }
    image_size = vision.count("image_size", _IMAGE_SIZE)
    capped = text.get("final_logit_softcapping", _FINAL_SOFTCAP) is not None
    return Facts(
        sizes=sizes,
        image_size=image_size,
        final_logits_softcap=(
            float(text.number("final_logit_softcapping", _FINAL_SOFTCAP)) if capped else 0.0
        ),
        sliding_window=_sliding_window(text, sizes["llm.depth"]),
        resize=_resize(preprocessor, image_size, pathlib.Path(folder) / PREPROCESSOR_CONFIG),
        padded_vocab=text.count("vocab_size", _PADDED_VOCAB),
        image_token=top.count(
            "image_token_id" if "image_token_id" in config_json else "image_token_index",
            _IMAGE_TOKEN,
        ),
    )


def check_deevisum(section: Any, file: str | os.PathLike[str]) -> None:
    """Makes sure that config.json's section on exits is one that exports write.

    Raises:
      UserError: it is not.
    """
    layers, policy = (
        (section.get("exit_layers"), section.get("exit_policy"))
        if isinstance(section, Mapping)
        else (None, None)
    )
    thresholds = policy.get("thresholds") if isinstance(policy, Mapping) else None
    if (
        not isinstance(layers, list)
        or not layers
        or not all(type(layer) is int for layer in layers)
        or section.get("format") != DEEVISUM_FORMAT
        or not isinstance(thresholds, list)
        or len(thresholds) != len(layers) - 1
        or not all(t is None or type(t) in (int, float) for t in thresholds)
        or policy.get("confidence") not in tuple(_CONFIDENCE_WORDS)
    ):
        raise UserError(
            f"{os.fspath(file)}: its section deevisum is damaged or of another version; export the "
            "run again"
        )


def generation_config(first_padding: int, table_rows: int) -> dict[str, Any]:
    """The content of generation_config.json: greedy, until EOS, and only ids that our model has.

    Args:
      first_padding: rows of our model's token table, and so the first id that it does not have.
      table_rows: of the token table as it is written, `padded_vocab` or more.
    """
    written: dict[str, Any] = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
    if padding := list(range(first_padding, table_rows)):
        # Transformers has logits for rows of padding, too, and nobody trained them to be low.
        written["suppress_tokens"] = padding
    return written


def preprocessor_config(config: PaliGemma2Config, *, resize: str) -> dict[str, Any]:
    """The content of preprocessor_config.json: resized without regard to shape, then [-1, 1].

    `PaliGemmaProcessor` gives the very pixels of PIL's resize, if it runs on PIL (`backend="pil"`).
    On torchvision, its choice where that is installed, a few in a thousand differ by 1 of 255.

    Args:
      config: for the image's size and number of tokens.
      resize: key of `RESAMPLE`.
    """
    size = config.img.image_size
    return {
        "processor_class": "PaliGemmaProcessor",
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": size, "width": size},
        "resample": RESAMPLE[resize],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "image_seq_length": config.img.num_patches,
    }


def tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of tokenizer_config.json, which goes with `tokenizer_json.to_tokenizer_json`."""
    return {
        "tokenizer_class": "GemmaTokenizer",
        "processor_class": "PaliGemmaProcessor",
        **special_tokens_map(),
        # Left to itself, transformers 5 adds a <mask> where there is none, behind <image> and
        # behind the rows of the token table. PaliGemma's own file has one, as id 4.
        "mask_token": _MASK if tokenizer.processor.piece_to_id(_MASK) != UNK else None,
        "add_bos_token": True,
        "add_eos_token": False,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        "model_max_length": 10**30,  # transformers' way to say that there is none
    }


def special_tokens_map() -> dict[str, Any]:
    """The content of special_tokens_map.json, which transformers 4 reads."""
    special = tokenizer_json.SPECIAL
    return {
        "bos_token": special[BOS],
        "eos_token": special[EOS],
        "pad_token": special[PAD],
        "unk_token": special[UNK],
        "additional_special_tokens": [tokenizer_json.IMAGE],
    }


def padded_vocab(config: PaliGemma2Config, tokenizer: Tokenizer) -> int:
    """Rows of the token table with `<image>`: 257,216 for PaliGemma's 257,152, a multiple of 64."""
    return -(-max(config.llm.vocab_size, tokenizer.vocab_size + 1) // 64) * 64


def model_card(
    config: PaliGemma2Config,
    *,
    title: str,
    deevisum: Mapping[str, Any] | None,
    report: Mapping[str, Any] | None,
    dataset: str | None,
    base_model: str | None,
    gemma_terms: bool,
) -> str:
    """README.md: what the model is, how to use it, how good it is, whose terms it is under.

    Args:
      config: the model's.
      title: its name, the heading.
      deevisum: the section of config.json; None = an export without exit heads.
      report: content of report.json (`evaluation.report_json`); None = not evaluated.
      dataset: name of what it was trained and evaluated on, if known.
      base_model: the weights it was initialized with, as the Hub names them; None = from scratch,
        or, with `gemma_terms`, released ones whose name was not kept.
      gemma_terms: the weights descend from Google's, so the Gemma Terms of Use go with them. The
        terms count a model that was distilled from such a one, even from scratch, as descending.
    """
    return _render(
        "model_card.md",
        config=config,
        title=title,
        deevisum=deevisum,
        report=report,
        dataset=dataset,
        base_model=base_model,
        gemma_terms=gemma_terms,
    )


def adapter_card(
    config: PaliGemma2Config,
    *,
    title: str,
    deevisum: Mapping[str, Any],
    report: Mapping[str, Any] | None,
    dataset: str,
    base: str,
    is_on_hub: bool,
    base_softcap: float,
    gemma_terms: bool,
) -> str:
    """README.md of an adapter in PEFT's form; arguments as `model_card`.

    `base` is the model that it belongs to, a path or the name on the Hub, as `is_on_hub` says;
    `base_softcap` what its logits are capped at, 0 = none.
    """
    return _render(
        "adapter_card.md",
        config=config,
        title=title,
        deevisum=deevisum,
        report=report,
        dataset=dataset,
        base=base,
        is_on_hub=is_on_hub,
        base_softcap=base_softcap,
        resample=RESAMPLE[deevisum["resize"]],
        gemma_terms=gemma_terms,
    )


def modeling_code() -> str:
    """The text of modeling_deevisum.py."""
    return (pathlib.Path(__file__).parent / "torch" / MODELING_FILE).read_text(encoding="utf-8")


def _render(template: str, **values: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(pathlib.Path(__file__).parent / "templates"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # JSON strings are YAML strings and Python strings.
    environment.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)
    return environment.get_template(template).render(
        gemma_notice=GEMMA_NOTICE,
        gemma_url=GEMMA_TERMS_URL,
        confidence_words=_CONFIDENCE_WORDS,
        **values,
    )


def write_folder(
    folder: pathlib.Path,
    *,
    config: PaliGemma2Config,
    tokenizer: Tokenizer,
    table_rows: int,
    dtype: str,
    resize: str,
    deevisum: Mapping[str, Any] | None,
    card: str,
    gemma_terms: bool,
) -> None:
    """Writes all but the weights and the exit heads.

    Args:
      folder: exists; under a temporary name, which the caller changes when the weights are there.
      config: the model's.
      tokenizer: its tokenizer; `<image>` gets the first id behind its pieces.
      table_rows: of the token table that is written beside, `padded_vocab` or more.
      dtype: of the weights that are written beside.
      resize: key of `RESAMPLE`.
      deevisum: as for `hf_config`.
      card: from `model_card`.
      gemma_terms: as for `model_card`; the notice that the terms ask for is written, too.

    Raises:
      UserError: the tokenizer cannot be written as tokenizer.json.
    """
    contents = {
        CONFIG: hf_config(
            config,
            image_token=tokenizer.vocab_size,
            padded_vocab=table_rows,
            dtype=dtype,
            deevisum=deevisum,
        ),
        GENERATION_CONFIG: generation_config(config.llm.vocab_size, table_rows),
        PREPROCESSOR_CONFIG: preprocessor_config(config, resize=resize),
        TOKENIZER_CONFIG: tokenizer_config(tokenizer),
        SPECIAL_TOKENS_MAP: special_tokens_map(),
    }
    texts = {
        **{name: json.dumps(content, indent=2) + "\n" for name, content in contents.items()},
        # Not indented: it has half a million pairs.
        tokenizer_json.TOKENIZER_JSON: json.dumps(
            tokenizer_json.to_tokenizer_json(tokenizer), ensure_ascii=False, separators=(",", ":")
        ),
        MODEL_CARD: card,
    }
    if gemma_terms:
        texts[NOTICE] = GEMMA_NOTICE + "\n"
    if deevisum is not None:
        texts[MODELING_FILE] = modeling_code()
    for name, text in texts.items():
        write_whole(folder / name, text)
    save_tokenizer(tokenizer, folder / TOKENIZER_MODEL)


@dataclasses.dataclass(frozen=True)
class _Section:
    """A part of a JSON file that names itself in errors."""

    file: pathlib.PurePath
    name: str  # dotted, with a dot behind; empty for the whole
    content: Mapping[str, Any]

    def get(self, field: str, default: Any) -> Any:
        return self.content.get(field, default)

    def section(self, field: str) -> _Section:
        """A section in this one; without fields where there is none."""
        content = self.get(field, None)
        if not isinstance(content, Mapping | None):
            raise UserError(f"{self.file}: {self.name}{field} is {content!r}, no section")
        return _Section(self.file, f"{self.name}{field}.", content or {})

    def number(self, field: str, default: float) -> float:
        value = self.get(field, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(
                f"{self.file}: {self.name}{field} is {value!r}, no number above 0; use the folder "
                "of a PaliGemma 2"
            )
        return value

    def count(self, field: str, default: int) -> int:
        """A whole number of things, of which there are never as many as a million."""
        value = self.number(field, default)
        if value != int(value) or value >= 10**6:
            raise UserError(
                f"{self.file}: {self.name}{field} is {value!r}, no number of things; use the "
                "folder of a PaliGemma 2"
            )
        return int(value)

    def demand(self, field: str, wanted: Any) -> None:
        """Refuses what the model does not compute; absent is as wanted."""
        if (value := self.get(field, wanted)) != wanted:
            raise UserError(
                f"{self.file}: {self.name}{field} is {json.dumps(value)}, but only "
                f"{json.dumps(wanted)} is computed here, as in PaliGemma 2; use such a checkpoint, "
                "for instance google/paligemma2-3b-pt-224"
            )


def _number(value: float) -> float:
    """An integer where it is one: transformers 5 refuses a query_pre_attn_scalar of 144.0."""
    return int(value) if value == int(value) else value


def _sliding_window(text: _Section, depth: int) -> int | None:
    alternating = [_GLOBAL if i % 2 else _LOCAL for i in range(depth)]
    kinds = text.get("layer_types", None) or alternating
    window = text.get("sliding_window", _WINDOW)
    if window is None or kinds == [_GLOBAL] * depth:
        return None
    if kinds != alternating:
        raise UserError(
            f"{text.file}: {text.name}layer_types is neither {_LOCAL} and {_GLOBAL} by turns from "
            f"layer 0 to {depth - 1} nor {_GLOBAL} throughout; no other pattern is computed here"
        )
    return text.count("sliding_window", _WINDOW)


def _resize(preprocessor: Mapping[str, Any] | None, image_size: int, file: pathlib.PurePath) -> str:
    content = preprocessor or {}
    # Version 5 writes processor_config.json, with a section.
    section = _Section(file, "", content)
    if "image_processor" in content:
        section = _Section(file.with_name(PROCESSOR_CONFIG), "", content).section("image_processor")
    for switch in ("do_resize", "do_rescale", "do_normalize"):
        section.demand(switch, True)
    section.demand("image_mean", [0.5] * 3)
    section.demand("image_std", [0.5] * 3)
    section.demand("size", {"height": image_size, "width": image_size})
    if abs(section.number("rescale_factor", 1 / 255) * 255 - 1) > 1e-6:  # written as 0.00392...
        section.demand("rescale_factor", 1 / 255)
    code = section.get("resample", RESAMPLE["bicubic"])  # SiglipImageProcessor's default
    by_code = {code: name for name, code in RESAMPLE.items()}
    if type(code) is not int or code not in by_code:
        raise UserError(
            f"{section.file}: {section.name}resample is {code!r}; images are resized here by 2 "
            "(bilinear) or 3 (bicubic)"
        )
    return by_code[code]
