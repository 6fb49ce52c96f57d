"""Integers of 1 to 8 bits with a scale, and optionally a zero, per group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from qdiff_kernels import integer_dequantize, pack_bits, packed_bytes
from torch import Tensor

from .base import (
    SCALE_DTYPES,
    GroupSize,
    TensorInfo,
    WeightFormat,
    check_choice,
    check_flag,
    check_group_size,
    check_range,
    describe_groups,
    group_columns,
    scale_shape,
)


@dataclass(frozen=True)
class IntegerFormat(WeightFormat):
    """Symmetric: ``w = scale * (code - 2**(bits-1))``; asymmetric: ``w = scale * code + zero``. Codes are unsigned.

    Tensors of a ``[rows, columns]`` weight:
        codes: int8 ``[rows, ceil(columns * bits / 8)]``, packed.
        scales: ``scale_dtype`` ``[rows or 1, groups]``.
        zeros: like ``scales``, only if not ``symmetric``.
    """

    bits: int
    group_size: GroupSize = 64
    symmetric: bool = True
    scale_dtype: str = "float16"

    kind: ClassVar[str] = "integer"

    def __post_init__(self) -> None:
        check_range("bits", self.bits, 1, 8)
        check_group_size(self.group_size)
        check_flag("symmetric", self.symmetric)
        check_choice("scale_dtype", self.scale_dtype, ("float16", "bfloat16", "float32", "e4m3"))

    def tensors(self, rows: int, columns: int) -> dict[str, TensorInfo]:
        scales = TensorInfo(scale_shape(self.group_size, rows, columns), SCALE_DTYPES[self.scale_dtype])
        out = {"codes": TensorInfo((rows, packed_bytes(columns, self.bits)), torch.int8), "scales": scales}
        return out if self.symmetric else out | {"zeros": scales}

    def pack(self, codes: Tensor, scales: Tensor, zeros: Tensor | None = None) -> dict[str, Tensor]:
        """codes: integer ``[rows, columns]``, signed if symmetric (``-2**(bits-1) ..``), else ``0 .. 2**bits - 1``."""
        # In int16, because int8 cannot hold 255.
        unsigned = codes.to(torch.int16) + (1 << (self.bits - 1)) if self.symmetric else codes
        dtype = SCALE_DTYPES[self.scale_dtype]
        out = {"codes": pack_bits(unsigned, self.bits), "scales": scales.to(dtype).contiguous()}
        return out | ({} if zeros is None else {"zeros": zeros.to(dtype).contiguous()})

    def largest_level(self, tensors: dict[str, Tensor]) -> float:
        return float(1 << (self.bits - 1 if self.symmetric else self.bits))

    def op_arguments(self, tensors: dict[str, Tensor], columns: int) -> tuple[Any, ...]:
        group = group_columns(self.group_size, columns)
        return (tensors["codes"], tensors["scales"], tensors.get("zeros"), self.bits, group)

    def dequantize(self, tensors: dict[str, Tensor], columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return integer_dequantize(*self.op_arguments(tensors, columns), columns, dtype)

    def describe(self) -> str:
        return f"int{self.bits} {'' if self.symmetric else 'asymmetric '}{describe_groups(self.group_size)}"
