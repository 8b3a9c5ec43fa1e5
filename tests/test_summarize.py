"""The command from a file to a summary: what comes out, and what is refused without a trace."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import pathlib
import shutil
import signal
import time
import types
import weakref

import av
import jax
import numpy as np
import pytest
from etils import epath

from deevisum_jax import checkpoints, experiment, files, runs, summarize
from deevisum_jax import config as config_lib
from deevisum_jax.config import LoraConfig
from deevisum_jax.corpus import VideoError
from deevisum_jax.data import tokenizer
from deevisum_jax.data.segments import Video, segment_bounds
from deevisum_jax.data.video import decode_video
from deevisum_jax.errors import UserError
from deevisum_jax.inference import staged
from deevisum_jax.inference.calibration import Calibration, Point, Promise
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.models import lora, paligemma2
from deevisum_jax.summary import render, report, select
from deevisum_jax.typing import ExitedScores
from tests import untrained
from tests.media import solid_frames, stream_durations, write_video

FPS = 12
SCENES_S = (1.5, 3.0, 0.75, 2.25, 1.0, 3.5, 1.25, 2.75)  # 16 s
DURATION_S = sum(SCENES_S)
RATE = 16_000


@pytest.fixture(scope="session")
def videos(tmp_path_factory) -> pathlib.Path:
    """A folder of videos, usable ones and others."""
    folder = tmp_path_factory.mktemp("videos")
    frames = scenes(FPS)
    sound = 0.2 * np.sin(2 * np.pi * 440 * np.arange(int(DURATION_S * RATE)) / RATE)
    faststart = {"movflags": "faststart"}
    write_video(folder / "scenes.mp4", frames, fps=FPS, audio=sound, container_options=faststart)
    write_video(folder / "mute.mkv", frames, fps=FPS)
    write_video(folder / "silent.mkv", frames, fps=FPS, audio=0 * sound)
    write_video(folder / "odd.mkv", scenes(FPS, 47, 63), fps=FPS, pix_fmt="yuv444p", audio=sound)
    write_video(folder / "single.mp4", frames[:1], fps=FPS)
    write_video(folder / "half_second.mp4", frames[: FPS // 2], fps=FPS)
    write_video(folder / "slides.mkv", solid_frames([0, 200, 90]), times_s=[0, 5, 10])
    whole = (folder / "scenes.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: int(0.6 * len(whole))])
    (folder / "no_index.mp4").write_bytes(whole[: whole.index(b"moov") - 4] + b"\0\0\0\x09mdat\0")
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "folder.mp4").mkdir()
    (folder / "text.mp4").write_text("Dear diary,\n" * 99)
    with av.open(str(folder / "sound.mp4"), "w") as out:
        stream = out.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.int16), layout="mono")
        frame.sample_rate = RATE
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return folder


def scenes(fps: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Random colour cells, others in every scene, that drift: bits enough to cut a file within."""
    rng = np.random.default_rng(0)
    rows, columns = np.arange(height) * 6 // height, np.arange(width) * 8 // width
    shots = []
    for length_s in SCENES_S:
        picture = rng.integers(0, 200, (6, 8, 3))[rows[:, None], columns[None]]
        shots.append(picture + np.arange(int(length_s * fps))[:, None, None, None] % 30)
    return np.concatenate(shots).astype(np.uint8)


def command(video, run, out, *flags) -> int:
    return summarize.main([str(video), "--checkpoint", str(run), "--out", str(out), *flags])


@pytest.fixture(scope="module")
def out(run, videos, tmp_path_factory) -> pathlib.Path:
    """What the command makes of scenes.mp4; new folders within new folders."""
    folder = tmp_path_factory.mktemp("out") / "new" / "summary"
    assert command(videos / "scenes.mp4", run, folder, "--exit_threshold", "off") == 0
    return folder


@pytest.fixture(scope="module")
def summary(out) -> dict:
    return json.loads((out / "summary.json").read_text())


