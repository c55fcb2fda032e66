"""Pricing of grouped matmuls: the data that steers a replay, which cells there are, what misses a target."""

import doctest
import json
import math

import pytest
from qwix_kernels import dispatch
from qwix_kernels.chips import CHIPS

from bench import bundles, op_suite, ragged_price, ragged_problems, ragged_rows, replay, shapes
from bench.ragged_price import RaggedCell, Row
from tests.bench.test_replay import TIMING, loop, program

BALANCED, EMPTY, HALF, UNEVEN = shapes.RAGGED["canonical"]


def row(static: float = 40.0, floor: float = 31.0, layer=BALANCED, chip="v6e", scheme="w8a8", **more) -> Row:
    cell = RaggedCell(chip, scheme, layer)
    return Row(cell, "mosaic_tpu", static, static, static, 5.0, floor, kcycles=1.75 * static, **more)


def test_a_loop_that_runs_as_often_as_an_input_says():
    where = "<no memory space> [shape: s32[], index: 0, kind: input, shape index: {}]"
    lines = [f"%s1_s0 = inlined_call_operand.{where}", *loop("0", ["%v3_v0 = vadd.f32 %v1_v0, %v2_v0"], 99)]
    lines = [line.replace(", 99 ", ", %s1_s0 ") for line in lines]
    kernel = bundles.parse("kernel", program(*lines))
    assert kernel.inputs == (("s1_s0", 0),)
    assert replay.replay(kernel, TIMING, known={0: [7]}).bundles == 2 + 7 * (1 + 1 + 3 + 4)
    with pytest.raises(replay.UnknownTripCount):
        replay.replay(kernel, TIMING)


def test_scalar_memory_that_an_input_was_copied_to():
    """A DMA of three words that say how much the loop's DMAs move."""
    lines = [
        "%s1_s0 = inlined_call_operand.hbm [shape: s32[3], index: 4, kind: input, shape index: {}]",
        "%s2_s0 = sshll.u32 %s1_s0, 4",
        "%s3_s0 = int_to_ptr.vmem [resolvable:$true] %s2_s0  ;;  %s4_s0 = smov [#allocation5]",
        "%5 = dma.vmem_to_smem /*vmem=*/%s3_s0, /*size_in_granules=*/16, /*smem=*/%s4_s0, /*x=*/[#alloc1]",
        *loop("0", [
            "%s6_s0 = scalar_lea.smem [#allocation5], %s11_s1",
            "%s7_s0 = scalar_lea.smem %s6_s0, 0 [#allocation5]",
            "%s8_s0 = sld [smem:[%s7_s0]]",
            "%9 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s1, /*size_in_granules=*/%s8_s0, %s2",
        ], 3),
    ]  # fmt: skip
    kernel = bundles.parse("kernel", program(*lines))
    assert replay.replay(kernel, TIMING, known={4: [10, 0, 5]}).traffic["hbm_to_vmem"] == 32 * 15
    with pytest.raises(ValueError, match="depends on data"):
        replay.replay(kernel, TIMING)


@pytest.mark.parametrize("layer", [layer for model in shapes.RAGGED.values() for layer in model], ids=str)
def test_group_sizes_are_what_their_name_says(layer):
    sizes = layer.group_sizes()
    assert len(sizes) == layer.experts
    assert sum(sizes) == layer.rows // (2 if layer.sizes == "half" else 1)
    assert (0 in sizes) == (layer.sizes in ("empty", "half"))


def test_every_cell_gets_a_kernel():
    cells = ragged_price.cells(["v6e"])
    assert len(set(cells)) == len(cells) == 17
    for cell in cells[:6]:
        problem = ragged_problems.problem(shapes.scheme(cell.scheme), cell.layer)
        assert dispatch.explain(problem, cell.chip).chosen == "mosaic_tpu"
    with pytest.raises(ValueError, match="Unknown scheme"):
        ragged_price.cells(["v6e"], ["w3a3"])
    assert "17 cells: about" in op_suite.plan(cells, ragged_price.SUITE.seconds)


def test_what_is_known_is_the_visits():
    known = ragged_problems.known(HALF, 512)
    assert known["qwix_group_visits"] == {0: [512, 0] * 4}
    # Four tiles with rows of a group each, and four that become zero.
    assert known["qwix_gmm"][0] == [8] and known["qwix_gmm"][1][-1] == 8


def test_the_floor_is_of_the_rows_and_matrices_that_there_are():
    scheme, chip = shapes.scheme("w8a8"), CHIPS["v6e"]
    (compute, memory), (half_compute, half_memory) = (
        ragged_problems.floor(scheme, layer, chip) for layer in (BALANCED, HALF)
    )
    assert half_compute == pytest.approx(compute / 2)
    written = 4096 * 1408 * 2 / chip.hbm_gbps / 1e3
    assert half_memory - written == pytest.approx((memory - written) / 2)


def test_targets():
    targets = lambda *rows: sorted({miss.target for miss in ragged_price.found_misses(rows)})
    assert targets(row(), row(41.0, layer=UNEVEN), row(38.0, 24.0, EMPTY), row(24.0, 19.0, HALF)) == []
    assert targets(row(60.0)) == ["floor"]
    assert targets(row(60.0, scheme="wf8af8"), row(60.0, layer=UNEVEN)) == []
    assert targets(row(120.0, 119.0)) == ["reference"]
    assert targets(row(), row(41.0, 31.0, EMPTY)) == ["rows"]
    assert targets(row(), row(35.0, 19.0, HALF)) == ["rows"]
    (miss,) = ragged_price.found_misses([row(math.inf, error="the compiler died")])
    assert miss.target == "price" and "died" in miss.why


def test_known_misses_are_real():
    """Each is of a cell of the suite."""
    from bench import misses

    names = {f"{c.layer.name} {c.layer.sizes}" for c in ragged_price.cells(ragged_price.CHIPS)}
    for entry in misses.load(ragged_price.MISSES):
        assert entry["rows"] in names and entry["chip"] in ragged_price.CHIPS, entry


def test_figures_are_printed_and_written(capsys):
    rows = [row(note="how"), row(error="no")]
    ragged_price.show(rows)
    out = capsys.readouterr().out
    assert "static" in out and "how" in out and "no" in out
    first, second = json.loads(op_suite.dumps(rows))
    assert first["ratio"] == pytest.approx(40 / 31) and second["error"] == "no"


def test_the_programs_on_a_cpu():
    assert not doctest.testmod(ragged_rows).failed
    layers = ragged_rows.cpu_layers("16x32x32", ["2"])
    found = list(ragged_rows.cpu_rows(layers[:1], ["w8a8"], 2))
    assert found[0]["scheme"] == "w8a8" and found[0]["ratio_to_float32"]["median"] > 0
    with pytest.raises(ValueError, match="do not divide"):
        ragged_rows.cpu_layers("16x32x32", ["3"])
