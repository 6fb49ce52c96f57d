"""LoRA adapters on packed layers, exact where PEFT would add to a dense weight that is not there.

PEFT fuses an adapter by ``base_layer.weight.data += delta``. A packed layer's ``weight`` is decoded at each access, so the sum
would be lost silently; here the adapter's factors are appended to the layer's low-rank branch instead, and saved with it.
"""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Conv2d, Linear
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from qdiff_kernels import matrix_layout
from torch import Tensor, nn

from ..errors import QDiffError
from . import PackedLayer
from .offloading import away_between_calls, changing, fetch, follow_class


class Fused(NamedTuple):
    """Changes that fusing one adapter made to a layer, to be undone by ``unmerge``."""

    name: str
    rank: int
    scaling: float
    extras_dtype: str  # dtype of the layer's branch before
    bias: Tensor | None  # bias of the layer before, if it was changed


class Factors(NamedTuple):
    """One adapter in float32, scaling included: ``down [rank, columns]``, ``up [rows, rank]``, ``bias [rows]`` if it has one."""

    down: Tensor
    up: Tensor
    bias: Tensor | None


class PackedLora:
    """Mixin of the two LoRA layers: fuses into the packed layer's low-rank branch and takes it out again."""

    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fuse the adapters, the active ones by default.

        Raises:
            QDiffError: the adapter is not a plain low-rank product, or not finite; nothing is fused.
        """
        base, factors = self.get_base_layer(), self.factors(adapter_names)
        with changing(base):
            for name, (down, up, bias) in factors.items():
                before = None if bias is None else base.bias.detach()
                fused = Fused(name, len(down), float(self.scaling[name]), base.spec.extras_dtype, before)
                self.__dict__.setdefault("fused", []).append(fused)
                base.append_branch(down, up)
                if bias is not None:
                    _set_bias(base, base.bias.float() + bias.to(base.bias.device))
                self.merged_adapters.append(name)

    def unmerge(self: Any) -> None:
        """Take the fused adapters out again, exactly."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        with changing(base):
            while self.merged_adapters:
                self.merged_adapters.pop()
                fused = self.fused.pop()
                base.drop_branch(fused.rank, fused.extras_dtype)
                if fused.bias is not None:
                    _set_bias(base, fused.bias)

    def factors(self: Any, adapter_names: list[str] | None = None) -> dict[str, Factors]:
        """What fusing would add to the layer, by adapter, the active ones by default.

        Raises:
            QDiffError: an adapter cannot be fused.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.lora_A]
        return {name: self._factors(name) for name in names}

    def _factors(self: Any, name: str) -> Factors:
        if name in getattr(self, "lora_variant", {}):
            raise QDiffError(
                f"adapter {name!r} is no plain LoRA (DoRA or another variant) and cannot be fused into a packed layer; "
                "leave it loaded and active without fuse_lora, or dequantize() the model first"
            )
        down, up = _tensor(self.lora_A[name], "weight"), _tensor(self.lora_B[name], "weight")
        bias = _tensor(self.lora_B[name], "bias")
        if any(tensor is not None and tensor.is_meta for tensor in (down, up, bias)):
            raise QDiffError(
                f"adapter {name!r} is on the meta device, where its weights are not; take the hooks off that offload the model "
                "(pipe.remove_all_hooks()), fuse, and offload again afterwards"
            )
        if bias is not None and self.get_base_layer().bias is None:
            raise QDiffError(f"adapter {name!r} adds a bias and the layer has none; leave it loaded and active without fuse_lora")
        scaling = self.scaling[name]
        scaled = None if bias is None else bias.detach().float() * scaling
        factors = Factors(matrix_layout(down.detach()).float(), matrix_layout(up.detach()).float() * scaling, scaled)
        if not all(torch.isfinite(factor).all() for factor in factors if factor is not None):
            raise QDiffError(f"adapter {name!r} holds NaN or infinity and was not fused")
        return factors

    def check_variants(self: Any) -> None:
        """Make sure that DoRA and other variants of LoRA, which read the layer under them between its calls, find it there.

        Raises:
            QDiffError: offloading or casting keeps that layer's tensors elsewhere, or in another dtype, between its calls.
        """
        variants = getattr(self, "lora_variant", {})
        if variants and not self.disable_adapters and not self.merged and away_between_calls(self.get_base_layer()):
            for name in self.active_adapters:
                if name in variants:
                    raise QDiffError(
                        f"adapter {name!r} is no plain LoRA (DoRA or another variant): it reads the layer under it, which "
                        "sequential or leaf-level offloading and layerwise casting keep elsewhere between its calls; use model CPU "
                        "offload or group offload by blocks"
                    )

    def check_dense_base(self: Any, layer: str) -> None:
        """Make sure that PEFT could take the fused adapters out of a dense layer again: it multiplies them by today's scaling.

        Raises:
            QDiffError: one was fused with another; ``layer`` is the name of the layer.
        """
        for fused in self.__dict__.get("fused", ()):
            if fused.name in self.scaling and float(self.scaling[fused.name]) != fused.scaling:
                raise QDiffError(
                    f"adapter {fused.name!r} was fused into layer {layer} with the scale {fused.scaling:.6g}, and now has "
                    f"{float(self.scaling[fused.name]):.6g}: unfuse_lora() first, and fuse it again afterwards"
                )

    def follow_dense_base(self: Any) -> None:
        """Turn back into PEFT's own class, over a layer that has become dense."""
        packed_class = type(self)
        self.__class__ = next(dense for dense, packed in PACKED.items() if packed is packed_class)
        self.__dict__.pop("fused", None)
        follow_class(self, packed_class)


