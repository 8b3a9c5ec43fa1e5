"""What processes do in tests: functions for `processes.run_function`."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import resource
import signal
import socket
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deevisum_jax import checkpoints, config, distributed, files, runs, sharding, weights
from deevisum_jax.errors import PreemptedError, UserError


def agree(folder: str) -> dict:
    """What one of four processes on two hosts is told."""
    index = jax.process_index()
    host = "ab"[index // 2]
    socket.gethostname = lambda: host
    told = {}

    def attempt(name: str, work: Callable[[], Any]) -> None:
        try:
            told[name] = work()
        except UserError as error:
            told[name] = f"error: {error}"

    def refuse() -> None:
        raise UserError("it is full; make room")

    attempt("on main", lambda: distributed.on_main(lambda: {"by": jax.process_index()}))
    attempt("refused on main", lambda: distributed.on_main(refuse))
    attempt("everywhere", lambda: distributed.everywhere(lambda: index))
    attempt("refused in two", lambda: distributed.everywhere(lambda: refuse() if index % 2 else 0))
    attempt("refused in all", lambda: distributed.everywhere(refuse))
    settings = {"seed": 0, "optim": {"learning_rate": 0.1 * (1 + index // 2)}}
    part = (distributed.everywhere, distributed.on_main, distributed.in_turns, distributed.on_main)
    attempt("parted", lambda: part[index](refuse))
    attempt("same", lambda: distributed.check_same("config", json.dumps({"seed": 0})))
    attempt("other", lambda: distributed.check_same("config", json.dumps(settings)))

    def make(there: pathlib.Path) -> bool:
        """Whether this process made it."""
        there.parent.mkdir(exist_ok=True)
        if made := not there.exists():
            there.write_text("whole")
        return made

    attempt("shared", lambda: distributed.in_turns(lambda: make(pathlib.Path(folder, "all", "x"))))
    attempt("hosts'", lambda: distributed.in_turns(lambda: make(pathlib.Path(folder, host, "x"))))
    # Devices of the processes in turn, as a torus may have them; and two to a tensor.
    devices = np.array(jax.devices()).reshape(4, 2).T
    rows = NamedSharding(Mesh(devices.reshape(8, 1), ("fsdp", "tensor")), P("fsdp"))
    told["rows"] = distributed.own_rows(rows, 16).tolist()
    halves = NamedSharding(Mesh(devices, ("fsdp", "tensor")), P("fsdp"))
    told["rows of halves"] = distributed.own_rows(halves, 16).tolist()
    placed = jax.make_array_from_process_local_data(rows, np.array(told["rows"]))
    told["placed"] = int(np.asarray(jax.jit(lambda x: (x * np.arange(16)).sum())(placed)))
    attempt("mesh", lambda: sharding.make_mesh(data=3, fsdp=1))
    # Two hosts that have a folder of the same name each.
    files._SHOWN_S = 0.5
    workdir = pathlib.Path(folder, f"workdir_of_{host}")
    attempt("workdir", lambda: runs.claim(workdir, config.from_file("configs/tiny.py")))
    told["main"] = distributed.is_main()
    return told


def end(how: str) -> None:
    """Process 1 of two ends in some way, while the other waits for it in a collective."""
    wait = lambda: multihost_utils.sync_global_devices("all")
    wait()
    if how == "mistaken" and jax.process_index() == 1:
        raise UserError("no such video; correct the path")
    if how == "broken" and jax.process_index() == 1:
        raise ZeroDivisionError("a bug")
    if how == "full" and jax.process_index() == 1:
        with open("/dev/full", "wb", buffering=0) as file:
            file.write(b"text")
    if how == "killed":
        distributed._LEAVE_S = 2.0
        if jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    if how == "preempted" and jax.process_index() == 1:
        raise PreemptedError("all is saved")
    wait()


def train_one_number(folder: str) -> dict:
    """What happens to two processes where one has a reason to stop, or cannot read."""
    from tests import test_training

    return test_training.in_two_processes(pathlib.Path(folder))


def load(paths: list[str], tokenizer_path: str) -> dict[str, str]:
    """A digest of all parameters of what can be started from, read over all devices."""
    digests = {}
    for path in paths:
        source = weights.open_source(path)
        if source.tokens is None:
            source = weights.open_source(path, tokenizer_path=tokenizer_path)
        params = source.load()
        assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(params)} == {
            jax.device_count()
        }
        digest = hashlib.sha256()
        for leaf in jax.tree.leaves(multihost_utils.process_allgather(params, tiled=True)):
            digest.update(np.asarray(leaf).tobytes())
        digests[path] = digest.hexdigest()
    return digests


def write_to_a_full_disk(folder: str) -> None:
    """Both save what they share; then process 1 can write no large file, and both save again."""
    from tests.test_checkpoints import Numbers, abstract, large_state

    devices = Mesh(np.array(jax.devices()), ("x",))
    rows, everywhere = (NamedSharding(devices, spec) for spec in (P("x"), P()))
    where = jax.tree.map(
        lambda leaf: rows if leaf.size > 2**16 else everywhere, abstract(large_state(0, 512))
    )
    begin = jax.jit(large_state, static_argnums=(0, 1), out_shardings=where)
    with checkpoints.Checkpoints(folder, config.CheckpointConfig()) as saved:
        saved.save(1, begin(1, 512), Numbers(), None)
        saved.wait()
        if jax.process_index() == 1:
            # Its log is a file, too.
            resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        saved.save(2, begin(2, 512), Numbers(), None)
        saved.wait()


def write_cache(folder: str, batch_size: int, kill_at: int | None) -> None:
    """Ten segments, four to a file; killed, if it is, where that segment is read."""
    from tests.distill import cached

    mesh = sharding.make_mesh()
    cached.write_cache(epath.Path(folder), mesh=mesh, batch_size=batch_size, kill_at=kill_at)
