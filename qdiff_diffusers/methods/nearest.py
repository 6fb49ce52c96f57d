"""Nearest codebook entries, at the speed of a matrix product.

This is what codebook quantization spends its time on. ``argmax`` along rows costs four times as much as the product that makes the
scores, so the index is written into the low mantissa bits of each score and a plain ``amax`` finds both. What is compared is
``-|x - c|**2 / 2`` itself, so the bits given up are relative to the distance: with blocks of 1,024 entries, two distances that
differ by less than 1e-4 of their size may be swapped.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiled import loops
from .error_feedback import cholesky
from .threads import map_blocks

BLOCK = 1024  # entries per product; 2.1e9 scores/s per core at 6 dimensions, 4,096 at once: 1.1e9 (out of the L2 cache)
SCORES = 1 << 17  # float32 scores in flight per thread, half of a 1 MB L2 cache
GPU_SCORES = 1 << 26
COMPILED_FROM = 64  # entries, below which a matrix product is faster than compiled loops
BLOCK_WEIGHTS = 1 << 16  # coordinates that one thread takes at a time


def assign(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid of each point: int64 ``[N]`` for points ``[N, d]`` and centroids ``[k, d]``, float32."""
    return nearest(points, centroids)[0]


def assign_under(slopes: Tensor, centroids: Tensor, metric: Tensor) -> Tensor:
    """Index of the centroid with the least ``c B c^T / 2 - <g, c>``, which is the one nearest to ``g B^-1`` under the metric B.

    Args:
        slopes: float32 ``[N, d]``, g.
        centroids: float32 ``[k, d]``.
        metric: float32 ``[d, d]``, positive definite: B.

    Returns:
        int64 ``[N]``.
    """
    if len(centroids) >= COMPILED_FROM and slopes.shape[1] > 1 and (module := loops("search_numba", slopes)) is not None:
        halves = ((centroids @ metric) * centroids).sum(1).div_(2)
        origins = slopes.square().sum(1).mul_(centroids.square().sum(1).max() * (1 + 1e-4)).sqrt_()  # no product is larger
        return _least_compiled(slopes, origins, centroids.T, halves, module)[0]
    points, factor = whiten(slopes, metric)
    return assign(points, centroids @ factor)


def whiten(slopes: Tensor, metric: Tensor) -> tuple[Tensor, Tensor]:
    """Points ``[N, d]`` in whose space distances to ``centroids @ factor`` are those of ``slopes B^-1`` to centroids under B."""
    factor = cholesky(metric.double()).to(slopes)
    return torch.linalg.solve_triangular(factor, slopes.T, upper=False).T.contiguous(), factor


def nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int64 ``[N]`` and squared distances float32 ``[N]`` to the nearest centroids, both within 1e-4 of the distance."""
    if points.shape[1] == 1:
        return _nearest_scalar(points, centroids)
    parts = map_blocks(lambda part: _nearest(points[part], centroids), points, BLOCK_WEIGHTS)
    return torch.cat([codes for codes, _ in parts]), torch.cat([distances for _, distances in parts])


def nearest_few(points: Tensor, centroids: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` nearest centroids of each point, nearest first: int64 and squared distances float32, both ``[N, count]``."""
    count = min(count, len(centroids))
    parts = [
        torch.cdist(part, centroids).topk(count, largest=False)
        for part in points.split(rows_in_flight(len(centroids), points.device))
    ]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts]).square_()


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    if len(centroids) >= COMPILED_FROM and (module := loops("search_numba", points)) is not None:
        return _nearest_compiled(points, centroids.T.contiguous(), module)
    width = min(BLOCK, len(centroids))
    blocks = [ScoreBlock(part, width) for part in centroids.split(BLOCK)]
    rows = rows_in_flight(width, points.device)
    buffer = points.new_empty(min(rows, len(points)), width)
    inputs = augment(points)
    best = points.new_empty(len(blocks), len(points))
    for start in range(0, len(points), rows):
        part = inputs[start : start + rows]
        for block, scores in zip(blocks, best, strict=True):
            torch.amax(block.scores(part, buffer), 1, out=scores[start : start + rows])
    score, which = best.max(0)
    codes = (score.view(torch.int32) & blocks[0].index_mask).long() + which * BLOCK
    return codes.clamp_max_(len(centroids) - 1), (score * -2).clamp_min_(0)


