"""Low-bitwidth floating point (arXiv 2408.06995): encoding and exponent bias chosen by squared error, data-free.

The paper gives each tensor an ExMy encoding and a real-valued exponent bias. A bias b multiplies every level by ``2**-b``, which
is what a free scale does, so the search over biases is a search over scales; here it runs per tensor, row or group.

Two additions make the bits count. Encodings with suffix "uz" put the code of negative zero to use, a 16th level at 4 bits. And a
format may carry two encodings of which each group takes the better one: uniform for groups of even spread, floating for groups
with a peak. The choice sits in the sign of the group's scale and costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from qdiff_kernels.activations import FP8_MAX
from torch import Tensor

from ..formats import MinifloatFormat, WeightFormat
from .base import Method, Stored, register_method
from .clips import ClipSearch
from .config import GroupSize, QDiffConfig
from .fields import Between
from .grids import encoding_grid, format_grids
from .scales import ABOVE_ABSMAX, ABSMAX, Search, pack_groups, quantize_groups
from .targets import POWER
from .threads import block_threads

NAMED_FORMATS = {
    "nvfp4": MinifloatFormat(("e2m1",), 16, "e4m3", tensor_scale=True),
    "mxfp4": MinifloatFormat(("e2m1",), 32, "e8m0"),
    "mxfp8": MinifloatFormat(("e4m3",), 32, "e8m0"),
}
ANY = "exmy"  # every split of the width, compared on the weight
SEARCHES: dict[str, Search | None] = {"fast": None, "grid": ClipSearch(), "absmax": ABSMAX}
SMALLEST = 2.0**-40  # stands in for the largest weight of a layer of zeros
SAMPLE = 1 << 16  # weights on which encodings are compared; their errors differ by percents, the sample's by parts of one

# Encodings of a bit width in short groups, by lowest error on Gaussian, Student-t and trained weights.
PRESETS = {
    2: ("e1m0uz",),
    3: ("e1m1uz",),
    4: ("e1m2uz", "e2m1uz"),
    5: ("e1m3uz", "e2m2uz"),
    6: ("e1m4uz", "e2m3uz"),
    7: ("e1m5", "e2m4"),
    8: ("e1m6", "e2m5"),
}
# Half a bit of scales, as much as round-to-nearest with a float16 scale and zero per 64 weights spends. Beyond 64 weights float16
# scales are cheap, and finer ones matter more.
GROUP_SIZE = 16
E4M3_GROUP = 64


@dataclass(repr=False)
class FPConfig(QDiffConfig):
    """Low-bitwidth floating point: encoding and scale chosen by squared error.

    Args:
        bits: 3 to 8; the encoding is chosen among those of that width.
        weight_format: an encoding ("e2m1", "e4m3", ...) or "nvfp4", "mxfp4", "mxfp8", instead of ``bits``; or "exmy": of all
            encodings of ``bits`` the one that fits a layer's weights best, as in the paper.
        group_size: columns that share a scale, "row" or "tensor".
        scale_dtype: "float16", "bfloat16", "float32", "e4m3" or "e8m0" (powers of two, of symmetric encodings).
        tensor_scale: of formats with one scale for the whole weight (NVFP4 above its others), that scale. ``None``: found by error.
            "power": the smallest power of two under which the largest weight fits. A number: this one, for weights that another
            program joins.
        scale_search: of scales, which are what the paper calls exponent biases. "fast": few candidates about the largest weight,
            then least squares. "grid": the paper's 111 clips from 0.1 to 1.2 times the largest weight, each tried on every
            weight. "absmax": none, the largest weight is the largest number.
    """

    weight_format: str | None = None
    group_size: GroupSize | None = None
    scale_dtype: Literal["float16", "bfloat16", "float32", "e4m3", "e8m0"] | None = None
    tensor_scale: Annotated[float, Between(2.0**-60, 2.0**60)] | Literal["power"] | None = None
    scale_search: Literal["fast", "grid", "absmax"] = "fast"

    method_name: ClassVar[str] = "fp"
    bit_choices: ClassVar[tuple[float, ...]] = (3, 4, 5, 6, 8)

    @property
    def bits_are_free(self) -> bool:
        return self.weight_format in (None, ANY)


@block_threads()
def quantize(
    weight: Tensor,
    weight_format: MinifloatFormat | Sequence[MinifloatFormat],
    search: Search | None = None,
    tensor_scale: float | None = None,
) -> tuple[MinifloatFormat, dict[str, Tensor]]:
    """Quantize a matrix to a minifloat format, or to the one of several that fits it best.

    Args:
        weight: float32 ``[rows, columns]``.
        weight_format: a format, or candidates of equal cost that are compared by squared error, on a sample of rows or, as the
            paper does, together with all clips on all of them.
        search: scale candidates; the default adapts to the grid and the group size.
        tensor_scale: the scale of the whole tensor, where it is given.

    Returns:
        The format and its tensors.
    """
    candidates = [weight_format] if isinstance(weight_format, MinifloatFormat) else list(weight_format)
    best = candidates[0] if len(candidates) == 1 else _fittest(weight, candidates, search)
    arguments = best.group_size, best.scale_dtype, bool(best.tensor_scale), search
    return best, pack_groups(best, quantize_groups(weight, format_grids(best), *arguments, tensor_value=tensor_scale))


def quantize_config(weight: Tensor, config: FPConfig) -> tuple[MinifloatFormat, dict[str, Tensor]]:
    """Quantize ``weight [rows, columns]`` as a config asks."""
    formats, given = _formats(config), config.tensor_scale
    scale = power_scale(float(weight.abs().max()), formats[0]) if given == POWER else given
    return quantize(weight, formats, SEARCHES[config.scale_search], scale)  # type: ignore[arg-type]


def power_scale(largest: float, weight_format: MinifloatFormat) -> float:
    """The smallest power of two that is a tensor's scale under which a weight of ``largest`` magnitude fits, with its search."""
    top = max(abs(level) for levels in weight_format.levels() for level in levels)
    room = FP8_MAX / ABOVE_ABSMAX if weight_format.tensor_scale else 1.0
    return 2.0 ** math.ceil(math.log2(max(largest, SMALLEST) / (top * room)))


