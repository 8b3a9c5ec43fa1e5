"""Safetensors both ways against the library, and all that can be wrong with a file or an index."""

import concurrent.futures
import json
import pathlib
import random

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from etils import epath
from huggingface_hub import split_torch_state_dict_into_shards

from deevisum_jax.convert import safetensors as st
from deevisum_jax.convert import tensors
from deevisum_jax.errors import UserError
from tests.checkpoint_files import BucketFile

ARRAYS = {
    "language_model.model.norm.weight": np.arange(5, dtype=ml_dtypes.bfloat16) / 3,
    "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4) / 7,
    "half": np.linspace(-1, 1, 9, dtype=np.float16).reshape(3, 3),
    "scalar": np.array(2.5, np.float32),  # no dimensions
    "none": np.zeros((0, 4), np.float32),
    "wörter": np.ones(3, np.float32),
}


def in_memory(arrays) -> dict[str, tensors.ArrayTensor]:
    return {name: tensors.ArrayTensor(array) for name, array in arrays.items()}


def assert_same(found, arrays):
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].shape == array.shape, name
        assert found[name].dtype == array.dtype, name
        np.testing.assert_array_equal(tensors.read(found[name]), array, err_msg=name)


def as_torch(array: np.ndarray) -> torch.Tensor:
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)


def matrices(*num_rows: int) -> dict[str, np.ndarray]:
    """Arrays "0", "1" ... of so many kilobytes each."""
    return {str(i): np.full((n, 250), i, np.float32) for i, n in enumerate(num_rows)}


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("kind", [str, pathlib.Path, epath.Path])
def test_what_the_library_wrote_comes_back(path, kind):
    arrays = {name: array for name, array in ARRAYS.items() if array.dtype != ml_dtypes.bfloat16}
    safetensors.numpy.save_file(arrays, path, metadata={"format": "np"})
    found = st.open_safetensors(kind(path))
    assert_same(found, arrays)
    assert {tensor.file for tensor in found.values()} == {str(path)}


def test_what_torch_wrote_comes_back(path):
    safetensors.torch.save_file({name: as_torch(array) for name, array in ARRAYS.items()}, path)
    assert_same(st.open_safetensors(path.parent), ARRAYS)


def test_dtypes_of_no_weights_are_left_to_the_caller(path):
    dtypes = ["bool", "u1", "i1", "i2", "u2", "i4", "u4", "f8", "i8", "u8"]
    arrays = {dtype: np.arange(3).astype(dtype) for dtype in dtypes}
    safetensors.numpy.save_file(arrays, path)
    assert_same(st.open_safetensors(path), arrays)


def test_the_library_writes_the_same_bytes(path, tmp_path):
    written = st.write_safetensors(tmp_path, in_memory(ARRAYS))
    assert written == ["model.safetensors"]
    safetensors.torch.save_file(
        {name: as_torch(array) for name, array in ARRAYS.items()},
        tmp_path / "library.safetensors",
        metadata={"format": "pt"},
    )
    assert path.read_bytes() == (tmp_path / "library.safetensors").read_bytes()
    loaded = safetensors.torch.load_file(path)
    assert loaded["language_model.model.norm.weight"].dtype == torch.bfloat16


