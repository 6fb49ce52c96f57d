"""SVDQuant (arXiv 2411.05007), data-free: a float16 low-rank branch takes what a low-bit residual would represent badly.

``W ~ up @ down + Q``, found by alternation: quantize ``W - up @ down``, then fit the branch to ``W - Q`` by SVD, and so on; the
best pair met is kept. The branch may be found in a rotated space: for an orthonormal H, ``SVD(W H)`` is ``SVD(W)`` with ``down H``
in place of ``down``, so turning ``down`` back gives a branch that sees the raw input.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..formats import GroupSize, IntegerFormat, MinifloatFormat, WeightFormat
from . import fp
from .grids import encoding_grid, integer_grid
from .low_rank import LowRank, energies, rank_bits, truncated_svd
from .scales import Quantized, ScaleSearch, quantize_groups

if TYPE_CHECKING:
    from ..config import SVDQuantConfig

Stored = tuple[WeightFormat, dict[str, Tensor]]
ResidualQuantizer = Callable[[Tensor], Stored]

OVERHEAD = 0.5  # bits per weight for scales and branch together, what group-64 round-to-nearest spends on its scales
RANK_BITS = 0.25  # bits per weight for the branch where the residual format is given: rank 24 at 3072 x 3072

# Error of longer groups relative to groups of 16: the price of cheaper scales, measured on Gaussian and on trained weights.
TRADES = {
    2: {16: 1.0, 32: 1.21, 64: 1.36},
    3: {16: 1.0, 32: 1.27, 64: 1.49},
    4: {16: 1.0, 32: 1.32, 64: 1.60},
    8: {16: 1.0, 32: 1.32, 64: 1.62},
}
SCALE_BITS = 8  # an E4M3 scale per group


class Plan(NamedTuple):
    """Where the bits beyond the codes go."""

    group_size: GroupSize
    rank: int


def quantize(weight: Tensor, *, residual_quantize: ResidualQuantizer, rank: int, rounds: int = 3, seed: int = 0) -> Stored:
    """Quantize a matrix to a low-rank branch and a residual.

    Args:
        weight: float32 ``[rows, columns]``.
        residual_quantize: any quantizer of a matrix, ``residual -> (format, tensors)``.
        rank: of the branch, capped at the smaller dimension; 0 for none.
        rounds: of quantizing the residual and refitting the branch. The error never rises with more.
        seed: of the randomised SVD.

    Returns:
        The residual's format, and its tensors with ``low_rank_down [rank, columns]`` and ``low_rank_up [rows, rank]``, float16.
    """
    if rank < 1:
        return residual_quantize(weight)
    attempt = residual_quantize.attempt if isinstance(residual_quantize, ScalarResidual) else _attempt(residual_quantize)
    branch = truncated_svd(weight, rank, seed=seed)
    residual = torch.addmm(weight, branch.up.float(), branch.down.float(), alpha=-1)
    difference = torch.empty_like(weight)
    best: tuple[float, Attempt, LowRank] | None = None
    for _ in range(max(1, rounds)):
        tried = attempt(residual)
        branch = truncated_svd(torch.sub(weight, tried.dense, out=difference), rank, start=branch.subspace, seed=seed)
        torch.addmm(weight, branch.up.float(), branch.down.float(), alpha=-1, out=residual)
        torch.sub(residual, tried.dense, out=difference)
        error = float(difference.view(-1).dot(difference.view(-1)))
        if best is None or error < best[0]:
            best = error, tried, branch
    assert best is not None
    weight_format, tensors = best[1].store()
    return weight_format, tensors | {"low_rank_down": best[2].down, "low_rank_up": best[2].up}


class Attempt(NamedTuple):
    """A quantized residual: its values ``[rows, columns]``, and a function that packs it."""

    dense: Tensor
    store: Callable[[], Stored]


def _attempt(residual_quantize: ResidualQuantizer) -> Callable[[Tensor], Attempt]:
    def attempt(residual: Tensor) -> Attempt:
        weight_format, tensors = residual_quantize(residual)
        return Attempt(weight_format.dequantize(tensors, residual.shape[1]), lambda: (weight_format, tensors))

    return attempt


class ScalarResidual:
    """A residual quantizer for integers and minifloats, which packs only the round that is kept."""

    def __init__(self, weight_format: IntegerFormat | MinifloatFormat, search: ScaleSearch | None = None) -> None:
        self.format = weight_format
        self.search = search

    def __call__(self, residual: Tensor) -> Stored:
        return self._store(self._quantize(residual, with_dense=False))

    def attempt(self, residual: Tensor) -> Attempt:
        found = self._quantize(residual, with_dense=True)
        assert found.dense is not None
        return Attempt(found.dense, lambda: self._store(found))

    def _quantize(self, residual: Tensor, with_dense: bool) -> Quantized:
        fmt = self.format
        if isinstance(fmt, IntegerFormat):
            # A negative scale lends the code -2**(bits-1) to a positive peak.
            grids, tensor_scale = [integer_grid(fmt.bits)], False
        else:
            grids, tensor_scale = [encoding_grid(encoding) for encoding in fmt.encodings], fmt.tensor_scale
        return quantize_groups(residual, grids, fmt.group_size, fmt.scale_dtype, tensor_scale, self.search, with_dense)

    def _store(self, found: Quantized) -> Stored:
        if isinstance(self.format, IntegerFormat):
            return self.format, self.format.pack(found.codes, found.scales)
        return self.format, self.format.pack(found.codes, found.scales, found.tensor_scale)


def quantize_config(weight: Tensor, config: SVDQuantConfig, seed: int = 0) -> Stored:
    """Quantize ``weight [rows, columns]`` as a config asks. Without format and rank, the weight's own spectrum decides."""
    bits = int(config.bits or 4)
    group_size, rank = config.group_size, config.rank
    if config.weight_format is None and rank is None and group_size is None:
        group_size, rank = plan(weight, bits, seed=seed)
    rank = default_rank(weight.shape) if rank is None else rank
    residual = residual_quantizer(bits, config.weight_format, group_size)
    return quantize(weight, residual_quantize=residual, rank=rank, rounds=config.rounds, seed=seed)


