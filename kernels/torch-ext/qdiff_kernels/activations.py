"""Dynamic quantization of activations: the integers or fp8 numbers a low-precision matrix unit sees, and their scales."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("none", "int8", "fp8", "int4")
INT4_GROUP = 64
FP8_MAX = 448.0


def quantize_activations(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Quantize the last dimension, symmetrically, with scales found from the data.

    Args:
        x: floating ``[..., channels]``.
        kind: "int8" or "fp8" (E4M3), one scale per token; "int4", one scale per token and group of 64 channels (the last
            group may be short).

    Returns:
        codes ``[..., channels]`` (int8, or float8_e4m3fn for "fp8") and scales ``[..., groups]``, float32 (float64 for float64
        input), with ``x ~ codes * scales``. An all-zero token has scale 1.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if kind == "int4":
        return _quantize_grouped(wide, INT4_GROUP, 7)
    if kind == "int8":
        scale = _safe(wide.abs().amax(-1, keepdim=True) / 127)
        return (wide / scale).round().clamp(-127, 127).to(torch.int8), scale
    if kind == "fp8":
        scale = _safe(wide.abs().amax(-1, keepdim=True) / FP8_MAX)
        return (wide / scale).clamp(-FP8_MAX, FP8_MAX).float().to(torch.float8_e4m3fn), scale
    raise ValueError(f"activations must be one of {', '.join(KINDS[1:])}, got {kind!r}")


def dequantize_activations(codes: Tensor, scales: Tensor) -> Tensor:
    """``codes * scales`` in the scales' dtype, ``[..., channels]``."""
    values = codes.to(scales.dtype)
    if scales.shape[-1] == 1:
        return values * scales
    return values * scales.repeat_interleave(INT4_GROUP, -1)[..., : codes.shape[-1]]


def _quantize_grouped(x: Tensor, group: int, limit: int) -> tuple[Tensor, Tensor]:
    channels = x.shape[-1]
    padded = torch.nn.functional.pad(x, (0, -channels % group)).unflatten(-1, (-1, group))
    scales = _safe(padded.abs().amax(-1) / limit)
    codes = (padded / scales[..., None]).round().clamp(-limit, limit).to(torch.int8)
    return codes.flatten(-2)[..., :channels], scales


def _safe(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)  # NaN stays NaN: it must not vanish in integer codes
