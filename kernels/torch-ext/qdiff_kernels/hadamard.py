"""Block Hadamard rotation with fixed pseudo-random signs.

``rotate(v) = (v * signs) H`` on consecutive blocks of the last dimension, with ``H`` the Sylvester Hadamard matrix over the
square root of its size. It is orthonormal, so ``rotate(x) . rotate(w) = x . w``: a weight quantized after rotation is used
with rotated inputs. Mixing many weights makes each rotated one nearly Gaussian, outliers included (QuIP#, QuaRot).

The signs follow from the index alone (splitmix64), so a checkpoint stores none.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

MAX_BLOCK = 256


def largest_block(size: int, limit: int = MAX_BLOCK) -> int:
    """Largest power of two that divides ``size``, at most ``limit``."""
    return min(size & -size, limit) if size else 1


@lru_cache(maxsize=256)
def _signs(size: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        z = (np.arange(1, size + 1, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return np.where(z >> np.uint64(63), -1.0, 1.0)


@lru_cache(maxsize=256)
def rotation_signs(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Signs ``[size]`` of +1 and -1: the top bit of splitmix64 of the index, the same on every machine."""
    with torch.inference_mode(False):  # a cached inference tensor could not take part in autograd later
        return torch.from_numpy(_signs(size)).to(device=device, dtype=dtype)


@lru_cache(maxsize=64)
def hadamard_matrix(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Sylvester Hadamard matrix ``[block, block]`` with entries +1 and -1; ``block`` is a power of two."""
    if block < 1 or block & (block - 1):
        raise ValueError(f"a Hadamard block must be a power of two, got {block}")
    with torch.inference_mode(False):
        matrix = torch.ones(1, 1, dtype=torch.float64, device="cpu")
        while matrix.shape[0] < block:
            matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
        return matrix.to(device=device, dtype=dtype)


def rotate(x: Tensor, block: int) -> Tensor:
    """Rotate blocks of the last dimension. x: floating ``[..., n]`` with ``block`` dividing n; returns the same shape and dtype."""
    return _transform(x * rotation_signs(x.shape[-1], x.device, x.dtype), block)


def unrotate(x: Tensor, block: int) -> Tensor:
    """Inverse of :func:`rotate`."""
    return _transform(x, block) * rotation_signs(x.shape[-1], x.device, x.dtype)


def _transform(x: Tensor, block: int) -> Tensor:
    if x.shape[-1] % block:
        raise ValueError(f"a rotation block of {block} does not divide {x.shape[-1]} channels")
    # One product with the whole block: the two small ones of its Kronecker factors have fewer operations, but matrix libraries are
    # slow at 4 to 16 columns, and 16-bit numbers would be rounded twice.
    half = (block.bit_length() - 1) // 2
    rotated = x.reshape(-1, block) @ _halved(block, x.device, x.dtype)
    if block != 4**half:
        rotated = rotated * 0.5**0.5
    return rotated.view(x.shape)


@lru_cache(maxsize=64)
def _halved(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The Hadamard matrix over the largest power of two up to the square root of its size.

    It is exact in every dtype, and a block of float16 activations sums to less than the largest number.
    """
    with torch.inference_mode(False):
        return hadamard_matrix(block, device, dtype) * 0.5 ** ((block.bit_length() - 1) // 2)
