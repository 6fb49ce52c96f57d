"""A packed weight as the Triton kernels are told about it: one description for all formats."""

from __future__ import annotations

import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..bitpack import packed_bytes
from ..minifloat import encoding_bits, fold_row_scale, levels
from ..minifloat import scale_values as minifloat_scales
from .launch import call

INTEGER, MINIFLOAT, CODEBOOK, DENSE = 0, 1, 2, 3
E2M1, E4M3 = 2 * 16 + 1 * 2, 4 * 16 + 3 * 2
SATURATING_REACH = 150


class WeightPointers(NamedTuple):
    """A packed weight as an argument of a kernel. ``None`` is known when the kernel is compiled."""

    codes: Tensor  # [rows, codes_stride]
    table: Tensor | None  # [books, entries, vector]
    scales: Tensor  # [rows or 1, groups]
    zeros: Tensor | None  # like scales
    tensor_scale: Tensor | None  # [1]
    codes_stride: int  # bytes of a row
    scales_stride: int  # 0 when one row of scales serves all rows
    groups: int
    rows: int
    columns: int


class WeightLayout(NamedTuple):
    """What the codes of a packed weight mean, as a compile-time argument of a kernel."""

    kind: int  # INTEGER, MINIFLOAT, CODEBOOK or DENSE
    bits: int  # of a code
    encoding: int  # of minifloats: exponent_bits * 16 + mantissa_bits * 2 + uz
    second: int  # the encoding of groups with a negative scale, 0 for none
    books: int
    vector: int  # weights that one entry of a codebook stands for
    midpoint: int  # subtracted from integer codes
    group: int  # columns that share a scale; a single group needs no size: layers of all widths share one compiled kernel
    e8m0: bool  # scales are exponents of two
    e4m3: bool  # scales are E4M3 numbers, as bytes


