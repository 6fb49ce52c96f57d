from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qdiff_kernels import dequantize_activations, quantize_activations

KINDS = ["int8", "fp8", "int4"]
GROUPED = {"int4": 64, "nvfp4": 16}
MAXIMA = {"int8": 127, "fp8": 448, "int4": 7}


@pytest.mark.parametrize("kind", [*KINDS, "nvfp4"])
@pytest.mark.parametrize("shape", [(1, 1), (17, 64), (3, 100), (2, 5, 129), (64,), (0, 8)], ids=str)
def test_codes_times_scales_match_the_definition(kind, shape):
    x = torch.randn(shape, dtype=torch.float64) * 3
    codes, scales = quantize_activations(x, kind)
    assert codes.shape == x.shape
    assert codes.dtype == (torch.float8_e4m3fn if kind == "fp8" else torch.int8)
    assert scales.shape == (*shape[:-1], -(-shape[-1] // GROUPED[kind]) if kind in GROUPED else 1)
    assert torch.allclose(dequantize_activations(codes, scales, kind), oracle.quantize_activations(x, kind), rtol=1e-12, atol=0)


@given(st.sampled_from(KINDS), st.integers(1, 200), st.integers(-120, 120), st.integers(0, 2**31))
def test_codes_stay_in_range_and_errors_below_half_a_step(kind, channels, exponent, seed):
    x = torch.randn(2, channels, generator=torch.Generator().manual_seed(seed)) * 2.0**exponent
    codes, scales = quantize_activations(x, kind)
    assert codes.float().abs().max() <= MAXIMA[kind]
    error = (dequantize_activations(codes, scales) - x).abs()
    step = scales.repeat_interleave(64, -1)[:, :channels] if scales.shape[-1] > 1 else scales
    half_step = 0.5 * step if kind != "fp8" else torch.maximum(x.abs() * 2**-4, step * 2**-10)
    assert (error <= half_step * 1.001).all()


@pytest.mark.parametrize("kind", KINDS)
def test_a_token_of_zeros_has_scale_one(kind):
    codes, scales = quantize_activations(torch.zeros(2, 70), kind)
    assert not codes.float().any()
    assert (scales == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_and_smallest_numbers_survive(kind):
    for value in (torch.finfo(torch.float32).max / 2, torch.finfo(torch.float32).tiny * 1000):
        x = torch.tensor([[value, -value, 0.0, value / 2]])
        restored = dequantize_activations(*quantize_activations(x, kind))
        assert torch.allclose(restored / value, x / value, atol=0.08)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_scales_are_float32_for_half_precision_inputs(kind, dtype):
    assert quantize_activations(torch.randn(3, 80).to(dtype), kind)[1].dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=str)
def test_a_number_that_is_not_finite_is_never_turned_into_a_finite_result(kind, bad):
    x = torch.ones(2, 8)
    x[1, 3] = bad
    restored = dequantize_activations(*quantize_activations(x, kind))
    assert torch.isfinite(restored[0]).all()
    assert not torch.isfinite(restored[1, 3])


@pytest.mark.parametrize("shift", [None, torch.full((8,), 0.25)], ids=["signed", "unsigned"])
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nor_does_it_vanish_under_a_given_scale(kind, bad, shift):
    x = torch.ones(2, 8)
    x[1, 3] = bad
    restored = dequantize_activations(*quantize_activations(x, kind, shift, torch.tensor([0.02])))
    assert torch.isfinite(restored[0]).all()
    assert not torch.isfinite(restored[1, 3])


def test_a_given_scale_holds_for_all_tokens_and_what_exceeds_it_is_clipped():
    x = torch.tensor([[0.1, -0.1], [3.0, -3.0]])
    scale, shift = torch.tensor([0.01]), torch.tensor([0.2, 0.2])
    assert quantize_activations(x, "int8", None, scale)[0].tolist() == [[10, -10], [127, -127]]
    assert quantize_activations(x, "int8", shift, scale)[0].tolist() == [[10, 0], [255, 0]]
    assert quantize_activations(100 * x, "fp8", None, scale)[0].tolist()[1] == [448, -448]
    assert quantize_activations(100 * x, "fp8", shift, scale)[0].tolist()[1] == [496, 0]
    with pytest.raises(ValueError, match="goes with int8 or fp8 activations, got 'int4'"):
        quantize_activations(x, "int4", None, scale)


def test_unknown_kinds_are_refused_by_name():
    with pytest.raises(ValueError, match="int8, fp8, int4, nvfp4, got 'int7'"):
        quantize_activations(torch.zeros(1, 4), "int7")


def test_nvfp4_takes_the_nearest_value_and_the_even_code_where_two_are_as_near():
    x = torch.tensor([[6.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, 0.3]])
    codes, scales = quantize_activations(x, "nvfp4")
    assert scales.item() == 0.5
    assert (codes * scales).tolist() == [[6.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 0.0, -1.0, -1.0, -2.0, -2.0, -4.0, -4.0, 0.5]]


def test_groups_with_a_shift_are_quantized_to_16_levels_from_zero_up():
    x = torch.rand(3, 128)
    shift = torch.cat([torch.zeros(64), torch.full((64,), 0.171875)])
    codes, scales = quantize_activations(x + shift, "int4", shift)
    assert codes[:, :64].max() == 7
    assert (codes[:, 64:].amax(1) == 15).all()
    assert codes.min() >= 0
    assert torch.allclose(scales[:, 1], (x + shift)[:, 64:].amax(1) / 15)
    signed, _ = quantize_activations(-x, "int4", shift)
    assert signed[:, :64].min() == -7
    assert not signed[:, 64:].any()
