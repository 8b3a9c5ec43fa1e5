"""A teacher's outputs come back as they were; what does not fit is refused, what is cut goes on."""

import dataclasses
import json
import re
import signal
from concurrent import futures

import jax.numpy as jnp
import numpy as np
import pytest
from array_record.python import array_record_module as array_record
from etils import epath

from deevisum_jax import sharding
from deevisum_jax.config import DataConfig
from deevisum_jax.data import prompts, tokenizer
from deevisum_jax.distill.cache import Cache, Identity
from deevisum_jax.errors import UserError
from tests import processes
from tests.distill import cached
from tests.distill.cached import IDENTITY, NUM, say, write_cache

COMMAND = (
    "python -m deevisum_jax.main --config CONFIG --config.stage=mentor --mode cache_teacher "
    "--workdir WORKDIR"
)
NAMES = [f"0000{k}-of-00003.array_record" for k in range(3)]


@pytest.fixture
def folder(tmp_path) -> epath.Path:
    return epath.Path(tmp_path) / "run" / "outputs"


@pytest.fixture
def whole(folder) -> epath.Path:
    """The folder of a complete cache."""
    write_cache(folder)
    return folder


def files_in(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def contents(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def check_all(found: Cache) -> None:
    assert len(found) == NUM
    for index in range(NUM):
        row, wanted = found[index], cached.said_of(index)
        assert list(row) == ["class_logits", "importance", "token_ids", "token_log_probs"]
        for name, value in row.items():
            assert value.dtype == wanted[name].dtype
            assert value.shape == wanted[name].shape
            assert value.tobytes() == wanted[name].tobytes()


# ---- What is kept ----


@pytest.mark.parametrize("batch_size", [1, 3, 8, 16])
def test_outputs_come_back_bit_by_bit_in_order(folder, batch_size):
    write_cache(folder, batch_size=batch_size)
    assert files_in(folder) == [*NAMES, "cache.json"]
    check_all(Cache.open(folder, "mentor"))


def test_one_row_by_hand(whole):
    row = Cache.open(whole, "mentor")[7]
    np.testing.assert_allclose(row["class_logits"], [1, -7 / 3], rtol=1e-6)
    np.testing.assert_array_equal(row["token_ids"], [[70, 71, 72], [70, 71, 72]])
    np.testing.assert_allclose(row["importance"], 7e-30, rtol=1e-6)


def test_a_record_is_the_bytes_that_cache_json_tells(whole):
    told = json.loads((whole / "cache.json").read_text())
    shapes = {name: (field["dtype"], field["shape"]) for name, field in told["fields"].items()}
    assert shapes == {
        "class_logits": ("float32", [2]),
        "importance": ("float32", []),
        "token_ids": ("int32", [2, 3]),
        "token_log_probs": ("float32", [2, 4]),
    }
    assert told["complete"]
    assert told["identity"]["weights"] == IDENTITY.weights
    numbers = cached.said_of(9).values()
    [record] = array_record.ArrayRecordReader(str(whole / NAMES[2])).read([1])
    assert record == b"".join(value.tobytes() for value in numbers)
    assert len(record) == 4 * (2 + 1 + 6 + 8)


def test_all_devices_write_what_one_does(folder):
    write_cache(folder, mesh=sharding.make_mesh(data=2, fsdp=2, tensor=2))
    check_all(Cache.open(folder, "mentor"))


def test_threads_read_what_one_does(whole):
    found = Cache.open(whole, "mentor")
    alone = [found[i % NUM]["token_ids"].tolist() for i in range(400)]
    with futures.ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda i: found[i % NUM]["token_ids"].tolist(), range(400)))
    assert together == alone


def test_an_iteration_ends(whole):
    assert len(list(Cache.open(whole, "mentor"))) == NUM
    with pytest.raises(IndexError, match="10 examples, got index 10"):
        Cache.open(whole, "mentor")[NUM]


def test_a_cache_in_a_bucket_is_copied_here_once(bucket, tmp_path, monkeypatch, gcs):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    with pytest.raises(InterruptedError):
        write_cache(bucket / "outputs", batch_size=4, stop_at=6)
    assert write_cache(bucket / "outputs", batch_size=4) == [4, 8]
    check_all(Cache.open(bucket / "outputs", "mentor"))
    here = sorted((tmp_path / "home").rglob("*.array_record"))
    assert [path.name for path in here] == NAMES
    times = [path.stat().st_mtime_ns for path in here]
    Cache.open(bucket / "outputs", "mentor")
    assert [path.stat().st_mtime_ns for path in here] == times
    (bucket / "outputs" / NAMES[1]).unlink()
    with pytest.raises(UserError, match=rf"{NAMES[1]} is damaged \(it is missing\)"):
        Cache.open(bucket / "outputs", "mentor")