def check_summary(summary: dict, film: pathlib.Path, native_times: np.ndarray) -> None:
    """What holds for every summary."""
    duration_s, shots, segments = (summary[key] for key in ("duration_s", "shots", "segments"))
    for parts in (shots, segments):  # they tile the video
        edges = [part["start_s"] for part in parts] + [parts[-1]["end_s"]]
        assert edges[0] == 0
        assert edges[-1] == pytest.approx(duration_s)
        assert [part["end_s"] for part in parts[:-1]] == edges[1:-1]
        assert (np.diff(edges) > 0).all()
    edges = np.append(native_times, duration_s)
    for shot in shots:  # begins with a frame
        assert np.abs(edges - shot["start_s"]).min() < 1e-6
    kept_s = sum(shot["end_s"] - shot["start_s"] for shot in shots if shot["selected"])
    assert summary["selected_s"] == pytest.approx(kept_s)
    assert 0 < kept_s <= summary["budget"] * duration_s + 1e-6
    durations = stream_durations(film)
    frame_s = duration_s / len(native_times)
    assert durations["video"] == pytest.approx(kept_s, abs=1e-3)
    assert durations.get("audio", kept_s) == pytest.approx(kept_s, abs=frame_s)
    with av.open(str(film)) as container:  # what a player shows
        assert container.duration / av.time_base <= summary["budget"] * duration_s + 1e-3


def test_everything_is_there_and_nothing_else(out, summary):
    names = ["keyframes", "report.html", "summary.json", "summary.mp4"]
    assert sorted(path.name for path in out.iterdir()) == names
    assert [path.name for path in out.parent.iterdir()] == ["summary"]
    selected = [shot for shot in summary["shots"] if shot["selected"]]
    stills = sorted(path.name for path in (out / "keyframes").iterdir())
    assert len(stills) == len(selected)
    for still, shot in zip(stills, selected, strict=True):
        assert shot["start_s"] <= float(still[4:-5]) <= shot["end_s"]
    page = (out / "report.html").read_text()
    assert 'src="summary.mp4"' in page
    assert "scenes" in page


def test_the_summary_keeps_to_the_budget_and_to_shot_borders(out, summary, videos):
    assert summary["video"] == str(videos / "scenes.mp4")
    assert (summary["title"], summary["budget"]) == ("scenes", 0.15)
    assert summary["duration_s"] == pytest.approx(DURATION_S)
    for key in ("start_s", "end_s", "score", "selected"):
        assert all(key in part for part in (*summary["segments"], *summary["shots"]))
    native_times = decode_video(videos / "scenes.mp4", size=(8, 8)).native_times
    check_summary(summary, out / "summary.mp4", native_times)
    starts = [shot["start_s"] for shot in summary["shots"]]
    for cut_s in itertools.accumulate(SCENES_S[:-1]):  # every scene begins a shot, to the frame
        assert np.abs(np.subtract(starts, cut_s)).min() < 1e-3


def test_every_segment_runs_to_the_end_without_a_threshold(summary):
    policy = {"confidence": "max_probability", "thresholds": [None]}
    assert summary["exit_policy"] == policy
    assert [segment["exit_layer"] for segment in summary["segments"]] == [4] * 8  # of 2 s


def test_scores_choose_the_shots_they_lie_in(videos):
    """Segments 4 and 5, [8, 12) s, matter; of the scenes, [8.5, 12) lies in them and fits 4 s."""
    importance = np.full(8, 0.3)
    importance[4:6] = 0.9
    exit_index = np.array([0, 1, 1, 1, 1, 1, 1, 1])
    student = types.SimpleNamespace(
        model_config=types.SimpleNamespace(exit_layers=(2, 4)),
        score=lambda video, policy: (
            segment_bounds(video.duration_s, 2.0),
            ExitedScores(importance=importance, summary_prob=importance, exit_index=exit_index),
        ),
    )
    film = summarize.read_film(str(videos / "mute.mkv"), size=28)
    policy = ExitPolicy(confidence="cosine", thresholds=(0.8,))
    summary = summarize.summarize(film, student, budget=0.25, policy=policy)
    assert summary["exit_policy"] == {"confidence": "cosine", "thresholds": [0.8]}
    [kept] = [shot for shot in summary["shots"] if shot["selected"]]
    assert (kept["start_s"], kept["end_s"]) == pytest.approx((8.5, 12.0), abs=1e-3)
    assert kept["score"] == pytest.approx(0.9)
    segments = summary["segments"]
    assert [segment["exit_layer"] for segment in segments] == [2, 4, 4, 4, 4, 4, 4, 4]
    assert [segment["selected"] for segment in segments] == [False] * 4 + [True] * 2 + [False] * 2
    assert segments[5]["score"] == pytest.approx(0.9)


def test_a_segment_has_what_is_kept_of_it():
    """Against every pair of the two, with shots that begin and end where segments do, too."""
    rng = np.random.default_rng(0)
    for _ in range(50):
        bounds = segment_bounds(float(rng.integers(1, 60)), 2.0)
        edges = np.unique(rng.integers(0, 4 * bounds[-1, 1] + 1, 12)) / 4
        kept = list(itertools.pairwise(edges))[:: rng.integers(1, 3)]
        wanted = [
            sum(max(0.0, min(end, stop) - max(start, begin)) for begin, stop in kept)
            for start, end in bounds
        ]
        np.testing.assert_array_equal(summarize._seconds_kept(bounds, kept), wanted)


