"""Which segments come in which order, for whom, and what the annotators make of them."""

import io
import itertools
import json

import numpy as np
import PIL.Image
import pytest

from deevisum_jax import datasets, experiment, sharding
from deevisum_jax.config import DataConfig
from deevisum_jax.data import pipeline
from deevisum_jax.data.pipeline import SegmentSource, annotation_of, in_order, train_iterator
from deevisum_jax.data.prompts import load_template
from deevisum_jax.errors import UserError
from deevisum_jax.typing import TeacherOutputs


class Encoder:
    """Stands in for `SegmentEncoder`: says which segment of which video was asked for."""

    left_out = ()

    def frames(self, video, start_s, end_s, change=None):
        tint = 0.0 if change is None else change.brightness
        return np.array([start_s, end_s, tint])

    def sound(self, video, start_s, end_s):
        return ""

    def text(self, video, start_s, end_s, *, sound, label):
        return {"tokens": np.array([ord(video.title[0]), label], np.int32)}


class Counted(list):
    """Records that remember which of them were read."""

    def __init__(self, records):
        super().__init__(records)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


def tints(batch) -> list[float]:
    """How pictures were changed, row by row; see `Encoder`."""
    return batch["frames"][:, 2].tolist()


def record(title: str, *, duration_s: float = 6.0, frame: bytes = b"", **changes):
    """A video whose points, one per two seconds, two people find more important in the end."""
    times = np.arange(1.0, duration_s, 2.0)
    return {
        "video_id": title,
        "title": title,
        "duration_s": duration_s,
        "frames": [frame],
        "frame_times": [0.0],
        "transcript": [{"start": 0.0, "end": 1.0, "text": "hello"}],
        "captions": [{"start": 0.0, "end": 1.0, "text": "a ball"}],
        "audio": np.zeros(0, np.int16),
        "score_times": times,
        "user_scores": np.stack([times, times]),
    } | changes


def source_of(num_videos: int = 4, **kwargs) -> SegmentSource:
    """Three segments per video; titles "a", "b" ..."""
    records = [record(chr(ord("a") + i)) for i in range(num_videos)]
    return SegmentSource(records, Encoder(), segment_s=2.0, label_fraction=0.25, **kwargs)


def names(batch) -> list[tuple[int, int]]:
    return list(zip(batch["video_id"].tolist(), batch["segment"].tolist(), strict=True))


def take(iterator, count: int) -> list[list[tuple[int, int]]]:
    return [names(next(iterator)) for _ in range(count)]


def joined(parts) -> list:
    return list(itertools.chain.from_iterable(parts))


ALL = [(video, segment) for video in range(4) for segment in range(3)]


def test_targets_by_hand():
    annotated = {
        # Mean of the two people: 1, 3, 5, 2.
        "user_scores": np.array([[1, 4, 5, 1], [1, 2, 5, 3]], np.float32),
        "score_times": np.array([0.5, 1.5, 2.5, 7.0]),
    }
    # Two points in the first segment, one in the second; the third takes the nearest, at 7.0.
    targets = annotation_of(annotated, np.array([[0, 2], [2, 4], [5, 6]]), 0.3)
    np.testing.assert_allclose(targets.score, [0, 1, 0])  # 2, 5, 2 within [2, 5]
    np.testing.assert_array_equal(targets.label, [0, 1, 0])
    finer = annotation_of(annotated, np.array([[0, 1], [1, 2], [2, 4], [4, 8]]), 0.5)
    np.testing.assert_allclose(finer.score, [0, 0.5, 1, 0.25])  # 1, 3, 5, 2 within [1, 5]
    np.testing.assert_array_equal(finer.label, [0, 1, 1, 0])
    assert finer.label.dtype == np.int32
    assert finer.score.dtype == np.float32


