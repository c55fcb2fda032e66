"""The Hopper matmul kernel, interpreted with race detection, and compiled for an H100.

Integer accumulators are bit-equal to int64; floats are within `reference.error_bound`.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from qwix_kernels import chips, dispatch
from qwix_kernels.matmul import gpu, gpu_plan, gpu_registers, matmul, reference
from qwix_kernels.matmul.describe import problem_of
from qwix_kernels.matmul.gpu import Config
from qwix_kernels.problem import NF4, Extras, Operand, RowQuantize, Tensor, dtype_bits

from bench import gpu_compile

H100 = dataclasses.replace(chips.chip("h100"), sms=2)  # two blocks, each with several items
INTERPRET = plgpu.InterpretGPUParams(detect_races=True)
SMALL = Config(block_m=16, block_n=128, block_k=64, stages=2)
BF16, I8, I4, F8 = "bfloat16", "int8", "int4", "float8_e4m3fn"


def values(rng, shape, dtype):
    dtype = jnp.dtype("uint4" if dtype == "nf4" else dtype)
    if jnp.issubdtype(dtype, jnp.integer):
        info = jnp.iinfo(dtype)
        return jnp.asarray(rng.integers(int(info.min), int(info.max) + 1, shape)).astype(dtype)
    return jnp.asarray(rng.standard_normal(shape) * 2, jnp.float32).astype(dtype)


def tensor(rng, shape, dtype, tile=None, *, tile_free=1, zero=False, scale_dtype="float32"):
    """`tile` None: not scaled; 0: a scale for all of K."""
    codebook = "nf4" if dtype == "nf4" else None
    if tile is None:
        return Tensor(values(rng, shape, dtype), codebook=codebook)
    small = (shape[0], shape[1] // tile_free, shape[2] // (tile or shape[2]))
    scale = jnp.asarray(rng.uniform(0.5, 1.5, small), scale_dtype)
    return Tensor(values(rng, shape, dtype), scale, values(rng, small, dtype) if zero else None, codebook)


def run(lhs, rhs, config, out_dtype="float32", **options):
    problem = problem_of(lhs, rhs, rhs_transposed=True, out_dtype=out_dtype, **options)
    made = gpu.run(problem, lhs, rhs, config=config, chip=H100, interpret=INTERPRET)
    return problem, np.asarray(made).astype(np.float64)


def check(lhs, rhs, config=SMALL, out_dtype="float32", **options):
    problem, got = run(lhs, rhs, config, out_dtype, **options)
    want = reference.run(problem, lhs, rhs)
    assert got.shape == want.shape
    if out_dtype == "int32":
        np.testing.assert_array_equal(got, want)
        return
    over = np.abs(got - want) - reference.error_bound(problem, lhs, rhs)
    assert np.all(over <= 0), f"{np.sum(~(over <= 0))} elements off by up to {over.max()} too much"


# rows, weight, tile of K of the weight (0: all of it), config
SCHEMES = {
    "w8a8": (I8, I8, 0, {}),
    "wf8af8": (F8, F8, 0, {}),
    "w8a8_g32": (I8, I8, 32, {"block_k": 128, "strategy": "after"}),
    "w4a8": (I8, I4, 0, {}),
    "w8a16": (BF16, I8, 0, {}),
    "w4a16": (BF16, I4, 0, {}),
    "wf8a16": (BF16, F8, 0, {}),
    "w4a16_g64": (BF16, I4, 64, {"block_k": 128, "strategy": "after"}),
    "w4a16_g128": (BF16, I4, 128, {"block_k": 128, "strategy": "before"}),
    "wnf4a16_g64": (BF16, "nf4", 64, {"strategy": "before"}),
}
QUICK = ("w8a8", "w8a8_g32", "w4a16", "w4a16_g128", "wnf4a16_g64")
ALL = [name if name in QUICK else pytest.param(name, marks=pytest.mark.large) for name in SCHEMES]


@pytest.mark.parametrize("name", ALL)
def test_schemes(name):
    """Two thread blocks, several items each, and sizes that no block divides."""
    rows, weight, tile, options = SCHEMES[name]
    rng = np.random.default_rng(0)
    lhs = tensor(rng, (1, 21, 256), rows, None if rows == BF16 else 0)
    rhs = tensor(rng, (1, 208, 256), weight, tile)
    check(lhs, rhs, dataclasses.replace(SMALL, **options), BF16)


def test_integer_accumulators_are_exact_whatever_the_sizes():
    """M, N and a tail in K that no block divides; -128 * -128 over all of K among the sums."""
    rng = np.random.default_rng(1)
    lhs, rhs = tensor(rng, (1, 13, 160), I8), tensor(rng, (1, 72, 160), I8)
    lowest = lambda x: dataclasses.replace(x, values=x.values.at[:, 0].set(-128))
    check(lowest(lhs), lowest(rhs), out_dtype="int32")


@pytest.mark.parametrize("tile", [128, pytest.param(None, marks=pytest.mark.large)])
def test_scales_of_the_rows_change_along_k(tile):
    """And those of the weight too, in other tiles; or the weight has none."""
    rng = np.random.default_rng(2)
    lhs, rhs = tensor(rng, (1, 16, 256), I8, 64), tensor(rng, (1, 128, 256), I8, tile)
    check(lhs, rhs, dataclasses.replace(SMALL, block_k=128, strategy="after"))


@pytest.mark.large
def test_precise_sums_of_8_bit_floats():
    rng = np.random.default_rng(8)
    lhs, rhs = tensor(rng, (1, 16, 512), F8, 0), tensor(rng, (1, 128, 512), F8, 0)
    check(lhs, rhs, dataclasses.replace(SMALL, block_k=128, strategy="after"), BF16, precision="highest")


@pytest.mark.large
@pytest.mark.parametrize("lhs_batch, rhs_batch", [(2, 2), (2, 1), (1, 2)])
def test_batches(lhs_batch, rhs_batch):
    rng = np.random.default_rng(3)
    check(tensor(rng, (lhs_batch, 8, 64), I8, 0), tensor(rng, (rhs_batch, 128, 64), I8, 0), out_dtype=BF16)


@pytest.mark.parametrize("weight", [I8, pytest.param(I4, marks=pytest.mark.large)])
def test_zero_points(weight):
    rng = np.random.default_rng(4)
    rhs = tensor(rng, (1, 128, 128), weight, 64, zero=True)
    check(tensor(rng, (1, 8, 128), BF16), rhs, dataclasses.replace(SMALL, strategy="before"))


@pytest.mark.parametrize(
    "options",
    [
        {"warpgroups_n": 1, "warpgroups_k": 2, "block_n": 64, "block_k": 128},
        pytest.param({"splits": 2}, marks=pytest.mark.large),
        pytest.param({"block_n": 256}, marks=pytest.mark.large),
        pytest.param({"block_m": 128, "stages": 3}, marks=pytest.mark.large),
    ],
    ids=str,
)
def test_who_sums_what(options):
    """Parts of K that several warpgroups, or thread blocks, sum; results in several chunks."""
    rng = np.random.default_rng(5)
    lhs, rhs = tensor(rng, (1, 40, 256), I8, 0), tensor(rng, (1, 256, 256), I8, 0)
    check(lhs, rhs, dataclasses.replace(SMALL, **options), BF16)


@pytest.mark.parametrize(
    "activation, options",
    [
        ("silu", {}),
        pytest.param("relu6", {}, marks=pytest.mark.large),
        pytest.param("relu", {"splits": 2}, marks=pytest.mark.large),
        pytest.param("gelu", {}, marks=pytest.mark.large),
    ],
    ids=str,
)
def test_what_is_fused_round_it(activation, options):
    """Rows quantized before, bias and activation in the kernel or after it, a weight stored [K, N]."""
    rng = np.random.default_rng(6)
    lhs, turned = tensor(rng, (1, 16, 128), BF16), tensor(rng, (1, 128, 128), I8, 0)
    rhs = jax.tree.map(lambda x: jnp.swapaxes(x, 1, 2), turned)
    extras = Extras(bias=values(rng, (1, 1, 128), "float32"))
    how = RowQuantize(I8, 127.5)
    problem = problem_of(lhs, rhs, extras, quantize_lhs=how, activation=activation, out_dtype=BF16)
    config = dataclasses.replace(SMALL, **options)
    got = gpu.run(problem, lhs, rhs, extras, config=config, chip=H100, interpret=INTERPRET)
    over = np.abs(np.asarray(got, np.float64) - reference.run(problem, lhs, rhs, extras))
    assert np.all(over <= reference.error_bound(problem, lhs, rhs, extras))


@pytest.mark.large
def test_nan_stays_in_its_row_and_column():
    rng = np.random.default_rng(7)
    lhs, rhs = tensor(rng, (1, 16, 64), BF16), tensor(rng, (1, 128, 64), F8, 0)
    lhs = dataclasses.replace(lhs, values=lhs.values.at[0, 3, 5].set(jnp.nan))
    rhs = dataclasses.replace(rhs, values=rhs.values.at[0, 70, 9].set(jnp.nan))
    _, got = run(lhs, rhs, SMALL)
    expected = np.zeros((16, 128), bool)
    expected[3], expected[:, 70] = True, True
    np.testing.assert_array_equal(np.isnan(got[0]), expected)


def test_the_table_of_a_codebook():
    """The bytes that the permutations pick are those of the table."""
    entries = np.asarray(NF4, np.float32).astype(jnp.bfloat16)
    index = jnp.arange(16).reshape(1, 16)
    got = gpu_registers.looked_up(index, NF4, BF16, emulated=True)
    np.testing.assert_array_equal(np.asarray(got)[0], entries)


@pytest.mark.parametrize(
    "lhs, rhs, constraint",
    [
        (Operand("float32", 1, 16), Operand(I8, 1, 128, "float32", 1, 256), "float32"),
        (Operand(BF16, 1, 16), Operand(BF16, 1, 128), "that product is XLA's"),
        (Operand(I8, 1, 16, "float32", 1, 256, True), Operand(I8, 1, 128, "float32", 1, 256), "zero points"),
        (Operand(I8, 1, 16), Operand(I8, 1, 128, "float32", 1, 256, True), "zero points"),
        (Operand(BF16, 1, 16), Operand("int2", 1, 128, "float32", 1, 256), "not int2"),
        (Operand(I8, 1, 16), Operand(I8, 1, 128, "float32", 1, 16), "tiles of 16"),
        (Operand(BF16, 1, 16), Operand(I4, 1, 128, "float32", 1, 32), "16 bytes of the rhs"),
    ],
    ids=lambda x: x if isinstance(x, str) else x.dtype,
)
def test_what_the_kernel_refuses(lhs, rhs, constraint):
    problem = problem_of_operands(lhs, rhs)
    explained = dispatch.explain(problem, "h100")
    assert explained.chosen == "xla"
    assert constraint in dict(explained.rejected)["mosaic_gpu"]


def problem_of_operands(lhs, rhs, m=16, k=256, n=128):
    return gpu_plan.MatmulProblem(m, k, n, lhs, rhs, BF16, rhs_transposed=True)


@pytest.mark.parametrize("sizes, constraint", [({"k": 240}, "K is 240"), ({"n": 136}, "N is 136")], ids=str)
def test_sizes_that_cannot_be_copied(sizes, constraint):
    k = sizes.get("k", 256)
    problem = problem_of_operands(Operand(I8, 1, 16), Operand(I8, 1, 128, "float32", 1, k), **sizes)
    assert constraint in dict(dispatch.explain(problem, "h100").rejected)["mosaic_gpu"]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"block_m": 12}, "multiples of 8"),
        ({"block_n": 96}, "64 or 128 columns"),
        ({"block_k": 96}, "multiples of 64"),
        ({"strategy": "after"}, "do not change along K"),
        ({"splits": 3}, "splits do not divide"),
        ({"stages": 200}, "shared memory"),
        ({"block_m": 256, "block_n": 512, "warpgroups_n": 4}, "registers of sums"),
    ],
    ids=str,
)
def test_configs_that_do_not_fit(changes, reason):
    problem = problem_of_operands(Operand(I8, 1, 16), Operand(I8, 1, 128, "float32", 1, 256))
    with pytest.raises(NotImplementedError, match=reason):
        gpu_plan.resolve(problem, H100, dataclasses.replace(SMALL, **changes))


@pytest.mark.parametrize("block_m", [8, 16, 64])
def test_every_copy_ends_at_128_bytes(block_m):
    """Where the copy engine writes, which neither the interpreter nor the compiler checks."""
    lhs, rhs = Operand(I8, 1, 16, "float32", 1, 128), Operand(I8, 1, 128, "float32", 1, 128)
    config = dataclasses.replace(SMALL, block_m=block_m, block_k=128, strategy="after")
    plan = gpu_plan.resolve(problem_of_operands(lhs, rhs), H100, config)
    assert {"lhs", "rhs", "lhs_scale", "rhs_scale"} == set(plan.streams)
    for block, dtype in plan.streams.values():
        assert block[0] * block[1] * dtype_bits(dtype) // 8 % 128 == 0


def test_other_gpus_are_named():
    """The kernel is for one compute capability; dispatch says so and takes XLA."""
    old = dataclasses.replace(chips.chip("h100"), name="a100")
    problem = problem_of_operands(Operand(I8, 1, 16), Operand(I8, 1, 128, "float32", 1, 256))
    with pytest.raises(NotImplementedError, match=r"a100.*h100"):
        gpu.check(problem, old)


def test_a_named_implementation_that_cannot_run_raises():
    lhs, rhs = jnp.ones((1, 16, 64), jnp.int8), jnp.ones((1, 64, 128), jnp.int8)
    with pytest.raises(NotImplementedError, match=r"mosaic_gpu.*runs on cuda"):
        matmul(lhs, rhs, implementation="mosaic_gpu")


# --- compiled for an H100

INSTRUCTION = {I8: "IGMMA", F8: "QGMMA", BF16: "HGMMA"}
COMPILED = [
    ("w8a8", I8, 4096, 4096, 4096),
    pytest.param(*("wf8af8", F8, 4096, 4096, 4096), marks=pytest.mark.large),
    pytest.param(*("w8a8_g128", I8, 4096, 4096, 4096), marks=pytest.mark.large),
    pytest.param(*("w4a16_g128", BF16, 4096, 4096, 4096), marks=pytest.mark.large),
    ("w4a16_g128", BF16, 16, 4096, 14336),
    pytest.param(*("w8a16", BF16, 16, 4096, 14336), marks=pytest.mark.large),
    ("wnf4a16_g64", BF16, 4096, 4096, 4096),
    pytest.param(*("wf8a16", BF16, 4096, 4096, 4096), marks=pytest.mark.large),
    # Sizes that no block divides, which the interpreter takes more easily than the copy engine does.
    ("w8a8", I8, 300, 1056, 528),
    ("w4a16", BF16, 3, 1088, 528),
    pytest.param(*("w4a8_g128", I8, 100, 1024, 528), marks=pytest.mark.large),
]


@pytest.mark.parametrize("scheme, dot, m, k, n", COMPILED, ids=lambda x: str(x))
def test_compiled(scheme, dot, m, k, n):
    """The right matrix instruction, TMA, nothing in local memory, registers that the warpgroups can have."""
    program = gpu_compile.compiled(
        "h100", "bench.gpu_problems:matmul", scheme=scheme, m=m, k=k, n=n, implementation="mosaic_gpu"
    )
    kernel = next(kernel for kernel in program.kernels if kernel.matrix)
    assert all(name.startswith(INSTRUCTION[dot]) for name in kernel.matrix)
    assert kernel.tma_loads and kernel.tma_stores
    assert kernel.spill_bytes == 0 and kernel.local_in_loops == 0
    assert kernel.highest_register < kernel.register_budget
    # What the memory warpgroup frees is all that the others can take: more would wait for ever.
    computing = kernel.threads // 128 - 1
    taken = computing * gpu_plan.registers(computing) + gpu_plan.MEMORY_REGISTERS
    assert taken <= kernel.registers * (computing + 1)


def test_the_main_loop_of_native_operands_is_nothing_but_the_matrix_unit():
    program = gpu_compile.compiled("h100", "bench.gpu_problems:matmul", scheme="w8a8", m=4096, k=4096, n=4096)
    kernel = next(kernel for kernel in program.kernels if kernel.matrix)
    assert kernel.main_loop is not None
    assert sum(kernel.main_loop.mix.values()) < 120
    assert gpu_plan.MEMORY_REGISTERS in kernel.budgets
