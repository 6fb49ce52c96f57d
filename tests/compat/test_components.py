"""What is attached to a quantized model: ControlNets, IP-Adapters, LoRA, attention backends, parallelism."""

from __future__ import annotations

import importlib
import pkgutil
from copy import deepcopy

import diffusers.models
import diffusers.pipelines
import pytest
import tiny_models
import torch
from compat.conftest import METHODS, distance
from diffusers import (
    ControlNetModel,
    ControlNetXSAdapter,
    FluxControlNetModel,
    MotionAdapter,
    UNet2DConditionModel,
    UNetControlNetXSModel,
    UNetMotionModel,
)
from torch import nn

from qdiff_diffusers.integrations.controlnets import OTHER_CONSTRUCTORS, copies


def run(model: nn.Module, **more) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(**tiny_models.flux_inputs(), **more, return_dict=False)[0]


SMALL = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2}


def control_inputs() -> dict:
    torch.manual_seed(1)
    return tiny_models.flux_inputs() | {"controlnet_cond": torch.randn(1, 16, 4)}


@pytest.mark.row("ControlNet on a quantized base")
def test_controlnet(load, tmp_path, method):
    """Both parts quantized; the ControlNet's samples go into the base."""
    torch.manual_seed(0)
    dense = FluxControlNetModel(in_channels=4, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), **SMALL)
    for block in dense.controlnet_blocks:
        nn.init.normal_(block.weight, std=0.1)
    dense.save_pretrained(tmp_path)
    model, controlnet = load(), FluxControlNetModel.from_pretrained(tmp_path, quantization_config=METHODS[method]())
    with torch.no_grad():
        samples, single_samples = controlnet(**control_inputs(), return_dict=False)
        exact, _ = dense(**control_inputs(), return_dict=False)
    assert distance(samples[0], exact[0]) < 0.7
    output = run(model, controlnet_block_samples=samples, controlnet_single_block_samples=single_samples)
    assert distance(output, run(model)) > 1e-3


@pytest.mark.row("ControlNet from a quantized base")
def test_controlnet_from_transformer(load):
    """A new ControlNet starts as a copy of the base's blocks: of what they are equivalent to, if they are packed."""
    model = load()
    controlnet = FluxControlNetModel.from_transformer(model, **SMALL)
    copied = controlnet.transformer_blocks[0].attn.to_q
    assert type(copied) is nn.Linear
    assert torch.allclose(copied.weight, model.transformer_blocks[0].attn.to_q.weight)
    assert "quantization_config" not in controlnet.config
    assert model.transformer_blocks[0].attn.to_q.codes is not None


@pytest.mark.row("ControlNet from a quantized UNet")
def test_controlnet_from_unet(load):
    model = load("sdxl_unet")
    controlnet = ControlNetModel.from_unet(model)
    copied = controlnet.down_blocks[0].resnets[0].conv1
    assert torch.allclose(copied.weight, model.down_blocks[0].resnets[0].conv1.weight)


def ip_adapter(model: nn.Module) -> dict:
    from diffusers.models.embeddings import ImageProjection
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    torch.manual_seed(2)
    width = model.config.num_attention_heads * model.config.attention_head_dim
    attention = FluxIPAdapterAttnProcessor(hidden_size=width, cross_attention_dim=32, scale=1.0).state_dict()
    image = ImageProjection(cross_attention_dim=32, image_embed_dim=32, num_image_text_embeds=4).state_dict()
    names = [name for name in model.attn_processors if not name.startswith("single")]
    leaves = ("to_k_ip", "to_v_ip")
    kinds = ("weight", "bias")
    return {
        "image_proj": {k.replace("image_embeds", "proj"): v for k, v in image.items()},
        "ip_adapter": {f"{i}.{n}.{k}": attention[f"{n}.0.{k}"] for i in range(len(names)) for n in leaves for k in kinds},
    }


@pytest.mark.row("IP-Adapter")
def test_ip_adapter(load):
    model = load()
    before = run(model)
    model._load_ip_adapter_weights([ip_adapter(model)])
    embedding = {"ip_adapter_image_embeds": [torch.randn(1, 1, 32)]}
    assert distance(run(model, joint_attention_kwargs=embedding), before) > 1e-3
    set_scale(model, 0.0)
    assert torch.allclose(run(model, joint_attention_kwargs=embedding), before, atol=1e-5)


def set_scale(model: nn.Module, scale: float) -> None:
    for processor in model.attn_processors.values():
        if hasattr(processor, "to_k_ip"):
            processor.scale = [scale]


