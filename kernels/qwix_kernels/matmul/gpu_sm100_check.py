"""What a matmul on a Blackwell GPU takes, and how.

Three kinds, by what the tensor core is given:

    native     both operands as they are stored, of one kind: int8, 8-bit floats, bfloat16, float16
    converted  weights that are narrower than the rows, converted to the rows' dtype on the way
    scaled     mxfp8, mxfp4, nvfp4: the tensor core multiplies by the scales of both (gpu_sm100_scaled.py)

Scales of rows and of columns go on the sum. Scales along K of converted weights are multiplied in when they
are converted, and the product is rounded to bfloat16; other scales along K make runs of K, each summed in the
tensor core, scaled in float32 and added in registers.
"""

from __future__ import annotations

import math

from qwix_kernels.chips import Chip
from qwix_kernels.matmul import gpu_sm100_scaled
from qwix_kernels.matmul.gpu_plan import MOST_K
from qwix_kernels.problem import MatmulProblem, Operand, dtype_bits

FP8 = ("float8_e4m3fn", "float8_e5m2")
WIDE = ("bfloat16", "float16")
# What weights are converted from, by the dtype of the rows.
CONVERTED = {
    "bfloat16": ("int8", "int4", *FP8, "float4_e2m1fn"),
    "float16": ("int8", "int4", *FP8, "float4_e2m1fn"),
    "int8": ("int4",),
    "float8_e4m3fn": ("int4", "float4_e2m1fn"),
}
ROWS = 8  # the copy engine moves tiles of so many rows, and must find whole ones
ALIGNED = 32  # bytes: the least columns of such a tile that the matrix unit reads
LEAST_SWIZZLE = 256  # bits of a row of a block that the matrix unit reads


def kind(p: MatmulProblem) -> str:
    """How the tensor core is given the weights: see the module's header.

    Raises NotImplementedError for dtypes of which it is given none.
    """
    x, w = x_dtype(p), p.rhs.dtype
    if block_format(p):
        return "scaled"
    if (x == w and x in ("int8", *WIDE)) or (x in FP8 and w in FP8):
        return "native"
    if w in CONVERTED.get(x, ()):
        return "converted"
    raise NotImplementedError(
        f"{x} rows with {w} weights: both sides are int8, 8-bit floats, bfloat16 or float16, or weights are "
        f"converted from {CONVERTED.get(x, ())} for {x} rows, or 4-bit floats on both sides have scales "
        "of 32 (float8_e8m0fnu) or 16 (float8_e4m3fn) along K"
    )


def x_dtype(p: MatmulProblem) -> str:
    """The dtype in which rows are multiplied: 4-bit integers as bytes."""
    return "int8" if p.lhs.dtype == "int4" else p.lhs.dtype


def block_format(p: MatmulProblem) -> str | None:
    """The block-scaled format of both operands, or None."""
    names = {gpu_sm100_scaled.FORMATS.get((x.dtype, x.scale_dtype or "", x.tile_k)) for x in (p.lhs, p.rhs)}
    same = p.lhs.scale_dtype == p.rhs.scale_dtype
    return next(iter(names)) if len(names) == 1 and same else None


def varies(x: Operand, p: MatmulProblem) -> bool:
    """Whether there is more than one scale along K."""
    return x.is_quantized and x.tile_k < p.k


def run_k(p: MatmulProblem) -> int:
    """Neighbours along K that are summed before they are scaled; 0 where all are."""
    if kind(p) == "scaled":
        return 0
    tiles = [p.lhs.tile_k] if varies(p.lhs, p) else []
    if varies(p.rhs, p) and not scales_converted(p):
        tiles.append(p.rhs.tile_k)
    return math.gcd(*tiles)


def scales_converted(p: MatmulProblem) -> bool:
    """Whether weights are multiplied by their scales along K when they are converted."""
    return kind(p) == "converted" and varies(p.rhs, p) and p.lhs.dtype in WIDE


def check(p: MatmulProblem, chip: Chip) -> None:
    """Raises NotImplementedError, naming the constraint, for a product that the kernel does not take.

    `p` has no prologue and no epilogue, and a transposed rhs: gpu.py sees to that.
    """
    if chip.name != "b200":
        raise NotImplementedError(
            f"this kernel is for compute capability 10.0 (Blackwell), not for {chip.name}"
        )
    how = kind(p)
    if not p.rhs_transposed:
        raise NotImplementedError("the weight must be stored [N, K] (rhs_transposed)")
    for name, x in (("lhs", p.lhs), ("rhs", p.rhs)):
        if x.codebook or x.zero_point:
            raise NotImplementedError(f"codebooks and zero points are not supported, and the {name} has one")
        bits = dtype_bits(x_dtype(p)) if name == "lhs" else x.bits
        if p.k * bits % (8 * ALIGNED):
            taken = f"rows of the {name} take {p.k * bits / 8:g} bytes"
            raise NotImplementedError(f"{taken}; the copy engine needs multiples of {ALIGNED}")
    if p.n % ROWS:
        raise NotImplementedError(f"N is {p.n}; the copy engine needs multiples of {ROWS}")
    if p.out_dtype not in ("float32", "int32", *WIDE):
        raise NotImplementedError(f"results are float32, int32, bfloat16 or float16, not {p.out_dtype}")
    if x_dtype(p) == "int8" and (run_k(p) or p.k) > MOST_K:
        raise NotImplementedError(f"sums of {p.k} products of bytes may not fit int32; {MOST_K} do")
    if how == "converted" and p.precision not in (None, "default"):
        raise NotImplementedError(
            f"weights are rounded to {p.lhs.dtype}, and precision {p.precision!r} is asked for"
        )
    _check_tiles(p)


def _check_tiles(p: MatmulProblem) -> None:
    if scales_converted(p):
        if p.lhs.dtype == "float16":
            raise NotImplementedError(
                "float16 may not hold scales along K: they are multiplied in as bfloat16 only"
            )
        tile = p.rhs.tile_k
        if tile < 16 or tile & (tile - 1):
            raise NotImplementedError(
                f"tiles of {tile} along K; weights are scaled by tiles of 16, 32, 64, ..."
            )
    run = run_k(p)
    narrow = min(dtype_bits(x_dtype(p)), p.rhs.bits)
    if run and run * narrow % LEAST_SWIZZLE:
        least = LEAST_SWIZZLE // narrow
        raise NotImplementedError(f"tiles of {run} along K; the tensor core reads multiples of {least}")
    if kind(p) == "native" and varies(p.lhs, p) and p.lhs.dtype in WIDE:
        raise NotImplementedError(f"{p.lhs.dtype} rows with scales along K")
