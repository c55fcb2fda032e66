"""The one quantized contraction with quantized gradients that dots, convolutions and ragged dots share.

An op says what is particular to it (`Op` and `Gradient` below); everything that quantization adds is here, so
that every field of `QtConfig` means the same for all of them.

    forward    each operand is calibrated, then quantized; the op runs on the stored values
    backward   dlhs = g . rhs and drhs = lhs . g, by ops of the same kind. With a gradient qtype, scales of
               the other operand that vary along the sum are moved into g first (the sum is over whole
               numbers then), and g is quantized.

Gradients go straight through rounding. Where an operand lies outside of a range that was meant to clip it,
they are zero; that is decided before the custom derivative, by a mask of one byte a value.

What is kept for the backward pass is exactly what it multiplies with: a quantized operand where it uses the
quantized one, the float otherwise, nothing where an operand needs no gradient. Quantized ones carry the
names `RESIDUAL_NAMES` for `jax.checkpoint_policies.save_only_these_names`.

Calibration happens outside of the custom derivative: a hook that writes statistics must run in the trace that
owns them.

What is quantized here is written so that XLA passes over it as rarely as it can: on a TPU, those passes are
what quantized training loses of what its matmuls gain.
- An operand that the backward pass needs as well is quantized once: a barrier keeps XLA from computing it
  again for each of its users. A weight is read once for that (`qwix_kernels.quantize`).
- A gradient that is quantized for both products is quantized along rows for one and along columns for the
  other where it is made, from one read. Only a gradient that one product needs is left to its matmul.
- Values are converted to float32 where they are scaled and not before (qt_scaling.py).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import NamedSharding

from qwix._src.core import calibration, explicit_mesh, numerics, qarray, qt_scaling
from qwix._src.core.calibration import Calibration, HowToQuantize
from qwix._src.core.qarray import QArray
from qwix._src.core.qt_config import QtConfig, Side, TileSize

# Names of the quantized lhs and rhs that a forward op leaves for its backward pass.
RESIDUAL_NAMES = {"lhs": "qwix_lhs", "rhs": "qwix_rhs"}
Operand = jax.Array | QArray
_SIDES: tuple[Side, Side] = ("lhs", "rhs")


class Gradient(Protocol):
    """The op that computes the gradient of one operand from g, that of the result, and the other operand.

    Attributes:
      contracting: the axes of the other operand that it sums over.
      movable: the axes of the other operand along which scales can be moved into g.
    """

    @property
    def contracting(self) -> tuple[int, ...]: ...

    @property
    def movable(self) -> tuple[int, ...]: ...

    def how(self, *, for_g: bool, tile_size: TileSize, **kwargs: Any) -> HowToQuantize:
        """How to quantize g, or the other operand, with scales that are constant along the sum (or tiled)."""
        ...

    def scaled(self, g: jax.Array, scale: jax.Array, extra: Any) -> jax.Array:
        """g times a scale of the other operand, which varies along movable axes only."""
        ...

    def in_rows(self, g: Any, other: Any, how: HowToQuantize) -> QArray | None:
        """What the op makes of a float g on the way, before it; None where it makes something else of it."""
        ...

    def __call__(
        self, g: Any, other: Any, extra: Any, dtype: np.dtype, act_how: HowToQuantize | None
    ) -> jax.Array:
        """The gradient; `act_how` quantizes a float g on the way."""
        ...


class Op(Protocol):
    """A bilinear op. Hashable; holds shapes and options. `extra`: its arrays beside the two operands."""

    gradients_are_dots: ClassVar[bool]

    def how(self, side: Side, *, tile_size: TileSize, **kwargs: Any) -> HowToQuantize:
        """How to quantize an operand."""
        ...

    def on_the_way(self, lhs: jax.Array, rhs: Operand, how: HowToQuantize) -> bool:
        """Whether the op quantizes a float lhs so itself, row by row as `RowQuantize` documents."""
        ...

    def __call__(
        self, lhs: Operand, rhs: Operand, extra: Any, dtype: np.dtype, act_how: HowToQuantize | None
    ) -> jax.Array:
        """The op itself."""
        ...

    def gradient(self, side: Side) -> Gradient:
        """The op for the gradient of one side."""
        ...


@dataclasses.dataclass(frozen=True)
class _Call:
    """What is static of one call."""

    op: Op
    config: QtConfig  # without functions
    dtype: np.dtype
    operand_dtypes: tuple[np.dtype, np.dtype]
    layouts: tuple[NamedSharding | None, NamedSharding | None]  # of the operands, where types have them
    noises: tuple[int | None, int | None]  # which noise function rounds the gradient of each side


def contract(op: Op, lhs: Operand, rhs: Operand, config: QtConfig, extra: Any, dtype: Any) -> jax.Array:
    """Runs `op` as `config` says. `dtype`: of the result."""
    if config.sparsity_rule is not None:
        lhs = qarray.sparsify(lhs, config.sparsity_rule, "activation") if _is_float(lhs) else lhs
        rhs = qarray.sparsify(rhs, config.sparsity_rule) if _is_float(rhs) else rhs
    operands, calibrations = {"lhs": lhs, "rhs": rhs}, {}
    for side in _SIDES:
        how = forward_how(op, config, side)
        x = operands[side]
        if how is None or not _is_float(x):
            continue
        collect = getattr(config, f"{side}_collect_quant_stat")
        if collect is None and _found_while_rounding(op, side, x, rhs, how):
            continue
        calibrations[side] = qarray.calibrate(jax.lax.stop_gradient(x), how)
        if collect is not None:
            calibrations[side] = jax.lax.stop_gradient(collect(calibrations[side]))
        if not config.disable_gradient_clipping:
            operands[side] = _clip_gradient(x, calibrations[side], how.calibration_method)
    functions, noises = _noises(config)
    static = dataclasses.replace(
        config,
        lhs_collect_quant_stat=None,
        rhs_collect_quant_stat=None,
        dlhs_stochastic_rounding_noise_fn=None,
        drhs_stochastic_rounding_noise_fn=None,
        sparsity_rule=None,
    )
    dtypes = jnp.dtype(lhs.dtype), jnp.dtype(rhs.dtype)
    layouts = explicit_mesh.sharding_of(lhs), explicit_mesh.sharding_of(rhs)
    call = _Call(op, static, jnp.dtype(dtype), dtypes, layouts, noises)
    return _contract(call, operands["lhs"], operands["rhs"], calibrations, functions, extra)


def _found_while_rounding(op: Op, side: Side, x: jax.Array, rhs: Operand, how: HowToQuantize) -> bool:
    """Whether the range of an operand needs no pass of its own."""
    return op.on_the_way(x, rhs, how) if side == "lhs" else qt_scaling.fits_one_pass(x, how)


def forward_how(op: Op, config: QtConfig, side: Side) -> HowToQuantize | None:
    """How `contract` quantizes an operand of the forward op."""
    qtype = getattr(config, f"{side}_qtype")
    if qtype is None:
        return None
    how = op.how(
        side,
        tile_size=config.tile_size_of(side),
        qtype=qtype,
        calibration_method=getattr(config, f"{side}_calibration_method"),
    )
    return _shared(how) if getattr(config, f"{side}_disable_channelwise_axes") else how


def tiled_axes(tile_size: TileSize, contracting: int) -> dict[int, int | float]:
    """{axis: tile}: a number goes to the contracting axis, a mapping is taken as it is."""
    if isinstance(tile_size, Mapping):
        return dict(tile_size)
    return {contracting: tile_size} if tile_size else {}


def _shared(how: HowToQuantize) -> HowToQuantize:
    return dataclasses.replace(how, channelwise_axes=())


def _is_float(x: Operand) -> TypeGuard[jax.Array]:
    return not isinstance(x, QArray) and numerics.should_quantize(x.dtype)


def _clip_gradient(x: jax.Array, ranges: Calibration, method: str) -> jax.Array:
    """x, whose gradient is zero outside of its calibrated range."""
    inside = calibration.inside_calibration(jax.lax.stop_gradient(x), ranges, method)
    return x if inside is None else _masked_gradient(x, inside)


@jax.custom_vjp
def _masked_gradient(x: jax.Array, inside: jax.Array) -> jax.Array:
    """x. Only the mask is kept, where `jnp.where(inside, x, stop_gradient(x))` keeps zeros besides."""
    del inside
    return x


_masked_gradient.defvjp(lambda x, inside: (x, inside), lambda inside, g: (jnp.where(inside, g, 0), None))


def _noises(config: QtConfig) -> tuple[list[Any], tuple[int | None, int | None]]:
    """The different noise functions as pytrees, and which of them each side's gradient takes."""
    functions: list[Any] = []
    given: list[Any] = []
    taken: list[int | None] = []
    for side in _SIDES:
        f = getattr(config, f"d{side}_stochastic_rounding_noise_fn")
        if f is None:
            taken.append(None)
            continue
        known = next((i for i, other in enumerate(given) if other is f), None)
        if known is None:
            known = len(given)
            given.append(f)
            is_tree = jax.tree.structure(f) != jax.tree.structure(0)
            functions.append(f if is_tree else jax.tree_util.Partial(f))
        taken.append(known)
    return functions, (taken[0], taken[1])


# --- forward


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _contract(call: _Call, lhs: Any, rhs: Any, calibrations: dict, noises: list, extra: Any) -> jax.Array:
    del noises
    operands, act_how = _quantized(call, lhs, rhs, calibrations, keep_lhs=False)
    return call.op(operands["lhs"], operands["rhs"], extra, call.dtype, act_how)


def _quantized(
    call: _Call, lhs: Any, rhs: Any, calibrations: dict, *, keep_lhs: bool
) -> tuple[dict[Side, Operand], HowToQuantize | None]:
    """Both operands as the op takes them, and how it is to quantize a lhs that nobody needs afterwards."""
    result: dict[Side, Operand] = {"lhs": lhs, "rhs": rhs}
    act_how = None
    for side in _SIDES:
        how, x = forward_how(call.op, call.config, side), result[side]
        if how is None or not _is_float(x):
            continue
        if side in calibrations:
            scale, zero_point = qarray.compute_scale_zero_point(calibrations[side], how.qtype)
            result[side] = qarray.quantize_with_scale_zero_point(x, how.qtype, scale, zero_point)
        elif side == "rhs":
            result[side] = qt_scaling.quantize_in_one_pass(x, how)
        elif keep_lhs:
            result[side] = qt_scaling.quantize_rows(x, how)
        else:
            act_how = how
    return result, act_how


def _forward(call: _Call, *args: Any) -> tuple[jax.Array, Any]:
    is_primal = lambda x: isinstance(x, CustomVJPPrimal)
    lhs, rhs, calibrations, noises, extra = jax.tree.map(lambda p: p.value, args, is_leaf=is_primal)
    needed = {
        side: any(p.perturbed for p in jax.tree.leaves(x, is_leaf=is_primal))
        for side, x in zip(_SIDES, args, strict=False)
    }
    keeps = not call.config.use_original_residuals
    operands, act_how = _quantized(call, lhs, rhs, calibrations, keep_lhs=keeps and needed["rhs"])
    for side in _SIDES:
        if keeps and needed[_other(side)] and isinstance(operands[side], QArray):
            once = jax.lax.optimization_barrier(operands[side])
            operands[side] = checkpoint_name(once, RESIDUAL_NAMES[side])
    out = call.op(operands["lhs"], operands["rhs"], extra, call.dtype, act_how)
    floats = {"lhs": lhs, "rhs": rhs}
    saved = {
        side: _residual(call, side, floats[_other(side)], operands[_other(side)])
        for side in _SIDES
        if needed[side]
    }
    return out, (saved, noises, extra)


def _other(side: Side) -> Side:
    return "rhs" if side == "lhs" else "lhs"


def _residual(call: _Call, side: Side, given: Operand, used: Operand) -> Operand:
    """What the gradient of `side` multiplies g with: the other operand, as given or as the op used it."""
    config, gradient = call.config, call.op.gradient(side)
    field = lambda name: getattr(config, f"d{side}_{name}")
    qtype = None if field("grad_qtype") is None else field("residual_qtype")
    quantized = isinstance(used, QArray) and not config.use_original_residuals
    if qtype is None or not _is_float(given):
        return used if quantized else given
    if quantized and _sums_whole_numbers(gradient, used):
        return used
    how = gradient.how(
        for_g=False,
        tile_size=field("tile_size"),
        qtype=qtype,
        calibration_method=field("residual_calibration_method"),
    )
    how = _shared(how) if field("residual_disable_channelwise_axes") else how
    return checkpoint_name(qarray.quantize(given, how), RESIDUAL_NAMES[_other(side)])


def _varies(x: QArray, axes: Sequence[int]) -> bool:
    return any(x.scale.shape[a] != 1 for a in axes)


def _is_movable(gradient: Gradient, x: QArray) -> bool:
    return not _varies(x, [a for a in range(x.ndim) if a not in gradient.movable])


def _sums_whole_numbers(gradient: Gradient, x: QArray) -> bool:
    """Whether no scale of x stands inside the gradient's sum, or it can be taken out."""
    return not _varies(x, gradient.contracting) or _is_movable(gradient, x)


