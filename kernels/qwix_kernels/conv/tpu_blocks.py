"""Which blocks the TPU convolution kernel may take: those that the chip's VMEM holds. Static."""

from __future__ import annotations

import math
from collections.abc import Iterator

from qwix_kernels.chips import Chip
from qwix_kernels.conv.problem import ConvProblem
from qwix_kernels.conv.tpu_plan import Plan, dot_dtypes, reads
from qwix_kernels.matmul.tpu_config import LANES, pl_cdiv
from qwix_kernels.matmul.tpu_plan import VMEM_SHARE
from qwix_kernels.problem import dtype_bits

_MOST_COLUMNS, _CHUNKS_TRIED = 1024, 8
_MOST_PLACES = 2048  # in one chunk; half where partial sums go in and out of registers often
_MOST_PUSHES = 560  # see `Plan.pushes`


def fitting(p: ConvProblem, chip: Chip) -> Iterator[Plan]:
    """Plans that the chip's VMEM holds."""
    width = max(p.out[1], *(pl_cdiv(p.windows[1].size, w.stride) for w in p.windows[1:]))
    pitches = {pl_cdiv(width, unit) * unit for unit in (8, 16, 32)}
    columns = {n for n in (128, 256, 512, 640) if n < p.out_features}
    most = _MOST_COLUMNS
    if p.taps == 1:  # their weights are small
        most += 256
        columns |= {1024} if p.out_features > 1024 else set()
    columns |= {p.out_features} if p.out_features <= most else set()
    unit = 32 if dot_dtypes(p, chip)[0] != "bfloat16" else 16
    for pitch in sorted(pitches):
        for block_n in sorted(columns):
            for bands in (1, 2, 4) if block_n == p.out_features else (1,):
                if bands > 1 and (block_n * bands > chip.mxu or p.out[0] % bands or p.kernel[0] == 1):
                    continue
                deep = p.k * (p.kernel[0] + bands - 1) // p.kernel[0]
                each = pl_cdiv(deep, chip.mxu) * pl_cdiv(block_n * bands, chip.mxu)
                places = _MOST_PLACES if deep <= 4 * chip.mxu else _MOST_PLACES // 2
                most = max(1, min(places, _MOST_PUSHES * unit // each) // pitch)
                for images in (n for n in (1, 2, 4, 8, 16) if n <= p.batch):
                    for turns in (n for n in (1, 2, 4, 8, 16) if n * images <= p.batch):
                        if turns == 1 or block_n == p.out_features:
                            yield from _with_chunks(p, chip, pitch, images, block_n, most, turns, bands)


def _with_chunks(
    p: ConvProblem, chip: Chip, pitch: int, images: int, block_n: int, most: int, turns: int, bands: int
) -> Iterator[Plan]:
    """The plans with the longest chunks, up to some `most` rows: the more chunks, the less is hidden."""
    found, out = 0, p.out[0] // bands
    step = 32 // math.gcd(pitch, 32)
    rows = (
        [pl_cdiv(out, n) for n in range(1, out + 1)] if images == 1 else range(most // step * step, 0, -step)
    )
    for count in dict.fromkeys(n for n in (pl_cdiv(n, step) * step for n in rows) if n <= most):
        try:
            yield make_plan(p, chip, pitch, images, count, block_n, turns, bands)
        except NotImplementedError:
            continue
        found += 1
        if found == _CHUNKS_TRIED:
            return


def make_plan(
    p: ConvProblem,
    chip: Chip,
    pitch: int,
    images: int,
    chunk_rows: int,
    block_n: int,
    turns: int = 1,
    bands: int = 1,
) -> Plan:
    """The plan with these blocks; NotImplementedError where VMEM does not hold them."""
    lhs_dot, rhs_dot = dot_dtypes(p, chip)
    h, _ = Plan(p, pitch, 0, images, chunk_rows, block_n, lhs_dot, rhs_dot, False, 0, turns, bands).windows
    shifts = [reads(h, t) for t in range(h.kernel)]
    above = max(0, -min(row for _, row in shifts))
    phase_rows = max(pl_cdiv(h.size - phase, h.stride) for phase, _ in shifts)
    need = max(phase_rows + above, h.out + max(0, max(row for _, row in shifts)))
    unit = 32 * 8 // dtype_bits(lhs_dot)
    rows = pl_cdiv(need, step := unit // math.gcd(pitch, unit)) * step
    plan = Plan(
        p, pitch, rows, images, chunk_rows, block_n, lhs_dot, rhs_dot, chip.bf16_math, chip.mxu, turns, bands
    )
    fits = rows % chunk_rows == 0 or (chunk_rows % rows == 0 and (images * rows) % chunk_rows == 0)
    if images > 1 and not fits:
        raise NotImplementedError(f"chunks of {chunk_rows} rows do not divide {images} images of {rows} rows")
    if turns > 1 and (turns % 2 or block_n < p.out_features):
        raise NotImplementedError(f"an odd number of turns, {turns}, or several blocks of columns")
    if turns > 1 and plan.chunks > 1 and (images > 1 or not plan.copies_are_local):
        raise NotImplementedError(f"{plan.chunks} chunks of {images} images, or copies of several rows")
    if bands > 1 and (p.out[0] % bands or block_n < p.out_features or h.rhs_dilation > 1):
        raise NotImplementedError(f"{bands} bands of {p.out[0]} rows, or several blocks of columns")
    if not plan.exact_taps:
        raise NotImplementedError(
            f"one tap of {p.features} features is more than {chip.name} adds up exactly on a float unit"
        )
    if (used := vmem_bytes(plan)) > VMEM_SHARE * chip.vmem_bytes:
        room = int(VMEM_SHARE * chip.vmem_bytes) >> 20
        raise NotImplementedError(
            f"blocks of {images} images of {h.size} x {p.windows[1].size} x {p.features} and {block_n} "
            f"output features need {used >> 20} MiB of VMEM; {chip.name} has {room} MiB"
        )
    return plan


def vmem_bytes(plan: Plan) -> int:
    """VMEM that the blocks (two of each), the flat images and the largest temporaries take."""
    p = plan.problem
    lanes = pl_cdiv(p.features, LANES) * LANES
    columns = pl_cdiv(plan.columns, LANES) * LANES
    of_lhs = (
        plan.block_images * plan.block_rows * pl_cdiv(plan.block_columns, 16) * 16 * lanes * p.lhs.bits // 8
    )
    flat = (len(plan.phases) + len(plan.copies)) * plan.length * lanes * dtype_bits(plan.lhs_dot) // 8
    flat *= 2 if plan.turns > 1 else 1
    weights = p.k * columns * p.rhs.bits // 8
    stored = plan.bands * pl_cdiv(plan.block_n, LANES) * LANES
    out = (
        plan.block_images
        * plan.out_rows
        * pl_cdiv(plan.pitch, 16)
        * 16
        * stored
        * dtype_bits(p.out_dtype)
        // 8
    )
    ready = plan.depth * columns * dtype_bits(plan.rhs_dot) // 8
    scratch = ready if plan.widens_rhs else 0
    scratch += plan.body * LANES * 4 if plan.images > 1 else 0
    scratch += plan.chunk * (3 * columns * 4 + len(plan.taps) * lanes * dtype_bits(plan.lhs_dot) // 8)
    return 2 * (of_lhs + weights + out) + flat + scratch
