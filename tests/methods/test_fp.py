"""Minifloat quantization: more bits err less, presets keep their budget, named block formats are what they are named after."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qdiff_diffusers.config import FPConfig
from qdiff_diffusers.formats import LayerSpec, MinifloatFormat
from qdiff_diffusers.methods import fp, rtn


def weights(seed: int, rows: int = 16, columns: int = 128) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02


def relative_error(weight: Tensor, stored: MinifloatFormat, tensors: dict[str, Tensor]) -> float:
    return float((stored.dequantize(tensors, weight.shape[1]) - weight).square().sum() / weight.square().sum())


def quantized_error(weight: Tensor, **request: object) -> float:
    return relative_error(weight, *fp.quantize(weight, fp.formats_for(**request)))


@given(seed=st.integers(0, 999), group=st.sampled_from([16, 32, "row"]))
def test_error_falls_with_more_bits(seed: int, group: int | str) -> None:
    weight = weights(seed, rows=8)
    errors = [quantized_error(weight, bits=bits, group_size=group) for bits in (2, 3, 4, 5, 6, 8)]
    assert all(more < less for less, more in itertools.pairwise(errors))


@given(seed=st.integers(0, 999), bits=st.integers(2, 8), columns=st.sampled_from([64, 100]))
def test_smaller_groups_err_less(seed: int, bits: int, columns: int) -> None:
    weight = weights(seed, columns=columns)
    assert quantized_error(weight, bits=bits, group_size=16) < quantized_error(weight, bits=bits, group_size=64)


@pytest.mark.parametrize("bits", range(2, 9))
def test_presets_spend_half_a_bit_on_scales_and_beat_round_to_nearest(bits: int) -> None:
    weight = weights(0, 256, 1024)
    stored, tensors = fp.quantize(weight, fp.formats_for(bits))
    cost = LayerSpec(stored).bits_per_weight((256, 1024))
    assert cost == pytest.approx(bits + 0.5, abs=1e-3)
    plain, baseline = rtn.quantize(weight, bits=bits, group_size=64)
    gain = 10 * math.log10(relative_error(weight, plain, baseline) / relative_error(weight, stored, tensors))
    assert gain > {2: 3.2, 3: 2.3, 4: 2.0}.get(bits, 1.2)


def test_adaptive_format_errs_less_than_either_encoding() -> None:
    weight = weights(0, 64, 512)
    both = quantized_error(weight, weight_format="e1m2uz,e2m1uz")
    assert both < 0.97 * min(quantized_error(weight, weight_format=e) for e in ("e1m2uz", "e2m1uz"))


def test_the_code_of_negative_zero_is_worth_a_level() -> None:
    weight = weights(0, 64, 512)
    for plain in ("e1m1", "e2m0", "e1m2", "e2m1"):
        assert quantized_error(weight, weight_format=plain + "uz") < 0.9 * quantized_error(weight, weight_format=plain)


@given(seed=st.integers(0, 999))
def test_nvfp4_scales_are_positive_e4m3_numbers_under_one_float32(seed: int) -> None:
    weight = weights(seed)
    stored, tensors = fp.quantize(weight, fp.formats_for(weight_format="nvfp4"))
    assert stored == MinifloatFormat(("e2m1",), 16, "e4m3", tensor_scale=True)
    assert tensors["scales"].dtype == torch.float8_e4m3fn and (tensors["scales"].float() >= 0).all()
    assert tensors["tensor_scale"].dtype == torch.float32 and tensors["tensor_scale"].shape == (1,)
    levels = (
        stored.dequantize(tensors, 128).unflatten(1, (-1, 16)) / (tensors["scales"].float() * tensors["tensor_scale"])[..., None]
    )
    e2m1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    assert ((levels.abs()[..., None] - e2m1).abs().amin(-1) < 1e-5).all()
    assert relative_error(weight, stored, tensors) < 0.0075  # absmax scales: 0.009


@given(seed=st.integers(0, 999), name=st.sampled_from(["mxfp4", "mxfp8"]))
def test_mx_scales_are_powers_of_two(seed: int, name: str) -> None:
    weight = weights(seed)
    stored, tensors = fp.quantize(weight, fp.formats_for(weight_format=name))
    assert (stored.group_size, stored.scale_dtype) == (32, "e8m0") and tensors["scales"].dtype == torch.int8
    exponents = tensors["scales"].view(torch.uint8).int() - 127
    peaks = weight.unflatten(1, (-1, 32)).abs().amax(-1)
    largest = 6 if name == "mxfp4" else 448
    assert ((peaks / largest).log2() - exponents).abs().max() <= 1.5


def test_long_groups_compare_all_encodings_of_the_width() -> None:
    choices = [c.encodings for c in fp.formats_for(bits=8, group_size="tensor")]
    assert {("e2m5",), ("e3m4",), ("e4m3",), ("e5m2",)} < set(choices)
    spiky = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)) ** 9
    assert fp.quantize(spiky, fp.formats_for(bits=8, group_size="tensor"))[0].encodings == ("e3m4",)
    flat = torch.rand(64, 256, generator=torch.Generator().manual_seed(0)) - 0.5
    assert fp.quantize(flat, fp.formats_for(bits=8, group_size="tensor"))[0].encodings[0] == "e1m6"


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"weight_format": "e9m9"}, "encoding"),
        ({"bits": 9}, "bits must be one of"),
        ({"weight_format": "nvfp4", "group_size": 64}, "nvfp4 has groups of 16"),
        ({"weight_format": "e1m2uz,e2m1uz", "scale_dtype": "e8m0"}, "e8m0 scales have no sign"),
    ],
)
def test_impossible_requests_name_the_way_out(request_: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fp.formats_for(**request_)


@pytest.mark.parametrize("group", [16, "row", "tensor"])
def test_config_settings_reach_the_format(group: int | str) -> None:
    stored, tensors = fp.quantize_config(weights(0), FPConfig(weight_format="e3m2", group_size=group, scale_dtype="float32"))
    assert stored == MinifloatFormat(("e3m2",), group, "float32")
    assert {name: (tuple(t.shape), t.dtype) for name, t in tensors.items()} == {
        name: (info.shape, info.dtype) for name, info in stored.tensors(16, 128).items()
    }
