"""The three vector blocks that the kernels are made of: look up 32 levels, add codebook entries, multiply rows by tokens."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from ._simd import BF16, F32, I8, I16, I32, I64, call, constant_vector, intrinsic, load, splat, store, to_stored, vector

BLOCK = 32  # columns that decode_levels takes at a time


@intrinsic(prefer_literal=True)
def decode_levels(
    typingctx: Any,
    source: Any,
    table: Any,
    scale0: Any,
    scale1: Any,
    zero0: Any,
    zero1: Any,
    target: Any,
    bits: Any,
    two: Any,
    zeros: Any,
    out: Any,
) -> Any:
    """Decode 32 packed codes with AVX-512: three instructions extract and look up 32 weights.

    A byte shuffle brings the two bytes that a code touches into each 16-bit lane, a variable shift moves the code down, and a
    word shuffle reads the level, as bfloat16, from a table held in registers. Even lanes hold columns 0 to 15, odd ones 16 to
    31, so that a shift and a mask make them two float32 vectors of consecutive columns.

    Args:
        source: address of ``4 * bits`` bytes.
        table: address of ``2 ** (bits + two)`` levels (at least 32, repeated), bfloat16.
        scale0, scale1, zero0, zero1: of columns 0 to 15 and 16 to 31. With ``two`` a negative scale picks the second table.
        target: address of 32 results.
        bits, two, zeros, out: literals: width of a code, whether there are two tables, whether there are zeros, result type.
    """
    width, pair, shifted, name = (t.literal_value for t in (bits, two, zeros, out))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        levels = _look_up(builder, arguments, width, pair)
        words = builder.bitcast(levels, vector(I32, 16))
        halves = (builder.shl(words, constant_vector(I32, [16] * 16)), builder.and_(words, constant_vector(I32, [0xFFFF0000] * 16)))
        results = []
        for half, scale, zero in zip(halves, arguments[2:4], arguments[4:6], strict=True):
            if pair:
                scale = call(builder, "llvm.fabs.f32", F32, scale)
            value = builder.fmul(builder.bitcast(half, vector(F32, 16)), splat(builder, scale, 16))
            results.append(builder.fadd(value, splat(builder, zero, 16)) if shifted else value)
        if name == "bfloat16":
            narrow = call(builder, "llvm.x86.avx512bf16.cvtne2ps2bf16.512", vector(BF16, 32), results[1], results[0])
        else:
            whole = builder.shuffle_vector(results[0], results[1], constant_vector(I32, list(range(32))))
            narrow = to_stored(builder, whole, name)
        store(builder, narrow, arguments[6])
        return context.get_dummy_value()

    f32, i64 = types.float32, types.int64
    return types.void(i64, i64, f32, f32, f32, f32, i64, bits, two, zeros, out), codegen


def _look_up(builder: Any, arguments: Any, bits: int, two: bool) -> Any:
    """``<32 x i16>``: bfloat16 levels of columns 0, 16, 1, 17, ..."""
    source, table, scale0, scale1 = arguments[:4]
    columns = [c // 2 + 16 * (c % 2) for c in range(32)]
    packed = load(builder, source, vector(I8, 4 * bits))
    packed = builder.shuffle_vector(packed, packed, constant_vector(I32, [min(i, 4 * bits - 1) for i in range(64)]))
    where = constant_vector(I8, [b for c in columns for b in (c * bits // 8, c * bits // 8 + 1)])
    pairs = call(builder, "llvm.x86.avx512.permvar.qi.512", vector(I8, 64), packed, where)
    words = builder.bitcast(pairs, vector(I16, 32))
    index = builder.lshr(words, constant_vector(I16, [c * bits % 8 for c in columns]))
    if two:
        index = builder.and_(index, constant_vector(I16, [(1 << bits) - 1] * 32))
        signs = [builder.fcmp_ordered("<", scale, F32(0.0)) for scale in (scale0, scale1)]
        low, high = (builder.select(sign, I32((1 << bits) << shift), I32(0)) for sign, shift in zip(signs, (0, 16), strict=True))
        index = builder.or_(index, builder.bitcast(splat(builder, builder.or_(low, high), 16), vector(I16, 32)))
    return _read_table(builder, table, index, bits + two)


def _read_table(builder: Any, table: Any, index: Any, bits: int) -> Any:
    """``table[index]`` for up to 256 words in registers; index bits above ``bits`` are ignored."""
    words = vector(I16, 32)

    def register(i: int) -> Any:
        return load(builder, builder.add(table, I64(64 * i)), words)

    if bits <= 5:  # a table of fewer entries is repeated to 32
        return call(builder, "llvm.x86.avx512.permvar.hi.512", words, register(0), index)
    parts = [
        call(builder, "llvm.x86.avx512.vpermi2var.hi.512", words, register(i), index, register(i + 1))
        for i in range(0, 1 << (bits - 5), 2)
    ]
    for bit in range(6, bits):
        chosen = builder.and_(index, constant_vector(I16, [1 << bit] * 32))
        second = builder.icmp_unsigned("!=", chosen, constant_vector(I16, [0] * 32))
        parts = [builder.select(second, b, a) for a, b in zip(parts[::2], parts[1::2], strict=True)]
    return parts[0]


@intrinsic(prefer_literal=True)
def add_entries(
    typingctx: Any,
    codes: Any,
    bit: Any,
    tables: Any,
    scale: Any,
    target: Any,
    bits: Any,
    count: Any,
    lanes: Any,
    integer: Any,
    out: Any,
) -> Any:
    """Decode one vector: the sum of one entry from each codebook, times a scale.

    Args:
        codes: address of the row's codes; bit: position of the vector's first code.
        tables: address of ``[count, 2**bits, lanes]``, int16 or float32.
        scale: of the vector.
        target: address of ``lanes`` results.
        bits, count, lanes, integer, out: literals: width of a code, number of codebooks, padded vector size, whether the tables
            are int16, result type.
    """
    width, books, size, whole, name = (t.literal_value for t in (bits, count, lanes, integer, out))
    kind = vector(I16 if whole else F32, size)
    entry_bytes = size * (2 if whole else 4)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, first, tables_at, factor, target_at = arguments[:5]
        total = None
        for m in range(books):
            code = read_packed(builder, source, first, m, width)
            offset = builder.add(builder.mul(code, I64(entry_bytes)), I64((m << width) * entry_bytes))
            entry = load(builder, builder.add(tables_at, offset), kind)
            total = entry if total is None else (builder.add if whole else builder.fadd)(total, entry)
        value = builder.sitofp(total, vector(F32, size)) if whole else total
        value = builder.fmul(value, splat(builder, factor, size))
        store(builder, to_stored(builder, value, name), target_at)
        return context.get_dummy_value()

    f32, i64 = types.float32, types.int64
    return types.void(i64, i64, i64, f32, i64, bits, count, lanes, integer, out), codegen


def read_packed(builder: Any, source: Any, first: Any, number: int, bits: int) -> Any:
    """Code ``number`` after bit ``first`` of the bytes at ``source``, which may be read three bytes past the code."""
    if bits == 8:
        at = builder.add(source, builder.add(builder.lshr(first, I64(3)), I64(number)))
        return builder.zext(load(builder, at, I8), I64)
    position = builder.add(first, I64(number * bits))
    word = load(builder, builder.add(source, builder.lshr(position, I64(3))), I32)
    shifted = builder.lshr(builder.zext(word, I64), builder.and_(position, I64(7)))
    return builder.and_(shifted, I64((1 << bits) - 1))


@intrinsic(prefer_literal=True)
def multiply(
    typingctx: Any,
    rows: Any,
    row_stride: Any,
    tokens: Any,
    token_stride: Any,
    steps: Any,
    sums: Any,
    row_count: Any,
    token_count: Any,
    out: Any,
    fast: Any,
) -> Any:
    """``sums[r, t] = rows[r] . tokens[t]`` in float32, for a handful of rows and tokens at once.

    Args:
        rows, tokens: addresses of contiguous rows; strides in bytes.
        steps: number of 64-byte steps along a row.
        sums: address of float32 ``[row_count, token_count]``.
        row_count, token_count: literals. out: literal "bfloat16" or "float32", type of the operands.
        fast: literal, whether the host has bfloat16 dot products.
    """
    height, width, name, native = (t.literal_value for t in (row_count, token_count, out, fast))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        rows_at, row_step, tokens_at, token_step, count, sums_at = arguments[:6]
        zero = ir.Constant(vector(F32, 16), [0.0] * 16)
        before = builder.block
        loop = builder.append_basic_block("multiply")
        after = builder.append_basic_block("multiplied")
        builder.cbranch(builder.icmp_signed(">", count, I64(0)), loop, after)
        builder.position_at_end(loop)
        step = builder.phi(I64)
        totals = [builder.phi(vector(F32, 16)) for _ in range(height * width)]
        offset = builder.mul(step, I64(64))
        kind = vector(BF16, 32) if name == "bfloat16" else vector(F32, 16)

        def operand(base: Any, stride: Any, index: int) -> Any:
            return load(builder, builder.add(builder.add(base, builder.mul(stride, I64(index))), offset), kind)

        columns = [operand(tokens_at, token_step, t) for t in range(width)]
        new = []
        for r in range(height):
            row = operand(rows_at, row_step, r)
            new += [_accumulate(builder, totals[r * width + t], row, columns[t], native) for t in range(width)]
        following = builder.add(step, I64(1))
        builder.cbranch(builder.icmp_signed("<", following, count), loop, after)
        step.add_incoming(I64(0), before)
        step.add_incoming(following, loop)
        builder.position_at_end(after)
        for i, (total, value) in enumerate(zip(totals, new, strict=True)):
            total.add_incoming(zero, before)
            total.add_incoming(value, loop)
            final = builder.phi(vector(F32, 16))
            final.add_incoming(zero, before)
            final.add_incoming(value, loop)
            new[i] = final
        for i, final in enumerate(new):
            store(builder, horizontal_sum(builder, final), builder.add(sums_at, I64(4 * i)))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(i64, i64, i64, i64, i64, i64, row_count, token_count, out, fast), codegen


def _accumulate(builder: Any, total: Any, a: Any, b: Any, native: bool) -> Any:
    """``total + a * b`` lane by lane; bfloat16 operands add two products to a lane."""
    if a.type.element is F32:
        return call(builder, "llvm.fma.v16f32", total.type, a, b, total)
    if native:
        return call(builder, "llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, a, b)
    words = [builder.bitcast(v, vector(I32, 16)) for v in (a, b)]
    even = [builder.bitcast(builder.shl(w, constant_vector(I32, [16] * 16)), total.type) for w in words]
    odd = [builder.bitcast(builder.and_(w, constant_vector(I32, [0xFFFF0000] * 16)), total.type) for w in words]
    return call(builder, "llvm.fma.v16f32", total.type, *odd, call(builder, "llvm.fma.v16f32", total.type, *even, total))


def horizontal_sum(builder: Any, value: Any) -> Any:
    """Sum of all lanes, halves added to halves: always in the same order."""
    count = value.type.count
    while count > 1:
        count //= 2
        low = builder.shuffle_vector(value, value, constant_vector(I32, list(range(count))))
        high = builder.shuffle_vector(value, value, constant_vector(I32, list(range(count, 2 * count))))
        value = builder.fadd(low, high)
    return builder.extract_element(value, I32(0))


@intrinsic
def hadamard16(typingctx: Any, address: Any) -> Any:
    """Four butterflies, of distance 1, 2, 4 and 8, on 16 float32 in place."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = vector(F32, 16)
        value = load(builder, arguments[0], kind)
        for distance in (1, 2, 4, 8):
            partner = builder.shuffle_vector(value, value, constant_vector(I32, [i ^ distance for i in range(16)]))
            signs = ir.Constant(kind, [-1.0 if i & distance else 1.0 for i in range(16)])
            value = call(builder, "llvm.fma.v16f32", kind, value, signs, partner)
        store(builder, value, arguments[0])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@intrinsic
def decode_e4m3(typingctx: Any, source: Any, factor: Any, target: Any) -> Any:
    """16 E4M3 bytes times a factor, as float32: shifted into float16, which has the same form with three exponent bits more."""

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        words = builder.zext(load(builder, arguments[0], vector(I8, 16)), vector(I16, 16))
        magnitude = builder.and_(words, constant_vector(I16, [0x7F] * 16))
        sign = builder.shl(builder.and_(words, constant_vector(I16, [0x80] * 16)), constant_vector(I16, [8] * 16))
        shifted = builder.shl(magnitude, constant_vector(I16, [7] * 16))
        invalid = builder.icmp_unsigned("==", magnitude, constant_vector(I16, [0x7F] * 16))
        bits = builder.or_(sign, builder.select(invalid, constant_vector(I16, [0x7E00] * 16), shifted))
        value = builder.fpext(builder.bitcast(bits, vector(ir.HalfType(), 16)), vector(F32, 16))
        scale = builder.fmul(arguments[1], F32(256.0))  # the difference of the exponents' biases is 8
        store(builder, builder.fmul(value, splat(builder, scale, 16)), arguments[2])
        return context.get_dummy_value()

    return types.void(types.int64, types.float32, types.int64), codegen
