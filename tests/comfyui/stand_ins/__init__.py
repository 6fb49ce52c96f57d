"""A node pack of stand-ins for the tests: conditioning and a decoder for tiny random models, and ComfyUI's detection of them."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import torch
from comfy_api.latest import ComfyExtension, io

sys.path.append(str(Path(__file__).resolve().parents[2]))

SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "flux": {"text": (8, 64), "pooled": (64,), "latent": (1, 16, 8, 8)},
    "sd3": {"text": (8, 64), "pooled": (64,), "latent": (1, 16, 8, 8)},
    "sdxl": {"text": (6, 32), "pooled": (32,), "latent": (1, 4, 8, 8)},
    "wan": {"text": (8, 4096), "pooled": (64,), "latent": (1, 16, 1, 8, 8)},
    "qwen": {"text": (8, 64), "pooled": (64,), "latent": (1, 16, 1, 8, 8)},
}


class StandIns(io.ComfyNode):
    """Conditioning, an empty latent and a decoder for a tiny model of one family."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="QDiffTestStandIns",
            display_name="Stand-ins (qdiff test)",
            category="qdiff/test",
            inputs=[io.Combo.Input("family", options=list(SHAPES))],
            outputs=[io.Conditioning.Output(), io.Latent.Output(), io.Vae.Output()],
        )

    @classmethod
    def execute(cls, family: str) -> io.NodeOutput:
        return io.NodeOutput(*stand_ins(family))


def stand_ins(family: str) -> tuple[Any, Any, Any]:
    """Conditioning, latent and decoder."""
    shape = SHAPES[family]
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(1, *shape["text"], generator=generator)
    pooled = torch.randn(1, *shape["pooled"], generator=generator)
    latent = {"samples": torch.zeros(shape["latent"])}
    return [[text, {"pooled_output": pooled, "guidance": 3.5}]], latent, Decoder()


class Decoder:
    """Shows three latent channels, 16 times larger."""

    def decode(self, samples: torch.Tensor) -> torch.Tensor:
        frames = samples.movedim(2, 1).flatten(0, 1) if samples.ndim == 5 else samples
        return torch.sigmoid(frames[:, :3]).repeat_interleave(16, 2).repeat_interleave(16, 3).movedim(1, -1).float()


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [StandIns]


async def comfy_entrypoint() -> ComfyExtension:
    with contextlib.suppress(ImportError):
        _recognise_tiny_models()
    return Extension()


def _recognise_tiny_models() -> None:
    """Published sizes that ComfyUI's detection takes for granted, replaced wherever a tiny model is seen."""
    import pytest
    from comfy import model_detection, supported_models
    from comfyui import detection, tiny_encoders
    from comfyui.tiny_families import TINY

    original = model_detection.detect_unet_config

    def detect(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        if config and config.get("image_model") == "qwen_image":
            return config | dict(TINY["qwen"].detected)
        return config

    model_detection.detect_unet_config = detect
    supported_models.models[:0] = detection.tiny_unets(supported_models)
    tiny_encoders.shrink(pytest.MonkeyPatch())
