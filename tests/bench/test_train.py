"""The training step that is priced: what its parts are, how they are compared, and what it compiles to."""

import doctest
import json
import re
import subprocess
import sys

import jax
import pytest

from bench import train, train_block, train_compile

SMALL = train_block.Sizes(batch=1, length=256, hidden=256, mlp=640, heads=2, kv_heads=1, head=128)
HLO = """
%fused_computation.1 (param_0.1: bf16[1,256,256], param_1.1: bf16[256,640]) -> bf16[256,640] {
  %param_0.1 = bf16[1,256,256]{2,1,0} parameter(0)
  %param_1.1 = bf16[256,640]{1,0} parameter(1)
  ROOT %convolution.1 = bf16[256,640]{1,0} convolution(%param_0.1, %param_1.1), dim_labels=bf_io->bf
}

ENTRY %main (x: bf16[1,256,256], w: bf16[256,640]) -> bf16[256,640] {
  %x = bf16[1,256,256]{2,1,0} parameter(0)
  %w = bf16[256,640]{1,0} parameter(1)
  %copy.1 = bf16[1,256,256]{1,2,0} copy(%x), metadata={op_name="jit(f)/jvp(Block)/Block._attention/mul"}, \
backend_config={"window_config":{"estimated_cycles":"1500"}}
  %marker = bf16[1,256,256]{2,1,0:S(1)} custom-call(%copy.1), custom_call_target="ConcatBitcast"
  ROOT %fusion.1 = bf16[256,640]{1,0} fusion(%marker, %w), kind=kOutput, calls=%fused_computation.1, \
metadata={op_name="jit(f)/transpose(jvp(Block))/Block._mlp/up_proj/dot"}, \
backend_config={"window_config":{"estimated_cycles":"3000"}}
}
"""


def op(where: str, result: str = "bf16[1,256,640]", us: float = 10.0, **kind) -> dict:
    kind = {"is_kernel": False, "is_matmul": False} | kind
    return {
        "name": "op", "where": where, "result": result, "estimated_us": us, "compute_us": None,
        "memory_us": 1.0, **kind,
    }  # fmt: skip


WEIGHTS = {"up_proj": (256, 640), "q_proj": (256, 256)}


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (op("jit(f)/jvp(Block)/Block._mlp/up_proj/qwix_matmul_w8a8", is_kernel=True), "forward"),
        (op("jit(f)/transpose(jvp(Block))/up_proj/dot", "bf16[1,256,256]", is_matmul=True), "dlhs"),
        (op("jit(f)/transpose(jvp(Block))/up_proj/dot", "(f32[8], bf16[640,256])", is_matmul=True), "drhs"),
        (op("jit(f)/transpose(jvp(Block))/up_proj/reduce_max"), "quantize"),
        (op("jit(f)/jvp(Block)/_attention/jit(flash_attention)/pallas_call", is_kernel=True), "attention"),
        (op("jit(f)/jvp(Block)/Block._attention/q_proj/qwix_matmul_w8a8", is_kernel=True), "forward"),
        (
            op("jit(f)/jvp(Block)/up_proj/pallas_call", name="qwix_quantize_int8.1", is_kernel=True),
            "quantize",
        ),
        (op("jit(f)/jvp(Block)/mlp_norm/mul"), "other"),
        (op(""), "other"),
    ],
)  # fmt: skip
def test_parts(given, part):
    assert train.part_of(given, WEIGHTS, quantized=True) == part


def test_comparison_shows_what_loses_and_fails_under_the_target():
    bf16 = train.step_of(
        "bf16", {"ops": [op("a/q_proj/dot", us=125.0, is_matmul=True)], "temp_bytes": 1}, WEIGHTS
    )
    ops = [op("a/q_proj/dot", us=80.0, is_kernel=True), op("a/q_proj/reduce_max", us=21.0)]
    quantized = train.step_of("int8", {"ops": ops, "temp_bytes": 1}, WEIGHTS)
    row = train.Comparison("v5e", bf16, quantized)
    assert row.ratio == pytest.approx(125 / 101) and row.losing == {"quantize": 21.0}
    assert train.failures([row]) == ["v5e: the int8 step is 1.24x as fast as bfloat16, not 1.25x"]
    assert json.loads(json.dumps(row.as_json()))["steps"]["int8"]["parts"]["quantize"] == 21.0


def test_a_plan_compiles_nothing_and_flags_of_cells_are_refused():
    command = [sys.executable, "-m", "bench.price", "--suite", "train"]
    run = lambda *given: subprocess.run([*command, *given], capture_output=True, text=True, timeout=120)
    done = run("--plan", "--chip", "v7x")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[:2] == ["v7x bf16", "v7x fp8"]
    done = run("--m", "16", "--scheme", "w8a8")
    assert done.returncode and "leave out --m, --scheme" in done.stderr + done.stdout


def test_attention_is_left_out_of_the_linear_ratio():
    attention = op("jit(f)/jvp(Block)/Block._attention/softmax", us=100.0)
    step = lambda name, us: train.step_of(
        name, {"ops": [attention, op("a/q_proj/dot", us=us, is_matmul=True)], "temp_bytes": 1}, WEIGHTS
    )
    row = train.Comparison("v6e", step("bf16", 200.0), step("int8", 100.0))
    assert row.ratio == 1.5 and row.linear_ratio == 2.0


def test_weight_shapes_are_those_of_the_block():
    _, (params, *_) = train_block.step(train_block.Block(train_block.Sizes()), train_block.Sizes())
    shapes = {name: p["kernel"].shape for name, p in params.items() if name.endswith("_proj")}
    assert shapes == train.weight_shapes()
    assert sum(a * b for a, b in shapes.values()) == train_block.Sizes().weights == 218103808


def test_ops_without_bundles_keep_the_compilers_estimate(tmp_path):
    copy, marker, dot = train_compile.step_ops("v5e", HLO, str(tmp_path))
    assert copy.estimated_us == pytest.approx(1.0) and copy.static_us == pytest.approx(1.0)
    assert marker.memory_us == pytest.approx(256 * 256 * 2 / 819e3) and not marker.is_matmul
    assert dot.is_matmul and dot.result == "bf16[256,640]" and "up_proj" in dot.where
    assert train.part_of(vars(dot), WEIGHTS, False) == "drhs"


def lowered(program: str, chip: str) -> str:
    from bench import tpu_compile

    return tpu_compile.lower_for(chip, *train_block.program(program, SMALL)).as_text()


@pytest.mark.parametrize(("program", "chip", "scheme"), [("int8", "v6e", "w8a8"), ("fp8", "v7x", "wf8af8")])
def test_forward_and_backward_are_kernels(program, chip, scheme):
    """All 7 projections: forward, and the gradients of rows and of weights, without a float dot left."""
    text = lowered(program, chip)
    kernels = re.findall(r'kernel_name = "(qwix_matmul_\w+)"', text)
    assert kernels == [f"qwix_matmul_{scheme}"] * 21, (program, kernels)
    assert "stablehlo.dot_general" not in text


def test_the_float_step_has_no_kernel_of_ours():
    text = lowered("bf16", "v5e")
    assert "qwix_matmul" not in text and text.count("stablehlo.dot_general") == 21


def test_nothing_is_allocated():
    _, *arguments = train_block.program("int8", SMALL)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(arguments))


def test_examples():
    assert doctest.testmod(train).failed == 0
