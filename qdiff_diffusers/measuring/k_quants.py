"""An encoder for GGUF's K-quants: the ``gguf`` package decodes these types but does not quantize to them.

A super-block of 256 weights has sub-blocks with a small integer scale each (Q4_K and Q2_K: a minimum too), and one or two float16
factors of those integers. The byte layouts are ggml's. The search is qdiff's own: scales and minima that are the least-squares ones
of a sub-block, then codes chosen anew for the factors as stored. On Gaussian weights the squared errors are 0.0052 (Q4_K), 0.0209
(Q3_K) and 0.071 (Q2_K); llama.cpp's quantizer without an importance matrix has 0.0051 and 0.0227 for the first two.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUPER_BLOCK = 256
SHRINK = torch.linspace(0.6, 1.1, 21)  # candidate ranges of a sub-block, as parts of its full range
CHUNK = 1 << 14  # super-blocks encoded at a time


def quantize(weight: Tensor, kind: str) -> Tensor:
    """Encode ``[rows, columns]`` as ``uint8 [rows, bytes]``.

    Args:
        weight: float; a multiple of 256 columns.
        kind: "Q2_K", "Q3_K" or "Q4_K".

    Raises:
        ValueError: the columns do not divide into super-blocks.
    """
    rows, columns = weight.shape
    if columns % SUPER_BLOCK:
        raise ValueError(f"{kind} has blocks of {SUPER_BLOCK} weights, the layer has {columns} columns")
    encode = {"Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k}[kind]
    blocks = weight.detach().float().cpu().reshape(-1, SUPER_BLOCK).split(CHUNK)
    return torch.cat([encode(part) for part in blocks]).reshape(rows, -1)


def _q4_k(blocks: Tensor) -> Tensor:
    factors, scales, minima, codes = _asymmetric(blocks, size=32, levels=15, integers=63)
    low, high = scales[:, :4], scales[:, 4:]
    low_min, high_min = minima[:, :4], minima[:, 4:]
    packed = torch.cat([low | (high >> 4) << 6, low_min | (high_min >> 4) << 6, (high & 15) | (high_min & 15) << 4], 1)
    pairs = codes.view(-1, 4, 2, 32)
    return torch.cat([factors, packed, (pairs[:, :, 0] | pairs[:, :, 1] << 4).flatten(1)], 1)


def _q2_k(blocks: Tensor) -> Tensor:
    factors, scales, minima, codes = _asymmetric(blocks, size=16, levels=3, integers=15)
    return torch.cat([scales | minima << 4, _pack_two_bits(codes), factors], 1)


def _q3_k(blocks: Tensor) -> Tensor:
    x = blocks.view(-1, 16, 16)
    best = _symmetric_scales(x)
    factor = _to_half(best.gather(1, best.abs().argmax(1, keepdim=True)) / -32)
    integers = torch.round(best / _safe(factor)).clamp(-32, 31)
    scale = (factor * integers)[..., None]
    codes = (torch.round(x / _safe(scale)).clamp(-4, 3) + 4).to(torch.uint8).view(-1, 8, 32)
    shifts = torch.arange(8, dtype=torch.uint8).view(8, 1)
    high = ((codes >> 2) << shifts).sum(1, dtype=torch.uint8)
    stored = (integers + 32).to(torch.uint8)
    low_bits = (stored[:, :8] & 15) | (stored[:, 8:] & 15) << 4
    tops = (stored >> 4).view(-1, 4, 4)
    top_bits = (tops << torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)).sum(1, dtype=torch.uint8)
    return torch.cat([high, _pack_two_bits(codes & 3), low_bits, top_bits, _bytes(factor)], 1)


def _asymmetric(blocks: Tensor, size: int, levels: int, integers: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Factors as bytes ``[blocks, 4]``, integer scales and minima ``[blocks, subs]``, codes ``[blocks, subs, size]``."""
    x = blocks.view(len(blocks), -1, size)
    scale, minimum = _least_squares(x, levels)
    factor = _to_half(scale.amax(1, keepdim=True) / integers)
    factor_min = _to_half(minimum.amax(1, keepdim=True) / integers)
    scales = torch.round(scale / _safe(factor)).clamp(0, integers)
    minima = torch.round(minimum / _safe(factor_min)).clamp(0, integers)
    step, offset = (factor * scales)[..., None], (factor_min * minima)[..., None]
    codes = torch.round((x + offset) / _safe(step)).clamp(0, levels)
    out = (scales, minima, codes)
    return torch.cat([_bytes(factor), _bytes(factor_min)], 1), *(t.to(torch.uint8) for t in out)  # type: ignore[return-value]


def _least_squares(x: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum ``[blocks, subs]``, not negative, of ``x ~ scale * code - minimum`` with the least squared error."""
    high, low = x.amax(-1), x.amin(-1).clamp_max(0)
    best_error = torch.full_like(high, torch.inf)
    best_scale, best_minimum = torch.zeros_like(high), torch.zeros_like(high)
    for shrink in SHRINK:
        scale, minimum = shrink * (high - low) / levels, -low * shrink
        for _ in range(2):
            codes = torch.round((x + minimum[..., None]) / _safe(scale)[..., None]).clamp(0, levels)
            centred, mean = codes - codes.mean(-1, keepdim=True), x.mean(-1)
            scale = ((centred * x).sum(-1) / centred.square().sum(-1).clamp_min(1e-20)).clamp_min(0)
            minimum = (scale * codes.mean(-1) - mean).clamp_min(0)
        error = (scale[..., None] * codes - minimum[..., None] - x).square().sum(-1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale, best_minimum = torch.where(better, scale, best_scale), torch.where(better, minimum, best_minimum)
    return best_scale, best_minimum


def _symmetric_scales(x: Tensor) -> Tensor:
    """Scales ``[blocks, subs]`` of either sign of ``x ~ scale * code`` with codes from -4 to 3."""
    largest = x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0]
    best_error, best = torch.full_like(largest, torch.inf), torch.zeros_like(largest)
    for shrink in torch.cat([SHRINK, -SHRINK]):
        scale = shrink * largest / -4
        codes = torch.round(x / _safe(scale)[..., None]).clamp(-4, 3)
        scale = (codes * x).sum(-1) / codes.square().sum(-1).clamp_min(1e-20)
        error = (scale[..., None] * codes - x).square().sum(-1)
        better = error < best_error
        best_error, best = torch.where(better, error, best_error), torch.where(better, scale, best)
    return best


def _pack_two_bits(codes: Tensor) -> Tensor:
    """``[blocks, 64]``: byte ``i`` of each half holds the codes ``i``, ``i + 32``, ``i + 64`` and ``i + 96`` of its half."""
    quarters = codes.reshape(-1, 2, 4, 32) << torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    return quarters.sum(2, dtype=torch.uint8).flatten(1)


def _safe(x: Tensor) -> Tensor:
    """``x`` with infinity in place of zero, so that what is divided by it becomes zero."""
    return torch.where(x == 0, torch.inf, x)


def _to_half(x: Tensor) -> Tensor:
    """Rounded to float16, and back."""
    return x.half().float()


def _bytes(x: Tensor) -> Tensor:
    return x.half().view(torch.uint8)
