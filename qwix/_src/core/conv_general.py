"""`conv_general_dilated` of arrays and QArrays, and what can be fused round it.

Every convolution with a quantized operand goes through `qwix_kernels.conv`, which is portable and exact in
integers; what that does not take (float64, scales that change along spatial axes) is dequantized, which XLA
convolves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from qwix_kernels import conv as conv_kernel
from qwix_kernels.conv import ConvExtras, ConvProblem
from qwix_kernels.problem import RowQuantize, Tensor

from qwix._src.core import calibration, conv_layout, numerics, qarray
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.qarray import QArray

Operand = jax.Array | QArray


class ConvFused(TypedDict, total=False):
    """What can be fused round a convolution, all of it optional.

    bias: added to the result; one per output feature.
    activation: "relu", "relu6", "gelu", "gelu_tanh" or "silu", of the result.
    act_scale: a static scale for `act_qtype` instead of a dynamic one: a scalar, or one per tile.
    out_qtype: quantize the images of the result; it becomes a QArray.
    out_scale: a static scale for `out_qtype`: a scalar.
    """

    bias: jax.Array | None
    activation: str | None
    act_scale: Any
    out_qtype: DTypeLike | str | None
    out_scale: Any


def get_how_to_quantize(
    *, dimension_numbers: jax.lax.ConvDimensionNumbers, for_lhs: bool, **kwargs: Any
) -> HowToQuantize:
    """How to quantize one operand of a convolution: a scale per image (lhs) or per output channel (rhs).

    >>> numbers = jax.lax.conv_dimension_numbers((1, 8, 8, 3), (3, 3, 3, 16), ("NHWC", "HWIO", "NHWC"))
    >>> get_how_to_quantize(dimension_numbers=numbers, for_lhs=False, qtype="int8").channelwise_axes
    (3,)
    """
    spec = dimension_numbers.lhs_spec if for_lhs else dimension_numbers.rhs_spec
    return HowToQuantize(channelwise_axes=(spec[0],), **kwargs)


def conv_general_dilated(
    lhs: Operand,
    rhs: Operand,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
    *,
    act_how: HowToQuantize | None = None,
    implementation: str | Sequence[str] | None = None,
    fused: ConvFused | None = None,
) -> Any:
    """`jax.lax.conv_general_dilated` where either operand may be quantized.

    Integers are convolved as integers whatever their scales and zero points: padding is a real zero, and
    scales may be of images, of output features and of runs of input features on either side.

    Args:
      lhs, rhs: arrays or QArrays.
      window_strides, ..., out_sharding: those of `jax.lax.conv_general_dilated`.
      act_how: how to quantize a float lhs on the way.
      implementation: "mosaic_tpu", "xla" or names in order; None takes the best that runs and never fails.
      fused: what else is computed in the same pass.

    Returns: as JAX's, in `preferred_element_type`; by default what the represented values promote to. A
      QArray with `out_qtype`.

    Raises ValueError for shapes and geometry that disagree, with the numbers.

    >>> import qwix
    >>> w = qwix.quantize(jnp.ones((3, 3, 2, 4)), "int8", channelwise_axes=(3,))
    >>> x = jnp.ones((1, 8, 8, 2))
    >>> conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")).shape
    (1, 8, 8, 4)
    """
    geometry = _geometry(
        lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
        feature_group_count, batch_group_count,
    )  # fmt: skip
    call = _call(lhs, rhs, geometry, precision, preferred_element_type, act_how, fused or {})
    if call is None:
        return _float_conv(lhs, rhs, geometry, precision, preferred_element_type, out_sharding)
    out = conv_kernel.conv(
        call.lhs,
        call.rhs,
        call.extras,
        implementation=implementation,
        out_sharding=out_sharding,
        **call.options,
    )
    spec = geometry.numbers.out_spec
    if not isinstance(out, Tensor):
        return conv_layout.from_canonical(out, spec).astype(call.result)
    found: tuple[Any, Any] = (out.values, out.scale)
    values, scale = (conv_layout.from_canonical(x, spec) for x in found)
    return QArray(values, scale.astype(jnp.float32))


def conv_problem(
    lhs: Any,
    rhs: Any,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    act_how: HowToQuantize | None = None,
    fused: ConvFused | None = None,
) -> ConvProblem | None:
    """The kernel's problem that `conv_general_dilated` would solve; None where XLA convolves floats.

    Arrays may be `jax.ShapeDtypeStruct`s.
    """
    found: list[ConvProblem | None] = []

    def describe(lhs: Any, rhs: Any, arrays: dict[str, Any]) -> None:
        geometry = _geometry(
            lhs, rhs, window_strides, padding, lhs_dilation, rhs_dilation, dimension_numbers,
            feature_group_count, batch_group_count,
        )  # fmt: skip
        options: Any = {**(fused or {}), **arrays}
        call = _call(lhs, rhs, geometry, precision, preferred_element_type, act_how, options)
        found.append(
            None if call is None else conv_kernel.problem_of(call.lhs, call.rhs, call.extras, **call.options)
        )

    arrays = {name: x for name, x in (fused or {}).items() if hasattr(x, "shape")}
    jax.eval_shape(describe, lhs, rhs, arrays)
    return found[0]


@dataclasses.dataclass(frozen=True)
class _Geometry:
    numbers: jax.lax.ConvDimensionNumbers
    strides: tuple[int, ...]
    padding: conv_layout.Pads
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    feature_groups: int
    batch_groups: int


def _geometry(
    lhs, rhs, strides, padding, lhs_dilation, rhs_dilation, dimension_numbers, feature_groups, batch_groups
) -> _Geometry:
    """Of one convolution, checked as far as the kernel's op does not."""
    numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    ones = (1,) * (len(lhs.shape) - 2)
    strides, lhs_dilation, rhs_dilation = (
        tuple(x) if x is not None else ones for x in (strides, lhs_dilation, rhs_dilation)
    )
    if feature_groups > 1 and batch_groups > 1:
        raise ValueError(
            f"One of feature_group_count and batch_group_count must be 1, got {feature_groups} and "
            f"{batch_groups}."
        )
    images, outputs = lhs.shape[numbers.lhs_spec[0]], rhs.shape[numbers.rhs_spec[0]]
    if batch_groups < 1 or (batch_groups > 1 and (images % batch_groups or outputs % batch_groups)):
        raise ValueError(
            f"batch_group_count={batch_groups} must divide the {images} images of lhs and the {outputs} "
            f"output features of rhs."
        )
    if not len(strides) == len(lhs_dilation) == len(rhs_dilation) == len(ones):
        raise ValueError(
            f"window_strides {strides}, lhs_dilation {lhs_dilation} and rhs_dilation {rhs_dilation} need "
            f"{len(ones)} numbers each, one for each spatial axis of lhs {tuple(lhs.shape)}."
        )
    sizes = [lhs.shape[a] for a in numbers.lhs_spec[2:]], [rhs.shape[a] for a in numbers.rhs_spec[2:]]
    pads = conv_layout.explicit_padding(padding, *sizes, strides, lhs_dilation, rhs_dilation)
    return _Geometry(numbers, strides, pads, lhs_dilation, rhs_dilation, feature_groups, batch_groups)


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call of the kernel's op."""

    lhs: Any
    rhs: Any
    extras: ConvExtras
    options: dict[str, Any]
    result: np.dtype


