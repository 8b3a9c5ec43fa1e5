"""From a `Config` to the parts that training, evaluation and `summarize` share."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from deevisum_jax import config as config_lib
from deevisum_jax.config import Config
from deevisum_jax.data import pipeline, prompts, tokenizer
from deevisum_jax.data.prompts import PromptTemplate
from deevisum_jax.data.segments import SegmentEncoder
from deevisum_jax.data.tokenizer import Tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.files import write_whole
from deevisum_jax.models import paligemma2

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
TEMPLATE_FILE = "template.txt"
CHECKPOINT_FOLDER = "checkpoints"

# What may differ between a workdir's config and the one it is resumed with: nothing that a trained
# number depends on.
_MAY_CHANGE = ("log_every", "checkpoint.", "eval.", "mesh.", "data.data_dir", "data.cache_mib")
_MAY_CHANGE += ("data.num_threads",)


def missing_parts(run: pathlib.Path) -> list[str]:
    """What a folder lacks to be a trained run."""
    parts = (CONFIG_FILE, TOKENIZER_FILE, TEMPLATE_FILE, CHECKPOINT_FOLDER)
    return [name for name in parts if not (run / name).exists()]


def has_checkpoint(workdir: pathlib.Path) -> bool:
    """Whether training has come to something that belongs to its config."""
    # Orbax writes a step under a longer name until it is whole.
    return any(path.name.isdigit() for path in (workdir / CHECKPOINT_FOLDER).glob("*"))


def claim_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Creates `workdir`, or makes sure that it belongs to a run of this config; writes the config.

    Raises:
      UserError: it cannot be written, holds something else, or a run of another config.
    """
    stored = workdir / CONFIG_FILE
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if stored.exists():
            if has_checkpoint(workdir):
                _check_same(workdir, config)
            elif _refused(workdir, config):
                # It stopped before its first checkpoint, likely at a mistake now mended.
                for name in (TOKENIZER_FILE, TEMPLATE_FILE):
                    (workdir / name).unlink(missing_ok=True)
        elif any(path.suffix != ".partial" for path in workdir.iterdir()):
            raise UserError(
                f"{workdir} is not empty and holds no run of ours; give --workdir a new folder"
            )
        config_lib.save(config, stored)
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be written ({error.strerror}); give --workdir a folder "
            "that can"
        ) from None


def check_run(workdir: pathlib.Path, config: Config) -> None:
    """Makes sure that `workdir` holds a trained run of this config; changes nothing.

    Raises:
      UserError: it does not.
    """
    if missing := missing_parts(workdir):
        raise UserError(
            f"{workdir} holds no run to evaluate, it lacks {', '.join(missing)}; train one, or "
            "correct --workdir"
        )
    _check_same(workdir, config)


def _check_same(workdir: pathlib.Path, config: Config) -> None:
    if refused := _refused(workdir, config):
        raise UserError(
            f"{workdir} holds a run of another config; use a new --workdir, or set back "
            + "; ".join(refused)
        )


def _refused(workdir: pathlib.Path, config: Config) -> list[str]:
    """What differs from the run in `workdir` and must not."""
    changed = config_lib.differences(config_lib.load(workdir / CONFIG_FILE), config)
    refused = [line for line in changed if not line.startswith(_MAY_CHANGE)]
    # The file of a template may have been edited, or be gone, since it was copied.
    given, kept = pathlib.Path(config.data.template), workdir / TEMPLATE_FILE
    there = given.is_file() and kept.is_file()
    if there and prompts.load_template(str(given)) != prompts.load_template(str(kept)):
        refused.append(f"the text of data.template={config.data.template} to that of {kept}")
    return refused


def initial_run(config: Config) -> pathlib.Path | None:
    """The folder of the run whose parameters training starts from; None when from scratch.

    Raises:
      UserError: there is no trained run of ours, or its parameters would mean something else here.
    """
    if config.initialization == config_lib.FROM_SCRATCH:
        return None
    folder = pathlib.Path(config.initialization).expanduser()
    if missing := missing_parts(folder):
        raise UserError(
            f"initialization={config.initialization!r} is neither {config_lib.FROM_SCRATCH!r} nor "
            f"the folder of a run of ours, it lacks {', '.join(missing)}; give one of them"
        )
    exits = config_lib.load(folder / CONFIG_FILE).model.exit_layers
    if exits != config.model.exit_layers:
        raise UserError(
            f"the exit heads of initialization={config.initialization!r} sit after the layers "
            f"{exits}, not after model.exit_layers={config.model.exit_layers}; set the same"
        )
    if config.data.tokenizer:
        ours, theirs = (
            tokenizer.load_tokenizer(path).processor.serialized_model_proto()
            for path in (config.data.tokenizer, folder / TOKENIZER_FILE)
        )
        if ours != theirs:
            raise UserError(
                f"data.tokenizer={config.data.tokenizer} is not the tokenizer of "
                f"initialization={config.initialization!r}, whose embeddings belong to its own "
                "pieces; leave data.tokenizer empty"
            )
    return folder


