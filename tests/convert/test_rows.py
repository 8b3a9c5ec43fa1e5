"""The engine under the tables: matching, placing on a mesh, going back, and what is refused."""

import jax
import ml_dtypes
import numpy as np
import pytest

from deevisum_jax import sharding
from deevisum_jax.convert import rows as rows_lib
from deevisum_jax.convert import tensors as tensors_lib
from deevisum_jax.convert.rows import Row, fill, match, spill
from deevisum_jax.convert.tensors import ArrayTensor
from deevisum_jax.errors import UserError

# Two heads of 3 on a width of 2: the source's rows are head 0's three, then head 1's.
HEADS = Row(target="w", sources=("q",), shape=(6, 2), split=(2, 3, 2), order=(0, 2, 1))
SOURCE = np.arange(12, dtype=np.float32).reshape(6, 2)


def abstract(shape, dtype=np.float32, where=None):
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)


def checkpoint(**arrays):
    return {name: ArrayTensor(array, file="a.npz") for name, array in arrays.items()}


def test_a_source_is_split_and_reordered():
    w = fill(checkpoint(q=SOURCE), [HEADS], {"w": abstract((2, 2, 3))})["w"]
    # Head 1, width 0: the first column of its rows 3, 4, 5.
    np.testing.assert_array_equal(w[1, 0], [6, 8, 10])


def test_layers_and_pairs_are_stacked_in_front():
    row = Row(target="w", sources=("{i}.k", "{i}.v"), shape=(1,))
    arrays = {
        f"{i}.{name}": np.float32([10 * i + j]) for i in (0, 1) for j, name in enumerate("kv")
    }
    w = fill(checkpoint(**arrays), [row], {"w": abstract((2, 2, 1))})["w"]
    np.testing.assert_array_equal(w[..., 0], [[0, 1], [10, 11]])


def test_one_source_may_be_cut_for_several_parameters():
    rows = [Row(target=t, sources=("qk",), shape=(6, 2), cut=cut, order=(1, 0))
            for t, cut in (("q", (0, 3)), ("k", (3, 6)))]  # fmt: skip
    shapes = {"q": abstract((2, 3)), "k": abstract((2, 3))}
    params = fill(checkpoint(qk=SOURCE), rows, shapes)
    np.testing.assert_array_equal(params["k"], SOURCE[3:].T)
    np.testing.assert_array_equal(tensors_lib.read(spill(params, rows)["qk"]), SOURCE)


def test_rows_behind_the_vocabulary_are_left():
    row = Row(target="w", sources=("q",), shape=(4, 2), max_padding=2)
    w = fill(checkpoint(q=SOURCE), [row], {"w": abstract((4, 2))})["w"]
    np.testing.assert_array_equal(w, SOURCE[:4])
    row = Row(target="w", sources=("q",), shape=(3, 2), max_padding=2)
    with pytest.raises(UserError, match=r"q: shape \(6, 2\), wanted \(3, 2\) for w \(in a.npz\)"):
        match(checkpoint(q=SOURCE), [row], {"w": abstract((3, 2))})


def test_parameters_on_an_accelerator_come_back_part_by_part(monkeypatch):
    monkeypatch.setattr(rows_lib, "_on_this_host", lambda leaf: False)
    source = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    tensors = {f"{i}.{name}": ArrayTensor(source + i) for i in range(2) for name in "kv"}
    row = Row(
        target="w", sources=("{i}.k", "{i}.v"), shape=(6, 8), split=(2, 3, 8), order=(0, 2, 1)
    )
    where = jax.sharding.NamedSharding(
        sharding.make_mesh(data=2, fsdp=2, tensor=2),
        jax.sharding.PartitionSpec(None, None, "data", "fsdp", None),
    )
    params = fill(tensors, [row], {"w": abstract((2, 2, 2, 8, 3), where=where)})
    for name, tensor in spill(params, [row]).items():
        np.testing.assert_array_equal(tensors_lib.read(tensor), tensors[name].array)


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 2, 0), (2, 0, 1), (2, 1, 0)])
@pytest.mark.parametrize("slab_bytes", [1, 2000, 10**9])
def test_every_order_goes_there_and_back_in_slabs_of_any_size(monkeypatch, order, slab_bytes):
    monkeypatch.setattr(tensors_lib, "SLAB_BYTES", slab_bytes)
    split = (5, 3, 70)  # more columns than one strip
    source = np.random.default_rng(0).normal(size=(15, 70)).astype(np.float32)
    row = Row(target="w", sources=("{i}",), shape=(15, 70), split=split, order=order)
    tensors = {"0": ArrayTensor(source), "1": ArrayTensor(-source)}
    wanted = source.reshape(split).transpose(order)
    params = fill(tensors, [row], {"w": abstract((2, *wanted.shape))})
    np.testing.assert_array_equal(params["w"], np.stack([wanted, -wanted]))
    back = spill(params, [row])
    for name, tensor in tensors.items():
        assert back[name].shape == (15, 70)
        np.testing.assert_array_equal(tensors_lib.read(back[name]), tensor.array)


