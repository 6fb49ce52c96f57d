"""qdiff's formats as contenders, one preset for each row, packed fast.

Timing needs no carefully chosen codes. In a single layer the codebook methods, which take longest, quantize only the first rows of
the weight and repeat their codes for the rest, so that the error of the layer can still be measured, against the weight with those
rows repeated. In a whole model every method does so, with one quantization for all layers of a shape.
"""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QDiffConfig
from ..formats import CodebookFormat, LayerSpec
from ..layers import PackedLayer, QDiffLinear, pack_layer
from ..measuring.contenders import OURS, Contender
from ..methods import method_of, quantize_weight

ROWS = 256
ROW_TENSORS = ("codes", "scales", "zeros", "low_rank_up")

PRESETS: dict[str, dict[str, Any]] = {
    "aq2": {"method": "aq", "bits": 2, "effort": 0},
    "aq3": {"method": "aq", "bits": 3, "effort": 0},
    "aq4": {"method": "aq", "bits": 4, "effort": 0},
    "vq2": {"method": "vq", "bits": 2, "restarts": 1},
    "vq3": {"method": "vq", "bits": 3, "restarts": 1},
    "vq4": {"method": "vq", "bits": 4, "restarts": 1},
    "fp4": {"method": "fp", "bits": 4},
    "fp6": {"method": "fp", "bits": 6},
    "fp8": {"method": "fp", "weight_format": "e4m3", "group_size": "row"},
    "int4": {"method": "rtn", "bits": 4},
    "int8": {"method": "rtn", "bits": 8, "group_size": "row"},
    "svd4": {"method": "svdquant", "weight_format": "int4", "group_size": 64, "rank": 32, "rounds": 1},
}

Quantized = tuple[LayerSpec, dict[str, Tensor]]


class Packer:
    """Packs layers. Each weight is quantized once, however many rows of a table share its codes.

    Args:
        whole_model: repeat the first rows with every method, and one layer's codes in all layers of its shape.
    """

    def __init__(self, whole_model: bool = False) -> None:
        self.whole_model = whole_model
        self.cache: dict[tuple[str, tuple[int, ...]], Quantized] = {}

    def convert(self, layer: nn.Module, preset: str, activations: str | None) -> nn.Module:
        """Pack a dense layer with a preset. Its attribute ``stands_for`` is the weight that it approximates."""
        config = QDiffConfig(**PRESETS[preset])
        assert isinstance(layer.weight, Tensor)
        weight = layer.weight.detach()
        short = self.whole_model or method_of(config).slow
        rows = min(ROWS, len(weight)) if short else len(weight)
        key = (preset, tuple(weight.shape))
        if key not in self.cache:
            self.cache[key] = _quantize_rows(weight, config, rows)
        spec, tensors = self.cache[key]
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}  # or one layer would warm the cache for another
        packed = pack_layer(layer, dataclasses.replace(spec, activations=activations or "none"), weight.dtype, tensors)
        if rows < len(weight):
            packed.stands_for = partial(_repeated, rows=rows)  # type: ignore[assignment]
        return packed


def contenders(packer: Packer, device: torch.device) -> list[Contender]:
    """Every preset with 16-bit and with 8-bit activations, SVDQuant with 4-bit ones too.

    8-bit activations are the kind that the device has fast products for: on a GPU FP8 for minifloats and INT8 for all others, on a
    CPU INT8.
    """
    out = []
    for preset in PRESETS:
        eight = "fp8" if preset.startswith("fp") and device.type == "cuda" else "int8"
        kinds = {"": None, "-a8": eight} | ({"-a4": "int4"} if preset == "svd4" else {})
        for suffix, activations in kinds.items():
            out.append(
                Contender(
                    f"qdiff-{preset}{suffix}",
                    OURS,
                    partial(packer.convert, preset=preset, activations=activations),
                    int(preset[-1]),
                    layers=(nn.Linear, nn.Conv2d),
                )
            )
    return out


def describe(module: nn.Module) -> str:
    """The stored format of a packed layer, an empty string for any other."""
    return module.spec.describe() if isinstance(module, PackedLayer) else ""


def stored_bits(module: nn.Module) -> float | None:
    """Stored bits per weight of a packed layer, ``None`` for any other."""
    return module.bits_per_weight if isinstance(module, PackedLayer) else None


def lookup_share(module: nn.Module, tokens: int) -> dict[str, float] | None:
    """Share of the dense product's ``multiplications``, and of all its ``operations``, that a product by look-up tables needs.

    ``None`` for a layer without codebooks.
    """
    if not isinstance(module, QDiffLinear) or not isinstance(module.spec.format, CodebookFormat):
        return None
    try:
        from qdiff_kernels.cpu import lookup_operations
    except ImportError:
        return None
    counted = lookup_operations(module.out_features, module.in_features, *module.spec.format.codebook_shape, tokens)
    dense, lookup = counted["dense_multiplications"], counted["lookup_multiplications"]
    everything = (lookup + counted["lookup_additions"]) / (dense + counted["dense_additions"])
    return {"multiplications": lookup / dense, "operations": everything}


def _quantize_rows(weight: Tensor, config: QDiffConfig, rows: int) -> Quantized:
    """Quantize the first ``rows`` and repeat their tensors; returns ``(spec, tensors)`` of the whole weight."""
    spec, tensors, _ = quantize_weight(weight[:rows], config)
    index = torch.arange(len(weight), device=weight.device) % rows
    if rows < len(weight):
        per_row = {n: t for n, t in tensors.items() if n in ROW_TENSORS and t.shape[0] == rows}
        tensors = tensors | {name: tensor[index].contiguous() for name, tensor in per_row.items()}
    expected = spec.tensors(tuple(weight.shape))
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {name: info.shape for name, info in expected.items()}
    return spec, tensors


def _repeated(weight: Tensor, rows: int) -> Tensor:
    """``weight`` with its first rows in place of all others."""
    return weight[torch.arange(len(weight), device=weight.device) % rows]
