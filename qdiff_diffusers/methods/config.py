"""What the configs of all methods share: settings, and the ``quantization_config`` that config.json carries.

Each method's own config lies in the method's file. After quantizing, a config also holds the exact spec of every packed layer, so
that a reader of the checkpoint needs no rule, only the table.
"""

from __future__ import annotations

import copy
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Annotated, Any, ClassVar, Literal

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from ..errors import CheckpointError, ConfigError
from ..formats import dtype_name
from ..formats.spec import STATIC
from .base import METHODS, method_of
from .fields import Between, check_fields
from .targets import check_settings

FORMAT_VERSION = 1
STORED = ("specs", "layers", "skipped", "provenance")  # what a checkpoint\'s config has besides settings
REGULAR = "regular"  # rotation by ConvRot's matrices
ACTIVATION_SCALES = ("token", "static", "timestep")
COMPUTE_DTYPES = ("float32", "bfloat16", "float16", "float64")
SEEDS = Between(-(1 << 62), 1 << 62)  # generators take 64 bits, and layers add to it
ORDINARY_LAYER = (3072, 3072)  # a weight matrix on which a config is tried when it is made
LONGEST_GROUP = 1 << 16  # columns; hardly a layer has longer rows
COMPLETE = "_complete_"  # marks a config that is made and checked
GroupSize = Annotated[int, Between(1, LONGEST_GROUP)] | Literal["row", "tensor"]


class QDiffMethod(str, Enum):
    """diffusers asks a config for ``quant_method.value``. All of qdiff's methods share one stored format and one name."""

    QDIFF = "qdiff"
    NUNCHAKU = "qdiff_nunchaku"  # never stored: a nunchaku_lite folder that is being loaded into our layers


def is_ours(quantization: Any) -> bool:
    """Whether a ``quantization_config``, the object or what config.json holds of it, is one of qdiff's."""
    kind = quantization.get("quant_method") if isinstance(quantization, Mapping) else getattr(quantization, "quant_method", None)
    return bool(getattr(kind, "value", kind) == QDiffMethod.QDIFF.value)


