"""Packed codes to a dense weight in memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .decode import CODEBOOK, E4M3, INTEGER, MINIFLOAT, scale_tile, weight_tile
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
        weight.pointers() if unit is None else weight.pointers()._replace(tensor_scale=None),
        1.0 if unit is None else unit,
        LAYOUT=weight.layout(),
        SCALED=unit is None,
        INT8=dtype == torch.int8,
        BN=BLOCK_ROWS,
        BK=BLOCK_COLUMNS,
    )
    return out


@triton.jit
def _dequantize_kernel(
    out_ptr,
    w,  # WeightPointers
    unit,
    LAYOUT: tl.constexpr,  # WeightLayout
    SCALED: tl.constexpr,
    INT8: tl.constexpr,
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
    inside = (row < w.rows)[:, None] & (column < w.columns)[None, :]
    tl.store(out_ptr + row.to(tl.int64)[:, None] * w.columns + column[None, :], value.to(OUT), mask=inside)
