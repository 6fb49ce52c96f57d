"""Convolution with a packed kernel as an implicit matrix product: no patch matrix in memory, taps are columns of the weight.

For each tap the kernel multiplies ``[rows, channels]`` of decoded weights by the ``[channels, pixels]`` the tap looks at. Inputs
are read where they are, channels first, or as the codes ``[pixels, channels]`` of quantized activations, whose scales belong
to input pixels and so multiply the partial sums of one tap.
"""

from __future__ import annotations

from math import gcd
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Extras, Window, kernel_layout
from .activations import prepare
from .blocks import (
    INT4_GROUP,
    ROW,
    WEIGHT,
    Epilogue,
    Numbers,
    Tile,
    add_branch_and_bias,
    input_operand,
    multiply,
    operand_tile,
    tile_of,
)
from .configs import LinearConfig
from .decode import group_scale
from .launch import call, empty, launch
from .linear import OPERANDS, Inputs, Units, on_weights, plan
from .weights import PackedWeight


class ImagePointers(NamedTuple):
    """A batch of images as an argument of a kernel."""

    data: Tensor  # [batch, channels, height, width] in any order
    scales: Tensor | None  # [batch, height, width], or [batch, height, width, groups of 64 channels]
    channels: int
    height: int
    width: int
    image_stride: int
    channel_stride: int
    y_stride: int
    x_stride: int


class Geometry(NamedTuple):
    """A convolution as an argument of a kernel."""

    out_height: int
    out_width: int
    kernel_height: int
    kernel_width: int
    stride_y: int
    stride_x: int
    padding_y: int
    padding_x: int
    dilation_y: int
    dilation_x: int


