"""2-D convolution over a packed weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..formats import matrix_shape
from . import decoded
from .base import CONV2D_OPS, PackedLayer


class QDiffConv2d(PackedLayer, nn.Conv2d):  # type: ignore[misc, override]
    """``nn.Conv2d`` (groups = 1, zero padding) whose kernel stays packed as rows ``[out, kh*kw*in]``."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Packed layers are converted, never constructed; PEFT constructs its adapters as ``type(base_layer)(channels, ...)``."""
        return nn.Conv2d(*args, **kwargs) if args or kwargs else object.__new__(cls)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, input: Tensor) -> Tensor:
        if input.ndim == 3:  # like nn.Conv2d, take an image without a batch too
            return self.forward(input[None])[0]
        self.check_channels(input.shape[1], self.in_channels)
        if self.spec.kernel_vectors:
            return self._decode_and_convolve(input)
        window = (list(self.kernel_size), list(self.stride), list(self.padding), list(self.dilation))
        return CONV2D_OPS[self.spec.format.kind](input, *self.op_arguments(), *window)

    def _decode_and_convolve(self, x: Tensor) -> Tensor:
        """Decode a weight with columns in kernel order, which no fused kernel reads; it hardly counts at thousands of pixels."""
        tensors = self.packed_tensors()
        matrix = self.spec.format.dequantize(tensors, matrix_shape(self.weight_shape)[1], x.dtype)
        branch = (tensors["low_rank_down"], tensors["low_rank_up"]) if self.spec.rank else None
        return decoded.conv2d(self, x, self.spec.stored_order(matrix, self.weight_shape), branch)
