"""The folder of a run: what is in it, whose it is, and whether a command may have it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from deevisum_jax import checkpoints, distributed, files
from deevisum_jax import config as config_lib
from deevisum_jax.config import STAGES, Config
from deevisum_jax.data import prompts
from deevisum_jax.errors import UserError
from deevisum_jax.files import exists, in_bucket, is_shown, locate, write_whole
from deevisum_jax.inference.calibration import Calibration
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.models import paligemma2
from deevisum_jax.models.paligemma2 import PaliGemma2Config

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.model"
TEMPLATE_FILE = "template.txt"
CHECKPOINT_FOLDER = "checkpoints"
REPORT_FILE = "report.json"  # written last
# Rows of the token table behind the vocabulary, if the weights came from Hugging Face.
PADDING_FILE = "vocab_padding.safetensors"
# What the weights descend from, for whoever exports them.
ORIGIN_FILE = "origin.json"

# Which videos it trains on, validates and tests with: a config says where they are, not what.
DATA_FILE = "data.json"
# Which weights it learns from, by stage.
TEACHERS_FILE = "teachers.json"
CALIBRATION_FILE = "calibration.json"  # when segments leave early, and what that was shown to cost

# What may differ between a workdir's config and the one it is resumed with: nothing that a trained
# number depends on.
_MAY_CHANGE = ("log_every", "checkpoint.", "eval.", "mesh.", "data.data_dir", "data.cache_mib")
_MAY_CHANGE += ("data.num_threads", "data.manual_dir", "distill.source", "distill.folder")
_MAY_CHANGE += ("calibration.",)


_BEFORE_TRAINING = (
    TOKENIZER_FILE, TEMPLATE_FILE, PADDING_FILE, ORIGIN_FILE, DATA_FILE, TEACHERS_FILE,
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """What weights were trained to be computed with, and no shape tells."""

    image_size: int  # pixels
    final_logits_softcap: float  # 0 = none
    sliding_window: int  # tokens, of layers 0, 2, 4, ...; 0 = all layers are global
    resize: str  # of `typing.RESIZES`

    @property
    def img(self) -> dict[str, Any]:
        """As fields of the image tower's config."""
        return {"image_size": self.image_size}

    @property
    def llm(self) -> dict[str, Any]:
        """As fields of the language model's config."""
        return {
            "final_logits_softcap": self.final_logits_softcap,
            "sliding_window": self.sliding_window or None,
        }


def settings_of(config: Config) -> Settings:
    """Those of a run; what its config leaves open is the variant's own."""
    config = with_settings(config, own_settings(paligemma2.get_config(config.model.variant)))
    return Settings(
        image_size=config.model.image_size,
        final_logits_softcap=config.model.final_logits_softcap,
        sliding_window=config.model.sliding_window,
        resize=config.data.resize,
    )


def own_settings(model: PaliGemma2Config, resize: str = "bilinear") -> Settings:
    """Those of a model that nothing else is known of."""
    return Settings(
        image_size=model.img.image_size,
        final_logits_softcap=model.llm.final_logits_softcap,
        sliding_window=model.llm.sliding_window or 0,
        resize=resize,
    )


def with_settings(config: Config, settings: Settings) -> Config:
    """The config, with `settings` where it leaves them open."""
    model = {
        name: getattr(settings, name)
        for name in ("image_size", "final_logits_softcap", "sliding_window")
        if getattr(config.model, name) is None
    }
    data = config.data
    if data.resize is None:
        data = dataclasses.replace(data, resize=settings.resize)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **model), data=data)


def load_config(run: epath.Path) -> Config:
    """The config of a run, with nothing left open.

    Raises:
      UserError: as `config.load`.
    """
    config = config_lib.load(run / CONFIG_FILE)
    return with_settings(config, settings_of(config))


def missing_parts(run: epath.Path) -> list[str]:
    """What a folder lacks to be a trained run."""
    parts = (CONFIG_FILE, TOKENIZER_FILE, TEMPLATE_FILE, CHECKPOINT_FOLDER)
    return [name for name in parts if not exists(run / name)]


def has_checkpoint(workdir: epath.Path) -> bool:
    """Whether training has come to something that belongs to its config."""
    folder = workdir / CHECKPOINT_FOLDER
    return exists(folder) and bool(checkpoints.complete_steps(folder))


def claim(workdir: epath.Path, config: Config) -> None:
    """Creates `workdir`, or makes sure that it belongs to a run of this config; writes the config.

    Process 0 does so, and all make sure that they see the same folder.

    Raises:
      UserError: it cannot be written, holds something else, or a run of another config; or not all
        processes see it.
    """
    distributed.on_main(lambda: _create(workdir))
    _check_shared(workdir)
    distributed.on_main(lambda: _claim(workdir, config))


