"""Orbax checkpoints: `params`, `train_state` and `data_iter` as separate items of every step.

The newest few are kept to resume from, and the best by validation tau besides. A step is written
under a temporary name and renamed when complete, so a kill at any moment leaves the ones before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from orbax.checkpoint.checkpoint_managers import preservation_policy

from deevisum_jax import optim
from deevisum_jax.config import CheckpointConfig
from deevisum_jax.errors import UserError
from deevisum_jax.optim import Params
from deevisum_jax.train_step import TrainState

BEST_METRIC = "tau"
_CHUNK_BYTES = 256 * 2**20  # of stored weights
_GROUP_BYTES = 2**30  # of weights restored at a time


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`."""

    def __init__(self, folder: pathlib.Path, config: CheckpointConfig | None = None) -> None:
        """Opens (and, when `config` is given, creates) the folder.

        Raises:
          UserError: reading was asked for, and the folder is not there.
        """
        self._folder = folder.absolute()
        if config is None and not self._folder.is_dir():
            raise UserError(
                f"{folder} does not exist; give the workdir of a run that saved checkpoints"
            )
        policy = None
        if config is not None:
            policy = preservation_policy.AnyPreservationPolicy(
                [
                    preservation_policy.LatestN(config.keep),
                    preservation_policy.BestN(
                        get_metric_fn=lambda metrics: metrics[BEST_METRIC],
                        n=1,
                        keep_checkpoints_without_metrics=False,
                    ),
                ]
            )
        self._manager = ocp.CheckpointManager(
            self._folder,
            item_names=("params", "train_state", "data_iter"),
            # Named here for `item_metadata`, which `_check` reads before anything is restored.
            item_handlers={
                "params": ocp.StandardCheckpointHandler(),
                "train_state": ocp.StandardCheckpointHandler(),
                "data_iter": grain.checkpoint.CheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                best_fn=lambda metrics: metrics[BEST_METRIC],
                create=config is not None,
                read_only=config is None,
            ),
        )

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()  # waits for what is being written

    @property
    def latest_step(self) -> int | None:
        """Newest complete step, or None."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int:
        """Complete step with the highest validation tau; without any metrics, the newest.

        Raises:
          UserError: there is no complete step.
        """
        steps = self._manager.all_steps()
        if not steps:
            raise UserError(f"{self._folder} holds no complete checkpoint; train first")
        if not any(self._manager.metrics(step) for step in steps):
            return max(steps)
        return self._manager.best_step()

    def save(
        self,
        step: int,
        state: TrainState,
        data_iter: grain.DatasetIterator,
        metrics: dict[str, float] | None,
    ) -> None:
        """Starts writing; returns as soon as the arrays are copied to the host."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(optim.merge(state.params, state.frozen)),
                train_state=ocp.args.StandardSave(
                    {"opt_state": state.opt_state, "step": state.step}
                ),
                data_iter=grain.checkpoint.CheckpointSave(data_iter),
            ),
            metrics=metrics,
        )

    def restore_params(self, step: int, abstract: Params) -> Params:
        """The parameters alone, onto the shapes, dtypes and shardings of `abstract`.

        Raises:
          UserError: the step holds parameters of another architecture (names what differs), or
            cannot be restored.
        """
        with self._reading(step):
            _check_shapes(self._stored(step), abstract, self._folder)
            restored = self._manager.restore(
                step, args=ocp.args.Composite(params=ocp.args.StandardRestore(abstract))
            )
        return restored["params"]

    def restore(
        self, step: int, abstract: TrainState, data_iter: grain.DatasetIterator
    ) -> TrainState:
        """A whole training state; `data_iter` is moved to where it stood.

        Args:
          step: one of the complete steps.
          abstract: shapes, dtypes and shardings of the state.
          data_iter: an iterator over the same data, built the same way.

        Raises:
          UserError: as `restore_params`.
        """
        params = optim.merge(abstract.params, abstract.frozen)
        with self._reading(step):
            _check_shapes(self._stored(step), params, self._folder)
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(params),
                    train_state=ocp.args.StandardRestore(
                        {"opt_state": abstract.opt_state, "step": abstract.step}
                    ),
                    data_iter=grain.checkpoint.CheckpointRestore(data_iter),
                ),
            )
        merged = flatten_dict(restored["params"])
        return dataclasses.replace(
            abstract,
            **restored["train_state"],
            params=unflatten_dict({path: merged[path] for path in flatten_dict(abstract.params)}),
            frozen=unflatten_dict({path: merged[path] for path in flatten_dict(abstract.frozen)}),
        )

    def _reading(self, step: int) -> contextlib.AbstractContextManager[None]:
        return _reading(
            self._folder / str(step), "move that folder aside to go on from the one before"
        )

    def _stored(self, step: int) -> Any:
        return self._manager.item_metadata(step)["params"].tree


