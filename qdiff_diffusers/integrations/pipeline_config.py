"""Choice of a pipeline's components where a ``PipelineQuantizationConfig`` lists none."""

from __future__ import annotations

from typing import Any

from diffusers.utils import logging

from ..config import QDiffMethod
from ..model.patterns import one_config_for_all

logger = logging.get_logger(__name__)

DECODERS = ("vae", "movq")  # in a component's name: vae, vqvae, audio_vae, vae_decoder, ...


def leave_decoders(original: Any, self: Any, is_diffusers: bool = True, module_name: str | None = None, **kwargs: Any) -> Any:
    """Make ``PipelineQuantizationConfig(quant_backend="qdiff", ...)`` leave the VAE alone unless it is named.

    diffusers quantizes every component if ``components_to_quantize`` is not given. A VAE is small, and every pixel passes through
    it. Other backends are left as they are.
    """
    ours = self.quant_backend == QDiffMethod.QDIFF.value and not self.components_to_quantize
    if ours and any(word in (module_name or "") for word in DECODERS):
        logger.info(f"{module_name} stays as it is; list it in components_to_quantize to have it quantized too")
        return None
    return original(self, is_diffusers=is_diffusers, module_name=module_name, **kwargs)


def from_pretrained(original: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``DiffusionPipeline.from_pretrained``, which warns of patterns without effect once all components are loaded."""
    with one_config_for_all():
        return original(cls, *args, **kwargs)
