"""Reports on a quantized model, as text and as pictures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from qdiff_diffusers.errors import ConfigError
from qdiff_diffusers.formats import LayerSpec

from .loader import ATTACHMENT, packed_weights


class Layer(NamedTuple):
    """A packed layer: its name in diffusers, spec, logical shape, and relative squared error if it is known."""

    name: str
    spec: LayerSpec
    shape: tuple[int, ...]
    error: float | None

    @property
    def kind(self) -> str:
        """Kind of the layer: its name without the numbers of blocks."""
        name = ".".join(part for part in self.name.split(".") if not part.isdigit())
        return name.replace("transformer_blocks", "blocks")


def layers(model: Any) -> list[Layer]:
    """The packed layers of a MODEL.

    Raises:
        ConfigError: there are none.
    """
    info = model.get_attachment(ATTACHMENT) or {}
    known = info["quantization"].layers if "quantization" in info else {}
    blocks = [block for weight in packed_weights(model).values() for block in weight._params.blocks if block.spec]
    if not blocks:
        raise ConfigError("this MODEL has no layer that qdiff has quantized")
    return [Layer(b.name, b.spec, b.shape, known[b.name].error if b.name in known else None) for b in blocks]


def describe(model: Any) -> str:
    """A table of the packed layers by kind, and totals."""
    found = layers(model)
    groups: dict[tuple[str, str], list[Layer]] = defaultdict(list)
    for layer in found:
        groups[layer.kind, layer.spec.describe()].append(layer)
    rows = [("layers", "kind", "stored as", "bits", "MB", "error")]
    rows += [
        (str(len(group)), kind, spec, f"{bits_per_weight(group):.2f}", _megabytes(group), _error(group))
        for (kind, spec), group in groups.items()
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    dense = 2 * sum(math.prod(layer.shape) for layer in found) / 1e6
    others = model.model_size() - sum(weight.nbytes for weight in packed_weights(model).values())
    info = model.get_attachment(ATTACHMENT) or {}
    method = info["quantization"].method_name if "quantization" in info else "?"
    return "\n".join(
        [
            f"{type(model.model).__name__}, {method}: {len(found)} packed layers, {bits_per_weight(found):.2f} bits per weight, "
            f"{_megabytes(found)} MB instead of {dense:.1f} MB in 16 bits; everything else {others / 1e6:.1f} MB",
            "",
            *table,
        ]
    )


def bits_per_weight(group: Iterable[Layer]) -> float:
    """Stored bits per packed weight, everything counted."""
    group = list(group)
    return 8 * sum(x.spec.nbytes(x.shape) for x in group) / sum(math.prod(x.shape) for x in group)


def _megabytes(group: Iterable[Layer]) -> str:
    return f"{sum(x.spec.nbytes(x.shape) for x in group) / 1e6:.1f}"


def _error(group: Iterable[Layer]) -> str:
    errors = [x.error for x in group if x.error is not None]
    return f"{sum(errors) / len(errors):.2e}" if errors else "-"


def to_tensor(image: Image.Image) -> Tensor:
    """A picture as ComfyUI's IMAGE, ``[1, height, width, 3]`` in [0, 1]."""
    data = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return data.view(1, image.height, image.width, 3).float() / 255


def compare_images(a: Tensor, b: Tensor, mode: str, gain: float) -> Tensor:
    """Two IMAGEs ``[n, h, w, 3]`` beside each other, their difference made ``gain`` times brighter, or both."""
    difference = ((a - b).abs() * gain).clamp(0, 1)
    parts = {"side by side": [a, b], "difference": [difference], "all": [a, b, difference]}[mode]
    gap = torch.ones(*a.shape[:2], 8, 3)
    joined = [piece for part in parts for piece in (part, gap)][:-1]
    return torch.cat(joined, 2)


def similarity(a: Tensor, b: Tensor) -> str:
    """PSNR and SSIM of two IMAGEs, in words."""
    from qdiff_diffusers.evaluation.metrics import psnr, ssim

    if torch.equal(a, b):
        return "the images are identical"
    x, y = a.movedim(-1, 1), b.movedim(-1, 1)
    text = f"PSNR {psnr(x, y).mean():.2f} dB"
    return text + (f", SSIM {ssim(x, y).mean():.4f}" if min(a.shape[1:3]) >= 11 else "")
