"""Teacher, mentor, student: where the stages of a distillation live, and what each takes of others.

    WORKDIR/teacher/            a run like any other
    WORKDIR/teacher/outputs/    what it says of every training example, if it is cached
    WORKDIR/mentor/             the same
    WORKDIR/                    the student's own run

`distill.folder` is the WORKDIR of others, whose teacher/ and mentor/ are trained and are shared.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from deevisum_jax import checkpoints, distributed, experiment, runs
from deevisum_jax.config import STAGES, Config
from deevisum_jax.data import prompts, tokenizer
from deevisum_jax.data.prompts import PromptTemplate
from deevisum_jax.data.tokenizer import Tokenizer
from deevisum_jax.distill import cache, objective
from deevisum_jax.distill.objective import Distillation
from deevisum_jax.distill.teachers import Asked
from deevisum_jax.errors import UserError
from deevisum_jax.files import exists, locate
from deevisum_jax.models.paligemma2 import PaliGemma2Config, Params


def folder_of(config: Config, workdir: epath.Path) -> epath.Path:
    """Where a stage's run is; `workdir` is the one that was given for all of them."""
    return workdir if config.stage in ("", STAGES[-1]) else workdir / config.stage


def needed(configs: Sequence[Config]) -> list[Config]:
    """Those that are to be trained: the last one, and whatever one of them learns from.

    Nobody's teachers are trained that are in a `distill.folder`.

    Args:
      configs: of `config.stages_from_file`, in order.
    """
    wanted = [configs[-1]]
    for config in reversed(configs[:-1]):
        learners = learners_of(config, wanted)
        if any(not learner.distill.folder for learner in learners):
            wanted.insert(0, config)
    return wanted


def learners_of(config: Config, configs: Sequence[Config]) -> list[Config]:
    """Those of `configs` that learn from a stage."""
    return [learner for learner in configs if config.stage in learner.teachers]


def is_finished(run: epath.Path) -> bool:
    """Whether a folder holds a run that was trained to its end, and evaluated.

    Asked by one process for all: on a disk that they share, another may see a file later.
    """

    def look() -> bool:
        if runs.missing_parts(run) or not exists(run / runs.REPORT_FILE):
            return False
        steps = checkpoints.complete_steps(run / runs.CHECKPOINT_FOLDER)
        return max(steps, default=0) >= runs.load_config(run).total_steps

    return distributed.on_main(look)


