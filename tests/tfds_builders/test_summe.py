"""SumMe as downloaded becomes records: names with spaces, selections, files of other lengths."""

import pathlib
import shutil

import numpy as np
import pytest
import scipy.sparse

from deevisum_jax.errors import UserError
from tests import media, official_files
from tests.official_files import FPS
from tfds_builders import records
from tfds_builders.summe import annotations
from tfds_builders.summe.summe import SumMe

NAMES = ("Base jumping", "car_over_camera")  # the 2nd and the 23rd


@pytest.fixture
def download(tmp_path) -> pathlib.Path:
    """All annotations, and two videos of 4 s in other containers and at other rates."""
    folder = tmp_path / "SumMe"
    official_files.write_summe_gt(folder / "GT", dict.fromkeys(NAMES, 4 * FPS))
    (folder / "videos").mkdir()
    frames = np.zeros((60, 32, 48, 3), np.uint8)
    media.write_video(folder / "videos" / f"{NAMES[0]}.mp4", frames, fps=15)
    # Three frames more than were annotated, as other decoders count them.
    media.write_video(folder / "videos" / f"{NAMES[1]}.avi", np.resize(frames, (123, 32, 48, 3)),
                      fps=FPS, codec="mpeg4")  # fmt: skip
    return folder


def make(folder: pathlib.Path, config: str = "1fps_partial"):
    return records.build(SumMe, folder.parent / "built", config, manual_dir=folder)


def refused(folder: pathlib.Path, config: str = "1fps_partial") -> str:
    with pytest.raises(UserError) as caught:
        make(folder, config)
    return str(caught.value)


def test_records_hold_what_people_chose(download):
    found = records.read(make(download), records.ALL)
    assert [record["video_id"] for record in found] == list(NAMES)
    assert [record["title"] for record in found] == ["Base jumping", "car over camera"]
    for record in found:
        assert (record["n_frames"], record["native_fps"], record["duration_s"]) == (120, 30.0, 4.0)
        assert record["frame_times"][:4].tolist() == [0, 1, 2, 3]
        # The file holds 3 where a frame is in the third part that was chosen.
        chosen = record["user_summary"]
        assert [row.nonzero()[0].tolist() for row in chosen] == [
            list(range(0, 10)), list(range(10, 20)), list(range(20, 30))
        ]  # fmt: skip
        np.testing.assert_array_equal(record["user_scores"], chosen)
        assert record["user_scores"].dtype == np.float32
        np.testing.assert_allclose(record["score_times"], (np.arange(120) + 0.5) / 30, rtol=1e-6)
        assert record["change_points"][0, 0] == 0
        assert record["change_points"][-1, 1] == 120


def test_what_is_missing_is_named(download):
    message = refused(download, "1fps")
    assert f"{download / 'videos'} lacks 23 of the 25 videos of summe: Air_Force_One, " in message
    assert "Bearpark_climbing" in message
    assert not any(name in message for name in NAMES)


def test_features(download):
    official_files.write_summe_gt(download / "GT")
    official_files.write_features(download / "features" / "summe.h5", annotations.VIDEO_IDS)
    found = records.read(make(download, "features"), records.ALL)
    assert [record["video_id"] for record in found] == list(annotations.VIDEO_IDS)
    assert (found[22]["features"] == 22).all()
    # What people chose, which the .mat tells; the file has frames 0 to 4 for everybody.
    assert found[22]["user_summary"][1].nonzero()[0].tolist() == list(range(10, 20))


def test_either_length_of_a_file_will_do(download):
    """A .mat tells 4 s of frames and, of the file, 6 s."""
    gt = download / "GT" / f"{NAMES[0]}.mat"
    official_files.write_summe_mat(gt, 4 * FPS, video_duration=6.0)
    path = download / "videos" / f"{NAMES[0]}.mp4"
    for seconds in (3, 7):  # a second beside either
        media.write_video(path, np.zeros((15 * seconds, 32, 48, 3), np.uint8), fps=15)
        shutil.rmtree(download.parent / "built", ignore_errors=True)
        assert make(download).info.splits[records.ALL].num_examples == 2
    media.write_video(path, np.zeros((15 * 8, 32, 48, 3), np.uint8), fps=15)
    shutil.rmtree(download.parent / "built")
    assert f"{path}: the annotations of video {NAMES[0]} are shorter" in refused(download)


def test_webm_and_what_is_unusual_about_a_file(download):
    (download / "videos" / f"{NAMES[0]}.mp4").unlink()
    times = np.delete(np.arange(60) / 15, range(20, 35))  # a second without pictures
    media.write_video(
        download / "videos" / f"{NAMES[0]}.webm", np.zeros((45, 32, 48, 3), np.uint8),
        times_s=times, codec="libvpx",
    )  # fmt: skip
    (download / "videos" / f"._{NAMES[0]}.webm").write_bytes(b"about a file")
    (download / "GT" / "._Jumps.mat").write_bytes(b"about a file")
    metadata = make(download).info.metadata
    assert metadata["videos"][NAMES[0]]["file"] == f"{NAMES[0]}.webm"
    assert list(metadata["notes"]) == [NAMES[0]]
    assert metadata["notes"][NAMES[0]][0].startswith("variable frame rate: frames last 66 to")


