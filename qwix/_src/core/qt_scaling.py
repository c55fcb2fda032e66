"""Scaling and rounding of what quantized training multiplies, in the arithmetic of the kernels.

Values are converted to float32 where they are scaled and not before: on a TPU the bytes of these passes are
what quantized training loses of what its matmuls gain.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from qwix_kernels import quantize as quantize_kernel
from qwix_kernels.quantize import DTYPES

from qwix._src.core import layout, numerics, qarray
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.qarray import QArray


def quantize_rows(x: jax.Array, how: HowToQuantize, columns: jax.Array | None = None) -> QArray:
    """`how` by the arithmetic of `qwix_kernels.problem.RowQuantize`, so that it makes no difference to the
    result whether a kernel quantizes rows on the way or finds them quantized. The scale is float32.

    x is multiplied by `columns` before, an array of its rank that is generically broadcast.
    """
    if columns is not None:
        x = _times(widened(x, columns), columns.astype(jnp.float32))
    reciprocal = np.float32(1) / np.float32(numerics.get_symmetric_bound(how.qtype))
    scale = qarray.calibrate(x, how)["absmax"].astype(jnp.float32) * reciprocal
    scale = jnp.where(scale < np.sqrt(np.finfo(np.float32).tiny), np.float32(1), scale)
    scaled = _times(widened(x, scale), 1 / scale)
    return QArray(numerics.convert_to(scaled, how.qtype), scale, None, how.qtype)


def fits_one_pass(x: jax.Array, how: HowToQuantize) -> bool:
    """Whether `quantize_in_one_pass` takes it: a matrix with a scale by row or by column, to bytes."""
    plain = how.calibration_method == "absmax" and not how.tiled_axes and how.noise_fn is None
    is_matrix = x.ndim == 2 and len(how.channelwise_axes) == 1 and x.dtype in (jnp.bfloat16, jnp.float32)
    return plain and is_matrix and str(how.qtype) in DTYPES and not isinstance(how.qtype, str)


def quantize_in_one_pass(x: jax.Array, how: HowToQuantize) -> QArray:
    """`qarray.quantize`, to the bit, of what fits. Where a kernel does it, x is read once and not twice."""
    (axis,) = how.channelwise_axes
    scale_of = "columns" if axis % 2 else "rows"
    bound = numerics.get_symmetric_bound(how.qtype)
    values, scale = quantize_kernel.quantize(x[None], how.qtype, bound, scale_of)
    return QArray(values[0], scale[0], None, how.qtype)


def widened(x: jax.Array, scale: jax.Array) -> jax.Array:
    """x in float32 at least, to be multiplied by `scale`; float64 stays.

    Where x is a transpose, XLA for TPUs converts first and moves twice or four times the bytes, unless what
    follows depends on a second array. So NaN is chosen where the scale is NaN and the product will be.
    """
    wide = numerics.compute_dtype(x.dtype)
    if wide == x.dtype:
        return x
    chosen = lambda x, scale: jnp.where(jnp.isnan(scale), jnp.asarray(jnp.nan, x.dtype), x)
    return layout.call_with_generic_broadcast(chosen, x, scale).astype(wide)


def _times(x: jax.Array, scale: jax.Array) -> jax.Array:
    return layout.call_with_generic_broadcast(jnp.multiply, x, scale)


def scale_gradient(g: jax.Array, scale: jax.Array) -> jax.Array:
    """g * scale, generically broadcast. Computed in float32 at least; float16, of short range, stays that."""
    out = _times(widened(g, scale), scale.astype(numerics.compute_dtype(g.dtype)))
    return out if g.dtype == jnp.float16 else out.astype(g.dtype)
