"""LoRA files on a packed Flux transformer: diffusers' loader for them looks up ``<layer>.weight`` in the state dict."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..model.packing import packed_layers


def expand_without_packed(expand: Any, cls: Any, transformer: nn.Module, lora_state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' step that widens LoRA adapters, with packed layers left out of it.

    That step is for adapters of a Control model on a base model, which differ in the embedder, a layer outside the blocks.
    """
    packed = {name.replace(".base_layer", "") for name in packed_layers(transformer)}
    prefix = f"{cls.transformer_name}."
    held = [key for key in lora_state_dict if key.removeprefix(prefix).split(".lora_")[0] in packed]
    kept = {key: lora_state_dict.pop(key) for key in held}
    return expand(cls, transformer=transformer, lora_state_dict=lora_state_dict) | kept
