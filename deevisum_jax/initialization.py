"""Where a model's parameters come from: a run of ours, converted weights, a released checkpoint.

`config.initialization` names one of them, or `from_scratch`. Each is a `Start` and says what its
weights were trained to be computed with, so that a config that leaves this open follows it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath

from deevisum_jax import checkpoints, runs
from deevisum_jax import config as config_lib
from deevisum_jax.config import Config
from deevisum_jax.convert import released, safetensors
from deevisum_jax.convert.released import Released
from deevisum_jax.convert.rows import Converted
from deevisum_jax.convert.tensors import ArrayTensor, read
from deevisum_jax.data import tokenizer
from deevisum_jax.data.tokenizer import Tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.files import exists, write_whole
from deevisum_jax.models import paligemma2
from deevisum_jax.models.paligemma2 import PaliGemma2Config, Params
from deevisum_jax.models.pytree import DTYPES
from deevisum_jax.runs import Settings, own_settings, settings_of, with_settings
from deevisum_jax.typing import RESIZES

# What converted weights consist of, besides a tokenizer and padding if the source had them.
WEIGHTS_FILE = "weights.json"
PARAMS_FOLDER = "params"
REPORT_FILE = "report.json"

_FORMAT = 1  # of WEIGHTS_FILE


class Start(Protocol):
    """Parameters to start from, none of them read yet."""

    settings: Settings

    def check(self, config: Config, vocab_size: int | None) -> None:
        """Refuses a config that these parameters do not fit; reads no numbers.

        Args:
          config: of the run.
          vocab_size: of the model with the run's tokenizer; None if there is none yet.

        Raises:
          UserError: another variant, other exits, or another vocabulary.
        """

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer whose pieces the embeddings belong to, if it is known."""

    def load(self, config: PaliGemma2Config, abstract: Params, key: jax.Array) -> Params:
        """All parameters of the model.

        Args:
          config: of the model.
          abstract: shapes, dtypes and shardings.
          key: what the start does not have, such as exit heads, is drawn from it.

        Raises:
          UserError: they do not fit the model, or cannot be read.
        """

    def vocab_padding(self, config: PaliGemma2Config) -> np.ndarray | None:
        """Rows that stood behind the vocabulary at Hugging Face, for the way back there."""


def find(config: Config) -> Start | None:
    """What `config.initialization` names; None when from scratch.

    Raises:
      UserError: it names nothing that a model can start from, or what it names is damaged.
    """
    given = config.initialization
    if given == config_lib.FROM_SCRATCH:
        return None
    if is_weights(given):
        return FromWeights(epath.Path(given).expanduser())
    if released.is_released(given):
        return FromReleased(released.open_released(given))
    folder = pathlib.Path(given).expanduser()
    if missing := runs.missing_parts(folder):
        raise UserError(
            f"initialization={given!r} is neither {config_lib.FROM_SCRATCH!r}, nor the folder of a "
            f"run of ours (it lacks {', '.join(missing)}), nor converted weights (it lacks "
            f"{WEIGHTS_FILE}), nor a big_vision .npz, nor a Hugging Face folder of PaliGemma 2; "
            "give one of them"
        )
    return FromRun(folder)


def is_weights(path: str) -> bool:
    """Whether a path is the folder of converted weights, in a bucket or not."""
    return exists(epath.Path(path).expanduser() / WEIGHTS_FILE)


def settle(config: Config, workdir: pathlib.Path) -> Config:
    """The config with what it leaves open filled in: as the run began, or as its start says.

    Raises:
      UserError: as `find`.
    """
    if runs.has_checkpoint(workdir) and (workdir / runs.CONFIG_FILE).exists():
        return with_settings(config, settings_of(runs.load_config(workdir)))
    start = find(config)
    if start is None:
        variant = paligemma2.get_config(config.model.variant)
        return with_settings(config, own_settings(variant))
    return with_settings(config, start.settings)


