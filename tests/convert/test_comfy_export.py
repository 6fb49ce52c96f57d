"""One file for ComfyUI's own loader: every weight number by number, and what has no place refused before it is begun."""

from __future__ import annotations

import json

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, safe_open
from typer.testing import CliRunner

from qdiff_diffusers import (
    AQConfig,
    Calibration,
    CheckpointError,
    ConfigError,
    FPConfig,
    RTNConfig,
    SVDQuantConfig,
    quantize,
    target_config,
)
from qdiff_diffusers.checkpoint.comfy_pack import families
from qdiff_diffusers.checkpoint.stored_model import read_stored_model
from qdiff_diffusers.cli.app import app
from qdiff_diffusers.convert import export_comfy
from qdiff_diffusers.convert.comfy_layouts import LAYOUTS, layout_of
from qdiff_diffusers.methods.targets import TARGETS

FEW = ["norm", "ff", "mlp", "to_out", "add", "proj_out"]  # layers left out, so that the others take no time


@pytest.fixture(scope="module")
def quantized(dense, tmp_path_factory):
    root = tmp_path_factory.mktemp("quantized")
    made = {}

    def folder(name, config):
        key = name, str(config.to_dict())
        if key not in made:
            made[key] = quantize(dense(name), config, root / str(len(made)), dtype=torch.float32)
        return made[key]

    return folder


def descriptions(tensors):
    return {
        key.removesuffix(".comfy_quant"): json.loads(bytes(value.tolist()))
        for key, value in tensors.items()
        if key.endswith(".comfy_quant")
    }


def decoded(file):
    """Every weight of a file, by ComfyUI's name, as float32."""
    tensors = load_file(file)
    packed = {f"{module}.weight" for module in descriptions(tensors)}
    out = {key: value for key, value in tensors.items() if not any(key.startswith(name) for name in packed)}
    out = {key: value for key, value in out.items() if not key.endswith(".comfy_quant")}
    for module, settings in descriptions(tensors).items():
        mine = {key.removeprefix(f"{module}."): value for key, value in tensors.items() if key.startswith(f"{module}.weight")}
        layout = layout_of(settings)
        rows = len(mine["weight"])
        columns = mine["weight"].shape[1] * (2 if layout.name in PACKED else 1)
        shape = (rows, columns)
        spec = layout.spec(settings, columns, [layout.infos(shape, {})["weight_scale"]])
        out[f"{module}.weight"] = spec.dequantize(layout.store([layout.unpack(settings, mine, shape)]), shape)
    return out


PACKED = ("nvfp4", "convrot_w4a4")


def expected(folder):
    """The same from the quantized folder, over the tables of names."""
    stored = read_stored_model(folder)
    tensors = stored.load()
    dense = {}
    for name, layer in stored.quantization.layers.items():
        own = {leaf: tensors.pop(f"{name}.{leaf}") for leaf in layer.spec.tensors(layer.shape)}
        dense[f"{name}.weight"] = layer.spec.dequantize(own, layer.shape)
    dense |= tensors
    rules = families().family_of_class(stored.model_class).rules(dense)
    out = {}
    for key, parts in families().to_native(rules, dense).items():
        rows = [torch.cat(dense[p.key].chunk(2)[::-1]) if p.swapped else dense[p.key] for p in parts]
        out[key] = torch.cat(rows) if rows[0].ndim else rows[0]
    return out


