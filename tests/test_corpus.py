"""Many videos: the list of them, the work on them, and what is there after every kind of end."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence

import jax
import numpy as np
import pytest
from etils import epath

from deevisum_jax import config as config_lib
from deevisum_jax import corpus, experiment, files, summarize
from deevisum_jax.corpus import Corpus, Item, Steps, VideoError
from deevisum_jax.data import tokenizer
from deevisum_jax.errors import PreemptedError, UserError
from deevisum_jax.inference import staged
from deevisum_jax.models import paligemma2
from scripts import benchmark_corpus
from tests import processes, untrained
from tests.media import write_video

FPS = 6
PARTS = ("keyframes", "report.html", "summary.json", "summary.mp4")
OURS = {"corpus.json", "index.html", "index.json", "failures.csv"}


# ---- The list ----


def listed(path: pathlib.Path, text: str | bytes) -> list[Item]:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return corpus.read_manifest(files.locate(path))


def test_a_manifest_is_read_beside_its_videos(tmp_path):
    text = (
        "\ufefftitle, video ,subtitles,id\r\n"
        '"One, two",a/talk.mp4,none,\r\n'
        ",,,\r\n"
        ",/far/b.mkv,words.srt,bee\r\n"
        "Far,gs://bucket/c d.mp4,,\r\n"
    )
    assert listed(tmp_path / "videos.csv", text) == [
        Item(
            id="talk", video=epath.Path(tmp_path / "a/talk.mp4"), title="One, two", subtitles="none"
        ),
        Item(
            id="bee",
            video=epath.Path("/far/b.mkv"),
            subtitles=epath.Path(tmp_path / "words.srt"),
        ),
        Item(id="c d", video=epath.Path("gs://bucket/c d.mp4"), title="Far"),
    ]


def test_empty_cells_at_the_end_of_all_rows_are_no_column(tmp_path):
    text = b'\xef\xbb\xbf"video",title,,\r\na.mp4,A,,\r\nb.mp4,,,\r\nc.mp4\r\n'
    items = listed(tmp_path / "videos.csv", text)
    assert [(item.id, item.title) for item in items] == [("a", "A"), ("b", None), ("c", None)]


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("video;title\na.mp4;A, B\n", ["has semicolons between the cells; save it with commas"]),
        ('video;title\n"a.mp4";"A"\n', ["has semicolons between the cells"]),
        ("video\ttitle\na.mp4\tA\n", ["has tabs between the cells"]),
        ('video,title\na.mp4,A\nb.mp4,"B" C\n', ["line 3: no CSV (',' expected after '\"')"]),
        ("video\ngs:/b/a.mp4\n", ["line 2: gs:/b/a.mp4 lacks a slash; write gs://b/a.mp4"]),
        ("video,id\na.mp4,Failed\n", ["line 2: id 'Failed' is a file or folder of its own"]),
        # The same letters, composed and not.
        ("video,id\na.mp4,caf\u00e9\nb.mp4,CAFE\u0301\n", ["lines 2, 3 have the same id"]),
        ("video,title,\na.mp4,A,B\n", ["line 2 has 3 cells for 2 columns"]),
        ("", ["is empty; its first row names the columns: video, title, subtitles, id"]),
        ("\n,\n", ["is empty"]),
        ("video,title\n", ["lists no video; give it a row for each, below video,title"]),
        ("vidoe,title\na.mp4,A\n", ["columns that are not known ('vidoe': did you mean 'video'?)"]),
        ("title,id\nA,a\n", ["no column video", "it has title, id"]),
        ("video,video\na,b\n", ["names a column twice"]),
        ('video\n"a.mp4\n', ["line 2: no CSV (unexpected end of data)"]),
        (b"video\na.mp4\ncaf\xe9.mp4\n", ["line 3: not UTF-8 text"]),
        ("video,title\na.mp4,A,B\n", ["line 2 has 3 cells for 2 columns"]),
        ("video,title\n,A\n", ["line 2: the column video is empty"]),
        ("video\nhttps://a.b/c.mp4\n", ["line 2: https://a.b/c.mp4 is neither a path nor in a"]),
        ("video,id\na.mp4,../a\n", ["line 2: id '../a' is no good name of a folder"]),
        ("video,id\na.mp4,.a\n", ["line 2: id '.a' is no good name of a folder"]),
        (f"video,id\na.mp4,{'x' * 201}\n", ["xxx' is no good name of a folder"]),
        ("video,id\na.mp4,failed\n", ["line 2: id 'failed' is a file or folder of its own"]),
        (
            "video,id\nx/a.mp4,\ny/A.mkv,\nb.mp4,\nb.mp4,c\n,d\n",
            ["lines 2, 3 have the same id 'a'; tell them apart", "line 6: the column video"],
        ),
    ],
)
def test_manifests_that_cannot_be(tmp_path, text, messages):
    with pytest.raises(UserError) as refused:
        listed(tmp_path / "videos.csv", text)
    assert "videos.csv" in str(refused.value)
    assert all(message in str(refused.value) for message in messages)


def test_of_many_mistakes_in_a_manifest_the_first_are_named(tmp_path):
    with pytest.raises(UserError) as refused:
        listed(tmp_path / "videos.csv", "video,id\n" + ",x\n" * 25)
    lines = str(refused.value).splitlines()
    assert lines[1].strip() == "line 2: the column video is empty"
    assert (len(lines), lines[-1].strip()) == (12, "and 15 more")


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_shares_are_disjoint_and_complete(count):
    items = [Item(id=str(i), video=epath.Path(f"{i}.mp4")) for i in range(7)]
    shares = [corpus.share(items, index, count) for index in range(count)]
    assert sorted(item.id for one in shares for item in one) == [item.id for item in items]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# ---- The work ----


@dataclasses.dataclass
class Thing:
    """What stands for a decoded video."""

    name: str
    closed: list[str]
    num_bytes: int = 1

    def close(self) -> None:
        self.closed.append(self.name)


class Record:
    """Steps that do nothing but note when they were called; a test fills in what they do.

    Who is scored is given back when `num_held` others were taken behind it, or none is left.
    """

    def __init__(
        self, folder: pathlib.Path, names: str, num_bytes: int = 1, num_held: int = 0
    ) -> None:
        self.corpus = Corpus(epath.Path(folder))
        self.items = [Item(id=name, video=epath.Path(f"{name}.mp4")) for name in names]
        self.num_bytes, self.num_held = num_bytes, num_held
        self.done = {
            f"{step} {name}": threading.Event()
            for step in ("read", "score", "write")
            for name in names
        }
        self.order: list[str] = []
        self.closed: list[str] = []
        self.said: list[str] = []
        self.during = {}

    def run(self) -> int:
        return corpus.work(
            self.corpus,
            self.items,
            Steps(
                read=lambda item: self._do("read", item.id),
                score=self._score,
                write=lambda item, thing: self._do("write", item.id) and "fine",
            ),
            self.said.append,
        )

    def _score(self, things: Iterator[Thing]) -> Iterator[Thing | VideoError]:
        held = []
        for thing in things:
            try:
                held.append(self._do("score", thing.name))
            except VideoError as error:
                held.append(error)
            if len(held) > self.num_held:
                yield held.pop(0)
        self.order.append("all are given back")
        yield from held

    def steps(self, *names: str) -> list[str]:
        """Which steps were called, in order, of those that begin so."""
        return [key for key in self.order if key.startswith(names)]

    def _do(self, step: str, name: str) -> Thing:
        key = f"{step} {name}"
        self.order.append(key)
        if key in self.during:
            self.during[key]()
        self.done[key].set()
        return Thing(name, self.closed, self.num_bytes)

    def wait(self, key: str):
        def until_done():
            assert self.done[key].wait(30), f"{key} does not come"

        return until_done


def test_the_next_video_is_read_and_the_one_before_written_while_one_is_scored(tmp_path):
    record = Record(tmp_path, "abc")
    record.during = {
        "score b": lambda: [record.wait(key)() for key in ("read c", "write a")],
        "write b": record.wait("score c"),
    }
    assert record.run() == 0
    assert sorted(record.said) == [
        f"[{i}/3] {name}: fine (0.0 s)" for i, name in enumerate("abc", 1)
    ]
    assert sorted(record.closed) == ["a", "b", "c"]
    assert record.steps("score") == ["score a", "score b", "score c"]


def test_videos_that_fill_the_memory_are_read_one_by_one(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_MAX_BYTES", 10)
    record = Record(tmp_path, "abc", num_bytes=6)
    assert record.run() == 0
    steps = record.steps("read", "score")
    assert steps == ["read a", "score a", "read b", "score b", "read c", "score c"]


def test_videos_under_way_fill_the_memory_too(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_MAX_BYTES", 10)
    record = Record(tmp_path, "abcd", num_bytes=4, num_held=99)
    assert record.run() == 0
    assert record.steps("score", "all") == [
        "score a", "score b", "all are given back", "score c", "score d", "all are given back"
    ]  # fmt: skip
    assert record.order.index("read c") > record.order.index("all are given back")
    assert sorted(record.closed) == ["a", "b", "c", "d"]


def test_a_video_under_way_does_not_wait_for_one_that_is_slow_to_decode(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_MAX_WAIT_S", 0.01)
    record = Record(tmp_path, "ab", num_held=99)
    record.during = {"read b": record.wait("write a")}
    assert record.run() == 0
    assert record.said[0].startswith("[1/2] a: fine")


def test_a_video_under_way_does_not_wait_for_ever_while_others_come(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_MAX_WAIT_S", 0.0)
    record = Record(tmp_path, "abc", num_held=99)
    record.during = {"score a": record.wait("read b"), "score b": record.wait("read c")}
    assert record.run() == 0
    end = "all are given back"
    assert record.steps("score", "all") == ["score a", end, "score b", end, "score c", end]


def test_the_time_of_a_video_is_that_in_which_it_was_the_oldest_under_way(tmp_path, monkeypatch):
    clock = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(corpus, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    record = Record(tmp_path, "ab", num_held=1)

    def takes(seconds):
        clock.now += seconds

    record.during = {
        "score a": lambda: [record.wait("read b")(), takes(1)],
        "score b": lambda: takes(3),  # then a is given back
        "write a": lambda: [record.wait("write b")()],
    }
    monkeypatch.setattr(corpus, "_NUM_WRITERS", 2)
    assert record.run() == 0
    assert sorted(record.said) == ["[1/2] b: fine (0.0 s)", "[2/2] a: fine (4.0 s)"]


def raises(error: BaseException):
    def fail():
        raise error

    return fail


def fills_the_disk_of_temporary_files():
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError as error:
        raise UserError("cannot be written (No space left on device)") from error


@pytest.mark.parametrize("num_held", [0, 1, 99])
def test_a_failure_is_noted_and_the_rest_is_done(tmp_path, num_held):
    record = Record(tmp_path, "abcd", num_held=num_held)
    bad = VideoError(UserError("too\nshort"))
    record.during = {
        "read a": raises(KeyError("x")),
        "score b": raises(bad),
        "write c": raises(UserError("no picture")),
    }
    assert record.run() == 3
    reasons = {"a": "KeyError: 'x'", "b": "too short", "c": "no picture"}
    assert record.corpus.failures() == reasons
    assert record.done["write d"].is_set()
    assert sorted(record.closed) == ["b", "c", "d"]


@pytest.mark.parametrize(
    "during",
    [
        {"score b": raises(UserError("scores are no numbers"))},
        {"score b": raises(RuntimeError("the device is gone"))},
        {"write b": raises(OSError(errno.ENOSPC, "No space left on device"))},
        {"read b": raises(OSError(errno.ENOSPC, "No space left on device"))},
        {"read b": fills_the_disk_of_temporary_files},
    ],
)
def test_what_no_other_video_would_survive_ends_the_work(tmp_path, during):
    record = Record(tmp_path, "abcdefgh")
    record.during = during
    with pytest.raises((UserError, RuntimeError, OSError), match=r"numbers|device"):
        record.run()
    assert record.corpus.failures() == {}
    assert not record.done["score h"].is_set()


@pytest.mark.parametrize("num_held", [0, 1])
def test_a_notice_leaves_what_is_not_begun(tmp_path, num_held):
    record, last = Record(tmp_path, "abcd", num_held=num_held), "bc"[num_held]
    record.during = {
        f"score {last}": lambda: [record.wait("write a")(), raises(PreemptedError("now"))()]
    }
    with pytest.raises(PreemptedError, match="3 of the 4 videos"):
        record.run()
    assert record.corpus.failures() == {}
    read = [key.removeprefix("read ") for key in record.steps("read")]
    assert sorted(record.closed) == sorted(read)


def test_a_video_that_is_being_decoded_at_a_notice_leaves_no_copy(tmp_path):
    record, told = Record(tmp_path, "ab"), threading.Event()

    def notice(*_):
        told.set()
        raise PreemptedError("now")

    def decode():
        time.sleep(0.2)  # by then it is waited for
        signal.pthread_kill(threading.main_thread().ident, signal.SIGUSR1)
        assert told.wait(30)

    record.during = {"read a": decode}
    previous = signal.signal(signal.SIGUSR1, notice)
    try:
        with pytest.raises(PreemptedError, match="2 of the 2 videos"):
            record.run()
    finally:
        signal.signal(signal.SIGUSR1, previous)
    read = [key.removeprefix("read ") for key in record.steps("read")]
    assert "a" in read
    assert sorted(record.closed) == sorted(read)


def test_what_is_done_is_no_failure_when_an_older_one_cannot_be_removed(tmp_path, monkeypatch):
    record = Record(tmp_path, "a")
    [item] = record.items
    record.corpus.note_failure(item, "no picture")

    def fails(*_, **__):
        raise OSError("the bucket does not answer")

    monkeypatch.setattr(type(record.corpus.out), "unlink", fails)
    with record.corpus.folder(item) as folder:
        (folder / "summary.json").write_text("{}")
    assert record.corpus.done() == {"a"}
    assert record.corpus.failures() == {}


# ---- The command ----


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> pathlib.Path:
    """Six videos of 4 to 9 s, all different, and one of 2 min."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    for name, seconds in [*zip("abcdef", range(4, 10), strict=True), ("long", 120)]:
        frames = rng.integers(0, 255, (seconds * 2, 6, 8, 3))  # a picture for half a second
        frames = frames.repeat(FPS // 2, 0).repeat(8, 1).repeat(8, 2).astype(np.uint8)
        write_video(folder / f"{name}.mp4", frames, fps=FPS)
    return folder


def manifest(path: epath.Path, videos: list[str]) -> str:
    files.write_whole(path, "\n".join(["video", *map(str, videos)]) + "\n")
    return os.fspath(path)


def command(rows, run, out, *flags) -> int:
    where = ["--checkpoint", str(run), "--out", str(out)]
    return summarize.main(["--manifest", str(rows), *where, "--budget", "0.3", *flags])


def check_all(out: epath.Path, names: Sequence[str]) -> None:
    """Every summary is whole, the index has them all, and nothing else is there."""
    folders = {path.name for path in out.iterdir() if path.is_dir()} - {"failed"}
    assert folders == set(names)
    for name in names:
        assert sorted(path.name for path in (out / name).iterdir()) == sorted(PARTS)
    assert {path.name for path in out.iterdir() if not path.is_dir()} == OURS
    index = json.loads((out / "index.json").read_text())
    assert {video["id"] for video in index["videos"] if video["state"] == "done"} == set(names)
    page = (out / "index.html").read_text()
    assert all(f'href="{name}/report.html"' in page for name in names)


def written(out: pathlib.Path) -> dict[str, int]:
    """When each summary was made."""
    found = out.glob("[!.]*/summary.json")  # not in a folder that is being made
    return {path.parent.name: path.stat().st_mtime_ns for path in found}


def test_failures_are_listed_the_rest_is_done_and_a_restart_mends_them(
    run, clips, tmp_path, capsys
):
    videos = [clips / "a.mp4", tmp_path / "text.mp4", clips / "b.mp4", tmp_path / "absent.mp4"]
    videos[1].write_text("Dear diary,\n" * 99)
    rows, out = manifest(epath.Path(tmp_path) / "videos.csv", videos), epath.Path(tmp_path) / "out"
    assert command(rows, run, out) == 1
    said = capsys.readouterr()
    assert "2 of 4 videos done (2 now)" in said.out
    assert f"2 failed: see {out / 'failures.csv'}" in said.out
    assert sorted(line[:5] for line in said.err.splitlines()) == [
        "[1/4]",
        "[2/4]",
        "[3/4]",
        "[4/4]",
    ]
    check_all(out, "ab")
    with (out / "failures.csv").open("r") as stream:
        reasons = {row["id"]: (row["video"], row["reason"]) for row in csv.DictReader(stream)}
    assert reasons.keys() == {"text", "absent"}
    assert reasons["absent"][0] == str(videos[3])
    assert "no such file; check the path" in reasons["absent"][1]
    index = json.loads((out / "index.json").read_text())
    assert index["totals"] | {"selected_s": 0} == {
        "videos": 4, "done": 2, "failed": 2, "left": 0, "duration_s": pytest.approx(9),
        "selected_s": 0,
    }  # fmt: skip
    first = index["videos"][0]
    assert (first["id"], first["state"], first["title"]) == ("a", "done", "a")
    assert (out / "a" / first["still"]).exists()
    before = written(tmp_path / "out")
    (out / "failed" / ".text.json.0123abcd.partial").write_text("{")  # of a process that was killed
    # ---- Again: what is done stays, what was mended is done now ----
    shutil.copy(clips / "c.mp4", videos[1])
    assert command(rows, run, out) == 1
    assert "3 of 4 videos done (1 now)" in capsys.readouterr().out
    shutil.copy(clips / "d.mp4", videos[3])
    assert command(rows, run, out) == 0
    assert "4 of 4 videos done (1 now)" in capsys.readouterr().out
    after = written(tmp_path / "out")
    assert after.keys() == {"a", "b", "text", "absent"}
    assert {name: after[name] for name in before} == before
    assert json.loads((out / "index.json").read_text())["totals"]["failed"] == 0
    assert [path.name for path in (out / "failed").glob("*.json")] == []
    # ---- Once more: there is nothing to do, and no model is needed for it ----
    shutil.copytree(run, tmp_path / "moved")
    shutil.rmtree(tmp_path / "moved" / "checkpoints" / "1" / "params")
    assert command(rows, tmp_path / "moved", out) == 0
    assert "4 of 4 videos done (0 now)" in capsys.readouterr().out
    assert written(tmp_path / "out") == after


def test_one_folder_is_filled_in_one_way(run, clips, tmp_path, capsys):
    rows = manifest(epath.Path(tmp_path) / "videos.csv", [clips / "a.mp4"])
    other = untrained.make_run(tmp_path / "other", seed=1)
    assert command(rows, run, tmp_path / "out") == 0
    for judge, flags, message in (
        (run, ("--budget", "0.4"), "--budget is 0.3 there and 0.4 now"),
        (
            run,
            ("--exit_threshold", "0.7"),
            "--exit_threshold is 0.9 by max_probability there and 0.7 by max_probability now",
        ),
        (run, ("--exit_threshold", "off"), "there and off by max_probability now"),
        (other, (), "the digest of --checkpoint is "),
    ):
        capsys.readouterr()
        assert command(rows, judge, tmp_path / "out", *flags) == 2
        said = capsys.readouterr().err
        assert "holds summaries made in another way" in said
        assert message in said
        assert "give --out a new folder, or go on with the options, and the version, that" in said


def test_a_folder_that_an_older_version_has_begun_is_said_so(run, clips, tmp_path, capsys):
    rows = manifest(epath.Path(tmp_path) / "videos.csv", [clips / "a.mp4"])
    assert command(rows, run, tmp_path / "out") == 0
    stored = tmp_path / "out" / "corpus.json"
    kept = json.loads(stored.read_text())
    del kept["exit_policy"]
    stored.write_text(json.dumps(kept | {"exit_threshold": 0.9}))
    capsys.readouterr()
    assert command(rows, run, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "(--exit_threshold was noted otherwise by the older version that began it; of " in said
    assert "give --out a new folder, or go on with the options, and the version, that" in said


def test_another_video_of_the_same_name_is_not_taken_for_done(run, clips, tmp_path, capsys):
    for folder, name in (("old", "a"), ("new", "b")):
        (tmp_path / folder).mkdir()
        shutil.copy(clips / f"{name}.mp4", tmp_path / folder / "talk.mp4")
    out = tmp_path / "out"
    assert (
        command(manifest(epath.Path(tmp_path) / "old" / "videos.csv", ["talk.mp4"]), run, out) == 0
    )
    before = written(out)
    capsys.readouterr()
    rows = epath.Path(tmp_path) / "videos.csv"
    for text, message in (
        (
            "video\nnew/talk.mp4\n",
            f"its video is {tmp_path}/old/talk.mp4 there and {tmp_path}/new/",
        ),
        (
            "video,title\nold/talk.mp4,A talk\n",
            "its title is None there and A talk in the manifest",
        ),
        ("video,subtitles\nold/talk.mp4,none\n", "its subtitles is None there and none in the"),
    ):
        files.write_whole(rows, text)
        assert command(rows, run, out) == 2
        said = capsys.readouterr().err
        assert f"{out}/talk: {message}" in said
        assert "delete those that are to be made anew, or give --out a new folder" in said
    assert written(out) == before
    # ---- The same video from another manifest is the same; a deleted one is made anew ----
    files.write_whole(rows, "id,video\ntalk,./old/talk.mp4\n")
    assert command(rows, run, out) == 0
    assert written(out) == before
    shutil.rmtree(out / "talk")
    files.write_whole(rows, "video\nnew/talk.mp4\n")
    assert command(rows, run, out) == 0
    check_all(epath.Path(out), ["talk"])


def test_a_damaged_summary_is_a_failure_of_its_own(run, clips, tmp_path, capsys):
    videos = [clips / f"{name}.mp4" for name in "abc"]
    rows, out = manifest(epath.Path(tmp_path) / "videos.csv", videos), tmp_path / "out"
    assert command(rows, run, out) == 0
    (out / "a" / "summary.json").write_text("{")
    (out / "b" / "summary.json").write_text("{}")
    capsys.readouterr()
    assert command(rows, run, out) == 1
    assert "1 of 3 videos done (0 now)" in capsys.readouterr().out
    index = json.loads((out / "index.json").read_text())
    assert [video["state"] for video in index["videos"]] == ["failed", "failed", "done"]
    assert "a/summary.json is no JSON" in index["videos"][0]["reason"]
    assert "b/summary.json is no summary of ours" in index["videos"][1]["reason"]
    for name, video in zip("ab", index["videos"], strict=False):
        assert f"delete {out / name}, and the same command makes it anew" in video["reason"]
        shutil.rmtree(out / name)
    assert command(rows, run, out) == 0
    check_all(epath.Path(out), "abc")


def test_a_half_made_summary_is_made_anew(run, clips, tmp_path, capsys):
    rows = manifest(epath.Path(tmp_path) / "videos.csv", [clips / "a.mp4"])
    out = tmp_path / "out"
    assert command(rows, run, out) == 0
    (out / "a" / "summary.json").unlink()
    left = out / ".index.json.0123abcd.partial"
    left.write_text("{")
    os.utime(left, (0, 0))
    assert command(rows, run, out) == 0
    check_all(epath.Path(out), "a")
    # ---- But for what is not ours ----
    (out / "a" / "summary.json").unlink()
    (out / "a" / "keyframes" / "holiday.jpg").write_text("mine")
    before = sorted(out.rglob("*"))
    capsys.readouterr()
    assert command(rows, run, out) == 2
    said = capsys.readouterr().err
    assert f"{out}/a: holds something else than a summary" in said
    assert "delete those that are to be made anew" in said
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("full", "is no empty folder and holds no summaries of ours"),
        ("file", "is no empty folder and holds no summaries of ours"),
        ("file/below", "cannot be written (Not a directory)"),
        ("gs://absent/out", "there is no bucket gs://absent"),
        ("gs://read-only/out", "no right to"),
    ],
)
def test_folders_that_cannot_take_a_corpus(gcs, run, clips, tmp_path, capsys, given, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    rows = manifest(epath.Path(tmp_path) / "videos.csv", [clips / "a.mp4"])
    out = given if ":" in given else tmp_path / given
    before = sorted(tmp_path.rglob("*"))
    assert command(rows, run, out) == 2
    said = capsys.readouterr().err
    assert message in said
    assert str(out) in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_that_not_all_processes_see_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_SHOWN_S", 0.0)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="is not the same folder for all processes"):
        Corpus(epath.Path(tmp_path) / "out").check_shared()


def test_a_model_without_sense_stops_at_once(run, clips, tmp_path, capsys):
    senseless = shutil.copytree(
        run, tmp_path / "senseless", ignore=shutil.ignore_patterns("checkpoints")
    )
    config = config_lib.load(run / "config.json")
    model = experiment.model_config(config, tokenizer.load_tokenizer(run / "tokenizer.model"))
    params = paligemma2.init_params(model, jax.random.key(0))
    nothing = jax.tree.map(lambda a: np.full_like(a, np.nan), params)
    untrained.save_params(senseless, config, nothing)
    rows = manifest(
        epath.Path(tmp_path) / "videos.csv", [clips / f"{name}.mp4" for name in "abcdef"]
    )
    assert command(rows, senseless, tmp_path / "out") == 2
    assert "gives scores that are no finite numbers" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["corpus.json"]
    # ---- Nothing was made with it, so another may take its place ----
    assert command(rows, run, tmp_path / "out") == 0
    check_all(epath.Path(tmp_path) / "out", "abcdef")


def test_every_video_of_a_corpus_has_its_own_scores(run, clips, tmp_path, monkeypatch):
    """They are scored together, by one compiled function for each stage."""
    made, init = [], staged.StagedScorer.__init__
    monkeypatch.setattr(
        staged.StagedScorer, "__init__", lambda self, *args: made.append(self) or init(self, *args)
    )
    rows = manifest(epath.Path(tmp_path) / "videos.csv", [clips / f"{name}.mp4" for name in "fabc"])
    assert command(rows, run, tmp_path / "out") == 0
    [scorer] = made
    assert [fn._cache_size() for fn in scorer._stages.values()] == [1, 1]
    student = summarize.Student(run)
    policy = summarize.policy_asked_for(None, epath.Path(run), student.config)
    found = []
    for name in "abcf":
        film = summarize.read_film(clips / f"{name}.mp4", size=28)
        _, scores = student.score(film.video, policy)
        summary = json.loads((tmp_path / "out" / name / "summary.json").read_text())
        found.append([segment["score"] for segment in summary["segments"]])
        np.testing.assert_allclose(found[-1], scores.importance, atol=1e-6)
    assert len({scores[0] for scores in found}) == 4


def test_a_notice_ends_the_command(run, clips, tmp_path, capsys, monkeypatch):
    score_all = summarize.Student.score_all

    def noticed(self, videos, policy):
        with contextlib.closing(score_all(self, videos, policy)) as results:
            yield next(results)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)  # where it interrupts

    monkeypatch.setattr(summarize.Student, "score_all", noticed)
    videos = [clips / f"{name}.mp4" for name in "abcd"]
    rows = manifest(epath.Path(tmp_path) / "videos.csv", videos)
    assert command(rows, run, tmp_path / "out") == 75
    assert "of the 4 videos that this process had before it are left" in capsys.readouterr().err
    monkeypatch.undo()
    assert command(rows, run, tmp_path / "out") == 0
    check_all(epath.Path(tmp_path) / "out", "abcd")


