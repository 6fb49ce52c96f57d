"""The search of arXiv 2408.06995: a scale from a fixed list of clips, each tried on every weight, at the price of one sort.

The paper searches a real-valued exponent bias b. All levels of an encoding are proportional to ``2**-b``, so a bias is a clip, the
largest number that is represented, and a clip is a scale. With the weights sorted, what a scale does to all of them follows from
where its decision thresholds fall: with S and N the sum and the number of the weights that go to level l,
``sum (w - s l)^2 = sum w^2 - 2 s sum l S + s^2 sum l^2 N``. That is the error to the last bits, for as many look-ups as there are
levels, where trying the scale on each weight takes ten passes over all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .grids import Grid
    from .scales import ScaleStore

LOOK_UPS = 1 << 20  # at a time


class ClipSearch(NamedTuple):
    """``steps`` clips, evenly spaced from ``low`` to ``high`` times the largest magnitude of a group; the paper's by default."""

    low: float = 0.1
    high: float = 1.2
    steps: int = 111


class SortedGroups:
    """Groups of numbers, sorted and summed up, so that the error of any scale is a few look-ups.

    Args:
        groups: float32 ``[count, size]``.
    """

    def __init__(self, groups: Tensor) -> None:
        self.values = groups.sort(1).values
        self.sums = torch.nn.functional.pad(self.values.double().cumsum(1), (1, 0))
        self.squares = self.values.double().square_().sum(1)

    def errors(self, levels: Tensor, scale: Tensor) -> Tensor:
        """Squared error float64 ``[count, tried]`` of each group under its scales ``[count, tried]`` of rising ``levels [n]``."""
        thresholds = scale[..., None] * (levels[1:] + levels[:-1]) / 2
        below = torch.searchsorted(self.values, thresholds.flatten(1))
        wide, size = levels.double(), self.values.shape[1]
        cross = wide[-1] * self.sums[:, -1:] - self.sums.gather(1, below).view(thresholds.shape) @ wide.diff()
        norm = wide[-1] ** 2 * size - below.view(thresholds.shape).double() @ wide.square().diff()
        return self.squares[:, None] - 2 * scale * cross + scale.double().square() * norm


def search_clips(
    groups: Tensor, grid: Grid, peak: Tensor, sign: Tensor | None, store: ScaleStore, search: ClipSearch
) -> tuple[Tensor, Tensor]:
    """Scales of the clips with the smallest squared error.

    Args:
        groups: float32 ``[count, size]``.
        grid: levels.
        peak: largest magnitude of each group ``[count]``.
        sign: of the scale of each group ``[count]``; ``None`` for a grid that is its own mirror image.
        store: rounds scales to what is stored, before they are tried.
        search: clips.

    Returns:
        signed stored scales and squared errors, both float32 ``[count]``.
    """
    sorted_groups = SortedGroups(groups if sign is None else groups * sign[:, None])
    levels = torch.tensor(grid.levels, dtype=torch.float32, device=groups.device) * grid.unit
    unit = peak / (max(grid.high, grid.low) * grid.unit)
    best_error = torch.full_like(peak, torch.inf, dtype=torch.float64)
    best_scale = torch.zeros_like(peak)
    clips = torch.linspace(search.low, search.high, search.steps, dtype=torch.float32, device=groups.device)
    for part in clips.split(max(1, LOOK_UPS // (len(groups) * len(levels)))):
        scales = store.round(unit[:, None] * part)
        error, chosen = sorted_groups.errors(levels, scales).min(1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scales.gather(1, chosen[:, None])[:, 0], best_scale)
    return best_scale if sign is None else best_scale * sign, best_error.clamp_min_(0).float()
