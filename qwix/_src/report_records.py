"""What a provider notes about each op it sees: the facts every line of a report comes from.

A record is written once per (module path, op id), while a model is traced or converted, so it holds only
static facts: shapes, dtypes, the rule that matched, and bytes as a device stores them (a 4-bit value is half
a byte; `.nbytes` says one). Nothing here keeps an array alive.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from qwix_kernels.conv import ConvProblem
from qwix_kernels.problem import MatmulProblem
from qwix_kernels.ragged_matmul import GmmProblem, TgmmProblem

from qwix._src.core import numerics

Problem = MatmulProblem | ConvProblem | GmmProblem | TgmmProblem


@dataclasses.dataclass(frozen=True, kw_only=True)
class OpRecord:
    """One op of a model, as a provider saw it.

    `reason` is None exactly when the op is quantized; otherwise it says why the op stayed float.
    """

    path: str  # of the module, e.g. "layers/0/mlp/up"; "" for the root
    op: str  # as rules name it, e.g. "dot_general"
    op_id: str  # unique within the module, e.g. "dot_general0"
    weight: str | None = None  # name of the param in that module; None when no operand is a weight
    weight_shape: tuple[int, ...] | None = None
    weight_dtype: str | None = None  # of the float weight
    lhs_shape: tuple[int, ...] | None = None
    rhs_shape: tuple[int, ...] | None = None
    rule: Any = None  # the QuantizationRule that matched
    how: Any = None  # the HowToQuantize of the weight
    act_qtype: Any = None  # of the activation, None when it stays float
    problem: Problem | None = None  # None: no kernel's (a lookup, a float op)
    reason: str | None = None
    adapter_rank: int | None = None  # of the weight's adapter
    trains: bool = False  # quantized for training: the weight itself is stored as float
    bwd_qtype: Any = None  # of incoming gradients, None when they stay float
    dynamic_because: str | None = None  # why the activation has no static scale, though the rule says so
    k_major: bool = False  # the weight is stored as the matrix units of GPUs read it
    device_bytes_before: int = 0  # of the float weight
    device_bytes_after: int = 0  # of its values, scales and zero points
    sqnr_db: float | None = None  # of the weight; None while it is unknown

    @property
    def is_quantized(self) -> bool:
        return self.reason is None


def device_bytes(tree: Any) -> int:
    """Bytes that the arrays of a pytree take on a device: values, scales and zero points of QArrays included.

    Works on arrays, tracers and `jax.ShapeDtypeStruct`s. Each array is rounded up to whole bytes.

    >>> device_bytes(jax.ShapeDtypeStruct((256, 3), "int4"))
    384
    """
    return sum(numerics.device_bytes(x.dtype, math.prod(x.shape)) for x in jax.tree.leaves(tree))


def sqnr_db(weight: jax.Array, represented: jax.Array) -> float | None:
    """Signal to quantization noise, 10 log10(sum w^2 / sum (w - w')^2), in dB; shapes must agree.

    inf when nothing was lost, nan for a weight that holds nan, None under a trace (there are no values yet).

    >>> sqnr_db(jnp.array([3.0, 4.0]), jnp.array([3.0, 3.5]))
    20.0
    """
    if isinstance(weight, jax.core.Tracer) or isinstance(represented, jax.core.Tracer):
        return None
    if weight.shape != represented.shape:
        raise ValueError(f"The two must have one shape, got {weight.shape=} and {represented.shape=}.")
    wide = weight.astype(jnp.float32)
    # Both sums over the largest magnitude, so that no square under- or overflows.
    peak = float(jnp.max(jnp.abs(wide), initial=0.0))
    if peak == 0:
        return math.inf
    signal = float(jnp.sum(jnp.square(wide / peak)))
    noise = float(jnp.sum(jnp.square((wide - represented.astype(jnp.float32)) / peak)))
    if math.isnan(signal) or math.isnan(noise):
        return math.nan
    return math.inf if noise == 0 else 10 * math.log10(signal / noise)