def test_long_films_keep_to_the_budget_too(run, videos, tmp_path, monkeypatch):
    monkeypatch.setattr(select, "_MAX_BUDGET_PARTS", 7)  # as coarse as in a film of years
    assert command(videos / "mute.mkv", run, tmp_path / "out", "--budget", "0.4") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    native_times = decode_video(videos / "mute.mkv", size=(8, 8)).native_times
    check_summary(summary, tmp_path / "out" / "summary.mp4", native_times)


def test_every_segment_leaves_at_the_first_exit_when_any_sureness_will_do(run, videos, tmp_path):
    flags = ("--exit_threshold", "0.5", "--budget", "0.5", "--title", "Two words")
    assert command(videos / "mute.mkv", run, tmp_path / "out", *flags) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [segment["exit_layer"] for segment in summary["segments"]] == [2] * 8
    policy = {"confidence": "max_probability", "thresholds": [0.5]}
    assert (summary["exit_policy"], summary["title"]) == (policy, "Two words")
    check_summary(
        summary,
        tmp_path / "out" / "summary.mp4",
        decode_video(videos / "mute.mkv", size=(8, 8)).native_times,
    )
    for segment in summary["segments"]:
        inside = sum(
            max(0, min(segment["end_s"], shot["end_s"]) - max(segment["start_s"], shot["start_s"]))
            for shot in summary["shots"]
            if shot["selected"]
        )
        assert segment["selected"] == (inside > 1.0)


@pytest.mark.parametrize(
    ("name", "flags", "note"),
    [
        ("mute.mkv", (), "no sound: judged by picture and text"),
        ("silent.mkv", (), "the sound is silent throughout"),
        ("odd.mkv", (), "the film is 62 x 46, its source 63 x 47: H.264 needs even sizes"),
        ("truncated.mp4", (), "the file ends early: "),
        ("single.mp4", ("--budget", "1"), "the video is a single picture"),
        ("half_second.mp4", ("--budget", "1"), "no sound"),
        ("slides.mkv", ("--budget", "0.5"), "no sound"),
    ],
)
def test_what_is_unusual_is_noted(run, videos, tmp_path, capsys, name, flags, note):
    assert command(videos / name, run, tmp_path / "out", *flags) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert any(found.startswith(note) for found in summary["notes"])
    assert note in (tmp_path / "out" / "report.html").read_text()
    assert f"note: {note}" in capsys.readouterr().out
    video = decode_video(videos / name, size=(8, 8))
    check_summary(summary, tmp_path / "out" / "summary.mp4", video.native_times)
    assert summary["duration_s"] == video.info.duration_s


def refused(capsys, folder: pathlib.Path, status: int) -> str:
    """The one line said; nothing was left in the folder of `--out`."""
    assert status == 2
    line, *more = capsys.readouterr().err.splitlines()
    assert more == []
    assert line.startswith("error: ")
    assert list(folder.iterdir()) == []
    return line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent.mp4", "no such file"),
        ("empty.mp4", "empty (0 bytes)"),
        ("text.mp4", "not a video file"),
        ("no_index.mp4", "index of this mp4 file is missing"),
        ("sound.mp4", "no video stream"),
        ("folder.mp4", "a folder"),
        ("single.mp4", "0.08 s long, so a summary of 15 % would last 0.01 s"),
        ("half_second.mp4", "under 0.5 s; raise --budget to 1"),
        ("slides.mkv", "stay on screen for 5.00 s and more"),
    ],
)
def test_videos_that_cannot_be_summarized(run, videos, tmp_path, capsys, name, message):
    said = refused(capsys, tmp_path, command(videos / name, run, tmp_path / "a" / "out"))
    assert message in said
    assert name in said


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("bad.srt", "1\n00:00:01,000 --> soon\nHello\n", "line 2: cannot read the timing"),
        ("bad.vtt", "WEBVTT\n\nhello\nworld\n", "line 3: expected a cue timing"),
        ("bad.txt", "Hello", "convert them to .srt or .vtt"),
        ("absent.srt", None, "no such subtitle file"),
    ],
)
def test_subtitles_that_cannot_be_read(run, videos, tmp_path, capsys, name, text, message):
    given, folder = tmp_path / name, tmp_path / "folder"
    folder.mkdir()
    if text is not None:
        given.write_text(text)
    status = command(videos / "scenes.mp4", run, folder / "out", "--subtitles", str(given))
    said = refused(capsys, folder, status)
    assert message in said
    assert name in said


