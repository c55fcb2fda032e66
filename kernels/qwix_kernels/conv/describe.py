"""From arrays to a `ConvProblem`: every check of what a caller may give, and the type of the result.

Only shapes and dtypes are read, so `jax.ShapeDtypeStruct`s serve as well as arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from qwix_kernels.conv.problem import NO_EXTRAS, ConvExtras, ConvProblem, Window
from qwix_kernels.matmul.describe import as_tensor
from qwix_kernels.problem import ACTIVATIONS, CODEBOOKS, Epilogue, Operand, RowQuantize, Tensor

_PRECISIONS = ("default", "high", "highest")


def problem_of(
    lhs: Any,
    rhs: Any,
    extras: ConvExtras | None = None,
    *,
    strides: Sequence[int] | None = None,
    padding: Sequence[tuple[int, int]] | None = None,
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    groups: int = 1,
    quantize_lhs: RowQuantize | None = None,
    out_dtype: Any = None,
    precision: Any = None,
    activation: str | None = None,
    quantize_out: RowQuantize | None = None,
) -> ConvProblem:
    """Describes the convolution of these operands, or says what is wrong with them.

    Args: as for `qwix_kernels.conv.conv`.

    Raises ValueError for shapes, tiles or options that disagree, TypeError for dtypes that no convolution
    takes.

    >>> import jax
    >>> x = jax.ShapeDtypeStruct((8, 56, 56, 64), jnp.int8)
    >>> scale = jax.ShapeDtypeStruct((1, 1, 1, 128), jnp.float32)
    >>> w = Tensor(jax.ShapeDtypeStruct((3, 3, 64, 128), jnp.int8), scale)
    >>> p = problem_of(x, w, strides=(2, 2), padding=((1, 1), (1, 1)))
    >>> p.scheme, p.out_shape
    ('conv 3x3 s2 w8a8', (8, 28, 28, 128))
    """
    lhs, rhs, extras = as_tensor(lhs), as_tensor(rhs), extras or NO_EXTRAS
    windows = _windows(lhs.shape, rhs.shape, strides, padding, lhs_dilation, rhs_dilation)
    features, inputs, outputs = lhs.shape[-1], rhs.shape[-2], rhs.shape[-1]
    if groups < 1 or features != inputs * groups or outputs % groups:
        raise ValueError(
            f"lhs {lhs.shape} has {features} features and rhs {rhs.shape} takes {inputs} in each of {groups} "
            f"groups and gives {outputs}; features must be inputs * groups ({inputs * groups}), and the "
            f"groups must divide the outputs."
        )
    last = len(lhs.shape) - 1
    left = _operand(lhs, "lhs", free=0, contracting=last)
    right = _operand(rhs, "rhs", free=last, contracting=last - 1)
    if quantize_lhs is not None:
        _check_quantize(quantize_lhs, left, features)
    static = _static_scale("lhs_scale", extras.lhs_scale, quantize_lhs, lhs.shape)
    if static:
        tile = quantize_lhs.tile_k or features  # type: ignore[union-attr]
        if extras.lhs_scale.shape[-1] != features // tile:  # type: ignore[union-attr]
            raise ValueError(
                f"lhs_scale {extras.lhs_scale.shape} must have {features // tile} tiles along its last axis."  # type: ignore[union-attr]
            )
    epilogue = _epilogue(extras, activation, quantize_out, (lhs.shape[0], *[w.out for w in windows], outputs))
    name = None if precision is None else str(getattr(precision, "name", precision)).lower()
    if name is not None and name not in _PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(_PRECISIONS)} or None, got {precision!r}.")
    return ConvProblem(
        windows=windows,
        features=features,
        groups=groups,
        lhs=left,
        rhs=right,
        out_dtype=_out_dtype(left, right, lhs, rhs, quantize_lhs, quantize_out, epilogue, out_dtype),
        quantize_lhs=quantize_lhs,
        precision=name,
        epilogue=epilogue,
    )


def _windows(lhs, rhs, strides, padding, lhs_dilation, rhs_dilation) -> tuple[Window, ...]:
    """The geometry; ValueError names the offending numbers."""
    rank = len(lhs) - 2
    if rank < 0 or len(rhs) != len(lhs):
        raise ValueError(
            f"lhs is [N, *spatial, C] and rhs [*kernel, C / groups, O], of one rank; got {lhs} and {rhs}."
        )
    given = {"strides": strides, "lhs_dilation": lhs_dilation, "rhs_dilation": rhs_dilation}
    for name, values in given.items():
        if values is not None and (len(values) != rank or any(v < 1 for v in values)):
            raise ValueError(
                f"{name} is {tuple(values)}; it needs {rank} numbers of at least 1, one for each spatial "
                f"axis of lhs {lhs}."
            )
    if padding is not None and (len(padding) != rank or any(len(pair) != 2 for pair in padding)):
        raise ValueError(f"padding is {padding}; it needs (low, high) for each of {rank} spatial axes.")
    ones, pads = (1,) * rank, padding or ((0, 0),) * rank
    windows = tuple(
        Window(size, kernel, int(stride), int(low), int(high), int(ld), int(rd))
        for size, kernel, stride, (low, high), ld, rd in zip(
            lhs[1:-1],
            rhs[:-2],
            strides or ones,
            pads,
            lhs_dilation or ones,
            rhs_dilation or ones,
            strict=True,
        )
    )
    for axis, w in enumerate(windows):
        if w.padded < 0:
            raise ValueError(
                f"padding ({w.low}, {w.high}) crops more than there is along spatial axis {axis}: {w.size} "
                f"elements{f', dilated by {w.lhs_dilation}' if w.lhs_dilation > 1 else ''}, leave {w.padded}."
            )
    return windows


def _operand(x: Tensor, name: str, free: int, contracting: int) -> Operand:
    dtype, shape = jnp.dtype(x.values.dtype), x.shape
    kinds = (jnp.integer, jnp.floating)
    if not any(jnp.issubdtype(dtype, kind) for kind in kinds) or dtype == jnp.float64:
        raise TypeError(f"{name} is {dtype}; a convolution takes integers and floats of at most 32 bits.")
    if x.codebook is not None and x.codebook not in CODEBOOKS:
        raise ValueError(f"Unknown codebook {x.codebook!r} of {name}; known: {', '.join(CODEBOOKS)}.")
    if x.scale is None:
        if x.zero_point is not None:
            raise ValueError(f"{name} has a zero point but no scale.")
        return Operand(dtype.name, 1, shape[free], codebook=x.codebook)
    scale = x.scale.shape
    if len(scale) != len(shape) or any(s == 0 or v % s for v, s in zip(shape, scale, strict=True)):
        raise ValueError(
            f"The scale of {name} {shape} is {scale}; its sizes must divide those of the values."
        )
    others = [a for a in range(len(shape)) if a not in (free, contracting)]
    if any(scale[a] != 1 for a in others):
        raise ValueError(
            f"The scale of {name} {shape} is {scale}, which varies along spatial axes "
            f"{[a for a in others if scale[a] != 1]}; dequantize it first."
        )
    if x.zero_point is not None and (x.zero_point.shape != scale or x.zero_point.dtype != dtype):
        raise ValueError(
            f"The zero point of {name} must be {dtype}{scale}, got {x.zero_point.dtype}{x.zero_point.shape}."
        )
    return Operand(
        dtype.name,
        1,
        shape[free],
        jnp.dtype(x.scale.dtype).name,
        _run(shape[free], scale[free]),
        _run(shape[contracting], scale[contracting]),
        x.zero_point is not None,
        x.codebook,
    )


def _run(size: Any, count: int) -> Any:
    return size if count == 1 else size // count


def _check_quantize(how: RowQuantize, left: Operand, features: int) -> None:
    floating = jnp.issubdtype(left.dtype, jnp.floating) and jnp.finfo(left.dtype).bits > 8
    if left.is_quantized or not floating:
        raise ValueError(f"quantize_lhs quantizes a plain float lhs, got {left}.")
    if how.columns or how.noise:
        raise ValueError(f"Images are quantized without columns and noise, got {how}.")
    if how.tile_k and features % how.tile_k:
        raise ValueError(
            f"quantize_lhs: the tile {how.tile_k} does not divide the {features} features of lhs."
        )


def _static_scale(name: str, scale: Any, how: RowQuantize | None, shape: tuple[int, ...]) -> bool:
    static = how is not None and how.static
    if static != (scale is not None):
        raise ValueError(f"{name} is given exactly where quantization is static; got {how} and {scale!r}.")
    if static:
        middle = scale.shape[1:-1]
        if scale.ndim != len(shape) or scale.shape[0] not in (1, shape[0]) or any(s != 1 for s in middle):
            raise ValueError(f"{name} of {shape} must be [N or 1, 1, ..., tiles], got {scale.shape}.")
    return static


def _epilogue(
    extras: ConvExtras, activation: str | None, quantize: RowQuantize | None, out: tuple[int, ...]
) -> Epilogue | None:
    if activation is not None and activation not in ACTIVATIONS:
        raise ValueError(f"Unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}, or None.")
    if extras.bias is not None and extras.bias.shape != out[-1:]:
        raise ValueError(f"bias has shape {extras.bias.shape}; it is added to the {out[-1]} output features.")
    if quantize is not None and quantize.tile_k % out[-1]:
        raise ValueError(f"A result is quantized by whole images, not by tiles of {quantize.tile_k}.")
    _static_scale("out_scale", extras.out_scale, quantize, out)
    if extras.out_scale is not None and extras.out_scale.size != 1:
        raise ValueError(f"out_scale must be one for all images, [1, ..., 1], got {extras.out_scale.shape}.")
    if extras.bias is None and activation is None and quantize is None:
        return None
    return Epilogue(bias=extras.bias is not None, activation=activation, quantize=quantize)


def _out_dtype(left, right, lhs, rhs, quantize_lhs, quantize_out, epilogue, given) -> str:
    if quantize_out is not None:
        return jnp.dtype(quantize_out.dtype).name
    integers = left.is_integer and right.is_integer and not (left.is_quantized or right.is_quantized)
    plain = integers and epilogue is None and quantize_lhs is None
    if given is not None:
        if plain and jnp.dtype(given) == jnp.int32:
            return "int32"
        if not jnp.issubdtype(given, jnp.floating):
            raise ValueError(f"out_dtype must be a float, or int32 for integers without scales; got {given}.")
        return jnp.dtype(given).name
    if plain:
        return "int32"
    values = [
        x.scale.dtype if x.scale is not None else x.values.dtype
        for x in (lhs, rhs)
        if x.scale is not None or jnp.issubdtype(x.values.dtype, jnp.floating)
    ]
    wide = [v for v in values if jnp.finfo(v).bits > 8] or [jnp.dtype(jnp.float32)]
    return jnp.dtype(jnp.result_type(*wide)).name
