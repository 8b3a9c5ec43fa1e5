"""The benchmark of the input: what it counts, and that it runs."""

import re
import time

import pytest

from scripts import benchmark_input


def test_a_part_within_another_counts_for_itself_alone(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 4.5, 5.0, 10.0])  # outer from 0 to 10; inner 1 to 4 and 4.5 to 5
    monkeypatch.setattr(time, "thread_time", lambda: next(now))
    clock = benchmark_input._Clock()
    inner = clock.around("inner", lambda: None)
    clock.around("outer", lambda: [inner(), inner()])()
    assert clock.spent == {"inner": 3.5, "outer": 6.5}


def test_generated_videos_are_timed_part_by_part(capsys):
    assert benchmark_input.main(["--videos", "2", "--repeats", "1", "--image_size", "32"]) == 0
    first, second = capsys.readouterr().out.split("first pass: ")[1].split("passes 2 to 2: ")
    for told in (first, second):
        shares = [float(share) for share in re.findall(r"([\d.]+)%", told)]
        assert sum(shares) == pytest.approx(100, abs=0.5)
    ms = {name: float(value) for name, value in re.findall(r"  (.+?) +([\d.]+) ms of CPU", second)}
    assert ms["decode pictures"] > 0
    assert ms["tokens"] == ms["describe sounds"] == ms["read records"] == 0  # all are kept


@pytest.mark.parametrize("name", ["repeats", "image_size", "videos"])
def test_counts_are_at_least_one(capsys, name):
    with pytest.raises(SystemExit):
        benchmark_input.main([f"--{name}", "0"])
    assert f"--{name} 0: give 1 or more" in capsys.readouterr().err


def test_overrides_need_a_config(capsys):
    with pytest.raises(SystemExit):
        benchmark_input.main(["--config.data.augment=True"])
    assert "unrecognized arguments: --config.data.augment=True" in capsys.readouterr().err
