"""Full fine-tuning of PaliGemma 2 3B with four exits, on 16 chips of a TPU v5e or more alike.

Parameters, gradients and AdamW's moments are float32, 48 GB in all, split over the chips; the
compiled step wants 5.9 GiB of each of 16 (docs/TPU.md). Weights: docs/WEIGHTS.md. Learning rate,
decay and schedule are those of big_vision's transfers (its `forkme.py`).
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            # Hugging Face's folder; for an npz set data.tokenizer, too.
            "initialization": "paligemma2-3b-pt-224",
            "seed": 0,
            "total_steps": 1000,
            "batch_size": 64,
            "data": {
                # The one data set there is so far; it shows that the path works.
                "dataset": "synthetic/quickstart",
                "text_len": 128,
                "num_frames": 1,
            },
            "model": {
                "variant": "paligemma2_3b",
                "exit_layers": (8, 13, 18, 26),
                "dtype": "bfloat16",
                "remat_policy": "dots_with_no_batch_dims_saveable",
            },
            "optim": {
                "learning_rate": 1e-5,
                "warmup_steps": 50,
                "weight_decay": 3e-7,
                "clip_norm": 1.0,
            },
            "mesh": {"data": 1, "fsdp": -1},
            "checkpoint": {"every_steps": 250},
            "eval": {"every_steps": 250},
        }
    )
