"""The pricing program: schemes, cells, floors, the command line and what it checks against."""

import doctest
import importlib
import json
import os
import pathlib
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from qwix_kernels.chips import CHIPS
from qwix_kernels.matmul import reference
from qwix_kernels.problem import Tensor

from bench import price, price_table, problems, reference_figures, shapes

ROOT = pathlib.Path(__file__).parents[2]
FIELDS = {
    "chip": str,
    "scheme": str,
    "m": int,
    "k": int,
    "n": int,
    "implementation": str,
    "bundles": int,
    "compute_us": float,
    "memory_us": float,
    "static_us": float,
    "floor_us": float,
    "ratio_to_floor": float,
    "xla_bf16_us": float,
    "xla_same_op_us": float,
}


def command(*arguments: str) -> subprocess.CompletedProcess:
    """Runs the program as a user would: in a fresh environment, from the repository."""
    env = {
        k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "TPU_", "LIBTPU", "XLA_", "ALLOW_"))
    }
    return subprocess.run(
        [sys.executable, "-m", "bench.price", *arguments],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.parametrize("module", ["bundles", "shapes", "reference_figures", "tpu_compile"])
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(f"bench.{module}")).failed == 0


@pytest.mark.parametrize(
    ("name", "weight", "activation", "tile"),
    [
        ("w8a8", "int8", "int8", 0),
        ("w4a16_g128", "int4", "bfloat16", 128),
        ("wf8af8", "float8_e4m3fn", "float8_e4m3fn", 0),
        ("wnf4a16_g64", "nf4", "bfloat16", 64),
        ("w8a4_g32", "int8", "int4", 32),
    ],
)
def test_schemes(name, weight, activation, tile):
    assert shapes.scheme(name) == shapes.Scheme(name, weight, activation, tile)
    assert problems.problem(shapes.scheme(name), 16, 256, 128).scheme == name


@pytest.mark.parametrize(
    "name", ["", "w8", "w8a8g128", "w8a8_g0", "w8a8_g", "w3a16", "W8A8", "w8anf4", "w8a8_g128x"]
)
def test_names_that_are_no_scheme(name):
    with pytest.raises(ValueError, match=r"w\{4,8,f8,nf4\}a\{4,8,f8,16\}"):
        shapes.scheme(name)


