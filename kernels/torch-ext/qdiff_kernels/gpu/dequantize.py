"""Packed codes to a dense weight in memory, and quantized tokens to the numbers they stand for: operands of 16-bit products."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import INT4_GROUP, input_operand, padded_rank
from .decode import CODEBOOK, E4M3, INTEGER, INTERPRETED, MINIFLOAT, scale_tile, weight_tile
from .launch import call, empty, launch
from .linear import Inputs
from .weights import PackedWeight

BLOCK_ROWS, BLOCK_COLUMNS = 32, 128
BLOCK_TOKENS, TOKEN_COLUMNS = 16, 256
FOLDED_RANK = 128  # at most, of a branch that is added while decoding: 32 KB of shared memory beside the tile


class Branch(NamedTuple):
    """A low-rank branch that becomes part of the decoded weight, or stands beside it, as an argument of the kernel."""

    down: Tensor | None  # [rank, columns], None beside it
    up: Tensor | None  # [rows, rank]
    rank: int


def dequantize(
    weight: PackedWeight,
    dtype: torch.dtype,
    unit: float | None = None,
    branch: tuple[Tensor, Tensor] | None = None,
    beside: Tensor | None = None,
    room: int = 0,
) -> Tensor:
    """The dense weight ``[rows, columns]`` in ``dtype``; with ``unit``, the levels times ``unit`` and no scale.

    The second form makes the operand of an 8-bit matrix product whose sums are scaled afterwards.

    Args:
        branch: ``down [rank, columns]`` and ``up [rows, rank]``; ``up @ down`` is added in float32 before the sum is rounded.
        beside: ``up [rows, rank]`` that follows the weight's columns, then zeros up to ``room`` columns.

    Returns:
        ``[rows, columns + room]``.
    """
    out = empty((weight.rows, weight.columns + room), dtype, weight.codes.device)
    if not out.numel():
        return out
    folded = branch is not None and branch[0].shape[0] <= FOLDED_RANK
    down, up = branch if folded and branch is not None else (None, beside)
    grid = (-(-weight.rows // BLOCK_ROWS), -(-(weight.columns + room) // BLOCK_COLUMNS))
    launch(
        _dequantize_kernel,
        grid,
        out,
        weight.pointers() if unit is None else weight.pointers()._replace(tensor_scale=None),
        1.0 if unit is None else unit,
        Branch(down, up, 0 if up is None else up.shape[1]),
        weight.columns + room,
        LAYOUT=weight.layout(),
        SCALED=unit is None,
        INT8=dtype == torch.int8,
        RANK=0 if down is None else padded_rank(down.shape[0]),
        BN=BLOCK_ROWS,
        BK=BLOCK_COLUMNS,
    )
    return out if branch is None or folded else call(_add_product, out, *branch)


def _add_product(dense: Tensor, down: Tensor, up: Tensor) -> Tensor:
    return dense.addmm_(up.to(dense.dtype), down.to(dense.dtype))


@triton.jit
def _dequantize_kernel(
    out_ptr,
    w,  # WeightPointers
    unit,
    branch,  # Branch
    stride,  # of a row of the result, as many as it has columns
    LAYOUT: tl.constexpr,  # WeightLayout
    SCALED: tl.constexpr,
    INT8: tl.constexpr,
    RANK: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    start = tl.program_id(1) * BK
    rows = tl.minimum(row, w.rows - 1)
    scales = tl.full([BN, BK], 1.0, tl.float32)
    if SCALED or LAYOUT.second:
        scales = scale_tile(w.scales, w, rows, start, LAYOUT, BK, BN, BK)
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    AS_IT_IS: tl.constexpr = not SCALED and OUT == tl.float8e4nv and LAYOUT.kind == MINIFLOAT and LAYOUT.encoding == E4M3
    IN_INT8: tl.constexpr = not SCALED and OUT == tl.int8 and LAYOUT.kind == INTEGER
    value = weight_tile(w, rows, scales < 0, start, OUT if AS_IT_IS or IN_INT8 else tl.float32, LAYOUT, BK, BN, BK)
    if SCALED:
        if LAYOUT.second:
            scales = tl.abs(scales)
        if w.tensor_scale is not None:
            scales = scales * tl.load(w.tensor_scale)
        value = value * scales
        if w.zeros is not None:
            value += scale_tile(w.zeros, w, rows, start, LAYOUT, BK, BN, BK) + scales * LAYOUT.midpoint
    elif value.dtype == tl.float32:
        value = value * unit
    if INT8 and LAYOUT.kind == CODEBOOK:
        value = tl.floor(tl.minimum(tl.maximum(value, -127.0), 127.0) + 0.5)
    column = start + tl.arange(0, BK)
    if RANK:
        value = _add_branch(value, branch, rows, column, w.columns, OUT, RANK)
    elif branch.up is not None:
        index = (column - w.columns)[None, :]
        at = branch.up + rows[:, None] * branch.rank + index
        held = tl.load(at, mask=(index >= 0) & (index < branch.rank), other=0.0)
        value = tl.where(index < 0, value, held.to(tl.float32))
    inside = (row < w.rows)[:, None] & (column < stride)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * stride + column[None, :], value.to(OUT), mask=inside)


@triton.jit
def _add_branch(value, branch, rows, column, columns, FACTORS: tl.constexpr, RANK: tl.constexpr):
    """``value [BN, BK] + up [BN, rank] @ down [rank, BK]``, the factors in the result's type, sums in float32."""
    index = tl.arange(0, RANK)
    inside = index < branch.rank
    up = tl.load(branch.up + rows[:, None] * branch.rank + index[None, :], mask=inside[None, :], other=0.0)
    at = branch.down + index[:, None] * columns + column[None, :]
    down = tl.load(at, mask=inside[:, None] & (column < columns)[None, :], other=0.0)
    up = up.to(FACTORS)
    down = down.to(FACTORS)
    if INTERPRETED:
        up = up.to(tl.float32)
        down = down.to(tl.float32)
    return tl.dot(up, down, value, input_precision="ieee")


