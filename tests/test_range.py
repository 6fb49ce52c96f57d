"""Weights of any finite magnitude err as those near 1 do, a power of two changes no code, and what cannot be held is named."""

from __future__ import annotations

import json
import math

import pytest
import tiny_models
import torch
from qdiff_kernels import use
from qdiff_kernels.gpu.blocks import INTERPRETED
from torch import Tensor, nn

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, QDiffError, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.config import METHODS
from qdiff_diffusers.formats import CodebookFormat, LayerSpec
from qdiff_diffusers.formats.layer_table import StoredLayer, write_layers
from qdiff_diffusers.layers import pack_layer
from qdiff_diffusers.methods import LayerInputs, QuantizedWeight, quantize_weight
from qdiff_diffusers.model.packing import quantize_layer

OWN = {"codebook_bits": 5, "vector_size": 2, "codebook": "layer"}
CONFIGS = {
    **{f"aq-{bits}": AQConfig(bits=bits, effort=0) for bits in (1, 2, 4)},
    "aq-own": AQConfig(num_codebooks=2, effort=0, **OWN),
    "vq-3": VQConfig(bits=3, restarts=1),
    "vq-own": VQConfig(restarts=1, **OWN),
    "vq-own-tensor": VQConfig(restarts=1, row_scales=False, **OWN),
    **{f"rtn-{bits}": RTNConfig(bits=bits) for bits in (1, 4, 8)},
    "rtn-row": RTNConfig(bits=8, group_size="row"),
    "rtn-tensor": RTNConfig(bits=8, group_size="tensor"),
    "rtn-rotated": RTNConfig(bits=4, rotation=True),
    **{f"fp-{bits}": FPConfig(bits=bits) for bits in (3, 4, 8)},
    **{f"fp-{group}-{dtype}": FPConfig(weight_format="e4m3", group_size=group, scale_dtype=dtype)
       for group in (64, "row", "tensor") for dtype in ("float16", "bfloat16", "float32")},
    "fp-e5m2": FPConfig(weight_format="e5m2", group_size="row", scale_dtype="float16"),
    "fp-exmy": FPConfig(bits=6, weight_format="exmy", group_size="row"),
    "fp-grid-tensor": FPConfig(bits=4, group_size="tensor", scale_search="grid"),
    **{name: FPConfig(weight_format=name) for name in ("nvfp4", "mxfp4", "mxfp8")},
    "svdquant": SVDQuantConfig(bits=4),
    "svdquant-int4": SVDQuantConfig(weight_format="int4", rank=4, rounds=2, rotation=True),
    "svdquant-int8-inputs": SVDQuantConfig(bits=8, rank=4, rounds=1, activations="int8"),
    "svdquant-aq": SVDQuantConfig(bits=2, weight_format="aq", rank=4, rounds=1),
    "svdquant-vq": SVDQuantConfig(bits=3, weight_format="vq", rank=4, rounds=1),
}  # fmt: skip
E4M3_SCALES = ("fp-3", "fp-4", "fp-8", "nvfp4", "svdquant", "svdquant-int8-inputs")
METHOD_OF_EACH = {"aq": "aq-2", "vq": "vq-3", "fp": "fp-4", "svdquant": "svdquant-int4", "rtn": "rtn-4"}
POWERS = (-118, -66, -41, -30, 11, 20, 66, 101, 116)
SHAPES = {"linear": (24, 128), "conv2d": (12, 32, 3, 3)}


