"""Static facts of GPU kernels: what they are held to, the model of their time, the list of known misses."""

import dataclasses
import doctest
import importlib
import json
import types

import pytest
from qwix_kernels import chips

from bench import gpu_price, gpu_problems, gpu_ragged, gpu_table, gpu_targets, op_suite, shapes
from bench.gpu_compile import Kernel
from bench.gpu_problems import Cell
from bench.gpu_sass import Loop
from bench.gpu_targets import Row

H100 = chips.chip("h100")
LOOP = Loop(60, 8, 2 * 64 * 256 * 256, 0, {"matrix": 8, "uniform": 52})
GOOD = Kernel(
    name="kernel",
    target="sm_90a",
    registers=168,
    budgets=(40, 232),
    highest_register=220,
    stack_bytes=0,
    spill_bytes=0,
    grid=(132, 1, 1),
    cluster=(1, 1, 1),
    threads=384,
    shared_bytes=200_000,
    matrix={"IGMMA": 8},
    tma_loads=4,
    tma_stores=2,
    local=0,
    local_in_loops=0,
    instructions=1000,
    main_loop=LOOP,
)
CONFIG = types.SimpleNamespace(block_m=256, block_n=128, splits=1)
CELL = Cell("h100", "w8a8", 1024, 4096, 4096)


def row(cell=CELL, **kernel) -> Row:
    made = dataclasses.replace(GOOD, **kernel)
    return Row(cell, "mosaic_gpu", 17.4, 35.0, 10.0, 17.9, 1.1, 6.3, made, note="as planned")


@pytest.mark.parametrize("module", ["gpu_problems", "gpu_ragged", "gpu_sass", "gpu_targets", "gpu_compile"])
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(f"bench.{module}")).failed == 0


@pytest.mark.parametrize(
    ("changed", "target"),
    [
        ({"spill_bytes": 8, "local": 3, "stack_bytes": 8}, "spills"),
        ({"local_in_loops": 2}, "local"),
        ({"matrix": {"HGMMA": 8}}, "instruction"),
        ({"matrix": {"IGMMA": 8, "HGMMA": 1}}, "instruction"),
        ({"tma_loads": 0}, "tma"),
        ({"highest_register": 232}, "registers"),
        ({"registers": 240}, "registers"),
    ],
)
def test_what_kernels_are_held_to(changed, target):
    assert [miss.target for miss in gpu_targets.misses([row(**changed)])] == [target]


def test_a_kernel_that_holds():
    assert gpu_targets.misses([row(), row(stack_bytes=128)]) == []  # a stack that nothing uses
    fallen = Row(CELL, "xla", 17.4, 35.0, note="not mosaic_gpu: N is 7")
    failed = Row(CELL, "mosaic_gpu", 17.4, 35.0, error="ptxas says no")
    found = gpu_targets.misses([fallen, failed])
    assert [(miss.target, miss.why) for miss in found] == [
        ("kernel", "not mosaic_gpu: N is 7"),
        ("price", "ptxas says no"),
    ]
    assert found[0].rows == "prefill" and fallen.static_us == 35.0


def test_the_model():
    """128 blocks of 256 x 128 on 132 multiprocessors, each one with 16 turns of two warpgroups."""
    tensor, issue = gpu_targets.model(CELL, H100, GOOD, CONFIG)
    work = 2 * 1024 * 4096 * 4096
    assert tensor == pytest.approx(work / (H100.int8 * 1e6) * 132 / 128)
    turns = 256 * 128 * 4096 / LOOP.multiplies
    assert issue == pytest.approx(turns * 60 / 1755)
    # One more row is one more row of blocks: two waves where one was.
    more, _ = gpu_targets.model(dataclasses.replace(CELL, m=1025), H100, GOOD, CONFIG)
    assert more == pytest.approx(2 * tensor)
    blackwell = dataclasses.replace(
        GOOD, matrix={"UTCIMMA": 4}, main_loop=dataclasses.replace(LOOP, multiplies=0)
    )
    assert gpu_targets.model(CELL, chips.chip("b200"), blackwell, CONFIG)[1] is None
    assert row().static_us == pytest.approx(17.9 + 6.3)