def test_a_corpus_in_a_bucket(bucket, run, clips, tmp_path, monkeypatch):
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    for name in "ab":
        files.write_whole(bucket / f"{name}.mp4", (clips / f"{name}.mp4").read_bytes())
    files.write_whole(bucket / "bad.mp4", "Dear diary,\n" * 99)
    rows = manifest(bucket / "videos.csv", ["a.mp4", "bad.mp4", "b.mp4", "absent.mp4"])
    out = bucket / "out"
    files.write_whole(out / "corpus.json", "{")  # as nothing of ours would leave it
    assert command(rows, run, out) == 2
    (out / "corpus.json").unlink()
    assert command(rows, run, out) == 1
    check_all(out, "ab")
    failures = Corpus(out).failures()
    assert failures["absent"] == f"{bucket / 'absent.mp4'} does not exist; check the path"
    assert failures["bad"].startswith(f"{bucket / 'bad.mp4'}: ")
    assert list(temporary.iterdir()) == []
    # ---- What was uploaded in part is done again, and nothing else ----
    (out / "a" / "summary.json").unlink()
    files.write_whole(out / "a" / "keyframes" / "half.jpg", "half")
    kept = (out / "b" / "summary.json").stat().mtime
    files.write_whole(bucket / "bad.mp4", (clips / "c.mp4").read_bytes())
    rows = manifest(bucket / "videos.csv", ["a.mp4", "bad.mp4", "b.mp4"])
    assert command(rows, run, out) == 0
    assert not (out / "a" / "keyframes" / "half.jpg").exists()
    assert (out / "b" / "summary.json").stat().mtime == kept
    check_all(out, ["a", "b", "bad"])


