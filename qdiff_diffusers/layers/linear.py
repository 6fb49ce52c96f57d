"""Linear layer over a packed weight."""

from __future__ import annotations

from torch import Tensor, nn

from .base import LINEAR_OPS, PackedLayer


class QDiffLinear(PackedLayer, nn.Linear):  # type: ignore[misc, override]
    """``nn.Linear`` whose weight stays packed. PEFT, group offloading and layerwise casting recognise it as the subclass it is."""

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:  # some models pass it by nn.Linear's name for it
        self.check_channels(input.shape[-1], self.in_features)
        return LINEAR_OPS[self.spec.format.kind](input, *self.op_arguments())
