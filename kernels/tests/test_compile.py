"""The ops as seen by torch.library's own checks and by torch.compile."""

from __future__ import annotations

import oracle
import pytest
import torch

VARIANTS = ["codebook-2x8-d8", "e2m1-or-e1m2-g16", "int3-asymmetric-g16"]
EXTRAS = ["plain", "bias+low_rank+smooth+rotation", "bias+int8", "int4"]
WINDOW = ([3, 3], [2, 1], [1, 0], [1, 1])


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


def linear_arguments(variant: str, extras: str, *tokens: int) -> tuple[str, tuple]:
    weight = oracle.packed_weight(variant, 5, 64)
    x = torch.randn(*tokens, 64, requires_grad=True)
    return weight.kind, (x, *weight.arguments, *oracle.make_extras(extras, 5, 64, 64).values())


def conv2d_arguments(variant: str, extras: str) -> tuple[str, tuple]:
    weight = oracle.packed_weight(variant, 5, 16 * 9)
    x = torch.randn(2, 16, 6, 5, requires_grad=True)
    return weight.kind, (x, *weight.arguments, *oracle.make_extras(extras, 5, 16 * 9, 16).values(), *WINDOW)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_linear_passes_the_checks_of_torch_library(variant, extras):
    kind, arguments = linear_arguments(variant, extras, 2, 3)
    torch.library.opcheck(oracle.LINEAR[kind], arguments)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_conv2d_passes_the_checks_of_torch_library(variant, extras):
    kind, arguments = conv2d_arguments(variant, extras)
    torch.library.opcheck(oracle.CONV2D[kind], arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_dequantize_passes_the_checks_of_torch_library(variant, dtype):
    weight = oracle.packed_weight(variant, 3, 40)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if "g16-e4m3" in variant:
        checks.remove("test_schema")  # it multiplies the arguments to see whether they changed, and float8 cannot be multiplied
    torch.library.opcheck(oracle.DEQUANTIZE[weight.kind], (*weight.arguments, 40, dtype), test_utils=checks)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("variant", [*VARIANTS, "e2m1-g16-e4m3-two-level"])
def test_compiled_linear_is_equal_in_value_and_gradient(variant, extras):
    kind, arguments = linear_arguments(variant, extras, 7)
    results = []
    for function in (oracle.LINEAR[kind], torch.compile(oracle.LINEAR[kind], fullgraph=True, backend="aot_eager")):
        arguments[0].grad = None
        y = function(*arguments)
        y.square().sum().backward()
        results.append((y, arguments[0].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_compiled_conv2d_is_equal_in_value_and_gradient(variant):
    kind, arguments = conv2d_arguments(variant, "bias+low_rank+smooth+rotation")
    results = []
    for function in (oracle.CONV2D[kind], torch.compile(oracle.CONV2D[kind], fullgraph=True, backend="aot_eager")):
        arguments[0].grad = None
        y = function(*arguments)
        y.square().sum().backward()
        results.append((y, arguments[0].grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
def test_a_new_number_of_tokens_does_not_recompile(training):
    kind, (_, *rest) = linear_arguments("int4-g64", "bias+rotation+int8", 4)
    compiled = torch.compile(oracle.LINEAR[kind], fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(torch.randn(3, 6, 64, requires_grad=training), *rest)  # no size equals another, or dynamo ties them
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in ((3, 9), (2, 17), (8, 128)):
            x = torch.randn(*tokens, 64, requires_grad=training)
            y = compiled(x, *rest)
            assert torch.equal(y, oracle.LINEAR[kind](x, *rest))
            if training:
                y.sum().backward()
                assert x.grad.shape == x.shape


def test_a_new_image_size_does_not_recompile():
    kind, (_, *rest) = conv2d_arguments("int4-g64", "bias+rotation")
    compiled = torch.compile(oracle.CONV2D[kind], fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(torch.randn(2, 16, 6, 8), *rest)
    with torch.compiler.set_stance("fail_on_recompile"):
        for size in ((3, 16, 9, 7), (4, 16, 12, 13)):
            x = torch.randn(size)
            assert torch.equal(compiled(x, *rest), oracle.CONV2D[kind](x, *rest))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_the_promised_dtype_is_the_inputs(dtype):
    for ops, (kind, (x, *rest)) in (
        (oracle.LINEAR, linear_arguments("int4-g64", "bias+int8", 4)),
        (oracle.CONV2D, conv2d_arguments("int4-g64", "bias")),
    ):
        torch.library.opcheck(ops[kind], (x.detach().to(dtype).requires_grad_(), *rest))


def test_shapes_are_known_on_the_meta_device():
    """A model can be laid out, and its memory planned, before any weight is read."""
    for kind, arguments in (linear_arguments("int4-g64", "bias", 2, 3), linear_arguments("codebook-2x8-d8", "plain", 2, 3)):
        meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
        y = oracle.LINEAR[kind](*meta)
        assert (y.shape, y.device.type) == ((2, 3, 5), "meta")
    kind, arguments = conv2d_arguments("e2m1-g32-e8m0", "bias")
    meta = [a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments]
    assert oracle.CONV2D[kind](*meta).shape == oracle.CONV2D[kind](*arguments).shape


@pytest.mark.parametrize("kind", ["codebook", "minifloat", "integer"])
def test_ops_live_in_the_projects_namespace(kind):
    for op in ("dequantize", "linear", "conv2d"):
        assert hasattr(torch.ops.qdiff, f"{kind}_{op}")
