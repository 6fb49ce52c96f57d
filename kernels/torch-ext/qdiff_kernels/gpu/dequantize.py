"""Packed codes to a dense weight in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import CODEBOOK, INTEGER, scale_tile, weight_tile
from .weights import PackedWeight

BLOCK_ROWS, BLOCK_COLUMNS = 32, 128


def dequantize(weight: PackedWeight, dtype: torch.dtype, unit: float | None = None) -> Tensor:
    """The dense weight ``[rows, columns]`` in ``dtype``; with ``unit``, the levels times ``unit`` and no scale.

    The second form makes the operand of an 8-bit matrix product whose sums are scaled afterwards.
    """
    out = torch.empty(weight.rows, weight.columns, device=weight.codes.device, dtype=dtype)
    if not out.numel():
        return out
    grid = (triton.cdiv(weight.rows, BLOCK_ROWS), triton.cdiv(weight.columns, BLOCK_COLUMNS))
    _dequantize_kernel[grid](
        out,
        weight.tensor_scale if weight.tensor_scale is not None else weight.scales,
        *weight.arguments(),
        weight.rows,
        1.0 if unit is None else unit,
        SCALED=unit is None,
        HAS_TENSOR_SCALE=weight.tensor_scale is not None and unit is None,
        INT8=dtype == torch.int8,
        BN=BLOCK_ROWS,
        BK=BLOCK_COLUMNS,
        **weight.constexprs(),
    )
    return out


@triton.jit
def _dequantize_kernel(
    out_ptr,
    tensor_scale_ptr,
    codes_ptr,
    table_ptr,
    scales_ptr,
    zeros_ptr,
    codes_stride,
    scales_stride,
    groups,
    columns,
    row_count,
    unit,
    SCALED: tl.constexpr,
    HAS_TENSOR_SCALE: tl.constexpr,
    INT8: tl.constexpr,
    BN: tl.constexpr,
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
    row = tl.program_id(0) * BN + tl.arange(0, BN)
    start = tl.program_id(1) * BK
    rows = tl.minimum(row, row_count - 1)
    scales = tl.full([BN, BK], 1.0, tl.float32)
    if SCALED or SECOND:
        scales = scale_tile(scales_ptr, rows, start, columns, scales_stride, groups, GROUP, E8M0, E4M3, BK)
    levels = weight_tile(
        codes_ptr, table_ptr, rows, scales < 0, start, columns, codes_stride,
        KIND, BITS, ENCODING, SECOND, BOOKS, VECTOR, True, BN, BK,
    )  # fmt: skip
    value = (levels - MIDPOINT).to(tl.float32) if KIND == INTEGER else levels
    if SCALED:
        if SECOND:
            scales = tl.abs(scales)
        if HAS_TENSOR_SCALE:
            scales = scales * tl.load(tensor_scale_ptr)
        value = value * scales
        if HAS_ZEROS:
            value += scale_tile(zeros_ptr, rows, start, columns, scales_stride, groups, GROUP, E8M0, E4M3, BK) + scales * MIDPOINT
    else:
        value = value * unit
    if INT8 and KIND == CODEBOOK:
        value = tl.floor(tl.minimum(tl.maximum(value, -127.0), 127.0) + 0.5)
    column = start + tl.arange(0, BK)
    inside = (row < row_count)[:, None] & (column < columns)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * columns + column[None, :], value.to(out_ptr.dtype.element_ty), mask=inside)
