"""One operand of the portable matmul, and where its axes are: what is the same for lhs and rhs."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from qwix_kernels.problem import CODEBOOKS, Tensor


@dataclasses.dataclass(frozen=True)
class Side:
    """One operand and where its axes are. Axis 0 is the batch."""

    tensor: Tensor
    is_left: bool
    free: int
    contracting: int

    @property
    def values(self) -> jax.Array:
        return self.tensor.values

    @property
    def scale(self) -> jax.Array | None:
        return self.tensor.scale

    @property
    def tile(self) -> int:
        """Neighbours along K that share a scale: the whole of K without scales."""
        k = self.values.shape[self.contracting]
        return k if self.scale is None else k // self.scale.shape[self.contracting]

    @property
    def is_integer(self) -> bool:
        return self.tensor.codebook is None and jnp.issubdtype(self.values.dtype, jnp.integer)

    @property
    def is_small(self) -> bool:
        return self.is_integer and jnp.iinfo(self.values.dtype).bits <= 8

    @property
    def is_slow_to_widen(self) -> bool:
        return self.tensor.codebook is not None or (self.values.dtype.itemsize == 1 and not self.is_integer)

    @property
    def varies_along_k(self) -> bool:
        """Whether there is more than one scale along K."""
        return self.scale is not None and self.scale.shape[self.contracting] > 1

    def with_arrays(self, values, scale=None, zero_point=None) -> Side:
        return dataclasses.replace(self, tensor=Tensor(values, scale, zero_point, self.tensor.codebook))

    def cut(self, start, length: int) -> Side:
        """The run of K from `start` (an int or traced), which lies within one tile."""
        if length == self.values.shape[self.contracting]:
            return self
        at = lambda a, i, n: None if a is None else jax.lax.dynamic_slice_in_dim(a, i, n, self.contracting)
        t, tile = self.tensor, start // self.tile
        return self.with_arrays(at(t.values, start, length), at(t.scale, tile, 1), at(t.zero_point, tile, 1))

    def rows(self, start, length: int) -> Side:
        """Some rows of a lhs whose scales are by row, or shared by all."""

        def at(a: jax.Array | None) -> jax.Array | None:
            if a is None or a.shape[1] == 1:  # shared by all rows
                return a
            return jax.lax.dynamic_slice_in_dim(a, start, length, 1)

        t = self.tensor
        return self.with_arrays(at(t.values), at(t.scale), at(t.zero_point))

    def on_result(self, a: jax.Array, dtype=jnp.float32) -> jax.Array:
        """What is constant along K, as it applies to the result: [batch, M, 1] or [batch, 1, N]."""
        size, count = self.values.shape[self.free], a.shape[self.free]
        a = a.astype(dtype)
        if count not in (1, size):
            a = jnp.repeat(a, size // count, axis=self.free)
        return a.reshape((a.shape[0], -1, 1) if self.is_left else (a.shape[0], 1, -1))

    def dequantized(self, dtype, scaled: bool) -> jax.Array:
        """The represented values, computed in float32 and rounded to `dtype`; or those before scaling."""
        t = self.tensor
        if t.codebook is not None:
            values = jnp.asarray(CODEBOOKS[t.codebook], jnp.float32)[t.values.astype(jnp.int32)]
        elif t.zero_point is None and not (scaled and t.scale is not None):
            return t.values.astype(dtype)
        else:
            values = t.values.astype(jnp.float32)
        if t.zero_point is not None:
            values = _tilewise(jnp.subtract, values, t.zero_point)
        if scaled and t.scale is not None:
            values = _tilewise(jnp.multiply, values, t.scale)
        return values.astype(dtype)


def _tilewise(op, values: jax.Array, small: jax.Array) -> jax.Array:
    """op(values, small), each entry of `small` covering a run of neighbours along every axis."""
    split, ones = [], []
    for size, count in zip(values.shape, small.shape, strict=True):
        split += [count, size // count]
        ones += [count, 1]
    return op(values.reshape(split), small.astype(values.dtype).reshape(ones)).reshape(values.shape)
