"""A weight on its way through a model: a float array to the model's code, a payload and its history to us.

`tag` marks an array as a weight. Under an `OpTrace` the mark becomes a `WeightTracer` at once; inside any
other JAX transformation (the body of a scan, a jit, a vmap) it's staged as the primitive `tag_p` and
becomes one when that program is evaluated under an `OpTrace`. Outside of both it's simply the dequantized
array.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax._src import core as jcore
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from qwix._src import weight_steps
from qwix._src.adapter import Adapter, CutChange
from qwix._src.core import qarray
from qwix._src.turned import Turned, canonical
from qwix._src.weight_steps import Step


@dataclasses.dataclass(frozen=True)
class WeightInfo:
    """Which param a weight is, and the rule for the ops that eat it.

    Paths don't take part in comparisons: otherwise two equal layers would have different tree structures, and
    neither stacking their params nor sharing a compiled program between them would work.
    """

    path: tuple[str | int, ...] | None = dataclasses.field(compare=False)  # of the module; None: not known
    name: str = dataclasses.field(compare=False)
    rule: Any = None
    # It's several weights: those of layers under vmap, or stacked along another axis than the first.
    mapped: bool = False
    vmapped: int = 0  # how many of its first axes vmap made

    @property
    def module_path(self) -> str | None:
        return None if self.path is None else "/".join(map(str, self.path))

    @property
    def full_path(self) -> str:
        return "/".join(map(str, (*(self.path or ()), self.name)))


class WeightTracer(jcore.Tracer):
    """A weight inside an `OpTrace`. Its payload is a QArray or a float array of the parent trace; what its
    adapter adds, if it has one, isn't in there. `stored` is the payload as it lies: a Turned, if its axes are
    in another order.
    """

    __slots__ = ("_value", "adapter", "info", "steps", "stored")
    aval: Any

    def __init__(
        self,
        trace: Any,
        aval: Any,
        stored: Any,
        info: WeightInfo,
        steps: tuple[Step, ...] = (),
        adapter: Adapter | CutChange | None = None,
    ):
        super().__init__(trace, aval)
        self.stored = stored
        self.adapter = adapter
        self.info = info
        self.steps = steps  # from the stored param to this
        self._value: Any = None

    @property
    def is_quantized(self) -> bool:
        return isinstance(self.stored, qarray.QArray | Turned)

    @property
    def payload(self) -> Any:
        """The QArray or the float array, with the axes of the weight."""
        with jcore.set_current_trace(self._trace.parent):
            return canonical(self.stored)

    @property
    def content(self) -> tuple[Any, Adapter | CutChange | None]:
        """The arrays: what a scan cuts."""
        return self.stored, self.adapter

    def value(self) -> jax.Array:
        """The float array, computed once."""
        if self._value is None:
            with jcore.set_current_trace(self._trace.parent):
                self._value = _adapted(self.payload, self.adapter, self.steps, self.aval.dtype)
        return self._value

    def moved_to(self, trace: Any) -> WeightTracer:
        return WeightTracer(trace, self.aval, self.stored, self.info, self.steps, self.adapter)

    def moved(self, stored: Any, step: Step | None = None, dtype: Any = None) -> WeightTracer:
        """The weight after a step, or with another dtype."""
        shape = self.aval.shape if step is None else step.new
        aval = self.aval.update(shape=tuple(shape), dtype=dtype or self.aval.dtype)
        steps = self.steps + ((step,) if step else ())
        return WeightTracer(self._trace, aval, stored, self.info, steps, self.adapter)

    def varying(self, stored: Any, adapter: Adapter | CutChange | None) -> WeightTracer:
        """The weight with content that inside of shard_map is typed otherwise."""
        aval = typed(self.aval.shape, self.aval.dtype, stored)
        return WeightTracer(self._trace, aval, stored, self.info, self.steps, adapter)

    def as_mapped(self, vmapped: int) -> WeightTracer:
        """Known to be several weights, along its first axes."""
        info = dataclasses.replace(self.info, mapped=True, vmapped=vmapped)
        return WeightTracer(self._trace, self.aval, self.stored, info, self.steps, self.adapter)

    def with_adapter(self, adapter: Adapter | CutChange | None) -> WeightTracer:
        return WeightTracer(self._trace, self.aval, self.stored, self.info, self.steps, adapter)

    def scanned(self) -> Any:
        """Ready to be cut along axis 0: itself, or the float array when its scales or its adapter can't be
        cut.
        """
        if self.adapter is not None and weight_steps.of_layer(self.steps):
            return self.value()
        if isinstance(self.stored, Turned) and self.stored.axes[0] != 0:
            return self.moved(self.payload).scanned()
        leaves = jax.tree.leaves(self.content)
        return self if all(leaf.shape[0] == self.aval.shape[0] for leaf in leaves) else self.value()

    def row(self) -> WeightTracer:
        """What one step of a scan over axis 0 sees; the content is put in by `with_content`."""
        shape = tuple(self.aval.shape)
        return self.moved(None, Step("index", shape, shape[1:], (0,)))

    def with_content(self, content: tuple[Any, Adapter | CutChange | None]) -> WeightTracer:
        stored, adapter = content
        return WeightTracer(self._trace, self.aval, stored, self.info, self.steps, adapter)


def _adapted(
    payload: Any, adapter: Adapter | CutChange | None, steps: Sequence[Step], dtype: Any
) -> jax.Array:
    """The float array that a payload and its adapter stand for, after the steps."""
    if adapter is None:
        return dense(payload, dtype)
    base, inner = dense(payload, jnp.float32), weight_steps.of_layer(steps)
    if isinstance(adapter, CutChange):
        whole = base + adapter.dense
    elif adapter.m is None:
        whole = base + weight_steps.apply(inner, adapter.change())
    else:
        whole = weight_steps.apply(inner, adapter.applied(weight_steps.undo(inner, base)))
    return whole.astype(dtype)


def dense(payload: Any, dtype: Any) -> jax.Array:
    """The float array that a payload stands for."""
    payload = canonical(payload)
    value = qarray.dequantize(payload) if isinstance(payload, qarray.QArray) else payload
    return value if value.dtype == dtype else value.astype(dtype)


def materialize(x: Any) -> Any:
    """The float array of a weight; anything else as it is."""
    return x.value() if isinstance(x, WeightTracer) else x


def tag(payload: Any, info: WeightInfo, adapter: Adapter | None = None) -> jax.Array:
    """Marks a QArray, a Turned or a float array as the param `info`, and returns what a model's code computes
    with.
    """
    leaves, treedef = jax.tree.flatten((payload, adapter))
    return tag_p.bind(*leaves, treedef=treedef, info=info)


tag_p = Primitive("qwix_weight")


def tagged_content(leaves: Sequence[Any], treedef: Any) -> tuple[Any, Adapter | CutChange | None]:
    """The payload and the adapter that were marked."""
    payload, adapter = jax.tree.unflatten(treedef, leaves)
    return payload, adapter


def float_type(payload: Any) -> tuple[tuple[int, ...], Any]:
    """(shape, dtype) of the float array that a payload stands for."""
    if isinstance(payload, qarray.QArray):
        return tuple(payload.qvalue.shape), payload.scale.dtype
    return tuple(payload.shape), payload.dtype


def typed(shape: Sequence[int], dtype: Any, content: Any) -> jcore.ShapedArray:
    """The type of an array made of these: inside of shard_map it varies over what any of them varies over."""
    avals = [jax.typeof(x) if isinstance(x, jax.Array) else x for x in jax.tree.leaves(content)]
    varying = [aval for aval in avals if isinstance(aval, jcore.ShapedArray) and aval.mat.varying]
    if not varying:
        return jcore.ShapedArray(tuple(shape), dtype)
    axes = frozenset().union(*(aval.mat.varying for aval in varying))
    manual = jcore.ManualAxisType(varying=axes)
    return varying[0].update(shape=tuple(shape), dtype=jnp.dtype(dtype), manual_axis_type=manual)


def _impl(*leaves: Any, treedef: Any, info: WeightInfo) -> jax.Array:
    del info
    payload, adapter = tagged_content(leaves, treedef)
    return _adapted(payload, adapter, (), float_type(payload)[1])


def _abstract_eval(*avals: Any, treedef: Any, info: WeightInfo) -> jcore.ShapedArray:
    del info
    content = tagged_content(avals, treedef)
    return typed(*float_type(content[0]), content)


def _batch(args: Sequence[Any], dims: Sequence[Any], *, treedef: Any, info: WeightInfo) -> tuple[Any, int]:
    size = next(a.shape[d] for a, d in zip(args, dims, strict=True) if d is not None)
    moved = [
        jnp.broadcast_to(a, (size, *a.shape)) if d is None else jnp.moveaxis(a, d, 0)
        for a, d in zip(args, dims, strict=True)
    ]
    return tag_p.bind(
        *moved, treedef=treedef, info=dataclasses.replace(info, mapped=True, vmapped=info.vmapped + 1)
    ), 0


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[Any, Any]:
    tangents = [ad.instantiate_zeros(t) for t in tangents]
    return jax.jvp(lambda *leaves: _impl(*leaves, **params), tuple(primals), tuple(tangents))


tag_p.def_impl(_impl)
tag_p.def_abstract_eval(_abstract_eval)
batching.primitive_batchers[tag_p] = _batch
ad.primitive_jvps[tag_p] = _jvp
mlir.register_lowering(tag_p, mlir.lower_fun(_impl, multiple_results=False))
