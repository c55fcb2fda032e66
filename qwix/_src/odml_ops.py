"""The table of ops: what LiteRT makes of each JAX primitive and of each function that JAX keeps by name.

Found by converting every op alone, with LiteRT's converter 0.5.0 and interpreter 2.3.0, and comparing what
its XNNPACK and builtin kernels compute; tests/providers/test_odml_ops.py does so again. Names are what rules
see.

Invariants
- Every primitive that is not here is `float`: it stays as it is, and breaks the chain of integer ops.
- Ranges that are always the same are those that LiteRT's kernels demand: 1/256 and 1/128 are steps of int8,
  1/32768 is that of int16.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from qwix._src import odml_forms, odml_forms_activations, odml_forms_norms, odml_forms_windows, op_search
from qwix._src.core import numerics

Kind = Literal["contraction", "compute", "moves", "fuses", "float", "ignore", "nested"]
Range = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """A kind of op.

    Attributes:
      name: which rules and statistics know.
      kind: contraction; compute: an integer op of quantized inputs; moves: input and output share a scale;
        fuses: into a contraction before it, else compute; float: LiteRT computes it in floats; ignore: of
        integers and booleans; nested: a program.
      operands: indices of the args that are quantized together with it; None: all that are floats.
      fixed: the range of its result for int8, if that is always the same.
      rounds: a move that computes: its result is rounded to the scale again.
      is_activation: a function that LiteRT's kernels apply at their end.
      qtypes: of activations, which LiteRT has a kernel for.
      form: what is computed in its place where it is quantized: (inner, compute, params, *args) -> results.
        It quantizes constants itself. See odml_forms.py.
      reason: why it stays float.
    """

    name: str
    kind: Kind
    operands: Sequence[int] | None = None
    fixed: Range | None = None
    rounds: bool = False
    is_activation: bool = False
    qtypes: tuple[str, ...] = ("int8", "int16")
    form: Callable[..., list[Any]] | None = None
    reason: str | None = None

    def operands_of(self, node: Any) -> Sequence[int]:
        """The indices of the args that count."""
        return (
            range(len(node.args))
            if self.operands is None
            else [i for i in self.operands if i < len(node.args)]
        )

    def fixed_range(self, rule: Any) -> Range | None:
        """The range of the result under a rule, if it's always the same."""
        if self.fixed is None or rule is None or rule.act_qtype is None:
            return None
        is_wide = numerics.canonical_qtype(rule.act_qtype) == np.dtype("int16")
        return (-32767 / 32768, 32767 / 32768) if is_wide else self.fixed

    def refusal(self, rule: Any) -> str | None:
        """Why a rule can't make the op an integer one; None if it can."""
        if self.kind == "float":
            return self.reason
        if rule is None or rule.act_qtype is None or self.kind == "ignore":
            return None
        qtype = numerics.canonical_qtype(rule.act_qtype)
        name = qtype if isinstance(qtype, str) else np.dtype(qtype).name
        if name in self.qtypes:
            return None
        return f"LiteRT has it for {' and '.join(self.qtypes)}, not for {name}"


_INT8 = ("int8",)
_UNIT = (0.0, 255 / 256)


def _specs(kind: Kind, names: str, **options: Any) -> dict[str, OpSpec]:
    return {name: OpSpec(name, kind, **options) for name in names.split()}


def _floats(reason: str, names: str) -> dict[str, OpSpec]:
    return _specs("float", names, reason=reason)


