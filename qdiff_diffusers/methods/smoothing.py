"""SVDQuant's smoothing (arXiv 2411.05007): inputs are divided by a vector and the weight is multiplied by it, so that outliers of
the inputs move into the weight, where the low-rank branch takes them up.

The vector is ``max|x_i|^a / max|w_i|^b`` for input channel i. The released code's 39 pairs (a, b) are tried with the branch, the
quantized residual and the quantized inputs in the loop, and the one whose outputs come closest is kept. The first pair is (0, 0),
no smoothing at all, so on the samples that are looked at the result is never worse. Others it can hurt, see docs/calibration.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..formats import WeightFormat, rotate_matrix
from ..formats.transform import smooth_matrix
from .inputs import treat

STEPS = [i / 20 for i in range(1, 20)]
PAIRS = [(0.0, 0.0), *((a, 0.0) for a in STEPS), *((a, 1 - a) for a in STEPS)]
ROWS = 512  # of samples on which outputs are compared
LIMIT = 2.0**12  # of a smoothing factor, well inside float16
SMALLEST = 1e-4  # of a channel's largest magnitude, relative to that of all: dead channels are not blown up


def search_smoothing(
    matrix: Tensor,
    rows: Tensor,
    channels: int,
    rotation: int,
    activations: str,
    quantize: Callable[[Tensor], tuple[WeightFormat, dict[str, Tensor]]],
) -> Tensor | None:
    """The smoothing vector of a layer, or ``None`` if it does best without.

    Args:
        matrix: float32 ``[out, taps * channels]``, the dense weight.
        rows: float32 ``[n, taps * channels]``, samples of what it is multiplied by.
        channels: of the input.
        rotation: Hadamard block of the smoothed inputs.
        activations: how they are quantized, or "none".
        quantize: what makes a format and its tensors, low-rank branch included, of a smoothed and rotated matrix.

    Returns:
        float32 ``[channels]`` of numbers that float16 holds exactly.
    """
    rows = rows[:: max(1, len(rows) // ROWS)]
    wanted = rows @ matrix.T
    of_inputs = _largest(rows, channels)
    of_weights = _largest(matrix, channels)
    best: tuple[float, Tensor | None] = (torch.inf, None)
    for a, b in PAIRS:
        smooth = None if a == b == 0 else _factors(of_inputs, of_weights, a, b)
        working = matrix if smooth is None else smooth_matrix(matrix, smooth)
        weight_format, tensors = quantize(rotate_matrix(working, channels, rotation))
        seen = treat(rows, channels, smooth=smooth, rotation=rotation, activations=activations)
        found = seen @ weight_format.dequantize(tensors, matrix.shape[1]).T
        if "low_rank_down" in tensors:
            exact = treat(rows, channels, smooth=smooth, rotation=rotation)
            found += exact @ tensors["low_rank_down"].float().T @ tensors["low_rank_up"].float().T
        error = float((found - wanted).square().sum())
        if error < best[0]:
            best = error, smooth
    return best[1]


def _largest(matrix: Tensor, channels: int) -> Tensor:
    largest = matrix.abs().amax(0).view(-1, channels).amax(0)
    return largest.clamp_min(max(float(largest.max()) * SMALLEST, 1e-12))


def _factors(of_inputs: Tensor, of_weights: Tensor, a: float, b: float) -> Tensor:
    """Their geometric mean is 1: a common factor changes nothing but the range that float16 has to cover."""
    logs = a * of_inputs.log2() - b * of_weights.log2()
    return (logs - logs.mean()).exp2().clamp(1 / LIMIT, LIMIT).half().float()
