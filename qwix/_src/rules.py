"""Quantization rules from data: a dict, a list of dicts, or YAML or JSON in a file or a text.

The keys are the fields of the rule class and nothing else, so a file says what the code would say. A misspelt
key or a wrong type is an error here, with its place, because a rule that is silently not applied looks
exactly like a model that quantizes badly. Order matters: the first rule that matches a module wins.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import difflib
import functools
import json
import os
import pathlib
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from qwix._src import qconfig

# Configuration files of other programs nest the rules: {"quantization": {"qwix": {"rules": [...]}}}.
_WRAPPERS = ("quantization", "qwix", "rules")
_SUFFIXES = (".yaml", ".yml", ".json")

Source = Mapping[str, Any] | Sequence[Any] | str | os.PathLike[str]


def load_rules[R: qconfig.QuantizationRule](
    source: Source, rule_type: type[R] = qconfig.QuantizationRule
) -> list[R]:
    """Reads quantization rules, in order, for any provider.

    Args:
      source: one rule as a dict; a list of dicts (rule objects among them pass through); a dict whose only
        key is `rules`, `qwix` or `quantization` around such a list; the path of a `.yaml`, `.yml` or `.json`
        file; or the YAML or JSON text itself. YAML needs the package `pyyaml`.
      rule_type: the class of the rules: `QuantizationRule` or a subclass, whose fields are then allowed too.

    Raises:
      ValueError: for an unknown key (with the nearest one), bad YAML or JSON, or a value that the rule
        refuses.
      TypeError: for a value of the wrong type.
      FileNotFoundError: for a path that is not there.
      ImportError: for YAML without `pyyaml`.

    >>> load_rules('[{"module_path": "layers/.*", "weight_qtype": "int8"}]')[0].module_path
    'layers/.*'
    >>> load_rules({"weight_qtyp": "int8"})
    Traceback (most recent call last):
    ...
    ValueError: rules[0] has the unknown key 'weight_qtyp'; did you mean 'weight_qtype'? Known keys: ...
    """
    if not (isinstance(rule_type, type) and issubclass(rule_type, qconfig.QuantizationRule)):
        raise TypeError(f"rule_type must be QuantizationRule or a subclass, got {rule_type!r}.")
    data, label = source, "rules"
    if isinstance(source, str | os.PathLike):
        data, label = _read(source)
    return [_make_rule(entry, rule_type, f"{label}[{i}]") for i, entry in enumerate(_entries(data, label))]


def _read(source: str | os.PathLike[str]) -> tuple[Any, str]:
    """The data of a file or a text, and what to call it in errors."""
    is_path = isinstance(source, os.PathLike) or ("\n" not in source and source.lower().endswith(_SUFFIXES))
    if not is_path:
        return _parse(os.fspath(source), "rules", json_only=False), "rules"
    path = pathlib.Path(source)
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise ValueError(f"Rules are read from {', '.join(_SUFFIXES)} files, got {str(path)!r}.")
    text = path.read_text(encoding="utf-8")
    return _parse(text, str(path), json_only=suffix == ".json"), str(path)


def _parse(text: str, label: str, *, json_only: bool) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if json_only:
            raise ValueError(f"{label} is not JSON: {error}.") from None
    try:
        import yaml
    except ImportError:
        raise ImportError(
            f"{label} is not JSON, and reading YAML needs the package pyyaml: pip install pyyaml."
        ) from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{label} is neither JSON nor YAML: {error}") from None


def _entries(data: Any, label: str) -> Sequence[Any]:
    """The list of rules inside whatever surrounds it."""
    while isinstance(data, Mapping) and len(data) == 1 and next(iter(data)) in _WRAPPERS:
        (data,) = data.values()
    if isinstance(data, Mapping | qconfig.QuantizationRule):
        return [data]
    if isinstance(data, Sequence) and not isinstance(data, str | bytes):
        return data
    raise TypeError(
        f"{label} must hold a rule or a list of rules, got {type(data).__name__}: {_shorten(data)}."
    )


def _make_rule[R: qconfig.QuantizationRule](entry: Any, rule_type: type[R], label: str) -> R:
    if isinstance(entry, rule_type):
        return entry
    if not isinstance(entry, Mapping):
        raise TypeError(
            f"{label} must be a mapping of {rule_type.__name__} fields, got {type(entry).__name__}: "
            f"{_shorten(entry)}."
        )
    known = {f.name: f for f in dataclasses.fields(rule_type) if f.init}
    for key in entry:
        if key not in known:
            raise ValueError(
                f"{label} has the unknown key {key!r}{_nearest(key, known)} Known keys: {', '.join(known)}."
            )
    needed = [n for n, f in known.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [name for name in needed if name not in entry]:
        raise ValueError(f"{label} lacks {', '.join(map(repr, missing))}, which {rule_type.__name__} needs.")
    hints = _hints(rule_type)
    values = {key: _convert(value, hints[key], f"{label}.{key}") for key, value in entry.items()}
    try:
        return rule_type(**values)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{label}: {error}") from error


def _nearest(key: Any, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.4)
    return f"; did you mean {close[0]!r}?" if close else "."


@functools.cache
def _hints(rule_type: type) -> dict[str, Any]:
    return typing.get_type_hints(rule_type)


def _convert(value: Any, hint: Any, label: str) -> Any:
    """The value as the field wants it: a tuple for a list or for one text of it, numbers for keys out of
    JSON."""
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, str) and not _fits(value, hint) and _fits((value,), hint):
        return (value,)
    if isinstance(value, Mapping):
        value = {int(k) if isinstance(k, str) and k.lstrip("-").isdigit() else k: v for k, v in value.items()}
    if not _fits(value, hint):
        raise TypeError(f"{label} must be {_describe(hint)}, got {type(value).__name__}: {_shorten(value)}.")
    return value


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation; true where that cannot be told from the value alone."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, typing.TypeAliasType):
        return _fits(value, hint.__value__)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, arg) for arg in args)
    if origin is typing.Literal:
        return value in args
    if isinstance(origin, type) and issubclass(origin, collections.abc.Mapping):
        return isinstance(value, Mapping) and all(
            _fits(k, args[0]) and _fits(v, args[1]) for k, v in value.items()
        )
    if isinstance(origin, type) and issubclass(origin, collections.abc.Collection):
        return isinstance(value, tuple) and all(_fits(v, args[0]) for v in value)
    if hint in (int, float):  # a bool is no number here, and an int is a fine float
        return isinstance(value, (int, float) if hint is float else int) and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool, type(None)) else True


def _describe(hint: Any) -> str:
    """An annotation in a reader's words: a union as a list of choices."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(_describe(arg) for arg in args))
    if hint is type(None):
        return "None"
    if origin is None and isinstance(hint, type):
        return hint.__name__
    return str(hint).replace("typing.", "").replace("collections.abc.", "")


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
