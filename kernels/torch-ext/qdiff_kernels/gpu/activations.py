"""What happens to a layer's input before the product, in one kernel: smoothing, rotation, quantization, low-rank projection.

Where nothing but a group of columns decides about a number (rotation, INT4), programs share the columns, so that the device is
busy from the first token on. An 8-bit scale needs the whole token: a program holds it in registers and reads it once, or, if it is
too long, walks over it twice, the second time out of cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..activations import FP8_MAX
from ..activations import INT4_GROUP as GROUP
from ..hadamard import rotation_signs
from ..reference import Extras
from .blocks import INT4_GROUP, padded_rank
from .configs import device_name, processors
from .decode import E4M3, INTERPRETED, minifloat_value
from .launch import call, empty, launch
from .linear import Inputs

BLOCK_TOKENS = 16
BLOCK_COLUMNS = 128
PROGRAMS_PER_PROCESSOR = 4
RIDING_RANK = 32  # at most, of a projection in the same kernel: 64 takes more than the 128 registers of 512 threads
HELD = 16384  # numbers that a program keeps in registers: 32 in each of 512 threads
INT8_LIMIT, FP8_LIMIT, INT4_LIMIT = tl.constexpr(127.0), tl.constexpr(FP8_MAX), tl.constexpr(7.0)
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
    signs: Tensor | None  # [columns], of the rotation
    input_scale: Tensor | None  # [1]
    down: Tensor | None  # [rank, columns]
    rank: int


class Prepared(NamedTuple):
    """Where the results go, as an argument of the kernel: the tensors of Inputs."""

    data: Tensor  # [tokens, columns]; codes of FP8 as bytes
    scales: Tensor | None  # [tokens, groups]
    sums: Tensor | None  # like scales
    branch: Tensor | None  # [tokens, rank]
    groups: int


class Partition(NamedTuple):
    """Which program prepares what."""

    tokens: int  # of a program
    columns: int  # of one step of it
    splits: int  # programs that share the columns of their tokens
    warps: int


def partition(tokens: int, columns: int, rotation: int, by_token: bool, contiguous: bool, multiprocessors: int) -> Partition:
    """How the work is shared.

    Args:
        by_token: a token's columns have to be seen together.
        contiguous: its columns are neighbours in memory. Of images, the tokens usually are.
        multiprocessors: of the device.
    """
    block = max(BLOCK_COLUMNS, rotation)
    if not by_token:
        tiles, steps = -(-tokens // BLOCK_TOKENS), -(-columns // block)
        return Partition(BLOCK_TOKENS, block, min(steps, -(-PROGRAMS_PER_PROCESSOR * multiprocessors // tiles)), 4)
    whole = max(block, 1 << (columns - 1).bit_length())
    together = max(1, min(BLOCK_TOKENS, 2048 // whole)) if contiguous else BLOCK_TOKENS
    if whole * together <= HELD:
        return Partition(together, whole, 1, max(4, min(16, whole * together // 512)))
    return Partition(BLOCK_TOKENS, block, 1, 4)


def prepare(x: Tensor, extras: Extras, down: Tensor | None) -> Inputs:
    """Transform and quantize tokens.

    Args:
        x: ``[tokens, columns]``, or an image batch ``[batch, columns, height, width]``, whose pixels are the tokens.
        extras: ``smooth``, ``rotation``, ``activations`` ("none", "int8", "fp8" or "int4") and ``input_scale``.
        down: ``[rank, columns]``: projects the raw input, where one program sees 16 whole tokens; else the result has no branch.
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
    multiprocessors = processors(device_name(x.device))
    by_token = activations in ("int8", "fp8")
    parts = partition(tokens, columns, rotation, by_token, strides[2] == 1, multiprocessors)
    fills = -(-tokens // BLOCK_TOKENS) >= multiprocessors
    if by_token or not fills or (down is not None and down.shape[0] > RIDING_RANK):
        down = None
    if down is not None:
        parts = parts._replace(splits=1, warps=16)
    values = empty((tokens, columns), x.dtype if activations == "none" else torch.int8, x.device)
    groups = -(-columns // GROUP) if activations == "int4" else 1
    scales = None if activations == "none" else empty((tokens, groups), torch.float32, x.device)
    sums = None if activations == "none" else empty((tokens, groups), torch.float32, x.device)
    rank = 0 if down is None else down.shape[0]
    branch = None if down is None else empty((tokens, rank), x.dtype, x.device)
    signs = call(rotation_signs, columns, x.device, x.dtype) if rotation else None
    launch(
        _prepare_kernel,
        (-(-tokens // parts.tokens), parts.splits),
        Source(x, columns, *strides),
        Transform(smooth, signs, given, down, rank),
        Prepared(values, scales, sums, branch, groups),
        tokens,
        pixels,
        CODE=CODES[activations],
        ROTATION=rotation,
        RANK=padded_rank(rank),
        BM=parts.tokens,
        BK=parts.columns,
        WHOLE=by_token and parts.columns >= columns,
        num_warps=parts.warps,
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
    ROTATION: tl.constexpr,
    RANK: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,  # a step sees all columns, and they decide together
):
    columns = source.columns
    token = tl.program_id(0) * BM + tl.arange(0, BM)
    inside = token < tokens
    token = tl.minimum(token, tokens - 1)
    x_row = source.data + (token // pixels).to(tl.int64) * source.image_stride
    x_row += (token % pixels).to(tl.int64) * source.token_stride
    out_row = out.data + token.to(tl.int64) * columns
    if CODE == 1 or CODE == 2:
        _quantize_tokens(source, transform, out, x_row, out_row, token, inside, CODE, ROTATION, BM, BK, WHOLE)
    else:
        branch = tl.zeros([BM, RANK if RANK else 16], dtype=tl.float32)
        split = tl.program_id(1)
        splits = tl.num_programs(1)
        steps = tl.cdiv(columns, BK)
        for step in range(split * steps // splits, (split + 1) * steps // splits):
            column = step * BK + tl.arange(0, BK)
            present = (column < columns)[None, :]
            x = _load(x_row, source, column)
            if RANK:
                index = tl.arange(0, RANK)
                at = transform.down + index[None, :] * columns + column[:, None]
                down = tl.load(at, mask=(index < transform.rank)[None, :] & (column < columns)[:, None], other=0.0)
                branch = _product(x, down.to(x.dtype), branch)
            t = _transform(x, transform, column, columns, ROTATION, BM, BK)
            if CODE == 0:
                tl.store(out_row[:, None] + column[None, :], t.to(x.dtype), mask=inside[:, None] & present)
            else:
                grouped = tl.reshape(t, [BM, BK // INT4_GROUP, INT4_GROUP])
                scale = _scale(_largest(grouped, 2), INT4_LIMIT)
                grouped = _round(tl.div_rn(grouped, scale[:, :, None] + tl.zeros_like(grouped)), INT4_LIMIT)
                codes = tl.reshape(grouped, [BM, BK])
                tl.store(out_row[:, None] + column[None, :], codes.to(tl.int8), mask=inside[:, None] & present)
                group = step * (BK // INT4_GROUP) + tl.arange(0, BK // INT4_GROUP)
                at = token.to(tl.int64)[:, None] * out.groups + group[None, :]
                held = inside[:, None] & (group < out.groups)[None, :]
                tl.store(out.scales + at, scale, mask=held)
                tl.store(out.sums + at, tl.sum(grouped, 2) * scale, mask=held)
        if RANK:
            index = tl.arange(0, RANK)
            at = out.branch + token.to(tl.int64)[:, None] * transform.rank + index[None, :]
            tl.store(at, branch.to(out.branch.dtype.element_ty), mask=inside[:, None] & (index < transform.rank)[None, :])


@triton.jit
def _quantize_tokens(
    source,
    transform,
    out,
    x_row,
    out_row,
    token,
    inside,
    CODE: tl.constexpr,
    ROTATION: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """INT8 or E4M3 codes with a scale per token, found or given."""
    LIMIT: tl.constexpr = INT8_LIMIT if CODE == 1 else FP8_LIMIT
    columns = source.columns
    sums = tl.zeros([BM], dtype=tl.float32)
    if WHOLE:
        column = tl.arange(0, BK)
        t = _transform(_load(x_row, source, column), transform, column, columns, ROTATION, BM, BK)
        scale = _token_scale(_largest(t, 1), transform, LIMIT, BM)
        sums = _store_codes(t, scale, transform, out_row, inside, column, columns, CODE, LIMIT)
    else:
        largest = tl.zeros([BM], dtype=tl.float32)
        for start in range(0, columns, BK):
            column = start + tl.arange(0, BK)
            t = _transform(_load(x_row, source, column), transform, column, columns, ROTATION, BM, BK)
            largest = tl.maximum(largest, _largest(t, 1), propagate_nan=tl.PropagateNan.ALL)
        scale = _token_scale(largest, transform, LIMIT, BM)
        for start in range(0, columns, BK):
            column = start + tl.arange(0, BK)
            t = _transform(_load(x_row, source, column), transform, column, columns, ROTATION, BM, BK)
            sums += _store_codes(t, scale, transform, out_row, inside, column, columns, CODE, LIMIT)
    tl.store(out.scales + token, scale, mask=inside)
    tl.store(out.sums + token, sums, mask=inside)


@triton.jit
def _load(x_row, source, column):
    """Inputs ``[BM, BK]`` of rows that begin at ``x_row``, zeros beyond the last column."""
    at = x_row[:, None] + column.to(tl.int64)[None, :] * source.column_stride
    return tl.load(at, mask=(column < source.columns)[None, :], other=0.0)


@triton.jit
def _token_scale(largest, transform, LIMIT: tl.constexpr, BM: tl.constexpr):
    """Scales ``[BM]``; NaN for a token that holds a NaN, and, where the scale is given, for one that holds an infinity."""
    if transform.input_scale is not None:
        given = tl.zeros([BM], dtype=tl.float32) + tl.load(transform.input_scale)
        return tl.where(largest < float("inf"), given, float("nan"))
    else:
        return _scale(largest, LIMIT)


@triton.jit
def _largest(t, AXIS: tl.constexpr):
    """Largest magnitude along an axis, NaN if there is one: the bits of magnitudes are ordered as they are, NaN above infinity."""
    return tl.max(t.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS).to(tl.float32, bitcast=True)


@triton.jit
def _store_codes(t, scale, transform, out_row, inside, column, columns, CODE: tl.constexpr, LIMIT: tl.constexpr):
    """Write the codes of ``t [BM, BK]``; returns the sums ``[BM]`` of the numbers they stand for."""
    codes, t = _codes(t, scale, CODE, LIMIT)
    tl.store(out_row[:, None] + column[None, :], codes.to(tl.int8), mask=inside[:, None] & (column < columns)[None, :])
    return tl.sum(t, 1) * scale


@triton.jit
def _codes(t, scale, CODE: tl.constexpr, LIMIT: tl.constexpr):
    """Codes ``[BM, BK]`` of INT8 or E4M3 inputs in units of ``scale [BM]``, and the numbers they stand for."""
    t = tl.div_rn(t, scale[:, None] + tl.zeros_like(t))
    if CODE == 1:
        t = _round(t, LIMIT)
        codes = t.to(tl.int32)
    else:
        codes = _e4m3_code(t)
        t = minifloat_value(codes, E4M3)
    return codes, t


@triton.jit
def _scale(largest, LIMIT: tl.constexpr):
    """``largest / LIMIT``, 1 for a token of zeros, NaN for one that holds a NaN: it must not vanish in integer codes."""
    return tl.where(largest == 0.0, 1.0, tl.div_rn(largest, tl.full(largest.shape, LIMIT, tl.float32)))


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
def _transform(x, transform, column, columns, ROTATION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    """Smoothed and rotated inputs ``[BM, BK]``, float32 numbers that x's dtype holds."""
    if transform.smooth is not None:
        smooth = tl.load(transform.smooth + column, mask=column < columns, other=1.0)
        x = (x.to(tl.float32) / smooth.to(x.dtype).to(tl.float32)[None, :]).to(x.dtype)
    if ROTATION:
        signs = tl.load(transform.signs + column, mask=column < columns, other=0.0)
        x = (x.to(tl.float32) * signs.to(tl.float32)[None, :]).to(x.dtype)
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
