"""Sizes that ComfyUI's detection takes for granted, replaced by those of the tiny models. The rest of it is left as it is."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import pytest
from comfyui import host
from comfyui.tiny_families import TINY

MOCHI_MLP = 384  # of the tiny model; ComfyUI's class insists on the published 12288


def recognise(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Make ComfyUI recognise one family's tiny model while the test runs. The test is skipped where ComfyUI is older than that."""
    host.pack()
    from comfy import model_base, supported_models
    from comfy.ldm.anima.model import LLMAdapter
    from comfy.ldm.genmo.joint_model.asymm_models_joint import AsymmetricJointBlock

    native = host.part("families").family_of_class(TINY[name].diffusers_class).native
    if not any(hasattr(model_base, kind) for kind in native):
        pytest.skip(f"this ComfyUI has no {native[0]}")
    recognise_config(monkeypatch, TINY[name].detected)
    monkeypatch.setattr(supported_models, "models", [*tiny_unets(supported_models), *supported_models.models])
    monkeypatch.setitem(supported_models.ZImage.unet_config, "dim", TINY["z_image"].config["dim"])
    init = AsymmetricJointBlock.__init__
    constants = tuple(MOCHI_MLP if value == 12288 else value for value in init.__code__.co_consts)
    monkeypatch.setattr(init, "__code__", init.__code__.replace(co_consts=constants))
    adapter = LLMAdapter.__init__
    monkeypatch.setattr(adapter, "__defaults__", (64, 64, 64, 1, 1, *adapter.__defaults__[5:]))  # its sizes


def recognise_config(monkeypatch: pytest.MonkeyPatch, sizes: Mapping[str, Any]) -> None:
    """Make ComfyUI's detection give these sizes instead of those that it takes for granted."""
    from comfy import model_detection, supported_models

    original = model_detection.detect_unet_config

    def detect(*args: Any, **kwargs: Any) -> Any:
        config = original(*args, **kwargs)
        return config if config is None else config | sizes

    monkeypatch.setattr(model_detection, "detect_unet_config", detect)
    for kind in supported_models.models:  # what a description adds
        for key in sizes.keys() & kind.unet_extra_config.keys():
            monkeypatch.setitem(kind.unet_extra_config, key, sizes[key])


def tiny_unets(supported_models: Any) -> list[type]:
    """Descriptions by which ComfyUI recognises the tiny UNets; the first that fits counts."""
    xl = {"model_channels": 32, "context_dim": 128, "use_linear_in_transformer": True, "adm_in_channels": 64 + 6 * 256}
    plain = {"model_channels": 32, "context_dim": 32, "use_linear_in_transformer": False, "adm_in_channels": None}
    linear = {"model_channels": 64, "context_dim": 32, "use_linear_in_transformer": True, "adm_in_channels": None}
    sizes = {
        "SDXL_instructpix2pix": xl | {"in_channels": 8},
        "SDXL": xl,
        "SD15_instructpix2pix": plain | {"in_channels": 8},
        "SD15": plain,
        "SD21UnclipL": linear | {"adm_in_channels": 96},
        "LotusD": linear | {"adm_in_channels": 4},
        "SD_X4Upscaler": linear | {"in_channels": 7},
    }
    kinds = {name: getattr(supported_models, name) for name in sizes if hasattr(supported_models, name)}
    return [
        type(f"Tiny{name}", (kind,), {"unet_config": sizes[name], "unet_extra_config": _extra(kind)})
        for name, kind in kinds.items()
    ]


def _extra(kind: type) -> dict[str, Any]:
    """What a description adds to what is detected; the upscaler's list has an entry for each of its four levels."""
    disabled = {"disable_self_attentions": [True, False]} if "disable_self_attentions" in kind.unet_extra_config else {}
    return kind.unet_extra_config | disabled


def made_by(kind: type) -> set[str]:
    """Names of the model classes that a description of ComfyUI's can make."""
    return set(re.findall(r"model_base\.(\w+)\(", inspect.getsource(kind.get_model)))
