"""Needles in haystacks: what is drawn, how it is judged, and what keyframes are worth there."""

import h5py
import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.keyframes import haystack
from deevisum_jax.keyframes.haystack import HaystackConfig, SceneConfig
from deevisum_jax.keyframes.selection import SelectionConfig
from scripts import haystack as script
from tests.media import solid_frames, write_video
from tests.siglip_reference import reference

# Frames are numbers that no two share, in pieces of the circle that videos do not share either.
LENGTHS = (30, 25, 40, 35)
ANGLES = [0.3 * v + 0.005 * (np.arange(T) + 1) for v, T in enumerate(LENGTHS)]
VIDEOS = [np.stack([np.cos(a), np.sin(a)], axis=1) for a in ANGLES]
# All frames of a video are one direction, which is at a right angle to those of the others.
ONE_HOT = [
    np.tile(row, (T, 1)) for row, T in zip(np.eye(4, dtype=np.float32), LENGTHS, strict=True)
]


@pytest.mark.parametrize("num_needles", [1, 2])
def test_needles_are_clips_of_other_videos_without_the_frame_that_asks(num_needles):
    config = HaystackConfig(
        num_frames=60, frame_rate=2, needle_s=(2.0, 4.0), num_needles=num_needles
    )
    assert config.clip_frames == (4, 8)
    lengths, asked = set(), set()
    for seed in range(60):
        drawn = haystack.draw(VIDEOS, config, np.random.default_rng(seed))
        angles = np.arctan2(drawn.embeddings[:, 1], drawn.embeddings[:, 0])
        video = np.round(angles // 0.3).astype(int)
        frame = np.round((angles - 0.3 * video) / 0.005 - 1).astype(int)
        assert len(angles) == 60
        np.testing.assert_array_equal(video, drawn.video)
        hay = drawn.needle < 0
        for i in range(num_needles):
            (at,) = np.nonzero(drawn.needle == i)
            np.testing.assert_array_equal(np.diff(at), 1)
            assert len(set(video[at])) == 1
            assert video[at[0]] not in video[hay]
            # A clip in a row, less one frame of it.
            steps = np.diff(frame[at])
            assert steps.min() == 1
            assert np.sum(steps == 2) <= 1
            assert steps.max() <= 2
            lengths.add(len(at) + 1)
            if num_needles == 1:
                asking = (np.arctan2(*drawn.query[::-1]) - 0.3 * video[at[0]]) / 0.005 - 1
                assert asking == pytest.approx(round(asking), abs=1e-3)
                asking = round(asking)
                assert asking not in frame[at]
                assert frame[at[0]] - 1 <= asking <= frame[at[-1]] + 1
                asked.add(asking - frame[at[0]])
        # Hay is whole videos, the last one cut off.
        kept = [frame[hay & (video == v)] for v in dict.fromkeys(video[hay])]
        for frames in kept:
            np.testing.assert_array_equal(frames, range(len(frames)))
    assert lengths == {4, 5, 6, 7, 8}
    if num_needles == 1:
        assert {-1, 1, 2} <= asked  # the first of a clip, and those within


def test_what_is_found_is_counted_by_hand():
    config = HaystackConfig(num_frames=60, frame_rate=2, needle_s=(3.0, 3.0), num_needles=2)
    found = haystack.search(
        ONE_HOT,
        {
            "everything": lambda frames, query, rng: np.arange(len(frames)),
            "nothing alike": lambda frames, query, rng: np.argsort(frames @ query)[:3],
            "the frames asked for": lambda frames, query, rng: np.nonzero(frames @ query)[0],
            "one of them": lambda frames, query, rng: np.nonzero(frames @ query)[0][[0, 1]],
        },
        config,
        num_haystacks=6,
        seed=0,
    )
    assert [each.recall for each in found.values()] == [1.0, 0.0, 1.0, 0.5]
    # Two clips of five frames each: of 45 pairs 20 are of one clip, and equal.
    asked = found["the frames asked for"]
    assert asked.num_videos == 2
    assert asked.redundancy == pytest.approx(20 / 45)
    assert found["one of them"].num_videos == 1
    assert found["one of them"].redundancy == pytest.approx(1)
    # 60 frames, less 10, are never one video alone here; two is all that is left for hay.
    assert found["everything"].num_videos == 4


def test_a_single_keyframe_has_no_redundancy():
    config = HaystackConfig(num_frames=60, frame_rate=2)
    one = {"one": lambda frames, query, rng: np.array([3])}
    found = haystack.search(VIDEOS, one, config, num_haystacks=2, seed=0)
    assert np.isnan(found["one"].redundancy)


def test_a_seed_fixes_the_haystacks_whoever_searches_them():
    config = HaystackConfig(num_frames=60, frame_rate=2)
    seen: dict[str, list[np.ndarray]] = {"a": [], "b": []}

    def method(name):
        def choose(frames, query, rng):
            seen[name].append(frames)
            return rng.integers(len(frames), size=3)

        return choose

    both = haystack.search(
        VIDEOS, {name: method(name) for name in seen}, config, num_haystacks=3, seed=1
    )
    alone = haystack.search(VIDEOS, {"a": method("a")}, config, num_haystacks=3, seed=1)
    assert alone["a"] == both["a"]
    for first, second, again in zip(seen["a"][:3], seen["b"], seen["a"][3:], strict=True):
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, again)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_frames": 0}, "at least 1 frame, got num_frames 0"),
        ({"num_needles": 0}, "num_needles must be at least 1, got 0"),
        ({"frame_rate": 0.0}, "frame_rate must be a positive number"),
        ({"frame_rate": float("nan")}, "frame_rate must be a positive number"),
        ({"needle_s": (5.0, 2.0)}, "a shortest and a longest length in seconds"),
        ({"needle_s": (0.5, 2.0)}, "a needle of 0.5 s has less than 2 frames at 2 frames"),
        ({"needle_s": (2.1, 2.2)}, "no whole number of frames lasts 2.1 to 2.2 s"),
    ],
)
def test_haystacks_that_are_none_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        HaystackConfig(**fields)


