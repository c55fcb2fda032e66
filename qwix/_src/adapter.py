"""A low-rank adapter of a weight: what it adds, in which axes, and how an op that eats the weight sees it.

A weight W with an adapter is the weight W + scaling * A B (LoRA, arXiv:2106.09685), wherever the model uses
it. A has the axes that the op contracts, B those that it keeps, and both have the axes along which the weight
is several (batch axes of a dot, groups of a ragged dot, layers under vmap). The first op that eats the weight
decides which axes those are; another op may contract what the first one keeps, as the tied head of a language
model does, and gets the same sum, the other way round.

Axes are counted where the weight is "at home": in the layout of the stored param of one layer, or after the
reshapes that the model puts between the param and the op. With DoRA (arXiv:2402.09353) the sum is scaled to
learned magnitudes m: (W + scaling * A B) * m / |W + scaling * A B|, norms over the axes of A, and no gradient
through them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from qwix._src import weight_steps
from qwix._src.core.low_rank import LowRank
from qwix._src.weight_steps import Step

SUFFIXES = {"a": "_lora_a", "b": "_lora_b", "m": "_lora_m"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSpec:
    """The static facts of one adapter.

    Attributes:
      home: shape of the weight at home, of one layer.
      steps: from the stored param of one layer to there; () unless the model reshapes it.
      batch: axes at home that A and B both have.
      ins: axes that A has.
      outs: axes that B has.
      rank: of the change; of a grouped convolution, in each group.
      alpha: A B is multiplied by alpha / rank, or by alpha / sqrt(rank) with `use_rslora`.
      flat: A has one axis for all of `ins`, and B one for all of `outs`.
      conv: A is a kernel: at home, with the rank in place of the output channels.
      groups: of a convolution's channels.
      dropout: the part of the activations that the adapter doesn't see in training.
      dora: there are magnitudes m.
      lifted: sizes of the leading axes of the stored arrays, which scans over layers cut.
      members: (name, (first, count)) of the ranks, where several adapters are stacked; else (). Their B are
        multiplied already.
    """

    home: tuple[int, ...]
    batch: tuple[int, ...]
    ins: tuple[int, ...]
    outs: tuple[int, ...]
    rank: int
    alpha: float
    use_rslora: bool = False
    steps: tuple[Step, ...] = ()
    flat: bool = True
    conv: bool = False
    groups: int = 1
    dropout: float = 0.0
    dora: bool = False
    lifted: tuple[int, ...] = ()
    members: tuple[tuple[str, tuple[int, int]], ...] = ()

    @property
    def scaling(self) -> float:
        """What A B is multiplied by."""
        return 1.0 if self.members else self.scaling_of(self.rank, self.alpha)

    def scaling_of(self, rank: int, alpha: float) -> float:
        return float(alpha / (math.sqrt(rank) if self.use_rslora else rank))

    def sizes(self, axes: Sequence[int]) -> tuple[int, ...]:
        return tuple(self.home[a] for a in axes)

    @property
    def a_shape(self) -> tuple[int, ...]:
        """Of one layer."""
        if self.conv:
            return tuple(self.rank * self.groups if a in self.outs else n for a, n in enumerate(self.home))
        ins = self.sizes(self.ins)
        return (*self.sizes(self.batch), *((math.prod(ins),) if self.flat else ins), self.rank)

    @property
    def b_shape(self) -> tuple[int, ...]:
        """Of one layer."""
        outs = self.sizes(self.outs)
        if self.conv:
            grouped = (self.groups,) if self.groups > 1 else ()
            return (*grouped, self.rank, outs[0] // self.groups)
        return (*self.sizes(self.batch), self.rank, *((math.prod(outs),) if self.flat else outs))

    @property
    def m_shape(self) -> tuple[int, ...]:
        """Of one layer: one for every feature that the weight gives."""
        outs = self.sizes(self.outs)
        return (*self.sizes(self.batch), *((math.prod(outs),) if self.flat and not self.conv else outs))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The arrays of an adapter, and its facts. In a scan over layers they are cut as the weight is."""

    a: jax.Array
    b: jax.Array
    m: jax.Array | None
    spec: AdapterSpec = dataclasses.field(metadata={"static": True})

    def change(self) -> jax.Array:
        """scaling * A B in float32, in the layout of the stored param."""
        spec = self.spec
        change = lambda a, b: weight_steps.undo(spec.steps, _at_home(spec, a, b))
        return _stacked(change, (self.a, self.b), _extra(self.a, spec.a_shape))

    def change_at_home(self) -> jax.Array:
        """The same of one layer, at home."""
        return _at_home(self.spec, self.a, self.b)

    def applied(self, weight: jax.Array) -> jax.Array:
        """The float weight, in the layout of the stored param, with the adapter: in float32."""
        total = weight.astype(jnp.float32) + self.change()
        if self.m is None:
            return total
        spec = self.spec

        def scaled(total: jax.Array, m: jax.Array) -> jax.Array:
            home = weight_steps.apply(spec.steps, total)
            norm = lax.stop_gradient(jnp.sqrt(jnp.sum(jnp.square(home), spec.ins, keepdims=True)))
            m = m.astype(jnp.float32).reshape(spec.sizes((*spec.batch, *spec.outs)))
            m = _placed(m, (*spec.batch, *spec.outs), len(spec.home))
            return weight_steps.undo(spec.steps, home * (m / norm))

        return _stacked(scaled, (total, self.m), _extra(self.a, spec.a_shape))

    def low_rank(
        self, axes: Sequence[int], contracting: Sequence[int], batch: Sequence[int]
    ) -> LowRank | None:
        """A and B as a dot wants them.

        Args:
          axes: for each axis of the weight in the op, where it is at home.
          contracting: the axes in the op, in the order of its dimension numbers.
          batch: the same.

        Returns: None where the op contracts neither the axes of A nor those of B, or has other batch axes.
        """
        spec = self.spec
        contracted = [axes[c] for c in contracting]
        batched = [axes[c] for c in batch]
        kept = [h for i, h in enumerate(axes) if i not in contracting and i not in batch]
        if set(batched) != set(spec.batch) or spec.conv:
            return None
        a = self.a.reshape(*spec.sizes((*spec.batch, *spec.ins)), spec.rank)
        b = self.b.reshape(*spec.sizes(spec.batch), spec.rank, *spec.sizes(spec.outs))
        first, second = (*spec.batch, *spec.ins, "rank"), (*spec.batch, "rank", *spec.outs)
        if set(contracted) == set(spec.outs) and set(contracted) != set(spec.ins):
            (a, b), (first, second) = (b, a), (second, first)
        elif set(contracted) != set(spec.ins):
            return None
        return LowRank(
            ordered(a, first, (*batched, *contracted, "rank")),
            ordered(b, second, (*batched, "rank", *kept)),
            spec.scaling,
        )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CutChange:
    """What an adapter adds to a part of its weight: an array, in the layout of that part."""

    dense: jax.Array


