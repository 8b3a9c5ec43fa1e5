"""Where a model's parameters come from: a run of ours, converted weights, a released checkpoint.

`config.initialization` names one of them, or `from_scratch`. Each is a `Start` and says what its
weights were trained to be computed with, so that a config that leaves this open follows it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import os
import re
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from qwix import QArray

from deevisum_jax import checkpoints, distributed, optim, runs, sharding
from deevisum_jax import config as config_lib
from deevisum_jax.config import Config
from deevisum_jax.convert import released, safetensors
from deevisum_jax.convert.released import Released
from deevisum_jax.convert.rows import Converted
from deevisum_jax.convert.tensors import ArrayTensor, read
from deevisum_jax.data import tokenizer
from deevisum_jax.data.tokenizer import Tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.files import exists, locate, read_json, write_whole
from deevisum_jax.models import lora, paligemma2
from deevisum_jax.models.paligemma2 import PaliGemma2Config, Params
from deevisum_jax.models.pytree import DTYPES
from deevisum_jax.runs import Settings, own_settings, settings_of, with_settings
from deevisum_jax.typing import RESIZES

# What converted weights consist of, besides a tokenizer and padding if the source had them.
WEIGHTS_FILE = "weights.json"
PARAMS_FOLDER = "params"
REPORT_FILE = "report.json"

_FORMAT = 1  # of WEIGHTS_FILE

# What is made of each parameter, given its path, as soon as it is read; None = nothing else.
_Finish = Callable[[str, jax.Array], Any] | None


class Start(Protocol):
    """Parameters to start from, none of them read yet."""

    settings: Settings
    # Path or name of the released weights at the root; None if there are none.
    origin: str | None

    def check_variant(self, config: Config) -> None:
        """Raises a `UserError` if these are the parameters of another variant."""

    def check(self, config: Config, vocab_size: int | None) -> None:
        """Refuses a config that these parameters do not fit; reads no numbers.

        Args:
          config: of the run.
          vocab_size: of the model with the run's tokenizer; None if there is none yet.

        Raises:
          UserError: another variant, other exits, another vocabulary, or adapters over quantised
            weights or projections of merging that cannot be taken over.
        """

    def tokenizer(self) -> Tokenizer | None:
        """The tokenizer whose pieces the embeddings belong to, if it is known."""

    def load(self, config: PaliGemma2Config, abstract: Params, key: jax.Array) -> Params:
        """All parameters of the model.

        The adapters of a model that has some are fresh, and change nothing yet; those of a run that
        had the same go on. A run's other adapters are added to its weights. What is quantised is so
        as soon as it is read, matrix by matrix; of a run, behind reading all of it.

        Args:
          config: of the model.
          abstract: shapes, dtypes and shardings.
          key: what the start does not have, such as exit heads and the projections of merged
            frames, is drawn from it.

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
    if config.initialization == config_lib.FROM_SCRATCH:
        return None
    try:
        return open_start(config.initialization)
    except UserError as error:
        meant = difflib.get_close_matches(config.initialization, [config_lib.FROM_SCRATCH])
        hint = f"; did you mean {meant[0]!r}?" if meant else ""
        raise UserError(f"initialization={config.initialization!r}: {error}{hint}") from error


def open_start(path: str) -> Start:
    """Opens a run, converted weights, or a released checkpoint, by what a path holds.

    Raises:
      UserError: it holds none of them, or one that is damaged.
    """
    if is_weights(path):
        return FromWeights(locate(path))
    if released.is_released(path):
        return FromReleased(released.open_released(path))
    folder = locate(path)
    if missing := runs.missing_parts(folder):
        raise UserError(_what_else(path, folder, missing))
    return FromRun(folder)