def test_words_beside_the_video_reach_the_report(run, videos, tmp_path):
    shutil.copy(videos / "mute.mkv", tmp_path / "talk.mkv")
    (tmp_path / "talk.en.srt").write_text("1\n00:00:01,000 --> 00:00:03,000\nGood <i>evening</i>\n")
    assert command(tmp_path / "talk.mkv", run, tmp_path / "out") == 0
    assert "Good evening" in (tmp_path / "out" / "report.html").read_text()


def test_broken_words_beside_the_video_can_be_declined(run, videos, tmp_path, capsys):
    shutil.copy(videos / "mute.mkv", tmp_path / "talk.mkv")
    (tmp_path / "talk.srt").write_text("1\nsoon --> later\nGood evening\n")
    assert command(tmp_path / "talk.mkv", run, tmp_path / "out") == 2
    assert "talk.srt" in capsys.readouterr().err
    assert command(tmp_path / "talk.mkv", run, tmp_path / "out", "--subtitles", "none") == 0
    assert "Good evening" not in (tmp_path / "out" / "report.html").read_text()


def test_the_prompt_is_the_one_that_the_run_has_kept(run, tmp_path):
    other = shutil.copytree(run, tmp_path / "other")
    (other / "template.txt").write_text("{title} about {sound}")
    assert summarize.Student(other).encoder.prompts.template.text == "{title} about {sound}"


@pytest.fixture
def broken_run(run, tmp_path):
    """A copy of the run to break."""
    return shutil.copytree(run, tmp_path / "broken")


def without(name):
    def remove(folder):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return remove


def with_no_step(folder):
    shutil.rmtree(folder / "checkpoints" / "1")


def with_other_model(folder):
    config = config_lib.load(folder / "config.json")
    shutil.rmtree(folder / "checkpoints")
    wider = paligemma2.get_config("tiny", llm={"mlp_dim": 128}, exit_layers=(2, 4))
    untrained.save_checkpoint(folder, config, wider)