def test_lengths_of_needles_are_whole_frames():
    config = HaystackConfig(frame_rate=30, needle_s=(0.1, 0.34))
    assert config.clip_frames == (3, 10)


@pytest.mark.parametrize(
    ("videos", "fields", "message"),
    [
        (VIDEOS[:1], {}, "want at least 2 videos, got 1"),
        (VIDEOS, {"num_needles": 4}, "4 needles in frames of other videos want at least 5 videos"),
        # 25 + 30 + 35 frames when the needle is of the longest, and 3 of the shortest needle.
        (VIDEOS, {"num_frames": 94}, "94 frames of other videos is wanted, .* surely give 93 only"),
        (VIDEOS, {"needle_s": (2.0, 13.0)}, "of 13 s has 26 frames, but video 1 only 25"),
        ([*VIDEOS, np.ones((30, 3))], {}, r"video 4 has .* \[30, 3\], wanted \[frames, 2\]"),
        ([*VIDEOS, np.ones(30)], {}, r"video 4 has embeddings of shape \[30\]"),
        ([*VIDEOS, np.full((30, 2), np.nan)], {}, "video 4: the embedding of frame 0 is not"),
    ],
)
def test_videos_that_give_no_such_haystack_are_refused(videos, fields, message):
    config = HaystackConfig(**({"num_frames": 60} | fields))
    with pytest.raises(UserError, match=message):
        haystack.search(videos, {}, config, num_haystacks=1, seed=0)


def test_the_longest_haystack_that_is_promised_can_be_drawn():
    config = HaystackConfig(num_frames=93)
    for seed in range(30):
        drawn = haystack.draw(VIDEOS, config, np.random.default_rng(seed))
        assert len(drawn.embeddings) == 93


def test_no_haystacks_and_needles_that_overflow_are_refused():
    with pytest.raises(UserError, match="num_haystacks must be at least 1, got 0"):
        haystack.search(VIDEOS, {}, HaystackConfig(num_frames=60), num_haystacks=0, seed=0)
    config = HaystackConfig(num_frames=5, needle_s=(10.0, 10.0))
    with pytest.raises(UserError, match="have more than 5 frames together"):
        haystack.search(VIDEOS, {}, config, num_haystacks=1, seed=0)


def test_centred_embeddings_have_no_common_direction():
    videos = haystack.centred([np.array([[2.0, 0], [0, 1]]), np.array([[0, -3.0], [0, 5]])])
    # Of unit embeddings (1, 0), (0, 1), (0, -1), (0, 1) the mean is (1/4, 1/4).
    np.testing.assert_allclose(videos[0], [[0.75, -0.25], [-0.25, 0.75]])
    np.testing.assert_allclose(videos[1], [[-0.25, -1.25], [-0.25, 0.75]])


