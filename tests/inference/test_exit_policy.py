"""How sure an exit is and who leaves, by hand."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.inference.exit_policy import ExitPolicy, confidence, describe
from deevisum_jax.typing import CONFIDENCES, SegmentScores

INF = math.inf
EVERY = list(CONFIDENCES)


def scores(summary_prob, importance=0.5, cosine=0.0) -> SegmentScores:
    """Of one exit or of some; what is not given is the same everywhere."""
    shape = np.shape(summary_prob)
    to = lambda values: np.broadcast_to(np.float32(values), shape)
    return SegmentScores(
        importance=to(importance), summary_prob=to(summary_prob), cosine=to(cosine)
    )


def policy(*thresholds, kind="max_probability"):
    return ExitPolicy(confidence=kind, thresholds=thresholds)


# How sure.


def test_max_probability_is_that_of_the_likelier_class():
    found = confidence("max_probability", scores([0.9, 0.1, 0.5]), None)
    np.testing.assert_allclose(found, [0.9, 0.9, 0.5], rtol=1e-6)


def test_entropy_is_in_bits():
    # 0.9 log2(1 / 0.9) + 0.1 log2(1 / 0.1) = 0.137 + 0.332 = 0.469.
    found = confidence("entropy", scores([0.9, 0.1, 0.5, 0.0, 1.0, 0.25]), None)
    np.testing.assert_allclose(found, [0.531, 0.531, 0, 1, 1, 0.1887], atol=1e-4)


def test_a_cosine_counts_without_its_sign():
    found = confidence("cosine", scores([0.5] * 3, cosine=[0.75, -0.75, 0]), None)
    np.testing.assert_array_equal(found, [0.75, 0.75, 0])


def test_exits_agree_as_far_as_neither_probability_nor_importance_changed():
    before = scores([0.5, 0.5, 0.0], [0.25, 0.75, 1.0])
    now = scores([0.75, 0.625, 1.0], [0.375, 0.25, 0.0])
    # Changes of 0.25 and 0.125, of 0.125 and 0.5, of 1 and 1.
    np.testing.assert_array_equal(confidence("agreement", now, before), [0.75, 0.5, 0])


def test_the_first_exit_agrees_with_nobody():
    np.testing.assert_array_equal(confidence("agreement", scores([0.5, 1.0]), None), [-1, -1])


@pytest.mark.parametrize("kind", EVERY)
def test_confidences_lie_within_their_range_and_are_float32(kind):
    # Also next to 1/2, where an entropy could be rounded beyond one bit.
    near = 0.5 + np.arange(-500, 500) * 2.0**-20
    p = np.concatenate([np.linspace(0, 1, 2001), near]).astype(np.float32)
    rng = np.random.default_rng(0)
    importance, cosine = rng.random(p.shape), rng.uniform(-1, 1, p.shape)
    found = confidence(kind, scores(p, importance, cosine), scores(rng.permutation(p)))
    low, high = CONFIDENCES[kind]
    assert found.dtype == np.float32
    assert found.min() >= low
    assert found.max() <= high


@pytest.mark.parametrize("kind", EVERY)
def test_confidences_are_the_same_under_jit(kind):
    rng = np.random.default_rng(0)
    now, before = (
        SegmentScores(**{name: rng.random(64, np.float32) for name in vars(scores(0.5))})
        for _ in range(2)
    )
    compiled = jax.jit(confidence, static_argnums=0)(kind, now, before)
    np.testing.assert_allclose(compiled, confidence(kind, now, before), atol=1e-6)
    assert jax.tree.all(jax.tree.map(lambda a: isinstance(a, np.ndarray), now))


# Who leaves. Three exits (down) of four segments (across).

SUMMARY_PROB = np.array(
    [
        [0.95, 0.50, 0.05, 0.60],
        [0.50, 0.90, 0.50, 0.70],
        [0.10, 0.20, 0.30, 0.80],
    ]
)


def test_the_example_of_the_docstring():
    # Sure by 0.95, 0.5, 0.1 and by 0.6, 0.7, 0.8; a cosine may be as small as 0.1.
    said = scores([[0.5, 0.5]] * 3, cosine=[[0.95, 0.6], [0.5, 0.7], [0.1, 0.8]])
    np.testing.assert_array_equal(policy(0.9, 0.9, kind="cosine").exit_index(said), [0, 2])


def test_a_segment_leaves_at_the_first_exit_that_is_sure_either_way():
    # Sure yes at once; sure at the second; sure no at once; never sure: the last.
    found = policy(0.9, 0.9).exit_index(scores(SUMMARY_PROB))
    np.testing.assert_array_equal(found, [0, 1, 0, 2])


@pytest.mark.parametrize(
    ("thresholds", "exits"),
    [
        ((0.5, 0.5), [0, 0, 0, 0]),
        ((0.6, 0.6), [0, 1, 0, 0]),
        ((0.8, 0.8), [0, 1, 0, 2]),
        ((1.0, 1.0), [2, 2, 2, 2]),
        ((1.0, 0.7), [2, 1, 2, 1]),  # each exit has its own
        ((0.9, INF), [0, 2, 0, 2]),
        ((INF, 0.5), [1, 1, 1, 1]),
        ((INF, INF), [2, 2, 2, 2]),
    ],
)
def test_every_exit_has_its_threshold(thresholds, exits):
    np.testing.assert_array_equal(policy(*thresholds).exit_index(scores(SUMMARY_PROB)), exits)


def test_even_a_certain_segment_passes_an_exit_that_nobody_leaves_at():
    certain = scores([[1.0], [1.0], [1.0]])
    np.testing.assert_array_equal(policy(INF, 1.0).exit_index(certain), [1])


def test_nobody_leaves_the_first_exit_by_agreement():
    same = scores([[0.5, 1.0]] * 3)
    np.testing.assert_array_equal(policy(0.0, 0.0, kind="agreement").exit_index(same), [1, 1])


def test_agreement_is_with_the_exit_before_even_where_nobody_leaves_it():
    said = scores([[0.1], [0.9], [0.9]])
    # 0.9 agrees with 0.9, not with 0.1.
    np.testing.assert_array_equal(policy(INF, 0.9, kind="agreement").exit_index(said), [2])
    said = scores([[0.1], [0.9], [0.9], [0.9]])
    np.testing.assert_array_equal(policy(INF, INF, 0.9, kind="agreement").exit_index(said), [2])


def test_a_model_with_one_exit_leaves_there():
    np.testing.assert_array_equal(policy().exit_index(scores([[0.5, 0.9]])), [0, 0])
    assert policy().is_off


def test_what_is_no_number_leaves_last():
    np.testing.assert_array_equal(policy(0.5, 0.5).exit_index(scores([[math.nan]] * 3)), [2])


# Made from a number, a list, nothing.


def test_one_threshold_is_for_all_exits_but_the_last():
    assert ExitPolicy.of(0.9, 3, "cosine") == policy(0.9, 0.9, kind="cosine")
    assert ExitPolicy.of([0.9], 3, "cosine") == policy(0.9, 0.9, kind="cosine")
    assert ExitPolicy.of(1, 4, "entropy") == policy(1, 1, 1, kind="entropy")
    assert ExitPolicy.of(0.9, 1, "cosine") == policy(kind="cosine")


def test_thresholds_may_be_given_for_each_exit():
    assert ExitPolicy.of([0.9, INF], 3, "cosine") == policy(0.9, INF, kind="cosine")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([0.9, 0.8], r"got 2 exit thresholds \(0\.9, 0\.8\); give one for all, or 3: .* 4 exits"),
        ([0.9] * 4, r"got 4 exit thresholds"),
        ([], r"got 0 exit thresholds"),
    ],
)
def test_another_number_of_thresholds_is_refused(given, message):
    with pytest.raises(UserError, match=message):
        ExitPolicy.of(given, 4, "max_probability")


@pytest.mark.parametrize("kind", EVERY)
def test_thresholds_outside_of_the_range_are_refused(kind):
    low, high = CONFIDENCES[kind]
    for threshold in (low - 0.01, high + 0.01, -INF, math.nan):
        with pytest.raises(UserError, match=rf"{threshold} is not within \[{low:g}, 1\].*{kind}"):
            policy(high, threshold, kind=kind)
    policy(low, high, INF, kind=kind)


def test_an_unknown_confidence_names_the_closest():
    with pytest.raises(UserError, match=r"confidence 'cosin'.*'cosine'"):
        policy(0.9, kind="cosin")


def test_scores_of_another_number_of_exits_are_refused():
    with pytest.raises(UserError, match=r"^3 exit thresholds .* 4 exits, and this one has 3$"):
        policy(0.9, 0.9, 0.9).exit_index(scores(SUMMARY_PROB))


def test_off_runs_every_layer():
    off = ExitPolicy.off(3)
    assert off.is_off
    assert not policy(INF, 1.0).is_off
    assert policy(0.5, INF, kind="agreement").is_off  # the first exit agrees with nobody
    np.testing.assert_array_equal(off.exit_index(scores(np.ones((3, 2)))), [2, 2])


# Written down.


@pytest.mark.parametrize("kind", EVERY)
def test_a_policy_comes_back_from_a_file(kind):
    found = policy(0.7123456789, INF, 1.0, kind=kind)
    written = json.dumps(found.to_json(), allow_nan=False)
    assert json.loads(written)["thresholds"] == [0.7123456789, None, 1.0]
    assert ExitPolicy.from_json(json.loads(written)) == found


def test_a_file_with_a_threshold_out_of_range_is_refused():
    with pytest.raises(UserError, match=r"threshold 0\.4 is not within"):
        ExitPolicy.from_json({"confidence": "max_probability", "thresholds": [0.4, None]})


def test_a_policy_in_words():
    layers = (2, 4, 6)
    assert (
        describe(policy(0.99, 0.5), layers)
        == "max_probability from 0.99 at layer 2, 0.5 at layer 4"
    )
    assert describe(policy(INF, 0.123456, kind="cosine"), layers) == "cosine from 0.1235 at layer 4"
    assert describe(ExitPolicy.off(3), layers) == "off"
    # Nobody agrees at the first.
    agreement = ExitPolicy.of(0.9, 3, "agreement")
    assert describe(agreement, layers) == "agreement from 0.9 at layer 4"


def test_thresholds_are_rounded_alike_wherever_they_come_from():
    # A billionth more than float32's 0.7: compared in float32, as a device does, no more.
    here = np.float32(0.7)
    threshold = float(here) + 1e-9
    said = scores([[0.5], [0.5]], cosine=[[here], [0]])
    for given in (threshold, np.float64(threshold)):
        np.testing.assert_array_equal(policy(given, kind="cosine").exit_index(said), [0])


def test_policies_are_told_apart_by_value():
    assert len({policy(0.9), policy(0.9), policy(0.8), policy(0.9, kind="cosine")}) == 3


def test_decisions_are_the_same_for_arrays_of_a_device():
    on_device = jax.tree.map(jnp.asarray, scores(SUMMARY_PROB))
    np.testing.assert_array_equal(policy(0.9, 0.9).exit_index(on_device), [0, 1, 0, 2])
