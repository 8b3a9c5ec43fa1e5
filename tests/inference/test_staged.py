"""The staged executor says what one pass says, and runs no stage more than it must."""

import collections
import dataclasses
import math

import jax
import numpy as np
import pytest

from deevisum_jax import sharding
from deevisum_jax.data import pipeline
from deevisum_jax.inference import scoring
from deevisum_jax.inference.exit_policy import ExitPolicy
from deevisum_jax.inference.staged import StagedScorer
from tests.inference import staging
from tests.inference.staging import CONFIG, INF, X

NUM_ROWS = 77  # of five batches three rows are none
BATCH = 16
ROWS = staging.make_rows(NUM_ROWS)
# Shares that leave at each exit but the last; None: nobody may.
SOME, GAP, TWO = (0.4, 0.5, 0.3), (0.5, None, 0.5), (0.5, None, None)


class CountingScorer(StagedScorer):
    """Notes which stages run, from which exit on."""

    def __init__(self, *args):
        super().__init__(*args)
        self.runs = collections.Counter()
        self.compiled = {}

    def stage(self, first, exit_):
        fn = super().stage(first, exit_)
        self.compiled[first, exit_] = fn

        def run(*args):
            self.runs[first] += 1
            return fn(*args)

        return run


@dataclasses.dataclass
class Executor:
    """A scorer with its parameters on a mesh."""

    mesh: jax.sharding.Mesh
    scorer: CountingScorer
    params: dict

    @classmethod
    def on(cls, name, host_params):
        mesh = staging.make_mesh(name)
        where = sharding.param_shardings(host_params, mesh)
        return cls(mesh, CountingScorer(CONFIG, where, mesh), jax.device_put(host_params, where))

    def run(self, policy, rows=ROWS, batch_size=BATCH):
        """The scores by video, from batches in order."""
        return self.run_batches(policy, pipeline.in_order(rows, batch_size=batch_size))

    def run_batches(self, policy, batches):
        self.scorer.runs.clear()
        with jax.set_mesh(self.mesh):
            return self.scorer.score_videos(self.params, batches, policy)


@pytest.fixture(scope="module")
def host_params():
    return staging.make_params()


@pytest.fixture(scope="module")
def full(host_params):
    return staging.full_scores(ROWS, host_params)


