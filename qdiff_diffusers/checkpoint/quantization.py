"""The record of a quantized model: the ``quantization_config`` of its config.json, see docs/format.md."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from diffusers.quantizers.quantization_config import QuantizationConfigMixin

from ..config import COMPUTE_DTYPES, QDiffConfig, QDiffMethod, is_stored
from ..errors import CheckpointError, ConfigError
from ..formats import dtype_name
from ..formats.layer_table import StoredLayer, read_layers, write_layers
from ..layers import PackedLayer


class Quantization(QuantizationConfigMixin):
    """The record of a quantized model, which its ``model.config.quantization_config`` holds and config.json carries.

    The settings that were asked for can be read here as on the config: ``quantization.bits``.

    Args:
        config: the settings that were asked for.
        layers: the packed layers by module name: spec, logical shape and error of each.
        skipped: reasons for which layers were left as they are, by module name.
        provenance: package, model class, base model, licence and calibration, as far as they are known.
    """

    quant_method: ClassVar[QDiffMethod] = QDiffMethod.QDIFF  # type: ignore[misc, assignment]

    def __init__(
        self,
        config: QDiffConfig,
        layers: Mapping[str, StoredLayer] | None = None,
        skipped: Mapping[str, str] | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> None:
        self.config = config
        self._layers = dict(layers or {})
        self.skipped = dict(skipped or {})
        self.provenance = dict(provenance or {})
        self.follow({})

    @classmethod
    def of(cls, value: QDiffConfig | Quantization) -> Quantization:
        """A new record for a config, or a copy of a record."""
        if isinstance(value, Quantization):
            return cls(value.config, value.layers, value.skipped, value.provenance)
        return cls(value)

    def requested(self) -> Quantization:
        """A new record for a model that is to be quantized by the same settings.

        Raises:
            ConfigError: this release no longer accepts the settings.
        """
        return Quantization(QDiffConfig(**self.config.settings()))

    @property
    def layers(self) -> dict[str, StoredLayer]:
        """The packed layers as they are now: those of a model in memory may have had adapters fused since they were quantized."""
        for name, layer in self._packed.items():
            if name in self._layers and isinstance(layer, PackedLayer):
                self._layers[name] = self._layers[name]._replace(spec=layer.spec)
        return self._layers

    @property
    def compute_dtype(self) -> str | None:
        """Dtype of the model's other parameters, which may have been cast since it was quantized."""
        dtypes = [dtype_name(layer.compute_dtype) for layer in self._packed.values() if isinstance(layer, PackedLayer)]
        known = [dtype for dtype in dtypes if dtype in COMPUTE_DTYPES]  # layerwise casting stores layers in float8 between uses
        return known[-1] if known else self.config.compute_dtype

    @compute_dtype.setter
    def compute_dtype(self, dtype: str | None) -> None:
        self.config = self.config.computing_in(dtype)

    def follow(self, packed: Mapping[str, PackedLayer]) -> None:
        """Describe these layers of a model, by module name, in their state at each access. They are not kept alive."""
        self._packed = WeakValueDictionary(packed)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "config":
            raise AttributeError(f"{type(self).__name__} has no {name}")
        return getattr(self.config, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name != "compute_dtype" and "config" in self.__dict__ and name in {f.name for f in fields(self.config)}:
            raise ConfigError(f"this says how the model was quantized; {name} can only be chosen for the full-precision model")
        super().__setattr__(name, value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Quantization) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        """State for copies and pickles, which follow no layers until their own quantizer calls :meth:`follow`."""
        config = self.config.computing_in(self.compute_dtype)
        return dict(Quantization(config, self.layers, self.skipped, self.provenance).__dict__, _packed=None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.follow({})

    def to_dict(self) -> dict[str, Any]:
        """The ``quantization_config`` of config.json: settings that differ from their defaults, and the table of layers."""
        out = self.config.computing_in(self.compute_dtype).to_dict() | write_layers(self.layers)
        if self.skipped:
            out["skipped"] = dict(self.skipped)
        if self.provenance:
            out["provenance"] = dict(self.provenance)
        return out

    to_diff_dict = to_dict  # the base class's __repr__ calls this but does not define it

    def __iter__(self) -> Any:
        return iter(self.to_dict().items())

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of :meth:`to_dict`. A user's own settings, which diffusers and transformers hand over alike, make a
        :class:`QDiffConfig`.

        Raises:
            CheckpointError: the version, the method or a layer's spec is unknown or malformed.
            ConfigError: a setting is unknown or malformed.
        """
        data = dict(config_dict) | kwargs
        read = QDiffConfig.from_dict(data)
        if is_stored(data):
            for key in ("skipped", "provenance"):
                if not isinstance(data.get(key) or {}, dict):
                    raise CheckpointError(f"quantization_config.{key} must be an object, got {data[key]!r}")
            read = cls(read, read_layers(data.get("specs"), data.get("layers")), data.get("skipped"), data.get("provenance"))
        return (read, {}) if return_unused_kwargs else read
