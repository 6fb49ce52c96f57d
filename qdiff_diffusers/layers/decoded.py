"""What a packed layer computes, on a weight that has been decoded: in training, and for formats that no fused kernel multiplies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from qdiff_kernels import kernel_layout, rotate
from qdiff_kernels.activations import dequantize_activations, quantize_activations
from torch import Tensor

from .base import input_scale

if TYPE_CHECKING:
    from ..formats import LayerSpec
    from .base import PackedLayer
    from .conv import QDiffConv2d

Branch = tuple[Tensor, Tensor] | None  # down [rank, columns] and up [rows, rank]


def reason(spec: LayerSpec) -> str | None:
    """Why a layer decodes its weight at each call, or ``None`` if a fused kernel multiplies it."""
    if spec.kernel_vectors:
        return "convolutions with kernel_vectors"
    if spec.shift:
        return "layers that shift their inputs"
    return "layers with nvfp4 activations" if spec.activations == "nvfp4" else None


def linear(layer: PackedLayer, x: Tensor, weight: Tensor, branch: Branch) -> Tensor:
    """x ``[..., in]``, weight ``[out, in]`` as the format stores it (rotated, smoothed) -> ``[..., out]``."""
    y = F.linear(quantized_inputs(layer, x), weight)
    if branch is not None:
        y = y + F.linear(F.linear(x, branch[0].to(x.dtype)), branch[1].to(x.dtype))
    return y if layer.bias is None else y + layer.bias


def conv2d(layer: QDiffConv2d, x: Tensor, weight: Tensor, branch: Branch) -> Tensor:
    """x ``[batch, in, height, width]``, weight ``[out, kh * kw * in]`` channels last -> ``[batch, out, h, w]``."""
    geometry: Any = (layer.stride, layer.padding, layer.dilation)
    size: Any = layer.kernel_size
    inputs = quantized_inputs(layer, x.movedim(1, -1)).movedim(-1, 1)
    y = F.conv2d(inputs, kernel_layout(weight, size), layer.bias, *geometry)
    if branch is None:
        return y
    down = F.conv2d(x, kernel_layout(branch[0].to(x.dtype), size), None, *geometry)
    return y + F.conv2d(down, branch[1].to(x.dtype)[:, :, None, None])


def quantized_inputs(layer: PackedLayer, x: Tensor) -> Tensor:
    """Inputs ``[..., channels]`` shifted, smoothed, rotated and quantized; gradients pass straight through the quantizer."""
    smooth, shift = getattr(layer, "smooth", None), getattr(layer, "shift", None)
    if shift is not None:
        x = x + shift.to(x.dtype)
    if smooth is not None:
        x = x / smooth.to(x.dtype)
    if layer.spec.rotation:
        x = rotate(x, layer.spec.rotation)
    if layer.spec.activations == "none" or layer.exact_inputs:
        return x
    kind, scale = layer.spec.activations, input_scale(layer.packed_tensors(), layer.timestep)
    with torch.no_grad():
        quantized = dequantize_activations(*quantize_activations(x, kind, shift, scale), kind).to(x.dtype)
    return x + (quantized - x).detach()
