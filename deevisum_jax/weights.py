"""Weights from one form into another: released ones into ours, ours into released ones.

What is read is a trained run, converted weights, or a released checkpoint. The scripts
`convert_weights.py`, `export_hf.py` and `export_big_vision.py` are this module's flags.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import jax

from deevisum_jax import experiment, initialization, runs, sharding
from deevisum_jax.config import Config
from deevisum_jax.convert import big_vision, hf_folder, huggingface, npz, safetensors
from deevisum_jax.convert.released import Released
from deevisum_jax.convert.rows import Converted, spill
from deevisum_jax.convert.tensors import Tensor, cast, named_dtype
from deevisum_jax.data import prompts, tokenizer
from deevisum_jax.data.tokenizer import Tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.files import check_local, check_room, exists, read_json, whole_folder, writing
from deevisum_jax.initialization import FromReleased, FromRun, FromWeights
from deevisum_jax.models import paligemma2
from deevisum_jax.models.paligemma2 import PaliGemma2Config, Params


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """What is converted or exported, its parameters not read yet."""

    path: str
    config: PaliGemma2Config
    resize: str  # of `typing.RESIZES`
    tokens: Tokenizer | None
    start: FromRun | FromReleased | FromWeights
    run: Config | None  # None: weights that nothing of ours was trained on

    def num_bytes(self, dtype: str = "") -> int:
        """What the parameters take in a file."""
        width = named_dtype(dtype or self.config.param_dtype).itemsize
        return paligemma2.num_params(self.config) * width

    def load(self) -> Params:
        """All parameters, over all devices of this process."""
        shapes = paligemma2.abstract_params(self.config)
        shardings = sharding.param_shardings(shapes, sharding.fitting_mesh(shapes))
        abstract = sharding.abstract(shapes, shardings)
        return self.start.load(self.config, abstract, jax.random.key(0))


def open_source(
    checkpoint: str,
    *,
    tokenizer_path: str = "",
    image_size: int | None = None,
    dtype: str = "",
) -> Source:
    """Opens a run, converted weights, or a released checkpoint.

    Args:
      checkpoint: a folder of the first two kinds, an .npz of big_vision or a Hugging Face folder.
      tokenizer_path: of weights that bring none.
      image_size: of a released checkpoint, whose position embeddings are resampled to it.
      dtype: of a released checkpoint's parameters; "" = the one that holds all of them.

    Raises:
      UserError: there is no such checkpoint, or it does not fit what is asked of it.
    """
    try:
        start = initialization.open_start(checkpoint)
    except UserError as error:
        raise UserError(f"{checkpoint}: {error}") from error
    run, tokens, resize = None, start.tokenizer(), start.settings.resize
    if isinstance(start, FromRun):
        run = start.config
        config = experiment.model_config(run, tokens)
    elif isinstance(start, FromWeights):
        config = start.model_config()
    else:
        config = start.checkpoint.config(image_size=image_size, dtype=dtype)
    if not isinstance(start, FromReleased) and (image_size is not None or dtype):
        raise UserError(
            f"{checkpoint} is as it was made; image size and dtype are only chosen for released "
            "checkpoints"
        )
    if tokenizer_path:
        given = tokenizer.load_tokenizer(tokenizer_path)
        if tokens is not None and given.pieces != tokens.pieces:
            raise UserError(
                f"{checkpoint} brings its own tokenizer, and {tokenizer_path} has other pieces; "
                "leave --tokenizer out"
            )
        if paligemma2.table_rows(given.vocab_size) != config.llm.vocab_size:
            raise UserError(
                f"tokenizer {tokenizer_path} has {given.vocab_size} pieces, the model "
                f"{config.llm.vocab_size} rows; give the tokenizer of these weights"
            )
        tokens = given
    return Source(
        path=checkpoint, config=config, resize=resize, tokens=tokens, start=start, run=run
    )


def convert(source: Source, out: pathlib.Path) -> list[Converted]:
    """Writes a released checkpoint as converted weights; returns the report of every tensor.

    Raises:
      UserError: it is not released, does not fit, is damaged, or `out` cannot be written.
    """
    found = _demand_released(source)
    if found.exit_layers:
        raise UserError(
            f"{source.path} is an export of ours with exit heads, which converted weights do not "
            f"hold; train with initialization={source.path}"
        )
    report = found.match(source.config)
    check_room(out, source.num_bytes())
    with whole_folder(out) as folder:
        params = source.load()
        initialization.save_weights(
            folder,
            params,
            source.config,
            variant=found.variant,
            resize=source.resize,
            source=found.path,
            report=report,
            tokens=source.tokens,
            padding=source.start.vocab_padding(source.config),
        )
    return report


def report_of(source: Source) -> list[Converted]:
    """The report that `convert` would give; reads headers only and writes nothing."""
    return _demand_released(source).match(source.config)


def export_big_vision(source: Source, out: pathlib.Path, *, dtype: str = "") -> None:
    """Writes an npz that big_vision's loader takes; exit heads have no place there.

    Args:
      source: what goes out.
      out: a new file that ends in .npz.
      dtype: of the file; "" = as the parameters are.

    Raises:
      UserError: `out` is there or cannot be written; or what reading the parameters raises.
    """
    if out.suffix != ".npz":
        raise UserError(f"{out} does not end in .npz, by which big_vision knows its checkpoints")
    check_local(out)
    if out.exists():
        raise UserError(f"{out} is there already; give --out a new name")
    if not out.absolute().parent.is_dir():
        raise UserError(f"{out.parent} is no folder; make it, or give --out a file in another")
    check_room(out, source.num_bytes(dtype))
    tensors = spill(_towers(source.load()), big_vision.paligemma2_rows(source.config))
    with writing(out):
        npz.write_npz(out, big_vision.with_prefix(_in_dtype(tensors, dtype)))


def export_hf(
    source: Source,
    out: pathlib.Path,
    *,
    dtype: str = "",
    max_shard_bytes: int = 5 * 10**9,
    title: str = "",
) -> None:
    """Writes a folder that transformers loads, exit heads and their PyTorch model included.

    Args:
      source: what goes out.
      out: a folder, new or empty.
      dtype: of the weights; "" = as the parameters are.
      max_shard_bytes: of a file of weights.
      title: of the model card; "" = the name of `out`.

    Raises:
      UserError: there is no tokenizer; `out` cannot be written; or what reading the parameters
        raises.
    """
    config, tokens = source.config, source.tokens
    if tokens is None:
        raise UserError(
            f"{source.path} brings no tokenizer, without which transformers cannot use it; give "
            "--tokenizer the path of paligemma_tokenizer.model (docs/WEIGHTS.md says where it is)"
        )
    check_room(out, source.num_bytes(dtype))
    with whole_folder(out) as folder:
        params = source.load()
        padding = source.start.vocab_padding(config)
        table_rows = hf_folder.padded_vocab(config, tokens)
        if padding is None:
            padding = huggingface.mean_rows(params, table_rows - config.llm.vocab_size)
        tensors = spill(_towers(params), huggingface.paligemma2_rows(config))
        tensors = huggingface.padded(tensors, padding)
        tensors = {huggingface.released_name(name): tensor for name, tensor in tensors.items()}
        section = _deevisum_section(source) if config.exit_layers else None
        card = hf_folder.model_card(
            config,
            title=title or out.resolve().name,
            deevisum=section,
            report=_read_report(source),
            dataset=source.run.data.dataset if source.run else None,
            base_model=_base_model(source.start.origin),
            gemma_terms=source.start.origin is not None,
        )
        with writing(out):
            safetensors.write_safetensors(
                folder, _in_dtype(tensors, dtype), max_shard_bytes=max_shard_bytes
            )
            if section is not None:
                heads = spill({"exits": params["exits"]}, huggingface.exit_rows(config))
                safetensors.write_safetensors_file(
                    folder / hf_folder.HEADS_FILE, _in_dtype(heads, dtype)
                )
            hf_folder.write_folder(
                folder,
                config=config,
                tokenizer=tokens,
                table_rows=config.llm.vocab_size + len(padding),
                dtype=dtype or config.param_dtype,
                resize=source.resize,
                deevisum=section,
                card=card,
                gemma_terms=source.start.origin is not None,
            )


def _demand_released(source: Source) -> Released:
    if not isinstance(source.start, FromReleased):
        raise UserError(
            f"{source.path} is in our own form already; train with initialization={source.path}, "
            "or export it with scripts/export_hf.py or scripts/export_big_vision.py"
        )
    return source.start.checkpoint


def _towers(params: Params) -> Params:
    return {name: params[name] for name in ("img", "llm")}


def _in_dtype(tensors: Mapping[str, Tensor], dtype: str) -> Mapping[str, Tensor]:
    if not dtype:
        return tensors
    return {name: cast(tensor, named_dtype(dtype)) for name, tensor in tensors.items()}


def _deevisum_section(source: Source) -> dict[str, Any]:
    """What modeling_deevisum.py needs to know besides sizes."""
    run = source.run
    if run is None:
        return dict(source.start.checkpoint.deevisum)  # of an export of ours, as it came
    template = prompts.load_template(str(source.start.folder / runs.TEMPLATE_FILE))
    encoder = experiment.make_encoder(run, source.tokens, template, source.config.img.image_size)
    return {
        "format": hf_folder.DEEVISUM_FORMAT,
        "exit_layers": list(source.config.exit_layers),
        "exit_threshold": run.eval.exit_threshold,
        "label_tokens": list(encoder.prompts.label_tokens),
        "prompt_template": template.text,
        "num_frames": run.data.num_frames,
        "segment_s": run.data.segment_s,
        "text_len": run.data.text_len,
        "resize": source.resize,
        # null: no weights of Google's are in it.
        "origin": _base_model(source.start.origin)
        or (source.start.origin and "released weights of PaliGemma 2"),
    }


def _read_report(source: Source) -> dict[str, Any] | None:
    if source.run is None:
        return None
    file = source.start.folder / "report.json"
    return read_json(file, "evaluate the run again") if exists(file) else None


def _base_model(origin: str | None) -> str | None:
    """The name that released weights have on the Hub, if their path still says it."""
    found = re.search(r"paligemma2-(3b|10b|28b)-[a-z0-9-]*(224|448|896)", origin or "")
    return f"google/{found[0]}" if found else None
