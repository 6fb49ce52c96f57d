"""Checks the files of a quantized checkpoint before the loaders act on them: they trust an index blindly, and of a damaged file
they only say that it cannot be read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from .checkpoint import check_index, index_shards, read_header
from .config import QDiffMethod
from .errors import CheckpointError

SUFFIX = ".safetensors"


def shard_files(original: Any, name: Any, index_filename: Any, *args: Any, **kwargs: Any) -> Any:
    """The function that reads an index; those of our checkpoints are checked first. Others are left alone."""
    path = Path(index_filename)
    if path.is_file() and _is_ours(path.parent / "config.json"):
        # Of a local folder all shards must be there; from the Hub they are fetched after this.
        (check_index if Path(name).is_dir() else index_shards)(path)
    return original(name, index_filename, *args, **kwargs)


def state_dict(original: Any, file: Any, *args: Any, **kwargs: Any) -> Any:
    """The function that reads a file; the header of our safetensors files is checked first. Others are left alone."""
    if not (isinstance(file, str | Path) and str(file).endswith(SUFFIX) and _is_ours(Path(file).parent / "config.json")):
        return original(file, *args, **kwargs)
    read_header(file)
    try:
        return original(file, *args, **kwargs)
    except OSError as error:  # what safetensors alone knows to be wrong
        raise CheckpointError(f"{file} cannot be read: {error.__context__ or error}") from error


def _is_ours(config: Path) -> bool:
    try:
        return json.loads(config.read_text(encoding="utf-8"))["quantization_config"]["quant_method"] == QDiffMethod.QDIFF.value
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
