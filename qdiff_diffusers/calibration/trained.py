"""Packed layers that are being trained: the same computation on a weight that is a function of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from qdiff_kernels import kernel_layout, rotate
from qdiff_kernels.activations import dequantize_activations, quantize_activations
from torch import Tensor, nn

from ..layers import PackedLayer
from ..methods.trainable import make_trainable
from .settings import Tuning


class TrainedLayer(nn.Module):
    """One packed layer in training.

    Args:
        layer: a packed linear layer or convolution; :meth:`write_back` changes it, nothing before does.
        dense: float32 matrix that its format approximates (rotated, without the low-rank branch), if it is known.
        tuning: settings.
    """

    def __init__(self, layer: PackedLayer, dense: Tensor | None, tuning: Tuning) -> None:
        super().__init__()
        self.layer = (layer,)  # in a tuple: not a child of this module
        spec, tensors = layer.spec, layer.packed_tensors()
        own = {name: tensors[name] for name in spec.format.tensors(*_matrix_shape(layer))}
        self.packed = make_trainable(spec.format, own, _matrix_shape(layer)[1], dense, tuning)
        self.down = self.up = None
        if spec.rank:
            self.down = nn.Parameter(layer.low_rank_down.float())
            self.up = nn.Parameter(layer.low_rank_up.float())

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer[0]
        weight = self.packed().to(x.dtype)
        if isinstance(layer, nn.Linear):
            y = F.linear(self._inputs(x), weight)
            if self.down is not None and self.up is not None:
                y = y + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
            return y if layer.bias is None else y + layer.bias
        assert isinstance(layer, nn.Conv2d)
        geometry: Any = (layer.stride, layer.padding, layer.dilation)
        size: Any = layer.kernel_size
        y = F.conv2d(self._inputs(x.movedim(1, -1)).movedim(-1, 1), kernel_layout(weight, size), layer.bias, *geometry)
        if self.down is not None and self.up is not None:
            down = F.conv2d(x, kernel_layout(self.down.to(x.dtype), size), None, *geometry)
            y = y + F.conv2d(down, self.up.to(x.dtype)[:, :, None, None])
        return y

    @torch.no_grad()
    def write_back(self) -> None:
        """Pack what training has made of the weight into the layer."""
        layer = self.layer[0]
        for name, tensor in self.packed.pack().items():
            old = getattr(layer, name)
            new = tensor.to(old.dtype).contiguous()
            setattr(layer, name, nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new)
        if self.down is not None and self.up is not None:
            layer.low_rank_down, layer.low_rank_up = self.down.to(torch.float16), self.up.to(torch.float16)

    def _inputs(self, x: Tensor) -> Tensor:
        """Smoothed, rotated and quantized inputs, channels last; the gradient passes straight through the quantizer."""
        layer = self.layer[0]
        smooth = getattr(layer, "smooth", None)
        if smooth is not None:
            x = x / smooth.to(x.dtype)
        if layer.spec.rotation:
            x = rotate(x, layer.spec.rotation)
        if layer.spec.activations == "none":
            return x
        quantized = dequantize_activations(*quantize_activations(x.detach(), layer.spec.activations)).to(x.dtype)
        return x + (quantized - x.detach())


@contextmanager
def training(layers: Mapping[str, TrainedLayer]) -> Iterator[None]:
    """In this context the packed layers compute what their trained forms do."""
    for trained in layers.values():
        trained.layer[0].forward = trained.forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for trained in layers.values():
            del trained.layer[0].forward


def _matrix_shape(layer: PackedLayer) -> tuple[int, int]:
    rows, *rest = layer.weight_shape
    columns = 1
    for n in rest:
        columns *= n
    return rows, columns
