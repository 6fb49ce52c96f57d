"""A quantized model on disk, read without building it: for programs with model classes of their own.

It is a folder with config.json and safetensors files, as ``save_pretrained`` writes it, or one self-contained safetensors file that
carries config.json in its metadata, as :func:`write_stored_model` writes it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..config import QDiffMethod, is_ours
from ..errors import CheckpointError
from ..formats import TensorInfo
from .files import check_tensors, header_of, read_headers, read_json, weight_files
from .folders import content, real_place, written_at_once
from .quantization import Quantization

METADATA = "qdiff_config"  # key of config.json in a safetensors file's metadata
FILE = "diffusion_pytorch_model.safetensors"
# Modules of transformers' vision-language models, and how the same library names them in files.
RENAMED = {"model.language_model.": "model.", "model.visual.": "visual."}


class StoredModel(NamedTuple):
    """A model on disk. ``settings`` is its config.json, ``quantization`` its ``quantization_config``, parsed."""

    path: Path
    settings: dict[str, Any]
    quantization: Quantization
    files: list[Path]
    tensors: dict[str, TensorInfo]

    @property
    def model_class(self) -> str:
        """The diffusers or transformers class, "" if config.json names none."""
        name = self.settings.get("_class_name") or next(iter(self.settings.get("architectures") or ()), "")
        return str(name)

    def load(self) -> dict[str, Tensor]:
        """Every tensor, on the CPU, in memory mapped from the files."""
        out: dict[str, Tensor] = {}
        for path in self.files:
            with safe_open(path, framework="pt") as file:
                out.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
        return out


def read_stored_model(path: str | Path) -> StoredModel:
    """Read config and headers and check every packed tensor's name, shape and dtype. No weight is read.

    Args:
        path: a model folder, a self-contained file, or the only weight file of a model folder.

    Raises:
        CheckpointError: there is no quantized model, or it is malformed, truncated or of an unknown version.
    """
    path = Path(path)
    settings = stored_settings(path)
    if settings is None:
        raise CheckpointError(
            f"{path} is no qdiff checkpoint: there is no config with quant_method {QDiffMethod.QDIFF.value!r}, neither in the file "
            "nor in a config.json beside it"
        )
    config = Quantization.from_dict(settings["quantization_config"])
    files = [path] if path.is_file() else weight_files(path)
    tensors = read_headers(files)
    layers = {_name_in_files(name, tensors): layer for name, layer in config.layers.items()}
    config = Quantization(config.config, layers, config.skipped, config.provenance)
    check_tensors(layers, tensors)
    return StoredModel(path, settings, config, files, tensors)


def _name_in_files(name: str, tensors: Mapping[str, TensorInfo]) -> str:
    """The prefix of a packed layer's tensors in the files, which may differ from the module's name."""
    for module, stored in RENAMED.items():
        renamed = name.replace(module, stored, 1) if name.startswith(module) else name
        if f"{name}.codes" not in tensors and f"{renamed}.codes" in tensors:
            return renamed
    return name


def stored_settings(path: str | Path) -> dict[str, Any] | None:
    """The config.json of a quantized model, ``None`` if this is something else.

    Raises:
        CheckpointError: there is nothing at ``path``, or its description is malformed.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    settings = _metadata(path) if path.is_file() else None
    beside = (path.parent if path.is_file() else path) / "config.json"
    if settings is None and beside.is_file():
        settings = read_json(beside)
    quantization = settings.get("quantization_config") if isinstance(settings, dict) else None
    return settings if is_ours(quantization) else None


def write_stored_model(
    folder: str | Path, settings: Mapping[str, Any], quantization: Quantization, tensors: Iterable[tuple[str, Tensor]]
) -> Path:
    """Write a model folder that ``from_pretrained`` reads, whose only weight file is self-contained.

    Args:
        folder: folder to write, which must not exist or be empty. It appears only once it is complete.
        settings: config.json without ``quantization_config``.
        quantization: the record, with its table of layers.
        tensors: names and tensors as in the model's own state dict.

    Returns:
        The weight file.

    Raises:
        CheckpointError: ``folder`` holds something already.
        ConfigError: ``folder`` cannot be written.
        OutputError: there is no space left.
    """
    folder = Path(folder)
    if content(real_place(folder)):
        raise CheckpointError(f"{folder} exists already; choose another name, or delete it")
    full = {**settings, "quantization_config": quantization.to_dict()}
    with written_at_once(folder) as new:
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors}
        save_file(contiguous, new / FILE, metadata={"format": "pt", METADATA: json.dumps(full)})
        (new / "config.json").write_text(json.dumps(full, indent=2) + "\n")
    return folder / FILE


def _metadata(path: Path) -> dict[str, Any] | None:
    """config.json out of a safetensors file's metadata, ``None`` if it has none or the file is of another kind."""
    header = header_of(path)
    if header is None:
        return None
    try:
        text = header.get("__metadata__", {}).get(METADATA)
        settings = None if text is None else json.loads(text)
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed safetensors header: {error}") from error
    return settings if isinstance(settings, dict) else None
