"""Additive codebooks: a vector is approximated by the sum of one entry from each of M codebooks.

Follows additive quantization (Babenko and Lempitsky 2014) as AQLM uses it (Egiazarian et al. 2024): residual k-means to begin
with, then in turn codes by beam search and codebooks by least squares, until the error stops falling.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .compiled import loops
from .kmeans import kmeans, kmeans_operations
from .nearest import BLOCK_WEIGHTS, ScoreBlock, assign, assign_under, augment, rows_in_flight, whiten
from .threads import map_blocks

DIRECT_UNKNOWNS = 2048  # codebook entries up to which the normal equations are factorised; beyond, block after block
SAMPLE_PER_ENTRY = 128
CROSSED_ENTRIES = 1 << 10  # of a codebook, up to which products of entries are tabulated
CROSSED_POINTS = 128  # whose products with all entries are in the cache together
CROSSED_FINE = 1 << 16  # products of entries that fit into the cache with 32 bits each
FINE_BITS = 4.5  # per weight, above which products of entries are kept to more than 16 bits
CROSSED_UNITS = {"i2": 32_000, "i4": 1 << 19}  # that the largest of them is at most
CANDIDATES = 1 << 14  # of all the points searched at a time; their residuals stay in the cache
BRANCH = 8  # continuations that one candidate may contribute to the next beam; 4: 0.3% more error, 16: 0.1% less


class AdditiveFit(NamedTuple):
    """``codebooks`` float32 ``[M, k, d]``, ``codes`` int64 ``[N, M]`` of the fitted sample, and the error after every round."""

    codebooks: Tensor
    codes: Tensor
    errors: list[float]


def fit(
    points: Tensor,
    num_codebooks: int,
    k: int,
    *,
    beam: int = 16,
    iterations: int = 10,
    tolerance: float = 2e-3,
    seed: int = 0,
    weights: Tensor | None = None,
    sample: int | None = None,
) -> AdditiveFit:
    """Fit additive codebooks to points.

    Args:
        points: float32 ``[N, d]``.
        num_codebooks: M.
        k: entries of each codebook, a power of two.
        beam: width of the beam search for codes.
        iterations: most alternations of least squares and beam search.
        tolerance: stop when an alternation lowers the error by less than this fraction.
        seed: the result depends on nothing else.
        weights: ``[N]``, of each point's squared error.
        sample: points to fit on, by default 128 per entry of a codebook.

    Returns:
        errors fall monotonically: a point keeps its codes unless the search finds better ones, and the codebooks solve their
        least-squares problem.
    """
    generator = torch.Generator().manual_seed(seed)
    size = max(sample or SAMPLE_PER_ENTRY * k, num_codebooks)
    if len(points) > size:
        keep = torch.randperm(len(points), generator=generator)[:size].to(points.device)
        points, weights = points[keep], None if weights is None else weights[keep]
    codebooks, codes = residual_kmeans(points, num_codebooks, k, seed=seed, weights=weights)
    errors = [weighted_error(points, codes, codebooks, weights)]
    for _ in range(iterations if num_codebooks > 1 else 2):
        codes = keep_better(points, codes, encode(points, codebooks, beam), codebooks)
        codebooks = update_codebooks(points, codes, codebooks, weights)
        errors.append(weighted_error(points, codes, codebooks, weights))
        if errors[-1] > (1 - tolerance) * errors[-2]:
            break
    return AdditiveFit(codebooks, codes, errors)


def encode_operations(count: int, num_codebooks: int, k: int, d: int, beam: int) -> float:
    """Multiply-adds of :func:`encode` for ``count`` points, roughly."""
    scored = k + (num_codebooks - 1) * float(beam) * k
    return count * scored * (d + 2)


def fit_operations(count: int, num_codebooks: int, k: int, d: int, *, beam: int, iterations: int) -> float:
    """Multiply-adds of :func:`fit` on a sample of ``count`` points, roughly."""
    start = num_codebooks * (kmeans_operations(count, k, d, iterations=8, restarts=1) + float(count) * k * (d + 2))
    return start + (iterations if num_codebooks > 1 else 2) * encode_operations(count, num_codebooks, k, d, beam)


def residual_kmeans(
    points: Tensor, num_codebooks: int, k: int, *, iterations: int = 8, seed: int = 0, weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each codebook is a k-means of what the codebooks before it left over. Codebooks ``[M, k, d]``, greedy codes ``[N, M]``."""
    residual = points
    codebooks, codes = [], []
    for m in range(num_codebooks):
        codebooks.append(kmeans(residual, k, iterations=iterations, restarts=1, seed=seed + m, weights=weights))
        codes.append(assign(residual, codebooks[-1]))
        residual = residual - codebooks[-1][codes[-1]]
    return torch.stack(codebooks), torch.stack(codes, 1)


