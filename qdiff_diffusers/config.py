"""Quantization configs: what a user asks for, and the ``quantization_config`` that config.json carries.

One class per method, all with good data-free defaults. After quantizing, a config also holds the exact spec of every packed
layer, so that a reader of the checkpoint needs no rule, only the table.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar

import torch
from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from .errors import CheckpointError, ConfigError
from .formats import GroupSize
from .formats.spec import STATIC
from .layer_table import StoredLayer, read_layers, write_layers

FORMAT_VERSION = 1
ACTIVATION_SCALES = ("token", "static", "timestep")
SCALE_SEARCHES = ("fast", "grid", "absmax")
RANK_SHARES = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0)  # of a mean rank, what a layer can have
STORED = ("specs", "layers", "skipped", "provenance")  # what a checkpoint's config has besides settings
COMPUTE_DTYPES = ("float32", "bfloat16", "float16", "float64")


class QDiffMethod(str, Enum):
    """diffusers asks a config for ``quant_method.value``. All of qdiff's methods share one stored format and one name."""

    QDIFF = "qdiff"
    NUNCHAKU = "qdiff_nunchaku"  # never stored: a nunchaku_lite folder that is being loaded into our layers


METHODS: dict[str, type[QDiffConfig]] = {}


@dataclass(repr=False)
class QDiffConfig(QuantizationConfigMixin):
    """Settings that all methods share. Use :class:`AQConfig`, :class:`VQConfig`, :class:`FPConfig`,
    :class:`SVDQuantConfig` or :class:`RTNConfig`; ``QDiffConfig(method="aq", ...)`` makes one by name.

    Args:
        bits: nominal bits per weight; each method says which it offers.
        rotation: rotate input channels by a block Hadamard matrix before quantizing; ``None``: as the method prefers.
        activations: ``None`` (16-bit), "int8" or "fp8", or for SVDQuant "int4" (groups of 64).
        activation_scales: of "int8" and "fp8". "token": each token's own, found at run time. "static": one per layer, "timestep":
            one per layer and timestep, both found on a calibration, which they need.
        unsigned: let layers whose inputs are bounded below, as those after a GELU or SiLU are, shift them and quantize to unsigned
            numbers where that errs less; for "int4" activations and static scales, without rotation. Needs a calibration.
        modules_to_not_convert: substrings of module names to leave in 16 bits, besides the default ones.
        overrides: substring of a module name -> another config (or ``None`` for 16 bits) for those layers; the first match counts.
        by_kind: let ``bits`` be the mean over all layers, more for the kinds and levels whose errors the model's output shows most.
            For UNets, whose narrow levels matter most; see docs/calibration.md.
        unbiased: rescale each packed weight so that it keeps its gain, at slightly more squared error (see methods/unbias.py).
        keep_outer_layers: leave the layers outside the repeated blocks (embedders, final norm and projection) in 16 bits.
        outer_bits: 8 (or another width of RTNConfig) rounds those outer layers to nearest instead of leaving them in 16 bits.
        compute_dtype: dtype of the model's other parameters, "bfloat16" and the like; set by loading.
        seed: of everything random.
    """

    method: str | None = None
    bits: float | None = None
    rotation: bool | None = None
    activations: str | None = None
    activation_scales: str = "token"
    unsigned: bool = False
    modules_to_not_convert: list[str] | None = None
    overrides: dict[str, Any] | None = None
    by_kind: bool = False
    unbiased: bool = True
    keep_outer_layers: bool = True
    outer_bits: int | None = None
    compute_dtype: str | None = None
    seed: int = 0

    quant_method: ClassVar[QDiffMethod] = QDiffMethod.QDIFF  # type: ignore[misc, assignment]
    method_name: ClassVar[str] = ""
    bit_choices: ClassVar[tuple[float, ...]] = ()
    activation_choices: ClassVar[tuple[str, ...]] = ("int8", "fp8")

    def __new__(cls, *args: Any, **kwargs: Any) -> QDiffConfig:
        if cls is QDiffConfig:
            method = args[0] if args else kwargs.get("method")
            if not isinstance(method, str) or method not in METHODS:
                raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
            cls = METHODS[method]
        return object.__new__(cls)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        METHODS[cls.method_name] = cls

    def __post_init__(self) -> None:
        self.layers: dict[str, StoredLayer] = {}
        self.skipped: dict[str, str] = {}
        self.provenance: dict[str, Any] = {}
        if self.method not in (None, self.method_name):
            raise ConfigError(f"{type(self).__name__} is for method {self.method_name!r}, got {self.method!r}")
        self.method = self.method_name
        if isinstance(self.compute_dtype, torch.dtype):
            self.compute_dtype = str(self.compute_dtype).removeprefix("torch.")
        self._check()

    def _check(self) -> None:
        name = type(self).__name__
        if self.activations == "none":
            self.activations = None
        if self.activations is not None and self.activations not in self.activation_choices:
            choices = ", ".join(map(repr, self.activation_choices))
            raise ConfigError(f"{name}: activations must be None, {choices}, got {self.activations!r}")
        if self.bits is not None and self.bits not in self.bit_choices:
            raise ConfigError(f"{name}: bits must be one of {_join(self.bit_choices)}, got {self.bits!r}")
        if self.compute_dtype is not None and self.compute_dtype not in COMPUTE_DTYPES:
            raise ConfigError(f"{name}: compute_dtype must be one of {', '.join(COMPUTE_DTYPES)}, got {self.compute_dtype!r}")
        if self.by_kind and self.bits is None:
            raise ConfigError(f"{name}: by_kind spreads a given mean over the layers; give bits too")
        if not isinstance(self.rotation, bool | None):
            raise ConfigError(f"{name}: rotation must be None, True or False, got {self.rotation!r}")
        for flag in ("keep_outer_layers", "unsigned"):
            if not isinstance(getattr(self, flag), bool):
                raise ConfigError(f"{name}: {flag} must be True or False, got {getattr(self, flag)!r}")
        if self.outer_bits is not None and (not self.keep_outer_layers or self.outer_bits not in RTNConfig.bit_choices):
            raise ConfigError(
                f"{name}: outer_bits must be one of {_join(RTNConfig.bit_choices)}, and keep_outer_layers True, "
                f"got {self.outer_bits!r} and {self.keep_outer_layers}"
            )
        if not isinstance(self.seed, int):
            raise ConfigError(f"{name}: seed must be an integer, got {self.seed!r}")
        self._check_inputs(name)
        self._check_patterns(name)

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

    def _check_patterns(self, name: str) -> None:
        if isinstance(self.modules_to_not_convert, str):
            self.modules_to_not_convert = [self.modules_to_not_convert]
        patterns = self.modules_to_not_convert or []
        if not isinstance(patterns, (list, tuple)) or not all(isinstance(p, str) for p in patterns):
            raise ConfigError(f"{name}: modules_to_not_convert must be a list of parts of module names, got {patterns!r}")
        if not isinstance(self.overrides or {}, dict):
            raise ConfigError(f"{name}: overrides must map a part of a module's name to a config, got {self.overrides!r}")
        self.overrides = {k: _as_config(k, v) for k, v in (self.overrides or {}).items()} or None

    def config_for(self, module_name: str) -> QDiffConfig | None:
        """The config that applies to a module: itself, an override, or ``None`` if the module stays in 16 bits."""
        if any(pattern in module_name for pattern in self.modules_to_not_convert or ()):
            return None
        for pattern, config in (self.overrides or {}).items():
            if pattern in module_name:
                return config
        return self

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
        if self.bits is None:
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

    def fresh(self) -> QDiffConfig:
        """The settings alone in a config of their own, so that quantizing one model leaves no trace in the next."""
        return QDiffConfig(**self.settings())

    def to_dict(self) -> dict[str, Any]:
        """The stored ``quantization_config``; see docs/format.md."""
        out = {"quant_method": self.quant_method.value, "format_version": FORMAT_VERSION} | self.settings()
        out |= write_layers(self.layers)
        if self.skipped:
            out["skipped"] = dict(self.skipped)
        if self.provenance:
            out["provenance"] = dict(self.provenance)
        return out

    to_diff_dict = to_dict  # the base class prints itself with it but does not define it

    def __iter__(self) -> Any:
        return iter(self.to_dict().items())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of :meth:`to_dict`. A user's own settings, without a version and layers, make a config too.

        Raises:
            CheckpointError: the version, the method or a layer's spec is unknown or malformed.
            ConfigError: a setting is.
        """
        data = dict(config_dict) | kwargs
        if not data.keys() & {"format_version", *STORED}:
            return _from_settings(data, return_unused_kwargs)
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
        known = {f.name for f in fields(METHODS[method])}
        if unknown := sorted(set(data) - known):
            raise CheckpointError(f"quantization_config has unknown keys {', '.join(unknown)}")
        config = METHODS[method](**data)
        config.layers = read_layers(stored["specs"], stored["layers"])
        for key in ("skipped", "provenance"):
            if not isinstance(stored[key] or {}, dict):
                raise CheckpointError(f"quantization_config.{key} must be an object, got {stored[key]!r}")
            setattr(config, key, dict(stored[key] or {}))
        return (config, {}) if return_unused_kwargs else config


def _from_settings(data: dict[str, Any], return_unused_kwargs: bool) -> Any:
    settings = {key: value for key, value in data.items() if key != "quant_method"}
    method = settings.get("method")
    if not isinstance(method, str) or method not in METHODS:
        raise ConfigError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    kind = METHODS[method]
    if unknown := sorted(set(settings) - {f.name for f in fields(kind)}):
        raise ConfigError(f"{kind.__name__} has no setting {', '.join(unknown)}")
    config = kind(**settings)
    return (config, {}) if return_unused_kwargs else config


def _as_config(pattern: str, value: Any) -> QDiffConfig | None:
    if isinstance(value, dict):
        try:
            value = QDiffConfig(**value)
        except (ConfigError, TypeError) as error:
            raise ConfigError(f"overrides[{pattern!r}]: {error}") from error
    if value is not None and not isinstance(value, QDiffConfig):
        raise ConfigError(f"overrides[{pattern!r}] must be a qdiff config or None, got {value!r}")
    if value is not None and value.overrides:
        raise ConfigError(f"overrides[{pattern!r}] has overrides of its own, which would never apply")
    return value


def _join(choices: tuple[float, ...]) -> str:
    return ", ".join(f"{c:g}" for c in choices)


@dataclass(repr=False)
class AQConfig(QDiffConfig):
    """Additive codebooks (AQLM, AQUATIC-Diff): a vector of weights is a sum of one entry from each of several codebooks.

    Args:
        bits: 1, 1.5, 2, 3 or 4 choose a preset; ignored for what the next three set.
        num_codebooks, codebook_bits, vector_size: the format, codes cost ``num_codebooks * codebook_bits / vector_size`` bits.
        codebook: "shared" (a universal table that costs nothing to store; wants rotation) or "layer" (fitted to each layer).
        effort: 0 (one pass) to 3 (wide beams, many alternations): quantization time against error.
        kernel_vectors: vectors of a convolution run through the taps of one channel's kernel rather than through channels; with a
            vector_size of 9 each 3 x 3 kernel is a vector (AQUATIC-Diff's KAQ).
    """

    num_codebooks: int | None = None
    codebook_bits: int | None = None
    vector_size: int | None = None
    codebook: str | None = None
    group_size: GroupSize | None = None
    effort: int = 1
    kernel_vectors: bool = False

    method_name: ClassVar[str] = "aq"
    bit_choices: ClassVar[tuple[float, ...]] = (1, 1.5, 2, 3, 4)

    def moves_by(self, assignments: str) -> bool:
        return assignments != "rounding" and (assignments != "candidates" or self.num_codebooks == 1)


@dataclass(repr=False)
class VQConfig(QDiffConfig):
    """One k-means codebook per layer (VQ4DiT): 8 bits x 4 weights = 2 bits, 6 bits x 2 = 3 bits.

    Args:
        bits: 2, 3, 4 or 8 choose a preset.
        codebook_bits, vector_size: the format, codes cost ``codebook_bits / vector_size`` bits.
        codebook: "layer" (fitted to each layer) or "shared" (a universal table; wants rotation).
        row_scales: one scale per output row besides the codebook.
        restarts: k-means restarts, the best is kept.
    """

    codebook_bits: int | None = None
    vector_size: int | None = None
    codebook: str | None = None
    row_scales: bool = True
    restarts: int = 2

    method_name: ClassVar[str] = "vq"
    bit_choices: ClassVar[tuple[float, ...]] = (2, 3, 4, 8)

    def moves_by(self, assignments: str) -> bool:
        return assignments != "rounding"


@dataclass(repr=False)
class FPConfig(QDiffConfig):
    """Low-bitwidth floating point: encoding and scale chosen by squared error.

    Args:
        bits: 3 to 8; the encoding is chosen among those of that width.
        weight_format: an encoding ("e2m1", "e4m3", ...) or "nvfp4", "mxfp4", "mxfp8", instead of ``bits``; or "exmy": of all
            encodings of ``bits`` the one that fits a layer's weights best, as in the paper.
        group_size: columns that share a scale, "row" or "tensor".
        scale_dtype: "float16", "float32", "e4m3" or "e8m0".
        scale_search: of scales, which are what the paper calls exponent biases. "fast": few candidates about the largest weight,
            then least squares. "grid": the paper's 111 clips from 0.1 to 1.2 times the largest weight, each tried on every
            weight. "absmax": none, the largest weight is the largest number.
    """

    weight_format: str | None = None
    group_size: GroupSize | None = None
    scale_dtype: str | None = None
    scale_search: str = "fast"

    method_name: ClassVar[str] = "fp"
    bit_choices: ClassVar[tuple[float, ...]] = (3, 4, 5, 6, 8)

    def _check(self) -> None:
        super()._check()
        if self.scale_search not in SCALE_SEARCHES:
            choices = ", ".join(map(repr, SCALE_SEARCHES))
            raise ConfigError(f"FPConfig: scale_search must be {choices}, got {self.scale_search!r}")


@dataclass(repr=False)
class SVDQuantConfig(QDiffConfig):
    """A 16-bit low-rank branch beside a low-bit residual (SVDQuant).

    Args:
        bits: of the residual, 2, 3, 4 or 8; the format follows unless ``weight_format`` is given.
        weight_format: of the residual: "int4", "nvfp4", an encoding such as "e2m1", ...; "aq" or "vq" for codebooks of ``bits``.
        rank: of the branch; ``None`` scales it with the layer (24 at 3072 x 3072).
        branch_bits: instead of ``rank``, what the branch may cost in bits per weight: each layer's rank follows from its shape, and
            with ``Calibration(mixed=True)`` from what rank is worth there, ``branch_bits`` being the mean.
        rounds: most rounds of alternating SVD and residual quantization; the first that does not lower the error ends them.
        smoothing: divide the inputs by a vector of which 39 are tried on each layer. Needs a calibration; worth it or not, see
            docs/calibration.md.
        adaln_w4a16: store the modulation of adaptive layer norms, which sees one token per image, as plain INT4 in groups of 64
            without a branch, and leave its inputs in 16 bits, as the SVDQuant authors' FLUX does and Nunchaku reads it.
    """

    weight_format: str | None = None
    group_size: GroupSize | None = None
    rank: int | None = None
    branch_bits: float | None = None
    rounds: int = 3
    smoothing: bool = False
    adaln_w4a16: bool = False

    method_name: ClassVar[str] = "svdquant"
    bit_choices: ClassVar[tuple[float, ...]] = (2, 3, 4, 8)
    activation_choices: ClassVar[tuple[str, ...]] = ("int8", "fp8", "int4", "nvfp4")

    def _check(self) -> None:
        super()._check()
        if (inner := self.codebooks()) is not None:  # raises if there are none of these bits
            self.bit_choices = tuple(b for b in inner.bit_choices if b in type(self).bit_choices)  # type: ignore[misc]
        for flag in ("smoothing", "adaln_w4a16"):
            if not isinstance(getattr(self, flag), bool):
                raise ConfigError(f"SVDQuantConfig: {flag} must be True or False, got {getattr(self, flag)!r}")
        if self.branch_bits is not None and (self.rank is not None or not 0 <= self.branch_bits <= 16):
            raise ConfigError(
                "SVDQuantConfig: branch_bits must lie between 0 and 16 and goes without rank, "
                f"got branch_bits {self.branch_bits!r} and rank {self.rank!r}"
            )

    @property
    def needs_samples(self) -> bool:
        return super().needs_samples or self.smoothing

    def alternatives(self) -> list[dict[str, Any]]:
        """Widths of the residual; or, where ``branch_bits`` is given, ranks."""
        if self.branch_bits is None:
            return super().alternatives()
        return [{"branch_bits": share * self.branch_bits} for share in RANK_SHARES]

    def moves_by(self, assignments: str) -> bool:
        inner = self.codebooks()
        return super().moves_by(assignments) if inner is None else inner.moves_by(assignments)

    def codebooks(self) -> QDiffConfig | None:
        """The method of a residual in codebooks, if ``weight_format`` asks for one."""
        if self.weight_format not in ("aq", "vq"):
            return None
        return METHODS[self.weight_format](bits=self.bits)  # type: ignore[call-arg]

    def modulation(self) -> QDiffConfig:
        """What ``adaln_w4a16`` makes of the linear layers inside adaptive norms."""
        return RTNConfig(bits=4, group_size=64, seed=self.seed)  # type: ignore[call-arg]


@dataclass(repr=False)
class RTNConfig(QDiffConfig):
    """Plain asymmetric round-to-nearest in groups: the baseline, and a cheap 8-bit choice for ``overrides``."""

    unbiased: bool = False
    group_size: GroupSize = 64

    method_name: ClassVar[str] = "rtn"
    bit_choices: ClassVar[tuple[float, ...]] = (1, 2, 3, 4, 5, 6, 7, 8)
