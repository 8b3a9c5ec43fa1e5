"""A segment's frames as K keyframes' tokens and one token of each other frame."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deevisum_jax import fsdp, sharding
from deevisum_jax.config import MergeConfig
from deevisum_jax.data import pipeline
from deevisum_jax.errors import UserError
from deevisum_jax.inference import scoring
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.inference.staged import StagedScorer
from deevisum_jax.models import paligemma2
from deevisum_jax.models.paligemma2 import bind, get_config, init_params
from tests.inference import staging
from tests.models.test_paligemma2 import make_batch

P, D = 4, 32
EXITS = (1, 3, 4)


def merged(num_keyframes=1, *, exit_layers=EXITS, remat_policy=None, **fields):
    """The tiny model that merges frames."""
    merge = MergeConfig(num_keyframes=num_keyframes, **fields)
    return get_config("tiny", exit_layers=exit_layers, remat_policy=remat_policy, merge=merge)


def make_params(config):
    return jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))


def encode(config, params, frames):
    return jax.jit(lambda params, frames: bind(config, params).encode_frames(frames))(
        params, frames
    )


@pytest.fixture(scope="module")
def pictures():
    """Two of them, uint8[2, 28, 28, 3]."""
    return np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def plain():
    """The tiny model as it is, and its parameters."""
    config = get_config("tiny", exit_layers=EXITS)
    return config, make_params(config)


def one_token(patches, reference, frames, alpha=0.01):
    """The paper's rule in float64, of float[P, D] each; the query is the mean unit patch."""
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    patches, reference, frames = (np.asarray(a, np.float64) for a in (patches, reference, frames))
    relevance = unit(patches) @ unit(unit(frames).sum((0, 1)))
    redundancy = np.sum(unit(patches) * unit(reference), axis=-1)
    weights = np.exp((relevance - redundancy - (relevance - redundancy).max()) / alpha)
    return weights / weights.sum() @ patches


def test_tokens_by_hand():
    # Patches of 4 each: 5 frames have 20. Of 2 keyframes 8, and one of each of the other 3.
    assert get_config("tiny").image_tokens(5) == 20
    assert merged(2).image_tokens(5) == 11
    assert merged(2).image_tokens(2) == 8
    assert merged(1).image_tokens(64) == 67
    with pytest.raises(UserError, match=r"segment of 1 frames has no 2 keyframes.*data.num_frames"):
        merged(2).image_tokens(1)


@pytest.mark.parametrize(
    ("order", "num_keyframes", "keyframes"),
    [
        # The mean picture is most like a; of equal pictures the first comes first.
        ("aaba", 1, (0,)),
        ("baaa", 1, (1,)),
        # b is the next that repeats none.
        ("aaba", 2, (0, 2)),
        ("baaa", 2, (0, 1)),
    ],
)
def test_tokens_come_in_time_order(plain, pictures, order, num_keyframes, keyframes):
    config, params = plain
    frames = np.stack([pictures["ab".index(which)] for which in order])[None]
    every = np.asarray(encode(config, params, frames)).reshape(4, P, D)
    found = encode(merged(num_keyframes, tau=0.9999), params, frames)[0]
    expected, reference = [], None
    for i, patches in enumerate(every):
        if i in keyframes:
            reference = patches
            expected.append(patches)
        else:  # in front of the first keyframe a frame is compared with itself
            compared = patches if reference is None else reference
            expected.append(one_token(patches, compared, every)[None])
    expected = np.concatenate(expected)
    assert len(expected) == P * num_keyframes + 4 - num_keyframes
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_without_keyframes_the_model_is_as_it_was(plain):
    config, params = plain
    off = merged(0)
    assert off == config
    assert off.merge is None
    frames = make_batch(num_frames=3).frames
    np.testing.assert_array_equal(
        encode(off, params, frames),
        # Frame by frame: nothing of one is in another's.
        np.concatenate([encode(config, params, frames[:, i : i + 1]) for i in range(3)], axis=1),
    )


def test_with_nothing_but_keyframes_all_tokens_are_kept(plain):
    config, params = plain
    frames = make_batch(num_frames=3).frames
    np.testing.assert_array_equal(encode(merged(3), params, frames), encode(config, params, frames))


def test_projections_are_behind_the_parameters_that_there_were(plain):
    config = merged(1, projections=True)
    params = make_params(config)
    learned = params.pop("merge")
    jax.tree.map(np.testing.assert_array_equal, params, plain[1])
    assert sorted(learned) == ["image_key", "image_query", "key", "log_temperature", "query"]
    assert paligemma2.num_params(config) == paligemma2.num_params(plain[0]) + 4 * (D * D + D) + 1


@pytest.mark.parametrize("projections", [False, True])
def test_gradients_reach_the_image_tower_and_the_projections(projections):
    config = merged(1, projections=projections, temperature=0.5)
    batch = make_batch(num_frames=3)

    def loss(params):
        # Of merged tokens alone: the keyframe's come first or last.
        return jnp.sum(bind(config, params).encode_frames(batch.frames) ** 2)

    params = make_params(config)
    for path, grad in jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        is_used = name.startswith(("img/", "merge/")) and not name.endswith("attn/key/bias")
        assert np.any(np.abs(grad) > 1e-6) == is_used or name.endswith("attn/key/bias"), name