@dataclass(repr=False)
class QDiffConfig(QuantizationConfigMixin):
    """What a user asks for: settings that all methods share.

    Use :class:`AQConfig`, :class:`VQConfig`, :class:`FPConfig`, :class:`SVDQuantConfig` or :class:`RTNConfig`;
    ``QDiffConfig(method="aq", ...)`` makes one by name. A config is checked when it is made and does not change afterwards
    (``dataclasses.replace(config, bits=2)`` makes another). What becomes of a model is its :class:`~qdiff_diffusers.Quantization`.

    Args:
        bits: nominal bits per weight; each method says which it offers.
        rotation: rotate input channels by a block Hadamard matrix before quantizing; ``None``: as the method prefers. "regular": by
            the matrices of ConvRot, which ComfyUI's rotated formats have, in blocks of a power of four.
        activations: ``None`` (16-bit), "int8" or "fp8", or for SVDQuant "int4" (groups of 64) or "nvfp4" (groups of 16).
        activation_scales: scales of "int8" and "fp8" activations. "token": each token's own, found at run time. "static": one per
            layer, "timestep": one per layer and timestep, both found on a calibration, which they need.
        unsigned: let layers whose inputs are bounded below, as those after a GELU or SiLU are, shift them and quantize to unsigned
            numbers where that errs less; for "int4" activations and static scales, without rotation. Needs a calibration.
        modules_to_not_convert: substrings of module names to leave in 16 bits, besides the default ones.
        overrides: substring of a module name -> another config (or ``None`` for 16 bits) for those layers; the first match counts.
        by_kind: let ``bits`` be the mean over all layers, more for the kinds and levels whose errors the model's output shows most.
            For UNets, whose narrow levels matter most; see docs/calibration.md.
        unbiased: rescale each packed weight so that it keeps its gain, at slightly more squared error (see methods/unbias.py).
        keep_outer_layers: leave the layers outside the repeated blocks (embedders, final norm and projection) in 16 bits.
        outer_bits: 8 (or another width of RTNConfig) rounds those outer layers to nearest instead of leaving them in 16 bits.
        target: format of another program that holds these layers exactly, such as "comfyui:nvfp4"; layers that have no place there
            stay in 16 bits. Use :func:`~qdiff_diffusers.target_config`, which makes the whole config.
        compute_dtype: dtype of the model's other parameters, "bfloat16" and the like; set by loading.
        seed: seeds everything random.
    """

    method: str | None = None
    bits: float | None = None
    rotation: bool | Literal["regular"] | None = None
    activations: str | None = None
    activation_scales: Literal["token", "static", "timestep"] = "token"
    unsigned: bool = False
    modules_to_not_convert: list[str] | None = None
    overrides: dict[str, Any] | None = None
    by_kind: bool = False
    unbiased: bool = True
    keep_outer_layers: bool = True
    outer_bits: int | None = None
    target: str | None = None
    compute_dtype: str | None = None
    seed: Annotated[int, SEEDS] = 0

    quant_method: ClassVar[QDiffMethod] = QDiffMethod.QDIFF  # type: ignore[misc, assignment]
    method_name: ClassVar[str] = ""
    bit_choices: ClassVar[tuple[float, ...]] = ()
    activation_choices: ClassVar[tuple[str, ...]] = ("int8", "fp8")

    def __new__(cls, *args: Any, **kwargs: Any) -> QDiffConfig:
        if cls is QDiffConfig:
            method = args[0] if args else kwargs.get("method")
            if not isinstance(method, str) or method not in METHODS:
                raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
            cls = METHODS[method].config
        return object.__new__(cls)

    def __post_init__(self) -> None:
        self._complete(asked_for=True)

    def __setattr__(self, name: str, value: Any) -> None:
        if COMPLETE in self.__dict__:
            kind = type(self).__name__
            raise ConfigError(f"a {kind} does not change once it is made; dataclasses.replace(config, {name}=...) makes another")
        super().__setattr__(name, value)

    def _complete(self, asked_for: bool) -> None:
        """Bring settings into one spelling, and check them. What was ``asked_for`` is checked whole. Those of a model that was
        quantized once only tell how, and are not needed to read it: what an earlier release accepted must not keep it from loading.
        """
        if self.method not in (None, self.method_name):
            raise ConfigError(f"{type(self).__name__} is for method {self.method_name!r}, got {self.method!r}")
        self.method = self.method_name
        if isinstance(self.compute_dtype, torch.dtype):
            self.compute_dtype = dtype_name(self.compute_dtype)
        if self.activations == "none":
            self.activations = None
        if isinstance(self.modules_to_not_convert, str):
            self.modules_to_not_convert = [self.modules_to_not_convert]
        elif isinstance(self.modules_to_not_convert, list | tuple):
            self.modules_to_not_convert = list(self.modules_to_not_convert)  # the caller's own may change
        self._check_choices()
        if asked_for:
            check_fields(self)
        self._check()
        self._check_overrides(asked_for)
        if asked_for:
            self._check_patterns()
            self._check_method()
        self.__dict__[COMPLETE] = True

    def _check_choices(self) -> None:
        name = type(self).__name__
        if self.activations is not None and not _is_one_of(self.activations, self.activation_choices):
            choices = ", ".join(map(repr, self.activation_choices))
            raise ConfigError(f"{name}: activations must be None, {choices}, got {self.activations!r}")
        if self.bits is not None and not _is_one_of(self.bits, self.bit_choices):
            raise ConfigError(f"{name}: bits must be one of {_join(self.bit_choices)}, got {self.bits!r}")
        if self.compute_dtype is not None and not _is_one_of(self.compute_dtype, COMPUTE_DTYPES):
            raise ConfigError(f"{name}: compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {self.compute_dtype!r}")

    def _check(self) -> None:
        name = type(self).__name__
        if self.by_kind and self.bits is None:
            raise ConfigError(f"{name}: by_kind spreads a given mean over the layers; give bits too")
        for flag in ("rotation", "keep_outer_layers", "unsigned"):
            value = getattr(self, flag)
            if not (isinstance(value, bool) or (flag == "rotation" and (value is None or value == REGULAR))):
                allowed = f"True, False or {REGULAR!r}" if flag == "rotation" else "True or False"
                raise ConfigError(f"{name}: {flag} must be {allowed}, got {value!r}")
        choices = METHODS["rtn"].config.bit_choices
        if self.outer_bits is not None and (not self.keep_outer_layers or not _is_one_of(self.outer_bits, choices)):
            raise ConfigError(
                f"{name}: outer_bits must be one of {_join(choices)}, and keep_outer_layers True, "
                f"got {self.outer_bits!r} and {self.keep_outer_layers}"
            )
        if not isinstance(self.seed, int):
            raise ConfigError(f"{name}: seed must be an integer, got {self.seed!r}")
        self._check_inputs(name)

    def _check_method(self) -> None:
        """What only the method can say: whether the settings go together, and a layer of ordinary shape can be quantized so."""
        method, name = method_of(self), type(self).__name__
        check_settings(self)
        if self.by_kind and not self.bits_are_free:
            raise ConfigError(f"{name}: by_kind spreads bits over the layers, but other settings fix them here: {self._given()}")
        try:
            method.check(self)
            method.formats(self, ORDINARY_LAYER)
        except ValueError as error:
            text = str(error)
            raise ConfigError(text if text.startswith(name) else f"{name}: {text}; got {self._given()}") from error

    def _given(self) -> str:
        """The settings as a user wrote them."""
        return ", ".join(f"{key}={value!r}" for key, value in self.settings().items() if key != "method")

    def _check_inputs(self, name: str) -> None:
        if self.activation_scales not in ACTIVATION_SCALES:
            choices = ", ".join(map(repr, ACTIVATION_SCALES))
            raise ConfigError(f"{name}: activation_scales must be {choices}, got {self.activation_scales!r}")
        if self.activation_scales != "token" and self.activations not in STATIC:
            raise ConfigError(
                f'{name}: activation_scales="{self.activation_scales}" goes with activations "int8" or "fp8", '
                f"not {self.activations!r}"
            )
        if self.unsigned and self.rotation:
            raise ConfigError(f"{name}: unsigned goes without rotation, which leaves no bound below")
        if self.unsigned and self.activations != "int4" and self.activation_scales == "token":
            raise ConfigError(f'{name}: unsigned goes with activations "int4", or "int8" and "fp8" with activation_scales="static"')

    @property
    def needs_samples(self) -> bool:
        """Whether something is asked for that follows from the layers' inputs, the overrides' wishes left out."""
        return self.unsigned or self.activation_scales != "token"

    @property
    def takes_samples(self) -> bool:
        """Whether a calibration should keep some of the layers' inputs."""
        return self.needs_samples or self.has_noisy_inputs

    @property
    def has_noisy_inputs(self) -> bool:
        """Whether activations have so few bits that it matters to the choice of codes; those of 8 bits err a hundred times less."""
        return self.activations is not None and self.activations not in STATIC

    @property
    def needs_calibration(self) -> bool:
        """Whether some layer needs samples of its inputs."""
        return any(config.needs_samples for config in self.with_overrides())

    def with_overrides(self) -> list[QDiffConfig]:
        """This config and those of its overrides."""
        return [self, *(config for config in (self.overrides or {}).values() if config is not None)]

    def moves_by(self, assignments: str) -> bool:
        """Whether :class:`~qdiff_diffusers.Tuning`'s ``assignments`` mean something for this method's codes."""
        return assignments != "candidates"

    def check_uncalibrated(self) -> None:
        """Refuse to quantize by the weights alone where that cannot give what is asked for.

        Raises:
            ConfigError: names the settings.
        """
        if self.needs_calibration:
            raise ConfigError(
                f"{type(self).__name__}: static activation_scales, unsigned and smoothing are found on the layers' inputs; "
                "quantize with qdiff_diffusers.quantize(..., calibration=...) or qdiff quantize --calibrate"
            )

    def _check_patterns(self) -> None:
        for field, patterns in (("modules_to_not_convert", self.modules_to_not_convert), ("overrides", self.overrides)):
            if "" in (patterns or ()):
                raise ConfigError(f"{type(self).__name__}: {field} has an empty pattern '', which is part of every layer's name")

    def _check_overrides(self, asked_for: bool) -> None:
        name = type(self).__name__
        patterns = self.modules_to_not_convert or []
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
            raise ConfigError(f"{name}: modules_to_not_convert must be a list of parts of module names, got {patterns!r}")
        if not isinstance(self.overrides or {}, dict) or not all(isinstance(p, str) for p in self.overrides or ()):
            raise ConfigError(f"{name}: overrides must map a part of a module's name to a config, got {self.overrides!r}")
        self.overrides = {k: _as_config(k, v, asked_for) for k, v in (self.overrides or {}).items()} or None

    def config_for(self, module_name: str) -> QDiffConfig | None:
        """The config that applies to a module: itself, an override, or ``None`` if the module stays in 16 bits."""
        if any(pattern in module_name for pattern in self.modules_to_not_convert or ()):
            return None
        for pattern, config in (self.overrides or {}).items():
            if pattern in module_name:
                return config
        return self

    @property
    def bits_are_free(self) -> bool:
        """Whether other ``bits`` would make it another format: not where other settings fix the format."""
        return True

    @property
    def widths(self) -> tuple[float, ...]:
        """What one layer's ``bits`` may be where they are a mean over layers: more than half of it.

        Errors at fewer are so large that they no longer add up as the choice assumes.
        """
        return tuple(bits for bits in self.bit_choices if 2 * bits > (self.bits or 0))

    def alternatives(self) -> list[dict[str, Any]]:
        """Settings among which mixed precision may choose for one layer, what is asked for among them.

        Raises:
            ConfigError: the bits are left to other settings.
        """
        if self.bits is None or not self.bits_are_free:
            raise ConfigError(f"{type(self).__name__}: mixed precision needs bits, which other settings replace here")
        return [{"bits": bits} for bits in self.widths]

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults, JSON-able, ``method`` always among them."""
        out: dict[str, Any] = {"method": self.method}
        for f in fields(self):
            value = getattr(self, f.name)
            if value != f.default and f.name != "method":
                out[f.name] = copy.deepcopy(value)
        if self.overrides:
            out["overrides"] = {k: v and v.settings() for k, v in self.overrides.items()}
        return out

    def computing_in(self, dtype: str | None) -> QDiffConfig:
        """The same settings with another ``compute_dtype``, which loading decides."""
        changed = copy.copy(self)
        changed.__dict__["compute_dtype"] = dtype
        return changed

    def to_dict(self) -> dict[str, Any]:
        """As config.json has it before any layer is packed; see docs/format.md."""
        return {"quant_method": self.quant_method.value, "format_version": FORMAT_VERSION} | self.settings()

    to_diff_dict = to_dict  # the base class prints itself with it but does not define it

    def __iter__(self) -> Any:
        return iter(self.to_dict().items())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of :meth:`to_dict`. A user's own settings, without a version, make a config too; of a quantized model's
        ``quantization_config`` this is the part that was asked for, :class:`~qdiff_diffusers.Quantization` reads the whole.

        Raises:
            CheckpointError: the version or the method of a stored config is unknown, or it has unknown keys.
            ConfigError: a setting is malformed.
        """
        data = dict(config_dict) | kwargs
        config = _from_stored(data) if is_stored(data) else _from_settings(data)
        return (config, {}) if return_unused_kwargs else config


