"""The command with a query, and its storyboard: what comes out, and what is refused."""

from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import pathlib
import shutil
import types

import numpy as np
import pytest
from PIL import Image

from deevisum_jax import summarize
from deevisum_jax.data.segments import segment_bounds
from deevisum_jax.errors import UserError
from deevisum_jax.inference import long_video
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.inference.long_video import Found
from deevisum_jax.keyframes.selection import SelectionConfig
from deevisum_jax.typing import ExitedScores
from tests import siglip_folder
from tests.media import write_video

FPS, SCENES = 8, 8  # of 2 s each


@pytest.fixture(scope="module")
def video(tmp_path_factory) -> pathlib.Path:
    """Eight scenes of random colour cells, 16 s, 32 sampled frames."""
    cells = np.random.default_rng(0).integers(0, 200, (SCENES, 6, 8, 3))
    scenes = cells.repeat(8, 1).repeat(8, 2).repeat(2 * FPS, 0)
    drift = np.arange(len(scenes))[:, None, None, None] % (2 * FPS)
    path = tmp_path_factory.mktemp("video") / "scenes.mp4"
    return write_video(path, (scenes + drift).astype(np.uint8), fps=FPS)


@pytest.fixture(scope="module")
def siglip(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("siglip")
    siglip_folder.write_folder(folder)
    return folder


def command(video, run, out, *flags) -> int:
    where = ["--checkpoint", str(run), "--out", str(out), "--budget", "0.3"]
    return summarize.main([str(video), *where, "--exit_threshold", "off", *map(str, flags)])


def summary_of(out) -> dict:
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def out(run, video, siglip, tmp_path_factory) -> pathlib.Path:
    """What the command makes of a query."""
    folder = tmp_path_factory.mktemp("out") / "out"
    query = ("--query", "A red door!", "--query_model", siglip, "--num_keyframes", 6)
    assert command(video, run, folder, *query) == 0
    return folder


@pytest.fixture(scope="module")
def plain(run, video, tmp_path_factory) -> pathlib.Path:
    """What it makes without one."""
    folder = tmp_path_factory.mktemp("plain") / "out"
    assert command(video, run, folder) == 0
    return folder


# ---- What comes out ----


def test_the_keyframes_are_there_and_on_one_sheet(out):
    summary = summary_of(out)
    assert summary["query"] == "A red door!"
    assert summary["query_weight"] == 0.5
    board = summary["storyboard"]
    assert len(board) == 6
    times = [entry["time_s"] for entry in board]
    assert times == sorted(times)
    files = {entry["file"] for entry in board}
    assert len(files) == 6
    found = {path.relative_to(out).as_posix() for path in (out / "storyboard").iterdir()}
    assert found == files | {"storyboard/contact_sheet.jpg"}
    for entry in board:
        assert f"{entry['time_s']:.2f}s" in entry["file"]
        assert isinstance(entry["filled"], bool)
        with Image.open(out / entry["file"]) as still:
            assert still.size == (64, 48)  # as in the file, not as the model sees it
    with Image.open(out / "storyboard" / "contact_sheet.jpg") as sheet:
        assert sheet.width == 10 + 4 * 170
    selected = [shot for shot in summary["shots"] if shot["selected"]]
    assert len(summary["keyframes"]) == len(selected)


def test_the_page_shows_the_query_and_the_storyboard(out, plain):
    page = (out / "report.html").read_text()
    assert "A red door!" in page
    assert page.count("<figure") == 6
    assert 'href="storyboard/contact_sheet.jpg"' in page
    assert "relevance" in page
    other = (plain / "report.html").read_text()
    assert "Storyboard" not in other
    assert "relevance" not in other


def test_a_query_has_its_share_of_each_score(out, plain):
    segments = summary_of(out)["segments"]
    own = [segment["score"] for segment in summary_of(plain)["segments"]]
    np.testing.assert_allclose([segment["importance"] for segment in segments], own, atol=1e-5)
    relevance = np.array([segment["relevance"] for segment in segments])
    assert np.ptp(relevance) > 0
    scaled = (relevance - relevance.min()) / np.ptp(relevance)
    wanted = 0.5 * np.array(own) + 0.5 * scaled
    np.testing.assert_allclose([segment["score"] for segment in segments], wanted, atol=1e-5)
    best = max(entry["relevance"] for entry in summary_of(out)["storyboard"])
    assert best == pytest.approx(relevance.max(), abs=1e-6)  # DKS takes the best frame first


def test_without_a_query_nothing_is_new(plain):
    summary = summary_of(plain)
    assert {"query", "query_weight", "storyboard"}.isdisjoint(summary)
    assert {"importance", "relevance"}.isdisjoint(summary["segments"][0])
    names = ["keyframes", "report.html", "summary.json", "summary.mp4"]
    assert sorted(path.name for path in plain.iterdir()) == names


def test_a_storyboard_needs_no_query_and_leaves_the_scores(run, video, plain, tmp_path):
    assert command(video, run, tmp_path / "out", "--num_keyframes", 3) == 0
    summary, before = summary_of(tmp_path / "out"), summary_of(plain)
    assert len(summary["storyboard"]) == 3
    assert "query" not in summary
    assert summary["segments"] == before["segments"]
    assert summary["shots"] == before["shots"]
    assert len(list((tmp_path / "out" / "storyboard").iterdir())) == 4
    assert "like the whole video" in (tmp_path / "out" / "report.html").read_text()


def test_more_keyframes_than_frames_are_all_frames(run, video, tmp_path):
    assert command(video, run, tmp_path / "out", "--num_keyframes", 500) == 0
    summary = summary_of(tmp_path / "out")
    times = [entry["time_s"] for entry in summary["storyboard"]]
    np.testing.assert_allclose(times, np.arange(32) / 2)
    [note] = [note for note in summary["notes"] if "storyboard" in note]
    assert note.startswith("the storyboard has all 32 frames of the video, at 2 a second")


def test_the_model_s_picture_size_may_be_another_than_the_student_s(run, video, tmp_path):
    siglip_folder.write_folder(tmp_path / "large", image_size=45)  # 3 x 3 patches, and 3 pixels
    query = ("--query", "a cat", "--query_model", tmp_path / "large", "--query_weight", 0)
    assert command(video, run, tmp_path / "out", *query) == 0
    summary = summary_of(tmp_path / "out")
    assert len(summary["storyboard"]) == 32  # the default, which is all
    assert [s["score"] for s in summary["segments"]] == pytest.approx(
        [s["importance"] for s in summary["segments"]]
    )


def test_a_query_brings_its_segment_into_the_summary(video):
    """All segments matter alike to the student, and frame 21, at 10.5 s, is asked for."""
    importance = np.full(SCENES, 0.5)
    student = types.SimpleNamespace(
        model_config=types.SimpleNamespace(exit_layers=(2, 4)),
        score=lambda video, policy: (
            segment_bounds(video.duration_s, 2.0),
            ExitedScores(
                importance=importance, summary_prob=importance, exit_index=np.ones(SCENES, int)
            ),
        ),
    )
    relevance = np.full(32, 0.02, np.float32)
    relevance[21] = 0.11
    found = Found(relevance=relevance, index=np.array([0, 21]), is_filled=np.array([True, False]))
    film = dataclasses.replace(summarize.read_film(video, size=28), found=found)
    query = types.SimpleNamespace(text="that", weight=0.5)
    request = summarize.Request(selection=SelectionConfig(num_keyframes=2), query=query)
    summary = summarize.summarize(
        film, student, budget=0.15, policy=ExitPolicy.off(2), request=request
    )
    scores = [segment["score"] for segment in summary["segments"]]
    assert scores == pytest.approx([0.25] * 5 + [0.75] + [0.25] * 2)
    kept = [shot for shot in summary["shots"] if shot["selected"]]
    assert kept[0]["start_s"] >= 10 - 1e-3
    assert kept[-1]["end_s"] <= 12 + 1e-3
    assert [entry["filled"] for entry in summary["storyboard"]] == [True, False]


# ---- What is refused ----


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--query", ""), "--query: '' has no word in it"),
        (("--query", "  ?! "), "--query: '  ?! ' has no word in it"),
        (("--query", "a dog"), "--query: give --query_model, too"),
        (("--query_model", "folder"), "--query_model: is for a --query, which is not given"),
        (("--query_weight", "0.5"), "--query_weight: is for a --query, which is not given"),
        (("--num_keyframes", "0"), "--num_keyframes: 0 is not at least 1"),
        (("--num_keyframes", "-3"), "--num_keyframes: -3 is not at least 1"),
        (("--num_keyframes", "1.5"), "invalid int value: '1.5'"),
        *(
            (
                ("--query", "a dog", "--query_model", "x", "--query_weight", weight),
                f"--query_weight: {shown} is not within [0, 1]",
            )
            for weight, shown in (("-0.1", "-0.1"), ("1.1", "1.1"), ("nan", "nan"))
        ),
    ],
)
def test_flags_out_of_range(run, video, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        command(video, run, tmp_path / "out", *flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def another_type(folder):
    (folder / "config.json").write_text('{"model_type": "clip"}')


def another_vocabulary(folder):
    siglip_folder.write_tokenizer(folder / "spiece.model", "Jazz 0 1 2 3 4")


def gemma_tokenizer(folder):
    siglip_folder.write_tokenizer(folder / "spiece.model", bos_id=2, unk_id=3)


def another_resize(folder):
    (folder / "preprocessor_config.json").write_text('{"resample": 1, "image_mean": [0.4]}')


def another_width(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 65
    (folder / "config.json").write_text(json.dumps(config))


def no_size(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"] = "many"
    (folder / "config.json").write_text(json.dumps(config))


def without(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (shutil.rmtree, ["no folder with a SigLIP: config.json is missing"]),
        (without("config.json"), ["no folder with a SigLIP: config.json is missing"]),
        (without("spiece.model"), ["spiece.model is not a file", "SigLIP 2 has Gemma's tokenizer"]),
        (without("model.safetensors"), ["holds neither model.safetensors nor"]),
        (another_type, ["config.json says model_type 'clip', wanted 'siglip'"]),
        (another_vocabulary, ["spiece.model has ", " pieces, and the text tower beside it takes"]),
        (gemma_tokenizer, ["its beginning at 2"]),
        (another_resize, ["resample: 1, wanted 2", "image_mean: [0.4], wanted"]),
        (another_width, ["text_model.encoder.layers.0.mlp.fc1.weight: shape (64, 32), wanted (65"]),
        (no_size, ["config.json: vision_config.num_hidden_layers is 'many', no size"]),
    ],
)
def test_folders_that_answer_no_query(run, video, siglip, tmp_path, capsys, damage, messages):
    broken, folder = shutil.copytree(siglip, tmp_path / "broken"), tmp_path / "folder"
    folder.mkdir()
    damage(broken)
    status = command(video, run, folder / "out", "--query", "a dog", "--query_model", broken)
    said = capsys.readouterr().err
    assert status == 2
    assert said.startswith("error: ")
    assert str(broken) in said
    assert all(message in said for message in messages)
    assert list(folder.iterdir()) == []


def test_a_query_that_is_too_long_is_refused_and_not_cut(run, video, siglip, tmp_path, capsys):
    for text in ("the dog " * 9, "日本 " * 9):
        flags = ("--query", text, "--query_model", siglip)
        assert command(video, run, tmp_path / "out", *flags) == 2
        said = capsys.readouterr().err
        assert "tokens, and the text tower takes 15 and their end; say it in fewer words" in said
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_of_temporary_files_is_said_so(run, video, tmp_path, monkeypatch, capsys):
    def fails(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", fails)
    assert command(video, run, tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "waits in a temporary file, and that cannot be written (No space left on" in said
    assert list(tmp_path.iterdir()) == []


def test_an_embedding_that_is_no_number_is_refused(run, video, tmp_path, monkeypatch, capsys):
    watched = long_video.KeyframeFinder.find
    monkeypatch.setattr(
        long_video.KeyframeFinder,
        "find",
        lambda self, given, places: watched(self, given * np.nan, places),
    )
    assert command(video, run, tmp_path / "out", "--num_keyframes", 3) == 2
    assert "image tower that looks for keyframes gives no numbers" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- Many videos ----


def many(rows, run, out, *flags) -> int:
    where = ["--checkpoint", str(run), "--out", str(out), "--budget", "0.3"]
    return summarize.main(["--manifest", str(rows), *where, *map(str, flags)])


def test_one_query_is_for_all_videos_of_a_manifest(run, video, siglip, tmp_path, capsys):
    for name in "ab":
        shutil.copy(video, tmp_path / f"{name}.mp4")
    rows, out = tmp_path / "videos.csv", tmp_path / "out"
    rows.write_text("video\na.mp4\nb.mp4\n")
    query = ("--query", "a dog", "--query_model", siglip, "--num_keyframes", 4)
    assert many(rows, run, out, *query) == 0
    for name in "ab":
        summary = summary_of(out / name)
        assert (summary["query"], len(summary["storyboard"])) == ("a dog", 4)
        assert len(list((out / name / "storyboard").iterdir())) == 5
    assert "by the query <b>a dog</b>" in (out / "index.html").read_text()
    settings = json.loads((out / "corpus.json").read_text())
    assert (settings["query"], settings["num_keyframes"]) == ("a dog", 4)
    # What is done was done with that query.
    moved = shutil.copytree(siglip, tmp_path / "moved")
    assert many(rows, run, out, "--query_model", moved, *query[:2], *query[4:]) == 0
    capsys.readouterr()
    siglip_folder.write_folder(tmp_path / "other", seed=1)
    for flags, message in (
        ((), "--query is a dog there and not given now"),
        (("--query", "a cat", *query[2:]), "--query is a dog there and a cat now"),
        ((*query, "--query_weight", 0.9), "--query_weight is 0.5 there and 0.9 now"),
        ((*query[:4], "--num_keyframes", 5), "--num_keyframes is 4 there and 5 now"),
        (
            (*query[:2], "--query_model", tmp_path / "other", *query[4:]),
            "the digest of --query_model is ",
        ),
    ):
        assert many(rows, run, out, *flags) == 2
        assert message in capsys.readouterr().err


def test_summaries_of_before_there_were_queries_go_on(run, video, tmp_path):
    shutil.copy(video, tmp_path / "a.mp4")
    rows, out = tmp_path / "videos.csv", tmp_path / "out"
    rows.write_text("video\na.mp4\n")
    assert many(rows, run, out) == 0
    stored = out / "corpus.json"
    kept = json.loads(stored.read_text())
    names = ("query", "query_weight", "query_model", "num_keyframes")
    stored.write_text(json.dumps({k: v for k, v in kept.items() if k not in names}))
    assert many(rows, run, out) == 0
    assert "query" not in (out / "index.html").read_text()


def test_half_a_storyboard_of_a_killed_writer_is_cleared(run, video, tmp_path):
    shutil.copy(video, tmp_path / "a.mp4")
    rows, out = tmp_path / "videos.csv", tmp_path / "out"
    rows.write_text("video\na.mp4\n")
    left = out / "a" / "storyboard"
    left.mkdir(parents=True)
    for name in ("000_0.00s.jpg", "contact_sheet.jpg", ".contact_sheet.jpg.0123abcd.partial"):
        (left / name).write_text("half")
    (out / "corpus.json").write_text("{}")
    assert many(rows, run, out, "--num_keyframes", 2) == 0
    with open(out / "failures.csv", newline="") as file:
        assert len(list(csv.reader(file))) == 1
    assert len(list(left.iterdir())) == 3


def test_one_query_is_read_once(siglip):
    query = summarize.read_query("a dog", pathlib.Path(siglip), 0.5)
    assert query.tokens.shape == (16,)
    assert (query.resize, query.model.img.image_size) == ("bicubic", 28)
    with pytest.raises(UserError, match="--query: '!' has no word in it"):
        summarize.read_query("!", pathlib.Path(siglip), 0.5)
