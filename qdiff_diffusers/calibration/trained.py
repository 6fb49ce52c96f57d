"""Packed layers in training: the layers' computation on weights that are functions of parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..formats import matrix_shape
from ..layers import PackedLayer, QDiffConv2d, decoded, set_tensor
from .settings import Tuning
from .trainable import make_trainable


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
        own = {name: tensors[name] for name in spec.format.tensors(*matrix_shape(layer.weight_shape))}
        self.packed = make_trainable(spec.format, own, matrix_shape(layer.weight_shape)[1], dense, tuning)
        self.down = self.up = None
        if spec.rank:
            self.down = nn.Parameter(layer.low_rank_down.float())
            self.up = nn.Parameter(layer.low_rank_up.float())

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer[0]
        weight = layer.spec.stored_order(self.packed(), layer.weight_shape).to(x.dtype)
        branch = None if self.down is None or self.up is None else (self.down, self.up)
        if isinstance(layer, QDiffConv2d):
            return decoded.conv2d(layer, x, weight, branch)
        return decoded.linear(layer, x, weight, branch)

    @torch.no_grad()
    def write_back(self) -> None:
        """Pack the trained weight into the layer."""
        layer = self.layer[0]
        for name, tensor in self.packed.pack().items():
            set_tensor(layer, name, tensor.to(getattr(layer, name).dtype).contiguous())
        if self.down is not None and self.up is not None:
            set_tensor(layer, "low_rank_down", self.down.to(layer.low_rank_down.dtype))
            set_tensor(layer, "low_rank_up", self.up.to(layer.low_rank_up.dtype))


@contextmanager
def training(layers: Mapping[str, TrainedLayer]) -> Iterator[None]:
    """A context in which the packed layers compute with their trained forms."""
    for trained in layers.values():
        trained.layer[0].forward = trained.forward  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for trained in layers.values():
            del trained.layer[0].forward