def is_stored(data: Mapping[str, Any]) -> bool:
    """Whether a dictionary is what config.json has of a quantized model, and no user's own settings."""
    return bool(data.keys() & {"format_version", *STORED})


def _from_stored(data: dict[str, Any]) -> QDiffConfig:
    version = data.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"this checkpoint has qdiff format version {version!r}, this package reads version {FORMAT_VERSION}; "
            "install the qdiff-diffusers release that wrote it, or a newer one"
        )
    data.pop("quant_method", None)
    stored = {key: data.pop(key, None) for key in STORED}
    method = data.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise CheckpointError(f"unknown method {method!r} in quantization_config; known: {', '.join(METHODS)}")
    kind = METHODS[method].config
    if unknown := sorted(set(data) - {f.name for f in fields(kind)}):
        raise CheckpointError(f"quantization_config has unknown keys {', '.join(unknown)}")
    return _of_quantized(kind, data) if any(stored.values()) else kind(**data)


def _of_quantized(kind: type[QDiffConfig], data: dict[str, Any]) -> QDiffConfig:
    """The config by which a model was quantized once."""
    config = object.__new__(kind)
    config.__dict__.update({f.name: data.get(f.name, f.default) for f in fields(kind)})
    config._complete(asked_for=False)
    return config


def _from_settings(data: dict[str, Any]) -> QDiffConfig:
    settings = {key: value for key, value in data.items() if key != "quant_method"}
    method = settings.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    kind = METHODS[method].config
    _check_names(kind, settings)
    return kind(**settings)


