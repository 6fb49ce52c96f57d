"""``from_single_file`` of a quantized file that is damaged: say how, where diffusers guesses at another program's layout."""

from __future__ import annotations

import functools
from pathlib import Path
from types import ModuleType
from typing import Any

from .checkpoint import read_header
from .config import QDiffConfig
from .errors import CheckpointError


def explain_failures(module: ModuleType) -> None:
    """Wrap ``module.FromOriginalModelMixin.from_single_file``, for files whose layers a config describes. Others are left alone."""
    mixin = module.FromOriginalModelMixin
    original = mixin.__dict__["from_single_file"].__func__
    if getattr(original, "explains_qdiff_failures", False):
        return

    @functools.wraps(original)
    def from_single_file(cls: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("quantization_config")
        try:
            return original(cls, *args, **kwargs)
        except (LookupError, AttributeError, TypeError, OSError) as error:
            if not (isinstance(config, QDiffConfig) and config.layers):
                raise
            if isinstance(error, OSError):
                _read_local(args[0] if args else "")
                raise
            raise CheckpointError(
                f"the file does not hold the tensors of a {cls.__name__} under diffusers' names ({type(error).__name__}: {error}); "
                "it is incomplete, or of another model than its config"
            ) from error

    from_single_file.explains_qdiff_failures = True  # type: ignore[attr-defined]
    mixin.from_single_file = classmethod(from_single_file)


def _read_local(source: Any) -> None:
    """What is wrong with the header of a local file, as an error; nothing if it is in order or somewhere else."""
    if isinstance(source, str | Path) and Path(source).is_file():
        read_header(source)
