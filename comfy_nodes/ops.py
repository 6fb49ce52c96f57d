"""ComfyUI's layers, able to hold a packed weight: the ``custom_operations`` of a quantized model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.ops
import torch
from qdiff_kernels import use
from torch import Tensor, nn

from .layout import is_packed, packed_conv2d, packed_linear, shift_offset
from .patches import Patches


class PackedWeight:
    """Mixin for layers that may hold a packed weight; ``patches`` are the LoRAs and other patches on it."""

    patches: Patches | None = None
    offset: Tensor | None = None  # offset of the bias while a decoded weight is in the packed one's place; see layout.shift_offset
    kernels: str | None = None  # forced implementation of the ops

    def _load_from_state_dict(
        self: Any, state_dict: dict[str, Tensor], prefix: str, metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        """Assign tensors instead of copying them: a packed weight cannot be copied into the layer's dense one."""
        for name in ("weight", "bias"):
            if (value := state_dict.get(prefix + name)) is not None:
                setattr(self, name, nn.Parameter(value, requires_grad=False))
            elif getattr(self, name, None) is not None:
                missing.append(prefix + name)

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Replace parameters; assigning to ``.data`` would lose a packed weight's storage."""
        for name, parameter in self._parameters.items():
            if parameter is not None and not parameter.is_meta:  # not loaded yet
                self.register_parameter(name, nn.Parameter(fn(parameter), requires_grad=False))
        return self

    def compute(self: Any, x: Tensor, packed: Callable[..., Tensor], dense: Callable[..., Tensor]) -> Tensor:
        """Fetch weight and bias to the device of ``x``, and apply them and the patches."""
        comfy.ops.run_every_op()
        weight, bias, stream = comfy.ops.cast_bias_weight(
            self,
            dtype=self.weight.dtype,
            device=x.device,
            bias_dtype=x.dtype,
            offloadable=True,
            compute_dtype=x.dtype,
            want_requant=True,
        )
        try:
            patches = self.patches
            if patches is not None and patches.dense:
                exact = weight.to(torch.float32).dequantize() if is_packed(weight) else weight.to(torch.float32, copy=True)
                bias = _add(bias, shift_offset(weight) if is_packed(weight) else self.offset, x)
                return dense(x, patches.weight(exact).to(x.dtype), bias)
            if not is_packed(weight):
                y = dense(x, weight.to(x.dtype), _add(bias, self.offset, x))
            elif self.kernels is None:
                y = packed(x, weight, bias)
            else:
                with use(self.kernels):
                    y = packed(x, weight, bias)
            return y if patches is None else patches.add(x, y, dense)
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, stream)

    def convert_weight(self, weight: Tensor, inplace: bool = False, **kwargs: Any) -> Tensor:
        """The weight that ComfyUI calculates with, for example when it merges models: the decoded one."""
        return weight.dequantize() if is_packed(weight) else weight

    def set_weight(
        self: Any, weight: Tensor, inplace_update: bool = False, seed: int | None = None, return_weight: bool = False, **kwargs: Any
    ) -> Any:
        """Store a weight that ComfyUI has moved, cast or patched; in place of a packed one only if its shape differs."""
        if return_weight:
            return weight
        if is_packed(self.weight):
            self.offset = shift_offset(self.weight)
        self.weight = nn.Parameter(weight.to(self.weight.dtype), requires_grad=False)
        return None

    def is_plain(self: Any) -> bool:
        """Whether this layer has neither a packed weight nor patches, so that ComfyUI's own code applies."""
        return not is_packed(self.weight) and self.patches is None and self.offset is None


def _add(bias: Tensor | None, offset: Tensor | None, like: Tensor) -> Tensor | None:
    """The sum of bias and offset, either of which may be missing, on the device and in the dtype of ``like``."""
    terms = [term.to(like.device, torch.float32) for term in (bias, offset) if term is not None]
    return sum(terms[1:], terms[0]).to(like.dtype) if terms else None


def force_kernels(model: nn.Module, name: str) -> None:
    """Make a model's packed layers use one implementation of the ops, "triton" or "torch"."""
    for module in model.modules():
        if isinstance(module, PackedWeight):
            module.kernels = name


class Operations(comfy.ops.manual_cast):
    """ComfyUI's layers, with linear layers and 2-D convolutions that can hold packed weights."""

    class Linear(PackedWeight, comfy.ops.manual_cast.Linear):
        def __init__(self, in_features: int, out_features: int, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
            # On the meta device: weights are assigned when they are loaded, dense memory for them is never allocated.
            nn.Linear.__init__(self, in_features, out_features, bias, device="meta", dtype=dtype)
            self.weight_comfy_model_dtype = self.bias_comfy_model_dtype = dtype

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.is_plain():
                return super().forward(x, *args, **kwargs)
            return self.compute(x, packed_linear, nn.functional.linear)

    class Conv2d(PackedWeight, comfy.ops.manual_cast.Conv2d):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if self.is_plain():
                return super().forward(x, *args, **kwargs)
            window = (list(self.stride), list(self.padding), list(self.dilation))
            return self.compute(
                x,
                lambda x, weight, bias: packed_conv2d(x, weight, bias, window),
                lambda x, weight, bias, *other: nn.functional.conv2d(x, weight, bias, *(other or window)),
            )

    class Embedding(comfy.ops.manual_cast.Embedding):
        def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
            """Decode a packed table: ComfyUI looks rows up in a dense one only."""
            key = f"{prefix}weight"
            if is_packed(state_dict.get(key)):
                state_dict[key] = state_dict[key].dequantize()
            super()._load_from_state_dict(state_dict, prefix, *rest)
