"""Compiles an experiment's step for a slice of TPUs that is not there, and says what it costs.

Nothing is allocated: parameters are abstract. What is compiled is what a run compiles.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import resource
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deevisum_jax import experiment, optim, sharding, train_step
from deevisum_jax import stages as experiment_stages
from deevisum_jax.config import Config
from deevisum_jax.data import tokenizer
from deevisum_jax.data.prompts import LABEL_WORDS
from deevisum_jax.data.tokenizer import Tokenizer
from deevisum_jax.distill import objective, teachers
from deevisum_jax.distill.objective import Distillation
from deevisum_jax.errors import UserError
from deevisum_jax.inference import scoring
from deevisum_jax.inference.cost import exit_flops
from deevisum_jax.inference.staged import StagedScorer
from deevisum_jax.models import lora, paligemma2, pytree
from deevisum_jax.planner import chips, environment, model_flops
from deevisum_jax.planner.chips import Topology
from deevisum_jax.planner.collectives import Collective
from deevisum_jax.planner.hlo import Program, Traffic
from deevisum_jax.typing import Batch, TeacherOutputs

MODES = ("full", "score", "cache_teacher", "early_exit", "long_video")
_GIB = 2**30
_LARGEST = 10  # tensors shown
_TRIED = 3  # compilations at most to find what fits
_MOST_ROWS = 1024  # of the batch on a chip, of what is tried: with more, one may take hours
_NO_ROOM = (
    re.compile(r"\(([\d.]+)([KMGT])i?\) exceeds available HBM"),
    re.compile(r"Used ([\d.]+)([KMGT])i? of [\d.]+[KMGT]i? hbm"),
)
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of HBM on one chip."""

    argument: int  # parameters, optimizer state, batch
    temporary: int
    output: int
    alias: int  # of the output, what takes the place of arguments
    peak: int  # at any one time, arguments included


@dataclasses.dataclass(frozen=True, kw_only=True)
class Placed:
    """A tensor and where it lives."""

    path: str
    shape: tuple[int, ...]
    dtype: str
    parts: tuple[int, ...]  # that each dimension is split into
    num_bytes: int  # on one chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cost:
    """One step on one chip, by the compiler's account."""

    flops: int  # of the compiled program, with what it recomputes
    cycles: int
    kernels: int  # Pallas kernels run, of which the compiler knows no cycles
    hbm_bytes: int
    traffic: dict[str, Traffic]
    ring_s: float  # collectives one after the other, each on the links along its own axes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What one step of an experiment takes on a slice."""

    topology: Topology
    mode: str  # of MODES
    # Of an early exit the stage ("layers 9 to 13") or "gather", of a long video how it is merged;
    # "" = all of a mode.
    part: str
    mesh: dict[str, int]  # devices along data, fsdp, tensor
    batch_size: int
    num_params: int  # of the model
    num_adapter_params: int  # of these, in low-rank adapters
    state_bytes: int  # on one chip: what is there between steps
    # Per chip, nothing recomputed: forward; of training also backward, twice that where all trains,
    # and what teachers do that run beside.
    model_flops: int
    # On one chip; None if it does not fit and the compiler does not say. Nothing is compiled if the
    # state alone does not fit, and this is no more than the state.
    needed_bytes: int | None
    refused: str  # the compiler's words, or "" if it fits
    memory: Memory | None  # None if it does not fit
    cost: Cost | None  # the same
    largest: tuple[Placed, ...]
    compile_cpu_s: float
    process_rss_bytes: int  # at most so far, of this process
    notes: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.memory is not None

    @property
    def is_compiled(self) -> bool:
        """Not if the state alone is larger than the chip's memory."""
        return self.fits or self.state_bytes <= self.hbm_limit

    @property
    def hbm_limit(self) -> int:
        return _limit(self.topology)

    @property
    def ideal_s(self) -> float:
        """The model's FLOPs at the chip's peak."""
        return self.model_flops / self.topology.chip.peak_flops

    @property
    def compute_s(self) -> float:
        """The compiler's own estimate of its cycles, compute and copies, at the assumed clock."""
        return self.cost.cycles / self.topology.chip.clock_hz

    @property
    def hbm_s(self) -> float:
        return self.cost.hbm_bytes / self.topology.chip.hbm_bytes_per_s

    @property
    def sent_bytes(self) -> int:
        """That leave one chip."""
        return sum(kind.num_bytes for kind in self.cost.traffic.values())

    @property
    def whole_bytes(self) -> int:
        """The plain count: arrays while they are whole, twice for an all-reduce."""
        return sum(kind.whole_bytes for kind in self.cost.traffic.values())

    @property
    def ici_s(self) -> float:
        """All that is sent, over all links of the chip at once."""
        return self.sent_bytes / self.topology.chip.ici_bytes_per_s

    @property
    def step_s(self) -> float:
        """The largest of the three: compute, memory and interconnect overlap wholly."""
        return max(self.compute_s, self.hbm_s, self.ici_s)

    @property
    def step_sum_s(self) -> float:
        """The sum of the three, and each collective on its own links: nothing overlaps."""
        return self.compute_s + self.hbm_s + max(self.ici_s, self.cost.ring_s)

    @property
    def mfu(self) -> float:
        """At `step_s`."""
        return self.ideal_s / self.step_s

    @property
    def mfu_sum(self) -> float:
        """At `step_sum_s`."""
        return self.ideal_s / self.step_sum_s


