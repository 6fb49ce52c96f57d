"""From the integer sums of an INT8 product to results: token scale, row scale, bias and rounding in one pass."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ._compile import SOURCE, kernel
from ._simd import fetch_add, read_f32, read_i8, read_i32, write
from ._threads import TASK, run_job
from ._weights import NAMES

TASKS, TOKENS, ROWS, SUMS, TOKEN_SCALES, ROW_SCALES, BIAS, ZEROS, CODES, Y, Y_STRIDE, COLUMNS, LENGTH = range(2, 15)
PER_TASK = 8  # tokens in a task


def scale_sums(
    sums: Tensor,
    token_scales: Tensor,
    row_scales: Tensor,
    bias: Tensor | None,
    y: Tensor,
    zeros: Tensor | None = None,
    codes: Tensor | None = None,
) -> None:
    """``y = (sums * row_scales + codes.sum(1) * zeros) * token_scales + bias``.

    Args:
        sums: int32 ``[tokens, rows]``, contiguous. token_scales: float32 ``[tokens]``. row_scales, bias, zeros: float32 ``[rows]``.
        codes: int8 ``[tokens, columns]``, contiguous, given with zeros.
        y: ``[tokens, rows]`` with contiguous rows, written.
    """
    tokens, rows = sums.shape
    tasks = -(-tokens // PER_TASK)
    job = np.zeros(LENGTH, np.int64)
    tensors = (sums, token_scales, row_scales, bias, zeros, codes, y)
    columns = 0 if codes is None else codes.shape[1]
    job[2:] = (tasks, tokens, rows, *(0 if t is None else t.data_ptr() for t in tensors), y.stride(0), columns)
    threads = min(torch.get_num_threads(), tasks) if tokens * rows > 1 << 14 else 1
    run_job(_kernel(NAMES[y.dtype], bias is not None, zeros is not None), job, threads)


@lru_cache(maxsize=8)
def _kernel(out: str, biased: bool, centered: bool) -> Any:
    source = SOURCE

    @kernel
    def entry(raw: Any) -> None:
        _ = source
        job = carray(raw, (LENGTH,), np.int64)
        header, rows = job.ctypes.data, job[ROWS]
        sums, row_scales, bias, y = job[SUMS], job[ROW_SCALES], job[BIAS], job[Y]
        task = fetch_add(header + 8 * TASK, 1)
        while task < job[TASKS]:
            for token in range(task * PER_TASK, min((task + 1) * PER_TASK, job[TOKENS])):
                scale = read_f32(job[TOKEN_SCALES], token)
                first, to = token * rows, token * job[Y_STRIDE]
                offset = np.float32(0)
                if centered:
                    codes, total = job[CODES] + token * job[COLUMNS], 0
                    for c in range(job[COLUMNS]):
                        total += read_i8(codes, c)
                    offset = np.float32(total) * scale
                for r in range(rows):
                    value = np.float32(read_i32(sums, first + r)) * (scale * read_f32(row_scales, r))
                    if centered:
                        value += offset * read_f32(job[ZEROS], r)
                    if biased:
                        value += read_f32(bias, r)
                    write(y, to + r, value, out)
            task = fetch_add(header + 8 * TASK, 1)

    return entry
