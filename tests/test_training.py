"""The loop around the update, with a model of one number, alone and in several processes."""

import io
import json
import pathlib
import resource
import signal
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from deevisum_jax import checkpoints, sharding, train_step, training, training_log
from deevisum_jax import config as config_lib
from deevisum_jax.checkpoints import Checkpoints
from deevisum_jax.errors import PreemptedError, UserError
from deevisum_jax.preemption import Notice
from deevisum_jax.training_log import read_metrics
from tests import processes

CONFIG = str(pathlib.Path(__file__).parent.parent / "configs" / "tiny.py")
TX = optax.adam(0.1)


@pytest.fixture(autouse=True)
def handler_as_before():
    """A process that was told to stop ignores what is told it later."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


class Batches:
    """Batch n holds the number n in each of its four rows, which are segments 4 n to 4 n + 3."""

    def __init__(self, mesh, at=None):
        split = sharding.batch_sharding(mesh).addressable_devices_indices_map((4,)).values()
        self._rows = sorted({row for (rows,) in split for row in range(4)[rows]})
        self._taken, self._at = 0, at or {}

    def __next__(self):
        self._taken += 1
        fields = {
            "x": np.full(len(self._rows), self._taken, np.float32),
            "video_id": np.full(len(self._rows), self._taken, np.int32),
            "segment": np.array([4 * self._taken + row for row in self._rows], np.int32),
        }
        if event := self._at.get(self._taken):
            event(fields)
        return fields

    def get_state(self):
        return {"taken": self._taken}

    def set_state(self, state):
        self._taken = state["taken"]


def nan(fields) -> None:
    fields["x"][0] = np.nan


def told(fields) -> None:
    signal.raise_signal(signal.SIGTERM)


@jax.jit
def step(state, x):
    loss, grad = jax.value_and_grad(lambda params: jnp.mean((params["w"] - x) ** 2))(state.params)
    updates, opt_state = TX.update(grad, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    new = train_step.TrainState(step=state.step + 1, params=params, frozen={}, opt_state=opt_state)
    return new, {"loss/total": loss, "param_norm": optax.tree.norm(params)}


def make_config(**overrides) -> config_lib.Config:
    """Ten updates, saved after 4, 5, 8 and 10, validated after 5 and 10."""
    fields = {
        "total_steps": 10, "batch_size": 4, "log_every": 100, "checkpoint.every_steps": 4,
        "checkpoint.keep": 9, "eval.every_steps": 5, **overrides,
    }  # fmt: skip
    return config_lib.from_file(CONFIG, [f"{name}={value}" for name, value in fields.items()])


def run(workdir, at=None, validate=None, update=step, **overrides) -> train_step.TrainState:
    """From where the folder stands to the end; the state that is saved there."""
    mesh = sharding.make_mesh(data=-1, fsdp=1, devices=jax.devices()[:4])
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def place(fields):
        where = sharding.batch_sharding(mesh)
        arrays = {
            name: jax.make_array_from_process_local_data(where, rows)
            for name, rows in fields.items()
        }
        return types.SimpleNamespace(**arrays)

    with jax.set_mesh(mesh), Notice() as notice:
        begin = jax.jit(
            lambda: train_step.init_state({"w": jnp.zeros(())}, TX), out_shardings=whole
        )
        abstract = sharding.abstract(jax.eval_shape(begin), jax.tree.map(lambda _: whole, begin()))
        config, batches = make_config(**overrides), Batches(mesh, at)
        with Checkpoints(workdir / "checkpoints", config.checkpoint) as saved:
            training.train(
                saved.restore_latest(abstract, batches) or begin(),
                config=config,
                workdir=epath.Path(workdir),
                data_iter=batches,
                place=place,
                update=lambda state, batch: update(state, batch.x),
                validate=validate or (lambda state: {"tau": float(state.params["w"])}),
                describe=lambda video, segment: {"video_id": f"v{video}", "segment": segment},
                saved=saved,
                notice=notice,
            )
        with Checkpoints(workdir / "checkpoints") as saved:
            return jax.device_get(saved.restore(saved.latest_step, abstract, batches))


def saved_steps(workdir) -> list[int]:
    names = [path.name for path in (workdir / "checkpoints").iterdir()]
    return sorted(int(name) for name in names if name.isdigit())


def scores(workdir) -> dict[int, float]:
    with Checkpoints(workdir / "checkpoints") as saved:
        found = {step: saved.scores(step) for step in saved_steps(workdir)}
    return {step: values["tau"] for step, values in found.items() if values}


def lines(workdir) -> list[dict]:
    logged = read_metrics(epath.Path(workdir) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "examples_per_s"} for line in logged]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    return types.SimpleNamespace(workdir=workdir, state=run(workdir))


def assert_same(found, expected) -> None:
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_what_is_logged_validated_and_saved(finished):
    assert saved_steps(finished.workdir) == [4, 5, 8, 10]
    assert scores(finished.workdir).keys() == {5, 10}
    logged = lines(finished.workdir)
    assert [line["step"] for line in logged] == [1, 4, 5, 5, 8, 10, 10]
    assert logged[0] == {"step": 1, "loss/total": 1.0, "param_norm": pytest.approx(0.1, 1e-4)}
    assert [line["step"] for line in logged if "validation/tau" in line] == [5, 10]


def test_every_step_is_checked_and_none_that_is_not_finite_saved(tmp_path):
    with pytest.raises(UserError, match=r"loss/total, param_norm not finite at step 7, the first"):
        run(tmp_path, {7: nan})
    assert saved_steps(tmp_path) == [4, 5]
    told = json.loads((tmp_path / "nonfinite.json").read_text())
    assert told == {
        "step": 7,
        "metrics": {"loss/total": "nan", "param_norm": "nan"},
        "batch": [{"video_id": "v7", "segment": segment} for segment in range(28, 32)],
    }
    assert [line["step"] for line in lines(tmp_path)] == [1, 4, 5, 5]


@pytest.mark.parametrize("at", [1, 3, 4, 5, 8, 10])
def test_a_notice_at_any_step_loses_nothing(finished, tmp_path, at):
    with pytest.raises(PreemptedError, match=f"step {at} of 10 is done and saved"):
        run(tmp_path, {at: told})
    assert saved_steps(tmp_path)[-1] == at
    assert_same(run(tmp_path), finished.state)
    # What was to be validated when the notice came was validated at the next start.
    assert scores(tmp_path) == scores(finished.workdir)
    validated = [line for line in lines(finished.workdir) if "validation/tau" in line]
    assert [line for line in lines(tmp_path) if "validation/tau" in line] == validated


def test_a_notice_at_the_first_validation_after_a_start_comes_again(finished, tmp_path):
    def stop(state):
        raise PreemptedError("while it validates")

    with pytest.raises(PreemptedError, match="step 5 of 10 is done and saved"):
        run(tmp_path, validate=stop)
    with pytest.raises(PreemptedError, match="while it validates"):
        run(tmp_path, validate=stop)
    assert_same(run(tmp_path), finished.state)
    assert scores(tmp_path) == scores(finished.workdir)


def test_a_finished_run_is_left_as_it_is(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")}
    assert_same(run(finished.workdir), finished.state)
    assert {path: path.stat().st_mtime_ns for path in finished.workdir.rglob("*")} == before


def test_a_damaged_newest_checkpoint_costs_no_more_than_its_steps(finished, tmp_path, capfd):
    with pytest.raises(PreemptedError):
        run(tmp_path, {9: told})
    (tmp_path / "checkpoints" / "9" / "params" / "_METADATA").unlink()
    assert_same(run(tmp_path), finished.state)
    assert "moved to 9.damaged" in capfd.readouterr().err


def test_all_of_it_in_a_bucket(bucket, tmp_path):
    workdir = bucket / "run"
    short = {"total_steps": 4, "checkpoint.every_steps": 2}
    with pytest.raises(PreemptedError):
        run(workdir, {3: told}, **short)
    # In a bucket a step has its name from the beginning, and this when it is complete.
    (workdir / "checkpoints" / "3" / "commit_success.txt").unlink()
    assert_same(run(workdir, **short), run(tmp_path, **short))
    assert saved_steps(workdir) == [2, 4]
    assert scores(workdir) == scores(tmp_path)
    assert [line["step"] for line in lines(workdir)] == [1, 2, 3, 4, 4]
    assert all("tfevents" in path.name for path in (workdir / "tensorboard").iterdir())


def test_a_batch_that_cannot_be_written_down_hides_no_failure(tmp_path):
    (tmp_path / "nonfinite.json").mkdir()
    with pytest.raises(UserError, match=r"not finite at step 7, the first; its batch could not be"):
        run(tmp_path, {7: nan})


def test_a_run_that_comes_to_its_end_forgets_an_earlier_failure(tmp_path):
    with pytest.raises(UserError, match="not finite at step 7"):
        run(tmp_path, {7: nan})
    run(tmp_path)
    assert not (tmp_path / "nonfinite.json").exists()


# Of Orbax's files, which Python closes in vain.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_last_save_that_fails_fails_the_run(tmp_path, monkeypatch):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    get_state = Batches.get_state

    def get_state_and_fill_the_disk(self):  # it is asked for at the beginning of a save
        if self._taken == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        return get_state(self)

    monkeypatch.setattr(Batches, "get_state", get_state_and_fill_the_disk)
    with io.StringIO() as shown:  # what pytest writes stderr to is a file, too
        monkeypatch.setattr("sys.stderr", shown)
        try:
            with pytest.raises(UserError, match="checkpoint of step 10 cannot be written"):
                run(tmp_path)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            monkeypatch.undo()
    assert saved_steps(tmp_path) == [4, 5, 8]


class Slow:
    """A number that a device has at a time to come; who asks for it waits until then."""

    def __init__(self, clock, at_s):
        self._clock, self._at_s = clock, at_s

    def copy_to_host_async(self):
        pass

    def is_ready(self) -> bool:
        return self._clock.now >= self._at_s

    def __array__(self):
        self._clock.now = max(self._clock.now, self._at_s)
        return np.array(1.0)


@pytest.mark.parametrize(("input_s", "update_s"), [(10.0, 1.0), (1.0, 10.0)])
def test_every_logged_speed_is_that_of_the_slower_of_input_and_device(
    tmp_path, monkeypatch, input_s, update_s
):
    clock = types.SimpleNamespace(now=0.0, free_s=0.0, monotonic=lambda: clock.now, time=time.time)
    monkeypatch.setattr(training_log, "time", clock)

    def wait(fields):
        clock.now += input_s

    def slow_step(state, x):
        clock.free_s = max(clock.now, clock.free_s) + update_s
        return step(state, x)[0], {"loss/total": Slow(clock, clock.free_s)}

    run(tmp_path, dict.fromkeys(range(1, 11), wait), update=slow_step, log_every=1)
    first, *speeds = [
        line["examples_per_s"]
        for line in read_metrics(epath.Path(tmp_path) / "metrics.jsonl")
        if "examples_per_s" in line
    ]
    assert len(speeds) == 9
    assert first == 4 / input_s
    # Four examples each 10 s; 11 where the device was waited for, before something was saved.
    assert all(4 / 11 <= speed <= 4 / 10 for speed in speeds)


def test_the_watchdog_knows_what_is_being_done(tmp_path, monkeypatch):
    class Listening(training.Watchdog):
        def watching(self, what, step):
            done.append((what, step))
            return super().watching(what, step)

    done = []
    monkeypatch.setattr(training, "Watchdog", Listening)
    run(tmp_path, total_steps=3, **{"optim.warmup_steps": 0, "checkpoint.every_steps": 2})
    assert done == [
        ("input", 1), ("update", 1), ("input", 2), ("update", 2), ("save", 2), ("input", 3),
        ("update", 3), ("validation", 3), ("save", 3),
    ]  # fmt: skip


def in_two_processes(folder: pathlib.Path) -> dict:
    """What happens to both where one of them has a reason to stop, or cannot read."""
    is_second = jax.process_index() == 1
    found = {}
    try:
        run(folder / "told", {3: told} if is_second else None)
    except PreemptedError as error:
        found["told"] = str(error)
    found["state"] = jax.tree.map(float, jax.tree.leaves(run(folder / "told")))
    try:
        run(folder / "nan", {6: nan} if is_second else None)
    except UserError as error:
        found["nan"] = str(error)
        found["batch"] = json.loads((folder / "nan" / "nonfinite.json").read_text())["batch"]

    read = checkpoints._read

    def unread(path, *args):
        if path.name == "5":
            raise ValueError("DATA_LOSS")
        return read(path, *args)

    if is_second:
        checkpoints._read = unread
    found["unread"] = jax.tree.map(float, jax.tree.leaves(run(folder / "nan")))
    return found


def test_of_two_processes_none_goes_on_alone(finished, tmp_path):
    ended = processes.run_function(2, "train_one_number", str(tmp_path))
    assert [(process.status, process.errors) for process in ended] == [(0, [])] * 2
    first, second = (json.loads(process.out.splitlines()[-1]) for process in ended)
    assert first == second
    # It was told in step 3; all ask for it in that step, and hear it two later.
    assert first["told"] == "step 5 of 10 is done and saved"
    assert scores(tmp_path / "told") == pytest.approx(scores(finished.workdir), abs=1e-6)
    # Two processes saved what one would have, and one process's own row is in it.
    expected = [float(leaf) for leaf in jax.tree.leaves(finished.state)]
    assert first["state"] == pytest.approx(expected, abs=1e-6)
    assert "not finite at step 6" in first["nan"]
    assert [row["segment"] for row in first["batch"]] == [24, 25, 26, 27]
    # Both went back to step 4, and on from there.
    assert first["unread"] == pytest.approx(expected, abs=1e-6)
    assert (tmp_path / "nan" / "checkpoints" / "5.damaged").is_dir()
    assert saved_steps(tmp_path / "told") == [4, 5, 8, 10]
    assert "another process cannot read its part" in ended[0].err
