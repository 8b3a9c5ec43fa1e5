"""The folder of a run: what is in it, whose it is, and whether a command may have it."""

from __future__ import annotations

import pathlib

from deevisum_jax import config as config_lib
from deevisum_jax.config import Config
from deevisum_jax.data import prompts
from deevisum_jax.errors import UserError

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
TEMPLATE_FILE = "template.txt"
CHECKPOINT_FOLDER = "checkpoints"
# Rows of the token table behind the vocabulary, if the weights came from Hugging Face.
PADDING_FILE = "vocab_padding.safetensors"

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


def claim(workdir: pathlib.Path, config: Config) -> None:
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


def check(workdir: pathlib.Path, config: Config) -> None:
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
