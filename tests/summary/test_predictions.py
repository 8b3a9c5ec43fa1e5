"""Predictions from files: all forms give the same numbers, and every mistake is named."""

import io
import json
import lzma
import os
import zipfile

import h5py
import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.summary import predictions, protocols
from deevisum_jax.summary.protocols import Protocol, VideoGroundTruth

IDS = ("alpha", "beta")
FPS, N_FRAMES = 10.0, 100  # picks at frames 0, 15, ..., 90: seven of them
HALF = Protocol(budget=0.5)


def truth(video_id="alpha"):
    rng = np.random.default_rng(0)
    return VideoGroundTruth(
        video_id=video_id,
        n_frames=N_FRAMES,
        native_fps=FPS,
        duration_s=N_FRAMES / FPS,
        score_times=(np.arange(0, N_FRAMES, 15) + 0.5) / FPS,
        user_scores=rng.integers(1, 6, (3, 7)).astype(float),
        user_summary=rng.random((3, N_FRAMES)) < 0.3,
        shots=np.array([[0, 20], [20, 45], [45, 70], [70, 100]]),
    )


PICKED = np.array([0.3, 0.9, 0.1, 0.8, 0.5, 0.2, 0.7])
PER_FRAME = np.repeat(PICKED, [15, 15, 15, 15, 15, 15, 10])
BOUNDS = np.array([[k / FPS, (k + 15) / FPS] for k in range(0, N_FRAMES, 15)])


def write_json(path, content):
    path.write_text(json.dumps(content, default=lambda array: array.tolist()))


def write_npz(path, content):
    flat = {}
    for video, value in content.items():
        for name, array in value.items() if isinstance(value, dict) else [(None, value)]:
            flat[video if name is None else f"{video}/{name}"] = array
    with path.open("wb") as stream:  # under any name
        np.savez(stream, **flat)


def write_hdf5(path, content):
    with h5py.File(path, "w") as file:
        for video, value in content.items():
            for name, array in value.items() if isinstance(value, dict) else [(None, value)]:
                file[video if name is None else f"{video}/{name}"] = array


WRITERS = (write_json, write_npz, write_hdf5)


@pytest.fixture(params=WRITERS, ids=["json", "npz", "hdf5"])
def write(request, tmp_path):
    """Writes a file of one of the three kinds, whose name does not tell which."""

    def write(content):
        request.param(tmp_path / "scores", content)
        return str(tmp_path / "scores")

    return write


def evaluate(path, video="alpha"):
    return predictions.evaluate(predictions.read(path, IDS, [video])[video], truth(video), HALF)


@pytest.mark.parametrize(
    "value",
    [
        PER_FRAME,
        PICKED,
        {"scores": PICKED},
        {"scores": PICKED, "picks": np.arange(0, N_FRAMES, 15)},
        {"scores": PER_FRAME.astype(np.float32)},
        {"scores": PICKED, "bounds": BOUNDS},
    ],
    ids=["per frame", "per pick", "field", "picks", "float32", "segments"],
)
def test_all_forms_give_the_same_numbers(write, value):
    expected = protocols.evaluate_frames(truth(), PER_FRAME, HALF)
    found = evaluate(write({"alpha": value}))
    assert (found.tau, found.rho, found.f1) == pytest.approx(
        (expected.tau, expected.rho, expected.f1)
    )


def test_videos_may_go_by_the_communitys_numbers(write):
    path = write({"video_2": PICKED, "alpha": PICKED[::-1]})
    read = predictions.read(path, IDS, ["alpha", "beta"])
    np.testing.assert_array_equal(read["beta"].scores, PICKED)
    assert read["beta"].video_id == "beta"


def test_only_what_is_wanted_is_read(write):
    path = write({"alpha": PICKED, "beta": np.array([np.nan])})
    assert list(predictions.read(path, IDS, ["alpha"])) == ["alpha"]


def test_a_pick_holds_until_the_next_and_the_first_from_the_start(tmp_path):
    write_json(tmp_path / "p", {"alpha": {"scores": [0.2, 0.6], "picks": [40, 70]}})
    expected = protocols.evaluate_frames(truth(), np.repeat([0.2, 0.6], [70, 30]), HALF)
    assert evaluate(tmp_path / "p") == expected


