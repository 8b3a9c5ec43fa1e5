"""A small student on the synthetic data set: data, training and evaluation on one CPU."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """See deevisum_jax/config.py for every field and its default."""
    return ml_collections.ConfigDict(
        {
            "initialization": "from_scratch",
            "seed": 0,
            "total_steps": 1000,
            "batch_size": 32,
            "data": {
                "dataset": "synthetic/quickstart",
                "vocab_size": 640,
                "text_len": 44,
                # Telling what is seen and heard teaches a model without pretraining to tie words
                # to pictures; without it, 1000 steps are too few to find the title's subject.
                "caption_len": 14,
                "num_frames": 1,
            },
            "model": {
                "variant": "quickstart_student",
                "exit_layers": (2, 4, 6),
                "remat_policy": None,
            },
            "optim": {
                "learning_rate": 2e-3,
                "warmup_steps": 100,
                "weight_decay": 0.05,
                "b2": 0.98,
            },
            "mesh": {"data": -1, "fsdp": 1},
            "checkpoint": {"every_steps": 250},
            "eval": {"every_steps": 250},
        }
    )