def _limit(topology: Topology) -> int:
    return round(topology.chip.hbm_gib * _GIB)


def plan(config: Config, topology: Topology, mode: str, stages: Sequence[Config] = ()) -> Plan:
    """Compiles for every chip of the slice; takes from seconds to minutes of CPU.

    Args:
      config: an experiment, or one of its stages. The tokenizer it names is read if there is one;
        else the vocabulary is the variant's own and a label word is one token.
      topology: the slice.
      mode: "full", an update of training; "score", the scoring pass at `eval.batch_size`;
        "cache_teacher", a pass at that size of a stage that others learn from. An early exit is
        more than one step: `plan_parts`.
      stages: all of the experiment's, as `config.stages_from_file` gives them.

    Raises:
      UserError: the mesh or the batch does not fit the slice, nobody learns from the stage that is
        to be cached, or as `experiment.model_config` and `objective.make`.
    """
    mesh = _mesh(config, topology)
    if mode == "full":
        made = _training(config, mesh, stages)
    elif mode == "score":
        made = _scoring(config, mesh)
    else:
        assert mode == "cache_teacher", mode
        made = _caching(config, mesh, stages)
    return planned(made, topology, mode, mesh)


def plan_parts(config: Config, topology: Topology) -> Iterator[Plan]:
    """As `plan`, what scoring at `eval.batch_size` with an early exit is made of, one by one.

    These are the stages between exits, the first with the pictures, and what gathers a batch from
    the survivors of two (`inference.staged`). The FLOPs of a stage's `model_flops` are those of
    `inference.cost`.

    Raises:
      UserError: the model has one exit only; or as `plan`.
    """
    mesh = _mesh(config, topology)
    for made in _stages_and_gather(config, mesh):
        yield planned(made, topology, "early_exit", mesh)


def _mesh(config: Config, topology: Topology) -> jax.sharding.Mesh:
    return sharding.make_mesh(
        **dataclasses.asdict(config.mesh), devices=environment.devices(topology)
    )


