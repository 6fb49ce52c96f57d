"""Least-squares search of the scales of a scalar grid, one per tensor, row or group.

For every group a ladder of candidate scales around "largest weight on the largest level" is tried, each rounded to its stored
dtype *before* the codes are chosen, and the one with the smallest squared error is kept (the idea of FP8 quantization's clip
search and of NVFP4 scale sweeps). For scales stored as floats a closed-form step follows: given codes q, the best scale is
``<x, q> / <q, q>``.

In torch everything is element-wise work in place on blocks that stay in cache: one candidate costs about ten passes. Compiled, a
fifth of a nanosecond per weight (``scales_numba.py``); what is tried, and what wins, is the same.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..formats import GroupSize, IntegerFormat, MinifloatFormat, group_columns
from .clips import ClipSearch, search_clips
from .compiled import loops
from .grids import Grid
from .threads import block_threads, map_blocks

TENSOR_SAMPLE = 1 << 18  # weights on which a per-tensor scale is searched
ABOVE_ABSMAX = 1.75  # the highest step of the ladders in E4M3
TINY = 1e-18  # stands in for a scale that its dtype rounded to zero


class ScaleSearch(NamedTuple):
    """How hard to look: scales at ``low .. high`` ladder steps from the absmax scale, then ``refinements`` least-squares steps.

    A ladder step is a factor ``2**(1/8)``, one number of an E4M3 scale, or one power of two of an E8M0 scale.
    """

    low: int
    high: int
    refinements: int = 0


ABSMAX = ScaleSearch(0, 0)
Search = ScaleSearch | ClipSearch


def default_search(grid: Grid, group: int, scale_dtype: str) -> ScaleSearch:
    """Candidates that come within 1% of the error of a search without limits, for groups of ``group`` weights.

    Measured on Gaussian, Student-t and trained weights. A coarse grid gains from clipping a group's peak, the more so the longer
    the group; a floating one from an unused top binade, whose steps are twice as wide (as in "four over six" for NVFP4).
    """
    if scale_dtype == "e8m0":
        return ScaleSearch(-1, 1)
    clip = {2: 3, 3: 2, 4: 1, 5: 1}.get(grid.bits, 0)
    if group > 128:
        clip = {2: 14, 3: 12, 4: 12, 5: 8, 6: 6}.get(grid.bits, 4)
    if group > 1 << 16:
        clip += 12
    return ScaleSearch(-clip, 3 if grid.mantissa_bits is None else 5, refinements=2)


class Quantized(NamedTuple):
    """Codes and stored scales of a matrix.

    Attributes:
        codes: uint8 or int8 ``[rows, columns]``, as ``Grid.codes`` gives them.
        scales: ``[rows or 1, groups]``: float32 values that the storage dtype holds exactly; for E8M0 the exponent bytes, int8.
        tensor_scale: float32 ``[1]`` that multiplies all scales, or ``None``.
        error: summed squared error of the stored weight.
        dense: float32 ``[rows, columns]``, the stored weight, if it was asked for.
    """

    codes: Tensor
    scales: Tensor
    tensor_scale: Tensor | None
    error: float
    dense: Tensor | None = None


class ScaleStore:
    """Rounds scales to what is stored. ``unit`` multiplies every stored value (NVFP4's second level)."""

    def __init__(self, dtype: str, unit: float = 1.0) -> None:
        self.dtype = dtype
        self.unit = unit

    @property
    def continuous(self) -> bool:
        """Whether stored scales are fine enough for a closed-form step to help."""
        return self.dtype in ("float16", "bfloat16", "float32")

    def round(self, scale: Tensor) -> Tensor:
        """Nearest stored value (times ``unit``) of each positive float32 scale; never infinite."""
        scale = scale / self.unit
        if self.dtype == "e8m0":
            stored = torch.exp2(scale.clamp(2.0**-126, 2.0**126).log2().round_())
        elif self.dtype == "e4m3":
            stored = scale.clamp_max(448).to(torch.float8_e4m3fn).float()
        else:
            dtype = getattr(torch, self.dtype)
            stored = scale.clamp_max(torch.finfo(dtype).max).to(dtype).float()
        return stored * self.unit

    def ladder(self, scale: Tensor, low: int, high: int) -> Iterator[Tensor]:
        """Stored scales ``low .. high`` steps from the one nearest to ``scale``."""
        base = self.round(scale)
        if self.dtype == "e4m3":
            codes = (base / self.unit).to(torch.float8_e4m3fn).view(torch.int8).to(torch.int32)
        for steps in range(low, high + 1):
            if steps == 0:
                yield base
            elif self.dtype == "e4m3":
                # Exponent and mantissa fields moved to those of a float32, whose bias is 120 more; subnormals included.
                bits = (codes + steps).clamp_(0, 126).bitwise_left_shift_(20)
                yield bits.view(torch.float32).mul(2.0**120).mul_(self.unit)
            else:
                yield self.round(base * (2.0**steps if self.dtype == "e8m0" else 2.0 ** (steps / 8)))

    def to_storage(self, scale: Tensor) -> Tensor:
        """What the format stores for signed scales that :meth:`round` produced."""
        if self.dtype == "e8m0":
            return (scale.log2().round() + 127).to(torch.uint8).view(torch.int8)
        return scale / self.unit


@block_threads()
def quantize_groups(
    weight: Tensor,
    grids: Sequence[Grid],
    group_size: GroupSize,
    scale_dtype: str,
    tensor_scale: bool = False,
    search: Search | None = None,
    with_dense: bool = False,
    tensor_value: float | None = None,
) -> Quantized:
    """Quantize a matrix to scalar codes with least-squares scales.

    Args:
        weight: float32 ``[rows, columns]``.
        grids: one grid, or two of which each group takes the better: the scale's sign tells, + the first, - the second. With a
            single asymmetric grid the sign of a scale mirrors the grid, so that its deeper side serves the largest weight.
        group_size: columns per scale, "row" or "tensor"; the last group of a row may be short.
        scale_dtype: "float16", "bfloat16", "float32", "e4m3" or "e8m0".
        tensor_scale: store E4M3 scales as multiples of one float32, chosen so that the largest uses the whole range.
        search: candidates per group; by default :func:`default_search`. Ladder steps are never worse than the absmax scale if 0 is
            among them.
        with_dense: also return the stored weight, to the bit what the format's ``dequantize`` gives.
        tensor_value: what ``tensor_scale``, or the only scale of ``group_size`` "tensor", is to be.
    """
    if scale_dtype == "e8m0" and (len(grids) > 1 or not grids[0].symmetric):
        raise ValueError("e8m0 scales have no sign; use one symmetric encoding, or float16 or e4m3 scales")
    unit = 1.0
    if tensor_scale:
        unit = _tensor_unit(weight, grids) if tensor_value is None else tensor_value
    store = ScaleStore(scale_dtype, unit)
    out = _Output(weight, grids, with_dense)
    if group_size == "tensor":
        scales, error = _quantize_tensor(weight, grids, store, search, out, None if tensor_scale else tensor_value)
    else:
        scales, error = _quantize_rows(weight, grids, group_columns(group_size, weight.shape[1]), store, search, out)
    second = torch.tensor([store.unit], dtype=torch.float32, device=weight.device) if tensor_scale else None
    return Quantized(out.codes, store.to_storage(scales), second, error, out.dense)


@block_threads()
def pack_groups(weight_format: IntegerFormat | MinifloatFormat, found: Quantized) -> dict[str, Tensor]:
    """The tensors of what :func:`quantize_groups` found for a format."""
    second = (found.tensor_scale,) if isinstance(weight_format, MinifloatFormat) else ()
    tensors = weight_format.pack(found.codes[:1], found.scales, *second)
    codes = map_blocks(lambda part: weight_format.pack(found.codes[part], found.scales, *second)["codes"], found.codes)
    return tensors | {"codes": torch.cat(codes)}


class _Output:
    """Codes and, if wanted, values of a matrix, written row by row."""

    def __init__(self, weight: Tensor, grids: Sequence[Grid], with_dense: bool) -> None:
        self.grids = grids
        code_dtype = torch.int8 if grids[0].signed_codes else torch.uint8
        self.codes = torch.empty(weight.shape, dtype=code_dtype, device=weight.device)
        self.dense = torch.empty_like(weight) if with_dense else None

    def write(self, part: slice, block: _Block, scale: Tensor) -> None:
        """Rows ``part`` from a block of their groups."""
        codes, dense = block.output(self.grids, scale)
        rows, columns = self.codes[part].shape
        self.codes[part] = codes.view(rows, -1)[:, :columns]
        if self.dense is not None:
            self.dense[part] = dense.view(rows, -1)[:, :columns]

    def rows(self, part: slice) -> tuple[Tensor, Tensor]:
        """Rows ``part`` of codes and values, to be written; of values that are not wanted none."""
        unwanted = self.codes.new_empty(0, self.codes.shape[1], dtype=torch.float32)
        return self.codes[part], unwanted if self.dense is None else self.dense[part]


class _Compiled:
    """The search in machine code; see ``scales_numba.py``.

    Args:
        module: with the compiled loops.
        grids: one or two.
        searches: one for each grid.
        store: of the scales.
    """

    def __init__(self, module: ModuleType, grids: Sequence[Grid], searches: Sequence[ScaleSearch], store: ScaleStore) -> None:
        self.search = module.search_scale_groups
        mirrored = len(grids) == 1 and not grids[0].symmetric
        self.grids = np.array([_numbers(grid) for grid in grids], np.float32)
        whole = []
        for grid, search in zip(grids, searches, strict=True):
            mantissa = -1 if grid.mantissa_bits is None else grid.mantissa_bits
            refinements = search.refinements if store.continuous else 0
            whole.append((mantissa, grid.bits, grid.signed_codes, mirrored, search.low, search.high, refinements))
        self.whole = np.array(whole, np.int64)
        mantissa, least, largest, kind = {
            "float16": (10, 2.0**-14, 65504.0, module.FLOAT),
            "bfloat16": (7, 2.0**-126, torch.finfo(torch.bfloat16).max, module.FLOAT),
            "float32": (23, 2.0**-126, torch.finfo(torch.float32).max, module.SINGLE),
            "e4m3": (3, 2.0**-6, 448.0, module.E4M3),
            "e8m0": (0, 2.0**-126, 2.0**126, module.E8M0),
        }[store.dtype]
        self.store = np.array([store.unit, least, largest], np.float32), kind, mantissa
        self.middle = max(0, *(-s.low for s in searches))
        steps = range(-self.middle, max(0, *(s.high for s in searches)) + 1)
        self.factors = np.array([2.0**step if store.dtype == "e8m0" else 2.0 ** (step / 8) for step in steps], np.float32)

    def __call__(self, weight: Tensor, group: int, scales: Tensor, codes: Tensor, dense: Tensor) -> float:
        """Write scales, codes and values of ``weight [rows, columns]``; returns the squared error."""
        out = scales.numpy(), codes.view(torch.uint8).numpy(), dense.numpy()
        numbers = weight.detach().contiguous().numpy()
        return float(self.search(numbers, group, self.grids, self.whole, *self.store, self.factors, self.middle, *out))


def _numbers(grid: Grid) -> tuple[float, ...]:
    """A grid as the compiled loops know it: unit, low, high, least binade, edge, magic number, spare level."""
    m = grid.mantissa_bits or 0
    edge = -math.inf if grid.spare is None else -(2 * -grid.spare - grid.low)
    spare = math.inf if grid.spare is None else grid.spare
    return grid.unit, grid.low, grid.high, 2.0**m, edge, 1.5 * 2.0 ** (23 - m), spare


def short_scale(scale: Tensor) -> Tensor:
    """float32 with float16's eleven significant bits: a power of two times what other programs can store in 16 bits."""
    mantissa, exponent = torch.frexp(scale.float())
    return torch.ldexp(mantissa.half().float(), exponent)


def _tensor_unit(weight: Tensor, grids: Sequence[Grid]) -> float:
    """Second-level scale: the largest group's scale, six ladder steps above absmax included, is E4M3's largest number."""
    low, high = (float(v) for v in weight.aminmax())
    largest = max(-low, high) / min(max(g.high, g.low) * g.unit for g in grids)
    return float(short_scale(torch.tensor(max(largest * ABOVE_ABSMAX / 448, TINY), dtype=torch.float32)))


def _quantize_rows(
    weight: Tensor, grids: Sequence[Grid], group: int, store: ScaleStore, search: Search | None, out: _Output
) -> tuple[Tensor, float]:
    columns = weight.shape[1]
    groups = -(-columns // group)
    scales = torch.empty(len(weight), groups, dtype=torch.float32, device=weight.device)
    if not isinstance(search, ClipSearch) and (module := loops("scales_numba", weight)) and group <= module.LONGEST_GROUP:
        searches = [search or default_search(grid, group, store.dtype) for grid in grids]
        compiled = _Compiled(module, grids, searches, store)
        return scales, sum(map_blocks(lambda part: compiled(weight[part], group, scales[part], *out.rows(part)), weight))
    scratch = _Scratch()

    def work(part: slice) -> float:
        short = groups * group - columns
        padded = F.pad(weight[part], (0, short)) if short else weight[part]
        block = _Block(padded.reshape(-1, group), scratch)
        found, errors = _search(block, grids, store, search)
        out.write(part, block, found)
        scales[part] = found.view(-1, groups)
        return float(errors.sum(dtype=torch.float64))

    return scales, sum(map_blocks(work, weight))


def _quantize_tensor(
    weight: Tensor, grids: Sequence[Grid], store: ScaleStore, search: Search | None, out: _Output, given: float | None = None
) -> tuple[Tensor, float]:
    """One scale in all: searched on evenly spaced weights, then held against the absmax scale on all of them.

    Of so many weights the clips of one sort cost less than a ladder. On demand they are tried on all weights, not on a sample.
    """
    sample = flat = weight.reshape(-1)
    if search is None:
        search = ClipSearch()
        if (step := flat.numel() // TENSOR_SAMPLE | 1) > 1:
            sample = torch.cat([flat[::step], flat[flat.abs().argmax()][None]])
    scratch = _Scratch()
    if given is None:
        found = [_search(_Block(sample[None], scratch), grids, store, s)[0] for s in (search, ABSMAX)]
    else:
        found = [store.round(torch.tensor([given], dtype=torch.float32, device=weight.device))]

    def block(part: slice) -> _Block:
        return _Block(weight[part].reshape(1, -1), scratch)

    def error(scale: Tensor) -> float:
        def work(part: slice) -> float:
            values = block(part).output(grids, scale)[1]
            return float(values.sub_(weight[part].reshape(1, -1)).square_().sum(dtype=torch.float64))

        return sum(map_blocks(work, weight))

    best, scale = min(((error(scale), scale) for scale in found), key=lambda pair: pair[0])
    map_blocks(lambda part: out.write(part, block(part), scale), weight)
    return scale.view(1, 1), best


class _Scratch(threading.local):
    """Memory for one block per thread, reused by the next: fresh memory would cost more than the arithmetic in it."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []

    def views(self, like: Tensor) -> list[Tensor]:
        if not self.buffers or self.buffers[0].numel() < like.numel():
            self.buffers = [torch.empty_like(like).view(-1) for _ in range(5)]
        return [buffer[: like.numel()].view(like.shape) for buffer in self.buffers]


class _Block:
    """Groups of a matrix with scratch memory, which only one block may use at a time."""

    def __init__(self, groups: Tensor, scratch: _Scratch) -> None:
        """groups: float32 ``[count, group]``, left as it is."""
        self.group = groups.shape[1]
        self.x = groups
        self.y, self.q, self.work, *self.values = scratch.views(groups)
        self.ones = groups.new_ones(self.group)

    def sums(self, values: Tensor) -> Tensor:
        """Sum over each group; a product with ones is twice as fast as ``sum`` for groups of 16."""
        return values.mv(self.ones)

    def rounded(self, grid: Grid, scale: Tensor) -> Tensor:
        """Nearest levels, in the grid's steps, under signed scales ``[count]``; ``self.y`` keeps the weights in those steps."""
        torch.mul(self.x, _step(grid, scale).reciprocal_()[:, None], out=self.y)
        return grid.round(self.y, self.q, self.work)

    def errors(self, grid: Grid, scale: Tensor) -> Tensor:
        """Squared error of each group ``[count]`` under signed scales."""
        residual = self.y.sub_(self.rounded(grid, scale))
        return self.sums(torch.mul(residual, residual, out=self.work)).mul_(_step(grid, scale).square_())

    def fitted(self, grid: Grid, scale: Tensor) -> Tensor:
        """Least-squares magnitudes of the scales ``[count]``, given the codes under ``scale``."""
        q = self.rounded(grid, scale)
        cross = self.sums(self.y.mul_(q))
        square = self.sums(torch.mul(q, q, out=self.work))
        return (scale.abs() * cross).div_(square.clamp_min_(TINY)).clamp_min_(0)

    def output(self, grids: Sequence[Grid], scale: Tensor) -> tuple[Tensor, Tensor]:
        """Codes of the nearest levels under signed stored scales, and their values, both ``[count, group]``."""
        size = scale if len(grids) == 1 else scale.abs()
        codes = []
        for grid, values in zip(grids, self.values, strict=False):
            q = self.rounded(grid, size)
            torch.mul(q, (size * grid.unit)[:, None], out=values)
            codes.append(grid.codes(q, self.y, self.work))
        if len(grids) == 1:
            return codes[0], self.values[0]
        # Selection by arithmetic, several times faster than torch.where; uint8 wraps around.
        second = (scale < 0)[:, None]
        chosen = codes[1].sub_(codes[0]).mul_(second.to(torch.uint8)).add_(codes[0])
        return chosen, self.values[0].lerp_(self.values[1], second.to(self.values[0].dtype))


def _step(grid: Grid, scale: Tensor) -> Tensor:
    """Signed size of a grid's smallest step, never zero."""
    return torch.copysign((scale.abs() * grid.unit).clamp_min_(TINY), scale)


def _search(block: _Block, grids: Sequence[Grid], store: ScaleStore, search: Search | None) -> tuple[Tensor, Tensor]:
    """Signed stored scales ``[count]`` and squared errors ``[count]`` of the groups of a block."""
    positive, negative = block.x.amax(1), block.x.amin(1).neg_()
    peak = torch.maximum(positive, negative)
    found = []
    for grid in grids:
        mirror = len(grids) == 1 and not grid.symmetric
        sign = torch.where(positive > negative, -1.0, 1.0).to(peak) if mirror else None
        found.append(_search_grid(block, grid, peak, sign, store, search or default_search(grid, block.group, store.dtype)))
    if len(found) == 1:
        return found[0]
    (first, error), (second, second_error) = found
    return torch.where(second_error < error, -second, first), torch.minimum(error, second_error)


def _search_grid(
    block: _Block, grid: Grid, peak: Tensor, sign: Tensor | None, store: ScaleStore, search: Search
) -> tuple[Tensor, Tensor]:
    if isinstance(search, ClipSearch):
        return search_clips(block.x, grid, peak, sign, store, search)
    best_error = torch.full_like(peak, torch.finfo(torch.float32).max)
    best_scale, better = torch.zeros_like(peak), torch.zeros_like(peak)

    def attempt(scale: Tensor) -> None:
        scale = scale if sign is None else scale * sign
        error = block.errors(grid, scale)
        # Weights of exactly 0 and 1 make lerp a selection, several times faster than torch.where.
        best_scale.lerp_(scale, torch.lt(error, best_error, out=better))
        torch.minimum(best_error, error, out=best_error)

    for scale in store.ladder(peak / (max(grid.high, grid.low) * grid.unit), search.low, search.high):
        attempt(scale)
    for _ in range(search.refinements if store.continuous else 0):
        attempt(store.round(block.fitted(grid, best_scale)))
    return best_scale, best_error
