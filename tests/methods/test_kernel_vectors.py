"""Kernel-aware grouping: vectors along a kernel's taps instead of along channels."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from qdiff_kernels import use

from qdiff_diffusers import AQConfig, quantize
from qdiff_diffusers.formats import LayerSpec
from qdiff_diffusers.formats.transform import channels_last, kernels_first
from qdiff_diffusers.layers import QDiffConv2d
from qdiff_diffusers.methods import LayerInputs, format_target, quantize_weight

CONFIG = {"num_codebooks": 2, "codebook_bits": 4, "vector_size": 9, "codebook": "layer"}


def packed_convolution(activations: str | None = None) -> tuple[torch.nn.Conv2d, QDiffConv2d]:
    dense = torch.nn.Conv2d(16, 12, 3, padding=1)
    packed = torch.nn.Conv2d(16, 12, 3, padding=1)
    packed.load_state_dict(dense.state_dict())
    config = AQConfig(**CONFIG, kernel_vectors=True, activations=activations)
    spec, tensors, _ = quantize_weight(dense.weight, config)
    return dense, QDiffConv2d.convert(packed, spec, torch.float32, tensors)


def test_the_order_of_columns_is_undone():
    matrix = torch.arange(24.0).view(1, 24)
    assert kernels_first(matrix, 4)[0, :6].tolist() == [0, 4, 8, 12, 16, 20]
    assert torch.equal(channels_last(kernels_first(matrix, 4), 4), matrix)


def test_weights_that_are_alike_within_a_kernel_cost_less_by_kernels():
    weight = torch.randn(24, 16, 1, 1) * torch.ones(1, 1, 3, 3) + 0.1 * torch.randn(24, 16, 3, 3)
    errors = [quantize_weight(weight, AQConfig(**CONFIG, rotation=False, kernel_vectors=kernel)).error for kernel in (False, True)]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("activations", [None, "int8"])
def test_the_layer_computes_what_its_dense_weight_does(activations):
    _, packed = packed_convolution(activations)
    x = torch.randn(2, 16, 7, 5, requires_grad=True)
    exact = torch.nn.functional.conv2d(x, packed.dequantize(), packed.bias, padding=1)
    y = packed(x)
    assert (y - exact).norm() / exact.norm() < (1e-5 if activations is None else 2e-2)
    with use("torch"):
        torch.testing.assert_close(packed(x), y, rtol=1e-4, atol=1e-4)
    found, wanted = (torch.autograd.grad(out.square().sum() / 2, x, retain_graph=True)[0] for out in (y, exact))
    assert (found - wanted).norm() / wanted.norm() < (1e-4 if activations is None else 5e-2)


def test_inputs_are_taken_into_account_in_the_same_order():
    weight = torch.randn(12, 16, 3, 3)
    x = torch.randn(500, 40) @ torch.randn(40, 144) + 0.3 * torch.randn(500, 144)
    hessian = x.T @ x / 500
    config = AQConfig(**CONFIG, kernel_vectors=True)

    def error(quantized):
        difference = weight - quantized.spec.dequantize(quantized.tensors, tuple(weight.shape))
        rows = difference.permute(0, 2, 3, 1).flatten(1)
        return float(((rows @ hessian) * rows).sum())

    plain, fitted = quantize_weight(weight, config), quantize_weight(weight, config, inputs=LayerInputs(hessian))
    assert error(fitted) < 0.66 * error(plain)
    target = format_target(weight, plain.spec, plain.tensors)
    stored = plain.spec.format.dequantize(plain.tensors, 144)
    assert float((target - stored).square().sum() / target.square().sum()) == pytest.approx(plain.error, rel=1e-3)


def test_a_unet_is_saved_and_reloaded_exactly(tmp_path):
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (16,)}
    model = UNet2DModel(8, in_channels=1, out_channels=1, norm_num_groups=4, layers_per_block=1, **blocks)
    model.save_pretrained(tmp_path / "dense")
    config = AQConfig(**CONFIG, kernel_vectors=True, compute_dtype="float32")
    folder = quantize(tmp_path / "dense", config, tmp_path / "out", dtype=torch.float32)
    first, second = (UNet2DModel.from_pretrained(folder) for _ in range(2))
    specs = {layer.kernel_size: layer.spec.kernel_vectors for layer in first.modules() if isinstance(layer, QDiffConv2d)}
    assert specs == {(3, 3): True, (1, 1): False}
    x = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        assert torch.equal(first(x, 5)[0], second(x, 5)[0])


def test_kernel_vectors_of_a_matrix_are_refused():
    spec = LayerSpec(packed_convolution()[1].spec.format, kernel_vectors=True)
    with pytest.raises(ValueError, match="kernel_vectors are for convolutions"):
        spec.tensors((8, 18))


def test_the_slower_path_is_announced_once(monkeypatch):
    from qdiff_diffusers import layers

    said: list[str] = []
    monkeypatch.setattr(layers.logger, "warning", said.append)
    layers._say_once.cache_clear()
    spec, tensors, _ = quantize_weight(torch.randn(12, 16, 3, 3), AQConfig(**CONFIG, kernel_vectors=True))
    for _ in range(2):
        layers.pack_layer(torch.nn.Conv2d(16, 12, 3), spec, torch.float32, dict(tensors))
    assert ["no fused kernel" in text and "kernel_vectors" in text for text in said] == [True]
