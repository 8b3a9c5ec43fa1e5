"""Data sets by name, in folds, and in buckets: built once, copied to every host, never half."""

import dataclasses
import errno
import json
import os
import shutil

import numpy as np
import pytest

from deevisum_jax import datasets, files, main, training_log
from deevisum_jax.config import DataConfig
from deevisum_jax.errors import UserError
from tests import official_files
from tests.conftest import TINY_CONFIG, TINY_MESH
from tests.gcs_server import READ_ONLY
from tfds_builders import records
from tfds_builders.synthetic.synthetic import Synthetic
from tfds_builders.tvsum.annotations import VIDEO_IDS

# gcsfs hands over what it uploads as bytes, which Python does not show unless asked to.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")

NAME = "synthetic/tiny"
VERSION = "synthetic/tiny/1.0.0"
TEST_RECORDS = "synthetic-test.array_record-00000-of-00001"


@pytest.fixture
def on_host(tmp_path, monkeypatch):
    """Goes to the host of this name: one with a cache of its own."""

    def go(host: str) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / host))

    go("first")
    return go


@pytest.fixture
def no_building(monkeypatch):
    monkeypatch.setattr(
        Synthetic, "_split_generators", lambda *args: pytest.fail("it was there, and was built")
    )


@pytest.fixture
def quick_building(data_dir, monkeypatch):
    """A data set is built in no time."""
    build = datasets._build

    def copy_first(wanted, folder):
        shutil.copytree(data_dir, folder, dirs_exist_ok=True)
        return build(wanted, folder)

    monkeypatch.setattr(datasets, "_build", copy_first)


@pytest.fixture
def uploaded(bucket, data_dir, no_building):
    """A bucket with a data set."""
    for path in (data_dir / VERSION).iterdir():
        files.write_whole(bucket / VERSION / path.name, path.read_bytes())
    return bucket


def open_set(folder) -> datasets.Dataset:
    return datasets.Dataset(DataConfig(dataset=NAME, data_dir=os.fspath(folder)))


def assert_equal(found, expected) -> None:
    assert len(found) == len(expected) > 0
    for record, other in zip(found, expected, strict=True):
        assert record.keys() == other.keys()
        for name, value in record.items():
            np.testing.assert_equal(value, other[name], err_msg=name)


# ---- Folds ----


@pytest.fixture(scope="module")
def tvsum(tmp_path_factory) -> dict[str, str]:
    """Fields of a config for TVSum's features, of which the 50th video is missing."""
    folder = tmp_path_factory.mktemp("tvsum")
    official_files.write_tvsum_mat(
        folder / "matlab" / "ydata-tvsum50.mat", official_files.tvsum_scores()
    )
    official_files.write_features(folder / "features.h5", VIDEO_IDS[:49])
    fields = {"manual_dir": str(folder), "data_dir": str(folder / "built")}
    return fields | {"dataset": "tvsum/features", "allow_missing": True}


def ids(found: records.Records) -> list[str]:
    return [record["video_id"] for record in found]


def test_splits_of_a_fold(tvsum):
    data = datasets.Dataset(DataConfig(**tvsum, folds="community", fold=1))
    assert ids(data.records()) == list(VIDEO_IDS[:49])
    # The second published fold tests these videos, by number.
    wanted = (10, 11, 13, 15, 19, 24, 33, 44, 45, 47)
    assert ids(data.split("test")) == [VIDEO_IDS[number - 1] for number in wanted]
    train, validation = ids(data.split("train")), ids(data.split("validation"))
    assert len(validation) == 4  # a tenth of the 39 that are there
    assert set(train) | set(validation) == set(VIDEO_IDS[:49]) - set(ids(data.split("test")))
    assert not set(train) & set(validation)
    assert train == [video for video in VIDEO_IDS if video in train]  # still in official order
    with pytest.raises(IndexError, match="there are 4 records, got index 4"):
        data.split("validation")[4]
    with pytest.raises(UserError, match="no split 'tset'; did you mean 'test'"):
        data.split("tset")


def test_the_seed_parts_the_videos_and_chooses_who_validates(tvsum):
    def parts(**fields: object) -> tuple[list[str], list[str]]:
        data = datasets.Dataset(DataConfig(**tvsum, **fields))
        return ids(data.split("test")), ids(data.split("validation"))

    tested = [parts(folds="partition", fold=fold)[0] for fold in range(5)]
    assert sorted(video for test in tested for video in test) == sorted(VIDEO_IDS[:49])
    assert parts(folds="partition", folds_seed=1)[0] != tested[0]
    first, second = parts(folds="community"), parts(folds="community", folds_seed=1)
    assert first[0] == second[0]
    assert first[1] != second[1]