TABLE: Mapping[str, OpSpec] = {
    **{op: OpSpec(op, "contraction") for op in op_search.CONTRACTIONS},
    **_specs("nested", "scan remat2"),
    # What moves values.
    **_specs(
        "moves", "reshape transpose slice squeeze rev stop_gradient expand_dims copy reduce_max reduce_min"
    ),
    **_specs("moves", "dynamic_slice", operands=(0,)),
    "broadcast_in_dim": OpSpec("broadcast_in_dim", "moves", operands=(0,), form=odml_forms.broadcast),
    "split": OpSpec("split", "moves"),
    "stack": OpSpec("stack", "moves"),
    "tile": OpSpec("tile", "moves"),
    "pad": OpSpec("pad", "moves", operands=(0, 1), form=odml_forms.pad),
    "concatenate": OpSpec("concatenate", "moves", form=odml_forms.concatenate),
    "gather": OpSpec("take", "moves", operands=(0,), qtypes=_INT8),
    "dynamic_update_slice": OpSpec("dynamic_update_slice", "moves", operands=(0, 1), qtypes=_INT8),
    "reduce_window_max": OpSpec("max_pool", "moves", form=odml_forms_windows.max_pool),
    "avg_pool": OpSpec("avg_pool", "moves", rounds=True, form=odml_forms_windows.avg_pool),
    "convert_element_type": OpSpec("convert_element_type", "moves"),
    # Arithmetic.
    "add": OpSpec("add", "fuses", form=odml_forms.add),
    "add_any": OpSpec("add", "fuses", form=odml_forms.add),
    "sub": OpSpec("subtract", "fuses", form=odml_forms.subtract),
    "mul": OpSpec("multiply", "fuses", form=odml_forms.multiply),
    "div": OpSpec("truediv", "fuses", form=odml_forms.divide),
    "neg": OpSpec("negative", "compute", form=odml_forms.negative),
    "max": OpSpec("maximum", "compute", form=odml_forms.maximum),
    "min": OpSpec("minimum", "compute", form=odml_forms.minimum),
    "clamp": OpSpec("clip", "compute", operands=(1,), form=odml_forms.clamp),
    "clip": OpSpec("clip", "compute", operands=(0,), form=odml_forms.clip),
    "select_n": OpSpec("where", "moves", operands=(1, 2, 3, 4), form=odml_forms.select),
    "square": OpSpec("square", "compute", form=odml_forms.square),
    **_specs("compute", "abs sqrt exp"),
    "rsqrt": OpSpec("rsqrt", "compute", form=odml_forms.rsqrt),
    "log": OpSpec("log", "compute", qtypes=_INT8),
    "exp2": OpSpec("exp2", "compute", form=odml_forms.exp2),
    "expm1": OpSpec("expm1", "compute", form=odml_forms.expm1),
    "log1p": OpSpec("log1p", "compute", qtypes=_INT8, form=odml_forms.log1p),
    "integer_pow": OpSpec("power", "compute", form=odml_forms.integer_pow),
    "pow": OpSpec("power", "compute", form=odml_forms.power),
    "cumsum": OpSpec("cumsum", "compute", form=odml_forms.cumsum),
    # Sums.
    "reduce_sum": OpSpec("sum", "compute"),
    "mean": OpSpec("mean", "compute"),
    "reduce_prod": OpSpec("prod", "compute"),
    "norm": OpSpec("norm_op", "compute", operands=(0,), form=odml_forms_norms.norm),
    # Activation functions.
    "relu": OpSpec("relu", "fuses", is_activation=True),
    "relu6": OpSpec("relu6", "fuses", is_activation=True, form=odml_forms_activations.relu6),
    "logistic": OpSpec("logistic", "compute", fixed=_UNIT),
    "tanh": OpSpec("tanh", "compute", fixed=(-1.0, 127 / 128)),
    "softmax": OpSpec("softmax", "compute", fixed=_UNIT),
    "silu": OpSpec("silu", "compute", form=odml_forms_activations.silu),
    "gelu": OpSpec("gelu", "compute", form=odml_forms_activations.gelu),
    "hard_silu": OpSpec("hard_swish", "compute", form=odml_forms_activations.hard_swish),
    "hard_sigmoid": OpSpec("hard_sigmoid", "compute", form=odml_forms_activations.hard_sigmoid),
    "leaky_relu": OpSpec("leaky_relu", "compute", operands=(0,), form=odml_forms.as_it_is),
    "hard_tanh": OpSpec("hard_tanh", "compute", form=odml_forms_activations.hard_tanh),
    "elu": OpSpec("elu", "compute", operands=(0,), form=odml_forms_activations.elu),
    "softplus": OpSpec("softplus", "compute", qtypes=_INT8, form=odml_forms_activations.softplus),
    "log_softmax": OpSpec("log_softmax", "compute", form=odml_forms_activations.log_softmax),
    "_resize": OpSpec("resize", "compute", form=odml_forms_windows.resize),
    # What LiteRT's converter leaves in floats.
    **_floats(
        "LiteRT has a float kernel only", "sin cos tan floor ceil round sign erf erfc erf_inv cbrt rem"
    ),
    **_floats("LiteRT has a float kernel only", "asin acos atan atan2 sinh cosh asinh acosh atanh nextafter"),
    **_floats("LiteRT has no kernel of it", "sort top_k cumprod cummax cummin cumlogsumexp reduce_precision"),
    **_floats(
        "LiteRT's converter compares floats, not integers", "eq ne lt le gt ge argmax argmin is_finite"
    ),
    **_floats("LiteRT sums windows only to average them", "reduce_window_sum reduce_window"),
    **_floats("LiteRT has no kernel that scatters integers", "scatter scatter-add scatter_add"),
    **_floats("what is in it is not looked at", "while cond custom_vjp_call pallas_call"),
    **_specs("ignore", "iota and or not xor random_bits shift_left shift_right_logical population_count"),
}

# Jitted functions that are one op; other names of functions are those of the primitives in them.
_NAMES = "clip relu relu6 silu hard_silu hard_sigmoid hard_tanh leaky_relu elu softplus log_softmax _resize"
FUNCTIONS = frozenset(_NAMES.split())


def spec_of(node: Any, table: Mapping[str, OpSpec] = TABLE) -> OpSpec:
    """What kind of op a node (`op`, `args`, `params`) is.

    >>> from types import SimpleNamespace as Node
    >>> spec_of(Node(op="tanh", args=[], params={})).fixed
    (-1.0, 0.9921875)
    >>> spec_of(Node(op="max", args=[object(), 0.0], params={})).name
    'relu'
    """
    if node.op == "max" and any(_is_zero(arg) for arg in node.args):
        return table["relu"]
    if node.op == "pow" and not _is_root(node.args[1]):
        return dataclasses.replace(table["pow"], qtypes=_INT8)  # by a logarithm
    return table.get(node.op) or OpSpec(node.op, "float", reason="LiteRT has no integer form of it")


def _is_zero(x: Any) -> bool:
    """Whether this is a constant 0."""
    if isinstance(x, jax.core.Tracer) or not isinstance(x, int | float | np.ndarray | np.generic | jax.Array):
        return False
    return np.size(x) == 1 and not np.any(np.asarray(x))


def _is_root(x: Any) -> bool:
    """Whether this is a constant 0.5 or -0.5."""
    if isinstance(x, jax.core.Tracer):
        return False
    return bool(np.all(np.abs(np.asarray(x, np.float32)) == 0.5)) and bool(
        np.ptp(np.asarray(x, np.float32)) == 0
    )