def _set_bias(layer: Any, value: Tensor) -> None:
    layer.bias = nn.Parameter(value.to(layer.bias), requires_grad=layer.bias.requires_grad)


def _tensor(module: nn.Module, name: str) -> Any:
    """A tensor of one of an adapter's own modules, wherever offloading keeps it."""
    return fetch(module).get(name, getattr(module, name))


class PackedLoraLinear(PackedLora, Linear):  # type: ignore[misc]
    """PEFT's LoRA layer over a packed linear layer.

    Where nothing is trained, plain adapters are added by the product itself: PEFT's passes over the output, one to scale and one to
    add, cost as much as the adapter's own arithmetic. That never calls the adapter's modules. If one of them has a hook (of
    offloading, of casting, of a user), a parametrization or another class, PEFT's own code runs.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = [name for name in self.active_adapters if name in self.lora_A]
        asked_for_more = args or any(value is not None for value in kwargs.values())
        if asked_for_more or self.disable_adapters or self.merged or not self._adds_in_place(names, x):
            self.check_variants()
            return super().forward(x, *args, **kwargs)
        y: Tensor = self.base_layer(x)
        tokens, out = x.reshape(-1, x.shape[-1]), y.view(-1, y.shape[-1])
        for name in names:
            down, up = cast(Tensor, self.lora_A[name].weight), cast(Tensor, self.lora_B[name].weight)
            out.addmm_(F.linear(tokens, down), up.T, alpha=self.scaling[name])
        return y

    def _adds_in_place(self, names: list[str], x: Tensor) -> bool:
        """Whether all these adapters are plain products on the device and in the dtype of ``x`` that nobody trains.

        The output that they are added to must be nobody else's: a hook on the packed layer may have kept it.
        """
        untracked = not torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type)
        own_output = isinstance(self.base_layer, PackedLayer) and _bare(self.base_layer)
        return untracked and own_output and all(self._is_plain(name, x) for name in names)

    def _is_plain(self, name: str, x: Tensor) -> bool:
        down, up, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
        if type(down) is not nn.Linear or type(up) is not nn.Linear or not (_bare(down) and _bare(up) and _bare(dropout)):
            return False
        alike = x.dtype == down.weight.dtype == up.weight.dtype and x.device == down.weight.device == up.weight.device
        adds_nothing_else = name not in getattr(self, "lora_variant", {}) and up.bias is None
        keeps_all = not self.training or isinstance(dropout, nn.Identity)
        return alike and adds_nothing_else and keeps_all and isinstance(self.scaling[name], int | float)


def _bare(module: nn.Module) -> bool:
    """Whether calling ``module`` runs its class's ``forward`` and nothing else. accelerate and diffusers replace ``forward``."""
    return "forward" not in module.__dict__ and not module._forward_hooks and not module._forward_pre_hooks


class PackedLoraConv2d(PackedLora, Conv2d):  # type: ignore[misc]
    """PEFT's LoRA layer over a packed convolution."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.check_variants()
        return super().forward(x, *args, **kwargs)


PACKED: dict[type[nn.Module], type[nn.Module]] = {Linear: PackedLoraLinear, Conv2d: PackedLoraConv2d}


def check_fusable(model: nn.Module, adapter_names: list[str] | None = None) -> None:
    """Make sure that the adapters of ``model``, the active ones by default, can be fused into its packed layers.

    Raises:
        QDiffError: an adapter cannot be fused.
    """
    for adapter in packed_adapters(model).values():
        if isinstance(adapter, PackedLora):
            adapter.factors(adapter_names)
        elif check_adapters_to_merge(adapter, adapter_names):
            adapter.merge()  # refuses


def packed_adapters(model: nn.Module) -> dict[str, Any]:
    """PEFT's adapters on packed layers by name."""
    adapters = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    return {name: adapter for name, adapter in adapters.items() if isinstance(adapter.get_base_layer(), PackedLayer)}


def check_dense_base(name: str, adapter: Any) -> None:
    """Raise a :class:`QDiffError` if ``adapter`` would not work on the layer ``name`` once that is dense."""
    if isinstance(adapter, PackedLora):
        adapter.check_dense_base(name)


def follow_dense_base(adapter: Any) -> None:
    """Turn an adapter whose layer has become dense back into PEFT's own class."""
    if isinstance(adapter, PackedLora):
        adapter.follow_dense_base()
    else:
        adapter.__dict__.pop("merge", None)
