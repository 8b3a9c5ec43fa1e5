"""What is built is only opened: unless it was built of other files; also while others build it."""

import os
import pathlib
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest

from deevisum_jax.errors import UserError
from tests import official_files
from tfds_builders import annotated, downloads, records, workers
from tfds_builders.tvsum.annotations import VIDEO_IDS
from tfds_builders.tvsum.tvsum import TVSum


@pytest.fixture
def download(tmp_path) -> pathlib.Path:
    """TVSum's annotations, and features of all its videos but the last."""
    folder = tmp_path / "tvsum"
    official_files.write_tvsum_mat(
        folder / "matlab" / "ydata-tvsum50.mat", official_files.tvsum_scores()
    )
    official_files.write_features(folder / "f.h5", VIDEO_IDS[:49])
    return folder


def build(tmp_path: pathlib.Path, manual_dir: object = "") -> int:
    """The number of records."""
    data_dir = tmp_path / "built"
    builder = records.build(TVSum, data_dir, "features_partial", manual_dir=manual_dir)
    return len(records.read(builder, records.ALL))


def refused(tmp_path: pathlib.Path, manual_dir: pathlib.Path) -> str:
    with pytest.raises(UserError) as caught:
        build(tmp_path, manual_dir)
    message = str(caught.value)
    assert "tvsum/features_partial/1.0.0 was built of other files than are in" in message
    assert f"{manual_dir} now: " in message
    assert "remove the former to build it anew, or leave out --config.data.manual_dir" in message
    return message


def test_it_is_opened_with_the_same_files_with_none_and_with_what_is_left(tmp_path, download):
    assert build(tmp_path, download) == 49
    elsewhere = shutil.copytree(download, tmp_path / "copy")
    empty = tmp_path / "empty"
    empty.mkdir()
    for manual_dir in (download, elsewhere, "", tmp_path / "nowhere", empty):
        assert build(tmp_path, manual_dir) == 49


def test_other_features_than_it_was_built_of_are_refused(tmp_path, download):
    build(tmp_path, download)
    with h5py.File(download / "f.h5", "r+") as file:  # as large as before
        file["video_1/features"][...] = 7
    assert ": f.h5 is another;" in refused(tmp_path, download)
    official_files.write_features(download / "f.h5", VIDEO_IDS)
    assert ": f.h5 is another;" in refused(tmp_path, download)
    (download / "f.h5").rename(download / "g.h5")
    assert ": g.h5 is new, f.h5 is gone;" in refused(tmp_path, download)
    assert build(tmp_path) == 49


def test_other_annotations_than_it_was_built_of_are_refused(tmp_path, download):
    build(tmp_path, download)
    path = download / "matlab" / "ydata-tvsum50.mat"
    with h5py.File(path, "r+") as file:
        file["#refs#/user_anno0"][...] = 3
    assert f": {path.name} is another;" in refused(tmp_path, download)


def test_other_videos_than_it_was_built_of_are_refused(tmp_path, download, monkeypatch):
    (download / "f.h5").unlink()
    for video_id in VIDEO_IDS[:3]:
        path = download / "video" / f"{video_id}.mp4"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"a video")

    def without_decoding(builder, videos, paths, described):
        for index, (video, path) in enumerate(zip(videos, paths, strict=True)):
            builder.info.metadata["videos"][video.video_id] = downloads.fingerprint(path)
            media = {"transcript": [], "audio": [], "frames": [], "frame_times": []}
            shots = annotated.native_shots(np.array([[0, 2.0]]), 60, 2.0)
            yield index, video.fields(shots) | media

    monkeypatch.setattr(annotated, "_video_examples", without_decoding)

    def make(manual_dir: object = download) -> int:
        built = records.build(TVSum, tmp_path / "built", "1fps_partial", manual_dir=manual_dir)
        return len(records.read(built, records.ALL))

    assert make() == make() == 3
    new = download / "video" / f"{VIDEO_IDS[4]}.mp4"
    new.write_bytes(b"a video that was missing")
    with pytest.raises(UserError, match=rf"now: {VIDEO_IDS[4]}.mp4 is new; remove"):
        make()
    new.unlink()
    for video_id in VIDEO_IDS[:2]:
        (download / "video" / f"{video_id}.mp4").write_bytes(b"another video")
    with pytest.raises(UserError, match=rf"{VIDEO_IDS[0]}.mp4 is another, {VIDEO_IDS[1]}.mp4 is"):
        make()
    official_files.write_features(download / "f.h5", VIDEO_IDS)
    with pytest.raises(UserError, match=r"now: f\.h5 is new"):
        make()
    (download / "f.h5").unlink()
    shutil.rmtree(download / "video")  # to have room, now that they are built
    assert make() == 3


def test_of_two_that_build_at_a_time_the_second_opens_what_the_first_has_built(
    tmp_path, download, monkeypatch
):
    examples, others = annotated._feature_examples, []

    def while_another_builds(*args):
        if not others:
            others.append(None)
            others[0] = build(tmp_path, download)  # begins later, and is done first
        yield from examples(*args)

    monkeypatch.setattr(annotated, "_feature_examples", while_another_builds)
    assert build(tmp_path, download) == 49
    assert others == [49]
    made = tmp_path / "built" / "tvsum" / "features_partial"
    assert [path.name for path in made.iterdir()] == ["1.0.0"]


def test_a_build_that_is_killed_leaves_nothing_that_is_taken_for_one(tmp_path, download):
    code = (
        "import os, pathlib, signal, sys\n"
        "from tests.tfds_builders import test_records\n"
        "examples = test_records.annotated._feature_examples\n"
        "def dying(*args):\n"
        "    yield next(examples(*args))\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "test_records.annotated._feature_examples = dying\n"
        "test_records.build(pathlib.Path(sys.argv[1]), sys.argv[2])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(download)]
    done = subprocess.run(
        command, cwd=workers.ROOT, env={**os.environ, "PYTHONPATH": str(workers.ROOT)}, check=False
    )
    assert done.returncode == -9
    [left] = (tmp_path / "built" / "tvsum" / "features_partial").iterdir()
    assert left.name.startswith("incomplete.")
    assert build(tmp_path, download) == 49
