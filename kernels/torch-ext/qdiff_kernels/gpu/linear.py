"""Matrix product with a packed weight: ``y^T = W x^T``, W decoded tile by tile in registers.

The weight is the first operand because matrix units of recent GPUs (Hopper's wgmma) take that one from registers: decoded
weights need not travel through shared memory. One kernel serves every format, every operand type and every number of tokens;
for few tokens the columns are split over several programs, whose partial sums are added in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import (
    GROUP_SUM,
    INT4_GROUP,
    NATIVE,
    ROW,
    WEIGHT,
    add_branch_and_bias,
    input_operand,
    multiply,
    multiply_scaled,
    operand_tile,
    tile_of,
)
from .configs import LinearConfig
from .decode import group_scale
from .weights import PackedWeight

OPERANDS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
}


class Inputs(NamedTuple):
    """What the kernel multiplies: transformed and perhaps quantized tokens."""

    values: Tensor  # [tokens, columns], floating, int8, or float8
    scales: Tensor | None  # float32 [tokens, 1], or [tokens, groups of 64]
    sums: Tensor | None  # float32 [tokens]: of quantized values, scales multiplied in; zeros of rows multiply them
    branch: Tensor | None  # [tokens, rank], the low-rank branch before its up-projection


class Arithmetic(NamedTuple):
    """In which type operands meet and where scales are multiplied."""

    operand: torch.dtype
    scale_at: int
    unit: float  # the weight operand holds levels times this


class Units(NamedTuple):
    """What the device's matrix units take beside 16-bit numbers and int8."""

    bf16: bool  # without, Triton's products run on scalar units
    fp8: bool  # E4M3
    block_scaled: bool  # MXFP4 and MXFP8, scales included


def plan(weight: PackedWeight, given: torch.dtype, block: int, out_dtype: torch.dtype, units: Units) -> Arithmetic:
    """8-bit operands where they lose nothing, else 16-bit ones, which hold both kinds of activation codes exactly.

    Args:
        given: dtype of the inputs.
        block: columns multiplied between two additions to the sums.
        units: what the device multiplies.
    """
    if units.block_scaled and weight.block_scaled and given in (torch.bfloat16, torch.float8_e4m3fn):
        return Arithmetic(given, NATIVE.value, 1.0)
    if weight.row_scales and (weight.zeros is None or given.itemsize == 1):
        scale_at = ROW.value
    elif weight.group_size % block == 0 and weight.zeros is None and not weight.second:
        scale_at = GROUP_SUM.value
    else:
        scale_at = WEIGHT.value
    if given.itemsize > 1:
        return Arithmetic(given, scale_at, weight.operand_unit(given) or 1.0 if scale_at != WEIGHT.value else 1.0)
    unit = weight.operand_unit(given)
    if unit is not None and scale_at != WEIGHT.value and (given == torch.int8 or units.fp8):
        return Arithmetic(given, scale_at, unit)
    return Arithmetic(torch.float32 if out_dtype == torch.float32 else torch.bfloat16, scale_at, 1.0)


