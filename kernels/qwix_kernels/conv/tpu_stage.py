"""How images get into VMEM as the dots of the TPU convolution kernel read them, laid out as in tpu_plan.py.

A turn's images are staged at once, in loops (`stage`), or in as many pieces as the turn before has chunks
(`stage_piece`): then the scheduler does the vector unit's work while the matrix units are busy. Buffers come
in two sets for that, so that no load of a dot waits for a store.
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
from qwix_kernels.problem import RowQuantize, dtype_bits

Refs = dict[str, Any]


def stage(plan: Plan, r: Refs, which: int = 0, turn: Any = 0) -> None:
    """The images of a turn, flat, with their copies, into the set of buffers `which`; after `scales`."""
    for slot in range(plan.images):
        for phase in plan.phases:
            whole = plan.phase_size(phase)[0] // plan.stage_rows

            @pl.loop(0, whole)
            def _(group, slot=slot, phase=phase):
                _group(plan, r, which, turn, slot, phase, group, None)

            for group in range(whole, plan.stage_groups):
                _group(plan, r, which, turn, slot, phase, group, _limit(plan, phase, group))
    count = plan.period // plan.per_word
    start = (plan.lead - plan.back()) // plan.per_word
    for phase, copies in _copies(plan):

        @pl.loop(0, (plan.back() + plan.body + plan.ahead) // plan.period)
        def _(i, phase=phase, copies=copies):
            _copy(plan, r, which, phase, copies, start + pl.multiple_of(i * count, 8))


def stage_piece(plan: Plan, r: Refs, which: int, turn: Any, piece: Any) -> None:
    """One of as many pieces of `stage` as there are chunks; without a loop, for the scheduler."""
    total = plan.images * plan.stage_groups
    each = -(-total // plan.chunks)
    count = plan.period // plan.per_word
    for k in range(each):
        i = piece * each + k
        if not isinstance(i, int):
            i = jnp.minimum(i, total - 1) if each * plan.chunks > total else i
        elif i >= total:
            break
        slot, group = (0, i) if plan.images == 1 else (i // plan.stage_groups, i % plan.stage_groups)
        for phase in plan.phases:
            ragged = plan.phase_size(phase)[0] < plan.stage_groups * plan.stage_rows
            _group(plan, r, which, turn, slot, phase, group, _limit(plan, phase, group) if ragged else None)
        if plan.copies_are_local:
            at = (plan.lead + slot * (plan.rows * plan.pitch)) // plan.per_word + group * count
            at = at if isinstance(at, int) else pl.multiple_of(at, 8)
            for phase, copies in _copies(plan):
                _copy(plan, r, which, phase, copies, at)
    if not plan.copies_are_local:
        start = (plan.lead - plan.back()) // plan.per_word
        for phase, copies in _copies(plan):
            for i in range((plan.back() + plan.body + plan.ahead) // plan.period):
                _copy(plan, r, which, phase, copies, start + i * count)


def _copies(plan: Plan) -> list[tuple[tuple[int, int], list[Copy]]]:
    """By phase."""
    found = [(phase, [copy for copy in plan.copies if copy.phase == phase]) for phase in plan.phases]
    return [(phase, copies) for phase, copies in found if copies]


def _limit(plan: Plan, phase: tuple[int, int], group: Any) -> Any:
    """Flat rows of a group of rows that lie in the image."""
    left = plan.phase_size(phase)[0] - group * plan.stage_rows
    left = min(max(left, 0), plan.stage_rows) if isinstance(left, int) else left
    return left * plan.pitch


def clear(plan: Plan, r: Refs, which: int = 0) -> None:
    """Zeros where taps read above, between and below the images."""
    names = [flat_name(phase, which) for phase in plan.phases]
    if plan.turns > 1 and plan.copies_are_local:  # they are copied with their rows
        names += [name_of(plan, copy, which) for copy in plan.copies]
    gaps = [(0, plan.lead)]
    for slot in range(plan.images):
        staged = slot * plan.rows + plan.stage_groups * plan.stage_rows
        end = (slot + 1) * plan.rows
        if end > staged and slot + 1 < plan.images:
            gaps.append((plan.lead + staged * plan.pitch, (end - staged) * plan.pitch))
    start = plan.lead + plan.staged_rows * plan.pitch
    gaps.append((start, plan.length - start))
    for buffer in (r[name] for name in names):
        if plan.pads:  # lanes that no feature fills meet rows of zeros
            rest = plan.lanes[-1].stop - plan.lanes[-1].start
            buffer[plan.lane_groups - 1, :, rest:] = jnp.zeros((buffer.shape[1], LANES - rest), jnp.int32)
        for at, size in gaps:
            words = slice(at // plan.per_word, (at + size) // plan.per_word)
            for group in range(plan.lane_groups):
                buffer[group, words, :] = jnp.zeros((size // plan.per_word, buffer.shape[2]), jnp.int32)


def flat_name(phase: tuple[int, int], which: int = 0) -> str:
    return f"flat{phase[0]}_{phase[1]}_{which}"


def look(plan: Plan, r: Refs, turn: Any) -> None:
    """Finds the greatest magnitude in each of a turn's images, where their scales are found here."""
    if plan.finds_scale:
        h, w = plan.windows
        packed = plan.bf16_math and r["lhs"].dtype == jnp.bfloat16
        for slot in range(plan.images):
            image = turn * plan.images + slot
            top = tpu_epilogue.absmax(r["lhs"], image, h.size, w.size, packed=packed)
            r["tops"][image, :, :] = jnp.broadcast_to(top, r["tops"].shape[1:])


