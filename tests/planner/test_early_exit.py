"""What is compiled of an early exit, what follows from it, and how it is shown."""

import dataclasses

import pytest

from deevisum_jax.errors import UserError
from deevisum_jax.inference import cost
from deevisum_jax.planner import early_exit, plan, report
from deevisum_jax.planner.early_exit import EarlyExit
from tests.planner.test_made import planned
from tests.planner.test_plan import made, refusal

MS = 819_000_000  # bytes of HBM that a v5e moves in a millisecond


def lasting(ms: float, *, flops: int = 0, **changes) -> plan.Plan:
    """A plan on v5e whose time is all HBM's."""
    nothing = {"cycles": 0, "traffic": {}, "ring_s": 0.0}
    spent = dataclasses.replace(made().cost, hbm_bytes=round(ms * MS), flops=flops, **nothing)
    return made(cost=spent, model_flops=flops, mode="early_exit", **changes)


def three_stages() -> EarlyExit:
    """60, 20 and 20 ms with 50, 25 and 25 FLOPs; a gather takes 2 ms, the fused pass 96."""
    return EarlyExit(
        whole=lasting(96, flops=100),
        stages=(
            lasting(60, flops=50, part="pictures, layers 1 to 2"),
            lasting(20, flops=25, part="layers 3 to 4"),
            lasting(20, flops=25, part="layers 5 to 6"),
        ),
        gather=lasting(2, part="gather"),
    )


@pytest.mark.parametrize(
    ("rates", "flops", "ms"),
    [
        ((0, 0, 1), 0, 60 + 20 + 20),  # dearer than the fused pass
        ((1, 0, 0), 50, 60),
        ((0.5, 0, 0.5), 25, 60 + 2 + 0.5 * (20 + 20)),  # nobody is parted at the second exit
        ((0.5, 0.5, 0), 37.5, 60 + 2 + 0.5 * 20),
        ((0.5, 0.25, 0.25), 31.25, 60 + 2 + 0.5 * (20 + 2) + 0.25 * 20),
    ],
)
def test_a_stage_costs_those_who_get_to_it(rates, flops, ms):
    saved = three_stages().saved(rates)
    assert saved.flops == pytest.approx(flops / 100)
    assert saved.time == pytest.approx(1 - ms / 96, abs=1e-6)


def test_what_overlaps_makes_two_times_of_one():
    """Half of 100 ms; with 50 ms of rings behind each other, half of 150."""
    found = three_stages()
    slow = lambda one: dataclasses.replace(one, cost=dataclasses.replace(one.cost, ring_s=0.05))
    saved = dataclasses.replace(
        found, whole=slow(lasting(100)), stages=(slow(found.stages[0]), *found.stages[1:])
    ).saved((1, 0, 0))
    assert saved.time == pytest.approx(1 - 60 / 100)
    assert saved.time_sum == pytest.approx(1 - (60 + 50) / (100 + 50))


@pytest.mark.parametrize("num_exits", [2, 4])
def test_examples_share_out_all_segments(num_exits):
    for words, rates in early_exit.examples(num_exits).items():
        assert len(rates) == num_exits, words
        assert sum(rates) == pytest.approx(1), words
    halves = early_exit.examples(4)["half of those that are there at every exit"]
    assert halves == (0.5, 0.25, 0.125, 0.125)


def test_stages_and_a_gather_are_given_to_the_compiler(mesh):
    config = planned("model.exit_layers=(1,3,4)", "eval.batch_size=16")
    first, second, third, gather = plan._stages_and_gather(config, mesh)
    assert [one.part for one in (first, second, third, gather)] == [
        "pictures, layers 1 to 1",
        "layers 2 to 3",
        "layers 4 to 4",
        "gather",
    ]
    # Pictures are an argument of the first alone: of 16 segments 2 on each of 8 devices.
    text = {one.part: one.lower().as_text() for one in (first, second, gather)}
    assert ["ui8>" in text[one.part] for one in (first, second, gather)] == [True, False, False]
    model_config, _ = plan._model(config)
    S = config.data.num_frames * model_config.img.num_patches + config.data.text_len
    D = model_config.llm.width
    batches = [f"tensor<2x{S}x{D}xf32>" in text[one.part] for one in (first, second, gather)]
    assert batches == [True, True, True]
    # Parameters are arguments of stages; a gather moves segments only.
    assert [len(one.placed) > 0 for one in (first, gather)] == [True, False]


