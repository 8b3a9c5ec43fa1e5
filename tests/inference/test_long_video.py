"""Frames embedded as they come, and what is found among them."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.inference import long_video
from deevisum_jax.inference.long_video import KeyframeFinder, Watch, focus, segment_relevance
from deevisum_jax.keyframes.selection import SelectionConfig
from deevisum_jax.models import paligemma2, two_towers

TOKENS = np.array([5, 9, 1, 1, 1, 1, 1, 1], np.int32)


def pictures(count: int, size: int = 28) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)


def seen(finder: KeyframeFinder, frames) -> long_video.Found:
    watch = finder.watch()
    for frame in frames:
        watch.see(frame)
    return watch.finish()


def cosines(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """float[N, D] with float[D]."""
    return x @ y / np.linalg.norm(x, axis=1) / np.linalg.norm(y)


def query_finder(num_devices: int = 8, num_keyframes: int = 5) -> KeyframeFinder:
    config = two_towers.get_config("siglip_tiny")
    return long_video.by_query(
        config,
        two_towers.init_params(config, jax.random.key(0)),
        TOKENS,
        resize="bicubic",
        config=SelectionConfig(num_keyframes=num_keyframes),
        mesh=long_video.device_mesh(jax.devices()[:num_devices]),
    )


# ---- Chunks ----


class Recorder:
    """Embeds a picture as its mean, and notes the chunks."""

    def __init__(self) -> None:
        self.chunks: list[np.ndarray] = []
        self.num_read = 0
        self.most_waiting = 0

    def embed(self, chunk: np.ndarray):
        self.chunks.append(chunk)
        self.most_waiting = max(self.most_waiting, len(self.chunks) - self.num_read)
        recorder = self

        class Later:
            def __array__(self, dtype=None, copy=None):
                recorder.num_read += 1
                return chunk.mean(axis=(1, 2), dtype=np.float32)

        return Later()


def of_frames(embeddings: np.ndarray, places: np.ndarray) -> np.ndarray:
    """What `find` is given, of each frame."""
    return embeddings[places]


@pytest.mark.parametrize("count", [1, 3, 4, 5, 40])
def test_chunks_have_one_size_and_all_frames_are_embedded_in_order(count):
    recorder = Recorder()
    watch = Watch(recorder.embed, 4, of_frames)
    frames = pictures(count)
    for frame in frames:
        watch.see(frame)
    found = watch.finish()
    assert {chunk.shape for chunk in recorder.chunks} == {(4, 28, 28, 3)}
    assert len(recorder.chunks) == -(-count // 4)
    assert (recorder.chunks[-1][(count - 1) % 4 + 1 :] == 0).all()
    np.testing.assert_allclose(found, frames.mean(axis=(1, 2)), atol=1e-3)
    assert recorder.most_waiting <= 3  # the one being made, and two that the device may have


def test_a_frame_that_stays_on_screen_is_embedded_once():
    recorder = Recorder()
    watch = Watch(recorder.embed, 4, of_frames)
    first, second = pictures(2)
    for frame in (first, first, first, second, second, first):
        watch.see(frame)
    found = watch.finish()
    assert len(recorder.chunks) == 1
    a, b = first.mean(axis=(0, 1)), second.mean(axis=(0, 1))
    np.testing.assert_allclose(found, [a, a, a, b, b, a], atol=1e-3)


def test_frames_that_show_one_picture_are_equally_relevant():
    finder = query_finder(num_keyframes=2)
    a, b = pictures(2)
    found = seen(finder, [a, a, a, b, b])
    assert found.relevance.shape == (5,)
    assert len(set(found.relevance[:3])) == len(set(found.relevance[3:])) == 1
    alone = seen(finder, [a, b])
    np.testing.assert_allclose(found.relevance[[0, 3]], alone.relevance, atol=1e-6)


# ---- What is found ----


def test_relevance_is_the_cosine_of_picture_and_text():
    config = two_towers.get_config("siglip_tiny")
    model = two_towers.bind(config, two_towers.init_params(config, jax.random.key(0)))
    frames = pictures(9)
    zimg, ztxt = model.encode_image(frames), model.encode_text(TOKENS[None])
    found = seen(query_finder(), frames)
    np.testing.assert_allclose(found.relevance, np.asarray(zimg @ ztxt[0]), atol=1e-5)
    assert len(found.index) == len(found.is_filled) == 5
    assert (np.diff(found.index) > 0).all()


def test_without_a_query_relevance_is_closeness_to_the_mean_frame():
    config = paligemma2.get_config("tiny", exit_layers=(2, 4))
    params = paligemma2.init_params(config, jax.random.key(0))
    frames = pictures(40)
    pixels = (frames / 127.5 - 1).astype(np.float32)
    patches = np.asarray(paligemma2.bind(config, params).img.encode(pixels))
    embeddings = patches.mean(axis=1)
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    finder = long_video.by_mean(
        config,
        params,
        resize="bilinear",
        config=SelectionConfig(num_keyframes=3),
        mesh=long_video.device_mesh(),
    )
    found = seen(finder, frames)
    np.testing.assert_allclose(found.relevance, cosines(unit, unit.mean(axis=0)), atol=1e-4)
    assert (finder.image_size, finder.resize, len(found.index)) == (28, "bilinear", 3)


def test_what_is_found_does_not_depend_on_the_number_of_devices():
    frames = pictures(70)
    one, eight = (seen(query_finder(count), frames) for count in (1, 8))
    np.testing.assert_allclose(one.relevance, eight.relevance, atol=1e-5)
    np.testing.assert_array_equal(one.index, eight.index)


@pytest.mark.parametrize("num_keyframes", [32, 10**12])  # so many would have no room in memory
def test_more_keyframes_than_frames_are_all_frames(num_keyframes):
    found = seen(query_finder(num_keyframes=num_keyframes), pictures(7))
    assert found.index.tolist() == list(range(7))
    assert found.relevance.shape == (7,)


def test_embeddings_that_are_no_numbers_are_refused():
    embeddings = np.ones((4, 16), np.float32)
    embeddings[2] = np.nan
    with pytest.raises(
        UserError, match=r"gives no numbers; its weights .* embedding of frame 2 is"
    ):
        query_finder().find(embeddings, np.arange(4))


def test_several_videos_may_be_watched_at_a_time():
    finder, frames = query_finder(), pictures(40)
    watches = [finder.watch(), finder.watch()]
    for first, second in zip(frames[:20], frames[20:], strict=True):
        watches[0].see(first)
        watches[1].see(second)
    for watch, part in zip(watches, (frames[:20], frames[20:]), strict=True):
        alone = seen(finder, part)
        np.testing.assert_allclose(watch.finish().relevance, alone.relevance, atol=1e-6)


# ---- Segments ----


def test_a_segment_is_as_relevant_as_its_most_relevant_frame_on_screen():
    relevance = np.array([0.1, 0.9, 0.2, 0.3, 0.8], np.float32)
    times = np.array([0.0, 1.0, 2.0, 3.0, 4.0])
    bounds = np.array([[0.0, 2.0], [2.0, 3.5], [3.5, 3.9], [3.9, 4.6]])
    # In [3.5, 3.9) none begins; the one of 3 s is on screen.
    np.testing.assert_allclose(
        segment_relevance(relevance, times, bounds), [0.9, 0.3, 0.3, 0.8], atol=1e-6
    )


def test_a_query_takes_its_share_of_a_score():
    importance, relevance = np.array([0.2, 0.6, 1.0]), np.array([0.10, 0.05, 0.06])
    np.testing.assert_allclose(focus(importance, relevance, 0.0), importance)
    np.testing.assert_allclose(focus(importance, relevance, 1.0), [1.0, 0.0, 0.2])
    np.testing.assert_allclose(focus(importance, relevance, 0.25), [0.4, 0.45, 0.8])


def test_a_query_that_all_segments_answer_alike_leaves_the_order():
    scores = focus(np.array([0.2, 0.6]), np.array([0.3, 0.3]), 0.5)
    np.testing.assert_allclose(scores, [0.35, 0.55])
