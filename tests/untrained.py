"""The workdir of a run whose model is tiny and has learned nothing."""

import pathlib

import grain
import jax
import optax

from deevisum_jax import checkpoints, experiment, runs, train_step
from deevisum_jax import config as config_lib
from deevisum_jax.config import Config
from deevisum_jax.models import paligemma2
from deevisum_jax.models.paligemma2 import PaliGemma2Config


def make_run(folder: pathlib.Path, *, seed: int = 0) -> pathlib.Path:
    """Fills `folder`; no data set is needed."""
    config = config_lib.from_file(str(pathlib.Path(__file__).parent.parent / "configs" / "tiny.py"))
    runs.claim(folder, config)
    template = experiment.make_template(config, folder)
    tokens = experiment.make_tokenizer(config, folder, template, records=[], given=None)
    save_checkpoint(folder, config, experiment.model_config(config, tokens), seed=seed)
    return folder


def save_checkpoint(
    folder: pathlib.Path, config: Config, model_config: PaliGemma2Config, *, seed: int = 0
) -> None:
    """Random parameters as step 1."""
    save_params(folder, config, paligemma2.init_params(model_config, jax.random.key(seed)))


def save_params(folder: pathlib.Path, config: Config, params: paligemma2.Params) -> None:
    """Given parameters as step 1."""
    state = train_step.init_state(params, optax.sgd(0.1))
    data_iter = iter(grain.MapDataset.range(1).to_iter_dataset())
    with checkpoints.Checkpoints(folder / runs.CHECKPOINT_FOLDER, config.checkpoint) as saved:
        saved.save(1, state, data_iter, None)
