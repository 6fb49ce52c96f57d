"""Additive quantization (AQLM, AQUATIC-Diff): each vector of weights is a sum of one entry from each of several codebooks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, NamedTuple

from torch import Tensor

from ..formats import CodebookFormat, WeightFormat, codebook_table
from .additive import encode, encode_operations, fit, fit_operations
from .base import Method, Option, Stored, register_method
from .config import GroupSize, QDiffConfig
from .fields import Between
from .threads import block_threads
from .vectors import codebook_format, encode_matrix, group_rms, sample_vectors, stored_codebooks, table_step

# Nominal bits -> (num_codebooks, codebook_bits, vector_size), fitted to each layer and universal. Large vectors are better for a
# universal codebook, which costs nothing however many entries it has, and worse for one that must be stored and fitted.
LAYER_PRESETS = {1: (2, 8, 16), 1.5: (2, 8, 12), 2: (2, 8, 8), 3: (3, 8, 8), 4: (4, 8, 8)}
SHARED_PRESETS = {1: (4, 8, 32), 1.5: (4, 8, 24), 2: (4, 8, 16), 3: (6, 8, 16), 4: (4, 8, 8)}
DEFAULT_BITS = 2
DRAFT_BEAM = 4  # width of the search for codes that will be chosen anew


@dataclass(repr=False)
class AQConfig(QDiffConfig):
    """Additive codebooks (AQLM, AQUATIC-Diff): a vector of weights is a sum of one entry from each of several codebooks.

    Args:
        bits: 1, 1.5, 2, 3 or 4 choose a preset, of which the next three replace what they set.
        num_codebooks, codebook_bits, vector_size: the format, codes cost ``num_codebooks * codebook_bits / vector_size`` bits.
        codebook: "shared" (a universal table that costs nothing to store; wants rotation) or "layer" (fitted to each layer).
        effort: 0 (one pass) to 3 (wide beams, many alternations): quantization time against error.
        kernel_vectors: vectors of a convolution run through the taps of one channel's kernel rather than through channels; with a
            vector_size of 9 each 3 x 3 kernel is a vector (AQUATIC-Diff's KAQ).
    """

    num_codebooks: Annotated[int, Between(1, 8)] | None = None
    codebook_bits: Annotated[int, Between(1, 16)] | None = None
    vector_size: Annotated[int, Between(1, 64)] | None = None
    codebook: Literal["shared", "layer"] | None = None
    group_size: GroupSize | None = None
    effort: Annotated[int, Between(0, 3)] = 1
    kernel_vectors: bool = False

    method_name: ClassVar[str] = "aq"
    bit_choices: ClassVar[tuple[float, ...]] = (1, 1.5, 2, 3, 4)

    @property
    def bits_are_free(self) -> bool:
        return None in (self.num_codebooks, self.codebook_bits, self.vector_size)

    def moves_by(self, assignments: str) -> bool:
        return assignments != "rounding" and (assignments != "candidates" or self.num_codebooks == 1)


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


@register_method
class AQ(Method[AQConfig]):
    config = AQConfig
    label = "AQ"
    title = "additive codebooks (AQ)"
    summary = "additive codebooks: each weight vector is a sum of codebook entries"
    description = """\
Every vector of consecutive weights is a sum of one entry from each of several codebooks, times a scale per output row. Codebook
entries are found by residual k-means and beam search; inputs are rotated by a block Hadamard matrix where the table says so."""
    limits = """\
- Very few bits cost detail first: textures, small faces and letters change before composition does. Decoding codebooks costs time as well,
  so below 3 bits the gain is memory rather than speed."""  # noqa: E501
    citation = """\
@article{hasan2025aquatic,
  title={AQUATIC-Diff: Additive Quantization for Truly Tiny Compressed Diffusion Models},
  author={Hasan, Adil and Peyrin, Thomas},
  journal={arXiv preprint arXiv:2506.05960},
  year={2025}
}"""
    colour = "#16a34a"
    rotates = True  # universal codebooks are made for Gaussian weights, which rotation provides
    slow = True
    suggested_bits = 2
    options = (Option("effort", 1, 0, len(EFFORTS) - 1, "0 is fast, 3 is thorough and takes many times longer."),)

    def formats(self, config: AQConfig, shape: tuple[int, int]) -> list[WeightFormat]:
        return [choose_format(config, shape)]

    def quantize(self, matrix: Tensor, config: AQConfig, seed: int) -> Stored:
        weight_format = choose_format(config, tuple(matrix.shape))
        return weight_format, quantize(matrix, weight_format, effort=config.effort, seed=seed)

    def draft(self, matrix: Tensor, config: AQConfig, seed: int) -> Stored:
        weight_format = choose_format(config, tuple(matrix.shape))
        return weight_format, quantize(matrix, weight_format, effort=config.effort, beam=DRAFT_BEAM, seed=seed)

    def operations(self, config: AQConfig, shape: tuple[int, int]) -> float:
        weight_format, (beam, iterations, sample) = choose_format(config, shape), EFFORTS[config.effort]
        num_codebooks, k, d = weight_format.codebook_shape
        count = shape[0] * -(-shape[1] // d)
        found = encode_operations(count, num_codebooks, k, d, beam)
        if weight_format.table is None:
            found += fit_operations(min(count, sample * k), num_codebooks, k, d, beam=beam, iterations=iterations)
        return found

    def kernel_vectors(self, config: AQConfig, shape: tuple[int, ...]) -> bool:
        return config.kernel_vectors and len(shape) == 4 and shape[2] * shape[3] > 1
