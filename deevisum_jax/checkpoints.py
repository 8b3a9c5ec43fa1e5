"""Orbax checkpoints: `params`, `train_state`, `data_iter`, `checksums` as items of every step.

The newest few are kept to resume from, and the best by validation tau besides. A step is written
under a temporary name and renamed when complete, so a kill at any moment leaves the ones before.
What was damaged all the same, by a crash of the machine or a disk, is moved aside, and the one
before taken; stored numbers have no checksums of their own, so ours are kept beside them. All
processes of a run do all of this together, on the folder that they share.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import hashlib
import json
import logging
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import preservation_policy
from qwix import QArray

from deevisum_jax import distributed, optim
from deevisum_jax.config import CheckpointConfig
from deevisum_jax.errors import UserError
from deevisum_jax.optim import Params
from deevisum_jax.train_step import TrainState

BEST_METRIC = "tau"
_SCORES = "metrics"  # Orbax's name for what a checkpoint is judged by, as item and as file
_CHUNK_BYTES = 256 * 2**20  # of stored weights
_GROUP_BYTES = 2**30  # of weights restored at a time

_BESIDE_PARAMS = ("opt_state", "step")  # of a state, `_beside_params`

_ADVICE = "move that folder aside to go on from the one before"
# What tensorstore and gcsfs say, in a ValueError, where a checkpoint may be whole and only out of
# reach just now.
_OUT_OF_REACH = (
    "ABORTED", "CANCELLED", "DEADLINE_EXCEEDED", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED", "UNAVAILABLE", f"os_error_code='{errno.EIO}'", "Bad Request",
)  # fmt: skip


class DataIterator(Protocol):
    """What can be put where it stood: `pipeline.train_iterator`'s."""

    def get_state(self) -> dict[str, Any]:
        """Where it stands, as JSON; the same in every process."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Puts it there."""


@contextlib.contextmanager
def _telling_once() -> Iterator[None]:
    """Of the files of a damaged step the first is told; those read beside it fail behind its back.

    Nobody listens to them any more, so asyncio and tensorstore would write a traceback for each.
    They are kept from it while what is inside lasts.
    """
    tell, log = sys.unraisablehook, logging.getLogger("asyncio")

    def hook(unraisable: Any) -> None:
        said = str(unraisable.exc_value)
        if "Event loop is closed" not in said and "TensorStore" not in said:
            tell(unraisable)

    def heard(record: logging.LogRecord) -> bool:
        return "exception was never retrieved" not in record.getMessage()

    sys.unraisablehook = hook
    log.addFilter(heard)
    try:
        yield
    except Exception as error:
        _let_go(error)
        raise
    finally:
        log.removeFilter(heard)
        sys.unraisablehook = tell


def _let_go(error: BaseException) -> None:
    """Removes what was read beside the file that an error is about, which would write then."""
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        cause = cause.__cause__
    gc.collect()


