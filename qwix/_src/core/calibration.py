"""How to quantize, and what range to map onto the quantized grid.

Statistics have the scale's shape: full along channelwise axes, one entry per tile along tiled axes, 1
elsewhere. They are kept in the array's dtype, but all arithmetic is done in float32 (float64 for float64),
so that a float16 array is scaled as well as a float32 one, and a jitted program gives the eager result.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from qwix_kernels.absmax import absmax

from qwix._src.core import layout, numerics

Calibration = dict[str, jax.Array]
METHODS = ("absmax", "minmax", "rms", "fixed", "percentile", "mse")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class HowToQuantize:
    """What to quantize to and which values share a scale. Hashable; equal for every spelling of the qtype.

    Attributes:
      qtype: a quantized dtype or a name of `numerics.QTYPE_NAMES`.
      channelwise_axes: axes along which every index has its own scale. Negative axes count from the back.
      tiled_axes: {axis: size}; along it, runs of `size` neighbours share a scale. A float size is the
        fraction of the axis that a tile covers: 1 / 8 makes 8 tiles.
      calibration_method: how the range is found; see `calibrate`.
      noise_fn: shape -> noise added before rounding to an integer, for stochastic rounding.

    >>> HowToQuantize(qtype="int8", tiled_axes={-1: 32}) == HowToQuantize(qtype=jnp.int8, tiled_axes={-1: 32})
    True
    """

    qtype: Any  # any spelling; canonical once it is made
    channelwise_axes: Collection[int] = ()
    tiled_axes: Mapping[int, int | float] = dataclasses.field(default_factory=dict)
    calibration_method: str = "absmax"
    noise_fn: numerics.NoiseFn | None = None

    def __post_init__(self):
        qtype = numerics.canonical_qtype(self.qtype)
        object.__setattr__(self, "qtype", qtype)
        object.__setattr__(self, "channelwise_axes", tuple(self.channelwise_axes))
        object.__setattr__(self, "tiled_axes", dict(self.tiled_axes or {}))
        if isinstance(qtype, str) and qtype in numerics.BLOCK_FORMATS:
            _check_block_format(qtype, self.tiled_axes)

    def __hash__(self):
        tiles = tuple(sorted(self.tiled_axes.items()))
        return hash((self.qtype, self.channelwise_axes, tiles, self.calibration_method, self.noise_fn))


def _check_block_format(qtype: str, tiled_axes: Mapping[int, int | float]) -> None:
    _, size = numerics.BLOCK_FORMATS[qtype]
    if not tiled_axes:
        raise ValueError(f"Format {qtype} requires `tiled_axes` to be specified.")
    for axis, got in tiled_axes.items():
        if got != size or isinstance(got, float):
            raise ValueError(f"Format {qtype} requires a tile size of {size}, but axis {axis} got {got}.")


def get_scale_shape(shape: tuple[int, ...], how: HowToQuantize) -> tuple[int, ...]:
    """The shape of the scale of an array of this shape.

    Raises:
      ValueError: no such axis, an axis both channelwise and tiled, or a tile that doesn't divide its axis
        (the message lists those that do).

    >>> get_scale_shape((128, 64), HowToQuantize(qtype="int4", channelwise_axes=(-1,), tiled_axes={0: 32}))
    (4, 64)
    """
    channelwise = layout.canonical_axes(tuple(how.channelwise_axes), len(shape))
    tiles = layout.canonical_tiles(how.tiled_axes, shape)
    both = sorted(set(channelwise) & set(tiles))
    if both:
        raise ValueError(
            f"The same axis cannot be both channelwise and tiled: {both} of {how.channelwise_axes=} and "
            f"{how.tiled_axes=} for shape {shape}. Leave it in one of them."
        )
    return tuple(
        dim if axis in channelwise else dim // tiles[axis] if axis in tiles else 1
        for axis, dim in enumerate(shape)
    )


def parse_method(method: str) -> tuple[str, tuple[float, ...]]:
    """Splits 'name,arg,...' into its name and numbers.

    >>> parse_method("fixed, -1, 2.5")
    ('fixed', (-1.0, 2.5))
    """
    name, *args = (part.strip() for part in method.lower().split(","))
    if name not in METHODS:
        raise ValueError(f"Unsupported calibration: {method!r}. Supported: {', '.join(METHODS)}.")
    try:
        return name, tuple(float(a) for a in args)
    except ValueError as e:
        raise ValueError(f"Unsupported calibration: {method!r}. Numbers follow the name: 'rms,7'.") from e


def calibrate(array: jax.Array, how: HowToQuantize) -> Calibration:
    """The range to represent, per scale: {'absmax'} (symmetric) or {'min', 'max'} (with a zero point).

    By `how.calibration_method`:
      'absmax[,factor]'     the largest magnitude, times the factor
      'minmax[,factor]'     the least and the greatest value (0 included), times the factor; asymmetric
      'rms,factor'          the root of the mean square, times the factor
      'fixed,bound'         this bound, whatever the values; 'fixed,lo,hi' asymmetric
      'percentile,p'        the magnitude below which p percent of the values lie (linear between neighbours);
                            99.9 and 99.99 are usual (Wu et al., arXiv 2004.09602, section 4.3)
      'mse[,lowest]'        the fraction of absmax, of 1.0, 0.98, ... down to `lowest` (0.2), that gives the
                            least mean square of the rounding error (Nagel et al., arXiv 2106.08295, 3.1)

    Every entry has the scale's shape, except that 'fixed' is one range for the whole array (shape of ones).
    NaN anywhere makes its scale NaN. An empty array has the range 0.

    >>> calibrate(jnp.array([[1.0, -3.0], [2.0, 0.5]]), HowToQuantize(qtype="int8", channelwise_axes=(0,)))
    {'absmax': Array([[3.],
           [2.]], dtype=float32)}
    """
    name, args = parse_method(how.calibration_method)
    shape = get_scale_shape(array.shape, how)
    if name == "fixed":
        return _fixed(array, args)
    if name == "rms" and len(args) != 1:
        raise ValueError(f"A scale factor is required for RMS calibration, as in 'rms,7'. Got {args}.")
    if name == "percentile" and not (len(args) == 1 and 0 < args[0] <= 100):
        raise ValueError(f"A percentage is required, above 0 and at most 100: 'percentile,99.9'. Got {args}.")
    if len(args) > 1:
        raise ValueError(f"Unsupported calibration: {name} takes at most one number, got {args}.")
    if name == "mse":
        return {"absmax": _least_error(array, how, *args).astype(array.dtype)}
    factor = args[0] if args and name != "percentile" else 1.0

    runs, axes = _runs(array.astype(numerics.compute_dtype(array.dtype)), shape)
    reduce = functools.partial(_reduce, runs, axes, shape)
    if name == "absmax":
        stats = {"absmax": reduce(absmax)}
    elif name == "minmax":
        lost = jnp.isnan(reduce(absmax))  # which XLA:CPU may lose in a minimum or maximum
        ends = {
            "min": reduce(lambda x, axis: jnp.min(x, axis=axis, initial=0)),
            "max": reduce(lambda x, axis: jnp.max(x, axis=axis, initial=0)),
        }
        stats = {key: jnp.where(lost, jnp.nan, end) for key, end in ends.items()}
    elif name == "percentile":
        cut = lambda x, axis: jnp.percentile(jnp.abs(x), args[0], axis=axis)
        stats = {"absmax": reduce(cut if array.size else lambda x, axis: jnp.sum(x, axis=axis))}
    else:
        count = max(1, math.prod(runs.shape[a] for a in axes))
        stats = {"absmax": reduce(lambda x, axis: jnp.sqrt(jnp.sum(x * x, axis=axis) / count))}
    return {key: (value * factor).astype(array.dtype) for key, value in stats.items()}


def _runs(x: jax.Array, scale_shape: tuple[int, ...]) -> tuple[jax.Array, tuple[int, ...]]:
    """Splits the tiled axes only (others keep their sharding), and says which axes to reduce."""
    shape: list[int] = []
    axes: list[int] = []
    for n, s in zip(x.shape, scale_shape, strict=True):
        if s == n:
            shape.append(n)
            continue
        shape += [n] if s == 1 else [s, n // s]
        axes.append(len(shape) - 1)
    return (x if tuple(shape) == x.shape else x.reshape(shape)), tuple(axes)


def _reduce(
    x: jax.Array, axes: tuple[int, ...], shape: tuple[int, ...], op: Callable[..., jax.Array]
) -> jax.Array:
    return op(x, axis=axes).reshape(shape)


_FRACTION_STEP = 0.02


def _least_error(array: jax.Array, how: HowToQuantize, lowest: float = 0.2) -> jax.Array:
    """The absmax, among fractions of the true one, with the least squared error of each scale's values."""
    if not 0 < lowest <= 1:
        raise ValueError(f"'mse,{lowest}': the lowest fraction of absmax must be above 0 and at most 1.")
    plain = dataclasses.replace(how, calibration_method="absmax")
    x = array.astype(numerics.compute_dtype(array.dtype))
    whole = calibrate(x, plain)["absmax"]

    def error(absmax: jax.Array) -> jax.Array:
        scale, _ = compute_scale_zero_point({"absmax": absmax.astype(array.dtype)}, how.qtype)
        scale = scale.astype(x.dtype)
        scaled = layout.call_with_generic_broadcast(jnp.divide, x, scale)
        stored = numerics.convert_from(numerics.convert_to(scaled, how.qtype), how.qtype).astype(x.dtype)
        off = layout.call_with_generic_broadcast(jnp.multiply, stored, scale) - x
        runs, axes = _runs(off * off, whole.shape)
        return runs.sum(axes).reshape(whole.shape)

    def step(i: jax.Array, best: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        absmax = whole * (1 - i.astype(x.dtype) * _FRACTION_STEP)
        now = error(absmax)
        return jnp.where(now < best[0], now, best[0]), jnp.where(now < best[0], absmax, best[1])

    steps = round((1 - lowest) / _FRACTION_STEP)
    return jax.lax.fori_loop(1, steps + 1, step, (error(whole), whole))[1]


def _fixed(array: jax.Array, args: tuple[float, ...]) -> Calibration:
    if len(args) not in (1, 2):
        raise ValueError(f"A fixed range is required, as in 'fixed,-1,2'. Got {args}.")
    lo, hi = args if len(args) == 2 else (-args[0], args[0])
    if not lo <= 0 <= hi or lo == hi:
        raise ValueError(f"The range must contain 0 and be non-empty. Got {lo}..{hi}.")
    full = lambda value: jnp.full((1,) * array.ndim, value, array.dtype)
    return {"absmax": full(hi)} if lo + hi == 0 else {"min": full(lo), "max": full(hi)}


def compute_scale_zero_point(
    calibration: Mapping[str, jax.Array], qtype: DTypeLike | str
) -> tuple[jax.Array, jax.Array | None]:
    """The scale that maps a calibrated range onto the qtype's, and a zero point for {'min', 'max'}.

    Symmetric: scale = absmax / bound. Asymmetric: scale = (max - min) / (hi - lo), zero_point = lo - min /
    scale. A scale below sqrt of the smallest normal float32 becomes 1, so that zeros stay zeros, and the
    rest is kept where it and its reciprocal are finite in the scale's dtype. Block formats take a scale that
    their scale type can hold: a power of two for mx (floor of C * scale, with C = 60/31 or 12/7 from arXiv
    2603.08713), a float8_e4m3fn number for nvfp4.

    Returns:
      (scale, zero_point or None), both of the calibration's shape; the scale has its dtype.

    >>> compute_scale_zero_point({"absmax": jnp.array([127.5])}, "int8")
    (Array([1.], dtype=float32), None)
    """
    qtype = numerics.canonical_qtype(qtype)
    if set(calibration) == {"min", "max"}:
        dtype = calibration["max"].dtype
        compute = numerics.compute_dtype(dtype)
        low, high = calibration["min"].astype(compute), calibration["max"].astype(compute)
        qmin, qmax = numerics.get_asymmetric_bound(qtype)
        scale = _representable((high - low) / (qmax - qmin), dtype)
        zero_point = numerics.convert_to(qmin - low / scale.astype(compute), qtype)
        return scale, zero_point
    if set(calibration) != {"absmax"}:
        raise ValueError(f"Unsupported calibration: {sorted(calibration)}; expected absmax, or min and max.")
    dtype = calibration["absmax"].dtype
    absmax = calibration["absmax"].astype(numerics.compute_dtype(dtype))
    scale = _representable(absmax / numerics.get_symmetric_bound(qtype), dtype)
    return _to_scale_format(scale, qtype), None


def _representable(scale: jax.Array, dtype: np.dtype) -> jax.Array:
    """Casts a scale to `dtype`: 1 for (nearly) nothing, and finite with a finite reciprocal."""
    scale = jnp.where(scale < np.sqrt(jnp.finfo(jnp.float32).tiny), 1, scale)
    largest = float(jnp.finfo(dtype).max)
    return jnp.clip(scale, 2 / largest, largest).astype(dtype)


def _to_scale_format(scale: jax.Array, qtype: numerics.QType) -> jax.Array:
    if not isinstance(qtype, str):
        return scale
    compute = numerics.compute_dtype(scale.dtype)
    if qtype == "int1":  # levels are stored as -1 and +1, twice the grid's -0.5 and +0.5
        return (scale.astype(compute) / 2).astype(scale.dtype)
    if qtype == "nvfp4":
        # A block too small for e4m3 keeps its smallest number: 0 would divide by zero.
        e4m3 = jnp.clip(scale.astype(compute), 2.0**-9, 448.0).astype(jnp.float8_e4m3fn)
        return e4m3.astype(scale.dtype)
    if qtype in numerics.BLOCK_FORMATS:
        factor = 12 / 7 if qtype == "mxfp4" else 60 / 31
        bits = jax.lax.bitcast_convert_type((scale.astype(compute) * factor).astype(jnp.bfloat16), jnp.uint16)
        return jax.lax.bitcast_convert_type(bits & jnp.uint16(0x7F80), jnp.bfloat16).astype(scale.dtype)
    return scale


def clip_to_calibration(
    array: jax.Array, calibration: Mapping[str, jax.Array], tiled_axes: Mapping[int, int | float]
) -> jax.Array:
    """Clips an array to its calibrated range."""
    del tiled_axes  # the tiles can be read off the shapes
    low, high = _range(calibration)
    array = layout.call_with_generic_broadcast(jnp.maximum, array, low.astype(array.dtype))
    return layout.call_with_generic_broadcast(jnp.minimum, array, high.astype(array.dtype))


def clip_gradient_to_calibration(
    g: jax.Array, array: jax.Array, calibration: Mapping[str, jax.Array], calibration_method: str
) -> jax.Array:
    """Zeroes the gradient where `array` lies outside of its calibrated range.

    Methods that cover the whole array (absmax and minmax without a factor below 1) return `g` itself.
    """
    inside = inside_calibration(array, calibration, calibration_method)
    return g if inside is None else jnp.where(inside, g, 0)


def inside_calibration(
    array: jax.Array, calibration: Mapping[str, jax.Array], calibration_method: str
) -> jax.Array | None:
    """Where `array` lies within its calibrated range, or None for methods that cover all of it."""
    name, args = parse_method(calibration_method)
    if name in ("absmax", "minmax") and (not args or args[0] >= 1):
        return None
    if name == "percentile" and args[0] >= 100:
        return None
    low, high = _range(calibration)
    inside = layout.call_with_generic_broadcast(jnp.greater_equal, array, low)
    return inside & layout.call_with_generic_broadcast(jnp.less_equal, array, high)


def _range(calibration: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    if set(calibration) == {"absmax"}:
        return -calibration["absmax"], calibration["absmax"]
    if set(calibration) == {"min", "max"}:
        return calibration["min"], calibration["max"]
    raise ValueError(f"Unsupported calibration: {sorted(calibration)}; expected absmax, or min and max.")
