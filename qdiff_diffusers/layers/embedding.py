"""Embedding with a packed table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .base import PackedLayer

SCALED = "ScaledWordEmbedding"  # how transformers ends the names of its tables that multiply by a constant (Gemma)


def is_table(module: nn.Module) -> bool:
    """Whether a module is a plain embedding, or one of transformers' that multiply its rows by a constant."""
    return type(module) is nn.Embedding or (isinstance(module, nn.Embedding) and type(module).__name__.endswith(SCALED))


class QDiffEmbedding(PackedLayer, nn.Embedding):  # type: ignore[misc, override]
    """``nn.Embedding`` whose table ``[num_embeddings, embedding_dim]`` stays packed: only the rows asked for are decoded."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Packed layers are converted, never constructed; PEFT constructs its adapters as ``type(base_layer)(...)``."""
        return nn.Embedding(*args, **kwargs) if args or kwargs else object.__new__(cls)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.num_embeddings, self.embedding_dim)

    @property
    def factor(self) -> float | None:
        """Factor by which the dense class multiplies its rows. It is not read from the buffer, which transformers may not fill."""
        factor = getattr(self, "scalar_embed_scale", getattr(self, "embed_scale", None))
        return None if factor is None else float(factor)

    def forward(self, input: Tensor) -> Tensor:
        rows = self.spec.select_rows(self.packed_tensors(), input.flatten(), self.num_embeddings)
        found = self.spec.dequantize(rows, self.weight_shape, self.compute_dtype)
        if self.factor is not None:
            found = found * torch.tensor(self.factor, dtype=found.dtype)  # rounded like the dense class
        return found.reshape(*input.shape, self.embedding_dim)

    def dense_bias(self) -> None:
        """``None``: an embedding has no bias."""

    def restore_dense_parts(self) -> None:
        if isinstance(getattr(self, "embed_scale", None), Tensor):
            self.embed_scale = torch.tensor(self.factor, dtype=torch.float32, device=self.codes.device)