def test_made_up_scenes_are_as_alike_as_they_say():
    config = SceneConfig(num_videos=40, video_frames=(100, 200), scene_frames=(20, 20))
    videos = haystack.draw_scenes(config, np.random.default_rng(0))
    assert len(videos) == 40
    assert {len(video) for video in videos} <= set(range(100, 201))
    for video in videos:
        np.testing.assert_allclose(np.linalg.norm(video, axis=1), 1, atol=1e-5)
    quantiles = haystack.cosine_quantiles(videos, np.random.default_rng(1))
    # Medians: 0.6; 0.6 + 0.12; 0.6 + 0.12 + 0.98 * 0.25 within a scene. Few videos are drawn.
    assert quantiles["other videos"][1] == pytest.approx(0.60, abs=0.03)
    assert quantiles["same video"][1] == pytest.approx(0.74, abs=0.03)
    assert quantiles["neighbours"][1] == pytest.approx(0.965, abs=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"common": 0.9}, "are shares of 1, none negative, got 0.9, 0.12 and 0.25"),
        ({"of_scene": -0.1}, "none negative"),
        ({"drift": 1.1}, r"drift is a correlation in \[0, 1\], got 1.1"),
        ({"rank": 600}, r"rank must lie in \[2, width\], got rank 600 and width 512"),
        ({"scene_frames": (5, 4)}, r"scene_frames must be a fewest and a most, got \(5, 4\)"),
        ({"num_videos": 0}, "num_videos must be at least 1"),
    ],
)
def test_scenes_that_are_none_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        SceneConfig(**fields)


def test_keyframes_hold_the_needle_where_evenly_spaced_frames_do_not():
    videos = haystack.draw_scenes(
        SceneConfig(num_videos=12, video_frames=(100, 200), width=64),
        np.random.default_rng(0),
    )
    ways = script.methods(SelectionConfig(num_keyframes=8), [0.7])
    config = HaystackConfig(num_frames=1000)
    found = haystack.search(videos, ways, config, num_haystacks=20, seed=0)
    assert found["DKS"].recall >= 0.95
    assert found["uniform"].recall < 0.2
    # What the difference is for: the most relevant frames are one moment again and again.
    assert found["DKS"].redundancy < found["most relevant K"].redundancy - 0.1
    assert found["DKS"].num_videos > found["most relevant K"].num_videos


def test_ten_thousand_real_frames(shared_data):
    videos = script.read_features(str(shared_data / "features" / "tvsum_squeezenet_fire9.h5"))
    ways = script.methods(SelectionConfig(), [])
    ways = {name: ways[name] for name in ("DKS", "most relevant K", "uniform")}
    found = haystack.search(videos, ways, HaystackConfig(), num_haystacks=20, seed=0)
    assert found["DKS"].recall >= 0.95
    assert found["uniform"].recall < 0.2
    assert found["DKS"].redundancy < found["most relevant K"].redundancy


SMALL = ["--frames", "300", "200", "--seeds", "2", "--haystacks", "2", "--together", "2"]


