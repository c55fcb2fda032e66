"""What a scheme must cost on a chip: microseconds of one jax device, by arithmetic.

    floor       what nothing can beat: 2 B M K N at the peak of the best exact unit, each operand moved once
    best floor  what no strategy can beat: a strategy is a matrix unit and a place for the scales, and it
                cannot avoid the vector work that goes with them

Vector work is counted in operations on one vector register of 1024 float32, four of which issue per cycle,
and only what no arrangement of a strategy avoids; matrix and vector work overlap, so the greater one counts:

    rows       quantize M x K: magnitude, maximum, product, round, pack; once for all columns
    after      every K tile's partial results M x N: to float32 (integers), a product for each side with
               scales (a 128 x 128 block's is one number for a row of lanes: it rides on the row's), a sum
    before     every weight once: to float, scaled and packed to bfloat16; the bfloat16 unit
    codebook   every weight once: one gather per cycle, as much as the lane unit does
    end        the result once: scaled and packed
"""

from __future__ import annotations

import dataclasses

from qwix_kernels.chips import Chip
from qwix_kernels.problem import CODEBOOKS, dtype_bits

from bench import problems
from bench.shapes import Scheme
from bench.tpu_compile import device_bandwidth, device_cores, device_rate

LANES = 1024
SLOTS = 4
# Operations per vector register of float32. v6e and v7x do bfloat16 arithmetic on two values per lane.
_ROWS, _END, _GATHER = 5.0, 2.0, 4.0
_DEQUANTIZE = {"v5e": 2.5, "v5p": 2.5}
_DEQUANTIZE_PACKED = 1.5


@dataclasses.dataclass(frozen=True)
class Floor:
    """Microseconds of one jax device; `strategy` says in words what `best_us` is the floor of."""

    compute_us: float
    memory_us: float
    best_us: float
    strategy: str

    @property
    def us(self) -> float:
        """What nothing can beat."""
        return max(self.compute_us, self.memory_us)


def floor(chip: Chip, scheme: Scheme, m: int, k: int, n: int, batch: int = 1) -> Floor:
    """The floors of `scheme` for [batch, M, K] times [batch, K, N].

    >>> from qwix_kernels.chips import CHIPS
    >>> from bench.shapes import scheme
    >>> f = floor(CHIPS["v6e"], scheme("w8a8_g128"), 1024, 4096, 4096)
    >>> round(f.us, 1), round(f.best_us, 1), f.strategy
    (20.6, 37.4, 'scales before the dot, bf16 unit')
    """
    moved = sum(x.size * dtype_bits(x.dtype.name) / 8 for x in problems.shapes_of(scheme, m, k, n, batch))
    memory = 1e6 * (moved + 2 * batch * m * n) / device_bandwidth(chip)
    multiplied = (scheme.activation, "bfloat16" if scheme.weight in CODEBOOKS else scheme.weight)
    unit, rate = chip.unit(*multiplied)
    work = 2e6 * batch * m * k * n
    options = {}
    for name, speed in {unit: rate, "bf16": chip.bf16}.items():
        matrix = work / device_rate(chip, speed)
        for where, ops in _vector_work(chip, scheme, name, m, k, n).items():
            cycles = batch * ops / (LANES * SLOTS * device_cores(chip))
            options[max(matrix, cycles / chip.ghz / 1e3)] = f"{where}, {name} unit"
    best = min(options)
    return Floor(work / device_rate(chip, rate), memory, max(best, memory), options[best])


def _vector_work(chip: Chip, scheme: Scheme, unit: str, m: int, k: int, n: int) -> dict[str, float]:
    """Operations times elements, by strategy on this unit."""
    tiles = k // scheme.tile if scheme.tile else 1
    always = _END * m * n
    if not (scheme.is_weight_only or scheme.static):
        always += _ROWS * m * k
    if scheme.weight in CODEBOOKS:
        always += _GATHER * k * n
    if tiles == 1:
        return {"scales once": always}
    sides = 1 if scheme.is_weight_only or scheme.tile_n % 128 == 0 else 2
    each = sides + 1 + (unit.startswith("int"))
    work = {"scales after the dot": always + each * tiles * m * n}
    if unit == "bf16":
        work["scales before the dot"] = always + _DEQUANTIZE.get(chip.name, _DEQUANTIZE_PACKED) * k * n
    return work
