"""Convolution with a packed kernel as an implicit matrix product: no patch matrix in memory, taps are columns of the weight.

For each tap the kernel multiplies ``[rows, channels]`` of decoded weights by the ``[channels, pixels]`` the tap looks at. Inputs
are read where they are, channels first, or as the codes ``[pixels, channels]`` of quantized activations, whose scales belong
to input pixels and so multiply the partial sums of one tap.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..reference import Extras, Window, kernel_layout
from .activations import prepare
from .blocks import INT4_GROUP, ROW, WEIGHT, add_branch_and_bias, input_operand, multiply, operand_tile, tile_of
from .configs import LinearConfig
from .decode import group_scale
from .linear import OPERANDS, Arithmetic, Inputs, Units, plan
from .weights import CODEBOOK, PackedWeight


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
        arithmetic = Arithmetic(torch.float32 if x.dtype == torch.float32 else operand, WEIGHT.value, 1.0)
    fp8_bytes = inputs.values.dtype == torch.float8_e4m3fn and arithmetic.operand != torch.float8_e4m3fn
    values = inputs.values.view(torch.uint8) if fp8_bytes else inputs.values
    out = torch.empty(batch, weight.rows, *size, device=x.device, dtype=x.dtype)
    pixels = batch * size[0] * size[1]
    branch, up = _branch(x, extras, window), extras.low_rank_up
    rank = 0 if branch is None or up is None else up.shape[1]
    vector = weight.vector_size if weight.kind == CODEBOOK else 1
    _conv2d_kernel[(triton.cdiv(weight.rows, config.block_rows) * triton.cdiv(pixels, config.block_tokens),)](
        values,
        values if inputs.scales is None else inputs.scales,
        out,
        values if extras.bias is None else extras.bias,
        values if branch is None else branch,
        values if up is None else up,
        values if weight.tensor_scale is None else weight.tensor_scale,
        *weight.arguments(),
        pixels,
        weight.rows,
        channels,
        height,
        width,
        *size,
        *strides,
        *window.kernel_size,
        *window.stride,
        *window.padding,
        *window.dilation,
        rank,
        arithmetic.unit,
        OPERAND=OPERANDS[arithmetic.operand],
        SCALE_AT=arithmetic.scale_at,
        X_SCALES=0 if inputs.scales is None else 1 + grouped,
        X_FP8_BYTES=fp8_bytes,
        RANK=max(16, triton.next_power_of_2(rank)) if rank else 0,
        HAS_BIAS=extras.bias is not None,
        HAS_TENSOR_SCALE=weight.tensor_scale is not None,
        ALIGNED=channels % 8 == 0 and channels % vector == 0,
        BN=config.block_rows,
        BM=config.block_tokens,
        BK=block,
        num_warps=config.warps,
        num_stages=config.stages,
        **weight.constexprs(),
    )
    return out


def _inputs(x: Tensor, extras: Extras) -> tuple[Inputs, tuple[int, ...]]:
    """What the kernel reads and its strides (image, channel, row, column)."""
    if extras.smooth is None and not extras.rotation and extras.activations == "none":
        return Inputs(x, None, None, None), x.stride()
    inputs = prepare(x, extras, None)
    _, channels, height, width = x.shape
    return inputs, (height * width * channels, 1, width * channels, channels)


def _branch(x: Tensor, extras: Extras, window: Window) -> Tensor | None:
    """The low-rank branch before its up-projection, ``[pixels, rank]``."""
    if extras.low_rank_down is None:
        return None
    down = kernel_layout(extras.low_rank_down.to(x.dtype), window.kernel_size)
    branch = F.conv2d(x, down, None, window.stride, window.padding, window.dilation)
    return branch.permute(0, 2, 3, 1).reshape(-1, down.shape[0]).contiguous()


@triton.jit(do_not_specialize=["pixels"])
def _conv2d_kernel(
    x_ptr,
    x_scales_ptr,
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
    pixels,
    row_count,
    channels,
    height,
    width,
    out_height,
    out_width,
    image_stride,
    channel_stride,
    y_stride,
    x_stride,
    kernel_height,
    kernel_width,
    stride_y,
    stride_x,
    padding_y,
    padding_x,
    dilation_y,
    dilation_x,
    rank,
    unit,
    OPERAND: tl.constexpr,
    SCALE_AT: tl.constexpr,
    X_SCALES: tl.constexpr,  # 0: none, 1: per input pixel, 2: per input pixel and 64 channels
    X_FP8_BYTES: tl.constexpr,
    RANK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_TENSOR_SCALE: tl.constexpr,
    ALIGNED: tl.constexpr,
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
    pid_n, pid_m = tile_of(tl.program_id(0), tl.cdiv(row_count, BN), tl.cdiv(pixels, BM))
    row = pid_n * BN + tl.arange(0, BN)
    rows = tl.minimum(row, row_count - 1)
    pixel = pid_m * BM + tl.arange(0, BM)
    inside = pixel < pixels
    image = pixel // (out_height * out_width)
    at_y = pixel // out_width % out_height * stride_y - padding_y
    at_x = pixel % out_width * stride_x - padding_x
    x_groups = tl.cdiv(channels, INT4_GROUP)
    SUM: tl.constexpr = tl.int32 if OPERAND == tl.int8 else tl.float32
    acc = tl.zeros([BN, BM], dtype=tl.float32)
    if HAS_TENSOR_SCALE and SCALE_AT == WEIGHT:
        unit = tl.load(tensor_scale_ptr)
    for tap in range(0, kernel_height * kernel_width):
        in_y = at_y + tap // kernel_width * dilation_y
        in_x = at_x + tap % kernel_width * dilation_x
        seen = inside & (in_y >= 0) & (in_y < height) & (in_x >= 0) & (in_x < width)
        x_pixel = x_ptr + image.to(tl.int64) * image_stride + in_y.to(tl.int64) * y_stride + in_x * x_stride
        scale_at = x_scales_ptr + (image.to(tl.int64) * height + in_y) * width * (x_groups if X_SCALES == 2 else 1)
        scale_at += in_x * (x_groups if X_SCALES == 2 else 1)
        part = tl.zeros([BN, BM], dtype=SUM)
        for first in range(0, channels, BK):
            w = operand_tile(
                codes_ptr, table_ptr, scales_ptr, zeros_ptr, rows, tap * channels + first, columns, codes_stride, scales_stride,
                groups, unit, OPERAND, SCALE_AT, KIND, BITS, ENCODING, SECOND, BOOKS, VECTOR, MIDPOINT, GROUP, E8M0, E4M3,
                HAS_ZEROS, ALIGNED, BN, BK,
            )  # fmt: skip
            channel = first + tl.arange(0, BK)
            at = x_pixel[None, :] + channel.to(tl.int64)[:, None] * channel_stride
            x = tl.load(at, mask=(channel < channels)[:, None] & seen[None, :], other=0.0)
            x = input_operand(x, OPERAND, X_FP8_BYTES)
            if X_SCALES == 2:
                sums = multiply(w, x, tl.zeros([BN, BM], dtype=SUM), SUM, BK).to(tl.float32)
                acc += sums * tl.load(scale_at + first // INT4_GROUP, mask=seen, other=0.0)[None, :]
            else:
                part = multiply(w, x, part, SUM, BK)
        if X_SCALES == 1:
            acc += part.to(tl.float32) * tl.load(scale_at, mask=seen, other=0.0)[None, :]
        elif X_SCALES == 0:
            acc += part.to(tl.float32)
    y = acc
    if SCALE_AT == ROW:
        y *= group_scale(scales_ptr, rows, 0, scales_stride, E8M0, E4M3)[:, None] / unit
    if HAS_TENSOR_SCALE and SCALE_AT != WEIGHT:
        y *= tl.load(tensor_scale_ptr)
    y = add_branch_and_bias(y, branch_ptr, up_ptr, bias_ptr, pixel, inside, rows, rank, RANK, HAS_BIAS)
    area = out_height * out_width
    at = y_ptr + (image.to(tl.int64) * row_count * area + pixel % area)[None, :] + row.to(tl.int64)[:, None] * area
    tl.store(at, y.to(y_ptr.dtype.element_ty), mask=inside[None, :] & (row < row_count)[:, None])
