"""The programs of the ragged suite: one MoE layer in one scheme.

Weights, scales and activations are those of problems.py, with a matrix for each expert.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from qwix_kernels import ragged_matmul
from qwix_kernels.chips import Chip
from qwix_kernels.problem import Tensor
from qwix_kernels.ragged_matmul import GmmProblem, cost, reference, tpu_visits

from bench import problems
from bench.shapes import RaggedLayer, Scheme
from bench.tpu_compile import KnownOf, device_cores


def operands(scheme: Scheme, layer: RaggedLayer) -> tuple[Any, Tensor, jax.ShapeDtypeStruct]:
    """Activations, the weight and the group sizes, without data."""
    lhs, rhs = problems.operands(scheme, layer.rows, layer.k, layer.n, layer.experts)
    first = lambda a, shape: jax.ShapeDtypeStruct(shape, a.dtype)
    if isinstance(lhs, Tensor):
        lhs = jax.tree.map(lambda a: first(a, a.shape[1:]), lhs)
    else:
        lhs = first(lhs, lhs.shape[1:])
    return lhs, rhs, jax.ShapeDtypeStruct((layer.experts,), jnp.int32)


def problem(scheme: Scheme, layer: RaggedLayer) -> GmmProblem:
    """The description that dispatch chooses by."""
    how = problems.row_quantize(scheme)
    return ragged_matmul.gmm_problem_of(*operands(scheme, layer), quantize_lhs=how, out_dtype=jnp.bfloat16)


def kernel(scheme: Scheme, implementation: str | None = None, config: Any = None) -> Callable[..., jax.Array]:
    """The op, as a function of `operands`."""

    def op(lhs, rhs, sizes):
        how = problems.row_quantize(scheme)
        return ragged_matmul.gmm(
            lhs,
            rhs,
            sizes,
            quantize_lhs=how,
            out_dtype=jnp.bfloat16,
            implementation=implementation,
            config=config,
        )

    return op


def known(layer: RaggedLayer, block: int) -> KnownOf:
    """What the layer's group sizes make of the data that steers the kernels; `block` is that of rows."""
    sizes = layer.group_sizes()
    visits = reference.visits([sizes], layer.rows, block)
    most = tpu_visits.most_visits(layer.rows, block, len(sizes), 1)
    fields = [[visit[i] for visit in visits] + [0] * (most - len(visits)) for i in range(len(visits[0]))]
    words = [word for field in fields for word in field]
    return {"qwix_group_visits": {0: sizes}, "qwix_gmm": {0: [len(visits)], 1: [*words, len(visits)]}}


def floor(scheme: Scheme, layer: RaggedLayer, chip: Chip) -> tuple[float, float]:
    """(compute, memory) in microseconds of a jax device: of the rows and the matrices that there are.

    Every row of the result is written.
    """
    sizes = layer.group_sizes()
    there = dataclasses.replace(layer, rows=sum(sizes), experts=sum(size > 0 for size in sizes))
    compute, memory = cost.gmm_floor(problem(scheme, there), chip)
    dead = (layer.rows - sum(sizes)) * layer.n * 2 / (chip.hbm_gbps * 1e3)
    return compute / device_cores(chip), (memory + dead) / device_cores(chip)
