"""A small student on the synthetic data set: data, training and evaluation on one CPU."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    """See deevisum_jax/config.py for every field and its default."""
    return ml_collections.ConfigDict(
        {
            "initialization": "from_scratch",
            "seed": 0,
            "total_steps": 2000,
            "batch_size": 32,
            "data": {
                "dataset": "synthetic/quickstart",
                "text_len": 56,
                "num_frames": 1,
                "vocab_size": 640,
            },
            "model": {"variant": "quickstart_student", "exit_layers": (2, 4, 6)},
            "optim": {"learning_rate": 1e-3, "warmup_steps": 100, "weight_decay": 0.05},
            "mesh": {"data": -1, "fsdp": 1},
            "checkpoint": {"every_steps": 500},
            "eval": {"every_steps": 500},
        }
    )
