"""What users get: every format that some method chooses by itself, found by asking the methods, so that none is ever missing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from ..config import QDiffConfig
from ..formats import LayerSpec
from ..methods import METHODS, method_of
from ..methods.config import ORDINARY_LAYER
from ..methods.layer import rotation_block
from . import ours

EXAMPLES: tuple[dict[str, Any], ...] = (
    {"method": "svdquant", "bits": 4, "rotation": True},
)  # what README shows beside the presets


class Default(NamedTuple):
    """A packed layer as some config makes it, with 16-bit activations.

    Attributes:
        name: of the method and of what was asked of it; several layouts of one config have their groups and rank in it.
        activations: what the method's layers may have besides "none".
        headline: whether it is what the method does when nothing is asked of it.
    """

    name: str
    spec: LayerSpec
    activations: tuple[str, ...]
    headline: bool


def default_layers(shape: tuple[int, int] = ORDINARY_LAYER) -> list[Default]:
    """Every layer ``[rows, columns]`` that a method makes at each of its widths, named formats and presets, each once."""
    unasked = {spec for method in METHODS for spec, _ in _layers({"method": method}, shape)}
    found: dict[LayerSpec, Default] = {}
    for name, settings in _settings():
        choices = METHODS[settings["method"]].config.activation_choices
        for spec, suffix in _layers(settings, shape):
            found.setdefault(spec, Default(name + suffix, spec, choices, spec in unasked))
    return list(found.values())


def _settings() -> Iterator[tuple[str, dict[str, Any]]]:
    """Settings of all configs, and what to call them."""
    for name, method in METHODS.items():
        for bits in method.config.bit_choices:
            yield f"{name} {bits:g}", {"method": name, "bits": bits}
        for named in method.named_formats:
            yield f"{name} {named}", {"method": name, "weight_format": named}
        yield name, {"method": name}
    for preset in (*ours.PRESETS.values(), *EXAMPLES):
        kind = preset.get("weight_format", preset.get("bits"))
        parts = [preset["method"], kind, preset.get("group_size"), "rotated" if preset.get("rotation") else None]
        yield " ".join(str(part) for part in parts if part is not None), preset


def _layers(settings: dict[str, Any], shape: tuple[int, int]) -> Iterator[tuple[LayerSpec, str]]:
    """The layers that one config may make, and what tells them apart if there are several."""
    config = QDiffConfig(**settings)
    layouts = method_of(config).layouts(config, shape)
    for weight_format, rank in layouts:
        suffix = f" g{weight_format.group_size} r{rank}" if len(layouts) > 1 else ""  # type: ignore[attr-defined]
        yield LayerSpec(weight_format, rank=rank, rotation=rotation_block(shape[1], config)), suffix
