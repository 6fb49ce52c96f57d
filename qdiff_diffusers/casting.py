"""``pipe.to(dtype)`` with quantized components.

diffusers casts one component after the other until it meets a quantized one, and raises: half of the pipeline is cast by then.
``from_pipe`` ends the same way, even if nothing would have to be cast. Here it is all or nothing: a pipeline whose quantized
components have the dtype already casts the others, any other is refused before its first component is touched.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

import torch
from torch import nn

from .errors import ConfigError
from .packing import packed_layers


def guard_pipelines(module: ModuleType) -> None:
    """Wrap ``module.DiffusionPipeline.to``; calling it again changes nothing. Pipelines without packed layers are left alone."""
    kind = module.DiffusionPipeline
    if not hasattr(kind.to, "of_qdiff"):
        kind.to = _all_or_nothing(kind.to)


def _all_or_nothing(original: Any) -> Any:
    @functools.wraps(original)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        dtype = next((value for value in (*args, kwargs.get("dtype")) if isinstance(value, torch.dtype)), None)
        models = {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}
        packed = {name: part for name, part in models.items() if packed_layers(part)}
        if dtype is None or not packed:
            return original(self, *args, **kwargs)
        for name, part in packed.items():
            _check_dtype(name, part, dtype)
        kwargs.pop("dtype", None)
        original(self, *(value for value in args if not isinstance(value, torch.dtype)), **kwargs)
        for part in models.values():
            if not getattr(part, "is_quantized", False):
                part.to(dtype)
        return self

    to.of_qdiff = True  # type: ignore[attr-defined]
    return to


def _check_dtype(name: str, part: Any, dtype: torch.dtype) -> None:
    if part.dtype != dtype:
        raise ConfigError(
            f"component {name!r} is quantized, its other parameters are {part.dtype}: it cannot be cast to {dtype}. Nothing was "
            f"changed. Pass dtype={dtype} to from_pretrained; from_pipe(pipe, torch_dtype={part.dtype}) and "
            "Pipeline(**pipe.components) take the components as they are"
        )
