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
from ..reference import Extras
from ._compile import SOURCE, helper, kernel
from ._simd import (
    SIZES,
    bits_float,
    fetch_add,
    float_bits,
    read_bf16,
    read_f16,
    read_f32,
    rint,
    write,
    write_i8,
    write_i16,
    write_i32,
    zero_bytes,
)
from ._threads import SLOT, TASK, run_job
from ._vector import hadamard16
from ._weights import KINDS, NAMES

(
    TASKS,
    TOKENS,
    COLUMNS,
    X,
    X_STRIDE,
    X_KIND,
    SMOOTH,
    SIGNS,
    ROTATION,
    GIVEN,
    TARGET,
    STRIDE,
    SCALES,
    SCRATCH,
    VECTOR,
    LANES,
    LENGTH,
) = range(2, 19)
SPLIT_MAX = 127.0 * 256 + 127  # largest number of a high and a low byte
VECTORS_MAX = 16383.0  # largest number of :mod:`._sums`: 32 pairs of products with sums of 8 entries of 128 stay below 2**31
LIMITS = {"none": 0.0, "int8": 127.0, "fp8": FP8_MAX, "int4": 7.0, "split8": 127.0, "split16": SPLIT_MAX, "vectors": VECTORS_MAX}
PER_TASK = 4  # tokens in a task
BFLOAT16, FLOAT16 = KINDS[torch.bfloat16], KINDS[torch.float16]


class Operands(NamedTuple):
    """Quantized tokens: the operands of the product, and the scales of its sums."""

    values: Tensor  # [tokens, columns padded with zeros], bfloat16, float32 or int8
    scales: Tensor | None  # float32 [tokens]


