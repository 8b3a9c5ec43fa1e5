"""Archives as numpy writes them: the same arrays come back, and nothing damaged does."""

import concurrent.futures
import io
import pathlib
import random
import re
import zipfile

import ml_dtypes
import numpy as np
import pytest
from etils import epath

from deevisum_jax.convert import npz, tensors
from deevisum_jax.errors import UserError
from tests.checkpoint_files import BucketFile

ARRAYS = {
    "params/img/pos_embedding": np.arange(24, dtype=np.float32).reshape(1, 4, 6) / 7,
    "params/llm/final_norm/scale": np.arange(5, dtype=ml_dtypes.bfloat16) / 3,
    "half": np.linspace(-1, 1, 9, dtype=np.float16).reshape(3, 3),
    "step": np.int64(7),  # no dimensions
    "none": np.zeros((0, 4), np.float32),
}


def in_memory(arrays) -> dict[str, tensors.ArrayTensor]:
    return {name: tensors.ArrayTensor(np.asarray(array)) for name, array in arrays.items()}


def assert_same(found, arrays):
    assert list(found) == list(arrays)
    for name, array in arrays.items():
        assert found[name].shape == array.shape, name
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(tensors.read(found[name]), array, err_msg=name)


def members(path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def npy_bytes(header: str, data: bytes = b"", version: int = 1) -> bytes:
    length = len(header).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + header.encode() + data


def archive_of(path, content: bytes, name="a.npy") -> pathlib.Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, content)
    return path


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    return tmp_path / "weights.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("kind", [str, pathlib.Path, epath.Path])
def test_what_numpy_wrote_comes_back(path, save, kind):
    save(path, **ARRAYS)
    found = npz.open_npz(kind(path))
    assert_same(found, ARRAYS)
    assert {tensor.file for tensor in found.values()} == {str(path)}


def test_a_bucket_is_read(path):
    np.savez(path, **ARRAYS)
    objects = {"gs://bucket/weights.npz": path.read_bytes()}
    with epath.testing.mock_epath(open=lambda _, name, mode: BucketFile(objects[name])):
        found = npz.open_npz("gs://bucket/weights.npz")
        assert found["half"].file == "gs://bucket/weights.npz"
        assert_same(found, ARRAYS)


def test_the_archive_is_what_numpy_writes(path, tmp_path):
    npz.write_npz(path, in_memory(ARRAYS))
    np.savez(tmp_path / "numpy.npz", **ARRAYS)
    assert members(path) == members(tmp_path / "numpy.npz")
    assert {info.compress_type for info in zipfile.ZipFile(path).infolist()} == {0}
    assert [other.name for other in tmp_path.glob(".*")] == []  # nothing temporary is left


def test_numpy_and_big_vision_read_it(path):
    npz.write_npz(path, in_memory(ARRAYS))
    with np.load(path, allow_pickle=False) as loaded:
        for name, array in ARRAYS.items():
            value = loaded[name]
            if value.dtype.type is np.void:  # as in big_vision's `recover_dtype`
                assert value.itemsize == 2
                value = value.view(ml_dtypes.bfloat16)
            assert value.dtype == array.dtype
            np.testing.assert_array_equal(value, array)


def test_the_same_tensors_give_the_same_bytes(path):
    written = []
    for _ in range(2):
        npz.write_npz(path, in_memory(ARRAYS))
        written.append(path.read_bytes())
    assert written[0] == written[1]
    assert zipfile.ZipFile(path).infolist()[0].date_time == (1980, 1, 1, 0, 0, 0)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("unit", "rows"), [(1, [3, 3, 3, 1]), (5, [5, 5]), (10, [10])])
def test_slabs_hold_whole_units(path, monkeypatch, save, unit, rows):
    monkeypatch.setattr(tensors, "SLAB_BYTES", 3 * 8 * 4)  # three rows of eight float32
    array = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
    save(path, a=array)
    tensor = npz.open_npz(path)["a"]
    slabs = [slab.copy() for slab in tensor.slabs(unit)]
    assert [len(slab) for slab in slabs] == rows
    np.testing.assert_array_equal(np.concatenate(slabs), array)


