"""Codes and scales of integer and minifloat formats, chosen a block of columns at a time under the inputs' second moments.

Matrices are transposed here, ``[columns, rows]``: a column of a few hundred rows is contiguous, and no row knows of another. What
is written with torch is the specification, and what runs on GPUs and without numba; ``columns_numba.py`` gives the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiled import loops
from .error_feedback import Moments

BLOCK = 128  # columns that one matrix product brings up to date
LONGEST_REFIT = 512  # columns of a group whose scale is fitted: a block holds it whole


class Levels(NamedTuple):
    """Sorted numbers to round to, by bisection.

    Attributes:
        values: float32 ``[tables * 2**bits]``, each table rising.
        edges: of the same shape: the midpoint after each of them, infinity after the last.
        bits: of the length of a table.
    """

    values: Tensor
    edges: Tensor
    bits: int

    def to(self, device: torch.device) -> Levels:
        """On another device."""
        return Levels(self.values.to(device), self.edges.to(device), self.bits)

    def nearest(self, wanted: Tensor, bases: Tensor | int = 0) -> Tensor:
        """Index int32 in ``values`` of what is nearest to ``wanted`` in the table that begins at ``bases``; the lower of two."""
        rank = torch.zeros_like(wanted, dtype=torch.int32) + bases
        step = (1 << self.bits) >> 1
        while step:
            rank = rank + (self.edges[rank + (step - 1)] < wanted).int() * step
            step >>= 1
        return rank


def make_levels(tables: Tensor) -> Levels:
    """Levels of ``tables [count, n]``, each row rising; filled up with infinities to a power of two."""
    bits = max(0, tables.shape[1] - 1).bit_length()
    values = F.pad(tables, (0, (1 << bits) - tables.shape[1]), value=torch.inf)
    edges = F.pad((tables[:, 1:] + tables[:, :-1]) / 2, (0, (1 << bits) - tables.shape[1] + 1), value=torch.inf)
    return Levels(values.flatten().contiguous(), edges.flatten().contiguous(), bits)


@lru_cache(maxsize=16)
def storable(dtype: torch.dtype) -> Levels:
    """The numbers from 0 up that scales of a dtype can be; int8 is E8M0's powers of two. For float32 one of no bits: anything."""
    with torch.inference_mode(False):
        if dtype == torch.float32:
            return make_levels(torch.zeros(1, 1, dtype=torch.float32))
        if dtype == torch.int8:
            return make_levels(torch.exp2(torch.arange(-126, 127, dtype=torch.float32))[None])
        width = torch.int8 if dtype.itemsize == 1 else torch.int16
        numbers = torch.arange(1 << (8 * dtype.itemsize - 1)).to(width).view(dtype).float()
        return make_levels(numbers[numbers.isfinite()][None])


@dataclass
class RowCodes:
    """Codes of some rows on their way.

    Attributes:
        levels: what the codes stand for, in units of a scale.
        steps: what scales and zeros can be, over ``units``.
        groups: int64 ``[columns]``, the row of ``scales`` and ``zeros`` that a column takes.
        scales, zeros: float32 ``[groups, rows]``.
        units: float32 ``[rows]``, a tensor's scale of scales.
        bases: int32 ``[groups, rows]``, where in ``levels`` the table of a group begins.
        ranks: int16 ``[columns, rows]``, indices in ``levels``.
        values: float32 ``[columns, rows]``.
        refit: 0 leaves scales as they are, 1 fits them to the codes, 2 zeros too.
    """

    levels: Levels
    steps: Levels
    groups: Tensor
    scales: Tensor
    zeros: Tensor
    units: Tensor
    bases: Tensor
    ranks: Tensor
    values: Tensor
    refit: int


