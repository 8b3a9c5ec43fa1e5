"""Many processes as one run: how they find each other, agree, and end together.

What they tell each other here goes through the key-value store of jax's coordinator, which needs no
device. So a mistake is told before a device is touched, and also to processes that wait in a
collective and would never come back from it. With one process nothing here does anything.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, ParamSpec, TypeVar

import jax
import numpy as np

# Neither the key-value store nor what jax knows of clusters has a public name.
from jax._src import distributed as jax_distributed
from jax._src.clusters import ClusterEnv

from deevisum_jax import rendezvous
from deevisum_jax.errors import (
    EXIT_INTERRUPTED,
    EXIT_PREEMPTED,
    EXIT_TRACEBACK,
    EXIT_USER_ERROR,
    UserError,
    outcome,
)
from deevisum_jax.rendezvous import name_processes

P = ParamSpec("P")
T = TypeVar("T")

_FIND_S = 300.0  # until all processes have to be there
_GRACE_S = 5.0  # for a process to end on a mistake that it sees itself
_SAVE_S = 10.0  # the same where it saves first
_LEAVE_S = 15.0  # until all processes have to be gone, when the first is about to go
_POLL_S = 0.5

# How what is said of an error goes on behind "process 1 ", by exit status.
_SAID = {
    EXIT_TRACEBACK: "stopped on ",
    EXIT_USER_ERROR: "stopped: ",
    EXIT_PREEMPTED: "",
    EXIT_INTERRUPTED: "was ",
}


@dataclasses.dataclass(frozen=True)
class _Group:
    """The processes of this run, of which this is one."""

    index: int
    size: int
    client: Any  # of jax's coordinator
    counter: Iterator[int] = dataclasses.field(default_factory=itertools.count)
    # Held by who ends this process: its main thread, or the one that watches the others.
    ending: threading.Lock = dataclasses.field(default_factory=threading.Lock)
    over: threading.Event = dataclasses.field(default_factory=threading.Event)

    def put(self, key: str, text: str) -> None:
        self.client.key_value_set(f"deevisum/{key}", text)

    def try_get(self, key: str) -> str | None:
        try:
            return self.client.key_value_try_get(f"deevisum/{key}")
        except jax.errors.JaxRuntimeError as error:
            if "NOT_FOUND" not in str(error):
                raise
            return None

    def get(self, key: str) -> str:
        """Waits for as long as it takes, and can be interrupted."""
        while True:
            try:
                return self.client.blocking_key_value_get(f"deevisum/{key}", int(_POLL_S * 1000))
            except jax.errors.JaxRuntimeError as error:
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise

    def agree(self, place: str, text: str, decide: Callable[[list[str]], str]) -> str:
        """What process 0 makes of everybody's texts, in every process; all call it alike.

        Raises:
          UserError: another process is at another place, in every process.
        """
        # Nothing but a number, so that who is elsewhere is found out and not waited for.
        key = next(self.counter)
        self.put(f"{key}/{self.index}", json.dumps([place, text]))
        if self.index == 0:
            told = [json.loads(self.get(f"{key}/{i}")) for i in range(self.size)]
            who: dict[str, list[int]] = {}
            for i, (its_place, _) in enumerate(told):
                who.setdefault(its_place, []).append(i)
            problem = decided = ""
            if len(who) > 1:
                places = (f"{name_processes(some)} at {at}" for at, some in who.items())
                problem = (
                    f"the processes do not do the same: {', '.join(places)}; start all with the "
                    "same command"
                )
            else:
                decided = decide([its_text for _, its_text in told])
            self.put(f"{key}/all", json.dumps([problem, decided]))
        problem, decided = json.loads(self.get(f"{key}/all"))
        if problem:
            raise _AgreedError(problem)
        return decided


_group: _Group | None = None


class _AgreedError(UserError):
    """One that every process raises."""


# ---- To begin together ----


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags that say who is who, where the environment does not."""
    group = parser.add_argument_group(
        "several processes",
        "The environment of a TPU pod, SLURM or Open MPI says it by itself. Give all three or none",
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="where process 0 is")
    group.add_argument("--num_processes", metavar="N", type=int, help="1 = alone, on a pod too")
    group.add_argument("--process_id", metavar="I", type=int, help="this one, 0 to N - 1")


def initialize(args: argparse.Namespace) -> None:
    """Connects this process with the others, if there are any; before any device is touched.

    Args:
      args: with the flags of `add_flags`.

    Raises:
      UserError: the flags cannot be; not all processes come; they differ in what they run.
    """
    found = _from_flags(args) or _from_environment()
    if found is None or found[1] == 1:
        return
    address, size, index, local_device_ids = found
    rendezvous.meet(address, size, index, _FIND_S)
    # It would swallow every SIGTERM until `preemption.Notice` listens.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        address,
        size,
        index,
        local_device_ids,
        cluster_detection_method="deactivate",  # it is done
    )
    global _group
    _group = _Group(index, size, jax_distributed.global_state.client)
    threading.Thread(target=_watch, args=(_group,), daemon=True).start()
    check_same("program", json.dumps(_program()))
    check_same("machine", json.dumps({"devices": jax.local_device_count()}))


