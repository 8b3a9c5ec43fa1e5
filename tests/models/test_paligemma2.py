"""Sizes, parameter names, and what the whole model promises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.models.paligemma2 import (
    VARIANTS,
    Embedded,
    abstract_params,
    bind,
    get_config,
    init_params,
    num_params,
)
from deevisum_jax.typing import Batch

NUM_PATCHES = 4
PREFIX, SUFFIX = 5, 3


def make_batch(B=2, num_frames=2, pad="right", pads=2, seed=0):
    """Prompts of 5 tokens and suffixes of 3, with pads on one side of the text."""
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (B, num_frames, 28, 28, 3)).astype(np.uint8)
    tokens = rng.integers(2, 512, (B, PREFIX + SUFFIX)).astype(np.int32)
    real = np.ones((B, PREFIX + SUFFIX), bool)
    causal = np.broadcast_to(np.arange(PREFIX + SUFFIX) >= PREFIX, real.shape)
    # Pads are causal boundaries, as in big_vision.
    padding = [(0, 0), (0, pads) if pad == "right" else (pads, 0)]
    unread = dict.fromkeys(("mask_loss", "label", "score", "video_id", "segment", "valid"))
    return Batch(
        frames=frames,
        tokens=np.pad(tokens, padding),
        mask_ar=np.pad(causal, padding, constant_values=True),
        mask_input=np.pad(real, padding),
        **unread,
    )


@pytest.fixture(scope="module")
def tiny():
    """The tiny variant with exits after layers 1, 3 and 4, and its parameters."""
    config = get_config("tiny", exit_layers=(1, 3, 4))
    return config, jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))


@pytest.mark.parametrize(
    ("name", "img", "count"),
    [
        ("paligemma2_3b", {}, 3_032_094_960),
        ("paligemma2_3b", {"image_size": 448}, 3_032_979_696),
        ("paligemma2_10b", {}, 9_662_409_456),
        ("paligemma2_28b", {}, 27_650_192_112),
    ],
)
def test_parameter_counts_are_the_published_ones(name, img, count):
    assert num_params(get_config(name, img=img)) == count


def test_quickstart_models_grow_from_student_to_teacher():
    student, mentor, teacher = (
        num_params(VARIANTS[f"quickstart_{role}"]) for role in ("student", "mentor", "teacher")
    )
    assert 2 * student < mentor < teacher / 2 < 5_000_000


def test_parameter_names_and_shapes_are_big_visions():
    params = abstract_params(get_config("paligemma2_3b", exit_layers=(8, 13)))
    shapes = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(params)
    }
    exits = {name: shapes.pop(name) for name in sorted(shapes) if name.startswith("exits/")}
    assert len(shapes) == 34
    block = "img/Transformer/encoderblock"
    expected = {
        "img/embedding/kernel": (14, 14, 3, 1152),
        "img/pos_embedding": (1, 256, 1152),
        f"{block}/ln1/scale": (27, 1152),
        f"{block}/mlp/fc1/kernel": (27, 1152, 4304),
        f"{block}/attn/query/kernel": (27, 1152, 16, 72),
        f"{block}/attn/query/bias": (27, 16, 72),
        f"{block}/attn/out/kernel": (27, 16, 72, 1152),
        "img/Transformer/encoder_norm/bias": (1152,),
        "img/head/kernel": (1152, 2304),
        "llm/embedder/input_embedding": (257152, 2304),
        "llm/final_norm/scale": (2304,),
        "llm/layers/attn/q_einsum/w": (26, 8, 2304, 256),
        "llm/layers/attn/kv_einsum/w": (26, 2, 4, 2304, 256),
        "llm/layers/attn/attn_vec_einsum/w": (26, 8, 256, 2304),
        "llm/layers/mlp/gating_einsum": (26, 2, 2304, 9216),
        "llm/layers/mlp/linear": (26, 9216, 2304),
        "llm/layers/post_ffw_norm/scale": (26, 2304),
    }
    assert {name: shapes[name] for name in expected} == expected
    assert exits == {
        "exits/classifier/bias": (2, 2),
        "exits/classifier/kernel": (2, 2304, 2),
        "exits/importance/bias": (2, 1),
        "exits/importance/kernel": (2, 2304, 1),
        "exits/norm/scale": (2, 2304),
        "exits/prototype": (2, 2304),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"exit_layers": (1, 5)}, r"exit_layers \(1, 5\).*1 and .*4.*out of range: \[5\]"),
        ({"exit_layers": (0, 2)}, r"out of range: \[0\]"),
        ({"exit_layers": (3, 2, 3)}, r"strictly increasing; try \(2, 3\)"),
        ({"img": {"image_size": 30}}, "image_size 30 is no multiple of img.patch_size 14"),
        ({"img": {"num_heads": 3}}, "width 16 is no multiple of img.num_heads 3"),
        ({"llm": {"num_kv_heads": 3}}, "num_heads 4 is no multiple of llm.num_kv_heads 3"),
        ({"llm": {"sliding_window": 0}}, "sliding_window 0"),
        ({"llm": {"vocabsize": 7}}, "llm has no field 'vocabsize': did you mean 'vocab_size'"),
        ({"exit_layer": (1,)}, "no field 'exit_layer': did you mean 'exit_layers'"),
        ({"dtype": "bfloat"}, "dtype 'bfloat' is unknown: did you mean 'bfloat16'"),
        ({"remat_policy": "nothing"}, "did you mean 'nothing_saveable'"),
    ],
)
def test_mistakes_in_a_config_are_named(change, message):
    with pytest.raises(UserError, match=message):
        get_config("tiny", **change)


def test_unknown_variant_names_the_closest():
    with pytest.raises(UserError, match=r"'paligemma_3b' is unknown.*'paligemma2_3b'"):
        get_config("paligemma_3b")


def test_frames_of_another_size_are_refused(tiny):
    config, params = tiny
    with pytest.raises(UserError, match="frames must be 28 x 28"):
        bind(config, params).encode_frames(np.zeros((1, 1, 32, 32, 3), np.uint8))


def test_frames_are_encoded_one_by_one_and_concatenated(tiny):
    config, params = tiny
    model = bind(config, params)
    frames = make_batch().frames
    both = model.encode_frames(frames)
    assert both.shape == (2, 2 * NUM_PATCHES, 32)
    np.testing.assert_allclose(both[:, NUM_PATCHES:], model.encode_frames(frames[:, 1:]), atol=1e-5)


def test_left_and_right_padding_score_alike(tiny):
    config, params = tiny
    score = jax.jit(lambda batch: bind(config, params).score(batch))
    right, left, none = (
        score(make_batch(pad=pad, pads=pads))
        for pad, pads in (("right", 2), ("left", 2), ("right", 0))
    )
    for scores in (right, left):
        np.testing.assert_allclose(scores.class_logits, none.class_logits, atol=1e-5)
        np.testing.assert_allclose(scores.importance, none.importance, atol=1e-5)


def test_scores_do_not_depend_on_the_suffix(tiny):
    config, params = tiny
    batch = make_batch()
    other = dataclasses.replace(
        batch, tokens=np.where(batch.mask_ar, batch.tokens[::-1] + 1, batch.tokens)
    )
    score = jax.jit(lambda batch: bind(config, params).score(batch))
    np.testing.assert_array_equal(score(batch).class_logits, score(other).class_logits)


def test_a_full_pass_gives_the_same_scores_and_what_was_collected(tiny):
    config, params = tiny
    batch = make_batch()
    out = jax.jit(lambda batch: bind(config, params)(batch, collect=lambda x: jnp.mean(x, axis=1)))(
        batch
    )
    scores = jax.jit(lambda batch: bind(config, params).score(batch))(batch)
    assert out.collected.shape == (4, 2, 32)
    assert out.pre_logits.shape == (2, 2 * NUM_PATCHES + 10, 32)
    assert scores.class_logits.shape == (3, 2, 2)
    assert scores.importance.shape == (3, 2)
    assert scores.class_logits.dtype == scores.importance.dtype == jnp.float32
    np.testing.assert_allclose(out.exits.class_logits, scores.class_logits, atol=1e-5)
    np.testing.assert_allclose(out.exits.importance, scores.importance, atol=1e-5)


@pytest.mark.parametrize("window", [None, 3])
def test_an_exit_equals_a_truncated_model(tiny, window):
    config, params = tiny
    config = dataclasses.replace(config, llm=dataclasses.replace(config.llm, sliding_window=window))
    scores = jax.jit(lambda params, batch: bind(config, params).score(batch))(params, make_batch())
    k = 3
    short = dataclasses.replace(
        config, exit_layers=(k,), llm=dataclasses.replace(config.llm, depth=k)
    )
    cut = {
        "img": params["img"],
        "llm": params["llm"] | {"layers": jax.tree.map(lambda a: a[:k], params["llm"]["layers"])},
        "exits": jax.tree.map(lambda a: a[1:2], params["exits"]),
    }
    truncated = jax.jit(lambda params, batch: bind(short, params).score(batch))(cut, make_batch())
    np.testing.assert_allclose(truncated.class_logits[0], scores.class_logits[1], atol=1e-5)
    np.testing.assert_allclose(truncated.importance[0], scores.importance[1], atol=1e-5)


def test_stages_with_fewer_rows_equal_one_pass(tiny):
    """What a staged executor does: run to an exit, keep some rows, run on."""
    config, params = tiny
    batch = make_batch(B=3)

    @jax.jit
    def staged(params):
        model = bind(config, params)
        embedded = model.embed(batch.frames, batch.tokens, batch.mask_ar, batch.mask_input)
        embedded, first = model.run_exits(embedded, stop=1)
        embedded: Embedded = jax.tree.map(lambda a: a[np.array([2, 0])], embedded)
        return first, model.run_exits(embedded, start=1)[1]

    scores = jax.jit(lambda params: bind(config, params).score(batch))(params)
    first, others = staged(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b[:1], atol=1e-5), first, scores)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b[1:, [2, 0]], atol=1e-5), others, scores
    )


@pytest.mark.parametrize(("start", "stop", "layers"), [(0, 1, 1), (0, 2, 3), (1, 2, 2), (2, 3, 1)])
def test_a_stage_reads_its_exits_and_runs_no_more_layers(tiny, start, stop, layers):
    config, params = tiny  # exits after layers 1, 3 and 4
    model = bind(config, params)
    batch = make_batch()
    ran = []

    def run_layers(embedded, *, start, stop, collect):
        ran.append(stop - start)
        return model.run_layers(embedded, start=start, stop=stop, collect=collect)

    def staged():
        embedded = model.embed(batch.frames, batch.tokens, batch.mask_ar, batch.mask_input)
        if start:
            embedded, _ = model.run_exits(embedded, stop=start)
        spied = bind(config, params)
        spied.run_layers = run_layers
        embedded, scores = spied.run_exits(embedded, start=start, stop=stop)
        return embedded.x, scores

    x, scores = jax.eval_shape(staged)
    assert ran == [layers]
    assert x.shape == (2, 2 * NUM_PATCHES + 10, 32)
    assert scores.class_logits.shape == (stop - start, 2, 2)
    assert scores.importance.shape == scores.cosine.shape == (stop - start, 2)


def test_a_stage_does_not_copy_the_weights_of_its_layers():
    config = get_config("quickstart_student")
    params = abstract_params(config)
    embedded = Embedded(
        x=jax.ShapeDtypeStruct((1, 8, config.llm.width), jnp.float32),
        mask_ar=jax.ShapeDtypeStruct((1, 8), bool),
        mask_input=jax.ShapeDtypeStruct((1, 8), bool),
        positions=jax.ShapeDtypeStruct((1, 8), jnp.int32),
        rotation=(jax.ShapeDtypeStruct((1, 8, config.llm.head_dim // 2), jnp.float32),) * 2,
    )
    stage = jax.jit(lambda params, embedded: bind(config, params).run_layers(embedded, stop=5))
    memory = stage.lower(params, embedded).compile().memory_analysis()
    layer = sum(4 * leaf.size for leaf in jax.tree.leaves(params["llm"]["layers"])) / 6
    # The weights of the layer at work, never those of all five.
    assert memory.temp_size_in_bytes < 2 * layer


def test_bfloat16_activations_over_float32_parameters(tiny):
    config, params = tiny
    half = dataclasses.replace(config, dtype="bfloat16")

    @jax.jit
    def run(params, batch):
        model = bind(half, params)
        out = model(batch)
        return out, model.logits(out.pre_logits)

    out, logits = run(params, make_batch())
    assert out.pre_logits.dtype == jnp.bfloat16
    assert logits.dtype == out.exits.class_logits.dtype == jnp.float32
    full = jax.jit(lambda params, batch: bind(config, params)(batch))(params, make_batch())
    error = np.abs(out.exits.class_logits - full.exits.class_logits)
    assert 0 < error.max() < 0.1


def test_parameters_are_stored_in_param_dtype():
    config = get_config("tiny", param_dtype="bfloat16", exit_layers=(2,))
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(abstract_params(config))}
    assert dtypes == {jnp.dtype("bfloat16")}


def test_gradients_reach_every_parameter_and_do_not_depend_on_rematerialisation(tiny):
    config, params = tiny
    batch = make_batch(B=1)

    def gradients(config):
        def loss(params):
            model = bind(config, params)
            out = model(batch)
            scores = sum(jnp.sum(said**2) for said in jax.tree.leaves(out.exits))
            return scores + jnp.mean(model.logits(out.pre_logits) ** 2)

        return jax.jit(jax.grad(loss))(params)

    kept = gradients(config)
    remade = gradients(dataclasses.replace(config, remat_policy="nothing_saveable"))
    for (path, a), b in zip(jax.tree.leaves_with_path(kept), jax.tree.leaves(remade), strict=True):
        # The softmax does not feel a shift that is common to all keys.
        if "key/bias" not in jax.tree_util.keystr(path, simple=True, separator="/"):
            assert np.any(np.abs(a) > 1e-6), path
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_first_logits_and_exit_logits_are_of_unit_size():
    """From scratch, losses start near those of a guess: ln 512 = 6.24 plus half a nat."""
    config = get_config("tiny", exit_layers=(4,), llm={"width": 256})
    params = jax.jit(init_params, static_argnums=0)(config, jax.random.key(0))
    batch = make_batch(B=4)

    @jax.jit
    def run(params):
        model = bind(config, params)
        out = model(batch)
        # The rows of image tokens: text rows see their own embedding in the tied table.
        return model.logits(out.pre_logits[:, : 2 * NUM_PATCHES]), out.exits.class_logits

    logits, class_logits = run(params)
    assert 0.8 < np.std(logits) < 1.25
    assert np.abs(class_logits).max() < 4
    entropy = np.mean(jax.nn.logsumexp(logits, axis=-1) - np.mean(logits, axis=-1))
    np.testing.assert_allclose(entropy, np.log(512) + 0.5, atol=0.2)