def dequantize_tokens(inputs: Inputs, dtype: torch.dtype, room: int = 0) -> Tensor:
    """Quantized inputs as the numbers they stand for, codes times scales ``[tokens, columns + room]``.

    In a 16-bit ``dtype`` each is rounded once, by at most half a unit in its last place (2**-9 of it in bfloat16): no more than the
    layer's input has been before. The first columns of the room hold ``inputs.branch``, the others zeros.
    """
    assert inputs.scales is not None
    tokens, columns = inputs.values.shape
    rank = 0 if inputs.branch is None else inputs.branch.shape[1]
    out = empty((tokens, columns + room), dtype, inputs.values.device)
    is_fp8 = inputs.values.dtype == torch.float8_e4m3fn
    grid = (-(-tokens // BLOCK_TOKENS), -(-(columns + room) // TOKEN_COLUMNS))
    launch(
        _dequantize_tokens_kernel,
        grid,
        out,
        inputs.values.view(torch.uint8) if is_fp8 else inputs.values,
        inputs.scales,
        inputs.branch,
        tokens,
        columns,
        inputs.scales.shape[1],
        rank,
        room,
        FP8_BYTES=is_fp8,
        BM=BLOCK_TOKENS,
        BK=TOKEN_COLUMNS,
    )
    return out


@triton.jit(do_not_specialize=["tokens"])
def _dequantize_tokens_kernel(
    out_ptr,
    codes_ptr,  # [tokens, columns]
    scales_ptr,  # [tokens, groups]
    branch_ptr,  # [tokens, rank]
    tokens,
    columns,
    groups,
    rank,
    room,
    FP8_BYTES: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = (token < tokens)[:, None]
    token = tl.minimum(token, tokens - 1).to(tl.int64)[:, None]
    column = (tl.program_id(1) * BK + tl.arange(0, BK))[None, :]
    codes = tl.load(codes_ptr + token * columns + column, mask=column < columns, other=0)
    value = input_operand(codes, tl.float32, FP8_BYTES)
    group = tl.minimum(column // INT4_GROUP, groups - 1)
    value *= tl.load(scales_ptr + token * groups + group)
    if branch_ptr is not None:
        index = column - columns
        held = tl.load(branch_ptr + token * rank + index, mask=(index >= 0) & (index < rank), other=0.0)
        value = tl.where(index < 0, value, held.to(tl.float32))
    at = out_ptr + token * (columns + room) + column
    tl.store(at, value.to(out_ptr.dtype.element_ty), mask=inside & (column < columns + room))
