"""How the TPU kernel lays images out in VMEM, and which blocks it takes. Static.

An image is kept flat, [rows * pitch, C], the pitch being its width rounded up to 8 sublanes. A tap of the
kernel is then the same flat array, read `row shift * pitch + column shift` further on, and the matrix unit is
given, for a chunk of positions, all taps side by side along C: an implicit matmul of [chunk, taps * C].

    strides      an image is split into its stride x stride phases, each flat on its own: a tap reads one
    columns      a tap that is shifted along the columns would read the end of the row before: such a tap gets
                 a copy of the flat image with those positions zero, already shifted, so that what is read is
                 aligned to a native tile (32 rows of 8 bits, 16 of 16)
    rows         above and below an image lie rows of zeros, shared by neighbours where several images are in
                 one block; where pitch is no multiple of the native tile's rows, shifted rows need copies too
"""

from __future__ import annotations

import dataclasses
import functools
import math

from qwix_kernels.chips import Chip
from qwix_kernels.conv.problem import ConvProblem, Window
from qwix_kernels.matmul.tpu_config import LANES, pl_cdiv
from qwix_kernels.matmul.tpu_plan import EXACT_BITS, VMEM_SHARE, is_fp8
from qwix_kernels.problem import dtype_bits

_STAGED = 256  # flat rows


@dataclasses.dataclass(frozen=True)
class Tap:
    """One element of the kernel: a phase of the image, and how far from the output's place it reads."""

    phase: tuple[int, int]
    row: int
    column: int


@dataclasses.dataclass(frozen=True)
class Copy:
    """The flat image of a phase, read `skew` + `column` further on, zero where the row's ends are passed."""

    phase: tuple[int, int]
    column: int
    skew: int  # what a row shift leaves of the native tile's rows

    @property
    def shift(self) -> int:
        return self.skew + self.column


