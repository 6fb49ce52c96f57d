"""From the ops' arguments to a kernel and its job: packed weights as the compiled code reads them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..bitpack import packed_bytes
from ..minifloat import encoding_bits, fold_row_scale, levels, scale_values
from . import _job as J
from ._bytes import OFFSET, bytes_kernel
from ._bytes import available as bytes_available
from ._bytes import scratch_bytes as bytes_scratch
from ._kernels import codebook_kernel, levels_kernel, scratch_bytes
from ._sums import scratch_bytes as sums_scratch
from ._sums import sums_kernel
from ._threads import run_job

KINDS = {torch.float32: J.FLOAT32, torch.float16: J.FLOAT16, torch.bfloat16: J.BFLOAT16}
NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.int8: "int8"}
SATURATED = 132  # largest sum of int8 entries that is cut to 127: the shared tables' few outermost, by at most 4%
TASK_WEIGHTS = 1 << 16  # weights in a task: some twenty microseconds of work


class ByteLevels(NamedTuple):
    """Levels that are bytes times ``unit``, for :mod:`._bytes`."""

    bits: int  # of a code
    two: bool  # whether there are two tables
    lookup: bool  # whether codes go through the table: not those of 8-bit integers
    table: Tensor  # levels plus an offset, uint8, repeated to at least 64
    unit: float


class Sums(NamedTuple):
    """A codebook whose vectors are summed in a register, for :mod:`._sums`."""

    lanes: int  # vector size, padded to a power of two
    integer: bool  # whether the table is int16
    kernel: Callable[[], Any]


class Weight(NamedTuple):
    """A packed weight as the kernels read it."""

    kind: str  # name of the format
    kernel: Callable[[str], Any]  # compiled kernel for rows of a type
    bits_per_weight: float
    columns: int
    codes: Tensor  # int8 [rows, bytes]
    scales: Tensor  # [rows or 1, groups]
    group_size: int
    table: Tensor  # levels or codebooks, as the kernel reads them
    int8: Callable[[], tuple[float, bool]]  # a scale times this is the unit of an int8 row; whether such rows are exact
    zeros: Tensor | None = None
    factor: float = 1.0  # factor of all scales
    vector_size: int = 1
    bytes: ByteLevels | None = None  # byte levels, if the levels are small integers
    sums: Sums | None = None  # for a codebook with a scale per row
    centered: Callable[[], tuple[Weight, Tensor]] | None = None  # for a zero per row: the weight without, and zeros [rows or 1]


def run_weight(weight: Weight, out: str, **fields: Any) -> None:
    """Run the weight's kernel for rows of a type. ``fields``: fields of the job by name; tensors stand for their addresses."""
    table = _scale_table(weight.scales.dtype, weight.factor, weight.int8()[0] if out == "int8" else 0.0)
    scratch = scratch_bytes(weight.columns, weight.scales.shape[1], weight.codes.shape[1])
    _run(weight, weight.kernel(out), table, weight.table, scratch, fields)


def run_bytes(weight: Weight, per: int, high: bool, **fields: Any) -> None:
    """Run the kernel of byte dot products, with :func:`scales_per_block` scales; ``high``: tokens have high bytes."""
    assert weight.bytes is not None
    levels = weight.bytes
    kernel = bytes_kernel(levels.bits, levels.lookup, levels.two, weight.zeros is not None, high, per)
    table = _scale_table(weight.scales.dtype, weight.factor * levels.unit, 0.0)
    scratch = bytes_scratch(weight.columns, weight.scales.shape[1], weight.codes.shape[1])
    _run(weight, kernel, table, levels.table, scratch, fields)


def run_sums(weight: Weight, **fields: Any) -> None:
    """Run the kernel that multiplies sums of codebook entries."""
    assert weight.sums is not None
    table = _scale_table(weight.scales.dtype, weight.factor, 0.0)
    _run(weight, weight.sums.kernel(), table, weight.table, sums_scratch(weight.codes.shape[1]), fields)


