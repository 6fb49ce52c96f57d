"""Files in ComfyUI's own formats that we wrote, in ComfyUI's own loader: the image of our loader, and stock LoRAs."""

from __future__ import annotations

import pytest
import torch
from comfyui import host
from comfyui.test_patches import lora_file, run
from safetensors.torch import load_file, save_file

from qdiff_diffusers import CheckpointError, ConfigError, FPConfig, RTNConfig, quantize, target_config
from qdiff_diffusers.convert import export_comfy
from qdiff_diffusers.methods.targets import TARGETS

FAMILIES = ("flux", "qwen", "sdxl", "wan")
# Largest difference of the outputs, and the root of its mean square, relative to the output's. Where inputs stay in 16 bits only
# float32 rounds. INT8 inputs are the same numbers but for a few that lie between two; one of them moves a token. Inputs of INT4
# have one scale per token there, and one per 64 numbers here.
EXACT = {"comfyui:fp8": 1e-5, "comfyui:nvfp4": 1e-5, "comfyui:mxfp8": 1e-5}
STRENGTH = 6.0  # of a LoRA
ROUNDED = {"comfyui:int8": 0.02, "comfyui:int8_convrot": 0.02, "comfyui:convrot_w4a4": 0.3}


@pytest.fixture(scope="session")
def quantized_for(dense, tmp_path_factory):
    """``quantized_for(family, target)``: the folder of the tiny model, quantized for one of ComfyUI's formats."""
    root, made = tmp_path_factory.mktemp("targets"), {}

    def folder(family, target):
        if (family, target) not in made:
            config = target_config(target, keep_outer_layers=False)
            made[family, target] = quantize(dense(family), config, root / f"{len(made)}", dtype=torch.float32)
        return made[family, target]

    return folder


@pytest.fixture
def stock(tiny):
    """``stock(family, file)``: what ComfyUI's own loader makes of a file."""

    def load(family, file):
        tiny(family)
        import comfy.sd
        from comfy.quant_ops import QUANT_ALGOS

        if not {"mxfp8", "convrot_w4a4"} <= QUANT_ALGOS.keys():
            pytest.skip("this ComfyUI does not know all formats")
        return comfy.sd.load_diffusion_model(str(file), model_options={"dtype": torch.float32})

    return load


def rms(tensor):
    return float(tensor.square().mean().sqrt())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", TARGETS)
@torch.no_grad()
def test_the_stock_loader_gives_the_output_of_ours(family, target, quantized_for, stock, tmp_path):
    folder = quantized_for(family, target)
    model = stock(family, export_comfy(folder, tmp_path / "model.safetensors"))
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

    ours, theirs = run(host.part("loader").load_model(folder), family), run(model, family)
    weights = [w for w in model.model.diffusion_model.parameters() if isinstance(w, QuantizedTensor)]
    assert len(weights) > 15
    name = {"fp8": "float8_e4m3fn", "int8": "int8_tensorwise", "int8_convrot": "int8_tensorwise"}
    kind = target.removeprefix("comfyui:")
    assert {w._layout_cls for w in weights} == {QUANT_ALGOS[name.get(kind, kind)]["comfy_tensor_layout"]}
    if target in EXACT:
        assert (ours - theirs).abs().max() < EXACT[target]
    else:
        assert rms(ours - theirs) < ROUNDED[target] * rms(theirs)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("target", ["comfyui:nvfp4", "comfyui:int8_convrot"])
