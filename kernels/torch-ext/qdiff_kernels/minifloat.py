"""Small floating-point numbers ExMy: a sign, e exponent bits and m mantissa bits, subnormals, no infinities and no NaN."""

from __future__ import annotations

import re
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ._register import register_format
from .bitpack import unpack_bits
from .codebook import apply_scales

WEIGHT_SCHEMA = "Tensor codes, Tensor scales, Tensor? tensor_scale, str encodings, int group_size"


def encoding_bits(encoding: str) -> tuple[int, int]:
    """``"e2m1"`` -> ``(2, 1)``; a suffix "uz" (useful zero) changes nothing here."""
    match = re.fullmatch(r"e([1-5])m([0-6])(uz)?", encoding)
    if not match or not 2 <= 1 + int(match[1]) + int(match[2]) <= 8:
        raise ValueError(f"encoding must be e<1-5>m<0-6> of 2 to 8 bits in all, optionally followed by uz, got {encoding!r}")
    return int(match[1]), int(match[2])


@lru_cache(maxsize=64)
def levels(encoding: str) -> tuple[float, ...]:
    """Value of every code ``sign | exponent | mantissa`` of an encoding, with exponent bias ``2**(e-1) - 1`` (0 for e = 1).

    An E1 encoding is a uniform grid. Every code is a number: the codes that hardware reads as infinity or NaN (E4M3's last,
    E5M2's last binade) decode to the largest finite magnitude, so that a quantizer never has a reason to choose them.

    With the suffix "uz" the code of negative zero, otherwise wasted, is one more negative level: a step beyond the most
    negative one of a uniform grid (which makes E1M2uz the integers -8 to 7), halfway between the two most negative ones of
    a floating grid (the redundant-zero remapping of RaZeR, arXiv 2501.04052, with a fixed target).
    """
    exponent_bits, mantissa_bits = encoding_bits(encoding)
    largest = {"e4m3": 448.0, "e5m2": 57344.0}.get(encoding, float("inf"))
    bias = (1 << (exponent_bits - 1)) - 1
    positive = []
    for exponent in range(1 << exponent_bits):
        for mantissa in range(1 << mantissa_bits):
            fraction = mantissa / (1 << mantissa_bits)
            value = (fraction if exponent == 0 else 1 + fraction) * 2.0 ** (max(exponent, 1) - bias)
            positive.append(min(value, largest))
    spare = 0.0
    if encoding.endswith("uz"):
        spare = positive[-1] + positive[1] if exponent_bits == 1 else (positive[-1] + positive[-2]) / 2
    return (*positive, -spare, *(-value for value in positive[1:]))


@lru_cache(maxsize=64)
def level_table(encodings: str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``[len(encodings) * 2**bits]``: the levels of each comma-separated encoding, one after the other."""
    with torch.inference_mode(False):
        return torch.tensor([v for e in encodings.split(",") for v in levels(e)], device=device, dtype=dtype)


def decode(
    codes: Tensor,
    scales: Tensor,
    tensor_scale: Tensor | None,
    encodings: str,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Torch reference of ``minifloat_dequantize``.

    Args:
        codes: int8 ``[rows, bytes]``, packed codes ``sign | exponent | mantissa``.
        scales: ``[rows or 1, groups]``: float16, float32 or float8_e4m3fn, or int8 holding E8M0 exponents
            (value ``2**(byte - 127)``).
            With two encodings the sign of a scale picks the group's encoding: + the first, - the second.
        tensor_scale: float32 ``[1]`` (NVFP4), ``[rows, 1]`` or ``None``, a second level above the scales.
        encodings: one or two comma-separated names of equal width.

    Returns:
        ``[rows, columns]`` in ``dtype``, computed in float32 (float64 for a float64 result).
    """
    bits = 1 + sum(encoding_bits(encodings.split(",")[0]))
    wide = torch.promote_types(dtype, torch.float32)
    index = unpack_bits(codes, bits, columns)
    factors = scale_values(scales, wide)
    if "," in encodings:
        second = apply_scales(torch.ones_like(index, dtype=wide), factors, group_size) < 0
        index = index + (second.to(index.dtype) << bits)
        factors = factors.abs()
    if tensor_scale is not None:
        factors = factors * tensor_scale.to(wide)
    table = level_table(encodings, codes.device, wide)
    values = F.embedding(index, table[:, None]).squeeze(-1)
    return apply_scales(values, factors, group_size).to(dtype)


def fold_row_scale(scales: Tensor, tensor_scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Scales and second level as a kernel that knows only one second-level number takes them.

    Scales of rows are multiplied into the scales of groups, in float32: exact for E4M3 scales and bfloat16 or float16 row scales.
    """
    if tensor_scale is None or tensor_scale.numel() == 1:
        return scales, tensor_scale
    return (scale_values(scales, torch.float32) * tensor_scale.float()).contiguous(), None


def scale_values(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored scales as numbers: E8M0 exponents (int8 storage) become powers of two, float scales are cast."""
    if scales.dtype == torch.int8:
        return torch.exp2(scales.view(torch.uint8).to(dtype) - 127)
    return scales.to(dtype)


minifloat_dequantize, minifloat_linear, minifloat_conv2d = register_format("minifloat", WEIGHT_SCHEMA, decode)
