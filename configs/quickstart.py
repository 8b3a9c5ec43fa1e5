"""A teacher, a mentor and a small student on the synthetic data set, on one CPU.

    python -m deevisum_jax.main --config configs/quickstart.py --workdir runs/quickstart

builds the data, trains the three of them in order and evaluates each. The student alone, from
labels only, in half the time: --config.distill.phi=0 --config.distill.psi=0. What distillation is
worth, and where: docs/DISTILLATION.md and configs/distillation.py. The same command with

    --mode calibrate

then chooses when the student's segments leave early, on 600 more videos: docs/EARLY_EXIT.md.
"""

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
                "exit_layers": (2, 3, 6),
                "remat_policy": None,
            },
            "optim": {
                "learning_rate": 2e-3,
                "warmup_steps": 100,
                "weight_decay": 0.05,
                "b2": 0.98,
            },
            # Labels of twenty annotators say more than such teachers do, hence the low weights.
            "distill": {"phi": 0.05, "psi": 0.1, "source": "cache"},
            "stages": {
                "teacher": {
                    "total_steps": 400,
                    "model": {"variant": "quickstart_teacher", "exit_layers": (3, 6, 8)},
                    "optim": {"learning_rate": 1.5e-3, "warmup_steps": 50},
                    "eval": {"ablate_inputs": False},
                },
                "mentor": {
                    "total_steps": 400,
                    "model": {"variant": "quickstart_mentor", "exit_layers": (3, 5, 7)},
                    "optim": {"warmup_steps": 50},
                    "distill": {"phi": 0.25},
                    "eval": {"ablate_inputs": False},
                },
                "student": {},
            },
            "mesh": {"data": -1, "fsdp": 1},
            "checkpoint": {"every_steps": 250},
            "eval": {"every_steps": 250},
            "calibration": {
                "dataset": "synthetic/calibration",
                "split": "calibration",
                # Of 450 test videos the mean loss is as good as normal.
                "bound": "normal",
            },
        }
    )