def pass_on(exact: Tensor, moments: Moments, codes: RowCodes) -> Tensor:
    """Choose all codes, column after column in ``moments.order``, each making up for the errors of those before it (GPTQ).

    Args:
        exact: float32 ``[columns, rows]``.

    Returns:
        the error ``e H e^T`` that is left in each row, float32 ``[rows]``.
    """
    order, feedback = moments.order, moments.feedback
    wanted, groups = exact[order], codes.groups[order]
    values, errors = torch.empty_like(wanted), torch.empty_like(wanted)
    ranks = torch.empty(wanted.shape, dtype=torch.int16, device=wanted.device)
    losses = torch.zeros_like(wanted[0])
    for start in range(0, len(wanted), BLOCK):
        part = slice(start, start + BLOCK)
        targets = torch.addmm(wanted[part], feedback[:start, part].T, errors[:start]) if start else wanted[part].clone()
        block = feedback[part, part].contiguous()
        given = targets, wanted[part], block, moments.pivots[part], *codes.levels, codes.scales, codes.zeros, codes.bases
        _run("columns_pass_block", _pass_block, *given, groups[part], values[part], ranks[part], errors[part], losses)
    codes.values[order], codes.ranks[order] = values, ranks
    return losses


def descend(exact: Tensor, hessian: Tensor, codes: RowCodes) -> Tensor:
    """One sweep of coordinate descent over scales, zeros and codes, group after group, all others fixed. No row's error rises.

    Returns:
        by how much the error ``e H e^T`` of each row falls, float32 ``[rows]``.
    """
    errors = exact - codes.values
    gains = torch.zeros_like(exact[0])
    width = block_width(codes.groups)
    for start in range(0, len(exact), width):
        part = slice(start, start + width)
        gradient = hessian[part] @ errors
        block = hessian[part, part].contiguous()
        tables = *codes.levels, *codes.steps, codes.scales, codes.zeros, codes.units, codes.bases
        rows = codes.groups[part], codes.values[part], codes.ranks[part], errors[part], gains
        _run("columns_descend_block", _descend_block, gradient, exact[part], block, *tables, *rows, codes.refit)
    return gains


