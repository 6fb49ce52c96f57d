"""The search of ``scales.py`` in machine code: one pass over a block of groups for all candidates, in place of ten for each.

Groups are independent of one another, so vector registers hold one weight of many groups. A tile of groups is transposed into the
first- or second-level cache, and every candidate is tried on it there.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from .compiled import compiled

TILE = 64  # groups: sixteen at a time is what a vector register holds, and LLVM makes vectors only of longer loops
LONGEST_GROUP = 1024  # of which a tile fits into a second-level cache
FREE = ("nnan", "nsz", "contract")

# How scales are rounded, and what the next one is: a float of few mantissa bits, float32 itself, E4M3's next number, powers of two.
FLOAT, SINGLE, E4M3, E8M0 = range(4)
# Columns of the tables of numbers and of integers that describe grids.
UNIT, LOW, HIGH, LEAST, EDGE, MAGIC, SPARE = range(7)
MANTISSA, BITS, SIGNED, MIRRORED, FIRST, LAST, REFINEMENTS = range(7)

_EXPONENT = np.int32(0x7F800000)
_ADDEND = np.float32(1.5 * 2.0**23)  # a sum with it is a whole number
_TINY = np.float32(1e-18)

_inline: Any = njit(error_model="numpy", inline="always")
_instruction: Any = intrinsic


@_instruction
def _bits(typing: Any, x: Any) -> Any:
    """The int32 with the bits of a float32."""
    return types.int32(types.float32), lambda context, builder, signature, args: builder.bitcast(
        args[0], context.get_value_type(types.int32)
    )


@_instruction
def _float(typing: Any, x: Any) -> Any:
    """The float32 with the bits of an int32."""
    return types.float32(types.int32), lambda context, builder, signature, args: builder.bitcast(
        args[0], context.get_value_type(types.float32)
    )


@_instruction
def _put(typing: Any, array: Any, index: Any, value: Any) -> Any:
    """``array[index] = value`` for a contiguous array, never as a part of a scattering vector store, which takes twice as long."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, args[0]).data
        builder.store_atomic(args[2], builder.gep(data, [args[1]]), "monotonic", 4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.float32), code


@_inline
def _step(scale: Any, unit: Any) -> Any:
    """Signed size of a grid's smallest step, never zero."""
    size = max(abs(scale) * unit, _TINY)
    return -size if scale < 0 else size


@_inline
def _nearest_whole(y: Any, low: Any, high: Any) -> Any:
    return min(max((y + _ADDEND) - _ADDEND, -low), high)


@_inline
def _nearest_float(y: Any, low: Any, high: Any, least: Any, edge: Any, magic: Any) -> Any:
    """Nearest level of a floating grid, as ``Grid.round`` finds it; below ``edge`` the step is half as wide."""
    binade = min(max(_float(_bits(y) & _EXPONENT), least), high)
    work = (binade * np.float32(0.5) if y < edge else binade) * magic
    return min(max((y + work) - work, -low), high)


@_inline
def _stored(scale: Any, kind: Any, mantissa: Any, least: Any, largest: Any) -> Any:
    """Nearest number that a scale's dtype holds."""
    if kind == E8M0:
        v = min(max(scale, np.float32(2.0**-126)), np.float32(2.0**126))
        power: Any = _float(_bits(v) & _EXPONENT)
        return power * np.float32(2) if v > power * np.float32(1.4142135) else power
    v = min(scale, largest)
    if kind == SINGLE:
        return v
    shift = np.int32(23 - mantissa)
    work = least * _ADDEND * _float((127 - mantissa) << 23)
    bits = _bits(v)
    bits += (np.int32(1) << (shift - np.int32(1))) - np.int32(1) + ((bits >> shift) & np.int32(1))
    rounded = _float((bits >> shift) << shift)
    return (v + work) - work if v < least else rounded


@_inline
def _round_all(scale: Any, store: Any, kind: Any, mantissa: Any) -> None:
    """Replace positive scales by the nearest ones that can be stored, as multiples of the store's unit."""
    unit, least, largest = store[0], store[1], store[2]
    for t in range(TILE):
        scale[t] = _stored(scale[t] / unit, kind, mantissa, least, largest)


@_inline
def _errors(x: Any, scale: Any, grid: Any, mantissa: Any, inverse: Any, error: Any) -> None:
    """Squared error of each group under signed scales."""
    unit, low, high, least, edge, magic = grid[UNIT], grid[LOW], grid[HIGH], grid[LEAST], grid[EDGE], grid[MAGIC]
    for t in range(TILE):
        inverse[t] = np.float32(1) / _step(scale[t], unit)
        error[t] = 0
    for j in range(x.shape[0]):
        if mantissa < 0:
            for t in range(TILE):
                y = x[j, t] * inverse[t]
                d = y - _nearest_whole(y, low, high)
                error[t] += d * d
        else:
            for t in range(TILE):
                y = x[j, t] * inverse[t]
                d = y - _nearest_float(y, low, high, least, edge, magic)
                error[t] += d * d
    for t in range(TILE):
        step = _step(scale[t], unit)
        error[t] *= step * step


