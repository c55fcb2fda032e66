"""A param of a model, quantized: its form is settled without arrays first, then its values are put into it.

The form doesn't depend on values, so an abstract model gets what a real one would, and forms of weights that
are alike are worked out once.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax

from qwix._src import derived_sharding, double_scale, prepack
from qwix._src.core import qarray
from qwix._src.model_weights import Found
from qwix._src.prepack import Prepack
from qwix._src.utils import flax_util
from qwix._src.weight_quantizer import Form, quantize_weight, with_scale_shape
from qwix._src.with_aux import WithAux


def create_quantized_param(
    name: str,
    value: Any,
    how: qarray.HowToQuantize,
    *,
    info: Any = None,
    lifted: Sequence[int] = (),
    cut: Sequence[int] = (),
    prepacked: Prepack = False,
    _qarray_module: Any = qarray,
) -> WithAux[Any]:
    """A param, quantized.

    Args:
      name: of the param, for errors.
      value: a float array, or a box of one (nnx.Param, linen Partitioned).
      how: in the layout of `value`.
      info: whose weight it is.
      lifted: axes along which every index must have scales of its own, even where the method shares them.
      cut: axes along which it can be cut when it's stored: scales that are quantized, too, are so for each
        index by itself.
      prepacked: store it as kernels read it (see prepack.py); not where it's sharded along axes that would
        have to be merged into others.

    Returns:
      A WithAux whose QArray's fields are in boxes like that of `value`, with its partition names.
    """
    several = bool(lifted) or (info is not None and info.mapped)
    twice = info is not None and bool(getattr(info.rule, "double_quantize", False))
    form = StoredForm(tuple(lifted), tuple(cut), several, prepacked, twice)
    return quantized_param(name, value, how, form, info=info, _qarray_module=_qarray_module)[0]


@dataclasses.dataclass(frozen=True)
class StoredForm:
    """The arguments of `create_quantized_param` that say how a weight is stored."""

    lifted: tuple[int, ...] = ()
    cut: tuple[int, ...] = ()
    several: bool = False  # layers are stacked in it
    prepacked: Prepack = False
    twice: bool = False  # scales are quantized, too

    @classmethod
    def of(cls, found: Found, prepacked: Prepack) -> StoredForm:
        """That of a weight of a model."""
        twice = bool(getattr(found.info.rule, "double_quantize", False))
        several = bool(found.lifted) or found.info.mapped
        return cls(tuple(found.lifted), tuple(found.cut), several, prepack.of_op(prepacked, found.op), twice)


def quantized_param(
    name: str,
    value: Any,
    how: qarray.HowToQuantize,
    form: StoredForm,
    *,
    info: Any = None,
    quality: bool = False,
    _qarray_module: Any = qarray,
) -> tuple[WithAux[Any], float | None]:
    """(`create_quantized_param`, its SQNR in dB or None). Without data (`jax.ShapeDtypeStruct`), shapes."""
    raw = flax_util.unbox(value)
    try:
        template = _template(tuple(raw.shape), jax.numpy.dtype(raw.dtype), how, form, _qarray_module)
        specs = [flax_util.partition_names(value), getattr(_sharding_of(raw), "spec", None)]
        if not all(spec is None or derived_sharding.survives(spec, template) for spec in specs):
            plain = dataclasses.replace(form, prepacked=False)
            template = _template(tuple(raw.shape), jax.numpy.dtype(raw.dtype), how, plain, _qarray_module)
        if isinstance(raw, jax.ShapeDtypeStruct):
            stored, sqnr = (
                derived_sharding.abstract_on(template, derived_sharding.on_mesh(raw.sharding, template)),
                None,
            )
        else:
            stored, sqnr = quantize_weight(
                jax.numpy.asarray(raw),
                Form.like(template, how),
                _qarray_module,
                name=f"The weight {name!r}",
                quality=quality,
            )
    except ValueError as error:
        raise ValueError(
            f"The weight {name!r} of shape {tuple(raw.shape)} can't be quantized: {error}"
        ) from error
    return WithAux(derived_sharding.boxed(stored, value), how, info), sqnr


def _sharding_of(raw: Any) -> Any:
    return jax.typeof(raw).sharding if isinstance(raw, jax.core.Tracer) else getattr(raw, "sharding", None)


@functools.lru_cache(maxsize=1024)
def _template(
    shape: tuple[int, ...], dtype: Any, how: qarray.HowToQuantize, form: StoredForm, module: Any
) -> Any:
    """What such a weight is stored as, without arrays."""

    def make(array: jax.Array) -> Any:
        quantized = module.quantize(array, how)
        if form.lifted:
            sizes = enumerate(quantized.scale.shape)
            quantized = with_scale_shape(quantized, [shape[a] if a in form.lifted else n for a, n in sizes])
        stored = prepack.prepack(quantized, how, form.prepacked, form.cut if form.several else None)
        return double_scale.double(stored, form.cut) if form.twice else stored

    return jax.eval_shape(make, jax.ShapeDtypeStruct(shape, dtype))
