"""Inputs are smoothed, rotated and quantized the same however the work is shared among programs."""

from __future__ import annotations

import oracle
import pytest
import torch
from ptx import COMPILED_FOR
from qdiff_kernels.activations import quantize_activations
from qdiff_kernels.hadamard import rotate

triton = pytest.importorskip("triton")
if not (COMPILED_FOR or torch.cuda.is_available()) and isinstance(triton.language.zeros_like, triton.runtime.JITFunction):
    pytest.skip("Triton was imported before TRITON_INTERPRET was set", allow_module_level=True)
from qdiff_kernels.gpu import activations
from qdiff_kernels.gpu.activations import partition, prepare
from qdiff_kernels.reference import Extras

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
H200 = 132


def extras(**given) -> Extras:
    return Extras(**(oracle.NO_EXTRAS | given))


@pytest.mark.parametrize("processors", [1, 3, H200])
@pytest.mark.parametrize("held", [activations.HELD, 256], ids=["whole tokens", "walked twice"])
@pytest.mark.parametrize("kind", ["int8", "fp8", "int4"])
def test_codes_and_scales_are_those_of_the_definition(monkeypatch, kind, held, processors):
    monkeypatch.setattr(activations, "processors", lambda name: processors)
    monkeypatch.setattr(activations, "HELD", held)
    x = torch.randn(19, 600, device=DEVICE)
    x[3] = 0
    inputs = prepare(x, extras(activations=kind), None)
    codes, scales = quantize_activations(x, kind)
    assert torch.equal(inputs.scales, scales)
    assert torch.equal(inputs.values.float(), codes.float())
    numbers = codes.double() if kind != "int4" else torch.nn.functional.pad(codes.double(), (0, 40)).unflatten(1, (10, 64))
    expected = numbers.sum(-1).reshape(scales.shape) * scales
    assert torch.allclose(inputs.sums.double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("kind", ["none", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_columns_are_shared_by_programs_without_a_difference(monkeypatch, dtype, kind):
    monkeypatch.setattr(activations, "processors", lambda name: 1)
    x = torch.randn(5, 1280, device=DEVICE).to(dtype)
    chosen = extras(activations=kind, rotation=256, smooth=torch.rand(1280, device=DEVICE) + 0.5)
    alone, shared = [], []
    for programs, result in ((1, alone), (H200, shared)):
        monkeypatch.setattr(activations, "PROGRAMS_PER_PROCESSOR", programs)
        result.extend(prepare(x, chosen, None)[:2])
    assert torch.equal(alone[0], shared[0])
    assert kind == "none" or torch.equal(alone[1], shared[1])


def test_a_rotation_is_that_of_its_signs_and_matrix():
    x = torch.randn(3, 384, device=DEVICE)
    assert torch.allclose(prepare(x, extras(rotation=128), None).values, rotate(x, 128), atol=1e-5)


@pytest.mark.parametrize("kind", ["none", "int4", "int8"])
def test_a_branch_rides_along_only_where_programs_see_whole_tokens_and_fill_the_device(monkeypatch, kind):
    down = torch.randn(5, 128, device=DEVICE)
    x = torch.randn(33, 128, device=DEVICE)
    for processors in (3, 4):
        monkeypatch.setattr(activations, "processors", lambda name, processors=processors: processors)
        branch = prepare(x, extras(rotation=16, activations=kind), down).branch
        assert (branch is not None) == (processors == 3 and kind != "int8")
        assert branch is None or torch.allclose(branch, x @ down.T, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("channels", [40, 1100])
def test_pixels_of_images_are_tokens(channels, kind):
    x = torch.randn(2, channels, 3, 2, device=DEVICE)
    codes, scales = quantize_activations(x.permute(0, 2, 3, 1).reshape(-1, channels), kind)
    for image in (x, x.contiguous(memory_format=torch.channels_last)):
        inputs = prepare(image, extras(activations=kind), None)
        assert torch.equal(inputs.values.float(), codes.float()) and torch.equal(inputs.scales, scales)


@pytest.mark.parametrize("columns", [64, 3072, 5120, 12288, 15360])
@pytest.mark.parametrize("tokens", [1, 16, 256, 1024, 4096])
def test_the_device_is_filled(tokens, columns):
    shared = partition(tokens, columns, 64, False, True, H200)
    tiles = -(-tokens // shared.tokens) * -(-columns // shared.columns)
    assert -(-tokens // shared.tokens) * shared.splits >= min(H200, tiles)
    whole = partition(tokens, columns, 64, True, True, H200)
    assert whole.columns >= columns and whole.tokens * whole.columns <= activations.HELD
    assert whole.tokens == 1 or columns <= 1024