@pytest.fixture(scope="module")
def executors(host_params):
    """By mesh, each made once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = Executor.on(name, host_params)
        return made[name]

    return get


@pytest.fixture(scope="module")
def one(executors):
    """On one device."""
    return executors("1")


def assert_same(found, expected):
    """Of `ExitedScores` by video: the same segments, exits and scores."""
    assert sorted(found) == sorted(expected)
    for video, want in expected.items():
        got = found[video]
        np.testing.assert_array_equal(got.exit_index, want.exit_index)
        np.testing.assert_allclose(got.importance, want.importance, rtol=0, atol=1e-5)
        np.testing.assert_allclose(got.summary_prob, want.summary_prob, rtol=0, atol=1e-5)


def at_exit(full, policy):
    return {video: scoring.at_exit(scores, policy) for video, scores in full.items()}


def only(expected, rows):
    """What was expected of some rows alone."""
    kept = collections.defaultdict(list)
    for row in rows:
        kept[int(row["video_id"])].append(int(row["segment"]))
    return {
        video: jax.tree.map(lambda a, segments=segments: a[np.sort(segments)], expected[video])
        for video, segments in kept.items()
    }


def leavers(expected):
    """int[X], how many leave at each exit."""
    exits = np.concatenate([scores.exit_index for scores in expected.values()])
    return np.bincount(exits, minlength=X)


# What it says.


@pytest.mark.parametrize("kind", ["max_probability", "agreement"])
def test_segments_leave_at_every_exit_with_what_one_pass_says_there(one, full, kind):
    policy = staging.make_policy(full, kind, SOME)
    expected = at_exit(full, policy)
    counts = leavers(expected)
    assert (counts[1:] > 5).all()
    assert (counts[0] == 0) == (kind == "agreement")
    assert_same(one.run(policy), expected)


@pytest.mark.parametrize("kind", ["entropy", "cosine"])
def test_other_confidences_decide_as_for_one_pass(one, full, kind):
    policy = staging.make_policy(full, kind, TWO)
    expected = at_exit(full, policy)
    assert (leavers(expected)[[0, 3]] > 20).all()
    assert_same(one.run(policy), expected)


@pytest.mark.parametrize(
    ("kind", "starts"), [("max_probability", [0, 1, 3]), ("agreement", [0, 3])]
)
def test_an_exit_that_nobody_may_leave_at_is_passed_within_a_stage(one, full, kind, starts):
    policy = staging.make_policy(full, kind, GAP)
    expected = at_exit(full, policy)
    assert leavers(expected)[1] == 0
    assert (leavers(expected)[2:] > 5).all()
    assert_same(one.run(policy), expected)
    assert sorted(one.scorer.runs) == starts


def test_the_first_exit_ends_no_stage_where_exits_must_agree(one, full):
    policy = staging.make_policy(full, "agreement", SOME)
    one.run(policy)
    whatever = dataclasses.replace(policy, thresholds=(0.5, *policy.thresholds[1:]))
    assert_same(one.run(whatever), at_exit(full, policy))
    assert sorted(one.scorer.runs) == [0, 2, 3]


def test_all_may_leave_at_once(one, full):
    policy = ExitPolicy.of(0.5, X, "max_probability")
    assert_same(one.run(policy), at_exit(full, policy))
    assert leavers(at_exit(full, policy))[0] == NUM_ROWS
    assert one.scorer.runs == {0: 5}


def test_off_is_one_whole_pass_per_batch(one, full):
    found = one.run(ExitPolicy.off(X))
    assert_same(found, at_exit(full, ExitPolicy.off(X)))
    assert (leavers(found) == [0, 0, 0, NUM_ROWS]).all()
    assert one.scorer.runs == {0: 5}


@pytest.mark.parametrize("mesh", ["8", "2x4", "2x2x2"])
def test_the_mesh_changes_nothing(executors, full, mesh):
    policy = staging.make_policy(full, "agreement", SOME)
    assert_same(executors(mesh).run(policy), at_exit(full, policy))


@pytest.mark.parametrize("batch_size", [8, 24])
def test_the_batch_size_changes_nothing(one, full, batch_size):
    policy = staging.make_policy(full, "max_probability", TWO)
    assert_same(one.run(policy, batch_size=batch_size), at_exit(full, policy))


def test_the_order_of_rows_changes_nothing(one, full):
    policy = staging.make_policy(full, "max_probability", SOME)
    rng = np.random.default_rng(1)
    for _ in range(3):
        mixed = [ROWS[i] for i in rng.permutation(NUM_ROWS)]
        assert_same(one.run(policy, mixed), at_exit(full, policy))


def test_the_order_of_batches_changes_nothing(one, full):
    # The one with rows that are none comes first.
    policy = staging.make_policy(full, "max_probability", SOME)
    batches = [*pipeline.in_order(ROWS, batch_size=BATCH)][::-1]
    assert_same(one.run_batches(policy, batches), at_exit(full, policy))


def test_nothing_gives_nothing(one):
    assert one.run_batches(ExitPolicy.of(0.9, X, "max_probability"), []) == {}


def test_a_single_batch_of_a_few_rows_goes_all_the_way(one, full):
    policy = staging.make_policy(full, "max_probability", SOME)
    assert_same(one.run(policy, ROWS[:3]), only(at_exit(full, policy), ROWS[:3]))


# Which rows run where.


def with_holes(rows):
    """Batches of which every other row is none, and looks like a segment of the same video."""
    for fields in pipeline.in_order(
        [row for pair in zip(rows, rows, strict=True) for row in pair], batch_size=BATCH
    ):
        fields["valid"] &= np.arange(BATCH) % 2 == 1
        fields["segment"] = np.where(fields["valid"], fields["segment"], 99).astype(np.int32)
        yield fields


def test_rows_that_fill_up_a_batch_never_come_back_and_never_go_on(one, full):
    stay = ExitPolicy(confidence="max_probability", thresholds=(1.0, INF, INF))
    found = one.run_batches(stay, with_holes(ROWS))
    assert_same(found, at_exit(full, stay))
    # Ten batches of eight rows; those rows alone make up the next stage's batches.
    assert one.scorer.runs == {0: 10, 1: math.ceil(NUM_ROWS / BATCH)}


def test_batches_of_nothing_but_filling_give_nothing(one):
    def nothing():
        for fields in pipeline.in_order(ROWS[:BATCH], batch_size=BATCH):
            yield fields | {"valid": np.zeros(BATCH, bool)}

    assert one.run_batches(ExitPolicy.of(0.9, X, "max_probability"), nothing()) == {}
    assert one.scorer.runs == {0: 1}


def test_deeper_stages_run_full(one, full):
    for shares in (SOME, (0.1, 0.1, 0.1), (0.9, 0.1, 0.9)):
        policy = staging.make_policy(full, "max_probability", shares)
        expected = at_exit(full, policy)
        assert_same(one.run(policy), expected)
        reached = NUM_ROWS - np.cumsum([0, *leavers(expected)[:-1]])
        assert [one.scorer.runs[x] for x in range(X)] == [math.ceil(n / BATCH) for n in reached]


def test_survivors_of_whole_batches_are_not_moved(one, full, monkeypatch):
    picks = []
    pick = one.scorer.pick
    monkeypatch.setattr(one.scorer, "pick", lambda *args: picks.append(1) or pick(*args))
    stay = ExitPolicy(confidence="max_probability", thresholds=(1.0, 1.0, 1.0))
    assert_same(one.run(stay, ROWS[:64]), only(at_exit(full, stay), ROWS[:64]))
    assert picks == []


def uneven_policy(full):
    """A policy, and rows of `ROWS` that leave at the first stage's end, and at the last's."""
    policy = staging.make_policy(full, "agreement", SOME)
    exits = np.concatenate(
        [scores.exit_index for _, scores in sorted(at_exit(full, policy).items())]
    )
    return policy, *([ROWS[i] for i in np.flatnonzero(exits == x)] for x in (1, 3))


def test_devices_may_keep_very_different_numbers_of_rows(executors, full):
    """Four of eight devices lose all their rows at an exit, the others none."""
    policy, leaving, staying = uneven_policy(full)
    num_batches = min(len(leaving), len(staying)) // (BATCH // 2)
    assert num_batches >= 3
    rows = []
    for start in range(0, num_batches * BATCH // 2, BATCH // 2):
        for group in (leaving, staying):
            rows += group[start : start + BATCH // 2]
    executor = executors("8")
    assert_same(executor.run(policy, rows), only(at_exit(full, policy), rows))
    # Nothing travels between devices: those that are full run, each time, beside empty ones.
    assert executor.scorer.runs == {0: num_batches, 2: num_batches, 3: num_batches}


def test_a_device_that_keeps_one_row_of_every_batch_waits_for_the_next(executors, full):
    """Two rows per device: one device has a survivor in each batch, the others have none."""
    policy, leaving, staying = uneven_policy(full)
    assert len(leaving) >= 30
    rows = leaving[:30]
    rows.insert(5, staying[0])  # the third device's second row, in both batches
    rows.insert(BATCH + 5, staying[1])
    executor = executors("8")
    assert_same(executor.run(policy, rows), only(at_exit(full, policy), rows))
    assert executor.scorer.runs == {0: 2, 2: 1, 3: 1}


# When.


def test_other_thresholds_compile_nothing_anew(one, full):
    one.run(staging.make_policy(full, "max_probability", SOME))
    compiled = lambda: {key: fn._cache_size() for key, fn in one.scorer.compiled.items()}
    before, picked = compiled(), one.scorer.pick._cache_size()
    for threshold in (0.6, 0.7, 0.99, 1):
        one.run(ExitPolicy.of(threshold, X, "max_probability"))
    assert compiled() == before
    assert one.scorer.pick._cache_size() == picked


def test_a_stage_is_compiled_once(executors, full):
    """Rows that were picked and rows that come straight from a stage are placed alike."""
    executor = executors("2x2x2")
    policy = staging.make_policy(full, "agreement", SOME)
    assert_same(executor.run(policy), at_exit(full, policy))
    for key, fn in executor.scorer.compiled.items():
        assert fn._cache_size() == 1, key


def test_batches_are_read_ahead_and_leavers_come_before_the_end(one, full):
    asked = []

    def batches():
        for i, fields in enumerate(pipeline.in_order(ROWS, batch_size=BATCH)):
            asked.append(i)
            yield fields

    policy = ExitPolicy.of(0.5, X, "max_probability")  # all leave at once
    with jax.set_mesh(one.mesh):
        stream = one.scorer.stream(one.params, batches(), policy)
        assert asked == []
        video_id, segment, _ = next(stream)
        assert 1 < len(asked) < 5
        first = [(row["video_id"], row["segment"]) for row in ROWS[:BATCH]]
        assert [*zip(video_id, segment, strict=True)] == first
        rest = [*stream]
    assert sum(len(rows[0]) for rows in rest) == NUM_ROWS - BATCH


@pytest.mark.parametrize("threshold", [INF, 0.9])
def test_scores_that_are_no_numbers_come_back_from_the_last_exit(one, threshold):
    exits = jax.tree.map(lambda leaf: leaf * math.nan, one.params["exits"])
    broken = dataclasses.replace(one, params=one.params | {"exits": exits})
    found = broken.run(ExitPolicy.of(threshold, X, "max_probability"), ROWS[:4])
    np.testing.assert_array_equal(found[3].exit_index, [3] * 4)
    assert np.isnan(found[3].importance).all()
