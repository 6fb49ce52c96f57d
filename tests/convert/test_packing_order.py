"""The packing orders: invertible, and equal to what Nunchaku's own converter wrote (``vectors/``: its inputs and its results)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from qdiff_diffusers.convert import packing_order
from qdiff_diffusers.convert.logical import LogicalLayer
from qdiff_diffusers.convert.nunchaku import Part, read_awq, read_w4a4
from qdiff_diffusers.convert.nunchaku_export import exactly, pack_awq, pack_w4a4, split_row_scales

VECTORS = Path(__file__).parent / "vectors"
ORDERS = {name: getattr(packing_order, name) for name in ("CODES", "SCALES", "MICRO_SCALES", "LORA_DOWN", "LORA_UP", "AWQ_CODES")}
PACKED = {"lora_down": "down", "lora_up": "up"}  # their names: ours


def vector(name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Inputs, and packed results by canonical name."""
    tensors = load_file(VECTORS / f"{name}.safetensors")
    packed = {key.removeprefix("packed_"): value for key, value in tensors.items() if key.startswith("packed_")}
    inputs = {key: value for key, value in tensors.items() if not key.startswith("packed_")}
    return inputs, {PACKED.get(key, key): value for key, value in packed.items()}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.int8), b.contiguous().view(torch.int8))


@given(st.sampled_from(sorted(ORDERS)), st.integers(1, 3), st.integers(1, 3))
def test_unpacking_undoes_packing(name, tall, wide):
    order = ORDERS[name]
    by_row, by_column = order.multiples
    rows, columns = by_row * tall, by_column * wide
    matrix = torch.arange(rows * columns).view(rows, columns)
    flat = order.pack(matrix)
    assert torch.equal(flat.sort().values, torch.arange(rows * columns))
    assert torch.equal(order.unpack(flat, rows, columns), matrix)


@pytest.mark.parametrize("name", ORDERS)
def test_other_sizes_are_refused(name):
    order = ORDERS[name]
    by_row, _ = order.multiples
    with pytest.raises(ValueError, match=f"multiples of {by_row} x"):
        order.pack(torch.zeros(by_row + 1, 640))


@pytest.mark.parametrize(
    ("name", "kind", "rank"),
    [("int4_o128_i128_r16", "int4", 16), ("int4_o256_i384_r32", "int4", 32), ("nvfp4_o128_i128_r32", "nvfp4", 32)],
)
def test_w4a4_layers_match_the_engines_converter_both_ways(name, kind, rank):
    inputs, packed = vector(name)
    codes = inputs["q"] + 8 if kind == "int4" else inputs["code"]
    scales = inputs["scale" if kind == "int4" else "micro_scale"]
    layer = read_w4a4(packed, kind, Part("layer", *codes.shape))
    assert torch.equal(layer.codes.long(), codes.long())
    assert same(layer.scales, scales)
    if kind == "nvfp4":
        assert torch.equal(layer.row_scales, inputs["channel_scale"].float())
    for ours, theirs in (("bias", "bias"), ("smooth", "smooth"), ("down", "lora_down"), ("up", "lora_up")):
        assert same(getattr(layer, ours), inputs[theirs]), ours
    written = pack_w4a4(layer, rank, torch.bfloat16)
    names = {
        "qweight": "qweight",
        "wscales": "wscales",
        "bias": "bias",
        "smooth_factor": "smooth",
        "proj_down": "down",
        "proj_up": "up",
    }
    if kind == "nvfp4":
        names["wcscales"] = "wcscales"
        assert written["wtscale"].item() == 1
    for ours, theirs in names.items():
        assert written[ours].shape == packed[theirs].shape, ours
        assert same(written[ours], packed[theirs]), ours


@pytest.mark.parametrize(("name", "splits"), [("awq_o192_i128_splits1", 1), ("awq_o384_i128_splits6", 6)])
def test_weight_only_layers_match_the_engines_converter_both_ways(name, splits):
    inputs, packed = vector(name)
    layer = read_awq(packed, Part("layer", *inputs["q"].shape, splits=splits))
    assert torch.equal(layer.codes.long(), inputs["q"].long())
    assert same(layer.scales, inputs["scale"])
    assert same(layer.zeros, (-7 * inputs["scale"].float()).bfloat16())
    error = (layer.bias.float() - inputs["bias"].float()).abs()
    one_step = 2.0**-8 * (inputs["bias"].float() + 1).abs().clamp_min(1)
    assert (error <= (one_step if splits > 1 else 0 * one_step)).all()  # "1 +" was rounded to bfloat16 by the converter
    rows = layer.codes.shape[0]
    order = torch.arange(rows).view(splits, -1).T.reshape(-1)
    bias = layer.bias.float().view(splits, -1)
    if splits > 1:
        bias[[1, splits - 2]] += 1
    stored = LogicalLayer("awq", layer.codes, layer.scales, zeros=layer.zeros, bias=bias.flatten()).rows(order)
    written = pack_awq(stored, torch.bfloat16)
    assert same(written["qweight"], packed["qweight"])
    assert same(written["bias"], packed["bias"])
    for key in ("wscales", "wzeros"):  # the converter pads the groups to 16 with zeros
        groups = written[key].shape[0]
        assert same(written[key], packed[key][:groups])
        assert not packed[key][groups:].any()


def test_scales_per_row_are_split_into_two_numbers_of_16_bits_exactly():
    for scale in (3.0517578125e-05 * 1.2578125, 0.4140625, 1.0):
        rows = torch.full((128,), scale)
        for dtype in (torch.bfloat16, torch.float16):
            channel, tensor = split_row_scales(rows, dtype)
            assert torch.equal(channel.float() * tensor.float(), rows)
    with pytest.raises(ValueError, match="cannot be written in bfloat16 exactly"):
        split_row_scales(torch.full((128,), 0.1), torch.bfloat16)


def test_numbers_that_would_be_rounded_are_refused():
    with pytest.raises(ValueError, match=r"its smooth \(float16\) would be rounded in bfloat16"):
        exactly(torch.tensor([1.001], dtype=torch.float16), torch.bfloat16, "smooth")
