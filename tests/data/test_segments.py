"""Segments of a video: where they lie, which pictures and words they get."""

import io

import numpy as np
import PIL.Image
import pytest

from deevisum_jax.data import audio
from deevisum_jax.data.augment import Augmentation
from deevisum_jax.data.prompts import PromptEncoder, PromptTemplate
from deevisum_jax.data.segments import SegmentEncoder, Video, segment_bounds
from deevisum_jax.data.subtitles import Cue
from deevisum_jax.data.tokenizer import train_tokenizer
from deevisum_jax.errors import UserError

SIZE = 8
RATE = audio.SAMPLE_RATE


@pytest.mark.parametrize(
    ("duration_s", "expected"),
    [
        (4.0, [[0, 2], [2, 4]]),
        (4.5, [[0, 2], [2, 4.5]]),
        (4.99, [[0, 2], [2, 4.99]]),
        (5.0, [[0, 2], [2, 4], [4, 5]]),  # half a segment stands alone
        (1.2, [[0, 1.2]]),
        (0.3, [[0, 0.3]]),
    ],
)
def test_segment_bounds_by_hand(duration_s, expected):
    np.testing.assert_allclose(segment_bounds(duration_s, 2.0), expected)


@pytest.mark.parametrize("duration_s", [0.01, 3.3, 59.97, 3600.5])
def test_segments_tile_the_video(duration_s):
    bounds = segment_bounds(duration_s, 2.0)
    assert bounds[0, 0] == 0
    assert bounds[-1, 1] == duration_s
    np.testing.assert_array_equal(bounds[1:, 0], bounds[:-1, 1])
    lengths = bounds[:, 1] - bounds[:, 0]
    assert (lengths < 3.0).all()
    assert (lengths > 0).all()


def gray(value: int) -> np.ndarray:
    return np.full((SIZE, SIZE, 3), value, np.uint8)


def video(**changes) -> Video:
    """Four seconds, a frame every half second whose gray is 10 times its number."""
    return Video(
        **{
            "title": "the ball",
            "duration_s": 4.0,
            "frames": [gray(10 * i) for i in range(8)],
            "frame_times": np.arange(8) / 2,
            "cues": [Cue(0.5, 1.5, "hello"), Cue(2.5, 3.5, "goodbye")],
            "waveform": np.zeros(4 * RATE, np.float32),
        }
        | changes
    )


@pytest.fixture(scope="module")
def prompt_encoder(tmp_path_factory):
    tokens = train_tokenizer(
        ["hello goodbye the ball", "yes no", *audio.DESCRIPTION_WORDS, "|"],
        tmp_path_factory.mktemp("tokenizer") / "t.model",
        vocab_size=320,
    )
    template = PromptTemplate("{title}|{transcript}|{sound}")
    return PromptEncoder(tokenizer=tokens, template=template, text_len=64)


@pytest.fixture
def make_encoder(prompt_encoder):
    def make(**kwargs) -> SegmentEncoder:
        defaults = {"prompts": prompt_encoder, "num_frames": 2, "image_size": SIZE}
        return SegmentEncoder(**defaults | kwargs)

    return make


def said(encoder: SegmentEncoder, *args, label: int = 0) -> str:
    encoded = encoder.text(*args, sound=encoder.sound(*args), label=label)
    return encoder.prompts.tokenizer.decode(encoded["tokens"][encoded["mask_input"]])


@pytest.mark.parametrize(
    ("num_frames", "bounds", "numbers"),
    [
        (1, (0, 2), [2]),  # the middle, 1.0 s
        (2, (0, 2), [1, 3]),  # 0.5 s and 1.5 s
        (4, (2, 4), [4, 5, 6, 7]),  # 2.25 s lies between two frames: the earlier
        (1, (100, 102), [7]),  # nothing nearer than the last
    ],
)
def test_frames_are_the_nearest_to_even_instants(make_encoder, num_frames, bounds, numbers):
    frames = make_encoder(num_frames=num_frames).frames(video(), *bounds)
    assert frames.shape == (num_frames, SIZE, SIZE, 3)
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames[:, 0, 0, 0], np.multiply(numbers, 10))


