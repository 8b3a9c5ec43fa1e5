"""What a run leaves for people to read, and what a kill may do to it."""

import collections
import io
import json
import resource
import time
import types

import pytest
from etils import epath
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from deevisum_jax import distributed, training_log
from deevisum_jax.errors import UserError
from deevisum_jax.training_log import METRICS_FILE, TrainingLog, read_metrics


def open_log(workdir, first_step=0):
    return TrainingLog(epath.Path(workdir), first_step=first_step, total_steps=10, batch_size=8)


def write(workdir, steps, first_step=0):
    with open_log(workdir, first_step) as log:
        for step in steps:
            log.advance()
            log.train(step, {"loss/total": float(step)}, log.trained_s())


def test_a_line_per_logged_step(tmp_path, capfd):
    with open_log(tmp_path) as log:
        log.train(1, {"loss/total": 2.0, "grad_norm": 1.5}, log.trained_s())
        log.write(1, {"validation/tau": 0.25})
    first, second = read_metrics(epath.Path(tmp_path / METRICS_FILE))
    assert first.pop("examples_per_s") > 0
    assert first == {"step": 1, "loss/total": 2.0, "grad_norm": 1.5}
    assert second == {"step": 1, "validation/tau": 0.25}
    assert "train:" in capfd.readouterr().err  # the progress bar


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with open_log(tmp_path) as log:
        log.train(1, {"loss/total": 2.0}, log.trained_s())
        assert len(read_metrics(epath.Path(tmp_path / METRICS_FILE))) == 1


def test_steps_behind_the_checkpoint_are_dropped_on_resuming(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 4, 5], first_step=2)
    assert [line["step"] for line in read_metrics(epath.Path(tmp_path / METRICS_FILE))] == [
        1,
        2,
        3,
        4,
        5,
    ]


def test_a_run_begun_anew_keeps_no_old_line(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert [line["step"] for line in read_metrics(epath.Path(tmp_path / METRICS_FILE))] == [1]


@pytest.mark.parametrize("half", ['{"step": 3, "loss/tot', "{", '{"step": 3}\n{"st'])
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path, half):
    write(tmp_path, [1, 2])
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text() + half)
    assert [line["step"] for line in read_metrics(epath.Path(path))][:2] == [1, 2]
    write(tmp_path, [3], first_step=2)
    assert [line["step"] for line in read_metrics(epath.Path(path))] == [1, 2, 3]
    for line in path.read_text().splitlines():
        json.loads(line)


def test_no_file_is_no_lines(tmp_path):
    assert read_metrics(epath.Path(tmp_path / METRICS_FILE)) == []


@pytest.fixture
def clock(monkeypatch):
    """One that a test sets."""
    clock = types.SimpleNamespace(now=0.0, monotonic=lambda: clock.now, time=lambda: 0.0)
    monkeypatch.setattr(training_log, "time", clock)
    return clock


def test_pauses_do_not_count_as_training_time(tmp_path, clock):
    with open_log(tmp_path) as log:
        clock.now = 10.0
        with log.paused():
            clock.now = 100.0
        clock.now = 110.0
        log.train(5, {"loss/total": 1.0}, log.trained_s())  # 5 steps of 8 in 20 s
    [line] = read_metrics(epath.Path(tmp_path / METRICS_FILE))
    assert line["examples_per_s"] == 2.0


def events(path) -> list[event_pb2.Event]:
    """Records: length (8 bytes), its checksum (4), event, checksum (4)."""
    data, found, position = path.read_bytes(), [], 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        for start, size in ((position, 8), (position + 12, length)):
            part, stored = data[start : start + size], data[start + size : start + size + 4]
            assert masked_crc32c(part) == int.from_bytes(stored, "little")
        found.append(event_pb2.Event.FromString(data[position + 12 : position + 12 + length]))
        position += length + 16
    return found


def test_tensorboard_gets_the_same_numbers(tmp_path):
    write(tmp_path, [1, 2])
    [path] = (tmp_path / "tensorboard").iterdir()
    assert "tfevents" in path.name
    version, begin, *logged = events(path)
    assert version.file_version == "brain.Event:2"
    assert (begin.session_log.status, begin.step) == (event_pb2.SessionLog.START, 1)
    assert [event.step for event in logged] == [1, 2]
    for event, line in zip(logged, read_metrics(epath.Path(tmp_path / METRICS_FILE)), strict=True):
        values = {value.tag: value.simple_value for value in event.summary.value}
        assert {"step": event.step, **values} == pytest.approx(line)


def test_tensorboard_is_told_which_steps_come_anew(tmp_path, monkeypatch):
    write(tmp_path, [1, 2, 3, 4])
    monkeypatch.setattr(time, "time", lambda: 2e9)  # its files are named by the second
    write(tmp_path, [3, 4], first_step=2)
    newest = max((tmp_path / "tensorboard").iterdir())
    assert events(newest)[1].step == 3


def test_a_full_disk_is_told(tmp_path):
    with open_log(tmp_path) as log:
        log._metrics._file.close()
        log._metrics._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
        with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(No space left"):
            log.write(1, {"loss/total": 1.0})


def test_a_disk_that_takes_only_a_part_of_a_line_is_told(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_log(tmp_path) as log, io.StringIO() as shown:
        log._bar.fp = shown
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, limits[1]))
            with pytest.raises(UserError, match=r"metrics.jsonl cannot be written \(File too lar"):
                log.write(1, {"loss/total": 1.0})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / METRICS_FILE).read_text() == '{"step": 1'


def test_files_are_closed_also_where_a_bucket_takes_no_more(tmp_path, monkeypatch):
    def full():
        raise UserError("the bucket is full")

    with pytest.raises(UserError, match="the bucket is full"), open_log(tmp_path) as log:
        monkeypatch.setattr(log._metrics, "flush", full)
    assert log._metrics._file.closed
    assert log._events._file.closed


def test_of_many_processes_only_the_first_writes_and_shows(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    write(tmp_path, [1, 2])
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


class Bucket:
    """Objects that are there when their upload ends; counts the uploads."""

    def __init__(self, monkeypatch):
        self.objects, self.uploads = {}, collections.Counter()
        monkeypatch.setattr(training_log, "in_bucket", lambda path: True)
        monkeypatch.setattr(training_log, "write_whole", self.upload)

    def upload(self, path, content: bytes) -> None:
        self.objects[path.name] = content
        self.uploads[path.name] += 1


def test_into_a_bucket_goes_all_of_it_once_a_minute_and_before_a_checkpoint(
    tmp_path, monkeypatch, clock
):
    bucket = Bucket(monkeypatch)
    with open_log(tmp_path) as log:
        for step in range(1, 100):
            clock.now += 1.0
            log.train(step, {"loss/total": 1.0}, log.trained_s())
        assert bucket.objects[METRICS_FILE].count(b"\n") == 60
        assert bucket.uploads[METRICS_FILE] == 2  # the first is empty
        log.flush()
        assert bucket.objects[METRICS_FILE].count(b"\n") == 99
        log.flush()  # nothing is new
        assert bucket.uploads[METRICS_FILE] == 3
        clock.now += 1.0
        log.train(100, {"loss/total": 1.0}, log.trained_s())
    assert bucket.objects[METRICS_FILE].count(b"\n") == 100
    [name] = bucket.objects.keys() - {METRICS_FILE}
    assert "tfevents" in name
    assert len(bucket.objects[name]) > 100 * 16
