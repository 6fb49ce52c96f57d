"""Device functions that the matrix product and the convolution share: operands, epilogue, order of tiles."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .decode import CODEBOOK, DENSE, E4M3, INTEGER, INTERPRETED, MINIFLOAT, minifloat_value, scale_tile, times, weight_tile

# Where a weight's scale is multiplied: on the sums of a row, on the partial sums of a group, on each weight in float32, by the
# matrix unit itself, or on each weight in bfloat16, which holds the products exactly (the scale of the tensor is left to the sums).
ROW, GROUP_SUM, WEIGHT, NATIVE, EXACT = (tl.constexpr(i) for i in range(5))
INT4_GROUP = tl.constexpr(64)


class Epilogue(NamedTuple):
    """What is added to the sums, as an argument of a kernel."""

    bias: Tensor | None  # [rows]
    branch: Tensor | None  # [tokens, rank]
    up: Tensor | None  # [rows, rank]
    rank: int

    @classmethod
    def of(cls, bias: Tensor | None, branch: Tensor | None, up: Tensor | None) -> Epilogue:
        """Without a branch unless both of its factors are there."""
        if branch is None or up is None:
            return cls(bias, None, None, 0)
        return cls(bias, branch, up, up.shape[1])

    @property
    def padded_rank(self) -> int:
        """The rank as a dimension of a tile: a power of two that a matrix unit takes, or 0."""
        return padded_rank(self.rank)


def padded_rank(rank: int) -> int:
    """A power of two of at least 16, which a matrix unit takes; 0 stays 0."""
    return max(16, 1 << (rank - 1).bit_length()) if rank else 0


class Numbers(NamedTuple):
    """How a product computes, as a compile-time argument of a kernel."""

    operand: Any  # Triton's type of both factors
    scale_at: int  # where a weight's scale is multiplied: ROW, GROUP_SUM, WEIGHT or NATIVE
    x_scales: int  # scales of the inputs: 0 for none, 1 per token (input pixel), 2 per token and 64 columns
    x_is_fp8_bytes: bool  # float8 inputs held as bytes, for GPUs without that type


class Tile(NamedTuple):
    """Sizes of the tiles of a product, as a compile-time argument of a kernel."""

    rows: int  # of the weight
    tokens: int
    columns: int
    rank: int  # 0 without a low-rank branch


@triton.jit
def operand_tile(
    w,  # WeightPointers
    rows,  # [BN]
    start,  # first column
    unit,
    OPERAND: tl.constexpr,
    SCALE_AT: tl.constexpr,
    LAYOUT: tl.constexpr,  # WeightLayout
    STEP: tl.constexpr,  # start is always a multiple of this power of two
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Weights ``[BN, BK]`` as the matrix unit takes them, times ``unit``; scales are in them only if ``SCALE_AT`` is ``WEIGHT`` or
    ``EXACT``."""
    if LAYOUT.kind == DENSE:
        column = start + tl.arange(0, BK)
        at = w.codes + rows.to(tl.int64)[:, None] * w.codes_stride + column[None, :]
        return tl.load(at, mask=(column < w.columns)[None, :], other=0.0)
    else:
        scales = tl.full([BN, BK], 1.0, tl.float32)
        if SCALE_AT == WEIGHT or SCALE_AT == EXACT:
            scales = scale_tile(w.scales, w, rows, start, LAYOUT, STEP, BN, BK)
        # Levels in the operand's type where it holds them.
        AS_IT_IS: tl.constexpr = OPERAND == tl.float8e4nv and LAYOUT.kind == MINIFLOAT and LAYOUT.encoding == E4M3
        IN_BFLOAT16: tl.constexpr = OPERAND == tl.bfloat16 and LAYOUT.kind != CODEBOOK and SCALE_AT != WEIGHT
        IN_INT8: tl.constexpr = OPERAND == tl.int8 and LAYOUT.kind == INTEGER
        NUMBER: tl.constexpr = OPERAND if AS_IT_IS or IN_BFLOAT16 or IN_INT8 else tl.float32
        tile = weight_tile(w, rows, scales < 0, start, NUMBER, LAYOUT, STEP, BN, BK)
        if SCALE_AT == EXACT:
            tile = times(tile, tl.abs(scales) if LAYOUT.second else scales)
        elif SCALE_AT == WEIGHT:
            scales *= unit
            tile = tile * (tl.abs(scales) if LAYOUT.second else scales)
            if w.zeros is not None:
                tile += scale_tile(w.zeros, w, rows, start, LAYOUT, STEP, BN, BK) + scales * LAYOUT.midpoint
        elif NUMBER == tl.float32 and LAYOUT.kind != INTEGER:
            tile *= unit
            if OPERAND == tl.int8 and LAYOUT.kind == CODEBOOK:
                tile = tl.floor(tl.minimum(tl.maximum(tile, -127.0), 127.0) + 0.5)
        return tile.to(OPERAND)