@_inline
def _fit(x: Any, scale: Any, grid: Any, mantissa: Any, inverse: Any, cross: Any, square: Any, fitted: Any) -> None:
    """Least-squares magnitudes of the scales, given the codes under ``scale``."""
    unit, low, high, least, edge, magic = grid[UNIT], grid[LOW], grid[HIGH], grid[LEAST], grid[EDGE], grid[MAGIC]
    for t in range(TILE):
        inverse[t] = np.float32(1) / _step(scale[t], unit)
        cross[t] = 0
        square[t] = 0
    for j in range(x.shape[0]):
        if mantissa < 0:
            for t in range(TILE):
                y = x[j, t] * inverse[t]
                q = _nearest_whole(y, low, high)
                cross[t] += y * q
                square[t] += q * q
        else:
            for t in range(TILE):
                y = x[j, t] * inverse[t]
                q = _nearest_float(y, low, high, least, edge, magic)
                cross[t] += y * q
                square[t] += q * q
    for t in range(TILE):
        fitted[t] = max(abs(scale[t]) * cross[t] / max(square[t], _TINY), np.float32(0))


@_inline
def _attempt(
    x: Any, scale: Any, unit: Any, sign: Any, grid: Any, mantissa: Any, inverse: Any, error: Any, best: Any, least: Any
) -> None:
    """Keep the stored scales ``scale * unit * sign`` where their error is the least so far."""
    for t in range(TILE):
        scale[t] *= unit * sign[t]
    _errors(x, scale, grid, mantissa, inverse, error)
    for t in range(TILE):
        best[t] = scale[t] if error[t] < least[t] else best[t]
        least[t] = min(error[t], least[t])


@_inline
def _write(x: Any, size: Any, mask: Any, grid: Any, whole: Any, inverse: Any, codes: Any, dense: Any) -> None:
    """Codes and values of the groups that ``mask`` selects, under signed scales; see ``Grid.codes``."""
    unit, low, high, least, edge, magic = grid[UNIT], grid[LOW], grid[HIGH], grid[LEAST], grid[EDGE], grid[MAGIC]
    mantissa, spare, sign = whole[MANTISSA], grid[SPARE], np.float32(1 << (whole[BITS] - 1))
    zero, wrap = np.float32(0), np.float32(256)
    m = max(mantissa, 0)
    bottom, shift, offset = np.float32(1 << m), np.int32(23 - m), np.int32((127 + m) << m)
    for t in range(TILE):
        inverse[t] = np.float32(1) / _step(size[t], unit)
    for j in range(x.shape[0]):
        if whole[SIGNED]:
            for t in range(TILE):
                q = _nearest_whole(x[j, t] * inverse[t], low, high)
                code = q + wrap if q < 0 else q
                codes[j, t] = np.uint8(np.int32(code)) if mask[t] else codes[j, t]
                dense[j, t] = q * (size[t] * unit) if mask[t] else dense[j, t]
        elif mantissa < 0:
            for t in range(TILE):
                q = _nearest_whole(x[j, t] * inverse[t], low, high)
                a = zero if q == -sign else abs(q)  # the spare level has the code of negative zero
                code = a + sign if q < 0 else a
                codes[j, t] = np.uint8(np.int32(code)) if mask[t] else codes[j, t]
                dense[j, t] = q * (size[t] * unit) if mask[t] else dense[j, t]
        else:
            for t in range(TILE):
                q = _nearest_float(x[j, t] * inverse[t], low, high, least, edge, magic)
                a = abs(q)
                above = np.int32((_bits(max(a, bottom)) >> shift) - offset)
                code = np.float32(above) + min(a, bottom)
                # The spare level truncates to its smaller neighbour, whose code is one less than the largest.
                code = (zero if q == spare else code) + sign if q < 0 else code
                codes[j, t] = np.uint8(np.int32(code)) if mask[t] else codes[j, t]
                dense[j, t] = q * (size[t] * unit) if mask[t] else dense[j, t]


