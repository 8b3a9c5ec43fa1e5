"""KTS against a plain transcription of the published code, and on problems solved by hand."""

import h5py
import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.summary.kts import change_points


def published_cpd_nonlin(K, ncp):
    """The dynamic programme of `cpd_nonlin.py`, loop by loop (lmin = 1)."""
    n = len(K)
    K1 = np.cumsum([0.0, *np.diag(K)])
    K2 = np.zeros((n + 1, n + 1))
    K2[1:, 1:] = np.cumsum(np.cumsum(K, 0), 1)
    J = np.zeros((n, n))
    for i in range(n):
        for j in range(i, n):
            inside = K2[j + 1, j + 1] + K2[i, i] - K2[j + 1, i] - K2[i, j + 1]
            J[i, j] = K1[j + 1] - K1[i] - inside / (j - i + 1)
    table = 1e101 * np.ones((ncp + 1, n + 1))
    table[0, 1:] = J[0]
    p = np.zeros((ncp + 1, n + 1), int)
    for k in range(1, ncp + 1):
        for length in range(k + 1, n + 1):
            table[k, length] = 1e100
            for t in range(k, length):
                c = table[k - 1, t] + J[t, length - 1]
                if c < table[k, length]:
                    table[k, length], p[k, length] = c, t
    cps, cur = np.zeros(ncp, int), n
    for k in range(ncp, 0, -1):
        cps[k - 1] = cur = p[k, cur]
    return cps, table[:, n]


def published_cpd_auto(K, ncp, vmax, desc_rate):
    """The choice of the number of change points of `cpd_auto.py`."""
    _, scores = published_cpd_nonlin(K, ncp)
    native = len(K) * desc_rate
    penalties = np.zeros(ncp + 1)
    count = np.arange(1, ncp + 1)
    penalties[1:] = (vmax * count / (2.0 * native)) * (np.log(float(native) / count) + 1)
    best = np.argmin(scores / len(K) + penalties)
    return published_cpd_nonlin(K, best)[0]


@pytest.mark.parametrize("seed", range(12))
def test_agrees_with_the_published_code_on_random_problems(seed):
    rng = np.random.default_rng(seed)
    n, pieces = rng.integers(2, 45), rng.integers(1, 8)
    centres = rng.normal(size=(pieces, 6))
    x = centres[np.sort(rng.integers(0, pieces, n))] + rng.normal(size=(n, 6)) * rng.uniform(0, 1)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    most, rate, penalty = int(rng.integers(0, n)), rng.choice([1, 4, 15]), rng.uniform(0.05, 2)
    found = change_points(x, max_change_points=most, penalty=penalty, descriptor_rate=rate)
    np.testing.assert_array_equal(found, published_cpd_auto(x @ x.T, most, penalty, rate))


def test_blocks_longer_than_the_cache_block_agree_too():
    x = np.random.default_rng(0).normal(size=(140, 3))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    found = change_points(x, max_change_points=12, penalty=0.3, descriptor_rate=15)
    np.testing.assert_array_equal(found, published_cpd_auto(x @ x.T, 12, 0.3, 15))


def test_three_plain_pieces():
    x = np.repeat(np.eye(3), [4, 3, 5], axis=0)
    # Two cuts bring the scatter to 0; the second still saves more than it costs.
    np.testing.assert_array_equal(change_points(x, max_change_points=11, penalty=0.5), [4, 7])
    # One cut allowed: the best is before the longest piece. Left of it 4 and 3 rows of two
    # directions scatter by 4 * 3 / 7 * |a - b|^2 = 12 / 7 * 2; cutting at 4 leaves 15 / 8 * 2.
    np.testing.assert_array_equal(change_points(x, max_change_points=1, penalty=0.0), [7])
    assert len(change_points(x, max_change_points=11, penalty=1e3)) == 0


def test_one_row_has_no_change():
    assert len(change_points(np.ones((1, 2)), max_change_points=5)) == 0


def test_shot_borders_of_real_tvsum_videos(shared_data):
    """Features as published segment to the stored change points (vmax 1, every 15th frame)."""
    with h5py.File(shared_data / "features" / "tvsum_squeezenet_fire9.h5") as file:
        for name in ("video_1", "video_5", "video_21", "video_33", "video_50"):
            features = file[name]["features"][()]
            stored = file[name]["change_points"][1:, 0] // 15
            found = change_points(features, max_change_points=len(features) - 1, descriptor_rate=15)
            np.testing.assert_array_equal(found, stored, err_msg=name)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (np.zeros((0, 3)), {}, "N >= 1"),
        (np.full((3, 2), np.nan), {}, "finite"),
        (np.ones((3, 2)), {"penalty": -1.0}, "penalty"),
        (np.ones((3, 2)), {"descriptor_rate": 0.5}, "descriptor_rate"),
    ],
)
def test_says_what_is_wrong(features, options, message):
    with pytest.raises(UserError, match=message):
        change_points(features, max_change_points=2, **options)
