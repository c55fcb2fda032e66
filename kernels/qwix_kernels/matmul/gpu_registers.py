"""A lookup table in registers: what a codebook's weights need below Pallas."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import arith

_PAIRS = plgpu.Layout.WGMMA


def looked_up(x: jax.Array, table: tuple[float, ...], dtype: str, *, emulated: bool) -> jax.Array:
    """table[x] in a 16-bit dtype, of 4-bit indices [rows, K] in the matrix instruction's layout.

    A byte permutation looks up four bytes among eight. So the table's sixteen high bytes and sixteen low
    bytes take two each, one more to choose by an index' highest bit, and two to put the bytes together. Four
    pairs of neighbours lie in one register, as they were read.

    `emulated`: for the interpreter, which has no registers.
    """
    entries = np.asarray(table, np.float32).astype(jnp.dtype(dtype))
    if emulated:
        return _selected(x.astype(jnp.int32), [*entries])
    planes = entries.view(np.uint8).reshape(16, 2).T.copy().view(np.uint32)  # [low or high, 4 words]

    @plgpu.inline_mgpu(
        arg_types=(_PAIRS,), return_type=plgpu.ShapeDtypeStruct(x.shape, jnp.dtype(dtype), layout=_PAIRS)
    )
    def found(_ctx: Any, index: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        kind = ir.VectorType.get((2,), mgpu.utils.dtype_to_ir_type(jnp.dtype(dtype)))
        out = np.empty_like(index.registers)
        for (row, column, *rest), _ in np.ndenumerate(index.registers[:, ::4]):
            places = [(row, 4 * column + pair, *rest) for pair in range(4)]
            eight = mgpu.utils.vector_concat([index.registers[place] for place in places])
            for place, word in zip(places, _entries(eight, planes), strict=True):
                out[place] = mgpu.utils.bitcast(word, kind)
        return mgpu.FragmentedArray(_registers=out, _layout=index.layout, _is_signed=None)

    return found(x)


def _selected(index: jax.Array, entries: list[Any]) -> jax.Array:
    """entries[index] by selects over the bits of the index: a kernel has no constant arrays."""
    for bit in range(4):
        is_set = (index & (1 << bit)) != 0
        pairs = zip(entries[::2], entries[1::2], strict=True)
        entries = [jnp.where(is_set, high, low) for low, high in pairs]
    return entries[0]


def _entries(eight: Any, planes: np.ndarray) -> list[Any]:
    """Eight entries of the table in four 32-bit words, for eight 4-bit indices."""
    i32 = ir.IntegerType.get_signless(32)
    const = lambda value: arith.constant(i32, ir.IntegerAttr.get(i32, int(np.uint32(value).view(np.int32))))
    permute = mgpu.utils.prmt
    index, words = mgpu.utils.bitcast(eight, i32), []
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
    return words
