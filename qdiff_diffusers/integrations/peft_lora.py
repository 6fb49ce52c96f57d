"""PEFT's adapters around packed layers: LoRA fuses into the layer's branch, other kinds run beside it and refuse to be fused."""

from __future__ import annotations

import functools
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..errors import QDiffError
from ..layers import PackedLayer
from ..layers.adapters import PACKED


def create_new_module(create: Any, lora_config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
    """PEFT's LoRA layer for ``target``; for a packed layer one that fuses into its low-rank branch."""
    module = create(lora_config, adapter_name, target, **kwargs)
    if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), PackedLayer):
        packed_class = PACKED.get(cast("type[nn.Module]", type(module)))
        if packed_class is not None:
            module.__class__ = packed_class  # type: ignore[assignment]
        else:  # token tables
            module.merge = functools.partial(_refuse, type(module).__name__)  # type: ignore[method-assign]
    return module


def refuse_to_fuse(replace_module: Any, self: Any, parent: nn.Module, child_name: str, new_module: Any, child: nn.Module) -> None:
    """Adapters other than LoRA (LoKr, LoHa, OFT, ...) run beside a packed layer; fusing, which would lose them, is refused."""
    replace_module(self, parent, child_name, new_module, child)
    if isinstance(new_module, BaseTunerLayer) and isinstance(new_module.get_base_layer(), PackedLayer):
        new_module.merge = functools.partial(_refuse, type(self).__name__)  # type: ignore[method-assign]


def _refuse(kind: str, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    raise QDiffError(
        f"adapters of PEFT's {kind} cannot be fused into packed layers; leave them loaded and active without fuse_lora, or "
        "dequantize() the model first"
    )
