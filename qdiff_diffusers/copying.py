"""Models that start as a copy of a quantized one.

diffusers' ControlNets copy their base's blocks through state dicts, some with ``strict=False``: packed layers would be skipped
without a word and the copy keep its random weights. They get the dense equivalent instead.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from .packing import packed_layers

COPYING = ("from_transformer", "from_unet")


def from_dense(construct: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    """A constructor that copies models; it gets dense ones."""
    args = tuple(dense_equivalent(value) for value in args)
    return construct(cls, *args, **{name: dense_equivalent(value) for name, value in kwargs.items()})


def dense_equivalent(value: Any) -> Any:
    """A dense copy of a quantized model; anything else as it is."""
    if not isinstance(value, nn.Module) or not packed_layers(value):
        return value
    dense: Any = copy.deepcopy(value)
    return dense.dequantize()
