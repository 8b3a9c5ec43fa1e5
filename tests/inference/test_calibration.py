"""P-values by hand and by simulation, and promises that are kept as often as they say."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from scipy import stats

from deevisum_jax.errors import UserError
from deevisum_jax.inference import calibration
from deevisum_jax.inference.calibration import Calibration, Promise
from deevisum_jax.inference.speed import Saved, Speed
from deevisum_jax.typing import CONFIDENCES, SegmentScores

INF = math.inf
DRAWS = 2000


def at_most(draws, probability):
    """Of a thousand honest counts one is larger."""
    return stats.binom.ppf(0.999, draws, probability)


def promise(f1=0.1, delta=0.1, bound="exact", **epsilons):
    return Promise(epsilons={"f1": f1, **epsilons}, delta=delta, bound=bound)


# P-values by hand.


def test_what_loses_nothing_multiplies_the_wealth_by_a_fixed_factor():
    # 1 + 0.9 * 0.1 / 0.9 = 1.1 per video.
    for n in (1, 10, 30):
        p = calibration.p_value(np.zeros(n), 0.1, reach=1, bet=0.9)
        assert p == pytest.approx(1.1**-n)


def test_a_loss_of_everything_takes_the_bet_and_a_gain_wins():
    # 1.1 for nothing lost, 0.1 for all, 1 + 0.9 * 0.6 / 0.9 = 1.6 for half gained.
    p = calibration.p_value(np.array([0, 1, -0.5]), 0.1, reach=1, bet=0.9)
    assert p == 1  # 1 / 0.176 is no probability
    assert calibration.p_value(np.ones(1000), 0.1, reach=1, bet=0.9) == 1
    p = calibration.p_value(np.array([0, -0.5]), 0.1, reach=1, bet=0.9)
    assert p == pytest.approx(1 / 1.76)


def test_tau_can_lose_twice_as_much():
    # 1 + 0.5 * 0.4 / 1.6 = 1.125.
    assert calibration.p_value(np.zeros(2), 0.4, reach=2, bet=0.5) == pytest.approx(1.125**-2)


def test_the_bet_follows_the_spread_the_number_and_delta():
    # Spread 0.5, delta e^-2: 0.9 * sqrt(2 * 2 / n) / 0.5 is 0.36 of 100 videos, 0.18 of 400.
    losses = np.array([-0.25, 0.25, 0.75])
    for n, expected in ((100, 0.36), (400, 0.18)):
        bet = calibration.best_bet(losses, 0.1, reach=1, delta=math.exp(-2), num_test=n)
        assert bet == pytest.approx(expected)
        # Not the mean, of which a search part knows little.
        assert bet == pytest.approx(
            calibration.best_bet(losses + 0.2, 0.1, reach=1, delta=math.exp(-2), num_test=n)
        )


@pytest.mark.parametrize("losses", [np.zeros(5), np.array([0.0, 0.01])])
def test_no_bet_risks_all(losses):
    assert calibration.best_bet(losses, 0.1, reach=1, delta=0.1, num_test=10) == 0.95


def test_the_bet_is_near_the_one_that_wins_most_often():
    rng = np.random.default_rng(0)
    losses = np.clip(rng.normal(0.02, 0.4, (DRAWS, 300)), -1, 1)

    def wins(bet):
        return np.mean([calibration.p_value(row, 0.1, reach=1, bet=bet) <= 0.1 for row in losses])

    bet = calibration.best_bet(losses[0], 0.1, reach=1, delta=0.1, num_test=300)
    best = max(wins(b) for b in (0.05, 0.1, 0.2, 0.3, 0.45, 0.6))
    assert 0 < bet < 0.95
    assert wins(bet) >= best - 0.02


def test_the_normal_bound_is_a_t_test():
    # Mean 0, spread 0.1, 0.05 of room in 4 videos: t = 0.05 / 0.1 * 2 = 1 with 3 degrees.
    losses = np.array([-1, 1, -1, 1]) * 0.1 * math.sqrt(3 / 4)
    assert calibration.normal_p_value(losses, 0.05) == pytest.approx(stats.t.sf(1, 3))
    assert calibration.normal_p_value(np.zeros(3), 0.05) == 0
    assert calibration.normal_p_value(np.full(3, 0.1), 0.05) == 1


def test_p_values_are_the_same_in_any_order_of_videos():
    rng = np.random.default_rng(1)
    losses = rng.uniform(-1, 1, 200) * 10.0 ** rng.integers(-6, 0, 200)
    for _ in range(20):
        mixed = rng.permutation(losses)
        assert calibration.p_value(mixed, 0.1, reach=1, bet=0.7) == calibration.p_value(
            losses, 0.1, reach=1, bet=0.7
        )
        assert calibration.normal_p_value(mixed, 0.1) == calibration.normal_p_value(losses, 0.1)


@pytest.mark.parametrize(
    ("asked", "least"),
    [
        # Factors 1 + 0.95 * 0.1 / 0.9 = 1.1056, 1 + 0.95 * 0.1 / 1.9 = 1.05, and ln 10 = 2.303.
        (promise(f1=0.1), 23),
        (promise(f1=0.1, tau=0.1), 48),
        (promise(f1=0.1, delta=0.01), 46),
        (promise(f1=0.005, tau=0.01), 484),
        (promise(f1=0.1, bound="normal"), 100),
    ],
)
def test_the_fewest_videos_that_can_show_a_promise(asked, least):
    assert calibration.least_videos(asked) == least


def test_one_video_less_than_the_fewest_shows_nothing():
    n = calibration.least_videos(promise(f1=0.1))
    assert calibration.p_value(np.zeros(n), 0.1, reach=1, bet=0.95) <= 0.1
    assert calibration.p_value(np.zeros(n - 1), 0.1, reach=1, bet=0.95) > 0.1


# P-values of hypotheses that are just true: the mean loss is epsilon.

MEAN = 0.1


def two_points(high, low=0.0):
    """`high` as often as makes the mean `MEAN`, else `low`."""
    share = (MEAN - low) / (high - low)
    return lambda rng, size: np.where(rng.random(size) < share, high, low)


JUST_BROKEN = {
    "rarely all": two_points(1.0),
    "rarely half": two_points(0.5),
    "often a little, rarely a great gain": two_points(0.15, low=-1.0),
    "gain or loss": two_points(1.0, low=-1.0),
    "uniform": lambda rng, size: rng.uniform(MEAN - 0.5, MEAN + 0.5, size),
    "skewed": lambda rng, size: rng.beta(0.1, 0.9, size),
    "always the same": lambda rng, size: np.full(size, MEAN),
}


@pytest.mark.parametrize("name", JUST_BROKEN)
@pytest.mark.parametrize(("num_test", "delta"), [(30, 0.1), (200, 0.05)])
def test_the_exact_bound_is_fooled_as_rarely_as_it_says(name, num_test, delta):
    rng = np.random.default_rng(2)
    fooled = 0
    for losses in JUST_BROKEN[name](rng, (DRAWS, 20 + num_test)):
        bet = calibration.best_bet(losses[:20], MEAN, reach=1, delta=delta, num_test=num_test)
        fooled += calibration.p_value(losses[20:], MEAN, reach=1, bet=bet) <= delta
    assert fooled <= at_most(DRAWS, delta)


def test_the_normal_bound_is_right_for_many_videos_and_wrong_for_few_skewed_ones():
    rng = np.random.default_rng(3)

    def fooled(losses):
        return sum(calibration.normal_p_value(row, MEAN) <= 0.1 for row in losses)

    assert fooled(JUST_BROKEN["uniform"](rng, (DRAWS, 300))) <= at_most(DRAWS, 0.1)
    # Fifteen videos show no loss in 0.9^15 = 21 % of the draws.
    assert fooled(JUST_BROKEN["rarely all"](rng, (DRAWS, 15))) > at_most(DRAWS, 0.1)


# Whole calibrations. What a segment costs where it leaves is written into its importance, so that a
# video's F1 is 0.6 less the mean of what is read, and its tau 0.2 less half of that.

LAYERS, FLOPS = (2, 4, 6), (4.0, 7.0, 10.0)


def evaluate(video, importance):
    lost = float(np.mean(importance))
    return {"f1": 0.6 - lost, "tau": 0.2 - lost / 2}


def population(num_videos, *, num_exits=3, num_segments=6, seed=0, cost=None):
    """Segments of which an exit is the less sure, and costs the more, the harder they are."""
    rng = np.random.default_rng(seed)
    shape = num_exits, num_segments
    if cost is None:
        cost = np.linspace(0.5, 0, num_exits)
    videos = []
    for _ in range(num_videos):
        hard = rng.random(num_segments)
        paid = (rng.random(shape) < hard**2) * np.asarray(cost)[:, None]
        paid += rng.normal(0, 0.02, shape)
        paid[-1] = 0
        videos.append(
            SegmentScores(
                importance=paid.astype(np.float32),
                summary_prob=np.broadcast_to(1 - hard / 2, shape).astype(np.float32),
                cosine=rng.uniform(-1, 1, shape).astype(np.float32),  # knows nothing
            )
        )
    return videos


def calibrate(scores, asked, **kwargs):
    given = {"exit_layers": LAYERS, "flops": FLOPS, "confidences": ["max_probability"], "seed": 0}
    return calibration.calibrate(scores, evaluate, promise=asked, **{**given, **kwargs})


def true_loss(videos, policy):
    """Mean loss of F1 over all videos of a population; all have as many segments."""
    segments = jax.tree.map(lambda *rows: np.concatenate(rows, axis=1), *videos)
    exits = policy.exit_index(segments)
    return segments.importance[exits, np.arange(len(exits))].mean()


@pytest.fixture(scope="module")
def videos():
    return population(240)


@pytest.mark.parametrize("bound", calibration.BOUNDS)
def test_promises_are_kept_as_often_as_they_say_and_time_is_saved(bound):
    # Videos are drawn from a finite population, whose mean loss is known.
    rng, everybody, epsilon, delta, repeats = (
        np.random.default_rng(5),
        population(600),
        0.05,
        0.2,
        60,
    )
    broken, saved = 0, []
    known = {}
    for seed in range(repeats):
        drawn = [everybody[i] for i in rng.integers(len(everybody), size=200)]
        found = calibrate(drawn, promise(epsilon, delta, bound), max_points=12, seed=seed)
        if found.policy not in known:
            known[found.policy] = true_loss(everybody, found.policy)
        broken += known[found.policy] > epsilon
        saved.append(found.curve[found.chosen].flops_saved)
    assert broken <= at_most(repeats, delta)
    assert np.mean(saved) > 0.2  # of 0.6; off would be no promise to keep


def test_the_curve_goes_from_off_to_cheap_and_the_last_that_passed_is_chosen(videos):
    found = calibrate(videos, promise(0.06))
    saved = [point.flops_saved for point in found.curve]
    passed = [point.passed for point in found.curve]
    assert found.curve[0].policy.is_off
    assert found.curve[0].losses == {"f1": 0, "tau": 0}
    assert found.curve[0].metrics == pytest.approx({"f1": 0.6, "tau": 0.2})
    assert saved == sorted(saved)
    assert 0 < found.chosen < len(found.curve) - 1  # what the next saving would cost is there, too
    assert passed == [True] * (found.chosen + 1) + [False] * (len(saved) - found.chosen - 1)
    # The sequence ended at the first that was not shown.
    p_values = [point.p_value for point in found.curve[found.chosen :]]
    assert p_values[0] <= 0.1 < p_values[1]
    assert set(p_values[2:]) == {None}
    assert found.policy == found.curve[found.chosen].policy
    assert len(found.curve) <= 16


def test_what_a_point_says_of_itself(videos):
    found = calibrate(videos, promise(0.06))
    for point in found.curve:
        # Exits run 2, 4, 6 layers and save 0.6, 0.3 and 0 of the FLOPs.
        assert sum(point.exit_rate) == pytest.approx(1)
        assert point.avg_depth == pytest.approx(np.dot(point.exit_rate, [2, 4, 6]))
        assert point.flops_saved == pytest.approx(np.dot(point.exit_rate, [0.6, 0.3, 0]))
        assert point.metrics["f1"] == pytest.approx(0.6 - point.losses["f1"])
        assert point.losses["tau"] == pytest.approx(point.losses["f1"] / 2)
    assert found.curve[-1].exit_rate == (1, 0, 0)
    assert (found.num_search, found.num_test) == (60, 180)


def test_every_metric_that_is_named_counts(videos):
    loose = calibrate(videos, promise(0.1, delta=0.2))
    # Tau loses half of what F1 does.
    tight = calibrate(videos, Promise(epsilons={"f1": 0.1, "tau": 0.025}, delta=0.2))
    alone = calibrate(videos, Promise(epsilons={"tau": 0.025}, delta=0.2))
    saved = [found.curve[found.chosen].flops_saved for found in (loose, tight, alone)]
    assert saved[0] > saved[1]
    assert saved[1] <= saved[2]


def test_a_bad_first_exit_is_not_used_and_a_good_second_one_is():
    scores = population(240, cost=(0.0, 0.0, 0.0))
    for of_video in scores:
        of_video.importance[0] = 1.0  # F1 is lost whole, however sure the exit is
    found = calibrate(scores, promise(0.02))
    assert found.policy.thresholds[0] == INF
    # All that the second exit saves, and a segment that leaves there loses nothing.
    assert found.curve[found.chosen].flops_saved == pytest.approx(0.3)


def test_the_confidence_that_knows_something_is_chosen(videos):
    found = calibrate(videos, promise(0.06), confidences=["cosine", "max_probability"])
    assert found.policy.confidence == "max_probability"


def test_the_order_of_segments_changes_nothing(videos):
    rng = np.random.default_rng(6)

    def mixed(of_video):
        order = rng.permutation(of_video.importance.shape[1])
        rows = {f.name: getattr(of_video, f.name)[:, order] for f in dataclasses.fields(of_video)}
        return SegmentScores(**rows)

    def rounded(video, importance):  # sums in any order
        return evaluate(video, np.sort(importance))

    given = {"exit_layers": LAYERS, "flops": FLOPS, "promise": promise(0.06), "seed": 0}
    one = calibration.calibrate(videos, rounded, **given)
    other = calibration.calibrate([mixed(of_video) for of_video in videos], rounded, **given)
    assert one == other


def test_the_same_seed_gives_the_same_and_the_split_is_drawn_by_it(videos):
    assert calibrate(videos, promise()) == calibrate(videos, promise())
    assert calibrate(videos, promise()).curve[1] != calibrate(videos, promise(), seed=1).curve[1]


def test_the_search_part_alone_makes_the_row_and_the_test_part_alone_the_p_values(videos):
    searched = np.random.default_rng(0).permutation(len(videos))[:60]
    others = population(len(videos), seed=9)
    changed = [videos[v] if v in searched else others[v] for v in range(len(videos))]
    one, other = calibrate(videos, promise(0.06)), calibrate(changed, promise(0.06))
    assert [p.policy for p in one.curve] == [p.policy for p in other.curve]
    assert one.curve[1].p_value != other.curve[1].p_value
    assert one.curve[-1].losses != other.curve[-1].losses


def test_a_video_is_evaluated_once_for_the_same_exits(videos):
    asked = []

    def counted(video, importance):
        asked.append((video, importance.tobytes()))
        return evaluate(video, importance)

    calibration.calibrate(
        videos, counted, exit_layers=LAYERS, flops=FLOPS, promise=promise(), seed=0
    )
    assert len(set(asked)) == len(asked)


@pytest.mark.parametrize("num_exits", [2, 5, 12])
def test_the_search_tries_a_bounded_number_of_policies(num_exits):
    asked = []

    def counted(video, importance):
        asked.append(video)
        return evaluate(video, importance)

    scores = population(60, num_exits=num_exits)
    found = calibration.calibrate(
        scores,
        counted,
        exit_layers=range(1, num_exits + 1),
        flops=np.arange(1, num_exits + 1),
        promise=promise(0.2),
        seed=0,
    )
    # 3 confidences (entropy orders as max_probability does) of 256 policies at most, and the curve.
    assert len(asked) <= 15 * (3 * 256 + 1) + 45 * len(found.curve)
    assert found.chosen > 0


def test_entropy_is_searched_if_it_is_asked_for_without_max_probability(videos):
    found = calibrate(videos, promise(0.06), confidences=["entropy"])
    assert {point.policy.confidence for point in found.curve[1:]} == {"entropy"}
    assert found.chosen > 0


def test_where_only_agreement_is_asked_of_two_exits_nobody_can_leave():
    # The first exit agrees with nobody, and the second is the last.
    scores = population(60, num_exits=2)
    found = calibrate(
        scores, promise(0.2), exit_layers=(3, 6), flops=(1, 2), confidences=["agreement"]
    )
    assert found.policy.is_off
    assert len(found.curve) == 1
    assert "no policy lets a segment leave" in found.text


# What is said.


def test_what_is_promised_in_words(videos):
    text = calibrate(videos, promise(0.06, tau=0.04)).text
    assert text.startswith(
        "Early exit loses at most 6 points of F1 and 0.04 of tau on average, with 90 % confidence, "
        "for videos drawn like the 180 it was tested on; there it saved "
    )
    assert "exact: it holds for any distribution" in text


def test_the_normal_bound_says_that_it_is_approximate(videos):
    text = calibrate(videos, promise(0.06, bound="normal")).text
    assert "holds approximately, for many videos" in text


@pytest.mark.parametrize("bound", calibration.BOUNDS)
def test_where_nothing_is_shown_exits_are_off_and_the_text_says_how_many_videos_would(bound):
    # All segments of a video leave or none; then it gains or loses 0.5 of F1 by chance.
    rng = np.random.default_rng(7)

    def lottery(num_videos):
        drawn = rng.choice(np.float32([-0.5, 0.5]), num_videos)
        sure = np.full((2, 6), 0.75, np.float32)
        return [
            SegmentScores(
                importance=np.stack([np.full_like(sure[0], lost), np.zeros_like(sure[0])]),
                summary_prob=sure,
                cosine=sure,
            )
            for lost in drawn
        ]

    given = {"exit_layers": (3, 6), "flops": (4, 10), "seed": 1}
    asked = promise(0.1, delta=0.01, bound=bound)
    few = calibrate(lottery({"exact": 80, "normal": 136}[bound]), asked, **given)
    assert few.policy.is_off
    needed, row = few.videos_needed
    assert f"Early exit is off: {few.num_test} test videos did not show" in few.text
    saved = 100 * few.curve[row].flops_saved
    assert (
        f"about {needed} test videos would show it of a policy that saves {saved:.0f} %" in few.text
    )
    many = calibrate(lottery(4 * needed), asked, **given)
    assert not many.policy.is_off


def test_where_everything_breaks_the_promise_more_videos_are_not_asked_for():
    found = calibrate(
        population(150, cost=(1.0, 0.9, 0.0)),
        promise(0.005, bound="normal"),
        confidences=["cosine"],
    )
    assert found.policy.is_off
    assert found.videos_needed is None
    assert "allow a larger loss" in found.text


def test_a_calibration_survives_json(videos):
    for asked in (promise(0.06, tau=0.05), promise(0.03, delta=0.001, bound="normal")):
        found = calibrate(videos, asked)
        written = json.dumps(found.to_json(), allow_nan=False)
        assert Calibration.from_json(json.loads(written)) == found
    assert json.loads(written)["text"] == found.text
    assert json.loads(written)["policy"] == found.policy.to_json()


def test_the_time_that_was_measured_belongs_to_the_points(videos):
    found = calibrate(videos, promise(0.06))
    assert found.time_saved is None
    shares = [Saved(median=row / 100, low=0.0, high=1.0) for row in range(len(found.curve))]
    speed = Speed(machine="one core", seconds=1.5, saved=tuple(shares))
    timed = dataclasses.replace(found, speed=speed)
    assert timed.time_saved == found.chosen / 100
    assert Calibration.from_json(json.loads(json.dumps(timed.to_json()))) == timed


# What a user may get wrong.


def test_too_few_videos_says_how_many_it_takes():
    with pytest.raises(UserError) as error:
        calibrate(population(20), promise(0.1))
    assert str(error.value).startswith("15 of 20 calibration videos are left for the test")
    # 23 for the test; a quarter of 30 is 7.5, so that 8 of 31 are searched on.
    assert "even if nothing were lost it takes 23, 31 in all with a search share of 0.25" in str(
        error.value
    )
    assert '(a larger epsilon or delta), or take the bound "normal"' in str(error.value)


def test_as_many_videos_as_the_message_says_are_enough():
    calibrate(population(31), promise(0.1))
    with pytest.raises(UserError, match="22 of 30 calibration videos"):
        calibrate(population(30), promise(0.1))


def test_too_few_videos_even_for_the_normal_bound():
    with pytest.raises(UserError, match="it takes 100, 134 in all") as error:
        calibrate(population(120), promise(0.1, bound="normal"))
    assert 'bound "normal"' not in str(error.value)


@pytest.mark.parametrize("epsilon", [0, -0.1, 1, math.nan])
def test_a_loss_that_nobody_can_promise(epsilon):
    with pytest.raises(UserError, match="must be above 0 and below 1"):
        promise(f1=epsilon)


@pytest.mark.parametrize("delta", [0, 1, 1.5, math.nan])
def test_a_probability_that_is_none(delta):
    with pytest.raises(UserError, match=r"must be between 0 and 1, such as 0.1"):
        promise(delta=delta)


def test_a_promise_of_nothing():
    with pytest.raises(UserError, match="names what may be lost: of f1, tau"):
        Promise(epsilons={}, delta=0.1)


def test_an_unknown_metric():
    with pytest.raises(UserError, match="metric 'taus'; did you mean 'tau'"):
        Promise(epsilons={"taus": 0.1}, delta=0.1)


def test_an_unknown_bound():
    with pytest.raises(UserError, match="no bound 'exakt'; did you mean 'exact'"):
        promise(bound="exakt")


def test_an_unknown_confidence():
    with pytest.raises(UserError, match="'max_prob'; did you mean 'max_probability'"):
        calibrate(population(40), promise(), confidences=["max_prob"])


def test_no_confidence():
    with pytest.raises(UserError, match=f"of {', '.join(CONFIDENCES)}"):
        calibrate(population(40), promise(), confidences=[])


def test_a_model_with_one_exit():
    with pytest.raises(UserError, match="only exit is layer 6, its last"):
        calibrate(population(40, num_exits=1), promise(), exit_layers=(6,), flops=(1,))


@pytest.mark.parametrize("share", [0, 1, -0.5])
def test_a_search_share_that_is_none(share):
    with pytest.raises(UserError, match="searched on must be between 0 and 1"):
        calibrate(population(40), promise(), search_share=share)


@pytest.mark.parametrize("field", ["importance", "summary_prob", "cosine"])
def test_scores_that_are_not_finite(field):
    scores = population(40)
    getattr(scores[7], field)[1, 2] = np.nan if field == "cosine" else np.inf
    with pytest.raises(UserError, match="video 7 at the exit after layer 4 are not finite"):
        calibrate(scores, promise())


def test_policies_in_a_file_are_checked(videos):
    found = calibrate(videos, promise()).to_json()
    found["curve"][0]["policy"] = {"confidence": "cosine", "thresholds": [7.0, None]}
    with pytest.raises(UserError, match=r"threshold 7.0 is not within"):
        Calibration.from_json(found)
