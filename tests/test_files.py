"""Files and folders are there whole or not at all, in buckets too."""

import os
import pathlib
import tempfile

import fsspec
import pytest
from etils import epath

from deevisum_jax import files
from deevisum_jax.errors import UserError
from tests.gcs_server import READ_ONLY


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


def test_content_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, sync, synced = tmp_path / "report.json", os.fsync, []

    def noted(stream):
        sync(stream)
        synced.append((stream.read(), path.exists()))

    monkeypatch.setattr(os, "fsync", noted)
    files.write_whole(path, "whole")
    assert synced == [(b"whole", False)]


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


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> pathlib.Path:
    """The folder of this machine's temporary files, empty."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def listed(folder: epath.Path) -> list[str]:
    """Every object under an address, by its name there."""
    found = fsspec.filesystem("gs").find(os.fspath(folder))
    return [f"gs://{name}".removeprefix(f"{os.fspath(folder)}/") for name in found]


def test_a_file_in_a_bucket_is_replaced(bucket, temporary):
    path = bucket / "report.html"
    assert not files.exists(path)
    files.write_whole(path, "old")
    files.write_whole(path, b"n\r\new")
    assert path.read_bytes() == b"n\r\new"
    assert fsspec.filesystem("gs").info(os.fspath(path))["contentType"] == "text/html"
    assert listed(bucket) == ["report.html"]
    assert list(temporary.iterdir()) == []


def test_an_interrupted_write_leaves_the_object_that_was_there(bucket, temporary):
    path = bucket / "video.mp4"
    files.write_whole(path, "whole")

    def write_half():
        with files.replacing(path) as here:
            here.write_text("ha")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert path.read_text() == "whole"
    assert list(temporary.iterdir()) == []


def test_the_marker_of_a_folder_reaches_a_bucket_last(gcs, bucket, temporary):
    with files.whole_folder(bucket / "out", "b.json") as folder:
        (folder / "stills").mkdir()
        for name in ("a.txt", "b.json", "c.txt", "stills/0.jpg"):
            (folder / name).write_text(name)
    assert gcs.written[-1].endswith("/out/b.json")
    assert listed(bucket) == ["out/a.txt", "out/b.json", "out/c.txt", "out/stills/0.jpg"]
    assert (bucket / "out" / "stills" / "0.jpg").read_text() == "stills/0.jpg"
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("broken", ["a.txt", "b.json"])
def test_a_failed_upload_leaves_nothing(gcs, bucket, temporary, broken):
    gcs.refuses = broken

    def upload():
        with files.whole_folder(bucket / "out", "b.json") as folder:
            for name in ("a.txt", "b.json", "c.txt"):
                (folder / name).write_text(name)

    with pytest.raises(UserError, match="cannot be written: you have no right to"):
        upload()
    assert listed(bucket) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("times", [1, 9])
def test_what_another_start_clears_during_an_upload_is_uploaded_again(
    bucket, temporary, monkeypatch, times
):
    client = fsspec.filesystem("gs")
    put, left = client.put, [None] * times

    def cleared_at_once(*args):
        put(*args)
        if left:
            left.pop()
            files.clear_unfinished(bucket, "b.json", {"out"})

    monkeypatch.setattr(client, "put", cleared_at_once)

    def upload():
        with files.whole_folder(bucket / "out", "b.json") as folder:
            for name in ("a.txt", "b.json", "c.txt"):
                (folder / name).write_text(name)

    if times == 1:
        upload()
        assert listed(bucket) == ["out/a.txt", "out/b.json", "out/c.txt"]
    else:
        with pytest.raises(UserError, match=r"out loses what is written there \(a.txt, c.txt\)"):
            upload()
        assert listed(bucket) == []


def test_a_folder_that_was_finished_while_others_were_looked_at_is_not_cleared(bucket, monkeypatch):
    objects = files._objects
    for name in ("a.txt", "b.json"):
        files.write_whole(bucket / "out" / name, name)
    # The marker is not in the listing: it came since.
    monkeypatch.setattr(files, "_objects", lambda folder: objects(folder)[:1])
    files.clear_unfinished(bucket, "b.json", {"out"})
    assert listed(bucket) == ["out/a.txt", "out/b.json"]


def test_a_folder_in_a_bucket_that_holds_something_is_refused(bucket):
    files.write_whole(bucket / "out" / "mine.txt", "mine")
    with (
        pytest.raises(UserError, match="holds something already"),
        files.whole_folder(bucket / "out"),
    ):
        pytest.fail("it must not come to work")
    assert listed(bucket) == ["out/mine.txt"]


@pytest.mark.parametrize(
    ("address", "messages"),
    [
        ("gs://absent/out", ["there is no bucket gs://absent", "buckets create gs://absent)"]),
        (f"gs://{READ_ONLY}/out", ["no right to", "application-default login", READ_ONLY]),
    ],
)
def test_a_bucket_that_takes_nothing_is_named_before_any_work(gcs, address, messages):
    for write in (
        lambda: files.whole_folder(files.locate(address)).__enter__(),
        lambda: files.write_whole(files.locate(address) / "file", "text"),
    ):
        with pytest.raises(UserError) as refused:
            write()
        assert str(refused.value).startswith(f"{address}")
        assert all(message in str(refused.value) for message in messages)


@pytest.mark.parametrize(("scheme", "install"), [("gs", '-e ".[gcs]"'), ("s3", "s3fs")])
def test_without_a_client_the_next_step_is_to_install_it(monkeypatch, scheme, install):
    def absent(*args, **kwargs):
        raise ImportError("no such client")

    monkeypatch.setattr(fsspec, "filesystem", absent)
    with pytest.raises(UserError) as refused:
        files.write_whole(files.locate(f"{scheme}://bucket/file"), "text")
    assert f"no client for such buckets is installed; pip install {install}" in str(refused.value)


def test_an_address_that_became_a_path_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = pathlib.Path("gs://bucket/out")  # "gs:/bucket/out"
    with pytest.raises(UserError, match="is in a bucket"), files.whole_folder(out):
        pytest.fail("it must not come to work")
    assert list(tmp_path.iterdir()) == []


def test_an_address_with_a_slash_too_few_is_no_path():
    with pytest.raises(UserError, match=r"gs:/b/a\.mp4 lacks a slash; write gs://b/a\.mp4"):
        files.locate("gs:/b/a.mp4")


def test_room_for_a_bucket_is_that_of_temporary_files(gcs, temporary):
    files.check_room(files.locate("gs://tests/out"), 1)
    with pytest.raises(UserError, match=r"disk of temporary files has .* set TMPDIR to another"):
        files.check_room(files.locate("gs://tests/out"), 10**18)
    with pytest.raises(UserError, match=r"its disk has .* give --out another"):
        files.check_room(temporary / "new" / "out", 10**18)


def test_a_copy_of_an_object_lasts_as_long_as_it_is_needed(bucket, temporary):
    for name in ("talk.mp4", "talk.en.srt", "talk.jpg", "other.srt"):
        files.write_whole(bucket / name, name)
    with files.local_copy(bucket / "talk.mp4", beside=(".srt",)) as here:
        assert here.name == "talk.mp4"
        assert {path.name: path.read_text() for path in here.parent.iterdir()} == {
            "talk.mp4": "talk.mp4",
            "talk.en.srt": "talk.en.srt",
        }
    assert list(temporary.iterdir()) == []
    with files.local_copy(epath.Path(temporary) / "x") as here:
        assert here == temporary / "x"
    with (
        pytest.raises(UserError, match=r"absent\.mp4 does not exist"),
        files.local_copy(bucket / "absent.mp4"),
    ):
        pytest.fail("it is not there")


def test_what_others_write_into_a_bucket_is_seen(bucket):
    """A client that keeps listings would not see it."""
    files.write_whole(bucket / "first", "1")
    assert [path.name for path in bucket.iterdir()] == ["first"]
    assert not files.exists(bucket / "second")
    other = fsspec.filesystem("gs", skip_instance_cache=True)
    other.pipe_file(os.fspath(bucket / "second"), b"2")
    assert sorted(path.name for path in bucket.iterdir()) == ["first", "second"]
    assert files.exists(bucket / "second")


def test_only_what_is_called_alike_is_copied_with_a_file(bucket, temporary, monkeypatch):
    there = ("1.mp4", "1.srt", "1.en.srt", "10.srt", "19.srt", "1.d/1.srt")
    for name in there:
        files.write_whole(bucket / name, name)
    with files.local_copy(bucket / "1.mp4", beside=(".srt",)) as here:
        assert sorted(path.name for path in here.parent.iterdir()) == ["1.en.srt", "1.mp4", "1.srt"]
    # ---- Without the endings nothing is listed ----
    monkeypatch.setattr(fsspec.filesystem("gs"), "find", lambda *_, **__: pytest.fail("listed"))
    with files.local_copy(bucket / "1.mp4") as here:
        assert [path.name for path in here.parent.iterdir()] == ["1.mp4"]


def test_what_killed_writers_left_of_a_file_is_removed_when_it_is_old(tmp_path):
    left = [tmp_path / f".{name}.0123abcd.partial" for name in ("a.json", "young.json", "b.json")]
    for path in left:
        path.write_text("half")
    for path in (left[0], left[2]):
        os.utime(path, (0, 0))
    files.clear_unfinished(epath.Path(tmp_path), "marker", {"a.json", "young.json"})
    assert sorted(tmp_path.iterdir()) == sorted(left[1:])


@pytest.mark.parametrize("where", ["here", "bucket"])
def test_what_killed_writers_left_is_told_from_whole_folders(where, bucket, tmp_path):
    home = bucket if where == "bucket" else epath.Path(tmp_path)
    assert files.is_empty(home)
    for name in ("a", "b"):
        with files.whole_folder(home / name, "marker") as folder:
            for file in ("x", "marker"):
                (folder / file).write_text(name)
    # A killed writer leaves objects without the marker; here, a folder under a temporary name.
    left = ("c", "d") if where == "bucket" else (".c.0123abcd.partial", ".d.0123abcd.partial")
    for name in left:
        if where == "here":
            (home / name).mkdir()
        files.write_whole(home / name / "x", "half")
    if where == "here":
        files.write_whole(home / left[0] / "marker", "half")
    assert not files.is_empty(home)
    assert files.whole_folders(home, "marker") == {"a", "b"}
    files.clear_unfinished(home, "marker", {"a", "c"})
    assert sorted(path.name for path in home.iterdir()) == sorted(["a", "b", left[1]])
    assert (home / "a" / "x").read_text() == "a"