def test_fortran_order_comes_back_in_rows(path, monkeypatch):
    monkeypatch.setattr(tensors, "SLAB_BYTES", 2 * 12 * 4)  # two rows
    array = np.arange(60, dtype=np.float32).reshape(5, 3, 4)
    np.savez(path, a=np.asfortranarray(array))
    assert b"'fortran_order': True" in members(path)["a.npy"]
    slabs = list(npz.open_npz(path)["a"].slabs())
    assert [slab.shape for slab in slabs] == [(2, 3, 4), (2, 3, 4), (1, 3, 4)]
    assert all(slab.flags.c_contiguous for slab in slabs)
    np.testing.assert_array_equal(np.concatenate(slabs), array)


def test_threads_may_read_at_the_same_time(path):
    arrays = {str(i): np.full((1000, 100), i, np.float32) for i in range(4)}
    np.savez(path, **arrays)
    found = npz.open_npz(path)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: tensors.read(found[str(i % 4)]), range(32)))
    for i, array in enumerate(read):
        np.testing.assert_array_equal(array, arrays[str(i % 4)])


def test_dtypes_of_no_weights_are_left_to_the_caller(path):
    arrays = {"ids": np.arange(3), "text": np.array(["no", "yes"]), "flag": np.array([True])}
    np.savez(path, **arrays)
    assert_same(npz.open_npz(path), arrays)


def test_a_failed_write_leaves_what_was_there(path):
    class Broken(tensors.ArrayTensor):
        def slabs(self, unit=1):
            raise UserError("the source is damaged")

    npz.write_npz(path, in_memory({"a": np.ones(3, np.float32)}))
    before = path.read_bytes()
    with pytest.raises(UserError, match="the source is damaged"):
        npz.write_npz(path, {"a": Broken(np.ones(4, np.float32))})
    assert path.read_bytes() == before
    assert [other.name for other in path.parent.iterdir()] == [path.name]


# Bad input.


def test_a_missing_file(path):
    with pytest.raises(UserError, match=r"weights\.npz does not exist"):
        npz.open_npz(path)


def test_a_folder(path):
    path.mkdir()
    with pytest.raises(UserError, match=r"weights\.npz cannot be opened: .*directory"):
        npz.open_npz(path)


@pytest.mark.parametrize("content", [b"", b"PK", b"<html>Not found</html>" * 100])
def test_no_zip(path, content):
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.npz is no \.npz archive, or not complete"):
        npz.open_npz(path)


def test_a_truncated_archive(path):
    np.savez(path, **ARRAYS)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match=r"weights\.npz is no \.npz archive, or not complete"):
        npz.open_npz(path)


def test_an_archive_that_was_cut_after_it_was_opened(path):
    np.savez(path, a=np.ones(1000, np.float32))
    tensor = npz.open_npz(path)["a"]
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"weights\.npz: tensor 'a' cannot be read"):
        tensors.read(tensor)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_bit_is_found_before_the_last_slab(path, monkeypatch, save):
    monkeypatch.setattr(tensors, "SLAB_BYTES", 10_000)
    save(path, good=np.ones(3), bad=np.random.default_rng(0).integers(0, 256, 30_000, np.uint8))
    info = zipfile.ZipFile(path).getinfo("bad.npy")
    content = bytearray(path.read_bytes())
    content[info.header_offset + info.compress_size // 2 + 100] ^= 4
    path.write_bytes(content)
    found = npz.open_npz(path)
    assert tensors.read(found["good"]).tolist() == [1, 1, 1]
    slabs = []
    with pytest.raises(UserError, match=r"weights\.npz: tensor 'bad' cannot be read"):
        slabs.extend(map(len, found["bad"].slabs()))
    assert len(slabs) < 3


def test_pickled_objects_are_never_loaded(path):
    np.savez(path, a=np.array([{}], dtype=object))
    with pytest.raises(UserError, match=r"weights\.npz: tensor 'a' .*pickled objects"):
        npz.open_npz(path)


@pytest.mark.parametrize("name", ["README.txt", "params/"])
def test_a_member_that_is_no_array(path, name):
    archive_of(path, b"", name)
    with pytest.raises(UserError, match=rf"weights\.npz: '{name}' is no \.npy array"):
        npz.open_npz(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no header of an array: EOF"),
        (b"no array at all", "no header of an array: the magic string is not correct"),
        (npy_bytes("{}", version=3), "version (3, 0)"),
        (npy_bytes("{'descr': '<f4'}"), "does not contain the correct keys"),
        (npy_bytes("["), "no header of an array"),
        (npy_bytes("(" * 5000), "no header of an array"),
        (npy_bytes("{[]: 1}"), "no header of an array"),
        (npy_bytes("__import__('os')"), "no header of an array"),
        (npy_bytes(" " * 20_000 + "{}", version=2), "no header of an array"),
    ],
)
def test_a_damaged_header(path, content, message):
    archive_of(path, content)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        npz.open_npz(path)
    assert "weights.npz: tensor 'a' cannot be read" in str(caught.value)


