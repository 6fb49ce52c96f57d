"""Checks of checkpoint files that diffusers and transformers do not make: they trust an index blindly, do not say what is wrong
with a damaged file, know nothing of the scales of 8-bit weights, and write packed layers as pickles that cannot be read back."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..checkpoint.files import check_index, index_shards, read_header, says_quantized
from ..errors import CheckpointError, ConfigError
from ..model.packing import packed_layers

SUFFIX = ".safetensors"


def shard_files(original: Any, name: Any, index_filename: Any, *args: Any, **kwargs: Any) -> Any:
    """The libraries' function that reads an index, after a check of qdiff checkpoints. Other checkpoints are left alone."""
    path = Path(index_filename)
    if path.is_file() and says_quantized(path.parent / "config.json"):
        # Of a local folder all shards must be there; from the Hub they are fetched after this.
        (check_index if Path(name).is_dir() else index_shards)(path)
    return original(name, index_filename, *args, **kwargs)


def state_dict(original: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
    """The libraries' function that reads a file, after a check of the header of qdiff's files. Other files are left alone."""
    if not (isinstance(file, str | Path) and str(file).endswith(SUFFIX) and says_quantized(Path(file).parent / "config.json")):
        return original(file, *args, **kwargs)
    read_header(file)
    try:
        return original(file, *args, **kwargs)
    except OSError as error:  # what safetensors alone knows to be wrong
        raise CheckpointError(f"{file} cannot be read: {error.__context__ or error}") from error


def decode_sources(original: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' function that loads a state dict, after qdiff's quantizer has applied the scales of 8-bit weights.

    qdiff's errors are raised; transformers would turn them into lines of its report.
    """
    quantizer = _quantizer_in((*args, *kwargs.values()))
    if quantizer is None:
        return original(*args, **kwargs)
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.arguments["state_dict"] = quantizer.read_source(bound.arguments["state_dict"])
    out = original(*bound.args, **bound.kwargs)
    if quantizer.failure is not None:
        raise quantizer.failure
    return out


def _quantizer_in(arguments: Iterable[Any]) -> Any:
    """qdiff's quantizer among the arguments of a function of transformers, or in its settings; ``None`` if there is none."""
    candidates = (found for argument in arguments for found in (argument, getattr(argument, "hf_quantizer", None)))
    return next((found for found in candidates if hasattr(found, "read_source")), None)


def refuse_pickles(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """``save_pretrained``, which writes a quantized model as safetensors or not at all. Other models are left alone."""
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
