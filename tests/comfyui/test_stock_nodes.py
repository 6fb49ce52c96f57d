"""ComfyUI's own nodes with packed models: samplers, ControlNet, merging, model sampling, torch.compile, saving."""

from __future__ import annotations

import pytest
import torch
from comfyui import host
from comfyui.test_patches import TOLERANCE, models, peft_lora, run, with_lora

from qdiff_diffusers import ConfigError

__all__ = ["models"]  # a fixture


SHAPES = {  # of a text, its pooled vector and the latent
    "flux": ((8, 64), 64, (1, 16, 8, 8)),
    "sd3": ((8, 4096), 128, (1, 16, 8, 8)),
    "sdxl": ((6, 128), 64, (1, 4, 8, 8)),
    "wan": ((8, 4096), 64, (1, 16, 1, 8, 8)),
    "qwen": ((8, 128), 64, (1, 16, 1, 8, 8)),
}


def conditioning(family):
    """A random text, and an empty latent."""
    generator = torch.Generator().manual_seed(0)
    (length, width), pooled, latent = SHAPES[family]
    text = torch.randn(1, length, width, generator=generator)
    extra = {"pooled_output": torch.randn(1, pooled, generator=generator), "guidance": 3.5}
    return [[text, extra]], {"samples": torch.zeros(latent)}


@torch.no_grad()
def sample(model, family, positive=None, *, sampler="euler", scheduler="simple", cfg=1.0):
    import nodes

    usual, latent = conditioning(family)
    return nodes.common_ksampler(model, 7, 2, cfg, sampler, scheduler, positive or usual, usual, latent)[0]["samples"]


@pytest.mark.parametrize("family", ["flux", "sd3", "sdxl", "wan", "qwen"])
def test_the_stock_sampler_gives_what_it_gives_with_decoded_weights(family, models):
    packed, stock = models(family)
    output, wanted = sample(packed, family), sample(stock, family)
    assert (output - wanted).abs().max() < TOLERANCE * wanted.abs().max()


@torch.no_grad()
def test_the_compare_node_samples_as_the_stock_sampler_does(models):
    packed, _ = models("flux")
    positive, latent = conditioning("flux")
    steps = []
    settings = (7, 2, 1.0, "euler", "simple", positive, positive, latent)
    output = host.part("sampling").sample_latent(packed, *settings, on_step=lambda: steps.append(1))
    assert torch.equal(output, sample(packed, "flux")) and len(steps) == 2


@pytest.mark.parametrize("sampler, scheduler", [("dpmpp_2m", "karras"), ("heun", "normal"), ("uni_pc", "sgm_uniform")])
def test_other_samplers_and_guidance_work(sampler, scheduler, models):
    packed, stock = models("sdxl")
    output, wanted = (sample(m, "sdxl", sampler=sampler, scheduler=scheduler, cfg=5.0) for m in (packed, stock))
    assert (output - wanted).abs().max() < TOLERANCE * wanted.abs().max()


def test_a_controlnet_steers_a_packed_model(models):
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.model_management
    import comfy.ops
    import nodes

    packed, stock = models("sdxl")
    settings = {k: v for k, v in stock.model.model_config.unet_config.items() if k not in ("out_channels", "dtype", "device")}
    control_model = comfy.cldm.cldm.ControlNet(**settings, hint_channels=3, operations=comfy.ops.manual_cast, dtype=torch.float32)
    torch.manual_seed(1)
    for parameter in control_model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    control = comfy.controlnet.ControlNet(control_model, load_device=comfy.model_management.get_torch_device())
    positive, _ = conditioning("sdxl")
    apply = nodes.ControlNetApplyAdvanced().apply_controlnet
    steered, _ = apply(positive, positive, control, torch.rand(1, 64, 64, 3), 0.9, 0.0, 1.0, None)
    outputs = [sample(model, "sdxl", steered) for model in (packed, stock)]
    assert (outputs[0] - outputs[1]).abs().max() < TOLERANCE * outputs[1].abs().max()
    assert (outputs[0] - sample(packed, "sdxl")).abs().max() > 100 * TOLERANCE


def test_model_sampling_nodes_act_on_packed_models(models):
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    packed, stock = models("flux")
    shifted = [ModelSamplingFlux().patch(m, max_shift=1.15, base_shift=0.5, width=512, height=512)[0] for m in (packed, stock)]
    outputs = [sample(model, "flux") for model in shifted]
    assert (outputs[0] - outputs[1]).abs().max() < TOLERANCE * outputs[1].abs().max()
    assert (outputs[0] - sample(packed, "flux")).abs().max() > 100 * TOLERANCE


@pytest.mark.parametrize("other", ["packed", "dense"])
def test_the_merge_node_mixes_decoded_weights(other, models):
    from comfy_extras.nodes_model_merging import ModelMergeSimple

    packed, stock = models("flux")
    second = with_lora(packed if other == "packed" else stock, peft_lora("flux"), 1.0)
    output = run(ModelMergeSimple().merge(packed, second, 0.4)[0], "flux")
    wanted = run(ModelMergeSimple().merge(stock, with_lora(stock, peft_lora("flux"), 1.0), 0.4)[0], "flux")
    assert (wanted - run(stock, "flux")).abs().max() > 100 * TOLERANCE
    assert (output - wanted).abs().max() < TOLERANCE


def test_the_compile_node_wraps_packed_models(models):
    """One block of it, with a backend that needs no compiler: all of the tiny Flux takes Dynamo half a minute."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    packed, _ = models("flux")
    wanted = sample(packed, "flux")
    compiled = packed.clone()
    set_torch_compile_wrapper(model=compiled, backend=backend, keys=["diffusion_model.double_blocks.0.img_mlp"])
    output = sample(compiled, "flux")
    assert graphs
    assert (output - wanted).abs().max() < TOLERANCE * wanted.abs().max()


def test_stock_save_nodes_refuse_and_name_the_one_that_can(models, tmp_path):
    from comfy_extras.nodes_model_merging import save_checkpoint

    packed, _ = models("flux")
    with pytest.raises(ConfigError, match=r"Save Quantized Model \(qdiff\)"):
        save_checkpoint(packed, filename_prefix="x", output_dir=str(tmp_path))
    assert not list(tmp_path.glob("**/*.safetensors"))