def planned(made: Made, topology: Topology, mode: str, mesh: jax.sharding.Mesh) -> Plan:
    """Compiles what was made for the slice."""
    state_bytes = sum(placed.num_bytes for placed in made.placed)
    memory = cost = compiled = None
    before = time.process_time()
    if state_bytes > _limit(topology):
        refused, needed = "the state alone is larger; nothing was compiled", state_bytes
    else:
        compiled, refused = _compile(made, mesh)
        needed = needed_bytes(refused)
    compile_cpu_s = time.process_time() - before
    notes = made.notes
    if compiled is not None:
        found = compiled.memory_analysis()
        memory = Memory(
            argument=found.argument_size_in_bytes,
            temporary=found.temp_size_in_bytes,
            output=found.output_size_in_bytes,
            alias=found.alias_size_in_bytes,
            peak=found.peak_memory_in_bytes,
        )
        program = Program(compiled.as_text())
        coords = [tuple(device.coords) for device in mesh.devices.flat]
        cost = Cost(
            flops=program.flops,
            cycles=program.cycles,
            kernels=program.kernels,
            hbm_bytes=program.hbm_bytes,
            traffic=program.traffic,
            ring_s=sum(
                times * ring_seconds(one, topology, coords) for one, times in program.collectives
            ),
        )
        needed, notes = memory.peak, notes + program.notes
    return Plan(
        topology=topology,
        mode=mode,
        part=made.part,
        mesh=sharding.sizes(mesh),
        batch_size=made.batch_size,
        num_params=pytree.num_params(made.params),
        num_adapter_params=lora.num_params(made.params),
        state_bytes=state_bytes,
        model_flops=made.model_flops // topology.num_chips,
        needed_bytes=needed,
        refused=refused,
        memory=memory,
        cost=cost,
        largest=tuple(sorted(made.placed, key=lambda one: -one.num_bytes)[:_LARGEST]),
        compile_cpu_s=compile_cpu_s,
        process_rss_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 2**10,
        notes=notes,
    )


def _compile(made: Made, mesh: jax.sharding.Mesh) -> tuple[jax.stages.Compiled | None, str]:
    """The compiled program; or None, and the compiler's words if it finds no room."""
    with (
        jax.set_mesh(mesh),
        environment.uncached(),
        environment.held_stderr() as drop,
    ):
        try:
            return made.lower().compile(), ""
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            drop()  # thousands of lines on what is in memory
            return None, str(error)
        finally:
            # One process may plan many steps, and none of them twice.
            jax.clear_caches()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Made:
    """What is to be compiled."""

    lower: Callable[[], jax.stages.Lowered]
    batch_size: int
    params: Any  # of the model, abstract
    model_flops: int  # of all chips together
    placed: list[Placed]
    part: str = ""  # as `Plan.part`
    notes: tuple[str, ...] = ()


def _training(config: Config, mesh: jax.sharding.Mesh, stages: Sequence[Config]) -> Made:
    microbatch = config.batch_size // config.optim.accumulate_steps
    sharding.check_batch("batch_size / optim.accumulate_steps", microbatch, mesh)
    model_config, num_targets = _model(config)
    distill = experiment_stages.distillation(config, stages, _tokens(config))
    schedule = optim.make_schedule(config.optim, config.total_steps)
    tx = optim.make_optimizer(config.optim, schedule)

    def first_state() -> train_step.TrainState:
        key = jax.random.key(0)
        params = paligemma2.init_params(model_config, key)
        params = objective.with_projections(distill, params, model_config, key)
        return train_step.init_state(params, tx, config.optim.frozen)

    shapes = jax.eval_shape(first_state)
    shardings = train_step.state_shardings(shapes, tx, mesh)
    batch = _batch(config, model_config, config.batch_size, captions=True)
    step = train_step.make_train_step(
        model_config,
        config.loss,
        tx,
        schedule,
        num_targets=num_targets,
        accumulate_steps=config.optim.accumulate_steps,
        distill=distill,
    )
    beside, flops, told = {}, 0, batch
    if distill:
        said, flops = _said(distill, batch, num_targets)
        told = dataclasses.replace(batch, teachers=said)
        if distill.online:
            beside = _teacher_params(distill, mesh)
        else:
            batch, flops = told, 0
    where = {name: found for name, (_, found) in beside.items()}
    given = (shapes, batch)
    if beside:
        given += ({name: params for name, (params, _) in beside.items()},)
    update = train_step.jit(step, shardings, mesh, where)
    placed = {"": (shapes, shardings)} | {f"{name}/": found for name, found in beside.items()}
    return Made(
        lower=lambda: update.lower(*given),
        batch_size=config.batch_size,
        params=optim.of_model(optim.merge(shapes.params, shapes.frozen)),
        model_flops=flops + _flops(config, model_config, shapes, told, num_targets, distill),
        placed=[
            dataclasses.replace(one, path=prefix + one.path)
            for prefix, trees in placed.items()
            for one in placement(*trees)
        ],
    )