def block_width(groups: Tensor) -> int:
    """Columns of a block that no group crosses, if groups are not longer than ``LONGEST_REFIT``."""
    group = int((groups == groups[0]).sum())
    return BLOCK if group > LONGEST_REFIT else max(BLOCK // group, 1) * group


def _run(name: str, function: Any, *given: Any) -> None:
    """A function of this module, or what does the same in machine code."""
    module = loops("columns_numba", given[0])
    if module is None:
        function(*given)
    else:
        getattr(module, name)(*(value.numpy() if isinstance(value, Tensor) else value for value in given))


def _pass_block(
    targets: Tensor,
    exact: Tensor,
    feedback: Tensor,
    pivots: Tensor,
    levels: Tensor,
    edges: Tensor,
    bits: int,
    scales: Tensor,
    zeros: Tensor,
    bases: Tensor,
    groups: Tensor,
    values: Tensor,
    ranks: Tensor,
    errors: Tensor,
    losses: Tensor,
) -> None:
    table, loss = Levels(levels, edges, bits), torch.zeros_like(losses)
    for i, group in enumerate(groups.tolist()):
        scale, zero = scales[group], zeros[group]
        rank = table.nearest((targets[i] - zero) / torch.where(scale == 0, 1, scale), bases[group])
        value = levels[rank] * scale + zero
        left = targets[i] - value
        loss += left * left * pivots[i]
        values[i], ranks[i], errors[i] = value, rank.to(torch.int16), exact[i] - value
        targets[i + 1 :] += errors[i] * feedback[i, i + 1 :, None]
    losses += loss


def _descend_block(
    gradient: Tensor,
    exact: Tensor,
    block: Tensor,
    levels: Tensor,
    edges: Tensor,
    bits: int,
    steps: Tensor,
    cuts: Tensor,
    depth: int,
    scales: Tensor,
    zeros: Tensor,
    units: Tensor,
    bases: Tensor,
    groups: Tensor,
    values: Tensor,
    ranks: Tensor,
    errors: Tensor,
    gains: Tensor,
    refit: int,
) -> None:
    table, gain = Levels(levels, edges, bits), torch.zeros_like(gains)
    found, lengths = groups.unique_consecutive(return_counts=True)
    begin = 0
    for group, length in zip(found.tolist(), lengths.tolist(), strict=True):
        end = begin + length
        part = slice(begin, end)
        if refit:
            q = levels[ranks[part].long()]
            fit = _GroupFit(q, gradient[begin:], block[part, begin:], refit)
            ds, dz, won = fit.change(scales[group], zeros[group], units, Levels(steps, cuts, depth))
            gain += won
            scales[group] += ds
            zeros[group] += dz
            values[part] = q * scales[group] + zeros[group]
            errors[part] = exact[part] - values[part]
            gradient[begin:] -= ds * fit.seen
            if refit > 1:
                gradient[begin:] -= dz * fit.ones[:, None]
        scale, zero = scales[group], zeros[group]
        safe = torch.where(scale == 0, 1, scale)
        for i in range(begin, end):
            pivot = block[i, i]
            rank = table.nearest((values[i] + gradient[i] / pivot - zero) / safe, bases[group])
            value = levels[rank] * scale + zero
            change = value - values[i]
            gain += change * (2 * gradient[i] - change * pivot)
            ranks[i] = torch.where(change != 0, rank.to(torch.int16), ranks[i])  # of two codes of zero the one that is there stays
            values[i], errors[i] = value, exact[i] - value
            gradient[i + 1 :] -= change * block[i, i + 1 :, None]
        begin = end
    gains += gain


class _GroupFit:
    """The error as a function of one group's scale and zero, in all rows, where codes stay as they are.

    Args:
        q: float32 ``[n, rows]``, the group's levels.
        gradient: ``[columns, rows]``, of the group's columns and those after it.
        block: ``[n, columns]``, their second moments.
        refit: 1 for scales, 2 for zeros as well.
    """

    def __init__(self, q: Tensor, gradient: Tensor, block: Tensor, refit: int) -> None:
        self.with_zero = refit > 1
        zero = torch.zeros_like(q[0])
        self.seen, self.ones = torch.zeros_like(gradient), torch.zeros_like(block[0])
        self.along, self.square, self.sums, self.cross, self.whole = zero, zero, zero, zero, self.ones[:0].sum()
        for j in range(len(q)):
            self.along = self.along + q[j] * gradient[j]
            self.seen += q[j] * block[j][:, None]
            self.ones += block[j]
        for j in range(len(q)):
            self.square = self.square + q[j] * self.seen[j]
            self.whole = self.whole + self.ones[j]
            self.sums, self.cross = self.sums + gradient[j], self.cross + self.seen[j]

    def change(self, scale: Tensor, zero: Tensor, units: Tensor, steps: Levels) -> tuple[Tensor, Tensor, Tensor]:
        """Changes of scale and zero to what is best among what can be stored, and what they gain, each ``[rows]``."""
        sign = torch.where(scale < 0, -1.0, 1.0)
        top, bottom = self.along, self.square
        if self.with_zero:  # the scale that is best if the zero follows
            top = top - self.cross * self.sums / self.whole
            bottom = bottom - self.cross * self.cross / self.whole
        best = torch.where(bottom > 0, scale + top / bottom, scale)
        wanted = best * sign / units
        stored = _stored(wanted, steps)
        ds = torch.where((wanted > 0) & (stored > 0) & (scale != 0), stored * units * sign - scale, 0)
        dz = torch.zeros_like(ds)
        if self.with_zero:  # the zero that is best with the scale as it is stored
            best = zero + (self.sums - self.cross * ds) / self.whole
            stored = _stored(best.abs(), steps)
            dz = torch.where(best < 0, -stored, stored) - zero
        won = ds * (2 * self.along - ds * self.square)
        if self.with_zero:
            won = won + dz * (2 * (self.sums - ds * self.cross) - dz * self.whole)
        keep = won > 0
        return torch.where(keep, ds, 0), torch.where(keep, dz, 0), torch.where(keep, won, 0)


def _stored(wanted: Tensor, steps: Levels) -> Tensor:
    return steps.values[steps.nearest(wanted)] if steps.bits else wanted
