"""Block sizes for a problem on a chip, from the most specific source that has them.

    explicit argument > `use(...)` context > the user's cache file > the packaged table > the kernel's
    heuristic

The user's file is named by the environment variable QWIX_TUNING_CACHE, else ~/.cache/qwix/tuning.json; the
packaged tables are tuning_tables/<chip>.json. A file is {implementation: {problem key: {field: value}}}, the
user's one with the chip's name round that. A file or an entry that cannot be read warns once and is ignored:
tuning never breaks a program.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import os
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any

from qwix_kernels.chips import Chip
from qwix_kernels.problem import MatmulProblem, Operand

_TABLES = pathlib.Path(__file__).parent / "tuning_tables"
_CONTEXT: contextvars.ContextVar[Any] = contextvars.ContextVar("qwix_tuning_config", default=None)


@contextlib.contextmanager
def use(config: Any) -> Iterator[None]:
    """Makes every kernel lowered inside use `config` where it fits; an explicit argument still wins.

    Lowering happens on the first call of a jitted function: a program that is compiled already is not
    changed.
    """
    token = _CONTEXT.set(config)
    try:
        yield
    finally:
        _CONTEXT.reset(token)


def ambient() -> Any:
    """The config of the innermost `use`, or None."""
    return _CONTEXT.get()


def key(problem: MatmulProblem) -> str:
    """The problem in one line that stays the same between versions: the key of the tables.

    >>> from qwix_kernels.problem import MatmulProblem, Operand
    >>> lhs, rhs = Operand("bfloat16", 1, 8), Operand("int4", 1, 32, "float32", 1, 32)
    >>> key(MatmulProblem(8, 64, 32, lhs, rhs, "bfloat16"))
    'b1 m8 k64 n32 bfloat16 int4[float32:1x32] bfloat16'
    """
    parts = [f"b{problem.batch} m{problem.m} k{problem.k} n{problem.n}"]
    parts += [_operand_key(problem.lhs, problem.batch), _operand_key(problem.rhs, problem.batch)]
    if q := problem.quantize_lhs:
        parts[-2] += f"->{q.dtype}:{q.tile_k}"
    parts.append(problem.out_dtype)
    if problem.rhs_transposed:
        parts.append("nk")
    if problem.precision:
        parts.append(problem.precision)
    return " ".join(parts)


def _operand_key(x: Operand, batch: int) -> str:
    name = x.codebook or x.dtype
    if x.is_quantized:
        name += f"[{x.scale_dtype}:{x.tile_free}x{x.tile_k}{',zero' if x.zero_point else ''}]"
    return name + ("/shared" if x.batch != batch else "")


def candidates(
    problem: Any, chip: Chip, explicit: Any, config_type: type, implementation: str
) -> Iterator[tuple[Any, str]]:
    """(config, source) pairs to try, the most specific first; the heuristic is the caller's.

    Raises TypeError for an explicit config of another type.
    """
    if explicit is not None:
        if not isinstance(explicit, config_type):
            raise TypeError(
                f"config must be a {config_type.__module__}.{config_type.__name__}, got {explicit!r}."
            )
        yield explicit, "explicit"
        return
    if isinstance(ambient(), config_type):
        yield ambient(), "context"
    name = key(problem)
    for path, source, outer in (
        (_user_file(), "user cache", (chip.name,)),
        (_TABLES / f"{chip.name}.json", "packaged", ()),
    ):
        entry: Any = _read(str(path), _stamp(path))
        for step in (*outer, implementation, name):
            entry = entry.get(step) if isinstance(entry, dict) else None
        if entry is None:
            continue
        try:
            yield config_type(**entry), source
        except (TypeError, ValueError) as e:
            _warn_once(f"Ignoring the tuning entry {name!r} of {path}: {e}.")


def save(problem: Any, chip: Chip, implementation: str, config: Any) -> pathlib.Path:
    """Writes `config` (a dataclass) for this problem into the user's cache file and returns the file."""
    path = _user_file()
    table = dict(_read(str(path), _stamp(path)))
    entries = table.setdefault(chip.name, {}).setdefault(implementation, {})
    entries[key(problem)] = {k: v for k, v in vars(config).items() if v is not None}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(table, indent=1, sort_keys=True))
    scratch.replace(path)
    return path


def _user_file() -> pathlib.Path:
    return pathlib.Path(os.environ.get("QWIX_TUNING_CACHE") or "~/.cache/qwix/tuning.json").expanduser()


def _stamp(path: pathlib.Path) -> int:
    """Changes when the file does; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@functools.lru_cache(maxsize=64)
def _read(path: str, stamp: int) -> dict:
    if not stamp:
        return {}
    try:
        table = json.loads(pathlib.Path(path).read_text())
    except (OSError, ValueError) as e:
        _warn_once(f"Ignoring the tuning file {path}: {e}.")
        return {}
    if not isinstance(table, dict):
        _warn_once(f"Ignoring the tuning file {path}: expected a JSON object, got {type(table).__name__}.")
        return {}
    return table


def _warn_once(message: str) -> None:
    if message not in _WARNED:
        _WARNED.add(message)
        warnings.warn(message, stacklevel=3)


_WARNED: set[str] = set()