@triton.jit
def multiply(w, x, acc, SUM: tl.constexpr, BK: tl.constexpr):
    """``w [BN, BK] @ x [BK, BM] + acc``. Sums of float8 products are carried on in full float32 after every block."""
    if INTERPRETED and w.dtype == tl.bfloat16:
        w = w.to(tl.float32)
        x = x.to(tl.float32)
    return tl.dot(w, x, acc, input_precision="ieee", max_num_imprecise_acc=BK, out_dtype=SUM)


@triton.jit
def multiply_scaled(w, rows, start, x, acc, BITS: tl.constexpr, BK: tl.constexpr):
    """``acc`` plus the product of MXFP4 or MXFP8 weights ``[BN, BK]``, as stored, with ``x [BK, BM]``: Blackwell's own format."""
    PER_BYTE: tl.constexpr = 8 // BITS
    byte = start // PER_BYTE + tl.arange(0, BK // PER_BYTE)
    at = w.codes + rows.to(tl.int64)[:, None] * w.codes_stride + byte[None, :]
    codes = tl.load(at, mask=(byte < w.codes_stride)[None, :], other=0).to(tl.uint8, bitcast=True)
    group = start // 32 + tl.arange(0, BK // 32)
    at = w.scales + rows[:, None] * w.scales_stride + group[None, :]
    scales = tl.load(at, mask=(group < w.groups)[None, :], other=0).to(tl.uint8, bitcast=True)
    FORMAT: tl.constexpr = "e2m1" if BITS == 4 else "e4m3"
    ones = tl.full([x.shape[1], BK // 32], 127, tl.uint8)  # without scales of both factors Triton multiplies in 16 bits
    return tl.dot_scaled(codes, scales, FORMAT, x, ones, "e4m3", acc)


@triton.jit
def input_operand(x, OPERAND: tl.constexpr, FP8_BYTES: tl.constexpr):
    """Loaded inputs in the operand's type; FP8_BYTES: float8 numbers held as bytes, for GPUs without that type."""
    if FP8_BYTES:
        return minifloat_value(x.to(tl.int32), E4M3).to(OPERAND)
    elif x.dtype == tl.int8 and OPERAND != tl.int8:
        return x.to(tl.float32).to(OPERAND)
    else:
        return x.to(OPERAND)


@triton.jit
def add_branch_and_bias(y, extras, token, token_inside, rows, RANK: tl.constexpr):
    """``y [BN, BM] + up [BN, rank] branch^T [rank, BM] + bias [BN]``; ``extras``: an Epilogue."""
    if RANK:
        index = tl.arange(0, RANK)
        inside = index < extras.rank
        up = tl.load(extras.up + rows[:, None] * extras.rank + index[None, :], mask=inside[None, :], other=0.0)
        at = extras.branch + token.to(tl.int64)[None, :] * extras.rank + index[:, None]
        branch = tl.load(at, mask=inside[:, None] & token_inside[None, :], other=0.0)
        y = multiply(up.to(branch.dtype), branch, y, tl.float32, RANK)
    if extras.bias is not None:
        y += tl.load(extras.bias + rows).to(tl.float32)[:, None]
    return y


@triton.jit
def tile_of(pid, tiles_n, tiles_m):
    """(row tile, token tile) of a program: groups of 8 row tiles walk over the tokens together, so that both stay in L2."""
    per_group = 8 * tiles_m
    first = pid // per_group * 8
    height = tl.minimum(tiles_n - first, 8)
    return first + pid % per_group % height, pid % per_group // height