def _flops(
    config: Config,
    model_config: paligemma2.PaliGemma2Config,
    state: train_step.TrainState,
    batch: Batch,
    num_targets: int,
    distill: Distillation | None,
) -> int:
    """Of the losses and their gradient, on all chips together."""

    def losses(trainable: Any, frozen: Any, batch: Batch) -> Any:
        params = optim.merge(trainable, frozen)
        projections = params.pop(optim.PROJECTIONS, None)
        # Kept, not computed again.
        config_ = dataclasses.replace(model_config, remat_policy=None)
        model = paligemma2.bind(config_, params)
        parts, weights = train_step.compute_losses(
            model, batch, config.loss, num_targets, distill, projections
        )
        return sum(weights[name] * part.sum for name, part in parts.items())

    if not jax.tree.leaves(state.frozen):
        # Backward is two products for each of forward's.
        return 3 * model_flops.count(losses, state.params, state.frozen, batch)
    return model_flops.count(jax.grad(losses), state.params, state.frozen, batch)


def _teacher_params(distill: Distillation, mesh: jax.sharding.Mesh) -> dict[str, tuple[Any, Any]]:
    """Shapes and shardings of the teachers that run beside the student, by name."""
    found = {}
    for teacher in distill.teachers:
        shapes = paligemma2.abstract_params(teacher.model_config)
        found[teacher.name] = (shapes, sharding.param_shardings(shapes, mesh))
    return found


def _said(
    distill: Distillation, batch: Batch, num_targets: int
) -> tuple[dict[str, TeacherOutputs], int]:
    """What the teachers say of a batch, as shapes, and the FLOPs it takes them."""
    said, flops = {}, 0
    for teacher in distill.teachers:

        def answer(params: Any, batch: Batch, teacher: teachers.Teacher = teacher) -> Any:
            model = paligemma2.bind(teacher.model_config, params)
            return teachers.outputs(model, batch, teacher.asked, num_targets=num_targets)

        params = paligemma2.abstract_params(teacher.model_config)
        said[teacher.name] = jax.eval_shape(answer, params, batch)
        flops += model_flops.count(answer, params, batch)
    return said, flops


def _caching(config: Config, mesh: jax.sharding.Mesh, stages: Sequence[Config]) -> Made:
    batch_size = config.eval.batch_size
    sharding.check_batch("eval.batch_size", batch_size, mesh)
    learners = experiment_stages.learners_of(config, stages)
    found = experiment_stages.asked_of(config.stage, learners, stages, _tokens(config))
    if not found:
        raise UserError(
            f"no other stage learns from {config.stage or 'this experiment'}, so there is nothing "
            "to cache; give a config with stages, and --config.stage=teacher"
        )
    learner, asked = next(iter(found.items()))
    model_config, num_targets = _model(config)
    params = paligemma2.abstract_params(model_config)
    shardings = sharding.param_shardings(params, mesh)
    batch = _batch(config, model_config, batch_size, captions=True)
    answer = teachers.make_teacher_fn(model_config, shardings, mesh, asked, num_targets=num_targets)
    others = [name for name, other in found.items() if other != asked]
    notes = (f"as the {learner} asks; differently by the {', '.join(others)}",) if others else ()

    def outputs(params: Any, batch: Batch) -> TeacherOutputs:
        model = paligemma2.bind(model_config, params)
        return teachers.outputs(model, batch, asked, num_targets=num_targets)

    return Made(
        lower=lambda: answer.lower(params, batch),
        batch_size=batch_size,
        params=params,
        model_flops=model_flops.count(outputs, params, batch),
        placed=list(placement(params, shardings)),
        notes=notes,
    )


