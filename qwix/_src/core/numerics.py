"""Quantized number formats: their names, bounds, storage, and the conversions in and out of storage.

A qtype is one thing under many spellings ('int8', `jnp.int8`, `np.dtype('int8')`). `canonical_qtype` maps
every spelling to one object, so that two equally quantized arrays always have the same tree structure:

- a `np.dtype` for formats that XLA stores natively (int8, float8_e4m3fn, ...);
- a string for formats that exist only by convention on top of one: 'nf4' (indices into a table of 16),
  'int1', 'int2', 'int3', 'int5', 'int6', 'int7' (in int4 or int8), and the block formats 'mxfp8',
  'mxfp8_16', 'mxfp4' and 'nvfp4'.

Every stored value times its scale is the represented value, except for 'nf4' where a table stands between.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from qwix_kernels import problem

from qwix._src.core import explicit_mesh

NoiseFn = Callable[[Sequence[int]], jax.Array]
QType = str | np.dtype

# Integers of a width that no chip has, kept in the next wider type that one has.
EMULATED_BITS = {"int1": 1, "int2": 2, "int3": 3, "int5": 5, "int6": 6, "int7": 7}
# Block formats: (element type, elements per scale).
BLOCK_FORMATS = {
    "mxfp8": ("float8_e4m3fn", 32),
    "mxfp8_16": ("float8_e4m3fn", 16),
    "mxfp4": ("float4_e2m1fn", 32),
    "nvfp4": ("float4_e2m1fn", 16),
}
NATIVE = (
    *("int4", "int8", "int16", "uint2", "uint4", "uint8"),
    *("float8_e4m3fn", "float8_e4m3", "float8_e5m2", "float8_e3m4", "float8_e4m3b11fnuz"),
    *("float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu", "float4_e2m1fn"),
)
QTYPE_NAMES = (*EMULATED_BITS, *NATIVE, "nf4", *BLOCK_FORMATS)

_FLOATS = frozenset(jnp.dtype(d) for d in (jnp.bfloat16, jnp.float16, jnp.float32, jnp.float64))


def should_quantize(dtype: DTypeLike) -> bool:
    """Whether `dtype` is a high-precision float: bfloat16, float16, float32 or float64.

    >>> should_quantize(jnp.bfloat16), should_quantize(jnp.int8)
    (True, False)
    """
    return jnp.dtype(dtype) in _FLOATS


def canonical_qtype(qtype: DTypeLike | str) -> QType:
    """The one object that stands for `qtype`, however it was spelled.

    Args:
      qtype: a name of `QTYPE_NAMES`, or a dtype that is one of them. The *string* 'int2' is the emulated type
        in int4 storage; the dtype `jnp.int2` is XLA's own.

    Raises:
      ValueError: if it isn't a quantized type. The message names the nearest one that is.

    >>> canonical_qtype("int8") == canonical_qtype(jnp.int8) == np.dtype("int8")
    True
    >>> canonical_qtype("nf4")
    'nf4'
    >>> canonical_qtype("int9")
    Traceback (most recent call last):
    ValueError: Cannot use 'int9' as qtype. Did you mean 'int8'? Valid names: int1, int2, ...
    """
    if isinstance(qtype, str):
        if qtype in EMULATED_BITS or qtype in BLOCK_FORMATS or qtype == "nf4":
            return qtype
        if qtype in NATIVE:
            return jnp.dtype(qtype)
        raise ValueError(f"Cannot use {qtype!r} as qtype.{_did_you_mean(qtype)}")
    if qtype is None:
        raise ValueError(f"Cannot use None as qtype.{_did_you_mean('None')}")
    dtype = jnp.dtype(qtype)
    if dtype.name == "int1":
        return "int1"
    if dtype.name == "int2" or dtype.name in NATIVE:
        return dtype
    raise ValueError(f"Cannot use {dtype.name} as qtype.{_did_you_mean(dtype.name)}")


def _did_you_mean(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), QTYPE_NAMES, n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Valid names: {', '.join(QTYPE_NAMES)}."


def storage_dtype(qtype: DTypeLike | str) -> np.dtype:
    """The dtype of `QArray.qvalue` for this qtype.

    >>> storage_dtype("int3").name, storage_dtype("nf4").name, storage_dtype("mxfp8").name
    ('int4', 'uint4', 'float8_e4m3fn')
    """
    qtype = canonical_qtype(qtype)
    if not isinstance(qtype, str):
        return qtype
    if qtype == "nf4":
        return jnp.dtype(jnp.uint4)
    if qtype in EMULATED_BITS:
        return jnp.dtype(jnp.int4 if EMULATED_BITS[qtype] <= 4 else jnp.int8)
    return jnp.dtype(BLOCK_FORMATS[qtype][0])


def device_bytes(dtype: DTypeLike, size: int) -> int:
    """Bytes that `size` values take on a device: sub-byte types are packed there.

    >>> device_bytes(jnp.int4, 10), device_bytes(jnp.bfloat16, 10)
    (5, 20)
    """
    return -(-size * problem.dtype_bits(jnp.dtype(dtype).name) // 8)


def can_dequant_on_output(qtype: DTypeLike | str) -> bool:
    """Whether a dot of stored values can be scaled afterwards. False only for 'nf4', stored as indices."""
    return not (isinstance(qtype, str) and qtype == "nf4")


def get_symmetric_bound(qtype: DTypeLike | str) -> float:
    """B such that the representable range is [-B, B]: the largest magnitude maps to B.

    Integers include the half step beyond their largest value (int8: 127.5), since rounding brings it back;
    int16 is 32768, as in TFLite. Floats: their largest finite value. nf4: 1.

    >>> get_symmetric_bound("int8"), get_symmetric_bound("int3"), get_symmetric_bound(jnp.float8_e4m3fn)
    (127.5, 3.5, 448.0)
    """
    qtype = canonical_qtype(qtype)
    if qtype == "nf4":
        return 1.0
    if isinstance(qtype, str) and qtype in EMULATED_BITS:
        return 2.0 ** (EMULATED_BITS[qtype] - 1) - 0.5
    dtype = storage_dtype(qtype)
    if dtype == jnp.int16:
        return 32768.0
    if jnp.issubdtype(dtype, jnp.integer):
        return float(jnp.iinfo(dtype).max) + 0.5
    return float(jnp.finfo(dtype).max)


def get_asymmetric_bound(qtype: DTypeLike | str) -> tuple[float, float]:
    """(lowest, highest) stored value for quantization with a zero point: int4, int8 and int16.

    >>> get_asymmetric_bound("int4")
    (-8.0, 7.0)
    """
    dtype = canonical_qtype(qtype)
    if dtype not in (jnp.dtype(jnp.int4), jnp.dtype(jnp.int8), jnp.dtype(jnp.int16)):
        raise ValueError(
            f"{dtype!s} doesn't support asymmetric quantization; int4, int8 and int16 do. Use one of "
            "them, or a symmetric calibration method such as 'absmax'."
        )
    info = jnp.iinfo(dtype)
    return float(info.min), float(info.max)


def compute_dtype(dtype: DTypeLike) -> np.dtype:
    """Where quantization arithmetic is done for arrays of this dtype: float32, or float64 for float64."""
    return jnp.promote_types(dtype, jnp.float32)


def convert_to(x: jax.Array, qtype: DTypeLike | str, noise_fn: NoiseFn | None = None) -> jax.Array:
    """Rounds an already scaled float array to `qtype`'s storage. The shape is kept.

    Integers: add noise if asked, round half to even, clip. 'int1' keeps only the sign: -1 below zero, +1
    otherwise (the levels -0.5 and +0.5 of a one-bit grid, stored as integers; `compute_scale_zero_point`
    halves the scale).
    Floats: clip to the finite range, then cast. 'nf4': the nearest of 16 values, the lower one on a tie.

    Args:
      x: float array, divided by its scale.
      qtype: what to convert to.
      noise_fn: shape -> float32 noise in [-0.5, 0.5), added before rounding, in units of the distance between
        stored values (stochastic rounding: uniform noise makes the result right on average). For integers of
        2 bits and up and for floats with a mantissa.

    Raises:
      ValueError: noise for 'nf4', 'int1' or float8_e8m0fnu.

    >>> convert_to(jnp.array([1.2, 3.5, -1300.0]), "int6")
    Array([  1,   4, -32], dtype=int8)
    """
    qtype = canonical_qtype(qtype)
    storage = storage_dtype(qtype)
    x = x.astype(compute_dtype(x.dtype))
    rounds = jnp.issubdtype(storage, jnp.integer) and qtype not in ("nf4", "int1")
    if noise_fn is not None:
        if not rounds and (jnp.issubdtype(storage, jnp.integer) or not jnp.finfo(storage).nmant):
            raise ValueError(
                f"noise_fn rounds integers of 2 bits or more and floats with a mantissa, not {qtype!s}."
            )
        x = x + noise_fn(x.shape) if rounds else _round_to_float(x, storage, noise_fn(x.shape))
    if isinstance(qtype, str) and qtype == "nf4":
        return fp_to_nf4(x)
    if isinstance(qtype, str) and qtype == "int1":
        return jnp.where(x < 0, -1, 1).astype(storage)
    if rounds:
        return jnp.clip(jnp.round(x), *integer_range(qtype)).astype(storage)
    info = jnp.finfo(storage)
    return jnp.clip(x, float(info.min), float(info.max)).astype(storage)


def _round_to_float(x: jax.Array, dtype: np.dtype, noise: jax.Array) -> jax.Array:
    """x rounded up or down to a value of a narrow float dtype, up where noise + 0.5 reaches what is missing.

    The distance between neighbours is 2**(exponent - mantissa bits), so |x| in units of it is exact, and its
    fraction is the probability of rounding up under uniform noise. A value of the dtype stays as it is.
    """
    info = jnp.finfo(dtype)
    x = jnp.clip(x, float(info.min), float(info.max))
    exponent = jnp.maximum(jnp.frexp(x)[1] - 1, info.minexp)
    unit = jnp.ldexp(jnp.ones_like(x), exponent - info.nmant)
    steps = jnp.abs(x) / unit
    whole = jnp.floor(steps)
    up = (steps - whole) + (noise + 0.5) >= 1
    return jnp.copysign((whole + up) * unit, x)


def integer_range(qtype: DTypeLike | str) -> tuple[int, int]:
    """The lowest and the highest stored integer.

    >>> integer_range("int3"), integer_range("uint8")
    ((-4, 3), (0, 255))
    """
    qtype = canonical_qtype(qtype)
    if isinstance(qtype, str) and qtype in EMULATED_BITS:
        half = 2 ** (EMULATED_BITS[qtype] - 1)
        return (-1, 1) if half == 1 else (-half, half - 1)
    info = jnp.iinfo(storage_dtype(qtype))
    return int(info.min), int(info.max)


def convert_from(x: jax.Array, qtype: DTypeLike | str) -> jax.Array:
    """Stored values as numbers: a table look-up to float32 for 'nf4', the same object for everything else.

    >>> convert_from(jnp.array([0, 7, 15], jnp.uint4), "nf4")
    Array([-1.,  0.,  1.], dtype=float32)
    """
    return nf4_to_fp(x) if isinstance(qtype, str) and qtype == "nf4" else x


def get_nf4_buckets() -> jax.Array:
    """The 16 values of NormalFloat4 (QLoRA, arXiv 2305.14314, appendix E), ascending, float32."""
    return jnp.array(problem.NF4, jnp.float32)


@jax.jit
def fp_to_nf4(array: jax.Array) -> jax.Array:
    """Indices (uint4) of the nearest NF4 values; the lower one on a tie.

    >>> fp_to_nf4(jnp.array([-1, -0.5, 0, 0.8, 1]))
    Array([0, 2, 7, 14, 15], dtype=uint4)
    """
    table = np.array(problem.NF4)
    middles = (table[1:] + table[:-1]) / 2
    # An index is the number of midpoints below: 15 fused comparisons and no (size, 16) array of distances.
    index = functools.reduce(jnp.add, ((array > float(m)).astype(jnp.int8) for m in middles))
    return index.astype(jnp.uint4)


def nf4_to_fp(array: jax.Array) -> jax.Array:
    """NF4 values (float32) of indices (uint4)."""
    indices = array.astype(jnp.int32)
    laid_out = explicit_mesh.sharding_of(indices)  # a gather must be told
    return get_nf4_buckets().at[indices].get(mode="promise_in_bounds", out_sharding=laid_out)


def is_integer(dtype: Any) -> bool:
    """Whether the dtype's name has 'int' in it: every signed and unsigned integer, not bool."""
    return re.search("int", jnp.dtype(dtype).name) is not None
