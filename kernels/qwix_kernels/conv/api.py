"""The convolution of quantized operands as one JAX operation.

`conv` describes and checks its operands and binds one primitive; which implementation that becomes is decided
when it is lowered (primitive.py). The gradient flows to float operands through the dequantized values of the
other side, by XLA's convolutions; quantization of the lhs is passed straight through. Quantized operands and
all scales get zero gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels import dispatch, lowering
from qwix_kernels.conv import images, primitive, xla
from qwix_kernels.conv.describe import problem_of
from qwix_kernels.conv.problem import NO_EXTRAS, ConvExtras, ConvProblem
from qwix_kernels.matmul.describe import as_tensor
from qwix_kernels.matmul.primitive import vary_alike
from qwix_kernels.partitioning_routes import laid_out_alike
from qwix_kernels.problem import RowQuantize, Tensor

__all__ = ["conv", "problem_of"]


@dataclasses.dataclass(frozen=True)
class _How:
    names: tuple[str, ...] | None
    config: Any = None
    out_sharding: Any = None
    bypass: bool = False  # the portable path itself


def conv(
    lhs: Tensor | jax.Array,
    rhs: Tensor | jax.Array,
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
    implementation: str | Sequence[str] | None = None,
    config: Any = None,
    out_sharding: Any = None,
) -> Any:
    """lhs [N, *spatial, C] convolved with rhs [*kernel, C / groups, O], either of them quantized.

    Integers without scales give their exact int32 sums. Integers with scales are summed exactly for each run
    of input features that shares them; everything else is summed in float32. The result is rounded once.

    Args:
      lhs: a `Tensor` or a plain array, with scales of images and of runs of C.
      rhs: the same, with scales of output features and of runs of C / groups.
      extras: bias [O] and static scales: see `ConvExtras`.
      strides, padding, lhs_dilation, rhs_dilation: one entry per spatial axis, as for
        `jax.lax.conv_general_dilated`; ones and zeros by default.
      groups: feature groups.
      quantize_lhs: quantize the images of a plain float lhs on the way.
      out_dtype: of the result; by default int32 for integers without scales, else what the represented values
        promote to.
      precision: of float products.
      activation: one of `qwix_kernels.problem.ACTIVATIONS`, of the result.
      quantize_out: quantize the images of the result.
      implementation: None takes the best that runs ("mosaic_tpu" on a TPU, "xla" anywhere) and never fails; a
        name or several names are used in that order, or raise.
      config: blocks for a kernel, a `qwix_kernels.conv.tpu.Config`; by default those of `tuning`.
      out_sharding: of the result, under a mesh with explicit axes.

    Returns: [N, *out, O] in `out_dtype`; with `quantize_out` a `Tensor` of that shape and its scales.

    Raises:
      ValueError, TypeError: operands that disagree, before anything runs.
      NotImplementedError: when lowered, if none of the named implementations can run this.

    >>> x = jnp.array([[[1], [2], [3]]], jnp.int8)
    >>> w = Tensor(jnp.array([[[1]], [[-1]]], jnp.int8), jnp.array([[[0.5]]]))
    >>> conv(x, w, padding=((1, 0),))[0, :, 0].tolist()
    [-0.5, -0.5, -0.5]
    """
    options: dict[str, Any] = {
        "strides": strides, "padding": padding, "lhs_dilation": lhs_dilation, "rhs_dilation": rhs_dilation,
        "groups": groups, "quantize_lhs": quantize_lhs, "out_dtype": out_dtype, "precision": precision,
        "activation": activation, "quantize_out": quantize_out,
    }  # fmt: skip
    problem = problem_of(lhs, rhs, extras, **options)
    names = (implementation,) if isinstance(implementation, str) else implementation
    names = None if names is None else tuple(names)
    dispatch.named(problem, names)
    bypass = 0 in (*problem.out_shape, problem.k)
    given = as_tensor(lhs), as_tensor(rhs), extras or NO_EXTRAS
    left, right, more = vary_alike(jax.tree.map(jnp.asarray, given))  # type: ignore[arg-type]
    out = _conv(problem, _How(names, config, out_sharding, bypass), left, right, more)
    if quantize_out is None:
        return out[0]
    return Tensor(out[0], more.out_scale if quantize_out.static else out[1])  # type: ignore[attr-defined]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _conv(problem: ConvProblem, how: _How, lhs: Tensor, rhs: Tensor, extras: ConvExtras) -> list[jax.Array]:
    if how.bypass:
        return jax.tree.leaves(xla.run(problem, lhs, rhs, extras, out_sharding=how.out_sharding))
    return primitive.bind(problem, lowering.How(how.names, how.config), lhs, rhs, extras)


def _forward(problem: ConvProblem, how: _How, lhs: Tensor, rhs: Tensor, extras: ConvExtras):
    if problem.epilogue and problem.epilogue.quantize:
        raise ValueError(
            "A result that is quantized (quantize_out) has no gradient. Leave it float where gradients flow "
            "and quantize it on the way into the next convolution (quantize_lhs), which passes them through."
        )
    return _conv(problem, how, lhs, rhs, extras), (lhs, rhs, extras)


def _backward(problem: ConvProblem, how: _How, saved: Any, g: list[jax.Array]):
    """Gradients of the float operands and of the bias: those of the convolution of represented values."""
    lhs, rhs, extras = saved
    stored = (
        images.quantize(lhs.values, problem.quantize_lhs, extras.lhs_scale) if problem.quantize_lhs else lhs
    )
    dtype = xla.multiplied(_float_of(lhs), _float_of(rhs))
    x, w = (xla.dequantized(t, True, dtype)[0] for t in (stored, rhs))

    def forward(x: jax.Array, w: jax.Array) -> jax.Array:
        return xla.convolve(problem, x, w, None, how.out_sharding, problem.precision)

    out, pull = jax.vjp(forward, x, w)
    dz, dbias = g[0].astype(jnp.float32), None
    if problem.epilogue:
        bias = None if extras.bias is None else extras.bias.astype(jnp.float32)
        after = lambda z, bias: images.finish(problem, z, ConvExtras(bias=bias))
        _, through = jax.vjp(after, out.astype(jnp.float32), bias)
        dz, dbias = through(g[0])
    dx, dw = pull(dz.astype(dtype))
    dlhs = Tensor(dx.astype(lhs.values.dtype)) if _is_float(lhs) else None
    drhs = Tensor(dw.astype(rhs.values.dtype)) if _is_float(rhs) else None
    grads = dlhs, drhs, ConvExtras(bias=None if dbias is None else dbias.astype(extras.bias.dtype))
    return laid_out_alike(grads, saved)


def _float_of(x: Tensor) -> str:
    return x.values.dtype.name if _is_float(x) else "int8"


def _is_float(x: Tensor) -> bool:
    wide = jnp.issubdtype(x.values.dtype, jnp.floating) and jnp.finfo(x.values.dtype).bits > 8
    return x.scale is None and x.codebook is None and wide


_conv.defvjp(_forward, _backward)