def _scoring(config: Config, mesh: jax.sharding.Mesh) -> Made:
    batch_size = config.eval.batch_size
    sharding.check_batch("eval.batch_size", batch_size, mesh)
    model_config, _ = _model(config)
    params = paligemma2.abstract_params(model_config)
    shardings = sharding.param_shardings(params, mesh)
    batch = _batch(config, model_config, batch_size, captions=False)
    score_fn = scoring.make_score_fn(model_config, shardings, mesh)
    return Made(
        lower=lambda: score_fn.lower(params, batch),
        batch_size=batch_size,
        params=params,
        model_flops=model_flops.count(
            lambda params, batch: paligemma2.bind(model_config, params).score(batch), params, batch
        ),
        placed=list(placement(params, shardings)),
    )


def _stages_and_gather(config: Config, mesh: jax.sharding.Mesh) -> Iterator[Made]:
    batch_size = config.eval.batch_size
    sharding.check_batch("eval.batch_size", batch_size, mesh)
    model_config, _ = _model(config)
    ends = model_config.exit_layers
    if len(ends) == 1:
        raise UserError(
            f"model.exit_layers={ends} has one exit only, so nobody leaves early and there is "
            "nothing to plan; name more exits, or give --mode score"
        )
    params = paligemma2.abstract_params(model_config)
    shardings = sharding.param_shardings(params, mesh)
    scorer = StagedScorer(model_config, shardings, mesh)
    batch = _batch(config, model_config, batch_size, captions=False)
    _, between = jax.eval_shape(scorer.stage(0, 0), params, batch)
    where = sharding.batch_sharding(mesh)
    # Nothing tells the gather where a batch is but the batch itself.
    between = sharding.abstract(between, jax.tree.map(lambda _: where, between))
    places = jax.ShapeDtypeStruct((batch_size,), jnp.int32, sharding=where)
    depths = (0, *ends)
    flops = np.diff(exit_flops(model_config, config.data), prepend=0)
    made = functools.partial(Made, batch_size=batch_size, params=params)
    for exit_ in range(len(ends)):
        stage = scorer.stage(exit_, exit_)
        given = between if exit_ else batch
        yield made(
            lower=functools.partial(stage.lower, params, given),
            model_flops=batch_size * int(flops[exit_]),
            placed=list(placement(params, shardings)),
            part=("" if exit_ else "pictures, ") + f"layers {depths[exit_] + 1} to {ends[exit_]}",
        )
    yield made(
        lower=functools.partial(scorer.pick.lower, between, between, places),
        model_flops=0,
        placed=[],
        part="gather",
    )


def _model(config: Config) -> tuple[paligemma2.PaliGemma2Config, int]:
    """The model, and the most tokens that it learns to tell: label word, its end, caption."""
    tokens = _tokens(config)
    longest = max(len(tokens.encode(word)) for word in LABEL_WORDS) if tokens else 1
    return experiment.model_config(config, tokens), longest + 1 + config.data.caption_len


def _tokens(config: Config) -> Tokenizer | None:
    """The tokenizer that the config names, if it names one."""
    return tokenizer.load_tokenizer(config.data.tokenizer) if config.data.tokenizer else None


def _batch(
    config: Config, model_config: paligemma2.PaliGemma2Config, batch_size: int, *, captions: bool
) -> Batch:
    B, size = batch_size, model_config.img.image_size
    T = config.data.text_len + (config.data.caption_len if captions else 0)
    of = jax.ShapeDtypeStruct
    return Batch(
        frames=of((B, config.data.num_frames, size, size, 3), jnp.uint8),
        tokens=of((B, T), jnp.int32),
        mask_ar=of((B, T), jnp.bool_),
        mask_input=of((B, T), jnp.bool_),
        mask_loss=of((B, T), jnp.bool_),
        label=of((B,), jnp.int32),
        score=of((B,), jnp.float32),
        video_id=of((B,), jnp.int32),
        segment=of((B,), jnp.int32),
        valid=of((B,), jnp.bool_),
    )


