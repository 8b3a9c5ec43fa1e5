"""The community's HDF5 files: what is accepted in which form, and what is refused by field."""

import pathlib

import h5py
import numpy as np
import pytest

from deevisum_jax.errors import UserError
from tests import official_files
from tfds_builders import community_features

IDS = ("a", "b")


@pytest.fixture
def path(tmp_path) -> pathlib.Path:
    """Features of two videos of 60 frames."""
    return official_files.write_features(tmp_path / "f.h5", IDS)


def put(path: pathlib.Path, name: str, value: object, **options: object) -> int:
    """Another field of the first video; returns where in the file it begins, if it has options."""
    with h5py.File(path, "r+") as file:
        file["video_1"].pop(name)
        made = file["video_1"].create_dataset(name, data=value, **options)
        return made.id.get_chunk_info(0).byte_offset if options else 0


def refused(path: pathlib.Path) -> str:
    with pytest.raises(UserError) as caught:
        community_features.read(path, IDS)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_frames", [60]),
        ("n_frames", [[60.0]]),
        ("n_steps", [[4]]),
        ("gtscore", np.linspace(0, 1, 4)[:, None]),
        ("picks", [[0.0, 15.0, 30.0, 45.0]]),
        ("n_frame_per_seg", [[30], [30]]),
        ("video_name", ["a"]),
        ("video_name", np.array([[b"a"]])),
    ],
)
def test_numbers_in_arrays_and_lists_in_tables_are_as_good(path, name, value):
    before = community_features.read(path, IDS)["a"]
    put(path, name, value)
    after = community_features.read(path, IDS)["a"]
    for field, wanted in vars(before).items():
        np.testing.assert_array_equal(getattr(after, field), wanted, err_msg=field)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gtscore", 0.5, r"gtscore is of shape \[\], wanted a list"),
        ("picks", 3, r"picks is of shape \[\], wanted a list"),
        ("picks", [0, 15.5, 30, 45], "picks holds what is no whole number"),
        ("n_frames", [60, 60], r"n_frames is of shape \[2\], wanted one number"),
        ("n_frames", np.nan, "n_frames holds what is not a finite"),
        ("n_frames", "sixty", r"n_frames holds \|S5, wanted numbers"),
        ("features", np.ones(4), r"features is of shape \[4\], wanted a table"),
        ("features", np.full((4, 8), 7e4), "features go up to 70000, and float16"),
        ("change_points", np.ones((2, 3)), r"change_points is of shape \[2, 3\], wanted \[S, 2\]"),
        ("user_summary", np.full((3, 60), np.nan), "user_summary holds what is not a finite"),
        ("user_summary", h5py.Empty("f"), "user_summary holds object"),
    ],
)
def test_other_forms_are_refused_by_file_video_and_field(path, name, value, message):
    put(path, name, value)
    with pytest.raises(UserError, match=message) as caught:
        community_features.read(path, IDS)
    assert str(caught.value).startswith(f"{path}, group 'video_1' (a): ")


def test_groups_and_arrays_in_each_others_place(path):
    with h5py.File(path, "r+") as file:
        del file["video_1/picks"]
        file.create_group("video_1/picks")
    assert "group 'video_1' (a): picks is a group, wanted an array" in refused(path)
    with h5py.File(path, "r+") as file:
        del file["video_1"]
        file["video_1"] = [1, 2]
    assert f"{path}, group 'video_1' is no group of a video" in refused(path)


@pytest.mark.parametrize("name", [np.bytes_(b"\xff\xfe"), 7, ["a", "b"]])
def test_a_name_that_is_no_text(path, name):
    put(path, "video_name", name)
    assert f"{path}, group 'video_1': video_name is no text" in refused(path)


def test_a_damaged_array(path):
    place = put(path, "features", np.ones((4, 8)), chunks=(4, 8), compression="gzip")
    data = bytearray(path.read_bytes())
    data[place : place + 8] = b"rubbish!"
    path.write_bytes(data)
    assert f"{path}, group 'video_1' (a): features cannot be read (" in refused(path)


def test_a_video_that_is_there_twice(path):
    put(path, "video_name", "b")
    assert f"{path}, group 'video_2': b is in the file twice" in refused(path)