def test_the_stages_cost_what_the_full_pass_does(mesh):
    config = planned("model.exit_layers=(1,3,4)", "eval.batch_size=16")
    *stages, gather = plan._stages_and_gather(config, mesh)
    by_formula = [one.model_flops for one in stages]
    model_config, _ = plan._model(config)
    assert sum(by_formula) == 16 * cost.exit_flops(model_config, config.data)[-1]
    assert by_formula[1] == 2 * by_formula[2]  # two layers and one
    # Counted in the traced pass, with the exit heads: of so small a model they are seen.
    assert sum(by_formula) == pytest.approx(plan._scoring(config, mesh).model_flops, rel=0.01)
    assert gather.model_flops == 0


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.exit_layers=(4,)", "one exit only, so nobody leaves early"),
        ("eval.batch_size=12", "eval.batch_size=12 is not divisible"),
    ],
)
def test_what_has_no_stages_is_refused(mesh, override, words):
    with pytest.raises(UserError, match=words):
        next(plan._stages_and_gather(planned(override), mesh))


def test_plans_are_kept_one_by_one(monkeypatch, tiny_config):
    found, kept = three_stages(), []
    monkeypatch.setattr(plan, "plan_parts", lambda *_: iter([*found.stages, found.gather]))
    monkeypatch.setattr(plan, "plan", lambda config, topology, mode: found.whole)
    got = early_exit.plan(tiny_config(), found.whole.topology, kept.append)
    assert got == found
    assert kept == [*found.stages, found.gather, found.whole]


def cells(page: str) -> list[list[str]]:
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_table_has_stages_the_gather_and_the_full_pass():
    segment = 64 // 16  # of each chip
    found = three_stages()
    stages = tuple(
        lasting(60, flops=segment * 10**12, part=one.part, notes=()) for one in found.stages
    )
    page = report.early_exit("3b", dataclasses.replace(found, stages=stages))
    assert page.startswith("3b, early exit, on v5e:4x4: batch 64, mesh data 1, fsdp 16, tensor 1")
    head, _, first, *_, gather, whole = cells(page)[:7]
    column = dict(zip(head, first, strict=True))
    assert column == {
        "part": "pictures, layers 1 to 2",
        "TF by formula": "1",
        "compiled TF": "1",
        "HBM GB": "49.1",
        "sent GB": "0",
        "peak GiB": "4.00",
        "compute ms": "0",
        "HBM ms": "60",
        "links ms": "0 to 0",
        "step ms": "60 to 60",
        "of the full pass": "62.5% to 62.5%",  # 60 of 96
        "compile CPU-s": "1",
    }
    assert gather[0] == "gather"
    assert whole[:2] == ["full pass", "2.5e-11"]
    assert "a batch between two stages has 1024.0 MiB on a chip" in page
    assert "note: gather: a note" in page


def test_what_is_saved_is_below():
    rows = {row[0]: row[1:] for row in cells(report.early_exit("3b", three_stages()))}
    # As by hand above: 60 + 2 + 20 of 96 ms.
    half = rows["half at the first exit, the others at the last"]
    assert half == ["25.0%", "14.6% to 14.6%"]


def test_a_stage_without_room_is_shown_and_nothing_is_saved():
    found = three_stages()
    page = report.early_exit("3b", dataclasses.replace(found, gather=refusal(20, part="gather")))
    assert "does not fit, 20.00 of 15.75 GiB, 4.25 GiB too much" in page
    assert "who leaves" not in page
    whole = report.early_exit("3b", dataclasses.replace(found, whole=refusal(20)))
    [first] = [row for row in cells(whole) if row[0] == "pictures, layers 1 to 2"]
    assert first[-2] == "-"  # no share of what has no time
