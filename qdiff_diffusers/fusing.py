"""The methods by which models, pipelines and PEFT's tuners load, fuse and save adapters, made safe for quantized models.

Nothing here imports PEFT: it takes seconds, and may not be installed.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import ExitStack
from typing import Any

from torch import nn

from .offloading import changing_all, without_group_offloading
from .packing import packed_layers

FUSING = ("fuse_lora", "merge_adapter", "_unload_and_optionally_merge")
OF_MODELS = ("add_adapter", "load_lora_adapter", "save_lora_adapter", "fuse_lora", "unfuse_lora")


def install_in_models(kind: Any) -> None:
    """Wrap what diffusers' ``PeftAdapterMixin`` does with a model's adapters; calling it again changes nothing."""
    for name in OF_MODELS:
        fuse_in_memory(kind, name)


def install_in_pipelines(kind: Any) -> None:
    """The same for ``LoraBaseMixin``: pipelines go past the models' methods to unfuse, and to fuse in text encoders."""
    for name in ("fuse_lora", "unfuse_lora"):
        fuse_in_memory(kind, name)


def fuse_in_memory(kind: Any, name: str) -> None:
    """Wrap a method of models, pipelines or tuners: all adapters are checked before the first is fused, offloading in groups, which
    holds on to every tensor, is off meanwhile, and an adapter that accelerate offloads is there to be read and replaced.

    What has no packed layers is left alone; calling it again changes nothing.
    """
    function = getattr(kind, name)
    if hasattr(function, "of_qdiff"):
        return
    signature = inspect.signature(function)

    @functools.wraps(function)
    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        models = [model for model in _models_of(self, given.get("components")) if packed_layers(model)]
        with ExitStack() as stack:
            for model in models:
                stack.enter_context(without_group_offloading(model))
            for model in models:
                if name in FUSING and given.get("merge", True):
                    _check_fusable(model, given.get("adapter_names"))
                if name in ("load_lora_adapter", "save_lora_adapter") and kwargs.get("_pipeline") is None:
                    stack.enter_context(changing_all(_parts_of_adapters(model)))
            return function(self, *args, **kwargs)

    wrapped.of_qdiff = True  # type: ignore[attr-defined]
    setattr(kind, name, wrapped)


def _check_fusable(model: nn.Module, adapter_names: list[str] | None) -> None:
    from .lora import check_fusable

    check_fusable(model, adapter_names)


def _parts_of_adapters(model: nn.Module) -> list[nn.Module]:
    from .lora import packed_adapters

    adapters = packed_adapters(model).values()
    return [part for adapter in adapters for name, part in adapter.named_modules() if name and "base_layer" not in name]


def _models_of(owner: Any, components: list[str] | None) -> list[nn.Module]:
    """The models that a method of ``owner`` is about: a pipeline's ``components``, a tuner's model, or itself."""
    if isinstance(owner, nn.Module):
        return [owner.model if hasattr(type(owner), "inject_adapter") else owner]  # type: ignore[list-item]
    parts = [getattr(owner, name, None) for name in components or ()]
    return [part for part in parts if isinstance(part, nn.Module)]
