"""Text encoders: quantized by transformers, run by ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch

from qdiff_diffusers.errors import CheckpointError
from qdiff_diffusers.stored import read_stored_model, stored_settings

from .families import Family
from .loader import native_tensors
from .ops import Operations
from .patches import adopt

# Qwen-VL's two halves; T5, CLIP and the rest have the same names in both.
NAMES = Family("text encoder", (), (), "model <- model.language_model\nvisual <- model.visual")


def load_clip(paths: list[Path], clip_type: str) -> Any:
    """A CLIP from one or more text encoders, each quantized or not.

    Args:
        paths: model folders or files, in the order of ComfyUI's own loaders.
        clip_type: name of a ``comfy.sd.CLIPType``, lower case.

    Raises:
        CheckpointError: a file is damaged, or this ComfyUI does not know the type.
    """
    kind = getattr(comfy.sd.CLIPType, clip_type.upper(), None)
    if kind is None:
        raise CheckpointError(f"this ComfyUI knows no text encoder type {clip_type!r}")
    tensors = [_tensors(path) for path in paths]
    clip = comfy.sd.load_text_encoder_state_dicts(
        tensors,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=kind,
        model_options={"custom_operations": Operations},
    )
    adopt(clip.patcher)
    return clip


def _tensors(path: Path) -> dict[str, Any]:
    if stored_settings(path) is None:
        return comfy.utils.load_torch_file(str(path), safe_load=True)
    stored = read_stored_model(path)
    dtype = getattr(torch, stored.quantization.compute_dtype or "bfloat16")
    return native_tensors(stored, NAMES, stored.load(), dtype)