# Address, number of processes, this one, which of the local devices.
_Found = tuple[str, int, int, Sequence[int] | None]


def _from_flags(args: argparse.Namespace) -> _Found | None:
    names = ("coordinator_address", "num_processes", "process_id")
    missing = [f"--{name}" for name in names if getattr(args, name) is None]
    if len(missing) == len(names):
        return None
    if missing:
        raise UserError(
            f"{' and '.join(missing)} missing; give all of "
            f"{', '.join(f'--{name}' for name in names)}, or none"
        )
    size, index = args.num_processes, args.process_id
    if size < 1:
        raise UserError(f"--num_processes {size} must be at least 1")
    if not 0 <= index < size:
        raise UserError(
            f"--process_id {index} is none of {size} processes; number them from 0 to {size - 1}"
        )
    rendezvous.split_address(args.coordinator_address)
    return args.coordinator_address, size, index, None


def _from_environment() -> _Found | None:
    """What a TPU pod, SLURM, Open MPI or Kubernetes says, by jax's own reading of it."""
    for env in ClusterEnv._cluster_types:
        if env.opt_in_only_method or not _may_be(env.__name__):
            continue
        try:
            if not env.is_env_present():
                continue
            if env.get_process_count() == 1:
                return None
            return ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, env.name, int(_FIND_S)
            )
        except Exception as error:  # of metadata servers, of variables that are not as they were
            raise UserError(
                f"this looks like one of many processes ({env.__name__}), but which cannot be told "
                f"({type(error).__name__}: {error}); give --coordinator_address, --num_processes "
                "and --process_id (localhost:8476, 1 and 0 to run alone)"
            ) from error
    return None


def _may_be(cluster: str) -> bool:
    """Whether to ask at all: jax warns in any pod, and a CPU run on a TPU's host is alone."""
    if cluster == "K8sCluster":
        return "JOB_COMPLETION_INDEX" in os.environ
    return "Tpu" not in cluster or os.environ.get("JAX_PLATFORMS") != "cpu"


def _program() -> dict[str, str]:
    """Versions that must not differ; the code's is a digest of it."""
    code = _digest_of_code(pathlib.Path(__file__).parents[1])
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
    return versions | {"python": platform.python_version(), "code": code}


def _digest_of_code(root: pathlib.Path) -> str:
    digest = hashlib.sha256()
    for package in ("deevisum_jax", "tfds_builders"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:12]


# ---- To agree ----


def is_main() -> bool:
    """Whether this is process 0, which alone writes small files."""
    return _group is None or _group.index == 0


def is_alone() -> bool:
    """Whether this is the only process."""
    return _group is None


def check_same(what: str, text: str) -> None:
    """Makes sure that all processes, which all call this, hold the same text.

    Args:
      what: it is, such as "config".
      text: JSON of an object whose fields are named where they differ.

    Raises:
      UserError: they do not, in every process.
    """
    if _group is None:
        return

    def compare(texts: list[str]) -> str:
        if len(set(texts)) == 1:
            return ""
        fields = [_flatten(json.loads(text)) for text in texts]
        names = dict.fromkeys(itertools.chain.from_iterable(fields))
        differing = []
        for name in names:
            who: dict[str, list[int]] = {}
            for index, of_process in enumerate(fields):
                who.setdefault(json.dumps(of_process.get(name)), []).append(index)
            if len(who) > 1:
                values = (f"{value} in {name_processes(some)}" for value, some in who.items())
                differing.append(f"{name} is {', '.join(values)}")
        return (
            f"the processes differ in their {what}: {'; '.join(differing)}; start all with the "
            f"same {what}"
        )

    if problem := _group.agree(f"check_same({what})", text, compare):
        raise _AgreedError(problem)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def on_main(work: Callable[[], T]) -> T:
    """Does `work` in process 0 while the others, which all call this, wait.

    Returns:
      Its result, in every process. It travels as JSON, so tuples come as lists.

    Raises:
      UserError: that of `work`, in every process.
    """
    if _group is None:
        return work()
    done = {}
    if is_main():
        try:
            done["result"] = work()
        except UserError as error:
            done["error"] = str(error)
    place = f"on_main({_name(work)})"
    done = json.loads(_group.agree(place, json.dumps(done), lambda texts: texts[0]))
    if "error" in done:
        raise _AgreedError(done["error"])
    return done["result"]


def everywhere(work: Callable[[], T]) -> T:
    """Does `work` in every process and waits for all.

    Returns:
      The result of this process.

    Raises:
      UserError: of any process, in every process.
    """
    if _group is None:
        return work()
    return _everywhere(f"everywhere({_name(work)})", work)


