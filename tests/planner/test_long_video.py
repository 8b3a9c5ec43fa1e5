"""What is compiled of a long video, with nothing compiled."""

import jax
import pytest

from deevisum_jax import sharding
from deevisum_jax.errors import UserError
from deevisum_jax.inference import cost
from deevisum_jax.planner import chips, environment, long_video, plan
from tests.planner.test_made import planned
from tests.planner.test_plan import made

ONE = chips.topology("v5e:1x1")
# configs/tiny.py: 4 patches; a tower of width 16, MLP 32; 32 wide behind the projection.
P, D, F, WIDE = 4, 16, 32, 32


@pytest.fixture
def of():
    """What is made of a video of so many frames, by the way of merging."""
    mesh = sharding.make_mesh(devices=jax.devices()[:1])

    def make(num_frames, part, *overrides):
        with jax.set_mesh(mesh):
            return long_video._made(planned(*overrides), mesh, num_frames, part)

    return make


def test_flops_by_hand(of):
    raw = of(10, "raw patches").model_flops
    model = of(1, "raw patches")
    assert raw == 10 * model.model_flops
    tiny, _ = plan._model(planned())
    encoded = cost.score_flops(tiny, num_frames=1, text_len=1, depth=0)
    # The other tower has a pooling head in place of the projection: one query over the patches.
    pooled = 2 * (2 * D * D + 2 * P * D * D + 2 * P * D + 2 * D * F)
    assert model.model_flops == 2 * encoded - 2 * P * D * WIDE + pooled
    # Three linear layers over patches, one over the query.
    learned = of(10, "learned projections").model_flops
    assert learned - raw == 10 * 2 * (3 * P + 1) * WIDE * WIDE


def test_the_whole_video_is_given_to_the_compiler(of):
    found = of(10, "learned projections", "eval.batch_size=4")
    assert found.batch_size == 4
    assert found.part == "learned projections"
    assert found.notes == ("10 frames, 32 of them keyframes",)
    placed = {one.path: one for one in found.placed}
    assert placed["frames"].shape == (10, 28, 28, 3)
    assert placed["params/merge/key/kernel"].shape == (WIDE, WIDE)
    lowered = found.lower()
    text = lowered.as_text()
    assert "tensor<10x28x28x3xui8>" in text
    made = lowered.out_info
    assert made.key_patches.shape == (32, P, WIDE)
    assert made.merged.shape == (10, WIDE)
    assert made.embeddings.shape == (10, D)


def test_a_config_that_merges_names_the_number_of_keyframes(of):
    overrides = ("model.merge.num_keyframes=3", "data.num_frames=4")
    assert of(10, "raw patches", *overrides).notes == ("10 frames, 3 of them keyframes",)


def test_plans_are_kept_one_by_one(monkeypatch, tiny_config):
    kept = []
    monkeypatch.setattr(environment, "devices", lambda _: jax.devices()[:1])
    monkeypatch.setattr(
        plan, "planned", lambda given, topology, mode, mesh: made(part=given.part, mode=mode)
    )
    found = long_video.plan(tiny_config(), ONE, 10, kept.append)
    assert [one.part for one in found] == ["raw patches", "learned projections"]
    assert kept == list(found)


@pytest.mark.parametrize(
    ("topology", "num_frames", "words"),
    [
        ("v5e:2x2", 10, "planned for one chip, v5e:2x2 has 4; give --topology v5e:1x1"),
        ("v5e:1x1", 0, "--num_frames 0 is no video"),
    ],
)
def test_what_cannot_be_planned_is_refused(tiny_config, topology, num_frames, words):
    with pytest.raises(UserError, match=words):
        long_video.plan(tiny_config(), chips.topology(topology), num_frames, lambda _: None)
