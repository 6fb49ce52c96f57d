"""Tensors that offloading keeps elsewhere between uses, for code that reads or changes them outside of a forward pass.

accelerate leaves tensors on the meta device in an offloaded layer, and diffusers' offloading to disk leaves empty tensors of the
right shape: computing with them is an error at best, and a wrong result without any message at worst.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import QDiffError

GROUPS, CASTING = "group_offloading", "layerwise_casting"  # diffusers' names of its hooks
GROUP_HOOKS = (GROUPS, "layer_execution_tracker", "lazy_prefetch_group_offloading")


def has_hooks(module: nn.Module) -> bool:
    """Whether accelerate or diffusers has put a hook on ``module``; most have none, and need nothing of this file."""
    return "_hf_hook" in module.__dict__ or "_diffusers_hook" in module.__dict__


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of ``module`` itself, without its children's."""
    return {name: tensor for name, tensor in (*module._parameters.items(), *module._buffers.items()) if tensor is not None}


def fetch(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of ``module`` itself, from wherever its own hooks keep them, on the device that computes. Nothing is changed."""
    tensors = own_tensors(module)
    if not has_hooks(module):
        return tensors
    for hook in _moving_hooks(module):
        kept = {name: hook.weights_map[name] for name, tensor in tensors.items() if tensor.is_meta and name in hook.weights_map}
        tensors |= {name: tensor.to(hook.execution_device) for name, tensor in kept.items()}
    if (hook := diffusers_hook(module, GROUPS)) is None:
        return tensors
    if hook.group.offload_to_disk_path and Path(hook.group.safetensors_file_path).is_file():
        stored = load_file(hook.group.safetensors_file_path)
        keys = hook.group.tensor_to_key
        tensors = {name: stored[keys[tensor]] if tensor in keys else tensor for name, tensor in tensors.items()}
    return {name: tensor.to(hook.group.onload_device) for name, tensor in tensors.items()}


def diffusers_hook(module: nn.Module, name: str) -> Any:
    """diffusers' hook of this name on ``module``, or ``None``."""
    registry = module.__dict__.get("_diffusers_hook")
    return None if registry is None else registry.get_hook(name)


def _moving_hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks that keep tensors of ``module`` elsewhere."""
    hook = module.__dict__.get("_hf_hook")
    return [hook for hook in getattr(hook, "hooks", (hook,)) if getattr(hook, "offload", False) is True]


def away_between_calls(module: nn.Module) -> bool:
    """Whether hooks of ``module`` itself keep its tensors on another device, on disk or in another dtype while it is not called."""
    if not has_hooks(module):
        return False
    group = getattr(diffusers_hook(module, GROUPS), "group", None)
    grouped = group is not None and (group.offload_to_disk_path is not None or group.onload_device != group.offload_device)
    return bool(grouped or _moving_hooks(module) or diffusers_hook(module, CASTING) is not None)


@contextmanager
def changing(module: nn.Module) -> Iterator[None]:
    """A context for replacing, adding or removing tensors of ``module``: they are fetched, and offloading learns of new ones.

    Raises:
        QDiffError: ``module`` is in diffusers' group offloading, which notes each tensor; see :func:`without_group_offloading`.
    """
    group = getattr(diffusers_hook(module, GROUPS), "group", None)
    if group is not None and (group.offload_to_disk_path or group.stream is not None):
        raise QDiffError(
            f"a {type(module).__name__} is offloaded in groups, which note every tensor, and cannot be changed meanwhile; go "
            "through the methods of the model or the pipeline (fuse_lora, unfuse_lora, dequantize), or offload afterwards"
        )
    hooks = _moving_hooks(module)
    away = [hook for hook in hooks if any(tensor.is_meta for tensor in own_tensors(module).values())]
    for hook in away:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in hooks:
            _remember(hook, own_tensors(module))
        for hook in away:
            hook.post_forward(module, None)


def _remember(hook: Any, tensors: dict[str, Tensor]) -> None:
    """Make accelerate's ``hook`` fetch ``tensors`` from now on. Those that it has offloaded already it keeps."""
    kept = {name: hook.weights_map[name] if tensor.is_meta else tensor.detach().to("cpu") for name, tensor in tensors.items()}
    hook.weights_map = kept
    hook.original_devices = {name: tensor.device for name, tensor in kept.items()}


@contextmanager
def changing_all(modules: Iterable[nn.Module]) -> Iterator[None]:
    """:func:`changing` for those of ``modules`` that accelerate offloads."""
    with ExitStack() as stack:
        for module in modules:
            if _moving_hooks(module):
                stack.enter_context(changing(module))
        yield


@contextmanager
def without_group_offloading(model: nn.Module) -> Iterator[None]:
    """A context in which a model has no group offloading; diffusers itself suspends it so around adapters."""
    hooks = (diffusers_hook(module, GROUPS) for module in model.modules())
    hook = next((hook for hook in hooks if hook is not None), None)
    if hook is None:
        yield
        return
    from diffusers.hooks.group_offloading import _apply_group_offloading
    from diffusers.hooks.hooks import HookRegistry

    registry = HookRegistry.check_if_exists_or_initialize(model)
    for name in GROUP_HOOKS:
        registry.remove_hook(name, recurse=True)
    try:
        yield
    finally:
        _apply_group_offloading(model, hook.config)


def deinitialize_hook(original: Any, self: Any, module: nn.Module) -> nn.Module:
    """``GroupOffloadingHook.deinitalize_hook``, which reads back what was written to disk.

    diffusers takes the hooks off and puts them on again whenever adapters come or go. What lay on disk is lost by that: the new
    hooks write tensors with nothing in them, or find the old file and leave it, though its tensors may be others by now.
    """
    _read_back(self.group)
    return original(self, module)


def _read_back(group: Any) -> None:
    if not group.offload_to_disk_path or not group._is_offloaded_to_disk:
        return
    file = Path(group.safetensors_file_path)
    stored = load_file(file, device=str(group.offload_device))
    for key, tensor in group.key_to_tensor.items():
        tensor.data = stored[key]
    group._is_offloaded_to_disk = False
    file.unlink()


def check_forward(name: str, module: nn.Module) -> None:
    """Make sure that only hooks known to :func:`follow_class` wrap the ``forward`` of layer ``name``.

    Raises:
        QDiffError: something else replaced ``forward``.
    """
    own = module.__dict__.get("forward")
    known = own is None or "_old_forward" in module.__dict__ or "_diffusers_hook" in module.__dict__
    if not known and not (isinstance(own, MethodType) and own.__self__ is module):
        raise QDiffError(
            f"the forward of layer {name} has been replaced by {own!r}, and would go on with what the layer was; `del layer."
            "forward` first and replace it again afterwards"
        )


def follow_class(module: nn.Module, before: type[nn.Module]) -> None:
    """Let hooks that wrapped the ``forward`` of ``module`` call the new one, now that its class is no longer ``before``.

    accelerate and diffusers hold on to the bound method, and leave it on the module when they are taken off.
    """
    new = MethodType(type(module).forward, module)

    def stale(value: Any) -> bool:
        return isinstance(value, MethodType) and value.__self__ is module and value.__func__ is before.forward

    for name in ("forward", "_old_forward"):
        if stale(module.__dict__.get(name)):
            module.__dict__[name] = new
    if stale(getattr(module.__dict__.get("forward"), "__wrapped__", None)):
        module.__dict__["forward"].__wrapped__ = new
    for reference in getattr(module.__dict__.get("_diffusers_hook"), "_fn_refs", ()):
        for name in ("forward", "original_forward"):
            if stale(getattr(reference, name)):
                setattr(reference, name, new)
