"""From a `Config` to the parts that training, evaluation and `summarize` share."""

from __future__ import annotations

import os
from collections.abc import Sequence

from etils import epath

from deevisum_jax import distributed
from deevisum_jax.config import Config
from deevisum_jax.data import pipeline, prompts, tokenizer
from deevisum_jax.data.prompts import PromptTemplate
from deevisum_jax.data.segments import SegmentEncoder
from deevisum_jax.data.tokenizer import Tokenizer
from deevisum_jax.errors import UserError
from deevisum_jax.files import exists, is_shown, write_whole
from deevisum_jax.initialization import Start
from deevisum_jax.models import paligemma2
from deevisum_jax.runs import TEMPLATE_FILE, TOKENIZER_FILE, settings_of


def make_template(config: Config, workdir: epath.Path) -> PromptTemplate:
    """The run's prompt template; a copy is kept in `workdir`, so that a run is whole by itself."""
    kept = workdir / TEMPLATE_FILE

    def keep() -> None:
        if not exists(kept):
            write_whole(kept, prompts.load_template(config.data.template).text)

    distributed.on_main(keep)
    is_shown(kept)
    return prompts.load_template(os.fspath(kept))


def given_tokenizer(config: Config, workdir: epath.Path, start: Start | None) -> Tokenizer | None:
    """The tokenizer that the run has or is to take over; None if it is yet to be trained."""
    kept = workdir / TOKENIZER_FILE
    if exists(kept):
        return tokenizer.load_tokenizer(kept)
    if config.data.tokenizer:
        return tokenizer.load_tokenizer(config.data.tokenizer)
    return start.tokenizer() if start else None  # its embeddings belong to its pieces


def make_tokenizer(
    config: Config,
    workdir: epath.Path,
    template: PromptTemplate,
    records: Sequence[pipeline.Record],
    given: Tokenizer | None,
) -> Tokenizer:
    """The run's tokenizer, `given_tokenizer`'s or trained; kept in `workdir` as the template is."""
    kept = workdir / TOKENIZER_FILE

    def keep() -> None:
        if given is None:
            texts = pipeline.texts(records, template)
            tokenizer.train_tokenizer(texts, kept, vocab_size=config.data.vocab_size)
        elif not exists(kept):
            tokenizer.save_tokenizer(given, kept)

    distributed.on_main(keep)
    is_shown(kept)
    return tokenizer.load_tokenizer(kept)  # `given` is a file of this host, if there is one


def model_config(config: Config, tokens: Tokenizer | None = None) -> paligemma2.PaliGemma2Config:
    """The model's config, with room for the tokenizer's pieces.

    Without a tokenizer the vocabulary is the variant's own: enough to check all else.

    Raises:
      UserError: as `paligemma2.get_config`, or the exits do not end at the depth.
    """
    settings = settings_of(config)
    llm = settings.llm
    if tokens is not None:
        llm |= {"vocab_size": paligemma2.table_rows(tokens.vocab_size)}
    made = paligemma2.get_config(
        config.model.variant,
        img=settings.img,
        llm=llm,
        exit_layers=config.model.exit_layers,
        dtype=config.model.dtype,
        param_dtype=config.model.param_dtype,
        remat_policy=config.model.remat_policy,
        lora=config.model.lora,
        merge=config.model.merge,
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
        resize=settings_of(config).resize,
        context_s=config.data.transcript_context_s,
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
        num_annotators=config.data.num_annotators,
        cache_mib=config.data.cache_mib,
        augmented=config.data.augment,
    )
