"""decode_video: sampling by timestamps, upright pictures, exact cuts, and files that are broken."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import av
import numpy as np
import pytest
from PIL import Image

from deevisum_jax.data.video import View, decode_video
from deevisum_jax.errors import UserError
from tests.media import quadrants, solid_frames, write_video


def _grey(frames: Sequence[np.ndarray]) -> np.ndarray:
    """The brightness of solid pictures, rounded to tens."""
    return np.round(np.asarray(frames).mean(axis=(1, 2, 3)) / 10).astype(int) * 10


def _cells(n_frames: int) -> np.ndarray:
    """Random 6 x 9 colour cells that drift in brightness: enough bits to cut a file within."""
    cells = np.random.default_rng(0).integers(0, 200, (6, 9, 3))
    picture = cells.repeat(16, axis=0).repeat(16, axis=1)
    return (picture + np.arange(n_frames)[:, None, None, None] % 50).astype(np.uint8)


@pytest.fixture(scope="module")
def whole_mp4(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "whole.mp4"
    faststart = {"movflags": "faststart"}
    return write_video(
        path, _cells(120), options={"g": "24", "crf": "20"}, container_options=faststart
    )


def test_samples_are_the_pictures_on_screen_at_k_over_the_rate(tmp_path):
    path = write_video(tmp_path / "steady.mp4", solid_frames(np.arange(24) * 10), fps=8)
    video = decode_video(path, frame_rate=2.0)
    assert _grey(video.frames).tolist() == [0, 40, 80, 120, 160, 200]  # every 4th of 24 frames
    np.testing.assert_allclose(video.frame_times, [0, 0.5, 1, 1.5, 2, 2.5])
    np.testing.assert_allclose(video.native_times, np.arange(24) / 8)
    assert video.info.duration_s == pytest.approx(3.0)
    assert video.info.native_fps == pytest.approx(8.0)
    assert (video.info.n_frames, video.info.height, video.info.width) == (24, 48, 64)
    assert not video.info.has_audio
    assert video.info.notes == ()


def test_variable_rate_and_late_start_go_by_timestamps(tmp_path):
    times_s = [1.0, 1.1, 1.5, 2.0, 2.1, 3.0]  # time 0 is the first frame, at 1.0 s in the file
    path = write_video(tmp_path / "vfr.mp4", solid_frames(np.arange(6) * 40), times_s=times_s)
    video = decode_video(path, frame_rate=4.0)
    np.testing.assert_allclose(video.native_times, [0, 0.1, 0.5, 1.0, 1.1, 2.0])
    # t = 0, .25 | .5, .75 | 1.0 | 1.25, 1.5, 1.75 | 2.0
    assert _grey(video.frames).tolist() == [0, 40, 80, 80, 120, 160, 160, 160, 200]
    assert video.info.notes == ("variable frame rate: frames last 100 to 900 ms",)


def test_native_rate_keeps_every_frame_though_matroska_rounds_to_milliseconds(tmp_path):
    levels = np.arange(24) * 10
    path = write_video(tmp_path / "rounded.mkv", solid_frames(levels), fps=24)
    video = decode_video(path, frame_rate=24.0)
    assert _grey(video.frames).tolist() == levels.tolist()


@pytest.mark.parametrize(("n_frames", "duration_s"), [(1, 1 / 24), (12, 0.5)])
def test_shortest_videos_yield_one_sample(tmp_path, n_frames, duration_s):
    path = write_video(tmp_path / "short.mp4", solid_frames([200] * n_frames))
    video = decode_video(path)
    assert np.shape(video.frames) == (1, 48, 64, 3)
    assert video.info.duration_s == pytest.approx(duration_s)
    assert video.change.tolist() == [0.0] * n_frames


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
def test_display_matrix_is_applied(tmp_path, rotation, mirrored):
    stored = quadrants()
    path = write_video(
        tmp_path / "turned.mp4", np.stack([stored] * 2), rotation=rotation, mirrored=mirrored
    )
    upright = np.rot90(stored[:, ::-1] if mirrored else stored, rotation // 90)
    video = decode_video(path)
    assert (video.info.height, video.info.width) == upright.shape[:2]
    assert np.abs(video.frames[0].astype(int) - upright).mean() < 4
    assert len(video.info.notes) == (rotation > 0) + mirrored
    assert np.shape(decode_video(path, size=(20, 30)).frames) == (1, 20, 30, 3)


def test_portrait_phone_matrix_turns_clockwise(tmp_path):
    """The matrix phones write for a portrait recording: x' = -y, y' = x, clockwise on screen."""
    path = tmp_path / "phone.mp4"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.set_display_matrix([0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30])
        out.mux(stream.encode(av.VideoFrame.from_ndarray(quadrants(), format="rgb24")))
        out.mux(stream.encode())
    frame = decode_video(path).frames[0]
    assert frame.shape == (64, 48, 3)
    corners = frame[[8, 8, -8, -8], [8, -8, 8, -8]].astype(int)
    # stored red, green / blue, white; a clockwise quarter turn gives blue, red / white, green
    expected = [[0, 0, 255], [255, 0, 0], [255, 255, 255], [0, 255, 0]]
    np.testing.assert_allclose(corners, expected, atol=12)


@pytest.mark.parametrize(
    ("pix_fmt", "codec", "tolerance"),
    [
        ("yuv444p", "libx264", 2),
        ("yuv422p12le", "ffv1", 4),
        ("yuva420p", "ffv1", 6),  # chroma bleeds over the odd border
        ("bgra", "ffv1", 0),
        ("rgb48le", "ffv1", 0),
    ],
)
def test_odd_sizes_deep_colours_and_alpha(tmp_path, pix_fmt, codec, tolerance):
    picture = quadrants(47, 63)
    path = write_video(tmp_path / "odd.mkv", np.stack([picture] * 2), codec=codec, pix_fmt=pix_fmt)
    video = decode_video(path)
    assert np.shape(video.frames) == (1, 47, 63, 3)
    assert np.abs(video.frames[0].astype(int) - picture).mean() <= tolerance


@pytest.mark.parametrize(
    ("pix_fmt", "codec"), [("gray", "ffv1"), ("gray16le", "ffv1"), ("yuv420p10le", "libx264")]
)
def test_grey_and_ten_bit_levels(tmp_path, pix_fmt, codec):
    frames = solid_frames([30, 120, 210])
    path = write_video(tmp_path / "grey.mkv", frames, fps=2, codec=codec, pix_fmt=pix_fmt)
    np.testing.assert_allclose(np.asarray(decode_video(path).frames, int), frames, atol=3)


def test_hd_colour_matrix_is_honoured(tmp_path):
    """BT.709 red is Y 63, Cb 102, Cr 240; read by the BT.601 matrix its green would be 24."""
    path = tmp_path / "red709.mkv"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("ffv1", rate=2)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv444p"
        stream.codec_context.colorspace = 1  # BT.709 in ITU-T H.273
        planes = np.broadcast_to(np.uint8([63, 102, 240])[:, None, None], (3, 48, 64))
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(planes), format="yuv444p")
        frame.colorspace = 1
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    np.testing.assert_allclose(decode_video(path).frames[0][24, 32], [255, 0, 0], atol=3)


@pytest.mark.parametrize(("resize", "other"), [("bilinear", "bicubic"), ("bicubic", "bilinear")])
def test_pictures_are_resized_with_the_kernel_asked_for_and_antialias(tmp_path, resize, other):
    # Gray, since FFmpeg halves the chroma of RGB on the way.
    gray = np.random.default_rng(0).integers(0, 256, (240, 320, 1)).astype(np.uint8).repeat(3, 2)
    path = write_video(tmp_path / "noise.mkv", gray[None], codec="ffv1", pix_fmt="bgra")
    ours = decode_video(path, size=(60, 100), resize=resize).frames[0].astype(int)

    def difference(kernel: str) -> float:
        pil = Image.fromarray(gray).resize((100, 60), Image.Resampling[kernel.upper()])
        return np.abs(ours - np.asarray(pil).astype(int)).mean()

    # Of 255. PIL's cubic has a = -0.5, FFmpeg's -0.6.
    assert difference(resize) < 1
    assert difference(other) > 3
    assert difference("nearest") > 30


def test_change_peaks_exactly_at_hard_cuts(tmp_path):
    rng = np.random.default_rng(1)
    cuts = [0, 11, 30, 31, 52]  # the first shot starts at 0; one shot is a single frame long
    frames = np.empty((70, 48, 64, 3), np.uint8)
    for start, end in zip(cuts, [*cuts[1:], 70], strict=True):
        shot = rng.integers(0, 230, (3, 4, 3)).repeat(16, axis=0).repeat(16, axis=1)
        for i in range(start, end):  # a slow pan within the shot
            frames[i] = np.roll(shot, i - start, axis=1)
    change = decode_video(write_video(tmp_path / "cuts.mp4", frames)).change
    assert change[0] == 0
    assert sorted(np.argsort(-change)[:4].tolist()) == cuts[1:]
    within = np.delete(change, cuts)
    assert change[cuts[1:]].min() > 2 * within.max()


def test_change_is_a_fraction_of_full_scale(tmp_path):
    frames = solid_frames([0, 255, 0])
    path = write_video(tmp_path / "flash.mkv", frames, codec="ffv1", pix_fmt="bgra")
    np.testing.assert_allclose(decode_video(path).change, [0, 1, 1], atol=0.01)


def test_packets_without_timestamps_are_spaced_by_the_rate(tmp_path):
    """A raw H.264 stream carries no clock at all; 25 fps is FFmpeg's assumption."""
    path = tmp_path / "bare.h264"
    with av.open(str(path), "w", format="h264") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.options = {"bf": "2"}
        for picture in solid_frames(np.arange(25) * 10):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        out.mux(stream.encode())
    video = decode_video(path, frame_rate=5.0)
    assert video.info.n_frames == 25
    np.testing.assert_allclose(video.native_times, np.arange(25) / 25)
    assert _grey(video.frames).tolist() == [0, 50, 100, 150, 200]
    assert any("no usable timestamp" in note for note in video.info.notes)