class Checkpoints:
    """The checkpoints of one run, in `workdir/checkpoints`."""

    def __init__(self, folder: os.PathLike[str], config: CheckpointConfig | None = None) -> None:
        """Opens (and, when `config` is given, creates) the folder.

        Raises:
          UserError: reading was asked for, and the folder is not there or a validation's scores in
            it are damaged; writing, and it cannot be written.
        """
        self._folder = _absolute(epath.Path(folder))
        self._writes = config is not None
        if not self._writes and not self._folder.is_dir():
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
        if self._writes:
            distributed.on_main(self._check_scores)
        else:
            self._check_scores()
        self._saving: int | None = None
        try:
            self._manager = ocp.CheckpointManager(
                self._folder,
                item_names=("params", "train_state", "data_iter", "checksums"),
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=policy,
                    best_fn=lambda metrics: metrics[BEST_METRIC],
                    **(_writing_together() if self._writes else _reading_alone()),
                ),
            )
        except Exception as error:  # of file systems and buckets
            raise UserError(
                f"{folder} cannot be {'written' if self._writes else 'read'} ({_why(error)}); "
                "mend that, or give --workdir another folder"
            ) from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        failed = None
        for end in (self.wait, self._close):  # of a failed save Orbax may tell only when it closes
            try:
                end()
            except UserError as error:
                failed = failed or error
        if failed is None:
            return
        if kind is None:
            raise failed
        # Another reason has ended the run already, and is told.
        if not issubclass(kind, UserError):
            print(f"warning: {failed}", file=sys.stderr)

    def _close(self) -> None:
        with self._writing():
            self._manager.close()

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
        newest = self.latest_step
        if newest is None:
            raise UserError(f"{self._folder} holds no complete checkpoint; train first")
        if not any(self._manager.metrics(step) for step in self._manager.all_steps()):
            return newest
        return self._manager.best_step()

    def fingerprint(self, step: int) -> str:
        """64 hexadecimal digits that tell a step's parameters from others; reads none of them.

        Raises:
          UserError: it has no checksums, being of an earlier version, or they are damaged.
        """
        path = self._folder / str(step) / "checksums"
        sums = _saved_checksums(path) or {}
        of_params = {
            name: value for name, value in sums.items() if not name.startswith(_BESIDE_PARAMS)
        }
        if not of_params:
            raise UserError(
                f"{path} has no checksums of the parameters, by which they could be told from "
                "others: it is of an earlier version, or damaged; train it again in a new folder"
            )
        return hashlib.sha256(json.dumps(of_params, sort_keys=True).encode()).hexdigest()

    def scores(self, step: int) -> Mapping[str, float] | None:
        """What a complete step was validated with, or None."""
        return self._manager.metrics(step)

    def save(
        self,
        step: int,
        state: TrainState,
        data_iter: DataIterator,
        metrics: Mapping[str, float] | None,
    ) -> None:
        """Starts writing; returns as soon as the arrays are copied to the host.

        Raises:
          UserError: it cannot be written, or the one before could not; that is known only now.
        """
        params, rest = optim.merge(state.params, state.frozen), _beside_params(state)
        with self._writing():
            self._manager.wait_until_finished()
            self._saving = step
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(_storable(params)),
                    train_state=ocp.args.StandardSave(rest),
                    data_iter=ocp.args.JsonSave(data_iter.get_state()),
                    checksums=ocp.args.JsonSave(_checksums(params) | _checksums(rest)),
                ),
                metrics=metrics,
            )

    def wait(self) -> None:
        """Returns when all is written.

        Raises:
          UserError: it cannot be.
        """
        with self._writing():
            self._manager.wait_until_finished()

    def add_scores(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes what a complete step was validated with, if it was not when it was saved."""
        self._saving = step
        with self._writing(), ocp.Checkpointer(_scores_handler()) as saver:
            saver.save(self._folder / str(step) / _SCORES, args=ocp.args.JsonSave(dict(metrics)))
            self._manager.reload()

    @_telling_once()
    def restore_params(self, step: int, abstract: Params) -> Params:
        """The parameters alone, onto the shapes, dtypes and shardings of `abstract`.

        What was only trained beside the model, `distill/`, may be there and is left out.

        Raises:
          UserError: the step holds parameters of another architecture (names what differs), or
            cannot be restored.
        """
        folder = self._folder / str(step)
        with _reading(folder, _ADVICE):
            params = _read_params(folder, abstract)
            _verify(folder, params)
            return params

    @_telling_once()
    def restore(self, step: int, abstract: TrainState, data_iter: DataIterator) -> TrainState:
        """A whole training state; `data_iter` is moved to where it stood.

        Args:
          step: one of the complete steps.
          abstract: shapes, dtypes and shardings of the state.
          data_iter: an iterator over the same data, built the same way.

        Raises:
          UserError: as `restore_params`.
        """
        folder = self._folder / str(step)
        with _reading(folder, _ADVICE):
            state = _read(folder, abstract, data_iter)
            _verify(folder, _all_of(state))
            return state

    @_telling_once()
    def restore_latest(self, abstract: TrainState, data_iter: DataIterator) -> TrainState | None:
        """The newest state that can be read, or None where nothing was saved yet.

        Damaged ones are moved aside, with a warning, and their steps can be saved again. All
        processes take the same one.

        Raises:
          UserError: all are damaged; or the newest holds another architecture, or is out of reach,
            which is no damage. Then nothing is moved.
        """
        damaged: dict[int, str] = {}
        for step in sorted(self._manager.all_steps(), reverse=True):
            folder, why = self._folder / str(step), ""
            try:
                state = _read(folder, abstract, data_iter)
            except UserError:
                raise
            except Exception as error:
                if not _is_damage(error):
                    raise _cannot_be_restored(folder, _why(error), _ADVICE) from error
                why = _why(error)
                _let_go(error)
            # The damaged file may be one that another process reads.
            if np.any(multihost_utils.process_allgather(np.array(why != ""))):
                damaged[step] = why or "another process cannot read its part"
                continue
            try:
                with _reading(folder, _ADVICE, but=(DamagedError,)):
                    _verify(folder, _all_of(state))
            except DamagedError as error:
                damaged[step] = _why(error)
                continue
            distributed.on_main(lambda: self._move_aside(damaged, step))  # noqa: B023  at once
            self._manager.reload()
            return state
        if damaged:
            reasons = "; ".join(f"{step}: {why}" for step, why in damaged.items())
            raise UserError(
                f"no checkpoint in {self._folder} can be restored ({reasons}); bring one back from "
                "a copy, or give --workdir a new folder to begin anew"
            )
        return None

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """What goes wrong inside, or went wrong behind the scenes, becomes a `UserError`."""
        try:
            yield
        except Exception as error:
            # Listed from the folder: Orbax counts a step from when it begins to write it.
            last = max(complete_steps(self._folder), default=None)
            left = "there is no other" if last is None else f"the one of step {last} is whole"
            raise UserError(
                f"the checkpoint of step {self._saving} cannot be written in {self._folder} "
                f"({_why(error)}); {left}: make room or mend what is said, and give the same "
                "command again"
            ) from error

    def _check_scores(self) -> None:
        """Orbax reads the scores of all steps at once, and would not open with damaged ones."""
        for step in complete_steps(self._folder):
            scores = self._folder / str(step) / _SCORES
            try:
                _scores_handler().restore(scores)
            except FileNotFoundError:
                continue  # it was not validated
            except Exception as error:
                if not self._writes or not _is_damage(error):
                    raise _cannot_be_restored(scores, _why(error), _ADVICE) from error
                _warn(f"{scores} is damaged ({_why(error)})", _put_aside(scores))

    def _move_aside(self, damaged: Mapping[int, str], taken: int) -> None:
        """Gives the folders of damaged steps names that do not count."""
        for step, why in damaged.items():
            folder = self._folder / str(step)
            what = f"checkpoint {folder} is damaged ({why})"
            _warn(what, f"{_put_aside(folder)}, and step {taken} is taken")


def _writing_together() -> dict[str, Any]:
    return {
        "create": True,
        "cleanup_tmp_directories": True,  # what a kill left half-written, which is never finished
        "async_options": ocp.options.AsyncOptions(barrier_sync_fn=_wait_for_all),
    }


def _reading_alone() -> dict[str, Any]:
    """Whoever only reads waits for no other process."""
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=this, active_processes={this}, barrier_sync_key_prefix=f"process_{this}"
    )
    return {"create": False, "read_only": True, "multiprocessing_options": alone}


def _wait_for_all(*, key: str, timeout_ms: int) -> None:
    """A barrier, at which a process that could not write raises its error and does not wait.

    At the end of a save Orbax waits for all processes, also while it handles an error. The others,
    who know nothing of it, wait at another barrier, and nobody would ever come on.
    """
    error = sys.exception()
    if error is not None and threading.current_thread() is not threading.main_thread():
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def _put_aside(path: epath.Path) -> str:
    """Renames a folder, and returns its new name."""
    aside, count = path.with_name(f"{path.name}.damaged"), 1
    while aside.exists():
        count += 1
        aside = path.with_name(f"{path.name}.damaged-{count}")
    path.rename(aside)
    return aside.name


def _warn(what: str, moved_to: str) -> None:
    print(f"warning: {what}; it was moved to {moved_to}", file=sys.stderr)


def _read(folder: epath.Path, abstract: TrainState, data_iter: DataIterator) -> TrainState:
    """A whole state. Orbax's handlers themselves, as its manager would wait for all processes."""
    params = _read_params(folder, optim.merge(abstract.params, abstract.frozen))
    handler, rest = ocp.StandardCheckpointHandler(), _beside_params(abstract)
    stored = handler.metadata(folder / "train_state").tree
    _check_shapes(stored, rest, folder, "an optimizer's state")
    rest = handler.restore(folder / "train_state", args=ocp.args.StandardRestore(rest))
    _put(data_iter, folder / "data_iter")
    merged = flatten_dict(params)
    return dataclasses.replace(
        abstract,
        **rest,
        params=unflatten_dict({path: merged[path] for path in flatten_dict(abstract.params)}),
        frozen=unflatten_dict({path: merged[path] for path in flatten_dict(abstract.frozen)}),
    )


class DamagedError(Exception):
    """What was read is not what was written."""


def _verify(folder: epath.Path, arrays: Any) -> None:
    """Holds what was read against the checksums of what was saved; all processes call it."""
    # Once for all: who could not read them would be missed where the others compare.
    saved = distributed.on_main(lambda: _saved_checksums(folder / "checksums"))
    if saved is None:
        return
    wrong = [path for path, found in _checksums(arrays).items() if found != saved.get(path)]
    if wrong:
        raise DamagedError(f"{wrong[0]} is not what was saved")


def _saved_checksums(folder: epath.Path) -> dict[str, int] | None:
    """None: of an earlier version, or the only thing that is damaged."""
    try:
        found = ocp.JsonCheckpointHandler().restore(folder)
    except Exception as error:
        if not _is_damage(error):
            raise _cannot_be_restored(folder, _why(error), _ADVICE) from error
        return None
    return found if isinstance(found, dict) else None


def _checksums(arrays: Any) -> dict[str, int]:
    """By path; the same on any mesh and any number of processes."""
    sums = jax.device_get(_checksums_on_device(arrays))
    return {_name(path): int(value) for path, value in jax.tree.leaves_with_path(sums)}


@jax.jit
def _checksums_on_device(arrays: Any) -> Any:
    return jax.tree.map(_checksum, arrays)


def _checksum(x: jax.Array) -> jax.Array:
    """`uint32[]`: the sum over all numbers of their bits and place, mixed.

    One changed number always changes it, any other change but with a chance of 2**-32. The mixing
    is MurmurHash3's, which gives different ones for different bits.
    """
    place = jnp.zeros(x.shape, jnp.uint32)
    for dim, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim)
    if x.dtype != jnp.uint4:  # which is no whole byte
        x = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
    bits = x.astype(jnp.uint32)
    bits ^= place * jnp.uint32(0x9E3779B9)
    bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
    return jnp.sum(bits ^ (bits >> 16), dtype=jnp.uint32)