@pytest.mark.parametrize(
    ("damage", "messages"),
    [
        (shutil.rmtree, ["lacks config.json, tokenizer.model, template.txt, checkpoints"]),
        (without("config.json"), ["it lacks config.json;"]),
        (without("tokenizer.model"), ["it lacks tokenizer.model;"]),
        (without("template.txt"), ["it lacks template.txt;"]),
        (without("checkpoints"), ["it lacks checkpoints;"]),
        (with_no_step, ["no complete checkpoint"]),
        (lambda folder: (folder / "config.json").write_text("{"), ["not the config of a run"]),
        (lambda folder: (folder / "tokenizer.model").write_text("x"), ["not a SentencePiece"]),
        (with_other_model, ["another architecture", "llm/embedder/input_embedding"]),
    ],
)
def test_runs_that_cannot_judge(broken_run, videos, tmp_path, capsys, damage, messages):
    damage(broken_run)
    folder = tmp_path / "folder"
    folder.mkdir()
    said = refused(capsys, folder, command(videos / "mute.mkv", broken_run, folder / "out"))
    assert all(message in said for message in messages)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--budget", "0"), "0.0 is not above 0 and at most 1"),
        (("--budget", "1.5"), "1.5 is not above 0 and at most 1"),
        (("--budget", "nan"), "nan is not above 0 and at most 1"),
        (("--budget", "much"), "invalid float value: 'much'"),
        (("--exit_threshold", "1.1"), "'1.1' is neither auto nor off, nor a number from 0 to 1"),
        (("--exit_threshold", "-0.1"), "'-0.1' is neither auto nor off, nor a number from 0 to 1"),
        (("--exit_threshold", "0.9,nan"), "'0.9,nan' is neither auto nor off, nor a number from 0"),
        (("--exit_threshold", "0.9,"), "'0.9,' is neither auto nor off, nor a number from 0 to 1"),
        (("--exit_threshold", "on"), "'on' is neither auto nor off, nor a number from 0 to 1"),
        (("--exit-threshold", "off"), "unrecognized arguments"),
    ],
)
def test_flags_out_of_range(run, videos, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        command(videos / "mute.mkv", run, tmp_path / "out", *flags)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# ---- When segments leave ----


def calibrate(run: pathlib.Path, threshold: float) -> dict:
    """Keeps this threshold as one that was shown to keep a promise; returns it as files have it."""
    policies = (ExitPolicy.off(2), ExitPolicy(confidence="entropy", thresholds=(threshold,)))
    curve = tuple(
        Point(
            policy=policy,
            metrics={"f1": 0.6},
            losses={"f1": 0.0},
            p_value=0.01,
            passed=True,
            avg_depth=4.0,
            flops_saved=0.0,
            exit_rate=(0.0, 1.0),
        )
        for policy in policies
    )
    promise = Promise(epsilons={"f1": 0.01}, delta=0.1)
    found = Calibration(promise=promise, num_search=9, num_test=9, curve=curve, chosen=1)
    with checkpoints.Checkpoints(run / runs.CHECKPOINT_FOLDER) as saved:
        weights = saved.fingerprint(saved.best_step)
    runs.keep_calibration(epath.Path(run), found, weights)
    return policies[1].to_json()


def test_segments_leave_as_the_run_was_calibrated_by_default_and_by_auto(
    broken_run, videos, tmp_path
):
    calibrated = calibrate(broken_run, 0.0)  # all leave at the first exit
    off = ExitPolicy.off(2).to_json()
    for i, (flags, policy, layer) in enumerate(
        [
            ((), calibrated, 2),
            (("--exit_threshold", "auto"), calibrated, 2),
            (("--exit_threshold", "off"), off, 4),
        ]
    ):
        out = tmp_path / str(i)
        assert command(videos / "mute.mkv", broken_run, out, *flags) == 0
        summary = json.loads((out / "summary.json").read_text())
        assert summary["exit_policy"] == policy
        assert {segment["exit_layer"] for segment in summary["segments"]} == {layer}


def with_a_calibration_of_other_weights(run):
    calibrate(run, 0.5)
    config = config_lib.load(run / "config.json")
    model = experiment.model_config(config, tokenizer.load_tokenizer(run / "tokenizer.model"))
    shutil.rmtree(run / "checkpoints")
    untrained.save_checkpoint(run, config, model, seed=1)


def with_a_calibration_of_other_exits(run):
    calibrate(run, 0.5)
    path = run / "calibration.json"
    found = json.loads(path.read_text())
    for point in found["curve"]:
        point["policy"]["thresholds"] *= 2
    path.write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("damage", "flags", "messages"),
    [
        (None, ("auto",), ["auto: ", "broken was not calibrated", "--mode calibrate", "give off"]),
        (
            with_a_calibration_of_other_weights,
            (),
            ["calibration.json is of other weights", "--mode calibrate), or delete it"],
        ),
        (
            with_a_calibration_of_other_exits,
            (),
            ["has thresholds of a model with 3 exits, and this one has 2", "--mode calibrate"],
        ),
        (
            lambda run: (run / "calibration.json").write_text("{"),
            (),
            ["calibration.json is no JSON", "--mode calibrate), or delete it"],
        ),
        # The run's confidence is the likelier class's probability.
        (None, ("0.4",), ["exit threshold 0.4 is not within [0.5, 1]", "'max_probability'"]),
        (None, ("0.9,0.8",), ["got 2 exit thresholds (0.9, 0.8); give one for all, or 1: "]),
    ],
)
def test_exits_that_cannot_be(broken_run, videos, tmp_path, capsys, damage, flags, messages):
    if damage is not None:
        damage(broken_run)
    folder = tmp_path / "folder"
    folder.mkdir()
    flags = [part for flag in flags for part in ("--exit_threshold", flag)]
    said = refused(capsys, folder, command(videos / "mute.mkv", broken_run, folder / "out", *flags))
    assert all(message in said for message in messages)


# ---- Many videos as one stream ----


@pytest.fixture(scope="module")
def student(run) -> summarize.Student:
    """On one device, where a batch is 8 segments."""
    with pytest.MonkeyPatch.context() as patch:
        devices = jax.devices()[:1]
        patch.setattr(jax, "local_devices", lambda: devices)
        return summarize.Student(run)


def clip(num_segments: int) -> Video:
    """Pictures of noise, one for every second, others for every length."""
    times = np.arange(2 * num_segments) + 0.5
    rng = np.random.default_rng(num_segments)
    return Video(
        title=f"clip {num_segments}",
        duration_s=2.0 * num_segments,
        frames=rng.integers(0, 255, (len(times), 28, 28, 3), np.uint8),
        frame_times=times,
        cues=[],
        waveform=None,
    )


LENGTHS = (3, 1, 6, 2, 9, 4)  # segments; 25 together, 4 batches of 8


