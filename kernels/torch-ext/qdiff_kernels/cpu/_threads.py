"""Runs a compiled function on torch's own OpenMP threads.

A second thread pool beside torch's would compete for the cores: idle OpenMP threads spin for a while before they sleep. So the
compiled kernels are entered through ``GOMP_parallel`` of the very library that torch computes with. It takes about two
microseconds, may be called from several Python threads at once, and follows ``torch.set_num_threads``.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

# The first two entries of every job are counters that the threads share: the next task, and the next free thread slot.
TASK, SLOT, HEADER = 0, 1, 2


def run_job(entry: Any, job: np.ndarray, threads: int) -> None:
    """Call ``entry(address of job)`` on ``threads`` threads and wait for all. job: int64, ``[0]`` and ``[1]`` zero."""
    address = job.ctypes.data
    if threads <= 1:
        entry(address)
        return
    parallel = _gomp_parallel()
    if parallel is not None:
        parallel(ctypes.cast(entry, ctypes.c_void_p), address, threads, 0)
        return
    pool = _pool(threads - 1)
    others = [pool.submit(entry, address) for _ in range(threads - 1)]
    entry(address)
    for other in others:
        other.result()


@lru_cache(maxsize=1)
def _gomp_parallel() -> Callable[..., None] | None:
    """``GOMP_parallel`` as torch's CPU library resolves it, ``None`` where torch has another OpenMP (macOS, Windows)."""
    if not sys.platform.startswith("linux"):
        return None
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        function = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    function.restype = None
    return function


@lru_cache(maxsize=4)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="qdiff")
