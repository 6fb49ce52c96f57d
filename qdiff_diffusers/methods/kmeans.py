"""k-means for weight vectors: nearest centroids at the speed of a matrix product, k-means++ seeds and Lloyd iterations.

Nearest-centroid search is what codebook quantization spends its time on. ``argmax`` along rows costs four times as much as
the product that makes the scores, so the index is written into the low mantissa bits of each score and a plain ``amax``
finds both. What is compared is ``-|x - c|**2 / 2`` itself, so the bits given up are relative to the distance: with blocks of
1,024 centroids, two distances that differ by less than 1e-4 of their size may be swapped.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .threads import map_blocks

BLOCK = 1024  # centroids per product; 2.1e9 scores/s per core at 6 dimensions, 4,096 at once: 1.1e9 (out of the L2 cache)
SCORES = 1 << 17  # float32 scores in flight per thread, half of a 1 MB L2 cache
GPU_SCORES = 1 << 26
BLOCK_WEIGHTS = 1 << 16  # coordinates that one thread takes at a time
SAMPLE_PER_CENTROID = 256  # the codebook of a sample of n vectors per entry costs about 1/n more error than that of all vectors


def kmeans(
    points: Tensor,
    k: int,
    *,
    iterations: int = 15,
    restarts: int = 3,
    seed: int = 0,
    weights: Tensor | None = None,
    sample: int | None = None,
) -> Tensor:
    """Centroids that minimise the (weighted) mean squared distance to the nearest one.

    Each restart is seeded by k-means++ and takes a few Lloyd iterations on a part of the sample; the best goes on with all
    of it. An empty cluster moves to the point that is worst served.

    Args:
        points: float32 ``[N, d]``.
        k: number of centroids; with fewer distinct points some centroids coincide.
        iterations: Lloyd iterations of the best restart.
        restarts: at least 1.
        seed: the result depends on nothing else.
        weights: ``[N]``, non-negative.
        sample: points to fit on, by default 256 per centroid.

    Returns:
        float32 ``[k, d]``.
    """
    if k < 1 or restarts < 1 or points.shape[0] == 0:
        raise ValueError(f"k-means needs points, k and restarts, got {points.shape[0]} points, k={k}, restarts={restarts}")
    generator = torch.Generator().manual_seed(seed)
    points, weights = _subsample(points, weights, sample or SAMPLE_PER_CENTROID * k, generator)
    if points.shape[1] == 1:
        return _lloyd_max(points[:, 0], k, weights, iterations * 10)[:, None]
    best, best_error = None, float("inf")
    for _ in range(restarts):
        part, part_weights = _subsample(points, weights, 32 * k if restarts > 1 else 16 * k, generator)
        centroids = seed_centroids(part, k, generator, part_weights)
        if restarts > 1:
            centroids, error = lloyd(part, centroids, 3, part_weights)
            if error >= best_error:
                continue
            best_error = error
        best = centroids
    assert best is not None
    return lloyd(points, best, iterations, weights)[0]


def seed_centroids(points: Tensor, k: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each further centroid is a point drawn in proportion to its squared distance."""
    mass = points.new_ones(len(points)) if weights is None else weights.to(points.dtype)
    chosen = torch.empty(k, dtype=torch.long, device=points.device)
    uniform = torch.rand(k, generator=generator).to(points.device)
    distance = torch.ones_like(mass)
    for i in range(k):
        cumulative = (distance * mass).cumsum(0)
        index = torch.searchsorted(cumulative, uniform[i : i + 1] * cumulative[-1]).clamp_max_(len(points) - 1)
        chosen[i] = index[0]
        step = (points - points[index]).square_().sum(1)
        distance = torch.minimum(distance, step) if i else step
    return points[chosen].clone()