@dataclasses.dataclass(frozen=True)
class Plan:
    """One way to run a problem with two spatial axes."""

    problem: ConvProblem
    pitch: int
    rows: int  # of an image in the flat array, zeros included
    images: int  # in one block
    chunk_rows: int  # rows of images (or of several images) in one dot
    block_n: int
    lhs_dot: str
    rhs_dot: str
    bf16_math: bool
    mxu: int  # columns of the matrix unit

    @property
    def windows(self) -> tuple[Window, Window]:
        return self.problem.windows  # type: ignore[return-value]

    @property
    def unit(self) -> int:
        """Rows of a native tile of what is multiplied."""
        return 32 * 8 // dtype_bits(self.lhs_dot)

    @property
    def per_word(self) -> int:
        """Flat rows in a word of 32 bits, in which the flat images are kept."""
        return 32 // dtype_bits(self.lhs_dot)

    @property
    def lanes(self) -> tuple[slice, ...]:
        """The features, by the register that they lie in."""
        size = self.problem.features
        return tuple(slice(lo, min(lo + LANES, size)) for lo in range(0, size, LANES))

    @property
    def lane_groups(self) -> int:
        return len(self.lanes)

    @property
    def chunk(self) -> int:
        """Positions in one dot."""
        return self.chunk_rows * self.pitch

    @property
    def chunks(self) -> int:
        p = self.problem
        return pl_cdiv(p.out[0] if self.images == 1 else self.images * self.rows, self.chunk_rows)

    @property
    def grid(self) -> tuple[int, int]:
        return pl_cdiv(self.problem.batch, self.images), pl_cdiv(self.problem.out_features, self.block_n)

    @functools.cached_property
    def taps(self) -> tuple[Tap, ...]:
        """In the order of the kernel's elements."""
        h, w = ([_reads(v, t) for t in range(v.kernel)] for v in self.windows)
        return tuple(Tap((ph, pw), row, column) for ph, row in h for pw, column in w)

    @functools.cached_property
    def phases(self) -> tuple[tuple[int, int], ...]:
        return tuple(dict.fromkeys(tap.phase for tap in self.taps))

    def phase_size(self, phase: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of an image in one phase."""
        h, w = (max(0, pl_cdiv(v.size - at, v.stride)) for v, at in zip(self.windows, phase, strict=True))
        return h, w

    @functools.cached_property
    def reads(self) -> tuple[tuple[Copy, int], ...]:
        """For each tap the copy that it reads and where, from the output's place on; aligned."""
        found = []
        for tap in self.taps:
            flat = tap.row * self.pitch
            skew = flat % self.unit
            found.append((Copy(tap.phase, tap.column, skew), flat - skew))
        return tuple(found)

    @functools.cached_property
    def copies(self) -> tuple[Copy, ...]:
        """Those that are not the flat image itself."""
        return tuple(c for c in dict.fromkeys(copy for copy, _ in self.reads) if not self.is_image(c))

    def is_image(self, copy: Copy) -> bool:
        return copy.shift == 0 and not self.is_masked(copy)

    def is_masked(self, copy: Copy) -> bool:
        """Whether some place of the result would read past an end of its row."""
        width = self.phase_size(copy.phase)[1]
        return copy.column < 0 or self.windows[1].out - 1 + copy.column >= width

    @property
    def period(self) -> int:
        """Flat rows that are staged at a time."""
        return self.stage_rows * self.pitch

    @property
    def lead(self) -> int:
        """Flat rows in front of the first image: zeros that taps read, and room to read shifted."""
        least = min(min(at for _, at in self.reads), 0)
        return self._slack(-min(copy.shift for copy, _ in self.reads)) + self.back(least)

    def back(self, least: int | None = None) -> int:
        """Of those, what copies have too: whole periods."""
        if least is None:
            least = min(min(at for _, at in self.reads), 0)
        return pl_cdiv(-least, self.period) * self.period

    @property
    def body(self) -> int:
        """Flat rows of the images of a block, with the last chunk's: whole periods."""
        rows = max(self.images * self.rows, self.chunks * self.chunk_rows, self.staged_rows)
        return pl_cdiv(rows * self.pitch, self.period) * self.period

    @property
    def ahead(self) -> int:
        """Flat rows behind the images that taps read: whole periods."""
        return pl_cdiv(max(max(at for _, at in self.reads), 0), self.period) * self.period

    @property
    def length(self) -> int:
        """Flat rows of a buffer: what any tap or copy reads lies inside."""
        return self.lead + self.body + self.ahead + self._slack(max(copy.shift for copy, _ in self.reads))

    def _slack(self, shift: int) -> int:
        return pl_cdiv(max(0, shift) + self.unit, self.unit) * self.unit

    @property
    def staged_rows(self) -> int:
        """Rows that the last image's staging writes, with those in front of it."""
        return (self.images - 1) * self.rows + pl_cdiv(self.phase_rows, self.stage_rows) * self.stage_rows

    @property
    def phase_rows(self) -> int:
        return max(self.phase_size(phase)[0] for phase in self.phases)

    @property
    def stage_rows(self) -> int:
        """Rows of an image that are staged at a time: whole native tiles, enough to hide their latency."""
        least = self.unit // math.gcd(self.pitch, self.unit)
        most = pl_cdiv(self.phase_rows, least)
        return least * max(1, min(most, _STAGED // (least * self.pitch)))

    @property
    def block_rows(self) -> int:
        """Rows of the image's block in VMEM; past the image they hold anything."""
        h = self.windows[0]
        return max(h.size, pl_cdiv(self.phase_rows, self.stage_rows) * self.stage_rows * h.stride)

    @property
    def block_columns(self) -> int:
        return max(self.windows[1].size, self.pitch * self.windows[1].stride)

    @property
    def out_rows(self) -> int:
        """Rows of the result's block for each image."""
        return self.rows if self.images > 1 else self.chunks * self.chunk_rows

    @property
    def splits(self) -> bool:
        return any(v.stride > 1 for v in self.windows)

    @property
    def quantizes(self) -> bool:
        return self.problem.quantize_lhs is not None

    @property
    def finds_scale(self) -> bool:
        q = self.problem.quantize_lhs
        return q is not None and not q.static

    @property
    def pushes(self) -> int:
        """Matrix instructions of a chunk, each of a native tile of rows: what there is to compile."""
        wide = pl_cdiv(self.problem.taps * self.tap_rows, self.mxu) * pl_cdiv(self.block_n, self.mxu)
        return self.chunk // self.unit * wide

    @property
    def partial(self) -> str:
        """dtype of one dot."""
        return "int32" if self.lhs_dot == "int8" else "float32"

    @property
    def exact_taps(self) -> int:
        """Taps in one dot: all, or as many as keep sums of integers exact on a float unit.

        Sums that are scaled anyway need not be: float32's rounding of them is within their bound.
        """
        p = self.problem
        if self.partial == "int32" or p.out_dtype != "int32":
            return p.taps
        lhs = dtype_bits(p.quantize_lhs.dtype if p.quantize_lhs else p.lhs.dtype)
        products = 1 << (EXACT_BITS - (lhs - 1) - (p.rhs.bits - 1))
        return max(0, min(p.taps, products // p.features))

    @property
    def pads(self) -> bool:
        """Whether each tap takes whole registers of lanes, where moving its features together costs more."""
        return self.problem.features % LANES != 0 and LANES % self.problem.features != 0

    @property
    def tap_rows(self) -> int:
        """Rows of the weights for each tap."""
        return self.lane_groups * LANES if self.pads else self.problem.features

    @property
    def widens_rhs(self) -> bool:
        """Whether the weights are rewritten into VMEM, in the matrix unit's dtype."""
        return self.problem.rhs.dtype != self.rhs_dot or self.pads


def _reads(window: Window, tap: int) -> tuple[int, int]:
    """(phase, shift): out i reads element (i + shift) of the phase."""
    at = tap * window.rhs_dilation - window.low
    return at % window.stride, at // window.stride


def dot_dtypes(p: ConvProblem, chip: Chip) -> tuple[str, str]:
    """What the matrix unit is fed, exact by construction: int4 fits int8; int8 and fp8 fit bfloat16."""
    lhs = p.quantize_lhs.dtype if p.quantize_lhs else p.lhs.dtype
    rhs = p.rhs.dtype
    if lhs in ("int8", "int4") and rhs in ("int8", "int4") and chip.is_native("int8", "int8"):
        return "int8", "int8"
    if is_fp8(lhs) and is_fp8(rhs) and chip.is_native(lhs, rhs):
        return lhs, rhs
    # Mosaic widens a narrow rhs on the way into the matrix unit.
    narrow = rhs in ("int8", "int4") or is_fp8(rhs)
    return "bfloat16", rhs if narrow else "bfloat16"


def make_plan(p: ConvProblem, chip: Chip, pitch: int, images: int, chunk_rows: int, block_n: int) -> Plan:
    """The plan with these blocks; NotImplementedError where VMEM does not hold them."""
    lhs_dot, rhs_dot = dot_dtypes(p, chip)
    h = p.windows[0]
    shifts = [_reads(h, t) for t in range(h.kernel)]
    above = max(0, -min(row for _, row in shifts))
    phase_rows = max(pl_cdiv(h.size - phase, h.stride) for phase, _ in shifts)
    need = max(phase_rows + above, h.out + max(0, max(row for _, row in shifts)))
    unit = 32 * 8 // dtype_bits(lhs_dot)
    rows = pl_cdiv(need, step := unit // math.gcd(pitch, unit)) * step
    plan = Plan(p, pitch, rows, images, chunk_rows, block_n, lhs_dot, rhs_dot, chip.bf16_math, chip.mxu)
    fits = rows % chunk_rows == 0 or (chunk_rows % rows == 0 and (images * rows) % chunk_rows == 0)
    if images > 1 and not fits:
        raise NotImplementedError(f"chunks of {chunk_rows} rows do not divide {images} images of {rows} rows")
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
    columns = pl_cdiv(plan.block_n, LANES) * LANES
    of_lhs = plan.images * plan.block_rows * pl_cdiv(plan.block_columns, 16) * 16 * lanes * p.lhs.bits // 8
    flat = (len(plan.phases) + len(plan.copies)) * plan.length * lanes * dtype_bits(plan.lhs_dot) // 8
    weights = p.k * columns * p.rhs.bits // 8
    out = plan.images * plan.out_rows * pl_cdiv(plan.pitch, 16) * 16 * columns * dtype_bits(p.out_dtype) // 8
    ready = p.taps * plan.tap_rows * columns * dtype_bits(plan.rhs_dot) // 8
    scratch = ready if plan.widens_rhs else 0
    scratch += plan.body * LANES * 4 if plan.images > 1 else 0
    scratch += plan.chunk * (3 * columns * 4 + p.taps * lanes * dtype_bits(plan.lhs_dot) // 8)
    return 2 * (of_lhs + weights + out) + flat + scratch
