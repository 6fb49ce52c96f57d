"""One token by a codebook of bytes through look-up tables, and the operations that they save.

The products of every part of the token with every entry are taken once, ``table[v, m, code] = codebooks[m, code] . x[v]``; a row of
the weight is then a sum of looked-up numbers. Tables are used in blocks that the first-level cache holds.

The ops do not use it: a look-up costs the loads of a code and of a number, and summing the entries themselves in a vector register
(``_sums.py``) costs as many loads, saves building the tables and shares the sum between tokens. On two Zen 4 cores at 3072 x 3072,
4 codebooks of 256 entries of 16: tables 1.04 ms of one thread, of which 0.13 to build them, register sums 0.71 ms.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numba import carray
from torch import Tensor

from ._compile import SOURCE, helper, kernel
from ._simd import fetch_add, read_f32, read_u8, write, zero_bytes
from ._threads import SLOT, TASK, run_job

TASKS, VECTORS, BOOKS, SIZE, CODEBOOKS, X, TABLES, ROWS, CODES, STRIDE, SUMS, PER_TASK, LENGTH = range(2, 15)
ENTRIES = 256
BLOCK_TABLES = 16  # tables in a block: 16 KB of float32
VECTORS_PER_TASK = 8


def lookup_sums(codes: Tensor, codebooks: Tensor, x: Tensor) -> Tensor:
    """``sum over v, m of codebooks[m, codes[r, v, m]] . x[v]`` for every row, float32 ``[rows]``.

    Args:
        codes: int8 ``[rows, vectors * num_codebooks]``, contiguous. codebooks: ``[num_codebooks, 256, vector_size]``.
        x: float32 ``[vectors, vector_size]``, contiguous.
    """
    books, _, size = codebooks.shape
    rows, vectors, threads = codes.shape[0], x.shape[0], torch.get_num_threads()
    by_column = codebooks.float().transpose(1, 2).contiguous()
    shapes = ((vectors * books, ENTRIES), (rows,))
    tables, sums = (torch.empty(*shape, dtype=torch.float32, device="cpu") for shape in shapes)
    job = np.zeros(LENGTH, np.int64)
    addresses = by_column.data_ptr(), x.data_ptr(), tables.data_ptr(), rows, codes.data_ptr(), codes.shape[1], sums.data_ptr()
    job[2:] = (-(-vectors // VECTORS_PER_TASK), vectors, books, size, *addresses, 0)
    run_job(_build_kernel(), job, threads)
    job[TASK] = job[SLOT] = 0
    job[PER_TASK] = -(-rows // threads)
    job[TASKS] = threads
    run_job(_sum_kernel(), job, threads)
    return sums


@lru_cache(maxsize=1)
def _build_kernel() -> Any:
    source = SOURCE

    @kernel
    def entry(raw: Any) -> None:
        _ = source
        job = carray(raw, (LENGTH,), np.int64)
        header, books, size = job.ctypes.data, job[BOOKS], job[SIZE]
        task = fetch_add(header + 8 * TASK, 1)
        while task < job[TASKS]:
            for v in range(task * VECTORS_PER_TASK, min((task + 1) * VECTORS_PER_TASK, job[VECTORS])):
                for m in range(books):
                    table = job[TABLES] + 4 * (v * books + m) * ENTRIES
                    fill_table(job[CODEBOOKS] + 4 * m * size * ENTRIES, job[X] + 4 * v * size, size, table)
            task = fetch_add(header + 8 * TASK, 1)

    return entry


@helper
def fill_table(columns: Any, x: Any, size: Any, target: Any) -> None:
    """Products of one part of the token with all entries of one codebook; ``columns [size, entries]``."""
    first = read_f32(x, 0)
    for e in range(ENTRIES):
        write(target, e, read_f32(columns, e) * first, "float32")
    for i in range(1, size):
        factor, column = read_f32(x, i), columns + 4 * i * ENTRIES
        for e in range(ENTRIES):
            write(target, e, read_f32(target, e) + read_f32(column, e) * factor, "float32")


@lru_cache(maxsize=1)
def _sum_kernel() -> Any:
    source = SOURCE

    @kernel
    def entry(raw: Any) -> None:
        _ = source
        job = carray(raw, (LENGTH,), np.int64)
        header, stride, sums = job.ctypes.data, job[STRIDE], job[SUMS]
        task = fetch_add(header + 8 * TASK, 1)
        while task < job[TASKS]:
            first, last = min(task * job[PER_TASK], job[ROWS]), min((task + 1) * job[PER_TASK], job[ROWS])
            zero_bytes(sums + 4 * first, 4 * (last - first))
            for begin in range(0, stride, BLOCK_TABLES):
                tables = job[TABLES] + 4 * begin * ENTRIES
                if stride - begin >= BLOCK_TABLES:
                    for row in range(first, last):
                        add_full(job[CODES] + row * stride + begin, tables, sums, row)
                else:
                    for row in range(first, last):
                        add_rest(job[CODES] + row * stride + begin, tables, stride - begin, sums, row)
            task = fetch_add(header + 8 * TASK, 1)

    return entry


@helper
def add_full(codes: Any, tables: Any, sums: Any, row: Any) -> None:
    """Add a block of tables to one row's sum, in four parts that do not wait for each other."""
    a = b = c = d = np.float32(0)
    for j in range(0, BLOCK_TABLES, 4):
        a += read_f32(tables, j * ENTRIES + read_u8(codes, j))
        b += read_f32(tables, (j + 1) * ENTRIES + read_u8(codes, j + 1))
        c += read_f32(tables, (j + 2) * ENTRIES + read_u8(codes, j + 2))
        d += read_f32(tables, (j + 3) * ENTRIES + read_u8(codes, j + 3))
    write(sums, row, read_f32(sums, row) + ((a + b) + (c + d)), "float32")


@helper
def add_rest(codes: Any, tables: Any, count: Any, sums: Any, row: Any) -> None:
    """Add the last ``count`` tables, fewer than a block, to one row's sum."""
    total = np.float32(0)
    for j in range(count):
        total += read_f32(tables, j * ENTRIES + read_u8(codes, j))
    write(sums, row, read_f32(sums, row) + total, "float32")
