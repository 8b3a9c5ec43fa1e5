"""The terms of a student's loss: their names, weights and numbers, and who learns from whom."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deevisum_jax import config as config_lib
from deevisum_jax.config import DistillConfig
from deevisum_jax.distill import objective
from deevisum_jax.errors import UserError
from deevisum_jax.models import paligemma2
from deevisum_jax.typing import Batch, ExitScores, TeacherOutputs

TINY = config_lib.from_file(
    str(pathlib.Path(__file__).resolve().parents[2] / "configs" / "tiny.py")
)
STUDENT = paligemma2.get_config("tiny", exit_layers=(2, 4))  # 4 layers, 32 wide
MENTOR = paligemma2.get_config("tiny", exit_layers=(7,), llm={"depth": 7, "width": 48})
TEACHER = paligemma2.get_config("tiny", exit_layers=(9,), llm={"depth": 9, "width": 64})
TEACHERS = {"mentor": MENTOR, "teacher": TEACHER}
LN3 = np.log(3.0)


def make(teachers=TEACHERS, student=STUDENT, **fields):
    config = dataclasses.replace(
        TINY,
        stages=("teacher", "mentor", "student"),
        stage="student",
        distill=DistillConfig(**{"phi": 0.5, "psi": 0.25} | fields),
    )
    return objective.make(config, student, teachers)


def weights(distill):
    return {part.name: part.weight for part in distill.parts}


def test_parts_weigh_as_their_teacher_their_kind_and_their_exit():
    found = weights(make(class_=2.0, score=3.0, token=5.0, hidden=7.0, exits=0.1))
    # Exits 2 and 4 weigh 1/3 and 2/3; the two taught layers share the weight of `hidden`.
    expected = {}
    for name, weight in (("mentor", 0.5), ("teacher", 0.25)):
        expected |= {
            f"loss/kl/{name}/class/exit_2": weight * 2 / 3,
            f"loss/kl/{name}/class/exit_4": weight * 4 / 3,
            f"loss/kl/{name}/score/exit_2": weight * 1,
            f"loss/kl/{name}/score/exit_4": weight * 2,
            f"loss/kl/{name}/token": weight * 5,
            f"loss/hidden/{name}/layer_2": weight * 3.5,
            f"loss/hidden/{name}/layer_4": weight * 3.5,
        }
    expected |= {"loss/kl/exits/class/exit_2": 0.2 / 3, "loss/kl/exits/score/exit_2": 0.1}
    assert found == pytest.approx(expected)


def test_what_has_no_weight_is_neither_computed_nor_asked_for():
    distill = make(psi=0.0, class_=0.0, token=0.0)
    assert list(weights(distill)) == ["loss/kl/mentor/score/exit_2", "loss/kl/mentor/score/exit_4"]
    [mentor] = distill.teachers
    assert (mentor.name, mentor.asked.top_k, mentor.asked.layers) == ("mentor", 0, ())
    assert objective.init_projections(distill, STUDENT, jax.random.key(0)) == {}


def test_nothing_to_learn_from_is_no_distillation():
    assert make(phi=0.0, psi=0.0) is None


def test_exits_learn_from_the_deepest_without_any_teacher():
    distill = make(phi=0.0, psi=0.0, exits=1.0)
    assert (distill.teachers, distill.online) == ((), False)
    assert set(weights(distill)) == {"loss/kl/exits/class/exit_2", "loss/kl/exits/score/exit_2"}


@pytest.mark.parametrize(("source", "online"), [("online", True), ("cache", False)])
def test_teachers_run_within_the_step_or_ran_before(source, online):
    assert make(source=source).online == online


def test_layers_are_taught_at_their_share_of_the_depth():
    mentor, teacher = make(hidden=1.0).teachers
    # Half of 7 and of 9 layers, of two the deeper; and all of them.
    assert (mentor.asked.layers, teacher.asked.layers) == ((4, 7), (5, 9))


def test_a_layer_map_names_the_layers_of_all():
    distill = make(hidden=1.0, layer_map=((1, 3, 5), (4, 7, 8)))
    assert distill.layers == (1, 4)
    assert [teacher.asked.layers for teacher in distill.teachers] == [(3, 7), (5, 8)]
    # The teacher alone keeps its column.
    [teacher] = make(phi=0.0, hidden=1.0, layer_map=((1, 3, 5), (4, 7, 8))).teachers
    assert teacher.asked.layers == (5, 8)


def test_projections_lead_to_each_teachers_width_and_keep_the_scale():
    found = objective.init_projections(make(hidden=1.0), STUDENT, jax.random.key(0))
    assert jax.tree.map(jnp.shape, found) == {
        "mentor": {"kernel": (2, 32, 48)},
        "teacher": {"kernel": (2, 32, 64)},
    }
    for projection in found.values():
        np.testing.assert_allclose(np.std(projection["kernel"]), 32**-0.5, rtol=0.05)


def refused(match, **kwargs):
    with pytest.raises(UserError, match=match):
        make(**kwargs)


def test_another_vocabulary_is_refused():
    other = dataclasses.replace(MENTOR, llm=dataclasses.replace(MENTOR.llm, vocab_size=640))
    refused(
        "the mentor has a vocabulary of 640, the student", teachers=TEACHERS | {"mentor": other}
    )


def test_other_pictures_are_refused_online_only():
    other = dataclasses.replace(TEACHER, img=dataclasses.replace(TEACHER.img, image_size=56))
    both = TEACHERS | {"teacher": other}
    refused("the teacher sees pictures of 56 pixels", teachers=both)
    assert make(teachers=both, source="cache")


def test_top_k_of_the_whole_vocabulary_is_refused():
    refused("top_k=512 must leave another token.* at most 511", top_k=512)
    assert make(top_k=511)


def test_a_layer_that_a_model_does_not_have_is_refused():
    refused("layer 5 of the student, which has 4", hidden=1.0, layer_map=((5, 1, 1),))
    refused("layer 10 of the teacher, which has 9", hidden=1.0, layer_map=((1, 1, 10),))


def test_a_layer_that_is_taught_twice_is_refused():
    refused("teaches a layer of the student twice", hidden=1.0, layer_map=((1, 1, 1), (1, 2, 2)))


def test_a_single_exit_has_none_to_teach():
    student = dataclasses.replace(STUDENT, exit_layers=(4,))
    refused("the model has one exit, at 4", exits=1.0, student=student)


def test_teachers_without_any_part_are_refused():
    refused("every part to learn has the weight 0", class_=0.0, score=0.0, token=0.0)


# ---- Numbers ----


def make_batch(**said) -> Batch:
    """Two rows, the second of which fills up the batch; a suffix of one token."""
    fields = {field.name: None for field in dataclasses.fields(Batch)}
    return Batch(
        **fields
        | {
            "tokens": jnp.array([[2, 3, 4], [9, 9, 9]]),
            "mask_input": jnp.ones((2, 3), bool),
            "mask_loss": jnp.array([[False, False, True]] * 2),
            "valid": jnp.array([True, False]),
            "teachers": said,
        }
    )


def make_output(class_logits, importance, collected=None) -> paligemma2.Output:
    importance = jnp.array(importance)
    exits = ExitScores(
        class_logits=jnp.array(class_logits),
        importance=importance,
        cosine=jnp.zeros_like(importance),  # teaches nobody
    )
    return paligemma2.Output(pre_logits=None, collected=collected, exits=exits)


def test_all_parts_by_hand_and_rows_that_fill_up_a_batch_add_nothing():
    distill = make(psi=0.0, hidden=1.0, exits=1.0, temperature=1.0, layer_map=((3, 1, 1),), top_k=1)
    huge = 77.0
    mentor = TeacherOutputs(
        class_logits=jnp.array([[LN3, 0.0], [huge, -huge]]),
        importance=jnp.array([LN3, huge]),
        token_ids=jnp.array([[[5]], [[5]]]),
        token_log_probs=jnp.log(jnp.array([[[0.75, 0.25]], [[0.5, 0.5]]])),
        hidden=jnp.array([[[1.0, 0.0]], [[huge, 1.0]]]),
    )
    collected = jnp.zeros((4, 2, 3)).at[2].set(jnp.array([[2.0, 0, 0], [huge, huge, 0]]))
    projections = {"mentor": {"kernel": jnp.array([[[0.0, 4.0], [1, 1], [1, 1]]])}}
    own = [[[0.0, 0.0], [-huge, huge]], [[LN3, 0.0], [huge, huge]]]
    found = objective.compute(
        distill,
        make_output(own, [[0.0, -huge], [LN3, huge]], collected),
        {"mentor": jnp.log(jnp.array([[[0.5, 0.5]], [[0.9, 0.1]]]))},
        make_batch(mentor=mentor),
        jnp.array([[True], [False]]),
        projections,
    )
    kl = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)  # of (3/4, 1/4) and (1/2, 1/2)
    expected = {
        "loss/kl/mentor/class/exit_2": kl,
        "loss/kl/mentor/class/exit_4": 0,
        "loss/kl/mentor/score/exit_2": kl,
        "loss/kl/mentor/score/exit_4": 0,
        "loss/kl/mentor/token": kl,
        "loss/hidden/mentor/layer_3": 2,  # (0, 8) is at right angles to (1, 0)
        "loss/kl/exits/class/exit_2": kl,
        "loss/kl/exits/score/exit_2": kl,
    }
    counts = objective.counts(distill, make_batch())
    assert set(found) == set(expected) == set(counts)
    for name, total in found.items():
        np.testing.assert_allclose(total.sum, expected[name], rtol=1e-5, atol=1e-6, err_msg=name)
        assert total.count == counts[name] == 1, name


def test_all_positions_count_the_prompt_too():
    # Tokens 3 and 4 of the one valid row.
    counts = objective.counts(make(positions="all"), make_batch())
    assert counts["loss/kl/mentor/token"] == 2
    assert counts["loss/kl/mentor/class/exit_2"] == 1


def test_what_exits_learn_from_the_deepest_leaves_the_deepest_alone():
    distill = make(phi=0.0, psi=0.0, exits=1.0)

    def loss(class_logits, importance):
        output = make_output(class_logits, importance)
        mask = jnp.ones((2, 1), bool)
        found = objective.compute(distill, output, {}, make_batch(), mask, {})
        return sum(total.sum for total in found.values())

    given = (jnp.array([[[0.0, 0], [0, 0]], [[LN3, 0], [1, 0]]]), jnp.array([[0.0, 0], [LN3, 1]]))
    to_classes, to_importance = jax.grad(loss, (0, 1))(*given)
    assert (to_classes[0, 0] != 0).all()
    assert to_importance[0, 0] != 0
    assert (to_classes[1] == 0).all()
    assert (to_importance[1] == 0).all()