def look_at_piece(plan: Plan, r: Refs, turn: Any, piece: Any) -> None:
    """One of as many pieces of `look` as there are chunks, without a loop; the first one starts anew."""
    if not plan.finds_scale:
        return
    h, w = plan.windows
    packed = plan.bf16_math and r["lhs"].dtype == jnp.bfloat16
    each = -(-h.size // plan.chunks)
    for slot in range(plan.images):
        image = turn * plan.images + slot
        first = piece * each
        if each * plan.chunks > h.size:
            first = min(first, h.size - each) if isinstance(first, int) else jnp.minimum(first, h.size - each)
        rows = [first + i for i in range(each)]
        top = tpu_epilogue.absmax_of_rows(r["lhs"], image, rows, w.size, packed=packed)
        if not isinstance(piece, int):
            top = jnp.maximum(jnp.where(piece == 0, 0.0, r["tops"][image, :, :]), top)
        r["tops"][image, :, :] = jnp.broadcast_to(top, r["tops"].shape[1:])


def scales(plan: Plan, r: Refs, which: int = 0, turn: Any = 0) -> None:
    """Turns what `look` found into the scales of a turn's images, and keeps them for the sums."""
    for slot in range(plan.images):
        image = turn * plan.images + slot
        scale = None
        how = plan.problem.quantize_lhs
        if how is not None and plan.finds_scale:
            scale = row_scale(r["tops"][image, :, :], how)
            r["found"][image, :, :] = scale
            scale = scale[:1, :1]
        elif "lhs_scale" in r:
            scale = r["lhs_scale"][image, :1, :1]
        if scale is not None and plan.images > 1:
            rows = pl.ds(slot * plan.rows * plan.pitch, plan.rows * plan.pitch)
            r[f"row_scale{which}"][rows, :] = jnp.broadcast_to(scale, (plan.rows * plan.pitch, LANES))


def _inverse(plan: Plan, r: Refs, image: Any) -> jax.Array | None:
    """1 / scale of an image, [1, 1], where it is quantized here."""
    how = plan.problem.quantize_lhs
    if how is None:
        return None
    return values.inverse(r["found" if plan.finds_scale else "lhs_scale"][image, :1, :1], how)


def _group(
    plan: Plan, r: Refs, which: int, turn: Any, slot: Any, phase: tuple[int, int], group: Any, limit: Any
) -> None:
    """Some rows of one phase of an image, into its flat array; zeros past the `limit` of flat rows."""
    image, words = turn * plan.images + slot, plan.period // plan.per_word
    inverse = _inverse(plan, r, image)
    at = (plan.lead + slot * (plan.rows * plan.pitch)) // plan.per_word + group * words
    at = at if isinstance(at, int) else pl.multiple_of(at, 8)
    for i, lanes in enumerate(plan.lanes):
        v = _rows(plan, r, image, phase, group, lanes, inverse)
        if limit is not None:
            v = v.astype(jnp.int32 if jnp.issubdtype(v.dtype, jnp.integer) else jnp.float32)
            row = lax.broadcasted_iota(jnp.int32, v.shape, 0)
            v = jnp.where(row < limit, v, jnp.zeros_like(v))
        packed = pltpu.bitcast(values.narrow(v, plan.lhs_dot), jnp.int32)
        r[flat_name(phase, which)][i, pl.ds(at, words), : packed.shape[1]] = packed


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
        first, count = group * plan.stage_rows, plan.stage_rows
        if h.stride == 1:
            v = x[image, pl.ds(first, count), : plan.pitch, lanes]
        else:
            rows = [(first + i) * h.stride + phase[0] for i in range(count)]
            v = jnp.stack([x[image, row, : plan.pitch, lanes] for row in rows])
        as_it_is = q is None and x.dtype == jnp.dtype(plan.lhs_dot) and plan.pitch % plan.unit == 0
        v = (v if as_it_is else v.astype(wide)).reshape(-1, v.shape[2])
    elif plan.splits_words:
        lines = []
        for i in range(plan.stage_rows):
            row, line = (group * plan.stage_rows + i) * h.stride + phase[0], r["line"].at[i]
            words = pltpu.bitcast(x[image, row, : 2 * plan.pitch, lanes], jnp.int32)
            line[:, : words.shape[1]] = words
            lines.append(_every_other(line, plan.pitch // 4, words.shape[1], phase[1]))
        v = lines[0] if len(lines) == 1 else jnp.concatenate(lines, axis=0)
        v = pltpu.bitcast(v, jnp.int8)
        if plan.lhs_dot != "int8":
            v = v.astype(wide)
    else:
        lines = []
        for i in range(plan.stage_rows):
            row = (group * plan.stage_rows + i) * h.stride + phase[0]
            r["line"][i, :, : lanes.stop - lanes.start] = x[image, row, :, lanes].astype(wide)
            line = r["line"][i, pl.ds(phase[1], plan.pitch, stride=w.stride), : lanes.stop - lanes.start]
            lines.append(line)
        v = lines[0] if len(lines) == 1 else jnp.concatenate(lines, axis=0)
    if q is not None and inverse is not None:
        v = _quantize(v * inverse, q, plan.lhs_dot)
    return v


def _quantize(x: jax.Array, how: RowQuantize, dtype: str) -> jax.Array:
    """As `values.quantize`, for `dtype`: of int8 only the lowest bytes count, of bfloat16 float32 will do.

    float32 has no fraction at this magnitude, so that the sum is rounded, half to even, and its lowest bits
    are the integer: one operation of the vector unit instead of two or three.
    """
    if not jnp.issubdtype(how.dtype, jnp.integer) or how.static:
        return values.quantize(x, how)
    shift = jnp.float32(1.5 * 2**23)
    x = jnp.minimum(x, jnp.float32(how.limits[1])) + shift
    return lax.bitcast_convert_type(x, jnp.int32) if dtype == "int8" else x - shift


def _every_other(line: Any, count: int, lanes: int, phase: int) -> jax.Array:
    """`count` words of 4 bytes each of the even or the odd columns of a row, out of twice as many words."""
    low, high = (line[pl.ds(i, count, stride=2), :lanes] for i in (0, 1))
    first, last = (np.int32(0xFF), np.int32(-1 << 24))
    second, third = (np.int32(0xFF00), np.int32(0xFF0000))
    right = lambda x, by: lax.shift_right_logical(x, np.int32(by))
    if phase == 0:  # bytes 0 and 2 of both
        return (low & first) | (right(low, 8) & second) | ((high & first) << 16) | ((high & third) << 8)
    return (right(low, 8) & first) | (right(low, 16) & second) | ((high & second) << 8) | (high & last)


def _copy(plan: Plan, r: Refs, which: int, phase: tuple[int, int], copies: list[Copy], at: Any) -> None:
    """A period of the shifted copies of a flat image, word by word: 4 (or 2) rows lie in one of 32 bits.

    Word i of a copy has rows of words i + words and i + words + 1; both loads may start at any sublane, as
    the lanes of one register lie in an array of their own. All copies are made together, so that they share
    loads and hide each other's latency.
    """
    per, source = plan.per_word, r[flat_name(phase, which)]
    count = plan.period // per
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
            r[name_of(plan, copy, which)][group, pl.ds(at, count), :] = v


def name_of(plan: Plan, copy: Copy, which: int = 0) -> str:
    """Of the buffer that a tap reads."""
    return flat_name(copy.phase, which) if plan.is_image(copy) else f"copy{plan.copies.index(copy)}_{which}"


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
