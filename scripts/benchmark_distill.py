"""What distillation adds to a student's step: `python scripts/benchmark_distill.py`.

Steps of the quickstart's student on one device, on random batches of its own sizes: without
distillation, with a teacher whose outputs are cached, with teacher and mentor cached, and with a
teacher that runs beside the student. The four are timed in turn, block after block; each block's
time is divided by that of the plain blocks before and after it, which cancels what the machine is
busy with otherwise. So it is for the process's CPU time, which other processes hardly change.
"""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from deevisum_jax import config as config_lib
from deevisum_jax import experiment, optim, sharding, train_step
from deevisum_jax.config import Config
from deevisum_jax.distill import objective, teachers
from deevisum_jax.models import paligemma2
from deevisum_jax.typing import Batch

REPO = pathlib.Path(__file__).resolve().parent.parent
_STAGES = ("teacher", "mentor", "student")
# What is timed: weights of mentor and teacher, and whether these run within the step.
_VARIANTS = {
    "without distillation": (0.0, 0.0, "cache"),
    "teacher cached": (0.0, 0.5, "cache"),
    "mentor and teacher cached": (0.5, 0.5, "cache"),
    "teacher online": (0.0, 0.5, "online"),
}


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=20, help="blocks of each kind")
    parser.add_argument("--block", type=int, default=5, help="steps per block")
    parser.add_argument("--top_k", type=int, default=64, help="tokens that a teacher gives")
    parser.add_argument("--positions", choices=("suffix", "all"), default="suffix")
    args = parser.parse_args()

    config = config_lib.from_file(str(REPO / "configs" / "quickstart.py"))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        runs = {name: make_run(variant, config, args, mesh) for name, variant in _VARIANTS.items()}
        for run in runs.values():
            run()  # compiles
            run()
        plain, *others = runs
        blocks: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for _ in range(args.rounds):
            for name in others:
                blocks[plain].append(timed(runs[plain], args.block))
                blocks[name].append(timed(runs[name], args.block))
        blocks[plain].append(timed(runs[plain], args.block))

    for clock, what in enumerate(("wall", "CPU")):
        times = [block[clock] for block in blocks[plain]]
        step_ms = statistics.median(times) / args.block * 1e3
        print(f"{what} time of a step {plain}: {step_ms:.1f} ms")
        for i, name in enumerate(others):
            ratios = []
            for j, block in enumerate(blocks[name]):
                before = i + j * len(others)
                ratios.append(block[clock] / ((times[before] + times[before + 1]) / 2))
            low, middle, high = statistics.quantiles(ratios, n=4)
            print(
                f"  {name}: {middle:.3f} times that (median; quartiles {low:.3f} and {high:.3f}; "
                f"{len(ratios)} blocks of {args.block})"
            )
    return 0


def make_run(
    variant: tuple[float, float, str],
    config: Config,
    args: argparse.Namespace,
    mesh: jax.sharding.Mesh,
) -> Callable[[], None]:
    """One step, waited for."""
    phi, psi, source = variant
    config = dataclasses.replace(
        config,
        stages=_STAGES,
        stage="student",
        distill=dataclasses.replace(
            config.distill,
            phi=phi,
            psi=psi,
            source=source,
            top_k=args.top_k,
            positions=args.positions,
        ),
    )
    model_config = _model_config(config, config.model.variant, config.model.exit_layers)
    teacher_configs = {}
    for name in config.teachers:
        depth = paligemma2.VARIANTS[f"quickstart_{name}"].llm.depth
        teacher_configs[name] = _model_config(config, f"quickstart_{name}", (depth,))
    distill = objective.make(config, model_config, teacher_configs)
    schedule = optim.make_schedule(config.optim, config.total_steps)
    tx = optim.make_optimizer(config.optim, schedule)
    num_targets = 2 + config.data.caption_len  # a label of one token and its end
    step = train_step.make_train_step(
        model_config,
        config.loss,
        tx,
        schedule,
        num_targets=num_targets,
        accumulate_steps=config.optim.accumulate_steps,
        distill=distill,
    )

    key = jax.random.key(0)
    begin = lambda key: train_step.init_state(paligemma2.init_params(model_config, key), tx)
    shardings = train_step.state_shardings(jax.eval_shape(begin, key), tx, mesh)
    state = jax.jit(begin, out_shardings=shardings)(key)
    params, of_teachers = {}, {}
    for name, teacher_config in teacher_configs.items():
        shapes = paligemma2.abstract_params(teacher_config)
        of_teachers[name] = sharding.param_shardings(shapes, mesh)
        init = jax.jit(paligemma2.init_params, static_argnums=0, out_shardings=of_teachers[name])
        params[name] = init(teacher_config, key)
    batch = jax.device_put(
        random_batch(config, model_config, args.batch_size), sharding.batch_sharding(mesh)
    )
    online = distill is not None and distill.online
    if distill is not None and not online:
        said = {}
        for teacher in distill.teachers:
            ask = teachers.make_teacher_fn(
                teacher.model_config,
                of_teachers[teacher.name],
                mesh,
                teacher.asked,
                num_targets=num_targets,
            )
            said[teacher.name] = ask(params[teacher.name], batch)
        batch = dataclasses.replace(batch, teachers=said)
    update = train_step.jit(step, shardings, mesh, of_teachers if online else None)
    rest = (params,) if online else ()

    def run() -> None:
        nonlocal state
        state, metrics = update(state, batch, *rest)
        jax.block_until_ready((state, metrics))

    return run


def _model_config(
    config: Config, variant: str, exit_layers: tuple[int, ...]
) -> paligemma2.PaliGemma2Config:
    """A variant as a run would have it, with a vocabulary as large as it may become."""
    model = dataclasses.replace(config.model, variant=variant, exit_layers=exit_layers)
    made = experiment.model_config(dataclasses.replace(config, model=model))
    rows = paligemma2.table_rows(config.data.vocab_size)
    return dataclasses.replace(made, llm=dataclasses.replace(made.llm, vocab_size=rows))


def random_batch(config: Config, model_config: paligemma2.PaliGemma2Config, size: int) -> Batch:
    """A full batch of the config's sizes: a prompt, a label, its end and a caption."""
    rng = np.random.default_rng(0)
    T = config.data.text_len + config.data.caption_len
    pixels = model_config.img.image_size
    in_suffix = np.broadcast_to(np.arange(T) >= config.data.text_len - 2, (size, T))
    return Batch(
        frames=rng.integers(0, 256, (size, config.data.num_frames, pixels, pixels, 3), np.uint8),
        tokens=rng.integers(4, config.data.vocab_size, (size, T), np.int32),
        mask_ar=in_suffix,
        mask_input=np.ones((size, T), bool),
        mask_loss=in_suffix,
        label=rng.integers(0, 2, size, np.int32),
        score=rng.uniform(size=size).astype(np.float32),
        video_id=np.zeros(size, np.int32),
        segment=np.arange(size, dtype=np.int32),
        valid=np.ones(size, bool),
    )


def timed(run: Callable[[], Any], steps: int) -> tuple[float, float]:
    """Seconds of wall and of CPU time of `steps` runs."""
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(steps):
        run()
    return time.perf_counter() - wall, time.process_time() - cpu


if __name__ == "__main__":
    sys.exit(main())