def test_the_benchmark_measures_both_ways(run, clips, tmp_path, capsys):
    for name in "ab":
        shutil.copy(clips / f"{name}.mp4", tmp_path)
    flags = ["--checkpoint", str(run), "--videos", str(tmp_path), "--repeats", "1"]
    assert benchmark_corpus.main([*flags, "--device_ms", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "2 videos, cpu, 1 repeats in turns"
    assert [line.split("  ")[0] for line in lines[1:3]] == ["in turn", "overlapped"]
    assert lines[3].startswith("faster by ")


# ---- Several processes ----


def test_two_processes_share_a_corpus_in_a_bucket(bucket, run, clips):
    videos = [clips / f"{name}.mp4" for name in "abcde"]
    rows = manifest(bucket / "videos.csv", [*videos, "absent.mp4"])
    flags = ["--manifest", rows, "--checkpoint", str(run), "--out", str(bucket / "out")]
    ended = processes.run(
        [
            ["-m", "deevisum_jax.summarize", *flags, "--budget", "0.3", *who]
            for who in processes.flags_of(2)
        ]
    )
    assert [process.errors for process in ended] == [[], []]
    # Also of the one with a failure: another status would stop the others.
    assert [process.status for process in ended] == [0, 0]
    assert "process 1: 2 of the 3 videos of this process done (2 now)" in ended[1].out
    assert "process 1: 1 failed: see" in ended[1].out
    assert list(Corpus(bucket / "out").failures()) == ["absent"]
    for i, names in enumerate((["a", "c", "e"], ["absent", "b", "d"])):
        lines = ended[i].err.splitlines()
        assert sorted(line.split(": ")[1].split()[1] for line in lines) == names
        assert all(line.startswith(f"process {i}: [") for line in lines)
    check_all(bucket / "out", "abcde")


def test_a_killed_process_leaves_whole_summaries_the_others_go_on_and_a_restart_does_the_rest(
    run, clips, tmp_path
):
    out = tmp_path / "out"
    # The first process has a, c and then one that it cannot end before it is killed.
    videos = [clips / f"{name}.mp4" for name in ("a", "b", "c", "d", "long", "f")]
    rows = manifest(epath.Path(tmp_path) / "videos.csv", videos)
    flags = ["--manifest", rows, "--checkpoint", str(run), "--out", str(out), "--budget", "0.3"]
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "deevisum_jax.summarize", *flags, *who],
            cwd=processes.REPO,
            env=os.environ | {"PYTHONPATH": str(processes.REPO)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for who in processes.flags_of(2)
    ]
    try:
        deadline = time.monotonic() + 100
        # The first has the others' way to talk, were they to.
        while not written(out).keys() & set("ac"):
            assert started[0].poll() is None, "it ended by itself"
            assert time.monotonic() < deadline, "nothing is finished"
            time.sleep(0.01)
        started[0].kill()
        assert started[1].wait(100) == 0
    finally:
        for process in started:
            process.kill()
            process.wait()
    before = written(out)
    assert set("bdf") < before.keys()
    assert "long" not in before
    for name in before:
        assert sorted(path.name for path in (out / name).iterdir()) == sorted(PARTS)
    (out / ".long.0123abcd.partial").mkdir()  # in case it was not in the middle of one
    # ---- One process goes on where two stood ----
    assert command(rows, run, out) == 0
    after = written(out)
    assert {name: after[name] for name in before} == before
    check_all(epath.Path(out), [*"abcdf", "long"])