def test_a_folder_for_the_copy_that_cannot_be_written_is_told(bucket, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    write_cache(bucket / "outputs")
    with pytest.raises(UserError, match="set XDG_CACHE_HOME to a folder that can"):
        Cache.open(bucket / "outputs", "mentor")


# ---- Killed, and gone on with ----


def test_an_interrupted_run_goes_on_with_the_files_that_are_missing(folder):
    with pytest.raises(InterruptedError):
        write_cache(folder, batch_size=2, stop_at=6)  # within the second file
    assert files_in(folder) == [NAMES[0], "cache.json"]
    first = (folder / NAMES[0]).stat()
    assert write_cache(folder, batch_size=2) == [4, 6, 8]
    assert (folder / NAMES[0]).stat() == first
    check_all(Cache.open(folder, "mentor"))


def test_an_interrupted_run_leaves_the_files_of_one_that_was_not(folder, whole, tmp_path):
    other = epath.Path(tmp_path) / "other"
    for stop_at in (3, 4, 5, 9):
        with pytest.raises(InterruptedError):
            write_cache(other, batch_size=3, stop_at=stop_at)
    write_cache(other, batch_size=3)
    assert contents(other) == contents(whole)


def test_a_killed_run_goes_on(folder):
    [ended] = processes.run_function(1, "write_cache", str(folder), 1, 6, devices=1)
    assert ended.status == -signal.SIGKILL, ended.err
    assert files_in(folder) == [NAMES[0], "cache.json"]
    with pytest.raises(UserError, match="for 4 of 10 segments"):
        Cache.open(folder, "mentor")
    assert write_cache(folder, batch_size=1) == [4, 5, 6, 7, 8, 9]
    check_all(Cache.open(folder, "mentor"))


def test_files_in_the_middle_that_are_missing_are_written_alone(whole):
    before = contents(whole)
    (whole / NAMES[1]).unlink()
    assert write_cache(whole, batch_size=4) == [4]
    assert contents(whole) == before


def test_a_file_that_was_cut_is_written_again(whole):
    before = contents(whole)
    (whole / NAMES[2]).write_bytes(before[NAMES[2]][:-65536])
    assert write_cache(whole, batch_size=4) == [8]
    assert contents(whole) == before


def test_a_run_that_ends_while_it_mends_is_not_complete(whole):
    cut = (whole / NAMES[2]).read_bytes()[:-65536]
    (whole / NAMES[0]).unlink()
    (whole / NAMES[2]).write_bytes(cut)
    with pytest.raises(InterruptedError):
        write_cache(whole, batch_size=4, stop_at=8)
    with pytest.raises(UserError, match="for 8 of 10 segments"):
        Cache.open(whole, "mentor")
    assert write_cache(whole, batch_size=4) == [8]
    check_all(Cache.open(whole, "mentor"))


def test_what_is_complete_is_not_scored_again(whole):
    before = contents(whole)
    assert write_cache(whole) == []
    assert contents(whole) == before


def test_files_keep_the_size_that_the_cache_was_begun_with(folder):
    with pytest.raises(InterruptedError):
        write_cache(folder, batch_size=4, stop_at=8)
    assert write_cache(folder, batch_size=4, examples_per_file=3) == [8]
    check_all(Cache.open(folder, "mentor"))


def test_several_processes_write_what_one_does_and_read_it(folder, whole, tmp_path):
    other = epath.Path(tmp_path) / "other"
    ended = processes.run_function(2, "write_cache", str(other), 8, None)
    assert [one.status for one in ended] == [0, 0], [one.err for one in ended]
    assert contents(other) == contents(whole)


# ---- Refused ----


def test_no_cache_tells_the_command(folder):
    with pytest.raises(UserError) as error:
        Cache.open(folder, "mentor")
    assert (
        str(error.value) == f"{folder} holds no outputs of the mentor; cache them first: {COMMAND}"
    )


def test_an_incomplete_cache_tells_how_much_there_is(folder):
    with pytest.raises(InterruptedError):
        write_cache(folder, batch_size=4, stop_at=8)
    with pytest.raises(UserError) as error:
        Cache.open(folder, "mentor")
    assert str(error.value) == (
        f"{folder} holds the mentor's outputs for 8 of 10 segments; the same command goes on: "
        f"{COMMAND}"
    )


OTHERS = {
    "weights": ({"weights": "12" * 32}, "weights: abababababab... -> 121212121212..."),
    "data": (
        {"data": {"data_set": "synthetic/tiny/1.0.0", "train": 7, "num_frames": 2}},
        "data.train: 6 -> 7; data.num_frames: 1 -> 2",
    ),
    "prompt": (
        {"prompt": IDENTITY.prompt | {"template": "34" * 32}},
        "prompt.template: cdcdcdcdcdcd... -> 343434343434...",
    ),
    "picture": ({"image_size": 56}, "image_size: 28 -> 56"),
    "asked": (
        {"asked": IDENTITY.asked | {"temperature": 1.0, "layers": [2, 4]}},
        "asked.temperature: 2.0 -> 1.0; asked.layers: [4] -> [2, 4]",
    ),
}


@pytest.mark.parametrize("part", OTHERS)
def test_a_cache_of_another_identity_tells_what_differs(whole, part):
    changes, told = OTHERS[part]
    other = dataclasses.replace(IDENTITY, **changes)
    with pytest.raises(UserError, match=re.escape(told)) as error:
        Cache.open(whole, "mentor").check(other)
    assert str(error.value).endswith(f"or delete {whole} and give: {COMMAND}")
    before = contents(whole)
    with pytest.raises(UserError, match=re.escape(told)) as error:
        write_cache(whole, identity=other)
    assert f"delete {whole} to write them anew" in str(error.value)
    assert contents(whole) == before


def test_all_parts_that_differ_are_told_at_once(whole):
    other = dataclasses.replace(IDENTITY, weights="12" * 32, image_size=56)
    with pytest.raises(UserError, match=r"weights: .*; image_size: 28 -> 56;"):
        Cache.open(whole, "mentor").check(other)


def test_the_same_identity_is_taken(whole):
    Cache.open(whole, "mentor").check(dataclasses.replace(IDENTITY))


def test_a_begun_cache_of_other_data_is_not_gone_on_with(folder):
    with pytest.raises(InterruptedError):
        write_cache(folder, batch_size=4, stop_at=8)
    with pytest.raises(UserError, match="weights: "):
        write_cache(folder, identity=dataclasses.replace(IDENTITY, weights="12" * 32))
    with pytest.raises(UserError, match="segments: 10 -> 9"):
        write_cache(folder, num_examples=9)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("field", ["class_logits", "importance", "token_log_probs"])
def test_a_number_that_is_not_finite_tells_its_field_and_segment(folder, field, number):
    def broken(batch):
        outputs = say(batch)
        value = getattr(outputs, field)
        at = (batch.tokens[:, 0] == 6).reshape(-1, *[1] * (value.ndim - 1))
        return dataclasses.replace(outputs, **{field: jnp.where(at, number, value)})

    with pytest.raises(UserError, match=f"{field} is not finite for video_id b, segment 2;"):
        write_cache(folder, say=broken)
    assert files_in(folder) == [NAMES[0], "cache.json"]  # what was sound is kept


def test_what_fills_a_batch_up_may_be_anything(folder):
    def broken(batch):
        outputs = say(batch)
        return dataclasses.replace(
            outputs, importance=jnp.where(batch.valid, outputs.importance, jnp.nan)
        )

    write_cache(folder, say=broken)
    check_all(Cache.open(folder, "mentor"))


def test_a_cut_file_is_named(whole):
    path = whole / NAMES[2]
    size = len(path.read_bytes())
    path.write_bytes(path.read_bytes()[:-65536])
    with pytest.raises(UserError) as error:
        Cache.open(whole, "mentor")
    assert str(error.value) == (
        f"{path} is damaged ({size - 65536} bytes, not {size}); delete it if it is there, and this "
        f"writes it again: {COMMAND}"
    )


def test_a_file_that_is_missing_is_named(whole):
    (whole / NAMES[1]).unlink()
    with pytest.raises(UserError, match=rf"{NAMES[1]} is damaged \(it is missing\)"):
        Cache.open(whole, "mentor")


def test_a_file_of_as_many_other_bytes_is_named(whole):
    path = whole / NAMES[1]
    path.write_bytes(bytes(len(path.read_bytes())))
    with pytest.raises(UserError, match=rf"{NAMES[1]} is damaged \("):
        Cache.open(whole, "mentor")


def test_a_bit_that_is_not_as_it_was_written_is_found_where_it_is_read(whole):
    path = whole / NAMES[0]
    content = bytearray(path.read_bytes())
    at = bytes(content).index(cached.said_of(2)["class_logits"].tobytes())
    content[at] ^= 1
    path.write_bytes(content)
    found = Cache.open(whole, "mentor")
    assert found[1]["token_ids"][0, 0] == 10
    with pytest.raises(UserError, match=rf"{NAMES[0]} is damaged \(Corrupted .*\); delete it"):
        found[2]


def test_a_file_of_another_cache_is_named(whole, tmp_path):
    other = epath.Path(tmp_path) / "other"
    write_cache(other, examples_per_file=10)
    [path] = other.glob("*.array_record")
    (whole / NAMES[0]).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=f"{NAMES[0]} is damaged"):
        Cache.open(whole, "mentor")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is no JSON"),
        ("[]", "holds no JSON object"),
        ('{"format": 2}', "is not what this version of deevisum_jax writes"),
        ('{"format": 1}', "is not what this version of deevisum_jax writes"),
    ],
)
def test_a_damaged_description_is_told(whole, content, told):
    (whole / "cache.json").write_text(content)
    for use in (lambda: Cache.open(whole, "mentor"), lambda: write_cache(whole)):
        with pytest.raises(UserError, match=told) as error:
            use()
        assert f"delete {whole}" in str(error.value)


