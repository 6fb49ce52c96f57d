"""The orders in which Nunchaku lays a layer's numbers out in memory, for the operands of the GPU's matrix instructions.

Each is a pure, invertible index map between a logical matrix ``[rows, columns]`` and a flat sequence: both dimensions are cut into
named axes, outermost first, and the axes are stored in another order. The shape that a checkpoint gives such a tensor says nothing
about where a number lies.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from qdiff_kernels import pack_bits, unpack_bits
from torch import Tensor

TILE = 128  # rows and columns of the packed weights come in multiples of this
RANK_TILE = 16
AWQ_ROWS, AWQ_GROUP, AWQ_SCALE_GROUPS = 4, 64, 16


class PackingOrder(NamedTuple):
    """An invertible index map between a logical matrix and a flat sequence.

    Attributes:
        rows, columns: ``{axis: size}`` of the logical dimensions, outermost first; the first axis takes as many as there are.
        memory: the axes of both in the order in which they are stored.
    """

    rows: dict[str, int]
    columns: dict[str, int]
    memory: tuple[str, ...]

    @property
    def multiples(self) -> tuple[int, int]:
        """Numbers that the rows and the columns must be multiples of."""
        return math.prod(list(self.rows.values())[1:]), math.prod(list(self.columns.values())[1:])

    def pack(self, matrix: Tensor) -> Tensor:
        """Logical ``[rows, columns]``, in multiples of :attr:`multiples` -> flat, in memory order."""
        axes, sizes = self._axes(matrix.shape[0], matrix.shape[1])
        return matrix.reshape(sizes).permute([axes.index(name) for name in self.memory]).flatten()

    def unpack(self, flat: Tensor, rows: int, columns: int) -> Tensor:
        """Inverse of :meth:`pack`, contiguous."""
        axes, sizes = self._axes(rows, columns)
        stored = flat.reshape([sizes[axes.index(name)] for name in self.memory])
        return stored.permute([self.memory.index(name) for name in axes]).reshape(rows, columns).contiguous()

    def _axes(self, rows: int, columns: int) -> tuple[list[str], list[int]]:
        by_row, by_column = self.multiples
        if rows % by_row or columns % by_column:
            raise ValueError(f"sizes must be multiples of {by_row} x {by_column}, got {rows} x {columns}")
        axes = [*self.rows, *self.columns]
        sizes = [*self.rows.values(), *self.columns.values()]
        sizes[0], sizes[len(self.rows)] = rows // by_row, columns // by_column
        return axes, sizes


# Four-bit codes: words of eight consecutive columns, lowest nibble first.
CODES = PackingOrder(
    {"row_tile": 0, "pack": 8, "row_half": 2, "row_lane": 8},
    {"column_tile": 0, "column_half": 2, "column_lane": 4, "nibble": 8},
    ("row_tile", "column_tile", "pack", "row_lane", "column_lane", "row_half", "column_half", "nibble"),
)
# bfloat16 or float16 scales, one per group of columns; biases and other vectors as one group.
SCALES = PackingOrder(
    {"row_tile": 0, "high": 8, "half": 2, "low": 4, "element": 2},
    {"group": 0},
    ("row_tile", "group", "high", "low", "half", "element"),
)
# E4M3 scales of groups of 16 columns.
MICRO_SCALES = PackingOrder(
    {"row_tile": 0, "part": 4, "middle": 4, "lane": 8},
    {"column_tile": 0, "group": 4},
    ("row_tile", "column_tile", "lane", "middle", "part", "group"),
)
LORA_DOWN = PackingOrder(
    {"rank_tile": 0, "rank_half": 2, "lane": 8},
    {"tile": 0, "half": 2, "column_lane": 4, "element": 2},
    ("tile", "rank_tile", "lane", "column_lane", "rank_half", "half", "element"),
)
LORA_UP = PackingOrder(
    {"tile": 0, "half": 2, "lane": 8},
    {"rank_tile": 0, "rank_half": 2, "rank_lane": 4, "element": 2},
    ("tile", "rank_tile", "lane", "rank_lane", "half", "rank_half", "element"),
)
# Codes of the weight-only layers: four rows interleaved per 64 columns, words of four codes eight columns apart.
AWQ_CODES = PackingOrder(
    {"row_tile": 0, "row": AWQ_ROWS},
    {"column_tile": 0, "half": 2, "nibble": 4, "word": 8},
    ("row_tile", "column_tile", "row", "half", "word", "nibble"),
)


def pack_codes(order: PackingOrder, codes: Tensor) -> Tensor:
    """Codes 0 .. 15 ``[rows, columns]`` -> int8, flat, two to a byte."""
    return pack_bits(order.pack(codes)[None], 4)[0]


def unpack_codes(order: PackingOrder, packed: Tensor, rows: int, columns: int) -> Tensor:
    """Inverse of :func:`pack_codes`, for ``packed`` of any integer dtype: int32 ``[rows, columns]``."""
    data = packed.contiguous().view(torch.int8).flatten()
    return order.unpack(unpack_bits(data[None], 4, rows * columns)[0].to(torch.int8), rows, columns)


def pack_vector(vector: Tensor) -> Tensor:
    """``[n]`` -> ``[n]`` as biases, smoothing factors and channel scales are stored."""
    return SCALES.pack(vector[:, None])


def unpack_vector(packed: Tensor) -> Tensor:
    """Inverse of :func:`pack_vector`."""
    return SCALES.unpack(packed.flatten(), packed.numel(), 1)[:, 0]


def pad_to(tensor: Tensor, sizes: tuple[int, ...], value: float = 0) -> Tensor:
    """``tensor`` with its dimensions enlarged at their ends to ``sizes``."""
    out = tensor.new_full(sizes, value) if tensor.dtype.itemsize > 1 or not tensor.is_floating_point() else None
    if out is None:  # float8 cannot be filled on every device
        out = torch.full(sizes, value).to(tensor.dtype)
    out[tuple(slice(n) for n in tensor.shape)] = tensor
    return out


def rounded_up(size: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``size``."""
    return -(-size // multiple) * multiple
