"""Differential keyframe selection: by hand, and against the published rule in float64."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.keyframes import cosines, filling, selection
from deevisum_jax.keyframes.selection import SelectionConfig, select
from tests.keyframes import published

X_AXIS = np.asarray([1, 0], np.float32)


def at_degrees(*angles):
    """Unit vectors float32[N, 2]; relevance to `X_AXIS` is the angle's cosine."""
    radians = np.deg2rad(np.asarray(angles, np.float64))
    return np.stack([np.cos(radians), np.sin(radians)], -1).astype(np.float32)


def chosen(keyframes):
    return np.asarray(keyframes.index)[np.asarray(keyframes.is_used)].tolist()


def walked(keyframes):
    by_walk = np.asarray(keyframes.is_used) & ~np.asarray(keyframes.is_filled)
    return np.asarray(keyframes.index)[by_walk].tolist()


def assert_same(found, want):
    for field in dataclasses.fields(want):
        one, other = getattr(found, field.name), getattr(want, field.name)
        np.testing.assert_array_equal(one, other, err_msg=field.name)


# By hand.


def test_a_frame_is_kept_unless_it_repeats_a_kept_one():
    # By relevance: 0, 10, 40, 50, 90 degrees. 10 is within 30 of 0, and 50 of 40.
    frames = at_degrees(50, 0, 90, 40, 10)
    config = SelectionConfig(num_keyframes=4, tau=math.cos(math.radians(30)), fill=False)
    found = select(frames, X_AXIS, config=config)
    assert found.index.tolist() == [1, 2, 3, 5]
    assert found.is_used.tolist() == [True, True, True, False]
    assert not found.is_filled.any()
    np.testing.assert_allclose(found.relevance, [1, 0, math.cos(math.radians(40)), 0], atol=1e-7)


def test_a_similarity_of_just_tau_is_a_repetition_in_the_paper_alone():
    # The cosine of the two is 8 * 1/16 - ... = (12 - 4) / 16 = 0.5, exact in float32.
    one = np.ones(16, np.float32)
    other = np.where(np.arange(16) < 12, 1, -1).astype(np.float32)
    frames = np.stack([one, other])
    for reject, count in ((">", 2), (">=", 1)):
        config = SelectionConfig(num_keyframes=2, tau=0.5, reject=reject, fill=False)
        assert len(chosen(select(frames, one, config=config))) == count


def test_the_walk_ends_under_the_floor():
    frames = at_degrees(0, 45, 90)
    config = SelectionConfig(num_keyframes=3, floor=0.5, fill=False)
    assert chosen(select(frames, X_AXIS, config=config)) == [0, 1]
    # One that is just there is above it: (10 - 6) / 16 = 0.25.
    query = np.ones(16, np.float32)
    frames = np.where(np.arange(16) < 10, 1, -1).astype(np.float32)[None]
    for floor, count in ((0.25, 1), (0.2500001, 0)):
        config = SelectionConfig(num_keyframes=1, floor=floor, fill=False)
        assert len(chosen(select(frames, query, config=config))) == count


def test_unused_budget_is_spread_as_published():
    for num_frames, num_keyframes, kept, want in (
        (40, 8, [10, 25], [5, 10, 16, 21, 25, 31, 36, 39]),
        (600, 32, [100], [17, 34, 51, 68, 85, 100, *range(120, 596, 19)]),
        # One gap of 100 frames, 4 extras at most: D = 20, ceil(100 / 20) - 1 = 4.
        (100, 4, [], [20, 40, 60, 80]),
        (3, 8, [1], [0, 1, 2]),
        (5, 4, [0, 1], [0, 1, 3, 4]),
    ):
        assert published.distribute_frames(kept, num_frames, num_keyframes) == want
        slots = kept + [num_frames] * (num_keyframes - len(kept))
        found = filling.fill(
            jnp.asarray(slots, jnp.int32), jnp.int32(len(kept)), jnp.int32(num_frames), num_frames
        )
        assert sorted(found.tolist()) == want + [num_frames] * (num_keyframes - len(want))


