"""``from_single_file`` of qdiff's files: a self-contained one needs no settings, and a damaged one is reported as damaged."""

from __future__ import annotations

import copy
import json
import tempfile
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..checkpoint.files import read_header
from ..checkpoint.quantization import Quantization
from ..checkpoint.source_weights import COMFY_METADATA, defer_source_tensors
from ..checkpoint.stored_model import stored_settings
from ..config import is_ours
from ..errors import CheckpointError
from .checkpoint_checks import state_dict

# Whether from_single_file was called with a config of ours.
_quantizing: ContextVar[bool] = ContextVar("_quantizing", default=False)


class DescribedTensors(dict[str, Any]):
    """A state dict with the metadata of the file that it was read from."""

    def __init__(self, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
        super().__init__(tensors)
        self.metadata = metadata


def load_state_dict(original: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
    """diffusers' function that reads a single file, which checks its header and keeps its metadata with the tensors."""
    tensors = state_dict(original, file, *args, **kwargs)
    if isinstance(file, str | Path) and str(file).endswith(".safetensors"):
        with safe_open(file, "pt") as opened:
            metadata = opened.metadata() or {}
        if COMFY_METADATA in metadata:
            return DescribedTensors(tensors, metadata)
    return tensors


def from_single_file(original: Any, cls: Any, *args: Any, **kwargs: Any) -> Any:
    """``FromOriginalModelMixin.from_single_file``, for files whose layers a config describes. Others are left alone."""
    if settings := _own_settings(args, kwargs):
        return _load_self_contained(cls, settings, args, kwargs)
    config = kwargs.get("quantization_config")
    token = _quantizing.set(is_ours(config))
    if _quantizing.get() and args and isinstance(args[0], dict):
        args = (copy.copy(args[0]), *args[1:])  # what has been read of it is dropped, and it may be the caller's own
    try:
        return original(cls, *args, **kwargs)
    except (LookupError, AttributeError, TypeError, OSError) as error:
        if not (isinstance(config, Quantization) and config.layers):
            raise
        if isinstance(error, OSError):
            _read_local(args[0] if args else "")
            raise
        raise CheckpointError(
            f"the file does not hold the tensors of a {cls.__name__} under diffusers' names ({type(error).__name__}: {error}); "
            "it is incomplete, or of another model than its config"
        ) from error
    finally:
        _quantizing.reset(token)


def should_convert(original: Any, model_state_dict: dict[str, Any], checkpoint_state_dict: dict[str, Any]) -> bool:
    """Whether to convert a single file. diffusers before 0.42 takes packed tensors for another program's layout."""
    is_packed = any(key.endswith(".codes") for key in checkpoint_state_dict)
    if not is_packed and _quantizing.get():
        defer_source_tensors(checkpoint_state_dict)
    return not is_packed and original(model_state_dict, checkpoint_state_dict)


def _read_local(source: Any) -> None:
    """Check the header of a file, if it is local, and raise what is wrong with it."""
    if isinstance(source, str | Path) and Path(source).is_file():
        read_header(source)


def _own_settings(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """config.json of a self-contained file, unless the caller says how to read it."""
    path = args[0] if args else kwargs.get("pretrained_model_link_or_path_or_dict")
    given = {"config", "quantization_config"} & kwargs.keys()
    if given or not isinstance(path, str | Path) or not Path(path).is_file() or Path(path).suffix != ".safetensors":
        return None
    return stored_settings(path)


def _load_self_contained(cls: Any, settings: dict[str, Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    config = Quantization.from_dict(settings["quantization_config"])
    plain = {key: value for key, value in settings.items() if key != "quantization_config"}
    with tempfile.TemporaryDirectory() as folder:  # diffusers takes the settings of the class from a folder only
        Path(folder, "config.json").write_text(json.dumps(plain))
        known = config.compute_dtype is None or {"dtype", "torch_dtype"} & kwargs.keys()
        dtype = {} if known else {"torch_dtype": getattr(torch, str(config.compute_dtype))}
        return cls.from_single_file(*args, **kwargs, **dtype, config=folder, quantization_config=config)
