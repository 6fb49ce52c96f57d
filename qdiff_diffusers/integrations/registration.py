"""Registers ``quant_method: qdiff`` with diffusers and transformers, and everything else that ``table.py`` lists."""

from __future__ import annotations

from typing import Any

from diffusers.utils import is_transformers_available, is_transformers_version, logging

from ..errors import ConfigError
from .patches import apply
from .table import OLD_TRANSFORMERS, REGISTRATION, TRANSFORMERS, WRAPPED

logger = logging.get_logger(__name__)

TOO_OLD = "qdiff quantizes and loads text encoders with transformers 5.0 or newer only"


def register() -> None:
    """Register the backend; calling it again changes nothing. A name that a library no longer has switches one feature off."""
    apply(REGISTRATION)
    if is_transformers_available() and is_transformers_version("<", "5.0"):
        logger.warning(f"{TOO_OLD}; please upgrade it")
        apply(OLD_TRANSFORMERS)
    else:
        apply(TRANSFORMERS)
    apply(WRAPPED)


class Refusal:
    """Registered instead of a config class where transformers is too old, which would fill a text encoder with random numbers."""

    @classmethod
    def from_dict(cls, *args: Any, **kwargs: Any) -> Any:
        raise ConfigError(f"this model is quantized, and {TOO_OLD}; please upgrade it")