def _nearest_compiled(points: Tensor, entries: Tensor, module: ModuleType) -> tuple[Tensor, Tensor]:
    """Codes and squared distances, of ``entries [d, k]``."""
    codes, least = _least_compiled(points, points.square().sum(1).div_(2), entries, entries.square().sum(0).div_(2), module)
    return codes, least.mul_(2).clamp_min_(0)


def _least_compiled(points: Tensor, origins: Tensor, entries: Tensor, halves: Tensor, module: ModuleType) -> tuple[Tensor, Tensor]:
    """Index of the least ``origin + half - <x, c>`` of ``entries [d, k]`` for each of ``points [N, d]``, and that sum."""
    (n, d), k = points.shape, entries.shape[1]
    if n % 4 or d % 2:
        points, origins = F.pad(points, (0, d % 2, 0, -n % 4)), F.pad(origins, (0, -n % 4))
    if d % 2 or k % module.RUN:
        entries = F.pad(entries, (0, -k % module.RUN, 0, d % 2))
        halves = F.pad(halves, (0, -k % module.RUN), value=torch.inf)
    codes, least = torch.empty(len(points), dtype=torch.long), torch.empty(len(points), dtype=torch.float32)
    module.search_nearest(*(t.contiguous().numpy() for t in (points, origins, entries, halves, codes, least)))
    return codes[:n], least[:n]


