"""Few tokens by packed levels on the byte dot products of AVX-512 (``vpdpbusd``): 64 weights in five instructions.

Levels that are small integers times a scale are looked up as bytes. A token is written as ``step * (256 * high + low)`` with bytes
``high`` and ``low``: 15 bits below its largest magnitude, finer than bfloat16 sums need. The instruction multiplies unsigned by
signed bytes, so levels are stored plus 128, and 128 times the token's sum is subtracted again.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types

from . import _job as J
from ._compile import SOURCE, helper, inlined, kernel
from ._rows import fill_scales, finish
from ._simd import (
    F32,
    I8,
    I32,
    I64,
    call,
    constant_vector,
    copy_bytes,
    fetch_add,
    host_features,
    intrinsic,
    load,
    read_f32,
    store,
    vector,
    write,
)
from ._vector import horizontal_sum

COLUMNS = 64  # columns in a block
BLOCK_BYTES = 192  # bytes of a token's block: high bytes, low bytes, corrections of the sums of four columns (int32)
SUMS_BYTES = 512
OFFSET = 128  # added to levels to make them unsigned


def available() -> bool:
    """Whether the host has the AVX-512 instructions that these kernels need."""
    return {"avx512f", "avx512bw", "avx512vbmi", "avx512vnni"} <= host_features()


@intrinsic(prefer_literal=True)
def dot_levels(
    typingctx: Any,
    codes: Any,
    code_stride: Any,
    table: Any,
    tokens: Any,
    token_stride: Any,
    scales: Any,
    zeros: Any,
    scale_stride: Any,
    blocks: Any,
    sums: Any,
    width: Any,
    bits: Any,
    lookup: Any,
    two: Any,
    shifted: Any,
    high: Any,
    groups: Any,
) -> Any:
    """``sums[r, t] = sum of (scale * level + zero) * token`` for four rows and ``width`` tokens, columns in blocks of 64.

    Args:
        codes: address of four rows of packed codes, readable 64 bytes past any block. table: address of the byte levels plus
            ``OFFSET``, repeated to at least 64.
        tokens: address of tokens in blocks of ``BLOCK_BYTES``.
        scales, zeros: addresses of float32, ``groups`` per block; zeros already divided by ``-OFFSET``. Strides in bytes.
        sums: address of float32 ``[4, width]``, in units of the tokens' steps.
        width, bits, lookup, two, shifted, high, groups: literals: tokens, bits of a code, whether codes go through the table,
            whether the sign of a scale picks a second table, whether there are zeros, whether tokens have high bytes, scales per
            block (1, 2 or 4).
    """
    count, b, looked, pair, zeroed, deep, per = (t.literal_value for t in (width, bits, lookup, two, shifted, high, groups))

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes_at, code_step, table_at, tokens_at, token_step, scales_at, zeros_at, scale_step, total, sums_at = arguments[:10]
        tables = [load(builder, builder.add(table_at, I64(64 * i)), vector(I8, 64)) for i in range(max(1, (1 << (b + pair)) // 64))]
        before, loop = builder.block, builder.append_basic_block("dot")
        after = builder.append_basic_block("dotted")
        builder.branch(loop)
        builder.position_at_end(loop)
        step = builder.phi(I64)
        step.add_incoming(I64(0), before)
        zero = ir.Constant(vector(F32, 16), [0.0] * 16)
        accumulators = [builder.phi(vector(F32, 16)) for _ in range(4 * count)]
        parts = [
            [_at(builder, tokens_at, (token_step, t), (step, BLOCK_BYTES), vector(I32, 16), 64 * i) for i in range(3)]
            for t in range(count)
        ]
        new = []
        for r in range(4):
            scale = _per_lane(builder, _at(builder, scales_at, (scale_step, r), (step, 4 * per), vector(F32, 16)), per)
            source = _at(builder, codes_at, (code_step, r), (step, 8 * b), vector(I8, 64))
            levels = builder.bitcast(_levels(builder, source, tables, scale, b, looked, pair), vector(I32, 16))
            if pair:
                scale = call(builder, "llvm.fabs.v16f32", scale.type, scale)
            for t, (top, low, correction) in enumerate(parts):
                value = _dot(builder, correction, levels, low)
                if deep:
                    upper = _dot(builder, ir.Constant(vector(I32, 16), [0] * 16), levels, top)
                    value = builder.add(builder.shl(upper, constant_vector(I32, [8] * 16)), value)
                result = _fma(builder, builder.sitofp(value, scale.type), scale, accumulators[r * count + t])
                if zeroed:
                    offsets = _at(builder, zeros_at, (scale_step, r), (step, 4 * per), vector(F32, 16))
                    result = _fma(builder, builder.sitofp(correction, scale.type), _per_lane(builder, offsets, per), result)
                new.append(result)
        following = builder.add(step, I64(1))
        step.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, total), loop, after)
        for accumulator, value in zip(accumulators, new, strict=True):
            accumulator.add_incoming(zero, before)
            accumulator.add_incoming(value, loop)
        builder.position_at_end(after)
        for i, value in enumerate(new):
            store(builder, horizontal_sum(builder, value), builder.add(sums_at, I64(4 * i)))
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(*(i64,) * 10, width, bits, lookup, two, shifted, high, groups), codegen


def _at(builder: Any, base: Any, outer: tuple[Any, int], inner: tuple[Any, int], kind: ir.Type, offset: int = 0) -> Any:
    """Load at ``base + outer[0] * outer[1] + inner[0] * inner[1] + offset``."""
    address = builder.add(base, builder.mul(outer[0], I64(outer[1])))
    return load(builder, builder.add(builder.add(address, builder.mul(inner[0], I64(inner[1]))), I64(offset)), kind)


def _dot(builder: Any, total: Any, unsigned: Any, signed: Any) -> Any:
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", total.type, total, unsigned, signed)


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return call(builder, "llvm.fma.v16f32", c.type, a, b, c)


def _per_lane(builder: Any, values: Any, per: int) -> Any:
    """The first ``per`` of 16 floats, each for its share of the 16 lanes of four columns."""
    return builder.shuffle_vector(values, values, constant_vector(I32, [lane * per // 16 for lane in range(16)]))


def _levels(builder: Any, source: Any, tables: list[Any], scale: Any, bits: int, lookup: bool, two: bool) -> Any:
    """``<64 x i8>``: unsigned levels of 64 packed codes.

    A byte shuffle puts the bytes of eight codes into each 64-bit lane, a multishift picks eight bits from every code's first on.
    """
    index = source
    if bits < 8:
        windows = constant_vector(I8, [bits * lane + i for lane in range(8) for i in range(8)])
        spread = call(builder, "llvm.x86.avx512.permvar.qi.512", source.type, source, windows)
        starts = constant_vector(I8, [bits * i for i in range(8)] * 8)
        index = call(builder, "llvm.x86.avx512.pmultishift.qb.512", source.type, starts, spread)
    if not lookup:
        return index
    if two:
        sign = builder.ashr(builder.bitcast(scale, vector(I32, 16)), constant_vector(I32, [31] * 16))
        second = builder.and_(builder.bitcast(sign, source.type), constant_vector(I8, [1 << bits] * 64))
        index = builder.or_(builder.and_(index, constant_vector(I8, [(1 << bits) - 1] * 64)), second)
    if len(tables) == 1:
        return call(builder, "llvm.x86.avx512.permvar.qi.512", source.type, tables[0], index)
    pairs = [
        call(builder, "llvm.x86.avx512.vpermi2var.qi.512", source.type, a, index, b)
        for a, b in zip(tables[::2], tables[1::2], strict=True)
    ]
    if len(pairs) == 1:
        return pairs[0]
    return builder.select(builder.icmp_signed("<", index, constant_vector(I8, [0] * 64)), pairs[1], pairs[0])


@helper
def block_scales(job: Any, row: Any, source: Any, scratch: Any, target: Any, per: Any, factor: Any) -> None:
    """One row's scales or zeros, ``per`` for every block of 64 columns."""
    groups = job[J.GROUPS]
    blocks = job[J.COLUMNS] // COLUMNS
    direct = groups == blocks * per
    fill_scales(job[J.SCALE_KIND], source, row * job[J.SCALE_STRIDE], groups, job[J.SCALE_TABLE], target if direct else scratch)
    if not direct:
        repeat = blocks // groups
        for g in range(groups):
            value = read_f32(scratch, g)
            for i in range(g * repeat, (g + 1) * repeat):
                write(target, i, value, "float32")
    if factor != 1.0:
        for i in range(blocks * per):
            write(target, i, read_f32(target, i) * factor, "float32")


