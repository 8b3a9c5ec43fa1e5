import dataclasses
import io
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from deevisum_jax.data import audio, video
from deevisum_jax.errors import UserError
from deevisum_jax.summary import metrics
from tfds_builders import records, workers
from tfds_builders.synthetic import annotators, paint, produce, scenario, sound, synthetic

RULES = scenario.Rules()


def draw(index: int, seed: int = 0) -> scenario.Scenario:
    return scenario.draw_scenario(seed=seed, split="train", index=index, rules=RULES)


def by_hand() -> scenario.Scenario:
    """Six seconds: the subject in [0, 3), applause in [1, 4), a salient line in the third point."""
    actor = scenario.Actor(
        colour="red", shape="ball", motion="bounce", radius=0.2, left=0.0, right=1.0,
        home=(0.5, 0.5), speed=1.0,
    )  # fmt: skip
    rival = dataclasses.replace(actor, colour="blue", shape="star", motion="circle")
    shot = scenario.Shot(
        start_frame=0, end_frame=30, ground="grass", texture_seed=1, pan=(2.0, 0.0), actors=(actor,)
    )
    other = dataclasses.replace(
        shot, start_frame=30, end_frame=60, ground="snow", texture_seed=2, actors=(rival,)
    )
    return scenario.Scenario(
        video_id="by_hand",
        key=(0, 0, 0),
        title="The red ball at the fair",
        category="FA",
        subject="red ball",
        n_frames=60,
        shots=(shot, other),
        lines=(
            scenario.Line(start_s=0.2, end_s=1.8, text="the bus was late again", salient=False),
            scenario.Line(start_s=4.2, end_s=5.8, text="here it comes", salient=True),
        ),
        events=(
            scenario.Sound(start_s=1.0, end_s=4.0, kind="applause"),
            scenario.Sound(start_s=4.0, end_s=6.0, kind="swell"),
        ),
        ambience=(scenario.Sound(start_s=0.0, end_s=6.0, kind="silence"),),
    )


def test_importance_by_hand():
    causes = scenario.causes(by_hand())
    np.testing.assert_allclose(causes.subject, [1.0, 0.5, 0.0])
    np.testing.assert_allclose(causes.applause, [0.5, 1.0, 0.0])
    np.testing.assert_allclose(causes.salient, [0.0, 0.0, 1.0])
    # 0.7 + 0.275 + 0.6 * 0.5,  0.35 + 0.55 + 0.6 * 0.5,  0.8
    np.testing.assert_allclose(scenario.importance(causes), [1.275, 1.2, 0.8])


def test_captions_say_what_is_seen_and_heard():
    assert [caption.text for caption in scenario.captions(by_hand())] == [
        "a red ball bounces over grass",
        "a blue star circles over snow while people clap",
        "a blue star circles over snow while loud music plays",
    ]


def test_scenarios_hold_what_the_data_set_promises():
    durations = []
    for index in range(100):
        drawn = draw(index)
        durations.append(drawn.duration_s)
        assert drawn.subject in drawn.title
        assert drawn.shots[0].start_frame == 0
        assert drawn.shots[-1].end_frame == drawn.n_frames
        for before, after in zip(drawn.shots, drawn.shots[1:], strict=False):
            assert before.end_frame == after.start_frame
            assert before.ground != after.ground
        for shot in drawn.shots:
            assert 2.0 <= (shot.end_frame - shot.start_frame) / scenario.FRAME_RATE <= 5.0
            colours = [actor.colour for actor in shot.actors]
            assert len(set(colours)) == len(colours)
            # The colour alone names the subject.
            for actor in shot.actors:
                assert (actor.name == drawn.subject) == (actor.colour == drawn.subject.split()[0])
        for line in drawn.lines:
            first, last = line.start_s // scenario.POINT_S, line.end_s // scenario.POINT_S
            assert 0 <= first <= last < drawn.num_points
    assert min(durations) >= 30
    assert max(durations) <= 90
    assert 38 <= np.mean(durations) <= 46