def has_tensor_scale(weight_format: MinifloatFormat) -> bool:
    """Whether one scale serves the whole weight, above others or alone."""
    return weight_format.tensor_scale is True or weight_format.group_size == "tensor"


def _formats(config: FPConfig) -> list[MinifloatFormat]:
    return formats_for(config.bits, config.weight_format, config.group_size, config.scale_dtype)


def formats_for(
    bits: float | None = None,
    weight_format: str | None = None,
    group_size: GroupSize | None = None,
    scale_dtype: str | None = None,
) -> list[MinifloatFormat]:
    """Candidate formats of a request; what is ``None`` follows the preset of the bit width.

    Args:
        bits: 2 to 8 (default 4), if there is no ``weight_format``.
        weight_format: "nvfp4", "mxfp4", "mxfp8", an encoding ("e2m1"), two ("e1m2uz,e2m1uz"), or "exmy" for all of the width.
        group_size: columns per scale, "row" or "tensor".
        scale_dtype: "float16", "bfloat16", "float32", "e4m3" (with a float32 scale per tensor above it) or "e8m0".

    Raises:
        ValueError: an encoding is unknown, or the parts do not go together.
    """
    if weight_format in NAMED_FORMATS:
        named = NAMED_FORMATS[weight_format]
        if group_size not in (None, named.group_size) or scale_dtype not in (None, named.scale_dtype):
            raise ValueError(
                f'{weight_format} has groups of {named.group_size} and {named.scale_dtype} scales; for others give "e2m1" or "e4m3"'
            )
        return [named]
    encodings = tuple(weight_format.split(",")) if weight_format is not None and weight_format != ANY else None
    width = encoding_width(encodings) if encodings else int(bits or 4)
    if width not in PRESETS:
        raise ValueError(f"bits must be one of {', '.join(map(str, PRESETS))}, got {bits}")
    group_size = GROUP_SIZE if group_size is None else group_size
    if scale_dtype is None:
        scale_dtype = "e4m3" if isinstance(group_size, int) and group_size <= E4M3_GROUP else "float16"
    if encodings:
        choices = [encodings]
    else:
        choices = _splits(width) if weight_format == ANY else _encodings(width, group_size, scale_dtype)
    formats = [MinifloatFormat(e, group_size, scale_dtype, scale_dtype == "e4m3") for e in choices]
    if scale_dtype == "e8m0" and (lopsided := [f for f in formats if not all(grid.symmetric for grid in format_grids(f))]):
        raise ValueError(
            f'scale_dtype "e8m0" has no sign, which {",".join(lopsided[0].encodings)} needs; give an encoding without "uz", or '
            'scale_dtype "float16" or "e4m3"'
        )
    return formats


