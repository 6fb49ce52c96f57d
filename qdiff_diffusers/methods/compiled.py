"""Loops in machine code: compiled by numba where it is installed, kept on disk, and never needed: torch does the same elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from diffusers.utils import logging
from torch import Tensor

logger = logging.get_logger(__name__)


def compiled(signature: str, *liberties: str) -> Callable[[Callable[..., Any]], Any]:
    """Decorator: compile a function of numpy arrays, for one signature. It runs without the interpreter's lock.

    ``liberties`` are LLVM's names of what may be done to floating-point arithmetic; by default none, and it is IEEE's, as written.

    numba knows a function by its name and types, so names must be unique in the package, and everything that it calls must be in
    its own file, whose date is the key of the code kept on disk.
    """
    from numba import njit
    from qdiff_kernels.cpu._compile import cache_lock

    options: dict[str, Any] = {"nogil": True, "error_model": "numpy", "fastmath": set(liberties) or False}

    def decorate(function: Callable[..., Any]) -> Any:
        with cache_lock():
            try:
                return njit(signature, cache=True, **options)(function)
            except RuntimeError as error:  # neither the package's folder nor the user's cache folder can be written
                if "cannot cache" not in str(error):
                    raise
                return njit(signature, **options)(function)

    return decorate


def loops(name: str, *tensors: Tensor) -> ModuleType | None:
    """The module of this package with compiled loops, imported at its first use; ``None`` where torch has to do: without numba, and
    for tensors that are not on a CPU."""
    if any(tensor.device.type != "cpu" for tensor in tensors) or not _numba_is_there():
        return None
    return import_module(f".{name}", __package__)


@cache
def _numba_is_there() -> bool:
    found = find_spec("numba") is not None
    if not found:
        logger.warning("qdiff: numba is not installed: codes are fitted by torch alone, which is slower (pip install numba)")
    return found