def _check_variant(given: str, variant: str, config: Config) -> None:
    if variant != config.model.variant:
        raise UserError(
            f"initialization={given!r} is a {variant}, not model.variant={config.model.variant}; "
            f"set model.variant={variant}, or start from another"
        )


@dataclasses.dataclass(frozen=True)
class FromRun:
    """A trained run of ours; its best checkpoint, exit heads included."""

    folder: pathlib.Path

    @property
    def config(self) -> Config:
        """What it was trained with."""
        return runs.load_config(self.folder)

    @property
    def settings(self) -> Settings:
        """As it was trained with."""
        return settings_of(self.config)

    def check(self, config: Config, vocab_size: int | None) -> None:
        """As `Start.check`."""
        given, theirs = config.initialization, self.config.model
        _check_variant(given, theirs.variant, config)
        if theirs.exit_layers != config.model.exit_layers:
            raise UserError(
                f"the exit heads of initialization={given!r} sit after the layers "
                f"{theirs.exit_layers}, not after model.exit_layers={config.model.exit_layers}; "
                "set the same"
            )
        if config.model.image_size not in (None, self.settings.image_size):
            raise UserError(
                f"initialization={given!r} was trained on pictures of {self.settings.image_size} "
                f"pixels, not of model.image_size={config.model.image_size}; set the same, or "
                "export the run and start from the export, which resamples its position embeddings"
            )
        _check_pieces(config, self.tokenizer())

    def tokenizer(self) -> Tokenizer:
        """As `Start.tokenizer`."""
        return tokenizer.load_tokenizer(self.folder / runs.TOKENIZER_FILE)

    def load(self, config: PaliGemma2Config, abstract: Params, key: jax.Array) -> Params:
        """As `Start.load`; nothing is drawn."""
        with checkpoints.Checkpoints(self.folder / runs.CHECKPOINT_FOLDER) as saved:
            return saved.restore_params(saved.best_step, abstract)

    def vocab_padding(self, config: PaliGemma2Config) -> np.ndarray | None:
        """As `Start.vocab_padding`."""
        return read_padding(self.folder)


@dataclasses.dataclass(frozen=True)
class FromReleased:
    """A released checkpoint; exit heads are drawn, unless it is an export of ours and has them."""

    checkpoint: Released

    @property
    def settings(self) -> Settings:
        """As the release computes: big_vision and Hugging Face differ."""
        facts = self.checkpoint.facts
        return Settings(
            image_size=facts.image_size,
            final_logits_softcap=facts.final_logits_softcap,
            sliding_window=facts.sliding_window or 0,
            resize=facts.resize,
        )

    def check(self, config: Config, vocab_size: int | None) -> None:
        """As `Start.check`."""
        self.checkpoint.check(paligemma2.get_config(config.model.variant))
        vocab_size = _demand_vocab_size(config, vocab_size)
        self.checkpoint.check_vocabulary(vocab_size)
        _check_pieces(config, self.tokenizer())
        if self.checkpoint.exit_layers not in ((), config.model.exit_layers):
            raise UserError(
                f"the exit heads of initialization={config.initialization!r} sit after the layers "
                f"{self.checkpoint.exit_layers}, not after model.exit_layers="
                f"{config.model.exit_layers}; set the same"
            )
        # All of it, before data is built.
        self.checkpoint.match(
            paligemma2.get_config(
                config.model.variant,
                img={"image_size": config.model.image_size or self.settings.image_size},
                llm={"vocab_size": vocab_size},
            )
        )

    def tokenizer(self) -> Tokenizer | None:
        """As `Start.tokenizer`."""
        return self.checkpoint.tokenizer()

    def load(self, config: PaliGemma2Config, abstract: Params, key: jax.Array) -> Params:
        """As `Start.load`."""
        params = self.checkpoint.fill(config, abstract)
        return params if "exits" in params else params | _fresh_exits(config, abstract, key)

    def vocab_padding(self, config: PaliGemma2Config) -> np.ndarray | None:
        """As `Start.vocab_padding`."""
        return self.checkpoint.vocab_padding(config)


