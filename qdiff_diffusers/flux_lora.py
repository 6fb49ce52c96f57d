"""LoRA files on a packed Flux transformer: diffusers' loader for them looks up ``<layer>.weight`` in the state dict."""

from __future__ import annotations

import functools
from typing import Any

from diffusers.loaders.lora_pipeline import FluxLoraLoaderMixin
from torch import Tensor, nn

from .packing import packed_layers


def install() -> None:
    """Keep packed layers out of the step that widens adapters; calling it again changes nothing."""
    loader: Any = FluxLoraLoaderMixin
    expand = loader._maybe_expand_lora_state_dict.__func__
    if not hasattr(expand, "of_qdiff"):
        loader._maybe_expand_lora_state_dict = classmethod(_without_packed(expand))


def _without_packed(expand: Any) -> Any:
    """That step is for adapters of a Control model on a base model, which differ in the embedder, a layer outside the blocks."""

    @functools.wraps(expand)
    def maybe_expand(cls: Any, transformer: nn.Module, lora_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        packed = {name.replace(".base_layer", "") for name in packed_layers(transformer)}
        prefix = f"{cls.transformer_name}."
        held = [key for key in lora_state_dict if key.removeprefix(prefix).split(".lora_")[0] in packed]
        kept = {key: lora_state_dict.pop(key) for key in held}
        return expand(cls, transformer=transformer, lora_state_dict=lora_state_dict) | kept

    maybe_expand.of_qdiff = True  # type: ignore[attr-defined]
    return maybe_expand