def _what_else(path: str, folder: epath.Path, missing: list[str]) -> str:
    """What a path is that nothing can start from, as far as it can be guessed."""
    if not exists(folder):
        on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+", path)
        return "there is no such file or folder; " + (
            f"if it is a name on the Hub, download it: hf download {path} --local-dir {folder.name}"
            if on_hub
            else "correct the path"
        )
    if folder.is_file():
        if folder.suffix == ".safetensors":
            return f"this is one file of a checkpoint; give its folder, {folder.parent}"
        return "this file is no checkpoint; give an .npz of big_vision, or a folder"
    if (folder / "adapter_config.json").exists():
        return "this is an adapter and no model; merge it into its base model first"
    if any(folder.glob("*.safetensors")):
        return (
            "this folder has weights and no config.json with a model_type, which says of what "
            "model they are; download that, too"
        )
    return (
        f"this folder is no run of ours (it lacks {', '.join(missing)}), no converted weights (it "
        f"lacks {WEIGHTS_FILE}) and no Hugging Face folder of PaliGemma 2; give one of them, or an "
        ".npz of big_vision"
    )


def is_weights(path: str) -> bool:
    """Whether a path is the folder of converted weights, in a bucket or not."""
    return exists(locate(path) / WEIGHTS_FILE)


def settle(config: Config, workdir: epath.Path) -> tuple[Config, Start | None]:
    """Fills in what the config leaves open: as the run began, or as its start says.

    Returns:
      The config, and the start; None from scratch, and where the run stands already.

    Raises:
      UserError: as `find`, or the start is of another variant.
    """
    if runs.has_checkpoint(workdir) and exists(workdir / runs.CONFIG_FILE):
        return with_settings(config, settings_of(runs.load_config(workdir))), None
    start = find(config)
    if start is None:
        return with_settings(config, settings_of(config)), None
    start.check_variant(config)
    return with_settings(config, start.settings), start


def _check_variant(variant: str, config: Config) -> None:
    if variant != config.model.variant:
        raise UserError(
            f"initialization={config.initialization!r} is a {variant}, not model.variant="
            f"{config.model.variant}; set model.variant={variant}, or start from another"
        )