class PackedWeight(NamedTuple):
    """Tensors, sizes and compile-time facts of one packed ``[rows, columns]`` weight."""

    codes: Tensor  # int8 [rows, bytes]
    table: Tensor | None  # codebooks [books, entries, vector_size]
    scales: Tensor  # [rows or 1, groups], float8 as its bytes
    zeros: Tensor | None  # like scales: asymmetric integers
    tensor_scale: Tensor | None  # float32 [1]
    columns: int
    group_size: int  # columns that share a scale; at least ``columns`` for one per row
    kind: int
    bits: int
    encoding: int = 0  # exponent_bits * 16 + mantissa_bits * 2 + uz
    second: int = 0
    books: int = 1
    vector_size: int = 1
    e8m0: bool = False
    e4m3: bool = False
    unit: float = 1.0  # of a dense operand

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def row_scales(self) -> bool:
        """Whether one scale, and one zero if any, serves a whole row, with the same meaning for every weight of it."""
        return self.scales.shape[1] == 1 and not self.second

    @property
    def block_scaled(self) -> bool:
        """Whether this is MXFP4 or MXFP8, which Blackwell's matrix units multiply as it is stored."""
        return self.kind == MINIFLOAT and self.encoding in (E2M1, E4M3) and self.e8m0 and self.group_size == 32 and not self.second

    @property
    def significant_bits(self) -> int:
        """Bits that the significand of a minifloat level times its group's scale takes at most; 64 if there is no telling."""
        if self.kind != MINIFLOAT or not (self.e8m0 or self.e4m3):
            return 64
        level = max(1 + number % 16 // 2 + number % 2 for number in (self.encoding, self.second))
        return level + (4 if self.e4m3 else 1)

    @property
    def midpoint(self) -> int:
        """What is subtracted from an integer code, with zeros or without: signed numbers fit the matrix unit."""
        return 1 << (self.bits - 1) if self.kind in (INTEGER, DENSE) else 0

    def pointers(self) -> WeightPointers:
        """What kernels are told at run time."""
        stride = 0 if self.scales.shape[0] == 1 else self.scales.stride(0)
        tensors = (self.codes, self.table, self.scales, self.zeros, self.tensor_scale)
        return WeightPointers(*tensors, self.codes.stride(0), stride, self.scales.shape[1], self.rows, self.columns)

    def layout(self) -> WeightLayout:
        """What kernels are compiled for."""
        return _layout(self[FACTS:], self.scales.shape[1] > 1)

    @property
    def name(self) -> str:
        """Key of the tuned tables: what decoding costs depends on this."""
        return _name(self[FACTS:], self.row_scales)

    def operand_unit(self, operand: torch.dtype) -> float | None:
        """Factor that turns every level into a number ``operand`` holds; ``None`` if it would lose precision that matters.

        Integers and minifloats must be exact. Codebook entries may be rounded to int8 (about 1 % of a weight). The entries of a
        universal table add up to a little over 127 at the most; such sums, all but never met, saturate.
        """
        if operand == torch.float16 and self.kind == MINIFLOAT and self.encoding // 16 == 5:
            return 0.25  # the largest E5 levels are beyond 65504
        if operand not in (torch.int8, torch.float8_e4m3fn):
            return 1.0
        if self.kind == DENSE:
            return self.unit
        if self.kind == CODEBOOK:
            return codebook_unit(self.table) if operand == torch.int8 and self.table is not None else None
        if self.kind == INTEGER:
            return 1.0 if operand == torch.int8 or self.bits <= 5 else None
        return _minifloat_unit((self.encoding, self.second) if self.second else (self.encoding,), operand)

    def dense(self, operand: Tensor, unit: float) -> PackedWeight:
        """The same weight with its levels, times ``unit``, laid out in memory: ``operand [rows, columns]``."""
        return self._replace(codes=operand, kind=DENSE, unit=unit)


FACTS = PackedWeight._fields.index("columns")  # from here on a packed weight has no tensors


@lru_cache(maxsize=1024)
def _layout(facts: tuple[Any, ...], groups: bool) -> WeightLayout:
    _, group_size, kind, bits, encoding, second, books, vector_size, e8m0, e4m3, _ = facts
    midpoint = 1 << (bits - 1) if kind in (INTEGER, DENSE) else 0
    return WeightLayout(kind, bits, encoding, second, books, vector_size, midpoint, group_size if groups else 1 << 30, e8m0, e4m3)


@lru_cache(maxsize=1024)
def _name(facts: tuple[Any, ...], row_scales: bool) -> str:
    _, group_size, kind, bits, _, _, books, vector_size, *_ = facts
    shape = f"{books}x{bits}d{vector_size}" if kind == CODEBOOK else str(bits)
    return f"{('integer', 'minifloat', 'codebook', 'dense')[kind]}{shape} {'row' if row_scales else f'g{group_size}'}"


def scale_values(scales: Tensor, e4m3: bool, tensor_scale: Tensor | None) -> Tensor:
    """A packed weight's scales as float32 numbers ``[rows or 1, groups]``, the scale of the tensor multiplied in."""
    values = minifloat_scales(scales.view(torch.float8_e4m3fn) if e4m3 else scales, torch.float32)
    return values if tensor_scale is None else values * tensor_scale


def codebook(codes: Tensor, codebooks: Tensor, scales: Tensor, group_size: int, columns: int) -> PackedWeight:
    books, entries, vector_size = codebooks.shape
    bits = entries.bit_length() - 1
    return _packed(codes, codebooks, scales, None, None, columns, group_size, CODEBOOK, bits, 0, 0, books, vector_size)


def minifloat(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, encodings: str, group_size: int, columns: int
) -> PackedWeight:
    if tensor_scale is not None and tensor_scale.numel() > 1:
        scales, tensor_scale = call(_folded, scales, tensor_scale), None
    bits, *numbers = _encoding_numbers(encodings)
    return _packed(codes, None, scales, None, tensor_scale, columns, group_size, MINIFLOAT, bits, *numbers)


def _folded(scales: Tensor, tensor_scale: Tensor) -> Tensor:
    return fold_row_scale(scales, tensor_scale)[0]


def integer(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, columns: int) -> PackedWeight:
    return _packed(codes, None, scales, zeros, None, columns, group_size, INTEGER, bits)


def _packed(
    codes: Tensor, table: Tensor | None, scales: Tensor, zeros: Tensor | None, tensor_scale: Tensor | None, *numbers: Any
) -> PackedWeight:
    facts = _facts(codes.shape[1], scales.dtype, numbers)
    if scales.dtype == torch.float8_e4m3fn:
        scales, zeros = scales.view(torch.uint8), None if zeros is None else zeros.view(torch.uint8)
    table, zeros = None if table is None else table.contiguous(), None if zeros is None else zeros.contiguous()
    return PackedWeight(codes.contiguous(), table, scales.contiguous(), zeros, tensor_scale, *facts)


@lru_cache(maxsize=1024)
def _facts(width: int, scales: torch.dtype, numbers: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a packed weight is besides its tensors. They follow from sizes and dtypes: nothing here can grow stale."""
    names = PackedWeight._fields[FACTS:]
    facts = PackedWeight._field_defaults | dict(zip(names, numbers, strict=False))
    facts |= {"e8m0": scales == torch.int8, "e4m3": scales == torch.float8_e4m3fn}
    columns, bits = facts["columns"], facts["bits"]
    count = columns if facts["kind"] != CODEBOOK else -(-columns // facts["vector_size"]) * facts["books"]
    if width != packed_bytes(count, bits):
        raise ValueError(f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, got {width}")
    return tuple(facts[name] for name in names)


@lru_cache(maxsize=64)
def _encoding_numbers(encodings: str) -> tuple[int, ...]:
    """Bits of a code, then the number of each encoding."""
    names = encodings.split(",")
    return 1 + sum(encoding_bits(names[0])), *(_encoding_number(name) for name in names)


def _encoding_number(name: str) -> int:
    exponent_bits, mantissa_bits = encoding_bits(name)
    return exponent_bits * 16 + mantissa_bits * 2 + name.endswith("uz")


def _encoding_name(number: int) -> str:
    return f"e{number // 16}m{number % 16 // 2}" + ("uz" if number % 2 else "")


@lru_cache(maxsize=256)
def _minifloat_unit(encodings: tuple[int, ...], operand: torch.dtype) -> float | None:
    values = torch.tensor([v for number in encodings for v in levels(_encoding_name(number))], dtype=torch.float64, device="cpu")
    return next((unit for unit in (2.0**n for n in range(-2, 8)) if _exact(values * unit, operand)), None)


class Known:
    """What is known of tensors' contents, for as long as they live, stay where they are and nobody writes to them."""

    def __init__(self) -> None:
        self._facts: dict[int, tuple[weakref.ref[Tensor], tuple[int, int], Any]] = {}

    def __getitem__(self, tensor: Tensor) -> Any:
        """The fact, ``None`` if there is none."""
        found = self._facts.get(id(tensor))
        return found[2] if found is not None and found[0]() is tensor and found[1] == _state(tensor) else None

    def __setitem__(self, tensor: Tensor, fact: Any) -> None:
        key = id(tensor)
        self._facts[key] = (weakref.ref(tensor, lambda _: self._facts.pop(key, None)), _state(tensor), fact)


def _state(tensor: Tensor) -> tuple[int, int]:
    return 0 if tensor.is_inference() else tensor._version, tensor.data_ptr()


_units, _clean = Known(), Known()


def codebook_unit(table: Tensor) -> float | None:
    """What turns sums of entries into int8 numbers. Finding it waits for the device, once for each table.

    ``None`` while a CUDA graph is captured, when nothing may wait: entries are multiplied as 16-bit numbers then.
    """
    if (unit := _units[table]) is None and not _capturing(table):
        reach = float(table.float().abs().amax((1, 2)).sum())
        exact = table.dtype == torch.int8 and reach <= SATURATING_REACH
        unit = _units[table] = 1.0 if exact else 127.0 / max(reach, 1e-30)
    return unit


class Asked(NamedTuple):
    """An answer that the device will have written to the host's memory once the event has passed."""

    answer: Tensor
    event: torch.cuda.Event


def no_nan(codes: Tensor) -> bool:
    """Whether none of E4M3 ``codes`` is known to be what hardware reads as NaN: then they are an operand as they are stored.

    No quantizer writes one, but a file may hold it. The second call with a tensor asks the device, and nothing waits for the
    answer; until it is there, and for tensors that offloading makes anew for each call, codes are copied. Products are the same
    either way.
    """
    known = _clean[codes]
    if isinstance(known, Asked) and known.event.query():
        known = _clean[codes] = bool(known.answer)
    elif known is None:
        _clean[codes] = "seen"
    elif known == "seen" and not _capturing(codes):
        found = ((codes.view(torch.uint8) & 0x7F) != 0x7F).all()
        if codes.device.type != "cuda":
            known = _clean[codes] = bool(found)
        else:
            answer = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(found, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            _clean[codes] = Asked(answer, event)
    return known is True


def _capturing(tensor: Tensor) -> bool:
    return tensor.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _exact(values: Tensor, dtype: torch.dtype) -> bool:
    limit = 127 if dtype == torch.int8 else 448
    return bool(values.abs().max() <= limit) and torch.equal(values.float().to(dtype).double(), values)