def test_files_of_nobody_knows_what_are_not_taken_over(whole):
    (whole / "cache.json").unlink()
    with pytest.raises(UserError, match=r"holds files, and no cache\.json that tells what of"):
        write_cache(whole)


def test_a_disk_without_room_is_told_before_it_is_full(folder, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 600})())
    with pytest.raises(UserError, match="put the teacher's run on another disk"):
        write_cache(folder)  # ten records of 68 bytes
    assert files_in(folder) == ["cache.json"]


# ---- Of whom and of what ----


def identity_of(tmp_path, **changes) -> Identity:
    tokens = tokenizer.train_tokenizer(["some text"], tmp_path / "t.model", vocab_size=280)
    given = {
        "weights": "ab",
        "dataset": {"data_set": "tvsum/1fps/1.0.0", "splits": {"train": ["a", "b"], "test": ["c"]}},
        "data": DataConfig(dataset="tvsum/1fps", resize="bilinear"),
        "template": prompts.load_template(),
        "tokens": tokens,
        "image_size": 224,
        "asked": {"top_k": 3, "layers": (3, 4)},
    }
    return Identity.of(**given | changes)


def test_an_identity_comes_back_from_json(tmp_path):
    made = identity_of(tmp_path)
    again = Identity(**json.loads(json.dumps(dataclasses.asdict(made))))
    assert again == made
    assert made.differences(again) == []


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("segment_s", 3.0),
        ("label_fraction", 0.5),
        ("num_annotators", 2),
        ("num_frames", 4),
        ("resize", "bicubic"),
        ("text_len", 65),
        ("caption_len", 8),
        ("transcript_context_s", 10.0),
        ("left_out", ("sound",)),
    ],
)
def test_what_changes_a_row_changes_the_identity(tmp_path, field, value):
    data = dataclasses.replace(DataConfig(dataset="d", resize="bilinear"), **{field: value})
    [told] = identity_of(tmp_path).differences(identity_of(tmp_path, data=data))
    assert told.startswith(f"data.{field}: ")


