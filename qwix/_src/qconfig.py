"""Rules (what to quantize, and how) and the base class of everything that carries them out.

A rule is checked when it's made, since a rule that silently matches nothing looks like a model that quantizes
well. The first rule in the list that matches an op's module path and name decides; later ones aren't asked.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import difflib
import itertools
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from flax.core import FrozenDict

from qwix._src import interception
from qwix._src.core import calibration, numerics
from qwix._src.report_records import OpRecord
from qwix._src.utils import flax_util

# Names of ops that JAX models have; kernels may define others with `get_current_rule`.
KNOWN_OPS = ("dot_general", "einsum", "conv_general_dilated", "ragged_dot", "take")

TileSize = int | float | Mapping[int, int | float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationRule:
    """Which ops to quantize, and how.

    Attributes:
      module_path: regular expression that the whole path of a module must match, e.g. 'layers/.*/mlp'.
      op_names: names of ops, e.g. ('dot_general', 'einsum', 'take'); empty means all.
      weight_qtype: format of the weights; None leaves them float.
      act_qtype: format of the activations; None leaves them float.
      tile_size: values that share a scale along the contracted axis: a count, or as a float the fraction of
        the axis; or {axis: size}. None means the whole axis.
      act_static_scale: use one scale, found by calibration, instead of one for each input.
      weight_calibration_method: see `HowToQuantize.calibration_method`.
      act_calibration_method: the same for activations; None means 'absmax'.
      act_batch_axes: axes over which static statistics are averaged.
      double_quantize: store the scales of weights as int8, with a float32 scale for each 256 of them
        (https://arxiv.org/abs/2305.14314): 4.127 bits per value of an nf4 weight with tiles of 64, not 4.5.
        Computed with as scales of the usual dtype, off by up to 1/254 of their block's largest distance
        from the mean. Weights of so few scales that it saves nothing keep them.

    Raises:
      ValueError: at construction, for anything that could never work.

    >>> QuantizationRule(module_path="mlp", weight_qtype="int9")
    Traceback (most recent call last):
    ...
    ValueError: weight_qtype: Cannot use 'int9' as qtype. Did you mean 'int8'? ...
    """

    module_path: str = ".*"
    op_names: Sequence[str] = ()
    weight_qtype: Any = None
    act_qtype: Any = None
    tile_size: TileSize | None = None
    act_static_scale: bool | None = None
    weight_calibration_method: str = "absmax"
    act_calibration_method: str | None = None
    act_batch_axes: Sequence[int] = (0,)
    double_quantize: bool = False

    def __post_init__(self):
        _check_path(self.module_path)
        names = (self.op_names,) if isinstance(self.op_names, str) else tuple(self.op_names)
        if any(not isinstance(name, str) for name in names):
            raise TypeError(f"op_names must be names such as {KNOWN_OPS}, got {self.op_names!r}.")
        object.__setattr__(self, "op_names", names)
        object.__setattr__(self, "act_batch_axes", tuple(self.act_batch_axes))
        for field in ("weight_qtype", "act_qtype"):
            check_field(field, getattr(self, field), numerics.canonical_qtype)
        for field in ("weight_calibration_method", "act_calibration_method"):
            check_field(field, getattr(self, field), calibration.parse_method)
        if isinstance(self.tile_size, Mapping):
            object.__setattr__(self, "tile_size", FrozenDict(self.tile_size))  # hashable
        check_tile_size(self.tile_size)
        _check_double(self.double_quantize, self.weight_qtype)


def _check_double(double_quantize: bool, weight_qtype: Any) -> None:
    if not isinstance(double_quantize, bool):
        raise TypeError(f"double_quantize must be True or False, got {double_quantize!r}.")
    if double_quantize and weight_qtype is None:
        raise ValueError(
            "double_quantize=True quantizes the scales of weights, but weight_qtype is None. Set "
            "weight_qtype, or leave double_quantize out."
        )
    if double_quantize and weight_qtype in numerics.BLOCK_FORMATS:
        raise ValueError(
            f"double_quantize=True can't be used with {weight_qtype!r}, whose scales are numbers of 8 bits "
            "by the format's definition. Take 'nf4' or 'int4', or leave double_quantize out."
        )


def _check_path(pattern: str) -> None:
    if not isinstance(pattern, str):
        raise TypeError(f"module_path must be a regular expression as text, got {pattern!r}.")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"module_path {pattern!r} isn't a regular expression: {error}. To match it literally, use "
            f"re.escape: {re.escape(pattern)!r}."
        ) from error


def check_field(field: str, value: Any, check: Callable[[Any], Any]) -> None:
    """Raises what `check(value)` does, with the field's name."""
    if value is None:
        return
    try:
        check(value)
    except (ValueError, TypeError) as error:
        raise type(error)(f"{field}: {error}") from error


def check_tile_size(tile_size: TileSize | None, name: str = "tile_size") -> None:
    """Raises if this could never be a tile size."""
    sizes = tile_size.values() if isinstance(tile_size, Mapping) else [tile_size]
    for size in sizes:
        if size is None:
            continue
        if isinstance(size, bool) or not isinstance(size, int | float):
            raise TypeError(f"{name} must be a number or {{axis: number}}, got {tile_size!r}.")
        if size <= 0 or (isinstance(size, float) and size > 1):
            raise ValueError(
                f"{name} must be a positive count, or as a float a fraction up to 1.0; got {tile_size!r}."
            )


@dataclasses.dataclass
class Run:
    """One call of a quantized model: the op counters and where in the model we are."""

    provider: QuantizationProvider
    counts: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)

    def op_id(self, path: str, op_name: str, *, repeated: bool = False) -> str:
        """The name of the next (or again of the last) op of this kind in this module."""
        if repeated:
            return f"{op_name}{max(self.counts[path, op_name] - 1, 0)}"
        self.counts[path, op_name] += 1
        return f"{op_name}{self.counts[path, op_name] - 1}"