def test_a_file_may_last_longer_than_what_was_annotated(tmp_path):
    content = {"scores": [*PICKED, 9.0], "bounds": [*BOUNDS[:-1].tolist(), [9, 10.2], [10.2, 11]]}
    write_json(tmp_path / "p", {"alpha": content})
    assert evaluate(tmp_path / "p") == protocols.evaluate_frames(truth(), PER_FRAME, HALF)


def test_scores_at_picks_are_what_rows_of_points_are(tmp_path):
    """The mean annotator as a file, one score per 15th frame, is the row oracle."""
    gt = truth()
    write_json(tmp_path / "p", {"alpha": gt.user_scores.mean(0)})
    rows = protocols.untrained_rows([gt], seed=0, protocol=HALF)
    assert [evaluate(tmp_path / "p")] == rows["oracle"]


def test_the_videos_of_a_file_are_told(write):
    path = write({"video_2": PICKED, "alpha": PICKED})
    assert predictions.names(path, IDS) == {"alpha", "beta"}


def test_our_own_files_are_read_back(tmp_path):
    path = tmp_path / "predictions.npz"
    predictions.write_npz(path, {"alpha": (BOUNDS, PICKED), "beta": (BOUNDS, PICKED[::-1])})
    read = predictions.read(path, IDS, IDS)
    np.testing.assert_array_equal(read["alpha"].bounds, BOUNDS)
    np.testing.assert_array_equal(read["beta"].scores, PICKED[::-1])
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.npz"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"alpha": np.ones(50)}, "got 50 scores, which are neither 100 .* nor 7 "),
        ({"alpha": np.ones(0)}, "there is no score"),
        ({"alpha": np.where(PICKED == 0.8, np.nan, PICKED)}, "score 3 of 7 is nan"),
        ({"alpha": PICKED * np.inf}, "score 0 of 7 is inf"),
        ({"alpha": PICKED * 1e308}, r"score 1 of 7 is 9e\+307; give scores of at most 1e\+100"),
        ({"alpha": np.ones((7, 1))}, r"scores must have the shape \[M\], got \[7, 1\]"),
        ({"alpha": {"bounds": BOUNDS}}, "lacks the field 'scores', it has bounds"),
        ({"alpha": {"scores": PICKED, "bound": BOUNDS}}, "'bound'; did you mean 'bounds'"),
        (
            {"alpha": {"scores": PICKED, "bounds": BOUNDS, "picks": np.arange(7)}},
            "both bounds and picks",
        ),
        ({"alpha": {"scores": PICKED, "bounds": BOUNDS[::-1]}}, "sort them by start time"),
        ({"alpha": {"scores": PICKED, "bounds": BOUNDS[:4]}}, r"M scores, got \(4, 2\) and \(7,\)"),
        ({"alpha": {"scores": PICKED, "bounds": BOUNDS[:, 0]}}, r"shape \[M, 2\], got \[7\]"),
        ({"alpha": {"scores": PICKED, "bounds": BOUNDS / 10}}, "the video lasts 10 s; give bounds"),
        ({"alpha": {"scores": PICKED, "bounds": BOUNDS * 10}}, "the video lasts 10 s; give bounds"),
        ({"alpha": {"scores": PICKED, "picks": np.arange(6)}}, "7 scores and 6 picks"),
        ({"alpha": {"scores": PICKED, "picks": np.arange(94, 101)}}, "within 0 to 99, got 94 to"),
        ({"alpha": {"scores": PICKED, "picks": np.arange(7)[::-1]}}, "ascending .* sort them"),
        ({"alpha": {"scores": PICKED, "picks": np.arange(7) + 0.5}}, "native frames, ascending"),
        ({"alpha": {"scores": PICKED, "picks": np.arange(7) * 1e30}}, r"got 0 to 6e\+30"),
        ({"alpha": {"scores": PICKED, "picks": np.arange(7) * np.nan}}, "native frames, ascending"),
    ],
)
def test_what_does_not_fit_is_named_with_file_and_video(write, content, message):
    path = write(content)
    with pytest.raises(UserError, match=message) as caught:
        evaluate(path)
    assert str(caught.value).startswith(f"{path}, alpha")


