"""F1, tau and rho by hand and against scipy."""

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


def test_tau_matrix_of_scores_with_many_levels():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 90, (2, 200)), rng.random((2, 200))
    tau = metrics.kendall_tau_matrix(a, b)
    np.testing.assert_allclose(tau, metrics.kendall_tau_matrix(b, a).T, atol=1e-12)
    assert tau[1, 0] == pytest.approx(stats.kendalltau(a[1], b[0]).statistic, abs=1e-12)


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
    with pytest.raises(UserError, match="not a finite number"):
        metrics.spearman_rho([1, np.nan], [1, 2])
