"""The reader of final bundles, on programs small enough to count by hand."""

import pytest

from bench import bundles, hlo, replay

TIMING = replay.Timing(occupancy=lambda element: 16, delay_slots=4)


def program(*lines: str) -> str:
    """A dump: `lines` are bundles, as `marks | instructions | regions`, marks and regions optional."""
    text = ["= control target key start", "LH: loop header", "= control target key end", ""]
    for address, line in enumerate(lines):
        mark, body, regions = ([*line.split("|"), "", ""] if "|" in line else ["", line, ""])[:3]
        comment = f" /* {regions.strip()} */" if regions.strip() else ""
        text.append(f" {address:#6x} {mark.strip() or '  '} : > {{ {body.strip()} }}{comment}")
    return "\n".join(text).replace("   0x0 ", "     0 ")


def cost(*lines: str, units: str = "", core: int = 0) -> replay.Cost:
    return replay.replay(bundles.parse("kernel", program(*lines), units), TIMING, core)


def loop(start: str, body: list[str], stop: int, region: int = 1) -> list[str]:
    """`body` repeated until the counter reaches `stop`; the branch and its slots make 3 + 4 bundles more."""
    return [
        f"%s10_s1 = smov {start}",
        f"LB|%s11_s1 = sphi %s10_s1, %s12_s1 /* iteration index */|Start region {region}",
        *body,
        "%s12_s1 = sadd.s32 1, %s11_s1  ;;  %v1_v1 = vld [vmem:[#allocation2] sm:$0xff]",
        f"%p13_p1 = scmp.ge.s32.totalorder %s12_s1, {stop} /* loop exit test */",
        f"%20 = sbr.rel (!%p13_p1) target = $region{region}",
        *[""] * 4,
    ]


def test_straight_line_costs_its_bundles():
    assert cost("%v1_v0 = vmov 0.0", "", "%v2_v0 = vmov 1.0").bundles == 3


@pytest.mark.parametrize("trips", [1, 2, 7, 100])
def test_a_loop_costs_its_trips(trips):
    body = ["%v3_v0 = vadd.f32 %v1_v0, %v2_v0"] * 5
    result = cost("", *loop("0", body, trips), "")
    assert result.bundles == 2 + 1 + trips * (1 + 5 + 3 + 4)
    assert result.cycles == result.bundles and result.assumed == 0


def test_nested_loops_multiply():
    inner = [line.replace("s1", "s21").replace("p13", "p23") for line in loop("0", [], 6, region=2)]
    inner_cost = 1 + 6 * (1 + 3 + 4)
    assert cost(*loop("0", inner, 5)).bundles == 1 + 5 * (inner_cost + 1 + 3 + 4)


def test_an_inner_loop_whose_end_is_the_outer_counter():
    inner = [
        line.replace("s1", "s21").replace("p13", "p23").replace(", 99", ", %s11_s1")
        for line in loop("0", [], 99, region=2)
    ]
    # Outer counter 1, 2, 3, 4: a loop that tests at its end runs that often.
    outer = loop("1", inner, 5)
    assert cost(*outer).bundles == 1 + 4 * (1 + 3 + 4 + 1) + (1 + 2 + 3 + 4) * (1 + 3 + 4)


def test_a_predicated_region_is_charged_when_its_condition_holds():
    def body(condition):
        return [
            f"%p5_p2 = scmp.ne.s32.totalorder %s11_s1, {condition}",
            "%6 = sbr.rel (%p5_p2) target = $region7",
            *[""] * 4,
            *["%v3_v0 = vadd.f32 %v1_v0, %v2_v0"] * 30,
            "PF||Start/End empty region 7",
        ]

    around = 1 + 10 * (1 + 1 + 1 + 4 + 1 + 3 + 4)
    assert cost(*loop("0", body(3), 10)).bundles == around + 30
    assert cost(*loop("0", body(10), 10)).bundles == around


