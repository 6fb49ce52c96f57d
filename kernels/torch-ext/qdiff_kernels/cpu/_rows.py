"""Compiled helpers of the weight kernels: scales of a row, products with tokens, results."""

from __future__ import annotations

from typing import Any

from . import _job as J
from ._compile import helper
from ._simd import fast_dot, read_bf16, read_f16, read_f32, read_u8, write
from ._vector import decode_e4m3, multiply

TABLE_FACTOR, TABLE_SPAN = 256, 257


@helper
def fill_scales(kind: Any, source: Any, first: Any, count: Any, table: Any, target: Any) -> None:
    """Scales ``first .. first + count - 1`` as float32 at ``target``."""
    factor = read_f32(table, TABLE_FACTOR)
    if kind == J.BYTE:
        for i in range(count):
            write(target, i, read_f32(table, read_u8(source, first + i)), "float32")
    elif kind == J.E4M3:
        for i in range(0, count - 15, 16):
            decode_e4m3(source + first + i, factor, target + 4 * i)
        for i in range(count // 16 * 16, count):
            write(target, i, read_f32(table, read_u8(source, first + i)), "float32")
    elif kind == J.FLOAT16:
        for i in range(count):
            write(target, i, read_f16(source, first + i) * factor, "float32")
    elif kind == J.BFLOAT16:
        for i in range(count):
            write(target, i, read_bf16(source, first + i) * factor, "float32")
    else:
        for i in range(count):
            write(target, i, read_f32(source, first + i) * factor, "float32")


@helper
def rescale_to_int8(scales: Any, zeros: Any, count: Any, span: Any, top: Any) -> Any:
    """Divide a row's scales (and zeros) so that its levels become int8; returns the divisor.

    ``span``: the largest level over 127, or the unit of which all levels are multiples. ``top``: the largest code, with zeros.
    """
    largest = 0.0
    for i in range(count):
        scale = read_f32(scales, i)
        if zeros == 0:
            largest = max(largest, abs(scale))
        else:
            zero = read_f32(zeros, i)
            largest = max(largest, abs(zero) / 127.0, abs(scale * top + zero) / 127.0)
    unit = largest if zeros != 0 else largest * span
    if unit == 0.0:
        unit = 1.0
    inverse = 1.0 / unit
    for i in range(count):
        write(scales, i, read_f32(scales, i) * inverse, "float32")
        if zeros != 0:
            write(zeros, i, read_f32(zeros, i) * inverse, "float32")
    return unit


@helper
def finish(sums: Any, width: Any, token: Any, row: Any, count: Any, job: Any) -> None:
    """Results of ``count`` rows and ``width`` tokens from their sums: token scale, bias, addend, rounding."""
    rows, y, size = job[J.ROWS], job[J.Y], count * width
    if job[J.TOKEN_SCALES]:  # one loop for each, for the compiler makes a copy of a loop for every combination of tests inside
        for i in range(size):
            write(sums, i, read_f32(sums, i) * read_f32(job[J.TOKEN_SCALES], token + i % width), "float32")
    if job[J.ADDEND]:
        for i in range(size):
            at = (token + i % width) * rows + row + i // width
            write(sums, i, read_f32(sums, i) + read_f32(job[J.ADDEND], at), "float32")
    if job[J.BIAS]:
        for i in range(size):
            write(sums, i, read_f32(sums, i) + read_f32(job[J.BIAS], row + i // width), "float32")
    for i in range(size):
        at = (token + i % width) * rows + row + i // width
        if job[J.Y_KIND] == J.BFLOAT16:
            write(y, at, read_f32(sums, i), "bfloat16")
        elif job[J.Y_KIND] == J.FLOAT16:
            write(y, at, read_f32(sums, i), "float16")
        else:
            write(y, at, read_f32(sums, i), "float32")


def _make_products(out: str, fast: bool) -> Any:
    @helper
    def products(rows: Any, stride: Any, row: Any, count: Any, sums: Any, job: Any) -> None:
        """Multiply four decoded rows, of which ``count`` exist, by all tokens."""
        steps = stride // 64
        x, x_stride, tokens = job[J.X], job[J.X_STRIDE], job[J.TOKENS]
        token = 0
        while token < tokens:
            at, width = x + token * x_stride, min(4, tokens - token)
            if width == 4:
                multiply(rows, stride, at, x_stride, steps, sums, 4, 4, out, fast)
            elif width == 3:
                multiply(rows, stride, at, x_stride, steps, sums, 4, 3, out, fast)
            elif width == 2:
                multiply(rows, stride, at, x_stride, steps, sums, 4, 2, out, fast)
            else:
                multiply(rows, stride, at, x_stride, steps, sums, 4, 1, out, fast)
            finish(sums, width, token, row, count, job)
            token += width

    return products


products_float32 = _make_products("float32", False)
products_bfloat16 = _make_products("bfloat16", fast_dot())