def _create(workdir: epath.Path) -> None:
    if in_bucket(workdir):
        return  # it has no folders, and a bucket of a mistyped name is not to be made
    with _writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)


def _claim(workdir: epath.Path, config: Config) -> None:
    stored = workdir / CONFIG_FILE
    with _writing(workdir):
        if not has_checkpoint(workdir):
            (workdir / CALIBRATION_FILE).unlink(missing_ok=True)  # of weights that are gone
        if exists(stored):
            if has_checkpoint(workdir):
                _check_same(workdir, config)
            elif refused(workdir, config):
                # It stopped before its first checkpoint, likely at a mistake now mended.
                for name in _BEFORE_TRAINING:
                    (workdir / name).unlink(missing_ok=True)
        elif exists(workdir) and any(_is_foreign(path) for path in workdir.iterdir()):
            raise UserError(
                f"{workdir} is not empty and holds no run of ours; give --workdir a new folder"
            )
        config_lib.save(config, stored)


def _is_foreign(path: epath.Path) -> bool:
    """Whether it is neither half-written nor the run of an earlier stage."""
    return path.suffix != ".partial" and path.name not in STAGES


@contextlib.contextmanager
def _writing(workdir: epath.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be written ({error.strerror}); give --workdir a folder "
            "that can"
        ) from None


def _check_shared(workdir: epath.Path) -> None:
    """Refuses a folder of the same name on several hosts, with a part of the run in each."""
    if distributed.is_alone():
        return

    def leave() -> str:
        name = f".{uuid.uuid4().hex[:8]}.partial"
        with _writing(workdir):
            write_whole(workdir / name, "")
        return name

    left = workdir / distributed.on_main(leave)

    def look() -> None:
        if not is_shown(left):
            raise UserError(
                f"workdir {workdir} is not the folder of that name that process 0 writes; give "
                "--workdir a folder that all hosts share, or an address in a bucket (gs://...)"
            )

    try:
        distributed.everywhere(look)
    finally:
        # No word with the others, of whom one may have stopped for another reason than a mistake.
        if distributed.is_main():
            left.unlink(missing_ok=True)


def check(workdir: epath.Path, config: Config) -> None:
    """Makes sure that `workdir` holds a trained run of this config; changes nothing.

    Raises:
      UserError: it does not, for any process.
    """
    distributed.everywhere(lambda: _check(workdir, config))


def _check(workdir: epath.Path, config: Config) -> None:
    if missing := missing_parts(workdir):
        raise UserError(
            f"{workdir} holds no run to evaluate, it lacks {', '.join(missing)}; train one, or "
            "correct --workdir"
        )
    _check_same(workdir, config)


def keep_data(workdir: epath.Path, identity: Mapping[str, Any]) -> None:
    """Notes which data a run is of, until it has a checkpoint; see `datasets.Dataset.identity`."""
    if not (exists(workdir / DATA_FILE) and has_checkpoint(workdir)):
        write_whole(workdir / DATA_FILE, json.dumps(identity, indent=2) + "\n")


def check_data(workdir: epath.Path, identity: Mapping[str, Any]) -> None:
    """Refuses data that the run in `workdir` is not of; one that has not begun is of any.

    Raises:
      UserError: the data set is another, or another video is in one of its splits.
    """
    if not (has_checkpoint(workdir) and exists(workdir / DATA_FILE)):
        return
    kept = files.read_json(workdir / DATA_FILE, "give --workdir a new folder")
    if kept == identity:
        return
    what = [f"{kept['data_set']}, not {identity['data_set']}"]
    if kept["data_set"] == identity["data_set"]:
        what = [
            f"split {name!r} has {_others(kept['splits'].get(name), identity['splits'].get(name))}"
            for name in {**kept["splits"], **identity["splits"]}
            if kept["splits"].get(name) != identity["splits"].get(name)
        ]
    raise UserError(
        f"the run in {workdir} is of other videos ({'; '.join(what)}), so what it was trained on "
        "could be tested; bring them back (data.manual_dir, data.data_dir), or give --workdir a "
        "new folder"
    )