def encoding_width(encodings: Sequence[str]) -> int:
    """Bits of a code.

    Raises:
        ValueError: an encoding is unknown.
    """
    try:
        return encoding_grid(encodings[0]).bits
    except ValueError as error:
        named = ", ".join(map(repr, (*NAMED_FORMATS, ANY)))
        raise ValueError(f"weight_format must be {named}, or one or two encodings such as 'e2m1': {error}") from error


def check_width(bits: float | None, width: int, weight_format: str) -> None:
    """Refuse bits that contradict a weight format.

    Raises:
        ValueError: names both.
    """
    if bits not in (None, width):
        raise ValueError(f"weight_format {weight_format!r} has {width} bits, not bits={bits}; give one of the two")


def _encodings(bits: int, group_size: GroupSize, scale_dtype: str) -> list[tuple[str, ...]]:
    """Encodings to compare: every split of the width where a scale serves many weights, the preset in small groups."""
    splits = _splits(bits)
    if scale_dtype == "e8m0":
        return splits
    long = not isinstance(group_size, int) or group_size > 128
    return [PRESETS[bits], *splits[1:]] if long else [PRESETS[bits]]


def _splits(bits: int) -> list[tuple[str, ...]]:
    return [(f"e{e}m{bits - 1 - e}",) for e in range(1, min(bits, 6))]


def _fittest(weight: Tensor, candidates: list[MinifloatFormat], search: Search | None) -> MinifloatFormat:
    step = 1 if isinstance(search, ClipSearch) else max(1, weight.numel() // SAMPLE)
    sample = weight[::step] if step <= len(weight) // 4 else weight[:: max(1, len(weight) // 4)]

    def error(candidate: MinifloatFormat) -> float:
        arguments = candidate.group_size, candidate.scale_dtype, bool(candidate.tensor_scale)
        return quantize_groups(sample, format_grids(candidate), *arguments, search).error

    return min(candidates, key=error)


@register_method
class FP(Method[FPConfig]):
    config = FPConfig
    label = "FP"
    title = "low-bitwidth floating point (FP)"
    summary = "low-bit floating point, format and scales searched for least squared error"
    description = """\
Weights are small floating-point numbers. The split into exponent and mantissa bits and the real-valued scale (the exponent bias)
are chosen by squared error."""
    limits = """\
- With 4 bits or fewer, layers with a few very large weights lose most; leave them out with `modules_to_not_convert` if it shows."""
    citation = """\
@article{chen2024lowbitwidth,
  title={Low-Bitwidth Floating Point Quantization for Efficient High-Quality Diffusion Models},
  author={Chen, Cheng and Giannoula, Christina and Moshovos, Andreas},
  journal={arXiv preprint arXiv:2408.06995},
  year={2024}
}"""
    colour = "#d18616"
    named_formats = tuple(NAMED_FORMATS)

    def check(self, config: FPConfig) -> None:
        if not config.bits_are_free:
            check_width(config.bits, _formats(config)[0].bits, str(config.weight_format))
        if config.tensor_scale is not None and not all(map(has_tensor_scale, _formats(config))):
            raise ValueError('tensor_scale goes with group_size "tensor", and with e4m3 scales such as those of "nvfp4"')
        if config.tensor_scale is not None and config.unbiased:
            raise ValueError("tensor_scale goes with unbiased=False, as unbiased weights have a scale of their own")

    def formats(self, config: FPConfig, shape: tuple[int, int]) -> list[WeightFormat]:
        return [*_formats(config)]

    def quantize(self, matrix: Tensor, config: FPConfig, seed: int) -> Stored:
        return quantize_config(matrix, config)
