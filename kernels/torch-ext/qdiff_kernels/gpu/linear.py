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
    EXACT,
    GROUP_SUM,
    INT4_GROUP,
    NATIVE,
    ROW,
    WEIGHT,
    Epilogue,
    Numbers,
    Tile,
    add_branch_and_bias,
    input_operand,
    multiply,
    multiply_scaled,
    operand_tile,
    tile_of,
)
from .configs import LinearConfig
from .decode import group_scale
from .launch import empty, launch
from .weights import PackedWeight

OPERANDS = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
}


BFLOAT16_BITS = 8  # of a number's significand, the leading one included


class Inputs(NamedTuple):
    """What the kernel multiplies: transformed and perhaps quantized tokens."""

    values: Tensor  # [tokens, columns], floating, int8, or float8
    scales: Tensor | None  # float32 [tokens, 1], or [tokens, groups of 64]
    sums: Tensor | None  # float32, like scales: of quantized values, scales multiplied in; zeros of rows multiply them
    branch: Tensor | None  # [tokens, rank], the low-rank branch before its up-projection


class TokenPointers(NamedTuple):
    """Inputs as an argument of a kernel."""

    data: Tensor  # [tokens, columns]; float8 as bytes where the device has no such type
    scales: Tensor | None
    sums: Tensor | None
    stride: int  # of a token


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
    if units.block_scaled and weight.block_scaled and given == torch.float8_e4m3fn:
        return Arithmetic(given, NATIVE.value, 1.0)
    if weight.row_scales and (weight.zeros is None or given.itemsize == 1):
        scale_at = ROW.value
    elif weight.group_size % block == 0 and weight.zeros is None and not weight.second:
        scale_at = GROUP_SUM.value
    else:
        scale_at = WEIGHT.value
    unit = weight.operand_unit(given)
    if given.itemsize == 1 and unit is not None and scale_at != WEIGHT.value and (given == torch.int8 or units.fp8):
        return Arithmetic(given, scale_at, unit)
    operand = given if given.itemsize > 1 else torch.float32 if out_dtype == torch.float32 else torch.bfloat16
    if scale_at == WEIGHT.value:
        return on_weights(weight, operand)
    return Arithmetic(operand, scale_at, weight.operand_unit(operand) or 1.0)