def test_folds_of_a_file(tvsum, tmp_path):
    path = tmp_path / "folds.json"
    train = [f"video_{number}" for number in (5, 2, 3)]
    path.write_text(json.dumps([{"train_keys": train, "test_keys": [VIDEO_IDS[0], "video_50"]}]))
    data = datasets.Dataset(DataConfig(**tvsum, folds=str(path)))
    assert ids(data.split("test")) == [VIDEO_IDS[0]]
    assert sorted(ids(data.split("train")) + ids(data.split("validation"))) == sorted(
        VIDEO_IDS[k] for k in (1, 2, 4)
    )
    path.write_text(json.dumps([{"train_keys": train, "test_keys": ["video_50"]}]))
    with pytest.raises(
        UserError, match=r"fold 0 of .* trains on 3 and tests on 0 of the 49 videos"
    ):
        datasets.Dataset(DataConfig(**tvsum, folds=str(path)))
    keys = [VIDEO_IDS[0], "video_50"]  # and the latter is not there
    path.write_text(json.dumps([{"train_keys": keys, "test_keys": [VIDEO_IDS[1]]}]))
    with pytest.raises(UserError, match=r"trains on 1 and tests on 1 .* it takes 2 and 1 at least"):
        datasets.Dataset(DataConfig(**tvsum, folds=str(path)))


def test_folds_where_there_are_none_and_none_where_there_must_be(tvsum, data_dir):
    with pytest.raises(UserError, match="one split, 'videos', and 'train' was asked for"):
        datasets.Dataset(DataConfig(**tvsum)).split("train")
    own = DataConfig(dataset=NAME, data_dir=str(data_dir), folds="partition")
    with pytest.raises(UserError, match=r"splits of its own \(test, train, validation\); set"):
        datasets.Dataset(own)
    with pytest.raises(UserError, match=r"data\.fold=5 is out of range"):
        datasets.Dataset(DataConfig(**tvsum, folds="community", fold=5))


def test_all_videos_of_a_data_set_in_one_piece_have_ids(tvsum, data_dir):
    assert datasets.Dataset(DataConfig(**tvsum)).video_ids == VIDEO_IDS
    with pytest.raises(UserError, match=r"splits of its own \(test, train, validation\), which"):
        _ = open_set(data_dir).video_ids


def test_what_can_lack_no_videos_is_not_built_without_some(data_dir):
    own = DataConfig(dataset=NAME, data_dir=str(data_dir), allow_missing=True)
    with pytest.raises(UserError, match="synthetic/tiny is not built from videos that could"):
        datasets.Dataset(own)


# ---- Building ----


def test_a_first_build_says_whose_shots_they_are(tvsum, tmp_path, capfd):
    data = DataConfig(**{**tvsum, "data_dir": str(tmp_path)})
    told = "data set tvsum/features_partial is built; shots: of features.h5"
    datasets.Dataset(data)
    assert told in capfd.readouterr().err
    datasets.Dataset(data)
    assert told not in capfd.readouterr().err


def test_other_files_than_a_data_set_was_built_of(tvsum, tmp_path):
    datasets.Dataset(DataConfig(**tvsum))
    other = tmp_path / "tvsum"
    shutil.copytree(os.path.join(tvsum["manual_dir"], "matlab"), other / "matlab")
    official_files.write_features(other / "features.h5", VIDEO_IDS[:48])
    with pytest.raises(UserError, match=r"1\.0\.0 was built of other files .* features\.h5 is ano"):
        datasets.Dataset(DataConfig(**{**tvsum, "manual_dir": str(other)}))


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(UserError, match=r"cannot be built in .*file.*; give a folder that can be"):
        open_set(tmp_path / "file" / "data")


@pytest.mark.parametrize(
    ("number", "file", "wanted"),
    [
        (errno.ENOSPC, None, UserError),
        (errno.EACCES, "built/synthetic", UserError),
        (errno.EIO, "films/one.mp4", OSError),
    ],
)
def test_only_what_cannot_be_written_is_blamed_on_the_folder(
    tmp_path, monkeypatch, number, file, wanted
):
    tries = []

    def failing(*args):
        tries.append(args)
        raise OSError(number, os.strerror(number), file and str(tmp_path / file))

    monkeypatch.setattr(Synthetic, "_split_generators", failing)
    with pytest.raises(wanted, match=os.strerror(number)):
        open_set(tmp_path / "built")
    assert len(tries) == 1


# ---- Buckets ----


def test_what_is_built_from_downloaded_files_is_uploaded(gcs, bucket, on_host, tvsum, tmp_path):
    in_bucket = DataConfig(**{**tvsum, "data_dir": str(bucket)})
    there = datasets.Dataset(in_bucket).records()
    assert gcs.written[-1].endswith("tvsum/features_partial/1.0.0/dataset_info.json")
    assert_equal(there, datasets.Dataset(DataConfig(**tvsum)).records())
    on_host("second")
    elsewhere = DataConfig(dataset=tvsum["dataset"], allow_missing=True, data_dir=str(bucket))
    assert_equal(datasets.Dataset(elsewhere).records(), there)  # needs no downloaded files
    other = tmp_path / "tvsum"
    shutil.copytree(os.path.join(tvsum["manual_dir"], "matlab"), other / "matlab")
    with pytest.raises(UserError, match=f"{bucket}/tvsum/.* was built of .* features.h5 is gone"):
        datasets.Dataset(dataclasses.replace(in_bucket, manual_dir=str(other)))


