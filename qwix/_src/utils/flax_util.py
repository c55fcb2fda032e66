"""What the two module systems of Flax have in common, for code that must work in both.

"The current module" of linen is the top of its module stack; of NNX, it's found by the frames of the Python
stack: the innermost function whose first argument (whatever its name) is an nnx.Module.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
from flax import nnx
from flax.core import meta
from flax.linen import module as linen_module
from jax.sharding import NamedSharding, PartitionSpec

from qwix._src.weight import WeightTracer

Path = tuple[str | int, ...]
# What nnx.iter_modules gives: all modules in a model, and their paths in it.
Modules = Sequence[tuple[Any, nnx.Module]]


class QuantStat(nnx.Variable):
    """Statistics for static-range quantization: {'count', 'sum_of_<key>', ...}, see `SimpleMovingAverage`."""


nnx.register_variable_name("quant_stats", QuantStat, overwrite=True)


class _Paths(threading.local):
    def __init__(self) -> None:
        self.stack: list[dict[int, Path]] = []
        self.linen_roots: list[Path] = []


_paths = _Paths()


@contextlib.contextmanager
def nnx_paths(root: nnx.Module, prefix: Path = (), modules: Modules | None = None) -> Iterator[None]:
    """Inside, NNX modules know their path from `root`, whose own is `prefix`. A shared module has the first
    one. `modules`: those of `root`, where they are known.
    """
    known: dict[int, Path] = {
        id(module): (*prefix, *(p if isinstance(p, int) else str(p) for p in path))
        for path, module in (nnx.iter_modules(root) if modules is None else modules)
    }
    _paths.stack.append(known)
    try:
        yield
    finally:
        _paths.stack.pop()


@contextlib.contextmanager
def linen_root(root: nn.Module | None) -> Iterator[None]:
    """Inside, paths of linen modules are counted from `root`; None: from where the scopes' paths begin."""
    _paths.linen_roots.append(() if root is None else root.path)
    try:
        yield
    finally:
        _paths.linen_roots.pop()


def from_linen_root(path: Path) -> Path:
    """A scope's path as rules see it."""
    root = _paths.linen_roots[-1] if _paths.linen_roots else ()
    return path[len(root) :] if path[: len(root)] == root else path


def nnx_values(
    model: nnx.Module, modules: Modules | None = None
) -> Iterator[tuple[Any, Path, str | int, Any]]:
    """All that modules hold, in their dicts and lists too: (module, dict or list; its path; key; value).

    `modules`: those of `model`, where they are known.
    """

    def walk(owner: Any, path: Path, items: Iterable[tuple[Any, Any]]) -> Iterator[Any]:
        for key, value in items:
            key = key if isinstance(key, int) else str(key)
            if type(value) is dict:
                yield from walk(value, (*path, key), value.items())
            elif type(value) is list:
                yield from walk(value, (*path, key), enumerate(value))
            else:
                yield owner, path, key, value

    for path, module in nnx.iter_modules(model) if modules is None else modules:
        path = tuple(p if isinstance(p, int) else str(p) for p in path)
        yield from walk(module, path, list(vars(module).items()))


def _linen_module() -> nn.Module | None:
    return linen_module._context.module_stack[-1]


