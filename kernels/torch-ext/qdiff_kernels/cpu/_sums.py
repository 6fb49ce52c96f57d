"""Few tokens by a codebook: each vector of weights is summed from its entries in a register and multiplied there.

Nothing is decoded to memory. int8 codebooks are held as int16 and multiplied by tokens in 16-bit integers (a token is
``step * number``, 14 bits or more below its largest magnitude), others in float32. Scales of a row are applied to its sum.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types

from . import _job as J
from ._compile import SOURCE, inlined, kernel
from ._rows import fill_scales, finish
from ._simd import (
    F32,
    I16,
    I32,
    I64,
    call,
    constant_vector,
    copy_bytes,
    fetch_add,
    intrinsic,
    load,
    read_f32,
    store,
    vector,
    write,
    zero_bytes,
)
from ._vector import horizontal_sum, read_packed

RUN = 32  # sums of 16-bit products that are added up as integers before they are added to float32 sums
LEAST_LANES = 8  # 16-bit lanes of the shortest register: shorter vectors are taken together


def joined(lanes: int) -> int:
    """Vectors that are multiplied together."""
    return max(1, LEAST_LANES // lanes)


@intrinsic(prefer_literal=True)
def dot_sums(
    typingctx: Any,
    codes: Any,
    code_stride: Any,
    tables: Any,
    tokens: Any,
    token_stride: Any,
    first: Any,
    last: Any,
    sums: Any,
    width: Any,
    bits: Any,
    count: Any,
    lanes: Any,
    integer: Any,
) -> Any:
    """Add to ``sums[r, t]`` the products of vectors ``first`` to ``last - 1`` of four rows with ``width`` tokens.

    Args:
        codes: address of four rows of packed codes. tables: address of ``[count, 2**bits, lanes]``, int16 or float32.
        tokens: address of ``[width, vectors, lanes]`` of the same type, zero where there is no column. Strides in bytes.
        first, last: multiples of ``joined(lanes)``, ``first < last``.
        sums: address of float32 ``[4, width, 16]``: lanes are kept apart.
        width, bits, count, lanes, integer: literals: tokens, width of a code, codebooks, vector size, whether int16.
    """
    tall, b, books, size, whole = (t.literal_value for t in (width, bits, count, lanes, integer))
    together = joined(size)
    kind, bytes_each = (I16, 2) if whole else (F32, 4)
    held = vector(I32, size * together // 2) if whole else vector(F32, size * together)

    def codegen(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        codes_at, code_step, tables_at, tokens_at, token_step, start, end, sums_at = arguments[:8]
        before, loop = builder.block, builder.append_basic_block("sums")
        after = builder.append_basic_block("summed")
        builder.branch(loop)
        builder.position_at_end(loop)
        at = builder.phi(I64)
        at.add_incoming(start, before)
        totals = [builder.phi(held) for _ in range(4 * tall)]
        offset = builder.mul(at, I64(size * bytes_each))
        columns = [
            load(
                builder, builder.add(builder.add(tokens_at, builder.mul(token_step, I64(t))), offset), vector(kind, size * together)
            )
            for t in range(tall)
        ]
        new = []
        for r in range(4):
            row = builder.add(codes_at, builder.mul(code_step, I64(r)))
            vectors = []
            for v in range(together):
                bit = builder.mul(builder.add(at, I64(v)), I64(b * books))
                vectors.append(_sum_entries(builder, row, bit, tables_at, vector(kind, size), b, books, whole))
            weights = _join(builder, vectors)
            new += [_multiply_add(builder, totals[r * tall + t], weights, columns[t], whole) for t in range(tall)]
        following = builder.add(at, I64(together))
        at.add_incoming(following, loop)
        builder.cbranch(builder.icmp_signed("<", following, end), loop, after)
        zero = ir.Constant(held, [0] * held.count)
        for total, value in zip(totals, new, strict=True):
            total.add_incoming(zero, before)
            total.add_incoming(value, loop)
        builder.position_at_end(after)
        for i, value in enumerate(new):
            place = builder.add(sums_at, I64(4 * i))
            amount = horizontal_sum(builder, builder.sitofp(value, vector(F32, held.count)) if whole else value)
            store(builder, builder.fadd(load(builder, place, F32), amount), place)
        return context.get_dummy_value()

    i64 = types.int64
    return types.void(*(i64,) * 8, width, bits, count, lanes, integer), codegen


def _sum_entries(builder: Any, row: Any, bit: Any, tables: Any, kind: ir.VectorType, bits: int, books: int, whole: bool) -> Any:
    entry_bytes = kind.count * (2 if whole else 4)
    total = None
    for m in range(books):
        code = read_packed(builder, row, bit, m, bits)
        offset = builder.add(builder.mul(code, I64(entry_bytes)), I64((m << bits) * entry_bytes))
        entry = load(builder, builder.add(tables, offset), kind)
        total = entry if total is None else (builder.add if whole else builder.fadd)(total, entry)
    return total


def _join(builder: Any, vectors: list[Any]) -> Any:
    """Vectors one after the other in one register."""
    while len(vectors) > 1:
        indices = constant_vector(I32, list(range(2 * vectors[0].type.count)))
        vectors = [builder.shuffle_vector(a, b, indices) for a, b in zip(vectors[::2], vectors[1::2], strict=True)]
    return vectors[0]


def _multiply_add(builder: Any, total: Any, a: Any, b: Any, whole: bool) -> Any:
    """``total + a * b``; 16-bit products are added in pairs, which is one instruction where the host has it."""
    if not whole:
        return call(builder, f"llvm.fma.v{total.type.count}f32", total.type, a, b, total)
    wide = vector(I32, a.type.count)
    products = builder.mul(builder.sext(a, wide), builder.sext(b, wide))
    even, odd = (builder.shuffle_vector(products, products, constant_vector(I32, list(range(i, wide.count, 2)))) for i in (0, 1))
    return builder.add(total, builder.add(even, odd))


@inlined
def all_sums(
    codes: Any, stride: Any, tables: Any, x: Any, x_stride: Any, vectors: Any, sums: Any,
    width: Any, bits: Any, count: Any, lanes: Any, integer: Any,
) -> None:  # fmt: skip
    """Products of four rows with ``width`` tokens, in runs that integers hold."""
    for i in range(4 * width):
        write(sums, i, np.float32(0), "float32")
    run = RUN if integer else vectors
    for begin in range(0, vectors, run):
        dot_sums(codes, stride, tables, x, x_stride, begin, min(begin + run, vectors), sums, width, bits, count, lanes, integer)


@inlined
def multiply_rows(
    job: Any, codes: Any, sums: Any, token: Any, vectors: Any, width: Any, bits: Any, books: Any, lanes: Any, integer: Any
) -> None:
    """Products of a block of rows with ``width`` tokens."""
    x = job[J.X] + token * job[J.X_STRIDE]
    all_sums(codes, job[J.CODE_BYTES], job[J.TABLE], x, job[J.X_STRIDE], vectors, sums, width, bits, books, lanes, integer)


def scratch_bytes(code_bytes: int) -> int:
    """Bytes of scratch that a thread needs: sums, scales, the last rows' codes."""
    return 1024 + 4 * (code_bytes + 16)


