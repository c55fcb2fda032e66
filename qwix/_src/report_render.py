"""A report for readers: like rows folded into one, as a rich table, as Markdown.

Rows fold when all but the numbers in their paths and their SQNR agree; the folded row counts its ops, names
the numbers (`layers/{0..29}/mlp/up`), sums the bytes of distinct weights and gives the range of the SQNR.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from qwix._src.report import Report
    from qwix._src.report_rows import Kernel, Row

_NUMBER = re.compile(r"\d+")


@dataclasses.dataclass(frozen=True)
class Folded:
    """Rows that differ only in the numbers of their paths and in their SQNR; `first` stands for them."""

    first: Row
    path: str
    count: int
    bytes_before: int
    bytes_after: int
    sqnr_db: tuple[float, float] | None  # lowest and highest


def fold(rows: Iterable[Row]) -> list[Folded]:
    """Folds like rows, in the order of their first members."""
    groups: dict[object, list[Row]] = collections.defaultdict(list)
    for row in rows:
        groups[dataclasses.replace(row, path=_NUMBER.sub("#", row.path), op_id="", sqnr_db=None)].append(row)
    return [_fold_group(group) for group in groups.values()]


def _fold_group(rows: Sequence[Row]) -> Folded:
    known = [row.sqnr_db for row in rows if row.sqnr_db is not None]
    weights = {(row.path, row.weight): row for row in rows}.values()
    return Folded(
        first=rows[0],
        path=path_pattern([row.path for row in rows]),
        count=len(rows),
        bytes_before=sum(row.bytes_before for row in weights),
        bytes_after=sum(row.bytes_after for row in weights),
        sqnr_db=(min(known), max(known)) if known else None,
    )


def path_pattern(paths: Sequence[str]) -> str:
    """One text for paths that differ only in their numbers.

    >>> path_pattern(["layers/0/up", "layers/1/up", "layers/2/up"]), path_pattern(["a_1/b", "a_5/b"])
    ('layers/{0..2}/up', 'a_{1,5}/b')
    """
    columns = zip(*(map(int, _NUMBER.findall(path)) for path in paths), strict=True)
    parts = iter([_numbers(sorted(set(column))) for column in columns])
    return _NUMBER.sub(lambda _: next(parts), paths[0])


def _numbers(values: Sequence[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    if len(values) > 2 and values[-1] - values[0] == len(values) - 1:
        return f"{{{values[0]}..{values[-1]}}}"
    return f"{{{','.join(map(str, values))}}}"


def facts_header() -> list[str]:
    """The titles of `facts`. `n` counts ops; MB are of their weights, on a device."""
    return ["layer", "n", "op", "shape", "rule", "schema", "scheme", "MB", "SQNR dB"]


def facts(folded: Folded) -> list[str]:
    """What was done to the ops of one folded row."""
    row = folded.first
    return [
        folded.path or "(root)",
        str(folded.count),
        row.op,
        "x".join(map(str, row.shape)) if row.shape is not None else "",
        row.rule.split()[0] if row.rule is not None else "",  # the summary says what the rule is
        row.schema,
        (row.scheme or "") + (f" +rank {row.adapter_rank}" if row.adapter_rank else ""),
        f"{megabytes(folded.bytes_before)} -> {megabytes(folded.bytes_after)}" if row.weight else "",
        _decibels(folded.sqnr_db),
    ]


def kernels_header(report: Report) -> list[str]:
    """The titles of `kernels`; times are static estimates in microseconds per op."""
    return [f"here ({report.here})", *(f"{chip}, us" for chip in report.chips)]


def kernels(folded: Folded, report: Report) -> list[str]:
    """What runs one folded row, here and on the named chips; for float ops why they are."""
    row = folded.first
    if row.reason is not None:
        return [f"float: {row.reason}", *("" for _ in report.chips)]
    return [_kernel(kernel) for kernel in row.kernels]


def _kernel(kernel: Kernel) -> str:
    # Here a clock is better than an estimate.
    timed = kernel.chip != "here" and kernel.static_us is not None
    return f"{kernel.implementation} {kernel.static_us:.3g}" if timed else kernel.implementation


def megabytes(count: int) -> str:
    """Bytes in units of 10^6, with three digits at least.

    >>> megabytes(1_500_000), megabytes(123), megabytes(0)
    ('1.50', '0.000123', '0')
    """
    mb = count / 1e6
    return "0" if count == 0 else f"{mb:.2f}" if mb >= 1 else f"{mb:.3g}"


def _decibels(sqnr_db: tuple[float, float] | None) -> str:
    if sqnr_db is None:
        return ""
    low, high = (f"{value:.1f}" if math.isfinite(value) else str(value) for value in sqnr_db)
    return low if low == high else f"{low}..{high}"


def summary(report: Report) -> list[str]:
    """The lines under the table: totals, the rules, what runs without a kernel and why."""
    t = report.totals
    ratio = f" ({t.bytes_after / t.bytes_before:.3f}x)" if t.bytes_before else ""
    lines = [
        f"{t.quantized_ops} of {t.ops} ops quantized; all their weights: {megabytes(t.bytes_before)} MB -> "
        f"{megabytes(t.bytes_after)} MB on device{ratio}."
    ]
    if t.other_bytes is not None:
        lines.append(f"Parameters that no op above uses: {megabytes(t.other_bytes)} MB.")
    lines += [f"Rule {rule}" for rule in report.rules]
    lines += [f"Rule {rule} MATCHED NOTHING" for rule in report.unused_rules]
    lines += _refusals(report)
    if report.chips and any(row.kernels for row in report.rows):
        lines.append("us: static estimates at the shapes the model was traced with, not measurements.")
    return lines


def _refusals(report: Report) -> list[str]:
    """Why an accelerator runs an op without a kernel made for it."""
    paths: dict[tuple[str, str], list[str]] = collections.defaultdict(list)
    for folded in fold(report.rows):
        for kernel in folded.first.kernels:
            if kernel.chip != "here" and kernel.implementation == "xla":
                for name, reason in kernel.rejected:
                    paths[kernel.chip, f"{name} {reason}"].append(folded.path or "(root)")
    return [f"xla on {chip} for {', '.join(found)}: {reason}." for (chip, reason), found in paths.items()]


def tables(report: Report, width: int | None = None) -> list[Table]:
    """The report as a rich table, or as two where `width` has no room for one."""
    folded = fold(report.rows)
    names = facts_header()
    left, right = [facts(f) for f in folded], [kernels(f, report) for f in folded]
    whole = [*names, *kernels_header(report)], [a + b for a, b in zip(left, right, strict=True)]
    one = _table(report.title, *whole, folded)
    if width is None or natural_width(one) <= width:
        return [one]
    running = [[a[0], a[2], *b] for a, b in zip(left, right, strict=True)]
    return [
        _table(report.title, names, left, folded),
        _table("What runs it", [names[0], names[2], *kernels_header(report)], running, folded),
    ]


def natural_width(table: Table) -> int:
    from rich.console import Console

    return Console(width=10_000).measure(table).maximum


def _table(title: str, names: list[str], rows: list[list[str]], folded: list[Folded]) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    result = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for name in names:
        result.add_column(name, justify="right" if name in ("n", "MB", "SQNR dB") else "left")
    for row, source in zip(rows, folded, strict=True):
        # Texts: a path may hold what rich takes for markup.
        result.add_row(*map(Text, row), style="dim" if source.first.reason is not None else None)
    return result


def markdown(report: Report) -> str:
    """The report as a GitHub-flavoured Markdown table, and the lines under it."""
    names = [*facts_header(), *kernels_header(report)]
    rows = [[*facts(f), *kernels(f, report)] for f in fold(report.rows)]
    lines = [names, ["---"] * len(names), *([text.replace("|", "\\|") for text in row] for row in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([f"## {report.title}", "", table, "", *(f"- {line}" for line in summary(report))]) + "\n"