def make_template(config: Config, workdir: pathlib.Path) -> PromptTemplate:
    """The run's prompt template; a copy is kept in `workdir`, so that a run is whole by itself."""
    kept = workdir / TEMPLATE_FILE
    if kept.exists():
        return prompts.load_template(str(kept))
    template = prompts.load_template(config.data.template)
    write_whole(kept, template.text)
    return template


def given_tokenizer(config: Config, workdir: pathlib.Path) -> Tokenizer | None:
    """The tokenizer that the run has or is to take over; None if it is yet to be trained."""
    kept = workdir / TOKENIZER_FILE
    if kept.exists():
        return tokenizer.load_tokenizer(kept)
    start = initial_run(config)  # the embeddings to start from belong to that run's pieces
    path = start / TOKENIZER_FILE if start else config.data.tokenizer
    return tokenizer.load_tokenizer(path) if path else None


def make_tokenizer(
    config: Config,
    workdir: pathlib.Path,
    template: PromptTemplate,
    records: Sequence[pipeline.Record],
) -> Tokenizer:
    """The run's tokenizer; kept in `workdir` as the template is."""
    kept = workdir / TOKENIZER_FILE
    given = given_tokenizer(config, workdir)
    if given is None:
        return tokenizer.train_tokenizer(
            pipeline.texts(records, template), kept, vocab_size=config.data.vocab_size
        )
    return given if kept.exists() else tokenizer.save_tokenizer(given, kept)


def model_config(config: Config, tokens: Tokenizer | None = None) -> paligemma2.PaliGemma2Config:
    """The model's config, with room for the tokenizer's pieces.

    Without a tokenizer the vocabulary is the variant's own: enough to check all else.

    Raises:
      UserError: as `paligemma2.get_config`, or the exits do not end at the depth.
    """
    llm = {
        "final_logits_softcap": config.model.final_logits_softcap,
        "sliding_window": config.model.sliding_window,
    }
    if tokens is not None:
        # To a multiple of 128, as PaliGemma's own is, so that any tensor axis divides it.
        llm["vocab_size"] = -(-tokens.vocab_size // 128) * 128
    made = paligemma2.get_config(
        config.model.variant,
        llm=llm,
        exit_layers=config.model.exit_layers,
        dtype=config.model.dtype,
        param_dtype=config.model.param_dtype,
        remat_policy=config.model.remat_policy,
    )
    if made.exit_layers[-1] != made.llm.depth:
        raise UserError(
            f"model.exit_layers={made.exit_layers} must end with the depth of "
            f"{config.model.variant}, {made.llm.depth}: the last exit gives the full model's score"
        )
    return made


def make_encoder(
    config: Config,
    tokens: Tokenizer,
    template: PromptTemplate,
    image_size: int,
    *,
    captions: bool = False,
) -> SegmentEncoder:
    """What turns a segment of a video into the fields of a `Batch`.

    Args:
      config: names the lengths and what is left out.
      tokens: the run's tokenizer.
      template: the run's prompt template.
      image_size: height and width of the model's pictures, pixels.
      captions: with room for `data.caption_len` tokens of a caption, as in training; scoring reads
        the label's place and has no use for them.
    """
    return SegmentEncoder(
        prompts=prompts.PromptEncoder(
            tokenizer=tokens,
            template=template,
            text_len=config.data.text_len,
            caption_len=config.data.caption_len if captions else 0,
        ),
        num_frames=config.data.num_frames,
        image_size=image_size,
        left_out=config.data.left_out,
    )


def make_source(
    config: Config, records: Sequence[pipeline.Record], encoder: SegmentEncoder
) -> pipeline.SegmentSource:
    """All segments of a split."""
    return pipeline.SegmentSource(
        records,
        encoder,
        segment_s=config.data.segment_s,
        label_fraction=config.data.label_fraction,
        cache_mib=config.data.cache_mib,
    )
