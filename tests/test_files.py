"""Files are there whole or not at all."""

import pytest

from deevisum_jax import files


def test_what_was_there_is_replaced(tmp_path):
    path = tmp_path / "report.json"
    files.write_whole(path, "old")
    files.write_whole(path, b"new")
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "video.mp4"
    path.write_text("whole")

    def write_half():
        with files.replacing(path) as temporary:
            temporary.write_text("ha")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]