def on_weights(weight: PackedWeight, operand: torch.dtype) -> Arithmetic:
    """Scales multiplied into the weights: as bfloat16 numbers if those hold every product, else as float32 ones, then rounded."""
    exact = operand == torch.bfloat16 and weight.significant_bits <= BFLOAT16_BITS
    return Arithmetic(operand, EXACT.value if exact else WEIGHT.value, 1.0)


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
    splits = min(config.splits, -(-columns // block))
    out = empty((tokens, weight.rows), out_dtype, x.device)
    target = out if splits == 1 else empty((splits, tokens, weight.rows), torch.float32, x.device)
    extras = Epilogue.of(bias, inputs.branch, up)
    grid = (-(-weight.rows // config.block_rows) * -(-tokens // config.block_tokens), splits)
    launch(
        _linear_kernel,
        grid,
        TokenPointers(x.view(torch.uint8) if fp8_bytes else x, inputs.scales, inputs.sums, x.stride(0)),
        weight.pointers(),
        extras,
        target,
        tokens,
        arithmetic.unit,
        NUMBERS=Numbers(OPERANDS[arithmetic.operand], arithmetic.scale_at, 0 if inputs.scales is None else 1 + grouped, fp8_bytes),
        LAYOUT=weight.layout(),
        TILE=Tile(config.block_rows, config.block_tokens, block, extras.padded_rank),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if splits > 1:
        size = out.numel()
        launch(_sum_splits_kernel, (-(-size // 1024),), target, out, size, splits, BLOCK=1024)
    return out


@triton.jit(do_not_specialize=["tokens"])
def _linear_kernel(
    inputs,  # TokenPointers
    w,  # WeightPointers
    extras,  # Epilogue
    y_ptr,  # [splits, tokens, rows]
    tokens,
    unit,
    NUMBERS: tl.constexpr,
    LAYOUT: tl.constexpr,  # WeightLayout
    TILE: tl.constexpr,
):
    OPERAND: tl.constexpr = NUMBERS.operand
    SCALE_AT: tl.constexpr = NUMBERS.scale_at
    X_SCALES: tl.constexpr = NUMBERS.x_scales
    BN: tl.constexpr = TILE.rows
    BM: tl.constexpr = TILE.tokens
    BK: tl.constexpr = TILE.columns
    pid_n, pid_m = tile_of(tl.program_id(0), tl.cdiv(w.rows, BN), tl.cdiv(tokens, BM))
    row = pid_n * BN + tl.arange(0, BN)
    token = pid_m * BM + tl.arange(0, BM)
    rows = tl.minimum(row, w.rows - 1)
    token_inside = token < tokens
    x_row = inputs.data + tl.minimum(token, tokens - 1).to(tl.int64) * inputs.stride
    x_groups = tl.cdiv(w.columns, INT4_GROUP)
    split = tl.program_id(1)
    blocks = tl.cdiv(w.columns, BK)
    # Integer sums stay integers as long as nothing but the row's and the token's scale multiplies them.
    EXACT: tl.constexpr = OPERAND == tl.int8 and SCALE_AT == ROW and X_SCALES < 2
    PARTS: tl.constexpr = SCALE_AT == GROUP_SUM or X_SCALES == 2
    SUM: tl.constexpr = tl.int32 if OPERAND == tl.int8 else tl.float32
    acc = tl.zeros([BN, BM], dtype=tl.int32 if EXACT else tl.float32)
    splits = tl.num_programs(1)
    if w.tensor_scale is not None and SCALE_AT == WEIGHT:  # with the other scales, or the weights might leave float16's range
        unit = tl.load(w.tensor_scale)
    for block in range(split * blocks // splits, (split + 1) * blocks // splits):
        start = block * BK
        column = start + tl.arange(0, BK)
        x = tl.load(x_row[None, :] + column[:, None], mask=(column < w.columns)[:, None] & token_inside[None, :], other=0.0)
        x = input_operand(x, OPERAND, NUMBERS.x_is_fp8_bytes)
        if SCALE_AT == NATIVE:
            acc = multiply_scaled(w, rows, start, x, acc, LAYOUT.bits, BK)
        else:
            tile = operand_tile(w, rows, start, unit, OPERAND, SCALE_AT, LAYOUT, BK, BN, BK)
            if PARTS:
                part = multiply(tile, x, tl.zeros([BN, BM], dtype=SUM), SUM, BK).to(tl.float32)
                if SCALE_AT == GROUP_SUM:
                    part *= group_scale(w.scales, w, rows, start // LAYOUT.group, LAYOUT)[:, None]
                if X_SCALES == 2:
                    at = inputs.scales + token.to(tl.int64) * x_groups + start // INT4_GROUP
                    part *= tl.load(at, mask=token_inside, other=0.0)[None, :]
                acc += part
            else:
                acc = multiply(tile, x, acc, SUM, BK)
    y = acc.to(tl.float32)
    if SCALE_AT == ROW:
        y *= group_scale(w.scales, w, rows, 0, LAYOUT)[:, None]
    if SCALE_AT == ROW or SCALE_AT == GROUP_SUM:
        y *= 1.0 / unit
    if w.tensor_scale is not None and SCALE_AT != WEIGHT:
        y *= tl.load(w.tensor_scale)
    if X_SCALES == 1:
        y *= tl.load(inputs.scales + token, mask=token_inside, other=0.0)[None, :]
    if split == 0:
        if w.zeros is not None and SCALE_AT == ROW:
            zeros = group_scale(w.zeros, w, rows, 0, LAYOUT)
            zeros += LAYOUT.midpoint * group_scale(w.scales, w, rows, 0, LAYOUT)
            groups = x_groups if X_SCALES == 2 else 1
            sums = tl.zeros([BM], dtype=tl.float32)
            for group in range(0, groups):
                sums += tl.load(inputs.sums + token.to(tl.int64) * groups + group, mask=token_inside, other=0.0)
            y += zeros[:, None] * sums[None, :]
        y = add_branch_and_bias(y, extras, token, token_inside, rows, TILE.rank)
    at = y_ptr + split.to(tl.int64) * tokens * w.rows + token.to(tl.int64)[None, :] * w.rows + row[:, None]
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=token_inside[None, :] & (row < w.rows)[:, None])


@triton.jit(do_not_specialize=["size"])
def _sum_splits_kernel(parts_ptr, out_ptr, size, splits, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for split in range(0, splits):
        total += tl.load(parts_ptr + tl.full([], split, tl.int64) * size + at, mask=at < size, other=0.0)
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=at < size)
