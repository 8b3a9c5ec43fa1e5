"""F1, tau and rho by hand and against scipy."""

import h5py
import numpy as np
import pytest
from scipy import stats

from deevisum_jax.errors import UserError
from deevisum_jax.summary import metrics


def test_f1_by_hand():
    # 2 common frames, 3 and 5 chosen: precision 2/3, recall 2/5, F1 = 4/8.
    summary = np.array([1, 1, 1, 0, 0, 0, 0, 0], bool)
    reference = np.array([0, 1, 1, 1, 1, 1, 0, 0], bool)
    assert metrics.f1(summary, reference) == 0.5
    assert metrics.f1(summary, np.zeros(8, bool)) == 0.0
    assert metrics.f1(np.zeros(8, bool), np.zeros(8, bool)) == 0.0
    matrix = metrics.f1_matrix(np.stack([summary, summary & False]), reference[None])
    np.testing.assert_array_equal(matrix, [[0.5], [0.0]])


def test_tau_and_rho_by_hand():
    # Of 6 pairs one is tied in y; 4 agree, 1 disagrees: (4 - 1) / sqrt(6 * 5).
    x, y = [1, 2, 3, 4], [1, 3, 2, 3]
    assert metrics.kendall_tau(x, y) == pytest.approx(3 / 30**0.5)
    # Ranks of y are 1, 3.5, 2, 3.5: covariance 3, variances 5 and 4.5.
    assert metrics.spearman_rho(x, y) == pytest.approx(3 / (5 * 4.5) ** 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_matrices_agree_with_scipy(seed):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(2, 300))
    a = np.concatenate([rng.random((2, n)), rng.integers(0, 3, (1, n))])
    a[2, :2] = 0, 2
    b = rng.integers(1, 6, (4, n)).astype(float)
    b[:, 0], b[:, 1] = 1, 5  # no row is constant
    tau, rho = metrics.kendall_tau_matrix(a, b), metrics.spearman_rho_matrix(a, b)
    for i in range(3):
        for j in range(4):
            assert tau[i, j] == pytest.approx(stats.kendalltau(a[i], b[j]).statistic, abs=1e-12)
            assert rho[i, j] == pytest.approx(stats.spearmanr(a[i], b[j]).statistic, abs=1e-12)
            assert metrics.kendall_tau(a[i], b[j]) == pytest.approx(tau[i, j], abs=1e-12)


@pytest.mark.parametrize("n", [1, 7, 64, 65, 1000])
def test_f1_matrix_is_f1_of_every_two(n):
    rng = np.random.default_rng(n)
    a, b = rng.random((3, n)) < 0.3, rng.random((5, n)) < 0.5
    expected = [[metrics.f1(x, y) for y in b] for x in a]
    np.testing.assert_array_equal(metrics.f1_matrix(a, b), expected)
    np.testing.assert_array_equal(metrics.f1_matrix(a.astype(np.uint8), 2.5 * b), expected)


ROWS = {
    "five levels": lambda rng: rng.integers(1, 6, (3, 200)),
    "five levels, every row its own": lambda rng: (
        rng.integers(1, 6, (40, 200)) * rng.random((40, 1))
    ),
    "ninety levels": lambda rng: rng.integers(0, 90, (2, 200)),
    "no ties": lambda rng: rng.random((2, 200)),
    "mostly tied": lambda rng: np.maximum(rng.random((3, 200)), 0.9),
    "one constant": lambda rng: np.arange(200) * np.array([[1], [0]]),
}


@pytest.mark.filterwarnings("ignore:An input array is constant")
@pytest.mark.parametrize("cells", [metrics._MOST_CELLS, 2000], ids=["whole", "in parts"])
@pytest.mark.parametrize("b", ROWS)
@pytest.mark.parametrize("a", ROWS)
def test_tau_and_rho_of_any_two_kinds_of_scores(a, b, cells, monkeypatch):
    monkeypatch.setattr(metrics, "_MOST_CELLS", cells)
    x, y = ROWS[a](np.random.default_rng(0)), ROWS[b](np.random.default_rng(1))
    tau, rho = metrics.kendall_tau_matrix(x, y), metrics.spearman_rho_matrix(x, y)
    for i, row in enumerate(x[:3]):
        for j, other in enumerate(y[:3]):
            expected = np.nan_to_num(stats.kendalltau(row, other).statistic)  # constant: 0
            assert tau[i, j] == pytest.approx(expected, abs=1e-12)
            expected = np.nan_to_num(stats.spearmanr(row, other).statistic)
            assert rho[i, j] == pytest.approx(expected, abs=1e-12)


def test_real_annotators_as_scipy_has_them(shared_data):
    rng = np.random.default_rng(0)
    with h5py.File(shared_data / "tvsum" / "matlab" / "ydata-tvsum50.mat") as file:
        for reference in file["tvsum50"]["user_anno"][()].ravel()[[0, 24, 49]]:
            scores = file[reference][:, ::15]
            predicted = rng.random((1, scores.shape[1]))
            for matrix, published in (
                (metrics.kendall_tau_matrix, stats.kendalltau),
                (metrics.spearman_rho_matrix, stats.spearmanr),
            ):
                for rows in (predicted, scores[:4]):
                    expected = [[published(x, y).statistic for y in scores] for x in rows]
                    np.testing.assert_allclose(matrix(rows, scores), expected, rtol=0, atol=1e-12)


def test_one_point_has_no_order():
    one = np.ones((1, 1))
    assert metrics.kendall_tau_matrix(one, one).tolist() == [[0.0]]
    assert metrics.spearman_rho_matrix(one, one).tolist() == [[0.0]]


def test_a_constant_says_nothing():
    constant, any_scores = np.full(5, 0.3), np.arange(5.0)
    assert metrics.kendall_tau(constant, any_scores) == 0.0
    assert metrics.spearman_rho(any_scores, constant) == 0.0
    assert metrics.kendall_tau_matrix(constant[None], any_scores[None])[0, 0] == 0.0
    assert metrics.spearman_rho_matrix(constant[None], any_scores[None])[0, 0] == 0.0


def test_says_what_is_wrong():
    with pytest.raises(UserError, match="frame by frame"):
        metrics.f1(np.ones(3, bool), np.ones(4, bool))
    with pytest.raises(UserError, match="common length"):
        metrics.kendall_tau([1, 2], [1, 2, 3])
    with pytest.raises(UserError, match="common length"):
        metrics.f1_matrix(np.ones((1, 3), bool), np.ones((1, 4), bool))
    for compare in (metrics.kendall_tau, metrics.spearman_rho):
        with pytest.raises(UserError, match="not a finite number"):
            compare([1, np.nan], [1, 2])
    for compare in (metrics.kendall_tau_matrix, metrics.spearman_rho_matrix, metrics.f1_matrix):
        with pytest.raises(UserError, match="not a finite number"):
            compare(np.ones((1, 2)), np.array([[1, np.nan]]))
