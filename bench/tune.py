"""Searches block sizes for TPUs that are not here, and writes the tables that dispatch looks them up in.

    python -m bench.tune --dry-run
    python -m bench.tune --chip v5e --scheme w4a16_g128 --model llama3_8b --m 16,1024
    python -m bench.tune --chip v6e --scheme w8a8 --k 5120 --n 13824 --user
    python -m bench.tune --op conv --chip v6e --scheme w8a8_static --model resnet50
    python -m bench.tune --op ragged --chip v7x --model mixtral_8x7b
    python -m bench.tune --chip v7x --verify

Candidates are compiled and priced as by bench.price, several at a time; answers are kept, so that a run which
was interrupted, or ran out of its budget, goes on where it was. docs/tuning.md says what the tables hold.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from absl import app, flags

from bench import pool, shapes, suites, tpu_compile
from bench.cache import default_folder
from bench.cells import cells_of, check_chips

_OP = flags.DEFINE_enum("op", "matmul", ["matmul", "conv", "ragged"], "Whose blocks to search.")
_CHIP = flags.DEFINE_list("chip", list(tpu_compile.TOPOLOGY), "Chips to tune for.")
_SCHEME = flags.DEFINE_list("scheme", None, "Schemes, for example w8a8,w4a16_g128; by default the main ones.")
_MODEL = flags.DEFINE_list(
    "model",
    None,
    f"Models of bench/shapes.py whose layers to tune, such as {', '.join(shapes.MODELS)} (all).",
)
_K = flags.DEFINE_list("k", None, "Lengths of the sums, instead of --model.")
_N = flags.DEFINE_list("n", None, "Columns of the weight, instead of --model.")
_M = flags.DEFINE_list("m", ["16", "64", "1024"], "Rows: one number for each bucket.")
_CANDIDATES = flags.DEFINE_integer(
    "candidates", 8, "Configs to compile for a problem, besides the heuristic's.", lower_bound=1
)
_JOBS = flags.DEFINE_integer("jobs", os.cpu_count() or 1, "Compiling processes at a time.", lower_bound=1)
_BUDGET = flags.DEFINE_float("budget_minutes", 0, "Stop after this long; what is known by then is written.")
_DRY_RUN = flags.DEFINE_boolean("dry-run", False, "Say what would be compiled; compile and write nothing.")
_OUT = flags.DEFINE_string(
    "out", None, "Folder of the tables, <chip>.json each; the packaged ones if not given."
)
_USER = flags.DEFINE_boolean("user", False, "Write to the user's own file instead (QWIX_TUNING_CACHE).")
_VERIFY = flags.DEFINE_boolean("verify", False, "Price the tables' entries again; fail where one has lost.")
_CACHE = flags.DEFINE_string("cache", default_folder(), "Folder of the answers so far; '': none.")
_RESULTS = flags.DEFINE_string("results", None, "Write every price of this run here, one JSON object a line.")

_MAIN = {"matmul": suites.MAIN_SCHEMES, "conv": shapes.CONV_SCHEMES, "ragged": ("w8a8", "w4a16_g128")}
_SECONDS = 5.0  # one compilation
_SHOWN = 40  # problems of a dry run


def _cells() -> tuple[list[Any], list[str]]:
    """The problems that the flags name, and those left out because a tile does not fit."""
    check_chips(_CHIP.value)
    if _OP.value != "matmul":
        from bench import tune_ops

        given = [flag for flag in ("k", "n", "m") if flags.FLAGS[flag].present]
        if given:
            raise ValueError(f"--op {_OP.value} tunes layers of models; leave out --{', --'.join(given)}.")
        return tune_ops.layer_cells(_OP.value, _CHIP.value, _schemes(), _MODEL.value)
    for model in _MODEL.value or ():
        if model not in shapes.MODELS:
            raise ValueError(f"Unknown model {model!r}; models: {', '.join(shapes.MODELS)}.")
    if bool(_K.value) != bool(_N.value) or (_K.value and _MODEL.value):
        raise ValueError("Give --k and --n, or --model.")
    if _K.value:
        layers = itertools.product(_numbers("k", _K.value), _numbers("n", _N.value))
    else:
        models = _MODEL.value or shapes.MODELS
        layers = ((layer.k, layer.n) for model in models for layer in shapes.MODELS[model])
    layers, ms, left_out, cells = list(dict.fromkeys(layers)), _numbers("m", _M.value), [], []
    for (k, n), name in itertools.product(layers, _schemes()):
        if reason := shapes.scheme(name).misfit(k, n):
            left_out.append(f"{name} {k} x {n}: {reason}")
        else:
            cells += cells_of(_CHIP.value, [name], ms, [(k, n)])
    return cells, left_out


def _schemes() -> Sequence[str]:
    return _SCHEME.value or _MAIN[_OP.value]


def _numbers(flag: str, values: list[str] | None) -> list[int]:
    try:
        return [int(v) for v in values or ()]
    except ValueError:
        raise ValueError(f"--{flag} takes whole numbers, got {','.join(values or ())}.") from None


def plan(searches: Sequence[Any], limit: int, jobs: int, cache: str | None) -> str:
    """What a search would compile at most, and for how long."""
    lines, known = [], 0
    for search in searches[:_SHOWN]:
        configs = search.planned()
        if search.op.name == "matmul":  # of other ops the programs are kept, not the cells
            known += pool.known([search.cell_of(config) for config in configs], cache)
        lines.append(f"{search.cell}: {len(configs)} configs, first {_blocks(configs)}")
    if len(searches) > _SHOWN:
        lines.append(f"and {len(searches) - _SHOWN} more")
    most = len(searches) * (limit + 1)
    minutes = (most - known) * _SECONDS / jobs / 60
    lines.append(
        f"{len(searches)} problems, at most {most} configs, of those above {known} priced before; some "
        f"{minutes:.0f} minutes with --jobs {jobs}, and less where the heuristic is next to the floor."
    )
    return "\n".join(lines)


def _blocks(configs: Sequence[Any]) -> str:
    from bench import tune_report

    return "; ".join(tune_report.blocks(config) for config in configs[:3])


def run(
    searches: Sequence[Any],
    price: Callable[[Sequence[Any]], Iterable[tuple[int, dict[str, Any]]]],
    deadline: float = float("inf"),
) -> None:
    """Advances all searches to their ends, round by round, or until the deadline (of time.monotonic)."""
    active = list(searches)
    while active and time.monotonic() < deadline:
        each = max(1, min(4, 8 // len(active)))
        turn = [(search, config) for search in active for config in search.next(each)]
        for index, answer in price([search.cell_of(config) for search, config in turn]):
            search, config = turn[index]
            search.answers[config] = answer
            _say(search, config, answer)
            if time.monotonic() >= deadline:
                return
        active = [search for search in active if search.next()]


def _say(search: Any, config: Any, answer: dict[str, Any]) -> None:
    what = answer.get("error") or f"{answer['static_us']:.2f} us, {answer['ratio_to_floor']:.3f}x the floor"
    own = "  (heuristic)" if config == search.heuristic else ""
    print(f"{search.cell} {_blocks([config])}: {what}{own}", file=sys.stderr, flush=True)


def write(searches: Sequence[Any], folder: pathlib.Path | None, user: bool) -> dict[pathlib.Path, int]:
    """Writes what the searches found; how many entries went into which file."""
    from qwix_kernels import tuning, tuning_files

    from bench.tune_search import IMPLEMENTATION

    by_file: dict[pathlib.Path, dict[tuple[str, ...], Any]] = {}
    for search in searches:
        entry = search.entry()
        if entry is None:
            continue
        path = tuning.user_file() if user else _table(search.chip, folder)
        levels = (search.cell.chip, IMPLEMENTATION) if user else (IMPLEMENTATION,)
        by_file.setdefault(path, {})[(*levels, search.key)] = entry
    for path, entries in by_file.items():
        tuning_files.update(path, entries)
    return {path: len(entries) for path, entries in by_file.items()}


def _table(chip: Any, folder: pathlib.Path | None) -> pathlib.Path:
    from qwix_kernels import tuning

    return folder / f"{chip.name}.json" if folder else tuning.packaged_file(chip)


@contextlib.contextmanager
def _price(op: str) -> Iterator[Any]:
    """What prices cells of an op."""
    from bench import tune_price

    cache = _CACHE.value or None
    if op == "matmul":
        yield lambda cells: pool.price_unordered(cells, jobs=_JOBS.value, cache=cache)
        return
    with tune_price.pricer(op, _JOBS.value, cache) as price:
        yield price


def main(argv: Sequence[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"Unexpected arguments: {' '.join(argv[1:])}.")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from bench import tune_report, tune_search, tune_verify

    folder = pathlib.Path(_OUT.value) if _OUT.value else None
    try:
        if _VERIFY.value:
            check_chips(_CHIP.value)
            with contextlib.ExitStack() as stack:
                price = lambda cells: tune_verify.by_op(cells, lambda op: stack.enter_context(_price(op)))
                sys.exit(tune_verify.verify(_CHIP.value, lambda chip: _table(chip, folder), price))
        cells, left_out = _cells()
    except ValueError as error:
        raise app.UsageError(str(error)) from None
    searches, refused = tune_search.searches(cells, _CANDIDATES.value, _OP.value)
    for line in (*left_out, *(f"{cell}: {reason}" for cell, reason in refused.items())):
        print(f"left out: {line}")
    if _DRY_RUN.value:
        print(plan(searches, _CANDIDATES.value, _JOBS.value, _CACHE.value or None))
        return
    deadline = time.monotonic() + 60 * _BUDGET.value if _BUDGET.value else float("inf")
    try:
        with _price(_OP.value) as price:
            run(searches, price, deadline)
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
    for path, count in write(searches, folder, _USER.value).items():
        print(f"{path}: {count} entries", file=sys.stderr)
    if _RESULTS.value:
        with open(_RESULTS.value, "w") as file:
            file.writelines(json.dumps(a) + "\n" for s in searches for a in s.answers.values())
    tune_report.show(searches)


if __name__ == "__main__":
    app.run(main)
