"""Where teachers know more: the quickstart's stages, the student's labels from two annotators.

Teacher and mentor learn from all twenty annotators of the training videos. The student is given
the same videos and two of them, whose mean is a noisy label; its teachers tell it the rest. So the
question is what a student takes over from teachers that know more than its own labels say, which
large pretrained ones do. With the same labels for all there is nothing to take over: at these
sizes the quickstart's student reaches its teacher by itself (docs/DISTILLATION.md has both tables).

    python scripts/ablate.py --config configs/distillation.py --out runs/ablation --seeds 0:5 \
        --arm "none: distill.phi=0 distill.psi=0" --arm "KD: distill.phi=0" --arm "MSKD:" \
        --baseline none --baseline KD
"""

import pathlib
import runpy

import ml_collections


def get_config() -> ml_collections.ConfigDict:
    quickstart = pathlib.Path(__file__).with_name("quickstart.py")
    config = runpy.run_path(str(quickstart))["get_config"]()
    config.total_steps = 600
    config.optim.warmup_steps = 50
    config.model.exit_layers = (2, 4, 6)
    config.stages.teacher.total_steps = 450
    config.stages.mentor.total_steps = 600
    config.stages.mentor.distill.phi = 0.5
    config.stages.student.data = ml_collections.ConfigDict({"num_annotators": 2})
    # Tokens stand behind a label word, which is another one for teachers of other labels.
    config.distill = ml_collections.ConfigDict(
        {"phi": 0.5, "psi": 0.5, "source": "cache", "token": 0.0}
    )
    config.checkpoint.every_steps = 150
    config.eval = ml_collections.ConfigDict({"every_steps": 150, "ablate_inputs": False})
    return config
