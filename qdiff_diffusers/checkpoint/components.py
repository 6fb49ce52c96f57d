"""The components of a stored pipeline."""

from __future__ import annotations

import importlib
from pathlib import Path

from torch import nn

from ..errors import ConfigError
from .folders import CONFIG, INDEX

DENOISERS = ("transformer", "unet")  # with a suffix too: "transformer_2" is the second expert of some video models


def pipeline_components(source: str | Path, revision: str | None = None) -> list[str] | None:
    """Names of a pipeline's components with weights; ``None`` if ``source`` is a bare model folder.

    Raises:
        ConfigError: there is no model at ``source``.
    """
    from diffusers import DiffusionPipeline  # late: pipelines take seconds to import

    root = Path(source)
    if root.is_dir() and not (root / INDEX).is_file():
        if (root / CONFIG).is_file():
            return None
        raise ConfigError(f"{source} holds neither {INDEX} (a pipeline) nor {CONFIG} (a model)")
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{source} is a file; give the folder of a pipeline or model")
    try:
        index = DiffusionPipeline.load_config(str(source), **({"revision": revision} if revision else {}))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} is no local folder, and no pipeline on the Hub that could be reached") from error
    parts = {name: value for name, value in index.items() if isinstance(value, list | tuple) and len(value) == 2 and value[0]}
    return [name for name, (library, kind) in parts.items() if _has_weights(library, kind)]


def _has_weights(library: str, kind: str) -> bool:
    """Whether a component of this class is a model and no scheduler, tokenizer or the like; ``True`` if the class is unknown."""
    if library not in ("diffusers", "transformers"):
        return True
    try:
        found = getattr(importlib.import_module(library), str(kind))
        return not isinstance(found, type) or issubclass(found, nn.Module)
    except (ImportError, AttributeError):
        return True
