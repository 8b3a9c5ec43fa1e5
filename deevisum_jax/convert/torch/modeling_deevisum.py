r"""DEEVisum's segment scorer in PyTorch: PaliGemma 2 that stops at the exit that is sure enough.

This file travels inside an exported folder, beside the weights, and stands alone:

    model = AutoModel.from_pretrained(FOLDER, trust_remote_code=True)
    scores = model.score(pixel_values, input_ids, attention_mask)

Of an adapter in PEFT's form `DeevisumModel.over` makes the model.

A segment is `[frames][BOS prompt]["\n"]`; the whole of it is prefix, so every position sees every
other. After each exit layer a head reads class, importance and the cosine to a prototype of the
summary class at the last position. Rows that it is sure enough of leave, deeper layers run on the
rest only, and when no row is left no more layer runs. The exit heads are ours (the export's own
file), all else is PaliGemma 2 as in transformers, 4.57 or later.

Shapes: B segments, I frames of a segment, T text tokens, M image tokens of a segment, S = M + T,
D model width, X exits, shallowest first.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import numbers
import os
from collections.abc import Iterable
from typing import TypeVar

import safetensors
import safetensors.torch
import torch
from torch import nn
from transformers.models.paligemma.configuration_paligemma import PaliGemmaConfig
from transformers.models.paligemma.modeling_paligemma import (
    PaliGemmaForConditionalGeneration,
    PaliGemmaModel,
    PaliGemmaPreTrainedModel,
)
from transformers.utils import cached_file

FORMAT = 2  # of the section `deevisum` in config.json and of the heads file
HEADS_FILE = "deevisum_heads.safetensors"
# In a folder of adapters, which has no config.json.
ADAPTER_HEADS_FILE, ADAPTER_SECTION_FILE = "exits.safetensors", "deevisum.json"
# How sure an exit is -> the least and the most that it can be; `_confidence` says what they are.
CONFIDENCES = {
    "max_probability": (0.5, 1.0),
    "entropy": (0.0, 1.0),
    "cosine": (0.0, 1.0),
    "agreement": (0.0, 1.0),
}
# Names in the released checkpoints, and so in the folder, to modules here. Most versions of
# transformers know it of their own PaliGemma only, not of code that comes with a model.
KEY_MAPPING = {
    r"^language_model\.model": "model.language_model",
    r"^vision_tower": "model.vision_tower",
    r"^multi_modal_projector": "model.multi_modal_projector",
}
HUB_KWARGS = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SegmentScores:
    """What is said of each segment, at the exit that it left at."""

    importance: torch.Tensor  # float32[B] in (0, 1)
    summary_prob: torch.Tensor  # float32[B], probability that the segment belongs to the summary
    class_logits: torch.Tensor  # float32[B, 2], not-summary and summary
    cosine: torch.Tensor  # float32[B] in [-1, 1], to the prototype of the summary class
    exit_layer: torch.Tensor  # int64[B], layers that the segment went through
    layers_run: int  # layers run times rows they ran on; the sum of exit_layer if nothing is wasted


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExitScores:
    """What every exit says of each segment; of one exit alone without the leading axis."""

    class_logits: torch.Tensor  # float32[X, B, 2], not-summary and summary
    importance: torch.Tensor  # float32[X, B], logit of the importance score
    cosine: torch.Tensor  # float32[X, B] in [-1, 1], to the prototype of the summary class


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Embedded:
    """Image and text tokens on their way through the layers, image first."""

    x: torch.Tensor  # float[B, S, D]
    mask: torch.Tensor  # float[B, 1, 1, S], added to attention logits; the same for every query
    cos: torch.Tensor  # float[B, S, H]
    sin: torch.Tensor  # float[B, S, H]
    last: torch.Tensor  # int64[B], index of the last real token

    def last_row(self) -> torch.Tensor:
        """float[B, D], where the exit heads read."""
        last = self.last.to(self.x.device)
        return self.x[torch.arange(len(last), device=last.device), last]


class ExitHeads(nn.Module):
    """Per exit a norm, linear layers to two class logits and to the importance, and a prototype.

    Args:
      tensors: by name, as in the heads file.
      num_exits: X.
      width: D.

    Raises:
      ValueError: tensors are missing, unknown or of another shape; lists all of them.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], *, num_exits: int, width: int):
        super().__init__()
        X, D = num_exits, width
        shapes = {
            "exits.norm.scale": (X, D),
            "exits.classifier.kernel": (X, D, 2),
            "exits.classifier.bias": (X, 2),
            "exits.importance.kernel": (X, D, 1),
            "exits.importance.bias": (X, 1),
            "exits.prototype": (X, D),
        }
        offenders = [f"{name}: missing" for name in shapes if name not in tensors]
        offenders += [f"{name}: unknown" for name in tensors if name not in shapes]
        offenders += [
            f"{name}: shape {tuple(tensors[name].shape)}, wanted {shape}"
            for name, shape in shapes.items()
            if name in tensors and tensors[name].shape != shape
        ]
        if offenders:
            raise ValueError(
                f"the exit heads do not fit a model of width {D} with {X} exits:\n  "
                + "\n  ".join(offenders)
            )
        for name in shapes:
            # Module attributes have no dots.
            self.register_parameter(self._attribute(name), nn.Parameter(tensors[name]))
        self.names = tuple(shapes)

    @staticmethod
    def _attribute(name: str) -> str:
        return name.removeprefix("exits.").replace(".", "_")

    def tensors(self) -> dict[str, torch.Tensor]:
        """By name, as in the heads file."""
        return {name: getattr(self, self._attribute(name)).detach().cpu() for name in self.names}

    def forward(self, rows: torch.Tensor, number: int) -> ExitScores:
        """Reads one exit.

        Args:
          rows: float[B, D], a layer's output at the last real position.
          number: of the exit, from 0.
        """
        rows = rows.to(self.norm_scale.device)
        x = rows.float()
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        x = x * (1.0 + self.norm_scale[number].float())
        # Rounded to the compute dtype as in the layers, then multiplied and added in float32.
        x = x.to(rows.dtype).float()
        classes = x @ self.classifier_kernel[number].float() + self.classifier_bias[number].float()
        importance = (
            x @ self.importance_kernel[number].float() + self.importance_bias[number].float()
        )
        prototype = self.prototype[number].float()
        lengths = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(prototype)
        cosine = x @ prototype / lengths.clamp(min=1e-12)
        return ExitScores(class_logits=classes, importance=importance[:, 0], cosine=cosine)


