"""Train and evaluate: `python -m deevisum_jax.main --config configs/quickstart.py --workdir DIR`.

Reads as a table of contents; every section is a call into the package. A run that was killed goes
on where its newest checkpoint stands when the same command is given again. Predictions of any other
method are evaluated with `--mode evaluate --predictions FILE`.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
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
    train_step,
    training,
    training_log,
)
from deevisum_jax import config as config_lib
from deevisum_jax.config import Config
from deevisum_jax.data import pipeline
from deevisum_jax.errors import PreemptedError, UserError, exits_cleanly
from deevisum_jax.files import locate, write_whole
from deevisum_jax.inference import scoring
from deevisum_jax.models import paligemma2
from deevisum_jax.summary import predictions, protocols, report
from deevisum_jax.summary.protocols import VideoGroundTruth
from deevisum_jax.typing import INPUTS

_EXAMPLES = """\
examples:
  python -m deevisum_jax.main --config configs/quickstart.py --workdir runs/quickstart
  python -m deevisum_jax.main --config configs/quickstart.py --workdir runs/lower_rate \\
      --config.optim.learning_rate=3e-4 --config.total_steps=500
  python -m deevisum_jax.main --config configs/tvsum.py --mode evaluate --predictions a.json b.npz

The same command again resumes a run that was stopped. deevisum_jax/config.py explains every field.
DIR may be in a bucket (gs://...). With several processes, each is given the same command.

what DIR gets:
  report.html     a page to look at: the student beside people and baselines, exit by exit
  report.json     the same numbers, with the protocol of each
  predictions.npz   scores of the test split's segments, as --predictions takes them
  metrics.jsonl   a line per logged step; tensorboard/ has them as event files
  checkpoints/    to resume from, and the best by validation tau
  config.json, data.json, tokenizer.model, template.txt   what the checkpoints need to be used
  evaluation.json, evaluation.html   with --predictions, and nothing else then

Exit status: 0 done; 2 a mistake in what was given, or a disk that is full (a message says which,
and the next step); 75 stopped by SIGTERM, with all saved: start the same command again; 130
interrupted.
"""


@exits_cleanly
@distributed.ends_together
def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    args, config = parse(argv)
    # Orbax warns of much that is as it should be.
    absl.logging.set_verbosity(absl.logging.ERROR)
    if args.predictions:
        # ---- Anybody's predictions: no model, no device, no other process ----
        evaluator.run(config, args.predictions, locate(args.workdir) if args.workdir else None)
        return 0
    distributed.initialize(args)
    with preemption.Notice() as notice:
        command = {"mode": args.mode, "workdir": args.workdir}
        command["config"] = dataclasses.asdict(config)
        distributed.check_same("command", json.dumps(command))
        workdir = locate(args.workdir)
        config, start = initialization.settle(config, workdir)
        if args.mode == "train":
            runs.claim(workdir, config)
        else:
            runs.check(workdir, config)
        with jax.set_mesh(sharding.make_mesh(**dataclasses.asdict(config.mesh))):
            run = Run(config, workdir, start, notice)
            if args.mode == "train":
                run.train()
            run.evaluate()
    return 0


def parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    """Flags, and the config with its overrides."""
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
        choices=("train", "evaluate"),
        default="train",
        help="train: train what is missing, then evaluate (default); evaluate: the best checkpoint",
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
    return args, config_lib.from_file(args.config, overrides)


class Run:
    """One experiment on the current mesh: its data, its model, its state."""

    def __init__(
        self,
        config: Config,
        workdir: epath.Path,
        start: initialization.Start | None,
        notice: preemption.Notice,
    ) -> None:
        # ---- Mistakes that need no data to be seen: building it may take minutes ----
        self.config, self.workdir, self.start, self.notice = config, workdir, start, notice
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
        self.model_config = experiment.model_config(config, tokens)
        self.make_encoder = functools.partial(
            experiment.make_encoder, config, tokens, template, self.model_config.img.image_size
        )

        # ---- Model and optimizer: shapes and shardings before any array ----
        self.schedule = optim.make_schedule(config.optim, config.total_steps)
        self.tx = optim.make_optimizer(config.optim, self.schedule)
        shapes = jax.eval_shape(self._from_scratch, jax.random.key(config.seed))
        self.shardings = train_step.state_shardings(shapes, self.tx, self.mesh)
        self.abstract = sharding.abstract(shapes, self.shardings)
        self.score_fn = scoring.make_score_fn(
            self.model_config, optim.merge(self.shardings.params, self.shardings.frozen), self.mesh
        )

    def train(self) -> None:
        """Trains to `total_steps`, from wherever the run stands."""
        config = self.config
        distributed.on_main(lambda: runs.keep_data(self.workdir, self.dataset.identity))
        # ---- Input: shuffled segments, an iterator that can be saved ----
        encoder = self.make_encoder(captions=True)
        records = self.dataset.split("train")
        source = experiment.make_source(config, records, encoder)
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
            num_targets=encoder.prompts.num_targets,
            accumulate_steps=config.optim.accumulate_steps,
        )
        update = train_step.jit(step, self.shardings, self.mesh)
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

    def evaluate(self) -> None:
        """Holds the best checkpoint against the test split; writes report.json and report.html.

        Raises:
          PreemptedError: a notice came first.
        """
        with self.notice.deferred():
            self._evaluate()

    def _evaluate(self) -> None:
        config = self.config
        with checkpoints.Checkpoints(self._checkpoint_folder) as saved:
            step = saved.best_step
            params = saved.restore_params(step, self._abstract_params)
        # ---- Predictions: with everything, and with one input left out ----
        test = self._test
        full = self._predict(params, test)
        models = evaluation.evaluate_exits(test.truths, full, config, self.model_config)
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
            cost=evaluation.early_exit_cost(full, config, self.model_config),
            notes=protocols.notes_on(test.truths, self.protocol),
        )
        scores = evaluation.of_videos(test.truths, full, evaluation.deepest)
        distributed.on_main(functools.partial(self._report, found, scores, step))

    def _report(
        self,
        found: evaluation.Evaluation,
        scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
        step: int,
    ) -> None:
        predictions.write_npz(self.workdir / "predictions.npz", scores)
        result = evaluation.report_json(found, steps=step)
        write_whole(self.workdir / "report.json", json.dumps(result, indent=2) + "\n")
        history = training_log.read_metrics(self.workdir / training_log.METRICS_FILE)
        report.write_run_report(
            self.workdir / "report.html",
            evaluation.report_page(found, config=self.config, history=history),
        )
        print(evaluation.table(result))

    @property
    def _checkpoint_folder(self) -> epath.Path:
        return self.workdir / runs.CHECKPOINT_FOLDER

    @property
    def _abstract_params(self) -> optim.Params:
        return optim.merge(self.abstract.params, self.abstract.frozen)

    def _from_scratch(self, key: jax.Array) -> train_step.TrainState:
        params = paligemma2.init_params(self.model_config, key)
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
        params = self.start.load(self.model_config, self._abstract_params, key)
        begin = lambda params: train_step.init_state(params, self.tx, self.config.optim.frozen)
        return jax.jit(begin, out_shardings=self.shardings, donate_argnums=0)(params)

    @functools.cached_property
    def _test(self) -> Split:
        """Read once, for training's first look at it and for the evaluation behind."""
        return self._split(self.config.eval.test_split)

    def _split(self, name: str) -> Split:
        records = self.dataset.split(name)
        return Split(
            truths=evaluation.ground_truths(records, self.protocol),
            source=experiment.make_source(self.config, records, self.make_encoder()),
        )

    def _predict(self, params: optim.Params, split: Split) -> evaluation.Prediction:
        batch_size = self.config.eval.batch_size
        rows = distributed.own_rows(sharding.batch_sharding(self.mesh), batch_size)
        scores = scoring.score_videos(
            functools.partial(self.score_fn, params),
            self._until_told(pipeline.in_order(split.source, batch_size=batch_size, rows=rows)),
            self.mesh,
        )
        return evaluation.Prediction(
            bounds=split.source.bounds, scores=[scores[row] for row in range(len(split.truths))]
        )

    def _until_told(
        self, batches: Iterator[dict[str, np.ndarray]]
    ) -> Iterator[dict[str, np.ndarray]]:
        for batch in batches:
            if self.notice.reached():
                raise PreemptedError("all that is trained is saved, and not evaluated yet")
            yield batch

    def _validate(self, state: train_step.TrainState, validation: Split) -> dict[str, float]:
        """tau, rho and F1 of the deepest exit; tau chooses the best checkpoint."""
        prediction = self._predict(optim.merge(state.params, state.frozen), validation)
        result = evaluation.evaluate(validation.truths, prediction, evaluation.deepest, self.config)
        return {"tau": result.tau, "rho": result.rho, "f1": result.f1}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """A split to evaluate on: what people said, and the segments to score."""

    truths: list[VideoGroundTruth]
    source: pipeline.SegmentSource


def _describe(
    records: Sequence[pipeline.Record], source: pipeline.SegmentSource, row: int, segment: int
) -> Mapping[str, Any]:
    """A segment of the training data, for people."""
    start_s, end_s = source.bounds[row][segment].tolist()
    video_id = records[row]["video_id"]
    return {"video_id": video_id, "segment": segment, "start_s": start_s, "end_s": end_s}


if __name__ == "__main__":
    sys.exit(main())
