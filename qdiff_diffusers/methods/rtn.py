"""Plain round-to-nearest between each group's minimum and maximum: the baseline that every method is shown beside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import IntegerFormat, WeightFormat, group_columns
from .base import Method, Stored, register_method
from .config import GroupSize, QDiffConfig
from .threads import block_threads, map_blocks

DEFAULT_BITS = 8


@dataclass(repr=False)
class RTNConfig(QDiffConfig):
    """Plain asymmetric round-to-nearest in groups: the baseline, and a cheap 8-bit choice for ``overrides``."""

    unbiased: bool = False
    group_size: GroupSize = 64

    method_name: ClassVar[str] = "rtn"
    bit_choices: ClassVar[tuple[float, ...]] = (1, 2, 3, 4, 5, 6, 7, 8)


@block_threads()
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
    if group_size == "tensor":
        return weight_format, _quantize(weight, weight_format)
    parts = map_blocks(lambda part: _quantize(weight[part], weight_format), weight)
    return weight_format, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _quantize(weight: Tensor, weight_format: IntegerFormat) -> dict[str, Tensor]:
    """The format's tensors of some rows, or of a whole matrix that shares a scale."""
    bits, group_size = weight_format.bits, weight_format.group_size
    rows, columns = weight.shape
    groups = weight.reshape(1, 1, -1) if group_size == "tensor" else _grouped(weight, group_columns(group_size, columns))
    low, high = groups.amin(-1), groups.amax(-1)
    limit = torch.finfo(torch.float16).max
    zeros = low.clamp(-limit, limit).to(torch.float16)
    scales = ((high - low) / ((1 << bits) - 1)).clamp_max(limit).to(torch.float16)
    inverse = scales.float().clamp_min(1e-30).reciprocal()
    codes = (groups - zeros.float()[..., None]).mul_(inverse[..., None]).round_().clamp_(0, (1 << bits) - 1)
    codes = codes.to(torch.uint8).reshape(rows, -1)[:, :columns]
    return weight_format.pack(codes, scales, zeros)


def _grouped(weight: Tensor, group: int) -> Tensor:
    """``[rows, groups, group]``; a short last group repeats its last column, which leaves its minimum and maximum alone."""
    missing = -weight.shape[1] % group
    return (F.pad(weight[None], (0, missing), mode="replicate")[0] if missing else weight).unflatten(1, (-1, group))


@register_method
class RTN(Method[RTNConfig]):
    config = RTNConfig
    label = "Round-to-nearest"
    title = "round-to-nearest"
    summary = "plain asymmetric integers in groups of 64 weights: the baseline"
    description = "Plain asymmetric round-to-nearest in groups."
    limits = """\
- This is the baseline that every other method is measured against. At 4 bits or fewer one of them is nearly always closer."""
    citation = """\
@software{qdiff,
  title={qdiff-diffusers: diffusion models at 2 to 8 bits},
  year={2026}
}"""
    colour = "#8b949e"
    is_baseline = True
    suggested_bits = DEFAULT_BITS

    def formats(self, config: RTNConfig, shape: tuple[int, int]) -> list[WeightFormat]:
        return [IntegerFormat(int(config.bits or DEFAULT_BITS), config.group_size, symmetric=False)]

    def quantize(self, matrix: Tensor, config: RTNConfig, seed: int) -> Stored:
        return quantize(matrix, bits=int(config.bits or DEFAULT_BITS), group_size=config.group_size)
