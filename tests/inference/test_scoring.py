"""Exits by hand, and that scores find their way back to their segments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deevisum_jax import sharding
from deevisum_jax.data import pipeline
from deevisum_jax.errors import UserError
from deevisum_jax.inference import scoring
from deevisum_jax.typing import ExitScores

# Three exits (down) of four segments (across).
SUMMARY_PROB = np.array(
    [
        [0.95, 0.50, 0.05, 0.60],
        [0.50, 0.90, 0.50, 0.70],
        [0.10, 0.20, 0.30, 0.80],
    ]
)


def test_a_segment_leaves_at_the_first_exit_that_is_sure_either_way():
    # Sure yes at once; sure at the second; sure no at once; never sure: the last.
    np.testing.assert_array_equal(scoring.exit_index(SUMMARY_PROB, 0.9), [0, 1, 0, 2])


@pytest.mark.parametrize(
    ("threshold", "exits"),
    [(0.5, [0, 0, 0, 0]), (0.6, [0, 1, 0, 0]), (0.8, [0, 1, 0, 2]), (1.0, [2, 2, 2, 2])],
)
def test_a_higher_threshold_leaves_later(threshold, exits):
    np.testing.assert_array_equal(scoring.exit_index(SUMMARY_PROB, threshold), exits)


@pytest.mark.parametrize("threshold", [0.49, 1.01, -1])
def test_thresholds_that_are_no_probability_of_the_likelier_class(threshold):
    with pytest.raises(UserError, match=r"is not within \[0.5, 1\]"):
        scoring.exit_index(SUMMARY_PROB, threshold)


def test_every_segment_is_read_at_its_own_exit():
    scores = scoring.SegmentScores(
        importance=np.arange(12.0).reshape(3, 4), summary_prob=SUMMARY_PROB
    )
    np.testing.assert_array_equal(scoring.at_exit(scores, np.array([0, 1, 0, 2])), [0, 5, 2, 11])


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
    """Importance logit = token at exit 0, its negative at exit 1; the class likewise."""
    token = batch.tokens[:, 0].astype(jnp.float32)
    importance = jnp.stack([token, -token])
    return ExitScores(
        class_logits=jnp.stack([jnp.zeros_like(importance), importance], axis=-1),
        importance=importance,
    )


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)])
def test_scores_come_back_by_video_in_order_without_padding(order):
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    batches = list(pipeline.in_order(Segments(), batch_size=4))[order]
    found = scoring.score_videos(score_fn, batches, mesh)
    assert sorted(found) == [0, 1]
    sigmoid = lambda x: 1 / (1 + np.exp(-np.array(x)))
    np.testing.assert_allclose(found[0].importance, sigmoid([[0, 1], [0, -1]]), rtol=1e-5)
    np.testing.assert_allclose(
        found[1].importance, sigmoid([[10, 11, 12], [-10, -11, -12]]), rtol=1e-5
    )
    np.testing.assert_allclose(found[1].summary_prob, found[1].importance, rtol=1e-4)


def test_batches_are_split_over_data_and_fsdp():
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    [fields, _] = pipeline.in_order(Segments(), batch_size=4)
    batch = sharding.place_batch(fields, mesh)
    assert batch.tokens.sharding.spec == jax.sharding.PartitionSpec(sharding.BATCH_AXES)
    np.testing.assert_array_equal(batch.tokens, fields["tokens"])