def _nnx_modules() -> Iterator[nnx.Module]:
    """The NNX modules whose methods are running, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount:
            first = frame.f_locals.get(code.co_varnames[0])
            if isinstance(first, nnx.Module):
                yield first
        frame = frame.f_back


def _scope(module: nn.Module) -> Any:
    if module.scope is None:
        raise ValueError(f"{type(module).__name__} is not bound to variables.")
    return module.scope


def get_current_module() -> nn.Module | nnx.Module:
    """The module whose method is running. Raises ValueError outside of any."""
    module = _linen_module() or next(_nnx_modules(), None)
    if module is None:
        raise ValueError("Current module is not known: no method of a Flax module is running.")
    return module


def get_current_module_path() -> Path:
    """Its path from the root, e.g. ('layers', 0, 'mlp'); () for the root.

    A copy of an NNX module that a transformation made inside the model has no path of its own: the path is
    then that of the module around it.
    """
    if (linen := _linen_module()) is not None:
        return from_linen_root(linen.path)
    known = _paths.stack[-1] if _paths.stack else {}
    for module in _nnx_modules():
        if id(module) in known:
            return known[id(module)]
    return ()


def find_param(x: Any, ptq_array_type: type | None = None) -> str | None:
    """The name of the current module's param that `x` is; None if it's an activation.

    A weight that was transposed, reshaped or cast is still that weight where the provider sees the model's
    ops; elsewhere only the very array counts. Shapes never do.
    """
    if isinstance(x, WeightTracer):
        return x.info.name
    module = get_current_module()
    if isinstance(module, nn.Module):
        params = dict(_scope(module)._collection("params"))
    else:
        kinds = (nnx.Param,) if ptq_array_type is None else (nnx.Param, ptq_array_type)
        params = {name: value for name, value in vars(module).items() if isinstance(value, kinds)}
    for name, value in params.items():
        if ptq_array_type is not None and isinstance(value, ptq_array_type):
            value = getattr(value, "array", value)
            x = getattr(x, "array", x)
        if unbox(value) is unbox(x):
            return name
    return None


def should_update_quant_stats() -> bool:
    """Whether statistics may change now: linen, 'quant_stats' is mutable and it isn't init; NNX, not
    disabled.
    """
    module = get_current_module()
    if isinstance(module, nn.Module):
        return not module.is_initializing() and module.is_mutable_collection("quant_stats")
    return not getattr(module, "disable_quant_stats_update", False)


def get_or_create_variable(collection: str, name: str, init_fn: Callable[[], Any]) -> Any:
    """A variable of the current module, made by `init_fn` if it isn't there.

    Returns linen's or NNX's variable. Raises ValueError if what's there has other shapes or dtypes.
    """
    module = get_current_module()
    if isinstance(module, nn.Module):
        variable = _scope(module).variable(collection, name, init_fn)
        value = variable.value
    else:
        variable = getattr(module, name, None)
        if variable is None:
            variable = nnx.variable_type_from_name(collection)(init_fn())
            setattr(module, name, variable)
        value = variable.get_value()
    _check_like(name, unbox(value), jax.eval_shape(init_fn))
    return variable


def get_and_delete_variable(collection: str, name: str) -> Any:
    """The value of a variable of the current module, which is then gone; None if there's none."""
    module = get_current_module()
    if isinstance(module, nn.Module):
        value = module.get_variable(collection, name)
        if value is not None and module.is_mutable_collection(collection):
            del _scope(module)._mutable_collection(collection)[name]
        return value
    variable = getattr(module, name, None)
    if not isinstance(variable, nnx.variable_type_from_name(collection)):
        return None
    delattr(module, name)
    return variable.get_value()


def get_or_create_param(
    name: str,
    init_fn: Callable[..., Any],
    *,
    nnx_param_type: type[nnx.Variable] = nnx.Param,
    need_rng: bool = False,
) -> Any:
    """A param of the current module, unboxed, made by `init_fn` (of a key, if `need_rng`) if it isn't
    there.
    """
    module = get_current_module()
    if isinstance(module, nn.Module):
        make = (lambda key: init_fn(key)) if need_rng else (lambda key: init_fn())
        return unbox(_scope(module).param(name, make))
    param = getattr(module, name, None)
    if param is None:
        value = init_fn(make_rng("params")) if need_rng else init_fn()
        param = jax.tree.map(nnx_param_type, value)
        setattr(module, name, param)
    return unbox(param)


def _check_like(name: str, value: Any, expected: Any) -> None:
    facts = lambda tree: jax.tree.map(lambda x: (tuple(x.shape), str(x.dtype)), tree)
    if facts(value) != facts(expected):
        raise ValueError(f"The variable {name!r} holds {facts(value)}, but {facts(expected)} was expected.")


def make_rng(stream: str) -> jax.Array:
    """A fresh key of the current module. NNX: from the attribute `qwix_rngs`."""
    module = get_current_module()
    if isinstance(module, nn.Module):
        return module.make_rng(stream)
    rngs = getattr(module, "qwix_rngs", None)
    if rngs is None:
        raise ValueError(
            "Cannot find rngs in the current module. Please set rngs via "
            "model.set_attributes(qwix_rngs=nnx.Rngs(...))."
        )
    return rngs[stream]()


def is_box(x: Any) -> bool:
    """Whether this is a value with metadata: a linen AxisMetadata or an nnx.Variable."""
    return isinstance(x, meta.AxisMetadata | nnx.Variable)


def unbox(tree: Any) -> Any:
    """The tree without boxes, neither linen's nor NNX's. No sharding constraint is applied, no hook is run.

    >>> unbox({"w": nnx.Param(1), "b": nn.Partitioned(2, names=("x",))})
    {'b': 2, 'w': 1}
    """

    def strip(x: Any) -> Any:
        while is_box(x):
            x = x.get_raw_value() if isinstance(x, nnx.Variable) else _axis_value(x)
        return x

    return jax.tree.map(strip, tree, is_leaf=is_box)


def _axis_value(box: meta.AxisMetadata) -> Any:
    return box.value if hasattr(box, "value") else box.unbox()


