"""The two weight kernels, one for formats of levels and one for codebooks.

Either decodes a packed weight into a dense one, or multiplies it by a few tokens without writing it anywhere: every thread takes
blocks of rows, decodes four at a time into its own scratch (which stays in the first-level cache) and multiplies them there. A
row belongs to one thread, and its sums are taken in one order, so results do not depend on the number of threads.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from numba import carray

from . import _job as J
from ._compile import SOURCE, helper, inlined, kernel
from ._rows import TABLE_SPAN, fill_scales, products_bfloat16, products_float32, rescale_to_int8
from ._simd import SIZES, copy_bytes, fast_lookup, fetch_add, read_bf16, read_f32, read_u8, write, zero_bytes
from ._vector import BLOCK, add_entries, decode_levels

SUMS_BYTES = 256
SLACK = 256  # bytes past a decoded row that a vector may write to


@helper
def scale_room(groups: Any) -> Any:
    """Bytes for one float32 per group, plus one vector."""
    return groups * 4 + 64


def scratch_bytes(columns: int, groups: int, code_bytes: int) -> int:
    """Bytes of scratch that a thread needs: four decoded rows, sums, scales and zeros, one row of codes."""
    rows = J.ROW_BLOCK * _round_up(columns, BLOCK) * 4 + SLACK
    return _round_up(rows + SUMS_BYTES + 2 * scale_room.py_func(groups) + code_bytes + SLACK, 4096)


@inlined
def products(decoded: Any, stride: Any, first: Any, count: Any, sums: Any, job: Any, out: Any) -> None:
    """Multiply decoded rows by all tokens."""
    if out == "float32":
        products_float32(decoded, stride, first, count, sums, job)
    if out == "bfloat16":
        products_bfloat16(decoded, stride, first, count, sums, job)


@inlined
def read_code(codes: Any, bit: Any, bits: Any) -> Any:
    """The code of up to 8 bits at position ``bit``; no byte without a part of it is read."""
    code = read_u8(codes, bit // 8)
    if bit % 8 + bits > 8:
        code += read_u8(codes, bit // 8 + 1) << 8
    return (code >> (bit % 8)) & ((1 << bits) - 1)


def row_stride(columns: int, out: str) -> int:
    """Bytes of a decoded row in scratch, padded with zeros to whole vectors."""
    return _round_up(columns, BLOCK if out == "bfloat16" else 16) * SIZES[out]


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@inlined
def decode_level_row(
    job: Any, row: Any, scratch: Any, target: Any, bits: Any, two: Any, zeros: Any, out: Any, size: Any, simd: Any
) -> None:
    """Decode one row of level codes to ``target``. ``scratch``: address of two arrays of scales, ``scale_room`` each."""
    columns, groups, group_size, table = job[J.COLUMNS], job[J.GROUPS], job[J.GROUP_SIZE], job[J.TABLE]
    scales, zero_values = scratch, scratch + scale_room(groups)
    row_scales(job, row, scales, zero_values, zeros, out, float((1 << bits) - 1))
    codes = job[J.CODES] + row * job[J.CODE_BYTES]
    whole, group, left = 0, 0, group_size
    if simd and group_size % 16 == 0:
        whole = columns // BLOCK
        for b in range(whole):
            s0 = read_f32(scales, group)
            z0 = read_f32(zero_values, group) if zeros else np.float32(0)
            left -= 16
            if left == 0:
                group, left = group + 1, group_size
            s1 = read_f32(scales, group)
            z1 = read_f32(zero_values, group) if zeros else np.float32(0)
            left -= 16
            if left == 0:
                group, left = group + 1, group_size
            at = target + b * BLOCK * size
            decode_levels(codes + b * 4 * bits, table, s0, s1, z0, z1, at, bits, two, zeros, out)
    for g in range(whole * BLOCK // group_size, groups):
        scale = read_f32(scales, g)
        zero = read_f32(zero_values, g) if zeros else np.float32(0)
        offset = (1 << bits) if two and scale < 0 else 0
        scale = abs(scale) if two else scale
        for c in range(max(g * group_size, whole * BLOCK), min((g + 1) * group_size, columns)):
            level = read_bf16(table, read_code(codes, c * bits, bits) + offset)
            write(target, c, level * scale + zero, out)


@inlined
def row_scales(job: Any, row: Any, scales: Any, zero_values: Any, zeros: Any, out: Any, top: Any) -> None:
    """A row's scales and zeros in float32; for int8 rows divided by the row's scale."""
    kind, groups, table, first = job[J.SCALE_KIND], job[J.GROUPS], job[J.SCALE_TABLE], row * job[J.SCALE_STRIDE]
    fill_scales(kind, job[J.SCALES], first, groups, table, scales)
    if zeros:
        fill_scales(kind, job[J.ZEROS], first, groups, table, zero_values)
    if out == "int8":
        unit = rescale_to_int8(scales, zero_values if zeros else 0, groups, read_f32(table, TABLE_SPAN), top)
        write(job[J.ROW_SCALES], row, unit, "float32")


@lru_cache(maxsize=64)
def levels_kernel(bits: int, two: bool, zeros: bool, out: str) -> Any:
    """Kernel of a weight whose codes are levels of a table: integers and minifloats of up to 8 bits.

    Args:
        bits: width of a code; two: whether the sign of a scale picks one of two tables; zeros: whether groups have zeros.
        out: "bfloat16", "float32", "float16" or "int8", what rows are decoded to.
    """
    simd = fast_lookup() and bits + two <= 8
    source, size, unit = SOURCE, SIZES[out], (BLOCK if out == "bfloat16" else 16)

    @kernel
    def entry(raw: Any) -> None:
        _ = source
        job = carray(raw, (J.LENGTH,), np.int64)
        header, rows, columns, tokens = job.ctypes.data, job[J.ROWS], job[J.COLUMNS], job[J.TOKENS]
        stride = (columns + unit - 1) // unit * unit * size
        decoded = job[J.SCRATCH] + fetch_add(header + 8 * J.SLOT, 1) * job[J.SCRATCH_BYTES]
        sums = decoded + J.ROW_BLOCK * stride + SLACK
        scales = sums + SUMS_BYTES
        task = fetch_add(header + 8 * J.TASK, 1)
        while task < job[J.TASKS]:
            for first in range(task * job[J.PER_TASK], min((task + 1) * job[J.PER_TASK], rows), J.ROW_BLOCK):
                count = min(J.ROW_BLOCK, rows - first)
                for row in range(first, first + count):
                    target = decoded + (row - first) * stride if tokens else job[J.TARGET] + row * job[J.TARGET_STRIDE]
                    decode_level_row(job, row, scales, target, bits, two, zeros, out, size, simd)
                    if tokens:
                        zero_bytes(target + columns * size, stride - columns * size)
                if tokens:
                    products(decoded, stride, first, count, sums, job, out)
            task = fetch_add(header + 8 * J.TASK, 1)

    return entry


@lru_cache(maxsize=64)
def codebook_kernel(bits: int, num_codebooks: int, lanes: int, integer: bool, out: str) -> Any:
    """Kernel of a weight whose vectors are sums of codebook entries.

    Args:
        bits: width of a code, up to 16.
        num_codebooks: entries in a sum.
        lanes: vector size, padded to a power of two: the tables' last dimension.
        integer: whether the tables are int16 (from int8 codebooks) rather than float32.
        out: as in :func:`levels_kernel`.
    """
    source, size, unit = SOURCE, SIZES[out], (BLOCK if out == "bfloat16" else 16)

    @kernel
    def entry(raw: Any) -> None:
        _ = source
        job = carray(raw, (J.LENGTH,), np.int64)
        header, rows, columns, tokens = job.ctypes.data, job[J.ROWS], job[J.COLUMNS], job[J.TOKENS]
        groups, group_size, vector_size = job[J.GROUPS], job[J.GROUP_SIZE], job[J.VECTOR_SIZE]
        stride = (columns + unit - 1) // unit * unit * size
        decoded = job[J.SCRATCH] + fetch_add(header + 8 * J.SLOT, 1) * job[J.SCRATCH_BYTES]
        sums = decoded + J.ROW_BLOCK * stride + SLACK
        scales = sums + SUMS_BYTES
        last_codes = scales + 2 * scale_room(groups)
        vectors = (columns + vector_size - 1) // vector_size
        per_group = group_size // vector_size if groups > 1 else vectors
        task = fetch_add(header + 8 * J.TASK, 1)
        while task < job[J.TASKS]:
            for first in range(task * job[J.PER_TASK], min((task + 1) * job[J.PER_TASK], rows), J.ROW_BLOCK):
                count = min(J.ROW_BLOCK, rows - first)
                for row in range(first, first + count):
                    row_scales(job, row, scales, scales, False, out, 0.0)
                    codes = job[J.CODES] + row * job[J.CODE_BYTES]
                    if bits != 8 and row == rows - 1:  # codes are read in words: not past the end of the last row
                        copy_bytes(last_codes, codes, job[J.CODE_BYTES])
                        codes = last_codes
                    target = decoded + (row - first) * stride
                    for g in range(groups):
                        scale = read_f32(scales, g)
                        for v in range(g * per_group, min((g + 1) * per_group, vectors)):
                            at = target + v * vector_size * size
                            add_entries(
                                codes, v * num_codebooks * bits, job[J.TABLE], scale, at, bits, num_codebooks, lanes, integer, out
                            )
                    if tokens:
                        zero_bytes(target + columns * size, stride - columns * size)
                    else:
                        copy_bytes(job[J.TARGET] + row * job[J.TARGET_STRIDE], target, columns * size)
                if tokens:
                    products(decoded, stride, first, count, sums, job, out)
            task = fetch_add(header + 8 * J.TASK, 1)

    return entry