def test_without_the_title_the_subject_is_one_object_among_others():
    seen = {"subject": 0, "first rival": 0, "second rival": 0}
    alone = {"subject": 0, "rival": 0}
    shots = 0
    for index in range(300):
        drawn = draw(index)
        names = sorted({a.name for s in drawn.shots for a in s.actors} - {drawn.subject})
        roles = {drawn.subject: "subject"} | dict(
            zip(names, ("first rival", "second rival"), strict=False)
        )
        for shot in drawn.shots:
            shots += 1
            for actor in shot.actors:
                seen[roles[actor.name]] += 1
            if len(shot.actors) == 1:
                alone["subject" if shot.actors[0].name == drawn.subject else "rival"] += 1
    for count in seen.values():
        assert count / shots == pytest.approx(0.5, abs=0.04)
    # How many objects are seen does not tell either.
    assert alone["subject"] / sum(alone.values()) == pytest.approx(0.5, abs=0.06)


def leave_out(causes: scenario.Causes, name: str) -> scenario.Causes:
    """Puts a constant, the usual value, in the place of one cause."""
    usual = {"subject": 0.5, "applause": 0.3, "salient": 0.3}[name]
    return dataclasses.replace(causes, **{name: np.full_like(causes.subject, usual)})


def test_annotators_agree_as_people_do_and_every_sense_is_needed():
    found: dict[str, list[float]] = {}
    for index in range(200):
        drawn = draw(index, seed=3)
        scores = annotators.annotate(drawn)
        assert scores.shape == (20, drawn.num_points)
        assert set(np.unique(scores)) <= {1, 2, 3, 4, 5}
        shots = np.array([(shot.start_frame, shot.end_frame) for shot in drawn.shots])
        summaries = produce.summaries(scores, shots, drawn.n_frames)
        causes = scenario.causes(drawn)
        predictions = {
            "everything": scenario.importance(causes),
            "no picture": scenario.importance(leave_out(causes, "subject")),
            "no sound": scenario.importance(leave_out(causes, "applause")),
            "no text": scenario.importance(leave_out(causes, "salient")),
            "oracle": scores.mean(0),
            "constant": np.ones(drawn.num_points),
        }
        rows = np.stack(list(predictions.values()))
        tau = metrics.kendall_tau_matrix(rows, scores).mean(1)
        f1 = metrics.f1_matrix(produce.summaries(rows, shots, drawn.n_frames), summaries).mean(1)
        for k, name in enumerate(predictions):
            found.setdefault(f"{name}/tau", []).append(tau[k])
            found.setdefault(f"{name}/f1", []).append(f1[k])
        pairs = np.triu_indices(len(scores), 1)
        human = metrics.kendall_tau_matrix(scores, scores)[pairs].mean()
        found.setdefault("human/tau", []).append(human)
    mean = {name: float(np.mean(values)) for name, values in found.items()}
    assert 0.165 <= mean["human/tau"] <= 0.195  # TVSum: 0.177
    for name in ("no picture", "no sound", "no text"):
        assert mean["everything/tau"] - mean[f"{name}/tau"] >= 0.05, name
        assert mean["everything/f1"] - mean[f"{name}/f1"] >= 0.02, name
    assert mean["oracle/f1"] - mean["constant/f1"] >= 0.15


def test_words_tell_applause_from_every_other_sound():
    kinds = {"applause": set(), "swell": set(), "other": set()}
    for index in range(12):
        drawn = draw(index)
        track = sound.waveform(drawn)
        assert abs(track).max() < 1
        spans = {
            kind: scenario._overlap(
                [(e.start_s, e.end_s) for e in drawn.events if e.kind == kind], drawn.num_points
            )
            for kind in ("applause", "swell")
        }
        step = round(scenario.POINT_S * sound.SAMPLE_RATE)
        for k in range(drawn.num_points):
            kind = next((kind for kind in spans if spans[kind][k] > 0.5), "other")
            kinds[kind].add(audio.describe(track[k * step : (k + 1) * step]))
    assert kinds["applause"] == {"loud, many onsets"}
    assert all("loud, music" in words for words in kinds["swell"])
    assert not any("loud" in words for words in kinds["other"])


