"""Checkpoints of PaliGemma 2 as they are released: what a path holds, and its parameters.

big_vision releases one npz, Hugging Face a folder of safetensors with config.json. Both are opened
here by their headers alone, so that a wrong file is known before anything else is done.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict

from deevisum_jax.convert import big_vision, hf_folder, huggingface, tokenizer_json
from deevisum_jax.convert.hf_folder import Facts
from deevisum_jax.convert.npz import open_npz
from deevisum_jax.convert.rows import Converted, Row, fill, match
from deevisum_jax.convert.safetensors import open_safetensors
from deevisum_jax.convert.tensors import STORED_DTYPES, Tensor
from deevisum_jax.data.tokenizer import Tokenizer, parse_tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.files import exists, locate, read_json
from deevisum_jax.models.paligemma2 import (
    VARIANTS,
    PaliGemma2Config,
    Params,
    abstract_params,
    get_config,
    table_rows,
    without_exits,
    without_lora,
)

BIG_VISION, HUGGING_FACE = "big_vision", "huggingface"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Released:
    """A released checkpoint, its numbers not yet read."""

    path: str
    form: str  # `BIG_VISION` or `HUGGING_FACE`
    tensors: Mapping[str, Tensor]  # under the names of the form's table
    own_names: Mapping[str, str]  # the file's, by those
    facts: Facts
    lm_head: Tensor | None = None  # a copy of the token table
    heads: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)  # exits, of our exports
    deevisum: Mapping[str, Any] | None = None  # of our exports: what config.json says of them

    @property
    def variant(self) -> str | None:
        """The variant whose sizes these are; None if none has them."""
        return next((name for name, config in VARIANTS.items() if not self._unlike(config)), None)

    @property
    def origin(self) -> str | None:
        """What is at the root of these weights; None for an export of a run from scratch."""
        return self.path if self.deevisum is None else self.deevisum.get("origin", self.path)

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """Where the exit heads sit that come along; () = none do."""
        return tuple(self.deevisum["exit_layers"]) if self.heads else ()

    def config(self, *, image_size: int | None = None, dtype: str = "") -> PaliGemma2Config:
        """The model that these are the parameters of.

        Args:
          image_size: pixels; None = the checkpoint's own.
          dtype: of the parameters; "" = what holds every tensor without loss.

        Raises:
          UserError: no variant has these sizes.
        """
        if self.variant is None:
            raise UserError(
                f"{self.path}: no variant has its sizes ("
                + ", ".join(f"{name} {size}" for name, size in self.facts.sizes.items())
                + "); give a PaliGemma 2 of 3B, 10B or 28B"
            )
        stored = {tensor.dtype for tensor in (*self.tensors.values(), *self.heads.values())}
        lossless = "bfloat16" if stored == {STORED_DTYPES["bfloat16"]} else "float32"
        return get_config(
            self.variant,
            img={"image_size": self.facts.image_size if image_size is None else image_size},
            llm={
                # <image> stands behind the pieces.
                "vocab_size": min(table_rows(self.facts.image_token), self.facts.padded_vocab),
                "final_logits_softcap": self.facts.final_logits_softcap,
                "sliding_window": self.facts.sliding_window,
            },
            exit_layers=self.exit_layers,
            param_dtype=dtype or lossless,
        )

    def check(self, config: PaliGemma2Config) -> None:
        """Compares sizes, before names and shapes of tensors say the same at length.

        Raises:
          UserError: the checkpoint is of another variant.
        """
        if unlike := self._unlike(config):
            is_a = f"a {self.variant}" if self.variant else "of sizes that no variant has"
            advice = f"set model.variant={self.variant}" if self.variant else "use another"
            raise UserError(
                f"{self.path} is {is_a}, not the model asked for ({'; '.join(unlike)}); {advice}"
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Compares the token table with the model's.

        Raises:
          UserError: the tokenizer has other pieces than the checkpoint has rows.
        """
        extra = self.facts.padded_vocab - vocab_size
        most = huggingface.MAX_PADDING if self.form == HUGGING_FACE else 0
        if not 0 <= extra <= most:
            raise UserError(
                f"{self.path}: its token table has {self.facts.padded_vocab} rows, the model with "
                f"its tokenizer {vocab_size}, so their vocabularies differ; give the tokenizer of "
                "the checkpoint (data.tokenizer; paligemma_tokenizer.model for Google's)"
            )

    def match(self, config: PaliGemma2Config) -> list[Converted]:
        """The report of every tensor; no numbers are read.

        Args:
          config: of the model; exit heads that do not come along are no part of it, nor is merging.

        Raises:
          UserError: as `check` and `rows.match`.
        """
        self.check(config)
        config = self._with_own_exits(config)
        report = match(
            {**self.tensors, **self.heads},
            self._rows(config),
            abstract_params(config),
            path=self.path,
            spell=lambda name: self.own_names.get(name) or self._spell(name),
        )
        if self.lm_head is not None:
            report.append(
                Converted(
                    source=self.own_names[huggingface.LM_HEAD],
                    target="llm/embedder/input_embedding",
                    shape=self.lm_head.shape,
                    dtype=self.lm_head.dtype.name,
                    transform="compared with embed_tokens, not stored twice",
                )
            )
        return report

    def fill(
        self,
        config: PaliGemma2Config,
        abstract: Params,
        finish: Callable[[str, jax.Array], Any] | None = None,
    ) -> Params:
        """The parameters `img` and `llm`, and `exits` if they come along; see `rows.fill`.

        Args:
          config: of the model.
          abstract: shapes, dtypes and shardings of all of its parameters.
          finish: as of `rows.fill`.

        Raises:
          UserError: as `match`; or a file is damaged.
        """
        self.match(config)
        if self.lm_head is not None:
            huggingface.check_tied(self.lm_head, self.tensors[huggingface.EMBED_TOKENS])
        config = self._with_own_exits(config)
        wanted = {name: abstract[name] for name in abstract_params(config)}
        return fill({**self.tensors, **self.heads}, self._rows(config), wanted, finish)

    def rows(self, config: PaliGemma2Config, path: str, stop: int | None = None) -> np.ndarray:
        """float32, one parameter, or its first `stop` rows: of a stacked one, layers.

        Args:
          config: of the model, whose sizes these are.
          path: of the parameter.
          stop: None = all.

        Raises:
          UserError: a file is damaged.
        """
        [row] = [row for row in self._rows(config) if row.target == path]
        plain = flatten_dict(abstract_params(without_lora(config)), sep="/")
        first, *others = plain[path].shape
        wanted = jax.ShapeDtypeStruct((stop or first, *others), np.float32)
        [found] = jax.tree.leaves(fill(self.tensors, [row], {path: wanted}))
        return np.asarray(found)

    def vocab_padding(self, config: PaliGemma2Config) -> np.ndarray | None:
        """Rows of the token table behind the vocabulary, [rows, D]; None if there are none."""
        if self.form == BIG_VISION:
            return None
        return huggingface.padding_rows(self.tensors, config)

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer that lies beside the weights; None if none does.

        Raises:
          UserError: it is no tokenizer of PaliGemma's layout.
        """
        if self.form == BIG_VISION:
            return None
        folder = epath.Path(self.path)
        model = folder / hf_folder.TOKENIZER_MODEL
        if exists(model):
            return parse_tokenizer(model.read_bytes(), os.fspath(model))
        fast = folder / tokenizer_json.TOKENIZER_JSON
        if exists(fast):
            return tokenizer_json.from_tokenizer_json(read_json(fast), os.fspath(fast))
        return None

    def _with_own_exits(self, config: PaliGemma2Config) -> PaliGemma2Config:
        return dataclasses.replace(without_exits(config), exit_layers=self.exit_layers)

    def _rows(self, config: PaliGemma2Config) -> list[Row]:
        tables = {
            BIG_VISION: big_vision.paligemma2_rows,
            HUGGING_FACE: huggingface.paligemma2_rows,
        }
        return tables[self.form](config) + huggingface.exit_rows(config)

    def _spell(self, name: str) -> str:
        """How the file would call a tensor that it does not have."""
        owns = self.own_names.values()
        if self.form == BIG_VISION:
            prefixed = any(own.startswith(big_vision.PREFIX) for own in owns)
            return big_vision.PREFIX + name if prefixed else name
        is_old = any(own.startswith("language_model.model.") for own in owns)
        return huggingface.released_name(name) if is_old else name

    def _unlike(self, config: PaliGemma2Config) -> list[str]:
        wanted = hf_folder.sizes_of(config)
        return [
            f"{name} is {size}, not {wanted[name]}"
            for name, size in self.facts.sizes.items()
            if size != wanted[name]
        ]


def is_released(path: str) -> bool:
    """Whether a path looks like a released checkpoint, if a wrong one."""
    if path.endswith(".npz"):
        return True
    config = locate(path) / hf_folder.CONFIG
    return exists(config) and "model_type" in read_json(config)


def open_released(path: str) -> Released:
    """Opens a big_vision npz, or a Hugging Face folder; local, or gs:// and what else epath opens.

    Raises:
      UserError: there is nothing, or no PaliGemma 2, or its headers are damaged.
    """
    path = os.fspath(locate(path))
    if path.endswith(".npz"):
        tensors, own_names = big_vision.without_prefix(open_npz(path))
        return Released(
            path=path,
            form=BIG_VISION,
            tensors=tensors,
            own_names=own_names,
            facts=_big_vision_facts(tensors, path),
        )
    folder = epath.Path(path)
    config = folder / hf_folder.CONFIG
    if not exists(config):
        raise UserError(
            f"{path} is neither an .npz file nor a folder with {hf_folder.CONFIG}; give a "
            "PaliGemma 2 checkpoint of big_vision or of Hugging Face"
        )
    preprocessors = [
        folder / name for name in (hf_folder.PREPROCESSOR_CONFIG, hf_folder.PROCESSOR_CONFIG)
    ]
    preprocessor = next((read_json(file) for file in preprocessors if exists(file)), None)
    content = read_json(config)
    facts = hf_folder.config_facts(content, preprocessor, path)
    tensors, own_names = huggingface.canonical(open_safetensors(path))
    tensors, lm_head = huggingface.tie(tensors)
    if table := tensors.get(huggingface.EMBED_TOKENS):
        # The file may have been resized and its config not.
        rows = table.shape[:1]
        if rows != (facts.padded_vocab,):
            raise UserError(
                f"{config} says vocab_size {facts.padded_vocab}, but {huggingface.EMBED_TOKENS} in "
                f"{table.file} has {rows} rows; download both again"
            )
    heads: Mapping[str, Tensor] = {}
    if "deevisum" in content:
        heads = open_safetensors(folder / hf_folder.HEADS_FILE)
        hf_folder.check_deevisum(content["deevisum"], config)
    return Released(
        path=path,
        form=HUGGING_FACE,
        tensors=tensors,
        own_names=own_names,
        facts=facts,
        lm_head=lm_head,
        heads=heads,
        deevisum=content.get("deevisum"),
    )


def _big_vision_facts(tensors: Mapping[str, Tensor], path: str) -> Facts:
    """What shapes tell; what they do not is the same in all of big_vision's PaliGemma 2."""
    layers = "llm/layers"

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        found = tensors[name].shape if name in tensors else None
        if found is None or len(found) != ndim:
            what = "absent" if found is None else f"of shape {found}"
            raise UserError(
                f"{path} is no PaliGemma 2 of big_vision: {name} is {what}, wanted with {ndim} "
                f"dimensions; the file holds {', '.join(sorted(tensors)[:3])}, …"
            )
        return found

    patch, _, _, img_width = shape("img/embedding/kernel", 4)
    _, num_patches, _ = shape("img/pos_embedding", 3)
    block = "img/Transformer/encoderblock"
    attention = f"{block}/MultiHeadDotProductAttention_0"
    img_depth, _, img_heads, _ = shape(f"{attention}/query/kernel", 4)
    _, _, img_mlp = shape(f"{block}/MlpBlock_0/Dense_0/kernel", 3)
    depth, heads, width, head_dim = shape(f"{layers}/attn/q_einsum/w", 4)
    _, _, kv_heads, _, _ = shape(f"{layers}/attn/kv_einsum/w", 5)
    _, mlp, _ = shape(f"{layers}/mlp/linear", 3)
    if f"{layers}/post_attention_norm/scale" not in tensors:
        raise UserError(
            f"{path} is the first PaliGemma ({layers}/post_attention_norm/scale is absent, width "
            f"{width}), whose language model is another; use a PaliGemma 2, for instance "
            "pt_3b_224.bf16.npz"
        )
    return Facts(
        sizes={
            "img.patch_size": patch,
            "img.width": img_width,
            "img.depth": img_depth,
            "img.mlp_dim": img_mlp,
            "img.num_heads": img_heads,
            "llm.width": width,
            "llm.depth": depth,
            "llm.mlp_dim": mlp,
            "llm.num_heads": heads,
            "llm.num_kv_heads": kv_heads,
            "llm.head_dim": head_dim,
        },
        image_size=math.isqrt(num_patches) * patch,
        final_logits_softcap=0.0,
        sliding_window=None,
        resize="bilinear",
        padded_vocab=shape("llm/embedder/input_embedding", 2)[0],
        image_token=shape("llm/embedder/input_embedding", 2)[0],
    )