def update_sharding(
    spec: Any,
    *,
    shape: Sequence[int] | None = None,
    split: Sequence[int] | None = None,
    merge: Sequence[int] | None = None,
    transpose: Sequence[int | None] | None = None,
) -> Any:
    """The spec (tuple, list or PartitionSpec; the same kind comes back) of a changed array.

    Args:
      spec: one entry per axis.
      shape: the new array's: entries of its axes of size 1 become None.
      split: axes that become two, (entry, None).
      merge: axes that swallow the next one's entry.
      transpose: the order of old axes; None is a new axis.

    >>> update_sharding(("x", "y"), shape=(1, 8))
    (None, 'y')
    """
    if sum(x is not None for x in (split, merge, transpose)) > 1:
        raise ValueError(f"At most one of them: {split=}, {merge=}, {transpose=}.")
    entries = list(spec)
    if split is not None:
        entries = [e for i, a in enumerate(entries) for e in ([a, None] if i in split else [a])]
    if merge is not None:
        entries = [a for i, a in enumerate(entries) if i - 1 not in merge]
    if transpose is not None:
        entries = [None if i is None else entries[i] for i in transpose]
    if shape is not None:
        entries += [None] * (len(shape) - len(entries))
        entries = [None if n == 1 else a for a, n in zip(entries, shape, strict=True)]
    return PartitionSpec(*entries) if isinstance(spec, PartitionSpec) else type(spec)(entries)


def update_boxed(
    boxed: Any,
    *,
    value: Any = None,
    split: Sequence[int] | None = None,
    merge: Sequence[int] | None = None,
    transpose: Sequence[int | None] | None = None,
) -> Any:
    """A box like `boxed` with a new value; its partition names follow the change and the new shape.

    A bare array gives the bare value. Raises ValueError for anything else.
    """
    value = unbox(boxed) if value is None else value
    return reboxed(
        boxed,
        value,
        lambda spec: update_sharding(spec, shape=value.shape, split=split, merge=merge, transpose=transpose),
    )


_NNX_FIELDS, _LINEN_FIELDS = ("out_sharding", "sharding_names"), ("names", "mesh_axes")


def reboxed(boxed: Any, value: Any, change: Callable[[Any], Any]) -> Any:
    """A box like `boxed` with a new value, and its partition names (one entry per axis) changed.

    A bare array gives the bare value. Raises ValueError for anything else.
    """

    def changed(spec: Any) -> Any:
        if isinstance(spec, NamedSharding):
            return NamedSharding(spec.mesh, changed(spec.spec), memory_kind=spec.memory_kind)
        return None if spec is None else change(spec)

    if isinstance(boxed, nnx.Variable):
        metadata = dict(boxed.get_metadata())
        for field in _NNX_FIELDS:
            if metadata.get(field) is not None:
                metadata[field] = changed(metadata[field])
        return type(boxed).from_metadata(value, metadata)
    if isinstance(boxed, meta.AxisMetadata):
        fields: Any = {f: changed(getattr(boxed, f)) for f in _LINEN_FIELDS if hasattr(boxed, f)}
        box: Any = boxed  # a dataclass, as every box of linen is
        return dataclasses.replace(box, value=value, **fields)
    if hasattr(boxed, "shape") and hasattr(boxed, "dtype"):
        return value
    raise ValueError(
        f"Unsupported type: {type(boxed).__name__}. Boxes are linen AxisMetadata or nnx.Variable."
    )


def partition_names(box: Any) -> tuple[Any, ...] | None:
    """The entries (None, a name or a tuple of names) that a box has for its axes; None if it has none.

    >>> partition_names(nn.Partitioned(jax.numpy.ones((4, 8)), names=("data", None)))
    ('data', None)
    """
    if isinstance(box, nnx.Variable):
        metadata = box.get_metadata()
        specs = [metadata.get(field) for field in _NNX_FIELDS]
    else:
        specs = [getattr(box, field, None) for field in _LINEN_FIELDS] if is_box(box) else []
    for spec in specs:
        if spec is not None:
            return tuple(spec.spec if isinstance(spec, NamedSharding) else spec)
    return None


def get_value_from_path(obj: Any, path: Sequence[str | int]) -> Any:
    """Follows dict keys, list indices and attributes; None when something is missing.

    >>> get_value_from_path({"a": [1, 2]}, ("a", 1))
    2
    """
    for key in path:
        if isinstance(obj, Mapping):
            obj = obj.get(key)
        elif isinstance(obj, list | tuple | nnx.List) and isinstance(key, int):
            obj = obj[key] if -len(obj) <= key < len(obj) else None
        else:
            obj = getattr(obj, str(key), None)
        if obj is None:
            return None
    return obj