def _call(
    lhs: Any,
    rhs: Any,
    geometry: _Geometry,
    precision: Any,
    preferred_element_type: DTypeLike | None,
    act_how: HowToQuantize | None,
    fused: ConvFused,
) -> _Call | None:
    """What the kernel's op is to do; None where nothing is quantized or fused."""
    check_names(fused)
    for x in (lhs, rhs):
        if isinstance(x, QArray):
            qarray.validate_qarray(x)
    given = any(x is not None for x in fused.values())
    if act_how is None and not given and not _is_involved(lhs, rhs):
        return None
    _, result = qarray.get_accumulator_and_result_type(
        lhs, rhs, preferred_element_type=preferred_element_type
    )
    rows = _images(fused, act_how, lhs, geometry)
    if act_how is not None and rows is None:
        lhs = qarray.quantize(lhs, act_how)
    numbers, groups = geometry.numbers, geometry.batch_groups
    x = conv_layout.canonical_lhs(_kept(lhs, numbers.lhs_spec), numbers.lhs_spec, groups)
    w = conv_layout.canonical_rhs(_kept(rhs, numbers.rhs_spec), numbers.rhs_spec)
    if (
        isinstance(x, jax.Array)
        and isinstance(w, jax.Array)
        and not given
        and rows is None
        and not _is_involved(x, w)
    ):
        return None
    out = _out(fused)
    extras = ConvExtras(
        lhs_scale=_static_scale("act_scale", fused.get("act_scale"), rows is not None, x.ndim),
        bias=fused.get("bias"),
        out_scale=_static_scale("out_scale", fused.get("out_scale"), out is not None, x.ndim),
    )
    whole = not jnp.issubdtype(result, jnp.floating) and not given
    options = {
        "strides": geometry.strides,
        "padding": geometry.padding,
        "lhs_dilation": geometry.lhs_dilation,
        "rhs_dilation": geometry.rhs_dilation,
        "groups": geometry.feature_groups * groups,
        "quantize_lhs": rows,
        "out_dtype": None if out else jnp.int32 if whole else result,
        "precision": precision,
        "activation": fused.get("activation"),
        "quantize_out": out,
    }
    return _Call(_tensor(x), _tensor(w), extras, options, result)


def check_names(fused: ConvFused) -> None:
    """Raises TypeError for a keyword that is none of `ConvFused`."""
    unknown = set(fused) - ConvFused.__optional_keys__
    if unknown:
        known = ", ".join(sorted(ConvFused.__optional_keys__))
        raise TypeError(f"Unknown keyword {', '.join(sorted(unknown))}; what can be fused: {known}.")