@pytest.mark.parametrize("name", ["flux", "sd3", "pixart", "sdxl_unet", "wan"])
@pytest.mark.parametrize("target", ["comfyui:fp8", "comfyui:nvfp4", "comfyui:mxfp8", "comfyui:int8", "comfyui:int8_convrot"])
def test_every_weight_is_the_one_that_was_quantized(name, target, quantized, tmp_path):
    folder = quantized(name, target_config(target))
    file = export_comfy(folder, tmp_path / "model.safetensors")
    found, wanted = decoded(file), expected(folder)
    assert found.keys() == wanted.keys()
    assert len(descriptions(load_file(file))) > 3
    for key, value in wanted.items():
        padded = found[key]
        here = tuple(slice(size) for size in value.shape)
        assert (padded[here] - value).abs().max() <= (1e-6 if "convrot" in target else 0), key
        padded[here] = 0
        assert not padded.any()


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_is_the_layout_of_its_name(target, quantized):
    """So a model that was quantized for it can be written."""
    from qdiff_diffusers.convert.comfy_layouts import layout_for
    from qdiff_diffusers.methods import quantize_weight

    weight = torch.randn(32, 256)
    spec = quantize_weight(weight, target_config(target)).spec
    assert layout_for(spec, (32, 256)).name == target.removeprefix("comfyui:")
    assert set(TARGETS) == {f"comfyui:{name}" for name in LAYOUTS}


def trajectories():
    """A calibration on the tiny model's own inputs."""
    return Calibration(run=lambda model, samples, generators: tiny_models.run(model, "flux"), samples=1)


@pytest.mark.parametrize("target", sorted(TARGETS.keys() - {"comfyui:fp8", "comfyui:nvfp4"}))
def test_what_is_calibrated_has_a_place_too(target, dense, tmp_path):
    config = target_config(target, keep_outer_layers=False)
    if target == "comfyui:convrot_w4a4":
        pytest.skip("no layer of the tiny model is wide enough")
    folder = quantize(dense("flux"), config, tmp_path / "out", dtype=torch.float32, calibration=trajectories())
    found, wanted = decoded(export_comfy(folder, tmp_path / "model.safetensors")), expected(folder)
    assert all((found[key][: len(value)] - value).abs().max() < 1e-6 for key, value in wanted.items() if value.ndim == 1)
    assert found.keys() == wanted.keys()


def test_static_scales_of_inputs_are_common_to_a_fused_layer(dense, tmp_path):
    config = target_config("comfyui:fp8", activations="fp8", activation_scales="static")
    folder = quantize(dense("flux"), config, tmp_path / "out", dtype=torch.float32, calibration=trajectories())
    tensors = load_file(export_comfy(folder, tmp_path / "model.safetensors"))
    assert float(tensors["double_blocks.0.img_attn.qkv.input_scale"]) > 0
    assert descriptions(tensors)["double_blocks.0.img_attn.qkv"] == {"format": "float8_e4m3fn"}


