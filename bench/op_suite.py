"""What the suites of single ops share: a plan, the list of known misses, JSON and a table. Needs no jax."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from bench import child, misses
from bench.targets import Miss


class Row(Protocol):
    """One cell's figures."""

    @property
    def cell(self) -> Any: ...

    @property
    def error(self) -> str:
        """Why there are none, or ""."""
        ...

    def as_json(self) -> dict[str, Any]:
        """Everything, flat."""
        ...


@dataclasses.dataclass(frozen=True)
class OpSuite[R: Row]:
    """The cells of one op, and what they are held to.

    Attributes:
      chips: that the whole suite is of.
      cells: (chips, schemes; none for all) -> cells. Raises ValueError for those that are not known.
      seconds: of a processor that a cell takes.
      price: (cells, folder of the answers so far) -> rows, in the order of the cells.
      found_misses: every target that a row misses.
      show: prints the table.
      file: of the misses that are known.
      ladder: where the strategies that were tried stand.
    """

    chips: tuple[str, ...]
    cells: Callable[[Sequence[str], Sequence[str]], list[Any]]
    seconds: int
    price: Callable[[Sequence[Any], str | None], Iterator[R]]
    found_misses: Callable[[Sequence[R]], list[Miss]]
    show: Callable[[Sequence[R]], None]
    file: pathlib.Path
    ladder: str

    def checked(self, rows: Sequence[R], complete: Sequence[str]) -> tuple[list[str], list[str]]:
        """(what fails, what is known and still so). `complete`: chips whose whole suite was priced."""
        return misses.against(self.found_misses(rows), misses.load(self.file), complete)

    def write_misses(self, rows: Sequence[R], complete: Sequence[str]) -> None:
        """Rewrites the list of known misses for these chips."""
        drafted = misses.draft(self.found_misses(rows), misses.load(self.file), complete)
        misses.save([entry | {"ladder": self.ladder} for entry in drafted], self.file)


def plan(wanted: Sequence[Any], seconds: int) -> str:
    """What would be compiled, in words.

    >>> print(plan(["v6e w8a8"], 50))
    v6e w8a8
    1 cells: about 1 minutes of one processor, if none is known
    """
    minutes = math.ceil(seconds * len(wanted) / 60)
    last = f"{len(wanted)} cells: about {minutes} minutes of one processor, if none is known"
    return "\n".join([*map(str, wanted), last])


def dumps(rows: Iterable[Row]) -> str:
    """As JSON."""
    return json.dumps([row.as_json() for row in rows], indent=1)


def print_table[R: Row](
    title: str,
    texts: Sequence[str],
    numbers: Sequence[str],
    rows: Iterable[R],
    line: Callable[[R], Sequence[str]],
    note: Callable[[R], str] = lambda row: "",
) -> None:
    """Prints a line for each row, and below the table what is noted of them and why some have no figures.

    Args:
      texts, numbers: the columns, the first ones aligned left and the others right.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for column in texts:
        table.add_column(column, no_wrap=True)
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    notes = []
    for row in rows:
        if not row.error:
            table.add_row(*line(row))
        if said := row.error or note(row):
            notes.append(f"{row.cell}: {said}")
    console = Console(width=max(200, Console().width))
    console.print(table)
    for said in notes:
        console.print(said, markup=False, highlight=False)


class Worker:
    """A compiling process (child.py), started when it is needed and again where one died."""

    def __init__(self, module: str, arguments: Sequence[str], log: str):
        self._module, self._arguments, self._log = module, arguments, log
        self._child: child.Child | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """What it answers; `error` is why there is nothing."""
        if self._child is None:
            self._child = child.Child(self._module, self._arguments, self._log)
        answer = self._child.request(request)
        if answer is None:
            answer = {"error": f"the compiler died: {self._child.last_words()}"}
            self.close()
        return answer

    def close(self) -> None:
        if self._child is not None:
            self._child.close()
            self._child = None
