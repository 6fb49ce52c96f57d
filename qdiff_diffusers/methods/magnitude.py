"""Weights of any magnitude: rows are brought near 1 by powers of two before anything is fitted, and their scales take them back.

Scales are float16 where that holds them: from about 1e-6 to 65504. What lies beyond is divided by a power of two, quantized like
any other weight, and stored with float32 scales, which hold the product with that power exactly. So the codes of ``W * 2**k`` are
those of ``W``, with the same relative error, and no square inside a method leaves the range of float32. Ordinary weights are left
as they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..formats import CodebookFormat, IntegerFormat, LayerSpec, MinifloatFormat, WeightFormat
from ..formats.spec import EXTRAS_DTYPES
from .scales import short_scale
from .threads import map_blocks

HIGH = 10  # exponent below which weights are ordinary, and which those beyond are brought to: 64 times it is still below 65504
CODEBOOK_LEVELS = 127.0  # a scale per row is about this much smaller than its largest weight
FINEST = 2.0**-24  # smallest number of float16
LEAST_STEPS = 4  # of which a scale must be at least these many, or its row is lost


class Reach(NamedTuple):
    """What a weight's formats hold with float16 scales.

    Attributes:
        least: smallest largest weight of a layer whose scales float16 holds as finely as the format's own steps.
        least_row: smallest largest weight of a row that float16 scales hold at all.
        by_row: whether each row has scales of its own.
    """

    least: float
    least_row: float
    by_row: bool


def reach(formats: Sequence[WeightFormat]) -> Reach:
    """Of the formats that may be chosen for a weight."""
    tops = [_top(fmt) for fmt in formats]
    return Reach(
        max(level * level / gap * FINEST * 2 for level, gap in tops),
        max(level * FINEST * LEAST_STEPS for level, _ in tops),
        all(getattr(fmt, "group_size", None) != "tensor" and not getattr(fmt, "tensor_scale", False) for fmt in formats),
    )


def _top(fmt: WeightFormat) -> tuple[float, float]:
    """The largest level of a format, and its distance from the one below."""
    if isinstance(fmt, IntegerFormat):
        return 2.0 ** (fmt.bits - 1), 1.0
    if not isinstance(fmt, MinifloatFormat):
        return CODEBOOK_LEVELS, 1.0
    tops = []
    for levels in fmt.levels():
        largest = sorted({abs(level) for level in levels})
        tops.append((largest[-1], largest[-1] - largest[-2]))
    return max(tops, key=lambda top: top[0] ** 2 / top[1])


def row_exponents(matrix: Tensor, limits: Reach) -> Tensor | None:
    """Even powers of two to divide the rows of a matrix by, so that float16 holds their scales; ``None`` if it does as they are.

    One power for all rows that a common one serves, so that what weighs them against each other (a branch, a codebook of the
    layer's own) sees them in proportion. A row that is lost beside the others gets one of its own, where it has scales of its own.
    Even powers have exact square roots: the two factors of a branch share them.

    Args:
        matrix: float32 ``[rows, columns]``, finite.
        limits: of the formats that may be chosen for it.

    Returns:
        int32 ``[rows, 1]``.
    """
    # Eighty times as fast as aminmax or vector_norm by rows.
    peaks = torch.cat(map_blocks(lambda part: torch.maximum(matrix[part].amax(1, True), -matrix[part].amin(1, True)), matrix))
    largest = peaks.amax()
    common = torch.zeros_like(largest, dtype=torch.int32)
    if largest > 0 and not limits.least <= largest < 2.0**HIGH:
        common = _even(largest.frexp().exponent - HIGH)
    exponents = common.expand(peaks.shape).clone()
    if limits.by_row:
        lost = (peaks > 0) & (times_power(peaks, -exponents) < limits.least_row)
        own = _even(peaks.frexp().exponent - torch.tensor(limits.least_row).frexp().exponent - 8)
        exponents = torch.where(lost, own, exponents)
    return exponents if bool(exponents.any()) else None


def _even(exponents: Tensor) -> Tensor:
    return exponents.div(2, rounding_mode="floor").mul_(2).to(torch.int32)


def times_power(values: Tensor, exponents: Tensor) -> Tensor:
    """``values * 2**exponents``, float32, exact where float32 holds the result; exponents are even, of up to 252."""
    half = torch.bitwise_left_shift(exponents.to(torch.int32) // 2 + 127, 23).view(torch.float32)
    return values * half * half


def restore(spec: LayerSpec, tensors: dict[str, Tensor], exponents: Tensor) -> tuple[LayerSpec, dict[str, Tensor]]:
    """Multiply the rows of a packed weight by ``2**exponents [rows, 1]``, exactly: its codes stay as they are.

    The scales, and the branch, keep their dtypes where those hold the products, and become float32 where not.

    Raises:
        ValueError: the format's powers of two end before the weights do.
    """
    common = exponents.amax().reshape(1)
    if spec.rank:
        spec, tensors = _restore_branch(spec, tensors, exponents, common)
    scales = tensors["scales"]
    if "tensor_scale" in tensors:
        return spec, tensors | {"tensor_scale": times_power(tensors["tensor_scale"], common)}
    shared = len(scales) != len(exponents)
    if scales.dtype == torch.int8:
        return spec, tensors | {"scales": _restore_powers(scales, common if shared else exponents)}
    moved = {
        name: times_power(tensors[name].float(), common if shared else exponents) for name in ("scales", "zeros") if name in tensors
    }
    if all(_holds(scales.dtype, tensor) for tensor in moved.values()):
        return spec, tensors | {name: tensor.to(scales.dtype) for name, tensor in moved.items()}
    assert isinstance(spec.format, CodebookFormat | IntegerFormat | MinifloatFormat)
    return replace(spec, format=replace(spec.format, scale_dtype="float32")), tensors | moved


def _restore_powers(scales: Tensor, exponents: Tensor) -> Tensor:
    """Scales that are powers of two, as the bytes of their exponents."""
    stored = scales.view(torch.uint8).int()
    moved = stored + exponents
    if bool(((moved < 0) & (stored > 1) | (moved > 254)).any()):  # 1 is what groups of zeros get
        raise ValueError("the weights are beyond the range of e8m0 scales, 2**-127 to 2**127; choose float32 scales")
    return moved.clamp_min_(0).to(torch.uint8).view(torch.int8)


def _restore_branch(
    spec: LayerSpec, tensors: dict[str, Tensor], exponents: Tensor, common: Tensor
) -> tuple[LayerSpec, dict[str, Tensor]]:
    """Each factor of the branch takes half of the power that all rows share; what is left of a row's goes to its own."""
    half = common // 4 * 2
    moved = {
        "low_rank_down": times_power(tensors["low_rank_down"].float(), half),
        "low_rank_up": times_power(tensors["low_rank_up"].float(), exponents - half),
    }
    dtype = spec.extras_dtype if all(_holds(EXTRAS_DTYPES[spec.extras_dtype], t) for t in moved.values()) else "float32"
    others = {name: tensors[name] for name in ("smooth", "shift") if name in tensors}
    extras = {name: tensor.to(EXTRAS_DTYPES[dtype]) for name, tensor in (moved | others).items()}
    return replace(spec, extras_dtype=dtype), tensors | extras


def _holds(dtype: torch.dtype, values: Tensor) -> bool:
    """Whether a dtype holds float32 values exactly."""
    return torch.equal(values.to(dtype).float(), values)


def half_precision(values: Tensor, anywhere: bool) -> Tensor:
    """float32 values as float16; with ``anywhere`` as float32 with float16's eleven significant bits, of any magnitude."""
    return short_scale(values) if anywhere else values.to(torch.float16)


def even_exponent(value: float) -> int:
    """The even ``e`` with ``1 <= value / 2**e < 4``; 0 for what is 0 or not finite."""
    return (math.frexp(value)[1] - 1) // 2 * 2 if value and math.isfinite(value) else 0
