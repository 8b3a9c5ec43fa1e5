"""Media files: what is refused and why, which stream is meant, which way is up, what time it is."""

from __future__ import annotations

import struct

import av
import numpy as np
import pytest

from deevisum_jax import media
from deevisum_jax.data.video import decode_video
from deevisum_jax.errors import UserError
from deevisum_jax.summary.render import render_summary
from tests.media import decode, solid_frames, write_video


def write_sound(path):
    """A file of 0.25 s of silence and no picture."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), layout="mono")
        frame.sample_rate = 16_000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("absent.mp4", lambda p: None, "no such file"),
        ("empty.mp4", lambda p: p.write_bytes(b""), "empty"),
        ("folder.mp4", lambda p: p.mkdir(), "folder"),
        ("text.mp4", lambda p: p.write_text("not a film\n" * 99), "not a video file.*Invalid data"),
        ("notes.txt", lambda p: p.write_text("not a film\n" * 99), "a text file, not a video"),
        ("sound.mp4", write_sound, "no video stream.*audio"),
    ],
)
def test_what_is_no_video_is_refused_by_name(tmp_path, name, write, message):
    path = tmp_path / name
    write(path)
    with pytest.raises(UserError, match=message) as refusal, media.open_media(path) as container:
        media.video_stream(container, path)
    assert name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_mp4_without_its_index_says_so(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", solid_frames([0, 80, 160])).read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(whole[: whole.index(b"moov") - 4])  # the index comes last in this file
    with pytest.raises(UserError, match=r"index of this mp4 file is missing.*fetch the file again"):
        media.open_media(path)


def test_default_stream_wins_over_larger_ones(tmp_path):
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as out:
        streams = [out.add_stream("libx264", rate=24) for _ in range(2)]
        for stream, scale in zip(streams, (1, 2), strict=True):
            stream.width, stream.height, stream.pix_fmt = 64 * scale, 48 * scale, "yuv420p"
        for stream, scale in zip(streams, (1, 2), strict=True):
            for picture in solid_frames([0] * 12, 48 * scale, 64 * scale):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            out.mux(stream.encode())
    with media.open_media(path) as container:
        stream = media.video_stream(container, path)
        assert (stream.height, stream.width) == (48, 64)
        assert media.audio_stream(container) is None


@pytest.fixture
def stray_stamp(tmp_path):
    """Grey pictures at 0, 0.5 and 1 s; a fourth claims 5000 s in a file of 1.5 s; 24 per second."""
    levels, times_s = [0, 80, 160, 240], [0, 0.5, 1, 5000]
    path = write_video(tmp_path / "stray.mkv", solid_frames(levels), times_s=times_s)
    data = bytearray(path.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3  # Matroska's Duration, a double in milliseconds
    data[at : at + 8] = struct.pack(">d", 1500.0)
    path.write_bytes(data)
    return path


def test_frames_ascend_from_zero_whatever_their_stamps_say(stray_stamp):
    with media.open_media(stray_stamp) as container:
        reader = media.FrameReader(container, media.video_stream(container, stray_stamp))
        times = [time_s for _, time_s in reader]
    np.testing.assert_allclose(times, [0, 0.5, 1, 1 + reader.period_s])
    assert (reader.zero_s, reader.untimed_frames) == (0.0, 1)
    assert reader.errors == []


def test_stray_timestamp_fills_hours_neither_with_samples_nor_with_film(stray_stamp, tmp_path):
    video = decode_video(stray_stamp)
    assert video.info.n_frames == 4
    assert video.info.duration_s < 3
    assert any("1 frame has no usable timestamp" in note for note in video.info.notes)
    seconds = render_summary(stray_stamp, [(0.5, 9.0)], tmp_path / "out.mp4")
    assert seconds == pytest.approx(video.info.duration_s - 0.5, abs=0.1)
    levels = decode(tmp_path / "out.mp4")[0].mean((1, 2, 3))
    np.testing.assert_allclose(levels, [80, 160, 240], atol=3)


def test_time_zero_is_the_first_picture(tmp_path):
    late = write_video(tmp_path / "late.mkv", solid_frames([0] * 3), times_s=[0.7, 0.8, 0.9])
    assert media.presentation_start_s(late) == pytest.approx(0.7)
    sound = write_sound(tmp_path / "sound.mka")
    assert media.presentation_start_s(sound) is None


class TurnedFrame:
    """What `upright_turn` looks at."""

    def __init__(self, a: int, b: int, c: int, d: int):
        numbers = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
        self.side_data = {"DISPLAYMATRIX": struct.pack("<9i", *numbers)}


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [  # x' = a x + c y, y' = b x + d y, y down: where the stored right (a, b) and down (c, d) go
        ((1, 0, 0, 1), (0, False)),
        ((0, -1, 1, 0), (1, False)),  # right goes up: counter-clockwise
        ((-1, 0, 0, -1), (2, False)),
        ((0, 1, -1, 0), (3, False)),  # right goes down: clockwise, as phones write it
        ((-1, 0, 0, 1), (0, True)),
        ((1, 0, 0, -1), (2, True)),  # upside down in a mirror: mirrored, then half a turn
    ],
)
def test_display_matrix_as_a_turn(matrix, turn):
    assert media.upright_turn(TurnedFrame(*matrix)) == turn
