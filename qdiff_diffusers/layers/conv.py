"""2-D convolution over a packed weight."""

from __future__ import annotations

from torch import Tensor, nn

from .base import CONV2D_OPS, PackedLayer


class QDiffConv2d(PackedLayer, nn.Conv2d):
    """``nn.Conv2d`` (groups = 1, zero padding) whose kernel stays packed as rows ``[out, kh*kw*in]``."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        columns = self.in_channels * self.kernel_size[0] * self.kernel_size[1]
        window = (list(self.kernel_size), list(self.stride), list(self.padding), list(self.dilation))
        return CONV2D_OPS[self.spec.format.kind](x, *self.op_arguments(columns), *window)