def test_the_first_few_annotators_may_be_asked_alone():
    annotated = {
        "video_id": "v",
        "user_scores": np.array([[1, 4, 5], [3, 2, 1], [1, 1, 1]], np.float32),
        "score_times": np.array([0.5, 1.5, 2.5]),
    }
    bounds = np.array([[0, 1], [1, 2], [2, 3]])
    first = annotation_of(annotated, bounds, 0.3, 1)
    np.testing.assert_allclose(first.score, [0, 0.75, 1])  # 1, 4, 5
    np.testing.assert_array_equal(first.label, [0, 0, 1])
    two = annotation_of(annotated, bounds, 0.3, 2)
    np.testing.assert_allclose(two.score, [0, 1, 1])  # 2, 3, 3
    np.testing.assert_array_equal(two.label, [0, 1, 0])
    with pytest.raises(UserError, match=r"num_annotators=4, but video v has 3"):
        annotation_of(annotated, bounds, 0.3, 4)


def test_annotation_of_a_video_that_is_the_same_throughout():
    flat = {"user_scores": np.full((2, 4), 3.0), "score_times": np.arange(4) + 0.5}
    targets = annotation_of(flat, np.array([[i, i + 1] for i in range(4)]), 0.25)
    np.testing.assert_array_equal(targets.score, 0.5)
    np.testing.assert_array_equal(targets.label, [1, 0, 0, 0])  # of equals, the earlier


