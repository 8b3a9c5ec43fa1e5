"""TVSum as downloaded becomes records, in seconds whatever the frame rate of a file."""

import dataclasses
import io
import pathlib
import shutil

import h5py
import numpy as np
import PIL.Image
import pytest
import scipy.io

from deevisum_jax.errors import UserError
from deevisum_jax.summary import select
from scripts import benchmark_build
from tests import media, official_files
from tests.official_files import FPS
from tfds_builders import annotated, build, records
from tfds_builders.tvsum import annotations
from tfds_builders.tvsum.tvsum import TVSum

FIRST, SECOND = annotations.VIDEO_IDS[:2]
RED, GREEN, BLUE = (220, 30, 30), (30, 200, 40), (30, 40, 220)


def three_shots(path: pathlib.Path, *, fps: float = 3, seconds: int = 12) -> pathlib.Path:
    """Red until second 3, green until 7, then blue; encoded again at few frames per second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    times = np.arange(seconds * fps) / fps
    colours = np.array([RED, GREEN, BLUE], np.uint8)[np.searchsorted([3, 7], times, "right")]
    frames = np.broadcast_to(colours[:, None, None], (len(times), 32, 48, 3))
    return media.write_video(path, np.ascontiguousarray(frames), fps=fps)


@pytest.fixture
def download(tmp_path) -> pathlib.Path:
    """The annotations and the first video: 12 s, 30 frames per second, at hand as 3 per second."""
    folder = tmp_path / "ydata-tvsum50-v1_1"
    scores = official_files.tvsum_scores({FIRST: official_files.scores_of(12 * FPS)})
    official_files.write_tvsum_mat(folder / "matlab" / "ydata-tvsum50.mat", scores)
    three_shots(folder / "video" / f"{FIRST}.mp4")
    return folder


def make(folder: pathlib.Path, config: str = "1fps_partial"):
    return records.build(TVSum, folder.parent / "built", config, manual_dir=folder)


def rewrite(folder: pathlib.Path, **changes) -> pathlib.Path:
    """Another .mat there; returns its path."""
    options = {"scores": official_files.tvsum_scores()} | changes
    return official_files.write_tvsum_mat(folder / "matlab" / "ydata-tvsum50.mat", **options)


def test_a_record_is_in_seconds_whatever_the_frame_rate_of_the_file(download):
    builder = make(download)
    [record] = records.read(builder, records.ALL)
    scores = official_files.scores_of(12 * FPS)
    assert record["video_id"] == FIRST
    assert record["title"] == "Film 0"
    assert record["category"] == "VT"
    assert (record["n_frames"], record["native_fps"], record["duration_s"]) == (360, 30.0, 12.0)
    np.testing.assert_allclose(record["frame_times"], np.arange(12))
    assert len(record["frames"]) == 12
    picture = np.asarray(PIL.Image.open(io.BytesIO(record["frames"][5])))
    assert picture.shape == (256, 256, 3)
    assert np.abs(picture.reshape(-1, 3).mean(0) - GREEN).max() < 12
    # Every 15th frame from the first on; the middle of frame 15 is at 15.5 / 30 s.
    np.testing.assert_array_equal(record["user_scores"], scores[:, ::15])
    np.testing.assert_allclose(record["score_times"][:2], [0.5 / 30, 15.5 / 30], rtol=1e-6)
    # Cuts at 3 s and 7 s; no shot may be longer than 15 % of the video, here 54 frames.
    edges = record["change_points"][:, 0]
    assert {0, 90, 210} <= set(edges)
    np.testing.assert_array_equal(record["change_points"][:, 1], [*edges[1:], 360])
    assert np.diff(record["change_points"]).max() <= 54 + FPS / 3  # a frame of the file is 10
    np.testing.assert_array_equal(
        record["user_summary"], select.annotator_summaries(scores, record["change_points"], 360)
    )
    assert record["audio"].size == 0


def test_what_it_was_made_of_is_in_the_metadata(download):
    metadata = make(download).info.metadata
    assert metadata["video_ids"] == [FIRST]
    assert metadata["missing"] == list(annotations.VIDEO_IDS[1:])
    assert metadata["change_points"] == "KTS of deevisum_jax on the videos"
    found = metadata["videos"][FIRST]
    path = download / "video" / f"{FIRST}.mp4"
    assert (found["file"], found["bytes"]) == (path.name, path.stat().st_size)
    assert len(found["sha256"]) == 64
    assert metadata["annotations"][0]["file"] == "ydata-tvsum50.mat"


def test_sound_is_kept_or_left_out(download):
    frames = np.zeros((36, 32, 48, 3), np.uint8)
    tone = 0.5 * np.sin(np.arange(12 * 16_000) / 5)
    media.write_video(download / "video" / f"{FIRST}.mp4", frames, fps=3, audio=tone)
    heard, silent = (
        records.read(make(download, config), records.ALL)[0]["audio"]
        for config in ("2fps_partial", "2fps_silent_partial")
    )
    assert abs(len(heard) / 16_000 - 12) < 0.2
    assert np.abs(heard).max() > 8_000
    assert silent.size == 0


def test_change_points_and_summaries_of_the_community_where_its_file_is_there(download):
    official_files.write_features(download / "any.h5", [FIRST], n_frames=360)
    builder = make(download)
    [record] = records.read(builder, records.ALL)
    assert record["change_points"].tolist() == [[0, 180], [180, 360]]
    assert builder.info.metadata["change_points"] == "of any.h5"
    assert builder.info.metadata["features"]["file"] == "any.h5"
    # The file's; of our own there would be nothing, as no shot of 180 frames is within 15 %.
    assert [row.nonzero()[0].tolist() for row in record["user_summary"]] == [[0, 1, 2, 3, 4]] * 3


def test_every_config_has_the_summaries_of_the_file_of_features(download):
    official_files.write_features(download / "any.h5", [FIRST], n_frames=360)
    [seen], [described] = (
        records.read(make(download, config), records.ALL)
        for config in ("1fps_partial", "features_partial")
    )
    for name in ("user_summary", "change_points", "user_scores", "score_times"):
        np.testing.assert_array_equal(seen[name], described[name], err_msg=name)


def test_change_points_for_other_videos_only(download):
    path = official_files.write_features(download / "any.h5", [SECOND])
    assert f"{path} has no change points of {FIRST}; give a file of all" in refused(download)


def test_archives_unpacked_into_folders_of_their_own_are_found(download):
    inside = download / "ydata-tvsum50-v1_1"
    for kind in ("video", "matlab"):
        (inside / f"ydata-tvsum50-{kind}").mkdir(parents=True)
        (download / kind).rename(inside / f"ydata-tvsum50-{kind}" / kind)
    (download / "video").mkdir()  # empty, and so not taken
    assert annotations.video_folder(download) == inside / "ydata-tvsum50-video" / "video"
    (inside / "ydata-tvsum50-video" / "video" / f"{FIRST}.mp4").rename(
        inside / "ydata-tvsum50-video" / f"{FIRST}.mp4"
    )
    assert len(records.read(make(download), records.ALL)) == 1


def test_tables_give_the_records_that_the_mat_gives(download):
    before = records.read(make(download), records.ALL)[0]
    videos = annotations.load(download)
    official_files.write_tvsum_tsv(download / "data", videos[::-1])
    shutil.rmtree(download / "matlab")
    shutil.rmtree(download.parent / "built")
    after = records.read(make(download), records.ALL)[0]
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_equal(after[name], value, err_msg=name)


# ---- What is not as it should be ----


def refused(folder: pathlib.Path, config: str = "1fps_partial") -> str:
    """The message; nothing may be left of the build."""
    with pytest.raises(UserError) as caught:
        make(folder, config)
    made = folder.parent / "built" / "tvsum"
    assert not [path for path in made.glob("*/*") if path.parent.name != ".config"]
    return str(caught.value)


def test_missing_videos_are_listed_by_name(download):
    message = refused(download, "1fps")
    assert f"{download / 'video'} lacks 49 of the 50 videos" in message
    assert all(video_id in message for video_id in annotations.VIDEO_IDS[1:])
    assert "--config.data.allow_missing (--allow_missing of tfds_builders.build)" in message
    (download / "video" / f"{FIRST}.mp4").unlink()
    assert "but no videos" in refused(download)  # of nothing, nothing can be made


def test_a_build_of_all_videos_and_one_without_some_never_mix(download):
    path = official_files.write_features(download / "f.h5", annotations.VIDEO_IDS)
    rewrite(download)
    make(download, "features")
    official_files.write_features(path, [SECOND])
    make(download, "features_partial")
    built = download.parent / "built"
    for config, count in (("features", 50), ("features_partial", 1)):
        opened = records.build(TVSum, built, config)
        assert len(records.read(opened, records.ALL)) == count
    assert records.partial_name(TVSum, "1fps") == "1fps_partial"
    assert records.partial_name(TVSum, "1fps_partial") == "1fps_partial"


def test_a_video_without_annotation(download):
    three_shots(download / "video" / "holiday.mp4")
    assert f"{download / 'video' / 'holiday.mp4'} is a video that nobody" in refused(download)


@pytest.mark.parametrize(("seconds", "word"), [(10, "longer"), (14, "shorter")])
def test_annotations_longer_or_shorter_than_the_video(download, seconds, word):
    path = three_shots(download / "video" / f"{FIRST}.mp4", seconds=seconds)
    message = refused(download)
    assert f"{path}: the annotations of video {FIRST} are {word} than the video" in message
    assert f"they last 12.00 s and the video {seconds}.00 s" in message


def test_a_container_may_be_a_little_shorter_or_longer(download):
    for seconds in (11, 13):
        three_shots(download / "video" / f"{FIRST}.mp4", seconds=seconds)
        shutil.rmtree(download.parent / "built", ignore_errors=True)
        assert make(download).info.splits[records.ALL].num_examples == 1


def test_a_corrupt_video(download):
    path = download / "video" / f"{FIRST}.mp4"
    path.write_bytes(b"no video at all" * 100)
    assert f"{path}: not a video file" in refused(download)


def test_a_video_that_stops_midway(download):
    (download / "video" / f"{FIRST}.mp4").unlink()
    path = three_shots(download / "video" / f"{FIRST}.mkv", fps=10)  # needs no index at its end
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert f"{path}: the annotations of video {FIRST} are longer than the" in refused(download)


def test_two_files_of_one_video(download):
    path = download / "video" / f"{FIRST}.mp4"
    shutil.copy(path, path.with_suffix(".MKV"))
    message = f"{path.with_suffix('.MKV')} and {path} are of the same video; keep one"
    assert message in refused(download)


def test_what_other_systems_keep_about_files_is_passed_over(download):
    official_files.write_features(download / "any.H5", [FIRST], n_frames=360)
    for name in (f"video/._{FIRST}.mp4", "video/.DS_Store", "._any.h5", ".hidden.hdf5"):
        (download / name).write_bytes(b"about a file")
    builder = make(download)
    assert builder.info.metadata["change_points"] == "of any.H5"
    assert builder.info.splits[records.ALL].num_examples == 1


def test_scores_that_are_no_numbers(download):
    scores = official_files.tvsum_scores()
    scores[SECOND][1, 7] = np.nan
    path = rewrite(download, scores=scores)
    message = f"{path}: the score of annotator 2 for frame 7 of video {SECOND} is nan"
    assert message in refused(download)


def test_scores_of_another_number_of_frames(download):
    path = rewrite(download)
    with h5py.File(path, "r+") as file:
        file["#refs#/nframes1"][...] = 61
    message = f"{path}: video {SECOND} has 61 frames in 2.0 s and scores of shape [3, 60]"
    assert message in refused(download)


def test_mats_of_another_kind(download):
    path = download / "matlab" / "ydata-tvsum50.mat"
    scipy.io.savemat(path, {"tvsum50": [1]})
    assert f"{path} is a MATLAB 5 file" in refused(download)
    path.write_bytes(b"<html>not found</html>")
    assert f"{path} is not the HDF5 file" in refused(download)
    with h5py.File(path, "w") as file:
        file["other"] = 1
    assert f"{path} is HDF5 without a struct 'tvsum50' (it holds other)" in refused(download)
    rewrite(download, without=["user_anno"])
    assert f"{path}: tvsum50 lacks the field 'user_anno'" in refused(download)
    with h5py.File(path, "r+") as file:
        file.create_group("tvsum50/user_anno")
    assert f"{path}: tvsum50 cannot be read (" in refused(download)
    path.unlink()
    path.mkdir()
    assert "TVSum's annotations are not there" in refused(download)


def test_a_damaged_mat(download):
    path = rewrite(download)
    with h5py.File(path, "r+") as file:
        cell, whole = file["#refs#/user_anno1"], file["#refs#/user_anno1"][()]
        del file["#refs#/user_anno1"]
        cell = file["#refs#"].create_dataset("user_anno1", data=whole, chunks=True, fletcher32=True)
        file["tvsum50/user_anno"][1, 0] = cell.ref
        place = cell.id.get_chunk_info(0).byte_offset
    spoil(path, place)
    assert f"{path}: row 2 of tvsum50 cannot be read (" in refused(download)


def spoil(path: pathlib.Path, place: int) -> None:
    """Changes a byte of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 255
    path.write_bytes(data)


