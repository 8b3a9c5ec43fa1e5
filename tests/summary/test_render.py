"""The summary film: exact pictures, sound in step, awkward sources, clean failure."""

import functools
import os
import struct

import av
import numpy as np
import pytest
from PIL import Image

from deevisum_jax.errors import UserError
from deevisum_jax.summary import render
from deevisum_jax.summary.render import (
    keyframe_times,
    render_summary,
    save_keyframes,
    save_sets_of_keyframes,
)
from tests import media
from tests.media import decode, frame_numbers, stream_durations

write_video = functools.partial(media.write_video, fps=25)


@pytest.fixture(scope="module")
def numbered_frames():
    return media.numbered_frames()


def read_jpeg(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_pictures_are_those_of_the_intervals(tmp_path, numbered_frames):
    source = write_video(
        tmp_path / "in.mp4", numbered_frames, options={"crf": "10", "preset": "fast", "bf": "2"}
    )
    out = tmp_path / "out.mp4"
    seconds = render_summary(source, [(2.0, 2.4), (0.4, 0.8)], out)  # 25 fps, any order
    frames, times, sound, _ = decode(out)
    np.testing.assert_array_equal(frame_numbers(frames), [*range(10, 20), *range(50, 60)])
    np.testing.assert_allclose(times, np.arange(20) / 25, atol=1e-4)
    assert seconds == pytest.approx(0.8)
    assert stream_durations(out) == {"video": pytest.approx(0.8, abs=1e-4)}
    assert sound is None
    data = out.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # plays while it loads


def test_rounded_borders_take_no_frame_of_the_next_shot(tmp_path, numbered_frames):
    source = write_video(tmp_path / "in.mp4", numbered_frames[:60], fps=24)
    render_summary(source, [(1.042, 2.042)], tmp_path / "out.mp4")  # frames 25 to 48 of 24 fps
    frames, *_ = decode(tmp_path / "out.mp4")
    np.testing.assert_array_equal(frame_numbers(frames), range(25, 49))


def test_overlapping_and_touching_intervals_are_joined(tmp_path, numbered_frames):
    source = write_video(tmp_path / "in.mp4", numbered_frames)
    assert render_summary(
        source, [(0.0, 0.4), (0.4, 0.8), (0.6, 1.0)], tmp_path / "out.mp4"
    ) == pytest.approx(1.0)
    np.testing.assert_array_equal(frame_numbers(decode(tmp_path / "out.mp4")[0]), range(25))


def test_variable_frame_rate_keeps_its_timing(tmp_path, numbered_frames):
    starts = np.array([0, 0.1, 0.2, 0.7, 0.8, 1.6, 1.7, 1.8])
    source = write_video(tmp_path / "in.mkv", numbered_frames[:8], times_s=starts)
    # From 0.5 s frame 2 is on screen (until 0.7), frame 5 begins at 1.6 and is cut at 1.65.
    seconds = render_summary(source, [(0.5, 1.65)], tmp_path / "out.mp4")
    frames, times, *_ = decode(tmp_path / "out.mp4")
    np.testing.assert_array_equal(frame_numbers(frames), [2, 3, 4, 5])
    np.testing.assert_allclose(times, [0, 0.2, 0.3, 1.1], atol=1e-4)
    assert seconds == pytest.approx(1.15)
    assert stream_durations(tmp_path / "out.mp4")["video"] == pytest.approx(1.15, abs=1e-3)


def test_a_slide_show_slower_than_the_intervals(tmp_path, numbered_frames):
    source = write_video(
        tmp_path / "in.mkv", numbered_frames[:3], times_s=np.array([0.0, 5.0, 10.0])
    )
    seconds = render_summary(source, [(1.0, 2.0), (3.0, 4.0), (6.0, 7.0)], tmp_path / "out.mp4")
    frames, times, *_ = decode(tmp_path / "out.mp4")
    np.testing.assert_array_equal(frame_numbers(frames), [0, 0, 1])
    np.testing.assert_allclose(times, [0, 1, 2], atol=1e-4)
    assert seconds == pytest.approx(3.0)


# Flashes of one frame and clicks of 2 ms at the same instants, 25 fps.
FLASHES = (20, 70, 110)  # 0.8, 2.8 and 4.4 s


def flash_and_click(rate, channels=1, shift_s=0.0):
    frames = np.full((150, 48, 64, 3), 16, np.uint8)
    sound = np.zeros((channels, 6 * rate), np.float32)
    for i in FLASHES:
        frames[i] = 240
        at = round((i / 25 - shift_s) * rate)
        sound[:, at : at + rate // 500] = 0.9
    return frames, sound


@pytest.mark.parametrize(
    ("name", "codec", "sound_codec", "rate", "start_s"),
    [
        ("in.mkv", "libx264", "flac", 48_000, 0.0),
        ("in.mp4", "libx264", "aac", 44_100, 0.0),  # AAC priming on both sides
        ("in.avi", "mpeg4", "pcm_s16le", 16_000, 0.0),
        ("in.webm", "libvpx", "libopus", 48_000, 0.0),
        ("late.mkv", "mpeg4", "flac", 8_000, 0.3),  # the sound stream begins later
    ],
)
def test_picture_and_sound_stay_together(tmp_path, name, codec, sound_codec, rate, start_s):
    frames, sound = flash_and_click(rate, shift_s=start_s)
    source = write_video(
        tmp_path / name,
        frames,
        codec=codec,
        audio=sound,
        audio_rate=rate,
        audio_codec=sound_codec,
        audio_start_s=start_s,
    )
    intervals = [(0.52, 1.48), (2.6, 3.0), (4.04, 5.0)]
    seconds = render_summary(source, intervals, tmp_path / "out.mp4")
    frames, times, sound, out_rate = decode(tmp_path / "out.mp4")
    assert out_rate == rate
    # Offsets of the intervals: 0, 0.96, 1.36.
    expected = np.array([0.8 - 0.52, 0.96 + 2.8 - 2.6, 1.36 + 4.4 - 4.04])
    flashes = times[frames.mean((1, 2, 3)) > 128]
    np.testing.assert_allclose(flashes, expected, atol=1e-3)
    for flash in flashes:
        # Around each flash the loudest instant; elsewhere near silence.
        near = sound[0, round((flash - 0.1) * rate) : round((flash + 0.1) * rate)]
        click = flash - 0.1 + np.argmax(np.abs(near)) / rate
        assert abs(click - flash) < 0.01  # a quarter of a frame
    durations = stream_durations(tmp_path / "out.mp4")
    assert durations["video"] == pytest.approx(seconds, abs=1e-4)
    assert seconds == pytest.approx(0.96 + 0.4 + 0.96)
    assert durations["audio"] == pytest.approx(seconds, abs=0.05)
    assert durations["video"] <= sum(b - a for a, b in intervals) + 1e-4


def test_sound_keeps_level_channels_and_ends_with_the_stream(tmp_path, numbered_frames):
    rate = 44_100
    t = np.arange(rate) / rate  # one second of sound in a film of four
    sound = 0.5 * np.stack([np.sin(2 * np.pi * 440 * t), np.sin(2 * np.pi * 880 * t)])
    source = write_video(
        tmp_path / "in.mkv", numbered_frames, audio=sound.astype(np.float32), audio_rate=rate
    )
    render_summary(source, [(0.5, 2.5)], tmp_path / "out.mp4")
    _, _, out, out_rate = decode(tmp_path / "out.mp4")
    assert (len(out), out_rate) == (2, rate)
    for channel, hertz in zip(out, (440, 880), strict=True):
        loud = channel[round(0.1 * rate) : round(0.4 * rate)]
        assert np.sqrt((loud**2).mean()) == pytest.approx(0.5 / 2**0.5, rel=0.05)
        spectrum = np.abs(np.fft.rfft(loud))
        assert np.argmax(spectrum) * rate / len(loud) == pytest.approx(hertz, abs=5)
    assert np.abs(out[:, round(0.6 * rate) : round(1.9 * rate)]).max() < 1e-2
    assert out.shape[1] == pytest.approx(2 * rate, abs=2048)


def test_joins_fade_and_do_not_click(tmp_path, numbered_frames):
    rate = 16_000
    sound = np.full((1, 4 * rate), 0.5, np.float32)  # a constant: any cut would be a step
    source = write_video(tmp_path / "in.mkv", numbered_frames, audio=sound, audio_rate=rate)
    render_summary(source, [(1.0, 2.0), (3.0, 3.5)], tmp_path / "out.mp4")
    _, _, out, _ = decode(tmp_path / "out.mp4")
    assert np.abs(out[0, rate - 8 : rate + 8]).min() < 0.1
    assert out[0, rate // 2] == pytest.approx(0.5, abs=0.05)


def test_more_than_two_channels_are_mixed_down_and_odd_rates_kept_near(tmp_path, numbered_frames):
    source = tmp_path / "in.mkv"
    with av.open(str(source), "w") as out:
        video = out.add_stream("mpeg4", rate=25)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = out.add_stream("pcm_s16le", rate=6000, layout="5.1")
        for picture in numbered_frames[:50]:
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture.copy(), format="rgb24")))
        samples = np.full((1, 6 * 12_000), 8000, np.int16)
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout="5.1")
        frame.sample_rate, frame.pts = 6000, 0
        out.mux(audio.encode(frame))
        out.mux([*video.encode(None), *audio.encode(None)])
    render_summary(source, [(0.5, 1.5)], tmp_path / "out.mp4")
    _, _, sound, rate = decode(tmp_path / "out.mp4")
    assert (len(sound), rate) == (2, 8000)  # AAC begins at 8 kHz
    assert np.abs(sound[:, 4000]).min() > 0.1


