"""Regular Hadamard matrices, with which ConvRot (arXiv 2512.03673) rotates, in terms of qdiff's rotation.

ConvRot's matrix of ``4**k`` channels is the k-fold Kronecker product of a 4 x 4 Hadamard matrix whose rows have equal sums. That
one is Sylvester's, of which every fourth row is negated, its columns in another order and one of them negated:

    R = diag(a) H P

So a layer that smooths its inputs by :func:`regular_signs` and rotates them in blocks of that size computes with ``x R`` up to the
order and the signs of the rotated channels, which :func:`to_regular` gives the weight's columns.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from qdiff_kernels.hadamard import MAX_BLOCK, rotation_signs
from torch import Tensor

ROW_SIGNS = (1, 1, 1, -1)
COLUMNS, COLUMN_SIGNS = (0, 2, 1, 3), (1, 1, 1, -1)


def regular_block(channels: int, limit: int = MAX_BLOCK) -> int:
    """The largest power of four that divides ``channels``, at most ``limit``."""
    block = 1
    while channels % (4 * block) == 0 and 4 * block <= limit:
        block *= 4
    return block


def regular_signs(channels: int, block: int) -> Tensor:
    """Smoothing vector ``[channels]``, float32 of +1 and -1, that makes qdiff's rotation in blocks of a power of four ConvRot's."""
    pattern = _kronecker(ROW_SIGNS, block).repeat(channels // block)
    return pattern * rotation_signs(channels, torch.device("cpu"), torch.float32)


def to_regular(codes: Tensor, block: int) -> Tensor:
    """Columns of a weight ``[rows, columns]`` that was rotated by qdiff, in ConvRot's order and with its signs."""
    order, signs = _columns(block)
    return (codes.unflatten(1, (-1, block))[..., order] * signs.to(codes.dtype)).flatten(1)


def from_regular(codes: Tensor, block: int) -> Tensor:
    """Inverse of :func:`to_regular`."""
    order, signs = _columns(block)
    out = codes.unflatten(1, (-1, block)) * signs.to(codes.dtype)
    return out[..., order.argsort()].flatten(1)


def negated_columns(columns: int, block: int) -> Tensor:
    """Which columns, in qdiff's order, :func:`to_regular` negates: bool ``[columns]``."""
    return from_regular(torch.ones(1, columns), block)[0] < 0


@lru_cache(maxsize=16)
def _columns(block: int) -> tuple[Tensor, Tensor]:
    order = torch.zeros(1, dtype=torch.long)
    size = 1
    while size < block:
        order = (4 * order[:, None] + torch.tensor(COLUMNS)).flatten()
        size *= 4
    if size != block:
        raise ValueError(f"blocks of regular Hadamard matrices are powers of four, not {block}")
    return order, _kronecker(COLUMN_SIGNS, block)


def _kronecker(factor: tuple[int, ...], size: int) -> Tensor:
    out = torch.ones(1)
    while len(out) < size:
        out = torch.kron(out, torch.tensor(factor, dtype=torch.float32))
    return out