@pytest.mark.parametrize(
    "spec", [("data", None, None), (None, "fsdp", "tensor"), ("tensor", "data")]
)
def test_a_parameter_is_filled_where_it_lives(spec):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    where = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
    source = np.random.default_rng(0).normal(size=(4, 24)).astype(np.float32)
    row = Row(target="w", sources=("{i}",), shape=(4, 24), split=(4, 3, 8), order=(2, 0, 1))
    tensors = {str(i): ArrayTensor(source + i) for i in range(2)}
    wanted = np.stack([(source + i).reshape(4, 3, 8).transpose(2, 0, 1) for i in range(2)])
    params = fill(tensors, [row], {"w": abstract((2, 8, 4, 3), where=where)})
    assert params["w"].sharding == where
    np.testing.assert_array_equal(params["w"], wanted)
    np.testing.assert_array_equal(tensors_lib.read(spill(params, [row])["1"]), source + 1)


@pytest.mark.parametrize("given", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_numbers_are_cast_as_numpy_casts_them(given, wanted):
    source = np.random.default_rng(0).normal(size=(130, 3)).astype(tensors_lib.STORED_DTYPES[given])
    row = Row(target="w", sources=("w",), shape=(130, 3), order=(1, 0))
    w = fill({"w": ArrayTensor(source)}, [row], {"w": abstract((3, 130), wanted)})["w"]
    assert w.dtype == wanted
    np.testing.assert_array_equal(w, source.T.astype(tensors_lib.STORED_DTYPES[wanted]))


def test_position_embeddings_of_another_grid_are_resampled():
    row = Row(target="w", sources=("p",), shape=(9, 1), split=(1, 9, 1), resample=True)
    source = np.float32([[0], [2], [4], [6]])
    tensors = {"p": ArrayTensor(source)}
    w = fill(tensors, [row], {"w": abstract((1, 9, 1))})["w"]
    np.testing.assert_allclose(np.ravel(w), [0, 1, 2, 2, 3, 4, 4, 5, 6])
    [line] = match(tensors, [row], {"w": abstract((1, 9, 1))})
    assert line.transform == "resample from (4, 1), reshape (1, 9, 1)"
    with pytest.raises(UserError, match=r"p: shape \(5, 1\), wanted \(9, 1\)"):
        match({"p": ArrayTensor(np.zeros((5, 1), np.float32))}, [row], {"w": abstract((1, 9, 1))})


def test_the_report_says_what_became_of_each_source():
    [line] = match(checkpoint(q=SOURCE), [HEADS], {"w": abstract((2, 2, 3))})
    assert line == rows_lib.Converted(
        source="q",
        target="w",
        shape=(6, 2),
        dtype="float32",
        transform="reshape (2, 3, 2), transpose (0, 2, 1)",
    )


def test_all_offenders_are_listed_at_once():
    rows = [
        HEADS,
        Row(target="x", sources=("x",), shape=(2,)),
        Row(target="y", sources=("y",), shape=(2,)),
    ]
    given = checkpoint(q=SOURCE[:5], x=np.zeros(2, np.int32), lora=np.zeros(1, np.float32))
    shapes = {"w": abstract((2, 2, 3)), "x": abstract((2,)), "y": abstract((2,))}
    with pytest.raises(UserError) as error:
        match(given, rows, shapes, path="a.npz")
    message = str(error.value)
    assert message.startswith("4 tensors of a.npz do not fit the model")
    assert "q: shape (5, 2), wanted (6, 2) for w (in a.npz)" in message
    assert "x: dtype int32, wanted one of float32, bfloat16, float16 (in a.npz)" in message
    assert "y: missing, wanted for y" in message
    assert "lora: no parameter takes it (in a.npz)" in message


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(dtype, value):
    broken = SOURCE.astype(dtype)
    broken[4, 1] = value
    with pytest.raises(UserError, match=r"tensor q \(in a.npz\) holds numbers that are not finite"):
        fill(checkpoint(q=broken), [HEADS], {"w": abstract((2, 2, 3))})
