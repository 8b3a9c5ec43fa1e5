"""A video file as the fields of a record: pictures, sound, words and shots as elsewhere."""

import io
import weakref

import numpy as np
import PIL.Image
import pytest

from deevisum_jax.data import audio, video
from deevisum_jax.summary import shots
from tests import media
from tfds_builders import downloads
from tfds_builders.media_record import read_many, read_media


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Six seconds at 10 per second: three colours, a tone, and a line of subtitles beside."""
    folder = tmp_path_factory.mktemp("film")
    colours = np.array([(200, 40, 40), (40, 180, 40), (40, 40, 200)], np.uint8)
    frames = np.zeros((60, 48, 64, 3), np.uint8) + colours[np.arange(60) // 20][:, None, None]
    tone = 0.5 * np.sin(np.arange(6 * 16_000) / 5)
    path = media.write_video(folder / "a film.mp4", frames, fps=10, audio=tone)
    path.with_suffix(".vtt").write_text("WEBVTT\n\n00:01.000 --> 00:02.500\nhere it comes\n")
    return path


def test_fields_of_a_record(film):
    found = read_media(film, frame_rate=2.0)
    fields = found.fields()
    assert fields["transcript"] == [{"start": 1.0, "end": 2.5, "text": "here it comes"}]
    np.testing.assert_array_equal(fields["frame_times"], np.arange(12, dtype=np.float32) / 2)
    np.testing.assert_array_equal(fields["audio"] / np.float32(32_768), audio.decode_audio(film))
    decoded = video.decode_video(film, frame_rate=2.0, size=(256, 256))
    for jpeg, frame in zip(fields["frames"], decoded.frames, strict=True):
        stored = np.asarray(PIL.Image.open(io.BytesIO(jpeg)))
        assert np.abs(stored.astype(int) - frame).max() <= 4
    assert [shot.start_frame for shot in found.shots if shot.start_frame in (20, 40)] == [20, 40]
    assert found.shots == shots.detect_shots(
        decoded.frames,
        decoded.frame_times,
        native_times=decoded.native_times,
        change=decoded.change,
        max_shot_s=shots.shot_limit_s(6.0),
        duration_s=decoded.info.duration_s,
    )


def test_sound_may_be_left_out_and_subtitles_given(film, tmp_path):
    other = tmp_path / "other.srt"
    other.write_text("1\n00:00:03,000 --> 00:00:04,000\nthere it goes\n")
    found = read_media(film, frame_rate=1.0, frame_size=32, sound=False, subtitles_path=other)
    assert found.waveform.dtype == np.int16
    assert found.waveform.size == 0
    assert [cue.text for cue in found.cues] == ["there it goes"]
    assert PIL.Image.open(io.BytesIO(found.frames[0])).size == (32, 32)


def test_a_picture_that_stays_on_screen_is_compressed_once(tmp_path):
    frames = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    path = media.write_video(tmp_path / "slides.mkv", frames, times_s=[0, 1, 2], fps=1)
    found = read_media(path, frame_rate=4.0)
    assert len(found.frames) == 12
    assert len({id(frame) for frame in found.frames}) == 3
    assert found.frames[3] is found.frames[0]


def test_pictures_pass_by_and_none_is_kept(film):
    seen = []

    def see(picture: np.ndarray) -> None:
        seen.append(weakref.ref(picture))
        assert sum(ref() is not None for ref in seen) <= 2

    shown = video.show_video(film, see, frame_rate=10.0)
    assert len(seen) == len(shown.frame_times) == shown.info.n_frames == 60


def test_several_files_by_several_processes_in_order(film, tmp_path):
    other = media.write_video(tmp_path / "b.mp4", np.zeros((20, 32, 32, 3), np.uint8), fps=10)
    paths = [other, film, other]
    found = list(read_many(paths, frame_rate=1.0, sound=False))
    assert [round(record["duration_s"]) for record in found] == [2, 6, 2]
    for path, record in zip(paths, found, strict=True):
        assert record["source"] == downloads.fingerprint(path)
        assert record["frames"] == read_media(path, frame_rate=1.0).frames
        assert record["shot_times"][0, 0] == 0
        assert record["shot_times"][-1, 1] == record["duration_s"]
        assert record["notes"] == []
        assert record["audio"].size == 0
