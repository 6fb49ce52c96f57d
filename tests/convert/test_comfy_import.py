"""ComfyUI's files as qdiff models: number by number what comfy-kitchen decodes, under diffusers' names."""

from __future__ import annotations

import json

import diffusers
import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from scaled_files import description
from typer.testing import CliRunner

from qdiff_diffusers import CheckpointError, ConfigError, quantize, target_config
from qdiff_diffusers.checkpoint.comfy_pack import families
from qdiff_diffusers.checkpoint.stored_model import read_stored_model
from qdiff_diffusers.cli.app import app
from qdiff_diffusers.convert import convert_comfy, export_comfy
from qdiff_diffusers.layers import PackedLayer

kitchen = pytest.importorskip("comfy_kitchen.tensor")

MODELS = ("flux", "sd3", "pixart", "sdxl_unet", "wan")
LAYOUTS = {
    "float8_e4m3fn": ("TensorCoreFP8Layout", {"scale": "recalculate"}, {}),
    "nvfp4": ("TensorCoreNVFP4Layout", {"scale": "recalculate"}, {}),
    "mxfp8": ("TensorCoreMXFP8Layout", {}, {}),
    "int8_tensorwise": ("TensorWiseINT8Layout", {}, {}),
    "int8_rows": ("TensorWiseINT8Layout", {"per_channel": True}, {}),
    "int8_convrot": (
        "TensorWiseINT8Layout",
        {"per_channel": True, "convrot": True, "convrot_groupsize": 16},
        {"convrot": True, "convrot_groupsize": 16},
    ),
    "convrot_w4a4": ("TensorCoreConvRotW4A4Layout", {"convrot_groupsize": 64}, {"convrot_groupsize": 64}),
}


def native(name, model):
    """A model's tensors under ComfyUI's names."""
    tensors = model.state_dict()
    parts = families().to_native(families().family_of_class(type(model).__name__).rules(tensors), tensors)

    def rows(part):
        tensor = tensors[part.key]
        return torch.cat(tensor.chunk(2)[::-1]) if part.swapped else tensor

    return {key: torch.cat([rows(p) for p in ps]) if tensors[ps[0].key].ndim else tensors[ps[0].key] for key, ps in parts.items()}


def written(name, kind, prefix=""):
    """A file as ComfyUI writes it, and the model with its weights decoded by comfy-kitchen."""
    model = tiny_models.make(name)
    tensors = native(name, model)
    layout, options, settings = LAYOUTS[kind]
    file, values = dict(tensors), dict(tensors)
    for key, value in tensors.items():
        if not key.endswith("weight") or value.ndim != 2 or value.shape[1] % (64 if kind == "convrot_w4a4" else 16):
            continue
        packed = kitchen.QuantizedTensor.from_float(value, layout, **options)
        file |= {key + suffix: tensor.contiguous() for suffix, tensor in packed.state_dict().items()}
        form = {"int8_rows": "int8_tensorwise", "int8_convrot": "int8_tensorwise"}.get(kind, kind)
        file[key.removesuffix("weight") + "comfy_quant"] = description({"format": form} | settings)
        values[key] = packed.dequantize()
    shapes = {key: tuple(t.shape) for key, t in values.items()}
    rules = families().family_of_class(type(model).__name__).rules(shapes)
    state = {}
    for key, slices in families().to_diffusers(rules, shapes).items():
        for part in slices:
            rows = values[key][part.start : part.stop] if values[key].ndim else values[key]
            state[part.key] = torch.cat(rows.chunk(2)[::-1]) if part.swapped else rows
    file = {
        prefix + key: torch.from_numpy(t.view(torch.uint8).numpy().copy()) if t.dtype == torch.float8_e8m0fnu else t.clone()
        for key, t in file.items()
    }
    model.load_state_dict(state)
    return file, model


def state(model):
    """A model's tensors with the packed ones decoded."""
    out = dict(model.state_dict())
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLayer):
            for leaf in layer.spec.tensors(layer.weight_shape):
                del out[f"{name}.{leaf}"]
            out[f"{name}.weight"] = layer.dequantize(torch.float32)
    return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", LAYOUTS)
def test_comfyuis_numbers_are_read(name, kind, dense, tmp_path):
    file, expected = written(name, kind)
    if not any(key.endswith("comfy_quant") for key in file):
        pytest.skip("no layer is wide enough")
    save_file(file, tmp_path / "file.safetensors")
    folder = convert_comfy(tmp_path / "file.safetensors", tmp_path / "out", config=dense(name))
    model = type(expected).from_pretrained(folder)
    found, wanted = state(model), expected.state_dict()
    assert found.keys() == wanted.keys()
    assert sum(isinstance(module, PackedLayer) for module in model.modules()) > 1
    for key, value in wanted.items():
        assert (found[key] - value).abs().max() <= (1e-5 * value.abs().max() if "rot" in kind else 0), key


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("target", ["comfyui:fp8", "comfyui:nvfp4", "comfyui:mxfp8", "comfyui:int8", "comfyui:int8_convrot"])
def test_there_and_back_again(name, target, dense, tmp_path):
    """The same numbers, and from them the same file; without a config, which the file carries."""
    folder = quantize(dense(name), target_config(target), tmp_path / "quantized", dtype=torch.float32)
    file = export_comfy(folder, tmp_path / "file.safetensors")
    back = convert_comfy(file, tmp_path / "back")
    cls = getattr(diffusers, read_stored_model(folder).model_class)
    ours, theirs = state(cls.from_pretrained(folder)), state(cls.from_pretrained(back))
    assert ours.keys() == theirs.keys()
    assert all((ours[key] - theirs[key]).abs().max() <= (1e-6 if "rot" in target else 0) for key in ours)
    stored, again = read_stored_model(folder), read_stored_model(back)
    assert stored.quantization.layers.keys() == again.quantization.layers.keys()
    first, second = load_file(file), load_file(export_comfy(back, tmp_path / "again.safetensors"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k].reshape(-1).view(torch.uint8), second[k].reshape(-1).view(torch.uint8)) for k in first)