class DeevisumModel(PaliGemmaPreTrainedModel):
    """PaliGemma 2 with exit heads, for scoring; `PaliGemmaForConditionalGeneration` generates.

    Made by `from_pretrained`, which reads the heads from their own file; without it `exits` is
    None and nothing can be scored.

    Raises:
      ValueError: the config has no section `deevisum`, or one that this file does not understand.
    """

    def __init__(self, config: PaliGemmaConfig):
        super().__init__(config)
        self.exit_layers = _exit_layers(config)
        self._policy("config", None)  # what cannot be used is refused before the weights are read
        self.model = PaliGemmaModel(config)
        llm_config = self.model.language_model.config
        if llm_config._attn_implementation == "sdpa":
            # The default of older transformers, which leaves out the cap of Gemma 2's logits.
            llm_config._attn_implementation = "eager"
        # Not made here: transformers would miss the heads among the weights.
        self.exits: ExitHeads | None = None
        self.post_init()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As every model of transformers, from a folder or a repository on the Hub.

        Raises:
          ValueError: the file of exit heads is missing, unreadable or made for another model.
        """
        # First, since the weights may take long.
        hub_kwargs = {name: kwargs[name] for name in HUB_KWARGS if kwargs.get(name) is not None}
        try:
            file = cached_file(pretrained_model_name_or_path, HEADS_FILE, **hub_kwargs)
            tensors = safetensors.torch.load_file(file)
        except (OSError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"the exit heads {HEADS_FILE} of {pretrained_model_name_or_path} cannot be read "
                f"({error}); export the model again, or copy the file beside its weights"
            ) from error
        loaded = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, **{"key_mapping": KEY_MAPPING, **kwargs}
        )
        # With `output_loading_info`, a tuple of model and info.
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        try:
            exits = ExitHeads(
                tensors,
                num_exits=len(model.exit_layers),
                width=model.config.text_config.hidden_size,
            )
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        # A device map of accelerate keeps offloaded weights on the device "meta".
        device = "cpu" if model.device.type == "meta" else model.device
        model.exits = exits.to(device, model.dtype).train(model.training)
        return loaded

    @classmethod
    def over(cls, model: PaliGemmaForConditionalGeneration, folder, **hub_kwargs) -> DeevisumModel:
        """A scorer of a base model with an adapter in it; the two share all weights.

        Args:
          model: the base with the adapter, `PeftModel.from_pretrained(base,
            folder).get_base_model()`, or with the adapter merged.
          folder: of the adapter, or its name on the Hub; has the exit heads.
          **hub_kwargs: such as `revision` and `token`.

        Raises:
          ValueError: `model` is something else, such as a PeftModel; a file is missing or
            unreadable; or the exit heads are of another model.
        """
        if not isinstance(model, PaliGemmaForConditionalGeneration):
            raise ValueError(
                f"DeevisumModel.over takes a PaliGemmaForConditionalGeneration, not a "
                f"{type(model).__name__}; of a PeftModel give model.get_base_model()"
            )
        try:
            file = cached_file(folder, ADAPTER_HEADS_FILE, **hub_kwargs)
            tensors = safetensors.torch.load_file(file)
            with open(cached_file(folder, ADAPTER_SECTION_FILE, **hub_kwargs)) as stream:
                section = json.load(stream)
        except (OSError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(
                f"the exit heads of {folder} cannot be read ({error}); export the adapter again"
            ) from error
        config = copy.deepcopy(model.config)
        config.deevisum = section
        with torch.device("meta"):
            scorer = cls(config)
        scorer.model = model.model
        width = config.text_config.hidden_size
        try:
            exits = ExitHeads(tensors, num_exits=len(scorer.exit_layers), width=width)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        scorer.exits = exits.to(model.device, model.dtype)
        return scorer.eval()

    def save_pretrained(self, save_directory, *, push_to_hub: bool = False, **kwargs) -> None:
        """As every model of transformers; the heads go into their own file again.

        Raises:
          ValueError: `push_to_hub` is given, which would leave the heads behind; or an adapter of
            peft is in the model, and not merged.
        """
        if push_to_hub:
            raise ValueError(
                "save_pretrained(push_to_hub=True) would leave the exit heads behind; call "
                "model.push_to_hub(REPOSITORY), which uploads all files"
            )
        exits = self._exits()
        state_dict = kwargs.pop("state_dict", None) or self.state_dict()
        weights = {name: t for name, t in state_dict.items() if not name.startswith("exits.")}
        if any(".lora_" in name for name in weights):
            raise ValueError(
                "an adapter of peft is in this model beside its weights, which would be saved "
                "under names that nothing loads; make it of what merge_and_unload() returns"
            )
        super().save_pretrained(save_directory, state_dict=weights, **kwargs)
        file = os.path.join(save_directory, HEADS_FILE)
        safetensors.torch.save_file(exits.tensors(), file, metadata={"format": "pt"})

    def prompt(self, title: str = "", transcript: str = "", sound: str = "") -> str:
        r"""The words that the model was trained with, for the tokenizer.

        Without what goes around them: `<image>` tokens and BOS in front, `"\n"` behind, which
        PaliGemma's processor puts there. Longer prompts than `config.deevisum["text_len"]` tokens
        were not seen in training.

        Args:
          title: of the video.
          transcript: what is said during the segment.
          sound: what else is heard, in a few words.
        """
        template: str = self.config.deevisum["prompt_template"]
        return template.format(title=title, transcript=transcript, sound=sound)

    def forward(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        *,
        threshold: float | Iterable[float | None] | str | None = "config",
        confidence: str | None = None,
    ) -> SegmentScores:
        """`score`; takes what PaliGemma's processor makes, `labels` being of no use."""
        return self.score(
            pixel_values,
            input_ids,
            attention_mask,
            token_type_ids,
            threshold=threshold,
            confidence=confidence,
        )

    @torch.no_grad()
    def score(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        *,
        threshold: float | Iterable[float | None] | str | None = "config",
        confidence: str | None = None,
    ) -> SegmentScores:
        r"""Scores segments; each leaves at the first exit that is sure enough, else at the last.

        A sure "no" leaves as early as a sure "yes".

        Args:
          pixel_values: float[B, I, 3, H, W] in [-1, 1], or float[B, 3, H, W] for one frame each.
            With `<image>` tokens in `input_ids` also float[B * I, 3, H, W], segment after segment,
            as PaliGemma's processor makes it.
          input_ids: int[B, T], `[BOS prompt]["\n"]`. Any `<image>` tokens
            (`config.image_token_id`) are dropped, and their number is checked: image tokens always
            stand in front of the text, wherever the placeholders stood.
          attention_mask: int or bool[B, T], 1 = real token, padded on the right or on the left;
            None = all are real.
          token_type_ids: int[B, T], 1 = suffix (label or caption), which scoring does not see;
            None = all is prefix.
          threshold: how sure is sure enough: "config" = the exported thresholds
            (`config.deevisum["exit_policy"]`); a number = at every exit but the last; several = one
            for each of them, None = no row leaves there; None = all rows go on to the last exit.
          confidence: what is held against the thresholds; None = as exported, or
            "max_probability" = probability of the likelier of the two classes, within [0.5, 1];
            "entropy" = 1 less the entropy of the classes in bits, within [0, 1];
            "cosine" = to the prototype of the summary class, without its sign, within [0, 1];
            "agreement" = 1 less what the probability or the importance has changed since the exit
            before, the more of the two, within [0, 1]; no row leaves at the first exit.

        Raises:
          ValueError: shapes, thresholds or the confidence do not fit.
        """
        confidence, thresholds = self._policy(threshold, confidence)
        exits = self._exits()
        embedded = self._embed(pixel_values, input_ids, attention_mask, token_type_ids)
        B = len(embedded.x)
        device = exits.norm_scale.device
        rows = torch.arange(B, device=device)  # still here
        class_logits = torch.zeros(B, 2, dtype=torch.float32, device=device)
        importance = torch.zeros(B, dtype=torch.float32, device=device)
        cosine = torch.zeros(B, dtype=torch.float32, device=device)
        exit_layer = torch.zeros(B, dtype=torch.int64, device=device)
        start, layers_run = 0, 0
        before = None  # what the exit before said of the rows that are still here
        for number, stop in enumerate(self.exit_layers):
            embedded = self._run_layers(embedded, start, stop)
            layers_run += len(rows) * (stop - start)
            start = stop
            now = exits(embedded.last_row(), number)
            if stop == self.exit_layers[-1]:
                leaves = torch.ones_like(rows, dtype=torch.bool)
            else:
                leaves = _confidence(confidence, now, before) >= thresholds[number]
            class_logits[rows[leaves]] = now.class_logits[leaves]
            importance[rows[leaves]] = now.importance[leaves].sigmoid()
            cosine[rows[leaves]] = now.cosine[leaves]
            exit_layer[rows[leaves]] = stop
            if leaves.all():
                break
            if leaves.any():
                rows, embedded, now = rows[~leaves], _take(embedded, ~leaves), _take(now, ~leaves)
            before = now
        return SegmentScores(
            importance=importance,
            summary_prob=class_logits.softmax(-1)[:, 1],
            class_logits=class_logits,
            cosine=cosine,
            exit_layer=exit_layer,
            layers_run=layers_run,
        )

    @torch.no_grad()
    def score_all(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
    ) -> ExitScores:
        """Every exit's scores of every segment, for choosing thresholds. Arguments as `score`."""
        exits = self._exits()
        embedded = self._embed(pixel_values, input_ids, attention_mask, token_type_ids)
        scores = []
        for number, (start, stop) in enumerate(itertools.pairwise((0, *self.exit_layers))):
            embedded = self._run_layers(embedded, start, stop)
            scores.append(exits(embedded.last_row(), number))
        fields = [field.name for field in dataclasses.fields(ExitScores)]
        return ExitScores(
            **{name: torch.stack([getattr(said, name) for said in scores]) for name in fields}
        )

    def _exits(self) -> ExitHeads:
        if self.exits is None:
            raise ValueError(
                "this model has no exit heads yet; load it with DeevisumModel.from_pretrained, or "
                "AutoModel.from_pretrained with trust_remote_code=True"
            )
        return self.exits

    def _policy(
        self, threshold: float | Iterable[float | None] | str | None, confidence: str | None
    ) -> tuple[str, tuple[float, ...]]:
        """The confidence, and a threshold for each exit but the last; arguments as `score`."""
        section = "exit_policy of the section deevisum in config.json"
        num_wanted = len(self.exit_layers) - 1
        policy = self.config.deevisum.get("exit_policy")
        if not isinstance(policy, dict) or not isinstance(policy.get("thresholds"), list):
            raise ValueError(
                f"{section} is {policy!r}, without a confidence and a list of thresholds; export "
                "the model again"
            )
        own = policy.get("confidence")
        where = f"confidence of {section}" if confidence is None else "confidence"
        confidence = own if confidence is None else confidence
        if confidence not in tuple(CONFIDENCES):
            raise ValueError(
                f"{where} {confidence!r} is unknown; choose one of {', '.join(CONFIDENCES)}"
            )
        where = "threshold"
        if isinstance(threshold, str):
            if threshold != "config":
                raise ValueError(
                    f'threshold {threshold!r} is none; give "config", a number, one for each exit '
                    "but the last, or None"
                )
            if confidence != own:
                raise ValueError(
                    f"the exported thresholds are of the confidence {own!r}; with "
                    f"confidence={confidence!r} give threshold, too"
                )
            where, threshold = section, policy
            given = tuple(policy["thresholds"])
        elif threshold is None or isinstance(threshold, numbers.Real):
            given = (threshold,) * num_wanted
        else:
            given = tuple(threshold)
        if len(given) != num_wanted:
            raise ValueError(
                f"{where}: wanted {num_wanted} thresholds, one for each exit but the last (after "
                f"the layers {list(self.exit_layers)}), got {len(given)}"
            )
        low, high = CONFIDENCES[confidence]
        for value in given:
            if value is None or (isinstance(value, numbers.Real) and value == math.inf):
                continue
            if not isinstance(value, numbers.Real) or not low <= value <= high:
                raise ValueError(
                    f"{where} is {threshold!r}, of which {value!r} is not within "
                    f"[{low:g}, {high:g}], where the confidence {confidence!r} lies; None (null) "
                    "lets no row leave"
                )
        return confidence, tuple(math.inf if value is None else float(value) for value in given)

    def _embed(
        self,
        pixel_values: torch.Tensor,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        token_type_ids: torch.Tensor | None,
    ) -> _Embedded:
        """Image tokens in front of text tokens, with masks and positions; arguments as `score`."""
        llm = self.model.language_model
        if llm.config._attn_implementation != "eager":
            # Others cap no logits, or read masks of their own kind.
            raise ValueError(
                f"the language model's attention is {llm.config._attn_implementation!r}; load with "
                'attn_implementation={"text_config": "eager"}, the one that caps its logits'
            )
        real = _real_tokens(input_ids, attention_mask, token_type_ids)
        placeholder = input_ids == self.config.image_token_id
        frames = self._frames(pixel_values, len(input_ids), bool(placeholder.any()))

        zimg = self.model.vision_tower(frames.flatten(0, 1).to(self.dtype)).last_hidden_state
        zimg = self.model.multi_modal_projector(zimg)
        zimg = zimg.reshape(len(frames), -1, zimg.shape[-1])
        M = zimg.shape[1]
        if placeholder.any():
            if (placeholder.sum(1) != M).any():
                raise ValueError(
                    f"rows of input_ids have {placeholder.sum(1).tolist()} <image> tokens, but "
                    f"{frames.shape[1]} frames make {M}; leave them out, or put in that many"
                )
            text = (len(input_ids), input_ids.shape[1] - M)
            input_ids, real = input_ids[~placeholder].view(text), real[~placeholder].view(text)

        ztxt = llm.embed_tokens(input_ids)
        if not hasattr(llm.embed_tokens, "embed_scale"):
            # Older transformers scale in Gemma2Model.forward, which is not used here.
            ztxt = ztxt * torch.tensor(ztxt.shape[-1] ** 0.5, dtype=ztxt.dtype, device=ztxt.device)
        x = torch.cat([zimg.to(ztxt.device, ztxt.dtype), ztxt], dim=1)
        real = torch.cat([real.new_ones(len(real), M), real], dim=1).to(x.device)
        cos, sin = _rotary(llm.config, real, x.dtype)
        mask = torch.zeros(real.shape, dtype=x.dtype, device=x.device)
        return _Embedded(
            x=x,
            mask=mask.masked_fill(~real, torch.finfo(x.dtype).min)[:, None, None],
            cos=cos,
            sin=sin,
            last=(real * torch.arange(real.shape[1], device=x.device)).amax(1),
        )

    def _frames(self, pixel_values: torch.Tensor, B: int, placeholders: bool) -> torch.Tensor:
        """float[B, I, 3, H, W]."""
        size = self.config.vision_config.image_size
        if (
            pixel_values.ndim not in (4, 5)
            or tuple(pixel_values.shape[-3:]) != (3, size, size)
            or not pixel_values.is_floating_point()
        ):
            raise ValueError(
                f"pixel_values must be floats in [-1, 1] of shape [B, I, 3, {size}, {size}] or "
                f"[B, 3, {size}, {size}] for this model, got {pixel_values.dtype} of shape "
                f"{list(pixel_values.shape)}; resize the frames and divide by 127.5, less 1"
            )
        frames = pixel_values
        if frames.ndim == 4:
            flat = placeholders and len(frames) % B == 0
            frames = frames.unflatten(0, (B, -1)) if flat else frames[:, None]
        if len(frames) != B:
            raise ValueError(
                f"pixel_values of shape {list(pixel_values.shape)} do not belong to {B} rows of "
                "input_ids; give one row of frames for each segment"
            )
        return frames

    def _run_layers(self, embedded: _Embedded, start: int, stop: int) -> _Embedded:
        """Runs the layers `start` to `stop` (half-open) of the language model."""
        x = embedded.x
        for layer in self.model.language_model.layers[start:stop]:
            x = layer(
                x,
                # No window: local layers exempt the prefix, and all is prefix.
                attention_mask=embedded.mask,
                position_embeddings=(embedded.cos, embedded.sin),
            )
            if isinstance(x, tuple):  # transformers 4
                x = x[0]
        return dataclasses.replace(embedded, x=x)


