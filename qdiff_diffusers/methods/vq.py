"""Vector quantization (VQ4DiT): each vector of weights is one entry of a codebook, fitted to the layer or universal."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor

from ..formats import CodebookFormat, WeightFormat, codebook_table
from .base import Method, Stored, register_method
from .config import QDiffConfig
from .fields import Between
from .kmeans import SAMPLE_PER_CENTROID, kmeans, kmeans_operations
from .nearest import EntryIndex, assign
from .threads import block_threads
from .vectors import Encoder, codebook_format, encode_matrix, group_rms, sample_vectors, stored_codebooks, table_step

# Nominal bits -> (codebook_bits, vector_size). Those fitted to a layer are VQ4DiT's own at 2 and 3 bits.
LAYER_PRESETS: dict[float, tuple[int, int]] = {2: (8, 4), 3: (6, 2), 4: (8, 2), 8: (8, 1)}
SHARED_PRESETS: dict[float, tuple[int, int]] = {2: (12, 6), 3: (12, 4), 4: (12, 3)}
DEFAULT_BITS = 2
INDEX_FROM = 1024  # entries of a codebook that is searched through an index
INDEX_SHARE = 4  # of whose entries it compares a point with one in so many


@dataclass(repr=False)
class VQConfig(QDiffConfig):
    """One k-means codebook per layer (VQ4DiT): 8 bits x 4 weights = 2 bits, 6 bits x 2 = 3 bits.

    Args:
        bits: 2, 3, 4 or 8 choose a preset, of which the next two replace what they set.
        codebook_bits, vector_size: the format, codes cost ``codebook_bits / vector_size`` bits.
        codebook: "layer" (fitted to each layer) or "shared" (a universal table; wants rotation).
        row_scales: one scale per output row besides the codebook.
        restarts: k-means restarts of a codebook that is fitted; the best is kept.
    """

    codebook_bits: Annotated[int, Between(1, 16)] | None = None
    vector_size: Annotated[int, Between(1, 64)] | None = None
    codebook: Literal["shared", "layer"] | None = None
    row_scales: bool = True
    restarts: Annotated[int, Between(1, 100)] = 2

    method_name: ClassVar[str] = "vq"
    bit_choices: ClassVar[tuple[float, ...]] = (2, 3, 4, 8)

    @property
    def bits_are_free(self) -> bool:
        return None in (self.codebook_bits, self.vector_size)

    def moves_by(self, assignments: str) -> bool:
        return assignments != "rounding"


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


@register_method
class VQ(Method[VQConfig]):
    config = VQConfig
    label = "VQ"
    title = "vector quantization (VQ)"
    summary = "one k-means codebook of short weight vectors per layer"
    description = """\
Every vector of consecutive weights is one entry of a k-means codebook, times a scale per output row."""
    limits = """\
- Very few bits cost detail first: textures, small faces and letters change before composition does."""
    citation = """\
@article{deng2024vq4dit,
  title={VQ4DiT: Efficient Post-Training Vector Quantization for Diffusion Transformers},
  author={Deng, Juncan and Li, Shuaiting and Wang, Zeyu and Gu, Hong and Xu, Kedong and Huang, Kejie},
  journal={arXiv preprint arXiv:2408.17131},
  year={2024}
}"""
    colour = "#a855f7"
    rotates = True  # universal codebooks are made for Gaussian weights, which rotation provides
    slow = True
    suggested_bits = 3

    def formats(self, config: VQConfig, shape: tuple[int, int]) -> list[WeightFormat]:
        return [choose_format(config, shape)]

    def quantize(self, matrix: Tensor, config: VQConfig, seed: int) -> Stored:
        weight_format = choose_format(config, tuple(matrix.shape))
        return weight_format, quantize(matrix, weight_format, restarts=config.restarts, seed=seed)

    def operations(self, config: VQConfig, shape: tuple[int, int]) -> float:
        weight_format = choose_format(config, shape)
        _, k, d = weight_format.codebook_shape
        count = shape[0] * -(-shape[1] // d)
        found = float(count) * k * (d + 2) / (INDEX_SHARE if k >= INDEX_FROM else 1)
        return found if weight_format.table else found + kmeans_operations(count, k, d, restarts=config.restarts)