def gaussian(shape: tuple[int, ...] = SHAPES["linear"], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def times(weight: Tensor, power: int) -> Tensor:
    """Exact for powers of more than float32's own exponents too."""
    return (weight.double() * 2.0**power).float()


def decoded(found: QuantizedWeight, shape: tuple[int, ...]) -> Tensor:
    return found.spec.dequantize(found.tensors, shape, torch.float64)


def error(weight: Tensor, found: QuantizedWeight) -> float:
    difference = decoded(found, tuple(weight.shape)) - weight.double()
    return float(difference.norm() / weight.double().norm())


def row_errors(weight: Tensor, found: QuantizedWeight) -> Tensor:
    difference = decoded(found, tuple(weight.shape)) - weight.double()
    return difference.flatten(1).norm(dim=1) / weight.double().flatten(1).norm(dim=1)


def packed(config: QDiffConfig, weight: Tensor, dtype: torch.dtype = torch.float32) -> nn.Module:
    found = quantize_weight(weight, config)
    layer = nn.Linear(weight.shape[1], weight.shape[0]) if weight.ndim == 2 else nn.Conv2d(weight.shape[1], weight.shape[0], 3)
    nn.init.zeros_(layer.bias)
    return pack_layer(layer.to(dtype), found.spec, dtype, found.tensors)


def test_every_method_is_tried() -> None:
    assert METHOD_OF_EACH.keys() == METHODS.keys()


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_power_of_two_multiplies_the_stored_weight_exactly(name: str, kind: str) -> None:
    """The two factors of a branch share its power, and float16 rounds the square root of an odd one otherwise."""
    config, weight = CONFIGS[name], 16 * gaussian(SHAPES[kind])
    near = quantize_weight(weight, config, seed=1)
    first = decoded(near, SHAPES[kind])
    for power in POWERS:
        found = quantize_weight(times(weight, power), config, seed=1)
        exact = torch.equal(decoded(found, SHAPES[kind]) / 2.0**power, first)
        assert exact or ("low_rank_up" in found.tensors and power % 2), power
        assert found.error == pytest.approx(near.error, rel=2e-2), power


@pytest.mark.parametrize("name", CONFIGS)
def test_all_magnitudes_between_err_alike(name: str) -> None:
    """Where float16 holds scales coarsely, too, and with factors that are no powers of two; scales that are err by what is near."""
    config, weight = CONFIGS[name], gaussian(seed=3)
    expected = error(weight, quantize_weight(weight, config))
    for exponent in (-34, -9, -7, -6, -5.5, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6, 9, 36):
        scaled = (weight.double() * 10.0**exponent).float()
        found = error(scaled, quantize_weight(scaled, config))
        assert found == pytest.approx(expected, rel=0.08 if name.startswith("mxfp") else 0.03), exponent


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("name", METHOD_OF_EACH.values())
def test_the_source_may_have_any_dtype_that_holds_the_weights(name: str, dtype: torch.dtype) -> None:
    weight = gaussian().to(torch.bfloat16).to(dtype)
    expected = decoded(quantize_weight(weight, CONFIGS[name], seed=1), SHAPES["linear"])
    for power in (-90, 90):
        found = quantize_weight(weight * 2.0**power, CONFIGS[name], seed=1)
        assert torch.allclose(decoded(found, SHAPES["linear"]) / 2.0**power, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("power", [-40, 0, 40])
@pytest.mark.parametrize("name", [name for name in CONFIGS if "tensor" not in name and name not in E4M3_SCALES])
def test_rows_a_million_times_smaller_than_another_are_kept(name: str, power: int) -> None:
    """Each by its own error; formats with one scale for the whole tensor cannot, and E4M3 scales span 2**17."""
    config, weight = CONFIGS[name], gaussian()
    weight[5] *= 1e6
    weight[7] = 0
    found = quantize_weight(times(weight, power), config)
    ordinary = row_errors(gaussian(), quantize_weight(gaussian(), config))
    errors = row_errors(times(weight, power), found)
    kept = torch.arange(len(weight)) != 7
    # Codebooks and branches of a layer's own are fitted to what is largest.
    slack = 3.0 if "own" in name or "svdquant" in name else 1.3
    assert (errors[kept] < slack * ordinary.max()).all()
    assert not decoded(found, SHAPES["linear"])[7].any()


@pytest.mark.parametrize("name", CONFIGS)
def test_one_huge_weight_leaves_finite_errors(name: str) -> None:
    for power in (0, 60):
        weight = gaussian()
        weight[3, 17] = 1e9
        weight = times(weight, power)
        found = quantize_weight(weight, CONFIGS[name])
        assert math.isfinite(found.error) and found.error < 0.8
        assert torch.isfinite(decoded(found, SHAPES["linear"])).all()


@pytest.mark.parametrize("power", [-132, -124, -60, 60, 120])
@pytest.mark.parametrize("name", [name for name in CONFIGS if not name.startswith("mxfp") and name != "fp-e5m2"])
def test_constant_weights_of_any_size_are_kept(name: str, power: int) -> None:
    """Those below float32's normal numbers too, with scales that are a thousand times smaller; E5M2's are smaller still."""
    weight = torch.full(SHAPES["linear"], 2.0**power)
    expected = quantize_weight(torch.ones(SHAPES["linear"]), CONFIGS[name])
    found = quantize_weight(weight, CONFIGS[name])
    assert found.error == pytest.approx(expected.error, rel=0.05, abs=1e-4)


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_weights_beyond_powers_of_two_as_scales_are_refused(name: str) -> None:
    with pytest.raises(QDiffError, match=r"layer blocks\.0\.proj .*e8m0"):
        quantize_layer(nn.Linear(128, 24), "blocks.0.proj", gaussian() * 1e-38, CONFIGS[name], torch.float32)


@pytest.mark.parametrize("name", METHOD_OF_EACH.values())
def test_weights_that_quantizing_would_make_infinite_are_refused_by_name(name: str) -> None:
    weight = torch.full((24, 128), 3.4e38) * gaussian().sign()
    try:
        layer = nn.Linear(128, 24)
        quantize_layer(layer, "blocks.0.proj", weight, CONFIGS[name], torch.float32)
    except QDiffError as refusal:
        assert "blocks.0.proj" in str(refusal) and "3.4e+38" in str(refusal)
    else:
        assert torch.isfinite(layer.weight).all()


@torch.no_grad()
@pytest.mark.parametrize("power", [-60, -20, 20, 60])
@pytest.mark.parametrize("name", METHOD_OF_EACH.values())
@pytest.mark.parametrize("kind", SHAPES)
def test_kernels_agree_on_weights_of_any_size(kind: str, name: str, power: int) -> None:
    layer = packed(CONFIGS[name], times(gaussian(SHAPES[kind]), power))
    near = packed(CONFIGS[name], gaussian(SHAPES[kind]))
    x = gaussian((3, 128) if kind == "linear" else (1, 32, 6, 6), seed=2)
    with use("torch"):
        expected = layer(x)
        scaled = near(x) * 2.0**power
    assert torch.allclose(expected, scaled, rtol=1e-2, atol=1e-3 * float(scaled.abs().max()))
    for implementation in ("cpu", "triton") if INTERPRETED.value else ("cpu",):
        with use(implementation):
            assert torch.allclose(layer(x), expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max())), implementation
            assert torch.allclose(layer.weight, layer.spec.dequantize(layer.packed_tensors(), layer.weight_shape), rtol=1e-5)


@pytest.mark.parametrize("name", METHOD_OF_EACH.values())
def test_bfloat16_layers_compute_with_weights_of_any_size(name: str) -> None:
    near = packed(CONFIGS[name], gaussian(), torch.bfloat16)
    x = gaussian((5, 128), seed=2).bfloat16()
    for power in (-90, -24, 24, 90):
        layer = packed(CONFIGS[name], times(gaussian(), power), torch.bfloat16)
        found, expected = layer(x).double() / 2.0**power, near(x).double()
        assert (found - expected).norm() < 0.02 * expected.norm(), power


@pytest.mark.parametrize("config", [RTNConfig(bits=4), AQConfig(bits=2, effort=0), FPConfig(bits=4)], ids=["rtn", "aq", "fp"])
def test_tables_look_up_entries_of_any_size(config: QDiffConfig) -> None:
    table = nn.Embedding(40, 64)
    weight = times(gaussian((40, 64)), -50)
    found = quantize_weight(weight, config)
    layer = pack_layer(table, found.spec, torch.float32, found.tensors)
    index = torch.tensor([[0, 3], [39, 3]])
    assert torch.allclose(layer(index), layer.weight[index], rtol=1e-6)
    assert found.error == pytest.approx(quantize_weight(gaussian((40, 64)), config).error, rel=1e-3)


@pytest.mark.parametrize("name", ["aq-2", "aq-own", "vq-3", "fp-4", "fp-row-float16", "nvfp4", "svdquant-int4", "rtn-4"])
def test_calibrated_codes_are_those_of_ordinary_weights_and_inputs(name: str) -> None:
    config, weight = CONFIGS[name], gaussian((16, 64))
    x = gaussian((200, 64), seed=5) @ gaussian((64, 64), seed=6)
    near = quantize_weight(weight, config, seed=1, inputs=LayerInputs(x.T @ x / 200))
    for weight_power, input_power in ((-60, 0), (60, 0), (0, -30), (0, 30), (30, -30)):
        inputs = times(x, input_power)
        errors: list[float] = []
        found = quantize_weight(
            times(weight, weight_power), config, seed=1, inputs=LayerInputs(inputs.T @ inputs / 200, errors=errors)
        )
        moved = decoded(found, (16, 64)) / 2.0**weight_power
        assert (moved - decoded(near, (16, 64))).norm() < 0.02 * float((moved - weight.double()).norm()), (
            weight_power,
            input_power,
        )
        assert all(map(math.isfinite, errors))


def test_ordinary_weights_keep_their_16_bit_scales() -> None:
    """From the smallest layers that models have to the largest."""
    for config in (RTNConfig(bits=4), AQConfig(bits=2, effort=0), FPConfig(bits=4, group_size="row"), SVDQuantConfig(bits=4)):
        for size in (2e-3, 0.02, 1.0, 30.0):
            spec = quantize_weight(gaussian() * size, config).spec
            assert getattr(spec.format, "scale_dtype", "") in ("float16", "e4m3")
            assert spec.extras_dtype == "float16"


@pytest.mark.parametrize("name", METHOD_OF_EACH.values())
def test_what_float16_cannot_compute_with_is_refused_by_name(name: str) -> None:
    weight = gaussian() * 1e6
    quantize_layer(nn.Linear(128, 24), "blocks.0.proj", weight, CONFIGS[name], torch.bfloat16)
    with pytest.raises(QDiffError, match=r"blocks\.0\.proj .*bfloat16"):
        quantize_layer(nn.Linear(128, 24), "blocks.0.proj", weight, CONFIGS[name], torch.float16)
    quantize_layer(nn.Linear(128, 24), "blocks.0.proj", gaussian() * 1e3, CONFIGS[name], torch.float16)


@pytest.mark.parametrize("name", METHOD_OF_EACH.values())
def test_a_model_with_extreme_layers_survives_saving(name: str, tmp_path) -> None:
    dense = tiny_models.make("dit")
    weights = dict(dense.transformer_blocks[0].named_parameters())
    with torch.no_grad():
        weights["attn1.to_q.weight"].mul_(1e8)
        weights["attn1.to_k.weight"].mul_(1e-8)
        weights["attn1.to_v.weight"].zero_()
    dense.save_pretrained(tmp_path / "dense")
    settings = CONFIGS[name].settings()
    model = type(dense).from_pretrained(tmp_path / "dense", quantization_config=QDiffConfig(**settings))
    model.save_pretrained(tmp_path / "packed")
    config = json.loads((tmp_path / "packed" / "config.json").read_text(), parse_constant=pytest.fail)
    assert all(entry[2] is not None for entry in config["quantization_config"]["layers"].values())
    again = type(dense).from_pretrained(tmp_path / "packed")
    assert torch.equal(tiny_models.run(again, "dit"), tiny_models.run(model, "dit"))
    for leaf in ("to_q", "to_k"):
        layer, exact = getattr(again.transformer_blocks[0].attn1, leaf), getattr(dense.transformer_blocks[0].attn1, leaf)
        assert (layer.weight - exact.weight).norm() < 0.5 * exact.weight.norm()
    with pytest.raises(QDiffError, match=r"transformer_blocks\.0\.attn1\.to_q .*bfloat16"):
        type(dense).from_pretrained(tmp_path / "packed", torch_dtype=torch.float16)


def test_errors_that_are_no_numbers_are_stored_as_unknown() -> None:
    spec = LayerSpec(CodebookFormat(1, 4, 4))
    table = {name: StoredLayer(spec, (8, 64), value) for name, value in (("a", math.nan), ("b", math.inf), ("c", 0.25))}
    stored = write_layers(table)["layers"]
    assert [entry[2] for entry in stored.values()] == [None, None, 0.25]
    json.dumps(stored, allow_nan=False)