@dataclasses.dataclass(frozen=True)
class FromWeights:
    """Converted weights: a released checkpoint in our own form; exit heads are drawn.

    Orbax reads it faster than the release was read, each process what its devices hold.
    """

    folder: epath.Path  # it may have been copied into a bucket

    @functools.cached_property
    def facts(self) -> dict[str, Any]:
        """The content of WEIGHTS_FILE.

        Raises:
          UserError: it is not what `save_weights` writes.
        """
        file = self.folder / WEIGHTS_FILE
        try:
            facts = json.loads(file.read_text(encoding="utf-8"))
            settings = Settings(**facts["settings"])
            known = (
                facts["format"] == _FORMAT
                and isinstance(facts["files"], dict)
                and facts["variant"] in paligemma2.VARIANTS
                and facts["dtype"] in DTYPES
                and settings.resize in RESIZES
                and type(settings.final_logits_softcap) in (int, float)
                and all(
                    type(number) is int
                    for number in (
                        facts["vocab_size"],
                        settings.image_size,
                        settings.sliding_window,
                    )
                )
            )
        except (OSError, ValueError, KeyError, TypeError):
            known = False
        if not known:
            raise UserError(
                f"{file} is damaged or not of this version; run scripts/convert_weights.py again"
            )
        return facts

    @property
    def settings(self) -> Settings:
        """As the release computes, or as the conversion was told."""
        return Settings(**self.facts["settings"])

    def model_config(self) -> PaliGemma2Config:
        """The model as it was converted, without exit heads."""
        facts = self.facts
        return paligemma2.get_config(
            facts["variant"],
            img={"image_size": self.settings.image_size},
            llm={
                "vocab_size": facts["vocab_size"],
                "final_logits_softcap": self.settings.final_logits_softcap,
                "sliding_window": self.settings.sliding_window or None,
            },
            param_dtype=facts["dtype"],
        )

    def check(self, config: Config, vocab_size: int | None) -> None:
        """As `Start.check`."""
        given, size = config.initialization, self.settings.image_size
        _check_variant(given, self.facts["variant"], config)
        if config.model.image_size not in (None, size):
            raise UserError(
                f"initialization={given!r} was converted for pictures of {size} pixels, not of "
                f"model.image_size={config.model.image_size}; set the same, or convert again with "
                f"--image_size {config.model.image_size}"
            )
        _check_pieces(config, self.tokenizer())
        wanted = _demand_vocab_size(config, vocab_size)
        if (rows := self.facts["vocab_size"]) != wanted:
            raise UserError(
                f"{self.folder} has a vocabulary of {rows}, the model with its tokenizer of "
                f"{wanted}; give the tokenizer that belongs to the weights (data.tokenizer; "
                "paligemma_tokenizer.model for Google's)"
            )

    def tokenizer(self) -> Tokenizer | None:
        """As `Start.tokenizer`."""
        file = self.folder / runs.TOKENIZER_FILE
        return tokenizer.parse_tokenizer(file.read_bytes(), str(file)) if exists(file) else None

    def load(self, config: PaliGemma2Config, abstract: Params, key: jax.Array) -> Params:
        """As `Start.load`."""
        if (found := _file_sizes(self.folder / PARAMS_FOLDER)) != self.facts["files"]:
            differing = sorted(found.items() ^ self.facts["files"].items())
            raise UserError(
                f"{self.folder / PARAMS_FOLDER / differing[0][0]} is missing, cut off or too much; "
                "copy the folder again, or convert the weights again"
            )
        towers = {name: abstract[name] for name in ("img", "llm")}
        params = checkpoints.restore_params(self.folder / PARAMS_FOLDER, towers)
        return params | _fresh_exits(config, abstract, key)

    def vocab_padding(self, config: PaliGemma2Config) -> np.ndarray | None:
        """As `Start.vocab_padding`."""
        return read_padding(self.folder)