@compiled("f8(f4[:,::1],i8,f4[:,::1],i8[:,::1],f4[::1],i8,i8,f4[::1],i8,f4[:,::1],u1[:,::1],f4[:,::1])", *FREE)
def search_scale_groups(
    weight: Any,
    group: Any,
    grids: Any,
    whole: Any,
    store: Any,
    kind: Any,
    mantissa: Any,
    factors: Any,
    middle: Any,
    scales: Any,
    codes: Any,
    dense: Any,
) -> float:
    """Scales of least squared error, and the codes under them.

    Args:
        weight: ``[rows, columns]``.
        group: columns that share a scale; the last group of a row may be short.
        grids, whole: both ``[grids, 7]``, one grid or two, in the columns named above.
        store: the number of which stored scales are multiples, the smallest normal number of their dtype, and the largest.
        kind, mantissa: of the scales' dtype: FLOAT with its mantissa bits, SINGLE, E4M3 or E8M0.
        factors: of the ladder's steps, that without a step at ``middle``.
        scales: ``[rows, groups]``, the result.
        codes: ``[rows, columns]``, the result: int8 for signed codes.
        dense: ``[rows, columns]``, the stored weight, or ``[0, columns]`` if it is not wanted.

    Returns:
        The summed squared error.
    """
    rows, columns = weight.shape
    groups = scales.shape[1]
    flat, values = np.empty(group * TILE, np.float32), np.empty((group, TILE), np.float32)
    x = flat.reshape(group, TILE)
    tile_codes = np.empty((group, TILE), np.uint8)
    peak, sign, flip, base, scale = (
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
    )
    inverse, error, cross, square = (
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
        np.empty(TILE, np.float32),
    )
    best, least = np.empty((2, TILE), np.float32), np.empty((2, TILE), np.float32)
    mask, number = np.empty(TILE, np.bool_), np.empty(TILE, np.int32)
    unit, total = store[0], 0.0
    row, place, written, filled = 0, 0, 0, 0  # the next group to read, and the next one to write
    for first in range(0, rows * groups, TILE):
        count = min(TILE, rows * groups - first)
        for t in range(TILE):
            width = min(group, columns - place * group) if t < count else 0
            for j in range(width):
                _put(flat, j * TILE + t, weight[row, place * group + j])
            for j in range(width, group):
                x[j, t] = 0
            row, place = (row, place + 1) if place + 1 < groups else (row + 1, 0)
        for t in range(TILE):
            peak[t], flip[t] = x[0, t], -x[0, t]
        for j in range(1, group):
            for t in range(TILE):
                peak[t] = max(peak[t], x[j, t])
                flip[t] = max(flip[t], -x[j, t])
        for t in range(TILE):
            flip[t], peak[t] = np.float32(-1) if peak[t] > flip[t] else np.float32(1), max(peak[t], flip[t])
        for k in range(len(grids)):
            grid, own = grids[k], whole[k]
            for t in range(TILE):
                sign[t] = flip[t] if own[MIRRORED] else np.float32(1)
                best[k, t] = 0
                least[k, t] = np.float32(3.4028235e38)
                base[t] = peak[t] / (max(grid[HIGH], grid[LOW]) * grid[UNIT])
            _round_all(base, store, kind, mantissa)
            for t in range(TILE):
                number[t] = _bits(base[t] * np.float32(2.0**-120)) >> np.int32(20)
            for steps in range(own[FIRST], own[LAST] + 1):
                if kind == E4M3:
                    for t in range(TILE):
                        moved = min(max(number[t] + np.int32(steps), np.int32(0)), np.int32(126))
                        scale[t] = _float(moved << np.int32(20)) * np.float32(2.0**120)
                else:
                    for t in range(TILE):
                        scale[t] = base[t] * unit * factors[middle + steps]
                    _round_all(scale, store, kind, mantissa)
                _attempt(x, scale, unit, sign, grid, own[MANTISSA], inverse, error, best[k], least[k])
            for _ in range(own[REFINEMENTS]):
                _fit(x, best[k], grid, own[MANTISSA], inverse, cross, square, scale)
                _round_all(scale, store, kind, mantissa)
                _attempt(x, scale, unit, sign, grid, own[MANTISSA], inverse, error, best[k], least[k])
        for k in range(len(grids)):
            for t in range(TILE):
                mask[t] = k == 0 or least[1, t] < least[0, t]
            _write(x, best[k], mask, grids[k], whole[k], inverse, tile_codes, values)
        for t in range(count):
            second = len(grids) == 2 and least[1, t] < least[0, t]
            scales[written, filled] = -best[1, t] if second else best[0, t]
            total += least[1, t] if second else least[0, t]
            column = filled * group
            width = min(group, columns - column)
            for j in range(width):
                codes[written, column + j] = tile_codes[j, t]
            if len(dense):
                for j in range(width):
                    dense[written, column + j] = values[j, t]
            written, filled = (written, filled + 1) if filled + 1 < groups else (written + 1, 0)
    return total
