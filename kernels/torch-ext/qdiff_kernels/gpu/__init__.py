"""Triton kernels: CUDA, ROCm and XPU, and any device under Triton's interpreter.

Only registration happens at import; Triton itself is imported by the first call.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from .._dispatch import implementation

FORMATS = ("codebook", "minifloat", "integer")
OPS = ("dequantize", "linear", "conv2d", "linear_input_gradient", "conv2d_input_gradient")


def _register(op: str, kind: str) -> None:
    function: Callable[..., Any] | None = None

    @implementation(f"{kind}_{op}", "triton")
    def run(*args: Any) -> Any:
        nonlocal function
        if function is None:
            function = getattr(import_module(".ops", __name__), op)
        return function(kind, *args)


if find_spec("triton") is not None:
    for _kind in FORMATS:
        for _op in OPS:
            _register(_op, _kind)