def conv2d(
    weight: PackedWeight,
    x: Tensor,
    extras: Extras,
    window: Window,
    size: tuple[int, int],
    config: LinearConfig,
    fp8: bool,
) -> Tensor:
    """x ``[batch, channels, height, width]`` -> ``[batch, rows, *size]`` in x's dtype."""
    batch, channels, height, width = x.shape
    inputs, strides = _inputs(x, extras)
    grouped = inputs.scales is not None and inputs.scales.shape[1] > 1
    block = INT4_GROUP.value if grouped else config.block_columns
    arithmetic = plan(weight, inputs.values.dtype, weight.columns + 1, x.dtype, Units(True, fp8, False))
    if (
        not weight.row_scales or weight.zeros is not None
    ):  # groups of columns do not follow the taps: scales are multiplied into the weights
        operand = inputs.values.dtype if inputs.values.dtype.itemsize > 1 else torch.bfloat16
        arithmetic = on_weights(weight, torch.float32 if x.dtype == torch.float32 else operand)
    fp8_bytes = inputs.values.dtype == torch.float8_e4m3fn and arithmetic.operand != torch.float8_e4m3fn
    values = inputs.values.view(torch.uint8) if fp8_bytes else inputs.values
    out = empty((batch, weight.rows, *size), x.dtype, x.device)
    pixels = batch * size[0] * size[1]
    epilogue = Epilogue.of(extras.bias, call(_branch, x, extras.low_rank_down, *window), extras.low_rank_up)
    launch(
        _conv2d_kernel,
        (-(-weight.rows // config.block_rows) * -(-pixels // config.block_tokens),),
        ImagePointers(values, inputs.scales, channels, height, width, *strides),
        weight.pointers(),
        epilogue,
        out,
        pixels,
        arithmetic.unit,
        Geometry(*size, *window.kernel_size, *window.stride, *window.padding, *window.dilation),
        NUMBERS=Numbers(OPERANDS[arithmetic.operand], arithmetic.scale_at, 0 if inputs.scales is None else 1 + grouped, fp8_bytes),
        LAYOUT=weight.layout(),
        STEP=gcd(channels, block),
        TILE=Tile(config.block_rows, config.block_tokens, block, epilogue.padded_rank),
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def _inputs(x: Tensor, extras: Extras) -> tuple[Inputs, tuple[int, ...]]:
    """What the kernel reads and its strides (image, channel, row, column)."""
    if extras.smooth is None and not extras.rotation and extras.activations == "none":
        return Inputs(x, None, None, None), x.stride()
    inputs = prepare(x, extras, None)
    _, channels, height, width = x.shape
    return inputs, (height * width * channels, 1, width * channels, channels)


def _branch(x: Tensor, down: Tensor | None, *window: tuple[int, int]) -> Tensor | None:
    """The low-rank branch before its up-projection, ``[pixels, rank]``."""
    if down is None:
        return None
    size, stride, padding, dilation = window
    down = kernel_layout(down.to(x.dtype), size)
    branch = F.conv2d(x, down, None, stride, padding, dilation)
    return branch.permute(0, 2, 3, 1).reshape(-1, down.shape[0]).contiguous()


@triton.jit(do_not_specialize=["pixels"])
def _conv2d_kernel(
    images,  # ImagePointers
    w,  # WeightPointers
    extras,  # Epilogue
    y_ptr,  # [batch, rows, out_height, out_width]
    pixels,
    unit,
    window,  # Geometry
    NUMBERS: tl.constexpr,
    LAYOUT: tl.constexpr,  # WeightLayout
    STEP: tl.constexpr,  # of channels, the largest power of two up to a tile that divides them
    TILE: tl.constexpr,
):
    OPERAND: tl.constexpr = NUMBERS.operand
    SCALE_AT: tl.constexpr = NUMBERS.scale_at
    X_SCALES: tl.constexpr = NUMBERS.x_scales
    BN: tl.constexpr = TILE.rows
    BM: tl.constexpr = TILE.tokens
    BK: tl.constexpr = TILE.columns
    pid_n, pid_m = tile_of(tl.program_id(0), tl.cdiv(w.rows, BN), tl.cdiv(pixels, BM))
    row = pid_n * BN + tl.arange(0, BN)
    rows = tl.minimum(row, w.rows - 1)
    pixel = pid_m * BM + tl.arange(0, BM)
    inside = pixel < pixels
    area = window.out_height * window.out_width
    image = (pixel // area).to(tl.int64)
    at_y = pixel // window.out_width % window.out_height * window.stride_y - window.padding_y
    at_x = pixel % window.out_width * window.stride_x - window.padding_x
    x_groups = tl.cdiv(images.channels, INT4_GROUP)
    SUM: tl.constexpr = tl.int32 if OPERAND == tl.int8 else tl.float32
    acc = tl.zeros([BN, BM], dtype=tl.float32)
    if w.tensor_scale is not None and SCALE_AT == WEIGHT:
        unit = tl.load(w.tensor_scale)
    for tap in range(0, window.kernel_height * window.kernel_width):
        in_y = at_y + tap // window.kernel_width * window.dilation_y
        in_x = at_x + tap % window.kernel_width * window.dilation_x
        seen = inside & (in_y >= 0) & (in_y < images.height) & (in_x >= 0) & (in_x < images.width)
        x_pixel = images.data + image * images.image_stride + in_y.to(tl.int64) * images.y_stride + in_x * images.x_stride
        part = tl.zeros([BN, BM], dtype=SUM)
        if X_SCALES:
            scale_at = images.scales + (image * images.height + in_y) * images.width * (x_groups if X_SCALES == 2 else 1)
            scale_at += in_x * (x_groups if X_SCALES == 2 else 1)
        for first in range(0, images.channels, BK):
            tile = operand_tile(w, rows, tap * images.channels + first, unit, OPERAND, SCALE_AT, LAYOUT, STEP, BN, BK)
            channel = first + tl.arange(0, BK)
            at = x_pixel[None, :] + channel.to(tl.int64)[:, None] * images.channel_stride
            x = tl.load(at, mask=(channel < images.channels)[:, None] & seen[None, :], other=0.0)
            x = input_operand(x, OPERAND, NUMBERS.x_is_fp8_bytes)
            if X_SCALES == 2:
                sums = multiply(tile, x, tl.zeros([BN, BM], dtype=SUM), SUM, BK).to(tl.float32)
                acc += sums * tl.load(scale_at + first // INT4_GROUP, mask=seen, other=0.0)[None, :]
            else:
                part = multiply(tile, x, part, SUM, BK)
        if X_SCALES == 1:
            acc += part.to(tl.float32) * tl.load(scale_at, mask=seen, other=0.0)[None, :]
        elif X_SCALES == 0:
            acc += part.to(tl.float32)
    y = acc
    if SCALE_AT == ROW:
        y *= group_scale(w.scales, w, rows, 0, LAYOUT)[:, None] / unit
    if w.tensor_scale is not None and SCALE_AT != WEIGHT:
        y *= tl.load(w.tensor_scale)
    y = add_branch_and_bias(y, extras, pixel, inside, rows, TILE.rank)
    at = y_ptr + (image * w.rows * area + pixel % area)[None, :] + row.to(tl.int64)[:, None] * area
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside[None, :] & (row < w.rows)[:, None])