def _is_involved(lhs: Any, rhs: Any) -> bool:
    """Whether there is something quantized: a QArray, or integers and narrow floats on both sides."""
    if isinstance(lhs, QArray) or isinstance(rhs, QArray):
        return True
    return all(jnp.dtype(x.dtype).itemsize == 1 and x.dtype != jnp.bool_ for x in (lhs, rhs))


def _kept(x: Any, spec: Sequence[int]) -> Any:
    """A QArray as the kernel's op takes it, or the values that it represents where that doesn't."""
    if not isinstance(x, QArray):
        return x.astype(jnp.float32) if x.dtype in (jnp.int16, jnp.int32, jnp.bool_) else x
    spatial = any(x.scale.shape[a] != 1 for a in spec[2:])
    return x.dequantize() if spatial or x.scale.dtype == jnp.float64 else x


def _tensor(x: Any) -> Tensor:
    if not isinstance(x, QArray):
        return Tensor(x)
    codebook = x.qtype if isinstance(x.qtype, str) and not numerics.can_dequant_on_output(x.qtype) else None
    return Tensor(x.qvalue, x.scale, x.zero_point, codebook)


def _images(fused: ConvFused, how: HowToQuantize | None, lhs: Any, geometry: _Geometry) -> RowQuantize | None:
    """How the kernel's op quantizes the images of a float lhs, if it does."""
    rows = None if how is None or geometry.batch_groups > 1 else _image_quantize(how, lhs, geometry)
    if fused.get("act_scale") is None:
        return rows
    if rows is None:
        raise ValueError(
            "act_scale needs act_qtype 'int8', 'int4' or a float8, with images quantized by the calibration "
            f"method 'absmax', no batch groups, and a float lhs; got {how!r}."
        )
    return dataclasses.replace(rows, static=True)


def _image_quantize(how: HowToQuantize, lhs: Any, geometry: _Geometry) -> RowQuantize | None:
    """`how` as a `RowQuantize`; None if it is anything but plain absmax of images and runs of features."""
    image, feature = geometry.numbers.lhs_spec[:2]
    axes = [a % lhs.ndim for a in how.channelwise_axes]
    tiles = {a % lhs.ndim: tile for a, tile in how.tiled_axes.items()}
    plain = calibration.parse_method(how.calibration_method) in (("absmax", ()), ("absmax", (1.0,)))
    dtype = numerics.canonical_qtype(how.qtype)
    if isinstance(dtype, str):
        return None
    narrow = dtype.name.startswith("float8_e") and dtype != jnp.float8_e8m0fnu
    fits = dtype.name in ("int8", "int4") or narrow
    if axes != [image] or set(tiles) - {feature} or not plain or not fits or how.noise_fn is not None:
        return None
    size = lhs.shape[feature]
    tile = tiles.get(feature, 0)
    tile = round(tile * size) if isinstance(tile, float) else tile
    return RowQuantize(dtype.name, numerics.get_symmetric_bound(dtype), tile if tile < size else 0)


def _out(fused: ConvFused) -> RowQuantize | None:
    """How the result is quantized, if it is."""
    qtype, scale = fused.get("out_qtype"), fused.get("out_scale")
    if qtype is None:
        if scale is not None:
            raise ValueError("out_scale is given without out_qtype; give that as well.")
        return None
    dtype = numerics.canonical_qtype(qtype)
    if isinstance(dtype, str):
        raise ValueError(f"out_qtype is {qtype!r}; a result is quantized to an integer or a float8 type.")
    return RowQuantize(dtype.name, numerics.get_symmetric_bound(dtype), static=scale is not None)


def _static_scale(name: str, scale: Any, used: bool, ndim: int) -> jax.Array | None:
    """[1, ..., 1, tiles] of a scalar or a vector."""
    if scale is None or not used:
        return None
    scale = jnp.asarray(scale)
    if scale.ndim > 1 or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise ValueError(f"{name} must be a float: a scalar or one per tile; got {scale.dtype}{scale.shape}.")
    return scale.reshape(*(1,) * (ndim - 1), -1)


def _float_conv(
    lhs: Any, rhs: Any, geometry: _Geometry, precision: Any, preferred: DTypeLike | None, out_sharding: Any
) -> jax.Array:
    """XLA's convolution of the represented values."""
    x, w = (v.dequantize() if isinstance(v, QArray) else v for v in (lhs, rhs))
    if isinstance(lhs, QArray) or isinstance(rhs, QArray):
        both = jnp.promote_types(x.dtype, w.dtype)
        x, w = x.astype(both), w.astype(both)
        _, preferred = qarray.get_accumulator_and_result_type(lhs, rhs, preferred_element_type=preferred)
    g = geometry
    return jax.lax.conv_general_dilated(
        x,
        w,
        g.strides,
        g.padding,
        g.lhs_dilation,
        g.rhs_dilation,
        g.numbers,
        feature_group_count=g.feature_groups,
        batch_group_count=g.batch_groups,
        precision=precision,
        preferred_element_type=preferred,
        out_sharding=out_sharding,
    )
