"""How bits are chosen. Each method turns a weight matrix into a format and its tensors."""

from __future__ import annotations

from .layer import LayerInputs, QuantizedWeight, format_target, quantize_weight

__all__ = ["LayerInputs", "QuantizedWeight", "format_target", "quantize_weight"]
