"""Integers of 2 to 8 bits with a scale, and optionally a zero, per group."""

from __future__ import annotations

import torch
from torch import Tensor

from ._register import register_format
from .bitpack import unpack_bits
from .codebook import apply_scales

WEIGHT_SCHEMA = "Tensor codes, Tensor scales, Tensor? zeros, int bits, int group_size"


def decode(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, columns: int, dtype: torch.dtype
) -> Tensor:
    """Torch reference of ``integer_dequantize``.

    Args:
        codes: int8 ``[rows, bytes]``, packed unsigned codes.
        scales: ``[rows or 1, groups]``, floating.
        zeros: like ``scales``, or ``None``. With zeros ``w = scale * code + zero``; without, ``w = scale * (code - 2**(bits-1))``.

    Returns:
        ``[rows, columns]`` in ``dtype``, computed in float32 (float64 for a float64 result).
    """
    wide = torch.promote_types(dtype, torch.float32)
    values = unpack_bits(codes, bits, columns).to(wide)
    if zeros is None:
        return apply_scales(values - (1 << (bits - 1)), scales, group_size).to(dtype)
    offset = apply_scales(torch.ones_like(values), zeros, group_size)
    return (apply_scales(values, scales, group_size) + offset).to(dtype)


integer_dequantize, integer_linear, integer_conv2d = register_format("integer", WEIGHT_SCHEMA, decode)
