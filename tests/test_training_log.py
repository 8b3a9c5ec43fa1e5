"""What a run leaves for people to read, and what a kill may do to it."""

import json
import types

import pytest
from tensorboardX.proto import event_pb2

from deevisum_jax import training_log
from deevisum_jax.errors import UserError
from deevisum_jax.training_log import METRICS_FILE, TrainingLog, read_metrics


def open_log(workdir, first_step=0):
    return TrainingLog(workdir, first_step=first_step, total_steps=10, batch_size=8)


def write(workdir, steps, first_step=0):
    with open_log(workdir, first_step) as log:
        for step in steps:
            log.advance()
            log.train(step, {"loss/total": float(step)})


def test_a_line_per_logged_step(tmp_path, capfd):
    with open_log(tmp_path) as log:
        log.train(1, {"loss/total": 2.0, "grad_norm": 1.5})
        log.write(1, {"validation/tau": 0.25})
    first, second = read_metrics(tmp_path / METRICS_FILE)
    assert first.pop("examples_per_s") > 0
    assert first == {"step": 1, "loss/total": 2.0, "grad_norm": 1.5}
    assert second == {"step": 1, "validation/tau": 0.25}
    assert "train:" in capfd.readouterr().err  # the progress bar


def test_a_line_is_on_disk_as_soon_as_it_is_logged(tmp_path):
    with open_log(tmp_path) as log:
        log.train(1, {"loss/total": 2.0})
        assert len(read_metrics(tmp_path / METRICS_FILE)) == 1


def test_steps_behind_the_checkpoint_are_dropped_on_resuming(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 4, 5], first_step=2)
    assert [line["step"] for line in read_metrics(tmp_path / METRICS_FILE)] == [1, 2, 3, 4, 5]


def test_a_run_begun_anew_keeps_no_old_line(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert [line["step"] for line in read_metrics(tmp_path / METRICS_FILE)] == [1]


@pytest.mark.parametrize("half", ['{"step": 3, "loss/tot', "{", '{"step": 3}\n{"st'])
def test_a_line_that_a_kill_cut_short_is_dropped(tmp_path, half):
    write(tmp_path, [1, 2])
    path = tmp_path / METRICS_FILE
    path.write_text(path.read_text() + half)
    assert [line["step"] for line in read_metrics(path)][:2] == [1, 2]
    write(tmp_path, [3], first_step=2)
    assert [line["step"] for line in read_metrics(path)] == [1, 2, 3]
    for line in path.read_text().splitlines():
        json.loads(line)


def test_no_file_is_no_lines(tmp_path):
    assert read_metrics(tmp_path / METRICS_FILE) == []


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_end_the_run(tmp_path, value):
    with open_log(tmp_path) as log:
        log.train(2, {"loss/total": 1.0})
        with pytest.raises(UserError, match="grad_norm not finite at step 5, after step 2"):
            log.train(5, {"loss/total": 1.0, "grad_norm": value})
    assert [line["step"] for line in read_metrics(tmp_path / METRICS_FILE)] == [2]


def test_pauses_do_not_count_as_training_time(tmp_path, monkeypatch):
    clock = iter([0.0, 10.0, 100.0, 110.0])
    stopped = types.SimpleNamespace(monotonic=lambda: next(clock))
    monkeypatch.setattr(training_log, "time", stopped)
    with open_log(tmp_path) as log:  # at 0 s
        with log.paused():  # from 10 s to 100 s
            pass
        log.train(5, {"loss/total": 1.0})  # at 110 s: 5 steps of 8 in 20 s
    [line] = read_metrics(tmp_path / METRICS_FILE)
    assert line["examples_per_s"] == 2.0


def test_tensorboard_gets_the_same_numbers(tmp_path):
    write(tmp_path, [1, 2])
    [events] = (tmp_path / "tensorboard").iterdir()
    data, found, position = events.read_bytes(), [], 0
    while position < len(data):  # records: length (8 bytes), its checksum (4), event, checksum (4)
        length = int.from_bytes(data[position : position + 8], "little")
        event = event_pb2.Event.FromString(data[position + 12 : position + 12 + length])
        found += [
            (event.step, v.simple_value) for v in event.summary.value if v.tag == "loss/total"
        ]
        position += length + 16
    assert found == [(1, 1.0), (2, 2.0)]