def test_rows_of_groups_are_padded_one_by_one():
    layer = shapes.RaggedLayer("canonical", 8, 4096, 2048, 1408)
    assert gpu_ragged.Cell("h100", "w8a8", layer).padded_rows(256) == 8 * 512
    decode = dataclasses.replace(layer, rows=32)
    assert gpu_ragged.Cell("h100", "w8a8", decode).padded_rows(64) == 8 * 64


def test_cells():
    for suite in (gpu_price.Suite("matmul"), gpu_price.Suite("ragged")):
        cells = suite.cells(("h100", "b200"))
        assert len(set(map(str, cells))) == len(cells)
        for cell in cells[::5]:
            assert cell.problem and cell.request and min(cell.floor(chips.chip(cell.chip))) > 0
        assert f"{len(cells)} cells" in op_suite.plan(cells, suite.seconds)
        with pytest.raises(ValueError, match="apart from other chips"):
            suite.cells(("h100", "v5e"))
        with pytest.raises(ValueError, match="Unknown scheme"):
            suite.cells(("h100",), ["w9a9"])
    with pytest.raises(ValueError, match="does not divide K=200"):
        gpu_price.Chosen("matmul", ((16, 200, 64),)).cells(("h100",), ["w8a8_g128"])


def test_weights_are_given_as_they_are_prepacked():
    _, (_, rhs) = gpu_problems.matmul("w4a16_g128", 16, 512, 256)
    assert rhs.values.shape == (1, 256, 512) and rhs.scale.shape == (1, 256, 4)
    _, (_, rhs) = gpu_problems.matmul("w4a16_g128", 16, 512, 256, prepacked=False)
    assert rhs.values.shape == (1, 512, 256) and rhs.scale.shape == (1, 4, 256)
    _, (lhs, rhs, sizes) = gpu_ragged.gmm("wf8af8_b128", vars(shapes.RaggedLayer("l", 4, 64, 256, 384)))
    assert (lhs.shape, rhs.values.shape, rhs.scale.shape) == ((64, 256), (4, 384, 256), (4, 3, 2))
    assert sizes.shape == (4,)


def test_the_list_of_known_misses_is_exact(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_price, "MISSES", tmp_path / "misses.json")
    gpu_price.MISSES.write_text("[]")
    suite, ragged = gpu_price.Suite("matmul"), gpu_price.Suite("ragged")
    missing, holding = [row(tma_loads=0)], [row()]
    assert len(suite.checked(missing, ("h100",))[0]) == 1
    suite.write_misses(missing, ("h100",))
    assert suite.checked(missing, ("h100",))[0] == [] and len(suite.checked(missing, ("h100",))[1]) == 1
    assert "no longer missed" in suite.checked(holding, ("h100",))[0][0]
    assert ragged.checked([], ("h100",)) == ([], [])  # its own part of the list
    ragged.write_misses([], ("h100",))
    assert len(json.loads(gpu_price.MISSES.read_text())) == 1


def test_the_table(capsys):
    rows = [row(), Row(CELL, "xla", 17.4, 35.0, note="not mosaic_gpu: too small")]
    gpu_table.show(rows)
    printed = capsys.readouterr().out
    assert "nothing was measured" in printed and "IGMMA x8" in printed and "too small" in printed
    assert all(len(gpu_table.line(one)) == len(gpu_table.COLUMNS) for one in rows)
    assert json.loads(op_suite.dumps(rows))[0]["kernel"]["registers"] == 168


def test_a_compiled_cell(tmp_path):
    """By the compiler, and then by what is remembered."""
    suite = gpu_price.Chosen("matmul", ((64, 4096, 4096),))
    (cell,) = suite.cells(("h100",), ["w8a8"])
    (first,), (again,) = (list(suite.price([cell], str(tmp_path))) for _ in range(2))
    assert first == again and first.runs == "mosaic_gpu" and not first.error
    assert gpu_targets.misses([first]) == [] and first.kernel and set(first.kernel.matrix) == {"IGMMA"}
    assert first.issue_us and first.static_us > 0
