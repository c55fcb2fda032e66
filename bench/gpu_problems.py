"""The matmuls that are compiled and timed on a GPU, and the set of them that the tables have.

As problems.py has them, but with weights as `prepacked` ones lie, [N, K]: what the matrix instructions for
8-bit operands read. `prepacked=False` is a weight [K, N], which XLA turns before the kernel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from qwix_kernels import matmul as op
from qwix_kernels.chips import Chip
from qwix_kernels.problem import MatmulProblem, Tensor, dtype_bits

from bench import floors, problems, shapes, targets
from bench.shapes import Scheme

SCHEMES = (
    "w8a8",
    "w8a8_g128",
    "wf8af8",
    "wf8af8_b128",
    "w4a8",
    "w8a16",
    "w4a16",
    "w4a16_g128",
    "wf8a16",
    "wnf4a16_g64",
)
IMPLEMENTATIONS = ("mosaic_gpu", "xla")
# Formats whose matrix instruction is Blackwell's alone. It takes scales as the format has them, so rows come
# quantized; those that are quantized on the way have float32 ones.
BLOCK_SCHEMES = ("wmxfp8amxfp8_static", "wmxfp4amxfp4_static", "wnvfp4anvfp4_static")
FP4_RATE = 2  # of 4-bit floats to 8-bit ones, where scales are those of block formats (B200 data sheet)
PREFILL = ((4096, 4096, 4096), (1024, 4096, 4096))  # M, K, N
DECODE = ((16, 4096, 14336), (64, 4096, 14336))
MLP = tuple((m, layer.k, layer.n) for layer in shapes.MODELS["llama3_8b"][-2:] for m in (16, 2048))


@dataclasses.dataclass(frozen=True)
class Cell:
    """One matmul on one GPU."""

    chip: str
    scheme: str
    m: int
    k: int
    n: int
    prepacked: bool = True

    def __str__(self) -> str:
        how = "" if self.prepacked else " [K, N]"
        return f"{self.chip} {self.scheme} {self.m} x {self.k} x {self.n}{how}"

    @property
    def rows(self) -> str:
        """The class that a miss is listed under."""
        return targets.rows_of(self.m) + ("" if self.prepacked else " [K, N]")

    @property
    def request(self) -> tuple[str, dict[str, Any]]:
        """What gpu_compile.py is asked."""
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k != "chip"}
        return "bench.gpu_problems:matmul", fields | {"implementation": self.implementation}

    @property
    def implementation(self) -> tuple[str, ...] | None:
        """What may run, kernels on request included; None for what dispatch prefers."""
        return IMPLEMENTATIONS if self.chip == "b200" else None

    @property
    def problem(self) -> MatmulProblem:
        return problem(shapes.scheme(self.scheme), self.m, self.k, self.n, self.prepacked)

    def floor(self, chip: Chip) -> tuple[float, float]:
        """(compute, memory) in microseconds, each operand moved once."""
        wanted = shapes.scheme(self.scheme)
        found = floors.floor(chip, wanted, self.m, self.k, self.n)
        faster = FP4_RATE if wanted.weight == wanted.activation == "float4_e2m1fn" else 1
        return found.compute_us / faster, found.memory_us

    @property
    def quantized_bytes(self) -> int:
        """What a pass that quantizes the rows reads and writes."""
        return row_bytes(shapes.scheme(self.scheme), self.m, self.k)

    def padded_rows(self, block: int) -> int:
        """Rows that blocks of `block` compute."""
        return -(-self.m // block) * block


def cells(chip: str, schemes: Sequence[str] = ()) -> list[Cell]:
    """The suite of a GPU: every scheme at prefill and decode, w8a8 and w4a16_g128 with weights [K, N] too.

    Raises ValueError for a scheme that is not one.

    >>> len(cells("h100")), str(cells("h100")[0])
    (72, 'h100 w8a8 4096 x 4096 x 4096')
    """
    wanted = [shapes.scheme(name).name for name in schemes] or [*SCHEMES, *BLOCK_SCHEMES * (chip == "b200")]
    sizes = dict.fromkeys((*PREFILL, *DECODE, *MLP))
    found = [Cell(chip, name, *size) for size in sizes for name in wanted]
    turned = [name for name in ("w8a8", "w4a16_g128") if name in wanted]
    return found + [Cell(chip, name, *PREFILL[1], prepacked=False) for name in turned]


def row_bytes(scheme: Scheme, m: int, k: int) -> int:
    """Of bfloat16 rows and what they are quantized to; 0 where they are not.

    >>> row_bytes(shapes.scheme("w8a8"), 16, 100), row_bytes(shapes.scheme("w8a16"), 16, 100)
    (4800, 0)
    """
    how = problems.row_quantize(scheme)
    return m * k * (16 + dtype_bits(how.dtype)) // 8 if how else 0


def asked(chip: str, sizes: Sequence[tuple[int, int, int]], schemes: Sequence[str]) -> list[Cell]:
    """Each scheme on each (M, K, N).

    >>> [str(cell) for cell in asked("h100", [(16, 256, 512), (64, 256, 512)], ["w8a8"])]
    ['h100 w8a8 16 x 256 x 512', 'h100 w8a8 64 x 256 x 512']
    """
    return [Cell(chip, name, *size) for size in sizes for name in schemes]


def shapes_of(scheme: Scheme, m: int, k: int, n: int, prepacked: bool = True) -> list[jax.ShapeDtypeStruct]:
    """As problems.shapes_of, one batch; the weight and what belongs to it [1, N, K] where `prepacked`.

    Scales of rows that come quantized are in the dtype of the scheme's format.
    """
    found = problems.shapes_of(scheme, m, k, n)
    lhs = 1 + scheme.static
    if scheme.static:
        found[1] = jax.ShapeDtypeStruct(found[1].shape, jnp.dtype(scheme.row_scale))
    if not prepacked:
        return found
    turned = [jax.ShapeDtypeStruct((1, *x.shape[:0:-1]), x.dtype) for x in found[lhs:]]
    return [*found[:lhs], *turned]


def operands(scheme: Scheme, m: int, k: int, n: int, prepacked: bool = True) -> tuple[Any, Tensor]:
    """Activations [1, M, K] and the weight, without data."""
    return jax.eval_shape(
        lambda *arrays: problems.tensors(scheme, arrays), *shapes_of(scheme, m, k, n, prepacked)
    )


def problem(scheme: Scheme, m: int, k: int, n: int, prepacked: bool = True) -> MatmulProblem:
    """The description that dispatch chooses by."""
    lhs, rhs = operands(scheme, m, k, n, prepacked)
    how = problems.row_quantize(scheme)
    return op.problem_of(lhs, rhs, quantize_lhs=how, rhs_transposed=prepacked, out_dtype=jnp.bfloat16)


def kernel(
    scheme: Scheme, prepacked: bool = True, implementation: str | Sequence[str] | None = None
) -> Callable[..., Any]:
    """The op itself, as a function of `operands`."""
    options = {"rhs_transposed": prepacked, "implementation": implementation}
    how = problems.row_quantize(scheme)
    return lambda lhs, rhs: op.matmul(lhs, rhs, quantize_lhs=how, out_dtype=jnp.bfloat16, **options)


def matmul(
    scheme: str,
    m: int,
    k: int,
    n: int,
    prepacked: bool = True,
    implementation: str | Sequence[str] | None = None,
):
    """(function, shapes): what gpu_compile.py is asked to compile."""
    named = shapes.scheme(scheme)
    return kernel(named, prepacked, implementation), operands(named, m, k, n, prepacked)


def xla_same_op(scheme: Scheme) -> Callable[..., jax.Array]:
    """problems.xla_same_op of a weight [1, N, K]."""
    chain, lhs = problems.xla_same_op(scheme), 1 + scheme.static
    return lambda *arrays: chain(*arrays[:lhs], *(x.swapaxes(1, 2) for x in arrays[lhs:]))


def xla_bf16(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """[1, M, K] times the transpose of [1, N, K], without any quantization."""
    return jax.lax.dot_general(lhs[0], rhs[0], (((1,), (1,)), ((), ())))[None]


def xla_dot(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """XLA's own product of 8-bit [1, M, K] and [1, N, K], without scales: int32, or bfloat16 of floats."""
    integer = jnp.issubdtype(lhs.dtype, jnp.integer)
    wanted = jnp.int32 if integer else jnp.bfloat16
    return jax.lax.dot_general(lhs[0], rhs[0], (((1,), (1,)), ((), ())), preferred_element_type=wanted)[None]
