"""The benchmark of the selection: that it runs, and that it times the published walk."""

import argparse
import dataclasses

import numpy as np
import pytest

from deevisum_jax.keyframes.selection import SelectionConfig
from scripts import benchmark_keyframes
from tests.keyframes import published


def test_a_table_has_a_row_for_every_length_and_kind(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_keyframes, "peak_memory", lambda *_: "1 MiB")
    flags = ["--num_frames", "50", "400", "--width", "16", "--matrix", "100", "--rounds", "2"]
    assert benchmark_keyframes.main([*flags, "--num_keyframes", "4"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[4:]]
    assert [row[0] for row in rows] == ["| 50", "| 50", "| 400", "| 400"]
    assert [row[5] == "-" for row in rows] == [False, False, True, True]


def test_the_walk_that_is_timed_is_the_published_one():
    frames, query = benchmark_keyframes.make_video(300, 64, None, "float32")
    config = SelectionConfig(num_keyframes=8, fill=False)
    rule = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    _, kept = published.select(frames, query, **rule)
    assert sorted(benchmark_keyframes.matrix_walk(frames, query, config)) == kept


def test_a_video_of_few_scenes_repeats_itself():
    frames, _ = benchmark_keyframes.make_video(400, 64, 16, "float16")
    assert frames.dtype == np.float16
    config = SelectionConfig(num_keyframes=32, fill=False)
    assert len(benchmark_keyframes.matrix_walk(frames.astype(np.float32), frames[0], config)) == 16


@pytest.mark.parametrize("name", ["rounds", "width", "num_frames"])
def test_counts_are_large_enough(capsys, name):
    with pytest.raises(SystemExit):
        benchmark_keyframes.main([f"--{name}", "0"])
    assert f"--{name} 0: give" in capsys.readouterr().err


def test_memory_is_that_of_the_process_alone():
    held = np.ones(2**27, np.float32)  # 512 MiB
    args = argparse.Namespace(dtype="float32", width=16, num_keyframes=4)
    peak = benchmark_keyframes.peak_memory(50, "16 scenes", args)
    assert held.all()
    own = benchmark_keyframes.own_peak_kib() / 2**10
    assert own > 512 + 100
    assert 100 < float(peak.removesuffix(" MiB").replace(",", "")) < own
