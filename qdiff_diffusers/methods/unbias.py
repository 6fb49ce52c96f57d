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
from .threads import block_threads, map_blocks

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
    wanted, found = _projections(matrix, weight_format, tensors_seen)
    gain = wanted / found if per_row else wanted.sum() / found.sum()
    gain = torch.where(gain.isfinite(), gain, 1.0).clamp(1 / MAX_GAIN, MAX_GAIN)
    if "tensor_scale" in tensors:
        return tensors | {"tensor_scale": short_scale(tensors["tensor_scale"] * gain)}
    if scales.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return tensors  # E8M0 scales are powers of two: nothing to adjust
    return tensors | {"scales": (scales.float() * (gain[:, None] if per_row else gain)).to(scales.dtype)}


@block_threads()
def _projections(matrix: Tensor, weight_format: WeightFormat, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """For each row its product with what the format stands for, the row less its branch, and with what the format holds."""
    names = row_names(matrix, tensors)

    def work(part: slice) -> Tensor:
        rows, own = matrix[part], {name: t[part] if name in names else t for name, t in tensors.items()}
        wanted = rows.square().sum(1)
        if "low_rank_down" in tensors:
            wanted -= ((rows @ own["low_rank_down"].float().T) * own["low_rank_up"].float()).sum(1)
        return torch.stack([wanted, (weight_format.dequantize(own, rows.shape[1]) * rows).sum(1)])

    wanted, found = torch.cat(map_blocks(work, matrix), 1)
    return wanted, found


def row_names(matrix: Tensor, tensors: dict[str, Tensor]) -> set[str]:
    """Names of the tensors of a packed ``matrix [rows, columns]`` that have an entry for each of its rows."""
    return {"codes", "low_rank_up"} | ({"scales", "zeros"} if tensors["scales"].shape[0] == len(matrix) else set())


def sample_rows(matrix: Tensor, tensors: dict[str, Tensor], weights: int = 1 << 18) -> tuple[Tensor, dict[str, Tensor]]:
    """Evenly spaced rows, about ``weights`` numbers in all, of a matrix and of its packed form."""
    rows, columns = matrix.shape
    step = max(1, min(rows, rows * columns // weights))
    per_row = row_names(matrix, tensors)
    return matrix[::step], {name: t[::step] if name in per_row else t for name, t in tensors.items()}