def test_it_is_built_once_and_every_host_has_a_copy(
    gcs, bucket, on_host, data_dir, request, monkeypatch
):
    files.write_whole(bucket / VERSION / TEST_RECORDS, "half of an upload that was killed")
    built = open_set(bucket)
    assert gcs.written[-1].endswith(f"{VERSION}/dataset_info.json")
    [_, video] = sorted((bucket / "synthetic" / "tiny" / "videos" / "test").glob("*.mp4"))
    assert video.read_bytes() == (data_dir / video.relative_to(bucket)).read_bytes()
    request.getfixturevalue("no_building")
    on_host("second")
    num_written = len(gcs.written)
    copied = open_set(bucket)
    for split in ("train", "validation", "test"):
        for found in (built, copied):
            assert_equal(found.split(split), open_set(data_dir).split(split))
    monkeypatch.setattr(files, "local_copy", lambda _: pytest.fail("it was here"))
    assert_equal(open_set(bucket).split("test"), copied.split("test"))
    assert len(gcs.written) == num_written


def test_what_has_changed_in_the_bucket_is_copied_again(uploaded, on_host):
    before = open_set(uploaded)
    other = uploaded / VERSION / TEST_RECORDS.replace("test", "validation")
    files.write_whole(uploaded / VERSION / TEST_RECORDS, other.read_bytes())
    after = open_set(uploaded)
    assert_equal(after.split("test"), before.split("validation"))
    assert before.split("test")[0]["video_id"] != after.split("test")[0]["video_id"]


def test_without_all_records_it_is_not_taken(uploaded, on_host):
    (uploaded / VERSION / TEST_RECORDS).unlink()
    with pytest.raises(UserError, match=r"1\.0\.0 holds 2 of 3 files of records; wait until all"):
        open_set(uploaded)


def test_a_failed_upload_is_not_taken_and_made_again(gcs, bucket, on_host, quick_building):
    gcs.refuses = TEST_RECORDS
    with pytest.raises(UserError, match=f"{TEST_RECORDS} cannot be written: you have no right"):
        open_set(bucket)
    assert not files.exists(bucket / VERSION / "dataset_info.json")
    gcs.refuses = ""
    assert len(open_set(bucket).split("test")) == 2


def test_a_stopped_download_is_not_taken_and_goes_on(uploaded, on_host, monkeypatch, capfd):
    download, asked = files.local_copy, []

    def fail_at_records(path):
        asked.append(path.name)
        if path.name == TEST_RECORDS and asked.count(path.name) == 1:
            raise UserError("the network is gone")
        return download(path)

    monkeypatch.setattr(files, "local_copy", fail_at_records)
    monkeypatch.setattr(files, "_NUM_TRANSFERS", 1)
    monkeypatch.setattr(files, "_TOLD_S", 0)
    with pytest.raises(UserError, match="the network is gone"):
        open_set(uploaded)
    assert len(open_set(uploaded).split("test")) == 2
    assert len(asked) == len(set(asked)) + 1
    assert set(asked) == {path.name for path in (uploaded / VERSION).iterdir()}
    assert f"GB of {uploaded / VERSION} downloaded" in capfd.readouterr().err


def test_a_disk_that_is_too_small_for_a_copy(uploaded, on_host, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2_000_000))
    with pytest.raises(UserError, match=r"GB and its disk has 0\.002 GB left.*XDG_CACHE_HOME"):
        open_set(uploaded)


def test_a_cache_that_cannot_be_written(uploaded, on_host, tmp_path):
    (tmp_path / "first").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written.*set XDG_CACHE_HOME to a folder"):
        open_set(uploaded)


@pytest.mark.parametrize(
    ("address", "name", "message"),
    [
        ("gs://absent/data", NAME, "there is no bucket gs://absent"),
        (f"gs://{READ_ONLY}/data", NAME, "you have no right to"),
        ("gs://tests/data", "synthetic/tini", "no config 'tini'; did you mean 'tiny'"),
    ],
)
def test_mistakes_are_found_before_anything_is_built(
    gcs, on_host, no_building, address, name, message
):
    with pytest.raises(UserError, match=message):
        datasets.Dataset(DataConfig(dataset=name, data_dir=address))
    assert gcs.written == []


def test_a_run_with_everything_in_a_bucket(uploaded, on_host):
    fields = (
        f"data.data_dir={uploaded}", "total_steps=2", "optim.warmup_steps=1", "eval.every_steps=2",
        "eval.ablate_inputs=False", *TINY_MESH,
    )  # fmt: skip
    flags = [f"--config.{field}" for field in fields]
    workdir = uploaded / "run"
    command = ["--config", str(TINY_CONFIG), "--workdir", os.fspath(workdir), *flags]
    assert main.main(command) == 0
    lines = training_log.read_metrics(workdir / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss/total" in line] == [1, 2]
    assert files.read_json(workdir / "report.json")["steps"] == 2
