"""The files that performance_page.py writes, from answers of bench.price."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from bench import page_cells, page_summary, roofline, suites, tpu_compile
from bench.cells import Cell

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECORDED = ROOT / "bench" / "recorded"


def load(path: str | None) -> list[dict[str, Any]]:
    """Answers of bench.price, from a file or from what it remembers of the suite.

    Raises ValueError for a file that is not bench.price's, with what is wrong with it.
    """
    if path is None:
        from bench import cache, pool

        return pool.remembered(
            suites.suite("matmul", tuple(tpu_compile.TOPOLOGY)).cells, cache.default_folder()
        )
    try:
        answers = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"Cannot read {path}: {error}.") from error
    answers = [answers] if isinstance(answers, dict) else answers
    wrong = [
        a for a in answers if not isinstance(a, dict) or not {"chip", "scheme", "m", "k", "n"} <= a.keys()
    ]
    if wrong or not answers:
        raise ValueError(
            f"{path} is no output of `bench.price --out`: {str(wrong[:1] or 'it is empty')[:200]}"
        )
    return answers


def missing(answers: Sequence[Mapping[str, Any]]) -> dict[str, list[Cell]]:
    """The cells of the matmul suite that have no answer, by chip; chips that lack nothing are left out."""
    found = {(*(a[key] for key in ("chip", "scheme", "m", "k", "n")), a.get("batch", 1)) for a in answers}
    lacking: dict[str, list[Cell]] = {}
    for cell in suites.suite("matmul", tuple(tpu_compile.TOPOLOGY)).cells:
        if (cell.chip, cell.scheme, cell.m, cell.k, cell.n, cell.batch) not in found:
            lacking.setdefault(cell.chip, []).append(cell)
    return lacking


def versions() -> str:
    """Of what compiled the programs."""
    return ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "jaxlib", "libtpu"))


def recorded(name: str) -> Any:
    """A file of bench/recorded/, or None where there is none."""
    path = RECORDED / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def build(answers: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Path under docs/ -> content: the page, one page of all cells per chip, and one plot per chip."""
    answers = [{"batch": 1, **answer} for answer in answers]
    chips = [chip for chip in tpu_compile.TOPOLOGY if any(a["chip"] == chip for a in answers)]
    priced = [a for a in answers if "error" not in a]
    files = {
        "performance.md": page_summary.page(
            answers,
            chips=chips,
            lacking={chip: len(cells) for chip, cells in missing(answers).items()},
            versions=versions(),
            cpu=recorded("cpu"),
            compile_time=recorded("compile_time"),
        )
    }
    for chip in chips:
        mine = [a for a in priced if a["chip"] == chip]
        files[f"performance_{chip}.md"] = page_cells.page(chip, [a for a in answers if a["chip"] == chip])
        if mine:
            files[f"figures/roofline_{chip}.svg"] = roofline.svg(chip, mine)
    return files


def differing(files: Mapping[str, str], docs: pathlib.Path) -> list[str]:
    """The files that the folder lacks or has otherwise."""
    same = lambda path, text: path.exists() and path.read_text() == text
    return [name for name, text in files.items() if not same(docs / name, text)]
