"""Makes diffusers and transformers know ``quant_method: qdiff``."""

from __future__ import annotations

from diffusers.quantizers import auto

from .config import QDiffConfig, QDiffMethod
from .quantizer import QDiffQuantizer


def register() -> None:
    """Register the backend; calling it again changes nothing. diffusers has no registration function, only two tables."""
    name = QDiffMethod.QDIFF.value
    auto.AUTO_QUANTIZER_MAPPING[name] = QDiffQuantizer
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = QDiffConfig
