"""Exits within one compiled function: what they say, and which stages run."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from deevisum_jax import sharding
from deevisum_jax.data import pipeline
from deevisum_jax.inference import in_graph, scoring
from deevisum_jax.models import paligemma2
from tests.inference import staging
from tests.inference.staging import CONFIG

BATCH = 16
ROWS = staging.make_rows(45)  # of three batches three rows are none


@pytest.fixture(scope="module")
def host_params():
    return staging.make_params()


@pytest.fixture(scope="module")
def full(host_params):
    return staging.full_scores(ROWS, host_params)


def on_mesh(name, host_params, policy):
    """The compiled function with its parameters on a mesh, and that mesh."""
    mesh = staging.make_mesh(name)
    where = sharding.param_shardings(host_params, mesh)
    score = in_graph.make_score_fn(CONFIG, where, mesh, policy)
    return score, jax.device_put(host_params, where), mesh


def run(name, host_params, policy):
    """`ExitedScores` by video."""
    score, params, mesh = on_mesh(name, host_params, policy)
    found = []
    with jax.set_mesh(mesh):
        for fields in pipeline.in_order(ROWS, batch_size=BATCH):
            said = jax.device_get(score(params, sharding.place_batch(fields, mesh)))
            valid = fields["valid"]
            found.append(
                (
                    fields["video_id"][valid],
                    fields["segment"][valid],
                    jax.tree.map(lambda a, valid=valid: a[valid], said),
                )
            )
    return scoring.by_video(found)


def assert_same(found, full, policy):
    assert sorted(found) == sorted(full)
    for video, scores in full.items():
        want = scoring.at_exit(scores, policy)
        np.testing.assert_array_equal(found[video].exit_index, want.exit_index)
        np.testing.assert_allclose(found[video].importance, want.importance, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found[video].summary_prob, want.summary_prob, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "shares"),
    [
        ("entropy", (0.5, None, 0.5)),
        ("cosine", (0.5, 0.5, None)),
        ("agreement", (0.5, 0.5, 0.5)),
    ],
)
def test_it_says_what_one_pass_says_of_every_segment_where_it_leaves(
    host_params, full, kind, shares
):
    policy = staging.make_policy(full, kind, shares)
    assert_same(run("1", host_params, policy), full, policy)


@pytest.mark.parametrize("mesh", ["8", "2x4", "2x2x2"])
def test_the_mesh_changes_nothing(host_params, full, mesh):
    policy = staging.make_policy(full, "agreement", (None, 0.5, 0.5))
    assert_same(run(mesh, host_params, policy), full, policy)


@pytest.fixture
def staged(host_params, full, monkeypatch):
    """A compiled batch: `score(leaving_by, poisoned)` gives the scores, and the exits that ran.

    Segments that stay longer than to the exit `leaving_by` are marked as none.
    """
    policy = staging.make_policy(full, "max_probability", (0.4, 0.5, 0.5))
    [fields, *_] = pipeline.in_order(ROWS, batch_size=BATCH)
    exits = scoring.at_exit(full[3], policy).exit_index[:BATCH]
    assert set(exits) == {0, 1, 2, 3}
    batch = sharding.place_batch(fields, staging.make_mesh("1"))
    ran = []
    run_exit = in_graph._run_exit

    def noted(model, embedded, x):
        jax.debug.callback(lambda: ran.append(x))
        return run_exit(model, embedded, x)

    monkeypatch.setattr(in_graph, "_run_exit", noted)
    score = jax.jit(
        lambda params, batch: in_graph.score(paligemma2.bind(CONFIG, params), batch, policy)
    )

    def spoiled(params, layers):
        """Without a number in the layers behind the first so many."""
        llm = params["llm"]
        broken = jax.tree.map(lambda a: np.where(spread(a) < layers, a, math.nan), llm["layers"])
        return params | {"llm": llm | {"layers": broken}}

    def spread(leaf):
        return np.arange(len(leaf)).reshape(-1, *[1] * (leaf.ndim - 1))

    def call(leaving_by, good_layers=4):
        valid = exits <= leaving_by
        ran.clear()
        found = score(spoiled(host_params, good_layers), dataclasses.replace(batch, valid=valid))
        found = jax.device_get(found)
        jax.effects_barrier()
        return jax.tree.map(lambda a: a[valid], found), exits[valid], sorted(ran)

    return call


def test_stages_run_until_everybody_has_left_and_no_further(staged):
    for x in range(4):
        found, exits, ran = staged(x)
        assert ran == list(range(x + 1))
        np.testing.assert_array_equal(found.exit_index, exits)
    # Who left at the first exit is not touched by layers that spoil everybody else.
    found, exits, ran = staged(0, good_layers=1)
    assert ran == [0]
    assert np.isfinite(found.importance).all()
    found, exits, ran = staged(3, good_layers=1)
    assert ran == [0, 1, 2, 3]
    np.testing.assert_array_equal(np.isnan(found.importance), exits > 0)


def test_it_can_be_exported_and_called_again(host_params, full):
    policy = staging.make_policy(full, "cosine", (None, 0.5, None))
    score, params, mesh = on_mesh("1", host_params, policy)
    first, second, _ = pipeline.in_order(ROWS, batch_size=BATCH)
    with jax.set_mesh(mesh):
        exported = jax.export.export(score)(params, sharding.place_batch(first, mesh))
        assert exported.mlir_module().count("stablehlo.case") == 3
        found = jax.device_get(exported.call(params, sharding.place_batch(second, mesh)))
    assert (second["video_id"] == np.repeat([3, 4], [4, 12])).all()
    np.testing.assert_array_equal(
        found.exit_index[4:], scoring.at_exit(full[4], policy).exit_index[:12]
    )
    np.testing.assert_allclose(
        found.importance[4:], scoring.at_exit(full[4], policy).importance[:12], rtol=0, atol=1e-5
    )
