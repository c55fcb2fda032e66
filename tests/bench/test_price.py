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
from qwix_kernels.matmul.describe import as_tensor

from bench import cells, floors, problems, shapes, suites

ROOT = pathlib.Path(__file__).parents[2]


def data(rng, like):
    """Numbers of a shape and type; scales between 0.5 and 2."""
    if jnp.issubdtype(like.dtype, jnp.integer):
        return jnp.asarray(rng.integers(-8, 8, like.shape), like.dtype)
    if like.shape[-1] == 128:  # the activations
        return jnp.asarray(rng.normal(size=like.shape), like.dtype)
    return jnp.asarray(rng.uniform(0.5, 2, like.shape), like.dtype)


E8M0 = {"weight_scale": "float8_e8m0fnu"}
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
    "batch": int,
    "best_floor_us": float,
    "xla_bf16_us": float,
    "xla_same_op_us": float,
    "binds": str,
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


@pytest.mark.parametrize(
    "module",
    [
        "bundles",
        "cells",
        "floors",
        "op_suite",
        "reference_figures",
        "shapes",
        "suites",
        "targets",
        "tpu_compile",
    ],
)
def test_examples_in_docstrings(module):
    assert doctest.testmod(importlib.import_module(f"bench.{module}")).failed == 0


@pytest.mark.parametrize(
    ("name", "weight", "activation", "rest"),
    [
        ("w8a8", "int8", "int8", {}),
        ("w4a16_g128", "int4", "bfloat16", {"tile": 128}),
        ("wf8af8", "float8_e4m3fn", "float8_e4m3fn", {}),
        ("w4af8_g64", "int4", "float8_e4m3fn", {"tile": 64}),
        ("wnf4a16_g64", "nf4", "bfloat16", {"tile": 64}),
        ("wf4a16_g32", "float4_e2m1fn", "bfloat16", {"tile": 32}),
        ("w8a4_g32", "int8", "int4", {"tile": 32}),
        ("w8a8_b128", "int8", "int8", {"tile": 128, "tile_n": 128}),
        ("w4a16_g128_z", "int4", "bfloat16", {"tile": 128, "zero_point": True}),
        ("w8a8_g128_static", "int8", "int8", {"tile": 128, "static": True}),
        (
            "wmxfp8amxfp8",
            "float8_e4m3fn",
            "float8_e4m3fn",
            {"tile": 32, **E8M0, "row_scale": "float8_e8m0fnu"},
        ),
        ("wmxfp4a16", "float4_e2m1fn", "bfloat16", {"tile": 32, **E8M0}),
        ("wnvfp4a16", "float4_e2m1fn", "bfloat16", {"tile": 16, "weight_scale": "float8_e4m3fn"}),
    ],
)
def test_schemes(name, weight, activation, rest):
    scheme = shapes.scheme(name)
    assert scheme == shapes.Scheme(name, weight, activation, **rest)
    problem = problems.problem(scheme, 16, 512, 256, batch=3)
    assert problem.scheme == shapes.scheme(problem.scheme).name  # the kernels' names are among ours
    left, right = problem.lhs, problem.rhs
    assert (problem.batch, left.batch, right.batch) == (3, 3, 3)
    assert right.tile_k == (scheme.tile or 512) and right.tile_free == scheme.tile_n
    assert right.zero_point == scheme.zero_point and left.is_quantized == scheme.static
    assert (problem.quantize_lhs is None) == (scheme.static or scheme.is_weight_only)


@pytest.mark.parametrize(
    "name", ["", "w8", "w8a8g128", "w8a8_g0", "w8a8_g", "w3a16", "W8A8", "w8anf4", "w8a8_g128x", "w8a8_g8_b8"]
)
def test_names_that_are_no_scheme(name):
    with pytest.raises(ValueError, match=r"w\{4,8,f8,f4,nf4,mxfp8,mxfp4,nvfp4\}a\{4,8,f8,16,"):
        shapes.scheme(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wmxfp4a16_g64", "has its own tile"),
        ("wmxfp4anvfp4", "has its own tile"),
        ("wnf4a16_g64_z", "only integer weights"),
        ("w8a16_static", "not quantized"),
    ],
)
def test_schemes_that_make_no_sense(name, message):
    with pytest.raises(ValueError, match=message):
        shapes.scheme(name)


