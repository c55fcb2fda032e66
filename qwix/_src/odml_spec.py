"""What kind of op a node is, as the plan sees it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

from qwix._src import op_search
from qwix._src.odml_graph import NESTED, Node

Kind = Literal["contraction", "compute", "moves", "fuses", "float", "ignore", "nested"]


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """A kind of op.

    Attributes:
      name: which rules and statistics know.
      kind: what the plan does with it.
      operands: indices of the args that are quantized together with it; None: all that are floats.
      fixed: the range of its result for int8, if that is always the same.
      rounds: a move that computes: its result is rounded to the scale again.
      is_activation: a function that LiteRT's kernels apply at their end.
      reason: why it stays float.
    """

    name: str
    kind: Kind
    operands: Sequence[int] | None = None
    fixed: tuple[float, float] | None = None
    rounds: bool = False
    is_activation: bool = False
    reason: str | None = None

    def operands_of(self, node: Node) -> Sequence[int]:
        return range(len(node.args)) if self.operands is None else self.operands

    def fixed_range(self, rule: Any) -> tuple[float, float] | None:
        return self.fixed


_MOVES = ["reshape", "transpose", "broadcast_in_dim", "slice", "squeeze", "rev", "dynamic_slice", "stop_gradient", "convert_element_type", "concatenate", "gather", "split", "expand_dims", "copy", "reduce_max", "reduce_window_max", "pad"]
TABLE = {
    **{name: OpSpec(name, "moves") for name in _MOVES},
    "avg_pool": OpSpec("avg_pool", "moves", rounds=True),
    **{op: OpSpec(op, "contraction") for op in op_search.CONTRACTIONS},
    **{op: OpSpec(op, "nested") for op in NESTED},
    "add": OpSpec("add", "fuses"),
    "add_any": OpSpec("add", "fuses"),
    "sub": OpSpec("subtract", "fuses"),
    "mul": OpSpec("multiply", "fuses"),
    "div": OpSpec("truediv", "fuses"),
    "relu": OpSpec("relu", "fuses", is_activation=True),
    "relu6": OpSpec("relu6", "fuses", is_activation=True),
    "softmax": OpSpec("softmax", "compute", fixed=(0, 255 / 256)),
    "logistic": OpSpec("logistic", "compute", fixed=(0, 255 / 256)),
    "tanh": OpSpec("tanh", "compute", fixed=(-1, 127 / 128)),
    "mean": OpSpec("mean", "compute"),
}


def spec_of(node: Node) -> OpSpec:
    return TABLE.get(node.op) or OpSpec(node.op, "float")
