"""Additive codebooks: vectors of consecutive weights as a sum of one entry from each codebook (AQLM, VQ4DiT)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from qdiff_kernels import codebook_dequantize, pack_bits, packed_bytes
from safetensors import safe_open
from torch import Tensor

from .base import (
    SCALE_DTYPES,
    GroupSize,
    TensorInfo,
    WeightFormat,
    check_choice,
    check_group_size,
    check_range,
    describe_groups,
    group_columns,
    scale_shape,
)

CODEBOOK_DTYPES = {"float16": torch.float16, "int8": torch.int8}
CPU = torch.device("cpu")
TABLES_FILE = Path(__file__).parent / "codebook_tables.safetensors"


@dataclass(frozen=True)
class CodebookFormat(WeightFormat):
    """``w[r, v*d:(v+1)*d] = scales[r, group] * sum_m codebooks[m, codes[r, v, m]]``, d = ``vector_size``.

    Tensors of a ``[rows, columns]`` weight, with V = ceil(columns / d) vectors in a row:
        codes: int8 ``[rows, ceil(V * num_codebooks * codebook_bits / 8)]``, packed.
        codebooks: ``codebook_dtype`` ``[num_codebooks, 2**codebook_bits, d]``; absent when ``table`` names a universal one.
        scales: ``scale_dtype`` ``[rows or 1, groups]``.
    """

    num_codebooks: int
    codebook_bits: int
    vector_size: int
    table: str | None = None
    group_size: GroupSize = "row"
    codebook_dtype: str = "float16"
    scale_dtype: str = "float16"

    kind: ClassVar[str] = "codebook"

    def __post_init__(self) -> None:
        check_range("num_codebooks", self.num_codebooks, 1, 8)
        check_range("codebook_bits", self.codebook_bits, 1, 16)
        check_range("vector_size", self.vector_size, 1, 64)
        check_group_size(self.group_size)
        if isinstance(self.group_size, int) and self.group_size % self.vector_size:
            raise ValueError(f"group_size {self.group_size} must be a multiple of vector_size {self.vector_size}")
        check_choice("codebook_dtype", self.codebook_dtype, CODEBOOK_DTYPES)
        check_choice("scale_dtype", self.scale_dtype, ("float16", "bfloat16", "float32"))
        if self.table is not None:
            shape = table_shapes().get(self.table)
            if shape is None:
                raise ValueError(f"unknown codebook table {self.table!r}; this version has {', '.join(table_shapes())}")
            if shape != self.codebook_shape:
                raise ValueError(f"codebook table {self.table!r} has shape {shape}, the format says {self.codebook_shape}")

    @property
    def codebook_shape(self) -> tuple[int, int, int]:
        return (self.num_codebooks, 1 << self.codebook_bits, self.vector_size)

    def tensors(self, rows: int, columns: int) -> dict[str, TensorInfo]:
        codes = -(-columns // self.vector_size) * self.num_codebooks
        out = {"codes": TensorInfo((rows, packed_bytes(codes, self.codebook_bits)), torch.int8)}
        if self.table is None:
            out["codebooks"] = TensorInfo(self.codebook_shape, CODEBOOK_DTYPES[self.codebook_dtype])
        shape = scale_shape(self.group_size, rows, columns)
        return out | {"scales": TensorInfo(shape, SCALE_DTYPES[self.scale_dtype])}

    def pack(self, codes: Tensor, codebooks: Tensor | None, scales: Tensor) -> dict[str, Tensor]:
        """codes: integer ``[rows, vectors, num_codebooks]``; codebooks ``[M, 2**bits, d]`` or ``None`` with a table."""
        out = {"codes": pack_bits(codes.flatten(1), self.codebook_bits)}
        if codebooks is not None:
            out["codebooks"] = codebooks.to(CODEBOOK_DTYPES[self.codebook_dtype]).contiguous()
        return out | {"scales": scales.to(SCALE_DTYPES[self.scale_dtype]).contiguous()}

    def largest_level(self, tensors: dict[str, Tensor]) -> float:
        codebooks = tensors["codebooks"] if "codebooks" in tensors else codebook_table(self.table or "")
        return float(codebooks.float().abs().amax((1, 2)).sum())

    def op_arguments(self, tensors: dict[str, Tensor], columns: int) -> tuple[Any, ...]:
        codebooks = tensors.get("codebooks")
        if codebooks is None:
            codebooks = shared_codebooks(self.table or "", tensors["codes"].device)
        return (tensors["codes"], codebooks, tensors["scales"], group_columns(self.group_size, columns))

    def dequantize(self, tensors: dict[str, Tensor], columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return codebook_dequantize(*self.op_arguments(tensors, columns), columns, dtype)

    def describe(self) -> str:
        books = f"{self.num_codebooks}x{self.codebook_bits} d{self.vector_size}"
        return f"{books} {'shared' if self.table else 'own'} {describe_groups(self.group_size)}"


@lru_cache(maxsize=1)
def table_shapes() -> dict[str, tuple[int, int, int]]:
    """Shapes of the universal codebooks that ship with the package."""
    with safe_open(TABLES_FILE, "pt") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in sorted(file.keys())}


@lru_cache(maxsize=64)
def codebook_table(name: str) -> Tensor:
    """A universal codebook, int8 ``[num_codebooks, 2**bits, vector_size]``, on the CPU. The row scale absorbs its unit."""
    if name not in table_shapes():
        raise ValueError(f"unknown codebook table {name!r}; this version has {', '.join(table_shapes())}")
    with safe_open(TABLES_FILE, "pt") as file, torch.inference_mode(False):
        return file.get_tensor(name)


_shared: dict[tuple[str, torch.device], Tensor] = {}


def shared_codebooks(name: str, device: torch.device) -> Tensor:
    """A universal codebook on ``device``: one for all layers there, which therefore hold none.

    No tensor of a module's own: offloading moves the data of such tensors to and fro, and would move it away from other layers.
    While a graph is traced nothing is kept: :func:`load_shared_codebooks` has put the CPU's in place.
    """
    found = _shared.get((name, device))
    if found is not None:
        return found
    if torch.compiler.is_compiling():
        return _shared[name, CPU].to(device)
    with torch.inference_mode(False):
        _shared[name, device] = codebook_table(name).to(device)
    return _shared[name, device]


def load_shared_codebooks(weight_format: WeightFormat) -> None:
    """Read the universal codebook that a format names, if it names one, before a trace may ask for it."""
    if isinstance(weight_format, CodebookFormat) and weight_format.table is not None:
        shared_codebooks(weight_format.table, CPU)
