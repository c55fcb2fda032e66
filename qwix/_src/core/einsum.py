"""`einsum` of arrays and QArrays: every step of two operands is one `dot_general`.

Before the steps each operand is brought down to axes that matter to the rest. What only it has and the
output lacks is summed, a letter that stands twice becomes its diagonal, and an axis of size 1 that is longer
elsewhere is dropped. After that a step is a dot and at most one transpose of its result.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import opt_einsum
from jax.typing import DTypeLike

from qwix._src.core import dot_general as dot_general_lib
from qwix._src.core import einsum_info, explicit_mesh, layout, qarray
from qwix._src.core.calibration import HowToQuantize
from qwix._src.core.dot_general import dot_general
from qwix._src.core.einsum_info import EinsumInfo
from qwix._src.core.qarray import QArray
from qwix._src.core.transposed_qarray import TransposedQArray

Operand = jax.Array | QArray | TransposedQArray


def get_how_to_quantize(
    *,
    einsum_str: str,
    ndims: tuple[int, int],
    for_lhs: bool,
    tile_size: int | float | Mapping[int, int | float] | None,
    **kwargs: Any,
) -> HowToQuantize:
    """How to quantize one operand of an einsum of two: a scale per index of each axis that isn't contracting.

    A numeric tile size goes to the contracting axis that stands last in this operand; a mapping
    {axis: size} is taken as it is. The other arguments are those of `dot_general.get_how_to_quantize`.

    >>> dense = {"einsum_str": "btd,dnh->btnh", "ndims": (3, 3)}
    >>> get_how_to_quantize(**dense, for_lhs=False, tile_size=4, qtype="int8")
    HowToQuantize(qtype=dtype('int8'), channelwise_axes=(1, 2), tiled_axes={0: 4}, ...)
    """
    info = EinsumInfo.parse(einsum_str, ndims)
    term = info.lhs if for_lhs else info.rhs
    contracting = [a for a, c in enumerate(term) if c in info.contract_chars]
    if isinstance(tile_size, Mapping):
        tiled_axes = {layout.canonical_axis(axis, len(term)): size for axis, size in tile_size.items()}
    else:
        tiled_axes = {contracting[-1]: tile_size} if tile_size and contracting else {}
    channelwise = tuple(a for a in range(len(term)) if a not in contracting and a not in tiled_axes)
    return HowToQuantize(channelwise_axes=channelwise, tiled_axes=tiled_axes, **kwargs)


def einsum(
    *args: Any,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: Any = None,
    optimize: Any = "auto",
    act_how: HowToQuantize | None = None,
    _qwix_dot_general: Any = dot_general,
    **kwargs: Any,
) -> jax.Array:
    """`jax.numpy.einsum` where any operand may be quantized.

    Args:
      *args: subscripts and operands, in either form that `jax.numpy.einsum` takes. Any number of operands;
        ellipsis, implicit output, diagonals and sums over axes of one operand alone included.
      precision, preferred_element_type, out_sharding: as for `dot_general`.
      optimize: the order of more than two operands, as for `opt_einsum.contract_path`.
      act_how: of two operands, quantize the first one that is float. Its axes are those of that operand.
      **kwargs: for `dot_general` (`implementation`).

    Raises:
      ValueError: subscripts that don't fit the operands, or sizes that disagree.

    >>> import qwix
    >>> w = qwix.quantize(jnp.ones((8, 4)), "int8", channelwise_axes=(1,))
    >>> einsum("...d,df->...f", jnp.ones((2, 3, 8)), w).shape, einsum("ab,bc->c", jnp.ones((5, 8)), w).shape
    ((2, 3, 4), (4,))
    """
    terms, out, operands = einsum_info.parse(args)
    operands = [x if isinstance(x, QArray | TransposedQArray) else jnp.asarray(x) for x in operands]
    floats = [n for n, x in enumerate(operands) if isinstance(x, jax.Array) and x.dtype.itemsize > 1]
    text = f"{','.join(terms)}->{out}"
    options = {"precision": precision, "preferred_element_type": preferred_element_type, "optimize": optimize}
    if len(floats) == len(operands) and act_how is None and _qwix_dot_general is dot_general:
        return jnp.einsum(text, *operands, out_sharding=out_sharding, **options)
    if out_sharding is not None:
        own = {"act_how": act_how, "_qwix_dot_general": _qwix_dot_general, **kwargs}
        return explicit_mesh.laid_out(lambda *x: einsum(text, *x, **options, **own), out_sharding)(*operands)
    _check_sizes(terms, operands)
    _, result = qarray.get_accumulator_and_result_type(
        *(x.to_qarray() if isinstance(x, TransposedQArray) else x for x in operands),
        preferred_element_type=preferred_element_type,
    )
    if act_how is not None and (len(operands) != 2 or not floats):
        raise ValueError(f"act_how quantizes the float one of two operands; got {operands!r}.")
    given, act = list(terms), floats[0] if act_how is not None else None
    pairs = [_simplify(i, terms, out, operands, act_how if i == act else None) for i in range(len(terms))]
    terms, operands = [t for t, _ in pairs], [x for _, x in pairs]
    if act is not None and terms[act] != given[act]:
        act_how = None  # it was quantized before it lost axes
    if len(operands) == 1:
        return jnp.einsum(f"{terms[0]}->{out}", _float(operands[0])).astype(result)
    kwargs |= {"precision": precision, "preferred_element_type": result}
    if act_how is not None:
        kwargs["act_how"] = act_how
    while len(operands) > 1:
        last = len(operands) == 2
        i, j = (0, 1) if last else _next_pair(terms, out, operands, optimize)
        rest = [t for n, t in enumerate(terms) if n not in (i, j)]
        step_out = out if last else _kept(terms[i] + terms[j], rest, out)
        info = EinsumInfo(terms[i], terms[j], step_out)
        x = _step(info, operands[i], operands[j], _qwix_dot_general, kwargs)
        operands = [y for n, y in enumerate(operands) if n not in (i, j)] + [x]
        terms = [*rest, step_out]
    return _float(operands[0])


def _check_sizes(terms: Sequence[str], operands: Sequence[Operand]) -> None:
    sizes: dict[str, int] = {}
    for term, x in zip(terms, operands, strict=True):
        for letter, n in zip(term, x.shape, strict=True):
            known = sizes.setdefault(letter, n)
            if not isinstance(n, int) or not isinstance(known, int):
                continue  # a symbolic size is checked where it is computed with
            if n != known and 1 not in (n, known):
                shapes = ", ".join(f"{t}: {y.shape}" for t, y in zip(terms, operands, strict=True))
                raise ValueError(f"Cannot broadcast axis {letter!r} of sizes {known} and {n} ({shapes}).")
            sizes[letter] = max(known, n)


def _simplify(
    index: int, terms: Sequence[str], out: str, operands: Sequence[Operand], act_how: HowToQuantize | None
) -> tuple[str, Operand]:
    """One operand without diagonals, without axes that nothing else has, without ones that broadcast."""
    term, x = terms[index], operands[index]
    others = "".join(t for n, t in enumerate(terms) if n != index)
    long_elsewhere = {
        c for t, y in zip(terms, operands, strict=True) for c, n in zip(t, y.shape, strict=True) if n != 1
    }
    kept = "".join(dict.fromkeys(c for c in term if c in others or c in out))
    dropped = {c for c, n in zip(term, x.shape, strict=True) if n == 1 and c in long_elsewhere}
    kept = "".join(c for c in kept if c not in dropped)
    if kept == term or len(terms) == 1:
        return term, x
    if act_how is not None:
        x = qarray.quantize(_float(x), act_how)
    if set(term) - set(kept) <= dropped and len(set(term)) == len(term):
        x = x.to_qarray() if isinstance(x, TransposedQArray) else x
        return kept, x.reshape(tuple(n for c, n in zip(term, x.shape, strict=True) if c in kept))
    x = _float(x)
    wide = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.promote_types(x.dtype, jnp.float32)
    return kept, jnp.einsum(f"{term}->{kept}", x, preferred_element_type=wide)


def _float(x: Operand) -> jax.Array:
    return x if isinstance(x, jax.Array) else x.dequantize()


def _kept(letters: str, rest: Sequence[str], out: str) -> str:
    """Letters of a step's result: those still needed, in order of appearance."""
    needed = set(out).union(*rest) if rest else set(out)
    return "".join(dict.fromkeys(c for c in letters if c in needed))


