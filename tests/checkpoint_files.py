"""Every size's tree at small widths, and checkpoints as their makers write them."""

import io
import pathlib
import shutil
from collections.abc import Callable

import jax
import numpy as np

from deevisum_jax import checkpoints, datasets, experiment, optim, runs, train_step
from deevisum_jax import config as config_lib
from deevisum_jax.config import Config
from deevisum_jax.convert import big_vision, huggingface, rows
from deevisum_jax.convert.tensors import read
from deevisum_jax.data import pipeline
from deevisum_jax.models.paligemma2 import (
    VARIANTS,
    PaliGemma2Config,
    Params,
    get_config,
    init_params,
)


def small(name: str, **overrides) -> PaliGemma2Config:
    """The variant, with layers and heads as they are, and narrow everything else."""
    llm = VARIANTS[name].llm
    return get_config(
        name,
        img={"image_size": 56, "width": 32, "mlp_dim": 24},
        llm={
            "vocab_size": 96,
            "width": 32,
            "mlp_dim": 40,
            "head_dim": 4 if llm.head_dim == 256 else 2,
        },
        **overrides,
    )


def write_big_vision(path: pathlib.Path, params: Params, config: PaliGemma2Config) -> str:
    """An npz as big_vision saves it: by numpy, under `params/`."""
    tensors = rows.spill(params, big_vision.paligemma2_rows(config))
    np.savez(path, **{f"params/{name}": read(tensor) for name, tensor in tensors.items()})
    return str(path)


def write_hugging_face(
    folder: pathlib.Path, params: Params, config: PaliGemma2Config, tokenizer_path: pathlib.Path
) -> str:
    """A folder as transformers saves it, with a tokenizer beside."""
    hugging_face_model(params, config).save_pretrained(folder)
    shutil.copy(tokenizer_path, folder / "tokenizer.model")
    return str(folder)


def hugging_face_model(params: Params, config: PaliGemma2Config):
    """The `transformers.PaliGemmaForConditionalGeneration` of these parameters.

    Its token table has 64 rows behind the vocabulary.
    """
    import torch
    import transformers

    from tests.hf_reference import hf_config

    dtype = getattr(torch, config.param_dtype)
    theirs = transformers.PaliGemmaForConditionalGeneration(
        hf_config(config, padded_vocab=config.llm.vocab_size + 64)
    ).to(dtype)
    tensors = huggingface.padded(
        rows.spill(params, huggingface.paligemma2_rows(config)),
        np.random.default_rng(0).normal(size=(64, config.llm.width)),
    )
    # Through float32, which holds any bfloat16: torch takes none from numpy.
    state = {
        name: torch.from_numpy(read(tensor).astype(np.float32)).to(dtype)
        for name, tensor in tensors.items()
    }
    theirs.load_state_dict({**state, "lm_head.weight": state[huggingface.EMBED_TOKENS]})
    return theirs


def write_run(
    workdir: pathlib.Path,
    config: Config,
    change: Callable[[Params], Params] = lambda params: params,
) -> None:
    """A run of one step with random parameters, as `main` leaves it but for its report.

    `change` makes others of them.
    """
    runs.claim(workdir, config)
    records = datasets.Dataset(config.data).split("train")
    template = experiment.make_template(config, workdir)
    tokens = experiment.make_tokenizer(config, workdir, template, records, None)
    model = experiment.model_config(config, tokens)
    encoder = experiment.make_encoder(config, tokens, template, model.img.image_size)
    batches = pipeline.train_iterator(
        experiment.make_source(config, records, encoder), batch_size=8, seed=0
    )
    schedule = optim.make_schedule(config.optim, config.total_steps)
    params = change(init_params(model, jax.random.key(3)))
    state = train_step.init_state(params, optim.make_optimizer(config.optim, schedule))
    with checkpoints.Checkpoints(workdir / runs.CHECKPOINT_FOLDER, config.checkpoint) as saved:
        saved.save(1, state, batches, {"tau": 0.0})


class BucketFile:
    """As little as a client of a bucket may offer."""

    def __init__(self, content: bytes):
        stream = io.BytesIO(content)
        self.read, self.seek, self.tell = stream.read, stream.seek, stream.tell
        self.seekable = lambda: True

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def claim(workdir: pathlib.Path, config: Config) -> Config:
    """What the folder holds when it was claimed."""
    runs.claim(workdir, config)
    return config_lib.load(workdir / runs.CONFIG_FILE)


def with_checkpoint(workdir: pathlib.Path) -> None:
    """As much of a checkpoint as tells that training has come to something."""
    (workdir / runs.CHECKPOINT_FOLDER / "100").mkdir(parents=True)
