"""The sharded ops that bench.scale compiles, and what arithmetic says that each must send.

A cell is one op over one mesh, with axes x and y: how its operands are cut, and the collectives and bytes
that no program could do without. Sums over shards travel in float32, once; what else moves has to be a row's
maximum, of which there is one per row. Sizes are those of a layer, and nothing is run: programs are compiled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import qwix
from qwix import collectives, ops

M, K, N, BATCH, EXPERTS, BLOCK = 1024, 2048, 2048, 16, 16, 256
BOTH = ("x", "y")


@dataclasses.dataclass(frozen=True)
class Cell:
    """One op on one mesh.

    operands: (shape, dtype or how a weight is quantized, spec) each.
    must: {collective: bytes on the wire per device} by arithmetic. Programs may send less.
    kernel: whether a TPU's shard should run one.
    """

    name: str
    fn: Callable[..., Any]
    operands: tuple[tuple[tuple[int, ...], Any, P], ...]
    must: Mapping[str, float]
    kernel: bool = True
    explicit: bool = True

    @property
    def must_bytes(self) -> int:
        return math.ceil(sum(self.must.values()))


INT8 = {"qtype": "int8"}


def cells(x: int, y: int) -> Iterator[Cell]:
    """All cells of a mesh of x * y devices."""
    yield from _dots(x, y)
    yield from _experts_and_images(x, y)
    yield from _collectives(x, y)


def _ring(n: int) -> float:
    return (n - 1) / n


def _dots(x: int, y: int) -> Iterator[Cell]:
    dot = lambda a, w: ops.qdot(a, w, act_qtype="int8")
    weight = ((K, N), {**INT8, "channelwise_axes": (1,)})
    rows = ((M, K), jnp.bfloat16)
    yield Cell("dot, M sharded", dot, ((*rows, P(BOTH, None)), (*weight, P(None, None))), {})
    yield Cell("dot, N sharded", dot, ((*rows, P(None, None)), (*weight, P(None, BOTH))), {})
    yield Cell("dot, M and N sharded", dot, ((*rows, P("x", None)), (*weight, P(None, "y"))), {})
    n = x * y
    sums = {"all-reduce": 2 * _ring(n) * (M * N + M) * 4}
    yield Cell("dot, K sharded", dot, ((*rows, P(None, BOTH)), (*weight, P(BOTH, None))), sums)
    if y > 1:
        local = {"all-reduce": 2 * _ring(y) * (M // x * (N + 1)) * 4}
        yield Cell("dot, M and K sharded", dot, ((*rows, P("x", "y")), (*weight, P("y", None))), local)
    batched = lambda a, w: ops.qdot_general(a, w, (((2,), (1,)), ((0,), (0,))), act_qtype="int8")
    many = ((BATCH, M // 8, K), jnp.bfloat16, P(BOTH, None, None))
    weights = ((BATCH, K, N), {**INT8, "channelwise_axes": (0, 2)}, P(BOTH, None, None))
    yield Cell("dot, batch sharded", batched, (many, weights), {})
    int4 = ((K, N), {"qtype": "int4", "channelwise_axes": (1,), "tiled_axes": {0: 128}}, P(None, BOTH))
    yield Cell("dot W4A16, N sharded", ops.qdot, ((*rows, P(None, None)), int4), {})


def _experts_and_images(x: int, y: int) -> Iterator[Cell]:
    experts = ((EXPERTS, K, N), {**INT8, "channelwise_axes": (0, 2)}, P("y", None, None))
    rows, sizes = ((M, K), jnp.bfloat16, P("x", None)), ((EXPERTS,), jnp.int32, P())
    ragged = lambda a, w, g: ops.qragged_dot(a, w, g, act_qtype="int8")
    # An expert's rows are zero elsewhere; where its group starts is known to all.
    sums = {"all-reduce": 2 * _ring(y) * (M // x) * N * 4} if y > 1 else {}
    yield Cell("ragged, experts sharded", ragged, (rows, experts, sizes), sums)
    images = ((BATCH, 32, 32, 128), jnp.bfloat16, P("x", None, None, None))
    kernel = ((3, 3, 128, 256), {**INT8, "channelwise_axes": (3,)}, P(None, None, None, "y"))
    conv = lambda a, w: ops.qconv_general_dilated(
        a, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), act_qtype="int8"
    )
    yield Cell("conv, images and channels sharded", conv, (images, kernel), {})


def _collectives(x: int, y: int) -> Iterator[Cell]:
    """On an axis of all devices; a quarter of float32's bytes and a scale per block."""
    n = x * y
    size = K * N
    narrow = lambda bits: _ring(n) * size * (bits / 8 + 4 / BLOCK)
    tree = ((K, N), jnp.float32, P())
    for qtype, bits in (("int8", 8), ("int4", 4), ("float8_e4m3fn", 8)):
        how = {"qtype": qtype, "block_size": BLOCK}
        reduce = lambda g, how=how: collectives.all_reduce(g, BOTH, **how)
        both = {"all-to-all": narrow(bits), "all-gather": narrow(bits)}
        yield Cell(f"all_reduce {qtype}", _in_shards(reduce, P(), P()), (tree,), both, False, False)
    scatter = lambda g: collectives.reduce_scatter(g, BOTH, qtype="int8", block_size=BLOCK)
    must = {"all-to-all": narrow(8)}
    yield Cell("reduce_scatter int8", _in_shards(scatter, P(), P(BOTH)), (tree,), must, False, False)
    gather = lambda w: collectives.all_gather(w, BOTH, to="invarying")
    rows = ((K, N), {**INT8, "channelwise_axes": (0,)}, P(BOTH, None))
    must = {"all-gather": _ring(n) * (size + 4 * K)}
    yield Cell("all_gather of QArrays", _in_shards(gather, P(BOTH), P()), (rows,), must, False, False)


def _in_shards(fn: Callable[[Any], Any], spec: P, out: P) -> Callable[[Any], Any]:
    def run(value: Any) -> Any:
        mesh = jax.sharding.get_abstract_mesh()
        return jax.shard_map(fn, mesh=mesh, in_specs=spec, out_specs=out)(value)

    return run


def placed(mesh: Any, operand: tuple[tuple[int, ...], Any, P]) -> Any:
    """Shapes of one operand, laid out; of a QArray's scales where their sizes allow it."""
    shape, dtype, spec = operand
    if not isinstance(dtype, Mapping):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    made = jax.eval_shape(lambda: qwix.quantize(jnp.zeros(shape, jnp.bfloat16), **dtype))

    def one(a: Any) -> Any:
        cut = [
            e
            if e is None
            or n % math.prod(mesh.shape[name] for name in ((e,) if isinstance(e, str) else e)) == 0
            else None
            for e, n in zip((*spec, *(None,) * a.ndim), a.shape, strict=False)
        ]
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, P(*cut)))

    return jax.tree.map(one, made)