@pytest.fixture(scope="module")
def policy(student) -> ExitPolicy:
    """One that lets about half of all segments leave at the first exit."""
    first = ExitPolicy(confidence="max_probability", thresholds=(0.5,))
    found = list(student.score_all(map(clip, LENGTHS), first))
    p = np.concatenate([scores.summary_prob for _, scores in found])
    sure = np.sort(np.maximum(p, 1 - p))
    return ExitPolicy(confidence="max_probability", thresholds=(float(sure[12:14].mean()),))


def test_scores_do_not_depend_on_what_else_is_scored(student, policy):
    alone = {n: next(student.score_all([clip(n)], policy)) for n in LENGTHS}
    left = np.concatenate([scores.exit_index for _, scores in alone.values()])
    assert 10 < left.sum() < 16  # both exits are in use
    for lengths in (LENGTHS, LENGTHS[::-1]):
        together = list(student.score_all(map(clip, lengths), policy))
        assert len(together) == len(lengths)
        for n, (bounds, scores) in zip(lengths, together, strict=True):
            wanted_bounds, wanted = alone[n]
            np.testing.assert_array_equal(bounds, wanted_bounds)
            np.testing.assert_array_equal(scores.exit_index, wanted.exit_index)
            np.testing.assert_allclose(scores.importance, wanted.importance, atol=1e-6)
            np.testing.assert_allclose(scores.summary_prob, wanted.summary_prob, atol=1e-6)
    # A batch that is no larger than the video
    bounds, scores = student.score(clip(3), policy)
    np.testing.assert_allclose(scores.importance, alone[3][1].importance, atol=1e-6)


@pytest.fixture
def ran(monkeypatch) -> list[tuple[int, int]]:
    """Every run of a stage from now on: the exits that it lies between."""
    calls, stage = [], staged.StagedScorer.stage

    def counting(self, first, exit_):
        compiled = stage(self, first, exit_)
        return lambda *args: calls.append((first, exit_)) or compiled(*args)

    monkeypatch.setattr(staged.StagedScorer, "stage", counting)
    return calls


def test_a_stream_of_short_videos_fills_its_batches(student, policy, ran):
    for n in LENGTHS:
        list(student.score_all([clip(n)], policy))
    one_by_one = ran.copy()
    ran.clear()
    list(student.score_all(map(clip, LENGTHS), policy))
    # 25 segments make 4 batches and their 12 or so survivors 2, where each video has its own.
    assert (ran.count((0, 0)), ran.count((1, 1))) == (4, 2)
    assert one_by_one.count((0, 0)) == 7  # one of each, and two of that of 9 segments
    assert one_by_one.count((1, 1)) > 3


def test_a_video_is_given_back_before_the_stream_ends_and_its_pictures_are_let_go(student):
    taken = []

    def videos():
        for _ in range(20):
            video = clip(4)
            taken.append(weakref.ref(video))
            yield video
            del video

    for i, _ in enumerate(student.score_all(videos(), ExitPolicy.off(2))):
        if i == 0:
            assert len(taken) < 12  # two make a batch; the device is given a few batches
        assert not any(video() for video in taken[: i + 1])
    assert i == 19


def test_a_video_whose_segments_cannot_be_made_leaves_the_others_alone(student, policy):
    broken = dataclasses.replace(clip(9), frames=[clip(9).frames[0]] * 10 + [None] * 8)
    wanted = list(student.score_all([clip(3), clip(6)], policy))
    found = list(student.score_all([clip(3), broken, clip(6), broken], policy))
    for i in (1, 3):
        assert isinstance(found[i], VideoError)
        assert isinstance(found[i].__cause__, AttributeError)
    for (bounds, scores), (_, other) in zip(wanted, found[::2], strict=True):
        assert scores.importance.shape == (len(bounds),)
        np.testing.assert_allclose(other.importance, scores.importance, atol=1e-6)
        np.testing.assert_array_equal(other.exit_index, scores.exit_index)


