"""The benchmark of long videos: what it makes of measurements, and one that is short."""

import json

import numpy as np
import pytest

from scripts import benchmark_long_video


def measured(num_frames, seconds):
    """A run of so many seconds that handed over 1 MiB and held 10 at most."""
    return {
        "frames": num_frames,
        "wall_s": seconds,
        "cpu_s": 2 * seconds,
        "peak_bytes": 10 * 2**20,
        "output_bytes": 2**20,
    }


def test_medians_spread_and_what_is_no_output():
    found = {100: [measured(100, seconds) for seconds in (2.0, 1.0, 5.0)]}
    row = benchmark_long_video._table(found).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    wall, cpu = "2.0 [1.0, 5.0]", "4.0 [2.0, 10.0]"
    assert cells == ["100", wall, cpu, "20.00", "10 [10, 10]", "1", "9 [9, 9]"]


def test_a_line_through_the_medians():
    found = {n: [measured(n, 1.0 + 0.002 * n)] for n in (1000, 2000, 4000)}
    line = benchmark_long_video._line(found, "wall_s")
    assert line.startswith("wall_s = 1.00 + 2.000 ms per frame; medians are at most 0.0% away")
    # 1, 2 and 4 seconds more: the line is not the video's.
    found = {n: [measured(n, (n / 1000) ** 2)] for n in (1000, 2000, 4000)}
    assert "0.0% away" not in benchmark_long_video._line(found, "wall_s")
    assert benchmark_long_video._line({100: [measured(100, 1.0)]}, "wall_s").endswith("no line")


def test_scenes_are_the_same_however_they_are_asked_for():
    whole = list(benchmark_long_video._chunks(20, 8))
    assert [len(chunk) for chunk in whole] == [8, 8, 4]
    for chunk, again in zip(whole, benchmark_long_video._chunks(20, 8), strict=True):
        np.testing.assert_array_equal(chunk, again)
    assert (whole[0].dtype, whole[0].shape[1:]) == (np.uint8, (224, 224, 3))


@pytest.mark.parametrize("mode", [[], ["--projections"]])
def test_one_length_is_measured(capsys, mode):
    flags = ["--one", "9", "--width", "64", "--chunk_size", "4", "--num_keyframes", "2", *mode]
    assert benchmark_long_video.main(flags) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["frames"] == 9
    # 9 embeddings, 9 tokens and 2 x 256 patches of 1152 numbers.
    assert found["output_bytes"] == (9 + 9 + 2 * 256) * 1152 * 4
    assert found["peak_bytes"] > found["output_bytes"]
