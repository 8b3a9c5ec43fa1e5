"""What is kept, what comes back, and what is refused."""

import dataclasses
import logging
import pathlib
import re
import shutil
import subprocess
import sys

import aiohttp
import gcsfs.retry
import google.auth.exceptions
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from deevisum_jax import checkpoints, distributed, train_step
from deevisum_jax.checkpoints import Checkpoints
from deevisum_jax.config import CheckpointConfig
from deevisum_jax.errors import PreemptedError, UserError
from tests import processes

TX = optax.adam(0.1)


def make_state(step: int = 0, width: int = 4) -> train_step.TrainState:
    params = {"a": {"kernel": jnp.full((8, width), float(step))}, "b": {"scale": jnp.ones(3)}}
    state = train_step.init_state(params, TX, frozen=("b/.*",))
    return train_step.TrainState(
        step=jnp.int32(step),
        params=state.params,
        frozen=state.frozen,
        opt_state=jax.tree.map(lambda leaf: leaf + step, state.opt_state),
    )


def abstract(state, sharding=None):
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )


class Numbers:
    """0, 1, 2 ..."""

    def __init__(self):
        self.taken = 0

    def __next__(self) -> int:
        self.taken += 1
        return self.taken - 1

    def get_state(self) -> dict[str, int]:
        return {"taken": self.taken}

    def set_state(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


def save(folder, taus, keep=2):
    """One checkpoint per tau, at steps 1, 2 ...; None: not validated."""
    numbers = Numbers()
    with Checkpoints(folder, CheckpointConfig(keep=keep)) as saved:
        for step, tau in enumerate(taus, start=1):
            next(numbers)
            saved.save(step, make_state(step), numbers, tau and {"tau": tau, "f1": 0.5})
    return numbers


def steps(folder) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


@pytest.mark.parametrize(
    ("taus", "kept", "best"),
    [
        ([0.1, 0.9, 0.3, 0.2, 0.4], [2, 4, 5], 2),  # the newest two, and the best
        ([0.1, 0.2, 0.3, 0.4, 0.5], [4, 5], 5),
        ([0.1, 0.9, None, None, None], [2, 4, 5], 2),  # validated less often than saved
        ([-0.5, None, -0.9], [1, 2, 3], 1),
        ([None, None, None], [2, 3], 3),  # never validated: the newest
    ],
)
def test_the_newest_and_the_best_survive(tmp_path, taus, kept, best):
    save(tmp_path, taus)
    assert steps(tmp_path) == kept
    with Checkpoints(tmp_path) as saved:
        assert saved.best_step == best
        assert saved.latest_step == len(taus)


def test_all_comes_back_to_the_bit(tmp_path):
    numbers = save(tmp_path, [0.1, 0.2])
    again = Numbers()
    with Checkpoints(tmp_path, CheckpointConfig()) as saved:
        state = saved.restore(2, abstract(make_state()), again)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(2))
    assert jax.tree.structure(state) == jax.tree.structure(make_state(2))
    assert next(again) == next(numbers) == 2