def decode(codes: Tensor, codebooks: Tensor) -> Tensor:
    """Sum of the entries: codes integer ``[N, M]``, codebooks ``[M, k, d]`` -> ``[N, d]``."""
    out = F.embedding(codes[:, 0], codebooks[0])
    for m in range(1, len(codebooks)):
        out += F.embedding(codes[:, m], codebooks[m])
    return out


def encode(points: Tensor, codebooks: Tensor, beam: int = 16) -> Tensor:
    """Codes that nearly minimise the distance of each point to the sum of its entries.

    Beam search: the best ``beam`` choices from the first codebooks are each continued with every entry of the next one. Works on
    a few thousand candidates at a time, so that the scores (candidates x k) stay in the cache.

    Args:
        points: float32 ``[N, d]``.
        codebooks: float32 ``[M, k, d]``, k a power of two; coarse codebooks first.
        beam: candidates kept; time is proportional to it, and M = 1 needs none.

    Returns:
        int64 ``[N, M]``.
    """
    num_codebooks, k = codebooks.shape[:2]
    if k & (k - 1):
        raise ValueError(f"codebooks need a power of two entries, got {k}")
    if beam < 1:
        raise ValueError(f"beam must be at least 1, got {beam}")
    if num_codebooks == 1:
        return assign(points, codebooks[0])[:, None]
    if (module := _compiled_search(points, codebooks)) is not None:
        search: _CompiledSearch | None = _CompiledSearch(codebooks, beam, module)
    else:
        search = None  # its buffers are one thread's own

    def work(part: slice) -> Tensor:
        return (search or _BeamSearch(codebooks, beam)).encode(points[part])

    return torch.cat(map_blocks(work, points, BLOCK_WEIGHTS))


def encode_under(slopes: Tensor, codebooks: Tensor, metric: Tensor, beam: int) -> Tensor:
    """Codes that nearly minimise ``s B s^T / 2 - <g, s>``, s being the sum of a point's entries: it is nearest to ``g B^-1`` then.

    Args:
        slopes: float32 ``[N, d]``, g.
        codebooks: float32 ``[M, k, d]``.
        metric: float32 ``[d, d]``, positive definite: B.
        beam: as for :func:`encode`.

    Returns:
        int64 ``[N, M]``.
    """
    if len(codebooks) == 1:
        return assign_under(slopes, codebooks[0], metric)[:, None]
    if (module := _compiled_search(slopes, codebooks)) is not None:
        return _CompiledSearch(codebooks, beam, module, metric).encode(slopes)
    points, factor = whiten(slopes, metric)
    return encode(points, codebooks @ factor, beam)


def _compiled_search(points: Tensor, codebooks: Tensor) -> ModuleType | None:
    """Compiled loops, for codebooks of which products of entries fill no more than the caches."""
    module = loops("search_numba", points)
    return module if module is not None and module.QUARTERS <= codebooks.shape[1] <= CROSSED_ENTRIES else None


