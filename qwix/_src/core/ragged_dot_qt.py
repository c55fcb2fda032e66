"""`ragged_dot` for training: quantized forward, and quantized gradients by ragged dots.

    out  [M, N]    = lhs [M, K] . rhs [G, K, N]     each row with its group's matrix, sums over K
    dlhs [M, K]    = g   [M, N] . rhs [G, K, N]     the same, sums over N
    drhs [G, K, N] = lhs [M, K] . g   [M, N]        sums over the rows of each group

Scales: of lhs per row, of rhs per group and column. What quantization adds is in qt_vjp.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.lax import RaggedDotDimensionNumbers
from jax.typing import DTypeLike

from qwix._src.core import qarray, qt_vjp, ragged_dot, ragged_kernel
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.qt_config import QtConfig, Side, TileSize
from qwix._src.core.qt_scaling import scale_gradient
from qwix._src.core.qt_vjp import Operand
from qwix._src.core.ragged_plan import describe

RaggedDotQtConfig = QtConfig
_PER_GROUP = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
)
_OVER_COLUMNS = RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((1,), (2,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,)
)
_Groups = tuple[jax.Array, jax.Array | None]  # sizes, offset


def ragged_dot_qt(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    config: RaggedDotQtConfig,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    group_offset: jax.Array | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot` that is quantized in training, forward and backward.

    Args:
      lhs, rhs, group_sizes, precision, preferred_element_type, group_offset: as for `ragged_dot.ragged_dot`.
        Rows of no group count as zeros, also for the range of lhs; they get no gradient and give none.
      config: what is quantized, and how.

    >>> config = RaggedDotQtConfig(lhs_qtype="int8", rhs_qtype="int8", drhs_grad_qtype="int8")
    >>> loss = lambda w: ragged_dot_qt(jnp.ones((5, 8)), w, jnp.array([3, 1]), config).sum()
    >>> jax.grad(loss)(jnp.ones((2, 8, 4)))[:, 0, 0].round(1).tolist()
    [3.0, 1.0]
    """
    rows, groups = lhs.shape[0], rhs.shape[0]
    alive = ragged_dot.rows_in_groups(rows, group_sizes, group_offset, groups)[:, None]
    if not isinstance(lhs, qarray.QArray):
        lhs = _zero_rows(lhs, alive)
    _, dtype = qarray.get_accumulator_and_result_type(lhs, rhs, preferred_element_type=preferred_element_type)
    out = qt_vjp.contract(_RaggedDot(precision, groups), lhs, rhs, config, (group_sizes, group_offset), dtype)
    return _zero_rows(out, alive)


def ragged_dot_general_qt(
    lhs: Operand,
    rhs: Operand,
    group_sizes: jax.Array,
    dimension_numbers: RaggedDotDimensionNumbers,
    config: RaggedDotQtConfig,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    group_offset: jax.Array | None = None,
) -> jax.Array:
    """`jax.lax.ragged_dot_general` in training, where each group has a matrix: axes are merged to [M, K] and
    [G, K, N], as whose scales `config` is meant, and the rest is `ragged_dot_qt`.

    Raises:
      ValueError: batch axes, free axes of lhs before the ragged one, or a ragged axis that is not free.

    >>> config = RaggedDotQtConfig(lhs_qtype="int8", rhs_qtype="int8")
    >>> numbers = RaggedDotDimensionNumbers((((1,), (2,)), ((), ())), (0,), (0,))
    >>> x, w = jnp.ones((5, 8, 2)), jnp.ones((2, 4, 8))
    >>> out = ragged_dot_general_qt(x, w, jnp.array([3, 1]), numbers, config)
    >>> out.shape, [round(float(v)) for v in out[:, 0, 0]]
    ((5, 2, 4), [8, 8, 8, 8, 0])
    """
    ragged = describe(lhs, rhs, group_sizes, dimension_numbers, group_offset is not None)
    (lhs_ca, rhs_ca), batch = ragged.numbers[0], ragged.numbers[1][0]
    if ragged.mode != "free" or batch or ragged.prefix:
        raise ValueError(
            f"In training each group has a matrix, and the ragged axis comes first; got {dimension_numbers} "
            f"with a ragged {ragged.mode} axis{', batch axes' * bool(batch)}. Transpose, or map over batches."
        )
    rows, columns = ragged.free_axes(0), ragged.free_axes(1)
    shape = [lhs.shape[a] for a in rows], [rhs.shape[a] for a in columns]
    rest, n = math.prod(shape[0][1:]), math.prod(shape[1])
    left = lhs.transpose((*rows, *lhs_ca)).reshape((shape[0][0] * rest, -1))
    right = rhs.transpose((ragged.group, *rhs_ca, *columns)).reshape((rhs.shape[ragged.group], -1, n))
    out = ragged_dot_qt(
        left, right, group_sizes * rest, config, precision, preferred_element_type, group_offset
    )
    return out.reshape((*shape[0], *shape[1]))


