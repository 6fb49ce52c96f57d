"""Makes diffusers and transformers know ``quant_method: qdiff``. Neither has a function for it that fits, both have tables."""

from __future__ import annotations

from diffusers.quantizers import auto as diffusers_auto
from diffusers.utils import is_transformers_available

from .config import QDiffConfig, QDiffMethod
from .hub.cards import write_cards_on_upload
from .quantizer import QDiffQuantizer


def register() -> None:
    """Register the backend; calling it again changes nothing."""
    name = QDiffMethod.QDIFF.value
    diffusers_auto.AUTO_QUANTIZER_MAPPING[name] = QDiffQuantizer
    diffusers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = QDiffConfig
    write_cards_on_upload()
    if is_transformers_available():
        _register_with_transformers(name)


def _register_with_transformers(name: str) -> None:
    from transformers.quantizers import auto as transformers_auto

    from .transformers_quantizer import QDiffTransformersQuantizer

    transformers_auto.AUTO_QUANTIZER_MAPPING[name] = QDiffTransformersQuantizer
    transformers_auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = QDiffConfig
