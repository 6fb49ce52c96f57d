"""The methods compute in float32, whatever torch's default dtype is: it belongs to the whole process, and loaders change it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.methods import LayerInputs, quantize_weight
from qdiff_diffusers.methods.layer import QuantizedWeight

CONFIGS: dict[str, QDiffConfig] = {
    "aq-4": AQConfig(bits=4),
    "aq-2-int8": AQConfig(bits=2, activations="int8"),
    "aq-1": AQConfig(bits=1),
    "aq-own-codebooks": AQConfig(num_codebooks=2, codebook_bits=4, vector_size=4, codebook="layer", rotation=False),
    "aq-unbiased": AQConfig(bits=2, unbiased=True),
    "vq-4": VQConfig(bits=4),
    "vq-2": VQConfig(bits=2),
    "vq-own-codebook": VQConfig(codebook_bits=6, vector_size=2, codebook="layer", row_scales=False),
    "fp-8": FPConfig(bits=8),
    "fp-4": FPConfig(bits=4),
    "fp-3-rotated": FPConfig(bits=3, rotation=True),
    "fp-tensor": FPConfig(weight_format="e3m2", group_size="tensor", scale_dtype="float32"),
    "fp-nvfp4": FPConfig(weight_format="nvfp4"),
    "fp-mxfp4": FPConfig(weight_format="mxfp4"),
    "svdquant-4-int4": SVDQuantConfig(bits=4, rank=4, activations="int4", smoothing=True),
    "svdquant-nvfp4": SVDQuantConfig(weight_format="nvfp4", rank=4, activations="nvfp4"),
    "svdquant-8": SVDQuantConfig(bits=8),
    "rtn-4": RTNConfig(bits=4, activations="int8"),
    "rtn-2-rotated": RTNConfig(bits=2, group_size="row", rotation=True),
}
ROWS, COLUMNS = 24, 64


def problem() -> tuple[Tensor, LayerInputs]:
    """A weight and inputs that a calibration could have recorded, at two timesteps."""
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(40, COLUMNS, generator=generator, dtype=torch.float32)
    noise = torch.randn(400, COLUMNS, generator=generator, dtype=torch.float32)
    x = torch.randn(400, 40, generator=generator, dtype=torch.float32) @ mix + 0.3 * noise
    weight = torch.randn(ROWS, COLUMNS, generator=generator, dtype=torch.float32)
    return weight, LayerInputs(x.T @ x / len(x), samples={10.0: x[:200], 900.0: x[200:]}, shiftable=True)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def assert_equal(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert found.spec == expected.spec
    assert found.error == expected.error
    for name, tensor in expected.tensors.items():
        assert found.tensors[name].dtype == tensor.dtype, name
        assert torch.equal(found.tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("calibrated", [False, True], ids=["plain", "calibrated"])
@pytest.mark.parametrize("method", CONFIGS)
def test_the_default_dtype_changes_no_bit(method: str, calibrated: bool, default: torch.dtype) -> None:
    weight, known = problem()
    inputs = known if calibrated else None
    expected = quantize_weight(weight, CONFIGS[method], 1, inputs)
    with default_dtype(default):
        assert_equal(quantize_weight(weight, CONFIGS[method], 1, inputs), expected)
        assert torch.get_default_dtype() == default


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64], ids=str)
def test_nor_does_it_for_convolutions_and_vectors_along_kernels(default: torch.dtype) -> None:
    weight = torch.randn(12, 16, 3, 3)
    config = AQConfig(bits=2, kernel_vectors=True)
    expected = quantize_weight(weight, config)
    with default_dtype(default):
        assert_equal(quantize_weight(weight, config), expected)


@pytest.mark.parametrize("method", ["aq-2-int8", "vq-2", "fp-nvfp4", "svdquant-4-int4", "rtn-4"])
def test_a_thread_that_changes_it_meanwhile_does_no_harm(method: str) -> None:
    weight, inputs = problem()
    expected = quantize_weight(weight, CONFIGS[method], 1, inputs)
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            for dtype in (torch.bfloat16, torch.float64, torch.float32):
                torch.set_default_dtype(dtype)

    other = threading.Thread(target=change)
    other.start()
    try:
        found = [quantize_weight(weight, CONFIGS[method], 1, inputs) for _ in range(3)]
    finally:
        over.set()
        other.join()
        torch.set_default_dtype(torch.float32)
    for quantized in found:
        assert_equal(quantized, expected)


@pytest.mark.parametrize("method", CONFIGS)
def test_the_global_random_numbers_are_neither_used_nor_disturbed(method: str) -> None:
    weight, inputs = problem()
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    expected = quantize_weight(weight, CONFIGS[method], 1, inputs)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert_equal(quantize_weight(weight, CONFIGS[method], 1, inputs), expected)
