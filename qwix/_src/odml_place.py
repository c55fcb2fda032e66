"""Where in a model an op is: the path of its module, and the layer of Flax that the module is, if it is one.

Linen's modules leave a mark in JAX's stack of names, which programs inside the model (scan, jit, remat) keep.
NNX's are found by the frames of Python, so what is in such a program belongs to the module around it.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
from flax import nnx

from qwix._src import op_trace
from qwix._src.utils import flax_util

_MARK = re.compile(r"qwix@([^@]*)@([^@]*)@([^@]*)@")
_LAYERS = ("BatchNorm", "LayerNorm", "GroupNorm", "RMSNorm", "InstanceNorm")


class Place(NamedTuple):
    """Where an op is.

    Attributes:
      path: of the module, "layers/0/mlp".
      layer: "LayerNorm" and the like, for what is inside of one of Flax's norms; else "".
      call: tells calls of one module apart.
    """

    path: str
    layer: str
    call: str


def _layer_of(module: Any) -> str:
    kinds = [getattr(nn if isinstance(module, nn.Module) else nnx, name, None) for name in _LAYERS]
    found = [name for name, kind in zip(_LAYERS, kinds, strict=True) if kind and isinstance(module, kind)]
    return found[0] if found else ""


@contextlib.contextmanager
def marking() -> Iterator[None]:
    """Inside, methods of Linen modules leave marks."""
    calls = itertools.count()

    def mark(
        next_fun: Callable[..., Any], args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if module.scope is None:
            return next_fun(*args, **kwargs)
        path = "|".join(map(str, flax_util.from_linen_root(module.path)))
        with jax.named_scope(f"qwix@{path}@{_layer_of(module)}@{next(calls)}@"):
            return next_fun(*args, **kwargs)

    with nn.intercept_methods(mark):
        yield


def current(around: Place | None) -> Place:
    """The place of the op that is being processed. `around`: that of the program it's in, if it is in one."""
    marks = _MARK.findall(op_trace.scope_names())
    if marks:
        path, layer, call = marks[-1]
        return Place(path.replace("|", "/"), layer, call)
    if around is not None:
        return around
    path = "/".join(map(str, flax_util.get_current_module_path()))
    module = next(flax_util._nnx_modules(), None)
    layer = "" if module is None else _layer_of(module)
    return Place(path, layer, str(id(module)) if layer else "")