@jax.custom_vjp
def _zero_rows(x: jax.Array, alive: jax.Array) -> jax.Array:
    """Zeros where `alive` [M, 1] is false, also in the gradient. Keeps no mask of x's shape."""
    return jnp.where(alive, x, 0)


_zero_rows.defvjp(
    lambda x, alive: (_zero_rows(x, alive), alive), lambda alive, g: (_zero_rows(g, alive), None)
)


def _how(
    channelwise: tuple[int, ...], contracting: int, tile_size: TileSize, kwargs: dict[str, Any]
) -> HowToQuantize:
    tiles = qt_vjp.tiled_axes(tile_size, contracting)
    return HowToQuantize(
        channelwise_axes=[a for a in channelwise if a not in tiles], tiled_axes=tiles, **kwargs
    )


@dataclasses.dataclass(frozen=True)
class _RaggedDot:
    """The op of qt_vjp.py. `groups`: those of rhs."""

    gradients_are_dots: ClassVar[bool] = False

    precision: Any
    groups: int

    def how(self, side: Side, *, tile_size: TileSize, **kwargs: Any) -> HowToQuantize:
        return _how((0,) if side == "lhs" else (0, 2), 1, tile_size, kwargs)

    def on_the_way(self, lhs: jax.Array, rhs: Operand, how: HowToQuantize) -> bool:
        return ragged_kernel.quantizes_rows(lhs, rhs, how, self.precision)

    def __call__(
        self, lhs: Operand, rhs: Operand, extra: _Groups, dtype: np.dtype, act_how: HowToQuantize | None
    ) -> jax.Array:
        sizes, offset = extra
        return ragged_dot.ragged_dot(lhs, rhs, sizes, self.precision, dtype, offset, act_how=act_how)

    def gradient(self, side: Side) -> _Dlhs | _Drhs:
        return _Dlhs(self.precision) if side == "lhs" else _Drhs(self.precision, self.groups)


@dataclasses.dataclass(frozen=True)
class _Dlhs:
    """dlhs = g . rhs, by a ragged dot over the other axis of the matrices."""

    precision: Any
    contracting = (2,)
    movable = (0, 2)

    def how(self, *, for_g: bool, tile_size: TileSize, **kwargs: Any) -> HowToQuantize:
        return _how((0,), 1, tile_size, kwargs) if for_g else _how((0, 1), 2, tile_size, kwargs)

    def scaled(self, g: jax.Array, scale: jax.Array, extra: _Groups) -> jax.Array:
        sizes, offset = extra
        scale = scale[:, 0]
        if scale.shape[0] > 1:
            first = 0 if offset is None else jnp.reshape(offset, ())
            scale = jnp.take(scale, ragged_dot.group_of_rows(g.shape[0], sizes) - first, axis=0, mode="clip")
        return scale_gradient(g, scale)

    def in_rows(self, g: jax.Array, other: Any, how: HowToQuantize) -> None:
        return None

    def __call__(
        self, g: Any, other: Any, extra: _Groups, dtype: np.dtype, act_how: HowToQuantize | None
    ) -> jax.Array:
        sizes, offset = extra
        return ragged_dot.ragged_dot_general(
            g, other, sizes, _OVER_COLUMNS, self.precision, dtype, offset, act_how=act_how
        )


@dataclasses.dataclass(frozen=True)
class _Drhs:
    """drhs = lhs . g, one product for each group of rows."""

    precision: Any
    groups: int
    contracting = (0,)
    movable = (0,)

    def how(self, *, for_g: bool, tile_size: TileSize, **kwargs: Any) -> HowToQuantize:
        return _how((1,), 0, tile_size, kwargs)

    def scaled(self, g: jax.Array, scale: jax.Array, extra: _Groups) -> jax.Array:
        return scale_gradient(g, scale)

    def in_rows(self, g: jax.Array, other: Any, how: HowToQuantize) -> None:
        return None

    def __call__(
        self, g: Any, other: Any, extra: _Groups, dtype: np.dtype, act_how: HowToQuantize | None
    ) -> jax.Array:
        g = g if act_how is None else qarray.quantize(g, act_how)
        sizes, offset = extra
        how = self.precision, dtype, offset, self.groups
        return ragged_dot.per_group(other, g, sizes, _PER_GROUP, *how)