def _all_of(state: TrainState) -> dict[str, Any]:
    return optim.merge(state.params, state.frozen) | _beside_params(state)


def _beside_params(state: TrainState) -> dict[str, Any]:
    return {"opt_state": state.opt_state, "step": state.step}


def _read_params(folder: epath.Path, abstract: Params) -> Params:
    # Not the standard handler, which cannot pass over anything.
    handler = ocp.PyTreeCheckpointHandler()
    wanted, stored = _storable(abstract), dict(handler.metadata(folder / "params").tree)
    left_out = {}
    if optim.PROJECTIONS not in wanted and optim.PROJECTIONS in stored:
        left_out[optim.PROJECTIONS] = stored.pop(optim.PROJECTIONS)
    _check_shapes(stored, wanted, folder)
    wanted |= jax.tree.map(lambda _: ocp.PLACEHOLDER, left_out)
    found = handler.restore(
        folder / "params",
        args=ocp.args.PyTreeRestore(
            item=wanted, restore_args=ocp.checkpoint_utils.construct_restore_args(wanted)
        ),
    )
    return _from_storable(found, abstract)


def _storable(params: Params) -> Params:
    """Quantised weights as dictionaries, their 4-bit codes as bytes: tensorstore has no uint4."""

    def plain(leaf: Any) -> Any:
        if not isinstance(leaf, QArray):
            return leaf
        codes = leaf.qvalue
        if codes.dtype == jnp.uint4:
            if isinstance(codes, jax.ShapeDtypeStruct):
                codes = jax.ShapeDtypeStruct(codes.shape, jnp.uint8, sharding=codes.sharding)
            else:
                codes = _as_type(codes, "uint8")
        return {"qvalue": codes, "scale": leaf.scale}

    return jax.tree.map(plain, params, is_leaf=lambda leaf: isinstance(leaf, QArray))


