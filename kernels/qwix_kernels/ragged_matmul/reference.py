"""The plainest correct grouped matmuls: numpy, group by group. Tests trust only this.

A group is one matmul, so what it gives and how far a computed one may be off is said by
`qwix_kernels.matmul.reference`; rows of no group are zero, exactly.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np

from qwix_kernels.matmul import reference
from qwix_kernels.problem import NO_EXTRAS, Extras, MatmulProblem, Tensor
from qwix_kernels.ragged_matmul.problem import GmmProblem, TgmmProblem

_BY_GROUP = ("bias", "gate", "gate_bias")
_BY_ROW = ("lhs_scale", "lhs_noise", "residual")


def gmm(
    problem: GmmProblem, lhs: Tensor, rhs: Tensor, sizes: Any, extras: Extras = NO_EXTRAS, first: int = 0
) -> np.ndarray:
    """[M, N] in float64; int64 for integers without scales. The rows of the groups start at `first`."""
    of = lambda *args: reference.run(*args)
    return _by_group(problem, lhs, rhs, sizes, extras, first, of)


def gmm_error_bound(
    problem: GmmProblem,
    lhs: Tensor,
    rhs: Tensor,
    sizes: Any,
    extras: Extras = NO_EXTRAS,
    first: int = 0,
    *,
    multiplied: str | None = None,
) -> np.ndarray:
    """How far each element of a result may be from that of `gmm`, [M, N]; as in `matmul.reference`."""
    of = lambda *args: reference.error_bound(*args, multiplied=multiplied)
    return _by_group(problem, lhs, rhs, sizes, extras, first, of)


def _by_group(problem: GmmProblem, lhs: Tensor, rhs: Tensor, sizes: Any, extras: Extras, first: int, of: Any):
    p = problem.product
    out = np.zeros((p.m, p.n), np.int64 if p.out_dtype == "int32" else np.float64)
    start = first
    for group, size in enumerate(np.asarray(sizes).tolist()):
        stop = min(start + size, p.m)
        if stop > start:
            out[start:stop] = of(*_of_group(p, lhs, rhs, extras, group, start, stop))[0]
        start = stop
    return out


def _of_group(p: MatmulProblem, lhs: Tensor, rhs: Tensor, extras: Extras, group: int, start: int, stop: int):
    """(problem, lhs, rhs, extras) of the matmul of one group."""
    rows = lambda a: a if a.shape[-2] == 1 and p.m != 1 else a[..., start:stop, :]
    mine = lambda a: a if a.shape[0] == 1 else a[group : group + 1]
    left = jax.tree.map(lambda a: rows(np.asarray(a))[None], lhs)
    right = jax.tree.map(lambda a: mine(np.asarray(a)), rhs)
    given: dict[str, Any] = {}
    for field in dataclasses.fields(Extras):
        x = jax.tree.map(np.asarray, getattr(extras, field.name))
        if x is not None:
            x = jax.tree.map(mine, x) if field.name in _BY_GROUP and _has_batch(x) else x
            given[field.name] = rows(x) if field.name in _BY_ROW else x
    one = dataclasses.replace(
        p,
        m=stop - start,
        lhs=dataclasses.replace(p.lhs, free=stop - start),
        rhs=dataclasses.replace(p.rhs, batch=1),
    )
    return one, left, right, Extras(**given)


def _has_batch(x: Any) -> bool:
    return isinstance(x, Tensor) or x.ndim == 3


def tgmm(problem: TgmmProblem, lhs: Tensor, g: Tensor, sizes: Any, first: int = 0) -> np.ndarray:
    """[G, K, N] in float64; int64 for integers without scales."""
    return _by_matrix(problem, lhs, g, sizes, first, lambda *args: reference.run(*args))


def tgmm_error_bound(
    problem: TgmmProblem, lhs: Tensor, g: Tensor, sizes: Any, first: int = 0, *, multiplied: str | None = None
) -> np.ndarray:
    """How far each element of a result may be from that of `tgmm`."""
    of = lambda *args: reference.error_bound(*args, multiplied=multiplied)
    return _by_matrix(problem, lhs, g, sizes, first, of)


def _by_matrix(p: TgmmProblem, lhs: Tensor, g: Tensor, sizes: Any, first: int, of: Any) -> np.ndarray:
    out = np.zeros((p.matrices, p.k, p.n), np.int64 if p.out_dtype == "int32" else np.float64)
    start = first
    for group, size in enumerate(np.asarray(sizes).tolist()):
        stop = min(start + size, p.m)
        if stop > start:
            left, right = (_some_rows(x, p.m, start, stop) for x in (lhs, g))
            left = jax.tree.map(lambda a: np.swapaxes(a, 1, 2), left)
            out[group] = of(_one_matrix(p, stop - start), left, right)[0]
        start = stop
    return out


def _some_rows(x: Tensor, m: int, start: int, stop: int) -> Tensor:
    """[1, rows, X] of [M, X]; scales have one row."""
    rows = lambda a: a if a.shape[0] == 1 and m != 1 else a[start:stop]
    return jax.tree.map(lambda a: rows(np.asarray(a))[None], x)


def _one_matrix(p: TgmmProblem, rows: int) -> MatmulProblem:
    """The matmul [1, K, rows] x [1, rows, N] of one group."""
    along = lambda x: dataclasses.replace(x, batch=1, tile_k=rows if x.is_quantized else 0)
    return MatmulProblem(p.k, rows, p.n, along(p.lhs), along(p.g), p.out_dtype, precision=p.precision)


def visits(
    sizes: Any, rows: int, block: int, matrix: Any = None, *, per_matrix: bool = False
) -> list[tuple[int, int, int, int, int]]:
    """What tpu_visits.py finds: (tile, fetch, matrix, lo, hi) of each visit, for [batches, P] sizes.

    >>> visits([[3, 0, 6]], 16, 4)
    [(0, 0, 0, 0, 3), (0, 0, 2, 3, 4), (1, 1, 2, 0, 4), (2, 2, 2, 0, 1), (2, 2, 2, 0, 0), (3, 2, 2, 0, 0)]
    """
    sizes = np.asarray(sizes)
    matrix = np.arange(sizes.size).reshape(sizes.shape) if matrix is None else np.asarray(matrix)
    out, fetch, held = [], 0, 0
    each = rows // len(sizes)
    for b, (row_sizes, of) in enumerate(zip(sizes.tolist(), matrix.tolist(), strict=True)):
        start, end = b * each, (b + 1) * each
        for size, m in zip([*row_sizes, rows], [*of, -1], strict=True):
            stop = min(start + size, end)
            tiles = range(start // block, (stop - 1) // block + 1) if stop > start else ()
            if per_matrix:
                tiles = () if m < 0 else tiles or (start // block,)
            for tile in tiles:
                reads = stop > start and m >= 0
                fetch = tile if reads else fetch
                held = m if reads or per_matrix else held
                lo, hi = (max(start - tile * block, 0), min(stop - tile * block, block)) if reads else (0, 0)
                out.append((tile, fetch, held, lo, hi))
            start = stop
    return out