def test_annotations_of_other_videos(download):
    scores = official_files.tvsum_scores()
    path = rewrite(download, scores={name: scores[name] for name in scores if name != SECOND})
    assert f"{path} annotates 49 videos, of TVSum's 50 not {SECOND};" in refused(download)
    path = rewrite(download, scores=scores | {"holiday": scores[FIRST]})
    assert f"{path}: holiday is no video of TVSum" in refused(download)


def test_tables_of_another_form(download):
    videos = annotations.load(download)
    shutil.rmtree(download / "matlab")
    folder = download / "data"
    anno, info = folder / "ydata-tvsum50-anno.tsv", folder / "ydata-tvsum50-info.tsv"

    def changed(path: pathlib.Path, old: str, new: str) -> str:
        official_files.write_tvsum_tsv(folder, videos)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        return refused(download)

    row = f"{SECOND}\tVT\t"
    assert f"{anno}, line 4: 2 columns between tabs, wanted 3" in changed(anno, row, row[:-1])
    assert f"{anno}, line 4: the scores are no list" in changed(anno, row, f"{row}x,")
    shorter = changed(anno, f"{row}{videos[1].user_scores[0, 0]:g},", row)
    assert f"59 and 60 frames of the same video, {SECOND}" in shorter
    assert f"length of {SECOND} is '2 s', wanted" in changed(
        info, f"watch?v={SECOND}\t0:02", f"watch?v={SECOND}\t2 s"
    )
    assert f"length of {SECOND} is '0:\xb2', wanted" in changed(
        info, f"watch?v={SECOND}\t0:02", f"watch?v={SECOND}\t0:\xb2"
    )
    official_files.write_tvsum_tsv(folder, videos)
    for path, message in (
        (info, f"{info} does not know video {SECOND} of {anno}"),
        (anno, f"{anno} has no scores of video {SECOND} of {info}"),
    ):
        rows = "".join(line for line in path.read_text().splitlines(True) if SECOND in line)
        assert message in changed(path, rows, "")