def test_out_must_be_a_new_or_an_empty_folder(run, videos, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    for out, message in [
        ("file", "is not an empty folder"),
        ("full", "is not an empty folder"),
        ("file/below", "cannot be written (Not a directory)"),
    ]:
        assert command(videos / "mute.mkv", run, tmp_path / out) == 2
        said = capsys.readouterr().err
        assert message in said
        assert str(tmp_path / out) in said
        assert said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_an_empty_folder_is_filled_in_place(run, videos, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    left = out / ".out.0123abcd.partial"  # of a run that was killed, or one that is at work
    left.mkdir()
    (left / "summary.json").write_text("half")
    inode = out.stat().st_ino  # a mounted folder cannot be renamed over
    (tmp_path / "link").symlink_to(out)
    assert command(videos / "mute.mkv", run, tmp_path / "link") == 0
    assert out.stat().st_ino == inode
    names = ["keyframes", "report.html", "summary.json", "summary.mp4"]
    assert sorted(path.name for path in out.iterdir()) == [left.name, *names]
    assert (left / "summary.json").read_text() == "half"


def test_video_words_model_and_summary_may_be_in_a_bucket(bucket, run, videos, tmp_path):
    for path in (path for path in run.rglob("*") if path.is_file()):
        files.write_whole(bucket / "run" / path.relative_to(run).as_posix(), path.read_bytes())
    files.write_whole(bucket / "talk.mkv", (videos / "mute.mkv").read_bytes())
    words = "1\n00:00:01,000 --> 00:00:03,000\nGood evening\n"
    files.write_whole(bucket / "talk.en.srt", words)
    assert command(bucket / "talk.mkv", bucket / "run", bucket / "new" / "out") == 0
    summary = json.loads((bucket / "new" / "out" / "summary.json").read_text())
    assert (summary["video"], summary["title"]) == (str(bucket / "talk.mkv"), "talk")
    assert "Good evening" in (bucket / "new" / "out" / "report.html").read_text()
    film = tmp_path / "film.mp4"
    film.write_bytes((bucket / "new" / "out" / "summary.mp4").read_bytes())
    native_times = decode_video(videos / "mute.mkv", size=(8, 8)).native_times
    check_summary(summary, film, native_times)


def test_words_in_a_bucket_go_with_a_video_that_is_here(bucket, run, videos, tmp_path, capsys):
    words = "1\n00:00:01,000 --> 00:00:03,000\nGood evening\n"
    for name, text in (("words.srt", words), ("bad.srt", "1\nsoon --> later\nHello\n")):
        files.write_whole(bucket / name, text)
    flags = ("--subtitles", str(bucket / "words.srt"))
    assert command(videos / "mute.mkv", run, tmp_path / "out", *flags) == 0
    assert "Good evening" in (tmp_path / "out" / "report.html").read_text()
    folder = tmp_path / "folder"
    folder.mkdir()
    capsys.readouterr()
    for name, message in (("absent.srt", "does not exist"), ("bad.srt", "cannot read the timing")):
        flags = ("--subtitles", str(bucket / name))
        said = refused(capsys, folder, command(videos / "mute.mkv", run, folder / "out", *flags))
        assert said.startswith(f"error: {bucket / name}")
        assert message in said


def test_a_notice_leaves_nothing_of_one_video(run, videos, tmp_path, capsys, monkeypatch):
    def noticed(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)  # where it interrupts

    monkeypatch.setattr(summarize.Student, "score", noticed)
    assert command(videos / "mute.mkv", run, tmp_path / "out") == 75
    assert "the same command again goes on" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_video_in_a_bucket_is_called_by_its_address(bucket, run, videos, tmp_path, capsys):
    for name, message in (("text.mp4", "not a video file"), ("absent.mp4", "does not exist")):
        if name != "absent.mp4":
            files.write_whole(bucket / name, (videos / name).read_bytes())
        said = refused(capsys, tmp_path, command(bucket / name, run, tmp_path / "out"))
        assert said.startswith(f"error: {bucket / name}")
        assert message in said


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give either one VIDEO or a --manifest"),
        (["a.mp4", "--manifest", "b.csv"], "give either one VIDEO or a --manifest"),
        (["--manifest", "b.csv", "--title", "x"], "--title: a --manifest has a column for it"),
        (["--manifest", "b.csv", "--subtitles", "x"], "--subtitles: a --manifest has a column"),
        (["a.mp4", "--num_processes", "2"], "--num_processes: is for a --manifest"),
    ],
)
def test_one_video_and_many_have_flags_of_their_own(capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        summarize.main([*flags, "--checkpoint", "run", "--out", "out"])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_a_name_that_is_no_text_is_shown_with_question_marks(run, videos, tmp_path, capsys):
    video = os.fsdecode(bytes(tmp_path) + b"/caf\xe9.mkv")
    shutil.copy(videos / "mute.mkv", video)
    assert command(video, run, tmp_path / "out") == 0
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["title"] == "caf?"
    assert "caf?" in (tmp_path / "out" / "report.html").read_text()


def test_a_refusal_tells_what_is_wrong_with_the_file(run, videos, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    status = command(videos / "truncated.mp4", run, folder / "out", "--budget", "0.02")
    assert "the file ends early" in refused(capsys, folder, status)


@pytest.mark.parametrize("budget", [0.5, 0.9])
def test_a_large_budget_is_used(run, videos, tmp_path, budget):
    assert command(videos / "mute.mkv", run, tmp_path / "out", "--budget", str(budget)) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["selected_s"] > 0.85 * budget * summary["duration_s"]


@pytest.mark.parametrize("module", [render, report])
@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("stop", [KeyboardInterrupt, ZeroDivisionError])
def test_nothing_is_left_of_a_summary_that_was_stopped(
    run, videos, tmp_path, monkeypatch, module, exists, stop
):
    def stops(*args, **kwargs):
        raise stop

    name = {render: "save_sets_of_keyframes", report: "write_video_report"}[module]
    monkeypatch.setattr(module, name, stops)
    out = tmp_path / "a" / "out"
    if exists:
        out.mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    if stop is KeyboardInterrupt:
        assert command(videos / "mute.mkv", run, out) == 130
    else:
        with pytest.raises(stop):
            command(videos / "mute.mkv", run, out)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_full_disk_is_said_so(run, videos, tmp_path, monkeypatch, capsys):
    def fails(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(summarize, "write_whole", fails)
    said = refused(capsys, tmp_path, command(videos / "mute.mkv", run, tmp_path / "out"))
    assert "cannot be written (No space left on device)" in said


def test_scores_do_not_depend_on_the_number_of_devices(run, videos, monkeypatch):
    film = summarize.read_film(str(videos / "scenes.mp4"), size=28)
    found = []
    for count in (8, 3, 1):  # 8 segments, so 3 devices take a batch of 9
        devices = jax.devices()[:count]
        with monkeypatch.context() as patch:
            patch.setattr(jax, "local_devices", lambda devices=devices: devices)
            bounds, scores = summarize.Student(run).score(film.video, ExitPolicy.off(2))
        assert scores.importance.shape == (len(bounds),) == (8,)
        found.append(scores)
    for scores in found[1:]:
        np.testing.assert_allclose(scores.importance, found[0].importance, atol=1e-5)
        np.testing.assert_allclose(scores.summary_prob, found[0].summary_prob, atol=1e-5)


def test_a_run_over_codes_scores_as_what_it_merges_to(run, videos, tmp_path):
    config = config_lib.load(run / "config.json")
    adapted = LoraConfig(rank=2, base="nf4", tile=8)
    over_codes = dataclasses.replace(config, model=dataclasses.replace(config.model, lora=adapted))
    tokens = tokenizer.load_tokenizer(run / "tokenizer.model")
    model = experiment.model_config(over_codes, tokens)
    params = paligemma2.init_params(model, jax.random.key(0))
    film = summarize.read_film(videos / "mute.mkv", size=model.img.image_size)
    found = []
    for name, one, stored in (
        ("codes", over_codes, params),
        ("merged", config, lora.merge(params, adapted, "float32")),
    ):
        folder = tmp_path / name
        shutil.copytree(run, folder, ignore=shutil.ignore_patterns("checkpoints"))
        config_lib.save(one, folder / "config.json")
        untrained.save_params(folder, one, stored)
        found.append(summarize.Student(folder).score(film.video, ExitPolicy.off(2))[1])
    np.testing.assert_allclose(found[0].importance, found[1].importance, atol=1e-5)
    np.testing.assert_allclose(found[0].summary_prob, found[1].summary_prob, atol=1e-5)


def test_a_real_film(run, shared_data, tmp_path):
    source = shared_data / "clips" / "tears_of_steel_70s.webm"
    assert command(source, run, tmp_path / "out") == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    native_times = decode_video(source, size=(8, 8)).native_times
    check_summary(summary, tmp_path / "out" / "summary.mp4", native_times)
    assert 0.9 * 0.15 < summary["selected_s"] / summary["duration_s"] <= 0.15
    assert summary["notes"] == []


@pytest.mark.parametrize(
    ("lost", "named"), [("exits", "exits/classifier/kernel"), ("prototype", "exits/prototype")]
)
def test_a_checkpoint_without_exit_heads_or_prototypes_is_refused_by_name(tmp_path, lost, named):
    folder = untrained.make_run(tmp_path / "run")
    params = jax.device_get(summarize.Student(epath.Path(folder)).params)
    (params if lost == "exits" else params["exits"]).pop(lost)
    shutil.rmtree(folder / "checkpoints")
    untrained.save_params(folder, runs.load_config(epath.Path(folder)), params)
    with pytest.raises(UserError, match="another architecture") as refused:
        summarize.Student(epath.Path(folder))
    assert f"{named}: absent in the checkpoint" in str(refused.value)
