"""A small student on SumMe's twenty-five real videos, from scratch: one of five folds.

    python -m deevisum_jax.main --config configs/summe.py --workdir runs/summe_0 \
        --config.data.manual_dir=DOWNLOADED --config.data.fold=0

As configs/tvsum.py, but with SumMe's conventions: the best annotator counts for F1, and tau and rho
compare summaries. `--config.eval.correlation=summe_scores` compares the scores themselves.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "initialization": "from_scratch",
            "seed": 0,
            "total_steps": 300,
            "batch_size": 32,
            "data": {
                "dataset": "summe/1fps",
                "folds": "partition",
                "vocab_size": 640,
                "text_len": 56,
                "num_frames": 2,
                "augment": True,
            },
            "model": {
                "variant": "quickstart_student",
                "exit_layers": (2, 4, 6),
                "remat_policy": None,
            },
            "loss": {"token": 0.1},
            "optim": {
                "learning_rate": 1e-3,
                "warmup_steps": 30,
                "weight_decay": 0.1,
                "b2": 0.98,
            },
            "mesh": {"data": -1, "fsdp": 1},
            "checkpoint": {"every_steps": 50},
            "eval": {"every_steps": 50, "f1": "max", "correlation": "summe_binary_summary"},
        }
    )
