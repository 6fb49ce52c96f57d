"""A node pack without nodes for the tests: lets ComfyUI recognise the tiny models, whose sizes it takes for granted."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from comfy_api.latest import ComfyExtension, io

sys.path.append(str(Path(__file__).resolve().parents[2]))


class Extension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return []


async def comfy_entrypoint() -> ComfyExtension:
    try:
        _recognise_tiny_models()
    except ImportError as error:  # where a test hides our packages
        print(f"tiny models are not recognised: {error}")
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