def save_params(folder: pathlib.Path, params: Params) -> None:
    """Parameters alone, outside of any run; `folder` must not be there.

    Memory beyond the parameters: about the largest of them.

    Raises:
      UserError: it cannot be written.
    """
    largest = max(leaf.nbytes for leaf in jax.tree.leaves(params))
    handler = ocp.PyTreeCheckpointHandler(
        save_concurrent_gb=largest / 1e9 + 1e-3,  # less than the largest, and Orbax refuses it
        # Little is gained on weights, and the compressor's buffers are as large as they.
        use_compression=False,
    )
    # In small chunks, of which a process reads those that its devices hold.
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), params)
    try:
        with ocp.Checkpointer(handler) as saver:
            saver.save(folder.absolute(), args=ocp.args.PyTreeSave(params, save_args=chunked))
    except Exception as error:  # tensorstore's own, over a full disk for instance
        raise UserError(
            f"parameters cannot be written ({type(error).__name__}: {_first_line(error)}); is the "
            "disk full?"
        ) from error


def restore_params(folder: epath.Path, abstract: Params) -> Params:
    """What `save_params` wrote, onto the shapes, dtypes and shardings of `abstract`.

    The folder may have been copied into a bucket. Memory beyond the result: about the largest
    parameter, which is read first, when there is most room.

    Raises:
      UserError: the folder is not there or damaged, or holds another architecture.
    """
    if "://" not in os.fspath(folder):
        folder = folder.absolute()  # Orbax takes no other
    wanted = flatten_dict(abstract)
    restored = {}
    with (
        _reading(folder, "convert the weights again"),
        ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as loader,
    ):
        _check_shapes(loader.metadata(folder).item_metadata.tree, abstract, folder)
        for paths in _in_groups(wanted):
            some = unflatten_dict(
                {path: leaf if path in paths else ocp.PLACEHOLDER for path, leaf in wanted.items()}
            )
            found = loader.restore(
                folder,
                args=ocp.args.PyTreeRestore(
                    item=some, restore_args=ocp.checkpoint_utils.construct_restore_args(some)
                ),
            )
            found = flatten_dict(found)
            for path in paths:
                if not _is_finite(found[path]):
                    raise UserError(
                        f"{folder}: {'/'.join(path)} holds numbers that are not finite; the files "
                        "are damaged, convert the weights again"
                    )
                restored[path] = found[path]
    return unflatten_dict({path: restored[path] for path in wanted})


@jax.jit
def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _in_groups(leaves: dict[tuple[str, ...], Any]) -> list[list[tuple[str, ...]]]:
    """Paths of at most `_GROUP_BYTES` together, or of one larger leaf; the largest first."""
    groups: list[list[tuple[str, ...]]] = []
    room = 0
    for path in sorted(leaves, key=lambda path: -leaves[path].size):
        size = leaves[path].size * np.dtype(leaves[path].dtype).itemsize
        if not groups or size > room:
            groups.append([])
            room = _GROUP_BYTES
        groups[-1].append(path)
        room -= size
    return groups


@contextlib.contextmanager
def _reading(folder: os.PathLike, advice: str) -> Iterator[None]:
    """Orbax, tensorstore and Grain raise what they like, over a damaged file or otherwise."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"checkpoint {folder} cannot be restored ({type(error).__name__}: "
            f"{_first_line(error)}); {advice}"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else "no reason given"


def _check_shapes(stored_tree: Any, abstract: Params, folder: os.PathLike) -> None:
    """Compares names and shapes before any array is read."""
    stored = flatten_dict(stored_tree, sep="/")
    stored = {path: tuple(leaf.shape) for path, leaf in stored.items()}
    wanted = {path: leaf.shape for path, leaf in flatten_dict(abstract, sep="/").items()}
    differing = [
        f"{path}: {stored.get(path, 'absent')} in the checkpoint, "
        f"{wanted.get(path, 'absent')} in the model"
        for path in sorted(stored.keys() | wanted.keys())
        if stored.get(path) != wanted.get(path)
    ]
    if differing:
        shown = "; ".join(differing[:5] + ["..."] * (len(differing) > 5))
        raise UserError(
            f"{folder} holds a model of another architecture ({len(differing)} of {len(wanted)} "
            f"parameters differ); use the config it was trained with: {shown}"
        )
