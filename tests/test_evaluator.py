"""The evaluator: data sets made of a few records, the command, and the published annotations."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from deevisum_jax import config as config_lib
from deevisum_jax import datasets, evaluation, evaluator, main
from deevisum_jax.errors import UserError
from deevisum_jax.summary import folds, protocols, report
from tests.summary.test_report import Page
from tfds_builders.tvsum import annotations as tvsum

REPO = pathlib.Path(__file__).parent.parent

CONFIG = """
import ml_collections

def get_config():
    return ml_collections.ConfigDict({
        "initialization": "from_scratch", "seed": 0, "total_steps": 1, "batch_size": 1,
        "data": {"dataset": "synthetic/tiny"},
        "model": {"variant": "tiny", "exit_layers": (2, 4)},
        "optim": {"learning_rate": 1e-3, "warmup_steps": 0},
        "eval": {"budget": 0.25},
    })
"""


def record(video_id, scores):
    """8 s at 5 frames per second, a point, a shot and a score per 2 s; two people who agree."""
    best = np.repeat(np.asarray(scores) == max(scores), 10).astype(np.uint8)
    return {
        "video_id": video_id,
        "n_frames": 40,
        "native_fps": 5.0,
        "duration_s": 8.0,
        "score_times": np.array([1.0, 3.0, 5.0, 7.0], np.float32),
        "user_scores": np.array([scores, scores], np.float32),
        "user_summary": np.stack([best, best]),
        "change_points": np.array([[0, 10], [10, 20], [20, 30], [30, 40]], np.int32),
        "frames": [],
    }


RECORDS = [
    record("a", [1, 2, 3, 4]),
    record("b", [4, 1, 2, 3]),
    record("c", [1, 4, 2, 3]),
    record("d", [3, 2, 4, 1]),
    record("e", [1, 3, 2, 4]),
]
BOUNDS = [[0, 2], [2, 4], [4, 6], [6, 8]]


class OnePiece:
    """A data set that is published in one piece, of which some records may not be at hand."""

    in_one_piece = True

    def __init__(self, data, records=RECORDS, video_ids=None):
        self._records = records
        self.video_ids = video_ids or tuple(r["video_id"] for r in records)
        self.folds = ()
        if data.folds:
            family = data.dataset.partition("/")[0]
            self.folds = folds.make(data.folds, family, self.video_ids, seed=data.folds_seed)

    def records(self):
        return self._records


class InSplits:
    """A data set that comes in splits of its own, with or without one to validate on."""

    in_one_piece = False

    def __init__(self, **splits):
        self._splits = splits or {"train": RECORDS[:3], "test": RECORDS[3:]}
        self.split_names = tuple(self._splits)

    def split(self, name):
        if name not in self._splits:
            raise UserError(f"there is no split {name!r}")
        return self._splits[name]


def perfect(records=RECORDS):
    return {
        r["video_id"]: {"scores": r["user_scores"][0].tolist(), "bounds": BOUNDS} for r in records
    }


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        (tmp_path / name).write_text(json.dumps(content))
        return str(tmp_path / name)

    return write


@pytest.fixture
def make_config(tmp_path):
    (tmp_path / "config.py").write_text(CONFIG)
    return lambda *overrides: config_lib.from_file(str(tmp_path / "config.py"), overrides)


@pytest.fixture
def overlapping(write):
    """Two folds: b is tested in both, e in none. The mean counts b twice."""
    return write(
        "folds.json",
        [
            {"train_keys": ["c", "d", "e"], "test_keys": ["a", "b"]},
            {"train_keys": ["a", "e"], "test_keys": ["b", "c", "d"]},
        ],
    )


def find(config, paths, records=RECORDS, video_ids=None):
    return find_in(OnePiece(config.data, records, video_ids), config, paths)


def find_in(dataset, config, paths):
    return evaluator.evaluate(config, evaluator.make_task(config, dataset), paths)


def test_all_videos_of_a_data_set_in_one_piece(make_config, write):
    found = find(make_config(), [write("best.json", perfect())])
    assert list(found["rows"]) == [
        "best.json", "random", "constant", "time", "human", "oracle"
    ]  # fmt: skip
    for metric in ("f1", "tau", "rho"):
        assert found["rows"]["best.json"][metric] == {
            "mean": pytest.approx(1), "low": pytest.approx(1), "high": pytest.approx(1),
            "mean_of_videos": pytest.approx(1),
        }  # fmt: skip
    # Equal shots: a constant score takes the first, which is the best of b only.
    assert found["rows"]["constant"]["f1"]["mean"] == pytest.approx(1 / 5)
    assert found["num_folds"] == 0
    assert found["protocols"] == protocols.Protocol(budget=0.25).texts()
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_test_split_of_a_data_set_that_comes_in_splits(make_config, write):
    path = write("best.json", perfect(RECORDS[3:]))
    found = find_in(InSplits(), make_config(), [path])
    assert list(found["per_video"]) == ["d", "e"]
    truths = evaluation.ground_truths(RECORDS)
    time = protocols.time_row(truths[:3], truths[3:])
    assert found["rows"]["time"]["tau"]["mean"] == pytest.approx(np.mean([t.tau for t in time]))


def test_a_file_may_cover_all_splits_but_numbers_mean_nothing_there(make_config, write):
    splits = InSplits(train=RECORDS[:2], validation=RECORDS[2:3], test=RECORDS[3:])
    found = find_in(splits, make_config(), [write("all.json", perfect())])
    assert list(found["per_video"]) == ["d", "e"]
    content = {f"video_{k + 1}": value for k, value in enumerate(perfect().values())}
    with pytest.raises(UserError, match=r"names 'video_1', which is no video .*'s 5; choose one"):
        find_in(splits, make_config(), [write("numbers.json", content)])


def test_folds_are_averaged_fold_by_fold_and_say_what_they_cover(make_config, write, overlapping):
    scores = perfect() | {"b": {"scores": [1, 4, 3, 2], "bounds": BOUNDS}}  # b is reversed: -1
    path = write("p.json", {video: scores[video] for video in "abcd"})
    found = find(make_config(f"data.folds={overlapping}"), [path])
    # Fold means are 0 and 1/3; over the four videos it is 1/2.
    assert found["rows"]["p.json"]["tau"]["mean"] == pytest.approx(1 / 6)
    assert found["rows"]["p.json"]["tau"]["mean_of_videos"] == pytest.approx(1 / 2)
    assert found["notes"][0].startswith("2 folds that overlap: 4 of 5 videos are ever tested, 1 ")
    table = evaluator.table(found).splitlines()
    assert table[0] == "synthetic/tiny: 4 videos, mean over 2 folds of the mean over test videos"
    assert "Instead, the mean over the 4 videos, each once:" in table
    assert [line.split()[2] for line in table if line.startswith("p.json")][1] == "0.500"


def test_a_file_for_each_fold(make_config, write, overlapping):
    # Predictions of b differ between the folds, as those of two trained models do.
    write("fold_0.json", perfect(RECORDS[:2]))
    reversed_b = perfect(RECORDS[1:4]) | {"b": {"scores": [1, 4, 3, 2], "bounds": BOUNDS}}
    path = write("fold_1.json", reversed_b).replace("fold_1", "fold_{fold}")
    found = find(make_config(f"data.folds={overlapping}"), [path])
    assert found["per_video"]["b"]["fold_{fold}.json"]["tau"] == pytest.approx(
        # Weights of b: 1/4 in the first fold, 1/6 in the second.
        (1 / 4 - 1 / 6) / (1 / 4 + 1 / 6)
    )
    assert found["rows"]["fold_{fold}.json"]["tau"]["mean"] == pytest.approx((1 + 1 / 3) / 2)
    with pytest.raises(UserError, match="a file per fold, and there are no folds"):
        find(make_config(), [path])


def test_a_file_for_each_fold_of_one(make_config, write):
    one = write("one.json", [{"train_keys": ["c", "d", "e"], "test_keys": ["a", "b"]}])
    path = write("fold_0.json", perfect(RECORDS[:2])).replace("fold_0", "fold_{fold}")
    found = find(make_config(f"data.folds={one}"), [path])
    assert list(found["per_video"]) == ["a", "b"]
    assert evaluator.table(found).splitlines()[0] == "synthetic/tiny: 2 videos"


def test_a_file_of_one_folds_test_videos_is_evaluated_on_it_alone(make_config, write, overlapping):
    """Such a file is what a run on that fold leaves."""
    path = write("of_fold_1.json", perfect(RECORDS[1:4]))
    config = make_config(f"data.folds={overlapping}")
    found = find(config, [path])
    assert list(found["per_video"]) == ["b", "c", "d"]
    assert found["num_folds"] == 1
    assert found["notes"][0].startswith(f"{path} has the test videos of fold 1 only: that fold")
    truths = dict(zip("abcde", evaluation.ground_truths(RECORDS), strict=True))
    time = protocols.time_row([truths[v] for v in "ae"], [truths[v] for v in "bcd"])
    assert found["rows"]["time"]["tau"]["mean"] == pytest.approx(np.mean([t.tau for t in time]))
    # Beside it a file per fold is asked for the same fold, and a file of another for these videos.
    write("run_1.json", perfect(RECORDS[1:4]))
    run = path.replace("of_fold_1", "run_{fold}")
    assert found["per_video"].keys() == find(config, [run, path])["per_video"].keys()
    with pytest.raises(UserError, match=r"other.json lacks 2 of 3 videos .*: c, d"):
        find(config, [path, write("other.json", perfect(RECORDS[:2]))])


def test_the_time_row_is_fitted_on_each_folds_training_videos(make_config, write, overlapping):
    found = find(make_config(f"data.folds={overlapping}"), [write("p.json", perfect())])
    truths = dict(zip("abcde", evaluation.ground_truths(RECORDS), strict=True))
    means = [
        np.mean([row.tau for row in protocols.time_row([truths[v] for v in train],
                                                       [truths[v] for v in test])])
        for train, test in (("cde", "ab"), ("ae", "bcd"))
    ]  # fmt: skip
    assert found["rows"]["time"]["tau"]["mean"] == pytest.approx(np.mean(means))


def test_two_files_are_compared_video_by_video(make_config, write):
    worse = perfect() | {"a": {"scores": [4, 3, 2, 1], "bounds": BOUNDS}}
    found = find(make_config(), [write("one.json", perfect()), write("two.json", worse)])
    tau = found["comparison"]["tau"]
    assert (tau["difference"], tau["wins"], tau["losses"]) == (pytest.approx(2 / 5), 1, 0)
    assert tau["p"] == 1.0  # one video that differs proves nothing
    table = evaluator.table(found)
    assert "one.json less two.json, paired by video:\n" in table
    assert "  tau  +0.400 [+0.000, +1.200]  p = 1  better on 1 video, worse on 0\n" in table


def test_the_second_file_must_cover_the_same_videos(make_config, write):
    paths = [write("one.json", perfect()), write("two.json", perfect(RECORDS[:3]))]
    with pytest.raises(UserError, match=r"two.json lacks 2 of 5 videos .* d, e"):
        find(make_config(), paths)
    with pytest.raises(UserError, match="two different ones"):
        find(make_config(), paths[:1] * 2)


def test_the_output_warns_of_what_the_numbers_hide(make_config, write):
    flat = {r["video_id"]: [0.5] * 40 for r in RECORDS}
    # Whoever scores all the same has the first shot for a summary, as a constant prediction has.
    lazy = [RECORDS[0] | {"user_scores": np.array([[1, 2, 3, 4], [2, 2, 2, 2]])}, *RECORDS[1:]]
    found = find(make_config(), [write("flat.json", flat)], lazy)
    notes = "\n".join(found["notes"])
    assert "A constant score reaches F1 0.300 in these very settings" in notes
    assert "F1 of flat.json is no better than that of a constant score." in notes
    assert "flat.json is the same throughout 5 of 5 videos, counted as tau 0 and rho 0" in notes
    assert "1 annotator is the same throughout a video" in notes
    assert "count as 0: 1 of a." in notes
    assert "Only 5 videos" in notes
    assert (
        found["rows"]["flat.json"]["tau"]["mean"],
        found["rows"]["flat.json"]["f1"]["mean"],
    ) == (
        0.0,
        pytest.approx(0.3),
    )
    assert "F1 (constant 0.300)" in evaluator.table(found)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"scores": [1, 2, 3, 4, 5]}, "got 5 scores, which are neither 40 .* nor 3 "),
        ([float("nan")] * 40, "score 0 of 40 is nan"),
    ],
)
def test_bad_predictions_are_named_with_file_and_video(make_config, write, content, message):
    path = write("p.json", perfect() | {"c": content})
    with pytest.raises(UserError, match=message) as caught:
        find(make_config(), [path])
    assert str(caught.value).startswith(f"{path}, c: ")


def test_videos_that_are_not_at_hand_are_told(make_config, write):
    config = make_config("data.dataset=tvsum/features")  # of fifty videos
    some = [r | {"video_id": video} for r, video in zip(RECORDS, tvsum.VIDEO_IDS[4:9], strict=True)]
    path = write(
        "p.json", {f"video_{k + 5}": perfect(some)[tvsum.VIDEO_IDS[k + 4]] for k in range(5)}
    )
    found = find(config, [path], some, tvsum.VIDEO_IDS)
    assert found["notes"][0].startswith("45 of 50 videos are not at hand and left out")
    # Of the five the second published fold tests none.
    config = make_config("data.dataset=tvsum/features", "data.folds=community")
    with pytest.raises(
        UserError, match=r"fold 1 of data.folds='community' has no video at hand to test"
    ):
        find(config, [path], some, tvsum.VIDEO_IDS)


def test_one_annotator_is_no_human_row(make_config, write, tmp_path):
    alone = RECORDS[0] | {name: RECORDS[0][name][:1] for name in ("user_scores", "user_summary")}
    found = find(make_config(), [write("p.json", perfect())], [alone, *RECORDS[1:]])
    assert "human" not in found["rows"]
    assert "There is no human row: 1 video with one annotator only, such as a." in found["notes"]
    report.write_evaluation_report(tmp_path / "page.html", found, titles=evaluator.TITLES)
    assert "no human row" in Page(tmp_path / "page.html").text
    nobody = RECORDS[0] | {name: RECORDS[0][name][:0] for name in ("user_scores", "user_summary")}
    with pytest.raises(UserError, match="a: nobody has annotated this video"):
        find(make_config(), [write("p.json", perfect())], [nobody, *RECORDS[1:]])


def test_names_of_rows_tell_files_apart(make_config, tmp_path):
    paths = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        paths.append(str(tmp_path / folder / "predictions.json"))
        (tmp_path / folder / "predictions.json").write_text(json.dumps(perfect()))
    assert list(find(make_config(), paths)["rows"])[:2] == paths
    (tmp_path / "human").write_text(json.dumps(perfect()))
    found = find(make_config(), [str(tmp_path / "human")])
    assert {str(tmp_path / "human"), "human"} <= found["rows"].keys()


def test_a_file_in_the_working_directory_does_not_take_a_rows_name(
    make_config, write, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    write("human", {r["video_id"]: [0.5] * 40 for r in RECORDS})
    write("time", perfect())
    found = find(make_config(), ["human", "time"])
    assert list(found["rows"])[:2] == ["./human", "./time"]
    assert found["rows"]["./human"]["kind"] == "method"
    assert (found["rows"]["./human"]["tau"]["mean"], found["rows"]["human"]["tau"]["mean"]) == (
        0.0,
        pytest.approx(1),
    )


# ---- Budgets and shots of one's own ----


@pytest.mark.parametrize("shots", ["data_set", "kts"])
def test_another_budget_makes_the_annotators_summaries_anew(shots):
    features = np.repeat(np.eye(4, dtype=np.float16), 2, axis=0)
    given = record("a", [1, 2, 4, 3]) | {
        "features": features,
        "picks": np.arange(0, 40, 5, dtype=np.int32),
    }
    for budget, chosen in ((0.25, {2}), (0.5, {2, 3})):
        protocol = protocols.Protocol(shots=shots, budget=budget)
        [truth] = evaluation.ground_truths([given], protocol)
        expected = np.isin(np.arange(40) // 10, list(chosen))
        np.testing.assert_array_equal(truth.user_summary, [expected, expected])
        assert "made of these shots for this budget" in protocol.texts()["f1"]
    # For what it was stored it stays, even if it is not what our knapsack makes of the points.
    other = given | {"user_summary": np.zeros((2, 40), np.uint8)}
    [truth] = evaluation.ground_truths([other])
    assert not truth.user_summary.any()
    assert "made of" not in protocols.TVSUM.texts()["f1"]


# ---- Shots by KTS ----


def test_shots_of_ours_make_the_annotators_summaries_anew():
    features = np.repeat(np.eye(2, 4, dtype=np.float16), [2, 6], axis=0)
    given = record("a", [1, 2, 3, 4]) | {
        "features": features,
        "picks": np.arange(0, 40, 5, dtype=np.int32),
    }
    kts = protocols.Protocol(shots="kts", budget=0.5)
    [truth] = evaluation.ground_truths([given], kts)
    np.testing.assert_array_equal(truth.shots, [[0, 10], [10, 40]])
    # The second shot is better and longer than half of the video, so the first is taken.
    expected = np.arange(40) < 10
    np.testing.assert_array_equal(truth.user_summary, [expected, expected])
    assert "shots by our KTS" in kts.texts()["f1"]
    # What people chose themselves stays: frame by frame it is their score.
    chosen = (np.arange(40) >= 35).astype(np.uint8)[None].repeat(2, 0)
    [truth] = evaluation.ground_truths(
        [
            given
            | {
                "user_summary": chosen,
                "user_scores": chosen.astype(np.float32),
                "score_times": (np.arange(40) + 0.5) / 5,
            }
        ],
        kts,
    )
    np.testing.assert_array_equal(truth.user_summary, chosen)


def test_shots_of_ours_on_frames():
    black, white = np.zeros((16, 16, 3), np.uint8), np.full((16, 16, 3), 255, np.uint8)
    given = record("a", [1, 2, 3, 4]) | {
        "frames": [black] * 3 + [white] * 5,
        "frame_times": np.arange(8.0),
    }
    [truth] = evaluation.ground_truths([given], protocols.Protocol(shots="kts"))
    np.testing.assert_array_equal(truth.shots, [[0, 15], [15, 40]])


def test_a_record_without_pictures_has_no_shots_of_ours():
    with pytest.raises(UserError, match="a has neither features nor frames"):
        evaluation.ground_truths([RECORDS[0]], protocols.Protocol(shots="kts"))


# ---- The command ----


@pytest.fixture
def command(make_config, tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "Dataset", OnePiece)

    def run(*flags):
        return main.main(["--config", str(tmp_path / "config.py"), "--mode", "evaluate", *flags])

    return run


def test_the_command_prints_a_table_and_leaves_nothing(command, write, tmp_path, capsys):
    path = write("p.json", perfect())
    before = set(tmp_path.iterdir())
    assert command("--predictions", path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "synthetic/tiny: 5 videos"
    assert lines[1] == (
        "protocol: F1 avg, tau and rho tvsum_per_annotator, shots data_set, budget 25 %"
    )
    [human] = [line for line in lines if line.startswith("human")]
    assert human.split() == ["human"] + ["1.000", "[1.000,", "1.000]"] * 3
    assert set(tmp_path.iterdir()) == before


def test_with_a_workdir_it_writes_the_numbers_and_a_page(command, write, tmp_path):
    one, two = write("<one>.json", perfect()), write("two.json", perfect())
    workdir = tmp_path / "deep" / "run"
    assert command("--predictions", one, two, "--workdir", str(workdir)) == 0
    assert {path.name for path in workdir.iterdir()} == {"evaluation.json", "evaluation.html"}
    found = json.loads((workdir / "evaluation.json").read_text())
    assert found["rows"]["human"]["tau"]["mean"] == pytest.approx(1)
    page = Page(workdir / "evaluation.html")
    for wanted in [
        "<one>.json and two.json", "<one>.json less two.json", "human 1.000 1.000 to 1.000",
        "A constant score reaches F1 0.200", *found["protocols"].values(),
    ]:  # fmt: skip
        assert wanted in page.text, wanted
    assert "<one>" not in page.source
    assert "each video once" not in page.text
    assert [link for link in page.links if not link.startswith("data:")] == []


def test_mistakes_are_a_message_and_status_2(command, write, tmp_path, capfd):
    assert command("--predictions", str(tmp_path / "none.npz")) == 2
    assert capfd.readouterr().err.startswith(f"error: predictions {tmp_path / 'none.npz'} cannot")
    path = write("p.json", perfect())
    assert command("--predictions", path, "--workdir", f"{path}/below") == 2
    assert "cannot be written" in capfd.readouterr().err
    assert command("--predictions", path, path + "2", path + "3") == 2
    assert "got 3 files of predictions" in capfd.readouterr().err


def test_the_page_shows_the_mean_over_distinct_videos(make_config, write, overlapping, tmp_path):
    scores = perfect() | {"b": {"scores": [1, 4, 3, 2], "bounds": BOUNDS}}  # as above
    found = find(make_config(f"data.folds={overlapping}"), [write("p.json", scores)])
    assert report.means_differ(found["rows"], evaluator.METRICS)
    report.write_evaluation_report(tmp_path / "page.html", found, titles=evaluator.TITLES)
    text = Page(tmp_path / "page.html").text
    p = found["rows"]["p.json"]
    numbers = " ".join(f"{p[metric]['mean_of_videos']:.3f}" for metric in evaluator.TITLES)
    assert f"The same, each video once F1 tau rho p.json {numbers} random" in text
    assert "Means over the 4 distinct videos" in text


def test_a_difference_that_rounds_to_0_has_no_sign(make_config, write, tmp_path):
    found = find(make_config(), [write("one.json", perfect()), write("two.json", perfect())])
    found["comparison"]["tau"] |= {"difference": -0.0001, "low": -0.0002, "high": 0.0001}
    report.write_evaluation_report(tmp_path / "page.html", found, titles=evaluator.TITLES)
    assert "tau +0.000 +0.000 to +0.000" in Page(tmp_path / "page.html").text
    assert "tau  +0.000 [+0.000, +0.000]" in evaluator.table(found)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--mode", "evaluate", "--predictions", "p.json", "--num_processes", "2"],
            "--predictions are evaluated by one process; leave out --num_processes",
        ),
        (
            ["--mode=evaluate", "--predictions=p", "--process_id=0", "--coordinator_address=a:1"],
            "leave out --coordinator_address, --process_id",
        ),
        (["--predictions", "p.json"], "--predictions are evaluated, not trained on"),
        (["--mode", "evaluate"], "required: --workdir"),
        ([], "required: --workdir"),
    ],
)
def test_flags_that_do_not_go_together(make_config, tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as caught:
        main.main(["--config", str(tmp_path / "config.py"), *flags])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_no_device_is_touched(make_config, write, tmp_path):
    """Where accelerators are in use by another process, jax's first look at them fails."""
    path = write("p.json", perfect())
    script = (
        "import jax, sys\n"
        "from deevisum_jax import datasets, main\n"
        "from tests.test_evaluator import OnePiece\n"
        "datasets.Dataset = OnePiece\n"
        "status = main.main(sys.argv[1:])\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "sys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "--config", tmp_path / "config.py", "--mode", "evaluate",
         "--predictions", path],
        cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)},
        check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "p.json" in done.stdout


# ---- The real thing ----


def test_the_human_row_of_tvsum(shared_data, tmp_path, make_config, capsys):
    config = make_config(
        "data.dataset=tvsum/features",
        f"data.manual_dir={shared_data / 'tvsum'}",
        f"data.data_dir={tmp_path / 'data'}",
        "eval.budget=0.15",
    )
    dataset = datasets.Dataset(config.data)
    flat = {r["video_id"]: [0.5] * r["n_frames"] for r in dataset.records()}
    (tmp_path / "flat.json").write_text(json.dumps(flat))
    evaluator.run(config, [str(tmp_path / "flat.json")])
    printed = capsys.readouterr().out
    [human] = [line.split() for line in printed.splitlines() if line.startswith("human")]
    assert (human[4], human[7]) == ("0.177", "0.204")
    [constant] = [line.split() for line in printed.splitlines() if line.startswith("constant")]
    assert 0.59 < float(constant[1]) < 0.63
    assert "F1 alone proves nothing here" in printed
    # The published folds: the same data, but not all of it.
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, folds="community", fold=2)
    )
    evaluator.run(config, [str(tmp_path / "flat.json")])
    assert "34 of 50 videos are ever tested" in capsys.readouterr().out
