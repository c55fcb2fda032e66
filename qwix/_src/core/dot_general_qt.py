"""`dot_general` for training: quantized forward, and quantized gradients by the same op.

With B, L, R, K the batch axes, the free axes of lhs and of rhs and the contracting axes:

    out  [B L R] = lhs [B L K] . rhs [B R K]        sums over K
    dlhs [B L K] = g   [B L R] . rhs [B R K]        sums over R
    drhs [B K R] = lhs [B L K] . g   [B L R]        sums over L

What quantization adds to that is in qt_vjp.py.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from qwix._src.core import dot_general as dot_lib
from qwix._src.core import dot_plan, layout, qarray, qt_scaling, qt_vjp
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.qarray import QArray
from qwix._src.core.qt_config import QtConfig, Side, TileSize
from qwix._src.core.qt_vjp import Operand
from qwix._src.core.transposed_qarray import DotDimensionNumbers

DotGeneralQtConfig = QtConfig


def dot_general_qt(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DotDimensionNumbers,
    config: DotGeneralQtConfig,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general` that is quantized in training, forward and backward.

    Args:
      lhs, rhs: float arrays of any rank. An operand that is quantized already (a QArray, or an array that
        isn't float) is used as it is and gets no gradient.
      dimension_numbers: as for `jax.lax.dot_general`; negative axes count from the back.
      config: what is quantized, and how.
      precision, preferred_element_type, out_sharding: as for `qwix.dot_general`. The gradients have the
        dtypes of their operands.

    Returns: as `jax.lax.dot_general`; by default what the dtypes of lhs and rhs promote to.

    >>> import jax.numpy as jnp
    >>> config = DotGeneralQtConfig(lhs_qtype="int8", rhs_qtype="int8", dlhs_grad_qtype="int8")
    >>> loss = lambda x, w: dot_general_qt(x, w, (((1,), (0,)), ((), ())), config).sum()
    >>> dx = jax.grad(loss)(jnp.ones((2, 8)), jnp.full((8, 4), 0.5))
    >>> dx.shape, bool(jnp.allclose(dx, 2.0, rtol=0.02))
    ((2, 8), True)
    """
    numbers = dot_plan.canonical_numbers(dimension_numbers, lhs.shape, rhs.shape)
    op = _Dot(numbers, tuple(lhs.shape), tuple(rhs.shape), precision, out_sharding)
    _, dtype = qarray.get_accumulator_and_result_type(lhs, rhs, preferred_element_type=preferred_element_type)
    return qt_vjp.contract(op, lhs, rhs, config, None, dtype)


