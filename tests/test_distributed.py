"""Processes as one run: who they are, what they agree on, how they end, and equal training.

The runs are those of configs/tiny.py, on devices that the machine simulates.
"""

import argparse
import functools
import json
import os
import pathlib
import shutil
from unittest import mock

import jax
import numpy as np
import pytest
from etils import epath

from deevisum_jax import (
    checkpoints,
    distributed,
    main,
    preemption,
    rendezvous,
    sharding,
    training_log,
)
from deevisum_jax import config as config_lib
from deevisum_jax.errors import UserError
from tests import processes
from tests.conftest import TINY_CONFIG

# ---- Who is who ----


@pytest.fixture
def connected(monkeypatch):
    """What `initialize` would have connected as: address, number of processes, this one."""
    found = []

    class Stop(Exception):  # noqa: N818
        pass

    def stop(address, size, index, timeout_s):
        found.append((address, size, index))
        raise Stop

    monkeypatch.setattr(rendezvous, "meet", stop)
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORD")):
            monkeypatch.delenv(name)

    def connect(*flags: str):
        parser = argparse.ArgumentParser()
        distributed.add_flags(parser)
        try:
            distributed.initialize(parser.parse_args(flags))
        except Stop:
            return found.pop()
        return None

    return connect


def three_flags(address="localhost:8476", size="2", index="1") -> list[str]:
    return ["--coordinator_address", address, "--num_processes", size, "--process_id", index]


def test_a_plain_machine_is_alone(connected):
    assert connected() is None
    assert distributed.is_main()
    assert distributed.on_main(lambda: (1, 2)) == (1, 2)
    distributed.check_same("config", "no JSON, and nobody to compare it with")


def test_flags_say_who_is_who(connected):
    assert connected(*three_flags()) == ("localhost:8476", 2, 1)
    assert connected(*three_flags(size="1", index="0")) is None  # alone, also on a pod


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (three_flags()[:2], "--num_processes and --process_id missing; give all of"),
        (three_flags()[:4], "--process_id missing; give all of --coordinator_address, --num_"),
        (three_flags(index="2"), "--process_id 2 is none of 2 processes; number them from 0 to 1"),
        (three_flags(index="-1"), "--process_id -1 is none of 2"),
        (three_flags(size="0"), "--num_processes 0 must be at least 1"),
        (three_flags(address="localhost"), "'localhost' is no HOST:PORT"),
    ],
)
def test_flags_that_cannot_be(connected, flags, message):
    with pytest.raises(UserError, match=message):
        connected(*flags)


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[001-003]",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
}
OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
}


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        (SLURM, ("node001:61447", 3, 2)),  # jax's choice of port: 61440 + 7
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (OPEN_MPI, ("10.96.0.1:62624", 4, 3)),  # 61440 + 1531576320 / 4096 % 4096
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),  # any pod; no indexed job
    ],
)
def test_the_environment_says_who_is_who(connected, monkeypatch, variables, found):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert connected() == found
    assert connected(*three_flags()) == ("localhost:8476", 2, 1)  # flags go before it