_Rows = TypeVar("_Rows", _Embedded, ExitScores)


def _take(record: _Rows, rows: torch.Tensor) -> _Rows:
    """The rows of the batch where bool[B] is 1."""
    fields = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
    return type(record)(**{name: t[rows.to(t.device)] for name, t in fields.items()})


def _confidence(kind: str, now: ExitScores, before: ExitScores | None) -> torch.Tensor:
    """How sure an exit is of each segment, float32[B]; -1 where nothing can be said.

    Args:
      kind: of `CONFIDENCES`.
      now: what the exit says.
      before: what the exit before said; None at the first.
    """
    if kind == "cosine":
        return now.cosine.abs()
    p = now.class_logits.softmax(-1)[:, 1]
    if kind == "max_probability":
        return torch.maximum(p, 1 - p)
    if kind == "entropy":
        q = torch.stack([p, 1 - p]).clamp(1e-12, 1.0)
        return 1 + (q * q.log2()).sum(0)
    if before is None:
        return torch.full_like(p, -1.0)
    changes = (
        p - before.class_logits.softmax(-1)[:, 1],
        now.importance.sigmoid() - before.importance.sigmoid(),
    )
    return 1 - torch.maximum(changes[0].abs(), changes[1].abs())


def _exit_layers(config: PaliGemmaConfig) -> tuple[int, ...]:
    section = getattr(config, "deevisum", None)
    if not isinstance(section, dict):
        raise ValueError(
            "config.json has no section `deevisum`, so this is no folder that deevisum_jax has "
            "exported; a plain PaliGemma 2 has no exits"
        )
    if section.get("format") != FORMAT:
        raise ValueError(
            f"the section deevisum in config.json is of format {section.get('format')!r}, this "
            f"modeling_deevisum.py reads format {FORMAT}; use the one that was exported with it"
        )
    exits, L = tuple(section.get("exit_layers", ())), config.text_config.num_hidden_layers
    if not exits or any(a >= b for a, b in itertools.pairwise((0, *exits, L + 1))):
        raise ValueError(
            f"exit_layers {list(exits)} of the section deevisum in config.json must increase "
            f"strictly within 1 and the depth of the language model, {L}"
        )
    return exits


