"""ComfyUI's dynamic VRAM with packed models, as far as it goes without a GPU.

It is ComfyUI's own code, on the CPU: what keeps track of pinned memory, which needs a GPU, is replaced by nothing. Not tried: the
transfers themselves, and the memory that aimdo reserves on the GPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from comfyui import host
from comfyui.models_folder import native_tensors
from comfyui.test_patches import TOLERANCE, control_lora, models, patches_of, peft_lora, run, run_nothing, with_lora
from comfyui.tiny_families import CONTEXT, IMAGE, POOLED, TINY

from qdiff_diffusers import RTNConfig

__all__ = ["models"]  # a fixture
CPU = torch.device("cpu")
FORCED = 16 * 1024  # bytes; smaller modules are not streamed but loaded at once


@pytest.fixture
def dynamic(monkeypatch):
    """The class of ComfyUI's dynamic patchers, which declines CPUs otherwise."""
    host.pack()
    import comfy.model_patcher

    if not hasattr(comfy.model_patcher, "ModelPatcherDynamic"):
        pytest.skip("this ComfyUI has no dynamic VRAM")
    buffers = pytest.importorskip("comfy_aimdo.host_buffer")
    kind = comfy.model_patcher.ModelPatcherDynamic
    monkeypatch.setattr(buffers, "HostBuffer", lambda *args: SimpleNamespace(size=0))
    monkeypatch.setattr(kind, "__new__", lambda cls, *args, **kwargs: object.__new__(cls))
    return kind


@pytest.fixture
def flux(models, dynamic):
    """The packed model with a dynamic patcher, and stock ComfyUI's with the same weights decoded."""
    packed, stock = models("flux")
    patcher = host.part("patches").adopt(dynamic(packed.model, CPU, CPU))
    patcher.cached_patcher_init = packed.cached_patcher_init
    return patcher, stock


def output(model):
    model.load(CPU)
    return TINY["flux"].native(model.model.diffusion_model)


@torch.no_grad()
def test_weights_are_used_as_they_are_and_loras_stay_beside_them(flux):
    patcher, stock = flux
    before, wanted = run(stock, "flux"), run(with_lora(stock, peft_lora("flux"), 0.8), "flux")
    patched = with_lora(patcher, peft_lora("flux"), 0.8)
    assert patched.is_dynamic()
    sizes = [weight.nbytes for weight in host.part("loader").packed_weights(patcher).values()]
    assert min(sizes) < FORCED < max(sizes)  # both ways of loading occur
    assert (output(patcher) - before).abs().max() < TOLERANCE
    assert (output(patched) - wanted).abs().max() < TOLERANCE
    assert (output(patcher) - before).abs().max() < TOLERANCE


@torch.no_grad()
def test_small_weights_stay_packed_and_keep_their_loras(flux):
    """ComfyUI decodes weights that it loads at once; patches that are held back from it have to reach those too."""
    patcher, _ = flux
    packed, patched = host.part("loader").packed_weights(patcher), with_lora(patcher, peft_lora("flux"), 0.8)
    patched.load(CPU)
    assert set(host.part("loader").packed_weights(patched)) == set(packed)
    assert len(patches_of(patched)) == sum(f"diffusion_model.{name}.weight" in patched.patches for name in packed)


@torch.no_grad()
def test_a_control_lora_widens_a_packed_layer(flux):
    patcher, stock = flux
    before = output(patcher)
    patched = with_lora(patcher, control_lora(), 0.8)
    stock = with_lora(stock, control_lora(), 0.8)
    wanted = run_wide(stock, load=run_nothing)
    assert (run_wide(patched) - wanted).abs().max() < TOLERANCE
    assert torch.equal(output(patcher), before)
    assert (run_wide(patched) - wanted).abs().max() < TOLERANCE


def run_wide(model, load=lambda model: model.load(CPU)):
    """The projection and all that follows, with twice as many channels as the model has been made for."""
    load(model)
    image = torch.cat([IMAGE, IMAGE.flip(-1)], 1)
    return model.model.diffusion_model(image, torch.tensor([0.7]), CONTEXT, POOLED, guidance=torch.tensor([3.5]))


@torch.no_grad()
def test_a_copy_without_dynamic_vram_keeps_loras_beside_packed_weights(flux):
    """Nodes that compile, and LoRAs scheduled by hooks, ask for one."""
    patcher, stock = flux
    static = with_lora(patcher, peft_lora("flux"), 0.8).clone(disable_dynamic=True)
    assert not static.is_dynamic() and static.model is not patcher.model
    wanted = run(with_lora(stock, peft_lora("flux"), 0.8), "flux")
    assert (run(static, "flux") - wanted).abs().max() < TOLERANCE
    assert len(host.part("loader").packed_weights(static)) == len(host.part("loader").packed_weights(patcher))
    assert len(patches_of(static)) > 10 and not patches_of(patcher)


@torch.no_grad()
def test_a_model_quantized_in_the_graph_can_be_copied_too(dynamic, dense, tiny, monkeypatch):
    tiny("flux")
    import comfy.model_patcher
    import comfy.sd

    stock = comfy.sd.load_diffusion_model_state_dict(native_tensors(dense("flux"), "flux"), model_options={"dtype": torch.float32})
    monkeypatch.setattr(comfy.model_patcher, "CoreModelPatcher", dynamic)
    packed = host.part("quantize").quantize_model(stock, RTNConfig(bits=4, group_size=32))
    assert packed.is_dynamic()
    static = packed.clone(disable_dynamic=True)
    assert not static.is_dynamic() and static.get_attachment("qdiff") is packed.get_attachment("qdiff")
    assert (run(static, "flux") - output(packed)).abs().max() < TOLERANCE
    patched = run(with_lora(static, peft_lora("flux"), 0.8), "flux")
    assert (patched - output(packed)).abs().max() > 100 * TOLERANCE


@torch.no_grad()
def test_a_streamed_weight_is_the_same_in_the_buffer_it_is_copied_to(models):
    """What ComfyUI does for every layer: it asks for the size, copies weight and bias into one buffer and reads them there."""
    packed, _ = models("flux")
    memory = pytest.importorskip("comfy.memory_management")
    import comfy.model_management

    if not hasattr(comfy.model_management, "cast_to_gathered"):
        pytest.skip("this ComfyUI does not stream weights")
    for name, weight in host.part("loader").packed_weights(packed).items():
        tensors = [weight, packed.model.diffusion_model.get_submodule(name).bias]
        size = memory.vram_aligned_size(tensors)
        assert weight.nbytes <= size < weight.nbytes + 8192
        buffer = torch.zeros(size, dtype=torch.uint8)
        comfy.model_management.cast_to_gathered(tensors, buffer)
        copy, bias = memory.interpret_gathered_like(tensors, buffer)
        assert copy._qdata.untyped_storage().data_ptr() == buffer.untyped_storage().data_ptr()
        assert torch.equal(copy.dequantize(), weight.dequantize())
        assert bias is None or torch.equal(bias, tensors[1])