def test_a_tpu_pod_of_gke_says_who_is_who(connected, monkeypatch):
    from jax._src.clusters import cloud_tpu_cluster

    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    for name, value in {
        "TPU_WORKER_HOSTNAMES": "localhost,worker-1",
        "TPU_WORKER_ID": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert connected() is None  # a CPU run on such a host is alone
    monkeypatch.delenv("JAX_PLATFORMS")
    assert connected() == ("localhost:8482", 2, 1)


def test_an_environment_that_cannot_be_read(connected, monkeypatch):
    for name, value in (SLURM | {"SLURM_NTASKS": "three"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=r"\(SlurmCluster\), but which cannot be told \(ValueErr"):
        connected()


# ---- What all agree on ----


def test_the_code_that_builds_data_must_not_differ_either(tmp_path):
    for package in ("deevisum_jax", "tfds_builders"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "code.py").write_text("1")
    digests = [distributed._digest_of_code(tmp_path)]
    for package in ("deevisum_jax", "tfds_builders"):
        (tmp_path / package / "code.py").write_text("2")
        digests.append(distributed._digest_of_code(tmp_path))
    assert len(set(digests)) == 3


class _Client:
    """Stands for that of jax's coordinator, out of reach at first."""

    def __init__(self):
        self.answers = [
            jax.errors.JaxRuntimeError("UNAVAILABLE"),
            jax.errors.JaxRuntimeError("NOT_FOUND"),
            json.dumps({"status": 2, "why": "process 1 stopped", "grace_s": 0.0}),
        ]

    def key_value_try_get(self, key: str) -> str:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_coordinator_out_of_reach_for_a_moment_is_asked_again(monkeypatch):
    ended = []
    monkeypatch.setattr(distributed, "_POLL_S", 0.01)
    monkeypatch.setattr(distributed, "_say_goodbye", lambda group: [])
    monkeypatch.setattr(distributed, "_exit", lambda *how: ended.append(how))
    distributed._watch(distributed._Group(0, 2, _Client()))
    assert ended == [("process 1 stopped", 2, [])]


def test_what_processes_tell_each_other(tmp_path):
    ended = processes.run_function(4, "agree", str(tmp_path), timeout_s=120)
    assert [process.status for process in ended] == [0] * 4, ended[0].err
    told = [json.loads(process.out.splitlines()[-1]) for process in ended]
    for i, of_process in enumerate(told):
        assert of_process | {"main": 0, "shared": 0, "hosts'": 0, "rows": 0} == {
            "on main": {"by": 0},
            "refused on main": "error: it is full; make room",
            "everywhere": i,
            "refused in two": "error: processes 1, 3: it is full; make room",
            "refused in all": "error: it is full; make room",
            "parted": "error: the processes do not do the same: process 0 at everywhere(tests."
            "process_work.agree.<locals>.refuse), processes 1, 3 at on_main(tests.process_work."
            "agree.<locals>.refuse), process 2 at in_turns(tests.process_work.agree.<locals>."
            "refuse); start all with the same command",
            "same": None,
            "other": "error: the processes differ in their config: optim.learning_rate is 0.1 in "
            "processes 0, 1, 0.2 in processes 2, 3; start all with the same config",
            "rows of halves": list(range(16)),  # a half of the tensor of every row
            "placed": sum(row * row for row in range(16)),  # every row in its place
            "mesh": "error: mesh sizes {'data': 3, 'fsdp': 1, 'tensor': 1} do not multiply to the "
            "number of devices, 8; choose sizes that do, of which one may be -1 to take what is "
            "left",
            "workdir": f"error: processes 2, 3: workdir {tmp_path}/workdir_of_b is not the folder "
            "of that name that process 0 writes; give --workdir a folder that all hosts share, or "
            "an address in a bucket (gs://...)",
            "main": 0, "shared": 0, "hosts'": 0, "rows": 0,
        }  # fmt: skip
        assert of_process["rows"] == [2 * i, 2 * i + 1, 8 + 2 * i, 9 + 2 * i]
    assert [of_process["main"] for of_process in told] == [True, False, False, False]
    assert [of_process["shared"] for of_process in told] == [True, False, False, False]
    assert [of_process["hosts'"] for of_process in told] == [True, False, True, False]
    assert list((tmp_path / "workdir_of_a").iterdir()) == []
    assert not (tmp_path / "workdir_of_b").exists()


# ---- How all end ----


@pytest.mark.parametrize(
    ("how", "status", "own", "told"),
    [
        ("mistaken", 2, "error: no such video; correct", "error: process 1 stopped: no such video"),
        ("broken", 1, "ZeroDivisionError: a bug", "error: process 1 stopped on ZeroDivisionError"),
        (
            "preempted", 75, "stopped by a preemption notice: all is saved; the same command",
            "error: process 1 stopped by a preemption notice: all is saved",
        ),
        (
            "full", 2, "error: a file cannot be written or read (No space left on device); mend",
            "error: process 1 stopped: a file cannot be written or read (No space left on device)",
        ),
    ],
)  # fmt: skip
def test_where_one_stops_the_others_stop_and_say_why(how, status, own, told):
    ended = processes.run_function(2, "end", how, timeout_s=100)
    assert [process.status for process in ended] == [status] * 2, ended
    assert own in ended[1].err
    [line] = [line for line in ended[0].err.splitlines() if "[Gloo]" not in line]
    assert line.startswith(told)


def test_where_one_is_killed_the_others_ask_to_be_started_again():
    alive, killed = processes.run_function(2, "end", "killed", timeout_s=100)
    assert (alive.status, killed.status) == (75, -9), alive
    assert alive.err.splitlines()[-1] == (
        "gone without a word: process 1 (killed, or a machine lost); the same command, started "
        "again everywhere, goes on from the newest checkpoint"
    )
    assert "Traceback" in alive.err  # it may have come of a mistake of ours all the same


# ---- To train together ----

MESH_OF_8 = ("mesh.data=2", "mesh.fsdp=4")
SHORT = (
    "total_steps=4", "eval.every_steps=4", "checkpoint.every_steps=2", "eval.ablate_inputs=False",
    "model.remat_policy=None",
)  # fmt: skip


def flags(workdir: pathlib.Path, data_dir: pathlib.Path, *overrides: str) -> list[str]:
    overrides = (f"data.data_dir={data_dir}", *SHORT, *overrides)
    given = ["--config", str(TINY_CONFIG), "--workdir", str(workdir)]
    return given + [f"--config.{override}" for override in overrides]


@pytest.fixture(scope="module")
def train(data_dir, tmp_path_factory):
    """Runs the program in processes of their own; returns the workdir."""

    def run(count: int, devices: int, *overrides: str) -> pathlib.Path:
        workdir = tmp_path_factory.mktemp(f"{count}_of_{devices}") / "run"
        given = [flags(workdir, data_dir, *overrides)] * count
        ended = processes.run_main(given, devices=devices, timeout_s=400)
        assert [process.status for process in ended] == [0] * count, ended
        assert "early_exit" in ended[0].out
        assert not any("early_exit" in process.out for process in ended[1:])
        return workdir

    return run


@pytest.fixture(scope="module")
def four(train) -> pathlib.Path:
    """The workdir of a run in four processes of two devices; not to be changed."""
    return train(4, 2, *MESH_OF_8)


@pytest.fixture
def here(data_dir, monkeypatch):
    """Runs the program in this process alone, on its first few devices."""

    def run(workdir: pathlib.Path, num_devices: int, *overrides: str) -> None:
        some = functools.partial(sharding.make_mesh, devices=jax.devices()[:num_devices])
        with monkeypatch.context() as patched:
            patched.setattr(sharding, "make_mesh", some)
            assert main.main(flags(workdir, data_dir, *overrides)) == 0

    return run


def losses(workdir: pathlib.Path) -> dict[tuple[int, str], float]:
    """By step and name."""
    return {
        (line["step"], name): value
        for line in training_log.read_metrics(workdir / "metrics.jsonl")
        for name, value in line.items()
        if name.startswith(("loss/", "validation/"))
    }


def state_of(workdir: pathlib.Path, step: int, num_devices: int, **mesh: int):
    """The training state in a checkpoint on devices of this process, and where the data stood."""
    config = config_lib.load(epath.Path(workdir / "config.json"))
    with jax.set_mesh(sharding.make_mesh(**mesh, devices=jax.devices()[:num_devices])):
        run = main.Run(config, epath.Path(workdir), None, preemption.Notice())
        with checkpoints.Checkpoints(epath.Path(workdir / "checkpoints")) as saved:
            data_iter = mock.Mock()
            state = saved.restore(step, run.abstract, data_iter)
    [[position], _] = data_iter.set_state.call_args
    return state, position


def assert_equal(found: pathlib.Path, expected: pathlib.Path, tolerance: float) -> None:
    """Losses, the last checkpoint and where the data stood, by absolute difference."""
    assert {step for step, _ in losses(expected)} == {1, 2, 3, 4}
    assert losses(found) == pytest.approx(losses(expected), abs=tolerance, rel=0)
    (state, position), (other_state, other_position) = (
        state_of(workdir, 4, 8, data=2, fsdp=4) for workdir in (found, expected)
    )
    assert position == other_position
    assert position["batches"] == 4
    leaves = zip(jax.tree.leaves_with_path(state), jax.tree.leaves(other_state), strict=True)
    for (path, leaf), other in leaves:
        name = jax.tree_util.keystr(path)
        # Its gradient is 0 on paper, and Adam makes steps of what rounding leaves.
        if tolerance and name.endswith("['attn']['key']['bias']"):
            continue
        np.testing.assert_allclose(leaf, other, rtol=0, atol=tolerance, err_msg=name)


def test_four_processes_train_as_one_with_a_quarter_of_the_devices(four, here, tmp_path):
    here(tmp_path / "run", 2, "mesh.data=1", "mesh.fsdp=2")
    assert_equal(four, tmp_path / "run", 1e-5)


def test_four_processes_train_as_one_with_the_same_devices(four, here, tmp_path):
    # Not to the bit: within a process sums are made in another order than between processes.
    here(tmp_path / "run", 8, *MESH_OF_8)
    assert_equal(four, tmp_path / "run", 1e-5)


@pytest.mark.skipif("DEEVISUM_LONG" not in os.environ, reason="takes long: set DEEVISUM_LONG")
@pytest.mark.parametrize(
    ("count", "devices", "tolerance"), [(2, 2, 1e-5), (2, 4, 0.0), (8, 1, 0.0)]
)
def test_other_numbers_of_processes_train_as_four(four, train, count, devices, tolerance):
    mesh = (f"mesh.data={count * devices // 4}", "mesh.fsdp=4")
    assert_equal(train(count, devices, *mesh), four, tolerance)


def test_a_checkpoint_of_four_processes_comes_back_on_one_device_and_on_eight(four):
    one, position = state_of(four, 4, 1, data=1, fsdp=1)
    eight, same_position = state_of(four, 4, 8, data=2, fsdp=2, tensor=2)
    assert position == same_position
    assert position["batches"] == 4
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(one)} == {1}
    assert {leaf.sharding.num_devices for leaf in jax.tree.leaves(eight)} == {8}
    jax.tree.map(np.testing.assert_array_equal, one, eight)


def test_what_four_processes_began_one_goes_on_with(four, here, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(four, workdir)
    shutil.rmtree(workdir / "checkpoints" / "4")
    here(workdir, 8, *MESH_OF_8)
    assert losses(workdir) == pytest.approx(losses(four), abs=1e-5, rel=0)
    assert state_of(workdir, 4, 1, data=1, fsdp=1)[1]["batches"] == 4


def test_different_commands_are_found_before_anything_is_written(data_dir, tmp_path):
    given = [
        [*flags(tmp_path / "run", data_dir, f"optim.learning_rate={rate}"), "--mode", mode]
        for rate, mode in ((0.01, "train"), (0.02, "evaluate"))
    ]
    for process in processes.run_main(given, timeout_s=120):
        assert process.status == 2
        assert process.err == (
            'error: the processes differ in their command: mode is "train" in process 0, '
            '"evaluate" in process 1; config.optim.learning_rate is 0.01 in process 0, 0.02 in '
            "process 1; start all with the same command\n"
        )
    assert not (tmp_path / "run").exists()
