"""k-means for weight vectors: k-means++ seeds, Lloyd iterations and Lloyd-Max levels."""

from __future__ import annotations

import torch
from torch import Tensor

from .nearest import nearest

SEEDING_PASSES = 8  # over memory for each centroid that k-means++ draws, each as slow as a multiply-add per coordinate
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


def kmeans_operations(count: int, k: int, d: int, *, iterations: int = 15, restarts: int = 3) -> float:
    """Multiply-adds of :func:`kmeans` on ``count`` points, roughly."""
    count = min(count, SAMPLE_PER_CENTROID * k)
    if d == 1:
        return float(iterations * 10 * k + 64 * count)
    part = min(count, (32 if restarts > 1 else 16) * k)
    seeding = float(k) * part * d * SEEDING_PASSES
    return restarts * (seeding + (3.0 * part * k * (d + 2) if restarts > 1 else 0)) + float(iterations) * count * k * (d + 2)


def seed_centroids(points: Tensor, k: int, generator: torch.Generator, weights: Tensor | None = None) -> Tensor:
    """k-means++ (Arthur and Vassilvitskii 2007): each further centroid is a point drawn in proportion to its squared distance."""
    mass = points.new_ones(len(points)) if weights is None else weights.to(points.dtype)
    chosen = torch.empty(k, dtype=torch.long, device=points.device)
    uniform = torch.rand(k, generator=generator, dtype=torch.float32).to(points.device)
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


def _lloyd_max(values: Tensor, k: int, weights: Tensor | None, iterations: int) -> Tensor:
    """Lloyd-Max levels ``[k]`` of a sample ``[N]``. Sorted once, an iteration is k binary searches in running sums.

    Starts from the cube root of the density, the optimum for many levels (Panter and Dite 1951).
    """
    values, order = values.double().sort()
    mass = torch.ones_like(values) if weights is None else weights.double()[order]
    count = torch.cat([mass.new_zeros(1), mass.cumsum(0)])
    total = torch.cat([mass.new_zeros(1), (mass * values).cumsum(0)])
    edges = torch.linspace(0, len(values) - 1, min(4 * k, len(values)) + 1, dtype=torch.float32, device=values.device).long()
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