def test_truncated_mp4_with_its_index_in_front_is_used_as_far_as_it_goes(tmp_path, whole_mp4):
    data = whole_mp4.read_bytes()
    path = tmp_path / "cut.mp4"
    path.write_bytes(data[: int(0.6 * len(data))])
    info = decode_video(path).info
    assert 1.0 < info.duration_s < 4.5
    assert info.notes[0] == f"the file ends early: {info.duration_s:.1f} s of 5.0 s decode"


def test_truncated_matroska_is_noted(tmp_path):
    whole = write_video(tmp_path / "whole.mkv", _cells(120), options={"g": "24", "crf": "20"})
    data = whole.read_bytes()
    path = tmp_path / "cut.mkv"
    path.write_bytes(data[: int(0.6 * len(data))])
    info = decode_video(path).info
    assert 1.0 < info.duration_s < 4.5
    assert info.notes[0].startswith("the file ends early: ")


def test_damaged_packets_are_skipped_and_noted(tmp_path, whole_mp4):
    data = bytearray(whole_mp4.read_bytes())
    with av.open(str(whole_mp4)) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    for at, size in packets[48:52]:  # a length beyond the packet, then noise
        data[at : at + size] = struct.pack(">I", 0x7FFFFFFF) + bytes(size - 4)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    video = decode_video(path, frame_rate=24.0)
    assert 96 <= video.info.n_frames < 120  # at most the 24 frames up to the next key frame
    assert video.info.duration_s == pytest.approx(5.0)
    assert any("damaged packets were skipped" in note for note in video.info.notes)


