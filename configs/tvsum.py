"""A small student on TVSum's fifty real videos, from scratch: one of five folds.

    python -m deevisum_jax.main --config configs/tvsum.py --workdir runs/tvsum_0 \
        --config.data.manual_dir=DOWNLOADED --config.data.fold=0

All five, and one table over every video: scripts/cross_validate.py. Where to get the data:
docs/DATA.md. Forty videos are few for a model that has seen nothing else; what it reaches is in
docs/RESULTS.md. The experiment with pretrained weights is configs/tvsum_3b.py.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            "initialization": "from_scratch",
            "seed": 0,
            "total_steps": 600,
            "batch_size": 32,
            "data": {
                "dataset": "tvsum/1fps",
                # Every video is tested once. The published folds are "community": comparable with
                # published tables, but 16 of the videos are never tested.
                "folds": "partition",
                "vocab_size": 640,
                "text_len": 56,
                "num_frames": 2,  # one per second of a segment, which is the annotators' unit
                "augment": True,
            },
            "model": {
                "variant": "quickstart_student",
                "exit_layers": (2, 4, 6),
                "remat_policy": None,
            },
            # The word of the label teaches nothing that the exits' own losses do not.
            "loss": {"token": 0.1},
            "optim": {
                "learning_rate": 1e-3,
                "warmup_steps": 60,
                "weight_decay": 0.1,
                "b2": 0.98,
            },
            "mesh": {"data": -1, "fsdp": 1},
            "checkpoint": {"every_steps": 100},
            "eval": {"every_steps": 100, "f1": "avg", "correlation": "tvsum_per_annotator"},
        }
    )