class _CompiledSearch:
    """The same search without bins, through the products of all entries with each other: a candidate's distances are sums of a
    few rows of tables, however long vectors are. Tables hold integers, of which twice as many fit into the caches."""

    def __init__(self, codebooks: Tensor, beam: int, module: ModuleType, metric: Tensor | None = None) -> None:
        count, k, d = codebooks.shape
        bent = codebooks if metric is None else codebooks @ metric
        self.shape, self.beam = (count, k), beam
        halves = (bent * codebooks).sum(2).div_(2)
        products = count * (count - 1) // 2
        kind = "i2" if products * k * k > CROSSED_FINE and count * math.log2(k) <= FINE_BITS * d else "i4"
        self._search = module.beam_search(kind)
        largest, second = halves.amax(1).clamp_min_(1e-15).sort(descending=True).values[:2].tolist()
        # No product of entries of two codebooks is more units than the table holds. What an entry alone adds must not be too far
        # either: where all codebooks but one are next to nothing, units are those of a second one a few hundredths as large.
        second = max(second, largest * (1.5 * CROSSED_UNITS[kind] / float(module.FAR)) ** 2)
        units = CROSSED_UNITS[kind] / (2 * (largest * second) ** 0.5)
        self.matrix = torch.cat([codebooks.reshape(-1, d) * -units, halves.view(-1, 1) * units], 1).T.contiguous()
        self.crossed = torch.empty(products, k, k, dtype=torch.int16 if kind == "i2" else torch.int32)
        scaled, tables, product = codebooks * units, iter(self.crossed), codebooks.new_empty(k, k)
        for m in range(1, count):
            for entries in scaled[:m]:
                next(tables).copy_(torch.mm(entries, bent[m].T, out=product).round_())

    def encode(self, points: Tensor) -> Tensor:
        """points ``[N, d]``, or their slopes under the metric -> codes ``[N, M]``."""
        codes = torch.empty(len(points), self.shape[0], dtype=torch.long)
        for part, found in zip(F.pad(points, (0, 1), value=1.0).split(CROSSED_POINTS), codes.split(CROSSED_POINTS), strict=True):
            self._search((part @ self.matrix).view(-1, *self.shape).numpy(), self.crossed.numpy(), self.beam, found.numpy())
        return codes


