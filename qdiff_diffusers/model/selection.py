"""Which layers of a model to quantize."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from diffusers.utils import logging
from torch import nn

from ..config import METHODS, QDiffConfig
from ..errors import ConfigError
from ..layers import unsupported_reason
from ..methods import method_of
from ..methods.base import DENSE_BITS
from ..methods.targets import TARGETS
from .bit_allocation import spread_by_kind
from .fused import check_fused, measured_layers
from .patterns import check_patterns

logger = logging.get_logger(__name__)

WEIGHTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Embedding)


def select_layers(model: nn.Module, config: QDiffConfig, keep: list[str]) -> tuple[dict[str, QDiffConfig], dict[str, str]]:
    """Choose the layers to pack.

    Args:
        model: the model; its weights may be on the meta device, only shapes matter.
        config: settings, with skip patterns and overrides.
        keep: parts of module names that the model class keeps in float32.

    Returns:
        ``{module name: config}`` for the layers to pack and ``{module name: reason}`` for those left as they are.

    Raises:
        ConfigError: names the first layer whose shape cannot be quantized as its config asks.
    """
    targets: dict[str, QDiffConfig] = {}
    skipped: dict[str, str] = {}
    inside = _inside_blocks(model)
    measured = measured_layers(model) if any(one.target for one in config.with_overrides()) else set()
    for name, module in model.named_modules():
        if not isinstance(module, WEIGHTED):
            continue
        layer_config = config.config_for(name)
        if reason := unsupported_reason(module):
            skipped[name] = reason
        elif layer_config is None:
            skipped[name] = "named in modules_to_not_convert or overrides"
        elif layer_config.target and (reason := _has_no_place(layer_config.target, module, name in measured)):
            skipped[name] = reason
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
    targets = spread_by_kind(targets, shapes)
    check_layers(targets, shapes)
    if any(target.target for target in targets.values()):
        check_fused(model, targets)
    modules = dict(model.named_modules())
    layers = [name for name, module in modules.items() if isinstance(module, WEIGHTED)]
    check_patterns(config, modules, layers, type(model).__name__)
    return targets, skipped


def _has_no_place(target: str, module: nn.Module, is_measured: bool) -> str | None:
    """Why another program's format has no place for a module; ``None`` if it has."""
    if isinstance(module, nn.Embedding):
        return "ComfyUI quantizes linear layers only"
    return TARGETS[target].reason_to_skip(target, tuple(module.weight.shape), is_measured)  # type: ignore[union-attr, arg-type]


def check_layers(targets: Mapping[str, QDiffConfig], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check from shapes alone that each layer can be quantized as its config asks.

    Raises:
        ConfigError: names the first layer that cannot.
    """
    seen: set[tuple[int, tuple[int, ...]]] = set()
    large = []
    for name, config in targets.items():
        if (id(config), shapes[name]) in seen:
            continue
        seen.add((id(config), shapes[name]))
        method = method_of(config)
        try:
            method.check_layer(config, shapes[name])
            bits = method.stored_bits(config, shapes[name])
        except ValueError as error:
            raise ConfigError(f"layer {name} {list(shapes[name])}: {type(config).__name__}: {error}") from error
        if bits > DENSE_BITS:
            large.append(f"{name} {list(shapes[name])} ({bits:.1f})")
    if large:
        logger.warning(
            f"qdiff: {len(large)} shapes of layers take more than the {DENSE_BITS} bits per weight that they have now, such as "
            f"{large[0]}; smaller codebooks or a lower rank suit them, or modules_to_not_convert"
        )


def _inside_blocks(model: nn.Module) -> set[str]:
    """Names of the modules inside an ``nn.ModuleList``, where diffusers' models keep their repeated blocks.

    What is left outside are the embedders, the modulation shared by all blocks, the first and the last layers: few weights,
    used once per step, and the ones whose errors no later block corrects.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    return {name for name, _ in model.named_modules() if any(name.startswith(f"{parent}.") for parent in lists)}
