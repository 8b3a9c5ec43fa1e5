"""Merging: by hand, and against a transcription in float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.keyframes import merging
from deevisum_jax.keyframes.merging import MergingConfig, interleave, merge, reference_slots
from tests.keyframes import merging_reference
from tests.keyframes.merging_reference import keyframes, random

N, P, D, E = 9, 4, 6, 5
MODES = [
    MergingConfig(projections=projections, reference=reference, temperature=0.2)
    for projections, reference in itertools.product((False, True), merging.REFERENCES)
]
MODE_NAMES = [f"{mode.projections=} {mode.reference}" for mode in MODES]


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


def of_mode(config):
    """The query and the learned parameters, if it has some."""
    params = merging_reference.params(D, E) if config.projections else None
    return random(E if config.projections else D, seed=3), params


# ---- Which frame is compared with which ----


def test_the_nearest_preceding_keyframe_is_the_reference():
    assert reference_slots(keyframes(2, 5), 7).tolist() == [-1, -1, 0, 0, 0, 1, 1]
    assert reference_slots(keyframes(0, 1), 3).tolist() == [0, 1, 1]


def test_slots_that_are_not_used_are_nobodys_reference():
    some = keyframes(1, slots=4, num_frames=3)
    assert reference_slots(some, 3).tolist() == [-1, 0, 0]
    none = keyframes(slots=2, num_frames=3)
    assert reference_slots(none, 3).tolist() == [-1, -1, -1]


def test_the_released_reference_is_the_frame_with_the_number_of_the_slot():
    some = keyframes(2, 5, slots=3, num_frames=7)
    frames = merging.reference_frames(some, MergingConfig()).tolist()
    assert frames[:2] == [2, 5]
    assert frames[2] > 10**9  # no frame
    released = merging.reference_frames(some, MergingConfig(reference="released"))
    assert released.tolist()[:2] == [0, 1]


def test_a_frame_in_front_of_all_keyframes_is_compared_with_itself():
    patches, bank = random(3, P, D), random(2, P, D, seed=1)
    found = merging.gather_references(patches, bank, jnp.array([-1, 1, 0]))
    np.testing.assert_array_equal(found, [patches[0], bank[1], bank[0]])


# ---- One token of a frame ----


def test_a_token_by_hand():
    # Two patches: one is the query, the other is what the keyframe shows at that place.
    patches = jnp.array([[1.0, 0.0], [0.0, 3.0]])
    references = jnp.array([[0.0, 1.0], [0.0, 1.0]])
    query = jnp.array([5.0, 0.0])
    # R = 1, 0 and T = 0, 1: scores 1 and -1, weights e^2 to 1 at a temperature of 1.
    token = merge(patches, references, query, config=MergingConfig(temperature=1.0))
    e2 = np.exp(2)
    np.testing.assert_allclose(token, [e2 / (e2 + 1), 3 / (e2 + 1)], rtol=1e-6)
    # Redundancy that counts for nothing: scores 1 and 0.
    config = MergingConfig(temperature=1.0, redundancy_weight=0.0)
    token = merge(patches, references, query, config=config)
    np.testing.assert_allclose(token, [np.e / (np.e + 1), 3 / (np.e + 1)], rtol=1e-6)
    # As released, 0.01, the first patch has all the weight.
    np.testing.assert_allclose(merge(patches, references, query, config=MergingConfig()), [1, 0])


@pytest.mark.parametrize("config", MODES, ids=MODE_NAMES)
@pytest.mark.parametrize("keys", [(0, 4, 7), (3, 4), (8,)])
def test_tokens_are_those_of_the_transcription(config, keys):
    patches = random(N, P, D)
    query, params = of_mode(config)
    some = keyframes(*keys)
    slots = reference_slots(some, N)
    bank = patches[np.asarray(merging.reference_frames(some, config))]
    references = merging.gather_references(patches, bank, slots)
    got = merge(patches, references, query, config=config, params=params)
    want = merging_reference.merged(patches, query, keys, config, params)
    assert got.shape == (N, D)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_both_references_differ():
    patches, query = random(N, P, D), random(D, seed=3)
    tokens = [
        merging_reference.merged(patches, query, (3, 6), config)
        for config in MODES
        if not config.projections
    ]
    # Frames 0 to 2 are their own reference either way.
    apart = np.abs(tokens[0] - tokens[1]).max(axis=-1) > 1e-3
    assert apart.tolist() == [False] * 3 + [True] * 6


def test_of_raw_patches_compared_with_themselves_relevance_alone_decides():
    patches, query = random(P, D), random(D, seed=3)
    own = merge(patches, patches, query, config=MergingConfig(temperature=0.2))
    config = MergingConfig(temperature=0.2, redundancy_weight=0.0)
    alone = merge(patches, random(P, D, seed=4), query, config=config)
    np.testing.assert_allclose(own, alone, atol=1e-5)


def test_of_projected_patches_compared_with_themselves_it_does_not():
    config = MergingConfig(projections=True)
    query, params = of_mode(config)
    patches = random(P, D)
    alone = MergingConfig(projections=True, redundancy_weight=0.0)
    tokens = [merge(patches, patches, query, config=one, params=params) for one in (config, alone)]
    assert np.abs(tokens[0] - tokens[1]).max() > 1e-2


@pytest.mark.parametrize("config", MODES, ids=MODE_NAMES)
def test_bfloat16_goes_in_and_out(config):
    patches = jnp.asarray(random(2, P, D), jnp.bfloat16)
    references = jnp.asarray(random(2, P, D, seed=1), jnp.bfloat16)
    query, params = of_mode(config)
    got = merge(patches, references, query, config=config, params=params)
    assert got.dtype == jnp.bfloat16
    as_float = [np.asarray(x, np.float32) for x in (patches, references)]
    want = merge(*as_float, query, config=config, params=params)
    np.testing.assert_allclose(np.asarray(got, np.float32), want, atol=0.03)


def test_weights_are_float32_though_patches_are_not():
    # Cosines of 1 and 0.998, which bfloat16 cannot tell apart, are 20 temperatures apart.
    patches = jnp.asarray([[1.0, 0.0], [1.0, 0.0625]], jnp.bfloat16)
    query = jnp.array([1.0, 0.0])
    config = MergingConfig(temperature=1e-4, redundancy_weight=0.0)
    token = merge(patches, patches, query, config=config)
    np.testing.assert_allclose(np.asarray(token, np.float32), [1, 0], atol=1e-6)


@pytest.mark.parametrize("config", MODES, ids=MODE_NAMES)
def test_windows_of_a_batch_are_merged_apart(config):
    patches, references = random(3, 2, P, D), random(3, 2, P, D, seed=1)
    query, params = of_mode(config)
    queries = np.stack([query, -query, 2 * query])
    one = lambda patches, references, query: merge(
        patches, references, query, config=config, params=params
    )
    got = jax.jit(jax.vmap(one))(patches, references, queries)
    want = [one(*given) for given in zip(patches, references, queries, strict=True)]
    np.testing.assert_allclose(got, np.stack(want), atol=1e-5)


# ---- Its gradient ----


@pytest.mark.parametrize("config", MODES, ids=MODE_NAMES)
def test_gradients_are_those_of_finite_differences(config):
    query, params = of_mode(config)
    given = {"patches": random(P, D), "references": random(P, D, seed=1), "query": query}
    if params:
        given["params"] = params
    towards = random(D, seed=5)

    def loss(given):
        return jnp.vdot(merge(**given, config=config), towards)

    def want(given):
        return merging_reference.token(**given, config=config) @ towards.astype(np.float64)

    step = 1e-6
    found = jax.tree.leaves(jax.grad(loss)(given))
    leaves, tree = jax.tree.flatten(jax.tree.map(lambda x: x.astype(np.float64), given))
    for which, leaf in enumerate(leaves):
        along = np.random.default_rng(which).normal(size=leaf.shape)
        ends = [
            want(tree.unflatten([*leaves[:which], leaf + sign * along, *leaves[which + 1 :]]))
            for sign in (step, -step)
        ]
        slope = (ends[0] - ends[1]) / (2 * step)
        np.testing.assert_allclose(np.vdot(found[which], along), slope, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("config", MODES, ids=MODE_NAMES)
def test_patches_and_queries_of_zeros_have_finite_gradients(config):
    query, params = of_mode(config)
    patches = random(P, D)
    patches[1] = 0
    loss = lambda *given: merge(*given, config=config, params=params).sum()
    for given in ((patches, patches, query), (patches * 0, patches, query * 0)):
        value, grads = jax.value_and_grad(loss, argnums=(0, 1, 2))(*given)
        assert np.isfinite(value)
        assert all(np.isfinite(grad).all() for grad in grads)


def test_a_cosine_with_zeros_is_zero():
    # R = 0 for the empty patch and 1 for the other: weights 1 to e.
    patches = jnp.array([[0.0, 0.0], [2.0, 0.0]])
    config = MergingConfig(temperature=1.0, redundancy_weight=0.0)
    token = merge(patches, patches, jnp.array([1.0, 0.0]), config=config)
    np.testing.assert_allclose(token, [2 * np.e / (1 + np.e), 0], rtol=1e-6)
    # A query of zeros asks for nothing: all patches weigh the same.
    token = merge(patches, patches, jnp.zeros(2), config=config)
    np.testing.assert_allclose(token, [1, 0])


def test_unit_patches_add_up():
    patches = jnp.array([[[3.0, 0.0], [0.0, 0.0]], [[0.0, 5.0], [0.0, 1.0]]])
    assert merging.sum_of_units(patches).tolist() == [1, 2]
    assert merging.sum_of_units(patches, np.array([True, False])).tolist() == [1, 0]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_patches_that_are_not_finite_do_not_decide_what_is_asked_of_others(bad):
    patches = jnp.array([[[3.0, 0.0], [bad, 1.0]], [[0.0, 5.0], [0.0, 1.0]]])
    assert merging.sum_of_units(patches).tolist() == [1, 2]


# ---- A sequence of tokens ----


def test_tokens_are_in_time_order():
    # Frame n's patches are 10 n and 10 n + 1, its token is n.
    key_patches = jnp.array([[[0.0], [1.0]], [[20.0], [21.0]]])
    merged = jnp.arange(4.0)[:, None]
    tokens, frames = interleave(key_patches, merged, keyframes(0, 2))
    assert tokens[:, 0].tolist() == [0, 1, 1, 20, 21, 3]
    assert frames.tolist() == [0, 0, 1, 2, 2, 3]


def test_behind_the_last_frame_are_zeros():
    key_patches = jnp.array([[[10.0], [11.0]], [[-1.0], [-1.0]], [[-1.0], [-1.0]]])
    merged = jnp.array([[5.0], [6.0], [7.0]])
    tokens, frames = interleave(key_patches, merged, keyframes(1, slots=3, num_frames=3))
    assert tokens[:, 0].tolist() == [5, 10, 11, 7, 0, 0]
    assert frames.tolist() == [0, 1, 1, 2, 3, 3]


def test_without_keyframes_each_frame_has_its_token():
    merged = jnp.array([[5.0], [6.0]])
    tokens, frames = interleave(jnp.ones((1, 2, 1)), merged, keyframes(slots=1, num_frames=2))
    assert tokens[:, 0].tolist() == [5, 6, 0]
    assert frames.tolist() == [0, 1, 2]


@pytest.mark.parametrize("num_keys", [1, 4, 9])
def test_any_keyframes_are_interleaved(num_keys):
    rng = np.random.default_rng(num_keys)
    for _ in range(5):
        keys = sorted(rng.choice(N, num_keys, replace=False).tolist())
        patches, merged = random(N, P, D), random(N, D, seed=1)
        tokens, frames = jax.jit(interleave)(patches[keys], merged, keyframes(*keys))
        want = [patches[n] if n in keys else merged[n, None] for n in range(N)]
        np.testing.assert_array_equal(tokens, np.concatenate(want))
        counts = [P if n in keys else 1 for n in range(N)]
        np.testing.assert_array_equal(frames, np.repeat(np.arange(N), counts))


def test_a_keyframes_own_token_has_no_gradient():
    merged, patches = jnp.ones((3, 1)), jnp.ones((1, 2, 1))
    total = lambda patches, merged: interleave(patches, merged, keyframes(1))[0].sum()
    of_patches, of_merged = jax.grad(total, argnums=(0, 1))(patches, merged)
    assert of_patches[:, :, 0].tolist() == [[1, 1]]
    assert of_merged[:, 0].tolist() == [1, 0, 1]


# ---- What is refused ----


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"reference": "fix"}, "merging.reference 'fix' is unknown: did you mean 'fixed'"),
        ({"temperature": 0.0}, "merging.temperature=0.0 must be more than 0"),
        ({"temperature": float("nan")}, "merging.temperature=nan must be more than 0"),
        ({"redundancy_weight": -1.0}, "merging.redundancy_weight=-1.0 must be 0 or more"),
    ],
)
def test_a_config_that_cannot_be_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        MergingConfig(**fields)


def test_projections_go_with_what_they_have_learned():
    patches, params = random(P, D), merging_reference.params(D, E)
    with pytest.raises(UserError, match="projections=True with no learned parameters; give `par"):
        merge(patches, patches, random(E), config=MergingConfig(projections=True))
    with pytest.raises(UserError, match="projections=False with learned parameters"):
        merge(patches, patches, random(D), config=MergingConfig(), params=params)


@pytest.mark.parametrize("config", MODES[::2], ids=MODE_NAMES[::2])
@pytest.mark.parametrize("shape", [(D + 3,), (1, D)])
def test_a_query_of_another_width_is_refused(config, shape):
    _, params = of_mode(config)
    width = E if config.projections else D
    with pytest.raises(UserError, match=f"must be one vector of width {width}, got query.shape"):
        merge(random(P, D), random(P, D), np.zeros(shape), config=config, params=params)
