"""Low-rank approximation of a weight by randomised SVD."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .threads import block_threads, map_blocks

FACTOR_BITS = 16
OVERSAMPLING = 8
PRODUCT_BLOCK = 1 << 20  # weights per block of a matrix product


class LowRank(NamedTuple):
    """``up @ down`` in float16, the best approximation of its rank, with the singular values shared between the factors.

    Attributes:
        down: float16 ``[rank, columns]``.
        up: float16 ``[rows, rank]``.
        subspace: float32 ``[columns, rank + oversampling]``, orthonormal: where the SVD of a similar matrix can start.
    """

    down: Tensor
    up: Tensor
    subspace: Tensor

    def dense(self) -> Tensor:
        """float32 ``[rows, columns]``."""
        return self.up.float() @ self.down.float()


@block_threads()
def truncated_svd(
    matrix: Tensor, rank: int, *, start: Tensor | None = None, iterations: int | None = None, seed: int = 0
) -> LowRank:
    """Nearly the best rank-``rank`` approximation of ``matrix`` float32 ``[rows, columns]`` (Halko, Martinsson and Tropp 2011).

    Exact where ``rank`` plus oversampling reaches the smaller dimension.

    Args:
        rank: at least 1, capped at the smaller dimension.
        start: ``subspace`` of a similar matrix, in place of a random one.
        iterations: subspace iterations. By default 2, or none with a ``start``: each of SVDQuant's rounds adds one, and its
            residual is then within 0.2% of that with exact SVDs, from 256 x 1024 to 1152 x 4608.
        seed: of the random start.
    """
    width = min(rank + OVERSAMPLING, *matrix.shape)
    if start is None or start.shape != (matrix.shape[1], width):
        generator = torch.Generator().manual_seed(seed)
        start = torch.randn(matrix.shape[1], width, generator=generator, dtype=torch.float32).to(matrix.device)
        iterations = 2 if iterations is None else iterations
    basis = torch.linalg.qr(_product(matrix, start)).Q
    for _ in range(iterations or 0):
        other = torch.linalg.qr(_transposed_product(matrix, basis)).Q
        basis = torch.linalg.qr(_product(matrix, other)).Q
    left, values, right = torch.linalg.svd(_transposed_product(matrix, basis).T, full_matrices=False)
    root = values[:rank].sqrt()
    up = (basis @ left[:, :rank]) * root
    down = root[:, None] * right[:rank]
    return LowRank(down.to(torch.float16).contiguous(), up.to(torch.float16).contiguous(), right.T.contiguous())


def energies(matrix: Tensor, count: int, seed: int = 0) -> Tensor:
    """Squared leading singular values of ``matrix`` over its squared norm, float32 ``[<= count]``, falling."""
    found = truncated_svd(matrix, count, seed=seed)
    return found.down.float().square().sum(1).square() / matrix.square().sum().clamp_min(1e-30)


def rank_bits(shape: tuple[int, int] | torch.Size) -> float:
    """Bits per weight that one unit of rank costs a ``[rows, columns]`` weight."""
    return FACTOR_BITS * (shape[0] + shape[1]) / (shape[0] * shape[1])


def _product(matrix: Tensor, narrow: Tensor) -> Tensor:
    """``matrix @ narrow``."""
    return torch.cat(map_blocks(lambda part: matrix[part] @ narrow, matrix, PRODUCT_BLOCK))


def _transposed_product(matrix: Tensor, narrow: Tensor) -> Tensor:
    """``matrix.T @ narrow``."""
    parts = map_blocks(lambda part: matrix[part].T @ narrow[part], matrix, PRODUCT_BLOCK)
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
