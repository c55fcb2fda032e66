"""What a report says of the ops of a model for ODML."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from qwix._src.core import qarray
from qwix._src.odml_graph import Act, Node, is_float
from qwix._src.odml_plan import Plan, Step, feature_axes, weight_side
from qwix._src.report_records import OpRecord, device_bytes


def note(provider: Any, plan: Plan) -> None:
    """Adds a record for each op that was decided about; what only moves values is left out."""
    for node, step in plan.steps.items():
        if step.op_id and step.spec.kind in ("contraction", "compute", "fuses", "float"):
            provider.records.setdefault((node.place.path, step.op_id), _record(node, step))


def _record(node: Node, step: Step) -> OpRecord:
    shapes = [tuple(np.shape(a)) for a in node.args if is_float(a)]
    rule, facts = step.rule, {}
    if step.spec.kind == "contraction" and step.chain:
        facts = _weight(node, rule)
    act_qtype = None if rule is None or step.reason is not None else rule.act_qtype
    return OpRecord(
        path=node.place.path,
        op=step.spec.name,
        op_id=step.op_id,
        lhs_shape=shapes[0] if shapes else None,
        rhs_shape=shapes[1] if len(shapes) > 1 else None,
        rule=rule,
        act_qtype=act_qtype,
        trains=True,
        reason=step.reason,
        **facts,
    )


def _weight(node: Node, rule: Any) -> dict[str, Any]:
    """The bytes of a contraction's weight, float and in the file."""
    weight: Any = node.args[weight_side(node)]
    assert not isinstance(weight, Act)
    float_type = jax.ShapeDtypeStruct(tuple(weight.shape), weight.dtype)
    before = after = device_bytes(float_type)
    how = None
    if rule is not None and rule.weight_qtype is not None:
        how = qarray.HowToQuantize(qtype=rule.weight_qtype, calibration_method=rule.weight_calibration_method)
        scales = max(1, int(np.prod([node.outs[0].shape[a] for a in feature_axes(node)])))
        values = jax.ShapeDtypeStruct(tuple(weight.shape), how.qtype)
        after = device_bytes([values, jax.ShapeDtypeStruct((scales,), np.float32)])
    return {
        "weight_shape": tuple(weight.shape),
        "weight_dtype": str(weight.dtype),
        "how": how,
        "device_bytes_before": before,
        "device_bytes_after": after,
    }
