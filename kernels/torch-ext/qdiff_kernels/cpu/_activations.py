"""One pass over the input of a layer: smoothing, rotation and quantization of every token, to the operands of the product."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ..activations import FP8_MAX, INT4_GROUP
from ..hadamard import rotation_signs
from ._compile import SOURCE, helper, kernel
from ._simd import SIZES, bits_float, fetch_add, float_bits, read_bf16, read_f16, read_f32, rint, write, zero_bytes
from ._threads import SLOT, TASK, run_job
from ._weights import KINDS, NAMES

TASKS, TOKENS, COLUMNS, X, X_STRIDE, X_KIND, SMOOTH, SIGNS, ROTATION, TARGET, STRIDE, SCALES, SCRATCH, LENGTH = range(2, 16)
PER_TASK = 4  # tokens in a task
BFLOAT16, FLOAT16 = KINDS[torch.bfloat16], KINDS[torch.float16]


class Operands(NamedTuple):
    """Quantized tokens: what is multiplied, and what the sums are to be multiplied by."""

    values: Tensor  # [tokens, columns padded with zeros], bfloat16, float32 or int8
    scales: Tensor | None  # float32 [tokens]


def prepare(
    x: Tensor, smooth: Tensor | None, rotation: int, activations: str, dtype: torch.dtype, pad: int = 1, fold: bool = False
) -> Operands:
    """Operands of a product with tokens ``x [tokens, columns]``.

    Args:
        smooth: ``[columns]`` that x is divided by. rotation: Hadamard block, 0 for none.
        activations: "none", "int8", "fp8" or "int4"; the last multiplies its group scales into the operands.
        dtype: of the operands: bfloat16 or float32, or int8 for "int8". pad: columns are padded to a multiple of this.
        fold: multiply the scales of tokens into the operands too.
    """
    tokens, columns = x.shape
    padded = -(-columns // pad) * pad
    plain = activations == "none" and smooth is None and not rotation
    if plain and x.dtype == dtype and padded == columns:
        return Operands(x if x.is_contiguous() else x.contiguous(), None)
    if x.stride(1) != 1:
        x = x.contiguous()
    values = torch.empty(tokens, padded, dtype=dtype)
    scales = torch.empty(tokens) if activations in ("int8", "fp8") and not fold else None
    divisor = None if smooth is None else smooth.float().contiguous()
    signs = rotation_signs(columns, x.device, torch.float32) if rotation else None
    tasks = -(-tokens // PER_TASK)
    threads = min(torch.get_num_threads(), tasks) if tokens * columns > 1 << 14 else 1
    scratch = torch.empty(threads, columns + 64)
    job = np.zeros(LENGTH, np.int64)
    job[2:] = (
        tasks,
        tokens,
        columns,
        x.data_ptr(),
        x.stride(0),
        KINDS[x.dtype],
        0 if divisor is None else divisor.data_ptr(),
        0 if signs is None else signs.data_ptr(),
        rotation,
        values.data_ptr(),
        padded * values.element_size(),
        0 if scales is None else scales.data_ptr(),
        scratch.data_ptr(),
    )
    run_job(_kernel(activations, NAMES[dtype], fold or activations == "int4"), job, threads)
    return Operands(values, scales)


@helper
def load_token(kind: Any, source: Any, first: Any, count: Any, target: Any) -> None:
    """One token as float32."""
    if kind == BFLOAT16:
        for i in range(count):
            write(target, i, read_bf16(source, first + i), "float32")
    elif kind == FLOAT16:
        for i in range(count):
            write(target, i, read_f16(source, first + i), "float32")
    else:
        for i in range(count):
            write(target, i, read_f32(source, first + i), "float32")


@helper
def transform_token(values: Any, count: Any, smooth: Any, signs: Any, block: Any) -> None:
    """Divide by the smoothing vector and rotate, in place: signs, then butterflies in each block."""
    if smooth:
        for i in range(count):
            write(values, i, read_f32(values, i) / read_f32(smooth, i), "float32")
    if not block:
        return
    norm = np.float32(1.0 / np.sqrt(block))
    for i in range(count):
        write(values, i, read_f32(values, i) * read_f32(signs, i) * norm, "float32")
    half = 1
    while half < block:
        for start in range(0, count, 2 * half):
            low, high = values + 4 * start, values + 4 * (start + half)
            for i in range(half):
                a, b = read_f32(low, i), read_f32(high, i)
                write(low, i, a + b, "float32")
                write(high, i, a - b, "float32")
        half *= 2


@helper
def step_of(values: Any, first: Any, last: Any, limit: Any) -> Any:
    """Largest magnitude over ``limit``: 1 where that is zero, not a number where any value is not."""
    largest = np.int32(0)
    for i in range(first, last):
        largest = max(largest, float_bits(read_f32(values, i)) & np.int32(0x7FFFFFFF))  # ordered like magnitudes, NaN last
    step = bits_float(largest) / np.float32(limit)
    return np.float32(1.0) if step == 0 else step


@helper
def round_e4m3(value: Any) -> Any:
    """Nearest E4M3 number, half to even; ``value`` lies within its range."""
    exponent = max((float_bits(value) >> np.int32(23)) & np.int32(0xFF), np.int32(127 - 6))
    step = bits_float((exponent - np.int32(3)) << np.int32(23))  # three mantissa bits below the leading one
    return rint(value / step) * step


@lru_cache(maxsize=16)
def _kernel(activations: str, out: str, fold: bool) -> Any:
    source, size = SOURCE, SIZES[out]
    limit = {"none": 0.0, "int8": 127.0, "fp8": FP8_MAX, "int4": 7.0}[activations]
    grouped, quantized, fp8 = activations == "int4", activations != "none", activations == "fp8"

    @kernel
    def entry(raw: Any) -> None:
        _ = source
        job = carray(raw, (LENGTH,), np.int64)
        header, columns = job.ctypes.data, job[COLUMNS]
        values = job[SCRATCH] + fetch_add(header + 8 * SLOT, 1) * (columns + 64) * 4
        task = fetch_add(header + 8 * TASK, 1)
        while task < job[TASKS]:
            for token in range(task * PER_TASK, min((task + 1) * PER_TASK, job[TOKENS])):
                load_token(job[X_KIND], job[X], token * job[X_STRIDE], columns, values)
                transform_token(values, columns, job[SMOOTH], job[SIGNS], job[ROTATION])
                target = job[TARGET] + token * job[STRIDE]
                for first in range(0, columns, INT4_GROUP if grouped else columns):
                    last = min(first + INT4_GROUP, columns) if grouped else columns
                    step = step_of(values, first, last, limit) if quantized else np.float32(1)
                    if quantized and not fold:
                        write(job[SCALES], token, step, "float32")
                    for i in range(first, last):
                        value = read_f32(values, i)
                        if quantized:
                            value = min(max(value / step, np.float32(-limit)), np.float32(limit))
                            value = round_e4m3(value) if fp8 else rint(value)
                        if fold:
                            value = value * step
                        write(target, i, value, out)
                zero_bytes(target + columns * size, job[STRIDE] - columns * size)
            task = fetch_add(header + 8 * TASK, 1)

    return entry