def test_two_files_of_one_video(download):
    path = download / "GT" / "Jumps.mat"
    shutil.copy(path, path.with_suffix(".MAT"))
    assert f"{path.with_suffix('.MAT')} and {path} are of the same" in refused(download)


def test_a_sparse_matrix_is_as_good(download):
    path = download / "GT" / "Jumps.mat"
    whole = annotations.read_mat(path)
    sparse = scipy.sparse.csc_matrix(whole.user_summary.T.astype(float))
    official_files.write_summe_mat(path, user_score=sparse)
    np.testing.assert_array_equal(annotations.read_mat(path).user_summary, whole.user_summary)


@pytest.mark.parametrize(("seconds", "word"), [(2, "longer"), (7, "shorter")])
def test_annotations_longer_or_shorter_than_the_video(download, seconds, word):
    path = download / "videos" / f"{NAMES[0]}.mp4"
    media.write_video(path, np.zeros((15 * seconds, 32, 48, 3), np.uint8), fps=15)
    message = refused(download)
    assert f"{path}: the annotations of video {NAMES[0]} are {word} than the video" in message
    assert f"4.00 s and the video {seconds}.00 s" in message


def test_mats_of_another_kind(download):
    path = download / "GT" / "Jumps.mat"
    official_files.write_summe_mat(path, user_score=None)
    assert f"{path}: there is no 'user_score' in it" in refused(download)
    official_files.write_summe_mat(path, nFrames=61)
    assert f"{path}: user_score is of shape [60, 3] and nFrames 61" in refused(download)
    scores = np.zeros((60, 3))
    scores[7, 1] = np.nan
    official_files.write_summe_mat(path, user_score=scores)
    message = f"{path}: the score of annotator 2 for frame 7 of video Jumps is nan"
    assert message in refused(download)
    official_files.write_summe_mat(path, user_score=np.full((60, 3), "x"))
    assert f"{path}: user_score " in refused(download)
    official_files.write_summe_mat(path, FPS=0)
    assert f"{path}: nFrames is 60, FPS 0 and" in refused(download)
    for name in ("nFrames", "FPS", "video_duration"):
        official_files.write_summe_mat(path, **{name: np.inf})
        assert "inf" in refused(download)
    official_files.write_summe_mat(path, FPS=[25, 30])
    assert f"{path}: nFrames, FPS or video_duration: " in refused(download)
    official_files.write_tvsum_mat(path, official_files.tvsum_scores())
    assert f"{path} is no MATLAB file" in refused(download)
    path.write_bytes(b"<html>not found</html>")
    assert f"{path} is no MATLAB file" in refused(download)


def test_annotations_of_other_videos(download):
    (download / "GT" / "Jumps.mat").rename(download / "GT" / "jumps.mat")
    assert f"{download / 'GT'} has no annotations of Jumps;" in refused(download)
    official_files.write_summe_mat(download / "GT" / "Jumps.mat")
    assert f"{download / 'GT' / 'jumps.mat'} is of no video of SumMe" in refused(download)


def test_a_folder_of_another_level_is_told_from_the_right_one(download, tmp_path):
    download = download.rename(tmp_path / "summe")
    for wrong in (download / "GT", download / "videos", tmp_path):
        with pytest.raises(UserError, match=f"did you mean {download}"):
            annotations.load(wrong)


# ---- The real annotations ----


def test_official_annotations(shared_data):
    videos = {video.video_id: video for video in annotations.load(shared_data / "summe")}
    assert tuple(videos) == annotations.VIDEO_IDS
    first = videos["Air_Force_One"]
    assert first.user_summary.shape == (15, 4_494)
    assert first.native_fps == 25
    assert first.length_s == 179.76
    # The lengths of two files are told by more than their pictures last.
    assert videos["Jumps"].video_duration_s - videos["Jumps"].length_s > 1.3


def test_real_videos(shared_data, tmp_path):
    builder = records.build(SumMe, tmp_path, "1fps_partial", manual_dir=shared_data / "summe")
    jump, ball = records.read(builder, records.ALL)
    assert (jump["video_id"], ball["video_id"]) == ("paluma_jump", "playing_ball")
    assert (jump["n_frames"], ball["n_frames"]) == (2_574, 3_120)
    assert len(jump["frames"]) == 86  # 85.9 s
    assert jump["user_summary"].shape == (15, 2_574)
    assert ball["user_summary"].shape == (16, 3_120)
    assert jump["user_summary"].mean(axis=1).min() > 0.05
    assert ball["score_times"][-1] == pytest.approx(3_119.5 / 30)