def test_tables_as_other_programs_save_them(download):
    """Other ends of lines, a mark of the encoding, an empty line, and odd spaces in titles."""
    videos = annotations.load(download)
    titled = [dataclasses.replace(videos[0], title="One\x85two\u2028three"), *videos[1:]]
    official_files.write_tvsum_tsv(download, titled)
    for kind in ("anno", "info"):
        path = download / f"ydata-tvsum50-{kind}.tsv"
        text = path.read_bytes().decode().replace("\n", "\r\n")
        path.write_bytes(f"\ufeff{text}\r\n".encode())
    paths = [download / f"ydata-tvsum50-{kind}.tsv" for kind in ("anno", "info")]
    for video, same in zip(titled, annotations.read_tsv(*paths), strict=True):
        assert (video.video_id, video.title) == (same.video_id, same.title)
        np.testing.assert_array_equal(video.user_scores, same.user_scores)


@pytest.mark.parametrize(("told_s", "length_s"), [(354, 353.593), (353, 353.593), (360, 360.0)])
def test_the_exact_length_is_taken_where_the_tables_round_it(tmp_path, told_s, length_s):
    """Of a video of as many frames; whoever has another one has another length, too."""
    video = annotations.VideoAnnotation(FIRST, "Film", "VT", told_s, 10_597, np.ones((1, 10_597)))
    official_files.write_tvsum_tsv(tmp_path, [video])
    [found] = annotations.read_tsv(
        tmp_path / "ydata-tvsum50-anno.tsv", tmp_path / "ydata-tvsum50-info.tsv"
    )
    assert found.length_s == length_s


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "",
            r"is built from files that you get\..*ydata-tvsum50-video\.zip.*data\.manual_dir",
        ),
        ("gs://bucket/tvsum", "is no folder of this machine"),
        ("/nowhere/at/all", "no such folder"),
    ],
)
def test_no_download(tmp_path, where, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        records.build(TVSum, tmp_path, "1fps", manual_dir=where)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_level_is_told_from_the_right_one(download, tmp_path):
    download = download.rename(tmp_path / "tvsum")
    for wrong in (download / "video", download / "matlab", tmp_path):
        with pytest.raises(UserError, match=f"did you mean {download}"):
            annotations.load(wrong)
    shutil.rmtree(download / "video")
    assert "but no videos; unpack the videos beside" in refused(download)


def test_files_of_features_that_do_not_fit(download):
    path = download / "f.h5"

    def with_change(name: str, value: object) -> str:
        official_files.write_features(path, annotations.VIDEO_IDS[1:3])
        with h5py.File(path, "r+") as file:
            del file[f"video_1/{name}"]
            if value is not None:
                file[f"video_1/{name}"] = value
        return refused(download, "features_partial")

    where = f"{path}, group 'video_1' ({SECOND}): "
    assert f"{where}there is no field 'picks'" in with_change("picks", None)
    assert f"{where}features holds what is not" in with_change("features", np.full((4, 8), np.nan))
    assert f"{where}3 features, 4 picks, 4 gtscores" in with_change("features", np.ones((3, 8)))
    assert f"{where}change_points do not lead" in with_change("change_points", [[0, 29], [30, 60]])
    assert f"{where}change_points leave out" in with_change("change_points", [[0, 28], [30, 59]])
    assert f"{where}n_frame_per_seg are not" in with_change("n_frame_per_seg", [30, 31])
    assert f"{where}picks do not ascend" in with_change("picks", [0, 15, 30, 60])
    assert f"{where}user_summary is of" in with_change("user_summary", np.ones((3, 59)))
    assert "summaries of 2 people, and 3" in with_change("user_summary", np.ones((2, 60)))
    assert "is 'x', no video of this data set" in with_change("video_name", "x")
    official_files.write_features(path, [SECOND], n_frames=64)
    message = f"video {SECOND} has n_frames=64, and its annotations are of 60 frames"
    assert message in refused(download, "features_partial")
    path.write_bytes(b"features")
    assert f"{path} is not an HDF5 file" in refused(download, "features_partial")
    path.unlink()
    assert f"{download}: there is no HDF5 file of features" in refused(download, "features")


def test_without_names_the_features_are_numbered_as_the_mat(download):
    scores = official_files.tvsum_scores()
    rewrite(download, scores=scores)
    official_files.write_features(download / "f.h5", annotations.VIDEO_IDS, named=False)
    found = records.read(make(download, "features"), records.ALL)
    for k, record in enumerate(found):
        assert record["video_id"] == annotations.VIDEO_IDS[k]
        assert (record["features"] == k).all()
        np.testing.assert_array_equal(record["user_scores"], scores[record["video_id"]][:, ::15])
        assert record["user_summary"][:, :5].all()
    assert len(found) == 50
    assert found[0]["frames"] == []
    assert found[0]["features"].dtype == np.float16
    assert found[0]["n_frame_per_seg"].tolist() == [30, 30]


def test_several_files_of_features(download):
    for name in ("a.h5", "features/b.h5"):
        official_files.write_features(download / name, [FIRST], n_frames=360)
    assert "several files of features" in refused(download, "features_partial")
    (download / "a.h5").rename(download / "features" / "eccv16_dataset_tvsum.h5")
    metadata = make(download, "features_partial").info.metadata
    assert metadata["change_points"] == "of eccv16_dataset_tvsum.h5"


def test_features_beside_a_linked_download(download, tmp_path):
    linked = tmp_path / "elsewhere" / "tvsum"
    linked.parent.mkdir()
    linked.symlink_to(download)
    path = linked.parent / "features" / "tvsum.hdf5"
    official_files.write_features(path, [FIRST], n_frames=360)
    official_files.write_features(path.with_name("summe.h5"), [FIRST])
    found = make(linked, "features_partial").info.metadata
    assert found["features"]["file"] == "tvsum.hdf5"
    path.rename(tmp_path / "tvsum.hdf5")
    features = tmp_path / "features"
    features.mkdir()
    (tmp_path / "tvsum.hdf5").rename(features / "tvsum.h5")
    found = records.build(TVSum, tmp_path, "features_partial", manual_dir=linked).info.metadata
    assert found["features"]["file"] == "tvsum.h5"


def test_titles_as_the_videos_had_them(download):
    path = rewrite(download)
    with h5py.File(path, "r+") as file:
        del file["#refs#/title0"], file["#refs#/title1"]
        for name, title in (("title0", "Vi\xf1a"), ("title1", '"One, two"')):
            bytes_as_letters = np.array([[byte] for byte in title.encode()], np.uint16)
            cell = file["#refs#"].create_dataset(name, data=bytes_as_letters)
            file["tvsum50/title"][int(name[-1]), 0] = cell.ref
    assert [video.title for video in annotations.load(download)[:2]] == ["Vi\xf1a", "One, two"]


def test_shots_in_frames_of_the_original():
    times = np.array([[0, 1.01], [1.01, 1.02], [1.02, 2.1]])  # a frame lasts 0.1 s
    assert annotated.native_shots(times, 20, 2.0).tolist() == [[0, 10], [10, 20]]
    assert annotated.native_shots(np.array([[0, 2.0], [2.0, 2.1]]), 20, 2.0).tolist() == [[0, 20]]


def test_the_command_says_what_it_built(download, capsys):
    command = [
        "tvsum/1fps", "--manual_dir", str(download), "--data_dir", str(download.parent / "built"),
    ]  # fmt: skip
    assert build.main(command) == 2
    assert "lacks 49 of the 50" in capsys.readouterr().err
    assert build.main([*command, "--allow_missing"]) == 0
    out = capsys.readouterr().out
    assert f"tvsum/1fps_partial is in {download.parent / 'built'}" in out
    assert "videos: 1 videos" in out
    assert f"missing: {SECOND}," in out


# ---- The real annotations ----


def test_official_annotations(shared_data):
    videos = annotations.load(shared_data / "tvsum")
    assert len(videos) == 50
    first = videos[0]
    assert (first.video_id, first.category) == ("AwmHb44_ouw", "VT")
    assert first.title == "#1306 How to change tires for off road vehicles [Davidsfarm]"
    assert (first.n_frames, first.length_s) == (10_597, 353.593)
    assert first.user_scores.shape == (20, 10_597)
    assert first.point_scores.shape == (20, 707)
    assert first.point_times[1] == pytest.approx(15.5 * 353.593 / 10_597)
    # What is written down here for the tables, which round lengths to seconds.
    known = {(video.video_id, video.n_frames): video.length_s for video in videos}
    assert known == annotations._LENGTHS_S


def test_real_scores_written_as_tables_are_read_with_the_exact_lengths(shared_data, tmp_path):
    videos = annotations.load(shared_data / "tvsum")[3::10]
    assert videos[0].title == "\u0160KODA Tips How to Repair Your Tyre"
    quoted = [dataclasses.replace(video, title=f'"{video.title}"') for video in videos]
    official_files.write_tvsum_tsv(tmp_path, quoted)
    found = annotations.read_tsv(
        tmp_path / "ydata-tvsum50-anno.tsv", tmp_path / "ydata-tvsum50-info.tsv"
    )
    for video, same in zip(videos, found, strict=True):
        np.testing.assert_array_equal(video.user_scores, same.user_scores)
        for name in ("video_id", "title", "category", "length_s", "n_frames"):
            assert getattr(video, name) == getattr(same, name)


def test_real_features_of_all_videos(shared_data, tmp_path):
    builder = records.build(TVSum, tmp_path, "features", manual_dir=shared_data / "tvsum")
    found = records.read(builder, records.ALL)
    assert tuple(record["video_id"] for record in found) == annotations.VIDEO_IDS
    record = found[0]
    assert (record["n_frames"], record["n_steps"]) == (10_597, 707)
    assert record["duration_s"] == pytest.approx(353.593)
    assert record["features"].shape == (707, 512)
    assert record["picks"][[0, 1, -1]].tolist() == [0, 15, 10_590]
    assert record["change_points"][[0, 1, -1]].tolist() == [[0, 30], [30, 60], [10_080, 10_597]]
    # The file's summaries are those of the annotators by its own shots, up to ties; summaries of
    # 15 % drawn at random would agree in three frames of four.
    mean = np.mean(
        [
            (
                select.annotator_summaries(video.user_scores, one["change_points"], video.n_frames)
                == one["user_summary"]
            ).mean()
            for video, one in zip(annotations.load(shared_data / "tvsum"), found, strict=True)
        ]
    )
    assert mean > 0.99


def test_real_videos(shared_data, tmp_path):
    folder = tmp_path / "some"
    (folder / "video").mkdir(parents=True)
    (folder / "matlab").symlink_to(shared_data / "tvsum" / "matlab")
    chosen = ("AwmHb44_ouw", "iVt07TCkFM0")
    for video_id in chosen:
        name = f"{video_id}.mp4"
        (folder / "video" / name).symlink_to(shared_data / "tvsum" / "video" / name)
    found = records.read(make(folder), records.ALL)
    assert tuple(record["video_id"] for record in found) == chosen
    record = found[0]
    assert len(record["frames"]) == 354
    assert record["frame_times"][-1] == 353
    assert record["user_scores"].shape == (20, 707)
    assert record["score_times"][-1] == pytest.approx(10_590.5 * 353.593 / 10_597)
    assert record["user_summary"].shape == (20, 10_597)
    assert record["user_summary"].mean(axis=1).max() <= 0.15
    assert record["user_summary"].mean(axis=1).min() > 0.14
    assert record["change_points"][-1, 1] == 10_597


# ---- The benchmark ----


def test_the_benchmark_builds_four_copies_of_a_film(tmp_path, capsys):
    film = three_shots(tmp_path / "film.mkv", fps=10, seconds=2)
    assert benchmark_build.main(["--clip", str(film), "--repeats", "1"]) == 0
    assert "clip: 8 s of video in " in capsys.readouterr().out
    assert benchmark_build.main([]) == 2
    assert "give --manual_dir, --clip or both" in capsys.readouterr().err
    assert benchmark_build.main(["--clip", str(tmp_path / "none.mkv")]) == 2
    assert "no such file" in capsys.readouterr().err
    assert benchmark_build.main(["--clip", str(film), "--repeats", "0"]) == 2
    assert "--repeats 0: nothing to measure" in capsys.readouterr().err