def test_instructions_after_a_taken_branch_still_happen():
    lines = [
        "%s1_s1 = smov 0",
        "%2 = sbr.rel target = $region9",
        "%s3_s2 = smov 5",
        *[""] * 3,
        *[""] * 50,
        "||Start region 9",
        *[line.replace("99", "%s3_s2") for line in loop("0", [], 99)],
    ]
    assert cost(*lines).bundles == 2 + 4 + 1 + 1 + 5 * 8


def test_spilled_counters_and_conditional_moves():
    body = [
        "%30 = sst [smem:[#allocation9_spill]] %s11_s1",
        "%s31_s2 = sld [smem:[#allocation9_spill]]",
        "%p32_p2 = scmp.lt.s32.totalorder %s31_s2, 4",
        "%s33_s2 = smov (%p32_p2, %s31_s2), 0  ;;  %s34_s3 = scalar_select /*predicate=*/%p32_p2, "
        "/*on_true=*/1, /*on_false=*/%s31_s2",
        "%p35_p3 = scmp.eq.s32.totalorder %s33_s2, 0  ;;  %p36_p4 = scmp.eq.s32.totalorder %s34_s3, 1",
        "%p37_p5 = pnand %p35_p3, %p36_p4",
        "%38 = dma.hbm_to_vmem [thread:$0]  (!%p37_p5), /*hbm=*/%s1_s9, /*size_in_granules=*/64, %s2",
    ]
    # The counter is below 4 in the first four of nine trips.
    assert cost(*loop("0", body, 9)).traffic == {"hbm_to_vmem": 4 * 64 * 32}


