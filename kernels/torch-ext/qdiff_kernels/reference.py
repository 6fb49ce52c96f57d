"""The computation of a packed layer in plain torch: the specification that every kernel is tested against.

With ``W`` the dequantized weight, ``R`` the rotation, ``s`` the smoothing vector and ``Q`` the activation quantizer:

    linear:  y = Q(R((x + t) / s)) W^T + (x D^T) U^T + b  (t: shift; D, U: low_rank_down, low_rank_up; the branch sees raw inputs)
    conv2d:  the same with a convolution; R and Q act along channels, a "token" is a pixel.

Without activation quantization the product runs in the input's dtype. With it, quantized operands are multiplied exactly and
accumulated in float32 (float64 for float64 input), and the scales are applied to the sums, as an INT8 or FP8 matrix unit does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input

from .activations import dequantize_activations, quantize_activations
from .hadamard import rotate, unrotate


class Extras(NamedTuple):
    """Bias, low-rank branch and input transforms: what a layer has beside its packed weight, in the order of the ops' arguments."""

    bias: Tensor | None  # [out]
    low_rank_down: Tensor | None  # [rank, columns]
    low_rank_up: Tensor | None  # [out, rank]
    smooth: Tensor | None  # [in]
    rotation: int  # Hadamard block, 0 for none
    activations: str  # "none", "int8", "fp8", "int4", "nvfp4"
    shift: Tensor | None = None  # [in], added to the inputs; int4 groups where it is positive are quantized to 0 .. 15
    input_scale: Tensor | None = None  # one number, instead of a scale per token; with a shift int8 and fp8 are unsigned then


class Window(NamedTuple):
    """Geometry of a convolution, each field (vertical, horizontal)."""

    kernel_size: tuple[int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]


def compute_dtype(x: Tensor, extras: Extras) -> torch.dtype:
    """Dtype that the reference needs the dequantized weight in."""
    if extras.activations == "none":
        return x.dtype
    return torch.promote_types(x.dtype, torch.float32)


def linear(x: Tensor, weight: Tensor, extras: Extras) -> Tensor:
    """x ``[..., in]``, weight ``[out, in]`` in ``compute_dtype`` -> ``[..., out]`` in x's dtype."""
    inputs = _transform(x, extras)
    if extras.activations == "none":
        y = F.linear(inputs, weight)
    else:
        codes, scales = quantize_activations(inputs, extras.activations, extras.shift, extras.input_scale)
        if scales.shape[-1] == 1:
            y = F.linear(codes.to(weight.dtype), weight) * scales
        else:
            y = F.linear(dequantize_activations(codes, scales, extras.activations), weight)
    if extras.low_rank_down is not None and extras.low_rank_up is not None:
        branch = F.linear(F.linear(x, extras.low_rank_down.to(x.dtype)), extras.low_rank_up.to(x.dtype))
        y = y + branch
    if extras.bias is not None:
        y = y + extras.bias
    return y.to(x.dtype)


def linear_input_gradient(gradient: Tensor, weight: Tensor, extras: Extras) -> Tensor:
    """Gradient of :func:`linear` with respect to x, straight through the activation quantizer. All ``[..., features]``."""
    grad = gradient @ weight.to(gradient.dtype)
    if extras.rotation:
        grad = unrotate(grad, extras.rotation)
    if extras.smooth is not None:
        grad = grad / extras.smooth.to(grad.dtype)
    if extras.low_rank_down is not None and extras.low_rank_up is not None:
        grad = grad + (gradient @ extras.low_rank_up.to(grad.dtype)) @ extras.low_rank_down.to(grad.dtype)
    return grad


def kernel_layout(matrix: Tensor, kernel_size: tuple[int, int]) -> Tensor:
    """Stored rows ``[out, kh*kw*in]`` (channels last) -> convolution kernel ``[out, in, kh, kw]``."""
    return matrix.unflatten(1, (*kernel_size, -1)).permute(0, 3, 1, 2)


def matrix_layout(kernel: Tensor) -> Tensor:
    """Convolution kernel ``[out, in, kh, kw]`` (or a matrix ``[out, in]``) -> stored rows ``[out, kh*kw*in]``."""
    return kernel.permute(0, 2, 3, 1).flatten(1) if kernel.ndim == 4 else kernel


def conv2d(x: Tensor, weight: Tensor, window: Window, extras: Extras) -> Tensor:
    """x ``[batch, in, height, width]``, weight ``[out, kh*kw*in]`` in ``compute_dtype`` -> ``[batch, out, h, w]`` in x's dtype."""
    geometry = (window.stride, window.padding, window.dilation)
    inputs = x
    changed = extras.smooth is not None or extras.shift is not None or extras.rotation
    if changed or extras.activations != "none":
        inputs = _transform(x.movedim(1, -1), extras)
        if extras.activations != "none":
            quantized = quantize_activations(inputs, extras.activations, extras.shift, extras.input_scale)
            inputs = dequantize_activations(*quantized, extras.activations)
        inputs = inputs.movedim(-1, 1)
    y = F.conv2d(inputs, kernel_layout(weight, window.kernel_size), None, *geometry)
    if extras.low_rank_down is not None and extras.low_rank_up is not None:
        down = kernel_layout(extras.low_rank_down.to(x.dtype), window.kernel_size)
        y = y + F.conv2d(F.conv2d(x, down, None, *geometry), extras.low_rank_up.to(x.dtype)[:, :, None, None])
    if extras.bias is not None:
        y = y + extras.bias[:, None, None]
    return y.to(x.dtype).contiguous()


def conv2d_input_gradient(gradient: Tensor, weight: Tensor, x_shape: list[int], window: Window, extras: Extras) -> Tensor:
    """Gradient of :func:`conv2d` with respect to x, straight through the activation quantizer."""

    def through(kernel: Tensor, grad: Tensor) -> Tensor:
        kernel = kernel_layout(kernel.to(grad.dtype), window.kernel_size)
        return conv2d_input(x_shape, kernel, grad, window.stride, window.padding, window.dilation)

    grad = through(weight, gradient)
    if extras.rotation:
        grad = unrotate(grad.movedim(1, -1), extras.rotation).movedim(-1, 1)
    if extras.smooth is not None:
        grad = grad / extras.smooth.to(grad.dtype)[:, None, None]
    if extras.low_rank_down is not None and extras.low_rank_up is not None:
        up = extras.low_rank_up.to(grad.dtype)
        grad = grad + through(extras.low_rank_down, torch.einsum("bohw,or->brhw", gradient, up))
    return grad.contiguous()


def conv2d_output_size(size: int, kernel: int, stride: int, padding: int, dilation: int) -> int:
    """Output extent of a convolution along one dimension."""
    return (size + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1


def _transform(x: Tensor, extras: Extras) -> Tensor:
    if extras.activations != "none":  # inputs that will be rounded to few levels are not rounded to another dtype first
        x = x.to(torch.promote_types(x.dtype, torch.float32))
    if extras.shift is not None:
        x = x + extras.shift.to(x.dtype)
    if extras.smooth is not None:
        x = x / extras.smooth.to(x.dtype)
    return rotate(x, extras.rotation) if extras.rotation else x