def test_frames_are_the_nearest_where_they_come_unevenly(make_encoder):
    times = np.array([0.0, 0.5, 0.75, 3.0, 3.25, 7.0])
    uneven = video(frames=[gray(10 * i) for i in range(6)], frame_times=times, duration_s=8.0)
    frames = make_encoder(num_frames=8).frames(uneven, 0, 8)  # at 0.5, 1.5, ... 7.5 s
    np.testing.assert_array_equal(frames[:, 0, 0, 0], [10, 20, 30, 40, 40, 50, 50, 50])
    # 5.125 s is as far from 3.25 as from 7.
    frames = make_encoder(num_frames=1).frames(uneven, 5.125, 5.125)
    assert frames[0, 0, 0, 0] == 40


@pytest.mark.parametrize("bounds", [(0, 0.04), (0, 4), (9, 9.5)])
def test_a_single_picture_is_the_nearest_to_everything(make_encoder, bounds):
    single = video(frames=[gray(70)], frame_times=np.array([0.0]), duration_s=0.04)
    assert (make_encoder().frames(single, *bounds) == 70).all()


def test_encoded_frames_are_decoded_and_resized(make_encoder):
    jpeg = io.BytesIO()
    PIL.Image.new("L", (24, 16), 90).save(jpeg, "JPEG")  # no square, and no colour
    frames = make_encoder().frames(video(frames=[jpeg.getvalue()] * 8), 0, 2)
    assert frames.shape == (2, SIZE, SIZE, 3)
    np.testing.assert_allclose(frames, 90, atol=1)


def test_words_and_sound_of_the_segment_only(make_encoder):
    loud = np.zeros(4 * RATE, np.float32)
    loud[2 * RATE :] = np.random.default_rng(0).uniform(-0.9, 0.9, 2 * RATE)
    encoder = make_encoder()
    assert said(encoder, video(waveform=loud), 0, 2) == "the ball|hello|silent\nno"
    second = said(encoder, video(waveform=loud), 2, 4, label=1)
    assert second.startswith("the ball|goodbye|loud")
    assert second.endswith("\nyes")


def test_sound_that_ends_before_the_picture_is_silent(make_encoder):
    short = video(waveform=np.ones(RATE, np.float32))
    assert said(make_encoder(), short, 2, 4) == "the ball|goodbye|silent\nno"


def test_no_sound_is_said_to_be_none(make_encoder):
    assert said(make_encoder(), video(waveform=None), 0, 2) == "the ball|hello|no sound\nno"


def test_inputs_can_be_left_out(make_encoder):
    assert (make_encoder(left_out=("picture",)).frames(video(), 0, 2) == 127).all()
    assert said(make_encoder(left_out=("text",)), video(), 0, 2) == "||silent\nno"
    assert said(make_encoder(left_out=("sound",)), video(), 0, 2) == "the ball|hello|\nno"


def test_what_is_said_around_the_segment(make_encoder):
    encoder = make_encoder(context_s=2.0)
    assert said(encoder, video(), 0, 2) == "the ball|hello goodbye|silent\nno"
    assert said(encoder, video(), 2, 4) == "the ball|hello goodbye|silent\nno"
    assert said(make_encoder(context_s=0.4), video(), 2, 4) == "the ball|goodbye|silent\nno"
    blind = make_encoder(context_s=2.0, left_out=("text",))
    assert said(blind, video(), 0, 2) == "||silent\nno"


def test_a_video_without_pictures_is_named(make_encoder):
    bare = video(frames=[], frame_times=np.zeros(0))
    with pytest.raises(UserError, match="'the ball' is stored without pictures"):
        make_encoder().frames(bare, 0, 2)
    assert (make_encoder(left_out=("picture",)).frames(bare, 0, 2) == 127).all()


def test_all_pictures_of_a_segment_are_changed_alike(make_encoder):
    change = Augmentation(brightness=0.5)
    frames = make_encoder().frames(video(), 0, 2, change)
    np.testing.assert_array_equal(frames[:, 0, 0, 0], [5, 15])
    striped = np.zeros((SIZE, SIZE, 3), np.uint8)
    striped[:, :2] = 200
    frames = make_encoder().frames(
        video(frames=[striped] * 8), 0, 2, Augmentation(mirrored=True, box=(0, 0, 0.5, 1))
    )
    # Of the left half, made as wide as all, the left half is bright; mirrored it is the right one.
    np.testing.assert_array_equal(frames[:, 0, [0, 7], 0], [[0, 200]] * 2)
