"""Schedule values at points known by hand; what decays, what is clipped, what is frozen."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
import qwix
from flax.traverse_util import flatten_dict

from deevisum_jax import optim
from deevisum_jax.config import MergeConfig, OptimConfig
from deevisum_jax.errors import UserError
from deevisum_jax.models import paligemma2

PARAMS = {
    "img": {"pos_embedding": jnp.ones((2, 3)), "head": {"kernel": jnp.ones((3, 2))}},
    "llm": {"layers": {"norm": {"scale": jnp.ones((4, 2))}, "mlp": {"linear": jnp.ones((4, 2))}}},
    "exits": {"classifier": {"kernel": jnp.ones((2, 2, 2)), "bias": jnp.ones((2, 2))}},
}


def test_schedule_by_hand():
    config = OptimConfig(learning_rate=0.5, warmup_steps=4, end_fraction=0.2)
    schedule = optim.make_schedule(config, 12)
    # Up in quarters; then half a cosine of 8 steps from 0.5 to 0.1, its middle half-way.
    np.testing.assert_allclose(
        [schedule(step) for step in (0, 1, 2, 4, 8, 12, 100)],
        [0, 0.125, 0.25, 0.5, 0.3, 0.1, 0.1],
        rtol=1e-6,
    )


def test_without_warmup_the_first_update_has_the_full_rate():
    schedule = optim.make_schedule(OptimConfig(learning_rate=0.5), 10)
    assert schedule(0) == 0.5
    np.testing.assert_allclose(schedule(10), 0, atol=1e-8)


def test_weight_decay_leaves_norms_biases_and_positions_alone():
    config = OptimConfig(learning_rate=0.5, weight_decay=0.1)
    tx = optim.make_optimizer(config, lambda _: 0.5)
    zeros = optax.tree.zeros_like(PARAMS)
    updates, _ = tx.update(zeros, tx.init(PARAMS), PARAMS)
    # No gradient: what moves moves by -rate * decay * weight = -0.5 * 0.1 * 1.
    flat = {path: float(leaf.ravel()[0]) for path, leaf in flatten_dict(updates, sep="/").items()}
    assert flat == {
        "img/pos_embedding": 0,
        "img/head/kernel": pytest.approx(-0.05),
        "llm/layers/norm/scale": 0,
        "llm/layers/mlp/linear": pytest.approx(-0.05),
        "exits/classifier/kernel": pytest.approx(-0.05),
        "exits/classifier/bias": 0,
    }


def test_every_matrix_of_the_model_decays_and_no_vector_does():
    merge = MergeConfig(num_keyframes=1, projections=True)
    config = paligemma2.get_config("tiny", exit_layers=(2, 4), merge=merge)
    params = paligemma2.abstract_params(config)
    decays = flatten_dict(optim._decays(params), sep="/")
    kept = {path.split("/")[-1] for path, decay in decays.items() if not decay}
    assert kept == {"scale", "bias", "pos_embedding", "log_temperature"}
    assert {path.split("/")[-1] for path, decay in decays.items() if decay} == {
        "kernel", "w", "gating_einsum", "linear", "input_embedding",
        "prototype",  # a direction: its length is read by nobody
    }  # fmt: skip


def test_gradients_are_clipped_by_their_global_norm():
    config = OptimConfig(learning_rate=1.0, clip_norm=1.0, b1=0.0)
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}  # norm 5 -> 0.6 and 0.8

    def second_moment(config):
        tx = optim.make_optimizer(config, lambda _: 1.0)
        _, state = tx.update(gradient, tx.init(gradient), gradient)
        adam = optax.tree.get(state, "nu")
        return float(adam["a"][0]), float(adam["b"][0])

    # (1 - b2) g^2 with b2 = 0.999.
    assert second_moment(config) == pytest.approx((0.36e-3, 0.64e-3))
    unclipped = dataclasses.replace(config, clip_norm=None)
    assert second_moment(unclipped) == pytest.approx((9e-3, 16e-3))


def test_adamw_by_hand():
    config = OptimConfig(learning_rate=0.1, weight_decay=0.5, clip_norm=None)
    tx = optim.make_optimizer(config, lambda _: 0.1)
    params = {"kernel": jnp.array([2.0])}
    updates, _ = tx.update({"kernel": jnp.array([-3.0])}, tx.init(params), params)
    # The first step of Adam is the gradient's sign; decay adds 0.5 * 2: -0.1 * (-1 + 1).
    np.testing.assert_allclose(updates["kernel"], 0.0, atol=1e-6)


def test_split_frozen_and_merge_are_inverse():
    trainable, frozen = optim.split_frozen(PARAMS, ("img/.*", r".*/scale"))
    assert set(flatten_dict(frozen, sep="/")) == {
        "img/pos_embedding", "img/head/kernel", "llm/layers/norm/scale",
    }  # fmt: skip
    assert set(trainable) == {"llm", "exits"}
    merged = optim.merge(trainable, frozen)
    assert flatten_dict(merged) == flatten_dict(PARAMS)


def test_nothing_frozen_is_the_default():
    trainable, frozen = optim.split_frozen(PARAMS, ())
    assert frozen == {}
    assert flatten_dict(trainable) == flatten_dict(PARAMS)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("img/(",), r"'img/\(' is no regular expression"),
        (("image/.*",), "'image/.*' matches no parameter; paths look like img/"),
        (("img",), "'img' matches no parameter"),  # a whole path is meant, not a part of it
        (("img/.*", ".*"), "nothing would train"),
    ],
)
def test_freezing_by_mistake_is_refused(patterns, message):
    with pytest.raises(UserError, match=message):
        optim.split_frozen(PARAMS, patterns)


ADAPTED = {
    "img": {"head": {"kernel": jnp.ones((3, 2))}},
    "llm": {
        "mlp": {
            "linear": qwix.quantize(jnp.ones((4, 2)), "nf4", channelwise_axes=(1,)),
            "linear_lora_a": jnp.ones((4, 1)),
            "linear_lora_b": jnp.ones((1, 2)),
        }
    },
    "exits": {"classifier": {"kernel": jnp.ones((2, 2, 2))}},
    "distill": {"mentor": {"kernel": jnp.ones((1, 2, 3))}},
}


def test_with_adapters_they_and_the_heads_alone_train():
    trainable, frozen = optim.split_frozen(ADAPTED, ())
    assert set(flatten_dict(trainable, sep="/")) == {
        "llm/mlp/linear_lora_a",
        "llm/mlp/linear_lora_b",
        "exits/classifier/kernel",
        "distill/mentor/kernel",
    }
    # A quantised weight is one parameter, whole.
    assert set(flatten_dict(frozen, sep="/")) == {"img/head/kernel", "llm/mlp/linear"}
    assert optim.merge(trainable, frozen).keys() == ADAPTED.keys()


def test_adapters_and_heads_can_be_frozen_too():
    trainable, _ = optim.split_frozen(ADAPTED, ("llm/mlp/linear_lora_a", "exits/.*"))
    assert set(flatten_dict(trainable, sep="/")) == {
        "llm/mlp/linear_lora_b",
        "distill/mentor/kernel",
    }
    with pytest.raises(UserError, match="matches every adapter and head, and they alone train"):
        optim.split_frozen(ADAPTED, ("llm/.*", "exits/.*", "distill/.*"))
    with pytest.raises(UserError, match=r"'lm/\.\*' matches no parameter"):
        optim.split_frozen(ADAPTED, ("lm/.*",))


def test_a_tower_whose_adapters_are_all_frozen_is_refused():
    img = {"head": {"kernel": jnp.ones((2, 2))}, "kernel_lora_a": jnp.ones((2, 1))}
    both = ADAPTED | {"img": img}
    assert "img" in optim.split_frozen(both, ("img/head/.*",))[0]
    with pytest.raises(UserError, match=r"every adapter of img.*leave img out of model\.lora\."):
        optim.split_frozen(both, ("img/.*",))
