"""Quantization of activations: the integers or fp8 numbers that a low-precision matrix unit multiplies, and their scales."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("none", "int8", "fp8", "int4", "nvfp4")
INT4_GROUP = 64
NVFP4_GROUP = 16
GROUPS = {"int4": INT4_GROUP, "nvfp4": NVFP4_GROUP}
FP8_MAX = 448.0
INT4_MAX, UINT4_MAX = 7, 15
UINT8_MAX = 255
UFP8_MAX = 496.0  # largest number of unsigned E4M4 with E4M3's bias: the sign bit joins the mantissa, and no code stands for NaN
UFP8_SMALLEST = 2.0**-6  # least of its normal numbers
E2M1_MAX = 6.0


def quantize_activations(x: Tensor, kind: str, shift: Tensor | None = None, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Quantize the last dimension, symmetrically, with scales found from the data or with one that is given.

    Args:
        x: floating ``[..., channels]``, the shift already added.
        kind: "int8" or "fp8" (E4M3), one scale per token; "int4", one scale per token and group of 64 channels (the last
            group may be short); "nvfp4", E2M1 with an E4M3 scale per token and group of 16 channels.
        shift: ``[channels]`` or ``None``. The "int4" groups in which it is positive hold numbers from 0 up, such as a shifted
            GELU's: they are quantized to 0 .. 15, and numbers below 0 to 0.
        scale: one number for all tokens, for "int8" and "fp8"; larger numbers are clamped to the largest code. With a shift codes
            are unsigned: 0 .. 255, or E4M4 numbers up to 496.

    Returns:
        codes ``[..., channels]`` (int8, or float8_e4m3fn for "fp8"; unsigned ones uint8 and float32; for "nvfp4" twice the E2M1
        values) and scales ``[..., groups]``, float32 (float64 for float64 input), with ``x ~ codes * scales``. An all-zero token or
        group has scale 1 ("nvfp4": 1/2, of codes that are twice the values).
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    if scale is not None:
        return _quantize_static(wide, kind, scale.to(wide).reshape(1), unsigned=shift is not None)
    if kind == "int4":
        return _quantize_int4(wide, shift)
    if kind == "nvfp4":
        return _quantize_nvfp4(wide)
    if kind == "int8":
        scale = _safe(wide.abs().amax(-1, keepdim=True) / 127)
        return (wide / scale).round().clamp(-127, 127).to(torch.int8), scale
    if kind == "fp8":
        scale = _safe(wide.abs().amax(-1, keepdim=True) / FP8_MAX)
        return (wide / scale).clamp(-FP8_MAX, FP8_MAX).float().to(torch.float8_e4m3fn), scale
    raise ValueError(f"activations must be one of {', '.join(KINDS[1:])}, got {kind!r}")


def dequantize_activations(codes: Tensor, scales: Tensor, kind: str = "int4") -> Tensor:
    """``codes * scales`` in the scales' dtype, ``[..., channels]``. ``kind`` says how many channels share a scale."""
    values = codes.to(scales.dtype)
    if scales.shape[-1] == 1:
        return values * scales
    return values * scales.repeat_interleave(GROUPS[kind], -1)[..., : codes.shape[-1]]


def _quantize_static(x: Tensor, kind: str, scale: Tensor, unsigned: bool) -> tuple[Tensor, Tensor]:
    units = x / scale
    scales = scale + 0 * units.abs().amax(-1, keepdim=True)  # NaN for tokens with NaN or infinity, which integers cannot hold
    if kind == "int8":
        codes = units.round().clamp(0, UINT8_MAX).to(torch.uint8) if unsigned else units.round().clamp(-127, 127).to(torch.int8)
    elif kind == "fp8" and unsigned:
        units = units.clamp(0, UFP8_MAX)
        binade = units.clamp_min(UFP8_SMALLEST).frexp().exponent - 1
        step = torch.ldexp(torch.ones_like(units), binade - 4)
        codes = ((units / step).round() * step).float()
    elif kind == "fp8":
        codes = units.clamp(-FP8_MAX, FP8_MAX).float().to(torch.float8_e4m3fn)
    else:
        raise ValueError(f"a given scale goes with int8 or fp8 activations, got {kind!r}")
    return codes, scales


def _quantize_int4(x: Tensor, shift: Tensor | None) -> tuple[Tensor, Tensor]:
    padded = _grouped(x, INT4_GROUP)
    largest = padded.abs().amax(-1)
    low, high = torch.tensor(-float(INT4_MAX)), torch.tensor(float(INT4_MAX))
    if shift is not None:
        unsigned = (_grouped(shift.to(x.dtype), INT4_GROUP) > 0).any(-1)
        largest = torch.where(unsigned, padded.amax(-1).clamp_min(0), largest)
        high = torch.where(unsigned, UINT4_MAX, INT4_MAX).to(x.dtype)[:, None]
        low = torch.where(unsigned, 0, -INT4_MAX).to(x.dtype)[:, None]
        scales = _safe(largest / high[:, 0])
    else:
        scales = _safe(largest / INT4_MAX)
    codes = (padded / scales[..., None]).round()
    codes = torch.minimum(torch.maximum(codes, low.to(codes)), high.to(codes)).to(torch.int8)
    return codes.flatten(-2)[..., : x.shape[-1]], scales


def _quantize_nvfp4(x: Tensor) -> tuple[Tensor, Tensor]:
    """E2M1 has steps of 1/2 up to 2, of 1 up to 4 and of 2 up to 6; twice its values are integers."""
    padded = _grouped(x, NVFP4_GROUP)
    stored = (padded.abs().amax(-1) / E2M1_MAX).clamp_max(FP8_MAX).float().to(torch.float8_e4m3fn)
    scales = _safe(stored.to(x.dtype))
    units = (padded / scales[..., None]).clamp(-E2M1_MAX, E2M1_MAX)
    magnitude = units.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0)).to(x.dtype)
    codes = (2 * step * (units / step).round()).to(torch.int8)
    return codes.flatten(-2)[..., : x.shape[-1]], scales / 2


def _grouped(x: Tensor, group: int) -> Tensor:
    """``[..., channels]`` -> ``[..., groups, group]``, padded with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % group)).unflatten(-1, (-1, group))


def _safe(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)  # NaN stays NaN: it must not vanish in integer codes
