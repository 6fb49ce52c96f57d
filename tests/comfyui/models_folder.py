"""A models folder with everything that the example workflows and the tests name: tiny and random."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from comfyui import conditioned, host, tiny_encoders
from comfyui.tiny_families import TINY
from safetensors.torch import load_file, save_file

from qdiff_diffusers import RTNConfig, quantize

FAMILIES = ("flux", "sd3", "sdxl", "wan", "qwen")
ODD = "große Modelle/flux (4 bit) [v2] 模型"
ELSEWHERE = "on another disk"  # in a folder that extra_model_paths.yaml names


def native_tensors(folder: Path, family: str) -> dict[str, torch.Tensor]:
    """The tensors of a dense diffusers model under ComfyUI's names."""
    families, placed = host.part("families"), host.part("loader").placed
    tensors = load_file(folder / "diffusion_pytorch_model.safetensors")
    found = families.family_of_class(TINY[family].diffusers_class)
    parts = families.to_native(found.rules(tensors), tensors)
    rows = {key: [placed(tensors[p.key], p) for p in sources] for key, sources in parts.items()}
    computed = found.computed(TINY[family].settings())
    for companion in found.beside:
        if companion.folder in TINY[family].beside:
            beside = folder.parent / companion.folder
            computed |= host.part("loader").companion_tensors(companion, beside, torch.float32)
    return computed | {key: torch.cat(values) if values[0].ndim else values[0] for key, values in rows.items()}


def fill(models: Path, dense: Callable[[str], Path], quantized: Callable[[str], Path]) -> None:
    """Write all of it."""
    import tiny_models
    from comfyui.test_patches import lora_file

    for name in ("qdiff", "diffusion_models", "loras", "text_encoders", "vae"):
        (models / name).mkdir(parents=True, exist_ok=True)
    for family in FAMILIES:
        shutil.copytree(quantized(family), models / "qdiff" / family)
        save_file(native_tensors(dense(family), family), models / "diffusion_models" / f"{family}.safetensors")
        save_file(lora_file(family), models / "loras" / f"{family}.safetensors")
    tiny_models.make("dit").save_pretrained(models.parent / "dit")
    quantize(models.parent / "dit", RTNConfig(bits=4), models / "qdiff" / "dit")
    shutil.copytree(quantized("flux"), models / "qdiff" / ODD)
    shutil.copytree(quantized("flux"), models.parent / "disk" / ELSEWHERE)
    (models.parent / "extra.yaml").write_text(f"mine:\n  base_path: {models.parent}\n  qdiff: disk\n")
    _bad_checkpoints(models / "qdiff", quantized("flux"))
    for kind in ("qdiff", "diffusion_models"):
        (models / kind / "gone.safetensors").symlink_to(models / "a file that was deleted.safetensors")
        (models / kind / "circle").symlink_to(models / kind)
    _as_the_workflows_name_it(models)


def _as_the_workflows_name_it(models: Path) -> None:
    shutil.copytree(models / "qdiff" / "flux", models / "qdiff" / "my-model-4bit")
    shutil.copy(models / "diffusion_models" / "flux.safetensors", models / "diffusion_models" / "flux1-dev.safetensors")
    shutil.copy(models / "loras" / "flux.safetensors", models / "loras" / "my-lora.safetensors")
    for name, tensors in conditioned.vaes().items():
        save_file(tensors, models / "vae" / name)
    dense = {"clip_l": "clip_l.safetensors", "t5": "t5xxl_fp16.safetensors"}
    for name in tiny_encoders.ENCODERS:
        folder, kind = models.parent / name, tiny_encoders.transformers_model(name)
        tiny_encoders.ENCODERS[name].make().save_pretrained(folder)
        packed = kind.from_pretrained(folder, dtype=torch.float32, quantization_config=RTNConfig(bits=4, group_size=16))
        packed.save_pretrained(models / "qdiff" / "text" / name)
        if name in dense:
            tensors = load_file(folder / "model.safetensors")
            prefix = "text_model." if name == "clip_l" else ""  # which published files have
            save_file({prefix + key: value for key, value in tensors.items()}, models / "text_encoders" / dense[name])
    (models / "qdiff" / "text" / "umt5" / "spiece.model").write_bytes(tiny_encoders.tokenizer_model())
    shutil.copytree(models / "qdiff" / "text" / "t5", models / "qdiff" / "t5xxl-4bit")


def _bad_checkpoints(folder: Path, good: Path) -> None:
    shutil.copytree(good, folder / "truncated")
    weights = folder / "truncated" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    shutil.copytree(good, folder / "future")
    config = json.loads((good / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (folder / "future" / "config.json").write_text(json.dumps(config))
    shutil.copytree(good, folder / "incomplete")
    config = json.loads((good / "config.json").read_text())
    config["quantization_config"]["layers"]["transformer_blocks.9.attn.to_q"] = [0, [128, 128], None]
    (folder / "incomplete" / "config.json").write_text(json.dumps(config))
    header = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "other.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    (folder / "text.safetensors").write_text("this is no safetensors file")
