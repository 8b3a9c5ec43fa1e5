"""What is kept, what comes back, and what is refused."""

import shutil

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deevisum_jax import train_step
from deevisum_jax.checkpoints import Checkpoints
from deevisum_jax.config import CheckpointConfig
from deevisum_jax.errors import UserError

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


def make_iterator():
    return iter(grain.MapDataset.range(50).seed(0).shuffle().repeat().to_iter_dataset())


def save(folder, taus, keep=2):
    """One checkpoint per tau, at steps 1, 2 ...; None: not validated."""
    iterator = make_iterator()
    with Checkpoints(folder, CheckpointConfig(keep=keep)) as saved:
        for step, tau in enumerate(taus, start=1):
            next(iterator)
            saved.save(step, make_state(step), iterator, tau and {"tau": tau, "f1": 0.5})
    return iterator


def steps(folder) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir())


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
    iterator = save(tmp_path, [0.1, 0.2])
    following = [next(iterator) for _ in range(5)]
    again = make_iterator()
    with Checkpoints(tmp_path, CheckpointConfig()) as saved:
        state = saved.restore(2, abstract(make_state()), again)
    jax.tree.map(np.testing.assert_array_equal, state, make_state(2))
    assert jax.tree.structure(state) == jax.tree.structure(make_state(2))
    assert [next(again) for _ in range(5)] == following


def test_a_state_can_come_back_on_another_mesh(tmp_path):
    save(tmp_path, [0.1])
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    params = {"a": make_state().params["a"], "b": {"scale": jnp.ones(3)}}
    wanted = abstract(params)
    wanted["a"]["kernel"] = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=split)
    with Checkpoints(tmp_path) as saved:
        restored = saved.restore_params(1, wanted)
    assert restored["a"]["kernel"].sharding == split
    np.testing.assert_array_equal(restored["a"]["kernel"], np.ones((8, 4)))


def test_what_was_saved_is_what_was_there_when_it_was_saved(tmp_path):
    update = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    state = make_state(1)
    with Checkpoints(tmp_path, CheckpointConfig()) as saved:
        saved.save(1, state, make_iterator(), None)
        for _ in range(3):
            state = update(state)  # takes over the buffers while they may still be written
    with Checkpoints(tmp_path) as saved:
        restored = saved.restore(1, abstract(make_state()), make_iterator())
    jax.tree.map(np.testing.assert_array_equal, restored, make_state(1))


def test_another_architecture_is_refused_and_named(tmp_path):
    save(tmp_path, [0.1])
    wider = make_state(width=5)
    message = r"another architecture \(1 of 2 parameters differ\)"
    with Checkpoints(tmp_path) as saved:
        with pytest.raises(UserError, match=message) as caught:
            saved.restore(1, abstract(wider), make_iterator())
        assert "a/kernel: (8, 4) in the checkpoint, (8, 5) in the model" in str(caught.value)
        other = abstract({"a": {"kernel": jnp.ones((8, 4))}, "c": jnp.ones(2)})
        with pytest.raises(UserError, match="architecture") as caught:
            saved.restore_params(1, other)
        assert "b/scale: (3,) in the checkpoint, absent in the model" in str(caught.value)
        assert "c: absent in the checkpoint, (2,) in the model" in str(caught.value)


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
        saved.restore(2, abstract(make_state()), make_iterator())


def test_a_step_that_cannot_be_restored_may_still_be_whole(tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        raise MemoryError("9 GiB")

    save(tmp_path, [0.1])
    with Checkpoints(tmp_path) as saved:
        monkeypatch.setattr(saved._manager, "restore", fails)
        with pytest.raises(UserError, match=r"/1 cannot be restored \(MemoryError: 9 GiB\)"):
            saved.restore(1, abstract(make_state()), make_iterator())


def test_a_step_without_its_parameters_is_named(tmp_path):
    save(tmp_path, [0.1, 0.2])
    shutil.rmtree(tmp_path / "2" / "params")
    with Checkpoints(tmp_path) as saved, pytest.raises(UserError, match=r"/2 cannot be restored"):
        saved.restore_params(2, abstract(make_state()).params)
