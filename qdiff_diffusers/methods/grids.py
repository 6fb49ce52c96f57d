"""Scalar grids: the sorted levels that one weight can take, and rounding to them by arithmetic instead of table search.

A grid works in units of its smallest step, so that a uniform grid rounds with one ``round`` and a floating one by adding and
subtracting a large number chosen from the binade of each value.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from qdiff_kernels.minifloat import levels
from torch import Tensor

from ..formats import IntegerFormat, MinifloatFormat

_EXPONENT = 0x7F800000  # exponent field of a float32
_MANTISSA_BITS = 23
_EXPONENT_BIAS = 127


@dataclass(frozen=True)
class Grid:
    """Levels ``unit * q`` with q the values that :meth:`round` gives, and the stored code of each.

    Attributes:
        bits: width of a code.
        levels: all of them, rising.
        unit: value of one step near zero; the other numbers are in such steps.
        high: the largest level.
        low: magnitude of the most negative level.
        mantissa_bits: of a floating grid, ``None`` for a uniform one.
        spare: the level that the code of negative zero stands for, or ``None`` where that code is a zero.
        signed_codes: codes are the integers q themselves (IntegerFormat) and not sign and magnitude.
    """

    bits: int
    levels: tuple[float, ...]
    unit: float
    high: float
    low: float
    mantissa_bits: int | None = None
    spare: float | None = None
    signed_codes: bool = False

    @property
    def symmetric(self) -> bool:
        """Whether the grid is its own mirror image, so that the sign of a scale makes no difference."""
        return self.spare is None

    def round(self, y: Tensor, out: Tensor, work: Tensor) -> Tensor:
        """Nearest level of each float32 ``y``, into ``out``. ``work`` is scratch of the same shape and dtype."""
        if self.mantissa_bits is None:
            return torch.round(y, out=out).clamp_(-self.low, self.high)
        torch.bitwise_and(y.view(torch.int32), _EXPONENT, out=work.view(torch.int32))
        work.clamp_(2.0**self.mantissa_bits, self.high)
        if self.spare is not None:
            # Below the second most negative level the step is halved, which puts the spare level between the last two.
            torch.lt(y, -(2 * -self.spare - self.low), out=out)
            work.addcmul_(work, out, value=-0.5)
        # 1.5 * 2**23 steps: the sum's last bit is worth one step, so the addition rounds to a multiple of it.
        work.mul_(1.5 * 2.0 ** (_MANTISSA_BITS - self.mantissa_bits))
        return torch.add(y, work, out=out).sub_(work).clamp_(-self.low, self.high)

    def codes(self, q: Tensor, work: Tensor, mask: Tensor) -> Tensor:
        """Stored codes of rounded values: uint8, or int8 for ``signed_codes``. Overwrites all three arguments."""
        if self.signed_codes:
            return q.to(torch.int8)
        sign = 1 << (self.bits - 1)
        torch.lt(q, 0, out=mask).mul_(sign)
        if self.mantissa_bits is None:
            # The spare level's magnitude is 2**(bits-1): the "and" turns it into the code of negative zero.
            codes = _integers(q.abs_()).bitwise_and_(sign - 1)
            return codes.add_(_integers(mask)).to(torch.uint8)
        m = self.mantissa_bits
        if self.spare is not None:  # it truncates to its smaller neighbour, whose code is one less than the largest
            mask.sub_(torch.eq(q, self.spare, out=work), alpha=sign - 2)
        # Exponent and top mantissa bits of a normal number count the levels above 2**m, the value itself those below.
        torch.clamp_min(q.abs_(), 2.0**m, out=work)
        codes = work.view(torch.int32).bitwise_right_shift_(_MANTISSA_BITS - m).sub_((_EXPONENT_BIAS + m) << m)
        return codes.add_(_integers(q.clamp_max_(2.0**m))).add_(_integers(mask)).to(torch.uint8)


def _integers(x: Tensor) -> Tensor:
    """Small whole float32 numbers as int32 in the same memory, up to a multiple of 256 that a cast to uint8 drops."""
    return x.add_(1.5 * 2.0**_MANTISSA_BITS).view(torch.int32)


def integer_grid(bits: int) -> Grid:
    """Two's complement integers ``-2**(bits-1) .. 2**(bits-1) - 1``, the codes of a symmetric ``IntegerFormat``."""
    half = 1 << (bits - 1)
    return Grid(bits, tuple(map(float, range(-half, half))), unit=1.0, high=half - 1, low=half, spare=-half, signed_codes=True)


@lru_cache(maxsize=128)
def encoding_grid(encoding: str) -> Grid:
    """The grid of a minifloat encoding, read off its table of levels.

    Raises:
        ValueError: the encoding is not known to the format.
    """
    table = levels(encoding)
    half = len(table) // 2
    unit, high = table[1], table[half - 1] / table[1]
    spare = table[half] / unit if table[half] != 0 else None
    low = high if spare is None else max(high, -spare)
    mantissa_bits = None if encoding.startswith("e1") else _mantissa_bits(encoding)
    return Grid(half.bit_length(), tuple(sorted({v / unit for v in table})), unit, high, low, mantissa_bits, spare)


def format_grids(weight_format: IntegerFormat | MinifloatFormat) -> list[Grid]:
    """The one or two grids among which each group of a format chooses."""
    if isinstance(weight_format, IntegerFormat):
        return [integer_grid(weight_format.bits)]
    return [encoding_grid(encoding) for encoding in weight_format.encodings]


def _mantissa_bits(encoding: str) -> int:
    return int(encoding.partition("m")[2].removesuffix("uz"))
