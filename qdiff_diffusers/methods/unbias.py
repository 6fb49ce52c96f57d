"""Undo the shrinkage of least-squares quantization.

A quantizer with the least squared error makes weights shorter: its error is orthogonal to the quantized weight Q, so
``<Q, W> = |Q|^2 = (1 - D) |W|^2`` with D the relative error, and every layer's output loses the same share of its gain. Unlike
the rest of the error these losses do not average out over channels, layers and steps. Scaling by ``|W|^2 / <Q, W>`` restores the
gain and raises the squared error only from D to D / (1 - D).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..formats import WeightFormat
from .scales import short_scale

MAX_GAIN = 1.5


def unbias(matrix: Tensor, weight_format: WeightFormat, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rescale a packed weight so that its projection on the weight it stands for is that weight.

    Args:
        matrix: float32 ``[rows, columns]``, what was quantized.
        weight_format: of the packed weight.
        tensors: the packed weight; a low-rank branch among them carries its own part exactly and is left alone.

    Returns:
        The tensors with new ``scales`` (per row), or with a new ``tensor_scale`` where the scales themselves are too coarse.
    """
    scales = tensors["scales"]
    per_row = "tensor_scale" not in tensors and scales.shape[0] == matrix.shape[0]
    if not per_row:  # one number for all: a sample of rows tells it
        matrix, tensors_seen = sample_rows(matrix, tensors)
    else:
        tensors_seen = tensors
    packed = weight_format.dequantize(tensors_seen, matrix.shape[1])
    wanted = matrix * matrix
    if "low_rank_down" in tensors:
        wanted -= matrix * (tensors_seen["low_rank_up"].float() @ tensors["low_rank_down"].float())
    dims = (1,) if per_row else (0, 1)
    gain = wanted.sum(dims) / (matrix * packed).sum(dims)
    gain = torch.where(gain.isfinite(), gain, 1.0).clamp(1 / MAX_GAIN, MAX_GAIN)
    if "tensor_scale" in tensors:
        return tensors | {"tensor_scale": short_scale(tensors["tensor_scale"] * gain)}
    if scales.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return tensors  # E8M0 scales are powers of two: nothing to adjust
    return tensors | {"scales": (scales.float() * (gain[:, None] if per_row else gain)).to(scales.dtype)}


def sample_rows(matrix: Tensor, tensors: dict[str, Tensor], weights: int = 1 << 18) -> tuple[Tensor, dict[str, Tensor]]:
    """Evenly spaced rows, about ``weights`` numbers in all, of a matrix and of its packed form."""
    rows, columns = matrix.shape
    step = max(1, min(rows, rows * columns // weights))
    per_row = {"codes", "low_rank_up"} | ({"scales", "zeros"} if tensors["scales"].shape[0] == rows else set())
    return matrix[::step], {name: t[::step] if name in per_row else t for name, t in tensors.items()}