def _at_home(spec: AdapterSpec, a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    highest = lax.Precision.HIGHEST
    if spec.conv:
        (out,) = spec.outs
        a = jnp.moveaxis(a, out, -1).reshape(*spec.sizes(spec.ins), spec.groups, spec.rank)
        b = b.reshape(spec.groups, spec.rank, -1)
        home = jnp.einsum("...gr,gro->...go", a, b, precision=highest)
        home = jnp.moveaxis(home.reshape(*spec.sizes(spec.ins), spec.home[out]), -1, out)
    else:
        many = math.prod(spec.sizes(spec.batch))
        product = jnp.matmul(
            a.reshape(many, -1, spec.rank), b.reshape(many, spec.rank, -1), precision=highest
        )
        order = (*spec.batch, *spec.ins, *spec.outs)
        home = ordered(product.reshape(spec.sizes(order)), order, range(len(order)))
    return spec.scaling * home


def ordered(x: jax.Array, names: Sequence[Any], wanted: Sequence[Any]) -> jax.Array:
    """x, whose axes are called `names`, with its axes as `wanted`."""
    perm = [list(names).index(name) for name in wanted]
    return x if perm == sorted(perm) else x.transpose(perm)


def _placed(x: jax.Array, axes: Sequence[int], ndim: int) -> jax.Array:
    """x, whose axes are those axes of an array of `ndim`, ready to be broadcast against it."""
    order = sorted(range(len(axes)), key=lambda i: axes[i])
    return jnp.expand_dims(x.transpose(order), [a for a in range(ndim) if a not in axes])


def _extra(x: jax.Array, shape: Sequence[int]) -> int:
    """How many leading axes x has over one layer's."""
    return x.ndim - len(shape)


def _stacked(fn: Any, arrays: Sequence[Any], levels: int) -> jax.Array:
    for _ in range(levels):
        fn = jax.vmap(fn)
    return fn(*arrays)