def test_filling_passes_over_frames_that_are_none():
    # Frames 0, 2, 4 … 78 are the 40 of the first example above.
    frames = np.full((80, 3), np.nan, np.float32)
    frames[::2] = (0, 0, -1)
    frames[20], frames[50] = (1, 0, 0), (0, 1, 0)
    config = SelectionConfig(num_keyframes=8, tau=0.5, floor=0.01)
    want = [10, 20, 32, 42, 50, 62, 72, 78]
    query = np.ones(3, np.float32)
    assert chosen(select(frames, query, np.arange(80) % 2 == 0, config=config)) == want
    # Frames without numbers are left out even if they are said to be valid.
    assert chosen(select(frames, query, config=config)) == want


def test_without_a_query_the_nearest_to_the_mean_come_first():
    frames = at_degrees(0, 30, 60) * np.asarray([[1], [1], [100]], np.float32)
    # Unit embeddings have their mean at 30 degrees, whatever their lengths were.
    np.testing.assert_allclose(
        selection.relevance(frames), np.cos(np.deg2rad([30, 0, 30])), atol=1e-7
    )
    config = SelectionConfig(num_keyframes=1)
    assert chosen(select(frames, config=config)) == [1]


def test_of_equally_relevant_frames_the_earlier_comes_first():
    frames = at_degrees(60, -60, 60, -60)
    config = SelectionConfig(num_keyframes=2, fill=False)
    assert chosen(select(frames, X_AXIS, config=config)) == [0, 1]
    assert chosen(select(frames[::-1], X_AXIS, config=config)) == [0, 1]


@pytest.mark.parametrize("num_frames", [7, 100, 3001])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_equal_frames_are_equally_relevant_wherever_they_stand(num_frames, dtype):
    rng = np.random.default_rng(num_frames)
    frame = rng.standard_normal(77).astype(dtype)
    query = rng.standard_normal(77).astype(np.float32)
    found = np.asarray(selection.relevance(np.tile(frame, (num_frames, 1)), query))
    assert len(set(found.tolist())) == 1
    exact = frame.astype(np.float64)
    cosine = exact @ query / np.linalg.norm(exact) / np.linalg.norm(query.astype(np.float64))
    assert found[0] == np.float32(cosine)


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1e3, 1e30])
def test_the_length_of_embeddings_changes_nothing(scale):
    rng = np.random.default_rng(0)
    frames = rng.standard_normal((50, 16)).astype(np.float32)
    query = rng.standard_normal(16).astype(np.float32)
    config = SelectionConfig(num_keyframes=8, tau=0.2)
    want = select(frames, query, config=config)
    assert_same(select(frames * np.float32(2.0 ** round(math.log2(scale))), query, config=config),
                want)  # fmt: skip


# Against the published rule.

PROGRAMS = [
    # most frames, width, whether there is a query, the rule
    (64, 16, True, SelectionConfig(num_keyframes=8, tau=0.5, reject=">=", fill=False)),
    (64, 16, False, SelectionConfig(num_keyframes=8, tau=0.75, reject=">", floor=0.25)),
    (256, 16, True, SelectionConfig(num_keyframes=32, tau=0.5, reject=">")),
    (256, 64, True, SelectionConfig(num_keyframes=8, tau=0.85, reject=">=", floor=0.0, fill=False)),
    (2000, 64, True, SelectionConfig(num_keyframes=32, tau=0.75, reject=">=")),
    (2000, 64, False, SelectionConfig(num_keyframes=32, tau=0.85, reject=">", fill=False)),
]
KINDS = ("random", "lattice", "near a lattice", "one frame", "scenes", "repeated", "drifting")