@dataclasses.dataclass(frozen=True)
class _Dot:
    """The op of qt_vjp.py."""

    gradients_are_dots: ClassVar[bool] = True

    numbers: DotDimensionNumbers  # canonical
    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    precision: Any
    out_sharding: Any

    def how(self, side: Side, *, tile_size: TileSize, **kwargs: Any) -> HowToQuantize:
        return dot_lib.get_how_to_quantize(
            dimension_numbers=self.numbers,
            ndims=(len(self.lhs_shape), len(self.rhs_shape)),
            for_lhs=side == "lhs",
            tile_size=tile_size,
            **kwargs,
        )

    def on_the_way(self, lhs: jax.Array, rhs: Operand, how: HowToQuantize) -> bool:
        plan = dot_plan.make_plan(lhs, rhs, self.numbers, precision=self.precision, act_how=how)
        return plan.rows is not None

    def __call__(
        self, lhs: Operand, rhs: Operand, extra: None, dtype: np.dtype, act_how: HowToQuantize | None
    ) -> jax.Array:
        return dot_lib.dot_general(
            lhs, rhs, self.numbers, self.precision, dtype, act_how=act_how, out_sharding=self.out_sharding
        )

    @functools.cached_property
    def _free(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        (lhs_ca, rhs_ca), (lhs_ba, rhs_ba) = self.numbers
        free = lambda shape, used: tuple(a for a in range(len(shape)) if a not in used)
        return free(self.lhs_shape, (*lhs_ca, *lhs_ba)), free(self.rhs_shape, (*rhs_ca, *rhs_ba))

    def gradient(self, side: Side) -> _DotGradient:
        (lhs_ca, rhs_ca), (lhs_ba, rhs_ba) = self.numbers
        lhs_free, rhs_free = self._free
        batch = tuple(range(len(lhs_ba)))
        g_lhs = tuple(range(len(batch), len(batch) + len(lhs_free)))
        g_rhs = tuple(range(len(batch) + len(lhs_free), len(batch) + len(lhs_free) + len(rhs_free)))
        ndims = len(self.lhs_shape), len(self.rhs_shape)
        ndim_g = len(batch) + len(lhs_free) + len(rhs_free)
        if side == "lhs":
            pairs = dict(zip(rhs_ca, lhs_ca, strict=True))
            order = (*lhs_ba, *lhs_free, *(pairs[a] for a in sorted(rhs_ca)))
            numbers = (g_rhs, rhs_free), (batch, tuple(rhs_ba))
            to_g = dict(zip((*rhs_ba, *rhs_free), batch + g_rhs, strict=True))
            shapes = (ndim_g, ndims[1])
        else:
            pairs = dict(zip(lhs_ca, rhs_ca, strict=True))
            order = (*rhs_ba, *(pairs[a] for a in sorted(lhs_ca)), *rhs_free)
            numbers = (lhs_free, g_lhs), (tuple(lhs_ba), batch)
            to_g = dict(zip((*lhs_ba, *lhs_free), batch + g_lhs, strict=True))
            shapes = (ndims[0], ndim_g)
        return _DotGradient(
            side, numbers, shapes, tuple(int(a) for a in np.argsort(order)), to_g, self.precision
        )


@dataclasses.dataclass(frozen=True)
class _Scaled:
    """g and what a kernel multiplies it with when it quantizes its rows, so that the product isn't stored."""

    g: jax.Array
    scale: jax.Array


@dataclasses.dataclass(frozen=True)
class _DotGradient:
    """dlhs = g . rhs or drhs = lhs . g. See `qt_vjp.Gradient`.

    Attributes:
      side: the operand whose gradient it is; g stands in its place.
      numbers, ndims: of the dot.
      perm: brings the axes of its result into the operand's order.
      to_g: axes of the other operand: the axes of g that they are.
    """

    side: Side
    numbers: DotDimensionNumbers
    ndims: tuple[int, int]
    perm: tuple[int, ...]
    to_g: dict[int, int]
    precision: Any

    @property
    def contracting(self) -> tuple[int, ...]:
        return tuple(self.numbers[0][1 if self.side == "lhs" else 0])

    @property
    def movable(self) -> tuple[int, ...]:
        return tuple(self.to_g)

    def how(self, *, for_g: bool, tile_size: TileSize, **kwargs: Any) -> HowToQuantize:
        return dot_lib.get_how_to_quantize(
            dimension_numbers=self.numbers,
            ndims=self.ndims,
            for_lhs=for_g == (self.side == "lhs"),
            tile_size=tile_size,
            **kwargs,
        )

    def scaled(self, g: jax.Array, scale: jax.Array, extra: None) -> Any:
        from_other = {a: other for other, a in self.to_g.items()}
        scale = layout.transpose_array(scale, [from_other.get(a) for a in range(g.ndim)])
        if self.side == "lhs" and g.dtype != jnp.float16:
            return _Scaled(g, scale)
        return qt_scaling.scale_gradient(g, scale)

    def in_rows(self, g: Any, other: Any, how: HowToQuantize) -> QArray | None:
        if self.side == "rhs":
            return None
        g, columns = (g.g, g.scale) if isinstance(g, _Scaled) else (g, None)
        plan = dot_plan.make_plan(g, other, self.numbers, precision=self.precision, act_how=how)
        return None if plan.rows is None else qt_scaling.quantize_rows(g, how, columns)

    def __call__(
        self, g: Any, other: Any, extra: None, dtype: np.dtype, act_how: HowToQuantize | None
    ) -> jax.Array:
        columns = None
        if isinstance(g, _Scaled):
            g, columns = g.g, g.scale
        if self.side == "rhs":
            g = g if act_how is None else qarray.quantize(g, act_how)
            lhs, rhs, act_how = other, g, None
        else:
            lhs, rhs = g, other
        out = dot_lib.dot_general(
            lhs, rhs, self.numbers, self.precision, dtype, act_how=act_how, act_columns=columns
        )
        return out.transpose(self.perm)