def scratch_bytes(columns: int, groups: int, code_bytes: int) -> int:
    """Bytes of scratch that a thread needs: scales and zeros of four rows, one row of either, the last rows' codes, sums."""
    return 9 * (max(columns // 16, groups) * 4 + 128) + 4 * (code_bytes + 128) + SUMS_BYTES


@inlined
def multiply_rows(
    job: Any, codes: Any, scales: Any, room: Any, token: Any, width: Any,
    bits: Any, lookup: Any, two: Any, zeros: Any, high: Any, per: Any,
) -> None:  # fmt: skip
    """Products of a block of rows with ``width`` tokens, into the scratch after the rows' scales."""
    x, sums, zero_values = job[J.X] + token * job[J.X_STRIDE], scales + 9 * room, scales + 4 * room
    dot_levels(
        codes, job[J.CODE_BYTES], job[J.TABLE], x, job[J.X_STRIDE], scales, zero_values, room, job[J.COLUMNS] // COLUMNS, sums,
        width, bits, lookup, two, zeros, high, per,
    )  # fmt: skip


@lru_cache(maxsize=64)
def bytes_kernel(bits: int, lookup: bool, two: bool, zeros: bool, high: bool, per: int) -> Any:
    """Kernel of a weight whose levels are bytes; see :func:`dot_levels` for the arguments."""
    source = SOURCE

    @kernel
    def entry(raw: Any) -> None:
        _ = source
        job = carray(raw, (J.LENGTH,), np.int64)
        header, rows, columns, tokens = job.ctypes.data, job[J.ROWS], job[J.COLUMNS], job[J.TOKENS]
        stride = job[J.CODE_BYTES]
        room = max(columns // COLUMNS * per, job[J.GROUPS]) * 4 + 128
        scales = job[J.SCRATCH] + fetch_add(header + 8 * J.SLOT, 1) * job[J.SCRATCH_BYTES]
        zero_values, one_row = scales + 4 * room, scales + 8 * room
        copied = one_row + room + SUMS_BYTES
        task = fetch_add(header + 8 * J.TASK, 1)
        while task < job[J.TASKS]:
            for first in range(task * job[J.PER_TASK], min((task + 1) * job[J.PER_TASK], rows), J.ROW_BLOCK):
                count = min(J.ROW_BLOCK, rows - first)
                codes = job[J.CODES] + first * stride
                if first + J.ROW_BLOCK >= rows:  # blocks are read 64 bytes at a time: not past the end of the last row
                    copy_bytes(copied, codes, count * stride)
                    codes = copied
                for r in range(count):
                    block_scales(job, first + r, job[J.SCALES], one_row, scales + r * room, per, 1.0)
                    if zeros:
                        block_scales(job, first + r, job[J.ZEROS], one_row, zero_values + r * room, per, -1.0 / OFFSET)
                token = 0
                while token < tokens:
                    width = 4 if tokens - token >= 4 else (2 if tokens - token >= 2 else 1)
                    if width == 4:
                        multiply_rows(job, codes, scales, room, token, 4, bits, lookup, two, zeros, high, per)
                    elif width == 2:
                        multiply_rows(job, codes, scales, room, token, 2, bits, lookup, two, zeros, high, per)
                    else:
                        multiply_rows(job, codes, scales, room, token, 1, bits, lookup, two, zeros, high, per)
                    finish(scales + 9 * room, width, token, first, count, job)
                    token += width
            task = fetch_add(header + 8 * J.TASK, 1)

    return entry