@pytest.mark.parametrize(
    ("chips", "schemes", "ms", "layers", "message"),
    [
        (["v4"], ["w8a8"], [1], [(8, 8)], "Unknown chip 'v4'; chips: v5e, v5p, v6e, v7x"),
        (["h100"], ["w8a8"], [1], [(8, 8)], "h100 cannot be priced yet"),
        (["v5e"], ["w8a8_g128"], [1], [(200, 8)], "128 does not divide K=200"),
        (["v5e"], ["w8a8"], [0], [(8, 8)], "start at 1, got 0"),
        (["v5e"], ["w9a8"], [1], [(8, 8)], "Unknown scheme 'w9a8'"),
    ],
)
def test_cells_that_cannot_be_priced(chips, schemes, ms, layers, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        price.cells_of(chips, schemes, ms, layers)


def test_cells_are_all_combinations():
    cells = price.cells_of(["v5e", "v6e"], ["w8a8", "w4a16_g8"], [16, 1], [(8, 24)], baselines=False)
    assert len(set(cells)) == 8
    assert cells[0] == price.Cell("v5e", "w8a8", 16, 8, 24, baselines=False)


def test_floors_by_hand():
    square = (4096, 4096)
    floor = lambda chip, name, m: problems.floor_us(CHIPS[chip], shapes.scheme(name), m, *square)
    work = 2 * 1024 * 4096 * 4096
    assert floor("v5e", "w8a8", 1024) == pytest.approx(1e6 * work / 394e12)
    assert floor("v5e", "w4a16_g128", 1024) == pytest.approx(1e6 * work / 197e12)
    assert floor("v5p", "wf8af8", 1024) == pytest.approx(1e6 * work / 459e12)  # no fp8 unit; two cores
    assert floor("v7x", "w8a8", 1024) == pytest.approx(1e6 * work / 1153.5e12)  # no int8 unit; one core
    assert floor("v7x", "wf8af8", 1024) == pytest.approx(1e6 * work / 2307e12)
    decode = 4096 * 4096 / 2 + 32 * 4096 * 2 + 2 * 16 * 4096 * 2  # 4-bit weight, scales, both activations
    assert floor("v6e", "w4a16_g128", 16) == pytest.approx(decode / 1640e3)
    assert floor("v6e", "wnf4a16_g128", 16) == floor("v6e", "w4a16_g128", 16)


@pytest.mark.parametrize(
    "name", ["w8a16_g32", "wnf4a16_g64", "w8a8", "w4a8_g32", "wf8af8_g64", "w8af8", "wnf4a8_g32"]
)
def test_the_chain_of_xla_ops_is_the_same_op(name):
    """What the kernel's price is compared with computes the same thing."""
    scheme, rng = shapes.scheme(name), np.random.default_rng(0)
    m, k, n = 8, 128, 16
    lhs_shape, values_shape, scale_shape = problems.shapes_of(scheme, m, k, n)
    lhs = jnp.asarray(rng.normal(size=lhs_shape.shape), jnp.bfloat16)
    low, high = (0, 16) if scheme.weight == "nf4" else (-8, 8)
    values = jnp.asarray(rng.integers(low, high, values_shape.shape), values_shape.dtype)
    scale = jnp.asarray(rng.uniform(0.5, 2, scale_shape.shape), scale_shape.dtype)
    result = problems.xla_same_op(scheme)(lhs, values, scale)
    codebook = "nf4" if scheme.weight == "nf4" else None
    kernel_operands = Tensor(lhs[None]), Tensor(values[None], scale[None], codebook=codebook)
    problem = problems.problem(scheme, m, k, n)
    exact = reference.run(problem, *kernel_operands)[0]
    a, b = (np.abs(x[0]) for x in reference.operands(problem, *kernel_operands))
    # Both factors and the result are rounded to bfloat16 once at the most; everything else is float32.
    bound = 3.1 * 2.0**-8 / 2 * (a @ b) + 2.0**-8 / 2 * np.abs(exact)
    np.testing.assert_array_less(np.abs(np.asarray(result, np.float64) - exact), bound)


ANSWER = {
    "chip": "v5e",
    "scheme": "w8a8",
    "m": 1024,
    "k": 4096,
    "n": 4096,
    "implementation": "mosaic_tpu",
    "compute_us": 100.0,
    "memory_us": 40.0,
    "static_us": 100.0,
    "floor_us": 87.0,
    "ratio_to_floor": 1.15,
    "xla_bf16_us": 185.0,
    "xla_same_op_us": None,
    "static_kcycles": 150.0,
    "units": {"MXU": 0.9, "XLU": 0.0, "VALU": 0.3},
    "spills": 0.25,
    "note": "",
}


def test_losing_cells_are_named():
    assert price.slower_than_reference(ANSWER) is None
    slow = price.slower_than_reference({**ANSWER, "static_kcycles": 265.4})
    assert slow == "v5e w8a8 1024 4096 4096: 265k cycles, google/qwix 0.1.8, static 265k"
    assert price.slower_than_reference({**ANSWER, "static_kcycles": 1e6, "n": 4097}) is None
    assert "died" in price.slower_than_reference({**ANSWER, "error": "The compiler's process died"})


def test_reference_figures_cover_known_cells():
    for (scheme, m), by_chip in reference_figures.KCYCLES.items():
        assert shapes.scheme(scheme) and m in shapes.CANONICAL_M
        assert set(by_chip) <= set(CHIPS) and scheme in shapes.CANONICAL_SCHEMES


def test_a_line_of_the_table():
    line = dict(zip(price_table.COLUMNS, price_table.row(ANSWER), strict=True))
    assert line["M x K x N"] == "1024 x 4096 x 4096"
    assert line["x floor"] == "1.15" and line["XLA same"] == "-" and line["spills"] == "25%"
    assert line["google/qwix"] == "1.8x slower" and line["busiest unit"] == "MXU 90%"


def test_models_have_layers_once():
    for layers in shapes.MODELS.values():
        assert layers and all(layer.k > 0 and layer.n > 0 for layer in layers)
    assert shapes.Layer("down", 14336, 4096) in shapes.MODELS["llama3_8b"]


def test_json_of_one_cell(tmp_path):
    out = tmp_path / "cell.json"
    done = command(
        *("--chip", "v5e", "--scheme", "w4a16_g128", "--m", "16", "--k", "256", "--n", "512"),
        *("--json", "--out", str(out)),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    answer = json.loads(done.stdout)  # and nothing else
    assert json.loads(out.read_text()) == answer
    assert {field: type(answer[field]) for field in FIELDS} == FIELDS
    assert [answer[field] for field in ("chip", "scheme", "m", "k", "n")] == [
        "v5e",
        "w4a16_g128",
        16,
        256,
        512,
    ]
    assert answer["implementation"] in ("mosaic_tpu", "xla")
    assert answer["static_us"] == pytest.approx(sum(op["static_us"] for op in answer["ops"]))
    assert answer["compute_us"] <= answer["static_us"] <= answer["compute_us"] + answer["memory_us"]
    assert answer["ratio_to_floor"] == pytest.approx(answer["static_us"] / answer["floor_us"])
    assert answer["static_kcycles"] == pytest.approx(1.5 * answer["static_us"])
    assert answer["bundles"] > 0 and answer["ratio_to_floor"] >= 1


def test_a_table_of_several_cells_and_an_error_among_them():
    done = command(
        *("--chip", "v6e", "--scheme", "w8a8,w8a16", "--m", "8", "--k", "128", "--n", "128"),
        *("--nobaselines", "--implementation", "xla", "--check"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Static" in done.stdout and done.stdout.count("8 x 128 x 128") == 2
    assert done.stderr.count("x the floor") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip", "v5e", "--scheme", "w5a5", "--m", "1"], "Unknown scheme 'w5a5'"),
        (["--chip", "b200", "--scheme", "w8a8", "--m", "1"], "b200 cannot be priced yet"),
        (["--chip", "v5e", "--scheme", "w8a8"], "--m is missing"),
        (["--chip", "v5e", "--scheme", "w8a8", "--m", "many"], "whole numbers, got many"),
    ],
)
def test_a_command_that_makes_no_sense(arguments, message):
    done = command(*arguments)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr
