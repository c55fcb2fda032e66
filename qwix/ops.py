"""The direct API: quantized dots of arrays and QArrays, and `explain`, which says what they become.

Either operand may be an array, a `QArray` or a prepacked `TransposedQArray`. `act_qtype` quantizes the float
side on the way: dynamically, one scale per row (and per tile of the contracting axis, with `act_tile_size`),
inside the kernel where a kernel can.

What surrounds a dot in a network can be fused into it: a normalisation before, a bias, an activation, a gate,
a residual and quantization for the next dot after it. `FusedOptions` lists the keywords.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Unpack, cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from qwix_kernels import dispatch
from qwix_kernels.dispatch import Explanation

from qwix._src.core import dot_general as _dot
from qwix._src.core import einsum as _einsum
from qwix._src.core import fused_dot as _fused
from qwix._src.core import qarray as _qarray
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.conv_general import ConvFused
from qwix._src.core.fused_dot import FusedOptions
from qwix._src.core.qarray import QArray
from qwix._src.core.ragged_kernel import RaggedFused
from qwix._src.core.transposed_qarray import DotDimensionNumbers, TransposedQArray
from qwix._src.qconv import conv_problem as _conv_problem
from qwix._src.qconv import qconv_general_dilated
from qwix._src.qragged import qragged_dot, qragged_dot_general
from qwix._src.qragged import ragged_problem as _ragged_problem

__all__ = [
    "ConvFused",
    "FusedOptions",
    "RaggedFused",
    "explain",
    "qconv_general_dilated",
    "qdot",
    "qdot_general",
    "qeinsum",
    "qgated_dot",
    "qragged_dot",
    "qragged_dot_general",
]

Operand = jax.Array | QArray | TransposedQArray


def qdot(
    lhs: Operand,
    rhs: Operand,
    *,
    act_qtype: DTypeLike | str | None = None,
    act_tile_size: int | float | None = None,
    act_calibration_method: str = "absmax",
    implementation: str | Sequence[str] | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    **fused: Unpack[FusedOptions],
) -> jax.Array | QArray:
    """`jax.numpy.dot`: the last axis of lhs with the last but one of rhs.

    Args: as for `qdot_general`.

    >>> import qwix
    >>> w = qwix.quantize(jnp.eye(64), "int4", channelwise_axes=(1,), tiled_axes={0: 32})
    >>> qdot(jnp.ones((2, 64)), w, act_qtype="int8").shape
    (2, 64)
    >>> hidden = qdot(jnp.ones((2, 64)), w, bias=jnp.ones(64), activation="relu", out_qtype="int8")
    >>> hidden
    QArray(int8[2,64], scale=float32[2,1])
    >>> qdot(hidden, w).shape
    (2, 64)
    """
    return qdot_general(
        lhs,
        rhs,
        _dot_numbers(lhs, rhs),
        act_qtype=act_qtype,
        act_tile_size=act_tile_size,
        act_calibration_method=act_calibration_method,
        implementation=implementation,
        precision=precision,
        preferred_element_type=preferred_element_type,
        **fused,
    )


def qdot_general(
    lhs: Operand,
    rhs: Operand,
    dimension_numbers: DotDimensionNumbers,
    *,
    act_qtype: DTypeLike | str | None = None,
    act_tile_size: int | float | None = None,
    act_calibration_method: str = "absmax",
    implementation: str | Sequence[str] | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    **fused: Unpack[FusedOptions],
) -> jax.Array | QArray:
    """`jax.lax.dot_general` where either side may be quantized.

    Args:
      lhs, rhs: arrays, QArrays or TransposedQArrays.
      dimension_numbers: ((lhs contracting, rhs contracting), (lhs batch, rhs batch)).
      act_qtype: quantize the float operand to this before the product; the lhs if both are float.
      act_tile_size: elements per scale along its last contracting axis; one scale per row by default.
      act_calibration_method: how its range is found; see `qwix.quantize`.
      implementation: "mosaic_tpu", "xla" or names in order; None takes the best that runs and never fails.
      precision: of products of floats, as in `jax.lax.dot`.
      preferred_element_type: dtype of the result; by default what the represented values promote to.
      **fused: what else is computed in the same pass: see `FusedOptions`.

    Returns:
      Array of the batch axes, the free axes of lhs, the free axes of rhs; a QArray with `out_qtype`, which
      has no gradient.

    Raises:
      ValueError: operands that disagree, or `act_qtype` with no float operand.
      NotImplementedError: a named implementation can't run this; the message says why.

    >>> x = jnp.array([[1, 2], [3, 4]], jnp.int8)
    >>> qdot_general(x, x, (((1,), (0,)), ((), ()))).tolist()  # exact integers
    [[7, 10], [15, 22]]
    """
    lhs, rhs, act_how = _with_act(
        lhs,
        rhs,
        dimension_numbers,
        tile_size=act_tile_size,
        qtype=act_qtype,
        calibration_method=act_calibration_method,
    )
    how: dict[str, Any] = {"act_how": act_how, "implementation": implementation}
    how |= {"precision": precision, "preferred_element_type": preferred_element_type}
    if _given(fused):
        return _fused.fused_dot_general(lhs, rhs, dimension_numbers, fused, **how)
    return _dot.dot_general(lhs, rhs, dimension_numbers, **how)


def qgated_dot(
    x: Operand,
    w_gate: Operand,
    w_up: Operand,
    *,
    gate_bias: jax.Array | None = None,
    act_qtype: DTypeLike | str | None = None,
    act_tile_size: int | float | None = None,
    act_calibration_method: str = "absmax",
    implementation: str | Sequence[str] | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    **fused: Unpack[FusedOptions],
) -> jax.Array | QArray:
    """activation(x @ w_gate) * (x @ w_up), the first half of a gated feed-forward layer, in one pass.

    On a TPU x is quantized once and neither product is written to memory (docs/fused.md).

    Args:
      x: [..., K]; see `qdot`.
      w_gate, w_up: [K, N], quantized alike.
      gate_bias: [N], added to x @ w_gate. `bias` is added to x @ w_up.
      act_qtype, ..., preferred_element_type: as for `qdot_general`.
      **fused: see `FusedOptions`. `activation` is the gate's: "silu" (SwiGLU) by default.

    Returns:
      [..., N]; a QArray with `out_qtype`.

    Raises:
      ValueError: weights that differ in shape or format, and as `qdot_general`.

    >>> import qwix
    >>> w = qwix.quantize(jnp.eye(64), "int8", channelwise_axes=(1,))
    >>> y = qgated_dot(jnp.ones((2, 64)), w, w, activation="relu", norm_weight=jnp.full(64, 3.0))
    >>> y.shape, round(float(y.max()), 1)
    ((2, 64), 8.9)
    """
    numbers = _dot_numbers(x, w_up)
    x, w_up, act_how = _with_act(
        x,
        w_up,
        numbers,
        tile_size=act_tile_size,
        qtype=act_qtype,
        calibration_method=act_calibration_method,
    )
    return _fused.fused_dot_general(
        x,
        w_up,
        numbers,
        {"activation": "silu", **fused},
        gate=w_gate,
        gate_bias=gate_bias,
        act_how=act_how,
        implementation=implementation,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def qeinsum(
    subscripts: str,
    *operands: Operand,
    act_qtype: DTypeLike | str | None = None,
    act_tile_size: int | float | None = None,
    act_calibration_method: str = "absmax",
    implementation: str | Sequence[str] | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
) -> jax.Array:
    """`jax.numpy.einsum` where any operand may be quantized.

    Args:
      subscripts: as for `jax.numpy.einsum`, ellipsis and implicit output included.
      *operands: arrays, QArrays or TransposedQArrays; with `act_qtype`, two.
      act_qtype, act_tile_size, ...: as for `qdot_general`.

    >>> import qwix
    >>> w = qwix.quantize(jnp.ones((64, 4, 16)), "int8", channelwise_axes=(1, 2))
    >>> qeinsum("btd,dnh->btnh", jnp.ones((1, 3, 64)), w, act_qtype="int8").shape
    (1, 3, 4, 16)
    """
    act_how = None
    if act_qtype is not None:
        act_how = _einsum_act(
            subscripts,
            operands,
            tile_size=act_tile_size,
            qtype=act_qtype,
            calibration_method=act_calibration_method,
        )
    return _einsum.einsum(
        subscripts,
        *operands,
        act_how=act_how,
        implementation=implementation,
        precision=precision,
        preferred_element_type=preferred_element_type,
    )


def explain(
    op: str,
    lhs: Any,
    rhs: Any,
    *,
    dimension_numbers: Any = None,
    chip: str | None = None,
    act_qtype: DTypeLike | str | None = None,
    act_tile_size: int | float | None = None,
    act_calibration_method: str = "absmax",
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    w_gate: Any = None,
    gate_bias: Any = None,
    geometry: Mapping[str, Any] | None = None,
    **fused: Any,
) -> Explanation:
    """Says, without running anything, which implementation an op gets on a chip, why, and what it costs.

    Args:
      op: "dot", "dot_general" (with `dimension_numbers`), "gated_dot" (with `w_gate`, rhs being w_up),
        "ragged_dot" (with `w_gate` or a ragged_dot_general's `dimension_numbers`, if need be),
        "conv_general_dilated" (with `geometry`), or einsum subscripts such as "btd,dnh->btnh".
      lhs, rhs: operands, or their shapes: `jax.ShapeDtypeStruct`, a QArray of them, or (shape, dtype).
      dimension_numbers: of "dot_general" or "ragged_dot".
      chip: "v5e", "v5p", "v6e", "v7x", "h100", "b200", "gpu" (any other) or "cpu"; None: the local one.
      act_qtype, ..., preferred_element_type, **fused: as for `qdot_general`; arrays may be shapes as well.
      w_gate, gate_bias: as for `qgated_dot`.
      geometry: of "conv_general_dilated": `window_strides`, `padding` and what else is given of
        `qconv_general_dilated`'s, `dimension_numbers` included.

    Returns:
      `qwix_kernels.dispatch.Explanation`: `chosen`, `config`, `estimate`, `rejected` ((name, reason), ...).
      `str()` gives it in words.

    Raises:
      ValueError: an op that isn't one of these, operands that disagree, or a dot that uses no kernel (both
        float, both in one block format).

    >>> import qwix
    >>> w = qwix.quantize(jnp.ones((256, 128)), "int8", channelwise_axes=(1,))
    >>> explain("dot", ((16, 256), "bfloat16"), w, chip="cpu").chosen
    'xla'
    """
    lhs, rhs, w_gate = _abstract(lhs), _abstract(rhs), _abstract(w_gate)
    gate_bias, given = _abstract(gate_bias), {k: _abstract(x) for k, x in fused.items()}
    fused_dot = cast(FusedOptions, given)
    act = {"tile_size": act_tile_size, "qtype": act_qtype, "calibration_method": act_calibration_method}
    options: dict[str, Any] = {"precision": precision, "preferred_element_type": preferred_element_type}
    if op != "ragged_dot" and (op == "gated_dot") != (w_gate is not None):
        raise ValueError("w_gate belongs to op 'gated_dot', which needs it, and to 'ragged_dot'.")
    if op == "ragged_dot":
        both = cast(RaggedFused, {**given, "w_gate": w_gate, "gate_bias": gate_bias})
        problem: Any = _ragged_problem(lhs, rhs, dimension_numbers, act, options, both)
    elif op == "conv_general_dilated":
        problem = _conv_problem(lhs, rhs, geometry, cast(ConvFused, given), **act, **options)
    elif op in ("dot", "dot_general", "gated_dot"):
        numbers = dimension_numbers if op == "dot_general" else _dot_numbers(lhs, rhs)
        if numbers is None:
            raise ValueError("explain('dot_general', ...) needs dimension_numbers.")
        lhs, rhs, options["act_how"] = _with_act(lhs, rhs, numbers, **act)
        if _given(fused_dot) or w_gate is not None:
            gate = {"gate": w_gate, "gate_bias": gate_bias}
            problem = _fused.fused_problem(lhs, rhs, numbers, fused_dot, **gate, **options)
        else:
            problem = _dot.matmul_problem(lhs, rhs, numbers, **options)
    elif "," in op:
        if _given(fused_dot):
            raise ValueError(f"Nothing is fused into an einsum; leave out {', '.join(fused)}.")
        if act_qtype is not None:
            options["act_how"] = _einsum_act(op, (lhs, rhs), **act)
        problem = _einsum.matmul_problem(op, lhs, rhs, **options)
    else:
        raise ValueError(
            f"op is {op!r}; it must be 'dot', 'dot_general', 'gated_dot', 'ragged_dot', "
            "'conv_general_dilated' or subscripts of two operands."
        )
    if problem is None:
        raise ValueError(
            f"No quantized kernel is involved in {op!r} of {lhs!r} and {rhs!r}: XLA computes it. "
            "Quantize one side, or give act_qtype."
        )
    return dispatch.explain(problem, chip)


def _dot_numbers(lhs: Any, rhs: Any) -> DotDimensionNumbers:
    a, b = len(lhs.shape), len(rhs.shape)
    return (((), ()) if 0 in (a, b) else ((a - 1,), (max(b - 2, 0),))), ((), ())


def _with_act(
    lhs: Any, rhs: Any, numbers: DotDimensionNumbers, *, qtype: Any, **act: Any
) -> tuple[Any, Any, HowToQuantize | None]:
    """The operands and how the lhs is quantized on the way; a float rhs is quantized here."""
    if qtype is None:
        return lhs, rhs, None
    side = _float_side(lhs, rhs)
    how = _dot.get_how_to_quantize(
        dimension_numbers=numbers,
        ndims=(len(lhs.shape), len(rhs.shape)),
        for_lhs=side == 0,
        qtype=qtype,
        **act,
    )
    if side == 0:
        return lhs, rhs, how
    if isinstance(rhs, jax.ShapeDtypeStruct):
        return lhs, jax.eval_shape(lambda x: _qarray.quantize(x, how), rhs), None
    return lhs, _qarray.quantize(jnp.asarray(rhs), how), None


def _given(fused: FusedOptions) -> bool:
    """Whether anything is fused."""
    _fused.check_names(fused)
    return any(x is not None for name, x in fused.items() if name != "norm_eps")


def _einsum_act(subscripts: str, operands: Sequence[Any], **act: Any) -> HowToQuantize:
    if len(operands) != 2:
        raise ValueError(f"act_qtype needs two operands, but {subscripts!r} has {len(operands)}.")
    return _einsum.get_how_to_quantize(
        einsum_str=subscripts,
        ndims=(len(operands[0].shape), len(operands[1].shape)),
        for_lhs=_float_side(*operands) == 0,
        **act,
    )


def _float_side(lhs: Any, rhs: Any) -> int:
    """0 or 1: the first operand that is a plain float."""
    for side, x in enumerate((lhs, rhs)):
        if not isinstance(x, QArray | TransposedQArray) and _qarray.numerics.should_quantize(x.dtype):
            return side
    raise ValueError(f"act_qtype quantizes a float operand, but there is none: {lhs!r} and {rhs!r}.")


def _abstract(x: Any) -> Any:
    """Shapes and dtypes of an operand in any form that `explain` takes."""
    if isinstance(x, tuple) and len(x) == 2 and not hasattr(x, "shape"):
        return jax.ShapeDtypeStruct(tuple(x[0]), jnp.dtype(x[1]))
    return jax.tree.map(lambda v: jax.ShapeDtypeStruct(v.shape, v.dtype) if hasattr(v, "shape") else v, x)