def _everywhere(place: str, work: Callable[[], T]) -> T:
    result, problem = None, ""
    try:
        result = work()
    except UserError as error:
        problem = str(error)

    def first(problems: list[str]) -> str:
        found = next(filter(None, problems), "")
        who = [i for i, problem in enumerate(problems) if problem == found]
        return found if len(who) == len(problems) else f"{name_processes(who)}: {found}"

    if problem := _group.agree(place, problem, first):
        raise _AgreedError(problem)
    return result


def _name(work: Callable[[], Any]) -> str:
    """As the code has it, which is the same in all processes."""
    work = getattr(work, "func", work)  # of a functools.partial
    return f"{work.__module__}.{work.__qualname__}"


def in_turns(work: Callable[[], T]) -> T:
    """Does `work` in process 0, then in one process of every other host, then in the others.

    What it makes in a folder is so made once, be the folder shared by all hosts or each one's own.

    Returns:
      The result of this process.

    Raises:
      UserError: of any process, in every process.
    """
    if _group is None:
        return work()
    place = f"in_turns({_name(work)})"
    hosts = json.loads(_group.agree(place, socket.gethostname(), json.dumps))
    first_here = hosts.index(hosts[_group.index]) == _group.index
    turn = 0 if is_main() else 1 if first_here else 2
    result = None
    for now in range(3):
        done = _everywhere(place, work if now == turn else lambda: None)
        result = done if now == turn else result
    return result


def own_rows(where: jax.sharding.Sharding, num_rows: int) -> np.ndarray:
    """`int[n]`: the rows of a global array that this process's devices hold, ascending.

    They depend on where its devices stand in the mesh: where a tensor is split over processes,
    several hold the same rows.

    Args:
      where: of the array; splits no dimension but the first.
      num_rows: of the global array.
    """
    held = where.addressable_devices_indices_map((num_rows,)).values()
    slices = sorted({rows.indices(num_rows)[:2] for (rows,) in held})
    return np.concatenate([np.arange(*rows) for rows in slices])


# ---- To end together ----


def ends_together(main: Callable[P, int]) -> Callable[P, int]:
    """Wraps a command's `main`: where one process stops on an error, the others stop, too.

    They may be waiting in a collective. Each says why, once, and exits with the status of the
    first. Where one was killed the status is that of a preemption notice: started again, all go on.
    Goes inside of `errors.exits_cleanly`.
    """

    @functools.wraps(main)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> int:
        try:
            status = main(*args, **kwargs)
            if _group is not None:
                _group.agree("end", "", lambda _: "")
        except BaseException as error:
            _leave(error)
            raise
        _leave(None)
        return status

    return wrapped


def _leave(error: BaseException | None) -> None:
    """Ends what `initialize` began, after telling the others of an error that they do not have."""
    global _group
    if _group is None:
        return
    group, _group = _group, None
    group.ending.acquire()  # for good
    group.over.set()
    status, why = 0, "was done"
    if error is not None:
        status, why = outcome(error)
        why = _SAID[status] + why
    if error is not None and not isinstance(error, _AgreedError):
        grace_s = _SAVE_S if status == EXIT_PREEMPTED else _GRACE_S
        told = {"status": status, "why": f"process {group.index} {why}", "grace_s": grace_s}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first
            group.put("stopped", json.dumps(told))
    if missing := _say_goodbye(group):
        # Whoever waits for them, such as jax at the end of Python, is aborted.
        if status == EXIT_TRACEBACK:
            traceback.print_exception(error)
        _exit(why, status, missing)


def _watch(group: _Group) -> None:
    """Ends this process when another has stopped; its main thread may never wake up."""
    text = None
    while text is None:
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # a moment's, or the end of `group`
            text = group.try_get("stopped")
        if text is None and group.over.wait(_POLL_S):
            return
    told = json.loads(text)
    if group.over.wait(told["grace_s"]):
        return
    with group.ending:
        _exit(told["why"], told["status"], _say_goodbye(group))


def _say_goodbye(group: _Group) -> list[int]:
    """Waits for all to leave, and disconnects; or returns who does not come in time."""
    group.put(f"leaving/{group.index}", "")
    # Without process 0 the others cannot talk.
    deadline = time.monotonic() + _LEAVE_S + (_GRACE_S if group.index == 0 else 0)
    missing = list(range(group.size))
    while missing and time.monotonic() < deadline:
        missing = [i for i in missing if group.try_get(f"leaving/{i}") is None]
        time.sleep(_POLL_S / 10 if missing else 0)
    if not missing:
        jax.distributed.shutdown()
    return missing


def _exit(message: str, status: int, missing: list[int]) -> NoReturn:
    """Ends this process at once, also where others are missing that were to leave with it."""
    print(f"error: {message}", file=sys.stderr)
    if missing:
        print(
            f"gone without a word: {name_processes(missing)} (killed, or a machine lost); the same "
            "command, started again everywhere, goes on from the newest checkpoint",
            file=sys.stderr,
        )
        # What went wrong here came of that.
        status = EXIT_PREEMPTED if status == EXIT_TRACEBACK else status
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
