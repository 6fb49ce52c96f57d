"""The one class that diffusers and transformers want for a backend's configs."""

from __future__ import annotations

from typing import Any

from ..checkpoint.quantization import Quantization
from ..config import QDiffConfig, is_ours


class _TakesBoth(type):
    """Makes configs and records alike instances of a class that is neither's base."""

    def __instancecheck__(cls, value: Any) -> bool:
        return not isinstance(value, dict) and is_ours(value)


class RegisteredConfig(metaclass=_TakesBoth):
    """Stands under "qdiff" in the libraries' tables: a user's settings make a :class:`QDiffConfig`, what config.json holds of a
    quantized model is read as its :class:`Quantization`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return QDiffConfig(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        return Quantization.from_dict(config_dict, return_unused_kwargs, **kwargs)
