"""The ways to choose frames that keyframe selection is held against, on frames seen at a glance."""

import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.keyframes import baselines

# Cosines to the query (1, 0, 0): 1, 0.8, 0.6, 0. The second and the third are 0.48 alike.
FRAMES = np.array([[2, 0, 0], [0.8, 0.6, 0], [0.6, 0, 0.8], [0, 1, 0]])
QUERY = np.array([5.0, 0, 0])


def test_uniform_frames_are_the_middles_of_equal_parts():
    np.testing.assert_array_equal(baselines.uniform(10, 2), [2, 7])
    np.testing.assert_array_equal(baselines.uniform(10, 3), [1, 5, 8])
    np.testing.assert_array_equal(baselines.uniform(3, 5), [0, 1, 2])


def test_the_most_relevant_frames_come_in_time_order_and_of_equals_the_earlier():
    np.testing.assert_array_equal(baselines.top_k(FRAMES[::-1], QUERY, 2), [2, 3])
    np.testing.assert_array_equal(baselines.top_k(np.ones((5, 3)), QUERY, 3), [0, 1, 2])
    # A frame without a direction has cosine 0: before what points away, after what does not.
    frames = np.array([[-1.0, 0, 0], [0, 0, 0], [0.1, 0, 0]])
    np.testing.assert_array_equal(baselines.top_k(frames, QUERY, 2), [1, 2])


@pytest.mark.parametrize(
    ("relevance_weight", "chosen"),
    [
        # After the first frame every other is as relevant as it is redundant: (2 lambda - 1) cos.
        (1.0, [0, 1]),
        (0.7, [0, 1]),
        (0.3, [0, 3]),
        (0.0, [0, 3]),
    ],
)
def test_mmr_by_hand(relevance_weight, chosen):
    found = baselines.maximal_marginal_relevance(
        FRAMES, QUERY, 2, relevance_weight=relevance_weight
    )
    np.testing.assert_array_equal(found, chosen)


def test_mmr_looks_at_all_that_is_chosen():
    # Third choice at lambda 0.5 after frames 0 and 1, of cosine 0.9 to the query both:
    # frame 2 repeats frame 1, (0.9 - 1) / 2; frame 3 is less relevant and new, (0.3 - 0.27) / 2.
    b = np.sqrt(1 - 0.81)
    frames = np.array([[0.9, b, 0], [0.9, -b, 0], [0.9, -b, 0], [0.3, 0, np.sqrt(1 - 0.09)]])
    found = baselines.maximal_marginal_relevance(frames, QUERY, 3, relevance_weight=0.5)
    np.testing.assert_array_equal(found, [0, 1, 3])


@pytest.mark.parametrize("relevance_weight", [0.0, 0.3, 0.7, 1.0])
def test_mmr_is_the_published_rule(relevance_weight):
    rng = np.random.default_rng(0)
    frames, query = rng.normal(size=(60, 5)), rng.normal(size=5)
    unit = frames / np.linalg.norm(frames, axis=1, keepdims=True)
    relevance = unit @ query / np.linalg.norm(query)
    chosen = [int(relevance.argmax())]
    while len(chosen) < 12:
        chosen.append(
            max(
                set(range(60)) - set(chosen),
                key=lambda n: (
                    relevance_weight * relevance[n]
                    - (1 - relevance_weight) * max(unit[n] @ unit[k] for k in chosen)
                ),
            )
        )
    found = baselines.maximal_marginal_relevance(
        frames, query, 12, relevance_weight=relevance_weight
    )
    np.testing.assert_array_equal(found, sorted(chosen))


def test_k_means_takes_the_middle_of_each_cluster():
    # Three directions, around each of them four frames with the direction itself among them.
    turns = np.array([[0, 0, 0], [0.1, 0.1, 0], [-0.1, 0.1, 0], [0, -0.2, 0]])
    frames = np.concatenate([np.roll([0, 0, 1.0], i) + np.roll(turns, i, 1) for i in range(3)])
    for seed in range(5):
        found = baselines.k_means(frames, 3, np.random.default_rng(seed))
        np.testing.assert_array_equal(found, [0, 4, 8])


def test_k_means_of_fewer_pictures_than_keyframes_takes_each_once():
    frames = np.repeat(np.eye(3), 10, axis=0)
    found = baselines.k_means(frames, 8, np.random.default_rng(0))
    assert sorted(found // 10) == [0, 1, 2]
    found = baselines.k_means(np.ones((20, 3), np.float16), 8, np.random.default_rng(0))
    assert len(found) == 1


def test_more_keyframes_than_frames_are_all_frames():
    rng = np.random.default_rng(0)
    for found in (
        baselines.top_k(FRAMES, QUERY, 9),
        baselines.maximal_marginal_relevance(FRAMES, QUERY, 9, relevance_weight=0.5),
        baselines.k_means(FRAMES, 9, rng),
    ):
        np.testing.assert_array_equal(found, range(4))


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (lambda: baselines.uniform(0, 3), "there are no frames"),
        (lambda: baselines.top_k(np.zeros((0, 3)), QUERY, 3), "there are no frames"),
        (lambda: baselines.k_means(FRAMES, 0, None), "num_keyframes must be at least 1, got 0"),
        (
            lambda: baselines.top_k(FRAMES, QUERY[:2], 3),
            r"query is of shape \[2\], the frames' embeddings of shape \[4, 3\]",
        ),
        (
            lambda: baselines.maximal_marginal_relevance(FRAMES, QUERY, 3, relevance_weight=1.5),
            r"lambda is a share in \[0, 1\], got 1.5",
        ),
    ],
)
def test_what_cannot_be_chosen_from_is_refused(choose, message):
    with pytest.raises(UserError, match=message):
        choose()
