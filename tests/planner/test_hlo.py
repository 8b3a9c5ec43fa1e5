"""What the planner reads of compiled programs, real ones trimmed and pieces of them."""

import pytest

from deevisum_jax.planner.collectives import read
from deevisum_jax.planner.hlo import Program
from deevisum_jax.planner.instructions import parse
from tests.planner import small_programs


def program(body: str, *others: str, header: str = "HloModule small, num_partitions=16") -> Program:
    """A program with these lines as its entry; `others` are whole computations."""
    return Program("\n".join([header, *others, "ENTRY %main (x: f32[]) -> f32[] {", body, "}"]))


@pytest.mark.parametrize("name", small_programs.ON_ONE_CHIP)
def test_flops_are_those_by_hand(name):
    *_, flops = small_programs.ON_ONE_CHIP[name]
    assert Program(small_programs.stored(name)).flops == flops


def test_a_product_reads_both_factors_and_writes_one_result():
    found = Program(small_programs.stored("matmul"))
    assert found.hbm_bytes == 2 * (512 * 1024 + 1024 * 256 + 512 * 256)


def test_nested_scans_multiply_their_trips():
    found = Program(small_programs.stored("nested_scans"))
    loops = sorted(found.trips(one) for one, *_ in found.executed() if one.opcode == "while")
    assert loops == [3, 5]
    # 15 products and copies behind them, 3 doublings; the compiler's own figures for each.
    assert found.cycles == 15 * (6236 + 4076) + 3 * 5270
    assert found.notes == ()


def test_a_windowed_einsum_steps_by_two():
    found = Program(small_programs.stored("windowed_einsum"))
    assert [found.trips(one) for one, *_ in found.executed() if one.opcode == "while"] == [4]
    assert found.flops == 2 * 4096**3
    # Once before the loop, four times in each of its rounds: bf16[256, 4096], all of it.
    sent = found.traffic["collective-permute"]
    assert (sent.count, sent.num_bytes) == (17, 17 * 256 * 4096 * 2)


def test_a_loop_that_may_end_early_counts_to_its_bound_and_says_so():
    found = Program(small_programs.stored("while_until"))
    assert found.flops == 26 * 2 * 512**3
    assert any("may end early" in note for note in found.notes)


def test_every_branch_counts_and_is_told():
    found = Program(small_programs.stored("conditional"))
    assert found.cycles == 7302 + 6272  # the product, and a copy in front
    assert any("every branch" in note for note in found.notes)


def test_pallas_kernels_have_flops_by_their_author_and_no_time():
    found = Program(small_programs.stored("pallas"))
    assert found.kernels == 7
    assert any(note.startswith("7 runs of Pallas kernels") for note in found.notes)
    silent = Program(small_programs.stored("pallas").replace('"cost_estimate"', '"other"'))
    assert silent.flops == 0
    assert any("7 of them tell no FLOPs" in note for note in silent.notes)


def test_every_kind_of_collective_sends_what_a_ring_would():
    traffic = Program(small_programs.stored("collectives")).traffic
    part = 1024 * 512 * 2  # bf16 of one chip, bytes
    assert {kind: (one.count, one.num_bytes, one.whole_bytes) for kind, one in traffic.items()} == {
        "all-gather": (1, 3 / 4 * 4 * part, 4 * part),  # over 4 chips
        "all-reduce": (1, 2 * 15 / 16 * part, 2 * part),  # over 16
        "reduce-scatter": (1, 3 / 4 * part, part),
        "all-to-all": (1, 3 / 4 * part, part),
        "collective-permute": (1, part, part),
    }


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,4,8,12},{1,5,9,13},{2,6,10,14},{3,7,11,15}}", (0, 4, 8, 12)),
        ("{}", tuple(range(16))),
        ("[4,4]<=[16]", (0, 1, 2, 3)),
        ("[4,4]<=[4,4]T(1,0)", (0, 4, 8, 12)),
        ("[8,2]<=[2,4,2]T(1,2,0)", (0, 8)),
        ("mesh['axis_0'=4,'axis_1'=4] {'axis_0'}", (0, 4, 8, 12)),
        ("mesh['axis_0'=4,'axis_1'=4] {'axis_1'}", (0, 1, 2, 3)),
        ("mesh['axis_0'=4,'axis_1'=2,'axis_2'=2] {'axis_0','axis_2'}", (0, 1, 4, 5, 8, 9, 12, 13)),
    ],
)
def test_groups_of_devices_in_each_way_of_writing(groups, first):
    body = f"""\
  %x = f32[8]{{0}} parameter(0)
  ROOT %sum = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add"""
    [(found, times)] = program(body).collectives
    assert (found.group, times) == (first, 1)
    assert found.num_bytes == 2 * (len(first) - 1) / len(first) * 32