@dataclasses.dataclass(frozen=True)
class FromRun:
    """A trained run of ours; its best checkpoint, exit heads and what merging learned included."""

    folder: epath.Path

    @functools.cached_property
    def config(self) -> Config:
        """What it was trained with."""
        return runs.load_config(self.folder)

    @property
    def settings(self) -> Settings:
        """As it was trained with."""
        return settings_of(self.config)

    @property
    def origin(self) -> str | None:
        """As the run noted it when it began."""
        file = self.folder / runs.ORIGIN_FILE
        if exists(file):
            return read_json(file, "delete it")["released_weights"]
        start = self.config.initialization  # of before it was noted
        return None if start == config_lib.FROM_SCRATCH else start

    def check_variant(self, config: Config) -> None:
        """As `Start.check_variant`."""
        _check_variant(self.config.model.variant, config)

    def check(self, config: Config, vocab_size: int | None) -> None:
        """As `Start.check`."""
        self.check_variant(config)
        _check_exits(config, self.config.model.exit_layers)
        self._check_lora(config)
        self._check_merging(config)
        size = self.settings.image_size
        if config.model.image_size not in (None, size):
            raise UserError(
                f"initialization={config.initialization!r} was trained on pictures of {size} "
                f"pixels, not of model.image_size={config.model.image_size}; set the same, or "
                "export the run and start from the export, which resamples its position embeddings"
            )
        _check_pieces(config, self)

    def tokenizer(self) -> Tokenizer:
        """As `Start.tokenizer`."""
        return tokenizer.load_tokenizer(self.folder / runs.TOKENIZER_FILE)

    def load(self, config: PaliGemma2Config, abstract: Params, key: jax.Array) -> Params:
        """As `Start.load`; only adapters are drawn, and projections that it merged without."""
        if config.has_merge_params and not self.config.model.merge.projections:
            towers = {name: part for name, part in abstract.items() if name != "merge"}
            params = self.load(paligemma2.without_merging(config), towers, key)
            return params | _draw(_is_merging, config, abstract, key)
        if lora.meaning(self.config.model.lora) == lora.meaning(config.lora):
            return self._restore(optim.of_model(abstract))
        return _load(self._read_merged, config, abstract, key)

    def _restore(self, abstract: Params) -> Params:
        with checkpoints.Checkpoints(self.folder / runs.CHECKPOINT_FOLDER) as saved:
            return saved.restore_params(saved.best_step, abstract)

    def _read_merged(self, config: PaliGemma2Config, abstract: Params, finish: _Finish) -> Params:
        """All of it first, since its checksums are of all; each leaf is let go when it is made."""
        own = dataclasses.replace(config, lora=self.config.model.lora)
        stored = abstract
        if own.lora is not None:
            shapes = paligemma2.abstract_params(own)
            mesh = jax.tree.leaves(abstract)[0].sharding.mesh
            stored = sharding.abstract(shapes, sharding.param_shardings(shapes, mesh))
        left, params = _flat(self._restore(stored)), {}
        for path, leaf in _flat(abstract).items():
            part = {name: left.pop(name) for name in (path, *lora.beside(path)) if name in left}
            params[path] = _plain(part, path, own, leaf)
            if finish:
                params[path] = finish(path, params[path])
        return unflatten_dict(params, sep="/")

    def _check_lora(self, config: Config) -> None:
        own, wanted = self.config.model.lora, config.model.lora
        if own.rank and own.base and wanted.base and lora.meaning(own) != lora.meaning(wanted):
            raise UserError(
                f"initialization={config.initialization!r} learned adapters over weights stored as "
                f"{own.base}. To go on with them, set its own model.lora (rank={own.rank}, alpha="
                f"{own.alpha}, towers={own.towers}, base={own.base!r}, tile={own.tile}). To begin "
                "new ones they must be added to the weights, and rounding the sum to model.lora."
                f"base={wanted.base!r} would lose much of what they learned; set model.lora."
                "base=None"
            )

    def _check_merging(self, config: Config) -> None:
        if self.config.model.merge.projections and not config.model.merge.projections:
            raise UserError(
                f"initialization={config.initialization!r} learned how to merge frames, and "
                "model.merge.projections=False would drop that; set it True, with model.merge."
                f"num_keyframes (its own is {self.config.model.merge.num_keyframes})"
            )

    def vocab_padding(self, config: PaliGemma2Config) -> np.ndarray | None:
        """As `Start.vocab_padding`."""
        return read_padding(self.folder)


@dataclasses.dataclass(frozen=True)
class FromReleased:
    """A released checkpoint; exit heads are drawn, unless it is an export of ours and has them.

    What merging learns is always drawn.
    """

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

    @property
    def origin(self) -> str | None:
        """The checkpoint itself, unless it is an export of a run of ours."""
        return self.checkpoint.origin

    def check_variant(self, config: Config) -> None:
        """As `Start.check_variant`."""
        self.checkpoint.check(paligemma2.get_config(config.model.variant))

    def check(self, config: Config, vocab_size: int | None) -> None:
        """As `Start.check`."""
        self.check_variant(config)
        vocab_size = _demand_vocab_size(config, vocab_size)
        self.checkpoint.check_vocabulary(vocab_size)
        _check_pieces(config, self)
        if self.checkpoint.exit_layers:
            _check_exits(config, self.checkpoint.exit_layers)
        # All of it, before data is built.
        settings = settings_of(with_settings(config, self.settings))
        self.checkpoint.match(
            paligemma2.get_config(
                config.model.variant,
                img=settings.img,
                llm=settings.llm | {"vocab_size": vocab_size},
            )
        )

    def tokenizer(self) -> Tokenizer | None:
        """As `Start.tokenizer`."""
        return self.checkpoint.tokenizer()

    def load(self, config: PaliGemma2Config, abstract: Params, key: jax.Array) -> Params:
        """As `Start.load`."""

        def read(config: PaliGemma2Config, abstract: Params, finish: _Finish) -> Params:
            params = self.checkpoint.fill(config, abstract, finish)
            if "exits" not in params:
                params |= _draw(_is_exit, config, abstract, key)
            return params | _draw(_is_merging, config, abstract, key)

        return _load(read, config, abstract, key)

    def vocab_padding(self, config: PaliGemma2Config) -> np.ndarray | None:
        """As `Start.vocab_padding`."""
        return self.checkpoint.vocab_padding(config)


