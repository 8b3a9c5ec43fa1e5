"""Folds: the published ones, files of them, partitions, and what is said of them."""

import collections
import json

import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.summary import folds
from deevisum_jax.summary.folds import Fold

IDS = tuple("abcdefg")


def numbered(count):
    return tuple(f"id{k}" for k in range(1, count + 1))


@pytest.mark.parametrize(
    ("dataset", "total", "tested", "repeatedly"), [("tvsum", 50, 34, 13), ("summe", 25, 18, 6)]
)
def test_the_community_folds_overlap_and_say_so(dataset, total, tested, repeatedly):
    found = folds.community(dataset, numbered(total))
    assert [len(fold.test) for fold in found] == [total // 5] * 5
    assert all(set(fold.train) == set(numbered(total)) - set(fold.test) for fold in found)
    assert folds.coverage(found) == (tested, total, repeatedly)
    assert f"{tested} of {total} videos are ever tested" in folds.coverage_sentence(found)


@pytest.mark.parametrize(("dataset", "total"), [("tvsum", 50), ("summe", 25)])
def test_the_community_folds_are_those_of_the_files(shared_data, dataset, total):
    there = folds.load(str(shared_data / "splits" / f"{dataset}_splits.json"), numbered(total))
    for fold, other in zip(folds.community(dataset, numbered(total)), there, strict=True):
        assert set(fold.test) == set(other.test)
        assert set(fold.train) == set(other.train)


def test_a_partition_tests_every_video_once():
    found = folds.partition(IDS, seed=3)
    assert sorted(len(fold.test) for fold in found) == [1, 1, 1, 2, 2]
    times = collections.Counter(video for fold in found for video in fold.test)
    assert times == dict.fromkeys(IDS, 1)
    assert all(set(fold.train) == set(IDS) - set(fold.test) for fold in found)
    assert folds.partition(IDS, seed=3) == found
    assert folds.partition(IDS, seed=4) != found
    assert folds.coverage_sentence(found) == "5 folds: 7 of 7 videos are tested, each once."
    assert folds.coverage_sentence(found[:1]).startswith("1 fold: 2 of 7 videos are tested")


def test_a_file_names_videos_by_id_or_by_number(tmp_path):
    path = tmp_path / "folds.json"
    path.write_text(json.dumps([{"train_keys": ["video_1", "b"], "test_keys": ["video_7"]}]))
    assert folds.load(str(path), IDS) == (Fold(("a", "b"), ("g",)),)
    assert folds.make(str(path), "any", IDS) == folds.load(str(path), IDS)
    # A video of this very id goes before the number.
    assert folds.resolve("video_1", ("x", "video_1")) == "video_1"
    assert folds.resolve("video_8", IDS) is None
    assert folds.resolve("video_0", IDS) is None


def test_numbers_name_no_video_where_ids_look_like_them():
    ids = ("video_10", "video_20", "video_30")
    assert folds.resolve("video_1", ids) is None
    assert folds.resolve("video_20", ids) == "video_20"
    assert folds.unknown("video_1", ids).startswith("no video of the data set's 3; did you mean")
    assert folds.resolve("video_1", ("a", "b"), numbered=False) is None


def test_validation_videos_are_drawn_from_those_that_train():
    kept = folds.validation(IDS, seed=0, count=2)
    assert len(set(kept)) == 2
    assert set(kept) <= set(IDS)
    assert kept == folds.validation(IDS, seed=0, count=2)
    assert len({folds.validation(IDS, seed=seed, count=2) for seed in range(20)}) > 5


def test_folds_of_one_size_validate_at_different_places():
    trains = [IDS[:k] + IDS[k + 1 :] for k in range(7)]
    places = {
        tuple(train.index(video) for video in folds.validation(train, seed=0, count=2))
        for train in trains
    }
    assert len(places) > 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"train_keys": ["a"], "test_keys": ["zz"]}]', "fold 0, test_keys: 'zz' is no video"),
        ('[{"train_keys": ["video_8"], "test_keys": ["a"]}]', "video_1 to video_7"),
        ('[{"train_keys": ["a", "b"], "test_keys": ["video_2"]}]', "fold 0: b both train and test"),
        ('[{"train_keys": ["a", "video_1"], "test_keys": ["b"]}]', "a is named twice"),
        ('[{"train_keys": ["a"], "test_keys": []}]', "holds no folds"),
        ('[{"train": ["a"], "test": ["b"]}]', "holds no folds"),
        ("{}", "holds no folds"),
        ("[", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_files_that_make_no_folds_are_named(tmp_path, content, message):
    path = tmp_path / "folds.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        folds.load(str(path), IDS)
    assert str(path) in str(caught.value)


def test_says_what_is_wrong():
    with pytest.raises(UserError, match="'tvsm' cannot be read as JSON"):
        folds.make("tvsm", "tvsum", IDS)
    with pytest.raises(UserError, match="no community folds of 'synthetic', only of tvsum, summe"):
        folds.community("synthetic", IDS)
    with pytest.raises(UserError, match="number the 50 videos of tvsum, and there are 7"):
        folds.community("tvsum", IDS)
    with pytest.raises(UserError, match="there are 7 videos, and 8 folds that each test one"):
        folds.partition(IDS, 0, 8)
    with pytest.raises(UserError, match=r"data.fold=5 is out of range: there are 5 folds, 0 to 4"):
        folds.choose(folds.partition(IDS, 0), 5)
    with pytest.raises(UserError, match="7 of 7 training videos cannot be kept"):
        folds.validation(IDS, 0, 7)


def test_few_videos_give_as_many_folds_as_there_are():
    found = folds.make("partition", "video_folder", ("a", "b", "c"))
    assert sorted(fold.test for fold in found) == [("a",), ("b",), ("c",)]
    with pytest.raises(UserError, match="there are 1 videos"):
        folds.make("partition", "video_folder", ("a",))