@pytest.mark.parametrize(
    ("field", "value"), [("label_fraction", 0.5), ("num_annotators", 2), ("caption_len", 8)]
)
def test_what_only_a_suffix_shows_matters_where_tokens_are_asked_for(tmp_path, field, value):
    data = dataclasses.replace(DataConfig(dataset="d", resize="bilinear"), **{field: value})
    asked = {"top_k": 0, "layers": (3, 4)}
    assert identity_of(tmp_path, asked=asked) == identity_of(tmp_path, asked=asked, data=data)


def test_what_changes_no_row_does_not_change_it(tmp_path):
    data = DataConfig(dataset="d", resize="bilinear", data_dir="/other", cache_mib=7, num_threads=9)
    test = {"data_set": "tvsum/1fps/1.0.0", "splits": {"train": ["a", "b"], "test": ["x"]}}
    assert identity_of(tmp_path, data=data, dataset=test) == identity_of(tmp_path)


def test_other_videos_words_and_pieces_change_it(tmp_path):
    one = identity_of(tmp_path)
    videos = {"data_set": "tvsum/1fps/1.0.0", "splits": {"train": ["a", "c"]}}
    assert one.differences(identity_of(tmp_path, dataset=videos)) == [
        'data.train: ["a", "b"] -> ["a", "c"]'
    ]
    template = prompts.PromptTemplate("{title}")
    [told] = one.differences(identity_of(tmp_path, template=template))
    assert told.startswith("prompt.template: ")
    tokens = tokenizer.train_tokenizer(["other words"], tmp_path / "o.model", vocab_size=280)
    [told] = one.differences(identity_of(tmp_path, tokens=tokens))
    assert told.startswith("prompt.tokenizer: ")


def test_long_lists_of_videos_are_told_by_their_digest(tmp_path):
    lists = [{"data_set": "d", "splits": {"train": [f"{k}_{n}" for n in range(40)]}} for k in "ab"]
    one, other = (identity_of(tmp_path, dataset=dataset) for dataset in lists)
    [told] = one.differences(other)
    assert re.fullmatch(r"data\.train: 40 items \(sha256 .{12}\.\.\.\) -> 40 items \(.*\)", told)
