"""Shots: exact borders on synthetic cuts and on real films."""

import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.summary import shots


def film(cuts, n_frames, *, fps=24.0, frame_rate=2.0, seed=0):
    """Flat-coloured noise shots: sampled frames, their times, the native timeline, `change`."""
    rng = np.random.default_rng(seed)
    shot = np.searchsorted(cuts, np.arange(n_frames), side="right")
    pictures = rng.integers(0, 256, (len(cuts) + 1, 12, 16, 3), np.uint8)
    native_times = np.arange(n_frames) / fps
    change = np.full(n_frames, 0.004, np.float32)
    change[0], change[cuts] = 0.0, 0.3
    frame_times = np.arange(0, n_frames / fps, 1 / frame_rate)
    on_screen = np.searchsorted(native_times, frame_times + 1e-9, side="right") - 1
    return pictures[shot[on_screen]], frame_times, native_times, change


def detect(sample, **options):
    frames, frame_times, native_times, change = sample
    options = {"max_shot_s": None} | options
    return shots.detect_shots(
        frames, frame_times, native_times=native_times, change=change, **options
    )


def test_borders_are_the_frames_of_the_cuts():
    # 24 fps sampled twice a second: none of these cuts falls on a sampled frame (every 12th).
    found = detect(film([50, 101, 190], 300))
    assert [s.start_frame for s in found] == [0, 50, 101, 190]
    assert [s.end_frame for s in found] == [50, 101, 190, 300]
    assert found[1].start_s == pytest.approx(50 / 24)
    assert found[-1].end_s == pytest.approx(300 / 24)  # the last frame has a length too


def test_without_a_clear_peak_the_border_stays_on_the_sampled_frame():
    frames, frame_times, native_times, change = film([50], 120)
    change[:] = 0.1  # a moving camera all along
    found = detect((frames, frame_times, native_times, change))
    assert [s.start_frame for s in found] == [0, 60]  # first sampled frame after frame 50


def test_long_shots_are_split_into_equal_parts():
    found = detect(film([48], 240), max_shot_s=3.0)  # shots of 2 s and 8 s
    assert [(s.start_frame, s.end_frame) for s in found] == [
        (0, 48), (48, 112), (112, 176), (176, 240)
    ]  # fmt: skip


def test_with_the_shot_limit_a_budget_can_always_be_used():
    for seconds in (2, 7, 60):
        n_frames = seconds * 24
        limit_s = shots.shot_limit_s(float(seconds))
        found = detect(film([], n_frames), max_shot_s=limit_s)
        longest = max(s.end_frame - s.start_frame for s in found)
        assert longest <= 0.15 * n_frames
        assert found[0].start_frame == 0
        assert found[-1].end_frame == n_frames
    assert shots.shot_limit_s(3600.0) == 5.0


def test_a_large_budget_asks_for_small_parts():
    assert shots.shot_limit_s(6.0, 0.3) == pytest.approx(1.8)
    assert shots.shot_limit_s(6.0, 0.9) == 1.0
    assert shots.shot_limit_s(30.0, 0.5) == 3.0
    assert shots.shot_limit_s(3600.0, 0.5) == 5.0


def test_no_scraps_at_the_ends_and_no_doubled_border():
    # A flash (frames 100 to 102) and a cut three frames before the end.
    found = detect(film([100, 103, 237], 240))
    assert [s.start_frame for s in found] == [0, 100]


def test_windows_of_a_long_video_meet_at_cuts(monkeypatch):
    cuts = np.arange(60, 1200, 60) + 5
    whole = detect(film(cuts, 1200))
    monkeypatch.setattr(shots, "_WINDOW", 24)
    assert detect(film(cuts, 1200)) == whole
    assert [s.start_frame for s in whole[1:]] == list(cuts)


def test_variable_frame_rate_uses_times_not_counts():
    frames, frame_times, native_times, change = film([60], 120)
    keep = np.r_[0:60:3, 60:120]  # the first shot lost two frames of three
    found = detect((frames, frame_times, native_times[keep], change[keep]), max_shot_s=1.3)
    assert [s.start_frame for s in found] == [0, 10, 20, 50]
    assert found[1].start_s == pytest.approx(1.25)


