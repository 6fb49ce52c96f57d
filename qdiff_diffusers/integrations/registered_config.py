"""The class that diffusers and transformers look up for a backend's config; each backend has only one."""

from __future__ import annotations

from typing import Any

from ..checkpoint.quantization import Quantization
from ..config import QDiffConfig, is_ours


class _TakesBoth(type):
    """Makes requests (``QDiffConfig``) and records (``Quantization``) instances of a class that is neither's base."""

    def __instancecheck__(cls, value: Any) -> bool:
        return not isinstance(value, dict) and is_ours(value)


class RegisteredConfig(metaclass=_TakesBoth):
    """The class under "qdiff" in the libraries' tables. A user's settings become a :class:`QDiffConfig`, the
    ``quantization_config`` of a quantized model's config.json a :class:`Quantization`."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return QDiffConfig(*args, **kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        return Quantization.from_dict(config_dict, return_unused_kwargs, **kwargs)