# --- backward


@dataclasses.dataclass(frozen=True)
class _Product:
    """One gradient: g times the other operand."""

    gradient: Gradient
    g: jax.Array
    other: Operand
    how: HowToQuantize | None  # of g, without noise
    noise: int | None


def _backward(call: _Call, residuals: Any, g: Any) -> tuple[Any, ...]:
    saved, noises, extra = residuals
    if isinstance(g, SymbolicZero):
        return (None,) * 5
    gradients: Any = functools.partial(_gradients, call)
    layouts = {side: layout for side, layout in zip(_SIDES, call.layouts, strict=True) if side in saved}
    typed = _keeps_types(call, saved)
    if not typed and all(layouts.values()):
        gradients = explicit_mesh.laid_out(gradients, layouts)
    result = gradients(saved, noises, extra, g)
    if typed and all(layouts.values()):
        result = {side: jax.sharding.reshard(x, layouts[side]) for side, x in result.items()}
    return (*(result.get(side) for side in _SIDES), None, None, None)


def _keeps_types(call: _Call, saved: Any) -> bool:
    """Whether each gradient is one quantized dot, which lays itself out on a mesh with explicit axes."""
    plain = call.op.gradients_are_dots and call.noises == (None, None)
    qtypes = [getattr(call.config, f"d{side}_grad_qtype") for side in saved]
    tiles = [call.config.tile_size_of(side) or getattr(call.config, f"d{side}_tile_size") for side in _SIDES]
    return plain and None not in qtypes and not any(tiles)


def _gradients(call: _Call, saved: Any, noises: Any, extra: Any, g: jax.Array) -> dict[Side, jax.Array]:
    """The gradients of those operands that need one."""
    products = {side: _product(call, side, g, other, extra) for side, other in saved.items()}
    rounded = _quantized_once(products, noises)
    result: dict[Side, jax.Array] = {}
    for side, dtype in zip(_SIDES, call.operand_dtypes, strict=True):
        if side not in products:
            continue
        p = products[side]
        incoming, how = (rounded, None) if rounded is not None else _incoming(p, products, noises)
        result[side] = p.gradient(incoming, p.other, extra, dtype, how)
    return result


def _incoming(
    p: _Product, products: dict[Side, _Product], noises: list
) -> tuple[Operand, HowToQuantize | None]:
    """g as the op of one gradient gets it, and how that op is to quantize it."""
    if p.how is None:
        return p.g, None
    both = len(products) == 2 and all(q.how is not None for q in products.values())
    if both and p.noise is None and (rows := p.gradient.in_rows(p.g, p.other, p.how)) is not None:
        return rows, None
    return p.g, _with_noise(p, noises)


def _product(call: _Call, side: Side, g: jax.Array, other: Operand, extra: Any) -> _Product:
    gradient = call.op.gradient(side)
    field = lambda name: getattr(call.config, f"d{side}_{name}")
    if field("grad_qtype") is None:
        return _Product(gradient, g, other, None, None)
    if isinstance(other, QArray) and _varies(other, gradient.contracting) and _is_movable(gradient, other):
        g = gradient.scaled(g, other.scale, extra)
        other = dataclasses.replace(other, scale=jnp.ones_like(other.scale))
        if other.zero_point is None:
            other = dataclasses.replace(other, scale=jnp.ones((1,) * other.ndim, other.scale.dtype))
    how = gradient.how(
        for_g=True,
        tile_size=field("tile_size"),
        qtype=field("grad_qtype"),
        calibration_method=field("grad_calibration_method"),
    )
    how = _shared(how) if field("grad_disable_channelwise_axes") else how
    return _Product(gradient, g, other, how, call.noises[_SIDES.index(side)])


def _quantized_once(products: dict[Side, _Product], noises: list) -> QArray | None:
    """g, if both gradients quantize the same g in the same way."""
    if len(products) < 2:
        return None
    left, right = products["lhs"], products["rhs"]
    same = left.g is right.g and left.how == right.how and left.noise == right.noise
    return qarray.quantize(left.g, _with_noise(left, noises)) if same and left.how is not None else None


def _with_noise(product: _Product, noises: list) -> HowToQuantize:
    how: Any = product.how
    return how if product.noise is None else dataclasses.replace(how, noise_fn=noises[product.noise])


_contract.defvjp(_forward, _backward, symbolic_zeros=True)