class _Runs(threading.local):
    def __init__(self) -> None:
        self.stack: list[Run] = []


_runs = _Runs()


def current_run() -> Run | None:
    """The innermost call of a quantized model on this thread."""
    return _runs.stack[-1] if _runs.stack else None


def bookmark() -> Callable[[], None]:
    """Returns what sets the op counters of the current run back to where they are now."""
    run = current_run()
    if run is None:
        return lambda: None
    counts = run.counts.copy()

    def restart() -> None:
        run.counts = counts.copy()

    return restart


def all_runs() -> Sequence[Run]:
    """All calls of quantized models that are going on, on this thread."""
    return tuple(_runs.stack)


@contextlib.contextmanager
def running(provider: QuantizationProvider) -> Iterator[Run]:
    """Marks the duration of one call of a quantized model, in JAX's jit caches too."""
    run = Run(provider)
    _runs.stack.append(run)
    try:
        with interception.trace_context(provider.token):
            yield run
    finally:
        _runs.stack.pop()


def get_current_rule(op_name: str) -> QuantizationRule | None:
    """The rule for an op of this name in the module that is running; None outside of a quantized model.

    For the authors of kernels: `op_name` may be any name, and rules name it in `op_names`.
    """
    run = current_run()
    if run is None:
        return None
    rule = run.provider._get_current_rule_and_op_id(op_name, only_rule=True)[0]
    if rule is not None:
        run.provider._asked_for.add(op_name)
    return rule