def linear(
    weight: PackedWeight,
    inputs: Inputs,
    up: Tensor | None,
    bias: Tensor | None,
    config: LinearConfig,
    out_dtype: torch.dtype,
    units: Units,
) -> Tensor:
    """``[tokens, rows]`` in ``out_dtype``; ``up [rows, rank]`` and ``bias [rows]`` are added in the epilogue."""
    x = inputs.values
    tokens, columns = x.shape
    grouped = inputs.scales is not None and inputs.scales.shape[1] > 1
    block = INT4_GROUP.value if grouped else config.block_columns
    arithmetic = plan(weight, x.dtype, block, out_dtype, units)
    fp8_bytes = x.dtype == torch.float8_e4m3fn and arithmetic.operand != x.dtype
    splits = min(config.splits, triton.cdiv(columns, block))
    out = torch.empty(tokens, weight.rows, device=x.device, dtype=out_dtype)
    target = out if splits == 1 else torch.empty(splits, tokens, weight.rows, device=x.device, dtype=torch.float32)
    rank = 0 if up is None or inputs.branch is None else up.shape[1]
    grid = (triton.cdiv(weight.rows, config.block_rows) * triton.cdiv(tokens, config.block_tokens), splits)
    values = x.view(torch.uint8) if fp8_bytes else x
    _linear_kernel[grid](
        values,
        values if inputs.scales is None else inputs.scales,
        values if inputs.sums is None else inputs.sums,
        target,
        values if bias is None else bias,
        values if inputs.branch is None else inputs.branch,
        values if up is None else up,
        values if weight.tensor_scale is None else weight.tensor_scale,
        *weight.arguments(),
        tokens,
        weight.rows,
        x.stride(0),
        rank,
        arithmetic.unit,
        OPERAND=OPERANDS[arithmetic.operand],
        SCALE_AT=arithmetic.scale_at,
        X_SCALES=0 if inputs.scales is None else 1 + grouped,
        X_FP8_BYTES=fp8_bytes,
        RANK=max(16, triton.next_power_of_2(rank)) if rank else 0,
        HAS_BIAS=bias is not None,
        HAS_TENSOR_SCALE=weight.tensor_scale is not None,
        BN=config.block_rows,
        BM=config.block_tokens,
        BK=block,
        num_warps=config.warps,
        num_stages=config.stages,
        **weight.constexprs(),
    )
    if splits > 1:
        size = out.numel()
        _sum_splits_kernel[(triton.cdiv(size, 1024),)](target, out, size, splits, BLOCK=1024)
    return out


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    x_ptr,
    x_scales_ptr,
    x_sums_ptr,
    y_ptr,
    bias_ptr,
    branch_ptr,
    up_ptr,
    tensor_scale_ptr,
    codes_ptr,
    table_ptr,
    scales_ptr,
    zeros_ptr,
    codes_stride,
    scales_stride,
    groups,
    columns,
    tokens,
    row_count,
    x_stride,
    rank,
    unit,
    OPERAND: tl.constexpr,
    SCALE_AT: tl.constexpr,
    X_SCALES: tl.constexpr,  # 0: none, 1: per token, 2: per token and 64 columns
    X_FP8_BYTES: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TENSOR_SCALE: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
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
):
    pid_n, pid_m = tile_of(tl.program_id(0), tl.cdiv(row_count, BN), tl.cdiv(tokens, BM))
    row = pid_n * BN + tl.arange(0, BN)
    token = pid_m * BM + tl.arange(0, BM)
    rows = tl.minimum(row, row_count - 1)
    token_inside = token < tokens
    x_row = x_ptr + tl.minimum(token, tokens - 1).to(tl.int64) * x_stride
    x_groups = tl.cdiv(columns, INT4_GROUP)
    split = tl.program_id(1)
    blocks = tl.cdiv(columns, BK)
    # Integer sums stay integers as long as nothing but the row's and the token's scale multiplies them.
    EXACT: tl.constexpr = OPERAND == tl.int8 and SCALE_AT == ROW and X_SCALES < 2
    PARTS: tl.constexpr = SCALE_AT == GROUP_SUM or X_SCALES == 2
    SUM: tl.constexpr = tl.int32 if OPERAND == tl.int8 else tl.float32
    acc = tl.zeros([BN, BM], dtype=tl.int32 if EXACT else tl.float32)
    splits = tl.num_programs(1)
    if HAS_TENSOR_SCALE and SCALE_AT == WEIGHT:  # with the other scales, or the weights might leave float16's range
        unit = tl.load(tensor_scale_ptr)
    for block in range(split * blocks // splits, (split + 1) * blocks // splits):
        start = block * BK
        column = start + tl.arange(0, BK)
        x = tl.load(x_row[None, :] + column[:, None], mask=(column < columns)[:, None] & token_inside[None, :], other=0.0)
        x = input_operand(x, OPERAND, X_FP8_BYTES)
        if SCALE_AT == NATIVE:
            acc = multiply_scaled(codes_ptr, scales_ptr, rows, start, codes_stride, scales_stride, groups, x, acc, BITS, BK)
        else:
            w = operand_tile(
                codes_ptr, table_ptr, scales_ptr, zeros_ptr, rows, start, columns, codes_stride, scales_stride, groups, unit,
                OPERAND, SCALE_AT, KIND, BITS, ENCODING, SECOND, BOOKS, VECTOR, MIDPOINT, GROUP, E8M0, E4M3, HAS_ZEROS, True,
                BN, BK,
            )  # fmt: skip
            if PARTS:
                part = multiply(w, x, tl.zeros([BN, BM], dtype=SUM), SUM, BK).to(tl.float32)
                if SCALE_AT == GROUP_SUM:
                    part *= group_scale(scales_ptr, rows, start // GROUP, scales_stride, E8M0, E4M3)[:, None]
                if X_SCALES == 2:
                    at = x_scales_ptr + token.to(tl.int64) * x_groups + start // INT4_GROUP
                    part *= tl.load(at, mask=token_inside, other=0.0)[None, :]
                acc += part
            else:
                acc = multiply(w, x, acc, SUM, BK)
    y = acc.to(tl.float32)
    if SCALE_AT == ROW:
        y *= group_scale(scales_ptr, rows, 0, scales_stride, E8M0, E4M3)[:, None]
    if SCALE_AT == ROW or SCALE_AT == GROUP_SUM:
        y *= 1.0 / unit
    if HAS_TENSOR_SCALE and SCALE_AT != WEIGHT:
        y *= tl.load(tensor_scale_ptr)
    if X_SCALES == 1:
        y *= tl.load(x_scales_ptr + token, mask=token_inside, other=0.0)[None, :]
    if split == 0:
        if HAS_ZEROS and SCALE_AT == ROW:
            zeros = group_scale(zeros_ptr, rows, 0, scales_stride, E8M0, E4M3)
            zeros += MIDPOINT * group_scale(scales_ptr, rows, 0, scales_stride, E8M0, E4M3)
            y += zeros[:, None] * tl.load(x_sums_ptr + token, mask=token_inside, other=0.0)[None, :]
        y = add_branch_and_bias(y, branch_ptr, up_ptr, bias_ptr, token, token_inside, rows, rank, RANK, HAS_BIAS)
    at = y_ptr + split.to(tl.int64) * tokens * row_count + token.to(tl.int64)[None, :] * row_count + row[:, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=token_inside[None, :] & (row < row_count)[:, None])


@triton.jit(do_not_specialize=["size"])
def _sum_splits_kernel(parts_ptr, out_ptr, size, splits, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(0, splits):
        total += tl.load(parts_ptr + tl.full([], split, tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)
