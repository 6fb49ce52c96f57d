"""Methods of models, pipelines and PEFT's tuners that load, fuse or save, made safe for offloaded quantized models.

Nothing here imports PEFT: it takes seconds, and may not be installed.
"""

from __future__ import annotations

import inspect
import sys
from contextlib import ExitStack
from typing import Any

from torch import nn

from ..errors import QDiffError
from ..layers import PackedLayer
from ..layers.offloading import changing_all, without_group_offloading
from ..model.packing import is_or_was_packed

FUSING = ("fuse_lora", "merge_adapter", "_unload_and_optionally_merge")


def on_offloaded(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    """The method ``original`` of a model, pipeline or tuner, with offloading suspended where it needs the tensors.

    All adapters are checked before the first is fused. Group offloading, which keeps references to every tensor, is off meanwhile.
    Adapters that accelerate offloads are fetched; a whole model that it offloads is not, and saving it is refused. Models that
    never had packed layers are left alone.
    """
    name = original.__name__
    saving = name == "save_pretrained"
    given = inspect.signature(original).bind(self, *args, **kwargs).arguments
    models = [model for model in _models_of(self, given.get("components")) if is_or_was_packed(model)]
    for model in models if saving else ():
        _check_in_memory(model)
    with ExitStack() as stack:
        for model in models:
            stack.enter_context(without_group_offloading(model))
        for model in models:
            if name in FUSING and given.get("merge", True):
                _check_fusable(model, given.get("adapter_names"))
            if not saving and kwargs.get("_pipeline") is None:  # or diffusers takes the hooks off itself
                stack.enter_context(changing_all(_parts_of_adapters(model)))
        return original(self, *args, **kwargs)


def _check_in_memory(model: nn.Module) -> None:
    away = next((name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta), None)
    if away is not None:
        raise QDiffError(
            f"{away} is offloaded by accelerate, and a model is saved from memory: take the hooks off first "
            "(pipe.remove_all_hooks() or accelerate.hooks.remove_hook_from_module(model, recurse=True)), offload again afterwards"
        )


def _check_fusable(model: nn.Module, adapter_names: list[str] | None) -> None:
    from ..layers.adapters import check_fusable

    check_fusable(model, adapter_names)


def _parts_of_adapters(model: nn.Module) -> list[nn.Module]:
    """The adapters' own modules, and the dense layers under some of them, which PEFT changes without asking where they are."""
    if "peft" not in sys.modules:
        return []
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapters = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    parts = {id(part): part for adapter in adapters for part in adapter.modules() if not isinstance(part, PackedLayer)}
    return list(parts.values())


def _models_of(owner: Any, components: list[str] | None) -> list[nn.Module]:
    """The models that a method of ``owner`` acts on: a pipeline's ``components``, a tuner's model, or ``owner`` itself."""
    if isinstance(owner, nn.Module):
        return [owner.model if hasattr(type(owner), "inject_adapter") else owner]  # type: ignore[list-item]
    parts = [getattr(owner, name, None) for name in components or ()]
    return [part for part in parts if isinstance(part, nn.Module)]