def unet_ip_adapter(model: nn.Module) -> dict:
    """Weights for every cross-attention, whose width is 32 throughout; the files number them 1, 3, 5, ..."""
    from diffusers.models.embeddings import ImageProjection

    torch.manual_seed(2)
    image = ImageProjection(cross_attention_dim=32, image_embed_dim=32, num_image_text_embeds=4).state_dict()
    crossing = [name for name in model.attn_processors if name.endswith("attn2.processor")]
    return {
        "image_proj": {key.replace("image_embeds", "proj"): value for key, value in image.items()},
        "ip_adapter": {
            f"{2 * i + 1}.{leaf}.weight": torch.randn(32, 32) for i in range(len(crossing)) for leaf in ("to_k_ip", "to_v_ip")
        },
    }


@pytest.mark.row("IP-Adapter on a UNet")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_unet_ip_adapter(load, dtype):
    model = load("sdxl_unet", dtype=dtype)
    inputs = {k: v.to(dtype) if k in ("sample", "encoder_hidden_states") else v for k, v in tiny_models.sdxl_unet_inputs().items()}

    @torch.no_grad()
    def output(**more: list[torch.Tensor]) -> torch.Tensor:
        return model(**inputs | {"added_cond_kwargs": inputs["added_cond_kwargs"] | more}, return_dict=False)[0]

    before = output()
    model._load_ip_adapter_weights([unet_ip_adapter(model)])
    embedding = [torch.randn(1, 1, 32, dtype=dtype)]
    assert distance(output(image_embeds=embedding), before) > 1e-3
    set_scale(model, 0.0)
    assert torch.allclose(output(image_embeds=embedding), before, atol=1e-5)


@pytest.mark.row("fuse_qkv_projections")
def test_fused_projections(load, note):
    model = load()
    expected = run(model)
    model.fuse_qkv_projections()
    note("the fused projections are dense copies without activation quantization, and cost memory")
    assert distance(run(model), expected) < 0.05
    model.unfuse_qkv_projections()
    assert torch.equal(run(model), expected)


@pytest.mark.row("set_attention_backend")
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_attention_backend(load, backend):
    model = load()
    expected = run(model)
    model.set_attention_backend(backend)
    try:
        assert torch.allclose(run(model), expected, atol=1e-5)
    finally:
        model.reset_attention_backend()


@pytest.mark.row("tensor parallel")
def test_tensor_parallel(load, refuses):
    from diffusers.hooks.tensor_parallel import _check_tp_supported

    model = load()
    with refuses("quantiz", (ValueError, NotImplementedError)):
        _check_tp_supported(type(model).__name__, {"transformer_blocks.*.attn.to_q": "colwise"}, 2, _Config(), model=model)


class _Config:
    tp_degree = 1
    mesh = None


def add_lora(model: nn.Module, beside: str = "proj_mlp") -> None:
    """A random adapter on the queries and one more kind of layer."""
    peft = pytest.importorskip("peft")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", beside], init_lora_weights=False))


@pytest.mark.row("LoRA: load, switch, unload")
@pytest.mark.parametrize("name", ["flux", "sdxl_unet"])
def test_lora(load, name):
    model = load(name)
    before = tiny_models.run(model, name)
    add_lora(model, {"flux": "proj_mlp", "sdxl_unet": "conv1"}[name])
    active = tiny_models.run(model, name)
    assert distance(active, before) > 1e-2
    model.disable_adapters()
    assert torch.allclose(tiny_models.run(model, name), before, atol=1e-5)
    model.enable_adapters()
    assert torch.allclose(tiny_models.run(model, name), active, atol=1e-5)
    model.unload_lora()
    assert torch.allclose(tiny_models.run(model, name), before, atol=1e-5)


@pytest.mark.row("LoRA: fuse, unfuse, save")
def test_fused_lora(load, tmp_path):
    model = load()
    add_lora(model)
    active = run(model)
    model.fuse_lora()
    assert distance(run(model), active) < 1e-2  # a last bit may flip a level of 4-bit activations
    model.save_pretrained(tmp_path)
    assert distance(run(type(model).from_pretrained(tmp_path)), active) < 1e-2
    model.unfuse_lora()
    assert distance(run(model), active) < 1e-2


@pytest.mark.row("save_lora_adapter, load_lora_adapter")
def test_lora_file(load, tmp_path):
    model = load()
    add_lora(model)
    active = run(model)
    model.save_lora_adapter(tmp_path)
    other = load()
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert torch.allclose(run(other), active, atol=1e-5)


