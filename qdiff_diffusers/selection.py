"""Which layers of a model to quantize."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .budget import spread_by_kind
from .config import METHODS, QDiffConfig
from .layers import unsupported_reason
from .methods import method_of

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Embedding)


def select_layers(model: nn.Module, config: QDiffConfig, keep: list[str]) -> tuple[dict[str, QDiffConfig], dict[str, str]]:
    """Choose the layers to pack.

    Args:
        model: the model's skeleton.
        config: with its skip patterns and overrides.
        keep: name parts that the model class itself wants in float32.

    Returns:
        ``{module name: config}`` for the layers to pack and ``{module name: reason}`` for those left as they are.
    """
    targets: dict[str, QDiffConfig] = {}
    skipped: dict[str, str] = {}
    inside = _inside_blocks(model)
    for name, module in model.named_modules():
        if not isinstance(module, WEIGHTED):
            continue
        layer_config = config.config_for(name)
        if reason := unsupported_reason(module):
            skipped[name] = reason
        elif layer_config is None:
            skipped[name] = "named in modules_to_not_convert or overrides"
        elif isinstance(module, nn.Embedding):
            # A table is no product: it takes no time, and is worth its errors only where it is large. See docs/text_encoders.md.
            if layer_config is config:
                skipped[name] = "an embedding that overrides does not name"
            else:
                targets[name] = replace(layer_config, activations=None, activation_scales="token", unsigned=False)
        elif any(part in name.split(".") for part in keep):
            skipped[name] = "kept in float32 by the model class"
        elif config.keep_outer_layers and layer_config is config and name not in inside:
            if config.outer_bits:
                targets[name] = METHODS["rtn"](bits=config.outer_bits)  # type: ignore[call-arg]
            else:
                skipped[name] = "outside the repeated blocks"
        else:
            targets[name] = method_of(layer_config).for_module(layer_config, model, name)
    shapes = {name: tuple(module.weight.shape) for name, module in model.named_modules() if name in targets}  # type: ignore[union-attr, arg-type]
    return spread_by_kind(targets, shapes), skipped


def _inside_blocks(model: nn.Module) -> set[str]:
    """Names of the modules inside an ``nn.ModuleList``, where diffusers' models keep their repeated blocks.

    What is left outside are the embedders, the modulation shared by all blocks, the first and the last layers: few weights,
    used once per step, and the ones whose errors no later block corrects.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {name for name, _ in model.named_modules() if any(name.startswith(f"{parent}.") for parent in lists)}
