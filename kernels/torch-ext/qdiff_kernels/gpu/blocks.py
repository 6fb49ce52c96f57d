"""Device functions that the matrix product and the convolution share: operands, epilogue, order of tiles."""

from __future__ import annotations

import os

import triton
import triton.language as tl

from .decode import CODEBOOK, DENSE, INTEGER, minifloat_value, scale_tile, weight_tile

# Where a weight's scale is multiplied: on the sums of a row, on the partial sums of a group, on each weight, or by the matrix
# unit itself.
ROW, GROUP_SUM, WEIGHT, NATIVE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
INT4_GROUP = tl.constexpr(64)
# Triton's interpreter multiplies the bit patterns of bfloat16 numbers; float32 holds the same numbers.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def operand_tile(
    codes_ptr,
    table_ptr,
    scales_ptr,
    zeros_ptr,
    rows,
    start,
    columns,
    codes_stride,
    scales_stride,
    groups,
    unit,
    OPERAND: tl.constexpr,
    SCALE_AT: tl.constexpr,
    KIND: tl.constexpr,
    BITS: tl.constexpr,
    ENCODING: tl.constexpr,
    SECOND: tl.constexpr,
    BOOKS: tl.constexpr,
    VECTOR: tl.constexpr,
    MIDPOINT: tl.constexpr,
    GROUP: tl.constexpr,
    E8M0: tl.constexpr,
    E4M3: tl.constexpr,
    HAS_ZEROS: tl.constexpr,
    ALIGNED: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Weights ``[BN, BK]`` as the matrix unit takes them, times ``unit``; scales are in them only if ``SCALE_AT`` is ``WEIGHT``."""
    if KIND == DENSE:
        column = start + tl.arange(0, BK)
        at = codes_ptr + rows.to(tl.int64)[:, None] * codes_stride + column[None, :]
        return tl.load(at, mask=(column < columns)[None, :], other=0.0)
    else:
        scales = tl.full([BN, BK], 1.0, tl.float32)
        if SCALE_AT == WEIGHT:
            scales = scale_tile(scales_ptr, rows, start, columns, scales_stride, groups, GROUP, E8M0, E4M3, BK) * unit
        w = weight_tile(
            codes_ptr, table_ptr, rows, scales < 0, start, columns, codes_stride,
            KIND, BITS, ENCODING, SECOND, BOOKS, VECTOR, ALIGNED, BN, BK,
        )  # fmt: skip
        if KIND == INTEGER:
            w -= MIDPOINT
            if OPERAND != tl.int8:
                w = w.to(tl.float32)
        elif SCALE_AT != WEIGHT:
            w *= unit
            if OPERAND == tl.int8 and KIND == CODEBOOK:
                w = tl.floor(tl.minimum(tl.maximum(w, -127.0), 127.0) + 0.5)
        if SCALE_AT == WEIGHT:
            w = w * (tl.abs(scales) if SECOND else scales)
            if HAS_ZEROS:
                w += scale_tile(zeros_ptr, rows, start, columns, scales_stride, groups, GROUP, E8M0, E4M3, BK) + scales * MIDPOINT
        return w.to(OPERAND)


@triton.jit
def multiply(w, x, acc, SUM: tl.constexpr, BK: tl.constexpr):
    """``w [BN, BK] @ x [BK, BM] + acc``. Sums of float8 products are carried on in full float32 after every block."""
    if INTERPRETED and w.dtype == tl.bfloat16:
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(w, x, acc, input_precision="ieee", max_num_imprecise_acc=BK, out_dtype=SUM)


@triton.jit
def multiply_scaled(
    codes_ptr, scales_ptr, rows, start, codes_stride, scales_stride, groups, x, acc,
    BITS: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """``acc`` plus the product of MXFP4 or MXFP8 weights ``[BN, BK]``, as stored, with ``x [BK, BM]``: Blackwell's own format."""
    PER_BYTE: tl.constexpr = 8 // BITS
    byte = start // PER_BYTE + tl.arange(0, BK // PER_BYTE)
    at = codes_ptr + rows.to(tl.int64)[:, None] * codes_stride + byte[None, :]
    w = tl.load(at, mask=(byte < codes_stride)[None, :], other=0).to(tl.uint8, bitcast=True)
    group = start // 32 + tl.arange(0, BK // 32)
    at = scales_ptr + rows[:, None] * scales_stride + group[None, :]
    scales = tl.load(at, mask=(group < groups)[None, :], other=0).to(tl.uint8, bitcast=True)
    FORMAT: tl.constexpr = "e2m1" if BITS == 4 else "e4m3"
    return tl.dot_scaled(w, scales, FORMAT, x, None, "bf16" if x.dtype == tl.bfloat16 else "e4m3", acc)


@triton.jit
def input_operand(x, OPERAND: tl.constexpr, FP8_BYTES: tl.constexpr):
    """Loaded inputs in the operand's type; FP8_BYTES: float8 numbers held as bytes, for GPUs without that type."""
    if FP8_BYTES:
        return minifloat_value(x.to(tl.int32), 4 * 16 + 3 * 2).to(OPERAND)
    elif x.dtype == tl.int8 and OPERAND != tl.int8:
        return x.to(tl.float32).to(OPERAND)
    else:
        return x.to(OPERAND)


@triton.jit
def add_branch_and_bias(
    y, branch_ptr, up_ptr, bias_ptr, token, token_inside, rows, rank, RANK: tl.constexpr, HAS_BIAS: tl.constexpr
):
    """``y [BN, BM] + up [BN, rank] branch^T [rank, BM] + bias [BN]``."""
    if RANK:
        index = tl.arange(0, RANK)
        inside = index < rank
        up = tl.load(up_ptr + rows[:, None] * rank + index[None, :], mask=inside[None, :], other=0.0)
        at = branch_ptr + token.to(tl.int64)[None, :] * rank + index[:, None]
        branch = tl.load(at, mask=inside[:, None] & token_inside[None, :], other=0.0)
        y = multiply(up.to(branch.dtype), branch, y, tl.float32, RANK)
    if HAS_BIAS:
        y += tl.load(bias_ptr + rows).to(tl.float32)[:, None]
    return y


@triton.jit
def tile_of(pid, tiles_n, tiles_m):
    """(row tile, token tile) of a program: groups of 8 row tiles walk over the tokens together, so that both stay in L2."""
    per_group = 8 * tiles_m
    first = pid // per_group * 8
    height = tl.minimum(tiles_n - first, 8)
    return first + pid % per_group % height, pid % per_group // height