class QuantizationProvider:
    """Carries out rules on a model; `qwix.quantize_model` asks it what to do.

    Subclasses say which functions to replace while the model runs (`get_intercept_map`), or which ops of it
    to handle (`op_handler`).

    Attributes:
      records: {(module path, op id): OpRecord}, one per op seen so far.
    """

    _tokens = itertools.count()

    def __init__(self, rules: Sequence[QuantizationRule] | QuantizationRule, *, disable_jit: bool = False):
        rules = self._checked(rules)
        self._rules = [self._init_rule(rule) for rule in rules]
        self._matches = [0] * len(self._rules)
        self._compiled = [re.compile(rule.module_path) for rule in self._rules]
        self._paths_seen: dict[str, None] = {}
        self._ops_seen: set[str] = set()
        self._asked_for: set[str] = set()  # ops whose own code took a rule, by get_current_rule
        self._complete = False
        self._warned: set[str] = set()
        self._token = next(self._tokens)
        self.disable_jit = disable_jit
        self.records: dict[tuple[str, str], OpRecord] = {}
        self.classes: dict[Any, type] = {}  # of converted models, see model_class

    def _checked(self, rules: Any) -> list[QuantizationRule]:
        """The rules as a list. A text or a dict is a sequence, too, but not of rules."""
        if isinstance(rules, QuantizationRule):
            return [rules]
        several = isinstance(rules, Iterable) and not isinstance(rules, str | bytes | Mapping | type)
        listed = list(rules) if several else [rules]
        for rule in listed:
            if not isinstance(rule, QuantizationRule):
                raise TypeError(
                    f"{type(self).__name__} takes a QuantizationRule or a sequence of them, got {rule!r}"
                    f"{f' in {rules!r}' if several else ''}. For example: {type(self).__name__}("
                    "[qwix.QuantizationRule(module_path='.*', weight_qtype='int8')]). qwix.load_rules makes "
                    "rules from dicts or YAML."
                )
        return listed

    @property
    def token(self) -> int:
        """What tells this provider's traces from others' in JAX's caches."""
        return self._token

    def _init_rule(self, rule: QuantizationRule) -> QuantizationRule:
        """Fills in defaults."""
        if rule.act_static_scale is not None and rule.act_qtype is None:
            raise ValueError(
                f"act_static_scale is set to {rule.act_static_scale} but act_qtype is None, in {rule}. Set "
                "act_qtype, or leave act_static_scale out."
            )
        return dataclasses.replace(
            rule,
            act_static_scale=bool(rule.act_static_scale),
            act_calibration_method=rule.act_calibration_method or "absmax",
        )

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k != "_token"} | {"classes": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _token=next(self._tokens))

    def get_intercept_map(self) -> dict[str, Callable[..., Any]]:
        """{dotted path: replacement}: the functions to replace while the model runs."""
        return {
            name: interception.opaque(interception.get_attribute(name))
            for name in ("jax.experimental.pallas.pallas_call", "jax.experimental.pallas.kernel")
            if interception.has_attribute(name)
        }

    def get_interceptors(self) -> list[Callable[[], interception.Interceptor]]:
        """Makers of the interceptors that are active while the model runs, outermost last."""
        return [lambda: interception.Interceptor(self.get_intercept_map(), id=id(self))]

    def process_model_inputs(self, model: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
        """Called before each outermost call of the model; may replace its inputs."""
        return model, args, kwargs

    def process_model_output(self, method_name: str, output: Any) -> Any:
        """Called after each outermost call of the model; may replace its output."""
        del method_name
        self._complete = True
        return output

    def _get_current_rule_and_op_id(
        self, op_name: str, *, only_rule: bool = False, repeated_call: bool = False, path: str | None = None
    ) -> tuple[QuantizationRule | None, str | None]:
        """The rule for this op here, and the op's name within its module.

        `repeated_call` asks again about the same op. `path` says where "here" is, when it isn't the module
        that is running.
        """
        if path is None:
            path = "/".join(map(str, flax_util.get_current_module_path()))
        rule = self.find_rule(path, op_name)
        if only_rule:
            return rule, None
        run = current_run() or Run(self)
        return rule, run.op_id(path, op_name, repeated=repeated_call)

    def find_rule(self, path: str, op_name: str) -> QuantizationRule | None:
        """The first rule that matches, and a note that it did."""
        self._paths_seen.setdefault(path)
        self._ops_seen.add(op_name)
        for i, rule in enumerate(self._rules):
            if (not rule.op_names or op_name in rule.op_names) and self._compiled[i].fullmatch(path):
                self._matches[i] += 1
                return rule
        return None

    def adapter_of(self, plan: Any, weight: Any, args: Sequence[Any], params: Mapping[str, Any]) -> Any:
        """The facts of the adapter that the weight of an op gets; None: it gets none."""
        del plan, weight, args, params
        return None

    def note_quality(self, keys: Sequence[tuple[str, str]], sqnr_db: float | None) -> None:
        """Adds a weight's SQNR to the records of the ops that eat it; None (there are no values) adds
        nothing.
        """
        for key in keys if sqnr_db is not None else ():
            self.records[key] = dataclasses.replace(self.records[key], sqnr_db=sqnr_db)

    def may_match(self, path: str) -> bool:
        """Whether some op of the module might be quantized."""
        return any(
            rule.weight_qtype is not None and compiled.fullmatch(path)
            for rule, compiled in zip(self._rules, self._compiled, strict=True)
        )

    def get_unused_rules(self) -> list[QuantizationRule]:
        """The rules that matched no op.

        Raises:
          ValueError: before the model has run for the first time, when nobody can know.
        """
        if not self._complete:
            raise ValueError(
                "Quantization is not completed yet. Please call `quantize_model` before calling "
                "`get_unused_rules`. (A Linen model completes it when it's first initialized or applied.)"
            )
        return [rule for rule, count in zip(self._rules, self._matches, strict=True) if not count]

    def finish(self) -> None:
        """Called when the whole model has been seen: warns, once each, about what can't be intended."""
        self._complete = True
        for rule in self.get_unused_rules():
            self._warn_once(f"The rule {rule} matched no op. {self._hint(rule)}")

    def _warn_if_nothing(self) -> None:
        """Warns where no op has been quantized, and none has taken a rule to quantize itself."""
        quantized = self._asked_for or any(record.is_quantized for record in self.records.values())
        if self._rules and not quantized:
            self._warn_once(
                f"No op of the model was quantized. `qwix.report` says why for each. {self._hint(None)}"
            )

    def _hint(self, rule: QuantizationRule | None) -> str:
        paths = ", ".join(repr(p) for p in itertools.islice(self._paths_seen, 8)) or "none"
        more = len(self._paths_seen) - 8
        hint = f"Module paths with ops: {paths}" + (f" and {more} more." if more > 0 else ".")
        for name in rule.op_names if rule else ():
            if name not in self._ops_seen:
                near = difflib.get_close_matches(name, {*KNOWN_OPS, *self._ops_seen}, n=1)
                hint += f" No op is called {name!r}" + (f"; did you mean {near[0]!r}?" if near else ".")
                hint += f" Ops seen: {', '.join(sorted(self._ops_seen)) or 'none'}."
        return hint

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)


__all__ = [
    "KNOWN_OPS",
    "QuantizationProvider",
    "QuantizationRule",
    "Run",
    "TileSize",
    "all_runs",
    "bookmark",
    "current_run",
    "get_current_rule",
    "running",
]
