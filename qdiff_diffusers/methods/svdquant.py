"""SVDQuant (arXiv 2411.05007): a float16 low-rank branch takes what a low-bit residual would represent badly.

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
from .grids import format_grids
from .low_rank import LowRank, energies, rank_bits, truncated_svd
from .scales import Quantized, ScaleSearch, quantize_groups
from .threads import block_threads, map_blocks

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


@block_threads()
def quantize(weight: Tensor, *, residual_quantize: ResidualQuantizer, rank: int, rounds: int = 3, seed: int = 0) -> Stored:
    """Quantize a matrix to a low-rank branch and a residual.

    Args:
        weight: float32 ``[rows, columns]``.
        residual_quantize: any quantizer of a matrix, ``residual -> (format, tensors)``.
        rank: of the branch, capped at the smaller dimension; 0 for none.
        rounds: most rounds of quantizing the residual and refitting the branch; the first that does not lower the error is the
            last, and not kept.
        seed: of the randomised SVD.

    Returns:
        The residual's format, and its tensors with ``low_rank_down [rank, columns]`` and ``low_rank_up [rows, rank]``, float16.
    """
    if rank < 1:
        return residual_quantize(weight)
    attempt = residual_quantize.attempt if isinstance(residual_quantize, ScalarResidual) else _attempt(residual_quantize)
    branch = truncated_svd(weight, rank, seed=seed)
    residual, _ = _without_branch(weight, branch, weight)
    target = torch.empty_like(weight)
    best: tuple[float, Attempt, LowRank] | None = None
    for _ in range(max(1, rounds)):
        tried = attempt(residual)
        torch.sub(weight, tried.dense, out=target)
        branch = truncated_svd(target, rank, start=branch.subspace, seed=seed)
        residual, error = _without_branch(weight, branch, tried.dense)
        if best is not None and error >= best[0]:
            break
        best = error, tried, branch
    assert best is not None
    weight_format, tensors = best[1].store()
    return weight_format, tensors | {"low_rank_down": best[2].down, "low_rank_up": best[2].up}


def _without_branch(weight: Tensor, branch: LowRank, stored: Tensor) -> tuple[Tensor, float]:
    """``weight - branch``, and its squared distance from ``stored``."""
    residual = torch.empty_like(weight)
    up, down = branch.up.float(), branch.down.float()

    def work(part: slice) -> float:
        rows = torch.addmm(weight[part], up[part], down, alpha=-1, out=residual[part])
        return float((rows - stored[part]).square_().sum())

    return residual, sum(map_blocks(work, weight))


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
        tensor_scale = isinstance(fmt, MinifloatFormat) and bool(fmt.tensor_scale)
        return quantize_groups(residual, format_grids(fmt), fmt.group_size, fmt.scale_dtype, tensor_scale, self.search, with_dense)

    def _store(self, found: Quantized) -> Stored:
        if isinstance(self.format, IntegerFormat):
            return self.format, self.format.pack(found.codes, found.scales)
        return self.format, self.format.pack(found.codes, found.scales, found.tensor_scale)


@block_threads()
def quantize_config(
    weight: Tensor, config: SVDQuantConfig, seed: int = 0, residual_quantize: ResidualQuantizer | None = None
) -> Stored:
    """Quantize ``weight [rows, columns]`` as a config asks. Without format and rank, the weight's own spectrum decides.

    ``residual_quantize`` is for formats that this module does not know.
    """
    bits = int(config.bits or 4)
    group_size, rank = config.group_size, config.rank
    if config.branch_bits is not None:
        rank = rank_within(weight.shape, config.branch_bits)
    elif config.weight_format is None and rank is None and group_size is None:
        group_size, rank = plan(weight, bits, seed=seed)
    rank = default_rank(weight.shape) if rank is None else rank
    residual = residual_quantize or residual_quantizer(bits, config.weight_format, group_size)
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
    return max(1, rank_within(shape, budget))


def rank_within(shape: tuple[int, int] | torch.Size, budget: float) -> int:
    """The largest rank whose factors cost at most ``budget`` bits per weight of a ``[rows, columns]`` weight."""
    return min(*shape, int(budget / rank_bits(shape) + 1e-9))


def plan(weight: Tensor, bits: int, *, overhead: float = OVERHEAD, min_rank: int = 1, seed: int = 0) -> Plan:
    """Divide ``overhead`` bits per weight between scales and branch so that the predicted error is lowest.

    The error of a residual is proportional to its energy, and what a branch removes is read off the leading singular values. A
    layer of flat spectrum gets smaller groups, one with a few strong directions more rank.

    Args:
        weight: float32 ``[rows, columns]``.
        bits: of the residual, a key of ``TRADES``.
        overhead: bits per weight to spend.
        min_rank: smallest rank, if ``overhead`` has room for it; 0 lets flat layers do without a branch.
        seed: of the randomised SVD.
    """
    trades = TRADES[bits]
    ranks = {group: int((overhead - SCALE_BITS / group) / rank_bits(weight.shape) + 1e-9) for group in trades}
    ranks = {group: min(rank, *weight.shape) for group, rank in ranks.items() if rank >= min_rank} or {max(trades): min_rank}
    kept = 1 - torch.cat([torch.zeros(1, dtype=torch.float32), energies(weight, max(1, *ranks.values()), seed).cpu().cumsum(0)])
    best = min(ranks, key=lambda group: trades[group] * float(kept[ranks[group]]))
    return Plan(best, ranks[best])