def _check_names(kind: type[QDiffConfig], settings: Mapping[str, Any]) -> None:
    if unknown := sorted(set(settings) - {f.name for f in fields(kind)}):
        raise ConfigError(f"{kind.__name__} has no setting {', '.join(unknown)}")


def _as_config(pattern: str, value: Any, asked_for: bool) -> QDiffConfig | None:
    if isinstance(value, dict):
        try:
            value = QDiffConfig(**value) if asked_for else _of_quantized_layer(value)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"overrides[{pattern!r}]: {error}") from error
    if value is not None and not isinstance(value, QDiffConfig):
        raise ConfigError(f"overrides[{pattern!r}] must be a qdiff config or None, got {value!r}")
    own = ("overrides", "modules_to_not_convert", "outer_bits") if asked_for else ("overrides",)
    if value is not None and (idle := [name for name in own if getattr(value, name)]):
        raise ConfigError(f"overrides[{pattern!r}] has {' and '.join(idle)} of its own, which would never apply")
    return value


def _of_quantized_layer(data: dict[str, Any]) -> QDiffConfig:
    """One of the overrides by which a model was quantized once."""
    kind = type(QDiffConfig.__new__(QDiffConfig, **data))  # raises where there is no such method
    _check_names(kind, data)
    return _of_quantized(kind, data)


def _is_one_of(value: Any, choices: tuple[Any, ...]) -> bool:
    return isinstance(value, numbers.Real | str) and value in choices


def _join(choices: tuple[float, ...]) -> str:
    return ", ".join(f"{c:g}" for c in choices)