def test_an_unreadable_group_counts_the_whole_and_is_told():
    groups = "mesh['axis_0'=4,'axis_1'=4] {'axis_0':(1)2}"
    found = program(f"""\
  %x = f32[8]{{0}} parameter(0)
  ROOT %sum = f32[8]{{0}} all-reduce(%x), replica_groups={groups}, to_apply=%add""")
    assert found.traffic["all-reduce"].num_bytes == 64
    assert any("devices cannot be read" in note for note in found.notes)


def test_a_collective_of_one_chip_sends_nothing():
    found = program("""\
  %x = f32[8]{0} parameter(0)
  ROOT %sum = f32[8]{0} all-reduce(%x), replica_groups={{0},{1}}, to_apply=%add""")
    assert found.traffic == {}


def test_a_collective_of_many_arrays_sends_them_all():
    found = program("""\
  %x = f32[8]{0} parameter(0)
  %y = bf16[8]{0} parameter(1)
  ROOT %sum = (f32[8]{0}, bf16[8]{0}) all-reduce(%x, %y), replica_groups={{0,1}}, to_apply=%add""")
    assert found.traffic["all-reduce"].num_bytes == 32 + 16


def test_a_started_gather_counts_its_whole_once():
    found = program("""\
  %x = f32[8]{0} parameter(0)
  %y = f32[2]{0} parameter(1)
  %go = ((f32[8]{0}, f32[2]{0}), (f32[32]{0}, f32[8]{0})) all-gather-start(%x, %y), \
replica_groups={{0,1,2,3}}, dimensions={0}
  ROOT %done = (f32[32]{0}, f32[8]{0}) all-gather-done(%go)""")
    traffic = found.traffic["all-gather"]
    assert (traffic.count, traffic.whole_bytes, traffic.num_bytes) == (1, 160, 120)


# As a gather that overlaps with two products is compiled: it starts in one fusion, goes on in a
# second beside a product, ends in a third.
OVERLAPPED = (
    """\
%fused_computation.1 (param_0: bf16[4,8]) -> (bf16[4,8], bf16[16,8], s32[2]) {
  %param_0 = bf16[4,8]{1,0} parameter(0)
  %all-gather.1 = bf16[16,8]{1,0} all-gather(%param_0), channel_id=66, replica_groups={{0,1,2,3}}
  ROOT %custom-call.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}, s32[2]{0:S(4)}) \
custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}""",
    """\
%async_collective_fusion.1 (param_0: bf16[4,8], param_1: s32[2]) -> (bf16[16,8], s32[2]) {
  %param_0 = bf16[4,8]{1,0} parameter(0)
  %param_1 = s32[2]{0:S(4)} parameter(1)
  %all-gather.2 = bf16[16,8]{1,0} all-gather(%param_0), channel_id=66, replica_groups={{0,1,2,3}}
  ROOT %tuple.1 = (bf16[16,8]{1,0}, s32[2]{0:S(4)}) tuple(%all-gather.2, %param_1)
}""",
    """\
%fused_computation.2 (param_0: bf16[4,8], param_1: bf16[16,8], param_2: s32[2]) -> bf16[16,8] {
  %param_0 = bf16[4,8]{1,0} parameter(0)
  %param_1 = bf16[16,8]{1,0} parameter(1)
  %all-gather.3 = bf16[16,8]{1,0} all-gather(%param_0), channel_id=66, replica_groups={{0,1,2,3}}
  %param_2 = s32[2]{0:S(4)} parameter(2)
  ROOT %custom-call.2 = bf16[16,8]{1,0} custom-call(%param_0, %param_1, %all-gather.3, %param_2), \
custom_call_target="AsyncCollectiveDone"
}""",
)


