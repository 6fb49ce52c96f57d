"""``dequantize()`` on models with adapters, hooks and casting: the errors recommend it, so everything has to go on afterwards."""

from __future__ import annotations

from pathlib import Path

import accelerate
import pytest
import tiny_models
import torch
from test_lora import CONFIGS, TARGETS, adapter, distance, load
from torch import nn

from qdiff_diffusers import QDiffError, RTNConfig
from qdiff_diffusers.layers import PackedLayer

peft = pytest.importorskip("peft")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in TARGETS:
        tiny_models.make(name).save_pretrained(root / name)
    return {name: root / name for name in TARGETS}


def flux(folders: dict[str, Path], method: str = "rtn", **kwargs) -> nn.Module:
    model = load("flux", folders["flux"], CONFIGS[method]())
    if kwargs.pop("lora", True):
        model.add_adapter(adapter("flux", **kwargs))
    return model


def run(model: nn.Module) -> torch.Tensor:
    return tiny_models.run(model, "flux")


OFFLOADS = {
    "model": lambda model, folder: accelerate.cpu_offload_with_hook(model, execution_device=CPU),
    "sequential": lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU),
    "buffers too": lambda model, folder: accelerate.cpu_offload(model, execution_device=CPU, offload_buffers=True),
    "blocks": lambda model, folder: group(model, offload_type="block_level", num_blocks_per_group=1),
    "leaves": lambda model, folder: group(model, offload_type="leaf_level"),
    "disk": lambda model, folder: group(model, offload_type="leaf_level", offload_to_disk_path=folder),
}


def group(model: nn.Module, **kwargs) -> None:
    model.enable_group_offload(onload_device=CPU, offload_device=CPU, **kwargs)


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", TARGETS)
@pytest.mark.parametrize("fused", [False, True])
def test_adapters_go_on_as_on_a_dense_model(name, method, fused, folders):
    model = load(name, folders[name], CONFIGS[method]())
    bare = tiny_models.run(model, name)
    model.add_adapter(adapter(name))
    active = tiny_models.run(model, name)
    if fused:
        model.fuse_lora()
    model.dequantize()
    assert not any(type(module).__module__.startswith("qdiff") for module in model.modules())
    assert distance(tiny_models.run(model, name), active) < 1e-3
    if not fused:
        model.fuse_lora()
        assert distance(tiny_models.run(model, name), active) < 1e-3
    model.unfuse_lora()
    assert distance(tiny_models.run(model, name), active) < 1e-3
    model.unload_lora()
    assert distance(tiny_models.run(model, name), bare) < 1e-3


@pytest.mark.parametrize("kind", OFFLOADS)
def test_an_offloaded_model_goes_on_offloaded(kind, folders, tmp_path):
    model = flux(folders, lora=False)
    expected = run(model)
    OFFLOADS[kind](model, str(tmp_path))
    model.dequantize()
    assert not any(isinstance(module, PackedLayer) for module in model.modules())
    assert distance(run(model), expected) < 1e-5
    assert distance(run(model), expected) < 1e-5


@pytest.mark.parametrize("kind", OFFLOADS)
def test_an_adapter_of_an_offloaded_model_is_fused_and_taken_out_afterwards(kind, folders, tmp_path):
    model = flux(folders)
    expected = run(model)
    OFFLOADS[kind](model, str(tmp_path))
    model.dequantize()
    for step in (model.fuse_lora, model.unfuse_lora):
        step()
        assert distance(run(model), expected) < 1e-5
        assert distance(run(model), expected) < 1e-5
    bare = flux(folders, lora=False).dequantize()
    model.unload_lora()
    assert distance(run(model), run(bare)) < 1e-5


@pytest.mark.parametrize("kind", OFFLOADS)
def test_hooks_that_were_taken_off_leave_nothing_behind(kind, folders, tmp_path):
    """accelerate and diffusers leave the layer's old bound ``forward`` on it."""
    model = flux(folders)
    expected = run(model)
    OFFLOADS[kind](model, str(tmp_path))
    run(model)
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    if hasattr(model, "_diffusers_hook"):
        model._diffusers_hook.remove_hook("group_offloading", recurse=True)
    assert distance(run(model), expected) < 1e-5
    model.dequantize()
    assert distance(run(model), expected) < 1e-5
    assert not any(tensor.is_meta for tensor in model.state_dict().values())


def test_layerwise_casting_goes_on_with_the_dense_layers(folders):
    model = flux(folders)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    expected = run(model)
    model.dequantize()
    assert model.transformer_blocks[0].attn.to_q.base_layer.weight.dtype == torch.float8_e4m3fn
    first, second = run(model), run(model)
    assert torch.equal(first, second)  # rounded from the first call on
    assert distance(first, expected) < 0.2


def test_other_adapters_can_be_fused_afterwards(folders):
    model = flux(folders, lora=False)
    model.add_adapter(peft.LoKrConfig(r=4, alpha=4, target_modules=TARGETS["flux"], init_weights=False))
    active = run(model)
    with pytest.raises(QDiffError, match=r"without fuse_lora, or dequantize"):
        model.fuse_lora()
    model.dequantize()
    model.fuse_lora()
    assert distance(run(model), active) < 1e-4


def test_a_variant_that_is_refused_can_be_fused_afterwards(folders):
    model = flux(folders, use_dora=True)
    active = run(model)
    with pytest.raises(QDiffError, match="dequantize"):
        model.fuse_lora()
    model.dequantize()
    model.fuse_lora()
    assert distance(run(model), active) < 1e-4


def test_a_replaced_forward_is_refused_before_anything_changes(folders):
    model = flux(folders)
    layer = model.transformer_blocks[0].ff.net[2]
    layer.forward = lambda x: x * 2
    with pytest.raises(QDiffError, match=r"forward of layer transformer_blocks.0.ff.net.2 has been replaced"):
        model.dequantize()
    assert model.is_quantized and isinstance(layer, PackedLayer)
    del layer.forward
    model.dequantize()


def test_an_adapter_fused_with_another_scale_is_refused_before_anything_changes(folders):
    """PEFT would take out another multiple than was put in."""
    model = flux(folders)
    model.fuse_lora()
    model.set_adapters(["default"], [0.25])
    with pytest.raises(QDiffError, match=r"scale 1, and now has 0\.25: unfuse_lora\(\) first"):
        model.dequantize()
    model.unfuse_lora()
    quarter = run(model)
    model.dequantize()
    assert distance(run(model), quarter) < 1e-5


def test_a_model_without_packed_layers_of_its_own_device_is_refused(folders):
    """A hook of a module around the layers holds their weights: nothing of theirs says where."""
    model = flux(folders, lora=False)
    accelerate.cpu_offload(model, execution_device=CPU, preload_module_classes=["FluxTransformerBlock"])
    with pytest.raises(QDiffError, match=r"is on the meta device.*remove_all_hooks"):
        model.dequantize()
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    model.dequantize()


def test_nothing_is_left_of_scales_per_timestep(folders):
    model = load("flux", folders["flux"], RTNConfig(bits=4))
    layer = model.transformer_blocks[0].attn.to_q
    model.dequantize()
    assert not {"spec", "compute_dtype", "dense_class", "codes"} & layer.__dict__.keys()
    assert not model._forward_pre_hooks
