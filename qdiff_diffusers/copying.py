"""Models that start as a copy of a quantized one.

diffusers' ControlNets copy their base's blocks through state dicts, some with ``strict=False``: packed layers would be skipped
without a word and the copy keep its random weights. They get the dense equivalent instead.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn

from .packing import packed_layers

COPYING = ("from_transformer", "from_unet")


def install() -> None:
    """Wrap every ControlNet class's copying constructors; calling it again changes nothing."""
    import diffusers.models.controlnets as package

    for value in list(vars(package).values()):
        for name in COPYING:
            method = vars(value).get(name) if isinstance(value, type) else None
            if isinstance(method, classmethod) and not hasattr(method.__func__, "of_qdiff"):
                setattr(value, name, classmethod(_from_dense(method.__func__)))


def _from_dense(construct: Any) -> Any:
    @functools.wraps(construct)
    def from_dense(cls: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(dense_equivalent(value) for value in args)
        return construct(cls, *args, **{name: dense_equivalent(value) for name, value in kwargs.items()})

    from_dense.of_qdiff = True  # type: ignore[attr-defined]
    return from_dense


def dense_equivalent(value: Any) -> Any:
    """A dense copy of a quantized model; anything else as it is."""
    if not isinstance(value, nn.Module) or not packed_layers(value):
        return value
    dense: Any = copy.deepcopy(value)
    return dense.dequantize()
