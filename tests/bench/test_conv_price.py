"""Pricing of convolutions: which cells there are, what misses a target, what is printed."""

import doctest
import json
import subprocess
import sys

import jax
import pytest
from qwix_kernels import dispatch
from qwix_kernels.chips import CHIPS
from qwix_kernels.conv import cost

from bench import conv_price, conv_problems, conv_rows, misses, op_suite, shapes

LAYER = shapes.CONVOLUTIONS["canonical"][0]


def row(static: float = 20.0, bf16: float = 30.0, floor: float = 16.0, error: str = "", **cell):
    cell = {"chip": "v6e", "scheme": "w8a8_static", "layer": LAYER} | cell
    return conv_price.Row(
        conv_price.ConvCell(**cell),
        "mosaic_tpu",
        static,
        static,
        5.0,
        floor,
        bf16,
        19.0,
        0.7,
        0.1,
        "note",
        error,
    )


def test_every_cell_is_a_problem_that_dispatch_knows():
    cells = conv_price.cells(conv_price.CHIPS)
    assert len(set(cells)) == len(cells) > 60
    for cell in cells:
        problem = conv_problems.problem(cell.layer, cell.scheme)
        assert problem.out == (-(-cell.layer.size // cell.layer.stride),) * 2
        x, w = conv_problems.bf16_operands(cell.layer)
        assert jax.eval_shape(conv_problems.xla_bf16(cell.layer), x, w).shape == problem.out_shape
    assert dispatch.explain(conv_problems.problem(LAYER, "w8a8"), "v6e").chosen == "mosaic_tpu"


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        (row(), []),
        (row(static=31.0), ["bf16", "floor"]),
        (row(static=25.0), ["floor"]),
        (row(static=25.0, scheme="w8a16"), []),
        (row(static=25.0, layer=shapes.CONVOLUTIONS["mobilenet_v2"][3]), []),
        (row(error="no"), ["price"]),
    ],
    ids=str,
)
def test_misses(given, targets):
    assert [miss.target for miss in conv_price.found_misses([given])] == targets
    fails, known = conv_price.SUITE.checked([given], ())
    listed = {(e["chip"], e["scheme"], e["rows"], e["target"]) for e in misses.load(conv_price.MISSES)}
    unlisted = [m for m in conv_price.found_misses([given]) if m.key not in listed]
    assert len(fails) >= len(unlisted) and len(fails) + len(known) == len(targets)


def test_the_list_of_misses_names_cells():
    names = {
        (m.chip, m.scheme, m.rows)
        for cell in conv_price.cells(conv_price.CHIPS)
        for m in conv_price.found_misses(
            [row(error="x", chip=cell.chip, scheme=cell.scheme, layer=cell.layer)]
        )
    }
    for entry in misses.load(conv_price.MISSES):
        assert (entry["chip"], entry["scheme"], entry["rows"]) in names and entry["reason"]


def test_arrays_are_moved_as_they_are_tiled():
    """Rows of 64 features as 128, 14 columns as 16; the floor counts what there is."""
    of = {layer.name: layer for layer in shapes.CONVOLUTIONS["resnet50"]}
    few = conv_problems.problem(of["conv2 3x3"], "w8a8_static")
    assert cost.tiled_bytes(few) == 8 * 56 * 56 * 128 * (1 + 2) + 9 * 64 * 64
    narrow = conv_problems.problem(of["conv4 3x3"], "w8a8_static")
    assert cost.tiled_bytes(narrow) == 8 * 14 * 16 * 256 * (1 + 2) + 9 * 256 * 256
    assert cost.floor(few, CHIPS["v6e"])[1] < cost.tiled_bytes(few) / (CHIPS["v6e"].hbm_gbps * 1e3)


def test_what_is_printed(capsys):
    conv_price.show([row(), row(error="it broke")])
    said = capsys.readouterr().out
    assert "1.50x" in said and "it broke" in said and "nothing was measured" in said
    assert json.loads(op_suite.dumps([row()]))[0]["ratio"] == 1.25


def test_bad_requests_are_named():
    for make in (lambda: conv_price.cells(["v9"]), lambda: conv_price.cells(["v6e"], ["w3a3"])):
        with pytest.raises(ValueError, match=r"Unknown (chip 'v9'|scheme 'w3a3')"):
            make()
    with pytest.raises(ValueError, match="Unknown layer 'x'"):
        conv_rows.layers_called(["x"])


def test_the_plan_and_the_examples():
    text = op_suite.plan(conv_price.cells(["v5e"], ["w8a16"]), conv_price.SUITE.seconds)
    assert text.splitlines()[0] == "v5e w8a16 3x3 8x56x56x256 -> 256" and "1 cells" in text
    for module in (conv_rows, conv_price, conv_problems):
        assert doctest.testmod(module).failed == 0


def test_cpu_ratios():
    layer = shapes.ConvLayer("small", 1, 6, 8, 8)
    rows = list(conv_rows.cpu_rows([layer], ["w8a8", "w8a16"], rounds=2))
    assert [r["scheme"] for r in rows] == ["w8a8", "w8a16"] and rows[0]["ratio_to_float32"]["median"] > 0


@pytest.mark.large
def test_the_program(tmp_path):
    command = [sys.executable, "-m", "bench.price", "--suite", "conv", "--chip", "v6e", "--scheme", "w8a16"]
    run = subprocess.run([*command, "--json", "--cache", ""], capture_output=True, text=True, check=True)
    (answer,) = json.loads(run.stdout)
    assert answer["runs"] == "mosaic_tpu" and answer["static_us"] > answer["floor_us"]
