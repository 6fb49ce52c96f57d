"""SVDQuant (arXiv 2411.05007): a float16 low-rank branch takes what a low-bit residual would represent badly.

``W ~ up @ down + Q``, found by alternation: quantize ``W - up @ down``, then fit the branch to ``W - Q`` by SVD, and so on; the
best pair met is kept. The branch may be found in a rotated space: for an orthonormal H, ``SVD(W H)`` is ``SVD(W)`` with ``down H``
in place of ``down``, so turning ``down`` back gives a branch that sees the raw input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..formats import IntegerFormat, MinifloatFormat, WeightFormat
from ..formats.spec import MAX_RANK
from . import fp
from .base import METHODS, Method, Option, Smoother, Stored, method_of, register_method
from .config import REGULAR, GroupSize, QDiffConfig
from .fields import Between
from .grids import format_grids
from .low_rank import FACTOR_BITS, LowRank, energies, rank_bits, truncated_svd
from .rtn import RTNConfig
from .scales import Quantized, ScaleSearch, pack_groups, quantize_groups
from .threads import block_threads, map_blocks

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

DEFAULT_BITS = 4
CODEBOOKS = ("aq", "vq")  # methods that may quantize the residual
INTEGERS = {f"int{bits}": bits for bits in range(2, 9)}
INTEGER_GROUP = 64
BRANCH_BITS = FACTOR_BITS  # most bits per weight for the branch
RANK_SHARES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # of a mean rank, what a layer can have


@dataclass(repr=False)
class SVDQuantConfig(QDiffConfig):
    """A 16-bit low-rank branch beside a low-bit residual (SVDQuant).

    Args:
        bits: of the residual, 2, 3, 4 or 8; the format follows unless ``weight_format`` is given.
        weight_format: of the residual: "int2" to "int8", "nvfp4", an encoding such as "e2m1", ...; "aq" or "vq" for codebooks of
            ``bits``.
        group_size: columns of the residual that share a scale, "row" or "tensor"; codebooks have one scale per row.
        rank: rank of the branch, 0 for none; ``None`` scales it with the layer (24 at 3072 x 3072).
        branch_bits: instead of ``rank``, what the branch may cost in bits per weight: each layer's rank follows from its shape, and
            with ``Calibration(mixed=True)`` from what rank is worth there, ``branch_bits`` being the mean.
        rounds: most rounds of alternating SVD and residual quantization; the first that does not lower the error ends them.
        smoothing: divide the inputs by a vector of which 39 are tried on each layer. Needs a calibration; worth it or not, see
            docs/calibration.md.
        adaln_w4a16: store the modulation of adaptive layer norms, which sees one token per image, as plain INT4 in groups of 64
            without a branch, and leave its inputs in 16 bits, as the SVDQuant authors' FLUX does and Nunchaku reads it.
    """

    weight_format: str | None = None
    group_size: GroupSize | None = None
    rank: Annotated[int, Between(0, MAX_RANK)] | None = None
    branch_bits: Annotated[float, Between(0, BRANCH_BITS)] | None = None
    rounds: Annotated[int, Between(1, 1000)] = 3
    smoothing: bool = False
    adaln_w4a16: bool = False

    method_name: ClassVar[str] = "svdquant"
    bit_choices: ClassVar[tuple[float, ...]] = (2, 3, 4, 8)
    activation_choices: ClassVar[tuple[str, ...]] = ("int8", "fp8", "int4", "nvfp4")

    @property
    def bits_are_free(self) -> bool:
        return self.weight_format in (None, *CODEBOOKS)

    @property
    def widths(self) -> tuple[float, ...]:
        inner = self.codebooks()
        return tuple(bits for bits in super().widths if inner is None or bits in inner.bit_choices)

    @property
    def needs_samples(self) -> bool:
        return super().needs_samples or self.smoothing

    def alternatives(self) -> list[dict[str, Any]]:
        """Widths of the residual; or, where ``branch_bits`` is given, ranks."""
        if self.branch_bits is None:
            return super().alternatives()
        return [{"branch_bits": share * self.branch_bits} for share in RANK_SHARES if share * self.branch_bits <= BRANCH_BITS]

    def moves_by(self, assignments: str) -> bool:
        inner = self.codebooks()
        return super().moves_by(assignments) if inner is None else inner.moves_by(assignments)

    def codebooks(self) -> QDiffConfig | None:
        """The method of a residual in codebooks, if ``weight_format`` asks for one."""
        if self.weight_format not in CODEBOOKS:
            return None
        return METHODS[self.weight_format].config(bits=self.bits)  # type: ignore[call-arg]

    def modulation(self) -> QDiffConfig:
        """What ``adaln_w4a16`` makes of the linear layers inside adaptive norms."""
        return RTNConfig(bits=4, group_size=64, seed=self.seed)  # type: ignore[call-arg]


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
        _difference(weight, tried.dense, target)
        branch = truncated_svd(target, rank, start=branch.subspace, seed=seed)
        residual, error = _without_branch(weight, branch, tried.dense)
        if best is not None and error >= best[0]:
            break
        best = error, tried, branch
    assert best is not None
    weight_format, tensors = best[1].store()
    return weight_format, tensors | {"low_rank_down": best[2].down, "low_rank_up": best[2].up}


def _difference(weight: Tensor, stored: Tensor, out: Tensor) -> None:
    map_blocks(lambda part: torch.sub(weight[part], stored[part], out=out[part]), weight)


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
        return self.format, pack_groups(self.format, found)


@block_threads()
def quantize_config(
    weight: Tensor, config: SVDQuantConfig, seed: int = 0, residual_quantize: ResidualQuantizer | None = None
) -> Stored:
    """Quantize ``weight [rows, columns]`` as a config asks. Without format and rank, the weight's own spectrum decides.

    ``residual_quantize`` is for formats that this module does not know.
    """
    bits, group_size = int(config.bits or DEFAULT_BITS), config.group_size
    if _is_planned(config):
        group_size, rank = plan(weight, bits, seed=seed)
    else:
        rank = _rank(config, weight.shape)
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
    return ScalarResidual(residual_format(bits, weight_format, group_size), search)


def residual_format(
    bits: int = DEFAULT_BITS, weight_format: str | None = None, group_size: GroupSize | None = None
) -> IntegerFormat | MinifloatFormat:
    """Format of a residual; arguments as for :func:`residual_quantizer`.

    Raises:
        ValueError: it is unknown, or the group size does not go with it.
    """
    if weight_format in INTEGERS:
        return IntegerFormat(INTEGERS[weight_format], INTEGER_GROUP if group_size is None else group_size)
    if weight_format == fp.ANY:
        raise ValueError(f"weight_format {fp.ANY!r} compares encodings, which is for FPConfig; give one, such as 'e2m1'")
    try:
        return fp.formats_for(bits, weight_format, group_size)[0]
    except ValueError as error:
        if weight_format is None or not str(error).startswith("weight_format must be"):
            raise
        known = ", ".join(map(repr, (*INTEGERS, *CODEBOOKS, *fp.NAMED_FORMATS)))
        raise ValueError(f"weight_format must be {known}, or one or two encodings such as 'e2m1', not {weight_format!r}") from error


def _is_planned(config: SVDQuantConfig) -> bool:
    """Whether groups and rank follow from the weight's own spectrum: without format, group size and rank."""
    return config.weight_format is config.group_size is config.rank is config.branch_bits is None


