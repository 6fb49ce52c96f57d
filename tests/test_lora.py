"""LoRA adapters on packed layers, through PEFT and diffusers: loaded, fused, taken out, saved."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from torch import nn

from qdiff_diffusers import AQConfig, FPConfig, QDiffConfig, QDiffError, RTNConfig, SVDQuantConfig, VQConfig
from qdiff_diffusers.layers import PackedLayer

peft = pytest.importorskip("peft")

CONFIGS = {
    "aq": lambda: AQConfig(num_codebooks=1, codebook_bits=8, vector_size=4, codebook="shared", rotation=True, effort=0),
    "vq": lambda: VQConfig(codebook_bits=4, vector_size=2, restarts=1),
    "fp": lambda: FPConfig(weight_format="nvfp4"),
    "svdquant": lambda: SVDQuantConfig(bits=4, rank=2, rounds=1),
    "rtn": lambda: RTNConfig(bits=4),
}
TARGETS = {"flux": ["to_q", "to_out.0", "proj_mlp", "x_embedder"], "sdxl_unet": ["to_q", "conv1"]}


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    for name in TARGETS:
        tiny_models.make(name).save_pretrained(root / name)
    return {name: root / name for name in TARGETS}


def load(name: str, folder: Path, config: QDiffConfig | None = None) -> nn.Module:
    return type(tiny_models.make(name)).from_pretrained(folder, quantization_config=config)


def adapter(name: str, **kwargs) -> peft.LoraConfig:
    torch.manual_seed(5)
    return peft.LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS[name], init_lora_weights=False, **kwargs)


def packed_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every packed tensor."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, PackedLayer)}
    return {f"{name}.{leaf}": tensor.clone() for name, layer in layers.items() for leaf, tensor in layer.packed_tensors().items()}


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", TARGETS)
def test_a_fused_adapter_counts_as_an_active_one_and_comes_out_exactly(name, method, folders):
    model = load(name, folders[name], CONFIGS[method]())
    base = tiny_models.run(model, name)
    model.add_adapter(adapter(name))
    active = tiny_models.run(model, name)
    assert distance(base, active) > 0.1
    stored = packed_state(model)
    model.fuse_lora()
    assert distance(tiny_models.run(model, name), active) < 1e-6
    model.unfuse_lora()
    assert packed_state(model).keys() == stored.keys()
    assert all(torch.equal(value, stored[key]) for key, value in packed_state(model).items())
    assert distance(tiny_models.run(model, name), active) < 1e-6
    model.unload_lora()
    assert distance(tiny_models.run(model, name), base) < 1e-6


@pytest.mark.parametrize("name", TARGETS)
def test_a_fused_adapter_is_saved_with_the_model(name, folders, tmp_path):
    model = load(name, folders[name], SVDQuantConfig(bits=4, rank=2, rounds=1))
    model.add_adapter(adapter(name))
    model.fuse_lora(lora_scale=0.5)
    fused = tiny_models.run(model, name)
    model.unload_lora()
    model.save_pretrained(tmp_path)
    reloaded = load(name, tmp_path)
    assert distance(tiny_models.run(reloaded, name), fused) < 1e-6
    ranks = {layer.spec.rank for layer in reloaded.modules() if isinstance(layer, PackedLayer)}
    assert {2, 6} <= ranks


def test_two_adapters_are_fused_and_taken_out_one_after_the_other(folders):
    model = load("flux", folders["flux"], RTNConfig(bits=4))
    model.add_adapter(adapter("flux"), adapter_name="a")
    model.add_adapter(adapter("flux"), adapter_name="b")
    model.set_adapters(["a", "b"], [0.7, 0.3])
    active = tiny_models.run(model, "flux")
    model.fuse_lora()
    assert distance(tiny_models.run(model, "flux"), active) < 1e-6
    model.unfuse_lora()
    assert distance(tiny_models.run(model, "flux"), active) < 1e-6


def test_an_adapter_that_is_only_loaded_is_left_out_of_the_saved_model(folders, tmp_path):
    model = load("flux", folders["flux"], RTNConfig(bits=4))
    base = tiny_models.run(model, "flux")
    model.add_adapter(adapter("flux"))
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny_models.run(load("flux", tmp_path), "flux"), base)


def test_fusing_a_variant_of_lora_is_refused_with_a_way_out(folders):
    model = load("flux", folders["flux"], RTNConfig(bits=4))
    model.add_adapter(adapter("flux", use_dora=True))
    with pytest.raises(QDiffError, match=r"no plain LoRA .* without fuse_lora"):
        model.fuse_lora()


def test_a_broken_adapter_is_not_fused(folders):
    model = load("flux", folders["flux"], RTNConfig(bits=4))
    model.add_adapter(adapter("flux"))
    model.transformer_blocks[0].attn.to_q.lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(QDiffError, match="NaN"):
        model.fuse_lora()
    assert model.transformer_blocks[0].attn.to_q.base_layer.spec.rank == 0


def test_adapters_are_trained_on_a_quantized_model(folders):
    model = load("flux", folders["flux"], RTNConfig(bits=4))
    model.requires_grad_(False)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS["flux"]))
    model(**tiny_models.flux_inputs()).sample.square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 10
    assert all(p.grad is not None for p in trained)


def flux_pipeline(folder: Path, config: QDiffConfig | None = None):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    return FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), transformer=load("flux", folder, config), **parts)


def saved_adapter(folder: Path, base: Path) -> Path:
    from diffusers import FluxPipeline

    dense = load("flux", base)
    dense.add_adapter(adapter("flux"))
    FluxPipeline.save_lora_weights(folder, transformer_lora_layers=peft.utils.get_peft_model_state_dict(dense))
    return folder


def test_a_flux_pipeline_loads_switches_and_unloads_an_adapter_file(folders, tmp_path):
    file = saved_adapter(tmp_path, folders["flux"])
    results = []
    for config in (None, RTNConfig(bits=8)):
        pipe = flux_pipeline(folders["flux"], config)
        outputs = [tiny_models.run(pipe.transformer, "flux")]
        pipe.load_lora_weights(file, adapter_name="a")
        outputs.append(tiny_models.run(pipe.transformer, "flux"))
        pipe.set_adapters(["a"], [0.5])
        outputs.append(tiny_models.run(pipe.transformer, "flux"))
        pipe.unload_lora_weights()
        outputs.append(tiny_models.run(pipe.transformer, "flux"))
        results.append(outputs)
    assert all(distance(packed, dense) < 0.02 for dense, packed in zip(*results, strict=True))


def test_importing_the_package_does_not_import_peft():
    code = "import sys, qdiff_diffusers; sys.exit('peft' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