def lloyd(points: Tensor, centroids: Tensor, iterations: int, weights: Tensor | None = None) -> tuple[Tensor, float]:
    """Lloyd iterations; returns the centroids and the weighted squared error per point *before* the last update.

    The error never rises from one iteration to the next: means are optimal for their cluster, and an empty cluster can only gain.
    """
    error = float("inf")
    for _ in range(iterations):
        codes, distances = nearest(points, centroids)
        if weights is not None:
            distances *= weights
        error = float(distances.mean(dtype=torch.float64))
        centroids = cluster_means(points, codes, centroids, weights)
        empty = (torch.bincount(codes, minlength=len(centroids)) == 0).nonzero()[:, 0]
        if len(empty):
            worst = distances.topk(min(len(empty), len(points))).indices
            centroids[empty[: len(worst)]] = points[worst]
    return centroids, error


def cluster_means(points: Tensor, codes: Tensor, centroids: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean of each cluster; ``centroids`` where a cluster has no weight. ``[k, d]``."""
    k = len(centroids)
    count = torch.bincount(codes, weights, minlength=k).to(points.dtype)[:, None]
    total = torch.zeros_like(centroids).index_add_(0, codes, points if weights is None else points * weights[:, None])
    return torch.where(count > 0, total / count.clamp_min(1e-30), centroids)


def assign(points: Tensor, centroids: Tensor) -> Tensor:
    """Index of the nearest centroid of each point: int64 ``[N]`` for points ``[N, d]`` and centroids ``[k, d]``, float32."""
    return nearest(points, centroids)[0]


def nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int64 ``[N]`` and squared distances float32 ``[N]`` to the nearest centroids, both within 1e-4 of the distance."""
    if points.shape[1] == 1:
        return _nearest_scalar(points, centroids)
    parts = map_blocks(lambda part: _nearest(points[part], centroids), points, BLOCK_WEIGHTS)
    return torch.cat([codes for codes, _ in parts]), torch.cat([distances for _, distances in parts])


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
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


def _lloyd_max(values: Tensor, k: int, weights: Tensor | None, iterations: int) -> Tensor:
    """Lloyd-Max levels ``[k]`` of a sample ``[N]``. Sorted once, an iteration is k binary searches in running sums.

    Starts from the cube root of the density, the optimum for many levels (Panter and Dite 1951).
    """
    values, order = values.double().sort()
    mass = torch.ones_like(values) if weights is None else weights.double()[order]
    count = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    total = torch.cat([mass.new_zeros(1), (mass * values).cumsum(0)])
    edges = torch.linspace(0, len(values) - 1, min(4 * k, len(values)) + 1, device=values.device).long()
    width = values[edges[1:]] - values[edges[:-1]]
    share = ((count[edges[1:]] - count[edges[:-1]]) * width.square()).pow(1 / 3).cumsum(0).clamp_min(1e-30)
    targets = (torch.arange(k, dtype=torch.float64, device=values.device) + 0.5) / k * share[-1]
    cell = torch.searchsorted(share, targets).clamp_max_(len(share) - 1)
    before = torch.where(cell > 0, share[cell - 1], 0)
    inside = (targets - before) / (share[cell] - before).clamp_min(1e-30)
    levels = values[edges[cell]] + width[cell] * inside.clamp(0, 1)
    for _ in range(iterations):
        inner = torch.searchsorted(values, (levels[1:] + levels[:-1]) / 2)
        edges = torch.cat([inner.new_zeros(1), inner, inner.new_full((1,), len(values))])
        cell_mass = count[edges[1:]] - count[edges[:-1]]
        means = (total[edges[1:]] - total[edges[:-1]]) / cell_mass.clamp_min(1e-300)
        levels = torch.where(cell_mass > 0, means, levels).sort().values
    return levels.float()


def _subsample(points: Tensor, weights: Tensor | None, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
    if len(points) <= size:
        return points, weights
    keep = torch.randperm(len(points), generator=generator)[:size].to(points.device)
    return points[keep], None if weights is None else weights[keep]