def _from_storable(found: Params, abstract: Params) -> Params:
    """What `_storable` was given, of the structure of `abstract`."""

    def whole(leaf: Any, stored: Any) -> Any:
        if not isinstance(leaf, QArray):
            return stored
        codes = stored["qvalue"]
        if leaf.qvalue.dtype == jnp.uint4:
            codes = _as_type(codes, "uint4")
        return dataclasses.replace(leaf, qvalue=codes, scale=stored["scale"])

    found = {name: found[name] for name in abstract}
    return jax.tree.map(whole, abstract, found, is_leaf=lambda leaf: isinstance(leaf, QArray))


# Compiled: arrays that other processes hold parts of allow nothing else.
_as_type = jax.jit(lambda x, dtype: x.astype(dtype), static_argnums=1)


def _put(data_iter: DataIterator, folder: epath.Path) -> None:
    """Moves the iterator to where it stood."""
    if any(folder.glob("process_*-of-*.json")):
        raise UserError(
            f"{folder} was written by an earlier version, whose order of the data this one cannot "
            "continue; finish the run with that version, or start a new one from its weights "
            "(--config.initialization)"
        )
    data_iter.set_state(ocp.JsonCheckpointHandler().restore(folder))


def _scores_handler() -> ocp.JsonCheckpointHandler:
    return ocp.JsonCheckpointHandler(filename=_SCORES)


