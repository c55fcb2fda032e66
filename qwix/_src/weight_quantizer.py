"""Quantizing one weight by one compiled program, in little memory.

The program calibrates, rounds, lays the values out as they are stored, looks for values that aren't finite
and measures what was lost. A weight of more than `2 * CHUNK_BYTES` (on each device) goes through it in
pieces along an axis that scales don't cross, in a loop whose result is written in place: float32 copies are
then those of a piece, never of the weight. The values don't depend on whether it was cut.

On a mesh the arrays of the result are laid out as derived_sharding says, so values stay where they are; a
maximum over an axis that is sharded is one small all-reduce.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from qwix._src import derived_sharding, double_scale, prepack
from qwix._src.core import explicit_mesh, layout, qarray
from qwix._src.core.calibration import parse_method
from qwix._src.core.transposed_qarray import Layout, TransposedQArray

CHUNK_BYTES = 16 * 2**20  # of the float weight, on each device
Stored = qarray.QArray | TransposedQArray


@dataclasses.dataclass(frozen=True)
class Form:
    """How a weight is quantized and stored.

    Attributes:
      how: in the param's layout.
      shape, scale_shape: of the QArray. The scales may be finer than `how` makes them.
      packed: the layout of a TransposedQArray and its side; None for a QArray.
      lead: None, or the axes of stacked layers, for scales that are quantized, too.
    """

    how: qarray.HowToQuantize
    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    packed: tuple[Layout, Any] | None
    lead: tuple[int, ...] | None

    @classmethod
    def like(cls, template: Any, how: qarray.HowToQuantize) -> Form:
        """As a QArray or TransposedQArray, perhaps without data, is stored."""
        shape, scale = tuple(template.shape), template.scale
        lead = scale.lead if isinstance(scale, double_scale.DoubleScale) else None
        if not isinstance(template, TransposedQArray):
            return cls(how, shape, tuple(scale.shape), None, lead)
        stacked = len(shape) - len(template.scale_shape)
        scale_shape = (*shape[:stacked], *template.scale_shape)
        return cls(how, shape, scale_shape, (template.layout, template.side), lead)

    def store(self, quantized: qarray.QArray) -> Stored:
        """The weight as it's stored."""
        stored: Any = with_scale_shape(quantized, self.scale_shape)
        if self.packed is not None:
            stored = TransposedQArray.of(stored, *self.packed)
        return stored if self.lead is None else double_scale.encoded(stored, self.lead)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Along which axis a weight goes through the program in pieces, and how long they are."""

    axis: int
    length: int
    tiles: tuple[tuple[int, int], ...]  # in values, also those that were given as fractions


def quantize_weight(
    array: jax.Array,
    form: Form,
    module: Any = qarray,
    *,
    name: str,
    quality: bool = False,
    shardings: Any = None,
) -> tuple[Any, float | None]:
    """(the weight as it's stored, its SQNR in dB or None).

    Args:
      array: floats, of `form.shape`.
      module: whose `quantize` is used.
      name: of the weight, for errors.
      quality: measure the SQNR; of traced arrays there is none.
      shardings: of the result's arrays, in their places; by default they follow from the array's.

    Raises:
      ValueError: NaN or infinity in a concrete array.
    """
    if isinstance(array, jax.core.Tracer):
        return _traced(array, form, module), None
    sharding = array.sharding if isinstance(array.sharding, NamedSharding) else None
    if shardings is None and sharding is not None:
        shardings = derived_sharding.on_mesh(sharding, abstract(array, form, module))
    program = _program(form, module, cut_of(array, form), quality, *_hashable(shardings))
    stored, facts = program(array)
    facts = np.asarray(facts)  # waits: no more than one weight is under way
    if not facts[:, 0].all():
        qarray.check_finite(array, name)
        raise ValueError(f"{name} of shape {array.shape} holds values that aren't finite.")
    return stored, _decibels(facts) if quality else None


def all_finite(array: jax.Array) -> bool:
    """Whether a concrete array holds neither NaN nor infinity."""
    return bool(_all_finite(array))


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


@functools.lru_cache(maxsize=1024)
def _abstract(shape: tuple[int, ...], dtype: Any, form: Form, module: Any) -> Any:
    whole = lambda x: form.store(module.quantize(x, form.how))
    return jax.eval_shape(whole, jax.ShapeDtypeStruct(shape, dtype))


def abstract(array: Any, form: Form, module: Any = qarray) -> Any:
    """What `quantize_weight` makes of such an array, as shapes."""
    return _abstract(tuple(array.shape), jnp.dtype(array.dtype), form, module)


def with_scale_shape(quantized: qarray.QArray, shape: Sequence[int]) -> qarray.QArray:
    """The same values with scales of another shape, which may be finer."""
    zero_point = quantized.zero_point
    return dataclasses.replace(
        quantized,
        scale=layout.broadcast_array(quantized.scale, shape),
        zero_point=None if zero_point is None else layout.broadcast_array(zero_point, shape),
    )


def _hashable(shardings: Any) -> tuple[tuple[Any, ...] | None, Any]:
    if shardings is None:
        return None, None
    leaves, treedef = jax.tree.flatten(shardings)
    return tuple(leaves), treedef


def _traced(array: jax.Array, form: Form, module: Any) -> Any:
    """In a trace: laid out if the array's type says how, and traced once for all weights that are alike."""
    sharding = explicit_mesh.sharding_of(array)
    shardings = derived_sharding.on_mesh(sharding, abstract(array, form, module)) if sharding else None
    return _program(form, module, None, False, *_hashable(shardings))(array)[0]


@functools.lru_cache(maxsize=1024)
def _program(
    form: Form, module: Any, cut: Cut | None, quality: bool, leaves: tuple[Any, ...] | None, treedef: Any
) -> Callable[[jax.Array], tuple[Any, jax.Array]]:
    """array -> (the stored weight, [pieces, 4] facts of `_facts`)."""

    def run(array: jax.Array) -> tuple[Any, jax.Array]:
        quantized = _whole(array, form, module) if cut is None else _in_pieces(array, form, module, cut)
        stored = form.store(quantized)
        if form.lead is not None:  # what was lost by that, too
            quantized = dataclasses.replace(
                with_scale_shape(quantized, form.scale_shape), scale=prepack.unpack(stored).scale
            )
        return stored, _facts(array, quantized, cut, quality)

    if leaves is None:
        return jax.jit(run)
    mesh = leaves[0].mesh
    shardings = jax.tree.unflatten(treedef, leaves), NamedSharding(mesh, jax.sharding.PartitionSpec())
    if jax.sharding.AxisType.Explicit in mesh.axis_types:
        return jax.jit(explicit_mesh.laid_out(run, shardings))
    return jax.jit(run, out_shardings=shardings)


def _whole(array: jax.Array, form: Form, module: Any) -> qarray.QArray:
    return module.quantize(array, form.how)


def _in_pieces(array: jax.Array, form: Form, module: Any, cut: Cut) -> qarray.QArray:
    """The same, piece by piece. The last piece ends where the array does: it may overlap the one before."""
    how = dataclasses.replace(form.how, tiled_axes=dict(cut.tiles))
    like = _abstract(tuple(array.shape), jnp.dtype(array.dtype), _plain(form), module)
    empty = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), like)

    def step(i: jax.Array, done: qarray.QArray) -> qarray.QArray:
        start = _start(i, array, cut)
        part = module.quantize(lax.dynamic_slice_in_dim(array, start, cut.length, cut.axis), how)

        def write(whole: jax.Array, piece: jax.Array) -> jax.Array:
            run = array.shape[cut.axis] // whole.shape[cut.axis]
            at = start // run if whole.shape[cut.axis] != 1 else 0
            return lax.dynamic_update_slice_in_dim(whole, piece, at, cut.axis)

        return jax.tree.map(write, done, part)

    return lax.fori_loop(0, _pieces(array, cut), step, empty)


