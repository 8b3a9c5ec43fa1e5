"""From a `Config` to the parts that training, evaluation and `summarize` share."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from deevisum_jax import config as config_lib
from deevisum_jax.config import Config
from deevisum_jax.data import pipeline, prompts, tokenizer
from deevisum_jax.data.segments import SegmentEncoder
from deevisum_jax.data.tokenizer import Tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.models import paligemma2

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
CHECKPOINT_FOLDER = "checkpoints"

# What may differ between a workdir's config and the one it is resumed with: nothing that a trained
# number depends on.
_MAY_CHANGE = ("log_every", "checkpoint.", "eval.", "mesh.", "data.data_dir", "data.cache_mib")
_MAY_CHANGE += ("data.num_threads",)


def claim_workdir(workdir: pathlib.Path, config: Config) -> None:
    """Creates `workdir`, or makes sure that it belongs to a run of this config; writes the config.

    Raises:
      UserError: it cannot be written, holds something else, or a run of another config.
    """
    stored = workdir / CONFIG_FILE
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if stored.exists():
            changed = config_lib.differences(config_lib.load(stored), config)
            refused = [line for line in changed if not line.startswith(_MAY_CHANGE)]
            if refused and any((workdir / CHECKPOINT_FOLDER).glob("[0-9]*")):
                raise UserError(
                    f"{workdir} holds a run of another config; use a new --workdir, or set back "
                    + "; ".join(refused)
                )
            if refused:  # It stopped before its first checkpoint, likely at a mistake now mended.
                (workdir / TOKENIZER_FILE).unlink(missing_ok=True)
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


def initial_run(config: Config) -> pathlib.Path:
    """The folder of the run whose parameters training starts from.

    Raises:
      UserError: there is no run of ours.
    """
    folder = pathlib.Path(config.initialization).expanduser()
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"initialization={config.initialization!r} is neither {config_lib.FROM_SCRATCH!r} nor "
            "the folder of a run of ours; give one of them"
        )
    return folder


def make_tokenizer(config: Config, workdir: pathlib.Path, records: Sequence[pipeline.Record]):
    """The run's tokenizer; a copy is kept in `workdir`, so that a run is whole by itself."""
    kept = workdir / TOKENIZER_FILE
    if kept.exists():
        return tokenizer.load_tokenizer(kept)
    if config.data.tokenizer:
        given = tokenizer.load_tokenizer(config.data.tokenizer)
        tokenizer.save_tokenizer(given, kept)
        return given
    if config.initialization != config_lib.FROM_SCRATCH:
        # The embeddings to start from belong to that run's pieces.
        theirs = tokenizer.load_tokenizer(initial_run(config) / TOKENIZER_FILE)
        tokenizer.save_tokenizer(theirs, kept)
        return theirs
    template = prompts.load_template(config.data.template)
    return tokenizer.train_tokenizer(
        pipeline.texts(records, template), kept, vocab_size=config.data.vocab_size
    )


def model_config(config: Config, tokens: Tokenizer) -> paligemma2.PaliGemma2Config:
    """The model's config; a model trained from scratch takes the tokenizer's vocabulary.

    Raises:
      UserError: as `paligemma2.get_config`, or the exits do not end at the depth.
    """
    made = paligemma2.get_config(
        config.model.variant,
        # To a multiple of 128, as PaliGemma's own is, so that any tensor axis divides it.
        llm={"vocab_size": -(-tokens.vocab_size // 128) * 128},
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
    config: Config, tokens: Tokenizer, image_size: int, *, captions: bool = False
) -> SegmentEncoder:
    """What turns a segment of a video into the fields of a `Batch`.

    Args:
      config: names the template, the lengths and what is left out.
      tokens: the run's tokenizer.
      image_size: height and width of the model's pictures, pixels.
      captions: with room for `data.caption_len` tokens of a caption, as in training; scoring reads
        the label's place and has no use for them.
    """
    return SegmentEncoder(
        prompts=prompts.PromptEncoder(
            tokenizer=tokens,
            template=prompts.load_template(config.data.template),
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
