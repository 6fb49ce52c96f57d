"""Make the universal codebooks that ship with the package: additive codebooks for vectors of independent N(0, 1) numbers.

    python tools/make_codebook_tables.py [--only NAME ...] [--output FILE] [--check]

A weight matrix whose rows were rotated by a Hadamard transform and divided by their scale looks like Gaussian noise, whatever
the model, so one codebook made here serves every layer and need not be stored with any.

Codebooks are fitted on fresh random samples in every round (nothing to overfit), with sufficient statistics averaged over the
last rounds, and rounded to int8 with one step per table, which the weight's scale absorbs.

Everything follows from the seed; on another CPU or torch build the last digits may differ. About 25 minutes on one core.
Metadata of the output holds, per table, a JSON object: ``step`` (value of one integer unit), ``mse`` (per coordinate, on fresh
vectors, int8 entries, encoded with ``beam``), ``bits`` per weight and ``bits_over`` the Gaussian rate-distortion limit.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from qdiff_diffusers.methods.additive import codeword_gram, decode, encode, residual_kmeans, solve_damped
from qdiff_diffusers.methods.nearest import nearest
from qdiff_diffusers.methods.vectors import integer_codebooks

OUTPUT = Path(__file__).parents[1] / "qdiff_diffusers" / "formats" / "codebook_tables.safetensors"
SEED = 20250601
CHECK_BEAM = 16


class Table(NamedTuple):
    """One universal codebook to make.

    Attributes:
        noise: standard deviation, in quantization errors, of the noise that blurs the first assignments, falling to zero. It
            helps k-means out of poor optima when there are few dimensions (12 bits, d = 3: 1% less error), not otherwise.
        rounds: of fitting; ``points`` fresh vectors each.
    """

    num_codebooks: int
    codebook_bits: int
    vector_size: int
    points: int
    rounds: int
    noise: float = 0.0

    @property
    def name(self) -> str:
        return f"gauss_{self.num_codebooks}x{self.codebook_bits}_d{self.vector_size}"

    @property
    def bits(self) -> float:
        return self.num_codebooks * self.codebook_bits / self.vector_size

    def bits_over(self, mse: float) -> float:
        """Bits above the least that any code needs for this error: ``bits - log2(1 / mse) / 2``."""
        return self.bits + 0.5 * math.log2(mse)


TABLES = (
    Table(4, 8, 32, 12000, 120, 0.4),  # 1 bit
    Table(4, 8, 24, 12000, 120, 0.4),  # 1.33 bits
    Table(2, 8, 12, 40000, 120, 0.4),
    Table(4, 8, 16, 20000, 150, 0.4),  # 2 bits
    Table(2, 8, 8, 40000, 150, 0.5),
    Table(1, 12, 6, 120000, 150),
    Table(1, 8, 4, 100000, 300),
    Table(3, 8, 10, 24000, 90, 0.4),  # 2.4 bits
    Table(1, 12, 5, 120000, 80),
    Table(6, 8, 16, 16000, 150, 0.4),  # 3 bits
    Table(1, 12, 4, 120000, 150),
    Table(2, 10, 6, 60000, 45, 0.4),  # 3.33 bits
    Table(1, 10, 3, 60000, 150, 0.5),
    Table(4, 8, 8, 24000, 200, 0.4),  # 4 bits
    Table(1, 12, 3, 120000, 150, 0.5),
    Table(3, 10, 7, 40000, 35, 0.4),  # 4.29 bits
    Table(1, 13, 3, 160000, 60, 0.5),  # 4.33 bits
)


def fit_single(table: Table) -> Tensor:
    """k-means, with running sums over fresh samples. ``[1, k, d]``."""
    k, d = 1 << table.codebook_bits, table.vector_size
    # Cells of an optimal code are as dense as the d/(d+2)-th power of the density: a wider Gaussian.
    centroids = torch.randn(k, d) * ((d + 2) / d) ** 0.5
    total, count = torch.zeros(k, d), torch.zeros(k)
    for i in range(table.rounds):
        done = i / table.rounds
        points = torch.randn(table.points, d)
        codes = nearest(blurred(points, table, done), centroids)[0]
        keep = 0.0 if done < 0.1 else 0.5 if done < 0.3 else 0.8 if done < 0.6 else 0.95 if done < 0.8 else 0.98
        total = (total * keep).index_add_(0, codes, points)
        count = count * keep + torch.bincount(codes, minlength=k)
        centroids = torch.where(count[:, None] > 0.5, total / count.clamp_min(0.5)[:, None], centroids)
    return centroids[None]


def fit_additive(table: Table) -> tuple[Tensor, Tensor, Tensor]:
    """Codebooks ``[M, k, d]`` and the averaged normal equations ``gram [Mk, Mk]``, ``right [Mk, d]`` of the last rounds."""
    m, k, d = table.num_codebooks, 1 << table.codebook_bits, table.vector_size
    codebooks, _ = residual_kmeans(torch.randn(80 * k, d), m, k, seed=SEED)
    gram, right = torch.zeros(m * k, m * k, dtype=torch.float64), torch.zeros(m * k, d, dtype=torch.float64)
    for i in range(table.rounds):
        done = i / table.rounds
        points = torch.randn(table.points, d)
        codes = encode(blurred(points, table, done), codebooks, 16 if done < 0.7 else 32)
        keep = 0.7 if done < 0.5 else 0.95
        gram = gram * keep + codeword_gram(codes, k)
        right *= keep
        for j in range(m):
            right[j * k : (j + 1) * k].index_add_(0, codes[:, j], points.double())
        flat = codebooks.flatten(0, 1).double()
        codebooks = (flat + solve_damped(gram, right - gram @ flat, 1e-3)).float().view(m, k, d)
    return codebooks, gram, right


def blurred(points: Tensor, table: Table, done: float) -> Tensor:
    width = table.noise * 2.0 ** (0.25 - table.bits) * max(0.0, 1 - done / 0.8)
    return points + torch.randn_like(points) * width if width else points


def round_in_turn(codebooks: Tensor, gram: Tensor, right: Tensor) -> tuple[Tensor, float]:
    """int8 codebooks and their step. Each codebook makes up for the rounding of those before it."""
    m, k, d = codebooks.shape
    _, step = integer_codebooks(codebooks)
    flat = codebooks.flatten(0, 1).double()
    for j in range(m):
        fixed, free = slice(0, (j + 1) * k), slice((j + 1) * k, m * k)
        flat[fixed] = (flat[fixed] / step).round() * step
        if j < m - 1:
            change = right[free] - gram[free] @ flat
            flat[free] += solve_damped(gram[free, free], change, 1e-3)
    integers = (flat / step).round().view(m, k, d)
    largest = torch.maximum(integers.amax(1).sum(0), -integers.amin(1).sum(0)).max()
    assert largest <= 127, f"sums of entries reach {largest}"
    return integers.to(torch.int8), step


def make(table: Table) -> tuple[Tensor, float]:
    """int8 codebooks ``[M, k, d]`` and the value of one unit."""
    torch.manual_seed(SEED)
    if table.num_codebooks == 1:
        return integer_codebooks(fit_single(table))
    return round_in_turn(*fit_additive(table))


def gaussian_mse(codebooks: Tensor, step: float, beam: int = CHECK_BEAM, weights: int = 1 << 20) -> float:
    """Mean squared error per coordinate on fresh Gaussian vectors."""
    torch.manual_seed(SEED + 1)
    values = codebooks.float() * step
    points = torch.randn(weights // values.shape[2], values.shape[2])
    return float((points - decode(encode(points, values, beam), values)).square().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[t.name for t in TABLES], metavar="NAME")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--check", action="store_true", help="only measure the tables of the output file")
    args = parser.parse_args()
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    if args.output.exists():
        with safe_open(args.output, "pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in metadata}
    for table in TABLES:
        if table.name not in args.only:
            continue
        start = time.perf_counter()
        if args.check:
            codebooks, step = tensors[table.name], json.loads(metadata[table.name])["step"]
        else:
            codebooks, step = make(table)
        mse = gaussian_mse(codebooks, step)
        seconds = time.perf_counter() - start
        over = table.bits_over(mse)
        print(f"{table.name:16} {table.bits:.3f} bits  mse {mse:.5f}  {over:+.3f} bits over  {seconds:.0f} s", flush=True)
        tensors[table.name] = codebooks
        about = {"step": step, "mse": round(mse, 6), "beam": CHECK_BEAM, "bits": round(table.bits, 4), "seed": SEED}
        metadata[table.name] = json.dumps(about | {"bits_over": round(over, 4)})
    if not args.check:
        save_file(tensors, args.output, metadata)


if __name__ == "__main__":
    main()
