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
    bands        neighbouring rows of the result in one dot: a convolution whose kernel has the rows of all of
                 them and whose row stride is as many times as great, with zeros in its weights
    features     whole registers of lanes of all taps come first in a dot, then what is left of each, several
                 taps to a register
"""

from __future__ import annotations

import dataclasses
import functools
import math

from qwix_kernels.chips import Chip
from qwix_kernels.conv.problem import ConvProblem, Window
from qwix_kernels.matmul.tpu_config import LANES, pl_cdiv
from qwix_kernels.matmul.tpu_plan import EXACT_BITS, is_fp8
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
    turns: int = 1  # groups of images in one block; the next one is staged while one is multiplied
    bands: int = 1  # neighbouring rows of the result side by side in the columns of the matrix unit

    @property
    def windows(self) -> tuple[Window, Window]:
        """The geometry of the dots, whose taps are those of all bands."""
        h, w = self.problem.windows
        if self.bands == 1:
            return h, w
        kernel, stride, out = (
            h.kernel + (self.bands - 1) * h.stride,
            self.bands * h.stride,
            h.out // self.bands,
        )
        high = (out - 1) * stride + kernel - h.size - h.low
        return dataclasses.replace(h, kernel=kernel, stride=stride, high=high), w

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
        return pl_cdiv(self.windows[0].out if self.images == 1 else self.images * self.rows, self.chunk_rows)

    @property
    def grid(self) -> tuple[int, int]:
        return pl_cdiv(self.problem.batch, self.block_images), pl_cdiv(
            self.problem.out_features, self.block_n
        )

    @property
    def block_images(self) -> int:
        """Images in one block."""
        return self.images * self.turns

    @property
    def copies_are_local(self) -> bool:
        """Whether a copy's row has places of the same row only."""
        return all(copy.skew == 0 for copy in self.copies)

    @property
    def stage_groups(self) -> int:
        """Groups of rows in which an image is staged."""
        return pl_cdiv(self.phase_rows, self.stage_rows)

    @functools.cached_property
    def taps(self) -> tuple[Tap, ...]:
        """In the order of the kernel's elements."""
        h, w = ([reads(v, t) for t in range(v.kernel)] for v in self.windows)
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
        """Whether columns are taken apart."""
        return self.windows[1].stride > 1

    @property
    def splits_words(self) -> bool:
        """Whether columns are taken apart four bytes at a time."""
        return self.windows[1].stride == 2 and self.problem.lhs.dtype == "int8"

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
        wide = pl_cdiv(self.depth, self.mxu) * pl_cdiv(self.columns, self.mxu)
        return self.chunk // self.unit * wide

    @property
    def depth(self) -> int:
        """Products in a dot, zeros included."""
        return len(self.taps) * self.tap_rows

    @property
    def columns(self) -> int:
        """Of a dot."""
        return self.block_n * self.bands

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
            return len(self.taps)
        lhs = dtype_bits(p.quantize_lhs.dtype if p.quantize_lhs else p.lhs.dtype)
        products = 1 << (EXACT_BITS - (lhs - 1) - (p.rhs.bits - 1))
        return max(0, min(len(self.taps), products // p.features))

    @property
    def full(self) -> int:
        """Features of a tap in whole registers of lanes."""
        return self.problem.features // LANES * LANES

    @property
    def rest(self) -> int:
        """Lanes for the other features of a tap: as many as several taps fill a register with."""
        left = self.problem.features - self.full
        return 1 << (left - 1).bit_length() if left else 0

    @property
    def pads(self) -> bool:
        """Whether some of these lanes have no feature."""
        return self.tap_rows != self.problem.features

    @property
    def tap_rows(self) -> int:
        """Rows of the weights for each tap."""
        return self.full + self.rest

    def weight_row(self, tap: int, feature: int) -> int:
        """Where the weights of a tap's feature lie: whole registers come first in a dot, then the rests."""
        first = tap // self.exact_taps * self.exact_taps
        taps = min(self.exact_taps, len(self.taps) - first)
        of_dot = (tap - first) * self.full + feature
        if feature >= self.full:
            of_dot = taps * self.full + (tap - first) * self.rest + feature - self.full
        return first * self.tap_rows + of_dot

    @property
    def widens_rhs(self) -> bool:
        """Whether the weights are rewritten into VMEM, in the matrix unit's dtype."""
        return (
            self.problem.rhs.dtype != self.rhs_dot
            or bool(self.full and self.rest)
            or self.pads
            or self.bands > 1
            or self.turned
        )

    @property
    def turned(self) -> bool:
        """Whether the weights lie column by column in memory, as they do where that pads fewer lanes."""
        return is_turned(self.problem)


def is_turned(p: ConvProblem) -> bool:
    """Whether XLA's layout of a 1 x 1 kernel has its inputs along the lanes."""
    up = lambda size: pl_cdiv(size, LANES) * LANES
    return p.taps == 1 and p.out_features * up(p.features) < p.features * up(p.out_features)


def reads(window: Window, tap: int) -> tuple[int, int]:
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