@pytest.mark.row("feature caching")
def test_first_block_cache(load):
    from diffusers import FirstBlockCacheConfig

    model = load()
    expected = run(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    with model.cache_context("cond"):
        assert torch.allclose(run(model), expected, atol=1e-5)


def test_every_constructor_that_copies_a_model_is_covered():
    """Found by a walk over diffusers; a newer one gets the same treatment. Those that copy nothing are named here."""
    seen, copying, others = set(), set(), set()
    for module in modules_of(diffusers.models, diffusers.pipelines):
        for kind in vars(module).values():
            if not isinstance(kind, type) or not kind.__module__.startswith("diffusers.") or kind in seen:
                continue
            seen.add(kind)
            for name, method in vars(kind).items():
                if name.startswith("from_") and name not in OTHER_CONSTRUCTORS and isinstance(method, classmethod):
                    (copying if copies(name, method) else others).add(f"{kind.__name__}.{name}")
                    assert copies(name, method) == hasattr(method.__func__, "of_qdiff"), (kind, name)
    assert {
        "ControlNetModel.from_unet",
        "FluxControlNetModel.from_transformer",
        "SparseControlNetModel.from_unet",
        "UNetControlNetXSModel.from_unet",
        "ControlNetXSCrossAttnDownBlock2D.from_modules",
        "UNetMotionModel.from_unet2d",
    } <= copying
    # The adapter of ControlNet-XS takes its base's sizes, Z-Image's ControlNet uses its base's modules: packed ones too.
    takes_a_model = {"ControlNetXSAdapter.from_unet", "ZImageControlNetModel.from_transformer"}
    assert {name for name in others if "unet" in name or "transformer" in name or "modules" in name} <= takes_a_model


def modules_of(*packages):
    for package in packages:
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda name: None):
            try:
                yield importlib.import_module(found.name)
            except (ImportError, RuntimeError):  # wants something that is not installed
                continue


@pytest.mark.row("AnimateDiff from a quantized UNet")
@pytest.mark.parametrize("offloaded", [False, True])
def test_motion_model_from_unet(load, offloaded, method, tmp_path):
    """Both the UNet and the motion adapter quantized; the UNet offloaded to disk or not."""
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=(32, 32), motion_layers_per_block=1, motion_norm_num_groups=8, motion_num_attention_heads=2
    )
    for parameter in adapter.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    adapter.save_pretrained(tmp_path / "adapter")
    packed_adapter = MotionAdapter.from_pretrained(tmp_path / "adapter", quantization_config=METHODS[method]())
    model = load("sdxl_unet")
    expected = motion_output(motion_model(load("sdxl_unet").dequantize(), deepcopy(packed_adapter).dequantize()))
    before = tiny_models.run(model, "sdxl_unet")
    if offloaded:
        cpu = torch.device("cpu")
        model.enable_group_offload(cpu, cpu, offload_type="leaf_level", offload_to_disk_path=str(tmp_path / "offload"))
    motion = motion_model(model, packed_adapter)
    assert "quantization_config" not in motion.config
    assert distance(motion_output(motion), expected) < 1e-5
    assert distance(tiny_models.run(model, "sdxl_unet"), before) < 1e-2
    assert model.is_quantized and packed_adapter.is_quantized


def motion_model(unet: nn.Module, adapter: nn.Module) -> nn.Module:
    """diffusers leaves one part of SDXL's time embedding random."""
    torch.manual_seed(3)
    return UNetMotionModel.from_unet2d(unet, adapter)


def motion_output(model: nn.Module) -> torch.Tensor:
    inputs = tiny_models.sdxl_unet_inputs()
    torch.manual_seed(1)
    frames = torch.randn(1, 4, 3, 8, 8)
    with torch.no_grad():
        return model.eval()(**inputs | {"sample": frames, "encoder_hidden_states": torch.ones(3, 6, 32)}, return_dict=False)[0]


@pytest.mark.row("ControlNet-XS from a quantized UNet")
def test_controlnet_xs_from_unet(cell, method, tmp_path):
    torch.manual_seed(0)
    config = tiny_models.make("sdxl_unet").config
    UNet2DConditionModel.from_config(dict(config) | {"layers_per_block": 2}).save_pretrained(tmp_path)
    model = UNet2DConditionModel.from_pretrained(tmp_path, quantization_config=METHODS[method]())
    adapter = ControlNetXSAdapter.from_unet(model, size_ratio=1)
    controlnet = UNetControlNetXSModel.from_unet(model, adapter)
    copied = controlnet.down_blocks[0].base_resnets[0].conv1
    assert type(copied) is nn.Conv2d
    assert torch.allclose(copied.weight, model.down_blocks[0].resnets[0].conv1.weight)


def test_a_constructor_that_passes_modules_on_passes_on_packed_ones(packed_folder):
    """Z-Image's ControlNet uses its base's modules, and is what is returned: neither may be copied."""
    from diffusers import ZImageControlNetModel

    controlnet, base = nn.Module(), type(tiny_models.make("flux")).from_pretrained(packed_folder("flux", "rtn"))
    for name in ("t_scale", "t_embedder", "all_x_embedder", "cap_embedder", "rope_embedder"):
        object.__setattr__(base, name, base.transformer_blocks)
    for name in ("noise_refiner", "context_refiner", "x_pad_token", "cap_pad_token"):
        object.__setattr__(base, name, base.transformer_blocks)
    assert ZImageControlNetModel.from_transformer(controlnet, base) is controlnet
    assert controlnet.noise_refiner is base.transformer_blocks
