"""Settings that make layers another program stores exactly: ``qdiff quantize --for comfyui:nvfp4`` and the like."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import ConfigError
from .base import METHODS

if TYPE_CHECKING:
    from .config import QDiffConfig

COMFYUI = "comfyui:"
SCALE = "tensor_scale"  # which several layers may have in common
FOREIGN = ("rotation", "smoothing", "adaln_w4a16", "unsigned", "outer_bits")  # settings that make other layers
POWER = "power"  # of a tensor's scale: a power of two, which bfloat16 holds exactly too


class Target(NamedTuple):
    """A format of another program.

    Attributes:
        method, settings: the config whose layers the format holds number by number.
        inputs: the activations besides 16 bits that the other program has.
        columns: number that a layer's input channels must be a multiple of.
        packed: whether it stores a weight in another shape, several numbers in one.
        padded: the number to whose multiples it pads rows and columns.
    """

    method: str
    settings: Mapping[str, Any]
    inputs: str | None
    columns: int = 1
    packed: bool = False
    padded: int = 1

    def reason_to_skip(self, name: str, shape: tuple[int, ...], is_measured: bool) -> str | None:
        """Why the format ``name`` has no place for a weight of this shape; ``None`` if it has.

        Args:
            name: of the target.
            shape: of the weight.
            is_measured: whether by the stored shape ComfyUI tells what model it has.
        """
        if len(shape) != 2:
            return "ComfyUI quantizes linear layers only"
        if shape[1] % self.columns:
            return f"{name} needs multiples of {self.columns} input channels"
        if is_measured and (self.packed or any(size % self.padded for size in shape)):
            return "ComfyUI tells by its shape what model it has"
        return None


ROTATED = {"group_size": "row", "rank": 0, "rotation": "regular"}
TARGETS: dict[str, Target] = {
    f"{COMFYUI}{name}": target
    for name, target in {
        "fp8": Target(
            "fp",
            {
                "weight_format": "e4m3",
                "group_size": "tensor",
                "scale_dtype": "float32",
                "tensor_scale": POWER,
                "unbiased": False,
            },
            "fp8",
        ),
        "nvfp4": Target("fp", {"weight_format": "nvfp4", "tensor_scale": POWER, "unbiased": False}, None, packed=True, padded=16),
        "mxfp8": Target("fp", {"weight_format": "mxfp8"}, "fp8", padded=32),
        "int8": Target("svdquant", {"weight_format": "int8", "group_size": "row", "rank": 0, "activations": "int8"}, "int8"),
        "int8_convrot": Target("svdquant", {"weight_format": "e1m6", **ROTATED, "activations": "int8"}, "int8"),
        "convrot_w4a4": Target(
            "svdquant", {"weight_format": "e1m2", **ROTATED, "activations": "int4"}, "int4", columns=64, packed=True
        ),
    }.items()
}


def check_target(name: str) -> Target:
    """The target with this name.

    Raises:
        ConfigError: there is none.
    """
    if not isinstance(name, str) or name not in TARGETS:
        raise ConfigError(f"target must be one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


def check_settings(config: QDiffConfig) -> None:
    """Make sure that a config with a target makes layers that the target holds.

    Raises:
        ConfigError: the target is unknown, or the config has other settings.
    """
    if config.target is None:
        return
    target, name = check_target(config.target), f"{type(config).__name__}: target {config.target!r}"
    given = {key: getattr(config, key, None) for key in target.settings.keys() - {"activations", SCALE}}
    if config.method != target.method or any(value != target.settings[key] for key, value in given.items()):
        raise ConfigError(
            f"{name} goes with the settings that target_config makes; make the config with target_config({config.target!r})"
        )
    if extra := [key for key in FOREIGN if key not in target.settings and getattr(config, key, None)]:
        raise ConfigError(f"{name} has no place for {' and '.join(extra)}; leave it out")
    if config.activations not in (None, target.inputs):
        allowed = "None" if target.inputs is None else f"None or {target.inputs!r}"
        raise ConfigError(f"{name}: activations must be {allowed}, got {config.activations!r}")
    if config.activation_scales != "token" and (config.target, config.activation_scales) != (f"{COMFYUI}fp8", "static"):
        raise ConfigError(f"{name} has no place for activation_scales={config.activation_scales!r}")
    if other := [pattern for pattern, one in (config.overrides or {}).items() if one is not None and one.target is None]:
        raise ConfigError(f"{name}: overrides[{other[0]!r}] must be None, or have a target too, as target_config makes it")


def target_config(name: str, **options: Any) -> QDiffConfig:
    """The config whose layers another program's format holds exactly.

    Args:
        name: a key of :data:`TARGETS`, such as "comfyui:nvfp4".
        options: further settings, such as ``modules_to_not_convert``; those that the format fixes cannot be among them.

    Raises:
        ConfigError: the target is unknown, or an option is one that it fixes.
    """
    target = check_target(name)
    fixed = {*target.settings, "method", "bits"} - {"activations"}
    if taken := sorted(fixed & options.keys()):
        raise ConfigError(f"{name} fixes {', '.join(taken)}; leave it out, or quantize without a target")
    return METHODS[target.method].config(**{**target.settings, **options, "target": name})