@pytest.mark.parametrize("remat_policy", [None, "nothing_saveable"])
def test_chunks_of_frames_change_nothing(monkeypatch, remat_policy):
    config = merged(2, projections=True, remat_policy=remat_policy, temperature=0.5)
    params, batch = make_params(config), make_batch(num_frames=5)

    def run():
        def loss(params):
            tokens = bind(config, params).encode_frames(batch.frames)
            return jnp.sum(tokens**2), tokens

        return jax.jit(jax.grad(loss, has_aux=True))(params)

    at_once = run()
    monkeypatch.setattr(paligemma2, "_FRAMES_AT_ONCE", 2)  # three chunks, the last of one frame
    in_chunks = run()
    for found, expected in zip(*map(jax.tree.leaves, (in_chunks, at_once)), strict=True):
        scale = np.abs(expected).max() + 1.0
        np.testing.assert_allclose(found / scale, expected / scale, atol=1e-4)


def make_rows(count):
    rng = np.random.default_rng(1)
    frames = rng.integers(0, 256, (count, 3, 28, 28, 3)).astype(np.uint8)
    rows = staging.make_rows(count)
    return [row | {"frames": own} for row, own in zip(rows, frames, strict=True)]


@pytest.mark.parametrize("mesh", ["8", "2x2x2"])
def test_scores_do_not_depend_on_the_mesh_nor_on_stages(mesh):
    config, rows = merged(1, projections=True), make_rows(24)
    params = jax.device_get(make_params(config))
    found = {}
    for name in ("1", mesh):
        on = staging.make_mesh(name)
        where = sharding.param_shardings(params, on)
        with jax.set_mesh(on):
            placed = jax.device_put(params, where)
            score = scoring.make_score_fn(config, where, on)
            found[name] = scoring.score_videos(
                lambda batch, score=score, placed=placed: score(placed, batch),
                pipeline.in_order(rows, batch_size=8),
                on,
            )
            staged = StagedScorer(config, where, on).score_videos(
                placed, pipeline.in_order(rows, batch_size=8), ExitPolicy.off(len(EXITS))
            )
        for video, scores in found[name].items():
            last = scores.at(len(EXITS) - 1)
            np.testing.assert_allclose(staged[video].importance, last.importance, atol=1e-5)
    for video, scores in found["1"].items():
        np.testing.assert_allclose(found[mesh][video].importance, scores.importance, atol=1e-5)


def test_gradients_do_not_depend_on_the_mesh():
    config = merged(1, projections=True, temperature=0.5)
    params = jax.device_get(make_params(config))
    frames = np.stack([row["frames"] for row in make_rows(8)])

    def own(params, frames):
        loss = lambda params: jnp.sum(bind(config, params).encode_frames(frames) ** 2)
        return fsdp.sum_gradients(jax.grad(loss)(params))

    found = {}
    for name in ("1", "2x2x2"):
        on = staging.make_mesh(name)
        specs = fsdp.param_specs(params)
        with jax.set_mesh(on):
            grads = fsdp.per_device(own, in_specs=(specs, fsdp.BATCH_SPEC), out_specs=specs)
            placed = jax.device_put(params, sharding.param_shardings(params, on))
            rows = jax.device_put(frames, sharding.batch_sharding(on))
            found[name] = jax.device_get(jax.jit(grads)(placed, rows))
    for one, other in zip(*map(jax.tree.leaves, found.values()), strict=True):
        scale = np.abs(one).max() + 1.0
        np.testing.assert_allclose(other / scale, one / scale, atol=1e-4)


def test_a_teacher_may_keep_all_tokens_where_its_student_merges(plain):
    """What a teacher says of text is read from behind, wherever the text begins."""
    teacher, batch = plain[0], make_batch(num_frames=3)
    outputs = [bind(config, plain[1])(batch).pre_logits.shape for config in (teacher, merged(1))]
    T = batch.tokens.shape[1]
    assert outputs == [(2, 3 * P + T, D), (2, P + 2 + T, D)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tau": 1.5}, "tau"),
        ({"reject": "="}, "reject"),
        ({"reference": "fix"}, "reference 'fix'.*'fixed'"),
        ({"redundancy_weight": -1.0}, "redundancy_weight"),
        ({"temperature": 0.0}, "temperature"),
        ({"num_keyframes": -1}, "num_keyframes"),
    ],
)
def test_mistakes_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        merged(**{"num_keyframes": 1} | fields)


def test_too_few_frames_are_refused_where_they_come(plain):
    with pytest.raises(UserError, match="segment of 1 frames has no 2 keyframes"):
        bind(merged(2), plain[1]).encode_frames(make_batch(num_frames=1).frames)


def test_adapters_go_along_with_merging():
    lora = paligemma2.LoraConfig(rank=2)
    config = dataclasses.replace(merged(1, projections=True), lora=lora)
    params = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    assert jax.tree.structure(params) == jax.tree.structure(paligemma2.abstract_params(config))
    assert "merge" in params
