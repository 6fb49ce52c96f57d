"""Layers that ComfyUI has as one weight, and the one scale that they then share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..checkpoint.comfy_pack import families, native_family
from ..config import QDiffConfig
from ..errors import ConfigError
from ..methods.fp import formats_for, power_scale
from ..methods.targets import POWER

WEIGHT = ".weight"


def fused_layers(model: nn.Module) -> list[list[str]]:
    """The groups of linear layers of a model that are one weight in ComfyUI's class for it.

    Raises:
        ConfigError: ComfyUI has no class for it.
    """
    _, natives = native_weights(model)
    return [group for group in natives.values() if len(group) > 1]


def measured_layers(model: nn.Module) -> set[str]:
    """The layers of a model by the shapes of whose weights ComfyUI tells what model it has.

    Raises:
        ConfigError: ComfyUI has no class for it.
    """
    family, natives = native_weights(model)
    return {name for key, group in natives.items() if family.is_measured(key) for name in group}


def native_weights(model: nn.Module) -> tuple[Any, dict[str, list[str]]]:
    """ComfyUI's family of a model, and the layers of which each of ComfyUI's weights consists.

    Raises:
        ConfigError: ComfyUI has no class for it.
    """
    family = native_family(type(model).__name__)
    keys = list(model.state_dict())
    natives = families().to_native(family.rules(keys), keys)
    weights = {key: parts for key, parts in natives.items() if key.endswith(WEIGHT)}
    return family, {key: [part.key.removesuffix(WEIGHT) for part in parts] for key, parts in weights.items()}


def check_fused(model: nn.Module, targets: Collection[str]) -> None:
    """Make sure that of layers which ComfyUI fuses all are quantized, or none.

    Raises:
        ConfigError: names those that are not; or ComfyUI has no class for the model.
    """
    for group in fused_layers(model):
        left = [name for name in group if name not in targets]
        if left and len(left) < len(group):
            raise ConfigError(
                f"{', '.join(left)} would stay in 16 bits, but ComfyUI has it in one weight with "
                f"{', '.join(name for name in group if name in targets)}; leave out all of them, or none"
            )


def shares_scales(config: QDiffConfig) -> bool:
    """Whether layers that ComfyUI fuses need a common scale, which only their weights tell."""
    return any(getattr(one, "tensor_scale", None) == POWER and one.target for one in config.with_overrides())


def fused_with_own_scales(model: nn.Module, targets: Mapping[str, QDiffConfig]) -> list[list[str]]:
    """The groups of layers that need a common scale and have none yet."""
    return [group for group in fused_layers(model) if all(_needs_scale(targets.get(name)) for name in group)]


def with_common_scales(model: nn.Module, targets: Mapping[str, QDiffConfig]) -> dict[str, QDiffConfig]:
    """The configs of layers, with a common scale for those that ComfyUI fuses; see :func:`shares_scales`."""
    out = dict(targets)
    if not any(map(_needs_scale, targets.values())):
        return out
    for group in fused_with_own_scales(model, targets):
        largest = max(float(model.get_submodule(name).weight.detach().abs().max()) for name in group)  # type: ignore[operator]
        config: Any = targets[group[0]]
        fmt = formats_for(config.bits, config.weight_format, config.group_size, config.scale_dtype)[0]
        scale = power_scale(largest, fmt)
        out |= {name: replace(targets[name], tensor_scale=scale) for name in group}  # type: ignore[call-arg]
    return out


def _needs_scale(config: QDiffConfig | None) -> bool:
    return config is not None and config.target is not None and getattr(config, "tensor_scale", None) == POWER
