"""The body of the TPU convolution kernel: one grid step of a `tpu_plan.Plan`.

The grid is (blocks of images, blocks of output features). In one step:
    1. on the first block of output features the images are staged: quantized where the plan says so, laid out
       flat phase by phase, with the shifted copies that the taps read (`stage`);
    2. chunk by chunk, the taps stand side by side along C and one dot gives the sums of all of them;
    3. scales, bias and activation go on; the result is rounded once, or quantized.

What lies in the result's block past the image, and columns past its width, is cut off by the store.

The ladder: static microseconds of 3 x 3, 8 x 56 x 56 x 256 -> 256, int8 in, bfloat16 out, and what binds.
`python -m bench.price --suite conv` gives the last figure of a line.

  v6e   XLA's bfloat16 70.2, its int8 193. The matrix units need 16.1; 18.4 with rows of 56 in a pitch of 64
            53.4  chunks of 128 places, a copy for each column shift made 64 places at a time
        ->  39.8 in 256 -> 33.9 in 512 -> 32.3 in 896 -> 30.9 in 1792: filling and emptying the matrix units
                  costs some 140 cycles a chunk. The dots are then at 94 % of the units' peak, in 19.9
        ->  25.8 copies made in one loop, 256 places at a time, which share loads and hide their latency
        rejected: a pitch of 56, which wastes nothing, but whose rows start within a native tile, so that
        every tap has a copy of its own: 42.6 against 39.8 in chunks of 256
  v6e   14 x 14 x 256: 3.3 -> 2.0 without XLA's op in front that multiplies two scales
  v6e   2 x 64 x 64 x 320: over two minutes to compile with features of taps side by side that fill no whole
        registers, each moved by half of one -> 12 seconds with taps of 384, rows of zeros in the weights
  v5e   XLA's bfloat16 221, its int8 372; the matrix units need 75.1: 94.7 in chunks of 448
  v7x   XLA's bfloat16 48.8; no int8 unit, so bfloat16, which needs 25.7: 40.4 in three dots whose sums of
        integers are exact in float32; sums that are scaled need not be -> one dot
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from qwix_kernels.conv import tpu_epilogue
from qwix_kernels.conv.tpu_plan import Copy, Plan
from qwix_kernels.matmul import tpu_values as values
from qwix_kernels.matmul.elementwise import row_scale
from qwix_kernels.matmul.tpu_config import LANES
from qwix_kernels.problem import dtype_bits

Refs = dict[str, Any]
_WEIGHT_ROWS = 256  # widened at a time


def kernel(plan: Plan, emulate: bool, names: tuple[str, ...], *refs: Any) -> None:
    """One grid step. `names` says which refs there are: see `tpu.run`."""
    r = dict(zip(names, refs, strict=True))

    @pl.when(pl.program_id(1) == 0)
    def _():
        stage(plan, r)

    if plan.widens_rhs:
        _widen_rhs(plan, r)

    @pl.loop(0, plan.chunks)
    def _(i):
        _chunk(plan, emulate, r, i)


# --- staging


def stage(plan: Plan, r: Refs) -> None:
    """The images of the block, flat, with their copies and their scales."""
    _zero_borders(plan, r)
    for image in range(plan.images):
        inverse = _scale(plan, r, image)
        for phase in plan.phases:
            _stage_phase(plan, r, image, phase, inverse)
    for phase in plan.phases:
        if copies := [copy for copy in plan.copies if copy.phase == phase]:
            _stage_copies(plan, r, phase, copies)


def _zero_borders(plan: Plan, r: Refs) -> None:
    """Zeros where taps read above, between and below the images."""
    buffers = [r[flat_name(phase)] for phase in plan.phases]
    gaps = [(0, plan.lead)]
    for image in range(plan.images):
        staged = image * plan.rows + -(-plan.phase_rows // plan.stage_rows) * plan.stage_rows
        end = (image + 1) * plan.rows
        if end > staged and image + 1 < plan.images:
            gaps.append((plan.lead + staged * plan.pitch, (end - staged) * plan.pitch))
    start = plan.lead + plan.staged_rows * plan.pitch
    gaps.append((start, plan.length - start))
    for buffer in buffers:
        if plan.pads:  # lanes that no feature fills meet rows of zeros
            rest = plan.lanes[-1].stop - plan.lanes[-1].start
            buffer[plan.lane_groups - 1, :, rest:] = jnp.zeros((buffer.shape[1], LANES - rest), jnp.int32)
        for at, size in gaps:
            words = slice(at // plan.per_word, (at + size) // plan.per_word)
            for group in range(plan.lane_groups):
                buffer[group, words, :] = jnp.zeros((size // plan.per_word, buffer.shape[2]), jnp.int32)


def flat_name(phase: tuple[int, int]) -> str:
    return f"flat{phase[0]}_{phase[1]}"


def _scale(plan: Plan, r: Refs, image: int) -> jax.Array | None:
    """1 / scale of an image, [1, 1], where it is quantized here; the scale is kept for the sums."""
    scale = None
    how = plan.problem.quantize_lhs
    if how is not None and plan.finds_scale:
        h, w = plan.windows
        packed = plan.bf16_math and r["lhs"].dtype == jnp.bfloat16
        top = tpu_epilogue.absmax(r["lhs"], image, h.size, w.size, packed=packed)
        scale = row_scale(top, how)
        r["found"][image, :, :] = jnp.broadcast_to(scale, r["found"].shape[1:])
    elif "lhs_scale" in r:
        scale = r["lhs_scale"][image, :1, :1]
    if scale is not None and plan.images > 1:
        rows = pl.ds(image * plan.rows * plan.pitch, plan.rows * plan.pitch)
        r["row_scale"][rows, :] = jnp.broadcast_to(scale, (plan.rows * plan.pitch, LANES))
    if how is None:
        return None
    assert scale is not None
    return values.inverse(scale, how)


def _stage_phase(plan: Plan, r: Refs, image: int, phase: tuple[int, int], inverse: jax.Array | None) -> None:
    """One phase of an image, into its flat array; rows past the image are zero."""
    count, height = plan.stage_rows, plan.phase_size(phase)[0]
    per = plan.per_word
    start = (plan.lead + image * plan.rows * plan.pitch) // per

    def write(group: Any, past: int) -> None:
        at = group * (plan.period // per)
        at = pl.multiple_of(at, 8) if isinstance(at, jax.Array) else at
        for i, lanes in enumerate(plan.lanes):
            v = _rows(plan, r, image, phase, group, lanes, inverse)
            if past:
                v = v.astype(jnp.int32 if jnp.issubdtype(v.dtype, jnp.integer) else jnp.float32)
                row = lax.broadcasted_iota(jnp.int32, v.shape, 0)
                v = jnp.where(row < (count - past) * plan.pitch, v, jnp.zeros_like(v))
            words = pltpu.bitcast(values.narrow(v, plan.lhs_dot), jnp.int32)
            r[flat_name(phase)][i, pl.ds(start + at, plan.period // per), : words.shape[1]] = words

    whole, groups = height // count, -(-plan.phase_rows // count)

    @pl.loop(0, whole)
    def _(group):
        write(group, 0)

    for group in range(whole, groups):
        write(group, min(count, count - (height - group * count)))


def _rows(
    plan: Plan,
    r: Refs,
    image: int,
    phase: tuple[int, int],
    group: Any,
    lanes: slice,
    inverse: jax.Array | None,
) -> jax.Array:
    """`stage_rows` rows of a phase, [rows * pitch, lanes], quantized; in 32 bits, or as they go on."""
    h, w = plan.windows
    q, x = plan.problem.quantize_lhs, r["lhs"]
    wide = jnp.int32 if jnp.issubdtype(x.dtype, jnp.integer) else jnp.float32
    if not plan.splits:
        v = x[image, pl.ds(group * plan.stage_rows, plan.stage_rows), : plan.pitch, lanes]
        as_it_is = q is None and x.dtype == jnp.dtype(plan.lhs_dot) and plan.pitch % plan.unit == 0
        v = (v if as_it_is else v.astype(wide)).reshape(-1, v.shape[2])
    else:
        lines = []
        for i in range(plan.stage_rows):
            row = (group * plan.stage_rows + i) * h.stride + phase[0]
            r["line"][i, :, : lanes.stop - lanes.start] = x[image, row, :, lanes].astype(wide)
            line = r["line"][i, pl.ds(phase[1], plan.pitch, stride=w.stride), : lanes.stop - lanes.start]
            lines.append(line)
        v = lines[0] if len(lines) == 1 else jnp.concatenate(lines, axis=0)
    if q is not None and inverse is not None:
        v = values.quantize(v * inverse, q)
    return v


def _stage_copies(plan: Plan, r: Refs, phase: tuple[int, int], copies: list[Copy]) -> None:
    """The shifted copies of a flat image, word by word: 4 (or 2) rows lie in one word of 32 bits.

    Word i of a copy has rows of words i + words and i + words + 1; both loads may start at any sublane, as
    the lanes of one register lie in an array of their own. One loop makes all copies, so that they share
    loads and hide each other's latency.
    """
    per, source = plan.per_word, r[flat_name(phase)]
    count, start = plan.period // per, (plan.lead - plan.back()) // per

    @pl.loop(0, (plan.back() + plan.body + plan.ahead) // plan.period)
    def _(i):
        at = start + pl.multiple_of(i * count, 8)
        for group in range(plan.lane_groups):
            loaded: dict[int, jax.Array] = {}

            def load(word: int, group: int = group, loaded: dict[int, jax.Array] = loaded) -> jax.Array:
                if word not in loaded:
                    loaded[word] = source[group, pl.ds(at + word, count), :]
                return loaded[word]

            for copy in copies:
                words, left = copy.shift // per, copy.shift % per * (32 // per)
                v = load(words)
                if left:
                    v = lax.shift_right_logical(v, np.int32(left)) | (load(words + 1) << np.int32(32 - left))
                masks = mask(plan, copy)
                if masks is not None:
                    v = v & r["masks"][masks, :, : v.shape[1]]
                r[name_of(plan, copy)][group, pl.ds(at, count), :] = v


def _lanes(x: jax.Array, width: int) -> jax.Array:
    """[rows, 128], the same in every lane, as [rows, width]."""
    if width <= LANES:
        return x[:, :width]
    whole = jnp.concatenate([x] * -(-width // LANES), axis=1)
    return whole[:, :width]


def name_of(plan: Plan, copy: Copy) -> str:
    """Of the buffer that a tap reads."""
    return flat_name(copy.phase) if plan.is_image(copy) else f"copy{plan.copies.index(copy)}"


def masked(plan: Plan) -> list[tuple[int, int, int]]:
    """The different masks: (column shift, skew, width of the phase)."""
    wanted = [(c.column, c.skew, plan.phase_size(c.phase)[1]) for c in plan.copies if plan.is_masked(c)]
    return list(dict.fromkeys(wanted))


def mask(plan: Plan, copy: Copy) -> int | None:
    """Which of `masked` a copy needs."""
    if not plan.is_masked(copy):
        return None
    return masked(plan).index((copy.column, copy.skew, plan.phase_size(copy.phase)[1]))


def mask_array(plan: Plan) -> np.ndarray | None:
    """[masks, words, 128] of bits that stay: those of places whose tap lies in their own row."""
    found = []
    bits = dtype_bits(plan.lhs_dot)
    place = np.arange(plan.stage_rows * plan.pitch)
    for column, skew, width in masked(plan):
        read = (place + skew) % plan.pitch + column
        keep = (read >= 0) & (read < width)
        full = np.where(keep, (1 << bits) - 1, 0).astype(np.uint64).reshape(-1, 32 // bits)
        words = np.bitwise_or.reduce([full[:, i] << np.uint64(bits * i) for i in range(32 // bits)])
        found.append(np.repeat(words.astype(np.uint32).view(np.int32)[:, None], LANES, axis=1))
    return np.stack(found) if found else None


# --- the dots


def _widen_rhs(plan: Plan, r: Refs) -> None:
    """The weights in the matrix unit's dtype, each tap's in whole registers of rows."""
    size, stride, ready = plan.problem.features, plan.tap_rows, r["rhs_ready"]
    for tap in range(plan.problem.taps):
        for lo in range(0, size, _WEIGHT_ROWS):
            rows = min(_WEIGHT_ROWS, size - lo)
            w = r["rhs"][tap * size + lo : tap * size + lo + rows, :]
            if w.dtype != ready.dtype:
                w = values.narrow(values.widen(w, None), plan.rhs_dot)
            ready[tap * stride + lo : tap * stride + lo + rows, :] = w
        if stride > size:
            nothing = jnp.zeros((stride - size, ready.shape[1]), ready.dtype)
            ready[tap * stride + size : (tap + 1) * stride, :] = nothing


def _chunk(plan: Plan, emulate: bool, r: Refs, i: jax.Array) -> None:
    """The sums, and the result, of one chunk of places."""
    p = plan.problem
    per = plan.per_word
    start = plan.lead // per + pl.multiple_of(i * (plan.chunk // per), 8)
    weights = r["rhs_ready"] if plan.widens_rhs else r["rhs"]
    total: Any = None
    for first in range(0, p.taps, plan.exact_taps):
        taps = range(first, min(first + plan.exact_taps, p.taps))
        parts = []
        for tap in taps:
            copy, at = plan.reads[tap]
            for group, lanes in enumerate(plan.lanes):
                words = r[name_of(plan, copy)][group, pl.ds(start + at // per, plan.chunk // per), :]
                part = pltpu.bitcast(words, jnp.dtype(plan.lhs_dot))
                parts.append(part if plan.pads else part[:, : lanes.stop - lanes.start])
        lhs = parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)
        rhs = weights[first * plan.tap_rows : (taps[-1] + 1) * plan.tap_rows, :]
        part = _dot(plan, emulate, lhs, rhs)
        if plan.problem.out_dtype == "int32":
            part = part.astype(jnp.int32)
        total = part if total is None else total + part
    _finish(plan, r, i, total)


def _dot(plan: Plan, emulate: bool, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    dtype = jnp.dtype(plan.partial)
    if emulate:  # XLA:CPU multiplies neither int4 nor fp8
        lhs, rhs = lhs.astype(dtype), rhs.astype(dtype)
    precision = lax.Precision.HIGHEST if emulate else None
    return lax.dot_general(lhs, rhs, (((1,), (0,)), ((), ())), precision, preferred_element_type=dtype)


def _finish(plan: Plan, r: Refs, i: jax.Array, total: jax.Array) -> None:
    """Scales, bias, activation, and the result of a chunk."""
    of_image = None
    if "lhs_scale" in r or plan.finds_scale:
        if plan.images > 1:
            of_image = _lanes(r["row_scale"][pl.ds(i * plan.chunk, plan.chunk), :], total.shape[1])
        else:
            of_image = r["found" if plan.finds_scale else "lhs_scale"][0, :1, :1]
    z = tpu_epilogue.finish(plan.problem, r, total, of_image)
    _store(plan, r, i, z)


def _store(plan: Plan, r: Refs, i: jax.Array, z: jax.Array) -> None:
    """Some rows of an image, or all rows of some images."""
    rows, columns = plan.chunk_rows, z.shape[1]
    z = z.reshape(rows, plan.pitch, columns)
    if plan.images == 1:
        r["out"][0, pl.ds(i * rows, rows)] = z
    elif rows <= plan.rows:
        each = plan.rows // rows
        r["out"][i // each, pl.ds(i % each * rows, rows)] = z
    else:
        some = rows // plan.rows
        r["out"][pl.ds(i * some, some)] = z.reshape(some, plan.rows, plan.pitch, columns)
