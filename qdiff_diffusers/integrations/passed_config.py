"""Handling of a qdiff config that is passed to ``from_pretrained`` for a model that is quantized already."""

from __future__ import annotations

import warnings
from typing import Any

from ..checkpoint.prequantized import describe_quantization, refuse_quantization
from ..checkpoint.quantization import Quantization
from ..config import QDiffConfig, is_ours


def obey_or_refuse(merge: Any, cls: Any, quantization_config: Any, quantization_config_from_args: Any, **kwargs: Any) -> Any:
    """``merge_quantization_configs`` of a library's auto quantizer, where a qdiff config is passed for a quantized model.

    Equal settings pass silently, and different ones with a warning that names both. Settings for another backend's model are
    refused; the libraries would ignore them.
    """
    passed = quantization_config_from_args
    if not isinstance(passed, QDiffConfig | Quantization):
        return merge(cls, quantization_config, passed, **kwargs)
    if not is_ours(quantization_config):
        refuse_quantization(quantization_config, "the model", None)
    merged = merge(cls, quantization_config, None, **kwargs)
    if _settings(merged) != _settings(passed):
        warnings.warn(
            "the model already has a `quantization_config`, which is used as it is stored: "
            f"{describe_quantization(merged)}. The one that was passed, {describe_quantization(passed)}, is ignored; pass it "
            "with the full-precision model",
            stacklevel=2,
        )
    return merged


def _settings(config: QDiffConfig | Quantization) -> dict[str, Any]:
    return {key: value for key, value in config.settings().items() if key != "compute_dtype"}
