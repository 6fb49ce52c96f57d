"""``<format>_conv2d`` on the CPU: a 1x1 kernel is a linear layer, any other is decoded once for torch's convolution."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import reference
from ..reference import Extras, Window
from ._activations import prepare
from ._linear import linear
from ._weights import Weight, decode

POINTWISE = Window((1, 1), (1, 1), (0, 0), (1, 1))


def conv2d(x: Tensor, weight: Weight, window: Window, extras: Extras) -> Any:
    """x ``[batch, in, height, width]`` that the kernels support -> ``[batch, out, h, w]``, or ``NotImplemented``."""
    pixels = x.movedim(1, -1)
    if window._replace(dilation=(1, 1)) == POINTWISE:
        return linear(pixels, weight, extras).movedim(-1, 1).contiguous()
    if x.dtype == torch.float16:
        return NotImplemented
    inputs = _inputs(x, pixels, extras)
    # The reference's own sum of branch and bias, on inputs that are already transformed.
    plain = extras._replace(smooth=None, rotation=0, activations="none", low_rank_down=None, low_rank_up=None)
    y = reference.conv2d(inputs, decode(weight, x.dtype), window, plain)
    if extras.low_rank_down is not None and extras.low_rank_up is not None:
        geometry = (window.stride, window.padding, window.dilation)
        down = F.conv2d(x, reference.kernel_layout(extras.low_rank_down.to(x.dtype), window.kernel_size), None, *geometry)
        y += F.conv2d(down, extras.low_rank_up.to(x.dtype)[:, :, None, None])
    return y


def _inputs(x: Tensor, pixels: Tensor, extras: Extras) -> Tensor:
    """Inputs of the convolution: x smoothed, rotated and quantized along channels."""
    if extras.smooth is None and not extras.rotation and extras.activations == "none":
        return x
    flat = pixels.reshape(-1, x.shape[1])
    values = prepare(flat, extras, x.dtype, fold=True).values
    return values.view(pixels.shape).movedim(-1, 1)
