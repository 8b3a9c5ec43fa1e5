"""Sound on the video's clock, log-mel parity with librosa, and measures on sounds we know."""

from __future__ import annotations

import warnings

import av
import numpy as np
import pytest

from deevisum_jax.data import audio
from deevisum_jax.data.audio import decode_audio, describe, log_mel, measure
from tests.media import solid_frames, write_video

RATE = audio.SAMPLE_RATE
TIME = np.arange(2 * RATE) / RATE  # the window that a segment has, 2 s


def _chord() -> np.ndarray:
    return 0.2 * sum(np.sin(2 * np.pi * hz * TIME) for hz in (261.6, 329.6, 392.0))


def _noise() -> np.ndarray:
    return 0.1 * np.random.default_rng(0).standard_normal(len(TIME))


def _syllables() -> np.ndarray:
    """A gliding voice of 110 to 170 Hz with 19 harmonics, open four times a second."""
    phase = np.cumsum(2 * np.pi * (140 + 30 * np.sin(2 * np.pi * 1.3 * TIME))) / RATE
    voice = sum(np.sin(k * phase) / k for k in range(1, 20))
    return 0.3 * voice * np.clip(np.sin(2 * np.pi * 4 * TIME), 0, 1)


def _clicks(n: int) -> np.ndarray:
    clicks = np.zeros(len(TIME))
    clicks[RATE // 16 :: len(TIME) // n][:n] = 0.9
    return clicks


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_impulses_land_at_their_times(tmp_path, suffix, rate):
    sound = np.zeros(3 * rate)
    sound[[rate, 2 * rate]] = 0.9
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    path = write_video(
        tmp_path / f"ticks{suffix}",
        solid_frames([0] * 72),
        audio=sound,
        audio_rate=rate,
        codec=codec,
    )
    decoded = decode_audio(path)
    assert decoded.dtype == np.float32
    assert len(decoded) == pytest.approx(3 * RATE, abs=1100)  # AAC fills its last block
    halves = decoded[: 3 * RATE // 2], decoded[3 * RATE // 2 :]
    peaks = np.argmax(halves[0]), 3 * RATE // 2 + np.argmax(halves[1])
    np.testing.assert_allclose(peaks, [RATE, 2 * RATE], atol=2)


@pytest.mark.parametrize(
    ("video_start_s", "audio_start_s", "peak_s"),
    [(0.0, 0.5, 1.5), (0.75, 0.0, 0.25)],
    ids=["sound starts later", "sound starts earlier"],
)
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_start_offsets_are_measured_from_the_first_frame(
    tmp_path, suffix, video_start_s, audio_start_s, peak_s
):
    sound = np.zeros(2 * RATE)
    sound[RATE] = 0.9
    path = write_video(
        tmp_path / f"offset{suffix}",
        solid_frames([0] * 16),
        times_s=video_start_s + np.arange(16) / 8,
        audio=sound,
        audio_start_s=audio_start_s,
    )
    decoded = decode_audio(path)
    assert np.argmax(decoded) / RATE == pytest.approx(peak_s, abs=0.001)
    late = max(0, round((audio_start_s - video_start_s) * RATE) - 32)
    assert not decoded[:late].any()


def test_gap_in_the_sound_is_zeros_and_what_follows_stays_in_place(tmp_path):
    path = tmp_path / "gap.mkv"
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=8)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        sound = out.add_stream("pcm_s16le", rate=RATE, layout="mono")
        for picture in solid_frames([0] * 24):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(video.encode())
        for start in (0, 2 * RATE):  # one second of sound, one without, one with
            block = np.full((1, RATE), 8192, np.int16)
            frame = av.AudioFrame.from_ndarray(block, format="s16", layout="mono")
            frame.sample_rate, frame.pts = RATE, start
            out.mux(sound.encode(frame))
        out.mux(sound.encode())
    decoded = decode_audio(path)
    np.testing.assert_allclose(decoded.reshape(3, RATE), np.repeat([[0.25], [0], [0.25]], RATE, 1))


def test_channels_are_mixed_without_clipping(tmp_path):
    loud = np.full((2, RATE), 0.9)
    half = loud * [[1], [0]]
    for sound, level in ((loud, 0.9), (half, 0.45)):
        path = write_video(tmp_path / "stereo.mkv", solid_frames([0] * 24), audio=sound)
        np.testing.assert_allclose(decode_audio(path)[100:-100], level, atol=1e-3)


def test_no_sound_stream_is_none(tmp_path):
    assert decode_audio(write_video(tmp_path / "mute.mp4", solid_frames([0]))) is None


@pytest.mark.parametrize(
    ("name", "seconds"),
    [
        ("big_buck_bunny_30s.webm", 30.0),
        ("flower_silent_audio.mp4", 5.06),
        ("nasa_multi_stream.mp4", 13.06),
        ("pancake_opus.mkv", 10.37),
        ("speech_friday.mp4", 6.15),
        ("tears_of_steel_70s.webm", 70.5),
    ],
)
def test_real_clips_decode_to_their_length(shared_data, name, seconds):
    decoded = decode_audio(shared_data / "clips" / name)
    assert len(decoded) / RATE == pytest.approx(seconds, abs=0.05)
    assert np.abs(decoded).max() <= 1


def test_real_clip_without_sound(shared_data):
    assert decode_audio(shared_data / "clips/bikes_no_audio.mp4") is None


@pytest.mark.parametrize("n", [399, 400, 16_000, 32_123])
@pytest.mark.parametrize(("num_mels", "window_s", "hop_s"), [(64, 0.025, 0.01), (40, 0.032, 0.016)])
def test_log_mel_equals_librosa(n, num_mels, window_s, hop_s):
    librosa = pytest.importorskip("librosa", reason="librosa is in the test extra")
    waveform = 0.1 * np.random.default_rng(n).standard_normal(n).astype(np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that one window is longer than the sound
        mel = librosa.feature.melspectrogram(
            y=waveform,
            sr=RATE,
            n_fft=round(window_s * RATE),
            hop_length=round(hop_s * RATE),
            n_mels=num_mels,
        )
    ours = log_mel(waveform, num_mels=num_mels, window_s=window_s, hop_s=hop_s)
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, np.log(np.maximum(mel, 1e-10)).T, atol=1e-4)


def test_log_mel_of_nothing_and_of_zeros_is_the_floor():
    for n in (0, 1600):
        features = log_mel(np.zeros(n, np.float32))
        assert features.shape == (1 + n // 160, 64)
        np.testing.assert_allclose(features, np.log(1e-10), rtol=1e-6)


def test_loudness_by_hand():
    assert measure(np.ones(RATE)).loudness_db == pytest.approx(0.0)
    sine = np.sin(2 * np.pi * 440 * TIME)
    assert measure(sine).loudness_db == pytest.approx(10 * np.log10(0.5), abs=0.01)  # -3.01
    assert measure(0.1 * sine).loudness_db == pytest.approx(-23.01, abs=0.01)
    assert measure(np.zeros(RATE)).loudness_db == -100.0


def test_silence_fraction_by_hand():
    half = _noise()
    half[: len(half) // 2] = 0
    assert measure(half).silence_fraction == pytest.approx(0.5, abs=0.02)
    assert measure(_noise()).silence_fraction == 0
    assert measure(np.zeros(RATE)).silence_fraction == 1


def test_chord_is_music_and_not_speech():
    measures = measure(_chord())
    assert measures.music_likeness > 0.95
    assert measures.speech_likeness < 0.05
    assert measures.onsets_per_s == 0


def test_gliding_syllables_are_speech_and_not_music():
    measures = measure(_syllables())
    assert measures.speech_likeness > 0.9
    assert measures.music_likeness < 0.1
    assert measures.onsets_per_s == 4.0  # eight syllables in 2 s


@pytest.mark.parametrize("gate_hz", [0, 4])
def test_noise_is_neither_speech_nor_music(gate_hz):
    gate = np.clip(np.sin(2 * np.pi * gate_hz * TIME), 0, 1) if gate_hz else 1
    measures = measure(_noise() * gate)
    assert measures.speech_likeness < 0.1
    assert measures.music_likeness < 0.1


def test_noise_burst_is_one_onset():
    burst = np.zeros(len(TIME))
    burst[RATE : RATE + 4000] = 3 * _noise()[:4000]
    measures = measure(burst)
    assert measures.onsets_per_s * 2 == 1
    assert (measures.speech_likeness, measures.music_likeness) == (0, 0)


@pytest.mark.parametrize("n", [1, 5, 9, 16])
def test_click_train_has_as_many_onsets_as_clicks(n):
    assert measure(_clicks(n)).onsets_per_s * 2 == n


def test_measures_do_not_depend_on_volume():
    loud, soft = measure(_syllables()), measure(0.3 * _syllables())
    assert soft.loudness_db == pytest.approx(loud.loudness_db + 20 * np.log10(0.3), abs=0.01)
    assert soft.speech_likeness == pytest.approx(loud.speech_likeness, abs=0.1)


def test_speech_of_a_film_is_speech(shared_data):
    waveform = decode_audio(shared_data / "clips/speech_friday.mp4")
    for at in range(0, 3 * 2 * RATE, 2 * RATE):
        measures = measure(waveform[at : at + 2 * RATE])
        assert measures.speech_likeness > 0.5
        assert measures.music_likeness < 0.1


def test_score_of_a_film_is_music(shared_data):
    waveform = decode_audio(shared_data / "clips/big_buck_bunny_30s.webm")[10 * RATE : 20 * RATE]
    measures = [measure(window) for window in waveform.reshape(5, 2 * RATE)]
    assert min(m.music_likeness for m in measures) > 0.5
    assert max(m.speech_likeness for m in measures) < 0.5


def test_descriptions():
    assert describe(None) == "no sound"
    assert describe(np.zeros(2 * RATE)) == "silent"
    assert describe(np.zeros(0)) == "silent"
    assert describe(_chord()) == "loud, music, no onsets"
    assert describe(0.05 * _chord()) == "quiet, music, no onsets"
    assert describe(_syllables()) == "loud, speech, many onsets"
    assert describe(0.5 * _noise()) == "moderate, no onsets"
    assert describe(_clicks(2)) == "quiet, few onsets"


@pytest.mark.parametrize("n", [1, 159, 400, 1600, 7999, 8000, 8001, 20_000, 32_000])
def test_any_length_is_described_in_the_fixed_vocabulary(n):
    for waveform in (_chord()[:n], _noise()[:n], _syllables()[-n:], np.ones(n)):
        words = describe(waveform).split(", ")
        assert set(words) <= set(audio.DESCRIPTION_WORDS)
        assert describe(waveform).split(", ") == words  # the same each time


@pytest.mark.parametrize("audio_start_s", [0.5, 0.0])
def test_sound_is_heard_piece_by_piece_as_it_is_decoded(tmp_path, audio_start_s):
    path = write_video(
        tmp_path / "late.mkv",
        solid_frames([0] * 16),
        times_s=0.25 + np.arange(16) / 8,
        audio=_noise(),
        audio_start_s=audio_start_s,
    )
    pieces = []
    assert audio.hear_audio(path, lambda start, samples: pieces.append((start, samples)))
    assert len(pieces) > 5
    assert pieces[0][0] == round(max(0, audio_start_s - 0.25) * RATE)
    assert all(samples.dtype == np.int16 for _, samples in pieces)
    ends = [start + len(samples) for start, samples in pieces]
    assert [start for start, _ in pieces[1:]] == ends[:-1]
    whole = np.concatenate([samples for _, samples in pieces]) / np.float32(32_768)
    np.testing.assert_array_equal(decode_audio(path)[pieces[0][0] :], whole)


def test_nothing_is_heard_without_sound(tmp_path):
    path = write_video(tmp_path / "mute.mp4", solid_frames([0]))
    assert not audio.hear_audio(path, lambda start, samples: pytest.fail("heard"))
