"""What a program holds, found without running it: ops that a handler decides about, and marks of weights."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from jax._src import core as jcore

from qwix._src.weight import WeightTracer, tag_p

# The ops a handler decides about.
CONTRACTIONS = ("dot_general", "conv_general_dilated", "ragged_dot_general")
JIT = ("jit", "pjit", "closed_call", "core_call")
_INSIDE = (*JIT, "remat2", "scan", "cond", "while", "custom_jvp_call", "custom_vjp_call", "shard_map")

_INTERESTING: weakref.WeakKeyDictionary[jcore.Jaxpr, bool] = weakref.WeakKeyDictionary()


def is_interesting(jaxpr: jcore.Jaxpr) -> bool:
    """Whether a handler would want to see inside. Kernels and the like count as empty."""
    found = _INTERESTING.get(jaxpr)
    if found is None:
        found = any(
            eqn.primitive is tag_p
            or eqn.primitive.name in CONTRACTIONS
            or (eqn.primitive.name in _INSIDE and any(map(is_interesting, _jaxprs(eqn))))
            for eqn in jaxpr.eqns
        )
        _INTERESTING[jaxpr] = found
    return found


def _jaxprs(eqn: jcore.JaxprEqn) -> list[jcore.Jaxpr]:
    return list(jcore.jaxprs_in_params(eqn.params))


def has_tag(jaxpr: jcore.Jaxpr) -> bool:
    return any(eqn.primitive is tag_p or any(map(has_tag, _jaxprs(eqn))) for eqn in jaxpr.eqns)


def scans_weights(jaxpr: jcore.Jaxpr, start: int, xs: Sequence[Any]) -> bool:
    """Whether a scan's body gets weights from the xs, which are its args from `start` on."""
    if any(isinstance(x, WeightTracer) for x in xs):
        return True
    return _tags(jaxpr, [i >= start for i in range(len(jaxpr.invars))])


def _tags(jaxpr: jcore.Jaxpr, given: Sequence[bool]) -> bool:
    """Whether something made of the given inputs is marked as a weight."""
    known = {v for v, g in zip(jaxpr.invars, given, strict=True) if g}
    for eqn in jaxpr.eqns:
        flags = [not isinstance(v, jcore.Literal) and v in known for v in eqn.invars]
        if not any(flags):
            continue
        if eqn.primitive is tag_p:
            return True
        for inner in _jaxprs(eqn) if eqn.primitive.name in _INSIDE else ():
            if _tags(inner, flags[len(flags) - len(inner.invars) :]):
                return True
        known.update(eqn.outvars)
    return False
