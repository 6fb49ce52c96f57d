"""SVDQuant's smoothing: 39 vectors tried with everything else in the loop, stored where one helps, never asked for by default."""

from __future__ import annotations

import pytest
import torch
from qdiff_kernels.reference import Extras, linear
from torch import Tensor

from qdiff_diffusers import ConfigError, SVDQuantConfig
from qdiff_diffusers.layers import op_arguments
from qdiff_diffusers.methods import LayerInputs, quantize_weight
from qdiff_diffusers.methods.smoothing import PAIRS

OUT, IN, TOKENS = 48, 128, 256


def layer(outliers: float, taps: int = 1) -> tuple[Tensor, Tensor]:
    """A weight, and inputs of which every 16th channel is ``outliers`` times as large as the others."""
    generator = torch.Generator().manual_seed(0)
    shape = (OUT, IN) if taps == 1 else (OUT, IN, taps, 1)
    sizes = torch.where(torch.arange(IN) % 16 == 3, outliers, 1.0).repeat(taps)
    return 0.05 * torch.randn(shape, generator=generator), torch.randn(TOKENS, IN * taps, generator=generator) * sizes


def output_error(weight: Tensor, x: Tensor, config: SVDQuantConfig, hessian: bool = False) -> tuple[float, bool]:
    """Relative squared error of the layer's output, computed by the layer's own definition, and whether it is smoothed."""
    inputs = LayerInputs(x.T @ x / len(x) if hessian else None, samples={1.0: x[::2], 2.0: x[1::2]})
    spec, tensors, _ = quantize_weight(weight, config, inputs=inputs)
    extras = op_arguments(spec, tensors, tuple(weight.shape), None)[-len(Extras._fields) :]
    y = linear(x, spec.format.dequantize(tensors, x.shape[1]), Extras(*extras))
    wanted = x @ weight.T
    return float((y - wanted).square().sum() / wanted.square().sum()), spec.smooth


def test_there_are_39_pairs_and_the_first_is_no_smoothing() -> None:
    assert len(PAIRS) == len(set(PAIRS)) == 39
    assert PAIRS[0] == (0, 0)
    assert {(0.5, 0.0), (0.5, 0.5), (0.95, 0.0)} <= set(PAIRS)


@pytest.mark.parametrize("rotation", [False, True])
@pytest.mark.parametrize("hessian", [False, True])
def test_inputs_with_outliers_are_smoothed_and_err_less(hessian: bool, rotation: bool) -> None:
    weight, x = layer(30.0)
    plain = SVDQuantConfig(weight_format="int4", rank=8, activations="int4", rotation=rotation)
    smooth = SVDQuantConfig(weight_format="int4", rank=8, activations="int4", rotation=rotation, smoothing=True)
    before, _ = output_error(weight, x, plain, hessian)
    after, smoothed = output_error(weight, x, smooth, hessian)
    assert smoothed
    assert after < (0.8 if rotation else 0.5) * before


@pytest.mark.parametrize("activations", [None, "int8", "nvfp4"])
def test_inputs_of_any_width_can_be_smoothed(activations: str | None) -> None:
    weight, x = layer(30.0)
    before, _ = output_error(weight, x, SVDQuantConfig(weight_format="int4", rank=8, activations=activations))
    after, _ = output_error(weight, x, SVDQuantConfig(weight_format="int4", rank=8, activations=activations, smoothing=True))
    assert after < before


def test_the_smoothing_of_a_convolution_is_one_factor_per_channel() -> None:
    weight, x = layer(30.0, taps=3)
    inputs = LayerInputs(None, samples={0.0: x})
    spec, tensors, _ = quantize_weight(
        weight, SVDQuantConfig(weight_format="int4", rank=8, activations="int4", smoothing=True), inputs=inputs
    )
    assert spec.smooth and tensors["smooth"].shape == (IN,) and tensors["smooth"].dtype == torch.float16
    dense = spec.dequantize(tensors, tuple(weight.shape))
    assert float((dense - weight).square().sum() / weight.square().sum()) < 0.05


def test_a_layer_that_does_best_without_is_stored_without() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, IN, generator=generator).sign()  # all inputs of one size: nothing to smooth
    weight = 0.05 * torch.randn(OUT, IN, generator=generator).sign()
    _, smoothed = output_error(weight, x, SVDQuantConfig(weight_format="int4", rank=0, activations="int4", smoothing=True))
    assert not smoothed


def test_it_is_never_the_default_and_refuses_what_it_does_not_know() -> None:
    assert not SVDQuantConfig().smoothing
    weight, x = layer(30.0)
    assert not output_error(weight, x, SVDQuantConfig(weight_format="int4", activations="int4"))[1]
    with pytest.raises(ConfigError, match="smoothing must be True or False, got 'yes'"):
        SVDQuantConfig(smoothing="yes")
