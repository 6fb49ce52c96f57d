"""ComfyUI's formats: what we write comfy-kitchen decodes to our numbers, and what it writes we read as its own."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from qdiff_diffusers import FPConfig, RTNConfig, SVDQuantConfig
from qdiff_diffusers.convert.comfy_layouts import LAYOUTS, joined, layout_for, layout_of, tiled, untiled
from qdiff_diffusers.formats import LayerSpec
from qdiff_diffusers.methods import quantize_weight

kitchen = pytest.importorskip("comfy_kitchen.tensor")

ROWS = {"group_size": "row", "scale_dtype": "float32"}
CONFIGS = {
    "fp8": [FPConfig(weight_format="e4m3", group_size="tensor", scale_dtype="float32")],
    "int8": [
        SVDQuantConfig(weight_format="int8", group_size="row", rank=0),
        SVDQuantConfig(weight_format="int8", group_size="tensor", rank=0),
        FPConfig(weight_format="e1m6", **ROWS),
    ],
    "int8_convrot": [FPConfig(weight_format="e1m6", rotation="regular", **ROWS)],
    "nvfp4": [FPConfig(weight_format="nvfp4"), SVDQuantConfig(weight_format="nvfp4", rank=0, activations="nvfp4")],
    "mxfp8": [FPConfig(weight_format="mxfp8")],
    "convrot_w4a4": [FPConfig(weight_format="e1m2", rotation="regular", **ROWS)],
}
CASES = [(name, config) for name, configs in CONFIGS.items() for config in configs]
SHAPES = [(64, 256), (128, 128), (48, 320), (7, 64), (130, 576), (33, 100), (5, 30), (1, 16)]
THEIRS = {
    "fp8": "TensorCoreFP8Layout",
    "int8": "TensorWiseINT8Layout",
    "int8_convrot": "TensorWiseINT8Layout",
    "nvfp4": "TensorCoreNVFP4Layout",
    "mxfp8": "TensorCoreMXFP8Layout",
    "convrot_w4a4": "TensorCoreConvRotW4A4Layout",
}


def fits(name, shape):
    columns = shape[1]
    return columns % {"int8_convrot": 16, "convrot_w4a4": 64}.get(name, 1) == 0


def weight(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)


def decoded(name, settings, tensors, shape, dtype=torch.float32):
    """What comfy-kitchen takes a file's tensors for."""
    layout = kitchen.get_layout_class(THEIRS[name])
    scale = tensors["weight_scale"]
    more = {"scale": scale}
    if name == "nvfp4":
        more = {"scale": tensors["weight_scale_2"], "block_scale": scale}
    if name == "mxfp8":
        more = {"scale": scale.view(torch.float8_e8m0fnu)}
    if "convrot_groupsize" in settings:
        more["convrot_groupsize"] = settings["convrot_groupsize"]
    if settings.get("convrot"):
        more["convrot"] = True
    params = layout.Params(**more, orig_dtype=dtype, orig_shape=shape)
    return kitchen.QuantizedTensor(tensors["weight"], THEIRS[name], params)


def packed(config, matrix):
    made = quantize_weight(matrix, config)
    layout = layout_for(made.spec, tuple(matrix.shape))
    return made, layout, layout.pack(layout.rows(made.spec, tuple(matrix.shape), made.tensors))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "config"), CASES)
def test_comfy_kitchen_decodes_our_numbers(name, config, shape):
    if not fits(name, shape):
        pytest.skip("no such layer")
    made, layout, tensors = packed(config, weight(*shape))
    assert layout.name == name
    assert {key: (tuple(t.shape), t.dtype) for key, t in tensors.items()} == {
        key: tuple(info) for key, info in layout.infos(shape, layout.shared(made.spec, made.tensors)).items()
    }
    theirs = decoded(name, layout.settings(made.spec, shape[1], False), tensors, shape).dequantize()
    ours = made.spec.dequantize(made.tensors, shape)
    assert theirs.shape == ours.shape
    if made.spec.rotation:  # turned back by products of matrices that round on their own
        assert (theirs - ours).abs().max() < 1e-6 * ours.abs().max()
    else:
        assert torch.equal(theirs, ours)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("name", "config"), CASES)
