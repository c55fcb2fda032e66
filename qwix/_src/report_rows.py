"""The lines of a report: one record, in the words and numbers that a reader wants.

Which kernel runs an op is asked of the kernels' own dispatch, with the very problem that the op will hand to
it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from qwix_kernels import dispatch

from qwix._src.report_records import OpRecord, Problem


@dataclasses.dataclass(frozen=True)
class Kernel:
    """What runs one op on one chip."""

    chip: str  # as it was asked for; "here" for the device of this process
    implementation: str
    static_us: float | None  # the compiler's or the model's estimate, never a measurement
    rejected: tuple[tuple[str, str], ...] = ()  # (implementation, why not)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One op. `reason` is None exactly when it is quantized; bytes are of its weight, on a device."""

    path: str
    op: str
    op_id: str
    weight: str | None
    shape: tuple[int, ...] | None  # of the weight, else of the right operand
    rule: str | None  # its index and its module_path
    schema: str  # "weight-only", "dynamic-range", "static-range" or "float"
    scheme: str | None  # such as "w8a8", "wnf4a16_g64" or "w8a16 K-major"
    bytes_before: int
    bytes_after: int
    sqnr_db: float | None
    kernels: tuple[Kernel, ...]  # here, then the named chips; empty for a float op
    reason: str | None
    adapter_rank: int | None  # of the weight's adapter


@dataclasses.dataclass(frozen=True)
class Totals:
    """Sums over the report; a weight that several ops use counts once."""

    ops: int
    quantized_ops: int
    bytes_before: int
    bytes_after: int
    other_bytes: int | None  # params that no op of the report uses; None when the params are not at hand


def make_rows(records: Iterable[OpRecord], rules: Sequence[Any], chips: Sequence[str]) -> tuple[Row, ...]:
    """The rows, with the kernels of each distinct problem looked up once."""
    kernels = functools.cache(functools.partial(_kernels, chips=tuple(chips)))
    return tuple(_row(record, rules, kernels) for record in records)


def _row(record: OpRecord, rules: Sequence[Any], kernels: Callable[..., tuple[Kernel, ...]]) -> Row:
    return Row(
        path=record.path,
        op=record.op,
        op_id=record.op_id,
        weight=record.weight,
        shape=record.weight_shape if record.weight_shape is not None else record.rhs_shape,
        rule=_rule_name(record.rule, rules) if record.rule is not None else None,
        schema=_schema(record),
        scheme=_scheme(record),
        bytes_before=record.device_bytes_before,
        bytes_after=record.device_bytes_after,
        sqnr_db=record.sqnr_db,
        kernels=kernels(record.problem) if record.is_quantized else (),
        reason=record.reason,
        adapter_rank=record.adapter_rank,
    )


def _rule_name(rule: Any, rules: Sequence[Any]) -> str:
    return f"#{rules.index(rule)} {rule.module_path}"


def rule_text(rule: Any, rules: Sequence[Any]) -> str:
    """A rule in a line: "#0 layers/.* [dot_general]: weights int4 by absmax, tiles of 64."."""
    what = []
    if rule.weight_qtype is not None:
        what.append(f"weights {_name(rule.weight_qtype)} by {rule.weight_calibration_method}")
    if rule.act_qtype is not None:
        static = "static " if rule.act_static_scale else ""
        what.append(f"activations {static}{_name(rule.act_qtype)} by {rule.act_calibration_method}")
    if rule.tile_size is not None:
        what.append(f"tiles of {rule.tile_size}")
    if hasattr(rule, "rank"):
        what.append(f"adapters of rank {rule.rank}")
    ops = f" [{', '.join(rule.op_names)}]" if rule.op_names else ""
    return f"{_rule_name(rule, rules)}{ops}: {', '.join(what) or 'stays float'}."


def _schema(record: OpRecord) -> str:
    if not record.is_quantized:
        return "float"
    if record.act_qtype is None:
        return "weight-only"
    static = record.rule is not None and record.rule.act_static_scale and record.dynamic_because is None
    return "static-range" if static else "dynamic-range"


def _scheme(record: OpRecord) -> str | None:
    if not record.is_quantized:
        return None
    weight = record.how.qtype if record.how is not None else record.weight_dtype
    acts = [] if record.act_qtype is None else [f"activations {_name(record.act_qtype)}"]
    text = ", ".join([*([] if weight is None else [_name(weight)]), *acts])
    text = record.problem.scheme if record.problem is not None else text
    text = text if record.bwd_qtype is None else f"{text}, gradients {_name(record.bwd_qtype)}"
    return f"{text} K-major" if record.k_major else text


def _name(qtype: Any) -> str:
    return qtype if isinstance(qtype, str) else getattr(qtype, "__name__", str(qtype))


def _kernels(problem: Problem | None, *, chips: tuple[str, ...]) -> tuple[Kernel, ...]:
    if problem is None:
        return tuple(Kernel(chip, "xla", None) for chip in ("here", *chips))
    return tuple(_kernel(problem, chip) for chip in ("here", *chips))


def _kernel(problem: Problem, chip: str) -> Kernel:
    found = dispatch.explain(problem, None if chip == "here" else chip)
    static_us = found.estimate.static_us if found.estimate is not None else None
    return Kernel(chip, found.chosen, static_us, tuple(tuple(pair) for pair in found.rejected))


def weight_key(row: Row) -> str | None:
    """Where the row's weight lies in the model, as in report_weights.py."""
    if row.weight is None:
        return None
    return f"{row.path}/{row.weight}" if row.path else row.weight


def make_totals(rows: Sequence[Row], other_bytes: int | None) -> Totals:
    weights = {weight_key(row): row for row in rows if row.weight is not None}.values()
    return Totals(
        ops=len(rows),
        quantized_ops=sum(row.reason is None for row in rows),
        bytes_before=sum(row.bytes_before for row in weights),
        bytes_after=sum(row.bytes_after for row in weights),
        other_bytes=other_bytes,
    )