def test_scaled_fp8_and_plain_float8_files_are_read(dense, tmp_path):
    file, expected = written("flux", "float8_e4m3fn")
    scaled = {key.replace("weight_scale", "scale_weight"): value for key, value in file.items() if "comfy_quant" not in key}
    layer = next(key for key in scaled if key.endswith("linear2.scale_weight")).removesuffix(".scale_weight")
    scaled |= {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn), f"{layer}.scale_input": torch.tensor(0.5)}
    scale = scaled.pop(f"{layer}.scale_weight")
    save_file(scaled, tmp_path / "file.safetensors")
    model = type(expected).from_pretrained(convert_comfy(tmp_path / "file.safetensors", tmp_path / "out", config=dense("flux")))
    found, wanted = state(model), expected.state_dict()
    name = "single_transformer_blocks.0.proj_out.weight"
    wanted[name] = wanted[name] / scale
    assert all(torch.allclose(found[key], wanted[key], rtol=1e-6, atol=0) for key in wanted)


def test_whole_checkpoints_and_descriptions_in_the_metadata_are_read(dense, tmp_path):
    """As files with text encoders are, whose tensors are left alone."""
    file, expected = written("flux", "nvfp4", "model.diffusion_model.")
    layers = {key.removesuffix(".comfy_quant"): json.loads(bytes(t.tolist())) for key, t in file.items() if "comfy_quant" in key}
    file = {key: value for key, value in file.items() if "comfy_quant" not in key} | {"vae.x.weight": torch.ones(2)}
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
    save_file(file, tmp_path / "file.safetensors", metadata)
    model = type(expected).from_pretrained(convert_comfy(tmp_path / "file.safetensors", tmp_path / "out", config=dense("flux")))
    found, wanted = state(model), expected.state_dict()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_converted_model_is_an_ordinary_one(dense, tmp_path):
    """It runs near the model with decoded weights, is saved, and loads again."""
    file, expected = written("flux", "int8_convrot")
    save_file(file, tmp_path / "file.safetensors")
    folder = convert_comfy(tmp_path / "file.safetensors", tmp_path / "out", config=dense("flux"))
    model = type(expected).from_pretrained(folder)
    assert all(m.spec.activations == "int8" for m in model.modules() if isinstance(m, PackedLayer))
    with torch.no_grad():
        output, wanted = (tiny_models.run(m, "flux") for m in (model, expected))
    assert (output - wanted).abs().mean() < 0.03 * wanted.abs().mean()
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(tiny_models.run(type(expected).from_pretrained(tmp_path / "saved"), "flux"), output)


def changed(**more):
    return lambda file: file | more


def without(*ends):
    return lambda file: {key: value for key, value in file.items() if not key.endswith(ends)}


LAYER = "double_blocks.0.img_attn.proj"
DAMAGED = [
    (changed(**{f"{LAYER}.comfy_quant": description({"format": "svdquant_w4a4"})}), "format svdquant_w4a4"),
    (changed(**{f"{LAYER}.comfy_quant": torch.zeros(3, dtype=torch.uint8)}), "malformed description"),
    (changed(**{f"{LAYER}.pre_quant_scale": torch.ones(32)}), "pre_quant_scale .* multiplies inputs"),
    (without("img_attn.proj.weight"), "describes double_blocks.0.img_attn.proj, but lacks its weight"),
    (without("img_attn.proj.weight_scale"), "its weight_scale is missing"),
    (without("img_attn.proj.weight_scale_2"), "no weight_scale_2"),
    (changed(**{f"{LAYER}.weight": torch.zeros(32, 8, dtype=torch.uint8)}), r"its weight is uint8 \[32, 8\], it should be"),
    (without("img_attn.proj.bias"), "lacks transformer_blocks.0.attn.to_out.0.bias"),
    (changed(extra=torch.ones(2)), "holds extra"),
    (without("comfy_quant", "scale", "scale_2"), "holds no weight in a quantized format"),
]


@pytest.mark.parametrize(("change", "message"), DAMAGED)
def test_damaged_files_are_refused_by_name(change, message, dense, tmp_path):
    file, _ = written("flux", "nvfp4")
    save_file(change(file), tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=message):
        convert_comfy(tmp_path / "file.safetensors", tmp_path / "out", config=dense("flux"))
    assert [path.name for path in tmp_path.iterdir()] == ["file.safetensors"]


def test_what_cannot_be_known_is_asked_for(dense, tmp_path):
    file, _ = written("flux", "mxfp8")
    save_file(file, tmp_path / "file.safetensors")
    with pytest.raises(ConfigError, match="--config"):
        convert_comfy(tmp_path / "file.safetensors", tmp_path / "out")
    with pytest.raises(ConfigError, match="no native class for a DiTTransformer2DModel"):
        convert_comfy(tmp_path / "file.safetensors", tmp_path / "out", config=dense("dit"))
    result = CliRunner().invoke(
        app, ["convert", "comfy", str(tmp_path / "file.safetensors"), str(tmp_path / "out"), "--config", str(dense("flux"))]
    )
    assert result.exit_code == 0, result.output
    assert "layers at 8." in result.output
