"""How bits are chosen. Each method turns a weight matrix into a format and its tensors."""

from __future__ import annotations

from .layer import QuantizedWeight, quantize_weight

__all__ = ["QuantizedWeight", "quantize_weight"]
