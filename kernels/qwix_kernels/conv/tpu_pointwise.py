"""A 1 x 1 convolution as the matmul of its pixels, by the matmul kernel as it is."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.chips import Chip
from qwix_kernels.conv import cost
from qwix_kernels.conv.problem import ConvExtras, ConvProblem
from qwix_kernels.dispatch import Estimate
from qwix_kernels.matmul import tpu_stored
from qwix_kernels.problem import Epilogue, Extras, MatmulProblem, Operand, Tensor

_SUBLANES = 8
_XLA_OP_US = 1.1  # as the compiler estimates one on a row of numbers


def takes(problem: ConvProblem, chip: Chip) -> bool:
    """Whether the matmul kernel runs this, on arrays that lie in memory as a matrix of pixels does.

    So they do where the width fills whole sublanes. A scale for each image would be one for each pixel
    there, in rows of 128 lanes: more to read than the pixels.
    """
    p = problem
    if not p.is_pointwise or p.lhs_tile or p.rhs_tile or any(w.stride > 1 for w in p.windows):
        return False
    if not p.windows or p.windows[-1].size % _SUBLANES or _is_per_image(p):
        return False
    try:
        tpu_stored.check(matmul_problem(p), chip)
    except NotImplementedError:
        return False
    return True


def _is_per_image(p: ConvProblem) -> bool:
    if p.quantize_lhs is not None:
        return p.batch > 1
    return p.lhs.is_quantized and p.lhs.tile_free < p.batch


def matmul_problem(p: ConvProblem) -> MatmulProblem:
    """[1, pixels, C] times [1, C, O]; the scale of the lhs rides on that of the rhs."""
    pixels = p.batch * math.prod(p.spatial)
    lhs = Operand(p.lhs.dtype, 1, pixels)
    rhs = Operand(p.rhs.dtype, 1, p.out_features, codebook=p.rhs.codebook)
    if p.rhs.is_quantized or p.lhs.is_quantized:
        tile = p.rhs.tile_free if p.rhs.is_quantized else p.out_features
        rhs = dataclasses.replace(
            rhs, scale_dtype="float32", tile_free=tile, tile_k=p.features, zero_point=p.rhs.zero_point
        )
    how = p.quantize_lhs
    if how is not None:
        how = dataclasses.replace(how, static=True, tile_k=0)
    e = p.epilogue and Epilogue(p.epilogue.bias, p.epilogue.activation, quantize=p.epilogue.quantize)
    return MatmulProblem(
        pixels, p.features, p.out_features, lhs, rhs, p.out_dtype, False, how, p.precision, None, e
    )


def estimate(problem: ConvProblem, chip: Chip) -> Estimate:
    """Static cost: the matmul's."""
    matmul = matmul_problem(problem)
    found = tpu_stored.estimate(matmul, chip, tpu_stored.heuristic_config(matmul, chip))
    before = 0.0
    if problem.quantize_lhs and not problem.quantize_lhs.static:  # one image's maximum, by XLA
        before = cost.lhs_bytes(problem) / (chip.hbm_gbps * 1e3)
    if problem.lhs.is_quantized and problem.rhs.is_quantized:  # their scales are multiplied by XLA
        before += _XLA_OP_US
    least = max(cost.floor(problem, chip))
    return dataclasses.replace(
        found,
        static_us=found.static_us + before,
        floor_us=least,
        note=f"a matmul of the pixels, {found.note}",
    )


def run(
    problem: ConvProblem, lhs: Tensor, rhs: Tensor, extras: ConvExtras, *, chip: Chip, interpret: Any = False
) -> jax.Array:
    """[1, pixels, O]."""
    from qwix_kernels.conv import images
    from qwix_kernels.matmul.elementwise import row_scale

    p, matmul = problem, matmul_problem(problem)
    pixels = lhs.values.reshape(1, -1, p.features)
    weights = rhs.values.reshape(1, p.features, p.out_features)
    scale = None if rhs.scale is None else rhs.scale.reshape(1, 1, -1).astype(jnp.float32)
    if lhs.scale is not None:
        one = lhs.scale.reshape(1, 1, 1).astype(jnp.float32)
        scale = one if scale is None else scale * one
    zero = None if rhs.zero_point is None else rhs.zero_point.reshape(1, 1, -1)
    given = extras.lhs_scale
    if p.quantize_lhs is not None and given is None:
        given = row_scale(images.absmax(lhs.values, 0), p.quantize_lhs)
    vector = lambda x: None if x is None else x.reshape(1, 1, -1)
    more = Extras(lhs_scale=vector(given), bias=vector(extras.bias), out_scale=vector(extras.out_scale))
    config = tpu_stored.heuristic_config(matmul, chip)
    right = Tensor(weights, scale, zero, rhs.codebook)
    out = tpu_stored.run(matmul, Tensor(pixels), right, more, config=config, chip=chip, interpret=interpret)
    return out.values if isinstance(out, Tensor) else out
