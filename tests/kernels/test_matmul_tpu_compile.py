"""The TPU matmul compiled by the real compiler for chips that are not attached."""

import jax
import jax.numpy as jnp
import pytest
from qwix_kernels.chips import CHIPS
from qwix_kernels.matmul import tpu
from qwix_kernels.matmul.describe import problem_of
from qwix_kernels.problem import MatmulProblem, RowQuantize, Tensor

from bench.tpu_compile import TOPOLOGY, compile_for

BOUND = {"int8": 127.5, "int4": 7.5, "float8_e4m3fn": 448.0}
CHIP_NAMES = tuple(TOPOLOGY)


def shaped(dtype, shape, tiles=None, scale_dtype="bfloat16", zero_point=False) -> Tensor:
    """A tensor without data; `tiles` are the neighbours that share a scale along the last two axes."""
    struct = jax.ShapeDtypeStruct
    values = struct(shape, jnp.uint4 if dtype == "nf4" else dtype)
    small = (shape[0], shape[1] // tiles[0], shape[2] // tiles[1]) if tiles else ()
    return Tensor(
        values,
        struct(small, scale_dtype) if tiles else None,
        struct(small, values.dtype) if zero_point else None,
        "nf4" if dtype == "nf4" else None,
    )


def compiled(
    chip: str, problem: MatmulProblem, lhs: Tensor, rhs: Tensor, config: tpu.Config | None = None
) -> str:
    """The HLO of the kernel's own lowering, one custom call and what lays out the scales."""
    tpu.check(problem, CHIPS[chip])
    config = config or tpu.heuristic_config(problem, CHIPS[chip])
    run = lambda lhs, rhs: tpu.run(problem, lhs, rhs, config=config, chip=CHIPS[chip])
    return compile_for(chip, run, lhs, rhs).as_text()


def weights(scheme, m, k=512, n=384, *, transposed=False, tiles=None, lhs_dtype="bfloat16", **kwargs):
    weight, act, tile = scheme
    per = tiles or (tile or k, 1)
    shape, per = ((1, n, k), per[::-1]) if transposed else ((1, k, n), per)
    lhs, rhs = shaped(lhs_dtype, (1, m, k)), shaped(weight, shape, per, **kwargs)
    how = RowQuantize(act, BOUND[act], tile) if act else None
    problem = problem_of(lhs, rhs, quantize_lhs=how, rhs_transposed=transposed, out_dtype=jnp.bfloat16)
    return problem, lhs, rhs


SCHEMES = {
    "w8a8": ("int8", "int8", 0),
    "w8a8_g128": ("int8", "int8", 128),
    "w4a8": ("int4", "int8", 0),
    "w4a8_g128": ("int4", "int8", 128),
    "w4a4": ("int4", "int4", 0),
    "w8a16": ("int8", None, 0),
    "w8a16_g128": ("int8", None, 128),
    "w4a16_g32": ("int4", None, 32),
    "w4a16_g128": ("int4", None, 128),
    "wf8af8": ("float8_e4m3fn", "float8_e4m3fn", 0),
    "wf8af8_g128": ("float8_e4m3fn", "float8_e4m3fn", 128),
    "wf8a16_g128": ("float8_e4m3fn", None, 128),
    "w4af8": ("int4", "float8_e4m3fn", 0),
    "wnf4a16_g64": ("nf4", None, 64),
    "wnf4a8": ("nf4", "int8", 0),
}


@pytest.mark.parametrize("chip", CHIP_NAMES)
@pytest.mark.parametrize("name", SCHEMES)
def test_schemes(chip, name):
    m = {"v5e": 16, "v5p": 16, "v6e": 256, "v7x": 128}[chip]
    text = compiled(chip, *weights(SCHEMES[name], m))
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    # The weight goes in as it lies in memory.
    assert "transpose(" not in text and "pad(" not in text


@pytest.mark.parametrize("chip", ["v5e", "v7x"])
@pytest.mark.parametrize("name", ["w8a8", "w8a16_g128", "w4a16_g32", "wf8af8", "wnf4a16_g64", "w4a8_g128"])
def test_transposed_weights(chip, name):
    text = compiled(chip, *weights(SCHEMES[name], 32, transposed=True))
    assert text.count('custom_call_target="tpu_custom_call"') == 1


@pytest.mark.parametrize("chip", ["v5e", "v7x"])
@pytest.mark.parametrize("shape", [(1, 300, 1), (67, 127, 131), (33, 1, 17), (5, 1100, 129)])
@pytest.mark.parametrize("name", ["w8a8", "w4a4", "w8a16", "wf8af8", "wnf4a8"])
def test_odd_shapes(chip, shape, name):
    m, k, n = shape
    compiled(chip, *weights(SCHEMES[name], m, k, n))


@pytest.mark.parametrize("chip", ["v5e", "v7x"])
@pytest.mark.parametrize("name", ["w8a8", "w4a16_g128", "wf8a16_g128", "w8a8_g128"])
def test_parts_of_k_and_their_tail(chip, name):
    """Blocks of K smaller than K, the last one part empty; both operands are zeroed past the end."""
    tile = SCHEMES[name][2]
    problem, lhs, rhs = weights(SCHEMES[name], 32, k=640, n=384)
    compiled(chip, problem, lhs, rhs, tpu.Config(32, 128, 256, "before" if tile else "once"))
    if tile:
        compiled(chip, problem, lhs, rhs, tpu.Config(32, 128, 256, "after"))


@pytest.mark.parametrize("chip", ["v5e", "v7x"])
@pytest.mark.parametrize("name", ["w8a8", "w4a16_g128", "w4a16_g32"])
@pytest.mark.parametrize("transposed", [False, True])
def test_zero_points(chip, name, transposed):
    compiled(chip, *weights(SCHEMES[name], 32, transposed=transposed, zero_point=True))


@pytest.mark.parametrize("chip", ["v5e", "v7x"])
@pytest.mark.parametrize("tiles", [(512, 384), (128, 96), (512, 128)])
def test_scale_tiles(chip, tiles):
    compiled(chip, *weights(("int8", "int8", 0), 32, tiles=tiles, scale_dtype="float32", lhs_dtype="float32"))


@pytest.mark.parametrize("chip", CHIP_NAMES)
@pytest.mark.parametrize(
    ("lhs", "rhs"), [("int8", "int8"), ("int8", "int4"), ("uint8", "int8"), ("int4", "int4")]
)
def test_integer_accumulators(chip, lhs, rhs):
    left, right = shaped(lhs, (2, 40, 2304)), shaped(rhs, (1, 2304, 136))
    text = compiled(chip, problem_of(left, right), left, right)
    assert "s32[2,40,136]" in text


@pytest.mark.large
@pytest.mark.parametrize("chip", CHIP_NAMES)
@pytest.mark.parametrize("m", [1, 16, 1024])
@pytest.mark.parametrize("name", SCHEMES)
def test_layers_of_llama(chip, m, name):
    for k, n in [(4096, 4096), (4096, 14336), (14336, 4096)]:
        compiled(chip, *weights(SCHEMES[name], m, k, n))


@pytest.mark.parametrize("chip", CHIP_NAMES)
def test_a_dtype_that_no_unit_takes_is_refused(chip):
    lhs, rhs = shaped("int16", (1, 8, 128)), shaped("int16", (1, 128, 128))
    with pytest.raises(NotImplementedError, match=f"int16.*{chip}"):
        tpu.check(problem_of(lhs, rhs), CHIPS[chip])
