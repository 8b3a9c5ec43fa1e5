"""A prediction made by hand, held against people, and the report of it."""

import dataclasses
import json

import numpy as np
import pytest

from deevisum_jax import evaluation
from deevisum_jax.inference.calibration import Calibration, Point, Promise
from deevisum_jax.inference.cost import score_flops
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.inference.speed import Saved, Speed
from deevisum_jax.models import paligemma2
from deevisum_jax.summary import protocols
from deevisum_jax.summary.protocols import Protocol, VideoGroundTruth
from deevisum_jax.typing import SegmentScores

QUARTER = Protocol(budget=0.25)
MODEL = paligemma2.get_config("tiny", exit_layers=(2, 4))
POLICY = ExitPolicy(confidence="max_probability", thresholds=(0.9,))


def truth(name: str, scores) -> VideoGroundTruth:
    """Four points, segments and shots of 2 s, 10 frames each; two people who agree."""
    scores = np.asarray(scores, float)
    best = np.repeat(scores == scores.max(), 10)
    return VideoGroundTruth(
        video_id=name,
        n_frames=40,
        native_fps=5.0,
        duration_s=8.0,
        score_times=np.array([1.0, 3.0, 5.0, 7.0]),
        user_scores=np.stack([scores, scores]),
        user_summary=np.stack([best, best]),
        shots=np.array([[0, 10], [10, 20], [20, 30], [30, 40]]),
    )


BOUNDS = np.array([[0, 2], [2, 4], [4, 6], [6, 8]])
TRUTHS = [truth("a", [1, 2, 3, 4]), truth("b", [4, 1, 2, 3])]
# The first exit has every order reversed, the second right; the first two segments leave at once.
PREDICTION = evaluation.Prediction(
    bounds=[BOUNDS, BOUNDS],
    scores=[
        SegmentScores(
            importance=np.stack([1 - row, row]),
            summary_prob=np.array([[0.95, 0.05, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]]),
            cosine=np.zeros((2, 4)),
        )
        for row in (np.array([0.2, 0.4, 0.6, 0.8]), np.array([0.8, 0.2, 0.4, 0.6]))
    ],
)


@pytest.fixture
def config(tiny_config):
    return tiny_config("eval.budget=0.25")


def test_every_exit_has_its_row(config):
    rows = evaluation.evaluate_exits(TRUTHS, PREDICTION, config, MODEL, POLICY)
    assert list(rows) == ["exit_2", "exit_4", "early_exit"]
    assert (rows["exit_2"].tau, rows["exit_2"].f1) == (-1.0, 0.0)
    assert (rows["exit_4"].tau, rows["exit_4"].rho) == (1.0, 1.0)
    assert rows["exit_4"].f1 == 1.0  # the budget is one shot, the best one
    # a: 0.8 0.6 0.6 0.8 against 1 2 3 4, b: 0.2 0.8 0.4 0.6 against 4 1 2 3. Of a's six pairs two
    # agree, two do not and two are tied: 0. Of b's one agrees (2 < 3 and 0.4 < 0.6): -4 / 6.
    assert rows["early_exit"].tau == pytest.approx((0 - 4 / 6) / 2)


def test_early_exit_cost_by_hand(config):
    cost = evaluation.early_exit_cost(PREDICTION, config, MODEL, POLICY)
    assert cost["exit_policy"] == {"confidence": "max_probability", "thresholds": [0.9]}
    assert cost["exit_rate"] == {"2": 0.5, "4": 0.5}
    assert cost["avg_depth"] == 3.0
    two, four = (score_flops(MODEL, num_frames=1, text_len=48, depth=depth) for depth in (2, 4))
    assert cost["compute_saved"] == pytest.approx(1 - (two + four) / 2 / four)


def test_never_leaving_early_saves_nothing(tiny_config):
    cost = evaluation.early_exit_cost(PREDICTION, tiny_config(), MODEL, ExitPolicy.off(2))
    assert (cost["avg_depth"], cost["compute_saved"]) == (4.0, 0.0)


@pytest.fixture
def found(config):
    models = evaluation.evaluate_exits(TRUTHS, PREDICTION, config, MODEL, POLICY)
    train = [truth("c", [1, 2, 3, 4])]
    return evaluation.Evaluation(
        exit_layers=MODEL.exit_layers,
        models=models,
        baselines=protocols.baseline_rows(train, TRUTHS, seed=0, protocol=QUARTER),
        left_out={"sound": models["exit_2"]},
        cost=evaluation.early_exit_cost(PREDICTION, config, MODEL, POLICY),
    )


def test_the_report_holds_what_the_contract_names(found):
    report = evaluation.report_json(found, steps=7)
    for name in (
        "f1", "tau", "rho", "f1_early_exit", "tau_early_exit", "avg_depth", "compute_saved",
        "wall_saved",
    ):  # fmt: skip
        assert name in report
    assert (report["tau"], report["f1"], report["steps"]) == (1.0, 1.0, 7)
    assert report["tau_early_exit"] == found.models["early_exit"].tau
    assert set(report["protocols"]) >= {"tau", "rho", "f1"}
    assert list(report["rows"]) == [
        "exit_2", "exit_4", "early_exit", "random", "constant", "time", "human", "oracle",
    ]  # fmt: skip
    assert set(report["row_protocols"]) == {"random", "constant", "time", "human", "oracle"}
    assert report["left_out"]["sound"]["tau"] == -1.0
    assert report["per_video"]["b"] == {"tau": 1.0, "rho": 1.0, "f1": 1.0}
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_the_table_has_a_line_per_row(found):
    lines = evaluation.table(evaluation.report_json(found, steps=7)).splitlines()
    assert lines[0].split() == ["row", "tau", "rho", "F1"]
    assert lines[2].split() == ["exit_4", "1.000", "1.000", "100.0"]
    assert any(line.startswith("without sound") for line in lines)
    assert lines[-1].startswith("early exit: 3.00 layers on average, which saves ")