def keep_teachers(workdir: epath.Path, fingerprints: Mapping[str, str]) -> None:
    """Notes which weights a run learns from; one that has begun goes on with the same.

    Args:
      workdir: of the run.
      fingerprints: by stage, `Checkpoints.fingerprint`.

    Raises:
      UserError: it began with others; names them.
    """
    if not (has_checkpoint(workdir) and exists(workdir / TEACHERS_FILE)):
        write_whole(workdir / TEACHERS_FILE, json.dumps(dict(fingerprints), indent=2) + "\n")
        return
    kept = files.read_json(workdir / TEACHERS_FILE, "give --workdir a new folder")
    others = [name for name in fingerprints if kept.get(name) != fingerprints[name]]
    if others:
        raise UserError(
            f"the run in {workdir} began with other weights of its {' and '.join(others)}; bring "
            "them back (distill.folder), or give --workdir a new folder"
        )


def keep_calibration(workdir: epath.Path, calibration: Calibration, weights: str) -> None:
    """Writes when segments leave early; `weights` is `Checkpoints.fingerprint` of what scores."""
    found = {"weights": weights} | calibration.to_json()
    write_whole(workdir / CALIBRATION_FILE, json.dumps(found, indent=2) + "\n")


def load_calibration(run: epath.Path) -> Calibration | None:
    """What `keep_calibration` wrote for the best checkpoint of a run; None where nothing was.

    Raises:
      UserError: it was made for other weights, or is no such file.
    """
    path = run / CALIBRATION_FILE
    if not exists(path):
        return None
    advice = "calibrate again (python -m deevisum_jax.main ... --mode calibrate), or delete it"
    found = files.read_json(path, advice)
    if not isinstance(found, dict):
        raise UserError(f"{path} is no calibration; {advice}")
    with checkpoints.Checkpoints(run / CHECKPOINT_FOLDER) as saved:
        weights = saved.fingerprint(saved.best_step)
    if found.pop("weights", None) != weights:
        raise UserError(
            f"{path} is of other weights than the best checkpoint beside it, for which it promises "
            f"nothing; {advice}"
        )
    try:
        return Calibration.from_json(found)
    except (AttributeError, KeyError, TypeError, ValueError) as error:  # a UserError is one
        raise UserError(f"{path} is no calibration of this version ({error}); {advice}") from None


def exit_policy(run: epath.Path, config: Config) -> tuple[ExitPolicy, Calibration | None]:
    """When segments leave: as the run was calibrated, or else as its config says.

    Args:
      run: its folder.
      config: its config.

    Raises:
      UserError: as `load_calibration`, or the calibration is of a model with other exits.
    """
    num_exits, calibration = len(config.model.exit_layers), load_calibration(run)
    if calibration is None:
        given = config.eval
        return ExitPolicy.of(given.exit_threshold, num_exits, given.exit_confidence), None
    if len(calibration.policy.thresholds) != num_exits - 1:
        raise UserError(
            f"{run / CALIBRATION_FILE} has thresholds of a model with "
            f"{len(calibration.policy.thresholds) + 1} exits, and this one has {num_exits}; "
            "calibrate it (--mode calibrate)"
        )
    return calibration.policy, calibration


def _others(kept: Any, given: Any) -> str:
    if isinstance(kept, list) and isinstance(given, list):
        more, gone = sorted(set(given) - set(kept)), sorted(set(kept) - set(given))
        told = [f"{', '.join(more)} more"] * bool(more) + [f"{', '.join(gone)} less"] * bool(gone)
        return " and ".join(told) or "them in another order"
    return f"{given} videos instead of {kept}"


def _check_same(workdir: epath.Path, config: Config) -> None:
    if differing := refused(workdir, config):
        raise UserError(
            f"{workdir} holds a run of another config; use a new --workdir, or set back "
            + "; ".join(differing)
            + (" (--config.stages.NAME.FIELD=VALUE is of one stage alone)" if config.stage else "")
        )


def refused(workdir: epath.Path, config: Config) -> list[str]:
    """What differs from the run in `workdir` and must not, as `config.differences`."""
    stored = load_config(workdir)
    # What the config leaves open stays as the run began.
    changed = config_lib.differences(stored, with_settings(config, settings_of(stored)))
    may_change = _MAY_CHANGE
    if not any(one.teachers or one.distill.exits for one in (stored, config)):
        may_change += ("distill.",)  # nothing is learned so
    found = [line for line in changed if not line.startswith(may_change)]
    # The file of a template may have been edited, or be gone, since it was copied.
    given, kept = locate(config.data.template), workdir / TEMPLATE_FILE
    there = exists(given) and exists(kept)
    if there and _template(given) != _template(kept):
        found.append(f"the text of data.template={config.data.template} to that of {kept}")
    return found


def _template(path: epath.Path) -> prompts.PromptTemplate:
    return prompts.load_template(os.fspath(path))