def complete_steps(folder: epath.Path) -> list[int]:
    """Steps in the folder of a run's checkpoints that were written to their end, ascending.

    No name tells it: in a bucket, a step has its own from the beginning.
    """
    folder = _absolute(folder)
    if not folder.is_dir():
        return []
    return sorted(found.step for found in ocp.path.step.standard_name_format().find_all(folder))


def _absolute(folder: epath.Path) -> epath.Path:
    """Orbax takes no other."""
    return folder if "://" in os.fspath(folder) else epath.Path(os.path.abspath(folder))


def _is_damage(error: Exception) -> bool:
    """Whether the same read would fail forever; if not, the checkpoint may be whole.

    Whatever is not known to be damage is none: clients of buckets raise errors of many kinds. Nor
    is an input/output error (EIO), which a dying disk gives for good, and a network's while its
    server is silent.
    """
    error = _root(error)
    if isinstance(error, OSError):
        return isinstance(error, FileNotFoundError | NotADirectoryError | IsADirectoryError)
    if isinstance(error, ValueError | KeyError | TypeError):
        return not any(code in str(error) for code in _OUT_OF_REACH)
    return False


@contextlib.contextmanager
def _reading(
    folder: os.PathLike[str], advice: str, but: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Orbax and tensorstore raise what they like, over a damaged file or otherwise.

    All of it becomes a `UserError`, but what is of the types of `but`.
    """
    try:
        yield
    except (UserError, *but):
        raise
    except Exception as error:
        raise _cannot_be_restored(folder, _why(error), advice) from error


def _cannot_be_restored(folder: os.PathLike[str], why: str, advice: str) -> UserError:
    return UserError(f"checkpoint {folder} cannot be restored ({why}); {advice}")


def _root(error: BaseException) -> BaseException:
    """What Orbax has wrapped into an `Exception` of no kind, of which it prints a TensorStore."""
    while type(error) is Exception and error.__cause__ is not None:
        error = error.__cause__
    return error


def _why(error: Exception) -> str:
    """The kind of an error and the first line of what it says."""
    error = _root(error)
    first = str(error).splitlines()[0] if str(error) else "no reason given"
    return f"{type(error).__name__}: {first}"


def save_params(folder: os.PathLike[str], params: Params) -> None:
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
            saver.save(
                _absolute(epath.Path(folder)), args=ocp.args.PyTreeSave(params, save_args=chunked)
            )
    except Exception as error:  # tensorstore's own, over a full disk for instance
        raise UserError(
            f"parameters cannot be written ({_why(error)}); is the disk full?"
        ) from error


@_telling_once()
def restore_params(
    folder: epath.Path,
    abstract: Params,
    finish: Callable[[str, jax.Array], Any] | None = None,
) -> Params:
    """What `save_params` wrote, onto the shapes, dtypes and shardings of `abstract`.

    The folder may have been copied into a bucket. Memory beyond the result: about the largest
    parameter, which is read first, when there is most room.

    Args:
      folder: what was written.
      abstract: of all parameters.
      finish: what is made of each of them, given its path, as soon as it is read.

    Raises:
      UserError: the folder is not there or damaged, or holds another architecture.
    """
    folder = _absolute(folder)
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
                leaf = found.pop(path)
                restored[path] = finish("/".join(path), leaf) if finish else leaf
                del leaf
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


def _check_shapes(
    stored_tree: Any, abstract: Any, folder: os.PathLike[str], what: str = "a model"
) -> None:
    """Compares names and shapes before any array is read."""
    stored, wanted = _shapes(stored_tree), _shapes(abstract)
    differing = [
        f"{path}: {stored.get(path, 'absent')} in the checkpoint, "
        f"{wanted.get(path, 'absent')} in the model"
        for path in sorted(stored.keys() | wanted.keys())
        if stored.get(path) != wanted.get(path)
    ]
    if differing:
        shown = "; ".join(differing[:5] + ["..."] * (len(differing) > 5))
        raise UserError(
            f"{folder} holds {what} of another architecture ({len(differing)} of {len(wanted)} "
            f"arrays differ); use the config it was trained with: {shown}"
        )


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {_name(path): tuple(leaf.shape) for path, leaf in jax.tree.leaves_with_path(tree)}


def _name(path: tuple[Any, ...]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")
