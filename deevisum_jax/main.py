"""Train and evaluate: `python -m deevisum_jax.main --config configs/quickstart.py --workdir DIR`.

Reads as a table of contents; every section is a call into the package. A run that was killed goes
on where its newest checkpoint stands when the same command is given again. Predictions of any other
method are evaluated with `--mode evaluate --predictions FILE`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import absl.logging
import jax
import numpy as np
from etils import epath

from deevisum_jax import (
    checkpoints,
    datasets,
    distributed,
    evaluation,
    evaluator,
    experiment,
    initialization,
    optim,
    preemption,
    runs,
    sharding,
    stages,
    train_step,
    training,
    training_log,
)
from deevisum_jax import config as config_lib
from deevisum_jax.config import Config
from deevisum_jax.data import pipeline
from deevisum_jax.distill import cache, objective, teachers
from deevisum_jax.errors import PreemptedError, UserError, exits_cleanly
from deevisum_jax.files import locate, write_whole
from deevisum_jax.inference import calibration, scoring, speed, staged
from deevisum_jax.models import paligemma2
from deevisum_jax.summary import predictions, protocols, report
from deevisum_jax.summary.protocols import VideoGroundTruth
from deevisum_jax.typing import INPUTS

_EXAMPLES = """\
examples:
  python -m deevisum_jax.main --config configs/quickstart.py --workdir runs/quickstart
  python -m deevisum_jax.main --config configs/quickstart.py --workdir runs/lower_rate \\
      --config.optim.learning_rate=3e-4 --config.total_steps=500
  python -m deevisum_jax.main --config configs/quickstart.py --workdir runs/quickstart \\
      --mode calibrate --config.calibration.tau=0.02
  python -m deevisum_jax.main --config configs/tvsum.py --mode evaluate --predictions a.json b.npz
  python -m deevisum_jax.main --config configs/tvsum_mskd.py --workdir DIR --config.stage=teacher
  python -m deevisum_jax.main --config configs/tvsum_mskd.py --workdir DIR --config.stage=teacher \\
      --mode cache_teacher

