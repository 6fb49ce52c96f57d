"""Gradients to the input and the bias; activation quantizers are passed straight through."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch.autograd import gradcheck

EXTRAS = ["plain", "bias", "low_rank", "smooth", "rotation", "bias+low_rank+smooth+rotation"]
WINDOW = ([3, 2], [2, 1], [1, 1], [1, 2])


def with_bias(extras: dict, bias: torch.Tensor | None) -> list:
    return list((extras | {"bias": bias}).values())


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("variant", ["codebook-2x8-d8", "e2m1-or-e1m2-g16", "int3-asymmetric-g16"])
def test_linear_gradients_are_the_numerical_ones(variant, extras):
    weight = oracle.packed_weight(variant, 4, 32)
    chosen = oracle.make_extras(extras, 4, 32, 32)
    x = torch.randn(2, 3, 32, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, b: oracle.LINEAR[weight.kind](x, *weight.arguments, *with_bias(chosen, b)), (x, bias))


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("variant", ["codebook-2x8-d8", "e2m1-or-e1m2-g16", "int3-asymmetric-g16"])
def test_conv2d_gradients_are_the_numerical_ones(variant, extras):
    weight = oracle.packed_weight(variant, 3, 16 * 6)
    chosen = oracle.make_extras(extras, 3, 16 * 6, 16)
    x = torch.randn(1, 16, 4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, b: oracle.CONV2D[weight.kind](x, *weight.arguments, *with_bias(chosen, b), *WINDOW), (x, bias))


@pytest.mark.parametrize("activations", ["int8", "fp8", "int4"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_quantized_activations_have_the_gradient_of_unquantized_ones(kind, activations):
    columns = 32 if kind == "linear" else 32 * 6
    weight = oracle.packed_weight("int4-g64", 4, columns)
    chosen = oracle.make_extras("bias+low_rank+smooth+rotation", 4, columns, 32)
    shape = (5, 32) if kind == "linear" else (2, 32, 5, 4)
    grads = []
    for quantizer in ("none", activations):
        torch.manual_seed(1)
        x = torch.randn(shape, requires_grad=True)
        arguments = (x, *weight.arguments, *(chosen | {"activations": quantizer}).values())
        y = oracle.LINEAR["integer"](*arguments) if kind == "linear" else oracle.CONV2D["integer"](*arguments, *WINDOW)
        y.backward(torch.ones_like(y))
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_are_those_of_the_dense_layer_in_the_models_precision(dtype):
    weight = oracle.packed_weight("codebook-1x6-d2-g16", 6, 64)
    x = torch.randn(7, 64).to(dtype).requires_grad_()
    bias = torch.randn(6).to(dtype).requires_grad_()
    oracle.LINEAR["codebook"](x, *weight.arguments, *with_bias(oracle.NO_EXTRAS, bias)).square().sum().backward()
    exact_x = x.detach().double().requires_grad_()
    exact_bias = bias.detach().double().requires_grad_()
    torch.nn.functional.linear(exact_x, weight.dense, exact_bias).square().sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (dtype, dtype)
    assert oracle.relative_error(x.grad, exact_x.grad) < 3e-2
    assert oracle.relative_error(bias.grad, exact_bias.grad) < 3e-2


def test_a_float32_bias_beside_half_precision_inputs_gets_a_float32_gradient():
    weight = oracle.packed_weight("int4-g64", 6, 64)
    x = torch.randn(7, 64).bfloat16().requires_grad_()
    bias = torch.randn(6, requires_grad=True)
    oracle.LINEAR["integer"](x, *weight.arguments, *with_bias(oracle.NO_EXTRAS, bias)).sum().backward()
    assert (x.grad.dtype, bias.grad.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("shape", [(64,), (0, 64), (1, 64), (2, 3, 64)], ids=str)
def test_gradients_have_the_inputs_shape(shape):
    weight = oracle.packed_weight("int4-g64", 6, 64)
    x = torch.randn(shape, requires_grad=True)
    bias = torch.randn(6, requires_grad=True)
    oracle.LINEAR["integer"](x, *weight.arguments, *with_bias(oracle.NO_EXTRAS, bias)).sum().backward()
    assert x.grad.shape == shape
    assert bias.grad.shape == (6,)


def test_a_non_contiguous_gradient_is_followed():
    weight = oracle.packed_weight("int4-g64", 6, 64)
    strided = torch.randn(6, 5).T
    grads = []
    for upstream in (strided, strided.contiguous()):
        x = torch.ones(5, 64, requires_grad=True)
        oracle.LINEAR["integer"](x, *weight.arguments, *oracle.NO_EXTRAS.values()).backward(upstream)
        grads.append(x.grad)
    assert torch.allclose(*grads)


def test_no_input_gradient_is_computed_for_a_frozen_input():
    weight = oracle.packed_weight("int4-g64", 6, 64)
    x, bias = torch.randn(3, 64), torch.randn(6, requires_grad=True)
    oracle.LINEAR["integer"](x, *weight.arguments, *with_bias(oracle.NO_EXTRAS, bias)).sum().backward()
    assert x.grad is None
    assert torch.equal(bias.grad, torch.full((6,), 3.0))
