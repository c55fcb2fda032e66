"""`qwix.ops.qragged_dot` and what `qwix.ops.explain` says of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack, cast

import jax
from jax.lax import RaggedDotDimensionNumbers
from jax.typing import DTypeLike

from qwix._src.core import dot_general as _dot
from qwix._src.core import ragged_dot as _ragged
from qwix._src.core import ragged_kernel as _kernel
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.qarray import QArray
from qwix._src.core.ragged_kernel import RaggedFused


def qragged_dot(
    lhs: jax.Array | QArray,
    rhs: jax.Array | QArray,
    group_sizes: jax.Array,
    *,
    group_offset: jax.Array | None = None,
    act_qtype: DTypeLike | str | None = None,
    act_tile_size: int | float | None = None,
    act_calibration_method: str = "absmax",
    implementation: str | Sequence[str] | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    **fused: Unpack[RaggedFused],
) -> jax.Array:
    """`jax.lax.ragged_dot`: rows of lhs [M, K] times the matrix of their group in rhs [G, K, N].

    On a TPU one kernel, whose cost follows the rows that there are (docs/ragged.md): an empty group costs
    nothing.

    Args:
      lhs, rhs: arrays or QArrays.
      group_sizes: [G] integers: the first group_sizes[0] rows of lhs are group 0, and so on.
      group_offset: a number: rhs[0] belongs to this group of the `group_sizes`, of which there may be more.
      act_qtype: quantize the rows of a float lhs to this before the product.
      act_tile_size: elements per scale along K; one scale per row by default.
      act_calibration_method, implementation, precision, preferred_element_type: as for `qdot_general`.
      **fused: what else is computed in the same pass: see `RaggedFused`. With `w_gate` it is
        activation(x . w_gate) * (x . rhs), "silu" by default.

    Returns:
      [M, N]; zeros in rows that belong to no group of rhs.

    Raises:
      ValueError: operands that disagree.
      NotImplementedError: a named implementation can't run this; the message says why.

    >>> import jax.numpy as jnp
    >>> import qwix
    >>> w = qwix.quantize(jnp.ones((2, 64, 8)), "int8", channelwise_axes=(0, 2))
    >>> sizes = jnp.array([3, 1])
    >>> out = qragged_dot(jnp.ones((5, 64)), w, sizes, act_qtype="int8", activation="relu")
    >>> out.shape, [round(float(x)) for x in out[:, 0]]
    ((5, 8), [63, 63, 63, 63, 0])
    """
    return qragged_dot_general(
        lhs,
        rhs,
        group_sizes,
        _ragged.BASIC_DIMENSION_NUMBERS,
        group_offset=group_offset,
        act_qtype=act_qtype,
        act_tile_size=act_tile_size,
        act_calibration_method=act_calibration_method,
        implementation=implementation,
        precision=precision,
        preferred_element_type=preferred_element_type,
        **fused,
    )


def qragged_dot_general(
    lhs: jax.Array | QArray,
    rhs: jax.Array | QArray,
    group_sizes: jax.Array,
    dimension_numbers: RaggedDotDimensionNumbers,
    *,
    group_offset: jax.Array | None = None,
    act_qtype: DTypeLike | str | None = None,
    act_tile_size: int | float | None = None,
    act_calibration_method: str = "absmax",
    implementation: str | Sequence[str] | None = None,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    **fused: Unpack[RaggedFused],
) -> jax.Array:
    """`jax.lax.ragged_dot_general` where either side may be quantized, in all of its three modes.

    Args:
      lhs, rhs: arrays or QArrays.
      group_sizes: [G] integers, or one such vector for each index of the axes before the ragged one.
      dimension_numbers: the ragged axis of lhs may be a free one (as in `qragged_dot`), the contracting one
        (each group gives a product) or a batch axis.
      act_qtype, act_tile_size, ...: as for `qragged_dot`; the ragged axis must be free.

    >>> import jax.numpy as jnp
    >>> numbers = RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())
    >>> x = jnp.array([[1], [2], [3]], jnp.int8)
    >>> qragged_dot_general(x, x, jnp.array([2, 1]), numbers).ravel().tolist()  # 1 + 4, 9
    [5, 9]
    """
    act = {"qtype": act_qtype, "tile_size": act_tile_size, "calibration_method": act_calibration_method}
    return _ragged.ragged_dot_general(
        lhs,
        rhs,
        group_sizes,
        dimension_numbers,
        precision,
        preferred_element_type,
        group_offset,
        act_how=_act(lhs, rhs, dimension_numbers, **act),
        implementation=implementation,
        **_given(fused),
    )


def _act(
    lhs: Any, rhs: Any, numbers: RaggedDotDimensionNumbers, *, qtype: Any, **act: Any
) -> HowToQuantize | None:
    """How the rows of lhs are quantized on the way."""
    if qtype is None:
        return None
    return _dot.get_how_to_quantize(
        dimension_numbers=numbers.dot_dimension_numbers,
        ndims=(len(lhs.shape), len(rhs.shape)),
        for_lhs=True,
        qtype=qtype,
        **act,
    )


def _given(fused: RaggedFused) -> RaggedFused:
    """What is not None of what can be fused, or somebody misspelt."""
    known = RaggedFused.__optional_keys__
    return cast(RaggedFused, {name: x for name, x in fused.items() if x is not None or name not in known})


def ragged_problem(
    lhs: Any, rhs: Any, numbers: Any, act: dict[str, Any], options: dict[str, Any], fused: RaggedFused
) -> Any:
    """The kernel's problem of a ragged dot of shapes; None where it is none."""
    numbers = _ragged.BASIC_DIMENSION_NUMBERS if numbers is None else numbers
    how = _act(lhs, rhs, numbers, **act)
    return _kernel.ragged_problem(lhs, rhs, numbers, act_how=how, **options, **_given(fused))