def rows_in_flight(k: int, device: torch.device) -> int:
    """How many points to score against ``k`` entries at a time."""
    return max(64, (SCORES if device.type == "cpu" else GPU_SCORES) // k)


class ScoreBlock:
    """Scores of codebook entries ``[k, d]``, with each entry's index in the low bits of its scores.

    Attributes:
        index_mask: selects the index bits of a score's int32 pattern: enough for ``capacity`` (by default k) entries.
    """

    def __init__(self, entries: Tensor, capacity: int = 0) -> None:
        k = len(entries)
        bias = entries.square().sum(1) * -0.5
        self.matrix = torch.stack([*entries.unbind(1), torch.ones_like(bias), bias])
        self.index_mask = (1 << max(1, (max(k, capacity) - 1).bit_length())) - 1
        self._index = torch.arange(k, dtype=torch.int32, device=entries.device)

    def scores(self, inputs: Tensor, buffer: Tensor) -> Tensor:
        """``-|x - c|**2 / 2`` with index bits, ``[n, k]``, in ``buffer [>= n, >= k]``; inputs from :func:`augment`."""
        k = self.matrix.shape[1]
        out = buffer[: len(inputs)] if buffer.shape[1] == k else buffer.flatten()[: len(inputs) * k].view(len(inputs), k)
        torch.mm(inputs, self.matrix, out=out)
        out.view(torch.int32).bitwise_and_(~self.index_mask).bitwise_or_(self._index)
        return out


def augment(points: Tensor) -> Tensor:
    """``[N, d] -> [N, d + 2]``: two more columns let one product with ``ScoreBlock.matrix`` give the whole distance."""
    n, d = points.shape
    out = points.new_empty(n, d + 2)
    out[:, :d] = points
    out[:, d] = points.square().sum(1).mul_(-0.5)
    out[:, d + 1] = 1
    return out


def _nearest_scalar(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """One dimension: a binary search among the midpoints of the sorted centroids."""
    levels, order = centroids[:, 0].sort()
    rank = torch.bucketize(points[:, 0].contiguous(), (levels[1:] + levels[:-1]) / 2)
    return order[rank], (points[:, 0] - levels[rank]).square_()


class EntryIndex:
    """A large codebook, prepared so that a point is compared with the entries of its neighbourhood only.

    Entries are grouped in cells around a few centers. A point looks at those entries whose own Voronoi cell may reach into the
    cell that it falls in: an entry lies at most its reach from the plane between that cell's center and its own. With a reach of
    0.7 times the distance to its d-th neighbour, 2 in 100,000 points miss their nearest entry, by too little to measure. On one
    core, 4,096 entries: 6 MW/s in place of 1.8 at d = 6, 6.6 in place of 1.1 at d = 4, 6.4 in place of 0.8 at d = 3.
    """

    CELLS = 32  # with 64 cells the lists are a quarter shorter, and the products too small: the same speed or less
    REACH = 0.7

    def __init__(self, entries: Tensor, seed: int = 0) -> None:
        k, d = entries.shape
        self.entries = entries
        self.centers = entries[torch.randperm(k, generator=torch.Generator().manual_seed(seed))[: self.CELLS]].clone()
        for _ in range(8):
            cell = assign(entries, self.centers)
            count = torch.bincount(cell, minlength=self.CELLS)[:, None]
            total = torch.zeros_like(self.centers).index_add_(0, cell, entries)
            self.centers = torch.where(count > 0, total / count.clamp_min(1), self.centers)
        distances = torch.cdist(entries, self.centers)
        own, cell = distances.min(1, keepdim=True)
        between = torch.cdist(self.centers, self.centers)[cell[:, 0]].clamp_min_(1e-30)
        to_plane = (distances.square() - own.square()) / (2 * between)
        neighbour = torch.cat([torch.cdist(part, entries).kthvalue(min(k, d + 1), 1).values for part in entries.split(BLOCK)])
        reach = self.REACH * neighbour[:, None]
        near = (to_plane <= reach).scatter_(1, cell, True)
        self.lists = [column.nonzero()[:, 0] for column in near.T]

    def assign(self, points: Tensor) -> Tensor:
        """Index of the nearest entry of each point, int64 ``[N]``."""
        cell = assign(points, self.centers)
        order = cell.argsort()
        parts = points[order].split(torch.bincount(cell, minlength=self.CELLS).tolist())
        found = [near[_nearest(part, self.entries[near])[0]] for part, near in zip(parts, self.lists, strict=True) if len(part)]
        return torch.empty_like(order).scatter_(0, order, torch.cat(found))


class NeighbourLists:
    """For each entry of a large codebook those around it: where a search that begins with a good entry looks.

    A point's nearest entry under the second moments of a layer's inputs is seldom far from the one it has. From 64 neighbours to
    theirs and so on, 1 in 200 points stops short of the nearest of 4,096 in 6 dimensions, for a tenth of the work, and 3 in 100
    where the metric's axes differ by ``ROUND``; far more where they differ by more, since neighbours are those of space as it is.
    """

    COUNT = 64
    ROUND = 16.0  # largest ratio of a metric's eigenvalues under which neighbours are of use

    def __init__(self, entries: Tensor) -> None:
        self.entries = entries.contiguous()
        lists = torch.cat(
            [torch.cdist(part, entries).topk(self.COUNT + 1, largest=False).indices[:, 1:] for part in entries.split(BLOCK)]
        )
        self.lists, self.near = lists.int(), entries[lists].transpose(1, 2).contiguous()

    def suit(self, metric: Tensor) -> bool:
        """Whether what is near is near under ``metric [d, d]``, positive definite, too."""
        if len(metric) != self.entries.shape[1]:
            return False
        axes = torch.linalg.eigvalsh(metric)
        return bool(axes[-1] <= self.ROUND * axes[0])

    def improve_under(self, slopes: Tensor, metric: Tensor, codes: Tensor) -> Tensor:
        """Codes int64 ``[N]`` at least as good as ``codes`` for what :func:`assign_under` minimises; on CPUs, where numba is."""
        halves = ((self.entries @ metric) * self.entries).sum(1).div_(2)
        found = codes.clone()
        given = slopes, halves, self.entries, self.lists, self.near, found
        module = loops("search_numba", slopes)
        assert module is not None
        module.search_near(*(value.contiguous().numpy() for value in given))
        return found