@dataclasses.dataclass(frozen=True)
class Earlier:
    """A finished stage, which a later one learns from; none of its numbers are read yet."""

    name: str
    run: epath.Path

    @functools.cached_property
    def config(self) -> Config:
        """What it was trained with."""
        return runs.load_config(self.run)

    @functools.cached_property
    def tokens(self) -> Tokenizer:
        """The tokenizer that it was trained with."""
        return tokenizer.load_tokenizer(self.run / runs.TOKENIZER_FILE)

    @functools.cached_property
    def model_config(self) -> PaliGemma2Config:
        """Of its model."""
        return experiment.model_config(self.config, self.tokens)

    @functools.cached_property
    def weights(self) -> str:
        """What tells its weights from others."""
        with self._checkpoints() as saved:
            return saved.fingerprint(saved.best_step)

    def load(self, abstract: Params) -> Params:
        """Its parameters, of the best checkpoint, onto shapes, dtypes and shardings."""
        with self._checkpoints() as saved:
            return saved.restore_params(saved.best_step, abstract)

    def outputs(self, asked: Asked) -> epath.Path:
        """The folder of the cache of what it was asked for."""
        name = "classes"
        if asked.top_k:
            name += f"_{asked.positions}_top{asked.top_k}_T{asked.temperature:g}"
        if asked.layers:
            name += "_layers" + "-".join(map(str, asked.layers))
        return self.run / cache.FOLDER / name

    def identity(
        self,
        learner: Config,
        dataset: Mapping[str, Any],
        template: PromptTemplate,
        tokens: Tokenizer,
        asked: Asked,
    ) -> cache.Identity:
        """What its outputs for a learner depend on; arguments as `cache.Identity.of`."""
        settings = runs.settings_of(self.config)
        return cache.Identity.of(
            weights=self.weights,
            dataset=dataset,
            data=dataclasses.replace(learner.data, resize=settings.resize),
            template=template,
            tokens=tokens,
            image_size=settings.image_size,
            asked=dataclasses.asdict(asked),
        )

    def _checkpoints(self) -> checkpoints.Checkpoints:
        return checkpoints.Checkpoints(self.run / runs.CHECKPOINT_FOLDER)

    def check(self, learner: Config, template: PromptTemplate, tokens: Tokenizer) -> None:
        """Refuses a learner that it cannot teach.

        Args:
          learner: with nothing left open.
          template: the learner's.
          tokens: the learner's.

        Raises:
          UserError: it reads or sees something else; names what.
        """
        self._check_words(learner, template, tokens)
        self._check_rows(learner)

    def _check_words(self, learner: Config, template: PromptTemplate, tokens: Tokenizer) -> None:
        if self.tokens.pieces != tokens.pieces:
            raise UserError(
                f"the {self.name} in {self.run} reads with another tokenizer "
                f"({self.tokens.vocab_size} pieces) than this {learner.stage} "
                f"({tokens.vocab_size}), so their tokens do not mean the same; train both with one "
                "(data.tokenizer), on the same data"
            )
        own = prompts.load_template(os.fspath(self.run / runs.TEMPLATE_FILE))
        if own != template:
            raise UserError(
                f"the {self.name} in {self.run} is asked with another prompt template than this "
                f"{learner.stage}; give data.template={self.run / runs.TEMPLATE_FILE}"
            )

    def _check_rows(self, learner: Config) -> None:
        differing = [
            f"data.{field}: {getattr(self.config.data, field)!r} there, "
            f"{getattr(learner.data, field)!r} here"
            for field in ROW_FIELDS
            if getattr(self.config.data, field) != getattr(learner.data, field)
            and (learner.distill.token or field not in cache.SUFFIX_FIELDS)
        ]
        if differing:
            raise UserError(
                f"the {self.name} in {self.run} was trained on other examples than this "
                f"{learner.stage}: {'; '.join(differing)}; set the same"
            )


# What a row of the training data depends on, besides the words around it and the picture's size.
ROW_FIELDS = ("dataset", "folds", "fold", "folds_seed", *cache.ROW_FIELDS)


def open_teachers(config: Config, workdir: epath.Path) -> dict[str, Earlier]:
    """The stages that this one learns from, nearest first.

    Args:
      config: of the learner.
      workdir: as it was given for all stages.

    Raises:
      UserError: one of them was not trained to its end.
    """
    found = {}
    for name in config.teachers:
        run = (locate(config.distill.folder) if config.distill.folder else workdir) / name
        if not is_finished(run):
            raise UserError(
                f"the {config.stage} learns from a {name}, and there is none in {run} that was "
                f"trained to its end and evaluated; train it first, or go on with it: the same "
                f"command with --config.stage={name}; or say with distill.folder where one is"
            )
        found[name] = Earlier(name, run)
    return found


def distillation(
    learner: Config, configs: Sequence[Config], tokens: Tokenizer | None
) -> Distillation | None:
    """What a stage learns from others, of which none need be trained.

    Args:
      learner: the stage.
      configs: of all stages.
      tokens: their tokenizer; None = vocabularies are the variants' own.

    Raises:
      UserError: as `objective.make`; of what a config leaves open, the variant's own is taken.
    """
    models = {config.stage: experiment.model_config(config, tokens) for config in configs}
    return objective.make(learner, experiment.model_config(learner, tokens), models)


def asked_of(
    stage: str, learners: Sequence[Config], configs: Sequence[Config], tokens: Tokenizer | None
) -> dict[str, Asked]:
    """What the learners of a stage ask of it, by their names; the rest as `distillation`."""
    return {
        learner.stage: teacher.asked
        for learner in learners
        for teacher in distillation(learner, configs, tokens).teachers
        if teacher.name == stage
    }