def save_weights(
    folder: pathlib.Path,
    params: Params,
    config: PaliGemma2Config,
    *,
    variant: str,
    resize: str,
    source: str,
    report: list[Converted],
    tokens: Tokenizer | None,
    padding: np.ndarray | None,
) -> None:
    """Writes what `FromWeights` reads, into an empty folder.

    Args:
      folder: the caller renames it when all is written.
      params: `img` and `llm`.
      config: of the model, `param_dtype` included.
      variant: its name.
      resize: how pictures come to its size.
      source: what was converted, for people.
      report: every tensor's way.
      tokens: the tokenizer that lay beside the source.
      padding: rows behind the vocabulary.
    """
    checkpoints.save_params(folder / PARAMS_FOLDER, params)
    if tokens is not None:
        tokenizer.save_tokenizer(tokens, folder / runs.TOKENIZER_FILE)
    write_padding(folder, padding)
    lines = [dataclasses.asdict(line) for line in report]
    write_whole(folder / REPORT_FILE, json.dumps(lines, indent=1) + "\n")
    facts = {
        "format": _FORMAT,
        "files": _file_sizes(folder / PARAMS_FOLDER),
        "variant": variant,
        "vocab_size": config.llm.vocab_size,
        "dtype": config.param_dtype,
        "settings": dataclasses.asdict(own_settings(config, resize)),
        "source": source,
    }
    write_whole(folder / WEIGHTS_FILE, json.dumps(facts, indent=2) + "\n")


def _file_sizes(folder: pathlib.Path | epath.Path) -> dict[str, int]:
    """Bytes of every file below a folder, by path: what a copy that broke off is known by."""
    folder = epath.Path(folder)
    sizes = {}
    for path in folder.iterdir():
        if path.is_dir():
            below = _file_sizes(path)
            sizes |= {f"{path.name}/{name}": size for name, size in below.items()}
        else:
            sizes[path.name] = path.stat().length
    return sizes


def write_padding(folder: pathlib.Path, padding: np.ndarray | None) -> None:
    """Keeps the rows behind a vocabulary at Hugging Face, if there are any, and no others."""
    file = folder / runs.PADDING_FILE
    if padding is None:
        file.unlink(missing_ok=True)
    else:
        safetensors.write_safetensors_file(file, {"rows": ArrayTensor(padding)})


def read_padding(folder: pathlib.Path | epath.Path) -> np.ndarray | None:
    """What `write_padding` kept."""
    file = epath.Path(folder) / runs.PADDING_FILE
    return read(safetensors.open_safetensors(file)["rows"]) if exists(file) else None


def _check_pieces(config: Config, own: Tokenizer | None) -> None:
    """Refuses another tokenizer than the weights' own, whatever its size."""
    if not config.data.tokenizer or own is None:
        return
    if tokenizer.load_tokenizer(config.data.tokenizer).pieces != own.pieces:
        raise UserError(
            f"data.tokenizer={config.data.tokenizer} is not the tokenizer of initialization="
            f"{config.initialization!r}, whose embeddings belong to its own pieces; leave "
            "data.tokenizer empty"
        )


def _demand_vocab_size(config: Config, found: int | None) -> int:
    if found is None:
        raise UserError(
            f"initialization={config.initialization!r} brings no tokenizer, and its embeddings "
            "belong to the pieces of its own; give data.tokenizer the path of "
            "paligemma_tokenizer.model (docs/WEIGHTS.md says where it is)"
        )
    return found


def _fresh_exits(config: PaliGemma2Config, abstract: Params, key: jax.Array) -> Params:
    """`{"exits": ...}`, drawn where they are to live; nothing for a model without."""
    if not config.exit_layers:
        return {}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract["exits"])
    # The compiler drops the rest of the model.
    draw = jax.jit(
        lambda key: paligemma2.init_params(config, key)["exits"], out_shardings=shardings
    )
    return {"exits": draw(key)}
