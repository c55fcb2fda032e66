"""What forms quantize their tensors with: the scales of an op's own tensors, by the executor's quantizer."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qwix._src import odml_quantizers
from qwix._src.odml_graph import Act, Node, is_float
from qwix._src.odml_plan import Request, Step


class NodeInner:
    """`odml_forms.Inner` of a node.

    Args:
      values: the executor's.
      node, step: the op, which a rule quantizes.
      scale: of what a move moves.
    """

    def __init__(self, values: Any, node: Node, step: Step, scale: Any = None, rule: Any = None):
        self.values, self.node, self.step, self.scale = values, node, step, scale
        self.rule: Any = rule if rule is not None else step.rule
        wanted = getattr(self.rule, "act_qtype", None)
        self.qtype = odml_quantizers.qtype_name(wanted) if scale is None else scale.qtype
        known = [i for i, a in enumerate(node.args) if is_float(a) and not isinstance(a, Act)]
        self.constants = frozenset(known)
        first = node.args[0]
        self.moved = isinstance(first, Act) and first.node.op in (
            "reshape",
            "squeeze",
            "expand_dims",
            "slice",
        )

    def __call__(
        self,
        name: str,
        x: Any,
        *,
        fixed: tuple[float, float] | None = None,
        qtype: str | None = None,
        positive: bool = False,
    ) -> Any:
        scale = self._scale(name, x, fixed, qtype)
        out = self.values.quantizer.apply(x, scale)
        if not positive:
            return out
        step = np.asarray(scale.step) if self.values.call.converts else scale.step
        least = jnp.maximum(out, jnp.asarray(step, x.dtype).reshape(()))
        return self.values.quantizer.apply(least, scale)

    def constant(self, x: Any, qtype: str | None = None) -> Any:
        small = _small(x) if self.values.call.converts else x
        scale = self.values.quantizer.of_weight(
            small, qtype or self.qtype, self._method(qtype or self.qtype), None
        )
        return self.values.quantizer.apply(small, scale)

    def ends(self, i: int) -> tuple[Any, Any]:
        scale = self.scale if self.scale is not None else self.values.scale(self.step.reads[i])
        top = scale.ends.get("max", scale.ends.get("absmax"))
        low = scale.ends.get("min", -top)
        return jnp.reshape(low, ()), jnp.reshape(top, ())

    def wide(self, name: str, x: Any) -> Any:
        """LiteRT's converter takes two types of one tensor for one; a reshape between makes them two."""
        scale = self._scale(name, x, None, "int16")
        flat = jnp.reshape(self.values.quantizer.apply(x, scale), (1, -1) if x.ndim == 1 else (-1,))
        return jnp.reshape(self.values.quantizer.apply(flat, scale), x.shape)

    def widened(self, name: str, x: Any, i: int = 0) -> Any:
        scale, given = self._scale(name, x, None, "int16"), self.values.scale(self.step.reads[i])
        if given.qtype == "int16":
            return x
        flat = jnp.reshape(x, (1, -1) if x.ndim == 1 else (-1,))
        flat = self.values.quantizer.apply(flat, given) if self.values.call.converts else flat
        return jnp.reshape(self.values.quantizer.apply(flat, scale), x.shape)

    def again(self, x: Any) -> Any:
        return self.values.quantizer.apply(x, self.scale)

    def _method(self, qtype: str) -> str:
        return "absmax" if qtype == "int16" else "minmax"

    def _scale(self, name: str, x: Any, fixed: tuple[float, float] | None, qtype: str | None) -> Any:
        qtype = qtype or self.qtype
        if fixed is not None and qtype == "int16":
            end = max(map(abs, fixed))
            end = 32767 / 32768 if end in (127 / 128, 255 / 256) else end
            fixed = (-end, end)
        rule = dataclasses.replace(self.rule, act_qtype=qtype)
        request = Request((self.node, 0), self.node.place.path, f"{self.step.op_id}_{name}", rule, fixed)
        return self.values.quantizer.of_request(request, lambda: x)


def _small(x: Any) -> Any:
    """A constant, with an axis of 1 where it's the same along one."""
    if isinstance(x, jax.core.Tracer):
        return x
    array = np.asarray(x)
    for axis in range(array.ndim):
        first = array[tuple(slice(0, 1) if a == axis else slice(None) for a in range(array.ndim))]
        if array.shape[axis] > 1 and (array == first).all():
            array = first
    return array