class _BeamSearch:
    """Beam search against fixed codebooks, for chunks of points. Holds a buffer, so each thread needs its own."""

    def __init__(self, codebooks: Tensor, beam: int) -> None:
        self.codebooks = codebooks
        self.beam = beam
        self.k = codebooks.shape[1]
        self.blocks = [ScoreBlock(c) for c in codebooks]
        self.rows = rows_in_flight(self.k, codebooks.device)
        self._buffer = codebooks.new_empty(self.rows, self.k)

    def encode(self, points: Tensor) -> Tensor:
        """points ``[N, d]`` -> codes ``[N, M]``."""
        return torch.cat([self._encode(chunk) for chunk in points.split(max(32, CANDIDATES // self.beam))])

    def _encode(self, points: Tensor) -> Tensor:
        n, d = points.shape
        last = len(self.blocks) - 1
        # Bins of entries, of which only the best competes; four per place in the beam rarely lose a good one.
        score = self._best_of_bins(points, 0, 1 << (4 * self.beam - 1).bit_length())
        score = score.topk(min(self.beam, score.shape[1]), 1, sorted=False).values
        entry = self._index(score)
        paths = entry[:, :, None]
        residuals = points[:, None] - self.codebooks[0][entry]
        for m in range(1, last + 1):
            score = self._best_of_bins(residuals.view(-1, d), m, BRANCH if m < last else 1)
            branches = score.shape[1]
            width = 1 if m == last else min(self.beam, residuals.shape[1] * branches)
            score, position = score.view(n, -1).topk(width, 1, sorted=False)
            entry = self._index(score)
            parent = (position // branches)[:, :, None]
            paths = torch.cat([paths.gather(1, parent.expand(-1, -1, m)), entry[:, :, None]], 2)
            if m < last:
                residuals = residuals.gather(1, parent.expand(-1, -1, d)) - self.codebooks[m][entry]
        return paths[:, 0]

    def _best_of_bins(self, residuals: Tensor, m: int, bins: int) -> Tensor:
        """Best score, with the entry's index in its low bits, in each of ``bins`` parts of codebook m: ``[n, bins]``."""
        bins = min(bins, self.k)
        # A reduction is fast along a long innermost dimension, or across vectors of at least 16 neighbours.
        view, dim = ((-1, self.k // bins, bins), 1) if bins >= 16 else ((-1, bins, self.k // bins), 2)
        inputs = augment(residuals)
        out = residuals.new_empty(len(residuals), bins)
        for start in range(0, len(residuals), self.rows):
            part = slice(start, start + self.rows)
            torch.amax(self.blocks[m].scores(inputs[part], self._buffer).view(view), dim, out=out[part])
        return out

    def _index(self, score: Tensor) -> Tensor:
        return (score.view(torch.int32) & self.blocks[0].index_mask).long().clamp_max_(self.k - 1)


def keep_better(points: Tensor, old: Tensor, new: Tensor, codebooks: Tensor) -> Tensor:
    """Of two sets of codes ``[N, M]``, for each point the one that is nearer."""

    def distance(codes: Tensor) -> Tensor:
        return (points - decode(codes, codebooks)).square_().sum(1)

    return torch.where((distance(new) < distance(old))[:, None], new, old)


def weighted_error(points: Tensor, codes: Tensor, codebooks: Tensor, weights: Tensor | None = None) -> float:
    """(Weighted) mean squared error per coordinate."""
    squares = (points - decode(codes, codebooks)).square_().mean(1)
    if weights is not None:
        squares *= weights
    return float(squares.mean(dtype=torch.float64))


def update_codebooks(points: Tensor, codes: Tensor, codebooks: Tensor, weights: Tensor | None = None) -> Tensor:
    """Codebooks that minimise the squared error with these codes.

    The normal equations are solved for the *change* of the entries, with a trace of damping: adding a vector to one codebook
    and subtracting it from another changes nothing, and an unused entry should stay where it is.

    Args:
        points: float32 ``[N, d]``.
        codes: int64 ``[N, M]``.
        codebooks: float32 ``[M, k, d]``, the present ones.
        weights: ``[N]``.

    Returns:
        float32 ``[M, k, d]``.
    """
    num_codebooks, k, d = codebooks.shape
    residual = points - decode(codes, codebooks)
    if num_codebooks * k > DIRECT_UNKNOWNS:
        return _update_in_turn(residual, codes, codebooks, weights)
    gram = codeword_gram(codes, k, weights)
    right = residual.new_zeros(num_codebooks * k, d, dtype=torch.float64)
    weighted = residual.double() if weights is None else residual.double() * weights[:, None]
    for m in range(num_codebooks):
        right[m * k : (m + 1) * k].index_add_(0, codes[:, m], weighted)
    return codebooks + solve_damped(gram, right).view_as(codebooks).to(codebooks.dtype)


def codeword_gram(codes: Tensor, k: int, weights: Tensor | None = None) -> Tensor:
    """Normal matrix of the codebook problem: how often two entries are used together. float64 ``[M * k, M * k]``."""
    num_codebooks = codes.shape[1]
    gram = torch.zeros(num_codebooks, k, num_codebooks, k, dtype=torch.float64, device=codes.device)
    mass = None if weights is None else weights.double()
    for i in range(num_codebooks):
        for j in range(i, num_codebooks):
            pairs = torch.bincount(codes[:, i] * k + codes[:, j], mass, minlength=k * k).view(k, k)
            gram[i, :, j] = pairs
            gram[j, :, i] = pairs.T
    return gram.view(num_codebooks * k, num_codebooks * k)


def solve_damped(gram: Tensor, right: Tensor, damping: float = 1e-4) -> Tensor:
    """``(gram + damping * mean diagonal)^-1 right``."""
    diagonal = gram.diagonal()
    damped = gram + torch.diag(torch.full_like(diagonal, damping) * diagonal.mean().clamp_min(1e-30))
    return torch.cholesky_solve(right, torch.linalg.cholesky(damped))


def _update_in_turn(residual: Tensor, codes: Tensor, codebooks: Tensor, weights: Tensor | None, sweeps: int = 3) -> Tensor:
    """Block coordinate descent: each codebook's entries become the means of what the others leave to them."""
    codebooks = codebooks.clone()
    mass = residual.new_ones(len(codes)) if weights is None else weights.to(residual.dtype)
    for _ in range(sweeps):
        for m, codebook in enumerate(codebooks):
            used = torch.bincount(codes[:, m], mass, minlength=len(codebook)).to(mass.dtype)[:, None]
            step = torch.zeros_like(codebook).index_add_(0, codes[:, m], residual * mass[:, None]) / used.clamp_min(1e-30)
            codebook += step
            residual = residual - step[codes[:, m]]
    return codebooks
