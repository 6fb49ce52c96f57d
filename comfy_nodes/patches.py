"""Patches on packed weights: LoRAs as an exact low-rank branch beside the layer, everything else on its dense weight.

A packed weight cannot absorb a patch and stay packed. ComfyUI decodes, patches and quantizes again, which would be lossy or, for
codebooks, take minutes; so here patches stay beside the weight and act when the layer is called.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import comfy.lora
import comfy.utils
from comfy.model_patcher import LowVramPatch
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
    """The patches on one packed weight, in ComfyUI's form. ``dense`` is set if one of them is no plain low-rank product.

    As in ComfyUI, a LoRA that was made for another shape is left out, and the log says so.
    """

    def __init__(self, key: str, patches: list[Any], shape: tuple[int, ...]) -> None:
        self.key, self.patches = key, [patch for patch in patches if _fits(key, patch, shape)]
        branches = [_branch(patch, shape) for patch in self.patches]
        self.dense = any(branch is None for branch in branches)
        self.branches = [branch for branch in branches if branch is not None]
        self.ready: list[Branch] = []

    def weight(self, dense: Tensor) -> Tensor:
        """The patched weight, from a decoded one that may be overwritten."""
        return comfy.lora.calculate_weight(self.patches, dense, self.key)

    def add(self, x: Tensor, y: Tensor, layer: Callable[..., Tensor]) -> Tensor:
        """``y``, the layer's output for ``x``, plus those of the branches. ``layer(x, weight, bias, ...)`` is the dense layer."""
        if not self.branches:
            return y
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


def _low_rank(patch: Any) -> tuple[Tensor, Tensor, Any] | None:
    """``up``, ``down`` and ``alpha`` of a patch that is a plain low-rank product, ``None`` if it is something else."""
    _, adapter, strength_model, part, function = patch
    if type(adapter) is not LoRAAdapter or strength_model != 1.0 or function is not None:
        return None
    up, down, alpha, *others = adapter.weights
    if any(other is not None for other in others) or not (part is None or part[0] in (0, 1)):
        return None
    return up, down, alpha


