"""Writes docs/performance.md, a page of tables per chip and the roofline plots, from priced cells.

    python -m bench.price --suite matmul --out suite.json
    python -m bench.performance_page --json suite.json
    python -m bench.performance_page --json suite.json --check   # exit 1 where docs/ has something else
    python -m bench.performance_page                             # from the answers that bench.price remembers

A suite that is priced in part gives a page all the same, which says what it lacks. The result depends on the
answers, on bench/recorded/ and on the versions of jax and libtpu, and on nothing else: no dates, no machines.
"""

from __future__ import annotations

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags

from bench import page_files

_JSON = flags.DEFINE_string(
    "json", None, "The file of `bench.price --suite matmul --out`; without it, what bench.price remembers."
)
_DOCS = flags.DEFINE_string("docs", str(page_files.ROOT / "docs"), "Folder to write to.")
_CHECK = flags.DEFINE_boolean("check", False, "Write nothing; exit with 1 unless the folder has this page.")


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    try:
        answers = page_files.load(_JSON.value)
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    if not answers:
        sys.exit("Nothing is priced yet: run python -m bench.price --suite matmul --out FILE.")
    files, docs = page_files.build(answers), pathlib.Path(_DOCS.value)
    for chip, cells in page_files.missing(answers).items():
        print(
            f"{chip}: {len(cells)} cells of the suite are not priced, {cells[0]} among them", file=sys.stderr
        )
    stale = page_files.differing(files, docs)
    if _CHECK.value:
        sys.exit(f"Out of date: {', '.join(stale)}." if stale else 0)
    for name in stale:
        (docs / name).parent.mkdir(parents=True, exist_ok=True)
        (docs / name).write_text(files[name])
    print(f"{len(files)} files in {docs}, {len(stale)} of them changed")


if __name__ == "__main__":
    app.run(main)
