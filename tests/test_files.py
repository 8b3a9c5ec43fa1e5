"""Files and folders are there whole or not at all."""

import pytest

from deevisum_jax import files
from deevisum_jax.errors import UserError


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


def test_a_failure_leaves_neither_a_folder_nor_its_parents(tmp_path):
    def fail():
        with files.whole_folder(tmp_path / "a" / "b") as folder:
            (folder / "half").write_text("half")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exists", [True, False])
def test_two_runs_side_by_side_keep_to_themselves(tmp_path, exists):
    """`--out res/a/summary` and `--out res/b/summary` both grow in res/ when a and b are new."""
    outs = [tmp_path / name / "summary" for name in "ab"]
    if exists:
        for out in outs:
            out.mkdir(parents=True)
    with files.whole_folder(outs[0]) as first:
        (first / "summary.json").write_text("a")
        with files.whole_folder(outs[1]) as second:
            (second / "summary.json").write_text("b")
    assert [(out / "summary.json").read_text() for out in outs] == ["a", "b"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_of_two_runs_into_one_folder_the_later_is_refused(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    later = files.whole_folder(out)
    (later.__enter__() / "summary.json").write_text("later")
    with files.whole_folder(out) as first:
        (first / "summary.json").write_text("first")
    with pytest.raises(UserError, match="was filled in the meantime"):
        later.__exit__(None, None, None)
    assert [path.read_text() for path in out.iterdir()] == ["first"]
