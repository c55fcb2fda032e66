"""Quantization of an array in shards.

Where a column (row) that shares its scale is cut, its greatest magnitude is one small max-reduce.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from qwix_kernels.absmax import absmax
from qwix_kernels.lowering import How
from qwix_kernels.partitioning import Dim, Dims, Layout, Plan
from qwix_kernels.quantize import xla
from qwix_kernels.quantize.problem import QuantizeProblem


def layout_of(problem: QuantizeProblem) -> Layout:
    """The array, its values and its scales."""
    dims: Dims = Dim("b", problem.batch), Dim("r", problem.rows), Dim("c", problem.columns)
    shape = (problem.batch, problem.rows, problem.columns)
    claims = ((0, 0), (0, 1), (0, 2))
    return Layout(("x",), (dims,), (shape,), (dims, dims), (shape, problem.scale_shape), claims)


def run(problem: QuantizeProblem, how: How, bind: Any, plan: Plan, x: jax.Array) -> list[jax.Array]:
    """One shard's values and scales, of its own part. `bind`: the op on it."""
    batch, rows, columns = x.shape
    problem = dataclasses.replace(problem, batch=batch, rows=rows, columns=columns)
    factor, axis = ("r", 1) if problem.scale_of == "columns" else ("c", 2)
    if plan.shards(factor) == 1:
        return bind(x, problem=problem, how=dataclasses.replace(how, out=None))
    most = jax.lax.pmax(absmax(x, axis, keepdims=True).astype(jnp.float32), plan.axes(factor))
    return list(xla.by_absmax(problem, x, most))