@dataclasses.dataclass(frozen=True)
class FromWeights:
    """Converted weights: a released checkpoint in our own form; exit heads and merging are drawn.

    Of many processes each reads what its devices hold; of a release each reads all.
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

    @property
    def origin(self) -> str:
        """What was converted."""
        return self.facts["source"]

    def check_variant(self, config: Config) -> None:
        """As `Start.check_variant`."""
        _check_variant(self.facts["variant"], config)

    def model_config(self) -> PaliGemma2Config:
        """The model as it was converted, without exit heads."""
        facts = self.facts
        return paligemma2.get_config(
            facts["variant"],
            img=self.settings.img,
            llm=self.settings.llm | {"vocab_size": facts["vocab_size"]},
            param_dtype=facts["dtype"],
        )

    def check(self, config: Config, vocab_size: int | None) -> None:
        """As `Start.check`."""
        given, size = config.initialization, self.settings.image_size
        self.check_variant(config)
        if config.model.image_size not in (None, size):
            raise UserError(
                f"initialization={given!r} was converted for pictures of {size} pixels, not of "
                f"model.image_size={config.model.image_size}; set the same, or convert again with "
                f"--image_size {config.model.image_size}"
            )
        _check_pieces(config, self)
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

        def read(config: PaliGemma2Config, abstract: Params, finish: _Finish) -> Params:
            towers = {name: abstract[name] for name in ("img", "llm")}
            params = checkpoints.restore_params(self.folder / PARAMS_FOLDER, towers, finish)
            for wanted in (_is_exit, _is_merging):
                params |= _draw(wanted, config, abstract, key)
            return params

        return _load(read, config, abstract, key)

    def vocab_padding(self, config: PaliGemma2Config) -> np.ndarray | None:
        """As `Start.vocab_padding`."""
        return read_padding(self.folder)


def save_weights(
    folder: os.PathLike[str],
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
      folder: local; the caller renames it when all is written.
      params: `img` and `llm`.
      config: of the model, `param_dtype` included.
      variant: its name.
      resize: how pictures come to its size.
      source: what was converted, for people.
      report: every tensor's way.
      tokens: the tokenizer that lay beside the source.
      padding: rows behind the vocabulary.
    """
    folder = epath.Path(folder)
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


def _file_sizes(folder: epath.Path) -> dict[str, int]:
    """Bytes of every file below a folder, by path: what a copy that broke off is known by."""
    sizes = {}
    for path in folder.iterdir():
        if path.is_dir():
            below = _file_sizes(path)
            sizes |= {f"{path.name}/{name}": size for name, size in below.items()}
        else:
            sizes[path.name] = path.stat().length
    return sizes


def keep(workdir: epath.Path, start: Start | None, config: PaliGemma2Config) -> None:
    """Notes in a run's folder what only its start knows and an export will want to know."""

    def note() -> None:
        write_padding(workdir, start.vocab_padding(config) if start else None)
        origin = {"released_weights": start.origin if start else None}
        write_whole(workdir / runs.ORIGIN_FILE, json.dumps(origin) + "\n")

    distributed.on_main(note)


