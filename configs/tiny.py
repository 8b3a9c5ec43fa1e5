"""The smallest experiment that has everything, in seconds: try an installation, or a change."""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "initialization": "from_scratch",
            "seed": 0,
            "total_steps": 6,
            "batch_size": 8,
            "log_every": 1,
            "data": {
                "dataset": "synthetic/tiny",
                "text_len": 48,
                "num_frames": 1,
                "vocab_size": 400,
            },
            "model": {"variant": "tiny", "exit_layers": (2, 4)},
            "optim": {"learning_rate": 1e-2, "warmup_steps": 2, "weight_decay": 0.05},
            "mesh": {"data": -1, "fsdp": 1},
            "checkpoint": {"every_steps": 2},
            "eval": {"every_steps": 4, "batch_size": 8},
        }
    )
