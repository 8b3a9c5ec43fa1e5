"""What is given to the compiler: steps with adapters, with teachers, and a teacher's own pass."""

import contextlib
import json
import re

import pytest

from deevisum_jax import config as config_lib
from deevisum_jax import sharding
from deevisum_jax.config import LoraConfig
from deevisum_jax.errors import UserError
from deevisum_jax.models import paligemma2, pytree
from deevisum_jax.planner import plan
from tests.conftest import TINY_CONFIG

LORA = ("model.lora.rank=2",)
NF4 = (*LORA, "model.lora.base=nf4", "model.lora.tile=8")
TEACHER, MENTOR, STUDENT = (
    paligemma2.VARIANTS[f"quickstart_{stage}"].llm for stage in ("teacher", "mentor", "student")
)


def planned(*overrides: str) -> config_lib.Config:
    return config_lib.from_file(str(TINY_CONFIG), overrides)


def num_bytes(made, start: str) -> int:
    return sum(one.num_bytes for one in made.placed if one.path.startswith(start))


def num_params(made) -> int:
    return pytree.num_params(made.params)


def test_only_what_trains_has_moments(mesh):
    made = plan._training(planned(*LORA), mesh, ())
    trained = {one.path.removeprefix("params/") for one in made.placed if "params/" in one.path}
    moments = {one.path.split("mu/")[1] for one in made.placed if "mu/" in one.path}
    assert moments == trained
    assert all("lora" in path or path.startswith("exits/") for path in trained)


def test_codes_of_4_bits_are_two_to_a_byte(mesh):
    """`float32[4, 2, 32, 64]` over 8 chips, as it is and in codes with a scale for 8."""
    place = "frozen/llm/layers/mlp/gating_einsum"
    numbers = 4 * 2 * 32 * 64 // 8
    assert num_bytes(plan._training(planned(*LORA), mesh, ()), place) == 4 * numbers
    found = plan._training(planned(*NF4), mesh, ())
    assert num_bytes(found, f"{place}/qvalue") == numbers // 2
    assert num_bytes(found, f"{place}/scale") == 4 * numbers // 8


def test_the_largest_model_in_4_bits_takes_two_gigabytes_of_each_of_8_chips(mesh):
    """28B: q, kv and o 3 x 32 x 128 x 4608, gate, up and down 3 x 4608 x 36864; 46 layers."""
    config = paligemma2.get_config(
        "paligemma2_28b", lora=LoraConfig(rank=8, base="nf4", tile=64), param_dtype="bfloat16"
    )
    shapes = paligemma2.abstract_params(config)
    placed = list(plan.placement(shapes, sharding.param_shardings(shapes, mesh)))
    numbers = 46 * (3 * 32 * 128 * 4608 + 3 * 4608 * 36_864)
    of = lambda end: sum(one.num_bytes for one in placed if one.path.endswith(end))
    assert of("/qvalue") == numbers // 2 // 8  # 1.63e9
    assert of("/scale") - of("norm/scale") - of("ln1/scale") - of("ln2/scale") == (
        2 * numbers // 64 // 8
    )
    # Every chip has the whole of each adapter's side that is not as wide as the model.
    assert 4 * 57_090_048 // 8 < of("_lora_a") + of("_lora_b") < 4 * 57_090_048
    assert 2.0e9 < of("") < 2.5e9  # with the token table and SigLIP, in bfloat16


def test_flops_of_adapters_leave_out_gradients_of_what_is_frozen(mesh):
    """Nothing flows back to pictures, and frozen weights' own gradients are a third of the rest."""
    full = plan._training(planned(), mesh, ()).model_flops
    found = plan._training(planned(*LORA), mesh, ()).model_flops
    quantized = plan._training(planned(*NF4), mesh, ()).model_flops
    assert full / 3 < found < 0.9 * full  # the adapters of so small a model are a tenth of it
    assert quantized == found  # finding the numbers of codes is no product