def test_remainders_and_shifts():
    body = [
        "%30 = sdivrem.u32 %s11_s1, 5 /* kRem */",
        "%s31_s2 = spop.drf %30",
        "%s32_s3 = sshrl.u32 %s11_s1, 1  ;;  %s33_s4 = ssub.s32 %s31_s2, 3",
        "%p34_p2 = scmp.lt.u32.totalorder %s33_s4, 2",  # unsigned: remainders 3 and 4
        "%35 = dma.vmem_to_hbm [thread:$0]  (%p34_p2), /*vmem=*/%s1, /*size_in_granules=*/%s32_s3, %s2",
    ]
    trips = range(12)
    assert cost(*loop("0", body, 12)).traffic == {"vmem_to_hbm": 32 * sum(i // 2 for i in trips if i % 5 > 2)}


def test_one_division_gives_its_quotient_and_then_its_remainder():
    body = [
        "%30 = sdivrem.u32 %s11_s1, 5 /* kDivAndRem */",
        "%s31_s2 = spop.drf %30",
        "%s32_s3 = spop.drf %30",
        "%34 = dma.vmem_to_hbm [thread:$0]  /*vmem=*/%s1, /*size_in_granules=*/%s31_s2, %s2",
        "%35 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s1, /*size_in_granules=*/%s32_s3, %s2",
    ]
    expected = {"vmem_to_hbm": 32 * sum(i // 5 for i in range(12))}
    expected["hbm_to_vmem"] = 32 * sum(i % 5 for i in range(12))
    assert cost(*loop("0", body, 12)).traffic == expected


def test_multi_line_comments_do_not_end_a_bundle():
    text = program("%3 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s1, /*size_in_granules=*/8 /* x", "")
    text = text.replace("/* x }", "/* \nbase_bounds: (128, 32)\n{window}: 1 */ }")
    kernel = bundles.parse("kernel", text)
    assert len(kernel.bundles) == 2
    assert replay.replay(kernel, TIMING).traffic == {"hbm_to_vmem": 256}


def test_matrix_instructions_hold_their_unit():
    line = "%5 = vmatmul.bf16.gmra.mxu0 %v1_v0  ;;  %6 = vmatmul.mubr.bf16.vlgmr.msra.gmra.mrb[4].mxu1 %v1_v0"
    result = cost(*loop("0", [line] * 10, 3))
    assert result.bundles == 1 + 3 * 18
    assert result.mxu_cycles == 3 * 10 * 16
    assert result.cycles == 3 * (160 + 4)  # the bundles after a branch are a run of their own
    # Spread out, they are in nobody's way.
    assert cost(*loop("0", [line, *[""] * 30], 3)).cycles == 1 + 3 * (1 + 31 + 3 + 4)


def test_a_branch_on_data_is_charged_forwards_and_refused_backwards():
    read = "%s40_s2 = sld [smem:[#allocation3 + %s11_s1]]"
    forward = [
        read,
        "%p41_p2 = scmp.eq.s32.totalorder %s40_s2, 0",
        "%42 = sbr.rel (%p41_p2) target = $region7",
        *[""] * 4,
        *["%v3_v0 = vadd.f32 %v1_v0, %v2_v0"] * 30,
        "PF||Start/End empty region 7",
    ]
    result = cost(*loop("0", forward, 4))
    assert result.assumed == 4 and result.bundles > 4 * 30
    with pytest.raises(replay.UnknownTripCount, match="constants"):
        cost(*loop("%s50_s3", [], 4))


def test_each_core_of_a_megacore_runs_its_share():
    lines = ["%s1_s1 = sld [smem:[#allocation0]] /* megacore core id :: core id */"]
    lines += ["%s10_s4 = sadd.s32 3, %s1_s1", "%s10_s1 = smov %s10_s4", *loop("%s10_s4", [], 6)[1:]]
    assert cost(*lines, core=0).bundles - cost(*lines, core=1).bundles == 8


def test_units_and_spills():
    header = "== CAPACTIY:\nMXU, XLU\n    4     3     4     2     1     3     3     1     1     2\n"
    units = header + "0 0 4 0 0 3 1 1 1 0\n0 0 2 0 0 1 0 0 0 0\n"
    result = cost("%v1_v0 = vmov 0.0", "", units=units)
    assert result.units["VALU"] == 6 / 8 and result.units["VLOAD"] == 4 / 6
    assert result.spills == 2 / 5
    with pytest.raises(ValueError, match="2 bundles"):
        bundles.parse("kernel", program("", ""), header + "0 0 0 0 0 0 0 0 0 0\n")


def test_text_that_is_no_dump():
    with pytest.raises(ValueError, match="No bundles"):
        bundles.parse("kernel", "nothing\n")
    with pytest.raises(ValueError, match=r"vmatmul\.q9"):
        bundles.parse("kernel", program("%5 = vmatmul.q9.mxu0 %v1_v0"))


HLO = """
%body (p.1: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %p.1 = (s32[], f32[8,128]{1,0:T(8,128)}) parameter(0)
  %g.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%p.1), index=1
  %f.1 = f32[8,128]{1,0:T(8,128)} fusion(%g.1), kind=kLoop, backend_config={"estimated_cycles":"10"}
  ROOT %t.1 = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%g.1, %f.1)
}

ENTRY %main.1 (a: bf16[64,128], b: s4[128,256]) -> f32[8,128] {
  %a = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = s4[128,256]{1,0:T(64,128)(8,1)} parameter(1)
  %copy-start = (bf16[64,128]{1,0:T(8,128)S(1)}, bf16[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%a)
  %copy-done = bf16[64,128]{1,0:T(8,128)(2,1)S(1)} copy-done(%copy-start)
  %k.1 = f32[64,256]{1,0:T(8,128)} custom-call(%copy-done, %b), custom_call_target="tpu_custom_call"
  %f.2 = f32[8,128]{1,0:T(8,128)S(1)} fusion(%k.1), backend_config={"estimated_cycles":"700"}
  %t = (s32[], f32[8,128]{1,0:T(8,128)}) tuple(%f.2)
  ROOT %w = (s32[], f32[8,128]) while(%t), body=%body, backend_config={"known_trip_count":{"n":"6"}}
}
"""


def test_the_schedule_of_a_compiled_program():
    kernel, fusion, looped = hlo.ops(HLO)
    assert kernel.is_kernel and kernel.hbm_bytes == 64 * 128 * 2  # only what XLA copied for it
    assert fusion.estimated_cycles == 700 and fusion.hbm_bytes == 64 * 256 * 4  # its result stays on the chip
    assert looped.times == 6 and looped.hbm_bytes == 2 * 8 * 128 * 4
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.ops("HloModule x")