def _rank(config: SVDQuantConfig, shape: tuple[int, int] | torch.Size) -> int:
    """Rank of the branch beside a ``[rows, columns]`` weight that is not planned."""
    if config.branch_bits is not None:
        return rank_within(shape, config.branch_bits)
    return default_rank(shape) if config.rank is None else min(config.rank, *shape)


def default_rank(shape: tuple[int, int] | torch.Size, budget: float = RANK_BITS) -> int:
    """The rank whose factors cost ``budget`` bits per weight of a ``[rows, columns]`` weight, at least 1."""
    return max(1, rank_within(shape, budget))


def rank_within(shape: tuple[int, int] | torch.Size, budget: float) -> int:
    """The largest rank whose factors cost at most ``budget`` bits per weight of a ``[rows, columns]`` weight."""
    return min(*shape, int(budget / rank_bits(shape) + 1e-9))


def affordable_ranks(
    shape: tuple[int, int] | torch.Size, bits: int, overhead: float = OVERHEAD, min_rank: int = 1
) -> dict[int, int]:
    """Group sizes that :func:`plan` compares, each with the rank that ``overhead`` bits per weight leave beside its scales."""
    ranks = {group: int((overhead - SCALE_BITS / group) / rank_bits(shape) + 1e-9) for group in TRADES[bits]}
    return {group: min(rank, *shape) for group, rank in ranks.items() if rank >= min_rank} or {max(TRADES[bits]): min_rank}


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
    trades, ranks = TRADES[bits], affordable_ranks(weight.shape, bits, overhead, min_rank)
    kept = 1 - torch.cat([torch.zeros(1, dtype=torch.float32), energies(weight, max(1, *ranks.values()), seed).cpu().cumsum(0)])
    best = min(ranks, key=lambda group: trades[group] * float(kept[ranks[group]]))
    return Plan(best, ranks[best])


