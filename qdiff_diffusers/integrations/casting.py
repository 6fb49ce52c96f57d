"""``pipe.to(dtype)`` and ``model.to(dtype)`` with packed layers.

diffusers refuses every ``model.to(dtype=...)`` of a quantized model, even those that its own ``load_ip_adapter`` (the model's
dtype, for the layers just added) and ``save_lora_adapter`` (``None``) make. Here only another dtype is refused.

In a pipeline diffusers casts one component after the other until it meets a quantized one, and raises: half of the pipeline is
cast by then. ``from_pipe`` ends the same way, even if nothing would have to be cast. Here it is all or nothing: a pipeline whose
quantized components have the dtype already casts the others, any other is refused before its first component is touched.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..errors import ConfigError
from ..model.packing import packed_layers


def model_to(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """``ModelMixin.to``; models without packed layers are left alone."""
    named = "dtype" in kwargs or any(isinstance(value, torch.dtype) for value in args)
    if not named or not getattr(self, "is_quantized", False) or not packed_layers(self):
        return original(self, *args, **kwargs)
    dtype = _dtype_in(args, kwargs)
    if dtype is None or (dtype == self.dtype and not self._keep_in_fp32_modules):
        args, kwargs = _without_dtype(args, kwargs)
        original(self, *args, **kwargs)
        return self if dtype is None else nn.Module.to(self, dtype)  # packed tensors keep their dtype
    return original(self, *args, **kwargs)


def _dtype_in(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.dtype | None:
    return next((value for value in (*args, kwargs.get("dtype")) if isinstance(value, torch.dtype)), None)


def _without_dtype(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    left = {key: value for key, value in kwargs.items() if key != "dtype"}
    return tuple(value for value in args if not isinstance(value, torch.dtype)), left


def pipeline_to(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """``DiffusionPipeline.to``; pipelines without packed layers are left alone."""
    dtype = _dtype_in(args, kwargs)
    models = {name: part for name, part in self.components.items() if isinstance(part, nn.Module)}
    packed = {name: part for name, part in models.items() if packed_layers(part)}
    if dtype is None or not packed:
        return original(self, *args, **kwargs)
    for name, part in packed.items():
        _check_dtype(name, part, dtype)
    args, kwargs = _without_dtype(args, kwargs)
    original(self, *args, **kwargs)
    for part in models.values():
        if not getattr(part, "is_quantized", False):
            part.to(dtype)
    return self


def _check_dtype(name: str, part: Any, dtype: torch.dtype) -> None:
    if part.dtype != dtype:
        raise ConfigError(
            f"component {name!r} is quantized, its other parameters are {part.dtype}: it cannot be cast to {dtype}. Nothing was "
            f"changed. Pass dtype={dtype} to from_pretrained; from_pipe(pipe, torch_dtype={part.dtype}) and "
            "Pipeline(**pipe.components) take the components as they are"
        )
