"""PaliGemma 2 28B teaches 10B, and both teach 3B, on one of TVSum's five published folds.

Each stage on machines of its own size, and what a teacher says is written down between them:

    main="python -m deevisum_jax.main --config configs/tvsum_mskd.py --workdir gs://BUCKET/mskd"
    $main --config.stage=teacher        # then the same with --mode cache_teacher
    $main --config.stage=mentor         # then the same with --mode cache_teacher
    $main --config.stage=student

So the 28B model never sits beside the student. On one machine that holds each of them, leave
--config.stage out: all of this happens in order. The teacher trains adapters over a 4-bit base
(QLoRA) and the mentor over a bfloat16 one, as DEEVISum's code does with all; the student trains
in full. The exits of all three are at the same shares of their depth. phi, psi and T are those of
the released code. What each stage wants of a chip: docs/TPU.md. No TPU was at hand to run it.
"""

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    lora = {"rank": 8, "alpha": 8.0}
    adapters = {"learning_rate": 1e-4, "weight_decay": 0.01}
    return ml_collections.ConfigDict(
        {
            "initialization": "paligemma2-3b-pt-224",
            "seed": 0,
            "total_steps": 400,  # 5 epochs of some 5,000 segments
            "batch_size": 64,
            "data": {
                "dataset": "tvsum/1fps",
                "folds": "community",
                "text_len": 128,
                "transcript_context_s": 15.0,
                "num_frames": 2,
            },
            "model": {
                "variant": "paligemma2_3b",
                "exit_layers": (8, 13, 18, 26),
                "dtype": "bfloat16",
                "remat_policy": "dots_with_no_batch_dims_saveable",
            },
            "optim": {
                "learning_rate": 1e-5,
                "warmup_steps": 20,
                "weight_decay": 3e-7,
                "clip_norm": 1.0,
            },
            "distill": {"phi": 0.5, "psi": 0.5, "temperature": 2.0, "source": "cache"},
            "stages": {
                "teacher": {
                    "initialization": "paligemma2-28b-pt-224",
                    "model": {
                        "variant": "paligemma2_28b",
                        "exit_layers": (14, 23, 32, 46),
                        "param_dtype": "bfloat16",
                        "remat_policy": "nothing_saveable",
                        "lora": lora | {"base": "nf4"},
                    },
                    "optim": adapters,
                },
                "mentor": {
                    "initialization": "paligemma2-10b-pt-224",
                    "model": {
                        "variant": "paligemma2_10b",
                        "exit_layers": (13, 21, 29, 42),
                        "param_dtype": "bfloat16",
                        "lora": lora,
                    },
                    "optim": adapters,
                },
                "student": {},
            },
            "mesh": {"data": 1, "fsdp": -1},
            "checkpoint": {"every_steps": 100},
            "eval": {"every_steps": 100, "f1": "avg", "correlation": "tvsum_per_annotator"},
        }
    )
