"""Additive quantization (AQLM, AQUATIC-Diff): each vector of weights is a sum of one entry from each of several codebooks."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..config import AQConfig
from ..formats import CodebookFormat, codebook_table
from .additive import encode, fit
from .threads import block_threads
from .vectors import codebook_format, encode_matrix, group_rms, sample_vectors, stored_codebooks, table_step

# Nominal bits -> (num_codebooks, codebook_bits, vector_size), fitted to each layer and universal. Large vectors are better for a
# universal codebook, which costs nothing however many entries it has, and worse for one that must be stored and fitted.
LAYER_PRESETS = {1: (2, 8, 16), 1.5: (2, 8, 12), 2: (2, 8, 8), 3: (3, 8, 8), 4: (4, 8, 8)}
SHARED_PRESETS = {1: (4, 8, 32), 1.5: (4, 8, 24), 2: (4, 8, 16), 3: (6, 8, 16), 4: (4, 8, 8)}
DEFAULT_BITS = 2


class Effort(NamedTuple):
    """How long to look: width of the beam, alternations, and the vectors per codebook entry that codebooks are fitted on."""

    beam: int
    iterations: int
    sample_per_entry: int


EFFORTS = (Effort(4, 2, 64), Effort(16, 8, 128), Effort(32, 16, 256), Effort(64, 30, 512))


def choose_format(config: AQConfig, shape: tuple[int, ...]) -> CodebookFormat:
    """Format for a weight matrix of ``shape [rows, columns]``: a universal codebook unless rotation is off or the shape is free.

    Raises:
        ConfigError: there is no universal codebook of the shape asked for.
    """
    bits = config.bits or DEFAULT_BITS
    free = any(v is not None for v in (config.num_codebooks, config.codebook_bits, config.vector_size))
    codebook = config.codebook or ("layer" if free or config.rotation is False else "shared")
    presets = LAYER_PRESETS if codebook == "layer" else SHARED_PRESETS
    num_codebooks, codebook_bits, vector_size = presets[bits]
    return codebook_format(
        (config.num_codebooks or num_codebooks, config.codebook_bits or codebook_bits, config.vector_size or vector_size),
        codebook,
        config.group_size or "row",
        shape,
    )


@block_threads()
def quantize(weight: Tensor, fmt: CodebookFormat, *, effort: int = 1, beam: int | None = None, seed: int = 0) -> dict[str, Tensor]:
    """Codes, codebooks and scales of a weight.

    The codebooks are fitted to a sample of the scaled weight's vectors (residual k-means, then least squares and beam search in
    turn), or are the universal ones that the format names; then every vector is encoded by beam search, and each scale takes its
    least-squares value.

    Args:
        weight: float32 ``[rows, columns]``, rotated if that is wanted.
        effort: 0 to 3, an index of ``EFFORTS``.
        beam: width of the beam instead of the effort's.
        seed: of the sample and of k-means.

    Returns:
        the tensors of ``fmt.tensors(rows, columns)``.
    """
    if not 0 <= effort < len(EFFORTS):
        raise ValueError(f"effort must be 0 to {len(EFFORTS) - 1}, got {effort}")
    width, iterations, sample = EFFORTS[effort]
    width = beam or width
    weight = weight.float()
    scales = group_rms(weight, fmt)
    if fmt.table is not None:
        codebooks, scales, stored = codebook_table(fmt.table).to(weight), scales * table_step(fmt.table), None
    else:
        k = 1 << fmt.codebook_bits
        points, weights = sample_vectors(weight, scales, fmt, sample * k, seed)
        fitted = fit(points, fmt.num_codebooks, k, beam=width, iterations=iterations, seed=seed, weights=weights, sample=sample * k)
        stored, step = stored_codebooks(fitted.codebooks, fmt)
        codebooks, scales = stored.float(), scales * step
    return encode_matrix(weight, fmt, scales, codebooks, stored, lambda points: encode(points, codebooks, width))