def test_counted_gradients_are_twice_the_forward_pass_where_all_but_little_trains(mesh):
    full = plan._training(planned(), mesh, ()).model_flops
    found = plan._training(planned("optim.frozen=('llm/final_norm/scale',)"), mesh, ()).model_flops
    assert found == pytest.approx(full, rel=0.03)


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """The stages of a small distillation, the student's teachers cached or online."""
    folder = tmp_path_factory.mktemp("stages")

    def make(source: str) -> tuple[config_lib.Config, ...]:
        file = folder / f"{source}.py"
        described = {
            "teacher": {
                "model": {"variant": "quickstart_teacher", "exit_layers": [2, TEACHER.depth]}
            },
            "mentor": {
                "model": {"variant": "quickstart_mentor", "exit_layers": [2, MENTOR.depth]},
                "distill": {"phi": 1.0},
            },
            "student": {
                "model": {"variant": "quickstart_student", "exit_layers": [2, STUDENT.depth]},
                "distill": {"phi": 1.0, "psi": 0.5, "hidden": 1.0, "top_k": 7},
            },
        }
        common = {"distill": {"source": source}}
        file.write_text(
            "import json, runpy\n"
            "def get_config():\n"
            f"    config = runpy.run_path({str(TINY_CONFIG)!r})['get_config']()\n"
            f"    config.update(json.loads({json.dumps(json.dumps(common))}))\n"
            f"    config.stages = json.loads({json.dumps(json.dumps(described))})\n"
            "    return config\n"
        )
        return config_lib.stages_from_file(str(file))

    return make


def test_cached_teachers_are_part_of_the_batch(mesh, stages, monkeypatch):
    given = lowered_with(monkeypatch)
    of_all = stages("cache")
    made = plan._training(of_all[-1], mesh, of_all)
    made.lower()
    [(_, batch)] = given
    B = of_all[-1].batch_size
    assert set(batch.teachers) == {"mentor", "teacher"}
    said = batch.teachers["teacher"]
    assert said.class_logits.shape == (B, 2)
    assert said.token_ids.shape == (B, 2, 7)  # the word and its end
    assert said.token_log_probs.shape == (B, 2, 8)
    assert said.hidden.shape == (B, len(of_all[-1].model.exit_layers), TEACHER.width)
    assert not num_bytes(made, "teacher/")
    assert num_bytes(made, "params/distill/teacher/kernel")


def test_online_teachers_are_arguments_and_cost_what_they_compute(mesh, stages, monkeypatch):
    given = lowered_with(monkeypatch)
    of_online, of_cached = stages("online"), stages("cache")
    online, cached = (plan._training(found[-1], mesh, found) for found in (of_online, of_cached))
    online.lower()
    [(_, batch, params)] = given
    assert batch.teachers == {}
    assert set(params) == {"mentor", "teacher"}
    assert num_bytes(online, "teacher/") > num_bytes(online, "mentor/") > 0
    assert online.model_flops > 2 * cached.model_flops  # the teacher is larger by far
    # Of the student, without the projections that it learns beside.
    student = paligemma2.num_params(plan._model(of_cached[-1])[0])
    assert num_params(online) == num_params(cached) == student


def lowered_with(monkeypatch) -> list[tuple]:
    """Arguments that a step is lowered with, in place of lowering."""
    given = []

    def jit(step, shardings, mesh, where=None):
        fake = contextlib.nullcontext()
        fake.lower = lambda *args: given.append(args)
        return fake

    monkeypatch.setattr(plan.train_step, "jit", jit)
    return given


def test_a_teachers_pass_is_planned_at_the_size_of_evaluation(mesh, stages):
    of_all = stages("cache")
    made = plan._caching(of_all[0], mesh, of_all)
    assert made.batch_size == of_all[0].eval.batch_size
    assert num_params(made) == num_params(plan._training(of_all[0], mesh, of_all))
    # The mentor learns no hidden states.
    assert made.notes == ("as the mentor asks; differently by the student",)
    text = made.lower().as_text()
    # Each device says of its rows what the 64 likeliest words are, and the rest.
    assert f"tensor<{made.batch_size // 8}x2x65xf32>" in text


def test_a_stage_that_nobody_learns_from_is_not_cached(mesh, stages):
    of_all = stages("cache")
    with pytest.raises(UserError, match="no other stage learns from student"):
        plan._caching(of_all[-1], mesh, of_all)
    with pytest.raises(UserError, match="no other stage learns from this experiment"):
        plan._caching(planned(), mesh, ())


@pytest.mark.parametrize("overrides", [LORA, NF4])
def test_a_step_with_adapters_is_one_program(mesh, overrides):
    made = plan._training(planned(*overrides), mesh, ())
    text = made.lower().as_text()
    # Adapters are arguments and results; codes of 4 bits arguments alone.
    assert len(re.findall(r"func\.func public", text)) == 1
    signature = re.search(r"func\.func public @main\((.*?)\) -> \((.*?)\) \{\n", text, re.DOTALL)
    arguments, results = (signature[i].count("xui4>") for i in (1, 2))
    assert (arguments, results) == ((5, 5) if overrides == NF4 else (0, 0))
