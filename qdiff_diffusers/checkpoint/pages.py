"""Memory of checkpoint files that are mapped: pages that have been read can go, and are read again if they are looked at once more.

The libraries map a file into memory. Its pages become resident as they are read, and stay so for as long as any tensor of the file
lives: after the last layer, a model that has been quantized would hold all of its dense checkpoint beside it.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

FEWEST_PAGES = 16  # a smaller tensor is not worth two system calls
# Bits of an entry of /proc/self/pagemap (Documentation/admin-guide/mm/pagemap.rst).
_PRESENT, _SWAPPED, _OF_A_FILE = np.uint64(1 << 63), np.uint64(1 << 62), np.uint64(1 << 61)


def release_pages(tensor: Tensor) -> None:
    """Let the pages of a mapped file go that hold this tensor alone. Its values stay as they are, for everybody who looks at them.

    Nothing happens to memory that is not a file's, to pages that have been written to since the file was mapped, and on systems
    other than Linux.
    """
    advise = _madvise()
    if advise is None or tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.is_contiguous():
        return
    start, stop = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    first, last = -(-start // mmap.PAGESIZE), stop // mmap.PAGESIZE
    if last - first >= FEWEST_PAGES and _are_a_files(first, last - first):
        advise(first * mmap.PAGESIZE, (last - first) * mmap.PAGESIZE, mmap.MADV_DONTNEED)


def _are_a_files(first: int, count: int) -> bool:
    """Whether what ``count`` pages hold can be read again: none of them is memory of the process's own."""
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as file:
            file.seek(first * 8)
            entries = np.frombuffer(file.read(count * 8), np.uint64)
    except (OSError, ValueError):  # not to be read, or empty
        return False
    held = (entries & (_PRESENT | _SWAPPED)) != 0
    return len(entries) == count and bool(((entries & _OF_A_FILE) != 0)[held].all())


@lru_cache(maxsize=1)
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's ``madvise``; ``None`` where pages cannot be told apart."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        function = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    function.restype = ctypes.c_int
    return function  # type: ignore[no-any-return]
