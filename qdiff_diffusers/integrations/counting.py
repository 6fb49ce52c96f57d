"""``model.num_parameters()`` of quantized models: the number of parameters of the dense model.

diffusers and transformers count the elements of parameters, which in packed layers are bytes of codes; only for bitsandbytes
they convert the number. ``get_memory_footprint()`` counts bytes, and is right as it is.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from ..layers import PackedLayer


def num_parameters(original: Any, self: Any, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """``num_parameters`` of a model, with packed weights counted as dense ones."""
    count = int(original(self, only_trainable, exclude_embeddings))
    layers = {id(m.codes): m for m in self.modules() if isinstance(m, PackedLayer)}.values()  # tied layers count once
    return count + sum(_missing(layer, only_trainable, exclude_embeddings) for layer in layers)


def _missing(layer: PackedLayer, only_trainable: bool, exclude_embeddings: bool) -> int:
    """Number of weights of a layer minus the bytes of its codes that were counted."""
    if only_trainable and not layer.codes.requires_grad:
        return 0
    without = exclude_embeddings and isinstance(layer, nn.Embedding)
    return (0 if without else math.prod(layer.weight_shape)) - layer.codes.numel()