def write_padding(folder: epath.Path, padding: np.ndarray | None) -> None:
    """Keeps the rows behind a vocabulary at Hugging Face, if there are any, and no others."""
    file = folder / runs.PADDING_FILE
    if padding is None:
        file.unlink(missing_ok=True)
    else:
        safetensors.write_safetensors_file(file, {"rows": ArrayTensor(padding)})


def read_padding(folder: epath.Path) -> np.ndarray | None:
    """What `write_padding` kept."""
    file = folder / runs.PADDING_FILE
    return read(safetensors.open_safetensors(file)["rows"]) if exists(file) else None


def _check_exits(config: Config, theirs: tuple[int, ...]) -> None:
    if theirs != config.model.exit_layers:
        raise UserError(
            f"the exit heads of initialization={config.initialization!r} sit after the layers "
            f"{theirs}, not after model.exit_layers={config.model.exit_layers}; set the same"
        )


def _check_pieces(config: Config, start: Start) -> None:
    """Refuses another tokenizer than the weights' own, whatever its size."""
    if not config.data.tokenizer or (own := start.tokenizer()) is None:
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


def _load(
    read: Callable[[PaliGemma2Config, Params, _Finish], Params],
    config: PaliGemma2Config,
    abstract: Params,
    key: jax.Array,
) -> Params:
    """What `read` gives of the model without adapters, made into the model.

    Of a quantised model its matrices are made codes while they are read, one by one: a model in 4
    bits need not fit on its devices, or into the host's memory, as numbers.
    """
    abstract = optim.of_model(abstract)
    if config.lora is None:
        return read(config, abstract, None)
    wanted = _flat(abstract)

    def finish(path: str, leaf: jax.Array) -> Any:
        if not isinstance(wanted.get(path), QArray):
            return leaf
        fit = jax.jit(
            lambda leaf: _flat(lora.quantize(unflatten_dict({path: leaf}, sep="/"), config.lora)),
            out_shardings={path: jax.tree.map(lambda array: array.sharding, wanted[path])},
        )
        # Before the next is read.
        return jax.block_until_ready(fit(leaf))[path]

    plain = lora.base_of(abstract, config.param_dtype)
    params = read(paligemma2.without_lora(config), plain, finish if config.lora.base else None)
    adapters = _draw(lora.is_adapter, config, abstract, key)
    return unflatten_dict(_flat(params) | _flat(adapters), sep="/")


def _plain(
    part: Params, path: str, config: PaliGemma2Config, leaf: jax.ShapeDtypeStruct
) -> jax.Array:
    """A weight with its adapter, if it has one, as the model without has it.

    Args:
      part: the weight and what is beside it, by path.
      path: of the weight.
      config: of the model with adapters.
      leaf: what is wanted.
    """
    if len(part) == 1 and not isinstance(part[path], QArray):
        return part[path]
    merge = functools.partial(lora.merge, config=config.lora, dtype=config.param_dtype)
    fit = jax.jit(
        lambda part: _flat(merge(unflatten_dict(part, sep="/")))[path], out_shardings=leaf.sharding
    )
    return fit(part)


def _draw(
    wanted: Callable[[str], bool], config: PaliGemma2Config, abstract: Params, key: jax.Array
) -> Params:
    """Fresh parameters of those paths, drawn where they are to live."""

    def pick(params: Params) -> dict[str, Any]:
        return {path: leaf for path, leaf in _flat(params).items() if wanted(path)}

    shardings = jax.tree.map(lambda leaf: leaf.sharding, pick(abstract))
    if not shardings:
        return {}
    # The compiler drops the rest of the model.
    draw = jax.jit(lambda key: pick(paligemma2.init_params(config, key)), out_shardings=shardings)
    return unflatten_dict(draw(key), sep="/")


def _is_exit(path: str) -> bool:
    return path.startswith("exits/")


def _is_merging(path: str) -> bool:
    return path.startswith("merge/")


def _flat(params: Params) -> dict[str, Any]:
    return flatten_dict(params, sep="/")