def test_file_of_which_nothing_decodes_is_refused(tmp_path, whole_mp4):
    data = bytearray(whole_mp4.read_bytes())
    at = data.index(b"mdat") + 4
    data[at:] = bytes(len(data) - at)
    path = tmp_path / "hollow.mp4"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"no frame of its h264 video stream decodes \[.*\]"):
        decode_video(path)


@pytest.mark.parametrize("wrong", [{"frame_rate": 0}, {"frame_rate": np.nan}, {"size": (0, 8)}])
def test_nonsense_sampling_is_refused(whole_mp4, wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        decode_video(whole_mp4, **wrong)


@pytest.mark.parametrize(
    ("name", "duration_s", "n_frames", "shape", "has_audio"),
    [
        ("clips/big_buck_bunny_30s.webm", 30.0, 720, (720, 1280), True),
        ("clips/bikes_no_audio.mp4", 10.0, 250, (272, 640), False),
        ("clips/flower_silent_audio.mp4", 5.005, 150, (540, 960), True),
        ("clips/nasa_multi_stream.mp4", 13.0, 325, (180, 320), True),
        ("clips/pancake_opus.mkv", 10.333, 310, (240, 426), True),
        ("clips/speech_friday.mp4", 6.167, 185, (480, 640), True),
    ],
)
def test_real_clips(shared_data, name, duration_s, n_frames, shape, has_audio):
    video = decode_video(shared_data / name, size=(56, 56))
    info = video.info
    assert info.duration_s == pytest.approx(duration_s, abs=0.002)
    assert info.n_frames == n_frames == len(video.native_times) == len(video.change)
    assert (info.height, info.width) == shape
    assert info.has_audio == has_audio
    assert info.notes == ()
    assert np.shape(video.frames) == (int(np.ceil(2 * info.duration_s)), 56, 56, 3)


def test_largest_changes_of_a_real_film_are_its_cuts(shared_data):
    video = decode_video(shared_data / "clips/tears_of_steel_70s.webm", frame_rate=1, size=(28, 28))
    # looked at as pictures, two frames before and after each
    cuts = [52, 158, 221, 309, 1203, 1234, 1246, 1284, 1345, 1378]
    assert sorted(np.argsort(-video.change)[:10].tolist()) == cuts


def test_others_see_the_same_frames_in_their_own_size(tmp_path):
    path = write_video(
        tmp_path / "steady.mp4", solid_frames(np.arange(24) * 10), fps=8, rotation=90
    )
    small, same, native = [], [], []
    video = decode_video(
        path,
        frame_rate=16.0,
        size=(10, 20),
        others=[
            View(see=small.append, size=(6, 4), resize="bicubic"),
            View(see=same.append, size=(10, 20)),
            View(see=native.append),
        ],
    )
    assert np.shape(video.frames) == (48, 10, 20, 3)
    assert (np.shape(small), np.shape(native)) == ((48, 6, 4, 3), (48, 64, 48, 3))
    np.testing.assert_array_equal(same, video.frames)
    for seen in (small, same, native):
        assert seen[0] is seen[1] is not seen[2]  # on screen for two samples
        assert _grey(seen).tolist() == np.repeat(np.arange(24) * 10, 2).tolist()


def test_a_size_that_another_wants_is_checked_too(tmp_path):
    path = write_video(tmp_path / "a.mp4", solid_frames([0]))
    with pytest.raises(UserError, match=r"got \(0, 4\)"):
        decode_video(path, size=(4, 4), others=[View(see=print, size=(0, 4))])