@pytest.mark.parametrize(
    ("chips", "schemes", "ms", "layers", "message"),
    [
        (["v4"], ["w8a8"], [1], [(8, 8)], "Unknown chip 'v4'; chips: v5e, v5p, v6e, v7x"),
        (["h100"], ["w8a8"], [1], [(8, 8)], "Unknown chip 'h100'; chips: v5e"),
        (["v5e"], ["w8a8_g128"], [1], [(200, 8)], "128 does not divide K=200"),
        (["v5e"], ["w8a8_b128"], [1], [(256, 192)], "128 does not divide N=192"),
        (["v5e"], ["w8a8"], [0], [(8, 8)], "start at 1, got 0"),
        (["v5e"], ["w9a8"], [1], [(8, 8)], "Unknown scheme 'w9a8'"),
    ],
)
def test_cells_that_cannot_be_priced(chips, schemes, ms, layers, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        cells.cells_of(chips, schemes, ms, layers)


def test_cells_are_all_combinations():
    found = cells.cells_of(["v5e", "v6e"], ["w8a8", "w4a16_g8"], [16, 1], [(8, 24)], baselines=False)
    assert len(set(found)) == 8
    assert found[0] == cells.Cell("v5e", "w8a8", 16, 8, 24, baselines=False)


def test_floors_by_hand():
    square = (4096, 4096)
    floor = lambda chip, name, m: floors.floor(CHIPS[chip], shapes.scheme(name), m, *square).us
    work = 2 * 1024 * 4096 * 4096
    assert floor("v5e", "w8a8", 1024) == pytest.approx(1e6 * work / 394e12)
    assert floor("v5e", "w4a16_g128", 1024) == pytest.approx(1e6 * work / 197e12)
    assert floor("v5p", "wf8af8", 1024) == pytest.approx(1e6 * work / 459e12)  # no fp8 unit; two cores
    assert floor("v7x", "w8a8", 1024) == pytest.approx(1e6 * work / 1153.5e12)  # no int8 unit; one core
    assert floor("v7x", "wf8af8", 1024) == pytest.approx(1e6 * work / 2307e12)
    decode = 4096 * 4096 / 2 + 32 * 4096 * 2 + 2 * 16 * 4096 * 2  # 4-bit weight, scales, both activations
    assert floor("v6e", "w4a16_g128", 16) == pytest.approx(decode / 1640e3)
    assert floor("v6e", "wnf4a16_g128", 16) == floor("v6e", "w4a16_g128", 16)


def test_floors_of_the_best_strategy_by_hand():
    best = lambda chip, name, m=1024: floors.floor(CHIPS[chip], shapes.scheme(name), m, 4096, 4096)
    # Four additions of 1024 values a cycle: 32 partial results, each widened, scaled twice and added up.
    after = (4 * 32 * 1024 * 4096 + 5 * 1024 * 4096 + 2 * 1024 * 4096) / 4096
    assert best("v5e", "w8a8_g128").best_us == pytest.approx(after / 1.5e3)
    assert best("v5e", "w8a8_g128").strategy == "scales after the dot, int8 unit"
    before = best("v6e", "w8a8_g128")  # its int8 unit would be done before the vector unit had scaled
    assert before.best_us == pytest.approx(1e6 * 2 * 1024 * 4096**2 / 918e12) and "before" in before.strategy
    # Weights in blocks of 128 x 128: one product less.
    assert best("v5e", "w8a8_b128").best_us == pytest.approx(max(before.us * 0, 1e6 * 2**35 / 394e12))
    assert best("v5e", "w8a8_g128_static").best_us < best("v5e", "w8a8_g128").best_us
    for chip in ("v5e", "v5p", "v6e", "v7x"):
        for name in suites.ALL_SCHEMES:
            for m in (16, 1024):
                assert best(chip, name, m).best_us >= best(chip, name, m).us


def test_the_suite_has_every_layer_on_every_chip():
    suite = suites.suite("matmul", ["v5e", "v7x"])
    layers = {(layer.k, layer.n) for model in shapes.MODELS.values() for layer in model}
    for chip in ("v5e", "v7x"):
        for m in (16, 1024):
            mine = [c for c in suite.cells if (c.chip, c.m, c.batch) == (chip, m, 1)]
            assert {(c.k, c.n) for c in mine if c.scheme == "w8a8"} == layers
            square = {c.scheme for c in mine if (c.k, c.n) == (4096, 4096)}
            assert square == set(suites.ALL_SCHEMES)
    assert len(set(suite.cells)) == len(suite.cells) and all(c.baselines for c in suite.cells)
    assert "w4a16_g128 on 576 x 1536: the tile 128 does not divide K=576" in suite.skipped
    assert {c.batch for c in suite.cells} == {1, 8, 64}
    assert not any(c.baselines for c in suites.suite("canonical", ["v6e"], baselines=False).cells)
    with pytest.raises(ValueError, match="Unknown chip 'v4'"):
        suites.suite("matmul", ["v4"])


@pytest.mark.parametrize(
    "name",
    [
        *("w8a16_g32", "wnf4a16_g64", "w8a8", "w4a8_g32", "wf8af8_g64", "w8af8", "wnf4a8_g32"),
        *(
            "wmxfp8amxfp8",
            "wmxfp4a16",
            "wnvfp4a16",
            "w4a16_g32_z",
            "w8a8_b64",
            "w8a8_g32_static",
            "w8a8_static",
        ),
    ],
)
def test_the_chain_of_xla_ops_is_the_same_op(name):
    """What the kernel's price is compared with computes the same thing."""
    scheme, rng = shapes.scheme(name), np.random.default_rng(0)
    m, k, n = 8, 128, 64
    arrays = [data(rng, s) for s in problems.shapes_of(scheme, m, k, n)]
    if scheme.weight == "nf4":
        arrays[1] = jnp.asarray(rng.integers(0, 16, (1, k, n)), jnp.uint4)
    result = problems.xla_same_op(scheme)(*arrays)[0]
    kernel_operands = [as_tensor(x) for x in problems.tensors(scheme, arrays)]
    problem = problems.problem(scheme, m, k, n)
    exact = reference.run(problem, *kernel_operands)[0]
    a, b = (np.abs(x[0]) for x in reference.operands(problem, *kernel_operands))
    # Both factors and the result are rounded to bfloat16 once at the most; everything else is float32.
    bound = 3.1 * 2.0**-8 / 2 * (a @ b) + 2.0**-8 / 2 * np.abs(exact)
    np.testing.assert_array_less(np.abs(np.asarray(result, np.float64) - exact), bound)


def test_models_have_layers_once():
    for layers in shapes.MODELS.values():
        assert layers and all(layer.k > 0 and layer.n > 0 for layer in layers)
    assert shapes.Layer("down", 14336, 4096) in shapes.MODELS["llama3_8b"]


def test_json_of_one_cell_and_again_from_what_is_kept(tmp_path):
    out = tmp_path / "cell.json"
    arguments = (
        *("--chip", "v5e", "--scheme", "w4a16_g128", "--m", "16", "--k", "256", "--n", "512"),
        *("--json", "--cache", str(tmp_path / "kept")),
    )
    done = command(*arguments, "--out", str(out))
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
    assert answer["best_floor_us"] >= answer["floor_us"]
    assert answer["binds"] in ("HBM", "MXU", "XLA", *answer["units"])
    kept = (tmp_path / "kept" / "prices.jsonl").read_text()
    assert sum(line.startswith('["cell ') for line in kept.splitlines()) == 1
    assert json.loads(command(*arguments).stdout) == answer
    assert (tmp_path / "kept" / "prices.jsonl").read_text() == kept


def test_a_table_of_several_cells_and_an_error_among_them():
    done = command(
        *("--chip", "v6e", "--scheme", "w8a8,w8a16", "--m", "8", "--k", "128", "--n", "128"),
        *("--nobaselines", "--implementation", "xla", "--check", "--cache", ""),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Static" in done.stdout and done.stdout.count("8 x 128 x 128") == 2
    assert done.stderr.count("x the floor") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--chip", "v5e", "--scheme", "w5a5", "--m", "1"], "Unknown scheme 'w5a5'"),
        (["--chip", "v5e,b200", "--scheme", "w8a8", "--m", "1"], "priced apart from other chips"),
        (["--suite", "conv", "--chip", "h100"], "--suite conv has no GPUs; matmul and ragged have"),
        (["--chip", "v5e", "--scheme", "w8a8"], "--m is missing"),
        (["--suite", "matmul", "--m", "16"], "leave out --m"),
        (["--suite", "canonical", "--write_misses"], "needs --suite matmul"),
        (["--suite", "ragged", "--scheme", "w4a8"], "no w4a8; it has w4a16_g128, w8a16, w8a8, wf8af8"),
        (["--chip", "v5e", "--scheme", "w8a8", "--m", "many"], "whole numbers, got many"),
    ],
)
def test_a_command_that_makes_no_sense(arguments, message):
    done = command(*arguments)
    assert done.returncode != 0
    assert message in done.stdout + done.stderr


def test_the_plan_prices_nothing(tmp_path):
    done = command("--suite", "matmul", "--chip", "v5e", "--plan", "--cache", str(tmp_path))
    assert done.returncode == 0, done.stderr
    count = len(suites.suite("matmul", ["v5e"]).cells)
    assert f"{count} cells, 0 of them priced before" in done.stdout and "minutes" in done.stdout
    assert "left out: w4a16_g128 on 576 x 576" in done.stdout
    assert not (tmp_path / "prices.jsonl").exists()