def test_one_file_without_metadata(path):
    st.write_safetensors_file(path, in_memory(ARRAYS), {})
    with safetensors.safe_open(path, "np") as opened:
        assert opened.metadata() is None
    assert_same(st.open_safetensors(path), ARRAYS)
    assert [other.name for other in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "num_rows", [(4, 4, 3), (5, 5, 5), (6, 6, 2, 6, 2, 2), (12, 1), (3, 12, 3, 5), (1, 9, 1)]
)
def test_shards_are_filled_as_hugging_face_does(tmp_path, num_rows):
    arrays = matrices(*num_rows)
    written = st.write_safetensors(tmp_path, in_memory(arrays), max_shard_bytes=10_000)
    split = split_torch_state_dict_into_shards(
        {name: as_torch(array) for name, array in arrays.items()},
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=10_000,
    )
    index_file = "model.safetensors.index.json"
    assert written == [*split.filename_to_tensors, index_file]
    assert sorted(written) == sorted(path.name for path in tmp_path.iterdir())
    for name, held in split.filename_to_tensors.items():
        assert set(safetensors.numpy.load_file(tmp_path / name)) == set(held)
    index = json.loads((tmp_path / index_file).read_text())
    assert index == {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    assert list(index["weight_map"]) == sorted(arrays)
    assert_same(st.open_safetensors(tmp_path), arrays)


def test_as_many_bytes_as_allowed_are_one_shard(tmp_path):
    arrays = matrices(5, 5)
    for name, limit, count in (("one", 10_000, 1), ("two", 9_999, 3)):
        folder = tmp_path / name
        folder.mkdir()
        written = st.write_safetensors(
            folder, in_memory(arrays), max_shard_bytes=limit, stem="heads"
        )
        assert len(written) == count
        assert all(file.startswith("heads") for file in written)


def test_a_dtype_that_cannot_be_written(path):
    with pytest.raises(UserError, match=r"tensor 'z' is complex64, which a safetensors file"):
        st.write_safetensors_file(path, in_memory({"z": np.ones(2, np.complex64)}))
    assert not path.exists()


def test_one_file_goes_before_an_index(tmp_path):
    st.write_safetensors(tmp_path, in_memory(matrices(5, 6)), max_shard_bytes=10_000)
    st.write_safetensors(tmp_path, in_memory(ARRAYS))
    assert_same(st.open_safetensors(tmp_path), ARRAYS)


def test_a_bucket_is_read(tmp_path):
    arrays = matrices(5, 6)
    st.write_safetensors(tmp_path, in_memory(arrays), max_shard_bytes=10_000)
    objects = {f"gs://bucket/{path.name}": path.read_bytes() for path in tmp_path.iterdir()}
    with epath.testing.mock_epath(
        open=lambda _, name, mode: BucketFile(objects[name]),
        exists=lambda _, name: name in objects,
    ):
        found = st.open_safetensors("gs://bucket")
        assert found["1"].file == "gs://bucket/model-00002-of-00002.safetensors"
        assert_same(found, arrays)


def test_links_of_a_cache_are_followed(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    arrays = matrices(5, 6)
    for name in st.write_safetensors(blobs, in_memory(arrays), max_shard_bytes=10_000):
        (blobs / name).rename(blobs / f"hash of {name}")
        (snapshot / name).symlink_to(f"../blobs/hash of {name}")
    assert_same(st.open_safetensors(snapshot), arrays)


@pytest.mark.parametrize(("unit", "rows"), [(1, [3, 3, 3, 1]), (5, [5, 5]), (10, [10])])
def test_slabs_hold_whole_units(path, monkeypatch, unit, rows):
    monkeypatch.setattr(tensors, "SLAB_BYTES", 3 * 8 * 4)  # three rows of eight float32
    array = np.random.default_rng(0).normal(size=(10, 8)).astype(np.float32)
    safetensors.numpy.save_file({"a": array, "b": array + 1}, path)
    tensor = st.open_safetensors(path)["b"]
    slabs = [slab.copy() for slab in tensor.slabs(unit)]
    assert [len(slab) for slab in slabs] == rows
    np.testing.assert_array_equal(np.concatenate(slabs), array + 1)


def test_threads_may_read_at_the_same_time(path):
    arrays = matrices(1000, 1000, 1000, 1000)
    safetensors.numpy.save_file(arrays, path)
    found = st.open_safetensors(path)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: tensors.read(found[str(i % 4)]), range(32)))
    for i, array in enumerate(read):
        np.testing.assert_array_equal(array, arrays[str(i % 4)])


# Bad files. Each has the tensor "a", of two float32, unless it says otherwise.

A = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write(path, header, data=bytes(8)) -> pathlib.Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)
    return path


def refused(path) -> str:
    """The message, which names the file and a next step."""
    with pytest.raises(UserError) as caught:
        st.open_safetensors(path)
    message = str(caught.value)
    assert str(path) in message
    assert any(step in message for step in ("download", "check the path", "give a "))
    return message


def test_the_smallest_file_is_good(path):
    assert_same(st.open_safetensors(write(path, {"a": A})), {"a": np.zeros(2, np.float32)})


def test_nothing_there(path):
    assert "does not exist" in refused(path)
    assert "holds neither model.safetensors nor" in refused(path.parent)
    assert "holds neither model.safetensors nor" in refused(path.parent / "nowhere")


def test_a_folder_named_as_a_file(path):
    path.mkdir()
    with pytest.raises(UserError, match=r"model\.safetensors cannot be opened: .*directory"):
        st.open_safetensors(path)


def test_a_name_that_no_file_can_have():
    with pytest.raises(UserError, match=r"cannot be opened: embedded null byte"):
        st.open_safetensors("a\0.safetensors")


def test_shorter_than_a_length(path):
    path.write_bytes(bytes(7))
    assert "has 7 bytes and no safetensors header" in refused(path)


@pytest.mark.parametrize("length", [9, 2**63, 100_000_001])
def test_a_header_longer_than_its_file_or_than_any(path, length):
    path.write_bytes(length.to_bytes(8, "little") + b"{}      ")
    assert f"claims a header of {length} bytes" in refused(path)


def test_a_header_above_the_limit_in_a_file_that_has_it(path):
    with path.open("wb") as stream:
        stream.write((100_000_001).to_bytes(8, "little"))
        stream.truncate(200_000_000)  # takes no space
    assert "claims a header of 100000001 bytes" in refused(path)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b'{"a": \xff}', "no JSON"),
        ("{}".encode("utf-16"), "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "no JSON object"),
        (b'{"a": {}, "a": {}}', "'a' is in it 2 times"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "'dtype' is in it 2 times"),
        (b'{"__metadata__": {"a": 1}}', "__metadata__ is no map of strings"),
        (b'{"__metadata__": []}', "__metadata__ is no map of strings"),
    ],
)
def test_a_header_that_is_none(path, header, message):
    assert message in refused(write(path, header, b""))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "is described by no JSON object"),
        ({"dtype": "F32", "shape": [2]}, "is described by ['dtype', 'shape'], not by"),
        (A | {"more": 1}, "is described by ['data_offsets', 'dtype', 'more', 'shape'], not by"),
        (A | {"dtype": "F8_E4M3"}, "has dtype 'F8_E4M3', which is none of BOOL, U8"),
        (A | {"dtype": ["F32"]}, "has dtype ['F32'], which is none of BOOL, U8"),
        (A | {"shape": 2}, "has no possible shape: 2"),
        (A | {"shape": [-2]}, "has no possible shape: [-2]"),
        (A | {"shape": [-1, -2]}, "has no possible shape: [-1, -2]"),
        (A | {"shape": [2.0]}, "has no possible shape: [2.0]"),
        (A | {"shape": [True, 2]}, "has no possible shape: [True, 2]"),
        (A | {"shape": [2**62, 0], "data_offsets": [0, 0]}, "has no possible shape"),
        (A | {"data_offsets": 8}, "has data_offsets 8, not a begin and an end"),
        (A | {"data_offsets": [0, 4, 8]}, "has data_offsets [0, 4, 8], not"),
        (A | {"data_offsets": [0.0, 8]}, "has data_offsets [0.0, 8], not"),
        (A | {"data_offsets": [-8, 0]}, "has data_offsets [-8, 0], not"),
        (A | {"data_offsets": [8, 0]}, "has data_offsets [8, 0], not"),
        (A | {"shape": [3]}, "has 8 bytes, but F32 [3] takes 12"),
        (A | {"shape": []}, "has 8 bytes, but F32 [] takes 4"),
        (A | {"data_offsets": [1, 9]}, "should end at byte 9 of the data, but the file ends at 8"),
    ],
)
def test_a_tensor_that_is_described_wrongly(path, entry, message):
    assert f"tensor 'a' {message}" in refused(write(path, {"a": entry}))


@pytest.mark.parametrize(
    ("begins", "num_bytes", "message"),
    [
        ({"a": 0, "b": 4}, 12, "tensor 'b' overlaps tensor 'a'"),
        ({"a": 0, "b": 0}, 8, "tensor 'b' overlaps tensor 'a'"),
        ({"a": 4}, 12, "the 4 bytes between the header and tensor 'a' belong to none"),
        ({"b": 10, "a": 0}, 18, "the 2 bytes between tensor 'a' and tensor 'b' belong to none"),
        ({"a": 0, "b": 8}, 17, "the 1 bytes behind tensor 'b' belong to no tensor"),
        ({}, 5, "the 5 bytes behind the header belong to no tensor"),
    ],
)
def test_bytes_of_two_tensors_or_of_none(path, begins, num_bytes, message):
    header = {name: A | {"data_offsets": [n, n + 8]} for name, n in begins.items()}
    assert message in refused(write(path, header, bytes(num_bytes)))