def make_problem(kind, most, width, rng):
    """Frames and a query; of lattices all cosines are multiples of 1 / width, hence many ties."""
    num_frames = most if rng.random() < 0.2 else int(np.exp(rng.uniform(0, np.log(most))))
    signs = lambda rows: rng.choice([-1.0, 1.0], (rows, width))
    normal = lambda rows: rng.standard_normal((rows, width))
    of_scenes = np.arange(num_frames) // 25
    match kind:
        case "random":
            frames = normal(num_frames)
        case "lattice":
            frames = signs(num_frames)
        case "near a lattice":
            flips = np.where(rng.random((num_frames, width)) < 0.05, -1, 1)
            frames = signs(num_frames)[of_scenes] * flips
        case "one frame":
            frames = np.tile(normal(1), (num_frames, 1))
        case "scenes":
            noise = rng.choice([0.0, 1e-6, 1e-3, 0.3])
            frames = normal(num_frames)[of_scenes] + noise * normal(num_frames)
        case "repeated":
            frames = normal(num_frames)[rng.integers(0, -(-num_frames // 4), num_frames)]
        case "drifting":
            frames = np.cumsum(normal(num_frames), 0)
            frames[rng.random(num_frames) < 0.05] = 0
    near = frames[rng.integers(num_frames)] + 0.5 * normal(1)[0]
    query = signs(1)[0] if "lattice" in kind else near
    return frames.astype(np.float32), query.astype(np.float32)


@pytest.mark.parametrize("program", range(len(PROGRAMS)))
def test_the_frames_are_those_of_the_published_rule(program):
    most, width, has_query, config = PROGRAMS[program]
    rng = np.random.default_rng(program)
    problems = 1002 // len(PROGRAMS)
    for number in range(problems):
        frames, query = make_problem(KINDS[number % len(KINDS)], most, width, rng)
        query = query if has_query else None
        # Among places that hold no frames: behind them, or anywhere.
        places = np.arange(len(frames))
        if number % 2:
            places = np.sort(rng.permutation(most)[: len(frames)])
        padded = np.full((most, width), np.nan, np.float32)
        padded[places] = frames
        valid = np.isin(np.arange(most), places)
        found = jax.device_get(select(padded, query, valid, config=config, block_size=32))
        rule = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
        want, kept = published.select(frames, query, **rule)
        assert chosen(found) == places[want].tolist(), (number, KINDS[number % len(KINDS)])
        assert walked(found) == places[kept].tolist(), (number, KINDS[number % len(KINDS)])


def test_order_is_exact_where_float32_cannot_tell():
    # Relevance falls by 1e-9 from frame to frame; each repeats the first, whichever that is.
    query = np.asarray([1, 0], np.float32)
    small = 1e-3 + 1e-6 * np.arange(40)
    frames = np.stack([np.ones(40), small], -1).astype(np.float32)
    for order in (np.arange(40), np.arange(40)[::-1], np.random.default_rng(0).permutation(40)):
        config = SelectionConfig(num_keyframes=4, fill=False)
        assert chosen(select(frames[order], query, config=config)) == [int(np.argmin(order))]


def test_a_guess_holds_as_far_as_it_says():
    """A scene has more frames than are walked at first, and scenes are fewer than keyframes."""
    rule = {"num_keyframes": 12, "tau": 0.8, "reject": ">", "floor": None}
    config = SelectionConfig(**rule, fill=False)
    rng = np.random.default_rng(5)
    outcomes = set()
    long = np.arange(2000) // 250
    for noise, block_size in itertools.product((0.1, 0.6), (4, 64)):
        for scene in (long, rng.permutation(long)):
            scenes = rng.standard_normal((8, 64))[scene]
            frames = (scenes + noise * rng.standard_normal((2000, 64))).astype(np.float32)
            query, valid = rng.standard_normal(64).astype(np.float32), jnp.ones(2000, bool)
            relevance, similarity = published.cosines(frames, query)
            walk = published.walk(relevance, similarity, **rule)

            rows, asked = jnp.asarray(frames), cosines.query_or_mean(frames, query, valid)
            fast = cosines.fast_pass(rows, asked, valid)
            order_of = functools.partial(selection._order_of, rows, asked, valid, config)
            state = selection._State(selection._Kept.none(12, 64), jnp.float32(jnp.inf))
            state = selection._walk_first(rows, fast, order_of, state, config, block_size)
            assert state.limit > -1  # not all frames had their turn
            counts, struck = [int(state.kept.count)], jnp.zeros(2000, bool)
            for _ in range(3):
                state, struck = selection._guess(
                    rows, fast, struck, order_of, state, config, block_size
                )
                counts.append(int(state.kept.count))
                kept = state.kept.index[: counts[-1]].tolist()
                assert kept == walk[: counts[-1]]
                assert (relevance[walk[counts[-1] :]] <= state.limit).all()
                assert (similarity[:, kept].max(1) > 0.8)[np.asarray(struck)].all()
            assert counts == sorted(counts)
            outcomes.add("all" if state.limit == -jnp.inf else "some" * (counts[-1] > counts[0]))
            found = select(frames, query, config=config, block_size=block_size)
            assert chosen(found) == sorted(walk)
    assert outcomes >= {"all", "some"}


@pytest.mark.parametrize("block_size", [1, 3, 200])
def test_the_block_size_changes_nothing(block_size):
    rng = np.random.default_rng(1)
    frames, query = make_problem("scenes", 150, 16, rng)
    config = SelectionConfig(num_keyframes=8, tau=0.3)
    want = select(frames, query, config=config)
    assert_same(select(frames, query, config=config, block_size=block_size), want)


def test_videos_may_be_mapped_over():
    rng = np.random.default_rng(2)
    frames = np.stack([make_problem("scenes", 1, 16, rng)[0].repeat(50, 0) for _ in range(2)])
    frames = np.concatenate([frames, rng.standard_normal((2, 50, 16)).astype(np.float32)])
    query = rng.standard_normal((4, 16)).astype(np.float32)
    valid = rng.random((4, 50)) < 0.8
    config = SelectionConfig(num_keyframes=8, tau=0.3)

    def one(*video):
        return select(*video, config=config)

    found = jax.vmap(one)(frames, query, valid)
    for row in range(4):
        want = one(frames[row], query[row], valid[row])
        assert_same(jax.tree.map(lambda x, row=row: x[row], found), want)


def test_half_precision_is_what_it_stands_for():
    rng = np.random.default_rng(3)
    frames, query = make_problem("scenes", 200, 16, rng)
    config = SelectionConfig(num_keyframes=8, tau=0.3)
    for dtype in (jnp.float16, jnp.bfloat16):
        rounded = jnp.asarray(frames, dtype)
        want = select(rounded.astype(jnp.float32), query, config=config)
        assert_same(select(rounded, query, config=config), want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_no_copy_of_the_features_is_made(dtype):
    features = jax.ShapeDtypeStruct((100_000, 512), dtype)
    query = jax.ShapeDtypeStruct((512,), jnp.float32)
    compiled = select.lower(features, query, config=SelectionConfig()).compile()
    taken = compiled.memory_analysis()
    assert taken.argument_size_in_bytes >= 100_000 * 512 * features.dtype.itemsize
    # Some numbers of each frame, K of them in float32, and chunks of 4 MiB.
    assert taken.temp_size_in_bytes < 0.2 * taken.argument_size_in_bytes


# Split over devices.


@pytest.mark.parametrize("has_query", [True, False])
@pytest.mark.parametrize(("fill", "num_keyframes"), [(True, 16), (False, 4)])
def test_devices_together_choose_what_one_does(has_query, fill, num_keyframes):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    config = SelectionConfig(num_keyframes=num_keyframes, tau=0.5, fill=fill)
    rng = np.random.default_rng(4)
    for kind in KINDS:
        frames, query = make_problem(kind, 203, 16, rng)
        padded = np.full((208, 16), np.nan, np.float32)
        valid = np.arange(208) < len(frames)
        padded[valid] = frames
        query = query if has_query else None
        found = selection.select_sharded(
            padded, query, valid, config=config, mesh=mesh, axes=("data", "fsdp"), block_size=8
        )
        assert_same(found, select(padded, query, valid, config=config))


def test_frames_that_devices_do_not_divide_are_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    config = SelectionConfig()
    with pytest.raises(UserError, match=r"10 frames cannot be split over 8 .* up to 16"):
        selection.select_sharded(np.ones((10, 4)), config=config, mesh=mesh, axes=("data",))
    with pytest.raises(UserError, match="mesh axis 'dat'; did you mean 'data'"):
        selection.select_sharded(np.ones((16, 4)), config=config, mesh=mesh, axes=("dat",))


# What cannot be used.


def test_more_keyframes_than_frames_are_all_of_them():
    frames = at_degrees(0, 1, 2)
    assert chosen(select(frames, X_AXIS, config=SelectionConfig(num_keyframes=5))) == [0, 1, 2]
    config = SelectionConfig(num_keyframes=5, fill=False)
    assert chosen(select(frames, X_AXIS, config=config)) == [0]


def test_no_valid_frame_is_no_keyframe():
    found = select(np.ones((4, 2), np.float32), X_AXIS, np.zeros(4, bool), config=SelectionConfig())
    assert not found.is_used.any()
    assert (found.index == 4).all()


def test_a_zero_embedding_has_cosine_0_to_everything():
    frames = np.asarray([[0, 0], [1, 0], [0, 0], [-1, 0]], np.float32)
    np.testing.assert_array_equal(selection.relevance(frames, X_AXIS), [0, 1, 0, -1])
    config = SelectionConfig(num_keyframes=4, tau=0.5, fill=False)
    # Such frames repeat nothing, each other neither.
    assert chosen(select(frames, X_AXIS, config=config)) == [0, 1, 2, 3]
    # A query of zero says nothing: the first come first.
    config = SelectionConfig(num_keyframes=1, fill=False)
    assert chosen(select(frames[1:], np.zeros(2, np.float32), config=config)) == [0]
    selection.check_embeddings(frames)


def test_a_frame_that_is_not_finite_is_no_keyframe_and_is_named_on_the_host():
    frames = at_degrees(0, 0, 60, 90)
    frames[1, 1] = np.nan
    frames[3, 0] = np.inf
    config = SelectionConfig(num_keyframes=4, tau=0.9)
    for query in (X_AXIS, None):
        assert chosen(select(frames, query, config=config)) == [0, 2]
    with pytest.raises(UserError, match="embedding of frame 1 is not finite"):
        selection.check_embeddings(frames)


@pytest.mark.parametrize(
    ("embeddings", "query", "valid", "message"),
    [
        (np.ones((0, 4)), None, None, "shape \\(0, 4\\); give at least one frame"),
        (np.ones((4, 0)), None, None, "shape \\(4, 0\\); give at least one frame"),
        (np.ones(4), None, None, "float64\\[4\\]; give float\\[N, E\\]"),
        (np.ones((4, 2), int), None, None, "int64\\[4, 2\\]; give float\\[N, E\\]"),
        (np.ones((4, 2)), np.ones(3), None, "query is of shape \\(3,\\) .* width 2"),
        (np.ones((4, 2)), None, np.ones(3, bool), "valid is of shape \\(3,\\); give bool\\[4\\]"),
    ],
)
def test_shapes_that_do_not_go_together_are_named(embeddings, query, valid, message):
    embeddings = embeddings.astype(np.float32) if embeddings.ndim == 2 and (
        embeddings.dtype == float) else embeddings  # fmt: skip
    message = message.replace("float64", "float(32|64)").replace("int64", "int(32|64)")
    with pytest.raises(UserError, match=message):
        select(embeddings, query, valid, config=SelectionConfig())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_keyframes": 0}, "num_keyframes 0: give a whole number from 1 on"),
        ({"num_keyframes": 2.5}, "num_keyframes 2.5: give a whole number"),
        ({"tau": 1.01}, "tau 1.01 is no cosine; give a number from -1 to 1"),
        ({"tau": math.nan}, "tau nan is no cosine"),
        ({"floor": -1.5}, "floor -1.5 is no cosine"),
        ({"reject": "<"}, "reject '<'; choose one of >, >="),
    ],
)
def test_a_rule_that_is_none_is_refused(fields, message):
    with pytest.raises(UserError, match=message):
        SelectionConfig(**fields)
