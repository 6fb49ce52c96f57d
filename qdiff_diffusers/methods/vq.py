"""Vector quantization (VQ4DiT): each vector of weights is one entry of a codebook, fitted to the layer or universal."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor

from ..config import VQConfig
from ..formats import CodebookFormat, codebook_table
from .kmeans import SAMPLE_PER_CENTROID, kmeans
from .nearest import EntryIndex, assign
from .threads import block_threads
from .vectors import Encoder, codebook_format, encode_matrix, group_rms, sample_vectors, stored_codebooks, table_step

# Nominal bits -> (codebook_bits, vector_size). Those fitted to a layer are VQ4DiT's own at 2 and 3 bits.
LAYER_PRESETS: dict[float, tuple[int, int]] = {2: (8, 4), 3: (6, 2), 4: (8, 2), 8: (8, 1)}
SHARED_PRESETS: dict[float, tuple[int, int]] = {2: (12, 6), 3: (12, 4), 4: (12, 3)}
DEFAULT_BITS = 2
INDEX_FROM = 1024  # entries of a codebook that is searched through an index


def choose_format(config: VQConfig, shape: tuple[int, ...]) -> CodebookFormat:
    """Format for a weight matrix of ``shape [rows, columns]``.

    By default a preset uses a universal codebook unless rotation is off, and a shape of one's own a codebook per layer.

    Raises:
        ConfigError: there is no universal codebook of the shape asked for.
    """
    bits = config.bits or DEFAULT_BITS
    free = config.codebook_bits is not None or config.vector_size is not None
    default = "layer" if free or config.rotation is False or bits not in SHARED_PRESETS else "shared"
    codebook = config.codebook or default
    presets = SHARED_PRESETS if codebook == "shared" and bits in SHARED_PRESETS else LAYER_PRESETS
    codebook_bits, vector_size = presets[bits]
    return codebook_format(
        (1, config.codebook_bits or codebook_bits, config.vector_size or vector_size),
        codebook,
        "row" if config.row_scales else "tensor",
        shape,
    )


@block_threads()
def quantize(weight: Tensor, fmt: CodebookFormat, *, seed: int = 0, restarts: int = 3, iterations: int = 15) -> dict[str, Tensor]:
    """Codes, codebook and scales of a weight.

    The codebook is a k-means of a sample of the scaled weight's vectors, or the universal one that the format names; then each
    vector takes its nearest entry, and each scale its least-squares value.

    Args:
        weight: float32 ``[rows, columns]``, rotated if that is wanted.
        fmt: with one codebook.
        seed: of the sample and of k-means.
        restarts: of k-means; the best is kept.
        iterations: Lloyd iterations.

    Returns:
        the tensors of ``fmt.tensors(rows, columns)``.
    """
    if fmt.num_codebooks != 1:
        raise ValueError(f"vector quantization has one codebook, the format has {fmt.num_codebooks}; use method aq")
    weight = weight.float()
    scales = group_rms(weight, fmt)
    if fmt.table is not None:
        codebooks, scales, stored = codebook_table(fmt.table).to(weight), scales * table_step(fmt.table), None
    else:
        k = 1 << fmt.codebook_bits
        points, weights = sample_vectors(weight, scales, fmt, SAMPLE_PER_CENTROID * k, seed)
        fitted = kmeans(points, k, iterations=iterations, restarts=restarts, seed=seed, weights=weights)
        stored, step = stored_codebooks(fitted[None], fmt)
        codebooks, scales = stored.float(), scales * step
    if codebooks.shape[1] < INDEX_FROM or weight.device.type != "cpu":
        search: Encoder = partial(assign, centroids=codebooks[0])
    else:
        search = (table_index(fmt.table) if fmt.table is not None else EntryIndex(codebooks[0])).assign
    return encode_matrix(weight, fmt, scales, codebooks, stored, lambda points: search(points)[:, None])


@lru_cache(maxsize=16)
def table_index(name: str) -> EntryIndex:
    """The index of a universal codebook takes 0.1 s to make, so it is kept."""
    with torch.inference_mode(False):
        return EntryIndex(codebook_table(name)[0].float())
