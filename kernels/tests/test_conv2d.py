"""``<format>_conv2d`` against the layer's definition: a token is a pixel, rotation and quantization act along channels."""

from __future__ import annotations

import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

EXTRAS = ["plain", "bias", "low_rank", "smooth", "rotation", "int8", "fp8", "int4", "nvfp4", "bias+low_rank+smooth+shift+int4"]
EXTRAS += ["bias+low_rank+smooth+rotation+int8", "rotation+static+int8", "bias+static+fp8"]
WINDOWS = {
    "1x1": ([1, 1], [1, 1], [0, 0], [1, 1]),
    "3x3-padded": ([3, 3], [1, 1], [1, 1], [1, 1]),
    "3x3-stride-2": ([3, 3], [2, 2], [1, 1], [1, 1]),
    "2x2-patches": ([2, 2], [2, 2], [0, 0], [1, 1]),
    "3x3-dilated": ([3, 3], [1, 1], [2, 2], [2, 2]),
    "1x3-lopsided": ([1, 3], [2, 1], [0, 1], [1, 1]),
    "5x2-everything": ([5, 2], [1, 3], [2, 1], [1, 2]),
}


def run(weight: oracle.Packed, x: torch.Tensor, extras: dict, window: tuple) -> torch.Tensor:
    return oracle.CONV2D[weight.kind](x, *weight.arguments, *extras.values(), *window)


def make(variant: str, extras: str, channels: int, window: tuple, rows: int = 5) -> tuple[oracle.Packed, dict]:
    columns = channels * window[0][0] * window[0][1]
    return oracle.packed_weight(variant, rows, columns), oracle.make_extras(extras, rows, columns, channels)


@pytest.mark.parametrize("extras", EXTRAS)
@pytest.mark.parametrize("variant", oracle.VARIANTS)
def test_conv2d_matches_the_definition(variant, extras):
    window = WINDOWS["3x3-stride-2"]
    weight, chosen = make(variant, extras, 16, window)
    x = torch.randn(2, 16, 7, 6, dtype=torch.float64)
    y = run(weight, x, chosen, window)
    assert y.shape == (2, 5, 4, 3)
    assert oracle.relative_error(y, oracle.conv2d(x, weight.dense, chosen, window)) < 1e-10


@pytest.mark.parametrize("name", WINDOWS)
@pytest.mark.parametrize("extras", ["plain", "bias+low_rank+smooth+rotation", "bias+low_rank+int8"])
def test_every_window_geometry(name, extras):
    window = WINDOWS[name]
    weight, chosen = make("int4-g64", extras, 32, window)
    x = torch.randn(1, 32, 9, 8, dtype=torch.float64)
    y = run(weight, x, chosen, window)
    assert oracle.relative_error(y, oracle.conv2d(x, weight.dense, chosen, window)) < 1e-10


@given(
    st.sampled_from(sorted(oracle.VARIANTS)),
    st.sampled_from(["plain", "bias+low_rank", "int8", "fp8", "int4"]),
    st.integers(1, 5),
    st.tuples(*[st.tuples(st.integers(1, 3), st.integers(1, 3))] * 2, st.tuples(st.integers(0, 2), st.integers(0, 2))),
    st.tuples(st.integers(1, 2), st.integers(1, 2)),
    st.integers(0, 2),
)
def test_conv2d_matches_the_definition_at_any_geometry(variant, extras, channels, sizes, dilation, batch):
    kernel, stride, padding = sizes
    window = (list(kernel), list(stride), list(padding), list(dilation))
    weight, chosen = make(variant, extras, channels, window, rows=3)
    x = torch.randn(batch, channels, 6, 5, dtype=torch.float64)
    y = run(weight, x, chosen, window)
    expected = oracle.conv2d(x, weight.dense, chosen, window)
    assert y.shape == expected.shape
    assert oracle.relative_error(y, expected) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("extras", ["bias+low_rank+smooth+rotation", "bias+int8"])
def test_conv2d_in_the_models_precision(dtype, extras):
    window = WINDOWS["3x3-padded"]
    weight, chosen = make("e3m2-tensor", extras, 32, window)
    x = torch.randn(2, 32, 6, 6).to(dtype)
    y = run(weight, x, chosen, window)
    assert y.dtype == dtype
    assert oracle.relative_error(y, oracle.conv2d(x, weight.dense, chosen, window)) < 3e-2


@pytest.mark.parametrize("extras", ["plain", "smooth+rotation+int8"])
def test_channels_last_and_strided_inputs_give_the_result_of_a_copy(extras):
    window = WINDOWS["3x3-padded"]
    weight, chosen = make("int4-g64", extras, 16, window)
    x = torch.randn(2, 16, 6, 6)
    expected = run(weight, x, chosen, window)
    for same in (x.contiguous(memory_format=torch.channels_last), torch.stack([x, x], -1)[..., 0]):
        assert not same.is_contiguous()
        y = run(weight, same, chosen, window)
        assert y.is_contiguous()
        assert torch.allclose(y, expected, atol=1e-5)


@pytest.mark.parametrize("activations", ["int8", "fp8", "int4"])
def test_padding_stays_exactly_zero_and_pixels_are_quantized_independently(activations):
    window = WINDOWS["3x3-padded"]
    weight, chosen = make("int8-row", activations, 16, window)
    x = torch.randn(1, 16, 8, 8)
    alone = run(weight, x, chosen, window)
    x[..., 7] *= 1e6
    assert torch.allclose(run(weight, x, chosen, window)[..., :6], alone[..., :6], rtol=1e-6)


def test_a_1x1_convolution_is_a_linear_layer_over_pixels():
    weight, chosen = make("codebook-2x8-d8", "bias+low_rank+smooth+rotation+int8", 32, WINDOWS["1x1"])
    x = torch.randn(2, 32, 4, 3, dtype=torch.float64)
    as_linear = oracle.LINEAR["codebook"](x.movedim(1, -1), *weight.arguments, *chosen.values()).movedim(-1, 1)
    assert torch.allclose(run(weight, x, chosen, WINDOWS["1x1"]), as_linear, atol=1e-12)