def _shape_of(part: tuple[int, int, int] | None, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a slice of a weight."""
    return tuple(part[2] if part and part[0] == dim else size for dim, size in enumerate(shape))


def _fits(key: str, patch: Any, shape: tuple[int, ...]) -> bool:
    """Whether a low-rank product has as many rows and columns as the weight; ComfyUI checks all other patches itself."""
    if (factors := _low_rank(patch)) is None:
        return True
    up, down, _ = factors
    rows, *columns = _shape_of(patch[3], shape)
    if up.shape[0] == rows and down.shape[1:].numel() == math.prod(columns):
        return True
    logging.error("LoRA for %s is left out: it is %d x %d, the layer is %s", key, len(up), down.shape[1:].numel(), list(shape))
    return False


def _branch(patch: Any, shape: tuple[int, ...]) -> Branch | None:
    """A patch as a low-rank branch of a layer with this shape, ``None`` if it is something else.

    LoRAs of linear layers are also stored as 1 x 1 convolutions, and the other way round.
    """
    if (factors := _low_rank(patch)) is None:
        return None
    up, down, alpha = factors
    rank, (rows, *columns) = down.shape[0], _shape_of(patch[3], shape)
    scale = patch[0] * (1.0 if alpha is None else alpha / rank)
    return Branch(up.reshape(rows, rank, *(1 for _ in columns[1:])), down.reshape(rank, *columns), scale, patch[3])


_ADOPTED: dict[type, type] = {}


def adopt(patcher: Any) -> Any:
    """Let a model patcher handle packed weights, by extending its class, static or dynamic."""
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
        """Clone, and adopt a patcher of ComfyUI's own class, which it makes for a node that wants no dynamic VRAM."""
        return adopt(super().clone(*args, **kwargs))

    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._without_packed_patches() as held:
            result = super().load(*args, **kwargs)
        self._attach(held)
        return result

    def partially_unload(self: Any, *args: Any, **kwargs: Any) -> Any:
        with self._without_packed_patches() as held:
            result = super().partially_unload(*args, **kwargs)
        self._attach(held)
        return result

    def unpatch_model(self: Any, device_to: Any = None, unpatch_weights: bool = True) -> Any:
        result = super().unpatch_model(device_to, unpatch_weights)
        if unpatch_weights:
            self._attach({})
        return result

    def patch_weight_to_device(self: Any, key: str, device_to: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Move a packed weight as it is, or let ComfyUI put patches that change its shape on the decoded one.

        Raises:
            ConfigError: a patch wants another shape that the weight cannot be padded to.
        """
        weight = comfy.utils.get_attr(self.model, key)
        packed = weight if is_packed(weight) else getattr(self.backup.get(key), "weight", None)
        if packed is None or not is_packed(packed):
            return super().patch_weight_to_device(key, device_to, *args, **kwargs)
        if key in self.patches:
            _check_padding(key, tuple(packed.shape), self._new_shape(key, packed))
            if packed is not weight:  # patched already
                comfy.utils.set_attr_param(self.model, key, packed)
        elif kwargs.get("force_cast") and not kwargs.get("return_weight"):
            self.backup.setdefault(key, Backup(packed.to(device=self.offload_device), False))
            comfy.utils.set_attr_param(self.model, key, packed.to(device=device_to))
            return None
        return super().patch_weight_to_device(key, device_to, *args, **kwargs)

    def state_dict_for_saving(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse ComfyUI's save nodes, which would write packed bytes that nothing reads.

        Raises:
            ConfigError: always.
        """
        raise ConfigError("this MODEL is quantized by qdiff; save it with Save Quantized Model (qdiff)")

    def patch_hook_weight_to_device(
        self: Any, hooks: Any, combined_patches: dict[str, Any], key: str, *args: Any, **kwargs: Any
    ) -> Any:
        """Apply patches that come and go during sampling.

        Raises:
            ConfigError: one of them changes the shape of the weight.
        """
        weight = comfy.utils.get_attr(self.model, key)
        if not is_packed(weight) or key not in combined_patches:
            return super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)
        patches = [*self.withheld.get(key, self.patches.get(key, ())), *combined_patches[key]]
        shape = tuple(weight.shape)
        if (wanted := tuple(comfy.lora.calculate_shape(patches, weight, key))) != shape:
            raise ConfigError(
                f"a LoRA in hooks makes {key} {list(wanted)} instead of {list(shape)}, and hooks cannot change shapes; apply it "
                "with LoraLoaderModelOnly"
            )
        module, _ = comfy.utils.resolve_attr(self.model, key)
        module.patches = Patches(key, patches, shape)
        self.__dict__.setdefault("hooked", set()).add(key)
        return None

    def unpatch_hooks(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = super().unpatch_hooks(*args, **kwargs)
        hooked, weights = self.__dict__.pop("hooked", set()), self._packed_weights()
        self._attach({**self.patches, **self.withheld}, [key for key in hooked if key in weights])
        return result

    @property
    def withheld(self: Any) -> dict[str, Any]:
        """The patches of packed weights that are hidden from ComfyUI for a while, by the weights' names."""
        return self.__dict__.get("_withheld", {})

    def _packed_weights(self: Any) -> dict[str, Any]:
        """The packed weights by name, including those that a decoded weight replaces for now."""
        weights = {f"{n}.weight": getattr(m, "weight", None) for n, m in self.model.named_modules()}
        weights |= {key: backup.weight for key, backup in self.backup.items() if is_packed(backup.weight)}
        return {key: weight for key, weight in weights.items() if is_packed(weight)}

    def _new_shape(self: Any, key: str, weight: Any) -> tuple[int, ...]:
        """The shape that the patches give a weight."""
        return tuple(comfy.lora.calculate_shape(self.patches[key], weight, key))

    def _attach(self: Any, patches: dict[str, Any], keys: Iterable[str] | None = None) -> None:
        """Put patches beside the packed weights of these names, by default of all that no hook has patched."""
        weights, hooked = self._packed_weights(), self.__dict__.get("hooked", ())
        for key in [key for key in weights if key not in hooked] if keys is None else keys:
            module, _ = comfy.utils.resolve_attr(self.model, key)
            module.patches = Patches(key, patches[key], tuple(weights[key].shape)) if key in patches else None

    @contextmanager
    def _without_packed_patches(self: Any) -> Iterator[dict[str, Any]]:
        """A context that hides the patches of packed weights from ComfyUI while it loads, except those that change a shape.

        Models read the shape to know how many channels to give a layer, so such a weight is decoded as long as it is patched.
        """
        weights = self._packed_weights()
        patched = [key for key in weights if key in self.patches]
        reshaped = [key for key in patched if self._new_shape(key, weights[key]) != tuple(weights[key].shape)]
        for key in set(weights) - set(reshaped):
            if not is_packed(comfy.utils.get_attr(self.model, key)):  # older ComfyUIs leave it so with dynamic VRAM
                self._put_back(key)
                self._put_back(f"{key.removesuffix('weight')}bias")
        everything, before = self.patches, self.withheld
        held = {key: everything[key] for key in patched if key not in reshaped}
        self.patches, self._withheld = {key: p for key, p in everything.items() if key not in held}, held
        try:
            yield held
            for key in reshaped:
                self._reshape(key)
        finally:
            self.patches, self._withheld = everything, before

    def _put_back(self: Any, key: str) -> None:
        """Restore a tensor from ComfyUI's backup, if there is one."""
        if backup := self.backup.pop(key, None):
            comfy.utils.set_attr_param(self.model, key, backup.weight)

    def _reshape(self: Any, key: str) -> None:
        """Give its new shape to a weight that ComfyUI left on the CPU to be patched at each use."""
        module, _ = comfy.utils.resolve_attr(self.model, key)
        if is_packed(module.weight):
            module.weight_function = [f for f in module.weight_function if not isinstance(f, LowVramPatch)]
            self.patch_weight_to_device(key, self.load_device)


class Backup(NamedTuple):
    """ComfyUI's backup of a weight."""

    weight: Any
    inplace_update: bool


def _check_padding(key: str, old: tuple[int, ...], new: tuple[int, ...]) -> None:
    """Refuse a new shape that is not the old one padded with zeros."""
    if len(old) != len(new) or any(a > b for a, b in zip(old, new, strict=True)):
        raise ConfigError(f"a LoRA makes {key} {list(new)}, which is smaller than the model's {list(old)}; it is for another model")