def residual_quantizer(
    bits: int = 4, weight_format: str | None = None, group_size: GroupSize | None = None, search: ScaleSearch | None = None
) -> ScalarResidual:
    """A scalar quantizer for the residual.

    Args:
        bits: 2 to 8, if there is no ``weight_format``.
        weight_format: "int2" .. "int8" (symmetric, groups of 64, float16 scales), or what ``fp.formats_for`` takes.
        group_size: columns per scale; by default the format's.
        search: scale candidates.
    """
    if weight_format is not None and weight_format.startswith("int"):
        return ScalarResidual(IntegerFormat(int(weight_format[3:]), 64 if group_size is None else group_size), search)
    return ScalarResidual(fp.formats_for(bits, weight_format, group_size)[0], search)


def default_rank(shape: tuple[int, int] | torch.Size, budget: float = RANK_BITS) -> int:
    """The rank whose factors cost ``budget`` bits per weight of a ``[rows, columns]`` weight, at least 1."""
    return max(1, int(budget / rank_bits(shape)))


def plan(weight: Tensor, bits: int, *, overhead: float = OVERHEAD, min_rank: int = 0, seed: int = 0) -> Plan:
    """Divide ``overhead`` bits per weight between scales and branch so that the predicted error is lowest.

    The error of a residual is proportional to its energy, and what a branch removes is read off the leading singular values. A
    layer of flat spectrum gets small groups and no branch, one with a few strong directions the opposite.
    """
    trades = TRADES[bits]
    cost = rank_bits(weight.shape)
    ranks = {group: max(min_rank, int((overhead - SCALE_BITS / group) / cost + 1e-9)) for group in trades}
    kept = 1 - torch.cat([torch.zeros(1), energies(weight, max(1, *ranks.values()), seed).cpu().cumsum(0)])
    best = min(trades, key=lambda group: trades[group] * float(kept[min(ranks[group], len(kept) - 1)]))
    return Plan(best, min(ranks[best], *weight.shape))
