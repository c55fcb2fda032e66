"""Pricing of matmuls with adapters: which cells there are, their programs, and what misses the target."""

import doctest
import json
import math

import pytest
from qwix_kernels import dispatch

from bench import child, lora_compile, lora_price, misses, op_suite, problems, shapes
from bench.lora_price import LoraCell, Row
from bench.shapes import Layer

SQUARE = Layer("q", 4096, 4096)


def row(static=22.0, base=20.0, kernels=1, chip="v6e", scheme="w4a16_g128", m=512, backward=False, error=""):
    cell = LoraCell(chip, scheme, m, SQUARE, backward)
    return Row(cell, static, base, kernels, 1, 0.0, 1100, 1000, 0.9, "MXU", error)


def test_cells():
    cells = lora_price.cells(lora_price.CHIPS)
    assert len(set(cells)) == len(cells) == 26
    assert all(cell.m >= 512 for cell in cells) and {cell.chip for cell in cells} == set(lora_price.CHIPS)
    assert {cell.layer.name for cell in cells if cell.backward} == {"q", "gate_up", "down"}
    assert {cell.scheme for cell in lora_price.cells(["v6e"], ["w8a8"])} == {"w8a8"}
    with pytest.raises(ValueError, match="Unknown scheme"):
        lora_price.cells(["v6e"], ["w3a3"])
    with pytest.raises(ValueError, match="Unknown chip"):
        lora_price.cells(["v9"])
    assert "26 cells: about" in op_suite.plan(cells, lora_price.SUITE.seconds)


@pytest.mark.parametrize("scheme", lora_price.SCHEMES)
@pytest.mark.parametrize("backward", [False, True])
def test_programs(scheme, backward):
    """A matmul with an update of the weight where there is a rank, and a result of the right shape."""
    import jax

    for rank in (0, 16):
        op, arrays = lora_compile.program(scheme, 16, 256, 128, rank, backward)
        jaxpr = jax.make_jaxpr(op)(*arrays)
        assert jaxpr.out_avals[0].shape == (1, 16, 256 if backward else 128)
        assert ("low_rank=LowRank(rank=16" in str(jaxpr)) == bool(rank)
        assert ("rhs_transposed=True" in str(jaxpr)) == backward


@pytest.mark.parametrize("chip", lora_price.CHIPS)
def test_dispatch_takes_the_kernel_for_few_rows_and_many(chip):
    import jax.numpy as jnp
    from qwix_kernels import matmul

    for m in (1, 16, 512):
        (_, (x, w, extras)) = lora_compile.program("w4a16_g128", m, 4096, 4096, 16, False)
        described = matmul.problem_of(x, w, extras, out_dtype=jnp.bfloat16)
        plan = dispatch.explain(described, chip)
        assert plan.chosen == "mosaic_tpu" and "by XLA" not in plan.estimate.note
        base = dispatch.explain(problems.problem(shapes.scheme("w4a16_g128"), m, 4096, 4096), chip)
        assert base.estimate.static_us < plan.estimate.static_us < 1.2 * base.estimate.static_us
        assert base.estimate.floor_us < plan.estimate.floor_us < 1.05 * base.estimate.floor_us


def test_targets():
    assert lora_price.found_misses([row(), row(23.0)]) == []
    (miss,) = lora_price.found_misses([row(25.0, backward=True)])
    assert miss.target == "adapter" and miss.rows == "q 512 backward" and "20.0 without" in miss.why
    assert miss.excess == pytest.approx(25 / 20 / 1.15)
    (miss,) = lora_price.found_misses([row(kernels=0)])
    assert miss.target == "price" and "0 kernels" in miss.why
    (miss,) = lora_price.found_misses([row(error="the compiler died")])
    assert math.isinf(miss.excess) and "died" in miss.why


def test_known_misses_are_real():
    names = {f"{c.layer.name} {c.m}" + " backward" * c.backward for c in lora_price.cells(lora_price.CHIPS)}
    for entry in misses.load(lora_price.MISSES):
        assert entry["rows"] in names and entry["chip"] in lora_price.CHIPS, entry
        assert entry["ladder"] == lora_price.LADDER


def test_figures_are_printed_and_written(capsys):
    ops = [{"name": "k", "is_kernel": True, "bundles": 90, "cycles": 100, "hbm_bytes": 8, "compute_us": 2.0}]
    base = {"ops": [{**ops[0], "memory_us": 1.0, "units": {"MXU": 0.5}, "mxu_busy": 0.9}]}
    around = {**base["ops"][0], "name": "fusion", "is_kernel": False, "compute_us": 1.0}
    found = lora_price.row_of(row().cell, base, {"ops": [*base["ops"], around]})
    assert found.ratio == 1.5 and found.around_us == 1.0 and found.binds == "MXU"
    failed = lora_price.row_of(row().cell, base, {"error": "no blocks"})
    lora_price.show([found, failed])
    out = capsys.readouterr().out
    assert "static" in out and "1.500 over" in out and "no blocks" in out
    first, second = json.loads(op_suite.dumps([found, failed]))
    assert first["ratio"] == 1.5 and second["error"] == "no blocks"


def test_doctests():
    assert doctest.testmod(lora_price).failed == 0


def test_processes_agree_on_the_order_of_sets(tmp_path):
    """What is priced in one process is found in the cache by the next: the keys hold sets as text."""
    (tmp_path / "says_a_set.py").write_text("input(); print('@answer \"' + str(set('abcdefgh')) + '\"')")
    said = []
    for i in range(3):
        process = child.Child("says_a_set", [], str(tmp_path / f"log{i}"), root=tmp_path)
        said.append(process.request({}))
        process.close()
    assert said[0] and len(set(said)) == 1