def scales_per_block(weight: Weight) -> int:
    """Number of scales that the byte dot products read for 64 columns; 0 if they do not support the weight."""
    columns, groups, size = weight.columns, weight.scales.shape[1], weight.group_size
    if weight.bytes is None or columns % 64 or not bytes_available():
        return 0
    if groups == 1:
        return 1
    if columns % size or groups != columns // size or (size not in (16, 32) and size % 64):
        return 0
    return max(1, 64 // size)


def _run(weight: Weight, kernel: Any, scale_table: tuple[Tensor, int], table: Tensor, size: int, fields: dict[str, Any]) -> None:
    rows = weight.codes.shape[0]
    if not rows or not weight.columns:
        return
    threads = torch.get_num_threads()
    per_task = max(J.ROW_BLOCK, min(TASK_WEIGHTS // weight.columns, rows // (4 * threads)) // J.ROW_BLOCK * J.ROW_BLOCK)
    tasks = -(-rows // per_task)
    threads = min(threads, tasks)
    groups = weight.scales.shape[1]
    size = -(-size // 64) * 64
    scratch = torch.empty(size * threads + 64, dtype=torch.int8, device="cpu")
    job = np.zeros(J.LENGTH, np.int64)
    job[2:21] = (
        tasks,
        per_task,
        rows,
        weight.columns,
        weight.codes.data_ptr(),
        weight.codes.shape[1],
        weight.scales.data_ptr(),
        scale_table[1],
        groups if weight.scales.shape[0] > 1 else 0,
        groups,
        weight.group_size if groups > 1 else weight.columns,
        scale_table[0].data_ptr(),
        0 if weight.zeros is None else weight.zeros.data_ptr(),
        table.data_ptr(),
        0,
        0,
        0,
        -(-scratch.data_ptr() // 64) * 64,
        size,
    )
    job[J.VECTOR_SIZE] = weight.vector_size
    for name, value in fields.items():
        if value is not None:
            job[getattr(J, name)] = value.data_ptr() if isinstance(value, Tensor) else value
    run_job(kernel, job, threads)


def decode(
    weight: Weight,
    dtype: torch.dtype,
    first: int = 0,
    count: int | None = None,
    target: Tensor | None = None,
    row_scales: Tensor | None = None,
) -> Tensor:
    """Dense rows ``first .. first + count - 1``, ``[count, columns]``, at the start of ``target`` if given.

    An int8 result needs ``row_scales`` (float32 ``[count]``, written), the scales of its rows.
    """
    part = weight if count is None else rows_of(weight, first, count)
    rows = part.codes.shape[0]
    dense = torch.empty(rows, weight.columns, dtype=dtype, device="cpu") if target is None else target[:rows]
    if dtype == torch.int8 and weight.kind == "integer" and weight.bits_per_weight == 8 and weight.int8()[1]:
        assert row_scales is not None
        row_scales[:rows] = part.scales.squeeze(1)
        return torch.bitwise_xor(part.codes, -128, out=dense)  # bytes counted from their middle
    stride = dense.stride(0) * dense.element_size()
    run_weight(part, NAMES[dtype], TARGET=dense, TARGET_STRIDE=stride, ROW_SCALES=row_scales)
    return dense


def rows_of(weight: Weight, first: int, count: int) -> Weight:
    """Consecutive rows as a weight of their own."""
    part = slice(first, first + count)
    scales = weight.scales[part] if weight.scales.shape[0] > 1 else weight.scales
    zeros = weight.zeros[part] if weight.zeros is not None and weight.zeros.shape[0] > 1 else weight.zeros
    return weight._replace(codes=weight.codes[part], scales=scales, zeros=zeros)


@lru_cache(maxsize=256)
def _scale_table(dtype: torch.dtype, factor: float, span: float) -> tuple[Tensor, int]:
    """Table float32 ``[258]`` (value of each scale byte, factor of other scales, int8 span) and the kind of scales."""
    with torch.inference_mode(False):
        values = torch.zeros(258, dtype=torch.float32, device="cpu")
        kind = J.E4M3 if dtype == torch.float8_e4m3fn else KINDS.get(dtype, J.BYTE)
        if kind in (J.BYTE, J.E4M3):
            every = torch.arange(256, dtype=torch.uint8, device="cpu").view(dtype)
            values[:256] = scale_values(every, torch.float32) * factor
        values[256], values[257] = factor, span
        return values, kind


def _readable(tensor: Tensor) -> Tensor:
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def _check_bytes(codes: Tensor, count: int, bits: int) -> None:
    if codes.shape[-1] != packed_bytes(count, bits):
        raise ValueError(f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, got {codes.shape[-1]}")


def integer_weight(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group_size: int, columns: int) -> Weight | None:
    """The weight for the arguments of ``integer_dequantize``; ``None`` if the kernels do not support them."""
    if not 1 <= bits <= 8 or (zeros is not None and (zeros.shape != scales.shape or zeros.dtype != scales.dtype)):
        return None
    _check_bytes(codes, columns, bits)
    table, span, exact = _integer_table(bits, zeros is not None)
    exact = exact and zeros is None and scales.shape[1] == 1
    shared = zeros is not None

    def kernel(out: str) -> Any:
        return levels_kernel(bits, False, shared, out)

    zeros = None if zeros is None else _readable(zeros)
    unit = 1.0 if exact else span
    rest = columns, _readable(codes), _readable(scales), group_size, table, lambda: (unit, exact)
    made = Weight("integer", kernel, bits, *rest, zeros=zeros, bytes=_integer_bytes(bits, shared))
    if zeros is None or scales.shape[1] > 1:
        return made

    def centered() -> tuple[Weight, Tensor]:
        plain = integer_weight(codes, scales, None, bits, group_size, columns)
        assert plain is not None
        return plain, (zeros.float() + scales.float() * 2 ** (bits - 1)).squeeze(1)

    return made._replace(centered=centered)


@lru_cache(maxsize=16)
def _integer_table(bits: int, zeros: bool) -> tuple[Tensor, float, bool]:
    first = 0 if zeros else -(1 << (bits - 1))
    values = tuple(float(first + code) for code in range(1 << bits))
    return _level_table((values,)), max(abs(v) for v in values) / 127, True


@lru_cache(maxsize=16)
def _integer_bytes(bits: int, zeros: bool) -> ByteLevels | None:
    if zeros and bits == 8:
        return None
    first = 0 if zeros else -(1 << (bits - 1))
    return _byte_levels(bits, [first + code for code in range(1 << bits)], False, 1.0, lookup=bits < 8)


def _byte_levels(bits: int, values: list[int], two: bool, unit: float, lookup: bool = True) -> ByteLevels:
    with torch.inference_mode(False):
        table = torch.tensor(values, dtype=torch.int32, device="cpu").add(OFFSET).to(torch.uint8)
        return ByteLevels(bits, two, lookup, table.repeat(max(1, 64 // len(values))), unit)


def minifloat_weight(
    codes: Tensor, scales: Tensor, tensor_scale: Tensor | None, encodings: str, group_size: int, columns: int
) -> Weight | None:
    """The weight for the arguments of ``minifloat_dequantize``; ``None`` if the kernels do not support them."""
    names = encodings.split(",")
    bits = 1 + sum(encoding_bits(names[0]))
    scales, tensor_scale = fold_row_scale(scales, tensor_scale)
    factor = 1.0 if tensor_scale is None else float(tensor_scale)
    if len(names) > 2 or (len(names) == 2 and factor < 0):
        return None
    _check_bytes(codes, columns, bits)
    table, span, exact = _minifloat_table(encodings)
    exact = exact and scales.shape[1] == 1
    two = len(names) == 2

    def kernel(out: str) -> Any:
        return levels_kernel(bits, two, False, out)

    unit = span if exact else _largest(encodings) / 127
    rest = columns, _readable(codes), _readable(scales), group_size, table, lambda: (unit, exact)
    return Weight("minifloat", kernel, bits, *rest, factor=factor, bytes=_minifloat_bytes(encodings, bits))


@lru_cache(maxsize=64)
def _largest(encodings: str) -> float:
    return max(abs(value) for name in encodings.split(",") for value in levels(name))


@lru_cache(maxsize=64)
def _minifloat_table(encodings: str) -> tuple[Tensor, float, bool]:
    tables = tuple(levels(name) for name in encodings.split(","))
    unit = 1.0
    values = [abs(v) for table in tables for v in table]
    while any(v / unit % 1 for v in values):
        unit /= 2
    exact = max(values) / unit <= 127
    return _level_table(tables), unit, exact


@lru_cache(maxsize=64)
def _minifloat_bytes(encodings: str, bits: int) -> ByteLevels | None:
    values = [value for name in encodings.split(",") for value in levels(name)]
    _, unit, exact = _minifloat_table(encodings)
    if not exact or len(values) > 256:
        return None
    return _byte_levels(bits, [int(value / unit) for value in values], "," in encodings, unit)


def _level_table(tables: tuple[tuple[float, ...], ...]) -> Tensor:
    """bfloat16 levels, one table after the other, repeated to at least 32 entries for a word shuffle."""
    with torch.inference_mode(False):
        values = torch.tensor([v for table in tables for v in table], dtype=torch.bfloat16, device="cpu")
        return values.repeat(max(1, 32 // len(values)))


def codebook_weight(codes: Tensor, codebooks: Tensor, scales: Tensor, group_size: int, columns: int) -> Weight | None:
    """The weight for the arguments of ``codebook_dequantize``; ``None`` if the kernels do not support them."""
    num_codebooks, entries, vector_size = codebooks.shape
    bits = entries.bit_length() - 1
    integer = codebooks.dtype == torch.int8
    lanes = 1 << max(0, vector_size - 1).bit_length()
    if lanes > 64 or bits > 16 or num_codebooks > 8 or (scales.shape[1] > 1 and group_size % vector_size):
        return None
    vectors = -(-columns // vector_size)
    _check_bytes(codes, vectors * num_codebooks, bits)
    table = codebooks.to(torch.int16 if integer else torch.float32)
    if lanes != vector_size:
        table = torch.nn.functional.pad(table, (0, lanes - vector_size))

    def int8() -> tuple[float, bool]:
        largest = float(codebooks.float().abs().amax(1).sum(0).max())  # largest sum, if one vector has the largest entries
        exact = integer and scales.shape[1] == 1 and largest <= SATURATED
        return 1.0 if exact else largest / 127, exact

    def kernel(out: str) -> Any:
        return codebook_kernel(bits, num_codebooks, lanes, integer, out)

    bits_per_weight = num_codebooks * bits / vector_size
    rest = columns, _readable(codes), _readable(scales), group_size, _readable(table), int8
    sums = Sums(lanes, integer, lambda: sums_kernel(bits, num_codebooks, lanes, integer)) if scales.shape[1] == 1 else None
    return Weight("codebook", kernel, bits_per_weight, *rest, vector_size=vector_size, sums=sums)


WEIGHTS: dict[str, Callable[..., Weight | None]] = {
    "codebook": codebook_weight,
    "minifloat": minifloat_weight,
    "integer": integer_weight,
}
