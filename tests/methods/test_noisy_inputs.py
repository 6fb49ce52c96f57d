"""Weights for inputs that are quantized to 4 bits: the filter is the best there is, and it lowers the error of real products."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qdiff_diffusers import RTNConfig, SVDQuantConfig
from qdiff_diffusers.formats import LayerSpec
from qdiff_diffusers.methods import LayerInputs, QuantizedWeight, quantize_weight
from qdiff_diffusers.methods.inputs import for_noisy_inputs, input_noise, treat


def correlated(tokens: int, channels: int, seed: int = 0) -> torch.Tensor:
    """Inputs in which some directions carry most, a few channels among them, as in trained transformers."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(channels // 4, channels, generator=torch.Generator().manual_seed(99))
    mix[:, ::32] *= 6
    return torch.randn(tokens, channels // 4, generator=generator) @ mix / channels**0.5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 24), st.floats(1e-3, 10))
def test_no_other_matrix_errs_less(seed: int, columns: int, level: float):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3 * columns, columns, generator=generator, dtype=torch.float64)
    hessian = x.T @ x / len(x) + 0.01 * torch.eye(columns)
    noise = level * torch.rand(columns, generator=generator, dtype=torch.float64)
    weight = torch.randn(5, columns, generator=generator, dtype=torch.float64)
    best, noisy = for_noisy_inputs(weight, hessian, noise)

    def expected_error(matrix: torch.Tensor) -> float:
        return float((((weight - matrix) @ hessian) * (weight - matrix)).sum() + (matrix.square() * noise).sum())

    assert torch.equal(noisy, hessian + torch.diag(noise))
    assert expected_error(best) <= expected_error(weight)
    for _ in range(5):
        other = best + 0.05 * torch.randn(best.shape, generator=generator, dtype=torch.float64)
        assert expected_error(best) < expected_error(other)


def test_without_noise_nothing_changes():
    weight, x = torch.randn(6, 16), torch.randn(64, 16)
    hessian = x.T @ x / len(x) + 0.01 * torch.eye(16)
    same, noisy = for_noisy_inputs(weight, hessian, torch.zeros(16))
    assert torch.allclose(same, weight, atol=1e-5) and torch.equal(noisy, hessian)


def output_error(found: QuantizedWeight, weight: torch.Tensor, x: torch.Tensor) -> float:
    """Of the whole packed product, quantized inputs and exact ones for the branch, relative and squared."""
    spec, tensors = found.spec, found.tensors
    residual = LayerSpec(spec.format).dequantize(tensors, tuple(weight.shape))
    out = treat(x, x.shape[1], activations=spec.activations) @ residual.T
    if spec.rank:
        out = out + x @ tensors["low_rank_down"].float().T @ tensors["low_rank_up"].float().T
    return float((out - x @ weight.T).square().sum() / (x @ weight.T).square().sum())


@pytest.mark.parametrize(("weight_format", "activations"), [("int4", "int4"), ("nvfp4", "nvfp4")])
@pytest.mark.parametrize("rank", [0, 8])
def test_products_with_quantized_inputs_err_less(weight_format: str, activations: str, rank: int):
    seen, unseen = correlated(3000, 128), correlated(1000, 128, seed=1)
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(2))
    config = SVDQuantConfig(bits=4, weight_format=weight_format, activations=activations, rank=rank)
    hessian = seen.T @ seen / len(seen)
    samples = {0.0: seen[:1000]}
    found = [quantize_weight(weight, config, 0, LayerInputs(hessian, samples=samples, noise_share=s)) for s in (0.0, 0.1, 1.0)]
    gptq, some, everything = (output_error(one, weight, unseen) for one in found)
    assert found[0].spec == found[1].spec == found[2].spec
    assert everything < 0.8 * gptq and everything < some < gptq


def test_only_a_few_bits_count_as_noise():
    samples = {0.0: torch.randn(8, 64)}
    assert input_noise(samples, RTNConfig(bits=4, activations="int8"), 64) is None
    assert input_noise(None, SVDQuantConfig(bits=4, activations="int4"), 64) is None
    noise = input_noise(samples, SVDQuantConfig(bits=4, activations="int4"), 64)
    assert noise.shape == (64,) and (noise > 0).all()
    assert torch.allclose(input_noise(samples, SVDQuantConfig(bits=4, activations="int4"), 64, share=0.25), noise / 4)