def prepare(x: Tensor, extras: Extras, dtype: torch.dtype, pad: int = 1, fold: bool = False) -> Operands:
    """Operands of a product with tokens ``x [tokens, columns]``.

    Args:
        extras: ``smooth``, ``rotation``, ``activations`` (group scales of "int4" are multiplied into the operands) and
            ``input_scale``.
        dtype: dtype of the operands: bfloat16 or float32, or int8 for "int8". pad: columns are padded to a multiple of this.
        fold: multiply the tokens' scales into the operands too.
    """
    columns = x.shape[1]
    padded = -(-columns // pad) * pad
    plain = extras.activations == "none" and extras.smooth is None and not extras.rotation
    if plain and x.dtype == dtype and padded == columns:
        return Operands(x if x.is_contiguous() else x.contiguous(), None)
    return _run(x, extras, extras.activations, dtype, padded, fold or extras.activations == "int4")


def _run(
    x: Tensor, extras: Extras, activations: str, dtype: torch.dtype, width: int, fold: bool, layout: tuple[int, int] = (0, 0)
) -> Operands:
    tokens, columns = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    values = torch.empty(tokens, width, dtype=dtype, device="cpu")
    scales = None if fold or activations in ("none", "int4") else torch.empty(tokens, dtype=torch.float32, device="cpu")
    divisor, given = (None if v is None else v.float().contiguous() for v in (extras.smooth, extras.input_scale))
    signs = rotation_signs(columns, x.device, torch.float32) if extras.rotation else None
    tasks = -(-tokens // PER_TASK)
    threads = min(torch.get_num_threads(), tasks) if tokens * columns > 1 << 14 else 1
    scratch = torch.empty(threads, columns + 64, dtype=torch.float32, device="cpu")
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
        extras.rotation,
        0 if given is None else given.data_ptr(),
        values.data_ptr(),
        width * values.element_size(),
        0 if scales is None else scales.data_ptr(),
        scratch.data_ptr(),
        *layout,
    )
    run_job(_kernel(activations, NAMES.get(dtype, "float32"), fold, layout[1] > 0, dtype == torch.int16), job, threads)
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
    if block >= 16:
        for first in range(0, count, 16):
            hadamard16(values + 4 * first)
        half = 16
    while half < block:
        for start in range(0, count, 2 * half):
            low, high = values + 4 * start, values + 4 * (start + half)
            for i in range(half):
                a, b = read_f32(low, i), read_f32(high, i)
                write(low, i, a + b, "float32")
                write(high, i, a - b, "float32")
        half *= 2


@helper
def step_of(values: Any, first: Any, last: Any, limit: Any, given: Any) -> Any:
    """Step of a token: its largest magnitude over ``limit``, 1 if that is zero; or the number at ``given``. NaN if any value is."""
    largest = np.int32(0)
    for i in range(first, last):
        largest = max(largest, float_bits(read_f32(values, i)) & np.int32(0x7FFFFFFF))  # ordered like magnitudes, NaN last
    step = bits_float(largest) / np.float32(limit)
    if given:
        return read_f32(given, 0) + np.float32(0) * step
    return np.float32(1.0) if step == 0 else step


@helper
def round_e4m3(value: Any) -> Any:
    """Nearest E4M3 number, half to even; ``value`` lies within its range."""
    exponent = max((float_bits(value) >> np.int32(23)) & np.int32(0xFF), np.int32(127 - 6))
    step = bits_float((exponent - np.int32(3)) << np.int32(23))  # three mantissa bits below the leading one
    return rint(value / step) * step


def split_bytes(x: Tensor, extras: Extras, codes: bool) -> Operands:
    """Tokens ``[tokens, columns]`` as the high and low bytes of :mod:`._bytes`, and their steps.

    ``codes``: INT8 activations, whose codes are the low bytes.
    """
    return _run(x, extras, "split8" if codes else "split16", torch.int8, 3 * x.shape[1], False)


def split_vectors(x: Tensor, extras: Extras, vector_size: int, lanes: int, integer: bool) -> Operands:
    """Tokens ``[tokens, columns]`` as vectors of ``lanes`` numbers for :mod:`._sums`: ``[tokens, vectors, lanes]``, flat.

    ``integer``: int16 numbers and their steps, else float32.
    """
    width = (-(-x.shape[1] // vector_size) + 7) * lanes
    activations = "int8" if extras.activations == "int8" else ("vectors" if integer else "none")
    dtype = torch.int16 if integer else torch.float32
    return _run(x, extras, activations, dtype, width, False, (vector_size, lanes))


@helper
def place_vectors(values: Any, count: Any, size: Any, lanes: Any, target: Any, integer: Any) -> None:
    """Copy a token's numbers to vectors of ``lanes``, ``size`` to each."""
    for first in range(0, count, size):
        at, to = values + 4 * first, first // size * lanes
        for i in range(min(size, count - first)):
            if integer:
                write_i16(target, to + i, np.int32(read_f32(at, i)))
            else:
                write(target, to + i, read_f32(at, i), "float32")


@helper
def split_token(values: Any, count: Any, step: Any, limit: Any, target: Any) -> None:
    """Bytes of one token, in blocks of 64 high bytes, 64 low bytes and 16 corrections."""
    for block in range(count // 64):
        at, high, low = values + block * 256, target + block * 192, target + block * 192 + 64
        for i in range(64):
            number = np.int32(rint(min(max(read_f32(at, i) / step, -limit), limit)))
            top = (number + np.int32(128)) >> np.int32(8)
            write_i8(high, i, top)
            write_i8(low, i, number - (top << np.int32(8)))
        for lane in range(16):
            total = np.int32(0)
            for i in range(4 * lane, 4 * lane + 4):
                total += np.int32(rint(min(max(read_f32(at, i) / step, -limit), limit)))
            write_i32(low + 64, lane, np.int32(-128) * total)


@lru_cache(maxsize=16)
def _kernel(activations: str, out: str, fold: bool, vectors: bool, integer: bool) -> Any:
    source, size = SOURCE, SIZES[out]
    limit = {
        "none": 0.0,
        "int8": 127.0,
        "fp8": FP8_MAX,
        "int4": 7.0,
        "split8": 127.0,
        "split16": SPLIT_MAX,
        "vectors": VECTORS_MAX,
    }[activations]
    split = activations.startswith("split")
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
                if split:
                    step = step_of(values, 0, columns, limit, job[GIVEN])
                    write(job[SCALES], token, step, "float32")
                    split_token(values, columns, step, np.float32(limit), target)
                    continue
                for first in range(0, columns, INT4_GROUP if grouped else columns):
                    last = min(first + INT4_GROUP, columns) if grouped else columns
                    step = step_of(values, first, last, limit, job[GIVEN]) if quantized else np.float32(1)
                    if quantized and not fold:
                        write(job[SCALES], token, step, "float32")
                    for i in range(first, last):
                        value = read_f32(values, i)
                        if quantized:
                            value = min(max(value / step, np.float32(-limit)), np.float32(limit))
                            value = round_e4m3(value) if fp8 else rint(value)
                        if fold:
                            value = value * step
                        if vectors:
                            write(values, i, value, "float32")
                        else:
                            write(target, i, value, out)
                if vectors:
                    zero_bytes(target, job[STRIDE])
                    place_vectors(values, columns, job[VECTOR], job[LANES], target, integer)
                    continue
                zero_bytes(target + columns * size, job[STRIDE] - columns * size)
            task = fetch_add(header + 8 * TASK, 1)

    return entry
