"""What the quantizers of diffusers and transformers have in common."""

from __future__ import annotations

from typing import Any

from ..checkpoint.quantization import Quantization
from ..config import QDiffConfig
from ..layers import PackedLayer


class KeepsRecord:
    """Mixin of a library's quantizer: its ``quantization_config`` is the model's own record, which follows the model's layers."""

    pre_quantized: bool
    quantization_config: Quantization
    packed: dict[str, PackedLayer]  # by module name; once the model is loaded

    def begin_record(self, given: QDiffConfig | Quantization) -> None:
        """Take ``given`` for what is stored, or for what is asked for once more."""
        record = Quantization.of(given)
        self.quantization_config = record if self.pre_quantized else record.requested()

    def follow(self, packed: dict[str, PackedLayer]) -> None:
        """Let the record say how these layers are, whenever it is asked."""
        self.packed = packed
        self.quantization_config.follow(packed)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy's record follows the copy's own layers."""
        self.__dict__.update(state)
        if "packed" in state:
            self.follow(self.packed)

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True
