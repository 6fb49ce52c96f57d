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

_EXPONENT = 0x7F800000  # exponent field of a float32
_MANTISSA_BITS = 23
_EXPONENT_BIAS = 127


@dataclass(frozen=True)
class Grid:
    """Levels ``unit * q`` with q the values that :meth:`round_` leaves, and the stored code of each.

    Attributes:
        bits: width of a code.
        unit: value of one step near zero; every other number here is in such steps.
        high: the largest level; the smallest is ``-low``.
        low: magnitude of the most negative level.
        mantissa_bits: of a floating grid, ``None`` for a uniform one.
        spare: the level that the code of negative zero stands for, or ``None`` where that code is a zero.
        offset: 0.5 for a uniform grid without a zero, levels ``.. -0.5, 0.5 ..``.
        signed_codes: codes are the integers q themselves (IntegerFormat) and not sign and magnitude.
    """

    bits: int
    unit: float
    high: float
    low: float
    mantissa_bits: int | None = None
    spare: float | None = None
    offset: float = 0.0
    signed_codes: bool = False

    @property
    def symmetric(self) -> bool:
        """Whether the grid is its own mirror image, so that the sign of a scale makes no difference."""
        return self.low == self.high

    def round_(self, y: Tensor, work: Tensor, mask: Tensor) -> Tensor:
        """Round float32 ``y`` to the nearest level in place. ``work`` and ``mask`` are float32 scratch of the same shape."""
        y.clamp_(-self.low, self.high)
        if self.mantissa_bits is None:
            return y.sub_(self.offset).round_().add_(self.offset) if self.offset else y.round_()
        torch.bitwise_and(y.view(torch.int32), _EXPONENT, out=work.view(torch.int32))
        work.clamp_min_(2.0**self.mantissa_bits)
        if self.spare is not None:
            # Below the second most negative level the step is halved, which puts the spare level between the last two.
            torch.lt(y, -(2 * -self.spare - self.low), out=mask)
            work.addcmul_(work, mask, value=-0.5)
        # 1.5 * 2**23 steps: the sum's last bit is worth one step, so the addition rounds to a multiple of it.
        work.mul_(1.5 * 2.0 ** (_MANTISSA_BITS - self.mantissa_bits))
        return y.add_(work).sub_(work)

    def codes(self, q: Tensor) -> Tensor:
        """Stored codes of rounded values ``q`` (as :meth:`round_` leaves them): uint8, or int8 for ``signed_codes``."""
        if self.signed_codes:
            return q.to(torch.int8)
        sign = 1 << (self.bits - 1)
        negative = q.lt(0).to(torch.uint8)
        magnitude = q.abs().sub_(self.offset)
        if self.mantissa_bits is None:
            # The spare level's magnitude is 2**(bits-1): the mask turns it into the code of negative zero.
            return magnitude.to(torch.int32).bitwise_and_(sign - 1).to(torch.uint8).add_(negative, alpha=sign)
        m = self.mantissa_bits
        top = magnitude.clamp_min(2.0**m).view(torch.int32).bitwise_right_shift(_MANTISSA_BITS - m)
        codes = top.sub_((_EXPONENT_BIAS + m) << m).to(torch.uint8).add_(magnitude.clamp_max(2.0**m).to(torch.int32).to(torch.uint8))
        if self.spare is not None:
            codes.mul_(q.ne(self.spare).to(torch.uint8))
        return codes.add_(negative, alpha=sign)


def integer_grid(bits: int) -> Grid:
    """Two's complement integers ``-2**(bits-1) .. 2**(bits-1) - 1``, the codes of a symmetric ``IntegerFormat``."""
    half = 1 << (bits - 1)
    return Grid(bits, unit=1.0, high=half - 1, low=half, spare=-half, signed_codes=True)


@lru_cache(maxsize=128)
def encoding_grid(encoding: str) -> Grid:
    """The grid of a minifloat encoding, read off its table of levels.

    Raises:
        ValueError: the encoding is not known to the format.
    """
    table = levels(encoding)
    half = len(table) // 2
    bits = half.bit_length()
    positive, mirrored = table[:half], table[half:]
    offset = 0.5 if positive[0] > 0 else 0.0
    unit = 2 * positive[0] if offset else positive[1]
    high = positive[-1] / unit
    spare = mirrored[0] / unit if not offset and mirrored[0] != 0 else None
    low = max(high, -spare) if spare is not None else high
    uniform = half < 3 or len({b - a for a, b in zip(positive, positive[1:], strict=False)}) == 1
    mantissa_bits = None if uniform else _mantissa_bits(encoding)
    return Grid(bits, unit, high, low, mantissa_bits, spare, offset)


def _mantissa_bits(encoding: str) -> int:
    return int(encoding.partition("m")[2].removesuffix("uz"))
