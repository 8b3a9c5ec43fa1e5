"""PaliGemma 2 28B teaches 10B, and both teach 3B, on one of TVSum's five published folds.

Each stage on machines of its own size, and what a teacher says is written down between them:

    main="python -m deevisum_jax.main --config configs/tvsum_mskd.py --workdir gs://BUCKET/mskd"
    $main --config.stage=teacher        # then the same with --mode cache_teacher
    $main --config.stage=mentor         # then the same with --mode cache_teacher
    $main --config.stage=student

So the 28B model never sits beside the student. On one machine that holds each of them, leave
--config.stage out: all of this happens in order. The teacher trains adapters over a 4-bit base
(QLoRA) and the mentor over a bfloat16 one, as DEEVISum's code does with all; the student trains
in full, as configs/tvsum_3b.py has it. The exits of all three are at the same shares of their
depth; phi, psi and T are those of the released code. What each stage wants of a chip: docs/TPU.md.
No TPU was at hand to run it.
"""

import pathlib
import runpy

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    alone = pathlib.Path(__file__).with_name("tvsum_3b.py")
    config = runpy.run_path(str(alone))["get_config"]()
    config.data.augment = False  # a cache knows pictures as they are
    config.distill = ml_collections.ConfigDict(
        {"phi": 0.5, "psi": 0.5, "temperature": 2.0, "source": "cache"}
    )
    lora = {"rank": 8, "alpha": 8.0}
    adapters = {"learning_rate": 1e-4, "weight_decay": 0.01}
    config.stages = ml_collections.ConfigDict(
        {
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
        }
    )
    return config
