"""Scores of every exit find their way back to their segments, and are read where they leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deevisum_jax import sharding
from deevisum_jax.data import pipeline
from deevisum_jax.errors import UserError
from deevisum_jax.inference import scoring
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.typing import ExitScores, SegmentScores

LN3 = np.log(3.0)


def test_logits_are_read_as_probabilities_by_hand():
    scores = ExitScores(
        class_logits=jnp.array([[[0.0, LN3], [LN3, 0]]]),
        importance=jnp.array([[LN3, 0.0]]),
        cosine=jnp.array([[0.5, -0.5]]),
    )
    found = scoring.read(scores)
    np.testing.assert_allclose(found.summary_prob, [[0.75, 0.25]], rtol=1e-6)
    np.testing.assert_allclose(found.importance, [[0.75, 0.5]], rtol=1e-6)
    np.testing.assert_array_equal(found.cosine, [[0.5, -0.5]])
    jax.tree.map(np.testing.assert_array_equal, found.at(0), jax.tree.map(lambda a: a[0], found))


# Three exits (down) of four segments (across).
SCORES = SegmentScores(
    importance=np.arange(12.0, dtype=np.float32).reshape(3, 4),
    summary_prob=np.array(
        [
            [0.95, 0.50, 0.05, 0.60],
            [0.50, 0.90, 0.50, 0.70],
            [0.10, 0.20, 0.30, 0.80],
        ],
        np.float32,
    ),
    cosine=np.zeros((3, 4), np.float32),
)


def test_every_segment_is_read_at_its_own_exit():
    found = scoring.at_exit(SCORES, ExitPolicy.of(0.9, 3, "max_probability"))
    np.testing.assert_array_equal(found.exit_index, [0, 1, 0, 2])
    np.testing.assert_array_equal(found.importance, [0, 5, 2, 11])
    np.testing.assert_array_equal(found.summary_prob, np.float32([0.95, 0.9, 0.05, 0.8]))


def test_without_early_exits_every_segment_is_read_at_the_last():
    found = scoring.at_exit(SCORES, ExitPolicy.off(3))
    np.testing.assert_array_equal(found.exit_index, [2, 2, 2, 2])
    np.testing.assert_array_equal(found.importance, SCORES.importance[2])


def test_a_policy_for_another_number_of_exits_is_refused():
    with pytest.raises(UserError, match="5 exits, and this one has 3"):
        scoring.at_exit(SCORES, ExitPolicy.off(5))


# By video.


def groups(rows, exits=None):
    """One segment per group; the value is ten times the video plus the segment."""
    for video, segment in rows:
        value = np.array([10.0 * video + segment])
        yield (
            np.array([video]),
            np.array([segment]),
            value if exits is None else value[None] * exits,
        )


ROWS = [(0, 0), (0, 1), (2, 0), (2, 1), (2, 2), (7, 0)]


@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_segments_is_put_right(seed):
    mixed = [ROWS[i] for i in np.random.default_rng(seed).permutation(len(ROWS))]
    found = scoring.by_video([*groups(mixed)])
    assert list(found) == [0, 2, 7]
    for video, expected in ((0, [0, 1]), (2, [20, 21, 22]), (7, [70])):
        np.testing.assert_array_equal(found[video], expected)


def test_exits_stay_in_front():
    found = scoring.by_video([*groups(ROWS, exits=np.array([[1], [-1]]))])
    np.testing.assert_array_equal(found[2], [[20, 21, 22], [-20, -21, -22]])


def test_groups_of_no_segment_add_nothing():
    nothing = (np.zeros(0, int), np.zeros(0, int), np.zeros(0))
    found = scoring.by_video([nothing, *groups(ROWS[:2]), nothing])
    np.testing.assert_array_equal(found[0], [0, 1])
    assert scoring.by_video([]) == {}
    assert scoring.by_video([nothing]) == {}


# Whole passes.


class Segments:
    """Two videos of 2 and 3 segments; the token tells video and segment apart."""

    rows = ((0, 0), (0, 1), (1, 0), (1, 1), (1, 2))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        video, segment = self.rows[i]
        return {
            "frames": np.zeros((1, 1, 1, 3), np.uint8),
            "tokens": np.array([10 * video + segment], np.int32),
            **{name: np.zeros(1, bool) for name in ("mask_ar", "mask_input", "mask_loss")},
            "label": np.int32(0),
            "score": np.float32(0),
            "video_id": np.int32(video),
            "segment": np.int32(segment),
            "valid": np.True_,
        }


@jax.jit
def score_fn(batch):
    """At exit 0 the token, at exit 1 its negative; a hundredth of that as probability."""
    token = batch.tokens[:, 0].astype(jnp.float32)
    importance = jnp.stack([token, -token])
    return SegmentScores(
        importance=importance, summary_prob=importance / 100, cosine=importance / 1000
    )


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_scores_come_back_by_video_in_order_without_padding(order):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    batches = list(pipeline.in_order(Segments(), batch_size=4))[order]
    found = scoring.score_videos(score_fn, batches, mesh)
    assert sorted(found) == [0, 1]
    np.testing.assert_array_equal(found[0].importance, [[0, 1], [0, -1]])
    np.testing.assert_array_equal(found[1].importance, [[10, 11, 12], [-10, -11, -12]])
    np.testing.assert_allclose(found[1].summary_prob, found[1].importance / 100)
    np.testing.assert_allclose(found[1].cosine, found[1].importance / 1000)


def test_batches_are_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    [fields, _] = pipeline.in_order(Segments(), batch_size=4)
    batch = sharding.place_batch(fields, mesh)
    assert batch.tokens.sharding.spec == jax.sharding.PartitionSpec(sharding.BATCH_AXES)
    np.testing.assert_array_equal(batch.tokens, fields["tokens"])
