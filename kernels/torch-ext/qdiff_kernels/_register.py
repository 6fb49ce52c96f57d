"""Turns one weight decoder into the three custom ops of a format: ``<format>_dequantize``, ``_linear`` and ``_conv2d``.

The torch implementations follow from the decoder and ``reference.py``; a Triton or CPU implementation registers beside them
with the op's own signature. Fake implementations make the ops opaque to ``torch.compile`` without graph breaks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import _dispatch, reference
from ._dispatch import implementation
from ._ops import add_op_namespace_prefix
from .reference import Extras, Window

GIVEN_SCHEMA = "Tensor? bias, Tensor? low_rank_down, Tensor? low_rank_up, Tensor? smooth, int rotation, str activations"
EXTRAS_SCHEMA = f"{GIVEN_SCHEMA}, Tensor? shift, Tensor? input_scale"
TRAILING_EXTRAS_SCHEMA = f"{GIVEN_SCHEMA}, Tensor? shift=None, Tensor? input_scale=None"  # arguments with defaults must come last
WINDOW_SCHEMA = "int[] kernel_size, int[] stride, int[] padding, int[] dilation"
Decoder = Callable[..., Tensor]


def register_format(name: str, weight_schema: str, decode: Decoder) -> tuple[Callable, Callable, Callable]:
    """Register the ops of one packed format.

    Args:
        name: format name, the ops' prefix.
        weight_schema: schema of the packed weight's arguments; the first must be ``Tensor codes`` with one row per output.
        decode: ``decode(*weight, columns, dtype) -> [rows, columns]``, the torch reference.

    Returns:
        The callables ``dequantize(*weight, columns, dtype)``, ``linear(x, *weight, *extras)`` and
        ``conv2d(x, *weight, *extras, *window)``.
    """
    count = weight_schema.count(",") + 1
    return (
        _register_dequantize(name, weight_schema, decode),
        _register_linear(name, weight_schema, decode, count),
        _register_conv2d(name, weight_schema, decode, count),
    )


def _register_dequantize(name: str, weight_schema: str, decode: Decoder) -> Callable:
    op = f"{name}_dequantize"
    implementation(op, "torch")(decode)

    def run(codes: Tensor, *rest: Any) -> Tensor:
        return _dispatch.run(op, codes.device.type, codes, *rest)

    custom = _custom_op(op, f"({weight_schema}, SymInt columns, ScalarType dtype) -> Tensor", run)

    @custom.register_fake
    def _(codes: Tensor, *rest: Any) -> Tensor:
        *_, columns, dtype = rest
        return codes.new_empty(codes.shape[0], columns, dtype=dtype)

    return custom


def _register_linear(name: str, weight_schema: str, decode: Decoder, count: int) -> Callable:
    op = f"{name}_linear"

    @implementation(op, "torch")
    def linear_torch(x: Tensor, *args: Any) -> Tensor:
        weight, extras = args[:count], Extras(*args[count:])
        return reference.linear(x, decode(*weight, x.shape[-1], reference.compute_dtype(x, extras)), extras)

    def run(x: Tensor, *args: Any) -> Tensor:
        return _dispatch.run(op, x.device.type, x, *args)

    custom = _custom_op(op, f"(Tensor x, {weight_schema}, {TRAILING_EXTRAS_SCHEMA}) -> Tensor", run)

    @custom.register_fake
    def _(x: Tensor, codes: Tensor, *args: Any) -> Tensor:
        return x.new_empty(*x.shape[:-1], codes.shape[0])

    @implementation(f"{op}_input_gradient", "torch")
    def gradient_torch(gradient: Tensor, *args: Any) -> Tensor:
        weight, extras, columns = args[:count], Extras(*args[count:-1]), args[-1]
        return reference.linear_input_gradient(gradient, decode(*weight, columns, gradient.dtype), extras)

    def run_gradient(gradient: Tensor, *args: Any) -> Tensor:
        return _dispatch.run(f"{op}_input_gradient", gradient.device.type, gradient, *args)

    gradient_schema = f"(Tensor gradient, {weight_schema}, {EXTRAS_SCHEMA}, SymInt columns) -> Tensor"
    input_gradient = _custom_op(f"{op}_input_gradient", gradient_schema, run_gradient)

    @input_gradient.register_fake
    def _(gradient: Tensor, *args: Any) -> Tensor:
        return gradient.new_empty(*gradient.shape[:-1], args[-1])

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.columns = inputs[0].shape[-1]
        _save(ctx, inputs[1:])

    def backward(ctx: Any, gradient: Tensor) -> tuple:
        args = _saved(ctx)
        grads: list[Tensor | None] = [None] * (1 + len(args))
        if ctx.needs_input_grad[0]:
            grads[0] = input_gradient(gradient, *args, ctx.columns)
        if ctx.needs_input_grad[1 + count]:
            grads[1 + count] = gradient.sum_to_size(gradient.shape[-1])
        return tuple(grads)

    custom.register_autograd(backward, setup_context=setup_context)
    return custom


def _register_conv2d(name: str, weight_schema: str, decode: Decoder, count: int) -> Callable:
    op = f"{name}_conv2d"

    def split(args: tuple) -> tuple[tuple, Extras, Window]:
        extras_end = count + len(Extras._fields)
        window = Window(*(tuple(pair) for pair in args[extras_end:]))
        return args[:count], Extras(*args[count:extras_end]), window

    @implementation(op, "torch")
    def conv2d_torch(x: Tensor, *args: Any) -> Tensor:
        weight, extras, window = split(args)
        columns = x.shape[1] * window.kernel_size[0] * window.kernel_size[1]
        return reference.conv2d(x, decode(*weight, columns, reference.compute_dtype(x, extras)), window, extras)

    def run(x: Tensor, *args: Any) -> Tensor:
        return _dispatch.run(op, x.device.type, x, *args)

    custom = _custom_op(op, f"(Tensor x, {weight_schema}, {EXTRAS_SCHEMA}, {WINDOW_SCHEMA}) -> Tensor", run)

    @custom.register_fake
    def _(x: Tensor, codes: Tensor, *args: Any) -> Tensor:
        window = split((codes, *args))[2]
        size = (reference.conv2d_output_size(n, *g) for n, *g in zip(x.shape[-2:], *window, strict=True))
        return x.new_empty(x.shape[0], codes.shape[0], *size)

    @implementation(f"{op}_input_gradient", "torch")
    def gradient_torch(gradient: Tensor, *args: Any) -> Tensor:
        x_shape = args[-1]
        weight, extras, window = split(args[:-1])
        columns = x_shape[1] * window.kernel_size[0] * window.kernel_size[1]
        dense = decode(*weight, columns, gradient.dtype)
        return reference.conv2d_input_gradient(gradient, dense, x_shape, window, extras)

    def run_gradient(gradient: Tensor, *args: Any) -> Tensor:
        return _dispatch.run(f"{op}_input_gradient", gradient.device.type, gradient, *args)

    gradient_schema = f"(Tensor gradient, {weight_schema}, {EXTRAS_SCHEMA}, {WINDOW_SCHEMA}, SymInt[] x_shape) -> Tensor"
    input_gradient = _custom_op(f"{op}_input_gradient", gradient_schema, run_gradient)

    @input_gradient.register_fake
    def _(gradient: Tensor, *args: Any) -> Tensor:
        return gradient.new_empty(args[-1])

    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.x_shape = list(inputs[0].shape)
        _save(ctx, inputs[1:])

    def backward(ctx: Any, gradient: Tensor) -> tuple:
        args = _saved(ctx)
        grads: list[Tensor | None] = [None] * (1 + len(args))
        if ctx.needs_input_grad[0]:
            grads[0] = input_gradient(gradient, *args, ctx.x_shape)
        if ctx.needs_input_grad[1 + count]:
            grads[1 + count] = gradient.sum((0, 2, 3))
        return tuple(grads)

    custom.register_autograd(backward, setup_context=setup_context)
    return custom


def _custom_op(op: str, schema: str, run: Callable) -> Any:
    return torch.library.custom_op(add_op_namespace_prefix(op), run, mutates_args=(), schema=schema)


def _save(ctx: Any, args: tuple) -> None:
    """Keep tensors where autograd can see them and the rest as plain attributes."""
    ctx.save_for_backward(*(a for a in args if isinstance(a, Tensor)))
    ctx.rest = [None if isinstance(a, Tensor) else (a,) for a in args]


def _saved(ctx: Any) -> tuple:
    tensors = iter(ctx.saved_tensors)
    return tuple(next(tensors) if kept is None else kept[0] for kept in ctx.rest)
