"""How a computation made of many small steps uses several threads."""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")

BLOCK = 1 << 18  # weights per block: a few float32 buffers of 1 MB each


class _Current(threading.local):
    executor: Executor | None = None


_current = _Current()
_setting = threading.Lock()


@contextmanager
def block_threads() -> Iterator[None]:
    """In this context, :func:`map_blocks` runs on as many threads as torch has, and every torch operation on one. Also a decorator.

    Torch would divide every operation among its threads and make them wait for each other after it. Whole blocks of many
    operations per thread are as fast on an idle machine, and five to fifty times faster where other programs take turns: an SVD
    of a 40 x 1152 matrix then takes a second on two threads and two milliseconds on one.
    """
    threads = torch.get_num_threads()
    if threads == 1 or _current.executor is not None:
        yield
        return
    set_own_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=set_own_threads, initargs=(1,)) as _current.executor:
            yield
    finally:
        _current.executor = None
        set_own_threads(threads)


def set_own_threads(count: int) -> None:
    """Let torch's operations in this thread use ``count`` threads, and leave all other threads as they are.

    ``torch.set_num_threads`` sets the number of the thread that calls it, and that with which every thread begins that is new to
    torch: those of a server that starts some meanwhile would keep a 1 for as long as they live.
    """
    torch.get_num_threads()  # a new thread takes the usual number at its first operation: now, not after this
    if (setters := _thread_setters()) is not None:
        for setter in setters:
            setter(count)
        return
    with _setting:
        usual = _in_new_thread(torch.get_num_threads)
        torch.set_num_threads(count)
        if usual != count:
            _in_new_thread(partial(torch.set_num_threads, usual))


@lru_cache(maxsize=1)
def _thread_setters() -> tuple[Callable[[int], Any], ...] | None:
    """The functions by which torch's own ``set_num_threads`` reaches OpenMP and MKL, which keep a number per thread.

    ``None`` where torch is built otherwise (macOS, Windows).
    """
    if not sys.platform.startswith("linux") or "OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        setters = [library.omp_set_num_threads]
        if torch.backends.mkl.is_available():
            setters.append(library.MKL_Set_Num_Threads_Local)
    except (OSError, AttributeError):
        return None
    for setter in setters:
        setter.argtypes = [ctypes.c_int]
    return tuple(setters)


def _in_new_thread(function: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(function()), name="qdiff-threads")
    thread.start()
    thread.join()
    return found[0]


def map_blocks(function: Callable[[slice], Result], matrix: Tensor, weights: int = BLOCK) -> list[Result]:
    """``function`` of slices of consecutive rows of ``matrix [rows, columns]``, about ``weights`` entries each, in order.

    The slices do not depend on the number of threads, so neither does the result. Memory that ``function`` keeps between calls
    must be the thread's own.
    """
    step = max(1, weights // matrix.shape[1])
    parts = [slice(start, start + step) for start in range(0, len(matrix), step)]
    if _current.executor is None or len(parts) == 1 or matrix.device.type != "cpu":
        return [function(part) for part in parts]
    return list(_current.executor.map(function, parts))