def corner_frames(height=45, width=63):
    """Dark, with a red top left and a green top right corner."""
    frames = np.full((25, height, width, 3), 30, np.uint8)
    frames[:, : height // 3, : width // 3] = (220, 20, 20)
    frames[:, : height // 3, -(width // 3) :] = (20, 220, 20)
    return frames


def test_odd_sizes_lose_their_last_row_and_column(tmp_path):
    source = write_video(tmp_path / "in.mkv", corner_frames(), codec="ffv1", pix_fmt="yuv444p")
    render_summary(source, [(0.0, 0.4)], tmp_path / "out.mp4")
    frames, *_ = decode(tmp_path / "out.mp4")
    assert frames.shape == (10, 44, 62, 3)
    np.testing.assert_allclose(frames[0, 5, 5], (220, 20, 20), atol=25)
    [still] = save_keyframes(source, [0.2], tmp_path / "stills")
    assert read_jpeg(still).shape == (45, 63, 3)


def rotated(source, target, matrix):
    """A copy of an mp4 whose track header carries this display matrix (a, b, c, d)."""
    data = bytearray(source.read_bytes())
    at = data.index(b"tkhd") + 4 + 4 + 20 + 16  # version and flags, times and ids, layer ... volume
    a, b, c, d = (round(x * 65536) for x in matrix)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    target.write_bytes(data)
    return target


@pytest.mark.parametrize(
    ("matrix", "size", "red", "green"),
    [
        # As phones write it: the picture is shown turned clockwise by 90 degrees.
        ((0, 1, -1, 0), (64, 44), "top right", "bottom right"),
        ((0, -1, 1, 0), (64, 44), "bottom left", "top left"),
        ((-1, 0, 0, -1), (44, 64), "bottom right", "bottom left"),
        ((-1, 0, 0, 1), (44, 64), "top right", "top left"),  # mirrored
    ],
)
def test_rotated_sources_come_out_upright(tmp_path, matrix, size, red, green):
    plain = write_video(tmp_path / "plain.mp4", corner_frames(44, 64))
    source = rotated(plain, tmp_path / "in.mp4", matrix)
    render_summary(source, [(0.0, 0.4)], tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as film:
        frame = next(film.decode(video=0))
        assert frame.rotation == 0
        picture = frame.to_ndarray(format="rgb24")
    still = read_jpeg(save_keyframes(source, [0.2], tmp_path / "stills")[0])
    for shown in (picture, still):
        assert shown.shape[:2] == size
        h, w = size
        places = {
            "top left": (4, 4),
            "top right": (4, w - 5),
            "bottom left": (h - 5, 4),
            "bottom right": (h - 5, w - 5),
        }
        np.testing.assert_allclose(shown[places[red]], (220, 20, 20), atol=40)
        np.testing.assert_allclose(shown[places[green]], (20, 220, 20), atol=40)


def test_damage_in_the_middle_is_passed_over(tmp_path, numbered_frames):
    source = write_video(
        tmp_path / "in.avi",
        numbered_frames,
        codec="mpeg4",
        audio=np.zeros((1, 64_000), np.float32),
        audio_rate=16_000,
        audio_codec="pcm_s16le",
    )
    data = bytearray(source.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = np.random.default_rng(0).bytes(3000)
    source.write_bytes(data)
    seconds = render_summary(source, [(0.0, 0.8), (3.2, 3.8)], tmp_path / "out.mp4")
    assert seconds == pytest.approx(1.4, abs=0.05)
    numbers = frame_numbers(decode(tmp_path / "out.mp4")[0])
    np.testing.assert_array_equal(numbers[:20], range(20))
    assert numbers[-1] >= 90


def test_what_lies_past_the_end_is_cut_off(tmp_path, numbered_frames):
    sound = np.zeros((1, 80_000), np.float32)  # the sound goes on for a second
    source = write_video(tmp_path / "in.mkv", numbered_frames, audio=sound, audio_rate=16_000)
    seconds = render_summary(source, [(3.0, 9.0)], tmp_path / "out.mp4")
    assert seconds == pytest.approx(1.0, abs=1e-3)
    durations = stream_durations(tmp_path / "out.mp4")
    assert durations["audio"] == pytest.approx(1.0, abs=0.1)
    with pytest.raises(UserError, match="no picture of it falls into"):
        render_summary(source, [(5.0, 6.0)], tmp_path / "none.mp4")
    assert not (tmp_path / "none.mp4").exists()


def test_an_older_summary_stays_until_the_new_one_is_whole(tmp_path, numbered_frames, monkeypatch):
    source = write_video(tmp_path / "in.mp4", numbered_frames)
    out = tmp_path / "out.mp4"
    out.write_bytes(b"older")
    with pytest.raises(UserError):
        render_summary(source, [(50.0, 60.0)], out)
    assert out.read_bytes() == b"older"
    render_summary(source, [(0.0, 0.4)], out)
    assert len(decode(out)[0]) == 10
    assert sorted(os.listdir(tmp_path)) == ["in.mp4", "out.mp4"]  # nothing half-made is left


def test_says_what_is_wrong(tmp_path, numbered_frames):
    source = write_video(tmp_path / "in.mp4", numbered_frames[:5])
    out = tmp_path / "out.mp4"
    (tmp_path / "text.mp4").write_text("no video")
    with av.open(str(tmp_path / "sound.mka"), "w") as sound:
        stream = sound.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = 8000
        sound.mux(stream.encode(frame))
    for video, intervals, target, message in [
        (source, [], out, "no interval"),
        (source, [(1.0, 0.5)], out, "start < end"),
        (source, [(-1.0, 0.5)], out, "start < end"),
        (source, [(0.0, 0.1)], tmp_path / "out.avi", r"\.mp4"),
        (source, [(0.0, 0.1)], tmp_path / "no" / "out.mp4", "does not exist"),
        (source, [(0.0, 0.1)], source, "the video itself"),
        (tmp_path / "no.mp4", [(0.0, 0.1)], out, "no such file"),
        (tmp_path / "text.mp4", [(0.0, 0.1)], out, "not a video"),
        (tmp_path / "sound.mka", [(0.0, 0.1)], out, "no video stream"),
    ]:
        with pytest.raises(UserError, match=message):
            render_summary(video, intervals, target)
    with pytest.raises(UserError, match="from 0 on"):
        save_keyframes(source, [-1.0], tmp_path / "stills")


def test_keyframes_show_what_is_on_screen(tmp_path, numbered_frames):
    source = write_video(tmp_path / "in.mp4", numbered_frames)
    files = save_keyframes(source, [2.0, 0.41, 99.0, 2.0], tmp_path / "a" / "stills")
    assert [f.name for f in files] == [
        "000_2.00s.jpg", "001_0.41s.jpg", "002_99.00s.jpg", "003_2.00s.jpg"
    ]  # fmt: skip
    pictures = np.stack([read_jpeg(f) for f in files])
    np.testing.assert_array_equal(frame_numbers(pictures), [50, 10, 99, 50])


def test_several_sets_of_keyframes_are_written_in_one_pass(tmp_path, numbered_frames, monkeypatch):
    source = write_video(tmp_path / "in.mp4", numbered_frames)
    opened, open_media = [], render.media.open_media
    monkeypatch.setattr(
        render.media, "open_media", lambda path: opened.append(path) or open_media(path)
    )
    found = save_sets_of_keyframes(
        source, [([2.0, 0.41], tmp_path / "a"), ([], tmp_path / "b"), ([0.41, 1.0], tmp_path / "c")]
    )
    names = [[path.relative_to(tmp_path).as_posix() for path in paths] for paths in found]
    assert names == [
        ["a/000_2.00s.jpg", "a/001_0.41s.jpg"], [], ["c/000_0.41s.jpg", "c/001_1.00s.jpg"]
    ]  # fmt: skip
    pictures = np.stack([read_jpeg(path) for paths in found for path in paths])
    np.testing.assert_array_equal(frame_numbers(pictures), [50, 10, 10, 25])
    assert opened == [source]


def test_keyframe_times_are_the_middles_of_the_best_parts():
    bounds = np.array([[0.0, 2.0], [2.0, 4.0], [4.0, 6.0]])
    scores = np.array([0.1, 0.9, 0.5])
    # [1, 3) is scored best in [2, 3); [4, 6) is one segment; nothing is known about [7, 8).
    assert keyframe_times([(1, 3), (4, 6), (7, 8)], bounds, scores) == [2.5, 5.0, 7.5]


def test_real_films(tmp_path, shared_data):
    for name in ("nasa_multi_stream.mp4", "pancake_opus.mkv", "bikes_no_audio.mp4"):
        source = shared_data / "clips" / name
        seconds = render_summary(source, [(1.0, 2.0), (6.0, 7.5)], tmp_path / "out.mp4")
        _, times, sound, _ = decode(tmp_path / "out.mp4")
        assert seconds == pytest.approx(2.5, abs=1e-6)
        assert times[0] == 0
        assert 2.3 < times[-1] < 2.5
        assert (sound is None) == (name == "bikes_no_audio.mp4")
        assert (np.diff(times) < 0.1).all()