def test_what_is_written_is_read_as_it_was(name, config, shape):
    if not fits(name, shape):
        pytest.skip("no such layer")
    made, layout, tensors = packed(config, weight(*shape))
    settings = layout.settings(made.spec, shape[1], False)
    assert layout_of(settings) is layout
    spec = layout.spec(settings, shape[1], [layout.infos(shape, {})["weight_scale"]])
    stored = layout.store([layout.unpack(settings, tensors, shape)])
    assert {key: tuple(info) for key, info in spec.tensors(shape).items()} == {
        key: (tuple(stored[key].shape), stored[key].dtype) for key in spec.tensors(shape)
    }
    assert torch.equal(spec.dequantize(stored, shape), made.spec.dequantize(made.tensors, shape))
    again = layout_for(spec, shape)
    assert again is layout
    back = again.pack(again.rows(spec, shape, stored))
    assert all(torch.equal(back[key].reshape(-1).view(torch.int8), tensors[key].reshape(-1).view(torch.int8)) for key in tensors)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_comfy_kitchen_writes_is_read_as_its_numbers(name, shape):
    """And some of its rows too, as where a fused weight is cut."""
    if not fits(name, shape):
        pytest.skip("no such layer")
    block = next(size for size in (256, 64, 16, 4) if shape[1] % size == 0) if "convrot" in name else 0
    options = {"convrot_groupsize": block} if block else {}
    if name.startswith("int8"):
        options |= {"per_channel": True, "convrot": bool(block)}
    elif name in ("fp8", "nvfp4"):
        options |= {"scale": "recalculate"}
    quantized = kitchen.QuantizedTensor.from_float(weight(*shape, seed=1), THEIRS[name], **options)
    tensors = {f"weight{key}": value for key, value in quantized.state_dict().items()}
    layout = LAYOUTS[name]
    settings = {"format": layout.format} | ({"convrot_groupsize": block} if block else {})
    settings |= {"convrot": True} if name == "int8_convrot" else {}
    assert layout_of(settings) is layout
    rows = layout.unpack(settings, tensors, shape)
    spec = layout.spec(settings, shape[1], [layout.infos(shape, {})["weight_scale"]])
    ours = spec.dequantize(layout.store([rows]), shape)
    expected = quantized.dequantize()
    assert (ours - expected).abs().max() <= (1e-6 * expected.abs().max() if block else 0)
    part, some = (shape[0] // 2, shape[1]), rows.select(0, shape[0] // 2)
    if part[0]:
        assert torch.equal(spec.dequantize(layout.store([some]), part), ours[: part[0]])


@pytest.mark.parametrize(("name", "config"), CASES)
def test_fused_rows_are_packed_as_one_weight(name, config):
    """Of what all rows share the first part's counts: whoever joins makes sure that they agree."""
    shapes, weights = [(24, 64), (8, 64)], [weight(24, 64), weight(8, 64, seed=2)]
    made = [quantize_weight(matrix, config) for matrix in weights]
    layout = layout_for(made[0].spec, (24, 64))
    parts = [layout.rows(m.spec, shape, m.tensors) for m, shape in zip(made, shapes, strict=True)]
    parts[1] = parts[1]._replace(shared=parts[0].shared)
    theirs = decoded(name, layout.settings(made[0].spec, 64, False), layout.pack(joined(parts)), (32, 64)).dequantize()
    if parts[0].shared:
        leaf = "tensor_scale" if name == "nvfp4" else "scales"
        made[1].tensors[leaf] = made[0].tensors[leaf]
    ours = torch.cat([m.spec.dequantize(m.tensors, shape) for m, shape in zip(made, shapes, strict=True)])
    assert (theirs - ours).abs().max() <= (1e-6 if made[0].spec.rotation else 0)


def test_an_e4m3_code_that_is_not_a_number_elsewhere_becomes_the_number_it_is_here():
    made = quantize_weight(weight(8, 32), CONFIGS["fp8"][0])
    made.tensors["codes"].view(torch.uint8)[0, :2] = torch.tensor([0x7F, 0xFF], dtype=torch.uint8)
    layout = LAYOUTS["fp8"]
    tensors = layout.pack(layout.rows(made.spec, (8, 32), made.tensors))
    theirs = decoded("fp8", {}, tensors, (8, 32)).dequantize()
    assert torch.equal(theirs, made.spec.dequantize(made.tensors, (8, 32)))


@pytest.mark.parametrize("name", ["fp8", "mxfp8"])
def test_nan_is_refused(name):
    _, layout, tensors = packed(CONFIGS[name][0], weight(8, 32))
    tensors["weight"].view(torch.uint8)[3, 3] = 0xFF
    with pytest.raises(ValueError, match="NaN"):
        layout.unpack({}, tensors, (8, 32))


def test_the_lowest_integer_cannot_be_negated():
    """ConvRot's order of columns negates some of them; qdiff's quantizers for it leave the lowest integer out."""
    made, layout, tensors = packed(CONFIGS["int8_convrot"][0], weight(4, 64))
    settings = layout.settings(made.spec, 64, False)
    spec = layout.spec(settings, 64, [])
    stored = layout.store([layout.unpack(settings, tensors, (4, 64))])
    assert layout.problem(spec, (4, 64), stored) is None
    stored["codes"].view(torch.uint8)[:] = 0
    assert "would negate" in layout.problem(spec, (4, 64), stored)
    tensors["weight"][:] = -128
    with pytest.raises(ValueError, match="would negate"):
        layout.unpack(settings, tensors, (4, 64))


def test_another_rotation_is_noticed():
    made, layout, _ = packed(CONFIGS["int8_convrot"][0], weight(4, 64))
    assert layout.problem(made.spec, (4, 64), made.tensors) is None
    assert "ConvRot" in layout.problem(made.spec, (4, 64), made.tensors | {"smooth": torch.ones(64)})


REFUSED = [
    (FPConfig(weight_format="e4m3", group_size="row", scale_dtype="float32"), "e4m3 per row"),
    (FPConfig(weight_format="mxfp4"), "e2m1 g32"),
    (SVDQuantConfig(weight_format="nvfp4", rank=4), "rank 4"),
    (RTNConfig(bits=4), "int4 asymmetric"),
    (RTNConfig(bits=8, group_size="row"), "int8 asymmetric"),
    (SVDQuantConfig(weight_format="int8", group_size=16, rank=0), "int8 g16"),
    (SVDQuantConfig(weight_format="int8", group_size="row", rank=0, rotation=True), "rotated 64"),
    (FPConfig(weight_format="nvfp4", rotation="regular"), "rotated 64"),
    (FPConfig(weight_format="nvfp4", activations="int8"), "int8 activations"),
    (FPConfig(weight_format="e4m3", group_size="tensor", scale_dtype="float32", activations="int8"), "int8 activations"),
]


@pytest.mark.parametrize(("config", "message"), REFUSED)
def test_other_layers_are_refused_by_what_they_are(config, message):
    made = quantize_weight(weight(32, 64), config)
    with pytest.raises(ValueError, match=message):
        layout_for(made.spec, (32, 64))


def test_convolutions_are_refused():
    made = quantize_weight(torch.randn(16, 32, 3, 3), CONFIGS["int8"][0])
    with pytest.raises(ValueError, match="convolution"):
        layout_for(made.spec, (16, 32, 3, 3))


@pytest.mark.parametrize("config", [CONFIGS["int8"][0], CONFIGS["fp8"][0], CONFIGS["nvfp4"][0]])
def test_inputs_in_16_bits_stay_so_unless_it_is_to_be_fast(config):
    spec = quantize_weight(weight(32, 64), config).spec
    layout = layout_for(spec, (32, 64))
    assert layout.settings(spec, 64, False)["full_precision_matrix_mult"] is True
    assert "full_precision_matrix_mult" not in layout.settings(spec, 64, True)
    quantized = dataclasses.replace(spec, activations=layout.inputs)
    assert "full_precision_matrix_mult" not in layout_for(quantized, (32, 64)).settings(quantized, 64, False)


def test_a_static_scale_of_fp8_inputs_is_kept():
    made = quantize_weight(weight(32, 64), CONFIGS["fp8"][0])
    spec = dataclasses.replace(made.spec, activations="fp8", input_scales=1)
    tensors = made.tensors | {"input_scales": torch.tensor([0.25])}
    layout = layout_for(spec, (32, 64))
    assert float(layout.pack(layout.rows(spec, (32, 64), tensors))["input_scale"]) == 0.25
    many = dataclasses.replace(spec, input_scales=3)
    with pytest.raises(ValueError, match="3 steps' fp8"):
        layout_for(many, (32, 64))


@pytest.mark.parametrize("shape", [(1, 1), (128, 4), (129, 5), (300, 17)])
def test_tiles_are_laid_and_taken_up_again(shape):
    from comfy_kitchen.float_utils import to_blocked

    scales = torch.randint(0, 127, shape, dtype=torch.int8)
    assert torch.equal(tiled(scales).view(torch.uint8), to_blocked(scales.view(torch.uint8), flatten=False))
    assert torch.equal(untiled(tiled(scales), *shape), scales)


def test_an_unknown_format_is_refused_by_name():
    with pytest.raises(ValueError, match="format svdquant_w4a4; float8_e4m3fn"):
        layout_of({"format": "svdquant_w4a4"})


def test_regular_rotation_needs_no_format_of_its_own():
    """It is qdiff's rotation after a smoothing vector of signs."""
    made = quantize_weight(weight(32, 256), CONFIGS["int8_convrot"][0])
    assert made.spec == LayerSpec(made.spec.format, rotation=256, smooth=True)
    assert made.tensors["smooth"].abs().eq(1).all()
