"""Arrays whose types say how they are laid out: those on a mesh with explicit axes.

There an op must be told where its result goes as soon as that doesn't follow from its operands, and every
reshape and transpose on the way, too. Inside of `laid_out` the compiler decides about all of them, and only
the result is given.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding


def sharding_of(x: Any) -> NamedSharding | None:
    """How an array is laid out, if its type says so; else None.

    >>> import jax.numpy as jnp
    >>> sharding_of(jnp.ones(4)) is None
    True
    """
    if not isinstance(x, jax.Array):
        return None
    sharding = jax.typeof(x).sharding
    return sharding if AxisType.Explicit in sharding.mesh.axis_types else None


def laid_out(fn: Callable[..., Any], out_sharding: Any) -> Callable[..., Any]:
    """`fn`, of arrays only, partitioned by the compiler, whose result is laid out as `out_sharding` says.

    Args:
      out_sharding: one for the whole result or a tree of them, as for `jax.sharding.auto_axes`.
    """
    return jax.sharding.auto_axes(fn, out_sharding=out_sharding)
