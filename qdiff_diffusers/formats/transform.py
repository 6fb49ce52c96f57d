"""Rotation and smoothing of a weight matrix, channel block by channel block."""

from __future__ import annotations

from qdiff_kernels import rotate, unrotate
from torch import Tensor


def rotate_matrix(matrix: Tensor, channels: int, block: int) -> Tensor:
    """Rotate the input channels of ``matrix [rows, taps * channels]`` (taps = kh * kw of a convolution, 1 of a linear layer)."""
    return rotate(matrix.unflatten(1, (-1, channels)), block).flatten(1) if block else matrix


def unrotate_matrix(matrix: Tensor, channels: int, block: int) -> Tensor:
    """Inverse of :func:`rotate_matrix`."""
    return unrotate(matrix.unflatten(1, (-1, channels)), block).flatten(1) if block else matrix


def kernels_first(matrix: Tensor, channels: int) -> Tensor:
    """Columns from tap by tap, channels last, to channel by channel: ``[rows, taps * channels] -> [rows, channels * taps]``."""
    return matrix.unflatten(1, (-1, channels)).transpose(1, 2).flatten(1)


def channels_last(matrix: Tensor, channels: int) -> Tensor:
    """Inverse of :func:`kernels_first`."""
    return matrix.unflatten(1, (channels, -1)).transpose(1, 2).flatten(1)


def smooth_matrix(matrix: Tensor, smooth: Tensor) -> Tensor:
    """Multiply the input channels of ``matrix [rows, taps * channels]`` by ``smooth [channels]``."""
    return (matrix.unflatten(1, (-1, smooth.numel())) * smooth).flatten(1)
