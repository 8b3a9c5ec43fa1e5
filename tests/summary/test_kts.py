"""KTS against a plain transcription of the published code, and on problems solved by hand."""

import tracemalloc

import h5py
import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.summary.kts import change_points
from scripts.benchmark_protocols import plain_kts

# Where segmentations tie, the kernel is free of rounding, so that no BLAS decides which is found.
PROBLEMS = {
    "noise": lambda rng, n: rng.normal(size=(n, 6)),
    "no common direction": lambda rng, n: rng.normal(size=(n, 6)) + 100,
    "shots": lambda rng, n: (
        rng.normal(size=(8, 6))[np.sort(rng.integers(0, 8, n))] + 0.3 * rng.normal(size=(n, 6))
    ),
    "shots of equal frames": lambda rng, n: np.repeat(np.eye(4), n // 4 + 1, axis=0)[:n],
    "three pictures in any order": lambda rng, n: np.eye(3)[rng.integers(0, 3, n)],
    "two pictures in turns": lambda rng, n: np.eye(2)[np.arange(n) % 2],
    "all frames equal": lambda rng, n: np.full((n, 3), 0.5),
    "all black": lambda rng, n: np.zeros((n, 2)),
    "the same twice": lambda rng, n: np.tile(rng.integers(-3, 4, (n // 2 + 1, 3)), (2, 1))[:n],
    "a still, then noise": lambda rng, n: np.where(
        np.arange(n)[:, None] < n // 2, 1.0, rng.normal(size=(n, 3))
    ),
}


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


@pytest.mark.parametrize("limit", [None, 5])
@pytest.mark.parametrize("penalty", [0.0, 0.02, 0.3, 1.0, 50.0])
@pytest.mark.parametrize("problem", PROBLEMS)
def test_ties_and_rounding_fall_as_in_the_plain_programme(problem, penalty, limit):
    for n in (2, 3, 17, 48):
        features = PROBLEMS[problem](np.random.default_rng(n), n)
        most = min(limit or n, n - 1)
        changes, _ = plain_kts(features, most, penalty, 4)
        found = change_points(features, max_change_points=most, penalty=penalty, descriptor_rate=4)
        np.testing.assert_array_equal(found, changes, err_msg=f"{n} frames")


@pytest.mark.parametrize(
    ("most", "penalty", "rate"), [(259, 1.0, 15), (259, 1.0, 1), (259, 0.0, 1), (20, 1.0, 15)]
)
def test_agrees_with_the_plain_programme_on_real_features(shared_data, most, penalty, rate):
    with h5py.File(shared_data / "features" / "tvsum_squeezenet_fire9.h5") as file:
        features = file["video_11"]["features"][:260].astype(np.float64)
    changes, _ = plain_kts(features, most, penalty, rate)
    found = change_points(features, max_change_points=most, penalty=penalty, descriptor_rate=rate)
    np.testing.assert_array_equal(found, changes)


def test_a_long_video_agrees_too():
    x = np.random.default_rng(0).normal(size=(40, 5)).repeat(55, axis=0)
    x += 0.1 * np.random.default_rng(1).normal(size=x.shape)
    changes, _ = plain_kts(x, 4, 0.1, 15)
    assert len(changes) == 4
    found = change_points(x, max_change_points=4, penalty=0.1, descriptor_rate=15)
    np.testing.assert_array_equal(found, changes)


def test_memory_is_one_matrix():
    x = np.random.default_rng(0).normal(size=(1500, 8))
    change_points(x[:50], max_change_points=49)
    tracemalloc.start()
    change_points(x, max_change_points=1499)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * 8 * 1500**2


def test_half_precision_is_only_read():
    x = np.random.default_rng(0).normal(size=(3, 16))[[0] * 5 + [1] * 4 + [2] * 6]
    x = (x + 0.05 * np.random.default_rng(1).normal(size=x.shape)).astype(np.float16)
    found = change_points(x, max_change_points=14)
    np.testing.assert_array_equal(found, [5, 9])
    np.testing.assert_array_equal(found, change_points(x.astype(float), max_change_points=14))


def test_two_rows_by_hand():
    # Apart, 1 and -1 cost the penalty of one change, p / (2 * 2) * (ln 2 + 1) = 0.423 p; together
    # their scatter, 2 / 2 = 1.
    x = np.array([[1.0], [-1.0]])
    assert change_points(x, max_change_points=1, penalty=2.3).tolist() == [1]
    assert change_points(x, max_change_points=1, penalty=2.4).tolist() == []


def test_none_allowed_is_none_found():
    assert len(change_points(np.eye(4), max_change_points=0, penalty=0.0)) == 0


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
    """Features as published segment to the stored change points (vmax 1, every 15th frame).

    In two videos two segmentations cost the same up to 2e-8, less than what rounding a feature to
    the stored float16 moves their difference by; the stored borders were found before that.
    """
    differ = {}
    with h5py.File(shared_data / "features" / "tvsum_squeezenet_fire9.h5") as file:
        for name in file:
            features = file[name]["features"][()].astype(np.float64)
            stored = file[name]["change_points"][1:, 0] // 15
            found = change_points(features, max_change_points=len(features) - 1, descriptor_rate=15)
            if not np.array_equal(found, stored):
                differ[name] = cost(features, stored) - cost(features, found)
    assert set(differ) == {"video_12", "video_40"}
    assert all(0 < more < 2e-8 for more in differ.values())


def cost(features, changes):
    """Of a segmentation, from the distances to the means (vmax 1, descriptor rate 15)."""
    pieces, n, m = np.split(features, changes), len(features), len(changes)
    scatter = sum(((piece - piece.mean(0)) ** 2).sum() for piece in pieces)
    return scatter / n + m / (2 * 15 * n) * (np.log(15 * n / m) + 1)


@pytest.mark.parametrize(
    ("features", "options", "message"),
    [
        (np.zeros((0, 3)), {}, "N >= 1"),
        (np.full((3, 2), np.nan), {}, "finite"),
        (np.ones(3), {}, r"\[N, D\]"),
        (np.ones((3, 2)), {"penalty": -1.0}, "penalty"),
        (np.ones((3, 2)), {"penalty": np.nan}, "penalty"),
        (np.ones((3, 2)), {"max_change_points": -1}, "max_change_points"),
        (np.ones((3, 2)), {"descriptor_rate": 0.5}, "descriptor_rate"),
    ],
)
def test_says_what_is_wrong(features, options, message):
    with pytest.raises(UserError, match=message):
        change_points(features, **{"max_change_points": 2} | options)