@pytest.mark.parametrize(("fraction", "count"), [(0.01, 1), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_label_fraction_is_a_share_of_the_segments_and_at_least_one(fraction, count):
    rising = {"user_scores": np.arange(8.0)[None], "score_times": np.arange(8) + 0.5}
    targets = annotation_of(rising, np.array([[i, i + 1] for i in range(8)]), fraction)
    np.testing.assert_array_equal(targets.label, np.arange(8) >= 8 - count)


def test_a_source_is_all_segments_in_order():
    source = source_of()
    assert len(source) == 12
    rows = [source[i] for i in range(12)]
    assert [(int(row["video_id"]), int(row["segment"])) for row in rows] == ALL
    np.testing.assert_array_equal(rows[5]["frames"], [4, 6, 0])  # third segment of the second video
    assert rows[5]["tokens"].tolist() == [ord("b"), 1]  # the best of three is labelled
    assert [row["label"] for row in rows[:3]] == [0, 0, 1]
    np.testing.assert_allclose([row["score"] for row in rows[:3]], [0, 0.5, 1])
    assert all(row["valid"] for row in rows)


def test_no_videos_is_an_error():
    with pytest.raises(UserError, match="holds no videos"):
        source_of(0)


def test_every_epoch_holds_every_segment_once_in_an_order_of_its_own():
    iterator = train_iterator(source_of(), batch_size=4, seed=0)
    epochs = [joined(take(iterator, 3)) for _ in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == ALL
        assert epoch != ALL
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


def test_batches_that_do_not_divide_an_epoch_leave_nothing_out():
    iterator = train_iterator(source_of(), batch_size=8, seed=0)
    seen = joined(take(iterator, 3))  # 24 = two epochs
    assert sorted(seen[:12]) == sorted(seen[12:]) == ALL


def test_the_seed_fixes_the_order():
    order = lambda seed: take(train_iterator(source_of(), batch_size=4, seed=seed), 6)
    assert order(0) == order(0)
    assert order(0) != order(1)


@pytest.mark.parametrize("shares", [[[0, 1], [2, 3]], [[0, 2], [1, 3]], [[0], [1], [2], [3]]])
def test_processes_together_have_the_batches_of_one_row_by_row(shares):
    one = train_iterator(source_of(), batch_size=4, seed=0)
    several = [train_iterator(source_of(), batch_size=4, seed=0, rows=rows) for rows in shares]
    for whole in take(one, 7):
        for iterator, rows in zip(several, shares, strict=True):
            assert names(next(iterator)) == [whole[row] for row in rows]


def test_a_process_reads_its_own_rows_and_no_others():
    records = Counted(record(title) for title in "abcd")
    source = SegmentSource(records, Encoder(), segment_s=2.0, label_fraction=0.5)
    records.read.clear()
    batches = list(in_order(source, batch_size=6, rows=[0, 1, 2]))
    assert joined(map(names, batches)) == [(0, 0), (0, 1), (0, 2), (2, 0), (2, 1), (2, 2)]
    assert records.read == [0, 2]


def test_a_saved_iterator_goes_on_where_it_stood():
    uninterrupted = take(train_iterator(source_of(), batch_size=4, seed=0), 9)
    iterator = train_iterator(source_of(), batch_size=4, seed=0)
    assert take(iterator, 4) == uninterrupted[:4]
    state = json.loads(json.dumps(iterator.get_state()))
    take(iterator, 2)  # what came after the state was saved is forgotten
    again = train_iterator(source_of(), batch_size=4, seed=0, num_threads=1)
    again.set_state(state)
    assert take(again, 5) == uninterrupted[4:]


def test_what_one_number_of_processes_saved_another_goes_on_from():
    whole = train_iterator(source_of(), batch_size=4, seed=0)
    uninterrupted = take(whole, 7)
    half = train_iterator(source_of(), batch_size=4, seed=0, rows=[2, 3])
    take(half, 5)
    assert half.get_state()["batches"] == 5
    whole.set_state(half.get_state())  # also of one that has begun to read ahead
    assert take(whole, 2) == uninterrupted[5:]


def test_pictures_change_only_in_training_and_only_where_asked():
    assert tints(next(train_iterator(source_of(), batch_size=4, seed=0))) == [0] * 4
    source = source_of(augmented=True)
    assert 0 not in tints(next(train_iterator(source, batch_size=4, seed=0)))
    assert tints(next(in_order(source, batch_size=4))) == [0] * 4
    assert source[0]["frames"][2] == 0


def test_every_epoch_and_every_seed_changes_pictures_in_a_way_of_its_own():
    def changes(seed):
        iterator = train_iterator(source_of(augmented=True), batch_size=4, seed=seed)
        return joined(tints(next(iterator)) for _ in range(9))  # three epochs

    assert len(set(changes(0))) == 36
    assert changes(0) == changes(0)
    assert not set(changes(0)) & set(changes(1))


@pytest.mark.parametrize("rows", [[0, 1], [1, 3], [2]])
@pytest.mark.parametrize("num_threads", [1, 3])
def test_changes_do_not_depend_on_processes_threads_or_where_training_resumed(rows, num_threads):
    source = source_of(augmented=True)
    one = train_iterator(source, batch_size=4, seed=0)
    whole = [tints(next(one)) for _ in range(7)]
    other = train_iterator(source, batch_size=4, seed=0, rows=rows, num_threads=num_threads)
    other.set_state({"batches": 3, "segments": 12, "seed": 0, "batch_size": 4})
    for batch in whole[3:]:
        assert tints(next(other)) == [batch[row] for row in rows]


def test_videos_without_scores_can_be_scored_and_not_trained_on():
    nobody = {"user_scores": np.zeros((0, 0), np.float32), "score_times": np.zeros(0)}
    records = [record("a"), record("b", **nobody), record("c", **nobody)]
    source = SegmentSource(records, Encoder(), segment_s=2.0, label_fraction=0.5)
    [batch] = in_order(source, batch_size=9)
    assert names(batch) == ALL[:9]
    assert batch["score"][3:].tolist() == [0] * 6
    with pytest.raises(UserError, match=r"2 of 3 videos .* no scores .*\(b, c\)"):
        train_iterator(source, batch_size=1, seed=0)


def test_a_position_in_other_data_is_refused():
    state = train_iterator(source_of(4), batch_size=4, seed=0).get_state()
    other = train_iterator(source_of(3), batch_size=4, seed=0)
    with pytest.raises(UserError, match=r"segments=9, not 12; bring the same data set back"):
        other.set_state(state)


def test_batches_larger_than_the_data_are_refused():
    with pytest.raises(UserError, match="batch_size=13 exceeds the 12 segments"):
        train_iterator(source_of(), batch_size=13, seed=0)


def test_in_order_fills_the_last_batch_with_rows_that_do_not_count():
    batches = list(in_order(source_of(), batch_size=5))
    assert [names(batch) for batch in batches[:2]] == [ALL[:5], ALL[5:10]]
    assert batches[0]["valid"].all()
    assert names(batches[2])[:2] == ALL[10:]
    np.testing.assert_array_equal(batches[2]["valid"], [1, 1, 0, 0, 0])
    assert {batch["frames"].shape for batch in batches} == {(5, 3)}


@pytest.mark.parametrize("batch_size", [4, 8, 16, 32])
def test_in_order_over_processes_is_in_order(batch_size):
    local = batch_size // 4
    parts = [
        list(in_order(source_of(), batch_size=batch_size, rows=range(i * local, (i + 1) * local)))
        for i in range(4)
    ]
    valid = [
        name
        for batches in zip(*parts, strict=True)  # every process has as many
        for batch in batches
        for name, counts in zip(names(batch), batch["valid"], strict=True)
        if counts
    ]
    assert valid == ALL


@pytest.mark.parametrize("first", [0, 4, 5, 11])
def test_in_order_begins_where_it_is_told_to(first):
    batches = list(in_order(source_of(), batch_size=5, first=first))
    counted = joined(names(batch) for batch in batches)
    valid = joined(batch["valid"].tolist() for batch in batches)
    assert [name for name, counts in zip(counted, valid, strict=True) if counts] == ALL[first:]
    assert len(batches) == -(-(12 - first) // 5)


def said(count: int = 12, **more) -> list[dict[str, np.ndarray]]:
    """What a teacher says of each segment: its number in the source."""
    return [
        {"importance": np.float32(k), "hidden": np.full((2, 3), k), **more} for k in range(count)
    ]


def test_without_teachers_a_row_has_no_field_of_theirs():
    assert "teachers" not in source_of()[0]
    assert "teachers" not in next(train_iterator(source_of(), batch_size=4, seed=0))


def test_a_row_has_what_each_teacher_says_of_its_segment():
    source = source_of()
    taught = source.with_teachers({"mentor": said(), "teacher": said(token=np.int32(7))})
    assert [taught[k]["teachers"]["mentor"]["importance"] for k in range(12)] == list(range(12))
    assert taught[5]["teachers"]["teacher"].keys() == {"importance", "hidden", "token"}
    assert taught[5]["frames"].tolist() == source[5]["frames"].tolist()
    assert "teachers" not in source[5]  # the source itself is as it was


def test_shuffled_rows_keep_what_teachers_say_of_them():
    taught = source_of().with_teachers({"mentor": said()})
    iterator = train_iterator(taught, batch_size=5, seed=0, num_threads=3)
    for _ in range(7):
        batch = next(iterator)
        mentor = batch["teachers"]["mentor"]
        numbers = [ALL.index(name) for name in names(batch)]
        assert mentor["importance"].tolist() == numbers
        assert mentor["hidden"].shape == (5, 2, 3)
        assert mentor["hidden"][:, 1, 2].tolist() == numbers


def test_teachers_change_neither_the_order_nor_where_training_resumes():
    plain = take(train_iterator(source_of(), batch_size=4, seed=0), 9)
    taught = source_of().with_teachers({"mentor": said()})
    iterator = train_iterator(taught, batch_size=4, seed=0)
    assert take(iterator, 4) == plain[:4]
    again = train_iterator(taught, batch_size=4, seed=0, rows=[1, 3])
    again.set_state(json.loads(json.dumps(iterator.get_state())))
    for batch in plain[4:]:
        half = next(again)
        assert names(half) == [batch[1], batch[3]]
        assert half["teachers"]["mentor"]["importance"].tolist() == [
            ALL.index(name) for name in names(half)
        ]


def test_a_batch_that_is_filled_up_has_rows_of_teachers_for_all():
    [_, _, last] = in_order(source_of().with_teachers({"mentor": said()}), batch_size=5)
    assert last["teachers"]["mentor"]["importance"].tolist() == [10, 11, 11, 11, 11]


def test_on_the_mesh_they_are_teacher_outputs_split_as_the_rest():
    rows = [{"class_logits": np.float32([k, -k]), "importance": np.float32(k)} for k in range(12)]
    taught = source_of().with_teachers({"mentor": rows, "teacher": rows})
    fields = next(in_order(taught, batch_size=8))
    # The stand-in has none of a text's masks.
    fields |= {name: np.zeros((8, 1), bool) for name in ("mask_ar", "mask_input", "mask_loss")}
    batch = sharding.place_batch(fields, sharding.make_mesh(data=2, fsdp=2, tensor=2))
    assert batch.teachers.keys() == {"mentor", "teacher"}
    outputs = batch.teachers["mentor"]
    assert isinstance(outputs, TeacherOutputs)
    assert outputs.importance.sharding == batch.tokens.sharding
    np.testing.assert_array_equal(outputs.class_logits[:, 1], -np.arange(8))
    assert outputs.token_ids is outputs.token_log_probs is outputs.hidden is None


@pytest.mark.parametrize("count", [0, 11, 13])
def test_outputs_for_another_number_of_segments_are_refused(count):
    with pytest.raises(UserError, match=rf"the mentor's cached outputs are for {count} segments"):
        source_of().with_teachers({"teacher": said(), "mentor": said(count)})


def test_what_a_teachers_list_raises_ends_training_as_it_is():
    class Damaged(list):
        def __getitem__(self, index):
            raise UserError("the file is damaged")

    iterator = train_iterator(
        source_of().with_teachers({"mentor": Damaged(said())}), batch_size=4, seed=0
    )
    with pytest.raises(UserError, match="the file is damaged"):
        next(iterator)


def test_the_cache_holds_the_most_recent_videos_and_no_more_than_its_size():
    records = Counted(record(title, frame=bytes(2**20)) for title in "abc")
    source = SegmentSource(records, Encoder(), segment_s=2.0, label_fraction=0.5, cache_mib=2)
    records.read.clear()
    for video in (0, 1, 0, 2, 0, 1, 2):  # two fit; the one not used for longest goes
        source[3 * video]
    # 2 drives 1 out, 0 stays, 1 drives 2 out, 2 drives 0 out.
    assert records.read == [0, 1, 2, 1, 2]


def test_a_video_larger_than_the_cache_is_kept_while_it_is_read():
    records = Counted(record(title, frame=bytes(2**20)) for title in "ab")
    source = SegmentSource(records, Encoder(), segment_s=2.0, label_fraction=0.5, cache_mib=0)
    records.read.clear()
    for index in (0, 1, 2, 3, 4):
        source[index]
    assert records.read == [0, 1]


def test_texts_for_a_tokenizer_hold_all_that_a_prompt_can_hold():
    texts = list(pipeline.texts([record("the fair")], load_template()))
    assert {"yes", "no", "silent", "no sound", "the fair", "hello", "a ball"} <= set(texts)
    assert "title: " in texts[0]


def test_a_record_becomes_a_video():
    jpeg = io.BytesIO()
    PIL.Image.new("RGB", (4, 4)).save(jpeg, "JPEG")
    made = pipeline.video_from_record(
        record("t", frame=jpeg.getvalue(), audio=np.array([-32768, 16384], np.int16))
    )
    np.testing.assert_array_equal(made.waveform, [-1, 0.5])
    assert made.cues[0].text == "hello"
    assert pipeline.video_from_record(record("t")).waveform is None


def test_real_records_give_whole_rows(tiny_config, data_dir, tmp_path):
    config = tiny_config()
    records = datasets.Dataset(DataConfig(dataset="synthetic/tiny", data_dir=str(data_dir))).split(
        "validation"
    )
    template = experiment.make_template(config, tmp_path)
    tokens = experiment.make_tokenizer(config, tmp_path, template, records, None)
    encoder = experiment.make_encoder(config, tokens, template, 28)
    source = experiment.make_source(config, records, encoder)
    [batch] = in_order(source, batch_size=10)
    shapes = {name: (rows.shape[1:], rows.dtype) for name, rows in batch.items()}
    text = {name: ((48,), bool) for name in ("mask_ar", "mask_input", "mask_loss")}
    assert shapes == text | {
        "frames": ((1, 28, 28, 3), np.uint8),
        "tokens": ((48,), np.int32),
        "label": ((), np.int32),
        "score": ((), np.float32),
        "video_id": ((), np.int32),
        "segment": ((), np.int32),
        "valid": ((), bool),
    }
    blind = source.without("picture").without("text")
    assert (blind[0]["frames"] == 127).all()
    assert source[0]["frames"].std() > 0
    # "text" alone would bring the picture back: withheld inputs add up.
    assert blind[0]["mask_input"].sum() < source[0]["mask_input"].sum()
    np.testing.assert_array_equal(blind[0]["score"], source[0]["score"])
    assert len(blind) == len(source) == 10
