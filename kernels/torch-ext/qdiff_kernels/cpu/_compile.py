"""Compiling and caching of kernels: once per machine, under a key that changes with any of their sources.

numba's own key covers the file of the cached function, not the files of what it calls. So only whole kernels are cached, and each
holds a digest of this folder in its closure, which is part of the key.

Functions made by one factory need names of their own. numba calls a compiled function by its name, its types and how many functions
its process had compiled before, so functions that two processes have cached can bear one name, and a third process
that loads both runs one of them in place of the other. So the values that a function closes over are part of its name.

numba numbers the files of its cache without a lock: of two processes that store their first kernels at the same time, one can leave
an index that points to the other's code, and every later process would multiply by the wrong kernel. So one process compiles or
reads at a time.
"""

from __future__ import annotations

import getpass
import hashlib
import inspect
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock  # torch depends on it
from numba import cfunc, njit, types

SOURCE = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
ENTRY = types.void(types.voidptr)


def helper(function: Callable[..., Any]) -> Any:
    """Decorator of functions that kernels call."""
    return njit(nogil=True, error_model="numpy")(_named(function))


inlined: Any = njit(inline="always")
"""Decorator of functions that take literals: they are typed anew in every kernel."""


def kernel(function: Callable[[Any], None]) -> Any:
    """Compile ``function(address of a job)``; reads the compiled code from numba's cache if there is one for this source."""
    function = _named(function)
    with cache_lock():
        try:
            return cfunc(ENTRY, cache=True, error_model="numpy")(function).ctypes
        except RuntimeError as error:  # neither the package's folder nor the user's cache folder can be written
            if "cannot cache" not in str(error):
                raise
            return cfunc(ENTRY, error_model="numpy")(function).ctypes


def _named(function: Callable[..., Any]) -> Callable[..., Any]:
    """Put the numbers and texts that a function closes over into its name."""
    values = inspect.getclosurevars(function).nonlocals
    assert all(isinstance(value, int | float | str) for value in values.values()), "another process could not tell these apart"
    parts = [f"{name}_{value}" for name, value in values.items() if value != SOURCE]
    function.__qualname__ = "_".join([function.__qualname__, *parts])
    return function


@lru_cache(maxsize=1)
def cache_lock() -> BaseFileLock:
    """The lock of this user's kernel cache. It is free again when its process ends, however it ends."""
    return FileLock(Path(tempfile.gettempdir(), f"qdiff-kernels-{_user()}.lock"))


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's user without a name
        return "unknown"
