"""`pl.pallas_call` for kernels whose arguments may be QArrays.

One block spec says which part of a QArray a kernel wants; the specs of its scale and zero point follow from
it (pallas_specs.py), in a layout that a TPU takes (pallas_tpu_layout.py). The kernel gets a QArray of refs,
so `q_ref[...]` is the QArray of that block, ready for `qwix.pallas.dot_general`.

Plain arguments, outputs, scratch shapes and scalar prefetch are Pallas's own business and stay untouched, and
so does the caller's grid_spec. An output may be a QArray too; its specs are derived in the same way.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import pallas as pl

from qwix._src.core import pallas_specs, pallas_tpu_layout, qarray


def pallas_call(
    kernel: Callable[..., None],
    out_shape: Any,
    *,
    grid_spec: pl.GridSpec | None = None,
    grid: Any = (),
    in_specs: Any = pl.no_block_spec,
    out_specs: Any = pl.no_block_spec,
    scratch_shapes: Any = (),
    **kwargs: Any,
) -> Callable[..., Any]:
    """`jax.experimental.pallas.pallas_call` that also takes and returns QArrays.

    Args:
      kernel: gets, in place of a QArray, a QArray of refs: `q_ref[...]` loads it. Where a scale's block does
        not suit a TPU, its layout is changed outside the kernel and restored inside; then `q_ref.scale` is
        already loaded, and `q_ref[...]` works the same.
      out_shape: `jax.ShapeDtypeStruct`s, or QArrays of them.
      grid_spec: as in Pallas, scalar prefetch included; never changed.
      grid: as in Pallas.
      in_specs: as in Pallas, with one spec for a whole QArray. A block may hold whole tiles (runs of values
        that share a scale) or lie inside one. Leave them out to hand every array over whole.
      out_specs: as in Pallas, with one spec for a whole QArray.
      scratch_shapes: as in Pallas.
      **kwargs: handed to Pallas (`interpret`, `compiler_params`, `name`, ...).

    Returns:
      A function of the arguments, arrays or QArrays.

    Raises:
      ValueError: when called, for a block that cuts a tile; the message names the sizes that do not.

    >>> import jax.numpy as jnp
    >>> w = qarray.quantize_api(jnp.eye(8, 128), "int8", channelwise_axes=[1])
    >>> def kernel(w_ref, out_ref):
    ...     out_ref[...] = qarray.dequantize(w_ref[...])
    >>> out = pallas_call(kernel, jax.ShapeDtypeStruct((8, 128), jnp.float32), interpret=True)(w)
    >>> bool(jnp.array_equal(out, qarray.dequantize(w)))
    True
    """
    if grid_spec is None:
        grid_spec = pl.GridSpec(grid, in_specs, out_specs, scratch_shapes)
    elif grid or in_specs is not pl.no_block_spec or out_specs is not pl.no_block_spec or scratch_shapes:
        raise ValueError(
            "With grid_spec given, grid, in_specs, out_specs and scratch_shapes must be left out: they are "
            "its."
        )
    prefetched = getattr(grid_spec, "num_scalar_prefetch", 0)
    derive = functools.partial(
        pallas_specs.update_block_specs_for_qarray, grid=None if prefetched else grid_spec.grid
    )

    def call(*args: Any) -> Any:
        spec = copy.copy(grid_spec)
        scalars, arrays = args[:prefetched], args[prefetched:]
        body = kernel
        if spec.in_specs is not pl.no_block_spec:
            spec.in_specs, arrays, restore = _for_tpu(derive(spec.in_specs, arrays), arrays)
            body = _restoring(kernel, restore, prefetched, len(arrays))
        if spec.out_specs is not pl.no_block_spec:
            spec.out_specs = derive(spec.out_specs, out_shape)
        return pl.pallas_call(body, out_shape, grid_spec=spec, **kwargs)(*scalars, *arrays)

    return call


def _for_tpu(specs: Any, args: Any) -> tuple[Any, Any, Callable[[Any], Any] | None]:
    """(specs, arguments, restore for the refs) with QArrays laid out for a TPU.

    A QArray that changes travels as a dict of its parts, whose ranks need not agree any more.
    """
    leaves, treedef = jax.tree.flatten(args, is_leaf=lambda x: isinstance(x, qarray.QArray))
    done = [
        _qarray_for_tpu(spec, arg) if isinstance(arg, qarray.QArray) else (spec, arg, None)
        for spec, arg in zip(treedef.flatten_up_to(specs), leaves, strict=True)
    ]
    backs = [back for _, _, back in done]
    if not any(backs):
        return specs, args, None

    def restore(refs: Any) -> Any:
        flat = treedef.flatten_up_to(refs)
        return treedef.unflatten([back(ref) if back else ref for back, ref in zip(backs, flat, strict=True)])

    return treedef.unflatten([s for s, _, _ in done]), treedef.unflatten([a for _, a, _ in done]), restore


def _qarray_for_tpu(spec: qarray.QArray, arg: qarray.QArray) -> tuple[Any, Any, Callable[[Any], Any] | None]:
    names = [name for name in ("qvalue", "scale", "zero_point") if getattr(arg, name) is not None]
    parts = {
        name: pallas_tpu_layout.rewrite(
            getattr(spec, name), getattr(arg, name), only_illegal=name == "qvalue"
        )
        for name in names
    }
    backs = {name: back for name, (_, _, back) in parts.items()}
    if not any(backs.values()):
        return spec, arg, None

    def restore(refs: dict[str, Any]) -> qarray.QArray:
        loaded = {name: back(refs[name]) if back else refs[name] for name, back in backs.items()}
        return qarray.QArray(**loaded, qtype=arg.qtype)

    return (
        {name: part[0] for name, part in parts.items()},
        {name: part[1] for name, part in parts.items()},
        restore,
    )


def _restoring(
    kernel: Callable[..., None], restore: Callable[[Any], Any] | None, first: int, count: int
) -> Callable[..., None]:
    """The kernel, given `count` arguments from `first` on in the layout that its author expects."""
    if restore is None:
        return kernel

    @functools.wraps(kernel)
    def restoring(*refs: Any, **scratch: Any) -> None:
        last = first + count
        kernel(*refs[:first], *restore(tuple(refs[first:last])), *refs[last:], **scratch)

    return restoring
