"""Long videos in chunks: as if done at once, with an encoder that is one small matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.keyframes import merging, stream
from deevisum_jax.keyframes.merging import MergingConfig
from deevisum_jax.keyframes.selection import SelectionConfig, select
from tests.keyframes import merging_reference
from tests.keyframes.merging_reference import random

N, H, P, D, E = 11, 4, 4, 6, 5
SELECTION = SelectionConfig(num_keyframes=3)
FRAMES = np.random.default_rng(0).integers(0, 256, (N, H, H, 3)).astype(np.uint8)
WEIGHTS = {"embed": random(H * H * 3, E), "patches": random(12, D, seed=1)}
QUERY = random(E, seed=2)
MODES = [
    MergingConfig(projections=projections, reference=reference, temperature=0.2)
    for projections, reference in ((False, "fixed"), (True, "fixed"), (True, "released"))
]
MODE_NAMES = [f"{mode.projections=} {mode.reference}" for mode in MODES]


@pytest.fixture(autouse=True)
def _highest_precision():
    with jax.default_matmul_precision("highest"):
        yield


@jax.jit
def embed(frames, weights=WEIGHTS["embed"]):
    return (frames.reshape(len(frames), -1) / 127.5 - 1) @ weights


@jax.jit
def patches(frames, weights=WEIGHTS["patches"]):
    """Rows of pixels as patches."""
    return (frames.reshape(len(frames), P, -1) / 127.5 - 1) @ weights


def of_mode(config, seed=3):
    params = merging_reference.params(D, E) if config.projections else None
    return {
        "patch_query": random(E if config.projections else D, seed=seed),
        "merging": config,
        "params": params,
    }


def in_chunks(size, frames=FRAMES):
    return lambda: (frames[start : start + size] for start in range(0, len(frames), size))


def wanted(given):
    """What a video gives that is done at once: embeddings, keyframes and merged tokens."""
    found = np.asarray(patches(FRAMES))
    keyframes = select(embed(FRAMES), given.get("query", QUERY), config=SELECTION)
    keys = np.asarray(keyframes.index)[np.asarray(keyframes.is_used)]
    query = given["patch_query"]
    tokens = merging_reference.merged(found, query, keys, given["merging"], given["params"])
    return keyframes, found[keys], tokens


def check(found, given):
    keyframes, key_patches, tokens = wanted(given)
    np.testing.assert_array_equal(found.keyframes.index, keyframes.index)
    np.testing.assert_array_equal(found.keyframes.is_used, keyframes.is_used)
    np.testing.assert_allclose(found.embeddings, embed(FRAMES), atol=1e-5)
    np.testing.assert_allclose(found.key_patches[: len(key_patches)], key_patches, atol=1e-5)
    np.testing.assert_allclose(found.merged, tokens, atol=1e-4)


# Chunks that do not fill up, and one that is larger than the video.
SIZES = [(MODES[0], 4), (MODES[1], 4), (MODES[2], 4), (MODES[2], 1), (MODES[0], 20)]
SIZE_NAMES = [f"{mode.projections=} {mode.reference} {size}" for mode, size in SIZES]


@pytest.mark.parametrize(("config", "size"), SIZES, ids=SIZE_NAMES)
def test_chunks_of_any_size_give_the_same(config, size):
    given = of_mode(config)
    found = stream.condense(
        in_chunks(size), embed, patches, query=QUERY, selection=SELECTION, **given
    )
    check(found, given)


@pytest.mark.parametrize(("config", "size"), SIZES, ids=SIZE_NAMES)
def test_frames_on_the_device_give_the_same(config, size):
    given = of_mode(config)
    found = stream.condense_on_device(
        FRAMES, embed, patches, chunk_size=size, query=QUERY, selection=SELECTION, **given
    )
    check(found, given)


def test_frames_on_the_device_are_one_program():
    given = of_mode(MODES[0])
    whole = functools.partial(stream.condense_on_device, selection=SELECTION, **given)
    program = jax.jit(lambda frames: whole(frames, embed, patches, chunk_size=4, query=QUERY))
    check(program(FRAMES), given)


def test_chunks_of_several_sizes_give_the_same():
    given = of_mode(MODES[0])
    chunks = [FRAMES[:4], FRAMES[4:5], FRAMES[5:5], FRAMES[5:8], FRAMES[8:]]
    found = stream.condense(
        lambda: chunks, embed, patches, query=QUERY, selection=SELECTION, **given
    )
    check(found, given)


@pytest.mark.parametrize("on_device", [False, True])
def test_without_a_query_the_mean_of_unit_patches_is_asked_for(on_device):
    given = {**of_mode(MODES[0]), "patch_query": None}
    more = {"selection": SELECTION, **given}
    if on_device:
        found = stream.condense_on_device(FRAMES, embed, patches, chunk_size=4, **more)
    else:
        found = stream.condense(in_chunks(4), embed, patches, **more)
    all_ = np.asarray(patches(FRAMES), np.float64)
    units = all_ / np.linalg.norm(all_, axis=-1, keepdims=True)
    check(found, {**given, "patch_query": units.mean(axis=(0, 1)), "query": None})


@pytest.mark.parametrize("on_device", [False, True])
def test_a_video_of_fewer_frames_than_keyframes(on_device):
    selection = SelectionConfig(num_keyframes=4)
    more = {"query": QUERY, "selection": selection, **of_mode(MODES[0])}
    two = FRAMES[:2]
    if on_device:
        found = stream.condense_on_device(two, embed, patches, chunk_size=4, **more)
    else:
        found = stream.condense(in_chunks(4, two), embed, patches, **more)
    assert np.asarray(found.keyframes.index).tolist() == [0, 1, 2, 2]
    np.testing.assert_allclose(found.key_patches[:2], patches(two), atol=1e-5)
    assert not np.any(found.key_patches[2:])
    tokens, frames = merging.interleave(found.key_patches, found.merged, found.keyframes)
    assert frames.tolist() == [0] * P + [1] * P + [2] * (4 * P + 2 - 4 - 2 * P)
    np.testing.assert_allclose(tokens[: 2 * P], patches(two).reshape(-1, D), atol=1e-5)


def test_more_frames_than_embeddings_are_padded_to(monkeypatch):
    """Embeddings grow twice: 4, 8 and 12 rows."""
    monkeypatch.setattr(stream, "_FRAMES", 4)
    given = of_mode(MODES[0])
    found = stream.condense(in_chunks(3), embed, patches, query=QUERY, selection=SELECTION, **given)
    check(found, given)


def test_bfloat16_patches_stay_so():
    given = of_mode(MODES[0])
    rounded = lambda frames: patches(frames).astype(jnp.bfloat16)
    found = stream.condense(in_chunks(4), embed, rounded, query=QUERY, selection=SELECTION, **given)
    assert (found.merged.dtype, found.key_patches.dtype) == (jnp.bfloat16, jnp.bfloat16)
    np.testing.assert_allclose(np.float32(found.merged), wanted(given)[2], atol=0.1)


def test_each_chunk_is_made_while_the_one_before_it_is_computed():
    """What is read of a chunk is read once the next one was handed over."""
    events = []

    def chunks():
        for number, chunk in enumerate(in_chunks(4)()):
            events.append(f"make {number}")
            yield chunk

    class Late:
        """An array that tells when it is read."""

        def __init__(self, name, array):
            self.name, self.array = name, array

        def __array__(self, *args, **kwargs):
            events.append(f"read {self.name}")
            return np.asarray(self.array)

    def late(frames):
        if isinstance(frames, jax.core.Tracer):
            return embed(frames)
        return Late(sum(event.startswith("make") for event in events) - 1, embed(frames))

    given = of_mode(MODES[0])
    stream.condense(chunks, late, patches, query=QUERY, selection=SELECTION, **given)
    first = events[: events.index("read 2") + 1]
    assert first == ["make 0", "make 1", "read 0", "make 2", "read 1", "read 2"]


# ---- Its gradient ----


@pytest.mark.parametrize("config", MODES, ids=MODE_NAMES)
def test_gradients_are_those_of_merging_at_once(config):
    given = of_mode(config)
    query, params = given.pop("patch_query"), given.pop("params")
    keyframes = select(embed(FRAMES), QUERY, config=SELECTION)
    towards = random(N, D, seed=5)

    def in_chunks(weights, query, params):
        found = stream.condense_on_device(
            FRAMES,
            embed,
            lambda frames: patches(frames, weights),
            chunk_size=4,
            query=QUERY,
            selection=SELECTION,
            patch_query=query,
            params=params,
            **given,
        )
        return jnp.vdot(found.merged, towards) + jnp.sum(jnp.square(found.key_patches))

    def at_once(weights, query, params):
        all_ = patches(FRAMES, weights)
        bank = all_[merging.reference_frames(keyframes, config)]
        slots = merging.reference_slots(keyframes, N)
        references = merging.gather_references(all_, bank, slots)
        tokens = merging.merge(all_, references, query, config=config, params=params)
        return jnp.vdot(tokens, towards) + jnp.sum(jnp.square(all_[keyframes.index]))

    args = (WEIGHTS["patches"], query, params)
    got, want = (jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args) for loss in (in_chunks, at_once))
    assert np.abs(got[1]).max() > 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), got, want)


# ---- What is refused ----


def refused(words, chunks=None, **changes):
    given = {"query": QUERY, "selection": SELECTION, **of_mode(MODES[0]), **changes}
    with pytest.raises(UserError, match=words):
        stream.condense(chunks or in_chunks(4), embed, patches, **given)


def test_no_frames_are_refused():
    refused("the video has no frames", lambda: [])
    with pytest.raises(UserError, match="the video has no frames"):
        stream.condense_on_device(
            FRAMES[:0], embed, patches, chunk_size=4, selection=SELECTION, **of_mode(MODES[0])
        )


def test_another_size_of_frames_is_refused():
    refused(
        r"chunk.shape=\(4, 2, 4, 3\) where the first has \(4, 4, 4, 3\)",
        lambda: [FRAMES[:4], FRAMES[4:8, :2]],
    )
    refused("the largest chunk first", lambda: [FRAMES[:4], FRAMES[4:]])


@pytest.mark.parametrize(("second", "words"), [(10, "10 the second"), (12, "more the second")])
def test_another_number_of_frames_the_second_time_is_refused(second, words):
    lengths = iter((N, second))

    def chunks():
        frames = np.concatenate([FRAMES, FRAMES])[: next(lengths)]
        return [frames[start : start + 4] for start in range(0, len(frames), 4)]

    refused(f"gave 11 frames the first time and {words}", chunks)


def one_chunk():
    yield FRAMES[:4]
    pytest.fail("went on")


@pytest.mark.parametrize("name", ["query", "patch_query"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_queries_that_are_not_finite_are_refused_with_the_first_chunk(name, bad):
    given = {"query": QUERY, **of_mode(MODES[0])}
    asked = jnp.asarray(given[name], jnp.bfloat16).at[1].set(bad)
    refused(f"^{name} is not finite; look for what", one_chunk, **{name: asked})


def test_queries_of_another_width_are_refused_with_the_first_chunk():
    refused("the query of merging must be one vector of width 6", one_chunk, patch_query=QUERY)
    params = merging_reference.params(D, E)
    # The mean of patches has their width, not that of the query that was learned with.
    refused(
        "must be one vector of width 5, got query.shape=.6,.",
        one_chunk,
        patch_query=None,
        merging=MODES[1],
        params=params,
    )