def _plain(form: Form) -> Form:
    """The form of what `how` alone makes."""
    scale_shape = qarray.get_scale_shape(form.shape, form.how)
    if parse_method(form.how.calibration_method)[0] == "fixed":
        scale_shape = (1,) * len(form.shape)
    return dataclasses.replace(form, scale_shape=scale_shape, packed=None, lead=None)


def _pieces(array: jax.Array, cut: Cut | None) -> int:
    return 1 if cut is None else -(-array.shape[cut.axis] // cut.length)


def _start(i: jax.Array, array: jax.Array, cut: Cut) -> jax.Array:
    return jnp.minimum(i * cut.length, array.shape[cut.axis] - cut.length)


def _facts(array: jax.Array, quantized: qarray.QArray, cut: Cut | None, quality: bool) -> jax.Array:
    """For each piece: is it finite, its largest magnitude p, and the sums of (w / p)^2 and (error / p)^2."""

    def of(part: jax.Array, represented: qarray.QArray | None, fresh: jax.Array | bool) -> jax.Array:
        finite = jnp.isfinite(part).all().astype(jnp.float32)
        if represented is None:
            return jnp.stack([finite] * 4)
        wide = jnp.where(fresh, part.astype(jnp.float32), 0)
        error = jnp.where(fresh, wide - _represented(represented), 0)
        peak = jnp.max(jnp.abs(wide), initial=0)
        by = jnp.where(peak == 0, 1, peak)
        sums = [jnp.sum(jnp.square(x / by)) for x in (wide, error)]
        return jnp.stack([finite, peak, *sums])

    given = quantized if quality else None
    if cut is None:
        return of(array, given, True)[None]
    rows = lambda x, i: _rows(x, array, _start(i, array, cut), cut)

    def step(i: jax.Array, facts: jax.Array) -> jax.Array:
        first = i * cut.length - _start(i, array, cut)  # what comes before is the previous piece's
        shape = [cut.length if a == cut.axis else 1 for a in range(array.ndim)]
        fresh = jnp.arange(cut.length).reshape(shape) >= first
        part = lax.dynamic_slice_in_dim(array, _start(i, array, cut), cut.length, cut.axis)
        represented = None if given is None else jax.tree.map(lambda x: rows(x, i), given)
        return facts.at[i].set(of(part, represented, fresh))

    count = _pieces(array, cut)
    return lax.fori_loop(0, count, step, jnp.zeros((count, 4), jnp.float32))


def _represented(quantized: qarray.QArray) -> jax.Array:
    """float32 of what it dequantizes to, rounded as that is: a compiler may leave out a cast and back."""
    kind = jnp.finfo(quantized.dtype)
    wide = qarray.dequantize(quantized.astype(jnp.float32))
    return lax.reduce_precision(wide, kind.nexp, kind.nmant) if kind.bits < 32 else wide


def _rows(x: jax.Array, array: jax.Array, start: jax.Array, cut: Cut) -> jax.Array:
    """What a piece of the weight has of its values, scales or zero points."""
    run = array.shape[cut.axis] // x.shape[cut.axis]
    if x.shape[cut.axis] == 1:
        return x
    return lax.dynamic_slice_in_dim(x, start // run, cut.length // run, cut.axis)


def _decibels(facts: np.ndarray) -> float:
    """The SQNR: inf where nothing was lost, nan where something isn't a number."""
    _, peak, signal, noise = np.asarray(facts, np.float64).T
    lost, kept = float((noise * peak**2).sum()), float((signal * peak**2).sum())
    if math.isnan(lost) or math.isnan(kept):
        return math.nan
    return math.inf if lost == 0 else 10 * math.log10(kept / lost)


def cut_of(array: jax.Array, form: Form) -> Cut | None:
    """How to cut a concrete weight; None where it's small, or every axis is crossed by a scale or sharded."""
    shape, how = tuple(array.shape), form.how
    sharding = array.sharding
    local = math.prod(sharding.shard_shape(shape)) * array.dtype.itemsize
    if local < 2 * CHUNK_BYTES or how.noise_fn is not None:
        return None
    spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    whole = [a for a, entry in enumerate(derived_sharding.padded(spec, len(shape))) if entry is None]
    tiles = layout.canonical_tiles(how.tiled_axes, shape)
    free = layout.canonical_axes(tuple(how.channelwise_axes), len(shape))
    if parse_method(how.calibration_method)[0] == "fixed":
        free = tuple(a for a in range(len(shape)) if a not in tiles)
    wanted = local / CHUNK_BYTES
    for axis in whole:
        unit = tiles.get(axis, 1) if axis in tiles or axis in free else shape[axis]
        if shape[axis] // unit >= wanted:  # pieces of as many units as make at most CHUNK_BYTES
            length = int(shape[axis] // unit // wanted) * unit
            return Cut(axis, length, tuple(sorted(tiles.items())))
    return None
