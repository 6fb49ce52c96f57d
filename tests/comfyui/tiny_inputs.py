"""What the tiny models of all families are made of: their description, and inputs that both programs take."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import diffusers
import torch
from torch import Tensor, nn


class Tiny(NamedTuple):
    """One tiny model.

    Attributes:
        detected: what ComfyUI's detection takes for granted of the published sizes and the tiny model has otherwise.
        beside: what makes the components that ComfyUI's model contains besides, by the name of their folder.
    """

    diffusers_class: str
    config: dict[str, Any]
    reference: Callable[[nn.Module], Tensor]
    native: Callable[[nn.Module], Tensor]
    detected: Mapping[str, Any] = MappingProxyType({})
    large_queries: bool = False
    beside: Mapping[str, Callable[[], nn.Module]] = MappingProxyType({})

    def settings(self) -> dict[str, Any]:
        """diffusers' config of the model and of what is beside it, defaults included."""
        with torch.device("meta"):
            model = getattr(diffusers, self.diffusers_class)(**self.config)
            return {**model.config, **{folder: dict(make().config) for folder, make in self.beside.items()}}


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + len(shape)))


IMAGE, CONTEXT, POOLED = noise(1, 16, 8, 8), noise(1, 8, 64), noise(1, 64)
VIDEO = noise(1, 16, 2, 8, 8)


def patches(x: Tensor) -> Tensor:
    """``[b, c, h, w]`` -> ``[b, h/2*w/2, c*4]``, channels first."""
    b, c, h, w = x.shape
    return x.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpatches(x: Tensor, h: int, w: int) -> Tensor:
    b, _, c = x.shape
    return x.view(b, h // 2, w // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(b, c // 4, h, w)


def positions(h: int, w: int, axes: int = 3) -> Tensor:
    ids = torch.zeros(h, w, axes)
    ids[..., 1], ids[..., 2] = torch.arange(h)[:, None], torch.arange(w)
    return ids.reshape(-1, axes)
