"""Triton kernels: CUDA, ROCm and XPU, and any device under Triton's interpreter.

Only registration happens at import; Triton itself is imported by the first call.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .._dispatch import implementation

FORMATS = ("codebook", "minifloat", "integer")
OPS = ("dequantize", "linear", "conv2d", "linear_input_gradient", "conv2d_input_gradient")


_usable = True


def _register(op: str, kind: str) -> None:
    function: Callable[..., Any] | None = None

    @implementation(f"{kind}_{op}", "triton")
    def run(*args: Any) -> Any:
        nonlocal function
        if not _usable:
            return NotImplemented
        if function is None:
            function = getattr(import_module(".ops", __name__), op)
        return _on_device_of(next(a for a in args if isinstance(a, Tensor)), function, kind, *args)


def _on_device_of(tensor: Tensor, function: Callable[..., Any], *args: Any) -> Any:
    """Call with the tensor's device current, which is where Triton launches, and in the dtypes the op promises."""
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return _on_device_of(tensor, function, *args)
    if kind == "cpu":
        return function(*args)
    with torch.get_device_module(kind).device(tensor.device):
        try:
            return function(*args)
        except RuntimeError as error:
            if "C compiler" not in str(error):
                raise
            return _give_up(error)


def _give_up(error: Exception) -> Any:
    """Triton compiles its launchers with the system's compiler; without one everything runs on the torch implementation."""
    global _usable
    _usable = False
    warnings.warn(f"qdiff runs without its Triton kernels, slowly, because they cannot be launched: {error}", stacklevel=2)
    return NotImplemented


if find_spec("triton") is not None:
    for _kind in FORMATS:
        for _op in OPS:
            _register(_op, _kind)