def _next_pair(terms: Sequence[str], out: str, operands: Sequence[Operand], optimize: Any) -> tuple[int, int]:
    shapes = [tuple(n if isinstance(n, int) else 1 for n in x.shape) for x in operands]
    path, _ = opt_einsum.contract_path(
        f"{','.join(terms)}->{out}", *shapes, shapes=True, optimize=True if optimize is False else optimize
    )
    pair = sorted(next(iter(path)))
    return (pair[0], pair[1]) if len(pair) > 1 else (0, 1)


def _step(info: EinsumInfo, lhs: Operand, rhs: Operand, dot: Any, kwargs: Mapping[str, Any]) -> jax.Array:
    """One dot. A quantized lhs changes place with a float rhs: kernels prefer weights on the right."""
    quantized = lambda x: isinstance(x, QArray)
    if quantized(lhs) and isinstance(rhs, jax.Array):
        info, lhs, rhs = EinsumInfo(info.rhs, info.lhs, info.out), rhs, lhs
    result = dot(lhs, rhs, info.dimension_numbers, **kwargs)
    return result if info.output_perm is None else result.transpose(info.output_perm)


def matmul_problem(
    einsum_str: str,
    lhs: Any,
    rhs: Any,
    **kwargs: Any,
):
    """`dot_general.matmul_problem` of an einsum of two operands without reductions of one side alone."""
    info = EinsumInfo.parse(einsum_str, (len(lhs.shape), len(rhs.shape)))
    if isinstance(lhs, QArray) and not isinstance(rhs, QArray | TransposedQArray):
        info, lhs, rhs = EinsumInfo(info.rhs, info.lhs, info.out), rhs, lhs
    return dot_general_lib.matmul_problem(lhs, rhs, info.dimension_numbers, **kwargs)
