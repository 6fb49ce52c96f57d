"""Checks around what the libraries do with files: they trust an index blindly, of a damaged file they only say that it cannot be
read, they know nothing of the scales of 8-bit weights, and they write pickles of layers that cannot be read back from them."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from .checkpoint import check_index, index_shards, read_header
from .config import QDiffMethod
from .errors import CheckpointError, ConfigError
from .packing import packed_layers

SUFFIX = ".safetensors"


def check_indices(module: ModuleType, function: str) -> None:
    """Make ``module.function(name, index_file, ...)`` check the index files of our checkpoints first. Others are left alone."""
    original = getattr(module, function, None)
    if original is None or getattr(original, "guarded_by_qdiff", False):
        return

    @functools.wraps(original)
    def checked(name: Any, index_filename: Any, *args: Any, **kwargs: Any) -> Any:
        path = Path(index_filename)
        if path.is_file() and _is_ours(path.parent / "config.json"):
            # Of a local folder all shards must be there; from the Hub they are fetched after this.
            (check_index if Path(name).is_dir() else index_shards)(path)
        return original(name, index_filename, *args, **kwargs)

    checked.guarded_by_qdiff = True  # type: ignore[attr-defined]
    setattr(module, function, checked)


def check_files(module: ModuleType, function: str = "load_state_dict") -> None:
    """Make ``module.function(file, ...)`` check the header of our safetensors files first. Others are left alone."""
    original = getattr(module, function, None)
    if original is None or getattr(original, "guarded_by_qdiff", False):
        return

    @functools.wraps(original)
    def checked(file: Any, *args: Any, **kwargs: Any) -> Any:
        if not (isinstance(file, str | Path) and str(file).endswith(SUFFIX) and _is_ours(Path(file).parent / "config.json")):
            return original(file, *args, **kwargs)
        read_header(file)
        try:
            return original(file, *args, **kwargs)
        except OSError as error:  # what safetensors alone knows to be wrong
            raise CheckpointError(f"{file} cannot be read: {error.__context__ or error}") from error

    checked.guarded_by_qdiff = True  # type: ignore[attr-defined]
    setattr(module, function, checked)


def decode_sources(module: ModuleType, function: str = "convert_and_load_state_dict_in_model") -> None:
    """Make ``module.function(model, state_dict, ...)`` apply the scales of 8-bit weights where a quantizer of ours is at work.

    It also raises our errors, which transformers turns into lines of its report.
    """
    original = getattr(module, function, None)
    if original is None or getattr(original, "guarded_by_qdiff", False):
        return

    @functools.wraps(original)
    def convert(*args: Any, **kwargs: Any) -> Any:
        quantizer = _quantizer_in((*args, *kwargs.values()))
        if quantizer is None:
            return original(*args, **kwargs)
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.arguments["state_dict"] = quantizer.read_source(bound.arguments["state_dict"])
        out = original(*bound.args, **bound.kwargs)
        if quantizer.failure is not None:
            raise quantizer.failure
        return out

    convert.guarded_by_qdiff = True  # type: ignore[attr-defined]
    setattr(module, function, convert)


def _quantizer_in(arguments: Iterable[Any]) -> Any:
    """The quantizer of ours that a function of transformers was given, by itself or in its settings."""
    candidates = (found for argument in arguments for found in (argument, getattr(argument, "hf_quantizer", None)))
    return next((found for found in candidates if hasattr(found, "read_source")), None)


def refuse_pickles(module: ModuleType, name: str) -> None:
    """Wrap ``module.name.save_pretrained``: a quantized model is written as safetensors or not at all. Others are left alone."""
    kind = getattr(module, name)
    original = kind.save_pretrained
    if getattr(original, "guarded_by_qdiff", False):
        return

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(self, *args, **kwargs).arguments
        asked = bound | bound.get("kwargs", {})
        wrong = "safe_serialization=False" if not asked.get("safe_serialization", True) else None
        wrong = "use_flashpack=True" if asked.get("use_flashpack") else wrong
        parts = {"the model": self} | {f"component {key!r}": part for key, part in getattr(self, "components", {}).items()}
        packed = [part for part, model in parts.items() if isinstance(model, nn.Module) and packed_layers(model)]
        if wrong and packed:
            raise ConfigError(
                f"{packed[0]} is quantized, and qdiff's layers are stored as safetensors only: {wrong} would write what cannot be "
                "loaded. Leave it out; or call dequantize() first"
            )
        return original(self, *args, **kwargs)

    save_pretrained.guarded_by_qdiff = True  # type: ignore[attr-defined]
    kind.save_pretrained = save_pretrained


def _is_ours(config: Path) -> bool:
    try:
        return json.loads(config.read_text(encoding="utf-8"))["quantization_config"]["quant_method"] == QDiffMethod.QDIFF.value
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
