"""What happens to the rows before the product and to the sum after it, in jnp; problem.py has the formulas.

The portable path is made of these, a kernel that takes only a part of a problem is completed by them
(unfused.py), and gradients are taken through them. Everything is computed in float32 and rounded once.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from qwix_kernels.absmax import absmax
from qwix_kernels.problem import (
    ACTIVATIONS,
    NO_EXTRAS,
    Epilogue,
    Extras,
    MatmulProblem,
    RMSNorm,
    RowQuantize,
    Tensor,
)

_LEAST_SCALE = np.sqrt(np.finfo(np.float32).tiny)
_EXPONENT = np.int32(0x7F800000)  # the exponent's bits of a float32


def activate(x: jax.Array, name: str | None) -> jax.Array:
    """One of `ACTIVATIONS` of a float32 array; None changes nothing.

    >>> activate(jnp.array([-1.0, 2.0, 7.0]), "relu6").tolist()
    [0.0, 2.0, 6.0]
    """
    if name is None:
        return x
    if name == "relu":
        return jnp.maximum(x, 0)
    if name == "relu6":
        return jnp.clip(x, 0, 6)
    if name == "silu":
        return x * jax.nn.sigmoid(x)
    if name == "gelu":  # by erf: Mosaic has no erfc
        return x * 0.5 * (1 + jax.lax.erf(x * np.float32(math.sqrt(0.5))))
    if name == "gelu_tanh":
        return jax.nn.gelu(x, approximate=True)
    raise ValueError(f"Unknown activation {name!r}; known: {', '.join(ACTIVATIONS)}, or None.")


def rms_norm(x: jax.Array, weight: jax.Array, norm: RMSNorm) -> jax.Array:
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, in float32."""
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    mean = jnp.mean(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean + np.float32(norm.eps)) * weight.astype(x.dtype)


def row_scale(absmax: jax.Array, how: RowQuantize) -> jax.Array:
    """The scale for runs of values whose greatest magnitudes are `absmax`, float32: see `RowQuantize`."""
    if how.scale_dtype == "float32":
        scale = absmax * np.float32(how.reciprocal)
    else:
        exponent = jax.lax.bitcast_convert_type(absmax, jnp.int32) & _EXPONENT
        power = jax.lax.bitcast_convert_type(exponent, jnp.float32)
        scale = jnp.where(jnp.isinf(power), jnp.nan, power * np.float32(2.0**-how.emax))
    return jnp.where(scale < _LEAST_SCALE, np.float32(1), scale)


def quantize_rows(x: jax.Array, how: RowQuantize, extras: Extras = NO_EXTRAS) -> Tensor:
    """Quantizes [batch, M, K] as `RowQuantize` says. The scale is float32, [batch, M, K / tile].

    Of `extras`, only what concerns the quantization of rows is read. 4-bit values are given in int8, which is
    what they would be widened to.
    """
    batch, m, k = x.shape
    if not x.size:
        return Tensor(x.astype(how.dtype), jnp.ones((batch, m, k // (how.tile_k or k or 1)), jnp.float32))
    tile = how.tile_k or k
    x = x.astype(jnp.float32)
    if extras.lhs_columns is not None:
        x = x * extras.lhs_columns.astype(jnp.float32)
    tiled = x.reshape(batch, m, k // tile, tile)
    scale = extras.lhs_scale
    if scale is None:
        scale = row_scale(absmax(tiled, -1), how)
    scale = scale.astype(jnp.float32)
    low, high = (np.float32(v) for v in how.limits)
    scaled = tiled * (1 / scale)[..., None]
    if extras.lhs_noise is not None:
        scaled = scaled + extras.lhs_noise.astype(jnp.float32)[..., None]
    if jnp.issubdtype(how.dtype, jnp.integer):
        scaled = jnp.round(scaled)
    values = jnp.clip(scaled, low, high).reshape(x.shape)
    return Tensor(values.astype(jnp.int8 if how.dtype in ("int2", "int4") else how.dtype), scale)


def prepare(problem: MatmulProblem, lhs: Tensor, extras: Extras) -> Tensor:
    """The lhs normalised and quantized, as the problem says."""
    if problem.norm:
        assert extras.norm_weight is not None
        normed = rms_norm(lhs.values, extras.norm_weight, problem.norm)
        lhs = Tensor(normed if problem.quantize_lhs else normed.astype(lhs.values.dtype))
    if problem.quantize_lhs:
        lhs = quantize_rows(lhs.values, problem.quantize_lhs, extras)
    return lhs


def add_low_rank(problem: MatmulProblem, z: jax.Array, lhs: jax.Array, extras: Extras) -> jax.Array:
    """z + scaling * ((lhs @ a) * mask) @ b, [batch, M, N], in at least float32."""
    assert problem.low_rank and extras.low_rank_a is not None and extras.low_rank_b is not None
    t = low_rank_rows(problem, lhs, extras.low_rank_a)
    if extras.low_rank_mask is not None:
        t = t * extras.low_rank_mask.astype(t.dtype)
    b = extras.low_rank_b
    t = t * np.float32(problem.low_rank.scaling)
    added = multiply_wide(t, b.astype(t.dtype), problem.precision)
    return z.astype(added.dtype) + added


def low_rank_rows(problem: MatmulProblem, lhs: jax.Array, a: jax.Array) -> jax.Array:
    """lhs @ a, [batch, M, rank], in at least float32."""
    both = jnp.promote_types(lhs.dtype, a.dtype)
    return multiply_wide(lhs.astype(both), a.astype(both), problem.precision)


def multiply_wide(a: jax.Array, b: jax.Array, precision: str | None) -> jax.Array:
    """a @ b over the last two axes, accumulated in at least float32; a batch of 1 serves all others."""
    wide = jnp.promote_types(a.dtype, jnp.float32)
    if b.shape[0] == 1:
        return jax.lax.dot_general(a, b[0], (((2,), (0,)), ((), ())), precision, wide)
    a = jnp.broadcast_to(a, (b.shape[0], *a.shape[1:]))
    return jax.lax.dot_general(a, b, (((2,), (1,)), ((0,), (0,))), precision, wide)


def combine(e: Epilogue, z: jax.Array, gate: jax.Array | None, extras: Extras) -> jax.Array:
    """The epilogue of the sums up to the residual, in at least float32."""
    wide = lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32))
    z = wide(z)
    if extras.bias is not None:
        z = z + wide(extras.bias)
    if gate is None:
        z = activate(z, e.activation)
    else:
        gate = wide(gate)
        z = activate(gate if extras.gate_bias is None else gate + wide(extras.gate_bias), e.activation) * z
    return z if extras.residual is None else z + wide(extras.residual)


def finish(
    problem: MatmulProblem, z: jax.Array, gate: jax.Array | None, extras: Extras
) -> jax.Array | Tensor:
    """The result of the sums [batch, M, N], in the output dtype; quantized, with its scales."""
    e = problem.epilogue
    if e is None:
        return z.astype(problem.out_dtype)
    out = combine(e, z, gate, extras)
    if e.quantize is None:
        return out.astype(problem.out_dtype)
    stored = quantize_rows(out, e.quantize, Extras(lhs_scale=extras.out_scale))
    return Tensor(stored.values.astype(e.quantize.dtype), stored.scale)