def test_a_gather_that_overlaps_with_compute_counts_once():
    found = program(
        """\
  %x = bf16[4,8]{1,0} parameter(0)
  %start = (bf16[4,8]{1,0}, bf16[16,8]{1,0}, s32[2]{0:S(4)}) fusion(%x), kind=kCustom, \
calls=%fused_computation.1
  %on = s32[2]{0:S(4)} get-tuple-element(%start), index=2
  %fusion.1 = (bf16[16,8]{1,0}, s32[2]{0:S(4)}) fusion(%x, %on), kind=kOutput, \
calls=%async_collective_fusion.1
  ROOT %done = bf16[16,8]{1,0} fusion(%x, %x, %on), kind=kCustom, calls=%fused_computation.2""",
        *OVERLAPPED,
    )
    traffic = found.traffic["all-gather"]
    assert (traffic.count, traffic.num_bytes) == (1, 3 * 4 * 8 * 2)


def test_an_all_reduce_of_which_each_chip_keeps_a_part_is_a_reduce_scatter():
    """As the compiler fuses them; the padding travels, too."""
    found = program(
        """\
  %x = bf16[504,8]{1,0} parameter(0)
  ROOT %fusion.1 = bf16[64,8]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter""",
        """\
%all-reduce-scatter (input: bf16[504,8]) -> bf16[64,8] {
  %input = bf16[504,8]{1,0} parameter(0)
  %zero = bf16[] constant(0)
  %pad.1 = bf16[512,8]{1,0} pad(%input, %zero), padding=0_8x0_0
  %all-reduce.1 = bf16[512,8]{1,0} all-reduce(%pad.1), replica_groups={{0,1,2,3,4,5,6,7}}
  %place = u32[] parameter(1)
  %first = u32[] constant(0)
  ROOT %own = bf16[64,8]{1,0} dynamic-slice(%all-reduce.1, %place, %first), \
dynamic_slice_sizes={64,8}
}""",
    )
    [(kind, traffic)] = found.traffic.items()
    assert (kind, traffic.num_bytes) == ("reduce-scatter", 7 / 8 * 512 * 8 * 2)


def test_a_convolution_with_groups_multiplies_one_group_only():
    """Feature groups divide what a kernel sees; batch groups what an output's batch is."""
    found = program("""\
  %x = bf16[4,8,128]{2,1,0} parameter(0)
  %k = bf16[1,32,64]{2,1,0} parameter(1)
  %by_features = bf16[4,8,64]{2,1,0} convolution(%x, %k), window={size=1}, \
dim_labels=b0f_0io->b0f, feature_group_count=4
  %wide = bf16[1,128,64]{2,1,0} parameter(2)
  ROOT %by_batch = bf16[1,8,64]{2,1,0} convolution(%x, %wide), window={size=1}, \
dim_labels=b0f_0io->b0f, batch_group_count=4""")
    assert found.flops == 2 * (4 * 8 * 64 * 32) + 2 * (1 * 8 * 64 * 128)


def test_padding_and_strides_of_a_convolution_are_no_products():
    """Window 3 over 5 numbers padded by one, every second place: 2 + 3 + 2 pairs, not 9."""
    found = program("""\
  %x = f32[1,5,1]{2,1,0} parameter(0)
  %k = f32[3,1,1]{2,1,0} parameter(1)
  ROOT %y = f32[1,3,1]{2,1,0} convolution(%x, %k), window={size=3 stride=2 pad=1_1}, \
dim_labels=b0f_0io->b0f""")
    assert found.flops == 2 * 7


