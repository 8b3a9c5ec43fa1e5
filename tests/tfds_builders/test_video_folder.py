"""People's own videos as a data set: what is read, what is refused, what is not done twice."""

import errno
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from deevisum_jax import manifest
from deevisum_jax.data import audio, video
from deevisum_jax.errors import UserError
from deevisum_jax.summary import select
from tests.media import solid_frames, write_video
from tfds_builders import build as builders
from tfds_builders import records
from tfds_builders.video_folder import prepare, sources, video_folder
from tfds_builders.video_folder.video_folder import FAILURES_FILE, VideoFolder

VTT = "WEBVTT\n\n00:00.500 --> 00:01.500\nhello\n"


@pytest.fixture(scope="module")
def originals(tmp_path_factory) -> pathlib.Path:
    """`a.mp4` (2 s, with sound and words beside it) and `more/b c.mkv` (3 s, silent)."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "more").mkdir()
    tone = 0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * 16_000) / 16_000)
    write_video(folder / "a.mp4", solid_frames(np.linspace(0, 200, 48)), fps=24, audio=tone)
    (folder / "a.vtt").write_text(VTT)
    write_video(folder / "more" / "b c.mkv", solid_frames(np.repeat([30, 220], 36)), fps=24)
    return folder


@pytest.fixture
def own(originals, tmp_path) -> pathlib.Path:
    """A copy of them to add to."""
    shutil.copytree(originals, tmp_path / "own")
    return tmp_path / "own"


def write(folder: pathlib.Path, text: str, name: str = "videos.csv") -> pathlib.Path:
    (folder / name).write_text(text)
    return folder / name


def build(manual_dir, data_dir, name: str = "1fps", **kwargs):
    return records.build(VideoFolder, data_dir, VideoFolder.config_of(name, manual_dir), **kwargs)


def failures(builder) -> list[dict[str, str]]:
    return json.loads((pathlib.Path(builder.data_dir).parent / FAILURES_FILE).read_text())


def equal(a, b) -> bool:
    if isinstance(a, np.ndarray):
        return a.dtype == b.dtype and a.shape == b.shape and bool((a == b).all())
    return a == b


# ---- What a folder becomes ----


def test_a_folder_becomes_records_of_what_is_in_its_videos(own, tmp_path):
    (own / "notes.txt").write_text("no video")
    (own / ".a.mp4").write_bytes(b"what another system keeps")
    builder = build(own, tmp_path / "data", "2fps")
    first, second = records.read(builder, records.ALL)
    assert (first["video_id"], first["title"]) == ("a", "a")
    assert (second["video_id"], second["title"]) == ("more_b c", "b c")
    assert first["transcript"] == [{"start": 0.5, "end": 1.5, "text": "hello"}]
    decoded = video.decode_video(own / "a.mp4", frame_rate=2.0, size=(256, 256))
    np.testing.assert_array_equal(first["frame_times"], [0, 0.5, 1, 1.5])
    assert len(first["frames"]) == len(decoded.frames) == 4
    assert (first["n_frames"], first["duration_s"]) == (48, 2.0)
    wanted = audio.decode_audio(own / "a.mp4")
    np.testing.assert_allclose(first["audio"] / 32768, wanted, atol=1e-6)
    assert second["audio"].shape == (0,)
    assert second["change_points"][0, 0] == 0
    assert second["change_points"][-1, 1] == second["n_frames"] == 72
    assert 36 in second["change_points"]  # the cut
    for record in (first, second):
        assert record["user_scores"].shape == (0, 0)
        assert record["score_times"].shape == (0,)
        assert record["user_summary"].shape == (0, record["n_frames"])
    assert records.video_ids(builder) == ("a", "more_b c")


def test_a_manifest_gives_titles_words_ids_splits_and_scores(own, tmp_path):
    write(own, VTT.replace("hello", "other words"), "words.vtt")
    write(own, "time_s,score,annotator\n0.5,1,x\n1.5,5,x\n0.5,4,y\n1.5,2,y\n", "a.csv")
    listed = write(
        own,
        "id,video,title,subtitles,scores,split\n"
        "one,more/b c.mkv,,words.vtt,,test\n"
        "two,a.mp4,An A,none,a.csv,train\n",
    )
    builder = build(listed, tmp_path / "data")
    [one], [two] = records.read(builder, "test"), records.read(builder, "train")
    assert (one["video_id"], one["title"]) == ("one", "b c")
    assert one["transcript"][0]["text"] == "other words"
    assert (two["video_id"], two["title"], two["transcript"]) == ("two", "An A", [])
    np.testing.assert_array_equal(two["user_scores"], [[1, 5], [4, 2]])
    np.testing.assert_array_equal(two["score_times"], [0.5, 1.5])
    # Until 1.0 s the first score is the nearer one.
    per_frame = np.repeat(two["user_scores"], 24, axis=1)
    np.testing.assert_array_equal(
        two["user_summary"],
        select.annotator_summaries(per_frame, two["change_points"], 48, select.DEFAULT_BUDGET),
    )


def test_real_videos_of_many_kinds(shared_data, tmp_path):
    names = ("speech_friday.mp4", "nasa_multi_stream.mp4", "pancake_opus.mkv", "bikes_no_audio.mp4")
    rows = "".join(f"{shared_data / 'clips' / name}\n" for name in names)
    found = {
        record["video_id"]: record
        for record in records.read(build(write(tmp_path, "video\n" + rows), tmp_path), records.ALL)
    }
    assert len(found["speech_friday"]["transcript"]) == 5
    assert len(found["bikes_no_audio"]["audio"]) == 0
    assert len(found["bikes_no_audio"]["change_points"]) > 2
    durations = {name: record["duration_s"] for name, record in found.items()}
    wanted = {"speech_friday": 6.2, "nasa_multi_stream": 13, "pancake_opus": 10.4}
    assert durations == pytest.approx(wanted | {"bikes_no_audio": 10}, abs=0.5)


def test_every_list_of_videos_is_a_data_set_of_its_own(own, tmp_path):
    name = lambda where=own: VideoFolder.config_of("1fps", where).name
    before = name()
    assert VideoFolder.config_of("2fps", own).name != before
    elsewhere = shutil.copytree(own, tmp_path / "elsewhere")
    assert name(elsewhere) == before
    assert name(write(own, "video,id\na.mp4,\nmore/b c.mkv,more_b c\n")) == before
    changed = [before]
    changed.append(name(write(own, "video,title\na.mp4,A title\nmore/b c.mkv,\n")))
    changed.append(name(write(own, "video\na.mp4\n")))
    (own / "a.vtt").write_text(VTT.replace("hello", "bye"))
    changed.append(name())
    with (own / "a.mp4").open("ab") as stream:
        stream.write(b"x")
    changed.append(name())
    scores = write(own, "time_s,score\n0,1\n", "s.csv")
    listed = write(own, "video,scores\na.mp4,s.csv\n")
    changed.append(name(listed))
    scores.write_text("time_s,score\n0,2\n")
    changed.append(name(listed))
    assert len(set(changed)) == len(changed)


def test_a_built_data_set_is_opened_by_its_name_without_the_videos(own, tmp_path):
    made = build(own, tmp_path / "data")
    shutil.rmtree(own)
    name = made.builder_config.name
    opened = records.build(VideoFolder, tmp_path / "data", VideoFolder.config_of(name, ""))
    assert len(records.read(opened, records.ALL)) == 2
    with pytest.raises(UserError, match=rf"video_folder/{name} is not in .*other.*manual_dir"):
        records.build(VideoFolder, tmp_path / "other", VideoFolder.config_of(name, ""))


def test_column_names_and_none_may_be_in_capitals(own):
    [item] = manifest.read(epath.Path(write(own, "Video,TITLE,Subtitles\na.mp4,An A,None\n")))
    assert (item.video.name, item.title, item.subtitles) == ("a.mp4", "An A", "none")


def test_a_change_in_the_middle_of_a_file_makes_it_another_video(tmp_path):
    file = tmp_path / "a.mp4"
    file.write_bytes(bytes(2**20))
    [before] = sources.read(tmp_path)
    # Samples lie at k / 17 of the file.
    with file.open("r+b") as stream:
        stream.seek(2**20 * 8 // 17)
        stream.write(b"x")
    [after] = sources.read(tmp_path)
    assert before.content != after.content


def test_folders_that_links_lead_to_are_read_once(own, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(own / "more" / "b c.mkv", elsewhere / "d.WMV")
    (own / "linked").symlink_to(elsewhere)
    (elsewhere / "back").symlink_to(own)
    (own / "again").symlink_to(own / "more")
    assert [one.id for one in sources.read(own)] == ["a", "linked_d", "more_b c"]


# ---- What is not done twice, and what fails ----


def test_what_is_decoded_is_not_decoded_again(own, tmp_path):
    videos = sources.read(own)
    store = prepare.Store(str(tmp_path), 1.0)
    prepare.with_processes(store, videos[:1])
    [done] = tmp_path.glob("*.npz")
    written = done.stat().st_mtime_ns
    # What a process leaves that is killed while it decodes the second.
    (tmp_path / ".0.npz.00000000.partial").write_bytes(b"half")
    store._path(videos[1], ".json").write_text(json.dumps({"reason": "killed"}))
    assert store.failure(videos[1]) == "killed"
    prepare.with_processes(store, videos)
    assert done.stat().st_mtime_ns == written
    assert [store.failure(one) for one in videos] == [None, None]
    assert [store.record(one)["video_id"] for one in videos] == ["a", "more_b c"]
    assert not list(tmp_path.glob("*.json"))


def test_titles_and_scores_may_change_without_decoding_again(own, tmp_path):
    build(own, tmp_path)
    decoded = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("decoded/*")}
    write(own, "time_s,score\n1,3\n", "s.csv")
    builder = build(write(own, "video,title,scores\na.mp4,New,s.csv\n"), tmp_path)
    [record] = records.read(builder, records.ALL)
    assert (record["title"], record["user_scores"].tolist()) == ("New", [[3]])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("decoded/*")} == decoded


def test_videos_that_fail_are_listed_and_the_others_are_built(own, tmp_path, capsys):
    (own / "bad.mp4").write_bytes(b"no video" * 100)
    write(own, "time_s,score\n1,3\n2.5,4\n", "late.csv")
    text = "video,scores\na.mp4,late.csv\nbad.mp4,\nmore/b c.mkv,\n"
    builder = build(write(own, text), tmp_path)
    assert [record["video_id"] for record in records.read(builder, records.ALL)] == ["b c"]
    assert records.video_ids(builder) == ("b c",)
    late, bad = failures(builder)
    assert (late["id"], late["video"]) == ("a", str(own / "a.mp4"))
    assert "late.csv: scores at 2.5 s, and " in late["reason"]
    assert "a.mp4 ends at 2.00 s; are they of another video?" in late["reason"]
    assert (bad["id"], bad["video"]) == ("bad", str(own / "bad.mp4"))
    assert "bad.mp4: not a video file" in bad["reason"]
    told = capsys.readouterr().err
    assert told.count("2 of 3 videos are left out") == 1
    assert FAILURES_FILE in told


def test_videos_that_failed_are_told_again_when_the_data_set_is_opened(own, tmp_path, capsys):
    (own / "bad.mp4").write_bytes(b"no video" * 100)
    made = build(own, tmp_path)
    video_folder._tell_failures.cache_clear()  # as in another process
    capsys.readouterr()
    build(own, tmp_path)
    told = capsys.readouterr().err
    assert "1 of 3 videos are left out" in told
    assert "bad: " in told
    folder = pathlib.Path(made.data_dir).parent
    assert f"delete {folder} to try again" in told
    shutil.rmtree(folder)
    build(own, tmp_path)
    assert failures(made)[0]["id"] == "bad"


@pytest.mark.parametrize(
    ("rows", "is_used"),
    [
        ("0,1\n1,2\n", True),  # 2 s of the 3 s are left
        ("0,1\n0.5,2\n", False),
        ("0,1\n1,2\n2.5,2\n", True),
        ("2.5,1\n", False),
    ],
)
def test_scores_must_reach_to_the_end_of_the_video(own, tmp_path, rows, is_used):
    write(own, f"time_s,score\n{rows}", "s.csv")
    [source] = sources.read(write(own, "video,scores\nmore/b c.mkv,s.csv\n"))
    store = prepare.Store(str(tmp_path), 1.0)
    store.prepare(source)
    reason = store.failure(source)
    if is_used:
        assert reason is None
    else:
        last = rows.split()[-1].split(",")[0]
        assert f"s.csv: the last of {len(rows.split())} scores is at {last} s, and " in reason
        assert "b c.mkv ends at 3.00 s; score all of it" in reason


def test_a_decoded_video_that_is_cut_off_is_decoded_anew(own, tmp_path):
    [source, _] = sources.read(own)
    store = prepare.Store(str(tmp_path), 1.0)
    store.prepare(source)
    [done] = tmp_path.glob("*.npz")
    whole = done.read_bytes()
    for damaged in (whole[:-100], whole[:100], b""):
        done.write_bytes(damaged)
        store.prepare(source)
        assert store.failure(source) is None
        assert len(store.record(source)["frames"]) == 2


def test_a_decoded_video_with_another_byte_in_it_is_removed(own, tmp_path):
    [source, _] = sources.read(own)
    store = prepare.Store(str(tmp_path), 1.0)
    store.prepare(source)
    [done] = tmp_path.glob("*.npz")
    content = bytearray(done.read_bytes())
    content[content.index(b"\xff\xd8\xff") + 100] ^= 1  # within the first picture
    done.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.mp4, was damaged .* give the same command again"):
        store.record(source)
    assert not done.exists()


def test_a_process_that_ends_between_two_videos_costs_none(own, tmp_path, monkeypatch):
    videos = sources.read(own)
    store = prepare.Store(str(tmp_path), 1.0)
    monkeypatch.setattr(prepare.workers, "num_cores", lambda: 1)
    monkeypatch.setattr(prepare, "__name__", "tests.tfds_builders.tiring_worker")
    prepare.with_processes(store, videos)
    assert [store.failure(one) for one in videos] == [None, None]


def test_processes_that_cannot_be_started_are_no_fault_of_a_video(own, tmp_path, monkeypatch):
    def start(*_):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(prepare.workers, "start", start)
    with pytest.raises(UserError, match=r"cannot be started .*temporarily unavailable"):
        prepare.with_processes(prepare.Store(str(tmp_path), 1.0), sources.read(own))


def test_a_process_that_ends_before_it_begins_is_no_fault_of_a_video(own, tmp_path, monkeypatch):
    videos = sources.read(own)
    store = prepare.Store(str(tmp_path), 1.0)
    # An older note does not count.
    store._path(videos[0], ".json").write_text(json.dumps({"reason": "killed"}))
    monkeypatch.setattr(prepare, "__name__", "tests.tfds_builders.no_such_module")
    with pytest.raises(UserError, match="ended before it began"):
        prepare.with_processes(store, videos)


def test_a_mended_video_is_read_and_the_list_of_failures_ends(own, tmp_path):
    (own / "c.mp4").write_bytes(b"no video")
    assert len(failures(build(own, tmp_path))) == 1
    shutil.copy(own / "a.mp4", own / "c.mp4")
    builder = build(own, tmp_path)
    assert records.video_ids(builder) == ("a", "c", "more_b c")
    assert not (pathlib.Path(builder.data_dir).parent / FAILURES_FILE).exists()


def test_a_video_that_kills_its_process_costs_itself_only(own, tmp_path, monkeypatch):
    shutil.copy(own / "a.mp4", own / "deadly.mp4")
    with (own / "deadly.mp4").open("ab") as stream:
        stream.write(b"x")
    videos = sources.read(own)
    store = prepare.Store(str(tmp_path), 1.0)
    monkeypatch.setattr(prepare, "__name__", "tests.tfds_builders.dying_worker")
    prepare.with_processes(store, videos)
    reasons = {one.id: store.failure(one) for one in videos}
    assert "the process that read it ended" in reasons.pop("deadly")
    assert reasons == {"a": None, "more_b c": None}


def test_no_good_video_is_an_error(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"no video of split .* can be used:\n  bad: .*bad\.mp4"):
        build(tmp_path, tmp_path / "data")


def test_a_split_without_good_videos_is_an_error(own, tmp_path):
    (own / "bad.mp4").write_bytes(b"no video")
    listed = write(own, "video,split\na.mp4,train\nbad.mp4,test\n")
    with pytest.raises(UserError, match="no video of split 'test' can be used"):
        build(listed, tmp_path)


def test_a_full_disk_is_an_error_and_no_failure_of_a_video(own, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(prepare, "read_media", full)
    store = prepare.Store(str(tmp_path), 1.0)
    with pytest.raises(OSError, match="No space left"):
        store.prepare(sources.read(own)[0])


def test_a_folder_that_is_gone_ends_the_work(own, tmp_path):
    store = prepare.Store(str(tmp_path / "gone"), 1.0)
    with pytest.raises(UserError, match="gone cannot be written"):
        prepare.with_processes(store, sources.read(own))


# ---- What is refused before anything is decoded ----


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("title\nA\n", ["has no column video"]),
        ("video,tilte\na.mp4,A\n", ["'tilte': did you mean 'title'?"]),
        ("video\nx.mp4\na.mp4\nmore\n", ["x: ", "x.mp4: no such file", "more: ", "is a folder"]),
        ("video,id\na.mp4,\n./a.mp4,b\n", ["a.mp4), b (", "the same file"]),
        ("video\na.mp4\na.mp4\n", ["lines 2, 3 have the same id 'a'"]),
        ("video,subtitles\na.mp4,x.vtt\n", ["a: ", "x.vtt: no such subtitle file"]),
        ("video,scores\na.mp4,x.csv\n", ["a: ", "x.csv: no such file of scores"]),
        ("video,scores\na.mp4,bad.csv\n", ["a: ", "bad.csv", "line 3: score 'nan' cannot be"]),
        ("video,split\na.mp4,train\nmore/b c.mkv,\n", ["b c: has no split, and others have"]),
        ("video,split\na.mp4,all\n", ["split 'all' is none of train, validation, test; choose"]),
        ("video,split\na.mp4,te-st\n", ["split 'te-st' is none of", "did you mean 'test'?"]),
        ("video\ngs://bucket/a.mp4\n", ["a: gs://bucket/a.mp4 is in a bucket"]),
        ("video\n/\na.mp4\n", ["line 2: id '' is no good name"]),
        (f"video,id\n{'x' * 252}.mp4,x\na.mp4,\n", ["line 2: xxx", "so long a name (256 bytes)"]),
        (f"video,id\n{'x/' * 600}a.mp4,x\n", ["line 2: x/x", "so long a name (1205 bytes)"]),
        (f"video,subtitles\na.mp4,{'x' * 300}.vtt\n", ["line 2: xxx", "so long a name"]),
        ("video\na.mp4\nb\0.mp4\n", ["line 3 has a NUL character"]),
        ("", ["is empty"]),
        ("video\n", ["lists no video"]),
    ],
)
def test_manifests_that_cannot_be(own, text, messages):
    write(own, "time_s,score\n0,1\n1,nan\n", "bad.csv")
    with pytest.raises(UserError) as refused:
        VideoFolder.config_of("1fps", write(own, text))
    assert "videos.csv" in str(refused.value)
    for message in messages:
        assert message in str(refused.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("score\n1\n", "has no column time_s; it has score"),
        ("time_s,score,who\n1,2,x\n", r"'who': "),
        ("0.5 1\n", r"columns that are not known \('0.5 1'"),
        ("time_s,score\n", "has no scores; give it a row for each"),
        ("time_s,score\n0,1\n1,\n", "line 3: score '' cannot be: wanted a number"),
        ("time_s,score\nx,inf\n", "line 2: time_s 'x' and score 'inf' cannot be"),
        ("time_s,score\n0,1e39\n1,1_0\n", "line 2: score '1e39' cannot.*\n.*line 3: score '1_0'"),
        ("time_s,score\n-1,2\n0,-3\n", "line 2: time_s -1 is below 0\n  line 3: score -3 is"),
        ("time_s,score\n1,2\n1.0,3\n", "line 3: a second score at 1 s"),
        ("time_s,score\n1,2,3\n", "line 2 has 3 cells for 2 columns"),
        ("time_s,score,annotator\n1,2,x\n2,2,x\n1,2,y\n", "annotator 'y' gave no score at 2 s"),
    ],
)
def test_scores_that_cannot_be(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as refused:
        sources.read_scores(write(tmp_path, text, "mine.csv"))
    assert "mine.csv" in str(refused.value)


def test_scores_come_in_any_order(tmp_path):
    text = "annotator,score,time_s\nb,1,2.5\na,2,0.5\nb,3,0.5\na,4,2.5\n"
    times, scores = sources.read_scores(write(tmp_path, text, "mine.csv"))
    np.testing.assert_array_equal(times, [0.5, 2.5])
    np.testing.assert_array_equal(scores, [[2, 4], [3, 1]])
    assert scores.dtype == np.float32


def test_words_beside_a_video_are_found_as_when_it_is_read(own):
    for name in ("b c.EN.srt", "b c.de.vtt", "b cd.vtt", "b c.mkv.vtt"):
        (own / "more" / name).write_text("")
    before = sources.read(own)[1].content
    (own / "more" / "b c.de.vtt").write_text(VTT)
    assert sources.read(own)[1].content == before
    (own / "more" / "b c.EN.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    assert sources.read(own)[1].content != before


def test_folders_that_cannot_be(own, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no videos \(files that end in \.3gp, "):
        VideoFolder.config_of("1fps", tmp_path / "empty")
    with pytest.raises(UserError, match="nowhere: no such folder and no such manifest"):
        VideoFolder.config_of("1fps", tmp_path / "nowhere")
    with pytest.raises(UserError, match="gs://b/videos is in a bucket"):
        VideoFolder.config_of("1fps", "gs://b/videos")
    with pytest.raises(UserError, match="is built of your own videos; say where they are"):
        VideoFolder.config_of("1fps", "")
    with pytest.raises(UserError, match="no config '3fps'; did you mean"):
        VideoFolder.config_of("3fps", own)
    shutil.copy(own / "a.mp4", own / "more_b c.mp4")
    with pytest.raises(UserError, match=r"more_b c \(.*more_b c \(.*the same id"):
        VideoFolder.config_of("1fps", own)


def test_names_that_are_no_text_are_one_id(own):
    for name in (b"bad\xff.mp4", b"bad\xfe.mp4"):
        try:
            shutil.copy(own / "a.mp4", os.path.join(os.fsencode(own), name))
        except OSError:
            pytest.skip("this file system has only names that are text")
    with pytest.raises(UserError, match=r"bad\? \(.*bad\? \(.*the same id"):
        sources.read(own)


# ---- The command, and Beam ----


def command(own, tmp_path, *flags):
    flags = ("--manual_dir", str(own), "--data_dir", str(tmp_path), *flags)
    return builders.main(["video_folder/1fps", *flags])


def test_the_command_tells_what_it_built(own, tmp_path, capsys):
    assert command(own, tmp_path) == 0
    name = VideoFolder.config_of("1fps", own).name
    assert f"video_folder/{name} is in {tmp_path}" in capsys.readouterr().out


def test_beams_flags_need_beam(own, tmp_path, capsys):
    with pytest.raises(SystemExit):
        command(own, tmp_path, "--runner=DirectRunner")
    assert "unrecognized arguments: --runner=DirectRunner" in capsys.readouterr().err


def test_a_data_set_is_built_in_a_folder(own, capsys):
    assert command(own, "gs://b/data") == 2
    assert "build in a local folder" in capsys.readouterr().err


def test_without_beam_the_extra_is_named(own, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(builders.importlib.util, "find_spec", lambda name: None)
    assert command(own, tmp_path, "--beam") == 2
    assert 'pip install -e ".[beam]"' in capsys.readouterr().err


def test_beam_is_for_ones_own_videos(tmp_path, capsys):
    assert builders.main(["synthetic/tiny", "--data_dir", str(tmp_path), "--beam"]) == 2
    assert "--beam builds video_folder, not synthetic" in capsys.readouterr().err


@pytest.mark.filterwarnings("default")  # Beam's own
@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--runnr=DirectRunner", "Apache Beam has no flag --runnr; did you mean --runner?"),
        ("-runner=DirectRunner", "Apache Beam has no flag -runner"),
        ("--runner=Direkt", "--runner=Direkt is no runner of Apache Beam: Unexpected"),
        ("--runner=no.such.Runner", "--runner=no.such.Runner is no runner of Apache Beam: No mod"),
    ],
)
def test_flags_that_beam_does_not_know_are_refused(own, tmp_path, capsys, flag, message):
    pytest.importorskip("apache_beam", reason="Apache Beam is not installed")
    assert command(own, tmp_path, "--beam", flag) == 2
    assert message in capsys.readouterr().err


@pytest.mark.filterwarnings("default")  # Beam's own
def test_beam_builds_the_same_records(own, tmp_path):
    options = pytest.importorskip(
        "apache_beam.options.pipeline_options", reason="Apache Beam is not installed"
    )
    (own / "bad.mp4").write_bytes(b"no video")
    write(own, "time_s,score\n1,3\n", "s.csv")
    listed = write(own, "video,scores\na.mp4,s.csv\nbad.mp4,\nmore/b c.mkv,\n")
    flags = options.PipelineOptions(["--runner=DirectRunner"])
    config = tfds.download.DownloadConfig(beam_options=flags)
    beams = build(listed, tmp_path / "beam", download_config=config)
    plain = build(listed, tmp_path / "plain")
    assert [one["id"] for one in failures(beams)] == ["bad"]
    assert failures(beams) == failures(plain)
    for mine, theirs in zip(
        records.read(plain, records.ALL), records.read(beams, records.ALL), strict=True
    ):
        assert mine.keys() == theirs.keys()
        assert [name for name in mine if not equal(mine[name], theirs[name])] == []
    assert records.video_ids(beams) == records.video_ids(plain) == ("a", "b c")