OFF, HALF = (
    Point(
        policy=policy,
        metrics={"f1": 0.5 - loss, "tau": 0.3},
        losses={"f1": loss, "tau": 0.0},
        p_value=p_value,
        passed=True,
        avg_depth=depth,
        flops_saved=1 - depth / 4,
        exit_rate=(1 - (depth - 2) / 2, (depth - 2) / 2),
    )
    for policy, loss, p_value, depth in (
        (ExitPolicy.off(2), 0.0, 0.0, 4.0),
        (POLICY, 0.004, 0.03, 2.0),
    )
)
CALIBRATION = Calibration(
    promise=Promise(epsilons={"f1": 0.01}, delta=0.1, bound="exact"),
    num_search=100,
    num_test=300,
    curve=(OFF, HALF),
    chosen=1,
    speed=Speed(
        machine="2 cores, 5 runs",
        seconds=2.0,
        saved=(Saved(median=0.0, low=-0.01, high=0.01), Saved(median=0.45, low=0.44, high=0.47)),
    ),
)


def test_a_calibrated_run_reports_its_promise_its_curve_and_the_time_saved(found, config):
    calibrated = dataclasses.replace(found, calibration=CALIBRATION)
    report = evaluation.report_json(calibrated, steps=7)
    assert report["wall_saved"] == 0.45
    assert Calibration.from_json(report["calibration"]) == CALIBRATION
    assert evaluation.table(report).splitlines()[-1] == CALIBRATION.text
    page = evaluation.report_page(calibrated, config=config, history=[])
    assert [point["chosen"] for point in page.tradeoff["points"]] == [False, True]
    assert page.tradeoff["points"][1]["f1_loss"] == 0.004
    assert page.tradeoff["points"][1]["time_saved"]["median"] == 0.45
    assert (page.tradeoff["num_layers"], page.tradeoff["num_videos"]) == (4, 300)
    # Without one, nothing is promised, and the page says so.
    plain = evaluation.report_page(found, config=config, history=[])
    assert plain.tradeoff is None
    assert "--mode calibrate" in plain.notes[-1]
    assert "--mode calibrate" not in " ".join(page.notes)


def test_calibrating_reads_f1_and_tau_of_the_protocol(tiny_config):
    # Each of 40 videos is one of the two above, whose first exit has every order reversed and whose
    # second is right. Half of them are not sure of anything at the first.
    scores = []
    for video in range(40):
        scores.append(
            dataclasses.replace(
                PREDICTION.scores[video % 2],
                summary_prob=np.full((2, 4), 0.95 if video % 4 < 2 else 0.5),
            )
        )
    many = evaluation.Prediction(bounds=[BOUNDS] * 40, scores=scores)
    config = tiny_config(
        "eval.budget=0.25",
        "calibration.dataset=many",
        "calibration.f1=0.6",
        "calibration.tau=None",
        "calibration.confidences=('max_probability',)",
    )
    found = evaluation.calibrate(TRUTHS * 20, many, config, MODEL)
    assert found.curve[0].metrics["f1"] == pytest.approx(1.0)
    assert found.promise == Promise(epsilons={"f1": 0.6}, delta=0.1, bound="exact")
    assert found.videos == "many, split validation"
    assert found.protocol["budget"] == 0.25
    assert "(many, split validation)" in found.text
    # Those that are sure lose all of F1 and 2 of tau.
    sure = found.curve[1]
    assert sure.losses["tau"] == pytest.approx(2 * sure.exit_rate[0])
    assert sure.losses["f1"] == pytest.approx(sure.exit_rate[0])


def test_the_page_shows_the_same_rows(found, config):
    history = [{"step": 1, "loss/total": 2.0}, {"step": 1, "validation/tau": 0.5}]
    page = evaluation.report_page(found, config=config, history=history)
    assert list(page.models) == ["exit_4", "exit_2", "early_exit"]  # the headline first
    assert [row["layer"] for row in page.exits] == [2, 4]
    assert page.exits[1]["tau"] == 1.0
    assert [tuple(axis) for axis in page.losses["loss/total"]] == [(1,), (2.0,)]


def test_ground_truth_of_a_record():
    record = {
        "video_id": "a",
        "n_frames": 40,
        "native_fps": 5.0,
        "duration_s": 8.0,
        "score_times": TRUTHS[0].score_times,
        "user_scores": TRUTHS[0].user_scores,
        "user_summary": TRUTHS[0].user_summary.astype(np.uint8),
        "change_points": TRUTHS[0].shots,
    }
    [made] = evaluation.ground_truths([record])
    assert made.user_summary.dtype == bool
    np.testing.assert_array_equal(made.user_summary, TRUTHS[0].user_summary)
    np.testing.assert_array_equal(made.shots, TRUTHS[0].shots)


def test_the_deepest_exit_is_the_last_row():
    np.testing.assert_array_equal(evaluation.deepest(PREDICTION.scores[0]), [0.2, 0.4, 0.6, 0.8])