def placement(shapes: Any, shardings: Any) -> Iterator[Placed]:
    """Every leaf of a tree of shapes, by its path."""
    leaves = jax.tree.leaves_with_path(shapes)
    for (path, leaf), where in zip(leaves, jax.tree.leaves(shardings), strict=True):
        shard = where.shard_shape(leaf.shape)
        yield Placed(
            path=jax.tree_util.keystr(path, simple=True, separator="/"),
            shape=leaf.shape,
            dtype=leaf.dtype.name,
            parts=tuple(whole // own for whole, own in zip(leaf.shape, shard, strict=True)),
            # Codes of 4 bits are two to a byte.
            num_bytes=math.prod(shard) * jax.dtypes.itemsize_bits(leaf.dtype) // 8,
        )


def ring_seconds(one: Collective, topology: Topology, coords: list[tuple[int, ...]]) -> float:
    """How long a collective takes that only has the links along its own axes.

    Nothing is sent the longer way round. What passes through other chips takes their links too:
    a permute counts as often as its longest way has hops, an all-to-all as its average way has
    along each axis, and a group with gaps as often as the widest of them, since other groups are
    in the gaps.

    Args:
      one: the collective.
      topology: the slice.
      coords: of every device of the program, its place in the slice.
    """
    axes = range(len(topology.dims))
    if one.group is None:
        times = 1.0
    elif one.kind == "collective-permute":
        places = np.array(coords)[np.array(one.pairs)]  # [pairs, 2, axes]
        times = sum(_hops(places[:, 0, a], places[:, 1, a], topology, a) for a in axes).max()
    elif one.kind == "all-to-all":
        places = np.array(coords)[np.array(one.group)]
        size = len(places)
        times = 0.0
        for axis in axes:
            hops = _hops(places[:, None, axis], places[None, :, axis], topology, axis)
            if hops.any():
                times += hops.sum() / (size * (size - 1)) / topology.links_along(axis)
    else:
        links = 0.0
        for axis in axes:
            spanned = sorted({coords[device][axis] for device in one.group})
            if len(spanned) == topology.dims[axis]:
                links += topology.links_along(axis)
            elif len(spanned) > 1:  # a part of an axis has no way around
                links += 1 / np.diff(spanned).max()
        times = 1 / links
    return float(one.num_bytes * times / topology.chip.link_bytes_per_s)


def _hops(start: np.ndarray, end: np.ndarray, topology: Topology, axis: int) -> np.ndarray:
    """Links from place to place along an axis: on a ring the shorter way."""
    hops = np.abs(start - end)
    if topology.links_along(axis) == 2:
        return np.minimum(hops, topology.dims[axis] - hops)
    return hops


def needed_bytes(refused: str) -> int | None:
    """Of a compiler that finds no room: the bytes of one chip that it would take."""
    for pattern in _NO_ROOM:
        if found := pattern.search(refused):
            return round(float(found[1]) * _UNITS[found[2]])
    return None


# ---- What would fit ----


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
    """What fits instead, as far as it was looked for."""

    topology: Topology | None  # the smallest listed one of the kind that does
    batch_size: int | None  # the largest on the same slice that does
    tried: tuple[str, ...]  # what was compiled or ruled out, and how that ended


def advise(config: Config, refused: Plan, stages: Sequence[Config] = ()) -> Advice:
    """Looks for a larger slice, and for a smaller batch on the same one, that fit.

    Compiles at most three candidates for each, and none with more than 1024 rows of the batch on a
    chip: compilation takes the longer the more there are, and cannot be interrupted.
    """
    tried: list[str] = []
    return Advice(
        topology=_larger_topology(config, refused, tried, stages),
        batch_size=_smaller_batch(config, refused, tried, stages),
        tried=tuple(tried),
    )


def _larger_topology(
    config: Config, refused: Plan, tried: list[str], stages: Sequence[Config]
) -> Topology | None:
    ratio = (refused.needed_bytes or 0) / refused.hbm_limit
    unit = _row_on_each(config, refused)
    compiled = 0
    for candidate in chips.larger(refused.topology):
        # A chip of n times as many holds at best one n-th.
        if candidate.num_chips < 0.9 * ratio * refused.topology.num_chips:
            tried.append(f"{candidate.name}: too few chips for it")
            continue
        rows = refused.batch_size * refused.topology.num_chips // (unit * candidate.num_chips)
        if rows > _MOST_ROWS:
            tried.append(f"{candidate.name}: not compiled, {rows} rows on a chip would take long")
            continue
        if compiled == _TRIED:
            break
        try:
            found = plan(config, candidate, refused.mode, stages)
        except UserError as error:
            tried.append(f"{candidate.name}: {str(error).splitlines()[0]}")
            continue
        compiled += 1
        tried.append(f"{candidate.name}: {in_short(found)}")
        if found.fits:
            return candidate
    return None


def _smaller_batch(
    config: Config, refused: Plan, tried: list[str], stages: Sequence[Config]
) -> int | None:
    unit = _row_on_each(config, refused)
    lowest, highest = 0, refused.batch_size // unit  # known to fit if not 0; known not to
    room = refused.hbm_limit - refused.state_bytes
    if room <= 0:
        tried.append(
            f"{refused.topology.name}, any batch: the state alone is "
            f"{refused.state_bytes / _GIB:.2f} GiB"
        )
        return None
    # What is not state grows with the batch, more or less.
    guess = (highest + lowest) // 2
    if refused.needed_bytes:
        guess = int(highest * room / max(refused.needed_bytes - refused.state_bytes, 1))
    if highest > _MOST_ROWS + 1:
        highest = _MOST_ROWS + 1
        tried.append(f"{refused.topology.name}: not more than {_MOST_ROWS} rows on a chip")
    for _ in range(_TRIED):
        if highest - lowest <= 1:
            break
        guess = min(max(guess, lowest + 1), highest - 1)
        smaller = with_batch(config, refused.mode, guess * unit)
        found = plan(smaller, refused.topology, refused.mode, stages)
        tried.append(f"{refused.topology.name}, batch {guess * unit}: {in_short(found)}")
        if found.fits:
            lowest = guess
        else:
            highest = guess
        guess = (highest + lowest) // 2
    return lowest * unit or None


def _row_on_each(config: Config, refused: Plan) -> int:
    """The batch that is one row on each chip at a time (on all those of `tensor` together)."""
    unit = refused.mesh["data"] * refused.mesh["fsdp"]
    return unit * config.optim.accumulate_steps if refused.mode == "full" else unit


def with_batch(config: Config, mode: str, batch_size: int) -> Config:
    """The config with another batch for that mode."""
    if mode == "full":
        return dataclasses.replace(config, batch_size=batch_size)
    evaluated = dataclasses.replace(config.eval, batch_size=batch_size)
    return dataclasses.replace(config, eval=evaluated)


def in_short(found: Plan) -> str:
    """Whether it fits, and how much it needs, in words."""
    limit = f"of {found.topology.chip.hbm_gib:g} GiB"
    if found.fits:
        return f"fits, {found.memory.peak / _GIB:.2f} {limit}"
    if found.needed_bytes is None:
        return f"does not fit: {found.refused.splitlines()[0]}"
    least = "" if found.is_compiled else "at least "
    over = (found.needed_bytes - found.hbm_limit) / _GIB
    return f"does not fit, {least}{found.needed_bytes / _GIB:.2f} {limit}, {over:.2f} GiB too much"