def test_unknown_videos_are_named_with_the_closest(write):
    path = write({"alpha": PICKED, "bta": PICKED})
    with pytest.raises(UserError, match=r"names 'bta', .* did you mean 'beta'") as caught:
        predictions.read(path, IDS, ["alpha"])
    assert path in str(caught.value)
    path = write({"video_3": PICKED})
    with pytest.raises(UserError, match=r"names 'video_3', .* video_1 to video_2"):
        predictions.read(path, IDS, ["alpha"])
    path = write({"video_1": PICKED})
    with pytest.raises(UserError, match=r"names 'video_1', which is no video .*s 2; choose one"):
        predictions.read(path, IDS, ["alpha"], numbered=False)


def test_missing_videos_are_listed(write):
    path = write({"alpha": PICKED})
    with pytest.raises(UserError, match="lacks 1 of 2 videos that are evaluated: beta"):
        predictions.read(path, IDS, IDS)


def test_a_video_may_be_named_only_once(write):
    path = write({"beta": PICKED, "video_2": PICKED})
    with pytest.raises(UserError, match="gives beta twice, as 'beta' and as 'video_2'"):
        predictions.read(path, IDS, ["beta"])


def test_a_group_without_scores_is_named(tmp_path):
    """The features that methods start from, given in place of what they predict."""
    with h5py.File(tmp_path / "features.h5", "w") as file:
        file["video_1/features"] = np.zeros((7, 4))
        file["video_1/picks"] = np.arange(0, N_FRAMES, 15)
    with pytest.raises(UserError, match="video_1 lacks the field 'scores', it has features, picks"):
        predictions.read(tmp_path / "features.h5", IDS, ["alpha"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"alpha": [1, 2}', "cannot be read as JSON, NPZ or HDF5"),
        ("[1, 2]", "holds no JSON object"),
        ('{"alpha": [1], "alpha": [2]}', "names alpha twice"),
        ('{"alpha": {"scores": [1]}, "alpha/scores": [2]}', "gives alpha/scores twice"),
        ('{"alpha": {}}', "alpha has no scores"),
        ('{"alpha": ["high", "low"]}', "alpha: scores must be numbers"),
        ('{"alpha": [[1, 2], [3]]}', "alpha: scores cannot be read"),
        ('{"alpha": null}', "alpha: scores must be numbers"),
        ('{"alpha": 0.5}', r"shape \[M\], got \[\]"),
        ("[" * 100_000, "cannot be read as JSON, NPZ or HDF5"),
    ],
)
def test_json_of_another_form_is_refused(tmp_path, text, message):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        predictions.read(tmp_path / "p.json", IDS, ["alpha"])
    assert "p.json" in str(caught.value)


def test_pickled_objects_are_never_loaded(tmp_path):
    np.savez(tmp_path / "p.npz", alpha=np.array([{"a": 1}], object))
    with pytest.raises(UserError, match=r"p.npz, alpha: scores cannot be read .*allow_pickle"):
        predictions.read(tmp_path / "p.npz", IDS, ["alpha"])
    np.save(tmp_path / "p.npy", np.array([{"a": 1}], object), allow_pickle=True)
    with pytest.raises(UserError, match="cannot be read as JSON, NPZ or HDF5"):
        predictions.read(tmp_path / "p.npy", IDS, ["alpha"])


@pytest.mark.parametrize("writer", [write_npz, write_hdf5])
def test_files_that_were_cut_short_are_refused(tmp_path, writer):
    writer(tmp_path / "whole", {"alpha": np.arange(1000.0)})
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"cut.* cannot be read"):
        predictions.read(tmp_path / "cut", IDS, ["alpha"])


