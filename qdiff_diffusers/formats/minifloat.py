"""Low-bitwidth floating point: any signed ExMy of 2 to 8 bits, and the block formats NVFP4, MXFP4 and MXFP8."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from qdiff_kernels import minifloat_dequantize, pack_bits, packed_bytes
from qdiff_kernels.minifloat import encoding_bits, levels
from torch import Tensor

from .base import (
    SCALE_DTYPES,
    GroupSize,
    TensorInfo,
    WeightFormat,
    check_choice,
    check_flag,
    check_group_size,
    describe_groups,
    group_columns,
    scale_shape,
)


@dataclass(frozen=True)
class MinifloatFormat(WeightFormat):
    """``w = scale * value(code)``, code = sign | exponent | mantissa. A real-valued scale is a real-valued exponent bias.

    With two encodings of equal width the sign of a group's scale picks one: + the first, - the second.

    Tensors of a ``[rows, columns]`` weight:
        codes: int8 ``[rows, ceil(columns * bits / 8)]``, packed.
        scales: ``scale_dtype`` ``[rows or 1, groups]`` ("e8m0": the exponent byte in int8).
        tensor_scale: float32, only if ``tensor_scale`` is set: ``[1]`` if true (NVFP4's second level), ``[rows, 1]`` if "row".
    """

    encodings: tuple[str, ...]
    group_size: GroupSize = "row"
    scale_dtype: str = "float16"
    tensor_scale: bool | Literal["row"] = False

    kind: ClassVar[str] = "minifloat"

    def __post_init__(self) -> None:
        named = isinstance(self.encodings, tuple) and all(isinstance(e, str) for e in self.encodings)
        if not named or len(self.encodings) not in (1, 2):
            raise ValueError(f'a minifloat format has one or two encodings such as ("e2m1",), got {self.encodings!r}')
        if len({sum(encoding_bits(e)) for e in self.encodings}) != 1:
            raise ValueError(f"the encodings of a group-adaptive format must be equally wide, got {self.encodings!r}")
        check_group_size(self.group_size)
        check_choice("scale_dtype", self.scale_dtype, SCALE_DTYPES)
        if self.tensor_scale != "row":
            check_flag("tensor_scale", self.tensor_scale)
        elif len(self.encodings) == 2:
            raise ValueError('tensor_scale "row" goes with one encoding')
        if len(self.encodings) == 2 and self.scale_dtype == "e8m0":
            raise ValueError("e8m0 scales have no sign to choose between two encodings; use float16 or e4m3 scales")

    @property
    def bits(self) -> int:
        return 1 + sum(encoding_bits(self.encodings[0]))

    def levels(self) -> tuple[tuple[float, ...], ...]:
        """Per encoding, the value of each of the ``2**bits`` codes."""
        return tuple(levels(e) for e in self.encodings)

    def tensors(self, rows: int, columns: int) -> dict[str, TensorInfo]:
        out = {
            "codes": TensorInfo((rows, packed_bytes(columns, self.bits)), torch.int8),
            "scales": TensorInfo(scale_shape(self.group_size, rows, columns), SCALE_DTYPES[self.scale_dtype]),
        }
        second = (rows, 1) if self.tensor_scale == "row" else (1,)
        return out | ({"tensor_scale": TensorInfo(second, torch.float32)} if self.tensor_scale else {})

    def pack(self, codes: Tensor, scales: Tensor, tensor_scale: Tensor | None = None) -> dict[str, Tensor]:
        """codes: integer ``[rows, columns]``; scales ``[rows or 1, groups]``, already in the storage's meaning."""
        out = {
            "codes": pack_bits(codes, self.bits),
            "scales": scales.to(SCALE_DTYPES[self.scale_dtype]).contiguous(),
        }
        second = (-1, 1) if self.tensor_scale == "row" else (1,)
        return out | ({} if tensor_scale is None else {"tensor_scale": tensor_scale.float().reshape(second)})

    def largest_level(self, tensors: dict[str, Tensor]) -> float:
        return max(abs(level) for levels in self.levels() for level in levels)

    def op_arguments(self, tensors: dict[str, Tensor], columns: int) -> tuple[Any, ...]:
        group = group_columns(self.group_size, columns)
        return (tensors["codes"], tensors["scales"], tensors.get("tensor_scale"), ",".join(self.encodings), group)

    def dequantize(self, tensors: dict[str, Tensor], columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return minifloat_dequantize(*self.op_arguments(tensors, columns), columns, dtype)

    def describe(self) -> str:
        return f"{'/'.join(self.encodings)} {describe_groups(self.group_size)} {self.scale_dtype} scales"