@lru_cache(maxsize=64)
def sums_kernel(bits: int, books: int, lanes: int, integer: bool) -> Any:
    """Kernel of a codebook weight with a scale per row; see :func:`dot_sums` for the arguments."""
    source, together = SOURCE, joined(lanes)

    @kernel
    def entry(raw: Any) -> None:
        _ = source
        job = carray(raw, (J.LENGTH,), np.int64)
        header, rows, tokens, stride = job.ctypes.data, job[J.ROWS], job[J.TOKENS], job[J.CODE_BYTES]
        vectors = (job[J.COLUMNS] + job[J.VECTOR_SIZE] - 1) // job[J.VECTOR_SIZE]
        vectors = (vectors + together - 1) // together * together
        sums = job[J.SCRATCH] + fetch_add(header + 8 * J.SLOT, 1) * job[J.SCRATCH_BYTES]
        scales, copied = sums + 256, sums + 512
        task = fetch_add(header + 8 * J.TASK, 1)
        while task < job[J.TASKS]:
            for first in range(task * job[J.PER_TASK], min((task + 1) * job[J.PER_TASK], rows), J.ROW_BLOCK):
                count = min(J.ROW_BLOCK, rows - first)
                codes = job[J.CODES] + first * stride
                if first + J.ROW_BLOCK >= rows:  # codes are read in words and in pairs: not past the end of the last row
                    zero_bytes(copied, 4 * stride + 64)
                    copy_bytes(copied, codes, count * stride)
                    codes = copied
                for r in range(count):
                    at = (first + r) * job[J.SCALE_STRIDE]
                    fill_scales(job[J.SCALE_KIND], job[J.SCALES], at, 1, job[J.SCALE_TABLE], scales + 4 * r)
                token = 0
                while token < tokens:
                    width = 4 if tokens - token >= 4 else (2 if tokens - token >= 2 else 1)
                    if width == 4:
                        multiply_rows(job, codes, sums, token, vectors, 4, bits, books, lanes, integer)
                    elif width == 2:
                        multiply_rows(job, codes, sums, token, vectors, 2, bits, books, lanes, integer)
                    else:
                        multiply_rows(job, codes, sums, token, vectors, 1, bits, books, lanes, integer)
                    for i in range(count * width):
                        write(sums, i, read_f32(sums, i) * read_f32(scales, i // width), "float32")
                    finish(sums, width, token, first, count, job)
                    token += width
            task = fetch_add(header + 8 * J.TASK, 1)

    return entry