def _real_tokens(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    token_type_ids: torch.Tensor | None,
) -> torch.Tensor:
    """bool[B, T], 1 = real token of the prefix."""
    if input_ids.ndim != 2:
        raise ValueError(f"input_ids must be [B, T], got shape {list(input_ids.shape)}")
    real = torch.ones_like(input_ids, dtype=torch.bool)
    for name, given, wanted in (
        ("attention_mask", attention_mask, 1),
        ("token_type_ids", token_type_ids, 0),
    ):
        if given is None:
            continue
        if given.shape != input_ids.shape:
            raise ValueError(
                f"{name} of shape {list(given.shape)} does not belong to input_ids of shape "
                f"{list(input_ids.shape)}"
            )
        real = real & (given == wanted).to(real.device)
    return real


def _rotary(config, real: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine float[B, S, H] of the positions, which count real tokens only.

    Made here, in float32: the language model's own table is rounded by `model.to(bfloat16)`.
    """
    positions = (real.cumsum(1) - 1).clamp(min=0)
    H = config.head_dim
    exponent = torch.arange(0, H, 2, dtype=torch.float32, device=real.device) / H
    parameters = getattr(config, "rope_parameters", None)
    base = parameters["rope_theta"] if parameters else config.rope_theta  # transformers 5 or 4
    angle = positions[..., None] * base**-exponent
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)