@register_method
class SVDQuant(Method[SVDQuantConfig]):
    config = SVDQuantConfig
    label = "SVDQuant"
    title = "SVDQuant, a low-rank branch beside a low-bit residual"
    summary = "a 16-bit low-rank branch beside a low-bit residual"
    description = """\
A 16-bit low-rank branch carries each weight's dominant directions; the residual is quantized to few bits. Branch and residual are
refined in turn."""
    limits = """\
- The low-rank branch is computed in 16 bits beside the packed weights; without kernels for your device it costs time."""
    citation = """\
@article{li2024svdquant,
  title={SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models},
  author={Li, Muyang and Lin, Yujun and Zhang, Zhekai and Cai, Tianle and Li, Xiuyu and Guo, Junxian and Xie, Enze and Meng, Chenlin and Zhu, Jun-Yan and Han, Song},
  journal={arXiv preprint arXiv:2411.05007},
  year={2024}
}"""  # noqa: E501
    colour = "#3b82f6"
    suggested_bits = DEFAULT_BITS
    options = (Option("rank", 0, 0, 512, "Rank of the 16-bit low-rank branch. 0: scaled with each layer.", unset=0),)
    few_rows_suffice = False  # a branch fits few rows too well

    def check(self, config: SVDQuantConfig) -> None:
        if config.smoothing and config.rotation == REGULAR:
            raise ValueError(f"smoothing goes without rotation {REGULAR!r}, which is made by a smoothing vector of signs")
        if config.branch_bits is not None and config.rank is not None:
            raise ValueError("branch_bits goes without rank, which it replaces")
        if config.codebooks() is not None:  # raises if there are none of these bits
            if config.group_size is not None:
                raise ValueError(
                    f"group_size goes with scalar formats; weight_format {config.weight_format!r} has one scale per row"
                )
        elif config.weight_format is not None:
            fixed = residual_format(weight_format=config.weight_format, group_size=config.group_size)
            fp.check_width(config.bits, fixed.bits, config.weight_format)

    def formats(self, config: SVDQuantConfig, shape: tuple[int, int]) -> list[WeightFormat]:
        if (inner := config.codebooks()) is not None:
            return method_of(inner).formats(inner, shape)
        bits = int(config.bits or DEFAULT_BITS)
        groups = list(TRADES[bits]) if _is_planned(config) else [config.group_size]
        return [residual_format(bits, config.weight_format, group) for group in groups]

    def quantize(self, matrix: Tensor, config: SVDQuantConfig, seed: int) -> Stored:
        if (inner := config.codebooks()) is None:
            return quantize_config(matrix, config, seed)
        return quantize_config(matrix, config, seed, lambda residual: method_of(inner).quantize(residual, inner, seed))

    def rank(self, config: SVDQuantConfig, shape: tuple[int, int]) -> int:
        rank = 0 if _is_planned(config) else _rank(config, shape)
        if rank > MAX_RANK:
            raise ValueError(f"branch_bits {config.branch_bits} means rank {rank} here, and {MAX_RANK} is the highest")
        return rank

    def layouts(self, config: SVDQuantConfig, shape: tuple[int, int]) -> list[tuple[WeightFormat, int]]:
        if not _is_planned(config):
            return super().layouts(config, shape)
        bits = int(config.bits or DEFAULT_BITS)
        return [(residual_format(bits, None, group), rank) for group, rank in affordable_ranks(shape, bits).items()]

    def operations(self, config: SVDQuantConfig, shape: tuple[int, int]) -> float:
        inner = config.codebooks()
        return 0.0 if inner is None else config.rounds * method_of(inner).operations(inner, shape)

    def inner(self, config: SVDQuantConfig) -> QDiffConfig | None:
        return config.codebooks()

    def smoother(self, config: SVDQuantConfig, seed: int) -> Smoother | None:
        if not config.smoothing:
            return None
        once = replace(config, rounds=1)
        return lambda matrix: quantize_config(matrix, once, seed)

    def for_module(self, config: SVDQuantConfig, model: nn.Module, name: str) -> QDiffConfig:
        return config.modulation() if config.adaln_w4a16 and _is_modulation(model, name) else config


def _is_modulation(model: nn.Module, name: str) -> bool:
    """Whether a layer gives an adaptive norm's scales and shifts: diffusers calls them AdaLayerNorm... and AdaGroupNorm."""
    parent = model.get_submodule(name.rpartition(".")[0])
    return type(parent).__name__.removeprefix("SD35").startswith(("AdaLayerNorm", "AdaGroupNorm"))