@torch.no_grad()
def test_a_stock_lora_changes_the_file_as_it_changes_our_model(family, target, quantized_for, stock, tmp_path):
    """ComfyUI bakes a LoRA in and rounds the weight anew, to four bits with as much noise as a weak LoRA has effect."""
    import comfy.sd

    folder = quantized_for(family, target)
    model = stock(family, export_comfy(folder, tmp_path / "model.safetensors"))
    ours = host.part("loader").load_model(folder)
    lora = lora_file(family)
    plain = run(model, family)
    with_lora, _ = comfy.sd.load_lora_for_models(model, None, dict(lora), STRENGTH, 0.0)
    ours_with_lora, _ = comfy.sd.load_lora_for_models(ours, None, dict(lora), STRENGTH, 0.0)
    changed, expected = run(with_lora, family), run(ours_with_lora, family)
    assert rms(changed - expected) < 0.6 * rms(expected - plain)
    assert torch.equal(run(model, family), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_node_saves_what_the_command_line_converts(family, quantized_for, stock, tmp_path):
    folder = quantized_for(family, "comfyui:nvfp4")
    first = export_comfy(folder, tmp_path / "first.safetensors")
    stock(family, first)
    second = host.part("quantize").save_for_comfyui(host.part("loader").load_model(folder), tmp_path / "second.safetensors")
    # The node has the names of this ComfyUI's modules, the command line those that every version reads.
    converted, saved = ({key.replace("_norm.scale", "_norm.weight"): t for key, t in load_file(f).items()} for f in (first, second))
    assert converted.keys() == saved.keys()
    assert all(torch.equal(converted[k].reshape(-1).view(torch.uint8), saved[k].reshape(-1).view(torch.uint8)) for k in saved)


@torch.no_grad()
def test_a_model_of_the_graph_is_quantized_and_saved_for_comfyui(dense, stock, tmp_path):
    from comfyui.models_folder import native_tensors

    save_file(native_tensors(dense("flux"), "flux"), tmp_path / "dense.safetensors")
    quantize_model, save = (getattr(host.part("quantize"), name) for name in ("quantize_model", "save_for_comfyui"))
    model = stock("flux", tmp_path / "dense.safetensors")
    packed = quantize_model(model, FPConfig(weight_format="mxfp8"))
    saved = stock("flux", save(packed, tmp_path / "saved.safetensors"))
    assert (run(saved, "flux") - run(packed, "flux")).abs().max() < 1e-5
    with pytest.raises(CheckpointError, match=r"is int4 asymmetric.*--for comfyui"):
        save(quantize_model(model, RTNConfig(bits=4)), tmp_path / "refused.safetensors")
    with pytest.raises(ConfigError, match="not quantized by qdiff"):
        save(model, tmp_path / "refused.safetensors")
    assert not (tmp_path / "refused.safetensors").exists()


@torch.no_grad()
def test_a_fast_file_is_one_that_may_quantize_inputs(quantized_for, stock, tmp_path):
    """On a CPU it cannot: the same numbers either way, and the flag that lets a GPU is off."""
    folder = quantized_for("flux", "comfyui:nvfp4")
    exact, fast = (stock("flux", export_comfy(folder, tmp_path / f"{flag}.safetensors", fast=flag)) for flag in (False, True))
    layers = [[m for m in model.model.diffusion_model.modules() if getattr(m, "quant_format", None)] for model in (exact, fast)]
    assert all(m._full_precision_mm_config for m in layers[0])
    assert not any(m._full_precision_mm_config for m in layers[1])
    assert torch.equal(run(exact, "flux"), run(fast, "flux"))


@torch.no_grad()
def test_layers_of_several_formats_are_one_file(dense, stock, tmp_path):
    overrides = {"ff": target_config("comfyui:int8"), "norm": target_config("comfyui:fp8"), "to_out": None}
    config = target_config("comfyui:nvfp4", overrides=overrides)
    folder = quantize(dense("flux"), config, tmp_path / "mixed", dtype=torch.float32)
    model = stock("flux", export_comfy(folder, tmp_path / "mixed.safetensors"))
    ours, theirs = run(host.part("loader").load_model(folder), "flux"), run(model, "flux")
    assert rms(ours - theirs) < 0.02 * rms(theirs)
    kinds = {m.quant_format for m in model.model.diffusion_model.modules() if getattr(m, "quant_format", None)}
    assert kinds == {"nvfp4", "int8_tensorwise", "float8_e4m3fn"}