@pytest.mark.parametrize("target", ["comfyui:fp8", "comfyui:nvfp4"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_what_comfyui_fuses_shares_a_power_of_two(target, calibrated, dense, tmp_path):
    """Whether calibrated or not: its bfloat16 rounds no such scale."""
    config = target_config(target, modules_to_not_convert=["norm"])
    folder = quantize(
        dense("flux"), config, tmp_path / "out", dtype=torch.float32, calibration=trajectories() if calibrated else None
    )
    export_comfy(folder, tmp_path / "model.safetensors")
    stored = read_stored_model(folder)
    tensors = stored.load()
    leaf = "scales" if target.endswith("fp8") else "tensor_scale"
    scales = {name: float(tensors[f"{name}.{leaf}"].float()) for name in stored.quantization.layers}
    block = "single_transformer_blocks.0"
    assert len({scales[f"{block}.{part}"] for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")}) == 1
    assert all(torch.frexp(torch.tensor(scale)).mantissa == 0.5 for scale in scales.values())
    assert len(set(scales.values())) > 1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AQConfig(bits=2, effort=0, modules_to_not_convert=FEW), "exact place"),
        (RTNConfig(bits=4, modules_to_not_convert=FEW), "is int4 asymmetric"),
        (SVDQuantConfig(bits=4, rank=2, modules_to_not_convert=FEW), "low-rank branch of rank 2"),
        (FPConfig(weight_format="nvfp4", modules_to_not_convert=FEW), "one weight in ComfyUI, with one scale"),
        (FPConfig(weight_format="mxfp8", modules_to_not_convert=["to_q"]), "is not quantized, but ComfyUI fuses"),
        (FPConfig(weight_format="mxfp8", overrides={"to_k": RTNConfig(bits=8)}), "to_k is int8 asymmetric"),
    ],
)
def test_layers_without_an_exact_place_are_refused_by_name(config, message, quantized, tmp_path):
    folder = quantized("flux", config)
    with pytest.raises(CheckpointError, match=message) as refused:
        export_comfy(folder, tmp_path / "sub" / "model.safetensors")
    assert "transformer_blocks.0" in str(refused.value)
    assert "qdiff quantize --for comfyui:nvfp4" in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_convolutions_are_refused_by_name(quantized, tmp_path):
    folder = quantized("sdxl_unet", SVDQuantConfig(weight_format="int8", group_size="row", rank=0))
    with pytest.raises(CheckpointError, match=r"conv.* is a convolution"):
        export_comfy(folder, tmp_path / "model.safetensors")


def test_a_weight_that_comfyui_measures_is_not_packed(quantized, tmp_path):
    """Its columns tell the width of the text."""
    folder = quantized("sdxl_unet", FPConfig(weight_format="nvfp4", modules_to_not_convert=["conv", "sampler"]))
    with pytest.raises(CheckpointError, match=r"attn2.to_k would have another shape in nvfp4"):
        export_comfy(folder, tmp_path / "model.safetensors")
    stored = read_stored_model(quantized("sdxl_unet", target_config("comfyui:nvfp4")))
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    assert "tells by its shape" in stored.quantization.skipped[name]
    assert name.replace("to_k", "to_v") in stored.quantization.layers


def test_an_interrupted_file_is_not_left_behind(quantized, tmp_path):
    folder, path = quantized("flux", target_config("comfyui:mxfp8")), tmp_path / "model.safetensors"

    def interrupt(done, total, name):
        assert total == done + (total - done)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_comfy(folder, path, advance=interrupt)
    assert not list(tmp_path.iterdir())
    export_comfy(folder, path)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        export_comfy(folder, path)
    with pytest.raises(KeyboardInterrupt):
        export_comfy(folder, path, advance=interrupt, overwrite=True)
    assert path.read_bytes() == before
    assert export_comfy(folder, path, overwrite=True).read_bytes() == before


@pytest.mark.parametrize(("name", "message"), [("model.bin", "ends in .safetensors"), ("folder.safetensors", "is a folder")])
def test_a_place_that_is_no_file_is_refused(name, message, quantized, tmp_path):
    (tmp_path / "folder.safetensors").mkdir()
    with pytest.raises(ConfigError, match=message):
        export_comfy(quantized("flux", target_config("comfyui:mxfp8")), tmp_path / name)


def test_models_that_comfyui_has_no_class_for_are_refused_early(dense, quantized, tmp_path):
    with pytest.raises(ConfigError, match="no native class for a DiTTransformer2DModel"):
        quantize(dense("dit"), target_config("comfyui:int8"), tmp_path / "out")
    folder = quantized("dit", SVDQuantConfig(weight_format="int8", group_size="row", rank=0, modules_to_not_convert=["emb"]))
    with pytest.raises(ConfigError, match="no native class for a DiTTransformer2DModel"):
        export_comfy(folder, tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_no_quantized_model_is_refused(dense, tmp_path):
    with pytest.raises(CheckpointError, match="holds no qdiff checkpoint"):
        export_comfy(dense("flux"), tmp_path / "model.safetensors")


def test_a_part_of_a_fused_weight_cannot_stay_dense(dense, tmp_path):
    with pytest.raises(ConfigError, match=r"attn.to_q would stay in 16 bits, but ComfyUI has it in one weight"):
        quantize(dense("flux"), target_config("comfyui:mxfp8", modules_to_not_convert=["to_q"]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_common_scale_needs_the_whole_model(dense):
    """``from_pretrained`` sees one weight at a time."""
    from diffusers import FluxTransformer2DModel, WanTransformer3DModel

    with pytest.raises(ConfigError, match=r"in one weight with one scale.*qdiff quantize --for"):
        FluxTransformer2DModel.from_pretrained(dense("flux"), quantization_config=target_config("comfyui:nvfp4"))
    WanTransformer3DModel.from_pretrained(dense("wan"), quantization_config=target_config("comfyui:nvfp4"))  # nothing is fused


def test_tuning_would_move_a_common_scale(dense, tmp_path):
    calibration = {"prompts": ["a"], "tuning": {"steps": 2}}
    with pytest.raises(ConfigError, match="tuning moves the scales"):
        quantize(dense("flux"), target_config("comfyui:nvfp4"), tmp_path / "out", calibration=calibration)


def test_a_target_fixes_its_format(dense):
    with pytest.raises(ConfigError, match="comfyui:int8 fixes group_size"):
        target_config("comfyui:int8", group_size=64)
    with pytest.raises(ConfigError, match="target must be one of comfyui:fp8"):
        target_config("comfyui:int3")
    for options, message in (
        ({"rotation": True}, "no place for rotation"),
        ({"outer_bits": 8}, "no place for outer_bits"),
        ({"activations": "int8"}, "activations must be None, got 'int8'"),
        ({"overrides": {"ff": RTNConfig(bits=8)}}, "must be None, or have a target too"),
    ):
        with pytest.raises(ConfigError, match=message):
            target_config("comfyui:nvfp4", **options)
    with pytest.raises(ConfigError, match="no place for smoothing"):
        target_config("comfyui:int8", smoothing=True)
    with pytest.raises(ConfigError, match="no place for activation_scales='static'"):
        target_config("comfyui:int8", activation_scales="static")
    assert target_config("comfyui:fp8", activations="fp8", activation_scales="static").target == "comfyui:fp8"
    with pytest.raises(ConfigError, match="tensor_scale goes with"):
        FPConfig(weight_format="mxfp8", tensor_scale="power", unbiased=False)
    with pytest.raises(ConfigError, match="unbiased=False"):
        FPConfig(weight_format="nvfp4", tensor_scale=0.5)
    with pytest.raises(ConfigError, match="smoothing goes without rotation 'regular'"):
        SVDQuantConfig(bits=4, smoothing=True, rotation="regular")


def test_the_command_line_quantizes_and_converts(dense, tmp_path):
    runner = CliRunner()
    arguments = ["quantize", str(dense("flux")), "-o", str(tmp_path / "out"), "--for", "comfyui:nvfp4", "--skip", "norm"]
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    result = runner.invoke(app, ["convert", "to-comfy", str(tmp_path / "out"), str(tmp_path / "model.safetensors"), "--fast"])
    assert result.exit_code == 0, result.output
    assert "model.safetensors: " in result.output.replace("\n", "")
    kinds = descriptions(load_file(tmp_path / "model.safetensors"))
    assert {"format": "nvfp4"} in kinds.values()
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["qdiff_model"])["_class_name"] == "FluxTransformer2DModel"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--for", "comfyui:int8", "--method", "aq"], "method of its own"),
        (["--for", "comfyui:int8", "--effort", "2"], "--effort does not go with"),
        (["--for", "comfyui:nvfp4", "--bits", "4"], "fixes bits"),
        (["--for", "forge"], "target must be one of"),
    ],
)
def test_options_that_contradict_a_target_are_refused(options, message, dense, tmp_path):
    result = CliRunner().invoke(app, ["quantize", str(dense("flux")), "-o", str(tmp_path / "out"), *options])
    assert result.exit_code != 0
    assert message in str(result.exception) + result.output
    assert not list(tmp_path.iterdir())
