"""Additive codebooks: every ``vector_size`` consecutive weights of a row are a sum of one entry from each codebook."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ._register import register_format
from .bitpack import unpack_bits

WEIGHT_SCHEMA = "Tensor codes, Tensor codebooks, Tensor scales, int group_size"


def decode(codes: Tensor, codebooks: Tensor, scales: Tensor, group_size: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Torch reference of ``codebook_dequantize``.

    Args:
        codes: int8 ``[rows, bytes]``, packed; per row the codes of vector 0 for all codebooks, then vector 1, ...
        codebooks: ``[num_codebooks, 2**bits, vector_size]``, float or int8.
        scales: ``[rows or 1, groups]``, one per ``group_size`` columns.
        columns: width of the dense weight; the last vector may reach past it.
        dtype: of the result.

    Returns:
        ``[rows, columns]``: ``scales * sum_m codebooks[m, code_m]``, computed in float32 (float64 for a float64 result).
    """
    num_codebooks, entries, vector_size = codebooks.shape
    vectors = -(-columns // vector_size)
    index = unpack_bits(codes, entries.bit_length() - 1, vectors * num_codebooks)
    index = index.view(codes.shape[0], vectors, num_codebooks)
    table = codebooks.to(torch.promote_types(dtype, torch.float32))
    values = F.embedding(index[..., 0], table[0])
    for m in range(1, num_codebooks):
        values += F.embedding(index[..., m], table[m])
    values = values.flatten(1)[:, :columns]
    return apply_scales(values, scales, group_size).to(dtype)


def apply_scales(values: Tensor, scales: Tensor, group_size: int) -> Tensor:
    """Multiply ``values [rows, columns]`` by one scale per group of columns; ``scales [rows or 1, groups]``."""
    scales = scales.to(values.dtype)
    if scales.shape[1] == 1:
        return values * scales
    columns = values.shape[1]
    if columns % group_size == 0:
        return (values.unflatten(1, (-1, group_size)) * scales[..., None]).flatten(1)
    return values * scales.repeat_interleave(group_size, 1)[:, :columns]


codebook_dequantize, codebook_linear, codebook_conv2d = register_format("codebook", WEIGHT_SCHEMA, decode)