def test_a_damaged_array_is_named(tmp_path):
    stream = io.BytesIO()
    np.savez_compressed(stream, alpha=np.random.default_rng(0).random(1000))
    content = bytearray(stream.getvalue())
    content[500:600] = bytes(100)
    (tmp_path / "p.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"p.npz, alpha: scores cannot be read"):
        predictions.read(tmp_path / "p.npz", IDS, ["alpha"])


def test_a_size_beyond_all_memory_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as file, file.open("alpha.npy", "w") as stream:
        header = {"descr": "<f8", "fortran_order": False, "shape": (10**15,)}
        np.lib.format.write_array_header_1_0(stream, header)
    with pytest.raises(UserError, match=r"p.npz, alpha: scores cannot be read .*allocate"):
        predictions.read(tmp_path / "p.npz", IDS, ["alpha"])


def test_a_damaged_lzma_archive_is_named(tmp_path):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, np.random.default_rng(0).random(1000))
    with zipfile.ZipFile(tmp_path / "p.npz", "w", zipfile.ZIP_LZMA) as file:
        file.writestr("alpha.npy", stream.getvalue())
    content = bytearray((tmp_path / "p.npz").read_bytes())
    content[43:140] = b"\xff" * 97  # behind the local header and its name
    (tmp_path / "p.npz").write_bytes(content)
    with pytest.raises(UserError, match=r"p.npz, alpha: scores cannot be read"):
        predictions.read(tmp_path / "p.npz", IDS, ["alpha"])
    with zipfile.ZipFile(tmp_path / "p.npz") as file, pytest.raises(lzma.LZMAError):
        file.read("alpha.npy")


def test_an_archive_with_one_name_twice_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "p.npz", "w") as file:
        for name in ("alpha.npy", "alpha"):  # numpy calls both "alpha"
            stream = io.BytesIO()
            np.lib.format.write_array(stream, PICKED)
            file.writestr(name, stream.getvalue())
    with pytest.raises(UserError, match=r"p.npz names alpha twice"):
        predictions.read(tmp_path / "p.npz", IDS, ["alpha"])


# ---- HDF5 has more ways to name what it holds ----


def test_links_and_second_names_in_hdf5_are_followed(tmp_path):
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["kept/here"] = PICKED[::-1]
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["alpha/scores"] = PICKED
        file["beta"] = file["alpha"]  # a second name of the same group
        file["gamma/scores"] = h5py.SoftLink("/alpha/scores")
        file["delta"] = h5py.ExternalLink("other.h5", "/kept/here")
    ids = ("alpha", "beta", "gamma", "delta")
    read = predictions.read(tmp_path / "p.h5", ids, ids)
    for video, expected in zip(ids, (PICKED, PICKED, PICKED, PICKED[::-1]), strict=True):
        np.testing.assert_array_equal(read[video].scores, expected)


@pytest.mark.parametrize(
    "link",
    [h5py.SoftLink("/none"), h5py.ExternalLink("none.h5", "/alpha")],
    ids=["soft", "external"],
)
def test_a_link_that_leads_nowhere_is_named(tmp_path, link):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["alpha"] = link
    with pytest.raises(UserError, match=r"p.h5, alpha: scores cannot be read"):
        predictions.read(tmp_path / "p.h5", IDS, ["alpha"])


def test_a_group_that_contains_itself_is_refused(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["alpha/scores"] = PICKED
        file["alpha/alpha"] = file["alpha"]
    with pytest.raises(UserError, match="group alpha/alpha contains itself"):
        predictions.read(tmp_path / "p.h5", IDS, ["alpha"])
    with h5py.File(tmp_path / "q.h5", "w") as file:
        file["alpha"] = h5py.SoftLink("/")
    with pytest.raises(UserError, match="group alpha contains itself"):
        predictions.read(tmp_path / "q.h5", IDS, ["alpha"])


def test_an_empty_group_has_no_scores(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w") as file:
        file["alpha"] = PICKED
        file.create_group("beta")
    with pytest.raises(UserError, match="beta has no scores"):
        predictions.read(tmp_path / "p.h5", IDS, ["alpha"])


def test_hdf5_may_begin_with_a_block_of_the_users(tmp_path):
    with h5py.File(tmp_path / "p.h5", "w", userblock_size=512) as file:
        file["alpha"] = PICKED
    read = predictions.read(tmp_path / "p.h5", IDS, ["alpha"])
    np.testing.assert_array_equal(read["alpha"].scores, PICKED)


# ---- Paths ----


def test_a_path_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match=r"cannot be read .*null byte.*; check the path"):
        predictions.read(os.fspath(tmp_path / "a\0b"), IDS, ["alpha"])


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match=r"none.json cannot be read .No such file"):
        predictions.read(tmp_path / "none.json", IDS, ["alpha"])
    with pytest.raises(UserError, match=r"cannot be read .Is a directory"):
        predictions.read(tmp_path, IDS, ["alpha"])
