"""Quantized text encoders as native CLIPs: stored under transformers' names, run by ComfyUI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import comfy.sd
import comfy.sd1_clip
import comfy.utils
import folder_paths
import torch
from torch import nn

from qdiff_diffusers.checkpoint.stored_model import StoredModel, read_stored_model, stored_settings
from qdiff_diffusers.errors import CheckpointError

from .families import Family
from .loader import is_text_encoder, native_tensors
from .ops import Operations
from .patches import adopt

# T5, Qwen and the rest have the same names in both programs.
CLIP_NAMES = "\n".join(f"text_model.{part} <- {part}" for part in ("embeddings", "encoder", "final_layer_norm"))
NAMES = (Family("CLIP", ("CLIPTextModel",), (), CLIP_NAMES),)
SAME_NAMES = Family("text encoder", (), ())

# Models whose tokenizer ComfyUI does not contain: the key it looks for beside the weights, and the file in a tokenizer folder.
TOKENIZERS = {
    "UMT5EncoderModel": ("spiece_model", "spiece.model"),
    "Gemma2Model": ("spiece_model", "tokenizer.model"),
    "Gemma3ForConditionalGeneration": ("spiece_model", "tokenizer.model"),
    "Mistral3ForConditionalGeneration": ("tekken_model", "tekken.json"),
}
SAME_TYPES = {"sdxl": "stable_diffusion"}  # which ComfyUI tells apart by the number of encoders
PROJECTION = "text_projection.weight"  # CLIP models without one are run with the identity
GENERATION = "lm_head.weight"  # not needed to encode


def load_clip(paths: list[Path], clip_type: str) -> Any:
    """A CLIP from one or more text encoders, each quantized or not.

    Args:
        paths: model folders or files, in the order of ComfyUI's own loaders.
        clip_type: name of a ``comfy.sd.CLIPType`` in lower case, or "sdxl".

    Raises:
        CheckpointError: a file is damaged, incomplete or no text encoder, or this ComfyUI does not know the type.
    """
    kind = getattr(comfy.sd.CLIPType, SAME_TYPES.get(clip_type, clip_type).upper(), None)
    if kind is None:
        raise CheckpointError(f"this ComfyUI knows no text encoder type {clip_type!r}")
    stored = [read_encoder(path) if stored_settings(path) else None for path in paths]
    tensors = [_tensors(path, model) for path, model in zip(paths, stored, strict=True)]
    clip = comfy.sd.load_text_encoder_state_dicts(
        tensors,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        clip_type=kind,
        # dtype of what is not packed. By default ComfyUI takes float16, in which T5 overflows.
        model_options={"custom_operations": Operations, "dtype": next(_dtype(model) for model in stored if model)},
    )
    _check_names(clip.cond_stage_model, tensors)
    adopt(clip.patcher)
    return clip


def read_encoder(path: Path) -> StoredModel:
    """The description of a stored quantized text encoder; no weight is read.

    Raises:
        CheckpointError: the model is damaged, incomplete or no text encoder.
    """
    stored = read_stored_model(path)
    if not is_text_encoder(stored):
        raise CheckpointError(
            f"{path.name} is no text encoder but a {stored.model_class}; load it with Load Quantized Model (qdiff)"
        )
    return stored


def tokenizer_files(folder: Path, model_class: str) -> dict[str, torch.Tensor]:
    """Tokenizer files that ComfyUI expects beside the weights of some encoders, as tensors of bytes.

    Raises:
        CheckpointError: the file is neither in the encoder's folder nor in the pipeline's ``tokenizer`` folders beside it.
    """
    if model_class not in TOKENIZERS:
        return {}
    key, name = TOKENIZERS[model_class]
    folders = [folder, *sorted(folder.parent.glob("tokenizer*"))]
    file = next((place / name for place in folders if (place / name).is_file()), None)
    if file is None:
        raise CheckpointError(
            f"{folder.name} is a {model_class}, whose tokenizer ComfyUI does not bring along; put {name} of the model's tokenizer "
            f"folder into {folder}"
        )
    return {key: torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)}


def _check_names(model: nn.Module, tensors: list[dict[str, Any]]) -> None:
    """Refuse missing tensors, which ComfyUI only logs before it encodes with random numbers."""
    encoders = {name: m.transformer for name, m in model.named_modules() if isinstance(m, comfy.sd1_clip.SDClipModel)}
    for name, encoder in encoders.items():
        wanted = {key for key, _ in encoder.named_parameters()}
        # The file that is most like it: CLIP-L's names are all in CLIP-G's file too.
        given = max(map(set, tensors), key=lambda keys: len(wanted & keys) - len(keys - wanted))
        lost = sorted(key for key in wanted - given if not key.endswith((PROJECTION, GENERATION)))
        if lost:
            raise CheckpointError(f"the text encoder lacks {', '.join(lost[:5])} of ComfyUI's {name or type(encoder).__name__}")
        if PROJECTION in wanted - given:
            size = encoder.text_projection.weight.shape[0]
            encoder.text_projection.weight = nn.Parameter(torch.eye(size), requires_grad=False)


def _tensors(path: Path, stored: StoredModel | None) -> dict[str, Any]:
    if stored is None:
        return comfy.utils.load_torch_file(str(path), safe_load=True)
    folder = path if path.is_dir() else path.parent
    names = next((family for family in NAMES if stored.model_class in family.classes), SAME_NAMES)
    return native_tensors(stored, names, stored.load(), _dtype(stored)) | tokenizer_files(folder, stored.model_class)


def _dtype(stored: StoredModel) -> torch.dtype:
    return getattr(torch, stored.quantization.compute_dtype or "bfloat16")
