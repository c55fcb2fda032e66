"""The report: what was quantized, what was not and why, what it saves, and which kernel runs it where.

Everything comes from the records a provider wrote while it saw the model (report_records.py), from the arrays
where they are at hand (report_weights.py) and from the kernels' own dispatch, which needs no device: a report
on a CPU says what a TPU will run. `report_render.py` and `report_plot.py` only show it.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flax import nnx
from qwix_kernels import chips as known_chips

from qwix._src import report_plot, report_render, report_rows, report_weights
from qwix._src.report_records import OpRecord, device_bytes, sqnr_db
from qwix._src.report_rows import Row, Totals

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["OpRecord", "Report", "device_bytes", "report", "sqnr_db"]


@dataclasses.dataclass(frozen=True)
class Report:
    """See `report`. `str(...)` is the table; `rows` holds every op, unfolded."""

    title: str
    rows: tuple[Row, ...]
    here: str  # the chip of this process
    chips: tuple[str, ...]
    rules: tuple[str, ...]  # those that matched, as texts
    unused_rules: tuple[str, ...]  # those that matched nothing
    totals: Totals

    def print(self, console: Console | None = None) -> None:
        """Prints the table, split in two on a narrow terminal, and its totals."""
        from rich.console import Console

        console = console or Console()
        if not console.is_terminal:
            console.out(str(self), highlight=False)
            return
        for table in report_render.tables(self, console.width):
            console.print(table)
        for line in report_render.summary(self):
            console.print(line, markup=False, highlight=False)

    def __str__(self) -> str:
        from rich.console import Console

        # As wide as it needs: a text, unlike a terminal, has no width.
        text = io.StringIO()
        Console(file=text, width=10_000, color_system=None).print(*report_render.tables(self))
        lines = [line.rstrip() for line in text.getvalue().splitlines()]
        return "\n".join([*lines, *report_render.summary(self)])

    def to_markdown(self) -> str:
        """The same table in GitHub-flavoured Markdown."""
        return report_render.markdown(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it. An SQNR that is no finite number becomes the text "inf" or "nan"."""
        result = dataclasses.asdict(self)
        for row in result["rows"]:
            if row["sqnr_db"] is not None and not math.isfinite(row["sqnr_db"]):
                row["sqnr_db"] = str(row["sqnr_db"])
        return result

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draws each weight's SQNR and bytes into a file (.png, .svg, .pdf). Needs matplotlib."""
        report_plot.plot(self, path)


def report(
    model_or_provider: Any, *, chips: Sequence[str] = ("v5e", "v6e", "v7x"), params: Any = None
) -> Report:
    """Says for each op of a quantized model what was done to it, what that saves and what runs it.

    Args:
      model_or_provider: what `quantize_model` returned, or the provider given to it. A Linen model has seen
        its ops once `init`, `apply` or `jax.eval_shape` of either has run.
      chips: which chips to name kernels for, beside the one here. None of them need be present.
      params: the float weights (nested dict, `nnx.State` or float `nnx.Module`), for the SQNR of each weight.
        For Linen also the quantized ones, whose bytes are then counted as they are.

    Raises:
      TypeError: for something that is neither a provider nor a quantized model.
      ValueError: when no op has been seen yet, or for an unknown chip.
    """
    provider = _provider_of(model_or_provider)
    if not provider.records:
        raise ValueError(
            "The provider has seen no op yet. A Linen model is seen when it is first traced: run "
            "jax.eval_shape(model.init, rng, x) before the report. An NNX model is seen by quantize_model."
        )
    given = report_weights.weights_of(params) if params is not None else {}
    stored = (
        report_weights.weights_of(model_or_provider) if isinstance(model_or_provider, nnx.Module) else given
    )
    records = [report_weights.measured(record, stored, given) for record in provider.records.values()]
    rows = report_rows.make_rows(records, provider._rules, chips)
    unused = [id(rule) for rule in provider.get_unused_rules()]
    texts = {id(rule): report_rows.rule_text(rule, provider._rules) for rule in provider._rules}
    used = {report_rows.weight_key(row) for row in rows}
    other = sum(device_bytes(value) for key, value in stored.items() if key not in used) if stored else None
    return Report(
        title=f"Quantization of {type(model_or_provider).__name__}",
        rows=rows,
        here=known_chips.chip().name,
        chips=tuple(chips),
        rules=tuple(text for key, text in texts.items() if key not in unused),
        unused_rules=tuple(texts[key] for key in unused),
        totals=report_rows.make_totals(rows, other),
    )


def _provider_of(model_or_provider: Any) -> Any:
    provider = getattr(type(model_or_provider), "_qwix_provider", model_or_provider)
    if not hasattr(provider, "records"):
        raise TypeError(
            f"A report needs a quantized model or a provider, not {type(model_or_provider).__name__}: "
            "pass what qwix.quantize_model(model, provider) returned, or that provider."
        )
    return provider
