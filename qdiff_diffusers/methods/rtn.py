"""Plain round-to-nearest between each group's minimum and maximum: the baseline that every method is shown beside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import GroupSize, IntegerFormat, group_columns


def quantize(weight: Tensor, *, bits: int, group_size: GroupSize = 64) -> tuple[IntegerFormat, dict[str, Tensor]]:
    """Asymmetric integers, float16 scale and zero per group, no search.

    Args:
        weight: float32 ``[rows, columns]``.
        bits: 2 to 8.
        group_size: columns per scale, "row" or "tensor"; the last group of a row may be short.

    Returns:
        The format and its tensors, ``w = scale * code + zero`` with ``zero`` the group's minimum.
    """
    weight_format = IntegerFormat(bits, group_size, symmetric=False)
    rows, columns = weight.shape
    groups = weight.reshape(1, 1, -1) if group_size == "tensor" else _grouped(weight, group_columns(group_size, columns))
    low, high = groups.amin(-1), groups.amax(-1)
    limit = torch.finfo(torch.float16).max
    zeros = low.clamp(-limit, limit).to(torch.float16)
    scales = ((high - low) / ((1 << bits) - 1)).clamp_max(limit).to(torch.float16)
    inverse = scales.float().clamp_min(1e-30).reciprocal()
    codes = (groups - zeros.float()[..., None]).mul_(inverse[..., None]).round_().clamp_(0, (1 << bits) - 1)
    codes = codes.to(torch.uint8).reshape(rows, -1)[:, :columns]
    return weight_format, weight_format.pack(codes, scales, zeros)


def _grouped(weight: Tensor, group: int) -> Tensor:
    """``[rows, groups, group]``; a short last group repeats its last column, which leaves its minimum and maximum alone."""
    missing = -weight.shape[1] % group
    return (F.pad(weight[None], (0, missing), mode="replicate")[0] if missing else weight).unflatten(1, (-1, group))
