"""Provenance of a model: its Hub name, licence and task, from model cards beside it or on the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, hf_hub_download
from huggingface_hub.utils import HFValidationError, validate_repo_id

from ..version import package_version

LICENSE_KEYS = ("license", "license_name", "license_link")
INHERITED = (*LICENSE_KEYS, "pipeline_tag")
GENERIC = "unconditional-image-generation"

# Parts of pipeline and model class names, in order of precedence, and the Hub's name of their task.
TASKS = (
    (("Inpaint", "Img2Img", "InstructPix2Pix", "Kontext", "Edit", "Upscale", "Fill", "Redux"), "image-to-image"),
    (("ImageToVideo", "Image2Video", "I2V", "StableVideoDiffusion"), "image-to-video"),
    (("Audio", "Music"), "text-to-audio"),
    (("Video", "Wan", "LTX", "Mochi", "CogVideo", "AnimateDiff", "Latte", "Allegro", "Transformer3D"), "text-to-video"),
    (("DiTPipeline", "DiTTransformer", "DDPM", "DDIMPipeline", "UNet2DModel"), GENERIC),
)


def _hub_name(path: str | Path) -> str | None:
    """``org/name`` of a file in the Hub's cache (``.../models--org--name/snapshots/...``); ``None`` for any other file."""
    for part in Path(path).parts:
        if part.startswith("models--"):
            return part.removeprefix("models--").replace("--", "/", 1)
    return None


def origin_of(checkpoint_file: str | Path) -> dict[str, str]:
    """Hub name, licence and task of the model that a checkpoint file belongs to, as far as they are known."""
    name = _hub_name(checkpoint_file)
    return ({"base_model": name} if name else {}) | local_card(checkpoint_file)


def origin_of_model(name_or_path: str) -> dict[str, str]:
    """Hub name, licence and task of a model in memory, from the name or folder that it was loaded from ("" if unknown)."""
    if is_hub_name(name_or_path) and not Path(name_or_path).exists():
        return {"base_model": name_or_path}
    return origin_of(Path(name_or_path, "config.json")) if name_or_path else {}


def local_card(checkpoint_file: str | Path) -> dict[str, str]:
    """Licence and task according to the card (README.md) in a checkpoint's folder, or in the pipeline folder around it."""
    folder = Path(checkpoint_file).parent
    if not (folder / "README.md").is_file() and (folder.parent / "model_index.json").is_file():
        folder = folder.parent
    return _read_card(folder / "README.md") if (folder / "README.md").is_file() else {}


def hub_card(base_model: str | None) -> dict[str, str]:
    """Licence and task according to a model's card on the Hub; empty if the card cannot be read."""
    if not is_hub_name(base_model):
        return {}
    try:
        return _read_card(hf_hub_download(str(base_model), "README.md"))
    except Exception:  # a missing card, a gated model or a lost connection must not stop an upload
        return {}


def is_hub_name(name: Any) -> bool:
    """Whether ``name`` has the form ``owner/name``, as ``base_model`` in a card must."""
    if not isinstance(name, str) or name.count("/") != 1:
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def task_of(folder: Path) -> str:
    """The Hub's ``pipeline_tag`` of a saved pipeline or model, from its class name."""
    index = folder / "model_index.json"
    data = json.loads((index if index.is_file() else folder / "config.json").read_text(encoding="utf-8"))
    if not index.is_file() and "_class_name" not in data:
        return "feature-extraction"  # an encoder of transformers
    name = data.get("_class_name")
    name = str(name[-1] if isinstance(name, list) and name else name)
    for parts, task in TASKS:
        if any(part in name for part in parts):
            return task
    if index.is_file():
        return "text-to-image" if any(key.startswith("tokenizer") for key in data) else GENERIC
    return "text-to-image"


def _read_card(path: str | Path) -> dict[str, str]:
    try:
        data = ModelCard.load(path, ignore_metadata_errors=True).data
    except Exception:  # cards are written by hand, with every mistake that YAML allows
        return {}
    return {key: value for key in INHERITED if isinstance(value := data.get(key), str)}


def new_provenance(model_class: str) -> dict[str, str]:
    """The first facts of a checkpoint's provenance: package and model class."""

    return {"package": f"qdiff-diffusers {package_version()}", "model_class": model_class}
