"""What quantized collectives put on the wire: whole bytes, the same on every backend.

Backends widen narrow types in collectives as they see fit: XLA:CPU sends int4 as int8 and fp8 as float16. So
values travel as bytes here: fp8 under the name of uint8, 4-bit values two to a byte, the first half of an
axis in the low bits and the second half in the high ones. (Neighbours together would need an axis of two,
which a TPU's memory layout pads to 128.) Scales travel as what they are.

Everything runs where mesh axes are bound, inside `jax.shard_map`, whether or not it checks which values vary
over which axis (`check_vma`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qwix_kernels.problem import dtype_bits

AxisName = str | tuple[str, ...]


def bound_axes(axis_name: AxisName, op: str) -> tuple[tuple[str, ...], int]:
    """The names, and over how many devices they go.

    Raises ValueError where one of them isn't bound, saying which are.
    """
    axes = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    if not axes or len(set(axes)) < len(axes):
        raise ValueError(f"{op} takes the name of a mesh axis or several different ones, not {axis_name!r}.")
    size = 1
    for axis in axes:
        try:
            size *= jax.lax.axis_size(axis)
        except NameError:
            raise ValueError(_unbound(axis, op)) from None
    return axes, size


def _unbound(axis: str, op: str) -> str:
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        there = ", ".join(map(repr, mesh.manual_axes))
        return f"{op}: no mesh axis {axis!r} here; this jax.shard_map is over {there}."
    has = f" The mesh in scope has {', '.join(map(repr, mesh.axis_names))}." if mesh.axis_names else ""
    return (
        f"{op} was called outside of jax.shard_map, where no mesh axis {axis!r} is bound. Wrap the function "
        f"in jax.shard_map over a mesh with that axis.{has}"
    )


def varying_axes(x: jax.Array) -> frozenset[str]:
    """The axes that `x` differs over, as far as its type says."""
    aval = jax.typeof(x)
    return frozenset(aval.mat.varying if hasattr(aval, "mat") else aval.vma)  # jax 0.12, and before


def varying(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """The same array, of a type that may differ over `axes`."""
    missing = tuple(a for a in axes if a not in varying_axes(x))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def all_gather(x: jax.Array, axes: tuple[str, ...], *, to: str) -> jax.Array:
    """Everyone's values, [devices, *shape]. `to`: as for `jax.lax.all_gather`."""
    return _carried(x, lambda wire: jax.lax.all_gather(varying(wire, axes), axes, to=to))


def all_to_all(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Row i of [devices, ...] to device i; row i of what is returned came from there."""
    return _carried(x, lambda wire: jax.lax.all_to_all(varying(wire, axes), axes, 0, 0, tiled=True))


def _carried(x: jax.Array, send: Any) -> jax.Array:
    bits = dtype_bits(x.dtype.name)
    if bits == 4:
        return unpacked(send(packed(x)), x.dtype, x.shape[-1])
    if bits == 8 and not jnp.issubdtype(x.dtype, jnp.integer):
        return jax.lax.bitcast_convert_type(send(jax.lax.bitcast_convert_type(x, jnp.uint8)), x.dtype)
    return send(x)


def packed(x: jax.Array) -> jax.Array:
    """4-bit values [..., n] as uint8 [..., ceil(n / 2)]: value i with value i + ceil(n / 2).

    >>> packed(jnp.array([1, 2, 3], jnp.int4))
    Array([49,  2], dtype=uint8)
    """
    nibbles = jax.lax.bitcast_convert_type(x, jnp.uint4).astype(jnp.uint8)
    if nibbles.shape[-1] % 2:
        nibbles = jnp.pad(nibbles, [(0, 0)] * (x.ndim - 1) + [(0, 1)])
    low, high = jnp.split(nibbles, 2, axis=-1)
    return low | (high << 4)


def unpacked(x: jax.Array, dtype: np.dtype, size: int) -> jax.Array:
    """What `packed` was given: `size` values of a 4-bit `dtype` along the last axis.

    >>> unpacked(jnp.array([49, 2], jnp.uint8), jnp.dtype(jnp.int4), 3)
    Array([1, 2, 3], dtype=int4)
    """
    nibbles = jnp.concatenate([x & 15, x >> 4], axis=-1)[..., :size].astype(jnp.uint4)
    return jax.lax.bitcast_convert_type(nibbles, dtype)
