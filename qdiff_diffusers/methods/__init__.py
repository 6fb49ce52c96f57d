"""How bits are chosen. Each method turns a weight matrix into a format and its tensors, and lies in one file; those of other
packages are found through the entry point group ``qdiff.methods``."""

from __future__ import annotations

from . import aq, vq, fp, svdquant, rtn  # isort: skip  # registers them, in this order
from .base import DEFAULT_METHOD, METHODS, Method, Option, method_of, register_method
from .layer import LayerInputs, QuantizedWeight, format_target, quantize_weight

__all__ = [
    "DEFAULT_METHOD",
    "METHODS",
    "LayerInputs",
    "Method",
    "Option",
    "QuantizedWeight",
    "aq",
    "format_target",
    "fp",
    "method_of",
    "quantize_weight",
    "register_method",
    "rtn",
    "svdquant",
    "vq",
]
