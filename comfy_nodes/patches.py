"""What is added to packed weights: LoRAs as an exact low-rank branch beside the layer, everything else on its dense weight.

A packed weight cannot take up a patch and stay packed. ComfyUI's own way, decode, patch and quantize again, would be lossy or, for
codebooks, take minutes; so patches stay beside the weight and act when the layer is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import comfy.lora
from comfy.weight_adapter import LoRAAdapter
from torch import Tensor

from qdiff_diffusers.errors import ConfigError

from .layout import is_packed


class Branch(NamedTuple):
    """``scale * up @ down``, for the slice ``(dim, start, length)`` of the weight or for all of it."""

    up: Tensor
    down: Tensor
    scale: float
    part: tuple[int, int, int] | None

    def to(self, like: Tensor) -> Branch:
        return self._replace(up=self.up.to(like.device, like.dtype), down=self.down.to(like.device, like.dtype))


class Patches:
    """The patches on one packed weight, in ComfyUI's form. ``dense`` says that one of them is no plain low-rank product."""

    def __init__(self, key: str, patches: list[Any]) -> None:
        self.key, self.patches = key, patches
        branches = [_branch(patch) for patch in patches]
        self.dense = any(branch is None for branch in branches)
        self.branches = [branch for branch in branches if branch is not None]
        self.ready: list[Branch] = []

    def weight(self, dense: Tensor) -> Tensor:
        """The patched weight, from a decoded one that may be overwritten."""
        return comfy.lora.calculate_weight(self.patches, dense, self.key)

    def add(self, x: Tensor, y: Tensor, layer: Callable[..., Tensor]) -> Tensor:
        """``y``, the layer's output for ``x``, with what the branches add. ``layer(x, weight, bias, ...)`` is the dense layer."""
        if not self.ready or (self.ready[0].up.device, self.ready[0].up.dtype) != (x.device, x.dtype):
            self.ready = [branch.to(x) for branch in self.branches]
        channels = -1 if self.branches[0].down.ndim == 2 else 1
        for branch in self.ready:
            dim, start, length = branch.part or (None, 0, 0)
            part = x.narrow(channels, start, length) if dim == 1 else x
            hidden = layer(part, branch.down, None)
            if branch.up.ndim == 4:
                delta = layer(hidden, branch.up, None, [1, 1], [0, 0], [1, 1]) * branch.scale
            else:
                delta = layer(hidden, branch.up, None) * branch.scale
            if dim == 0:
                y = y.clone()
                y.narrow(channels, start, length).add_(delta)
            else:
                y = y + delta
        return y


def _branch(patch: Any) -> Branch | None:
    """A patch as a low-rank branch, ``None`` if it is something else."""
    strength, adapter, strength_model, part, function = patch
    if type(adapter) is not LoRAAdapter or strength_model != 1.0 or function is not None:
        return None
    up, down, alpha, *others = adapter.weights
    if any(other is not None for other in others) or not (part is None or part[0] in (0, 1)):
        return None
    if down.ndim == 2:
        up = up.flatten(1)
    elif down.ndim == 4:
        up = up.reshape(*up.shape[:2], 1, 1)
    else:
        return None
    return Branch(up, down, strength * (1.0 if alpha is None else alpha / down.shape[0]), part)


_ADOPTED: dict[type, type] = {}


def adopt(patcher: Any) -> Any:
    """Make a model patcher keep its hands off packed weights. It stays of its own class, static or dynamic, which is extended."""
    kind = type(patcher)
    if issubclass(kind, PackedPatcher):
        return patcher
    if kind not in _ADOPTED:
        _ADOPTED[kind] = type(f"QDiff{kind.__name__}", (PackedPatcher, kind), {})
    patcher.__class__ = _ADOPTED[kind]
    return patcher


class PackedPatcher:
    """Mixin of ComfyUI's model patchers."""

    def clone(self: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI makes a patcher of its own class where a node wants one without dynamic VRAM."""
        return adopt(super().clone(*args, **kwargs))

    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._without_packed_patches() as held:
            result = super().load(*args, **kwargs)
        self._attach(held)
        return result

    def unpatch_model(self: Any, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        result = super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            self._attach({})
        return result

    def state_dict_for_saving(self: Any, *args: Any, **kwargs: Any) -> Any:
        """ComfyUI's save nodes would write packed bytes that nothing reads.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("this MODEL is quantized by qdiff; save it with Save Quantized Model (qdiff)")

    def patch_hook_weight_to_device(
        self: Any, hooks: Any, combined_patches: dict[str, Any], key: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Patches that come and go during sampling."""
        if (module := self._packed_modules().get(key)) is None:
            return super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)
        module.patches = Patches(key, [*self.patches.get(key, ()), *combined_patches[key]])
        self.__dict__.setdefault("hooked", set()).add(key)
        return None

    def unpatch_hooks(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().unpatch_hooks(*args, **kwargs)
        modules = self._packed_modules()
        for key in self.__dict__.pop("hooked", ()):
            modules[key].patches = Patches(key, self.patches[key]) if key in self.patches else None
        return result

    def _packed_modules(self: Any) -> dict[str, Any]:
        """Modules with a packed weight, by the weight's name."""
        return {f"{n}.weight": m for n, m in self.model.named_modules() if is_packed(getattr(m, "weight", None))}

    def _attach(self: Any, patches: dict[str, Any]) -> None:
        for key, module in self._packed_modules().items():
            module.patches = Patches(key, patches[key]) if key in patches else None

    @contextmanager
    def _without_packed_patches(self: Any) -> Iterator[dict[str, Any]]:
        """ComfyUI must not see patches of packed weights while it loads."""
        modules = self._packed_modules()
        held = {key: patches for key, patches in self.patches.items() if key in modules}
        everything = self.patches
        self.patches = {key: patches for key, patches in everything.items() if key not in held}
        try:
            yield held
        finally:
            self.patches = everything
