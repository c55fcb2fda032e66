"""What the widening of 4-bit weights needs below Pallas: which thread holds what, and a lookup table.

For a 16-bit matrix instruction a thread holds pairs of neighbours along K. It reads runs of eight 4-bit
values, 32 bits, of which three pairs are other threads'. K is summed over, so its order is free: with
`runs_as_pairs` a thread keeps what it has read, and the rows are given in the same order, `in_pair_order`.
Within each 32 of K the value at 8 p + 2 t + i of the new order is that at 8 t + 2 p + i (t, p in 0..3).

Both functions take `emulated` for the interpreter, which has no registers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

RUN, GROUP = 8, 32  # 4-bit values that a thread reads at once; those of the four threads of a row
_RUNS, _PAIRS = plgpu.Layout.WGMMA_UPCAST_4X, plgpu.Layout.WGMMA


def in_pair_order(x: jax.Array) -> jax.Array:
    """The last axis in the order that `runs_as_pairs` gives it; a multiple of 32.

    >>> in_pair_order(jnp.arange(32)).tolist()[:10]
    [0, 1, 8, 9, 16, 17, 24, 25, 2, 3]
    """
    split = x.reshape(*x.shape[:-1], -1, 4, 4, 2)
    return jnp.swapaxes(split, -3, -2).reshape(x.shape)


def runs_as_pairs(x: jax.Array, *, emulated: bool) -> jax.Array:
    """4-bit values [rows, K] that were read in runs, as the matrix instruction takes them: K in pair order."""
    if emulated:
        return in_pair_order(x)

    @plgpu.inline_mgpu(
        arg_types=(_RUNS,), return_type=plgpu.ShapeDtypeStruct(x.shape, x.dtype, layout=_PAIRS)
    )
    def kept(_ctx: Any, runs: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        return _pairs(runs.registers, x.shape, runs.is_signed, lambda run: run)

    return kept(x)


def looked_up(x: jax.Array, table: tuple[float, ...], dtype: str, *, emulated: bool) -> jax.Array:
    """table[x] in a 16-bit dtype, of indices [rows, K] that were read in runs; K in pair order.

    A byte permutation looks up four bytes among eight. So the table's sixteen high bytes and sixteen low bytes
    take two each, one more to choose by an index' highest bit, and two to put the bytes together.
    """
    entries = np.asarray(table, np.float32).astype(jnp.dtype(dtype))
    if emulated:
        return in_pair_order(_selected(x.astype(jnp.int32), [*entries]))
    planes = entries.view(np.uint8).reshape(16, 2).T.copy().view(np.uint32)  # [low or high, 4 words]

    @plgpu.inline_mgpu(
        arg_types=(_RUNS,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), layout=_PAIRS)
    )
    def found(_ctx: Any, runs: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        kind = ir.VectorType.get((RUN,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
        return _pairs(runs.registers, x.shape, None, lambda run: _entries(run, planes, kind))

    return found(x)


def _selected(index: jax.Array, entries: list[Any]) -> jax.Array:
    """entries[index] by selects over the bits of the index: a kernel has no constant arrays."""
    for bit in range(4):
        is_set = (index & (1 << bit)) != 0
        pairs = zip(entries[::2], entries[1::2], strict=True)
        entries = [jnp.where(is_set, high, low) for low, high in pairs]
    return entries[0]


def _pairs(runs: np.ndarray, shape: Any, is_signed: bool | None, change: Any) -> mgpu.FragmentedArray:
    """Registers that each hold a run of eight, taken for four of pairs."""
    layout = _PAIRS.to_mgpu()
    out = np.empty(layout.registers_shape(shape), dtype=object)
    for (row, column, *rest), run in np.ndenumerate(runs):
        changed = change(run)
        for pair in range(4):
            out[row, 4 * column + pair, *rest] = mgpu.utils.vector_slice(
                changed, slice(2 * pair, 2 * pair + 2)
            )
    return mgpu.FragmentedArray(_registers=out, _layout=layout, _is_signed=is_signed)


def _entries(run: Any, planes: np.ndarray, kind: Any) -> Any:
    """Eight entries of the table, a vector of 16-bit values, for eight 4-bit indices."""
    i32 = ir.IntegerType.get_signless(32)
    const = lambda value: arith.constant(i32, ir.IntegerAttr.get(i32, int(np.uint32(value).view(np.int32))))
    permute = mgpu.utils.prmt
    index, words = mgpu.utils.bitcast(run, i32), []
    for half in range(2):
        four = arith.shrui(index, const(16)) if half else index
        within = arith.andi(four, const(0x7777))
        upper = arith.shrui(arith.andi(four, const(0x8888)), const(1))
        choice = arith.ori(upper, const(0x3210))
        low, high = (
            permute(
                permute(const(plane[0]), const(plane[1]), within),
                permute(const(plane[2]), const(plane[3]), within),
                choice,
            )
            for plane in planes
        )
        words += [permute(low, high, const(0x5140)), permute(low, high, const(0x7362))]
    pair = ir.VectorType.get((2,), ir.VectorType(kind).element_type)
    return mgpu.utils.vector_concat([mgpu.utils.bitcast(word, pair) for word in words])