def test_painted_objects_stay_inside_and_keep_their_colour():
    for index in range(4):
        drawn = draw(index)
        frames = list(paint.frames(drawn))
        assert len(frames) == drawn.n_frames
        for shot in drawn.shots:
            for k in (shot.start_frame, (shot.start_frame + shot.end_frame) // 2):
                for colour in scenario.COLOURS:
                    present = colour in {actor.colour for actor in shot.actors}
                    assert (share_of(frames[k], colour) > 0.02) == present


def share_of(frame: np.ndarray, colour: str) -> float:
    """Share of the pixels that have about the colour of an object."""
    distance = np.abs(frame.astype(int) - np.array(paint.RGB[colour])).max(axis=-1)
    return float((distance < 40).mean())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> synthetic.Synthetic:
    return records.build(synthetic.Synthetic, tmp_path_factory.mktemp("data"), "tiny")


def drawn_of(builder: synthetic.Synthetic, split: str, index: int) -> scenario.Scenario:
    config = builder.builder_config
    return scenario.draw_scenario(seed=config.seed, split=split, index=index, rules=config.rules)


def test_records_hold_the_fields_of_the_contract(tiny):
    assert {name: len(records.read(tiny, name)) for name in tiny.info.splits} == {
        "train": 4,
        "validation": 2,
        "test": 2,
    }
    for index, record in enumerate(records.read(tiny, "train")):
        drawn = drawn_of(tiny, "train", index)
        n, points = drawn.n_frames, drawn.num_points
        assert record["video_id"] == f"synthetic_train_{index:04d}"
        assert record["title"] == drawn.title
        assert record["category"] in scenario.CATEGORIES
        assert record["n_frames"] == n
        assert record["native_fps"] == pytest.approx(10.0)
        assert record["duration_s"] == pytest.approx(drawn.duration_s)
        assert record["audio"].dtype == np.int16
        assert abs(len(record["audio"]) / 16_000 - drawn.duration_s) < 0.1
        assert len(record["frames"]) == len(record["frame_times"]) == 2 * drawn.duration_s
        np.testing.assert_allclose(record["frame_times"], np.arange(2 * drawn.duration_s) / 2)
        assert PIL.Image.open(io.BytesIO(record["frames"][0])).size == (96, 96)
        np.testing.assert_allclose(record["score_times"], 2 * np.arange(points) + 1)
        np.testing.assert_array_equal(record["user_scores"], annotators.annotate(drawn))
        assert record["user_scores"].dtype == np.float32
        assert record["user_summary"].shape == (20, n)
        assert record["user_summary"].dtype == np.uint8
        assert record["user_summary"].sum(1).min() > 0
        assert record["user_summary"].sum(1).max() <= 0.15 * n
        shots = record["change_points"]
        assert shots.dtype == np.int32
        assert shots[0, 0] == 0
        assert shots[-1, 1] == n
        np.testing.assert_array_equal(shots[1:, 0], shots[:-1, 1])
        assert len(record["captions"]) == points
        assert record["captions"][0]["text"] == scenario.captions(drawn)[0].text
        assert [line["text"] for line in record["transcript"]] == [x.text for x in drawn.lines]
        np.testing.assert_allclose(
            [(line["start"], line["end"]) for line in record["transcript"]],
            [(line.start_s, line.end_s) for line in drawn.lines],
            atol=1e-6,
        )


def test_two_builds_are_equal_byte_for_byte_and_another_seed_differs(tiny, tmp_path):
    def contents(builder):
        files = [
            *builder.data_path.glob("*.array_record*"),
            *synthetic.videos_folder(builder).rglob("*.*"),
        ]
        return {path.name: path.read_bytes() for path in files}

    again = records.build(synthetic.Synthetic, tmp_path, "tiny")
    assert len(contents(tiny)) == 3 + 2 * 8
    assert contents(again) == contents(tiny)

    changed = dataclasses.replace(
        again.builder_config, name="other_seed", seed=1, num_videos={"train": 1}
    )
    other = records.read(records.build(synthetic.Synthetic, tmp_path, changed), "train")[0]
    mine = records.read(tiny, "train")[0]
    assert other["user_scores"].tolist() != mine["user_scores"].tolist()
    assert other["frames"] != mine["frames"]


def test_reading_needs_neither_tensorflow_nor_jax(tiny):
    code = (
        "import sys\n"
        "from tfds_builders import records\n"
        "from tfds_builders.synthetic import synthetic\n"
        "builder = records.build(synthetic.Synthetic, sys.argv[1], 'tiny')\n"
        "print(records.read(builder, 'test')[0]['title'])\n"
        "assert not {'tensorflow', 'jax', 'torch'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny.data_path.parents[2])],
        cwd=workers.ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == drawn_of(tiny, "test", 0).title + "\n"


def test_records_end_where_the_split_ends(tiny):
    test = records.read(tiny, "test")
    assert len(list(test)) == 2
    with pytest.raises(IndexError, match="there are 2 records, got index 2"):
        test[2]


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[scenario.Scenario, str]:
    """A full-length video as the quickstart has it."""
    drawn = draw(2)
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    produce.write_video(drawn, path)
    produce.write_subtitles(drawn, path.with_suffix(".vtt"))
    return drawn, path


def test_written_picture_shows_the_shots(written):
    drawn, path = written
    decoded = video.decode_video(path, frame_rate=10.0)
    assert (decoded.info.width, decoded.info.height) == (160, 120)
    assert decoded.info.notes == ()
    assert len(decoded.frames) == drawn.n_frames
    painted = np.stack(list(paint.frames(drawn)))
    error = np.abs(np.asarray(decoded.frames, int) - painted).mean(axis=(1, 2, 3))
    assert error.max() < 12


def test_written_sound_is_heard_at_its_time(written):
    drawn, path = written
    made, heard = sound.waveform(drawn), audio.decode_audio(path)
    n = min(len(made), len(heard))
    spectrum = np.fft.rfft(heard[:n], 2 * n) * np.conj(np.fft.rfft(made[:n], 2 * n))
    lag = int(np.argmax(np.fft.irfft(spectrum)))
    assert min(lag, 2 * n - lag) <= 16  # samples: 1 ms


def test_what_a_sound_is_called_survives_its_encoding(written):
    drawn, path = written
    made, heard = sound.waveform(drawn), audio.decode_audio(path)
    step = round(scenario.POINT_S * sound.SAMPLE_RATE)
    words = [
        [audio.describe(track[k * step : (k + 1) * step]) for k in range(drawn.num_points)]
        for track in (made, heard)
    ]
    assert "loud, many onsets" in words[0]
    assert words[0] == words[1]


def test_shots_of_a_written_video_are_its_cuts(written):
    drawn, path = written
    record = produce.read_back(drawn, path, frame_rate=2.0, frame_size=96)
    expected = [(shot.start_frame, shot.end_frame) for shot in drawn.shots]
    np.testing.assert_array_equal(record["change_points"], expected)


def test_summaries_by_hand():
    # 20 s, five shots of 3 to 5 s; 15 % are 30 frames, so one shot of 3 s, the one of higher mean.
    shots = np.array([(0, 30), (30, 80), (80, 130), (130, 170), (170, 200)])
    scores = np.ones((2, 10))
    scores[0, 9] = 5  # the last point, frames 180 to 200
    scores[1, 0] = 2
    summary = produce.summaries(scores, shots, 200)
    assert summary[0].nonzero()[0].tolist() == list(range(170, 200))
    assert summary[1].nonzero()[0].tolist() == list(range(30))


def test_a_failing_worker_stops_the_build(tmp_path, capfd):
    job = produce.Job(
        seed=0,
        split="trian",
        num_videos=1,
        rules=RULES,
        frame_rate=2.0,
        frame_size=96,
        folder=str(tmp_path),
    )
    with pytest.raises(UserError, match=r"video 0 of split 'trian' in .* ended early"):
        list(produce.records(job))
    assert "ValueError" in capfd.readouterr().err


def test_unknown_names_are_explained(tiny, tmp_path):
    with pytest.raises(UserError, match="did you mean 'quickstart'"):
        records.build(synthetic.Synthetic, tmp_path, "quickstrat")
    with pytest.raises(UserError, match="no split 'validaton'; did you mean 'validation'"):
        records.read(tiny, "validaton")
