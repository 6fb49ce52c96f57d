"""Implementation "cpu" of the ops: compiled with numba where it is installed, else absent.

Nothing here imports numba before the first call that uses it; float64 and whatever else the kernels do not support runs on torch.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from torch import Tensor

from .. import reference
from .._dispatch import implementation
from ..reference import Extras, Window
from .operations import lookup_operations

__all__ = ["lookup_operations"]

ARGUMENTS = {"codebook": 4, "minifloat": 5, "integer": 5}  # number of arguments of a packed weight
EXTRAS = len(Extras._fields)


def _register(kind: str, count: int) -> None:
    def weight_of(arguments: tuple[Any, ...], columns: int) -> Any:
        from ._weights import WEIGHTS

        return WEIGHTS[kind](*arguments[:count], columns)

    @implementation(f"{kind}_dequantize", "cpu")
    def dequantize(*args: Any) -> Any:
        from ._weights import KINDS, decode

        *_, columns, dtype = args
        if dtype not in KINDS:
            return NotImplemented
        weight = weight_of(args, columns)
        return NotImplemented if weight is None else decode(weight, dtype)

    @implementation(f"{kind}_linear", "cpu")
    def linear(x: Tensor, *args: Any) -> Any:
        from ._linear import linear as run
        from ._linear import supports, supports_transforms
        from ._weights import decode

        extras = Extras(*args[count:])
        if not supports(x, extras) or (weight := weight_of(args, x.shape[-1])) is None:
            return NotImplemented
        if not supports_transforms(extras):
            return reference.linear(x, decode(weight, reference.compute_dtype(x, extras)), extras)
        return run(x, weight, extras)

    @implementation(f"{kind}_conv2d", "cpu")
    def conv2d(x: Tensor, *args: Any) -> Any:
        from ._conv2d import conv2d as run
        from ._linear import supports, supports_transforms
        from ._weights import decode

        extras = Extras(*args[count : count + EXTRAS])
        window = Window(*(tuple(pair) for pair in args[count + EXTRAS :]))
        columns = x.shape[1] * window.kernel_size[0] * window.kernel_size[1]
        if not supports(x.movedim(1, -1), extras) or (weight := weight_of(args, columns)) is None:
            return NotImplemented
        if not supports_transforms(extras):
            return reference.conv2d(x, decode(weight, reference.compute_dtype(x, extras)), window, extras)
        return run(x, weight, window, extras)

    @implementation(f"{kind}_linear_input_gradient", "cpu")
    def linear_input_gradient(gradient: Tensor, *args: Any) -> Any:
        dense = dequantize(*args[:count], args[-1], gradient.dtype)
        if dense is NotImplemented:
            return NotImplemented
        return reference.linear_input_gradient(gradient, dense, Extras(*args[count:-1]))

    @implementation(f"{kind}_conv2d_input_gradient", "cpu")
    def conv2d_input_gradient(gradient: Tensor, *args: Any) -> Any:
        window = Window(*(tuple(pair) for pair in args[count + EXTRAS : -1]))
        columns = args[-1][1] * window.kernel_size[0] * window.kernel_size[1]
        dense = dequantize(*args[:count], columns, gradient.dtype)
        if dense is NotImplemented:
            return NotImplemented
        return reference.conv2d_input_gradient(gradient, dense, args[-1], window, Extras(*args[count : count + EXTRAS]))


if find_spec("numba") is not None:
    for _kind, _count in ARGUMENTS.items():
        _register(_kind, _count)
