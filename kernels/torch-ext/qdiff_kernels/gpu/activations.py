"""What happens to a layer's input before the product, in one kernel: smoothing, rotation, quantization, low-rank projection.

A program reads 16 tokens from memory once; 8-bit scales need the whole token first, so it walks over them again, out of cache,
unless they are given.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import FP8_MAX
from ..activations import INT4_GROUP as GROUP
from ..reference import Extras
from .blocks import INT4_GROUP, INTERPRETED, padded_rank
from .decode import minifloat_value
from .launch import empty, launch
from .linear import Inputs

BLOCK_TOKENS = 16
# With so few tokens most of the device idles and a program's walk over the columns is what one waits for: longer steps. Twice
# this with a low-rank branch takes 105 KB of shared memory, more than consumer GPUs have.
FEW_TOKENS, LONG_STEP = 256, 256
CODES = {"none": 0, "int8": 1, "fp8": 2, "int4": 3}


class Source(NamedTuple):
    """Tokens, or the pixels of images, as an argument of the kernel."""

    data: Tensor
    columns: int
    image_stride: int
    token_stride: int
    column_stride: int


class Transform(NamedTuple):
    """What is done to them besides rounding, as an argument of the kernel."""

    smooth: Tensor | None  # [columns]
    input_scale: Tensor | None  # [1]
    down: Tensor | None  # [rank, columns]
    rank: int


class Prepared(NamedTuple):
    """Where the results go, as an argument of the kernel: the tensors of Inputs."""

    data: Tensor  # [tokens, columns]; codes of FP8 as bytes
    scales: Tensor | None  # [tokens, groups]
    sums: Tensor | None  # [tokens]
    branch: Tensor | None  # [tokens, rank]
    groups: int


def prepare(x: Tensor, extras: Extras, down: Tensor | None) -> Inputs:
    """Transform and quantize tokens.

    Args:
        x: ``[tokens, columns]``, or an image batch ``[batch, columns, height, width]``, whose pixels are the tokens.
        extras: ``smooth``, ``rotation``, ``activations`` ("none", "int8", "fp8" or "int4") and ``input_scale``.
        down: ``[rank, columns]``: projects the raw input.
    """
    if x.ndim == 4 and not x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        x = x.contiguous()
    smooth, rotation, activations, given = extras.smooth, extras.rotation, extras.activations, extras.input_scale
    columns = x.shape[1]
    pixels = x.shape[2] * x.shape[3] if x.ndim == 4 else x.shape[0]
    tokens = x.shape[0] * pixels if x.ndim == 4 else pixels
    if x.ndim == 4:  # the stride of a dimension of size 1 means nothing
        strides = (x.stride(0), x.stride(3) if x.shape[3] > 1 else x.stride(2), x.stride(1))
    else:
        strides = (0, x.stride(0), x.stride(1))
    values = empty((tokens, columns), x.dtype if activations == "none" else torch.int8, x.device)
    groups = -(-columns // GROUP) if activations == "int4" else 1
    scales = None if activations == "none" else empty((tokens, groups), torch.float32, x.device)
    sums = None if activations == "none" else empty((tokens,), torch.float32, x.device)
    rank = 0 if down is None else down.shape[0]
    branch = None if down is None else empty((tokens, rank), x.dtype, x.device)
    launch(
        _prepare_kernel,
        (-(-tokens // BLOCK_TOKENS),),
        Source(x, columns, *strides),
        Transform(smooth, given, down, rank),
        Prepared(values, scales, sums, branch, groups),
        tokens,
        pixels,
        CODE=CODES[activations],
        LIMIT={"int8": 127.0, "int4": 7.0}.get(activations, FP8_MAX),
        ROTATION=rotation,
        RANK=padded_rank(rank),
        BM=BLOCK_TOKENS,
        BK=LONG_STEP if tokens <= FEW_TOKENS and columns >= LONG_STEP else max(128, rotation),
        num_warps=8 if tokens <= FEW_TOKENS else 4,
    )
    return Inputs(values.view(torch.float8_e4m3fn) if activations == "fp8" else values, scales, sums, branch)


@triton.jit(do_not_specialize=["tokens", "pixels"])
def _prepare_kernel(
    source,  # Source
    transform,  # Transform
    out,  # Prepared
    tokens,
    pixels,  # of an image; as many as tokens without images
    CODE: tl.constexpr,
    LIMIT: tl.constexpr,
    ROTATION: tl.constexpr,
    RANK: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    GIVEN: tl.constexpr = transform.input_scale is not None
    columns = source.columns
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = token < tokens
    token = tl.minimum(token, tokens - 1)
    x_row = source.data + (token // pixels).to(tl.int64) * source.image_stride
    x_row += (token % pixels).to(tl.int64) * source.token_stride
    out_row = out.data + token.to(tl.int64) * columns
    largest = tl.zeros([BM], dtype=tl.float32)
    broken = tl.zeros([BM], dtype=tl.int32)
    branch = tl.zeros([BM, RANK if RANK else 16], dtype=tl.float32)
    sums = tl.zeros([BM], dtype=tl.float32)
    if GIVEN:
        given = tl.zeros([BM], dtype=tl.float32) + tl.load(transform.input_scale)
    for start in range(0, columns, BK):
        column = start + tl.arange(0, BK)
        present = (column < columns)[None, :]
        x = tl.load(x_row[:, None] + column.to(tl.int64)[None, :] * source.column_stride, mask=present, other=0.0)
        if RANK:
            index = tl.arange(0, RANK)
            at = transform.down + index[None, :] * columns + column[:, None]
            down = tl.load(at, mask=(index < transform.rank)[None, :] & (column < columns)[:, None], other=0.0)
            branch = _product(x, down.to(x.dtype), branch)
        t = _transform(x, transform.smooth, column, columns, ROTATION, BM, BK)
        if CODE == 0:
            tl.store(out_row[:, None] + column[None, :], t.to(x.dtype), mask=inside[:, None] & present)
        elif CODE == 3:
            grouped = tl.reshape(t, [BM, BK // INT4_GROUP, INT4_GROUP])
            scale = _scale(tl.max(tl.abs(grouped), 2), tl.max((grouped != grouped).to(tl.int32), 2), LIMIT)
            grouped = _round(tl.div_rn(grouped, scale[:, :, None] + tl.zeros_like(grouped)), LIMIT)
            sums += tl.sum(tl.sum(grouped, 2) * scale, 1)
            codes = tl.reshape(grouped, [BM, BK])
            tl.store(out_row[:, None] + column[None, :], codes.to(tl.int8), mask=inside[:, None] & present)
            group = start // INT4_GROUP + tl.arange(0, BK // INT4_GROUP)
            at = out.scales + token.to(tl.int64)[:, None] * out.groups + group[None, :]
            tl.store(at, scale, mask=inside[:, None] & (group < out.groups)[None, :])
        else:
            largest = tl.maximum(largest, tl.max(tl.abs(t), 1))
            broken = tl.maximum(broken, tl.max((t != t).to(tl.int32), 1))
            if GIVEN:
                codes, t = _codes(t, given, CODE, LIMIT)
                sums += tl.sum(t, 1) * given
                tl.store(out_row[:, None] + column[None, :], codes.to(tl.int8), mask=inside[:, None] & present)
    if RANK:
        index = tl.arange(0, RANK)
        at = out.branch + token.to(tl.int64)[:, None] * transform.rank + index[None, :]
        tl.store(at, branch.to(out.branch.dtype.element_ty), mask=inside[:, None] & (index < transform.rank)[None, :])
    if CODE == 1 or CODE == 2:
        if GIVEN:
            scale = tl.where((broken > 0) | (largest == float("inf")), float("nan"), given)
        else:
            scale = _scale(largest, broken, LIMIT)
            for start in range(0, columns, BK):
                column = start + tl.arange(0, BK)
                present = (column < columns)[None, :]
                x = tl.load(x_row[:, None] + column.to(tl.int64)[None, :] * source.column_stride, mask=present, other=0.0)
                codes, t = _codes(_transform(x, transform.smooth, column, columns, ROTATION, BM, BK), scale, CODE, LIMIT)
                sums += tl.sum(t, 1) * scale
                tl.store(out_row[:, None] + column[None, :], codes.to(tl.int8), mask=inside[:, None] & present)
        tl.store(out.scales + token, scale, mask=inside)
    if CODE != 0:
        tl.store(out.sums + token, sums, mask=inside)


@triton.jit
def _codes(t, scale, CODE: tl.constexpr, LIMIT: tl.constexpr):
    """Codes ``[BM, BK]`` of INT8 or E4M3 inputs in units of ``scale [BM]``, and the numbers they stand for."""
    t = tl.div_rn(t, scale[:, None] + tl.zeros_like(t))
    if CODE == 1:
        t = _round(t, LIMIT)
        codes = t.to(tl.int32)
    else:
        codes = _e4m3_code(t)
        t = minifloat_value(codes, 4 * 16 + 3 * 2)
    return codes, t


@triton.jit
def _scale(largest, broken, LIMIT: tl.constexpr):
    """``largest / LIMIT``, 1 for a token of zeros, NaN for one that holds a NaN: it must not vanish in integer codes."""
    scale = tl.where(largest == 0.0, 1.0, tl.div_rn(largest, tl.full(largest.shape, LIMIT, tl.float32)))
    return tl.where(broken > 0, float("nan"), scale)


@triton.jit
def _round(value, LIMIT: tl.constexpr):
    """To the nearest integer, ties to even: float32 of this size has no fraction."""
    value = tl.minimum(tl.maximum(value, -LIMIT), LIMIT)
    return (value + 12582912.0) - 12582912.0


@triton.jit
def _e4m3_code(value):
    """The byte of the nearest E4M3 number, ties to even. In integer arithmetic, since not every GPU has the type."""
    bits = tl.minimum(tl.abs(value), 448.0).to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 the grid is uniform with steps of 2**-9, which adding 1.5 * 2**14 rounds to.
    subnormal = (((bits.to(tl.float32, bitcast=True) + 24576.0) - 24576.0) * 512.0).to(tl.int32)
    code = tl.where(bits < (121 << 23), subnormal, normal)
    return tl.where(value < 0, code | 0x80, code)


@triton.jit
def _transform(x, smooth_ptr, column, columns, ROTATION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Smoothed and rotated inputs ``[BM, BK]``, float32 numbers that x's dtype holds."""
    if smooth_ptr is not None:
        smooth = tl.load(smooth_ptr + column, mask=column < columns, other=1.0)
        x = (x.to(tl.float32) / smooth.to(x.dtype).to(tl.float32)[None, :]).to(x.dtype)
    if ROTATION:
        x = (x.to(tl.float32) * _signs(column)[None, :]).to(x.dtype)
    if ROTATION > 1:
        LOG: tl.constexpr = (
            (ROTATION >= 4) + (ROTATION >= 16) + (ROTATION >= 64) + (ROTATION >= 256)
        )  # half of its logarithm, rounded down
        OUTER: tl.constexpr = 2**LOG
        INNER: tl.constexpr = ROTATION // OUTER
        # H of size OUTER * INNER is the Kronecker product of two small ones; between them the numbers are scaled.
        x = (_hadamard(x, INNER, BM, BK) * (ROTATION**-0.5)).to(x.dtype)
        x = tl.reshape(tl.permute(tl.reshape(x, [BM, BK // ROTATION, OUTER, INNER]), (0, 1, 3, 2)), [BM, BK])
        x = _hadamard(x, OUTER, BM, BK).to(x.dtype)
        x = tl.reshape(tl.permute(tl.reshape(x, [BM, BK // ROTATION, INNER, OUTER]), (0, 1, 3, 2)), [BM, BK])
    return x.to(tl.float32)


@triton.jit
def _signs(column):
    """The rotation's signs of channels, +1 and -1: hadamard.rotation_signs, without a tensor to keep."""
    z = (column.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return tl.where((z >> 63) != 0, -1.0, 1.0)  # the last step of splitmix64 leaves the top bit


@triton.jit
def _hadamard(x, SIZE: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Unscaled Hadamard transform of every SIZE (at most 16) neighbours, as a product with a block-diagonal matrix, float32."""
    if SIZE == 1:
        return x.to(tl.float32)
    else:
        i = tl.arange(0, 16)[:, None]
        j = tl.arange(0, 16)[None, :]
        parity = (i % SIZE) & (j % SIZE)
        parity = (parity ^ (parity >> 2)) & 3
        parity = (parity ^ (parity >> 1)) & 1
        matrix = tl.where(i // SIZE == j // SIZE, 1.0 - 2.0 * parity, 0.0).to(x.dtype)
        sums = tl.zeros([BM * BK // 16, 16], dtype=tl.float32)
        return tl.reshape(_product(tl.reshape(x, [BM * BK // 16, 16]), matrix, sums), [BM, BK])


@triton.jit
def _product(a, b, acc):
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")
