"""What an experiment is made of: frozen, typed, checked at the door.

`configs/*.py` return an `ml_collections.ConfigDict`, which command lines can override
(`--config.optim.learning_rate=1e-4`); `from_config_dict` turns it into the dataclasses below. A
field that no dataclass has, or one left unset, is an error that names it.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import json
import math
import pathlib
import runpy
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_collections
from etils import epath

from deevisum_jax.errors import UserError, closest
from deevisum_jax.files import open_binary, write_whole
from deevisum_jax.typing import CONFIDENCES, INPUTS, RESIZES

FROM_SCRATCH = "from_scratch"

# Of multi-stage distillation, in order: each may learn from those before it.
STAGES = ("teacher", "mentor", "student")

# Which values a field may have, in words and as a test; None is not tested.
_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    ("above 0", lambda value: value > 0, (
        "total_steps", "batch_size", "log_every", "data.vocab_size", "data.text_len",
        "data.num_frames", "data.segment_s", "data.cache_mib", "data.num_threads",
        "model.image_size", "optim.learning_rate", "optim.clip_norm", "optim.accumulate_steps",
        "checkpoint.every_steps", "checkpoint.keep", "eval.every_steps", "eval.batch_size",
        "model.lora.alpha", "model.lora.tile", "model.merge.temperature", "distill.temperature",
        "distill.top_k",
        "calibration.f1", "calibration.tau", "calibration.timed_segments",
    )),
    ("at least 2", lambda value: value >= 2, ("calibration.rounds",)),
    ("above 0 and below 1", lambda value: 0 < value < 1, (
        "calibration.delta", "calibration.search_share",
    )),
    ("at least 0", lambda value: value >= 0, (
        "data.fold", "data.num_annotators", "data.caption_len", "data.transcript_context_s",
        "model.final_logits_softcap", "model.sliding_window", "model.lora.rank",
        "model.merge.num_keyframes", "model.merge.redundancy_weight", "loss.token", "loss.class_",
        "loss.score", "loss.prototype", "optim.weight_decay", "distill.phi", "distill.psi",
        "distill.class_", "distill.score", "distill.token", "distill.hidden", "distill.exits",
    )),
    ("above 0 and at most 1", lambda value: 0 < value <= 1, ("data.label_fraction", "eval.budget")),
    ("at least 0 and at most 1", lambda value: 0 <= value <= 1, ("optim.end_fraction",)),
    ("at least 0 and below 1", lambda value: 0 <= value < 1, ("optim.b1", "optim.b2")),
    ("at least -1 and at most 1, as a cosine is", lambda value: -1 <= value <= 1, (
        "model.merge.tau", "model.merge.floor",
    )),
    ("at least 0 and below 2**32", lambda value: 0 <= value < 2**32, ("seed", "data.folds_seed")),
)  # fmt: skip

_CHOICES = {
    "eval.f1": ("avg", "max"),
    "eval.correlation": ("tvsum_per_annotator", "summe_binary_summary", "summe_scores"),
    "eval.shots": ("data_set", "kts"),
    "distill.direction": ("teacher_first", "student_first"),
    "distill.positions": ("suffix", "all"),
    "distill.source": ("cache", "online"),
    "eval.exit_confidence": tuple(CONFIDENCES),
    "calibration.bound": ("exact", "normal"),
    "model.merge.reject": (">", ">="),
    "model.merge.reference": ("fixed", "released"),
}

_LORA_TOWERS = ("llm", "img")
_LORA_BASES = ("int8", "nf4")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which videos, cut how, with which words."""

    dataset: str  # builder/config, such as "synthetic/quickstart"
    data_dir: str = "~/tensorflow_datasets"  # where built data sets live
    manual_dir: str = ""  # a data set's own files as downloaded, for those that want it to be built
    allow_missing: bool = False  # build also where some of the data set's videos are not at hand
    # Which videos train and which test: "" = the data set's own splits; "community" = the five
    # published, overlapping folds; "partition" = five folds of our own, every video tested once; or
    # a JSON file of folds ([{"train_keys": [...], "test_keys": [...]}, ...]).
    folds: str = ""
    fold: int = 0  # which of them, from 0
    folds_seed: int = 0  # of the partition, and of who validates
    tokenizer: str = ""  # path of paligemma_tokenizer.model; "" trains one on the data set's text
    vocab_size: int = 1024  # text pieces at most, when the tokenizer is trained
    # A prompt template's name or path; of ours also no_title, no_transcript and no_sound.
    template: str = "deevisum"
    text_len: int = 64  # tokens of the prompt, the separator and the label word
    # Seconds before and after a segment whose transcript the prompt tells, too, nearest first.
    transcript_context_s: float = 0.0
    caption_len: int = 0  # tokens of a caption that the student also learns to tell; 0 = none
    num_frames: int = 2  # I, pictures per segment
    # bilinear (with antialias, as big_vision) or bicubic (as Hugging Face); None: as the weights in
    # `initialization` were trained, bilinear from scratch.
    resize: str | None = None
    augment: bool = False  # crop, mirror and tint pictures in training
    segment_s: float = 2.0  # seconds per segment
    label_fraction: float = 0.25  # share of a video's segments labelled as summary
    # The first so many of a video's annotators are trained on; 0 = all. Validation and test ask
    # all of them.
    num_annotators: int = 0
    left_out: tuple[str, ...] = ()  # of picture, text, sound: withheld in training and evaluation
    cache_mib: int = 1024  # memory for stored pictures and prompts
    num_threads: int = 2  # threads that decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Low-rank adapters (Hu et al. 2021), which then train alone, besides the exit heads."""

    rank: int = 0  # 0 = none: every parameter trains that optim.frozen does not name
    alpha: float = 8.0  # what an adapter adds is scaled by alpha / rank
    # llm: q, k, v, o, gate, up and down of every layer; img: SigLIP's q, k and v.
    towers: tuple[str, ...] = ("llm",)
    # How the language model's matrices, which stay as they are, are stored: int8 or nf4 (QLoRA,
    # Dettmers et al. 2023); None = in model.param_dtype.
    base: str | None = None
    tile: int = 64  # numbers that share one scale, of `base`


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Which of a segment's pictures keep all their tokens; each of the others becomes one token.

    ViLaMP's two steps (Cheng et al. 2025), see `deevisum_jax.keyframes`. How relevant a picture is,
    is its cosine to the mean picture of the segment.
    """

    num_keyframes: int = 0  # K of data.num_frames that keep their tokens; 0 = all, none is merged
    tau: float = 0.85  # cosine of two pictures' mean patches, beyond which one repeats the other
    reject: str = ">"  # ">": above tau, as released; ">=": from tau on, as the paper
    floor: float | None = None  # least cosine of a keyframe to the mean picture; None = any
    # Four learned linear maps and a learned temperature compare the patches, as released; without,
    # patches are compared as they are, as in the paper.
    projections: bool = False
    # Which keyframe a patch is compared with: fixed, the nearest before it; released, the picture
    # that the released code takes in its place.
    reference: str = "fixed"
    redundancy_weight: float = 1.0  # lambda, of the likeness to that keyframe's patch
    temperature: float = 0.01  # alpha, of a picture's patches; a learned one starts with it


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which PaliGemma 2, with which exits."""

    variant: str  # see deevisum_jax.models.paligemma2.VARIANTS
    exit_layers: tuple[int, ...]  # layers after which an exit head sits, increasing, last = depth
    dtype: str = "float32"  # compute; "bfloat16" on TPU
    param_dtype: str = "float32"  # storage
    # What the backward pass does not compute again: a key of models.layers.REMAT_POLICIES. In the
    # order of memory and speed: nothing_saveable, outputs_saveable,
    # dots_with_no_batch_dims_saveable, None (keeps everything).
    remat_policy: str | None = "nothing_saveable"
    # None: as the weights in `initialization` were trained; from scratch as the variant is.
    image_size: int | None = None  # pixels; position embeddings are resampled to it
    final_logits_softcap: float | None = None  # 0 = none, as big_vision; 30 = as Hugging Face
    sliding_window: int | None = None  # tokens, of layers 0, 2, 4 ...; 0 = all layers are global
    lora: LoraConfig = LoraConfig()
    merge: MergeConfig = MergeConfig()


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the parts of the loss."""

    token: float = 1.0  # cross-entropy of the suffix: the label word, and a caption if there is one
    class_: float = 1.0  # cross-entropy of the exits' summary heads, weighted over exits
    score: float = 1.0  # cross-entropy of the exits' importance scores
    prototype: float = 1.0  # of the exits' prototypes of the summary class, which move nothing else
    exit_weights: tuple[float, ...] | None = None  # one per exit, normalised; None = its depth


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What a stage learns from those before it, which are frozen (DEEVISum, distillation).

    A mentor's loss is CE + phi KL(teacher), a student's CE + phi KL(mentor) + psi KL(teacher).
    """

    phi: float = 0.0  # weight of the stage right before this one
    psi: float = 0.0  # weight of the one before that
    source: str = "online"  # teachers run beside the student (online), or ran before it (cache)
    folder: str = ""  # where teacher/ and mentor/ are, trained; "" = in the workdir
    direction: str = "teacher_first"  # KL(teacher || student), or student_first
    temperature: float = 2.0  # T, of both; the KL is multiplied by its square
    # Weights of the parts; each teacher's deepest exit teaches every exit.
    class_: float = 1.0  # the summary heads' two classes
    score: float = 1.0  # the importance score, as a probability
    token: float = 1.0  # tokens, over top_k of them and the rest as one
    hidden: float = 0.0  # hidden states at the last prefix position, through a learned projection
    positions: str = "suffix"  # of the token part: suffix, or all real tokens of the text
    top_k: int = 64  # the teacher's likeliest tokens; at most the vocabulary less one
    # Rows (own layer, layer of the stage right before, layer of the one before that), counted from
    # 1; empty: every exit, and the layers at its share of the depth.
    layer_map: tuple[tuple[int, ...], ...] = ()
    exits: float = 0.0  # weight of the KL from the deepest exit to those before it


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW with warm-up and cosine."""

    learning_rate: float  # peak
    warmup_steps: int = 0
    end_fraction: float = 0.0  # of the peak, where the cosine ends
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float | None = 1.0  # global gradient norm
    accumulate_steps: int = 1  # microbatches per update; divides batch_size
    frozen: tuple[str, ...] = ()  # regexes over parameter paths, such as "img/.*"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices per mesh axis; one of them may be -1 for what is left."""

    data: int = 1  # replicas
    fsdp: int = -1  # parameter shards; the batch is split over data and fsdp
    tensor: int = 1  # tensor parallel


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What is kept while training."""

    every_steps: int = 1000  # saved at this pace, besides what is validated
    keep: int = 2  # newest checkpoints kept; the best by validation tau is kept besides


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How often, on what, by which protocol."""

    every_steps: int = 1000  # validated and saved at this pace; tau chooses the best checkpoint
    batch_size: int = 64  # global
    validation_split: str = "validation"
    test_split: str = "test"
    budget: float = 0.15  # share of the video in a summary
    f1: str = "avg"  # over annotators: avg (TVSum) or max (SumMe)
    # What tau and rho compare: a name in summary.protocols.CORRELATIONS.
    correlation: str = "tvsum_per_annotator"
    shots: str = "data_set"  # a summary's units: data_set (its change points) or kts (ours)
    # Leave at the first exit at least this sure, until `--mode calibrate` has chosen thresholds.
    exit_threshold: float = 0.9
    exit_confidence: str = "max_probability"  # of typing.CONFIDENCES
    ablate_inputs: bool = True  # also evaluate the test split without picture, text and sound


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """What early exit may cost on average, and what that is tried on (`--mode calibrate`)."""

    f1: float | None = 0.005  # F1, of 1, that may be lost against the full model; None = any
    tau: float | None = 0.01  # likewise
    delta: float = 0.1  # the promise is broken at most this often
    # exact: for any distribution of losses; normal: by a t test, which takes fewer videos and
    # holds approximately.
    bound: str = "exact"
    dataset: str = ""  # of the videos that it is tried on; "" = data.dataset
    manual_dir: str = ""  # as data.manual_dir, of `dataset`
    split: str = ""  # "" = eval.validation_split
    search_share: float = 0.25  # of the videos: they choose what is tried on the others
    confidences: tuple[str, ...] = ("max_probability", "cosine", "agreement")
    rounds: int = 5  # how often the time of every point is taken
    timed_segments: int = 1024  # on as many segments


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment."""

    # What training starts from: "from_scratch"; a run's folder; the folder that
    # scripts/convert_weights.py wrote; a big_vision .npz or a Hugging Face folder of PaliGemma 2.
    initialization: str
    seed: int
    total_steps: int
    batch_size: int  # global
    log_every: int = 50  # steps
    data: DataConfig
    model: ModelConfig
    # Of STAGES: those that the file describes, and which of them this is. None: trained by itself.
    stages: tuple[str, ...] = ()
    stage: str = ""
    loss: LossConfig = LossConfig()
    distill: DistillConfig = DistillConfig()
    optim: OptimConfig
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    calibration: CalibrationConfig = CalibrationConfig()

    def __post_init__(self) -> None:
        values = _flatten(dataclasses.asdict(self))
        for wanted, holds, names in _RANGES:
            for name in names:
                if values[name] is not None and not holds(values[name]):
                    raise UserError(f"{name}={values[name]} must be {wanted}")
        for name in self.data.left_out:
            if name not in INPUTS:
                raise UserError(f"data.left_out names {name!r}; {closest(name, INPUTS)}")
        if self.data.resize not in (None, *RESIZES):
            raise UserError(
                f"data.resize={self.data.resize!r}; {closest(str(self.data.resize), RESIZES)}"
            )
        if not 0 <= self.optim.warmup_steps < self.total_steps:
            raise UserError(
                f"optim.warmup_steps={self.optim.warmup_steps} is not at least 0 and below "
                f"total_steps={self.total_steps}; shorten the warm-up"
            )
        if self.batch_size % self.optim.accumulate_steps:
            raise UserError(
                f"batch_size={self.batch_size} is not divisible by optim.accumulate_steps="
                f"{self.optim.accumulate_steps}; use a divisor"
            )
        if not self.model.exit_layers:
            raise UserError("model.exit_layers is empty; name at least the depth of the model")
        if self.loss.token + self.loss.class_ + self.loss.score == 0:
            raise UserError(
                "loss.token, loss.class_ and loss.score are all 0, so nothing would be learned; "
                "give one of them weight"
            )
        weights = self.loss.exit_weights
        if weights is not None and (
            len(weights) != len(self.model.exit_layers) or min(weights) < 0 or sum(weights) <= 0
        ):
            raise UserError(
                f"loss.exit_weights={weights} must be one weight of at least 0 for each of "
                f"model.exit_layers={self.model.exit_layers}, not all 0"
            )
        self._check_exits()
        if "train" in (self.eval.validation_split, self.eval.test_split):
            raise UserError(
                "eval.validation_split and eval.test_split must not be the split trained on, "
                "'train'; choose another"
            )
        for name, choices in _CHOICES.items():
            if values[name] not in choices:
                raise UserError(f"{name}={values[name]!r}; {closest(values[name], choices)}")
        self._check_lora()
        self._check_merge()
        self._check_layer_map()

    @property
    def teachers(self) -> dict[str, float]:
        """The earlier stages that this one learns from, and the weight of each, nearest first."""
        earlier = self.stages[: self.stages.index(self.stage)][::-1] if self.stage else ()
        weights = zip(earlier, (self.distill.phi, self.distill.psi), strict=False)
        return {name: weight for name, weight in weights if weight}

    @property
    def calibrated_on(self) -> tuple[DataConfig, str]:
        """Data and split of the videos that early exit is calibrated on.

        Raises:
          UserError: the model is trained or tested on them.
        """
        dataset = self.calibration.dataset or self.data.dataset
        split = self.calibration.split or self.eval.validation_split
        if dataset == self.data.dataset and split in ("train", self.eval.test_split):
            raise UserError(
                f"split {split!r} of {dataset} is what the model is trained or tested on, so a "
                "promise made with it would be worth nothing; give calibration.split another, or "
                "calibration.dataset other videos"
            )
        if dataset == self.data.dataset:
            return self.data, split
        others = dataclasses.replace(
            self.data,
            dataset=dataset,
            manual_dir=self.calibration.manual_dir,
            allow_missing=False,
            folds="",
            num_annotators=0,
        )
        return others, split

    def _check_exits(self) -> None:
        low, high = CONFIDENCES.get(self.eval.exit_confidence, (0.0, 1.0))
        if not low <= self.eval.exit_threshold <= high:
            raise UserError(
                f"eval.exit_threshold={self.eval.exit_threshold} is not within [{low:g}, {high:g}],"
                f" where the confidence {self.eval.exit_confidence!r} lies"
            )
        for name in self.calibration.confidences:
            if name not in CONFIDENCES:
                raise UserError(f"calibration.confidences: {name!r}; {closest(name, CONFIDENCES)}")
        if not self.calibration.confidences:
            raise UserError(f"calibration.confidences is empty; name some of {list(CONFIDENCES)}")
        for metric, most in (("f1", 1.0), ("tau", 2.0)):
            if (getattr(self.calibration, metric) or 0.0) >= most:
                raise UserError(
                    f"calibration.{metric}={getattr(self.calibration, metric)} must be below "
                    f"{most:g}, the most that can be lost"
                )
        if self.calibration.f1 is None and self.calibration.tau is None:
            raise UserError(
                "calibration.f1 and calibration.tau are both None, so nothing would be promised; "
                "set one of them"
            )

    def _check_lora(self) -> None:
        lora = self.model.lora
        for tower in lora.towers:
            if tower not in _LORA_TOWERS:
                raise UserError(
                    f"model.lora.towers names {tower!r}; {closest(tower, _LORA_TOWERS)}"
                )
        if lora.base not in (None, *_LORA_BASES):
            raise UserError(
                f"model.lora.base={lora.base!r}; {closest(str(lora.base), _LORA_BASES)}"
            )
        if lora.rank and not lora.towers:
            raise UserError("model.lora.towers is empty; name llm, or set model.lora.rank=0")
        if lora.base and not lora.rank:
            raise UserError(
                f"model.lora.base={lora.base!r} stores matrices so that they cannot train, and "
                "model.lora.rank=0 puts no adapters beside them; set a rank such as 8"
            )

    def _check_merge(self) -> None:
        kept, pictures = self.model.merge.num_keyframes, self.data.num_frames
        if kept > pictures:
            raise UserError(
                f"model.merge.num_keyframes={kept} is more than data.num_frames={pictures}, the "
                "pictures of a segment; give data.num_frames more, or keep fewer"
            )
        if self.model.merge.projections and kept in (0, pictures):
            raise UserError(
                "model.merge.projections compare patches that are merged, and model.merge."
                f"num_keyframes={kept} of data.num_frames={pictures} merges none; set it above 0 "
                "and below data.num_frames"
            )

    def _check_layer_map(self) -> None:
        if not self.stage:
            return
        columns = 1 + self.stages.index(self.stage)
        for row in self.distill.layer_map:
            if columns > 1 and (len(row) != columns or min(row) < 1):
                raise UserError(
                    f"distill.layer_map: {row} must be {columns} layers, counted from 1: the "
                    f"{self.stage}'s own, and one of each stage that it may learn from, nearest "
                    "first"
                )


def from_config_dict(values: ml_collections.ConfigDict) -> Config:
    """The checked `Config` of a `configs/*.py` file; of several stages the last one's.

    Raises:
      UserError: a field that does not exist (names the closest), is missing or has a wrong type.
    """
    return _stages(values.to_dict(), ())[-1]


def from_file(path: str, overrides: Sequence[str] = ()) -> Config:
    """The config of the stage that `stage` names, or of the last one; as `stages_from_file`."""
    return stages_from_file(path, overrides)[-1]


def stages_from_file(path: str, overrides: Sequence[str] = ()) -> tuple[Config, ...]:
    """The configs that `get_config()` of a Python file describes, in the order they are trained in.

    A file without `stages` describes one. With `stages`, `{"teacher": {...}, "student": {...}}`,
    each of them is the file's own fields with the stage's in their place. `stage` leaves one.

    Args:
      path: a file such as `configs/quickstart.py`.
      overrides: `field.of.group=value`, values as Python literals (`1e-4`, `(2, 4)`, `None`) or
        else plain text; for every stage, or as `stages.mentor.field=value` for one of them.
        (`ml_collections.config_flags` would read `sys.argv` behind our back.)

    Raises:
      UserError: the file cannot be run, or as `from_config_dict`.
    """
    if not pathlib.Path(path).is_file():
        what = "is a folder" if pathlib.Path(path).is_dir() else "does not exist"
        raise UserError(f"config file {path} {what}; give a file such as configs/quickstart.py")
    try:
        values = runpy.run_path(path)["get_config"]().to_dict()
    except Exception as error:  # whatever the user's file does wrong
        raise UserError(
            f"config file {path} gives no config: {type(error).__name__}: {error}; it must define "
            "get_config() that returns an ml_collections.ConfigDict"
        ) from error
    parsed = []
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"override {override!r} has no value; write --config.{name}=VALUE")
        parsed.append((name, _literal(text)))
    return _stages(values, parsed)


def described_stages(path: str, overrides: Sequence[str] = ()) -> tuple[Config, ...]:
    """As `stages_from_file`, all of them, also where `stage` asks for one."""
    return stages_from_file(path, [o for o in overrides if not o.startswith("stage=")])


def _stages(values: dict[str, Any], overrides: Sequence[tuple[str, Any]]) -> tuple[Config, ...]:
    # Of all stages first: what is said of one comes after it.
    ordered = sorted(overrides, key=lambda override: override[0].startswith("stages."))
    described = values.pop("stages", {})
    if not described:
        for name, value in ordered:
            _override(values, name, value)
        if values.get("stage"):
            raise UserError(
                f"stage={values['stage']!r}: the config describes no stages; leave it out"
            )
        return (_build(Config, values, ""),)
    for name in described:
        if name not in STAGES:
            raise UserError(f"config field stages.{name} is no stage; {closest(name, STAGES)}")
    present = tuple(name for name in STAGES if name in described)
    made = []
    for stage in present:
        own = _merged(values, described[stage])
        for name, value in ordered:
            group, _, rest = name.partition(".")
            if group == "stages":
                of, _, rest = rest.partition(".")
                if of not in present:
                    raise UserError(f"override {name}: {closest(of, present)}")
                if rest in ("", "stage", "stages"):
                    raise UserError(f"override {name} names no field of a stage")
                if of == stage:
                    _override(own, rest, value)
            else:
                _override(own, name, value)
        asked = own.pop("stage", "")
        if asked and asked not in present:
            raise UserError(f"stage={asked!r}; {closest(str(asked), present)}")
        if asked in ("", stage):
            made.append(_build(Config, own | {"stage": stage, "stages": present}, ""))
    return tuple(made)


def _merged(values: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """`values` with `own` in their place, group by group; neither is changed."""
    both = copy.deepcopy(dict(values))
    for name, value in own.items():
        old = both.get(name)
        both[name] = (
            _merged(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
        )
    return both


def _override(values: dict[str, Any], name: str, value: Any) -> None:
    *groups, leaf = name.split(".")
    group = values
    for part in groups:
        group = group.setdefault(part, {})
        if not isinstance(group, dict):
            raise UserError(f"config field {name} does not exist: {part} is no group of fields")
    group[leaf] = value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def save(config: Config, path: epath.Path) -> None:
    """Writes `config` as JSON."""
    write_whole(path, json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load(path: epath.Path) -> Config:
    """The `Config` that `save` wrote.

    Raises:
      UserError: the file is missing or is no config of this version.
    """
    try:
        with open_binary(path) as stream:
            values = json.loads(stream.read())
    except ValueError as error:  # a UserError is one
        raise UserError(
            f"{path} is not the config of a run ({error}); give the workdir of a finished run"
        ) from None
    return _build(Config, values, "")


def differences(old: Config, new: Config) -> list[str]:
    """Dotted fields in which two configs differ, as `name: old -> new`."""
    olds, news = _flatten(dataclasses.asdict(old)), _flatten(dataclasses.asdict(new))
    return [
        f"{name}: {olds[name]!r} -> {news[name]!r}" for name in olds if olds[name] != news[name]
    ]


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        flat |= (
            _flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat


def _build(cls: type, values: Mapping[str, Any], prefix: str) -> Any:
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for name in values:
        if name not in fields:
            raise UserError(f"config field {prefix}{name} does not exist; {closest(name, fields)}")
    required = [
        prefix + name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in values
    ]
    if required:
        raise UserError(f"the config leaves out {', '.join(required)}; set every one")
    return cls(
        **{name: _convert(hints[name], value, prefix + name) for name, value in values.items()}
    )


def _convert(hint: Any, value: Any, name: str) -> Any:
    if dataclasses.is_dataclass(hint):
        if not isinstance(value, Mapping):
            raise UserError(f"config field {name}={value!r} must be a group of fields")
        return _build(hint, value, f"{name}.")
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        (hint,) = (option for option in typing.get_args(hint) if option is not types.NoneType)
    if typing.get_origin(hint) is tuple and isinstance(value, list | tuple):
        item = typing.get_args(hint)[0]
        return tuple(_convert(item, part, f"{name}[{i}]") for i, part in enumerate(value))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(hint, type) or type(value) is not hint:
        wanted = getattr(hint, "__name__", str(hint))
        raise UserError(f"config field {name}={value!r} must be of type {wanted}")
    if hint is float and not math.isfinite(value):
        raise UserError(f"config field {name}={value} must be a finite number")
    return value