def test_a_picture_that_is_held_for_long_leaves_the_frames_around_it_together():
    """As in a recording of a screen: 4 s at 24 fps, one picture for 30 s, 8 s at 24 fps."""
    native_times = np.concatenate([np.arange(96) / 24, 34 + np.arange(192) / 24])
    native_times[96:] += 1 / 24  # frame 95 is the one that stays
    frame_times = np.arange(0, 42, 0.5)
    found = shots.detect_shots(
        np.full((len(frame_times), 12, 16, 3), 99, np.uint8),
        frame_times,
        native_times=native_times,
        change=np.zeros(len(native_times)),
        max_shot_s=5.0,
    )
    assert [(s.start_frame, s.end_frame) for s in found] == [
        (0, 95), (95, 96), (96, 168), (168, 288)
    ]  # fmt: skip


def test_a_picture_that_is_held_for_almost_as_long_as_a_shot_may_last_makes_no_scraps():
    lasts = np.full(400, 1 / 20)
    lasts[100] = 4.9
    edges = np.concatenate([[0.0], np.cumsum(lasts)])  # 24.85 s
    parts = shots._split(0, 400, edges, 5.0)
    assert [start for start, _ in parts[1:]] == [end for _, end in parts[:-1]]
    assert (parts[0][0], parts[-1][1]) == (0, 400)
    lengths = [edges[end] - edges[start] for start, end in parts]
    assert max(lengths) <= 5.0 + 1e-9
    assert len(parts) <= 7


@pytest.mark.parametrize("seed", range(20))
def test_parts_of_a_shot_are_the_fewest_and_none_is_too_long(seed):
    rng = np.random.default_rng(seed)
    lasts = rng.choice([0.04, 0.2, 1.0, 3.0], rng.integers(2, 60), p=[0.4, 0.3, 0.2, 0.1])
    edges, limit_s = np.concatenate([[0.0], np.cumsum(lasts)]), 2.0
    parts = shots._split(0, len(lasts), edges, limit_s)
    assert [start for start, _ in parts] == [0, *(end for _, end in parts[:-1])]
    assert parts[-1][1] == len(lasts)
    assert all(end > start for start, end in parts)
    assert all(edges[b] - edges[a] <= limit_s + 1e-9 for a, b in parts if b > a + 1)
    fewest = at = 0
    while at < len(lasts):  # as many frames as fit, again and again
        fewest, stop = fewest + 1, at + 1
        while stop < len(lasts) and edges[stop + 1] - edges[at] <= limit_s + 1e-9:
            stop += 1
        at = stop
    assert len(parts) == fewest


def test_one_frame_is_one_shot():
    found = detect(film([], 1))
    assert [(s.start_frame, s.end_frame) for s in found] == [(0, 1)]


def test_descriptors_are_unit_vectors_that_tell_pictures_apart():
    red = np.zeros((1, 20, 30, 3), np.uint8)
    red[..., 0] = 250
    left_right = red.copy()
    left_right[:, :, 15:] = 0
    x = shots.frame_descriptors(np.concatenate([red, red, left_right, left_right[:, :, ::-1]]))
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)
    products = x @ x.T
    assert products[0, 1] == pytest.approx(1)
    assert products[0, 2] < 0.95
    assert products[2, 3] < 0.95  # the same colours elsewhere


def test_descriptors_of_flat_mid_grey_are_finite():
    x = shots.frame_descriptors(np.full((1, 5, 5, 3), 127, np.uint8))
    np.testing.assert_allclose(np.linalg.norm(x, axis=1), 1, rtol=1e-5)


def test_says_what_is_wrong():
    frames, frame_times, native_times, change = film([], 24)
    with pytest.raises(UserError, match="uint8"):
        shots.frame_descriptors(frames.astype(float))
    with pytest.raises(UserError, match="one value per native frame"):
        detect((frames, frame_times, native_times, change[1:]))
    with pytest.raises(UserError, match="frame times"):
        detect((frames[1:], frame_times, native_times, change))
    with pytest.raises(UserError, match="max_shot_s"):
        detect((frames, frame_times, native_times, change), max_shot_s=0)


def test_cuts_of_a_real_film(shared_data):
    """Hard cuts of Tears of Steel as seen by eye, to the frame; a pan and a dolly are not cuts."""
    from deevisum_jax.data.video import decode_video

    video = decode_video(
        shared_data / "clips" / "tears_of_steel_70s.webm", frame_rate=2.0, size=(90, 160)
    )
    found = detect((video.frames, video.frame_times, video.native_times, video.change))
    starts = {s.start_frame for s in found}
    by_eye = {52, 122, 158, 221, 309, 715, 788, 872, 901, 987, 1127, 1203, 1234, 1246, 1284, 1345}
    by_eye |= {1378, 1525, 1571, 1618}
    assert by_eye <= starts
    assert len(found) < 40
