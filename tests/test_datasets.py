"""Data sets in buckets: built once, copied to every host, never half."""

import os
import shutil

import numpy as np
import pytest

from deevisum_jax import datasets, files, main, training_log
from deevisum_jax.errors import UserError
from tests.conftest import TINY_CONFIG, TINY_MESH
from tests.gcs_server import READ_ONLY
from tfds_builders.synthetic.synthetic import Synthetic

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

    def copy_first(family, config, folder):
        shutil.copytree(data_dir, folder, dirs_exist_ok=True)
        return build(family, config, folder)

    monkeypatch.setattr(datasets, "_build", copy_first)


@pytest.fixture
def uploaded(bucket, data_dir, no_building):
    """A bucket with a data set."""
    for path in (data_dir / VERSION).iterdir():
        files.write_whole(bucket / VERSION / path.name, path.read_bytes())
    return bucket


def open_set(folder) -> datasets.Dataset:
    return datasets.Dataset(NAME, os.fspath(folder))


def assert_equal(found, expected) -> None:
    assert len(found) == len(expected) > 0
    for record, other in zip(found, expected, strict=True):
        assert record.keys() == other.keys()
        for name, value in record.items():
            np.testing.assert_equal(value, other[name], err_msg=name)


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
    monkeypatch.setattr(datasets, "_NUM_TRANSFERS", 1)
    monkeypatch.setattr(datasets, "_SHOWN_S", 0)
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
        datasets.Dataset(name, address)
    assert gcs.written == []


def test_a_run_with_everything_in_a_bucket(uploaded, on_host, compile_once):
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