def test_hbm_bytes_of_slices_updates_and_vmem():
    found = program(
        """\
  %x = f32[100,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %row = f32[1,8]{1,0:S(1)} fusion(%x, %i), kind=kLoop, calls=%take
  %near = f32[1,8]{1,0:S(1)} add(%row, %row)
  ROOT %kept = f32[100,8]{1,0} fusion(%x, %near, %i), kind=kLoop, calls=%put""",
        """\
%take (p0: f32[100,8], p1: s32[]) -> f32[1,8] {
  %p0 = f32[100,8]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %c = s32[] constant(0)
  ROOT %s = f32[1,8]{1,0:S(1)} dynamic-slice(%p0, %p1, %c), dynamic_slice_sizes={1,8}
}""",
        """\
%put (q0: f32[100,8], q1: f32[1,8], q2: s32[]) -> f32[100,8] {
  %q0 = f32[100,8]{1,0} parameter(0)
  %q1 = f32[1,8]{1,0:S(1)} parameter(1)
  %q2 = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %u = f32[100,8]{1,0} dynamic-update-slice(%q0, %q1, %q2, %z)
}""",
    )
    index = 4  # s32, read by each fusion
    assert found.hbm_bytes == (8 * 4 + index) + 0 + (8 * 4 + index)


def test_a_loop_without_a_known_bound_counts_once_and_is_told():
    found = program(
        """\
  %x = f32[] parameter(0)
  ROOT %loop = f32[] while(%x), condition=%until, body=%again""",
        "%until (c: f32[]) -> pred[] {\n  ROOT %c = pred[] parameter(0)\n}",
        "%again (b: f32[]) -> f32[] {\n  ROOT %b = f32[] parameter(0)\n}",
    )
    assert found.times["again"] == 1
    assert any("trips cannot be read" in note for note in found.notes)


def test_a_loop_that_does_not_begin_at_0_makes_fewer_trips():
    found = program(
        """\
  %three = s32[] constant(3)
  %start = (s32[]) tuple(%three)
  ROOT %loop = (s32[]) while(%start), condition=%until, body=%again""",
        """\
%until (c: (s32[])) -> pred[] {
  %c = (s32[]) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %ten = s32[] constant(10)
  ROOT %lt = pred[] compare(%i, %ten), direction=LT
}""",
        """\
%again (b: (s32[])) -> (s32[]) {
  %b = (s32[]) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%j, %one)
  ROOT %out = (s32[]) tuple(%next)
}""",
    )
    assert found.times["again"] == 7


def test_what_is_not_known_is_told_and_breaks_nothing():
    found = program("""\
  %x = f32[8]{0} parameter(0)
  %broken = f32[8]{0} add(%x, (%x
  %strange = bf16[8,8]{1,0} convolution(%x, %missing), dim_labels=??
  %sent = (f32[8]{0}, u32[]) send(%x), channel_id=7
  ROOT %y = f32[8]{0} some-new-thing(%x), new_attribute={{a}}""")
    assert found.flops == 0
    told = " ".join(found.notes)
    assert all(word in told for word in ("lines are left out", "strange", "1 x send"))


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no HLO text"):
        Program("HloModule nothing")


@pytest.mark.parametrize(
    ("shape", "num_bytes"),
    [
        ("bf16[4,8]{1,0:T(8,128)(2,1)}", 64),
        ("f32[10]{0}", 40),
        ("s4[16]{0}", 8),
        ("f8e4m3fn[16]{0}", 16),
        ("pred[3]{0}", 3),
        ("u32[]{:S(2)}", 4),
        ("f32[<=8]{0}", 32),
        ("token[]", 0),
        ("(f32[2]{0}, bf16[2]{0})", 12),
    ],
)
def test_bytes_of_a_shape(shape, num_bytes):
    text = f"HloModule one\nENTRY %main () -> f32[] {{\n  ROOT %x = {shape} parameter(0)\n}}"
    assert parse(text).computations["main"]["x"].num_bytes == num_bytes


def test_an_instruction_that_is_no_collective_is_none():
    [one] = (
        parse("HloModule one\nENTRY %main () -> f32[] {\n  ROOT %x = f32[2]{0} parameter(0)\n}")
        .computations["main"]
        .values()
    )
    assert read(one, {}, 4) is None