def test_a_state_can_come_back_on_another_mesh(tmp_path):
    save(tmp_path, [0.1])
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"a": make_state().params["a"], "b": {"scale": jnp.ones(3)}}
    wanted = abstract(params, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    wanted["a"]["kernel"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=split)
    with Checkpoints(tmp_path) as saved:
        restored = saved.restore_params(1, wanted)
    assert restored["a"]["kernel"].sharding == split
    np.testing.assert_array_equal(restored["a"]["kernel"], np.ones((8, 4)))


def test_what_was_saved_is_what_was_there_when_it_was_saved(tmp_path):
    update = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = make_state(1)
    with Checkpoints(tmp_path, CheckpointConfig()) as saved:
        saved.save(1, state, Numbers(), None)
        for _ in range(3):
            state = update(state)  # takes over the buffers while they may still be written
    with Checkpoints(tmp_path) as saved:
        restored = saved.restore(1, abstract(make_state()), Numbers())
    jax.tree.map(np.testing.assert_array_equal, restored, make_state(1))


def test_another_architecture_is_refused_and_named(tmp_path):
    save(tmp_path, [0.1])
    wider = make_state(width=5)
    message = r"another architecture \(1 of 2 arrays differ\)"
    with Checkpoints(tmp_path) as saved:
        with pytest.raises(UserError, match=message) as caught:
            saved.restore(1, abstract(wider), Numbers())
        assert "a/kernel: (8, 4) in the checkpoint, (8, 5) in the model" in str(caught.value)
        other = abstract({"a": {"kernel": jnp.ones((8, 4))}, "c": jnp.ones(2)})
        with pytest.raises(UserError, match="architecture") as caught:
            saved.restore_params(1, other)
        assert "b/scale: (3,) in the checkpoint, absent in the model" in str(caught.value)
        assert "c: absent in the checkpoint, (2,) in the model" in str(caught.value)


def test_what_only_training_has_is_left_out_where_the_model_is_wanted(tmp_path):
    kernel = {"kernel": jnp.full((8, 4), 2.0)}
    params = {"a": kernel, "distill": {"mentor": {"kernel": jnp.ones((1, 2, 3))}}}
    state = train_step.init_state(params, TX)
    save_all(tmp_path / "c", {1: state})
    with Checkpoints(tmp_path / "c") as saved:
        found = saved.restore_params(1, abstract({"a": kernel}))
        jax.tree.map(np.testing.assert_array_equal, found, {"a": kernel})
        assert jax.tree.structure(found) == jax.tree.structure({"a": kernel})
        whole = saved.restore_params(1, abstract(params))
        jax.tree.map(np.testing.assert_array_equal, whole, params)
        with pytest.raises(UserError, match=r"a/kernel: \(8, 4\) in the checkpoint, absent"):
            saved.restore_params(1, abstract({"distill": params["distill"]}))


def test_a_checkpoint_that_was_not_finished_does_not_count(tmp_path):
    save(tmp_path, [0.1])
    (tmp_path / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    with Checkpoints(tmp_path) as saved:
        assert saved.latest_step == 1


def test_no_folder_and_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"nothing does not exist; give the workdir of a run"):
        Checkpoints(tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()
    with (
        Checkpoints(tmp_path) as saved,
        pytest.raises(UserError, match="holds no complete checkpoint; train first"),
    ):
        _ = saved.best_step


@pytest.mark.parametrize("pattern", ["params/**/*", "data_iter/*", "params/_METADATA"])
def test_a_damaged_step_is_named(tmp_path, pattern):
    save(tmp_path, [0.1, 0.2])
    damaged = [path for path in (tmp_path / "2").glob(pattern) if path.is_file()]
    assert damaged
    for path in damaged:
        path.write_bytes(b"\0")
    with (
        Checkpoints(tmp_path) as saved,
        pytest.raises(
            UserError, match=r"checkpoint .*/2 cannot be restored .* move that folder aside"
        ),
    ):
        saved.restore(2, abstract(make_state()), Numbers())


def test_a_step_without_its_parameters_is_named(tmp_path):
    save(tmp_path, [0.1, 0.2])
    shutil.rmtree(tmp_path / "2" / "params")
    with Checkpoints(tmp_path) as saved, pytest.raises(UserError, match=r"/2 cannot be restored"):
        saved.restore_params(2, abstract(make_state()).params)


def test_who_opens_checkpoints_to_read_them_waits_for_no_other_process(tmp_path, monkeypatch):
    def wait(work):
        pytest.fail("it waits")

    save(tmp_path, [0.1])
    monkeypatch.setattr(distributed, "on_main", wait)
    with Checkpoints(tmp_path) as saved:
        assert saved.best_step == 1


# ---- Damage, and what is none ----


def gone(path: pathlib.Path) -> None:
    path.unlink()


def half(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def zeros(path: pathlib.Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def resume(folder, keep=3) -> tuple[train_step.TrainState | None, Numbers]:
    numbers = Numbers()
    with Checkpoints(folder, CheckpointConfig(keep=keep)) as saved:
        return saved.restore_latest(abstract(make_state()), numbers), numbers


def assert_is_step(state: train_step.TrainState, step: int) -> None:
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step))


@pytest.mark.parametrize("harm", [gone, half, zeros])
def test_any_damaged_file_of_the_newest_is_harmless_or_leads_to_the_one_before(
    tmp_path, capfd, harm
):
    save(tmp_path / "whole", [0.1, 0.2])
    files = [path for path in (tmp_path / "whole" / "2").rglob("*") if path.is_file()]
    taken = set()
    for path in files:
        name = str(path.relative_to(tmp_path / "whole"))
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "run")
        harm(tmp_path / "run" / name)
        state, numbers = resume(tmp_path / "run")
        step = int(state.step)
        assert_is_step(state, step)
        assert numbers.taken == step
        assert ("run/2 is damaged (" in capfd.readouterr().err) == (step == 1)
        assert steps(tmp_path / "run") == [1, 2][:step]
        assert (tmp_path / "run" / "2.damaged").exists() == (step == 1)
        if step == 1:
            taken.add(name)
    assert {"2/params/_METADATA", "2/params/manifest.ocdbt", "2/data_iter/metadata"} <= taken


def large_state(step: int, rows: int = 64) -> train_step.TrainState:
    """With an array that has a file of its own."""
    kernel = jax.random.normal(jax.random.key(step), (rows, 512))
    return dataclasses.replace(make_state(step), params={"a": {"kernel": kernel}})


# A reply of tensorstore's that comes after the failed read finds nobody to tell.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("num_bytes", [1, 4096])
def test_numbers_that_changed_on_the_disk_are_found(tmp_path, capfd, num_bytes):
    with Checkpoints(tmp_path, CheckpointConfig()) as saved:
        for step in (1, 2):
            saved.save(step, large_state(step), Numbers(), {"tau": 0.1})
    data = max((tmp_path / "2" / "params").rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    assert len(content) > 64 * 512
    middle = len(content) // 2
    content[middle : middle + num_bytes] = bytes(
        byte ^ 0x10 for byte in content[middle : middle + num_bytes]
    )
    data.write_bytes(content)
    wanted = abstract(large_state(0))
    with Checkpoints(tmp_path) as saved, pytest.raises(UserError, match=r"/2 cannot be restored"):
        saved.restore_params(2, wanted.params | wanted.frozen)
    with Checkpoints(tmp_path, CheckpointConfig()) as saved:
        state = saved.restore_latest(wanted, Numbers())
    jax.tree.map(np.testing.assert_array_equal, state, large_state(1))
    if num_bytes == 1:  # more is no data that can be unpacked
        assert "DamagedError: a/kernel is not what was saved" in capfd.readouterr().err


def test_a_checksum_sees_every_single_number_and_where_it_stands():
    numbers = np.arange(6, dtype=np.float32).reshape(2, 3)
    found = set()
    for row, column in np.ndindex(2, 3):
        changed = numbers.copy()
        changed[row, column] = 7
        found.add(int(checkpoints._checksum(jnp.asarray(changed))))
    found.add(int(checkpoints._checksum(jnp.asarray(numbers))))
    found.add(int(checkpoints._checksum(jnp.asarray(numbers.reshape(3, 2).T))))
    assert len(found) == 8
    for dtype in (jnp.bfloat16, jnp.int32):  # of optimizers, for instance
        one, other = (checkpoints._checksum(jnp.array(x, dtype)) for x in ([0, 1], [1, 0]))
        assert one != other


def test_a_fingerprint_is_of_the_parameters_alone_and_of_every_one_of_them(tmp_path):
    def fingerprint(name: str, state) -> str:
        with Checkpoints(tmp_path / name, CheckpointConfig()) as saved:
            saved.save(1, state, Numbers(), None)
            saved.wait()
            return saved.fingerprint(1)

    state = make_state()
    first = fingerprint("first", state)
    assert len(first) == 64
    assert fingerprint("same", make_state()) == first
    others_moments = jax.tree.map(lambda leaf: leaf + 1, state.opt_state)
    assert fingerprint("step", dataclasses.replace(state, opt_state=others_moments)) == first
    kernel = state.params["a"]["kernel"].at[3, 1].set(1e-38)
    changed = dataclasses.replace(state, params={"a": {"kernel": kernel}})
    assert fingerprint("changed", changed) != first
    frozen = dataclasses.replace(state, frozen={"b": {"scale": jnp.array([1.0, 1.0, 2.0])}})
    assert fingerprint("frozen", frozen) != first


def test_a_step_without_checksums_has_no_fingerprint(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig()) as saved:
        saved.save(1, make_state(), Numbers(), None)
        saved.wait()
        shutil.rmtree(tmp_path / "1" / "checksums")
        with pytest.raises(UserError, match="has no checksums of the parameters"):
            saved.fingerprint(1)


def test_several_damaged_ones_are_moved_aside_and_their_steps_saved_again(tmp_path, capfd):
    save(tmp_path, [0.1, 0.2, 0.3], keep=3)
    for step in (2, 3):
        (tmp_path / str(step) / "params" / "_METADATA").unlink()
    with Checkpoints(tmp_path, CheckpointConfig(keep=3)) as saved:
        assert_is_step(saved.restore_latest(abstract(make_state()), Numbers()), 1)
        warnings = capfd.readouterr().err.splitlines()
        assert [line.split(" is damaged (")[0] for line in warnings] == [
            f"warning: checkpoint {tmp_path}/3", f"warning: checkpoint {tmp_path}/2",
        ]  # fmt: skip
        assert warnings[0].endswith("; it was moved to 3.damaged, and step 1 is taken")
        for step in (2, 3):
            saved.save(step, make_state(step), Numbers(), None)
    assert_is_step(resume(tmp_path)[0], 3)
    # Nothing is lost, also when it happens again.
    (tmp_path / "3" / "params" / "_METADATA").unlink()
    assert_is_step(resume(tmp_path)[0], 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "1", "2", "2.damaged", "3.damaged", "3.damaged-2",
    }  # fmt: skip


def test_where_all_are_damaged_nothing_is_begun_anew(tmp_path):
    save(tmp_path, [0.1, 0.2])
    for step in (1, 2):
        shutil.rmtree(tmp_path / str(step) / "train_state")
    for _ in range(2):  # nor at the second try
        with pytest.raises(
            UserError, match=r"no checkpoint in .* can be restored \(2: FileNotFound.*; 1: FileNot"
        ):
            resume(tmp_path)
    assert steps(tmp_path) == [1, 2]


def test_an_empty_folder_is_a_beginning(tmp_path):
    assert resume(tmp_path)[0] is None


def test_damaged_scores_are_named_by_who_only_reads(tmp_path):
    save(tmp_path, [0.1, 0.2])
    (tmp_path / "1" / "metrics" / "metrics").write_text('{"tau": ')
    with pytest.raises(UserError, match=r"/1/metrics cannot be restored \(JSONDecodeError"):
        Checkpoints(tmp_path)
    assert steps(tmp_path) == [1, 2]


def test_a_run_goes_on_from_where_only_scores_are_damaged(tmp_path, capfd):
    save(tmp_path, [0.1, 0.2])
    (tmp_path / "2" / "metrics" / "metrics").write_text('{"tau": ')
    with Checkpoints(tmp_path, CheckpointConfig()) as saved:
        assert_is_step(saved.restore_latest(abstract(make_state()), Numbers()), 2)
        assert saved.scores(2) is None
        saved.add_scores(2, {"tau": 0.2})
        assert saved.best_step == 2
    assert "it was moved to metrics.damaged" in capfd.readouterr().err


@pytest.mark.parametrize(
    "reason",
    [
        MemoryError("9 GiB"),
        PermissionError(13, "Permission denied"),
        OSError(5, "Input/output error"),
        ValueError("UNAVAILABLE: Error reading gs://bucket/object"),
        ValueError("Bad Request: gs://bucket/object"),
        gcsfs.retry.HttpError({"code": 503, "message": "Service Unavailable"}),
        google.auth.exceptions.RefreshError("no route to the metadata server"),
        aiohttp.ClientPayloadError("Response payload is not completed"),
    ],
)
@pytest.mark.parametrize("item", ["params", "checksums", "metrics"])
def test_what_is_out_of_reach_may_be_whole_and_stays(tmp_path, monkeypatch, reason, item):
    def fails(*args, **kwargs):
        raise reason

    save(tmp_path, [0.1, 0.2])
    with monkeypatch.context() as patched:
        if item == "params":
            patched.setattr(checkpoints, "_read_params", fails)
        else:
            restore = ocp.JsonCheckpointHandler.restore
            patched.setattr(
                ocp.JsonCheckpointHandler,
                "restore",
                lambda self, path: fails() if path.name == item else restore(self, path),
            )
        with pytest.raises(UserError, match=r"cannot be restored \(.*; move that folder aside"):
            resume(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}
    assert resume(tmp_path)[0].step == 2


def test_what_a_wrapper_of_no_kind_says_is_looked_up_in_its_cause(tmp_path, monkeypatch, capfd):
    def fails(folder, *args):
        try:
            raise KeyError("a.kernel")
        except KeyError as error:
            raise Exception("See full TensorStore details: TensorStore({") from error

    save(tmp_path, [0.1, 0.2])
    monkeypatch.setattr(checkpoints, "_read_params", fails)
    with pytest.raises(UserError, match=r"\(2: KeyError: 'a\.kernel'; 1: KeyError"):
        resume(tmp_path)


def test_others_reports_are_kept_back_only_while_a_checkpoint_is_read(tmp_path, caplog):
    save(tmp_path, [0.1, 0.2])
    (tmp_path / "2" / "params" / "manifest.ocdbt").write_bytes(b"\0")
    tell = sys.unraisablehook
    with Checkpoints(tmp_path) as saved, pytest.raises(UserError, match="cannot be restored"):
        saved.restore(2, abstract(make_state()), Numbers())
    assert_is_step(resume(tmp_path)[0], 1)
    assert sys.unraisablehook is tell
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    assert "never retrieved" in caplog.text


def test_another_architecture_or_optimizer_is_no_damage(tmp_path):
    save(tmp_path, [0.1, 0.2])
    wider = abstract(make_state(width=5))
    other = abstract(
        dataclasses.replace(
            make_state(), opt_state=optax.sgd(0.1, momentum=0.9).init(make_state().params)
        )
    )
    with Checkpoints(tmp_path, CheckpointConfig()) as saved:
        with pytest.raises(UserError, match="holds a model of another architecture"):
            saved.restore_latest(wider, Numbers())
        with pytest.raises(UserError, match="an optimizer's state of another architecture"):
            saved.restore_latest(other, Numbers())
    assert steps(tmp_path) == [1, 2]


def test_the_data_order_of_an_earlier_version_is_refused_and_its_parameters_are_not(tmp_path):
    save(tmp_path, [0.1])
    (tmp_path / "1" / "data_iter" / "metadata").rename(
        tmp_path / "1" / "data_iter" / "process_0-of-1.json"
    )
    with pytest.raises(UserError, match="was written by an earlier version"):
        resume(tmp_path)
    assert steps(tmp_path) == [1]
    shutil.rmtree(tmp_path / "1" / "checksums")  # which it did not write, either
    with Checkpoints(tmp_path) as saved:
        wanted = abstract(make_state())
        params = saved.restore_params(saved.best_step, wanted.params | wanted.frozen)
    np.testing.assert_array_equal(params["a"]["kernel"], np.ones((8, 4)))


def test_what_a_kill_left_half_written_is_removed(tmp_path):
    save(tmp_path, [0.1])
    (tmp_path / "2.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (tmp_path / "2.orbax-checkpoint-tmp" / "params" / "file").touch()
    assert_is_step(resume(tmp_path)[0], 1)
    assert steps(tmp_path) == [1]


# ---- Scores that come later ----


def test_scores_can_be_added(tmp_path):
    save(tmp_path, [0.1, None])
    with Checkpoints(tmp_path, CheckpointConfig()) as saved:
        assert saved.scores(1) == {"tau": 0.1, "f1": 0.5}
        assert saved.scores(2) is None
        saved.add_scores(2, {"tau": 0.2, "f1": 0.5})
        assert saved.scores(2) == {"tau": 0.2, "f1": 0.5}
        assert saved.best_step == 2
        saved.save(3, make_state(3), Numbers(), {"tau": 0.15, "f1": 0.5})
        saved.save(4, make_state(4), Numbers(), {"tau": 0.15, "f1": 0.5})
    assert steps(tmp_path) == [2, 3, 4]
    with Checkpoints(tmp_path) as saved:
        assert saved.best_step == 2


# ---- What cannot be written ----


def save_all(folder, states: dict[int, train_step.TrainState]) -> None:
    with Checkpoints(folder, CheckpointConfig(keep=1)) as saved:
        for step, state in states.items():
            saved.save(step, state, Numbers(), {"tau": step / 10})


# Writes beside the one that fails end when Orbax has stopped listening to them.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_told_and_the_checkpoint_before_stays(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", small], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no right to mount a small disk")
    try:
        save_all(small / "c", {1: make_state(1)})
        message = (
            r"the checkpoint of step 2 cannot be written in .* \(.*\); the one of step 1 is whole: "
            "make room"
        )
        huge = make_state(2)
        huge.params["a"]["kernel"] = jax.random.normal(jax.random.key(0), (1024, 1024))  # 4 MiB
        # It is written while others train, so it is known at the next save, or at the end.
        for later in ([3], []):
            with pytest.raises(UserError, match=message):
                save_all(small / "c", {2: huge} | dict.fromkeys(later, huge))
        state, numbers = resume(small / "c")
        assert_is_step(state, 1)
        assert numbers.taken == 0
    finally:
        subprocess.run(["umount", "-l", small], check=True)


@pytest.mark.parametrize("reason", [ZeroDivisionError, UserError, PreemptedError])
def test_a_save_that_fails_does_not_hide_what_ended_the_run(tmp_path, monkeypatch, capfd, reason):
    class TheReasonError(reason):
        """What all processes raise is of a class below `UserError`, too."""

    full, closed = [OSError(28, "No space left on device")], []

    def wait() -> None:
        if full:  # Orbax says it once
            raise full.pop()

    def end() -> None:
        with Checkpoints(tmp_path, CheckpointConfig()) as saved:
            saved.save(1, make_state(1), Numbers(), None)
            saved.wait()
            close = saved._manager.close
            monkeypatch.setattr(saved._manager, "wait_until_finished", wait)
            monkeypatch.setattr(saved._manager, "close", lambda: closed.append(close()))
            raise TheReasonError

    with pytest.raises(TheReasonError):
        end()
    assert ("cannot be written" in capfd.readouterr().err) == (reason is not UserError)
    assert len(closed) == 1


def test_of_two_processes_one_cannot_write_and_both_stop(tmp_path):
    first, second = processes.run_function(2, "write_to_a_full_disk", str(tmp_path), timeout_s=120)
    assert (first.status, second.status) == (2, 2)
    said = r"the checkpoint of step 2 cannot be written .* the one of step 1 is whole: make room"
    assert re.search(f"error: process 1 stopped: {said}", first.err)
    assert re.search(f"error: {said}", second.err)
    with Checkpoints(tmp_path, CheckpointConfig()) as saved:
        state = saved.restore_latest(abstract(large_state(0, 512)), Numbers())
    jax.tree.map(np.testing.assert_array_equal, state, large_state(1, 512))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/c cannot be written \(NotADirectoryError"):
        Checkpoints(tmp_path / "file" / "c", CheckpointConfig())
