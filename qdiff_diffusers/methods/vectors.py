"""From a weight matrix to codes and scales, for any codebook: what vector and additive quantization share."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import lru_cache

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from ..errors import ConfigError
from ..formats import CodebookFormat, GroupSize, codebook_table, group_columns, table_shapes
from ..formats.base import SCALE_DTYPES
from ..formats.codebook import TABLES_FILE
from .additive import decode
from .nearest import NeighbourLists
from .threads import map_blocks

WIDER = (1.2, 1.45, 1.75, 2.1, 2.5)  # factors on the scale of a row that a codebook does not cover
FLOAT_CODEBOOK_BITS = 0.01  # bits per weight above which a layer's codebook is stored as int8, which hardly costs accuracy
INTEGER_RANGE = 127  # sums of int8 codebook entries stay within it, so that a kernel may multiply them as int8

Encoder = Callable[[Tensor], Tensor]


def find_table(num_codebooks: int, codebook_bits: int, vector_size: int) -> str | None:
    """Name of the universal codebook of this shape, or ``None``."""
    name = f"gauss_{num_codebooks}x{codebook_bits}_d{vector_size}"
    return name if name in table_shapes() else None


def codebook_format(
    codebook_shape: tuple[int, int, int], codebook: str, group_size: GroupSize, weight_shape: tuple[int, ...]
) -> CodebookFormat:
    """Format with ``codebook_shape`` (num_codebooks, codebook_bits, vector_size), "shared" or one per "layer".

    Raises:
        ConfigError: ``codebook`` is neither, or no universal codebook has that shape.
    """
    if codebook not in ("shared", "layer"):
        raise ConfigError(f'codebook must be "shared" or "layer", got {codebook!r}')
    if codebook == "shared":
        table = find_table(*codebook_shape)
        if table is None:
            raise ConfigError(
                f"no shared codebook has num_codebooks x codebook_bits, vector_size = {codebook_shape}; "
                f'there are {", ".join(table_shapes())}; or use codebook="layer"'
            )
        return CodebookFormat(*codebook_shape, table=table, group_size=group_size)
    entries = codebook_shape[0] * codebook_shape[2] << codebook_shape[1]
    small = entries * 16 > FLOAT_CODEBOOK_BITS * math.prod(weight_shape)
    return CodebookFormat(*codebook_shape, group_size=group_size, codebook_dtype="int8" if small else "float16")


@lru_cache(maxsize=64)
def table_step(name: str) -> float:
    """Value of one integer unit of a universal codebook when it stands for N(0, 1) vectors."""
    with safe_open(TABLES_FILE, "pt") as file:
        return float(json.loads(file.metadata()[name])["step"])


@lru_cache(maxsize=16)
def table_neighbours(name: str) -> NeighbourLists:
    """Those of a universal codebook that is used alone: they take 0.2 s to find, so they are kept."""
    with torch.inference_mode(False):
        return NeighbourLists(codebook_table(name)[0].float())


def group_rms(weight: Tensor, fmt: CodebookFormat) -> Tensor:
    """Root mean square of the weights under each scale: float32, the shape of the format's scales."""
    rows, columns = weight.shape
    if fmt.group_size == "tensor":
        return weight.square().mean(dtype=torch.float64).sqrt().float().view(1, 1)
    size = group_columns(fmt.group_size, columns)
    groups = -(-columns // size)
    out = torch.empty(rows, groups, dtype=torch.float32, device=weight.device)
    for g in range(groups):
        part = weight[:, g * size : (g + 1) * size]
        torch.div(torch.linalg.vector_norm(part, dim=1), part.shape[1] ** 0.5, out=out[:, g])
    return out


def stored_scales(scales: Tensor, fmt: CodebookFormat) -> Tensor:
    """Scales as the format will store them, in float32."""
    dtype = SCALE_DTYPES[fmt.scale_dtype]
    return scales.clamp(-torch.finfo(dtype).max, torch.finfo(dtype).max).to(dtype).float()


def sample_vectors(weight: Tensor, scales: Tensor, fmt: CodebookFormat, size: int, seed: int) -> tuple[Tensor, Tensor]:
    """Vectors of the scaled weight to fit a codebook on, all of them if there are at most ``size``.

    Returns:
        points float32 ``[n, d]`` and the weights ``[n]`` of their squared errors, of mean 1: squared scales.
    """
    rows, columns = weight.shape
    per_row = -(-columns // fmt.vector_size)
    total = rows * per_row
    if total > size:
        chosen = torch.randint(total, (size,), generator=torch.Generator().manual_seed(seed))
    else:
        chosen = torch.arange(total)
    chosen = chosen.to(weight.device)
    row, vector = chosen // per_row, chosen % per_row
    column = vector[:, None] * fmt.vector_size + torch.arange(fmt.vector_size, device=weight.device)
    points = weight[row[:, None], column.clamp_max(columns - 1)].masked_fill_(column >= columns, 0)
    group = vector * fmt.vector_size // group_columns(fmt.group_size, columns)
    scale = scales[row % len(scales), group]
    points /= torch.where(scale == 0, 1, scale)[:, None]
    importance = scale.square()
    return points, importance / importance.mean().clamp_min(1e-30)


def encode_matrix(
    weight: Tensor, fmt: CodebookFormat, scales: Tensor, codebooks: Tensor, stored: Tensor | None, encode: Encoder
) -> dict[str, Tensor]:
    """Codes and least-squares scales of a weight, packed.

    Args:
        weight: float32 ``[rows, columns]``.
        scales: float32 ``[rows or 1, groups]``, those that the codes are chosen with. Afterwards each becomes the best one for
            its codes, ``<w, q> / <q, q>``. Rows that come out much worse than the others try larger ones.
        codebooks: float32 ``[M, k, d]``, the values that codes stand for.
        stored: codebooks to store, or ``None`` if the format names a table.
        encode: points ``[N, d]`` -> codes ``[N, M]``.

    Returns:
        the tensors of ``fmt.tensors(rows, columns)``.
    """
    rows, columns = weight.shape
    scales = stored_scales(scales, fmt)

    def encode_rows(part: slice) -> tuple[Tensor, Tensor]:
        block = _Block(weight[part], group_columns(fmt.group_size, columns), codebooks, encode)
        block.encode(scales[part] if len(scales) == rows else scales)
        if len(scales) == rows:
            block.widen_scales()
        return fmt.pack(block.codes, None, scales)["codes"], block.dots

    packed, dots = zip(*map_blocks(encode_rows, weight), strict=True)
    sums = torch.cat(dots)
    if len(scales) == 1:
        sums = sums.sum(0, keepdim=True)
    best = torch.where(sums[..., 1] > 0, sums[..., 0] / sums[..., 1].clamp_min(1e-30), scales)
    first = torch.zeros(1, -(-columns // fmt.vector_size), fmt.num_codebooks, dtype=torch.long, device=weight.device)
    return fmt.pack(first, stored, stored_scales(best, fmt)) | {"codes": torch.cat(packed)}


class _Block:
    """Some rows on their way to codes.

    Attributes:
        codes: int64 ``[rows, vectors, M]``.
        dots: ``<w, q>`` and ``<q, q>`` of every group, ``[rows, groups, 2]``; q are codebook values, without scale.
    """

    codes: Tensor
    dots: Tensor

    def __init__(self, weight: Tensor, group: int, codebooks: Tensor, encode: Encoder) -> None:
        self.weight = weight
        self.group = group
        self.codebooks = codebooks
        self._encode = encode

    def encode(self, scales: Tensor) -> None:
        """Choose codes with these scales, ``[rows or 1, groups]``."""
        self.scales = scales
        self.codes, self.dots = self._code(self.weight, scales)

    def widen_scales(self) -> None:
        """Try larger scales where the error is far above the median.

        One huge weight makes a rotated row all but binary, far outside of the range a universal codebook was made for. Such rows
        are few, but hold a share of the energy: on MiniLM's trained weights this takes 11% off the error at 4 bits.
        """
        energy = self.weight.square().sum(1).clamp_min(1e-30)
        errors = self._errors(energy, self.dots)
        active = (errors > 1.15 * errors.median()).nonzero()[:, 0]
        for factor in WIDER:
            if not len(active):
                break
            wider = self.scales[active] * factor
            codes, dots = self._code(self.weight[active], wider)
            found = self._errors(energy[active], dots)
            better = found < errors[active]
            active = active[better]
            errors[active], self.codes[active], self.dots[active] = found[better], codes[better], dots[better]

    def _errors(self, energy: Tensor, dots: Tensor) -> Tensor:
        """Relative squared error of rows with least-squares scales."""
        return 1 - (dots[..., 0].square() / dots[..., 1].clamp_min(1e-30)).sum(1) / energy

    def _code(self, weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        rows, columns = weight.shape
        size = self.codebooks.shape[2]
        found = self._encode(split_vectors(_divide(weight, scales, self.group), size))
        values = decode(found, self.codebooks).view(rows, -1)[:, :columns]
        dots = torch.stack([_group_sums(weight * values, self.group), _group_sums(values.square(), self.group)], 2)
        return found.view(rows, -(-columns // size), len(self.codebooks)), dots


def split_vectors(matrix: Tensor, vector_size: int) -> Tensor:
    """``[rows, columns] -> [rows * vectors, vector_size]``, rows padded with zeros to whole vectors."""
    return F.pad(matrix, (0, -matrix.shape[1] % vector_size)).view(-1, vector_size)


def stored_codebooks(codebooks: Tensor, fmt: CodebookFormat) -> tuple[Tensor, float]:
    """Fitted codebooks ``[M, k, d]`` in the format's dtype, and the factor that scales must absorb."""
    if fmt.codebook_dtype == "int8":
        return integer_codebooks(codebooks)
    return codebooks.to(torch.float16), 1.0


def integer_codebooks(codebooks: Tensor) -> tuple[Tensor, float]:
    """Round codebooks ``[M, k, d]`` to int8, as finely as sums within +-127 allow. Returns them and what one unit stands for, the
    same for all: by least squares, so that rounding does not shrink what it rounds, and numbers that are whole already stay."""
    largest = torch.maximum(codebooks.amax(1).sum(0), -codebooks.amin(1).sum(0)).max()
    step = float(largest) / (INTEGER_RANGE - len(codebooks) / 2) or 1.0
    whole = (codebooks / step).round_()
    unit = float((whole * codebooks).sum(dtype=torch.float64)) / (float(whole.square().sum(dtype=torch.float64)) or 1.0)
    return whole.to(torch.int8), unit or 1.0


def _divide(weight: Tensor, scales: Tensor, group: int) -> Tensor:
    scales = torch.where(scales == 0, 1, scales)
    if scales.shape[1] == 1:
        return weight / scales
    return weight / scales.repeat_interleave(group, 1)[:, : weight.shape[1]]


def _group_sums(values: Tensor, group: int) -> Tensor:
    """``[rows, columns] -> [rows, groups]``."""
    return F.pad(values, (0, -values.shape[1] % group)).unflatten(1, (-1, group)).sum(2)