def test_tables_of_a_file_of_features(tmp_path, capsys):
    videos = haystack.draw_scenes(
        SceneConfig(num_videos=6, video_frames=(80, 120), width=32), np.random.default_rng(0)
    )
    with h5py.File(tmp_path / "features.h5", "w") as file:
        for v, frames in enumerate(videos):
            file[f"video_{v + 1}/features"] = frames.astype(np.float16)
    flags = ["--features", str(tmp_path / "features.h5"), *SMALL, "--num_keyframes", "8"]
    assert script.main([*flags, "--center"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(
        f"6 videos, {sum(map(len, videos))} frames, embeddings of width 32: `features` of "
        "features.h5; less their mean. Cosines (5 %, 50 %, 95 %): neighbours "
    )
    assert "2 seeds x 2 haystacks with one needle of 2 to 10 s at 2 frames per second" in lines[2]
    assert "2 seeds x 1 haystacks with 2 needles, asked for together, of 2 to 10 s" in "".join(
        lines
    )
    (head, _) = (line for line in lines if line.startswith("| method"))
    assert "| recall, 200 frames | recall, 300 frames |" in head
    rows = [line.split(" | ")[0] for line in lines if line.startswith("| ")]
    names = ["DKS", "DKS, budget not filled", "most relevant K", "MMR, lambda 0.3",
             "MMR, lambda 0.7", "K-means", "uniform"]  # fmt: skip
    assert rows == 2 * ["| method", *(f"| {name}" for name in names)]
    assert any(line.startswith("| DKS | 100.0 (100.0 to 100.0) | 100.0 (") for line in lines)


def test_made_up_embeddings_where_nothing_is_given(capsys):
    flags = ["--frames", "200", "--seeds", "1", "--haystacks", "1", "--together", "1"]
    assert script.main(flags) == 0
    assert ": made up: SceneConfig(num_videos=50, " in capsys.readouterr().out


def test_frames_of_files_are_embedded_by_a_model(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for v, seconds in enumerate((20, 17, 22)):
        levels = np.repeat(rng.uniform(0, 255, seconds), 2)
        write_video(tmp_path / f"{v}.mp4", solid_frames(levels), fps=2)
    flags = ["--videos", str(tmp_path), "--frames", "60", "--seeds", "1", "--haystacks", "2",
             "--together", "1", "--needle_s", "2", "4", "--num_keyframes", "8"]  # fmt: skip
    assert script.main(flags) == 0
    about = "3 videos, 118 frames, embeddings of width 16: frames of 3 files by "
    assert capsys.readouterr().out.startswith(
        f"{about}siglip_tiny with freshly drawn weights, which have learned nothing. Cosines"
    )
    reference().theirs.save_pretrained(tmp_path / "siglip")
    assert script.main([*flags, "--model", str(tmp_path / "siglip")]) == 0
    assert capsys.readouterr().out.startswith(f"{about}siglip. Cosines")


def _write(path, **fields):
    with h5py.File(path, "w") as file:
        for name, value in fields.items():
            file[name] = value


@pytest.mark.parametrize(
    ("make", "flags", "messages"),
    [
        (None, ["--features", "PATH"], ["file is no file; give an HDF5 file of features"]),
        (
            lambda path: path.write_text("no features"),
            ["--features", "PATH"],
            ["file is not an HDF5 file", "download it again"],
        ),
        (
            lambda path: _write(path, features=np.ones((100, 4))),
            ["--features", "PATH"],
            ["'features': no group of a video with `features`", "the community's layout"],
        ),
        (
            lambda path: _write(path, **{"video_1/embedding": np.ones((100, 4))}),
            ["--features", "PATH"],
            ["'video_1': no group of a video with `features`"],
        ),
        (
            lambda path: _write(path, **{"video_1/features": np.ones(100)}),
            ["--features", "PATH"],
            ["'video_1': no group of a video with `features`, a table"],
        ),
        (lambda path: _write(path), ["--features", "PATH"], ["want at least 2 videos, got 0"]),
        (
            lambda path: _write(
                path, **{f"video_{v}/features": np.ones((100, 4)) for v in range(9)}
            ),
            ["--features", "PATH"],
            ["a haystack of 2,000 frames of other videos is wanted", "surely give 803 only"],
        ),
        (None, ["--videos", "PATH"], ["file is no folder"]),
        (lambda path: path.mkdir(), ["--videos", "PATH"], ["file holds no video files"]),
        (None, ["--tau", "2"], ["tau"]),
        (None, ["--frames", "0"], ["at least 1 frame"]),
        (None, ["--needle_s", "2", "1000"], ["a needle of 1000 s has 2000 frames, but video"]),
    ],
)
def test_what_cannot_be_searched_is_named(make, flags, messages, tmp_path, capsys):
    path = tmp_path / "file"
    if make is not None:
        make(path)
    assert script.main([str(path) if flag == "PATH" else flag for flag in flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for message in messages:
        assert message in error


def test_a_video_that_is_none_and_a_model_that_is_none_are_named(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    assert script.main(["--videos", str(tmp_path)]) == 2
    assert "a.mp4" in capsys.readouterr().err
    assert script.main(["--videos", str(tmp_path), "--variant", "siglip_tin"]) == 2
    assert "did you mean 'siglip_tiny'?" in capsys.readouterr().err
    assert script.main(["--videos", str(tmp_path), "--model", str(tmp_path / "gone")]) == 2
    assert "gone is no folder with a SigLIP" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--features", "a", "--videos", "b"], "give --features or --videos, not both"),
        (["--model", "a"], "--model is of a model that embeds --videos"),
        (
            ["--videos", "a", "--model", "b", "--variant", "siglip_tiny"],
            "--variant is of fresh weights; a --model has sizes of its own",
        ),
        (["--seeds", "0"], "--seeds 0: give 1 or more"),
        (["--mmr_lambda", "0.5", "2"], "--mmr_lambda 2: give shares in [0, 1]"),
    ],
)
def test_flags_that_do_not_fit_are_refused(flags, message, capsys):
    with pytest.raises(SystemExit):
        script.main(flags)
    assert message in capsys.readouterr().err
