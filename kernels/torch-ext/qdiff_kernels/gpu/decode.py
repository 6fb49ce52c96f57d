"""Device functions: a tile of packed codes becomes a tile of weights in registers.

``weight_tile`` is the one entry. What it returns are *levels*, the numbers that a scale multiplies: integers for the integer
format, minifloat values, sums of codebook entries. ``scale_tile`` loads the scales of the same tile. Kernels decide where to
multiply: on the sums of a row, on the partial sums of a group, or on each weight.

Codes of two neighbouring columns are decoded together, as the halves of one 32-bit word: a bfloat16 number has room for every
level of every minifloat, so a few integer instructions make two of them.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTEGER = tl.constexpr(0)
MINIFLOAT = tl.constexpr(1)
CODEBOOK = tl.constexpr(2)
DENSE = tl.constexpr(3)  # already an operand of the matrix unit, in memory

# Triton's interpreter multiplies the bit patterns of bfloat16 numbers; float32 holds the same numbers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
BOTH = tl.constexpr(0x00010001)  # times a 15-bit number: the number in both halves of a word
SIGNS = tl.constexpr(0x80008000 - (1 << 32))  # the top bits of both halves, as int32
UPPER = tl.constexpr(0xFFFF0000 - (1 << 32))
E4M3 = tl.constexpr(4 * 16 + 3 * 2)
E5M2 = tl.constexpr(5 * 16 + 2 * 2)


@triton.jit
def weight_tile(
    w,  # WeightPointers
    rows,  # [BN] int, already clamped to existing rows
    second,  # [BN, BK] bool: weights of a minifloat tile that use the second encoding, if the layout has one
    start,  # first column; what lies beyond the last decodes to some finite number
    NUMBER: tl.constexpr,  # type of the levels: int8, bfloat16, float8e4nv where it holds them, or float32
    LAYOUT: tl.constexpr,  # WeightLayout
    STEP: tl.constexpr,  # start is always a multiple of this power of two
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Levels ``[BN, BK]`` in the type NUMBER."""
    row_start = w.codes + rows.to(tl.int64) * w.codes_stride
    if LAYOUT.kind == CODEBOOK:
        levels = _codebook_tile(row_start, w.table, start, w.columns, LAYOUT, STEP, BN, BK)
    elif LAYOUT.kind == INTEGER:
        levels = _integer_tile(w, row_start, start, NUMBER, LAYOUT, STEP, BN, BK)
    elif NUMBER == tl.float8e4nv:  # E4M3 itself; the code that hardware reads as NaN is the largest number
        codes = _code_tile(row_start, start, w.columns, w.codes_stride, LAYOUT.bits, STEP, BN, BK)
        codes = tl.where((codes & 0x7F) == 0x7F, codes - 1, codes)
        levels = codes.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    else:
        pairs = _code_pairs(row_start, start, w.columns, w.codes_stride, LAYOUT.bits, STEP, BN, BK)
        words = _minifloat_words(pairs, LAYOUT.encoding)
        factor = _minifloat_factor(LAYOUT.encoding)
        if LAYOUT.second:
            even, odd = tl.split(tl.reshape(second, [BN, BK // 2, 2]))
            chosen = tl.where(even, 0xFFFF, 0) | tl.where(odd, UPPER, 0)
            words = (words & ~chosen) | (_minifloat_words(pairs, LAYOUT.second) & chosen)
            factor = tl.where(second, _minifloat_factor(LAYOUT.second), factor)
        levels = times(halves(words, NUMBER), factor)
    return levels


@triton.jit
def _integer_tile(
    w, row_start, start, NUMBER: tl.constexpr, LAYOUT: tl.constexpr, STEP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Codes minus the midpoint. A code put behind the exponent of 2**7 or 2**23 is that number plus the code: no conversion."""
    if NUMBER == tl.bfloat16 and LAYOUT.bits < 8:
        pairs = _code_pairs(row_start, start, w.columns, w.codes_stride, LAYOUT.bits, STEP, BN, BK)
        return plus(halves(pairs | (0x4300 * BOTH), NUMBER), -128.0 - LAYOUT.midpoint)
    codes = _code_tile(row_start, start, w.columns, w.codes_stride, LAYOUT.bits, STEP, BN, BK)
    if NUMBER == tl.int8:
        return (codes - LAYOUT.midpoint).to(tl.int8)
    else:
        return ((codes | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + LAYOUT.midpoint)).to(NUMBER)


@triton.jit
def _minifloat_words(pairs, ENCODING: tl.constexpr):
    """Two ``sign | exponent | mantissa`` codes in a word -> the bits of two bfloat16 numbers, which ``_minifloat_factor`` times are
    the codes' values. ``ENCODING = exponent_bits * 16 + mantissa_bits * 2 + uz``."""
    E: tl.constexpr = ENCODING // 16
    M: tl.constexpr = ENCODING % 16 // 2
    magnitude = pairs & ((2 ** (E + M) - 1) * BOTH)
    if ENCODING == E4M3:  # hardware's NaN is the largest number
        magnitude -= ((magnitude + 1 * BOTH) >> 7) & BOTH
    if ENCODING == E5M2:  # hardware's last binade is the largest number, 0x7B
        last = ((magnitude + 4 * BOTH) >> 7) & BOTH
        magnitude = (magnitude | last * 3) - last * 4
    words = (magnitude << (7 - M)) | ((pairs << (15 - E - M)) & SIGNS)
    if ENCODING % 2:  # the code of negative zero is one more level: formats/minifloat calls it "useful zero"
        SPARE: tl.constexpr = 256 if E == 1 else (2 ** (E + M + 1) - 3) << (6 - M)
        CODE: tl.constexpr = 2 ** (E + M)
        other = ((pairs ^ (CODE * BOTH)) + (2 * CODE - 1) * BOTH) & (2 * CODE * BOTH)  # not this code
        words += ((other >> (E + M + 1)) ^ BOTH) * SPARE
    return words


@triton.jit
def _minifloat_factor(ENCODING: tl.constexpr):
    """What the smallest normal numbers of the encoding and of bfloat16 are apart. Subnormal numbers keep their distance."""
    return 2.0 ** (127 - (2 ** (ENCODING // 16 - 1) - 1))


@triton.jit
def minifloat_value(code, ENCODING: tl.constexpr):
    """Values of codes, float32: of scales and of activations, where no code is hardware's NaN."""
    E: tl.constexpr = ENCODING // 16
    M: tl.constexpr = ENCODING % 16 // 2
    bits = ((code & (2 ** (E + M) - 1)) << (23 - M)) | ((code >> (E + M)) << 31)
    return bits.to(tl.float32, bitcast=True) * _minifloat_factor(ENCODING)


@triton.jit
def halves(words, NUMBER: tl.constexpr):
    """int32 ``[BN, W]`` holding two bfloat16 numbers each -> ``[BN, 2 W]``, bfloat16 or float32."""
    if NUMBER == tl.bfloat16:
        low = words.to(tl.int16).to(tl.bfloat16, bitcast=True)
        high = (words >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & UPPER).to(tl.float32, bitcast=True)
    return tl.interleave(low, high)


@triton.jit
def times(x, factor):
    """``x * factor`` in x's type; both hold, and their product is, a number of that type."""
    if x.dtype == tl.bfloat16 and INTERPRETED:
        return _narrowed(_widened(x) * factor)
    else:
        return x * tl.cast(factor, x.dtype)


@triton.jit
def _widened(x):
    """bfloat16 as float32, subnormal numbers included: the interpreter's own conversion loses them."""
    return (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)


@triton.jit
def _narrowed(x):
    """float32 that bfloat16 holds as such."""
    return (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def plus(x, number):
    """``x + number`` in x's type, which holds both and the sum."""
    if x.dtype == tl.bfloat16 and INTERPRETED:
        return _narrowed(_widened(x) + number)
    else:
        return x + tl.cast(number, x.dtype)


@triton.jit
def scale_tile(stored, w, rows, start, LAYOUT: tl.constexpr, STEP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Scales or zeros (``stored``: ``w.scales`` or ``w.zeros``) ``[BN, BK]`` of a tile, float32; columns beyond the matrix get the
    last group's. Where groups begin with the tile, each is loaded and decoded once."""
    GROUP: tl.constexpr = LAYOUT.group
    if GROUP % BK == 0 and STEP % BK == 0:
        return group_scale(stored, w, rows, start // GROUP, LAYOUT)[:, None] + tl.zeros([BN, BK], dtype=tl.float32)
    elif BK % GROUP == 0 and STEP % GROUP == 0:
        group = tl.minimum(start // GROUP + tl.arange(0, BK // GROUP), w.groups - 1)
        scales = _scale_value(tl.load(stored + rows[:, None] * w.scales_stride + group[None, :]), LAYOUT)
        return tl.reshape(tl.broadcast_to(scales[:, :, None], [BN, BK // GROUP, GROUP]), [BN, BK])
    else:
        group = tl.minimum((start + tl.arange(0, BK)) // GROUP, w.groups - 1)
        return _scale_value(tl.load(stored + rows[:, None] * w.scales_stride + group[None, :]), LAYOUT)


@triton.jit
def group_scale(stored, w, rows, group, LAYOUT: tl.constexpr):
    """Scales or zeros ``[BN]`` of one group, float32."""
    return _scale_value(tl.load(stored + rows * w.scales_stride + group), LAYOUT)


@triton.jit
def _scale_value(stored, LAYOUT: tl.constexpr):
    if LAYOUT.e8m0:  # the exponent of a float32; its smallest, 2**-127, is a subnormal one
        exponent = stored.to(tl.int32) & 0xFF
        return tl.where(exponent == 0, 0x00400000, exponent << 23).to(tl.float32, bitcast=True)
    elif LAYOUT.e4m3:  # as bytes: float8e4nv is a type on some GPUs only. E4M3's NaN is never written.
        return minifloat_value(stored.to(tl.int32), E4M3)
    else:
        return stored.to(tl.float32)


@triton.jit
def _code_pairs(
    row_start, start, columns, codes_stride, BITS: tl.constexpr, STEP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr
):
    """Codes of columns ``start ..``, int32 ``[BN, BK // 2]``: an even column's in a word's lower half, the next one's above."""
    if BITS == 4 and STEP % 2 == 0:
        held = _packed_bytes(row_start, start // 2, codes_stride, BK // 2)
        return (held | (held << 12)) & (0xF * BOTH)
    else:
        codes = _code_tile(row_start, start, columns, codes_stride, BITS, STEP, BN, BK)
        even, odd = tl.split(tl.reshape(codes, [BN, BK // 2, 2]))
        return even | (odd << 16)


@triton.jit
def _packed_bytes(row_start, first, codes_stride, COUNT: tl.constexpr):
    """Bytes ``[BN, COUNT]`` of rows, int32; zeros beyond their end."""
    byte = first + tl.arange(0, COUNT)
    return tl.load(row_start[:, None] + byte[None, :], mask=(byte < codes_stride)[None, :], other=0).to(tl.int32) & 0xFF


@triton.jit
def _code_tile(row_start, start, columns, codes_stride, BITS: tl.constexpr, STEP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Unsigned codes ``[BN, BK]`` of columns ``start ..``, int32."""
    if 8 % BITS == 0 and STEP % (8 // BITS) == 0:
        PER_BYTE: tl.constexpr = 8 // BITS
        return _spread(_packed_bytes(row_start, start // PER_BYTE, codes_stride, BK // PER_BYTE), BITS, PER_BYTE)
    elif BITS % 3 == 0 and BITS < 8 and STEP % 8 == 0:  # 3 and 6 bits: 8 or 4 codes in three bytes
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
    STEP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    BITS: tl.constexpr = LAYOUT.bits
    BOOKS: tl.constexpr = LAYOUT.books
    VECTOR: tl.constexpr = LAYOUT.vector
    last_vector = (columns - 1) // VECTOR
    if (VECTOR & (VECTOR - 1)) == 0 and STEP % VECTOR == 0:
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
