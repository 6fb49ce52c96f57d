"""Device functions: a tile of packed codes becomes a tile of weights in registers.

``weight_tile`` is the one entry. What it returns are *levels*, the numbers that a scale multiplies: integers for the integer
format, minifloat values, sums of codebook entries. ``scale_tile`` loads the scales of the same tile. Kernels decide where to
multiply: on the sums of a row, on the partial sums of a group, or on each weight.
"""

from __future__ import annotations

import triton
import triton.language as tl

INTEGER = tl.constexpr(0)
MINIFLOAT = tl.constexpr(1)
CODEBOOK = tl.constexpr(2)
DENSE = tl.constexpr(3)  # already an operand of the matrix unit, in memory


@triton.jit
def weight_tile(
    w,  # WeightPointers
    rows,  # [BN] int, already clamped to existing rows
    second,  # [BN, BK] bool: weights of a minifloat tile that use the second encoding, if the layout has one
    start,  # first column; what lies beyond the last decodes to some finite number
    LAYOUT: tl.constexpr,  # WeightLayout
    ALIGNED: tl.constexpr,  # start is always a multiple of 8 codes (and of the layout's vector)
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Levels ``[BN, BK]``: int32 for integers, float32 otherwise."""
    row_start = w.codes + rows.to(tl.int64) * w.codes_stride
    if LAYOUT.kind == CODEBOOK:
        levels = _codebook_tile(row_start, w.table, start, w.columns, LAYOUT, ALIGNED, BN, BK)
    else:
        codes = _code_tile(row_start, start, w.columns, w.codes_stride, LAYOUT.bits, ALIGNED, BN, BK)
        if LAYOUT.kind == INTEGER:
            levels = codes
        else:
            levels = minifloat_value(codes, LAYOUT.encoding)
            if LAYOUT.second:
                levels = tl.where(second, minifloat_value(codes, LAYOUT.second), levels)
    return levels


@triton.jit
def minifloat_value(code, ENCODING: tl.constexpr):
    """Value of ``sign | exponent | mantissa`` codes. ``ENCODING = exponent_bits * 16 + mantissa_bits * 2 + uz``."""
    E: tl.constexpr = ENCODING // 16
    M: tl.constexpr = ENCODING % 16 // 2
    BIAS: tl.constexpr = 2 ** (E - 1) - 1
    exponent = (code >> M) & (2**E - 1)
    mantissa = code & (2**M - 1)
    normal = (((exponent + (127 - BIAS)) << 23) | (mantissa << (23 - M))).to(tl.float32, bitcast=True)
    value = tl.where(exponent == 0, mantissa.to(tl.float32) * (2.0 ** (1 - BIAS - M)), normal)
    if E == 4 and M == 3 and ENCODING % 2 == 0:
        value = tl.minimum(value, 448.0)
    if E == 5 and M == 2 and ENCODING % 2 == 0:
        value = tl.minimum(value, 57344.0)
    negative = (code >> (E + M)) == 1
    value = tl.where(negative, -value, value)
    if ENCODING % 2:  # the code of negative zero is one more level: formats/minifloat calls it "useful zero"
        TOP: tl.constexpr = (2 - 2.0**-M) * 2.0 ** (2**E - 1 - BIAS)
        STEP: tl.constexpr = 2.0 ** (2**E - 1 - BIAS - M)
        if E == 1:
            value = tl.where(code == 2 ** (E + M), -(TOP + STEP), value)
        else:
            BEFORE: tl.constexpr = TOP - STEP if M > 0 else TOP / 2
            value = tl.where(code == 2 ** (E + M), -(TOP + BEFORE) / 2, value)
    return value


@triton.jit
def scale_tile(stored, w, rows, start, LAYOUT: tl.constexpr, BK: tl.constexpr):
    """Scales or zeros (``stored``: ``w.scales`` or ``w.zeros``) ``[BN, BK]`` of a tile, float32; columns beyond the matrix get the
    last group's."""
    group = tl.minimum((start + tl.arange(0, BK)) // LAYOUT.group, w.groups - 1)
    return _scale_value(tl.load(stored + rows[:, None] * w.scales_stride + group[None, :]), LAYOUT.e8m0, LAYOUT.e4m3)


@triton.jit
def group_scale(stored, w, rows, group, LAYOUT: tl.constexpr):
    """Scales or zeros ``[BN]`` of one group, float32."""
    return _scale_value(tl.load(stored + rows * w.scales_stride + group), LAYOUT.e8m0, LAYOUT.e4m3)


@triton.jit
def _scale_value(stored, E8M0: tl.constexpr, E4M3: tl.constexpr):
    if E8M0:  # the exponent of a float32; its smallest, 2**-127, is a subnormal one
        exponent = stored.to(tl.int32) & 0xFF
        return tl.where(exponent == 0, 0x00400000, exponent << 23).to(tl.float32, bitcast=True)
    elif E4M3:  # as bytes: float8e4nv is a type on some GPUs only. E4M3's NaN is never written.
        return minifloat_value(stored.to(tl.int32) & 0xFF, 4 * 16 + 3 * 2)
    else:
        return stored.to(tl.float32)


@triton.jit
def _code_tile(
    row_start, start, columns, codes_stride, BITS: tl.constexpr, ALIGNED: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Unsigned codes ``[BN, BK]`` of columns ``start ..``, int32."""
    if ALIGNED and 8 % BITS == 0:
        PER_BYTE: tl.constexpr = 8 // BITS
        byte = start // PER_BYTE + tl.arange(0, BK // PER_BYTE)
        held = tl.load(row_start[:, None] + byte[None, :], mask=(byte < codes_stride)[None, :], other=0).to(tl.int32) & 0xFF
        return _spread(held, BITS, PER_BYTE)
    elif ALIGNED and BITS % 3 == 0 and BITS < 8:  # 3 and 6 bits: 8 or 4 codes in three bytes
        PER_WORD: tl.constexpr = 24 // BITS
        word = (start // PER_WORD + tl.arange(0, BK // PER_WORD)) * 3
        held = tl.zeros([BN, BK // PER_WORD], dtype=tl.int32)
        for i in tl.static_range(3):
            byte = tl.load(row_start[:, None] + (word + i)[None, :], mask=(word + i < codes_stride)[None, :], other=0)
            held |= (byte.to(tl.int32) & 0xFF) << (8 * i)
        return _spread(held, BITS, PER_WORD)
    else:
        column = tl.minimum(start + tl.arange(0, BK), columns - 1)
        return _code_at(row_start, column, BITS)


@triton.jit
def _spread(held, BITS: tl.constexpr, COUNT: tl.constexpr):
    """``[BN, W]`` words of COUNT codes -> codes ``[BN, W * COUNT]``. Interleaving keeps neighbours in one thread."""
    MASK: tl.constexpr = 2**BITS - 1
    if COUNT == 1:
        return held & MASK
    elif COUNT == 2:
        return tl.interleave(held & MASK, (held >> BITS) & MASK)
    else:  # words of every second code, twice as wide apart
        even = _spread_every(held, BITS, COUNT // 2)
        odd = _spread_every(held >> BITS, BITS, COUNT // 2)
        return tl.interleave(even, odd)


@triton.jit
def _spread_every(held, BITS: tl.constexpr, COUNT: tl.constexpr):
    """Codes 0, 2, 4, .. of words, ``[BN, W * COUNT]``; COUNT is 2 or 4."""
    MASK: tl.constexpr = 2**BITS - 1
    if COUNT == 2:
        return tl.interleave(held & MASK, (held >> (2 * BITS)) & MASK)
    else:
        even = tl.interleave(held & MASK, (held >> (4 * BITS)) & MASK)
        odd = tl.interleave((held >> (2 * BITS)) & MASK, (held >> (6 * BITS)) & MASK)
        return tl.interleave(even, odd)


@triton.jit
def _code_at(row_start, index, BITS: tl.constexpr):
    """Codes ``[BN, n]`` number ``index [n]`` of each row, int32, wherever they lie."""
    first = index * BITS // 8
    shift = (index * BITS % 8)[None, :]
    last = (index * BITS + (BITS - 1)) // 8
    at = row_start[:, None] + first[None, :]
    held = tl.load(at).to(tl.int32) & 0xFF
    if 8 % BITS:
        more = (last > first)[None, :]
        held |= (tl.load(at + 1, mask=more, other=0).to(tl.int32) & 0xFF) << 8
    if BITS > 9:
        more = (last > first + 1)[None, :]
        held |= (tl.load(at + 2, mask=more, other=0).to(tl.int32) & 0xFF) << 16
    return (held >> shift) & (2**BITS - 1)


@triton.jit
def _entries(table_ptr, code, book, lane, BITS: tl.constexpr, VECTOR: tl.constexpr):
    """Entries ``[BN, V, VECTOR]`` of one codebook, float32."""
    entry = table_ptr + (code + book * 2**BITS) * VECTOR
    return tl.load(entry[:, :, None] + lane[None, None, :]).to(tl.float32)


@triton.jit
def _codebook_tile(
    row_start,
    table_ptr,
    start,
    columns,
    LAYOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    BITS: tl.constexpr = LAYOUT.bits
    BOOKS: tl.constexpr = LAYOUT.books
    VECTOR: tl.constexpr = LAYOUT.vector
    last_vector = (columns - 1) // VECTOR
    if ALIGNED and (VECTOR & (VECTOR - 1)) == 0 and VECTOR <= BK:
        # One look-up fetches the whole vector: lanes are the last, contiguous dimension of the pointers.
        vector = tl.minimum(start // VECTOR + tl.arange(0, BK // VECTOR), last_vector)
        lane = tl.arange(0, VECTOR)
        total = tl.zeros([BN, BK // VECTOR, VECTOR], dtype=tl.float32)
        if BITS == 8 and (BOOKS == 2 or BOOKS == 4):  # neighbouring bytes, loaded together
            byte = start // VECTOR * BOOKS + tl.arange(0, BK // VECTOR * BOOKS)
            inside = (byte < (last_vector + 1) * BOOKS)[None, :]
            codes = tl.load(row_start[:, None] + byte[None, :], mask=inside, other=0).to(tl.int32) & 0xFF
            if BOOKS == 2:
                first, second = tl.split(tl.reshape(codes, [BN, BK // VECTOR, 2]))
                total += _entries(table_ptr, first, 0, lane, BITS, VECTOR) + _entries(table_ptr, second, 1, lane, BITS, VECTOR)
            else:
                even, odd = tl.split(tl.reshape(codes, [BN, BK // VECTOR, 2, 2]))
                first, third = tl.split(even)
                second, fourth = tl.split(odd)
                total += _entries(table_ptr, first, 0, lane, BITS, VECTOR) + _entries(table_ptr, second, 1, lane, BITS, VECTOR)
                total += _entries(table_ptr, third, 2, lane, BITS, VECTOR) + _entries(table_ptr, fourth, 3, lane, BITS, VECTOR)
        else:
            for book in tl.static_range(BOOKS):
                total += _entries(table_ptr, _code_at(row_start, vector * BOOKS + book, BITS), book, lane, BITS, VECTOR)
        return tl.reshape(total, [BN, BK])
    else:
        column = start + tl.arange(0, BK)
        vector = tl.minimum(column // VECTOR, last_vector)
        lane = (column % VECTOR)[None, :]
        spread = tl.zeros([BN, BK], dtype=tl.float32)
        for book in tl.static_range(BOOKS):
            code = _code_at(row_start, vector * BOOKS + book, BITS)
            spread += tl.load(table_ptr + (code + book * 2**BITS) * VECTOR + lane).to(tl.float32)
        return spread