def header(shape="(2,)", descr="'<f4'", fortran="False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, }}\n"


@pytest.mark.parametrize(
    "shape",
    [
        "(-2,)",
        "(-1, -2)",
        "(True, 2)",
        "(2.0,)",
        "[2]",
        f"({10**30}, 0)",
        f"({2**62}, 0)",
        f"({'1,' * 70}2)",
    ],
)
def test_an_impossible_shape(path, shape):
    archive_of(path, npy_bytes(header(shape), bytes(8)))
    with pytest.raises(UserError, match=r"weights\.npz: tensor 'a' .*shape"):
        npz.open_npz(path)


@pytest.mark.parametrize(
    ("shape", "wanted"), [("(3,)", 12), ("(1,)", 4), (f"({2**40},)", 2**42), ("()", 4)]
)
def test_more_or_less_data_than_the_header_says(path, shape, wanted):
    archive_of(path, npy_bytes(header(shape), bytes(8)))
    with pytest.raises(UserError, match=rf"tensor 'a' .*has 8 bytes, but .* takes {wanted}"):
        npz.open_npz(path)


@pytest.mark.parametrize(
    ("descr", "named"),
    [
        ("'|V8'", "V8"),
        ("[('x', '<f4'), ('y', '<f4')]", "V8"),
        ("[('x', 'u1'), ('y', 'u1')]", "V2"),
        ("'>f4'", ">f4"),
        ("'<U0'", "U0"),
    ],
)
def test_no_numbers(path, descr, named):
    archive_of(path, npy_bytes(header(descr=descr), bytes(8)))
    with pytest.raises(UserError, match=rf"tensor 'a' .*holds .?{named}, no numbers"):
        npz.open_npz(path)


def test_a_name_that_is_there_twice(path):
    content = npy_bytes(header(), bytes(8))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", content)
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.npy", content)
    with pytest.raises(UserError, match=r"weights\.npz: tensor 'a' is in it twice"):
        npz.open_npz(path)


def test_a_compression_that_numpy_does_not_use(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
        archive.writestr("a.npy", npy_bytes(header(), bytes(8)))
    with pytest.raises(UserError, match=r"tensor 'a' is encrypted or compressed in another way"):
        npz.open_npz(path)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_wherever_a_byte_is_damaged_it_is_noticed_or_does_not_matter(path, save):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(2, np.float16)}
    buffer = io.BytesIO()
    save(buffer, **arrays)
    whole = buffer.getvalue()
    generator = random.Random(0)
    noticed = 0
    for place in range(len(whole)):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ generator.randrange(1, 256)]) + whole[place + 1 :]
        )
        try:
            found = npz.open_npz(path)
            read = {name: tensors.read(tensor) for name, tensor in found.items()}
        except UserError:
            noticed += 1
            continue
        # The list at the end may lose a name to its neighbour's comment: then a tensor is missing.
        assert read.keys() <= arrays.keys(), place
        for name, array in read.items():
            np.testing.assert_array_equal(array, arrays[name], err_msg=str(place))
    assert noticed > len(whole) / 2
