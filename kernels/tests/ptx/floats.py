"""Floating-point formats that numpy does not have, as their bits."""

from __future__ import annotations

import numpy as np
import torch

from .machine import Array

U32, F32, F64 = (np.dtype(name) for name in ("u4", "f4", "f8"))


def widen(bits: Array) -> Array:
    """bfloat16 bits as float32."""
    return (bits.astype(U32) << np.uint32(16)).view(F32)


def narrow(values: Array) -> Array:
    """float32 or float64 to bfloat16 bits, to nearest, ties to even."""
    if values.dtype == F64:
        values = _to_odd(values)
    bits = values.view(U32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FFF), rounded)


def _to_odd(values: Array) -> Array:
    """float64 to float32 so that rounding once more gives what rounding at once would."""
    near = values.astype(F32)
    wide = near.astype(F64)
    bits = near.view(U32) - (np.abs(wide) > np.abs(values)).astype(U32)
    inexact = (wide != values) & np.isfinite(values)
    return np.where(inexact, bits | np.uint32(1), near.view(U32)).astype(U32).view(F32)


def e4m3(codes: Array) -> Array:
    """E4M3 codes as float32."""
    codes = codes.astype(U32)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * np.exp2(exponent.astype(F32) - 10))
    size = np.where((codes & 0x7F) == 0x7F, np.nan, size)
    return np.where(codes & 0x80, -size, size).astype(F32)


def to_e4m3(values: Array) -> Array:
    """float32 as E4M3 codes, to nearest, beyond the range its largest number."""
    wide = torch.from_numpy(np.asarray(np.clip(values, -448, 448), F32))
    return wide.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