The same command again resumes a run that was stopped. deevisum_jax/config.py explains every field.
DIR may be in a bucket (gs://...). With several processes, each is given the same command.

A config of several stages trains teacher, mentor and student in this order, each but the student in
a folder of its name in DIR; what is finished is not trained again. --config.stage=NAME is one of
them alone. --config.FIELD=VALUE holds for all, --config.stages.NAME.FIELD=VALUE for one.

what DIR gets:
  report.html     a page to look at: the student beside people and baselines, exit by exit
  report.json     the same numbers, with the protocol of each
  predictions.npz   scores of the test split's segments, as --predictions takes them
  metrics.jsonl   a line per logged step; tensorboard/ has them as event files
  checkpoints/    to resume from, and the best by validation tau
  config.json, data.json, tokenizer.model, template.txt   what the checkpoints need to be used
  calibration.json   after --mode calibrate: when segments leave early, and what that may cost
  evaluation.json, evaluation.html   with --predictions, and nothing else then

Exit status: 0 done; 2 a mistake in what was given, or a disk that is full (a message says which,
and the next step); 75 stopped by SIGTERM, with all saved: start the same command again; 130
interrupted.
"""


@exits_cleanly
@distributed.ends_together
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args, configs = parse(argv)
    # Orbax warns of much that is as it should be.
    absl.logging.set_verbosity(absl.logging.ERROR)
    if args.predictions:
        # ---- Anybody's predictions: no model, no device, no other process ----
        folder = locate(args.workdir) if args.workdir else None
        evaluator.run(configs[-1], args.predictions, folder)
        return 0
    distributed.initialize(args)
    with preemption.Notice() as notice:
        command = {"mode": args.mode, "workdir": args.workdir}
        command["stages"] = [config.stage for config in configs]
        command |= {one.stage or "config": dataclasses.asdict(one) for one in args.stages}
        distributed.check_same("command", json.dumps(command))
        workdir = locate(args.workdir)
        # ---- Stages: teacher, mentor, student; or the one that is asked for ----
        for config in stages.needed(configs) if args.mode == "train" else configs[-1:]:
            with jax.set_mesh(sharding.make_mesh(**dataclasses.asdict(config.mesh))):
                _do(args.mode, config, configs, args.stages, workdir, notice)
    return 0


def _do(
    mode: str,
    config: Config,
    asked_for: Sequence[Config],
    all_stages: Sequence[Config],
    workdir: epath.Path,
    notice: preemption.Notice,
) -> None:
    """One stage, or a run of none, on the current mesh.

    Args:
      mode: as `--mode`.
      config: of the stage.
      asked_for: the stages of this command.
      all_stages: those that the config describes.
      workdir: of all of them.
      notice: tells when to stop.
    """
    folder, is_last = stages.folder_of(config, workdir), config.stage == asked_for[-1].stage
    finished = stages.is_finished(folder)
    trains = mode == "train" and not finished
    # What others learn from is not evaluated again; what is asked for by itself is.
    evaluates = trains or (mode != "cache_teacher" and is_last)
    config, start = initialization.settle(config, folder)
    if mode == "train" and evaluates:
        runs.claim(folder, config)
    else:
        runs.check(folder, config)
    if mode in ("cache_teacher", "calibrate") and not finished:
        raise UserError(
            f"the {config.stage or 'run'} in {folder} is not trained to its end, and what it says "
            "would change; first give the same command without --mode"
        )
    learners = stages.learners_of(config, all_stages if mode == "cache_teacher" else asked_for)
    if mode != "cache_teacher":
        learners = [learner for learner in learners if learner.distill.source == "cache"]
    if not (evaluates or learners):
        return
    earlier = stages.open_teachers(config, workdir) if trains else None
    run = Run(config, folder, start, notice, earlier)
    if trains:
        run.train()
    if mode == "calibrate":
        run.calibrate()
    if evaluates:
        run.evaluate()
    if learners and mode not in ("evaluate", "calibrate"):
        run.cache_outputs(learners, all_stages)
    if not is_last and notice.reached():
        raise PreemptedError(f"the {config.stage} is done and saved")


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, tuple[Config, ...]]:
    """Flags, and the config of every stage with its overrides."""
    parser = argparse.ArgumentParser(
        prog="python -m deevisum_jax.main",
        description="Trains an early-exit PaliGemma 2 to summarize video, then evaluates it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="an experiment in configs/")
    parser.add_argument("--workdir", metavar="DIR", help="where the run lives")
    parser.add_argument(
        "--mode",
        choices=("train", "evaluate", "calibrate", "cache_teacher"),
        default="train",
        help="train: train what is missing, then evaluate (default); evaluate: the best "
        "checkpoint; calibrate: choose when its segments leave early, so that what is lost stays "
        "within --config.calibration.f1 and tau, then evaluate; cache_teacher: write down what a "
        "trained stage says of every training example, for those that learn from it",
    )
    parser.add_argument(
        "--predictions",
        nargs="+",
        default=[],
        metavar="FILE",
        help="evaluate these scores instead of a run, of two files also their difference; "
        "JSON, NPZ or HDF5 (docs/EVALUATION.md); {fold} in FILE is the number of the fold",
    )
    parser.add_argument(
        # Shown in the help only; the overrides are what argparse does not know.
        "--config.FIELD=VALUE",
        action="store_true",
        help="override a field of the config, such as --config.total_steps=500; repeatable",
    )
    distributed.add_flags(parser)
    args, rest = parser.parse_known_args(argv)
    unknown = [flag for flag in rest if not flag.startswith("--config.")]
    if unknown:
        advice = "; write overrides as --config.FIELD=VALUE" if len(unknown) < len(rest) else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{advice}")
    if args.predictions and args.mode != "evaluate":
        parser.error("--predictions are evaluated, not trained on; add --mode evaluate")
    processes = ("coordinator_address", "num_processes", "process_id")
    others = [f"--{name}" for name in processes if getattr(args, name) is not None]
    if args.predictions and others:
        parser.error(f"--predictions are evaluated by one process; leave out {', '.join(others)}")
    if not args.predictions and not args.workdir:
        parser.error("the following arguments are required: --workdir")
    overrides = [flag.removeprefix("--config.") for flag in rest]
    args.stages = config_lib.described_stages(args.config, overrides)
    configs = config_lib.stages_from_file(args.config, overrides)
    if args.mode == "cache_teacher" and not any(
        configs[-1].stage in learner.teachers for learner in args.stages
    ):
        parser.error(
            "--mode cache_teacher is of a stage that another learns from; say which: "
            "--config.stage=teacher"
        )
    if args.mode == "calibrate":
        _ = configs[-1].calibrated_on  # a mistake there is better known at once
    return args, configs


class Run:
    """One experiment on the current mesh: its data, its model, its state."""

    def __init__(
        self,
        config: Config,
        workdir: epath.Path,
        start: initialization.Start | None,
        notice: preemption.Notice,
        earlier: Mapping[str, stages.Earlier] | None = None,
    ) -> None:
        """Looks at all that can be wrong before anything is trained.

        Args:
          config: with nothing left open.
          workdir: of this run.
          start: None from scratch, and where the run stands already.
          notice: tells when to stop.
          earlier: the stages that it learns from; None if it is not to be trained.

        Raises:
          UserError: what `main` tells its user.
        """
        # ---- Mistakes that need no data to be seen: building it may take minutes ----
        self.config, self.workdir, self.start, self.notice = config, workdir, start, notice
        self.earlier = earlier or {}
        self.protocol = evaluation.protocol_of(config.eval)
        self.mesh = jax.sharding.get_mesh()
        microbatch = config.batch_size // config.optim.accumulate_steps
        sharding.check_batch("batch_size / optim.accumulate_steps", microbatch, self.mesh)
        sharding.check_batch("eval.batch_size", config.eval.batch_size, self.mesh)
        early_config = experiment.model_config(config)
        shapes = paligemma2.abstract_params(early_config)
        sharding.validate(shapes, self.mesh)
        optim.split_frozen(shapes, config.optim.frozen)
        template = experiment.make_template(config, workdir)
        given = experiment.given_tokenizer(config, workdir, start)
        for teacher in self.earlier.values():
            given = given or teacher.tokens  # a word is the same token to all of them
            teacher.check(config, template, given)
        vocab_size = None
        if given is not None:
            experiment.make_encoder(config, given, template, early_config.img.image_size)
            vocab_size = experiment.model_config(config, given).llm.vocab_size
        if start is not None:
            start.check(config, vocab_size)

        # ---- Data: records, tokenizer, segments ----
        self.dataset = datasets.Dataset(config.data)
        runs.check_data(workdir, self.dataset.identity)
        for split in (config.eval.validation_split, config.eval.test_split):
            self.dataset.split(split)  # a wrong name is better known before training than after
        tokens = experiment.make_tokenizer(
            config, workdir, template, self.dataset.split("train"), given
        )
        self.template, self.tokens = template, tokens
        self.model_config = experiment.model_config(config, tokens)
        self.make_encoder = functools.partial(
            experiment.make_encoder, config, tokens, template, self.model_config.img.image_size
        )

        # ---- Distillation: what is learned of which stage ----
        self.distill = None
        if earlier is not None:
            for teacher in earlier.values():
                runs.check_data(teacher.run, self.dataset.identity)
            models = {name: teacher.model_config for name, teacher in earlier.items()}
            self.distill = objective.make(config, self.model_config, models)

        # ---- Model and optimizer: shapes and shardings before any array ----
        self.schedule = optim.make_schedule(config.optim, config.total_steps)
        self.tx = optim.make_optimizer(config.optim, self.schedule)
        shapes = jax.eval_shape(self._from_scratch, jax.random.key(config.seed))
        self.shardings = train_step.state_shardings(shapes, self.tx, self.mesh)
        self.abstract = sharding.abstract(shapes, self.shardings)
        self.score_fn = scoring.make_score_fn(
            self.model_config, _of_model(self.shardings), self.mesh
        )

    def train(self) -> None:
        """Trains to `total_steps`, from wherever the run stands."""
        config = self.config
        distributed.on_main(lambda: runs.keep_data(self.workdir, self.dataset.identity))
        # ---- Input: shuffled segments, an iterator that can be saved ----
        records, source, num_targets = self._training_data
        online: dict[str, optim.Params] = {}
        if self.distill and self.distill.teachers:
            distributed.on_main(self._keep_teachers)
            if self.distill.online:
                online = self._load_teachers()
            else:
                source = source.with_teachers(self._open_caches())
        data_iter = pipeline.train_iterator(
            source,
            batch_size=config.batch_size,
            seed=config.seed,
            rows=distributed.own_rows(sharding.batch_sharding(self.mesh), config.batch_size),
            num_threads=config.data.num_threads,
        )
        validation = self._split(config.eval.validation_split)
        for split in (validation, self._test):
            for truth in split.truths:
                truth.check()  # better known before training than after
        # ---- Update: one compiled function, the state donated ----
        step = train_step.make_train_step(
            self.model_config,
            config.loss,
            self.tx,
            self.schedule,
            num_targets=num_targets,
            accumulate_steps=config.optim.accumulate_steps,
            distill=self.distill,
        )
        where = {
            name: jax.tree.map(lambda a: a.sharding, params) for name, params in online.items()
        }
        compiled = train_step.jit(step, self.shardings, self.mesh, where)
        update = (lambda state, batch: compiled(state, batch, online)) if online else compiled
        with checkpoints.Checkpoints(self._checkpoint_folder, config.checkpoint) as saved:
            # ---- State: resume > what `initialization` names > from scratch ----
            state = saved.restore_latest(self.abstract, data_iter)
            if state is None:
                state = self._first_state()
            # ---- Loop: update, check, log, validate, save ----
            training.train(
                state,
                config=config,
                workdir=self.workdir,
                data_iter=data_iter,
                place=functools.partial(sharding.place_batch, mesh=self.mesh),
                update=update,
                validate=functools.partial(self._validate, validation=validation),
                describe=functools.partial(_describe, records, source),
                saved=saved,
                notice=self.notice,
            )

    def cache_outputs(self, learners: Sequence[Config], configs: Sequence[Config]) -> None:
        """Writes down what this stage, trained, says of every training example.

        Args:
          learners: those that learn from it so.
          configs: of all stages.

        Raises:
          PreemptedError: a notice came first; what is written stays.
          UserError: as `cache.write`.
        """
        this = stages.Earlier(self.config.stage, self.workdir)
        missing: dict[teachers.Asked, cache.Identity] = {}
        for asked in stages.asked_of(this.name, learners, configs, self.tokens).values():
            identity = this.identity(
                self.config, self.dataset.identity, self.template, self.tokens, asked
            )
            if not cache.is_whole(this.outputs(asked), identity):
                missing[asked] = identity
        if not missing:
            return
        records, source, num_targets = self._training_data
        with self.notice.deferred():
            params = this.load(_of_model(self.abstract))
            for asked, identity in missing.items():
                answer = teachers.make_teacher_fn(
                    self.model_config,
                    _of_model(self.shardings),
                    self.mesh,
                    asked,
                    num_targets=num_targets,
                )
                cache.write(
                    this.outputs(asked),
                    identity,
                    functools.partial(answer, params),
                    functools.partial(self._from, source),
                    self.mesh,
                    num_examples=len(source),
                    describe=functools.partial(_describe, records, source),
                )

    def _from(self, source: pipeline.SegmentSource, first: int = 0) -> Iterator[pipeline.Row]:
        """Batches of all segments from one on, until a notice comes."""
        batch_size = self.config.eval.batch_size
        rows = distributed.own_rows(sharding.batch_sharding(self.mesh), batch_size)
        return self._until_told(
            pipeline.in_order(source, batch_size=batch_size, rows=rows, first=first)
        )

    @functools.cached_property
    def _training_data(self) -> tuple[Sequence[pipeline.Record], pipeline.SegmentSource, int]:
        """Records and segments to train on, and the most token targets of one of them."""
        encoder = self.make_encoder(captions=True)
        records = self.dataset.split("train")
        source = experiment.make_source(self.config, records, encoder)
        return records, source, encoder.prompts.num_targets

    def _keep_teachers(self) -> None:
        weights = {name: teacher.weights for name, teacher in self.earlier.items()}
        runs.keep_teachers(self.workdir, weights)

    def _open_caches(self) -> dict[str, cache.Cache]:
        """What every teacher said of every training example.

        Raises:
          UserError: as `cache.Cache`, or of other data, weights or prompts than now.
        """
        if self.config.data.augment:
            raise UserError(
                "data.augment changes pictures anew in every epoch, and a cache knows what its "
                "teacher said of them as they are; set data.augment=False, or distill.source=online"
            )
        opened = {}
        for teacher in self.distill.teachers:
            earlier = self.earlier[teacher.name]
            opened[teacher.name] = cache.Cache.open(earlier.outputs(teacher.asked), teacher.name)
            opened[teacher.name].check(
                earlier.identity(
                    self.config, self.dataset.identity, self.template, self.tokens, teacher.asked
                )
            )
        return opened

    def _load_teachers(self) -> dict[str, optim.Params]:
        """The parameters of the teachers that run beside the student, by name.

        Raises:
          UserError: what one says of the first batch is not finite.
        """
        records, source, num_targets = self._training_data
        describe = functools.partial(_describe, records, source)
        loaded = {}
        first = next(self._from(source, 0))
        for teacher in self.distill.teachers:
            shapes = paligemma2.abstract_params(teacher.model_config)
            where = sharding.param_shardings(shapes, self.mesh)
            params = self.earlier[teacher.name].load(sharding.abstract(shapes, where))
            answer = teachers.make_teacher_fn(
                teacher.model_config, where, self.mesh, teacher.asked, num_targets=num_targets
            )
            score = functools.partial(answer, params)
            for _ in cache.said(score, [first], self.mesh, describe):
                pass  # it looks at every number
            loaded[teacher.name] = params
        return loaded

    def evaluate(self) -> None:
        """Holds the best checkpoint against the test split; writes report.json and report.html.

        Raises:
          PreemptedError: a notice came first.
        """
        with self.notice.deferred():
            self._evaluate()

    def _evaluate(self) -> None:
        config = self.config
        policy, found_before = runs.exit_policy(self.workdir, config)
        step, params = self._best()
        # ---- Predictions: with everything, and with one input left out ----
        test = self._test
        full = self._predict(params, test)
        models = evaluation.evaluate_exits(test.truths, full, config, self.model_config, policy)
        left_out = {}
        for name in INPUTS if config.eval.ablate_inputs else ():
            blind = self._predict(
                params, dataclasses.replace(test, source=test.source.without(name))
            )
            left_out[name] = evaluation.evaluate(test.truths, blind, evaluation.deepest, config)
        # ---- Rows that need no model ----
        # All that a fold does not test; a split of its own is what it is.
        fitted = ("train", "validation") if config.data.folds else ("train",)
        records = (record for name in fitted for record in self.dataset.split(name))
        baselines = protocols.baseline_rows(
            evaluation.ground_truths(records, self.protocol),
            test.truths,
            seed=config.seed,
            protocol=self.protocol,
        )
        # ---- Report ----
        found = evaluation.Evaluation(
            exit_layers=self.model_config.exit_layers,
            models=models,
            baselines=baselines,
            left_out=left_out,
            cost=evaluation.early_exit_cost(full, config, self.model_config, policy),
            calibration=found_before,
            notes=protocols.notes_on(test.truths, self.protocol),
        )
        scores = evaluation.of_videos(test.truths, full, evaluation.deepest)
        distributed.on_main(functools.partial(self._report, found, scores, step))

    def calibrate(self) -> None:
        """Chooses when segments leave early, for a promise about quality; writes calibration.json.

        Raises:
          PreemptedError: a notice came first.
          UserError: as `calibration.calibrate`.
        """
        with self.notice.deferred():
            config, settings = self.config, self.config.calibration
            split = self._calibration_split()
            # ---- Mistakes that need no scores ----
            promise = evaluation.calibration_promise(config)
            calibration.check_videos(len(split.truths), promise, settings.search_share)
            for truth in split.truths:
                truth.check()
            # ---- Scores, and by one process for all what follows of them ----
            _, params = self._best()
            with checkpoints.Checkpoints(self._checkpoint_folder) as saved:
                weights = saved.fingerprint(saved.best_step)
            scored = self._predict(params, split)
            choose = lambda: evaluation.calibrate(
                split.truths, scored, config, self.model_config
            ).to_json()
            found = calibration.Calibration.from_json(distributed.on_main(choose))
            # ---- Time: of every point, on the same segments, in turn ----
            count = -(-settings.timed_segments // config.eval.batch_size)
            batches = list(itertools.islice(self._from(split.source), count))
            score_fn = functools.partial(self.score_fn, params)
            scorer = staged.StagedScorer(self.model_config, _of_model(self.shardings), self.mesh)
            timed = speed.of_policies(
                lambda: scoring.score_videos(score_fn, self._until_told(batches), self.mesh),
                functools.partial(scorer.score_videos, params, batches),
                [point.policy for point in found.curve],
                rounds=settings.rounds,
            )
            found = dataclasses.replace(found, speed=timed)
            keep = functools.partial(runs.keep_calibration, self.workdir, found, weights)
            distributed.on_main(keep)

    def _calibration_split(self) -> Split:
        """The videos that early exit is calibrated on.

        Raises:
          UserError: there is no such split, or the model was trained or is tested on one of them.
        """
        data, name = self.config.calibrated_on
        if data == self.config.data:
            return self._split(name)
        dataset = datasets.Dataset(data)
        if name not in dataset.split_names:
            raise UserError(
                f"{data.dataset} has no split {name!r}; give calibration.split one of "
                f"{sorted(dataset.split_names)}"
            )
        split = self._split(name, dataset)
        family = lambda dataset: dataset.partition("/")[0]
        if family(data.dataset) == family(self.config.data.dataset) != "synthetic":
            used = {
                record["video_id"]
                for of_run in ("train", self.config.eval.test_split)
                for record in self.dataset.split(of_run)
            }
            if both := sorted(used & {truth.video_id for truth in split.truths}):
                raise UserError(
                    f"{len(both)} of the videos of {data.dataset}, such as {both[0]}, are among "
                    "those that the model is trained or tested on, so a promise made with them "
                    "would be worth nothing; give calibration.dataset or split others"
                )
        return split

    def _best(self) -> tuple[int, optim.Params]:
        """Step and parameters of the best checkpoint."""
        with checkpoints.Checkpoints(self._checkpoint_folder) as saved:
            step = saved.best_step
            return step, saved.restore_params(step, _of_model(self.abstract))

    def _report(
        self,
        found: evaluation.Evaluation,
        scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
        step: int,
    ) -> None:
        predictions.write_npz(self.workdir / "predictions.npz", scores)
        result = evaluation.report_json(found, steps=step)
        history = training_log.read_metrics(self.workdir / training_log.METRICS_FILE)
        report.write_run_report(
            self.workdir / "report.html",
            evaluation.report_page(found, config=self.config, history=history),
        )
        write_whole(self.workdir / runs.REPORT_FILE, json.dumps(result, indent=2) + "\n")
        print(evaluation.table(result))

    @property
    def _checkpoint_folder(self) -> epath.Path:
        return self.workdir / runs.CHECKPOINT_FOLDER

    def _from_scratch(self, key: jax.Array) -> train_step.TrainState:
        return self._begin(paligemma2.init_params(self.model_config, key), key)

    def _begin(self, params: optim.Params, key: jax.Array) -> train_step.TrainState:
        """The state at step 0 of a model's parameters."""
        key = jax.random.fold_in(key, 1)  # not what the model is drawn from
        params = objective.with_projections(self.distill, params, self.model_config, key)
        return train_step.init_state(params, self.tx, self.config.optim.frozen)

    def _first_state(self) -> train_step.TrainState:
        key = jax.random.key(self.config.seed)
        if self.start is None and self.config.initialization != config_lib.FROM_SCRATCH:
            # It was taken for a run that has begun.
            raise UserError(
                f"{self._checkpoint_folder} holds no complete checkpoint to go on from; delete it "
                f"to start again from initialization={self.config.initialization!r}"
            )
        initialization.keep(self.workdir, self.start, self.model_config)
        if self.start is None:
            return jax.jit(self._from_scratch, out_shardings=self.shardings)(key)
        params = self.start.load(self.model_config, _of_model(self.abstract), key)
        return jax.jit(self._begin, out_shardings=self.shardings, donate_argnums=0)(params, key)

    @functools.cached_property
    def _test(self) -> Split:
        """Read once, for training's first look at it and for the evaluation behind."""
        return self._split(self.config.eval.test_split)

    def _split(self, name: str, dataset: datasets.Dataset | None = None) -> Split:
        """Of the run's data set, or of another."""
        records, config = (dataset or self.dataset).split(name), self.config
        if dataset is not None:  # all of its annotators are asked
            data = dataclasses.replace(config.data, num_annotators=0)
            config = dataclasses.replace(config, data=data)
        return Split(
            truths=evaluation.ground_truths(records, self.protocol),
            source=experiment.make_source(config, records, self.make_encoder()),
        )

    def _predict(self, params: optim.Params, split: Split) -> evaluation.Prediction:
        scores = scoring.score_videos(
            functools.partial(self.score_fn, params), self._from(split.source), self.mesh
        )
        return evaluation.Prediction(
            bounds=split.source.bounds, scores=[scores[row] for row in range(len(split.truths))]
        )

    def _until_told(
        self, batches: Iterable[dict[str, np.ndarray]]
    ) -> Iterator[dict[str, np.ndarray]]:
        for batch in batches:
            if self.notice.reached():
                raise PreemptedError("all that is trained is saved, and not evaluated yet")
            yield batch

    def _validate(self, state: train_step.TrainState, validation: Split) -> dict[str, float]:
        """tau, rho and F1 of the deepest exit; tau chooses the best checkpoint."""
        prediction = self._predict(_of_model(state), validation)
        result = evaluation.evaluate(validation.truths, prediction, evaluation.deepest, self.config)
        return {"tau": result.tau, "rho": result.rho, "f1": result.f1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A split to evaluate on: what people said, and the segments to score."""

    truths: list[VideoGroundTruth]
    source: pipeline.SegmentSource


def _of_model(state: train_step.TrainState) -> optim.Params:
    """The parameters (or what stands for them) that score."""
    return optim.of_model(optim.merge(state.params, state.frozen))


def _describe(
    records: Sequence[pipeline.Record], source: pipeline.SegmentSource, row: int, segment: int
) -> Mapping[str, Any]:
    """A segment of the training data, for people."""
    start_s, end_s = source.bounds[row][segment].tolist()
    video_id = records[row]["video_id"]
    return {"video_id": video_id, "segment": segment, "start_s": start_s, "end_s": end_s}


if __name__ == "__main__":
    sys.exit(main())
