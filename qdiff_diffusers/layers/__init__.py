"""Packed layers: modules that hold packed tensors and call one op."""

from __future__ import annotations

from functools import lru_cache

import torch
from diffusers.utils import logging
from torch import Tensor, nn

from ..formats import LayerSpec
from . import decoded
from .base import CONV2D_OPS, LINEAR_OPS, PackedLayer, op_arguments, set_tensor
from .conv import QDiffConv2d
from .embedding import QDiffEmbedding, is_table
from .linear import QDiffLinear
from .offloading import changing, follow_class
from .timesteps import follow_timesteps

__all__ = [
    "CONV2D_OPS",
    "LINEAR_OPS",
    "PackedLayer",
    "QDiffConv2d",
    "QDiffEmbedding",
    "QDiffLinear",
    "decoded",
    "dense_layer",
    "follow_timesteps",
    "op_arguments",
    "pack_layer",
    "set_tensor",
    "unsupported_reason",
]

logger = logging.get_logger(__name__)

PACKED: dict[type[nn.Module], type[PackedLayer]] = {nn.Linear: QDiffLinear, nn.Conv2d: QDiffConv2d, nn.Embedding: QDiffEmbedding}


def unsupported_reason(module: nn.Module) -> str | None:
    """Why a layer with a weight cannot be packed, or ``None`` if it can."""
    if type(module) is nn.Linear:
        return None
    if is_table(module):
        return "Embedding that renormalises its rows" if module.max_norm is not None else None
    if type(module) is not nn.Conv2d:
        return f"{type(module).__name__} is not a plain Linear, Conv2d or Embedding"
    if module.groups != 1:
        return f"convolution with {module.groups} groups"
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        return f"convolution with padding {module.padding!r} of mode {module.padding_mode}"
    return None


def pack_layer(module: nn.Module, spec: LayerSpec, compute_dtype: torch.dtype, tensors: dict[str, Tensor]) -> PackedLayer:
    """Convert a supported layer in place. ``tensors`` are named as in ``spec.tensors(shape)``."""
    if reason := decoded.reason(spec):
        _say_once(reason)
    cls = next(packed for dense, packed in PACKED.items() if isinstance(module, dense))
    return cls.convert(module, spec, compute_dtype, tensors)


@lru_cache
def _say_once(reason: str) -> None:
    logger.warning(f"{reason} are multiplied by no fused kernel yet: their weights are decoded at each call, which is slower")


def dense_layer(layer: PackedLayer) -> nn.Module:
    """Convert a packed layer back, in place, into the dense layer it is equivalent to, keeping its hooks."""
    packed_class = type(layer)
    with changing(layer):
        weight, bias = layer.dequantize(), layer.dense_bias()
        layer.restore_dense_parts()
        for name in layer.packed_tensors():
            delattr(layer, name)
        del layer.spec, layer.compute_dtype
        layer.__class__ = layer.__dict__.pop("dense_class")
        set_tensor(layer, "weight", weight)
        if bias is not None and bias is not layer.bias:
            set_tensor(layer, "bias", bias)
    follow_class(layer, packed_class)
    return layer