@pytest.mark.parametrize("missing", [1, 60, 300, 500])
def test_a_download_that_stopped(path, missing):
    safetensors.numpy.save_file(matrices(1, 1), path)
    path.write_bytes(path.read_bytes()[:-missing])
    message = refused(path)
    assert "tensor '1' should end at byte 2000 of the data" in message
    assert "the download may not be complete" in message


def test_a_file_that_was_cut_after_it_was_opened(path):
    safetensors.numpy.save_file(matrices(1, 1), path)
    found = st.open_safetensors(path)
    path.write_bytes(path.read_bytes()[:-1])
    assert tensors.read(found["0"]).max() == 0
    with pytest.raises(UserError, match=r"model\.safetensors: tensor '1' cannot be read to its"):
        tensors.read(found["1"])


def test_whatever_is_done_to_a_header_gives_an_error_or_whole_tensors(path):
    st.write_safetensors_file(path, in_memory(matrices(1, 2)))
    whole = path.read_bytes()
    generator = random.Random(0)
    noticed = 0
    for place in range(8 + int.from_bytes(whole[:8], "little")):
        damaged = bytes([whole[place] ^ generator.randrange(1, 256)])
        path.write_bytes(whole[:place] + damaged + whole[place + 1 :])
        try:
            read = [tensors.read(tensor) for tensor in st.open_safetensors(path).values()]
        except UserError:
            noticed += 1
            continue
        assert sum(array.nbytes for array in read) == 3000, place
    assert noticed > 100


# Bad folders: "0" is in the first shard, "1" in the second.

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    st.write_safetensors(tmp_path, in_memory(matrices(5, 6)), max_shard_bytes=10_000)
    return tmp_path


def write_index(folder, content):
    text = content if isinstance(content, str) else json.dumps(content)
    (folder / "model.safetensors.index.json").write_text(text)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json is no JSON"),
        ("[]", "index.json is no JSON object"),
        ({}, "index.json has no weight_map"),
        ({"weight_map": {}}, "index.json has no weight_map"),
        ({"weight_map": [FIRST]}, "index.json has no weight_map"),
        (f'{{"weight_map": {{"0": "{FIRST}", "0": "{SECOND}"}}}}', "'0' is in it 2 times"),
    ],
)
def test_an_index_that_is_none(folder, index, message):
    write_index(folder, index)
    assert message in refused(folder)


@pytest.mark.parametrize(
    "shard",
    [f"../{FIRST}", f"sub/{FIRST}", "/etc/passwd", f"..\\{FIRST}", "..", ".", "", "a\0b", 1, None],
)
def test_an_index_that_points_outside_its_folder(folder, shard):
    write_index(folder, {"weight_map": {"0": FIRST, "1": shard}})
    assert f"tensor '1' is in {shard!r}, which points outside its folder" in refused(folder)


def test_a_shard_that_is_missing(folder):
    (folder / SECOND).unlink()
    assert f"{SECOND} does not exist, but 1 tensors should be in it" in refused(folder)


def test_a_tensor_that_is_not_in_its_shard(folder):
    write_index(folder, {"weight_map": {"0": FIRST, "1": SECOND, "2": SECOND}})
    assert f"{SECOND}: tensor '2' is missing" in refused(folder)


def test_a_tensor_that_is_elsewhere(folder):
    write_index(folder, {"weight_map": {"0": SECOND, "1": FIRST}})
    assert f"{FIRST}: tensor '0' is in {SECOND} according to" in refused(folder)


def test_a_tensor_that_the_index_does_not_know(folder):
    st.write_safetensors_file(folder / SECOND, in_memory(matrices(1, 6, 6)))
    write_index(folder, {"weight_map": {"1": SECOND}})
    assert f"{SECOND}: tensor '0' is in no file according to" in refused(folder)


def test_a_damaged_shard_is_named(folder):
    (folder / SECOND).write_bytes(b"")
    assert f"{SECOND} has 0 bytes" in refused(folder)
