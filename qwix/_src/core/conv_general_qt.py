"""`conv_general_dilated` for training: quantized forward, and quantized gradients by convolutions.

Both gradients of a convolution are convolutions (as in JAX's own transpose rules). With N, C, O for images,
input and output features:

    dlhs    g with the spatially reversed kernel, sums over O; strides and lhs dilation change places
    drhs    lhs with g as the kernel, sums over N; strides and rhs dilation change places, C and N of lhs do,
            and so do the axes of g. What were feature groups are batch groups then, and the reverse.

What quantization adds to that is in qt_vjp.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.lax import ConvDimensionNumbers
from jax.typing import DTypeLike

from qwix._src.core import conv_general, conv_layout, qarray, qt_vjp
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.qt_config import QtConfig, Side, TileSize
from qwix._src.core.qt_scaling import scale_gradient
from qwix._src.core.qt_vjp import Operand

ConvGeneralQtConfig = QtConfig
_Padding = tuple[tuple[int, int], ...]


def conv_general_qt(
    lhs: Operand,
    rhs: Operand,
    config: ConvGeneralQtConfig,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    out_sharding: Any = None,
    *,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """`jax.lax.conv_general_dilated` that is quantized in training, forward and backward.

    Args:
      config: what is quantized, and how. Scales are per image of lhs and per output feature of rhs; a tile
        size is one of the input features.
      others: as for `jax.lax.conv_general_dilated`. `padding` may also be "SAME", "SAME_LOWER" or "VALID".

    >>> import jax.numpy as jnp
    >>> config = ConvGeneralQtConfig(lhs_qtype="int8", rhs_qtype="int8", dlhs_grad_qtype="int8")
    >>> conv = lambda x: conv_general_qt(x, jnp.ones((4, 2, 3, 3)), config, (1, 1), "SAME")
    >>> jax.grad(lambda x: conv(x).sum())(jnp.ones((1, 2, 8, 8))).shape
    (1, 2, 8, 8)
    """
    numbers = jax.lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    ones = (1,) * len(window_strides)
    lhs_dilation, rhs_dilation = tuple(lhs_dilation or ones), tuple(rhs_dilation or ones)
    sizes = [lhs.shape[a] for a in numbers.lhs_spec[2:]], [rhs.shape[a] for a in numbers.rhs_spec[2:]]
    padding = conv_layout.explicit_padding(padding, *sizes, window_strides, lhs_dilation, rhs_dilation)
    op = _Conv(
        numbers,
        tuple(lhs.shape),
        tuple(rhs.shape),
        tuple(window_strides),
        padding,
        lhs_dilation,
        rhs_dilation,
        feature_group_count,
        batch_group_count,
        precision,
        out_sharding,
    )
    _, dtype = qarray.get_accumulator_and_result_type(lhs, rhs, preferred_element_type=preferred_element_type)
    return qt_vjp.contract(op, lhs, rhs, config, None, dtype)


def _how(
    spec: Sequence[int], batch: int, contracting: int, tile_size: TileSize, kwargs: dict[str, Any]
) -> HowToQuantize:
    """A scale per index of spec[batch], with tiles along spec[contracting]."""
    tiles = qt_vjp.tiled_axes(tile_size, spec[contracting])
    channelwise = [] if spec[batch] in tiles else [spec[batch]]
    return HowToQuantize(channelwise_axes=channelwise, tiled_axes=tiles, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Conv:
    """The op of qt_vjp.py: the geometry of one convolution."""

    gradients_are_dots: ClassVar[bool] = False

    numbers: ConvDimensionNumbers
    lhs_shape: tuple[int, ...]
    rhs_shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: _Padding
    lhs_dilation: tuple[int, ...]
    rhs_dilation: tuple[int, ...]
    feature_groups: int
    batch_groups: int
    precision: Any
    out_sharding: Any

    def how(self, side: Side, *, tile_size: TileSize, **kwargs: Any) -> HowToQuantize:
        return _how(
            self.numbers.lhs_spec if side == "lhs" else self.numbers.rhs_spec, 0, 1, tile_size, kwargs
        )

    def on_the_way(self, lhs: jax.Array, rhs: Operand, how: HowToQuantize) -> bool:
        return False

    def __call__(
        self, lhs: Operand, rhs: Operand, extra: None, dtype: np.dtype, act_how: HowToQuantize | None
    ) -> jax.Array:
        return conv_general.conv_general_dilated(
            lhs,
            rhs,
            self.strides,
            self.padding,
            self.lhs_dilation,
            self.rhs_dilation,
            self.numbers,
            self.feature_groups,
            self.batch_groups,
            self.precision,
            dtype,
            self.out_sharding,
        )

    def gradient(self, side: Side) -> _Dlhs | _Drhs:
        return _Dlhs(self) if side == "lhs" else _Drhs(self)

    def dilated(self) -> list[tuple[int, int, int]]:
        """Along each spatial axis: sizes of the dilated lhs, the dilated kernel, and the strided result."""
        rows = []
        for i, (low, high) in enumerate(self.padding):
            lhs = conv_layout.dilated(self.lhs_shape[self.numbers.lhs_spec[2 + i]], self.lhs_dilation[i])
            rhs = conv_layout.dilated(self.rhs_shape[self.numbers.rhs_spec[2 + i]], self.rhs_dilation[i])
            out = max(0, (lhs + low + high - rhs) // self.strides[i] + 1)
            rows.append((lhs, rhs, conv_layout.dilated(out, self.strides[i])))
        return rows


@dataclasses.dataclass(frozen=True)
class _Dlhs:
    """dlhs: g convolved with the reversed kernel."""

    op: _Conv

    @property
    def contracting(self) -> tuple[int, ...]:
        features, _, *spatial = self.op.numbers.rhs_spec
        return (features, *spatial)

    @property
    def movable(self) -> tuple[int, ...]:
        return (self.op.numbers.rhs_spec[0],)

    def how(self, *, for_g: bool, tile_size: TileSize, **kwargs: Any) -> HowToQuantize:
        if for_g:
            return _how(self.op.numbers.out_spec, 0, 1, tile_size, kwargs)
        return _how(self.op.numbers.rhs_spec, 1, 0, tile_size, kwargs)

    def scaled(self, g: jax.Array, scale: jax.Array, extra: None) -> jax.Array:
        features = self.op.numbers.out_spec[1]
        return scale_gradient(g, scale.reshape([scale.size if a == features else 1 for a in range(g.ndim)]))

    def in_rows(self, g: jax.Array, other: Any, how: HowToQuantize) -> None:
        return None

    def __call__(
        self, g: Any, other: Any, extra: None, dtype: np.dtype, act_how: HowToQuantize | None
    ) -> jax.Array:
        op = self.op
        g = g if act_how is None else qarray.quantize(g, act_how)
        (out_feature, in_feature, *spatial), groups = op.numbers.rhs_spec, op.feature_groups * op.batch_groups
        kernel = jax.tree.map(
            lambda x: jax.lax.rev(x, spatial), conv_layout.regroup(other, out_feature, in_feature, groups)
        )
        padding = []
        for (lhs, rhs, out), (low, _) in zip(op.dilated(), op.padding, strict=True):
            before = rhs - low - 1
            padding.append((before, lhs + rhs - 1 - out - before))
        out = conv_general.conv_general_dilated(
            g,
            kernel,
            op.lhs_dilation,
            padding,
            op.strides,
            op.rhs_dilation,
            ConvDimensionNumbers(op.numbers.out_spec, _swapped(op.numbers.rhs_spec), op.numbers.lhs_spec),
            groups,
            1,
            op.precision,
            dtype,
        )
        image, feature = op.numbers.lhs_spec[:2]
        return conv_layout.regroup(out, feature, image, op.batch_groups)


@dataclasses.dataclass(frozen=True)
class _Drhs:
    """drhs: lhs convolved with g."""

    op: _Conv

    @property
    def contracting(self) -> tuple[int, ...]:
        image, _, *spatial = self.op.numbers.lhs_spec
        return (image, *spatial)

    @property
    def movable(self) -> tuple[int, ...]:
        return (self.op.numbers.lhs_spec[0],)

    def how(self, *, for_g: bool, tile_size: TileSize, **kwargs: Any) -> HowToQuantize:
        return _how(self.op.numbers.out_spec if for_g else self.op.numbers.lhs_spec, 1, 0, tile_size, kwargs)

    def scaled(self, g: jax.Array, scale: jax.Array, extra: None) -> jax.Array:
        """With batch groups, output features come in as many runs, each of its own run of images."""
        image, feature, *_ = self.op.numbers.out_spec
        scale = scale.reshape(self.op.batch_groups, -1)
        scale = scale.T if image < feature else scale
        sizes = dict(zip(sorted((image, feature)), scale.shape, strict=True))
        return scale_gradient(g, scale.reshape([sizes.get(a, 1) for a in range(g.ndim)]))

    def in_rows(self, g: jax.Array, other: Any, how: HowToQuantize) -> None:
        return None

    def __call__(
        self, g: Any, other: Any, extra: None, dtype: np.dtype, act_how: HowToQuantize | None
    ) -> jax.Array:
        op = self.op
        g = g if act_how is None else qarray.quantize(g, act_how)
        padding = []
        for (lhs, rhs, out), (low, _) in zip(op.dilated(), op.padding, strict=True):
            padding.append((low, out - lhs + rhs - low - 1))
        lhs_spec, rhs_spec, out_spec = map(_swapped, op.numbers)
        return conv_general.conv_general_dilated(
            other,
            g,
            op.rhs_dilation,
            padding,
            op.lhs_dilation,
            op.strides,
            ConvDimensionNumbers(lhs_spec, out_spec, rhs_spec),
            op.batch_groups,
            op.feature_groups,
            op.precision,
            dtype,
        )


def _swapped(spec: Sequence[int]) -> tuple[int, ...]:
    return (spec[1], spec[0], *spec[2:])
