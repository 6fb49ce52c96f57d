"""LoRA adapters on packed layers, exact where PEFT would add to a dense weight that is not there.

PEFT fuses an adapter by ``base_layer.weight.data += delta``. A packed layer's ``weight`` is made at each access, so the sum would
be lost without a word; here the adapter's factors are appended to the layer's low-rank branch instead, and saved with it.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import Conv2d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from qdiff_kernels import matrix_layout
from torch import Tensor, nn

from .errors import QDiffError
from .layers import PackedLayer


class PackedLora:
    """Mixin of the two LoRA layers: fuses into the packed layer's low-rank branch and takes it out again."""

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fuse the adapters, the active ones by default.

        Raises:
            QDiffError: the adapter is not a plain low-rank product, or not finite; nothing is fused.
        """
        base = self.get_base_layer()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        factors = {name: self._factors(name) for name in names}
        for name, (down, up) in factors.items():
            before = base.spec.extras_dtype
            base.append_branch(down, up)
            if self.lora_bias[name]:
                base.bias.data += self.lora_B[name].bias * self.scaling[name]
            self.merged_adapters.append(name)
            self.__dict__.setdefault("fused", []).append((name, len(down), self.scaling[name], before))

    def unmerge(self: Any) -> None:
        """Take the fused adapters out again, exactly."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        while self.merged_adapters:
            self.merged_adapters.pop()
            name, rank, scaling, before = self.fused.pop()
            self.get_base_layer().drop_branch(rank, before)
            if self.lora_bias.get(name):
                self.get_base_layer().bias.data -= self.lora_B[name].bias * scaling

    def _factors(self: Any, name: str) -> tuple[Tensor, Tensor]:
        """``down [rank, columns]`` and ``up [rows, rank]`` in float32, scaling included."""
        if name in getattr(self, "lora_variant", {}):
            raise QDiffError(
                f"adapter {name!r} is no plain LoRA (DoRA or another variant) and cannot be fused into a packed layer; "
                "leave it loaded and active without fuse_lora, or dequantize() the model first"
            )
        down = matrix_layout(self.lora_A[name].weight.detach()).float()
        up = matrix_layout(self.lora_B[name].weight.detach()).float() * self.scaling[name]
        if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
            raise QDiffError(f"adapter {name!r} holds NaN or infinity and was not fused")
        return down, up


class PackedLoraLinear(PackedLora, Linear):  # type: ignore[misc]
    """PEFT's LoRA layer over a packed linear layer.

    Where nothing is trained, plain adapters are added by the product itself: PEFT's passes over the output, one to scale and one to
    add, cost as much as the adapter's own arithmetic.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        asked_for_more = args or any(value is not None for value in kwargs.values())
        if asked_for_more or self.disable_adapters or self.merged or not all(self._adds_in_place(name, x) for name in names):
            return super().forward(x, *args, **kwargs)
        y: Tensor = self.base_layer(x)
        tokens, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for name in names:
            down, up = self._weights(name)
            out.addmm_(F.linear(tokens, down), up.T, alpha=self.scaling[name])
        return y

    def _weights(self, name: str) -> tuple[Any, Any]:
        """``[rank, columns]`` and ``[rows, rank]``, without the scaling."""
        return self.lora_A[name].weight, self.lora_B[name].weight

    def _adds_in_place(self, name: str, x: Tensor) -> bool:
        """Whether an adapter is a plain product in the dtype of ``x`` that nobody trains."""
        plain = name not in getattr(self, "lora_variant", {}) and not self.lora_bias.get(name)
        plain = plain and (not self.training or isinstance(self.lora_dropout[name], nn.Identity))
        down, up = self._weights(name)
        same = x.dtype == down.dtype == up.dtype
        untracked = not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
        return bool(plain and same and untracked and isinstance(self.scaling[name], int | float))


class PackedLoraConv2d(PackedLora, Conv2d):  # type: ignore[misc]
    """PEFT's LoRA layer over a packed convolution."""


PACKED: dict[type[nn.Module], type[nn.Module]] = {Linear: PackedLoraLinear, Conv2d: PackedLoraConv2d}


def create_new_module(create: Any, lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
    """What PEFT's ``LoraModel`` puts around a layer; around a packed one, a layer that fuses into its branch."""
    module = create(lora_config, adapter_name, target, **kwargs)
    if type(module) in PACKED and isinstance(module.get_base_layer(), PackedLayer):
        module.__class__ = PACKED[type(module)]
    return module


def refuse_to_fuse(replace_module: Any, self: Any, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module) -> None:
    """Adapters other than LoRA (LoKr, LoHa, OFT, ...) run beside a packed layer; fused, they would be lost without a word."""
    replace_module(self, parent, child_name, new_module, child)
    if isinstance(new_module, BaseTunerLayer) and isinstance(new_module.get_base_layer(), PackedLayer):
        new_module.merge = functools.partial(_refuse, type(self).__name__)  # type: ignore[method-assign]


def _refuse(kind: str, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    raise QDiffError(
        f"adapters of PEFT's {kind} cannot be fused into packed layers; leave them loaded and active without fuse_lora, or "
        "dequantize() the model first"
    )
