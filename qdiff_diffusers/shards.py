"""Checks the index of a quantized checkpoint's shards before the loaders act on it: they trust it blindly."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from .checkpoint import index_shards
from .config import QDiffMethod


def check_indices(module: ModuleType, function: str) -> None:
    """Make ``module.function(name, index_file, ...)`` check the index files of our checkpoints first. Others are left alone."""
    original = getattr(module, function, None)
    if original is None or getattr(original, "checks_qdiff_indices", False):
        return

    @functools.wraps(original)
    def checked(name: Any, index_filename: Any, *args: Any, **kwargs: Any) -> Any:
        path = Path(index_filename)
        if path.is_file() and _is_ours(path.parent / "config.json"):
            index_shards(path)
        return original(name, index_filename, *args, **kwargs)

    checked.checks_qdiff_indices = True  # type: ignore[attr-defined]
    setattr(module, function, checked)


def _is_ours(config: Path) -> bool:
    try:
        return json.loads(config.read_text(encoding="utf-8"))["quantization_config"]["quant_method"] == QDiffMethod.QDIFF.value
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
