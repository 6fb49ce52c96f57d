"""What a quantized model consists of, as text and as pictures."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from qdiff_diffusers.errors import ConfigError
from qdiff_diffusers.formats import LayerSpec

from .loader import ATTACHMENT, packed_weights

INK, PAPER, GRID = "#1f2328", "#ffffff", "#d0d7de"
COLOURS = ("#3b82f6", "#d18616", "#16a34a", "#a855f7", "#dc2626", "#0891b2", "#8b949e", "#ca8a04", "#db2777", "#4b5563")
LEFT, TOP, RIGHT, BOTTOM = 100, 64, 24, 72  # margins of a plot, pixels
LEGEND, LINE = 340, 27  # width of the legend and height of its lines, pixels


class Layer(NamedTuple):
    """A packed layer: its name in diffusers, spec, logical shape, and relative squared error if it is known."""

    name: str
    spec: LayerSpec
    shape: tuple[int, ...]
    error: float | None

    @property
    def kind(self) -> str:
        """The name without the numbers of blocks."""
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
        (str(len(group)), kind, spec, f"{_bits(group):.2f}", _megabytes(group), _error(group))
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
            f"{type(model.model).__name__}, {method}: {len(found)} packed layers, {_bits(found):.2f} bits per weight, "
            f"{_megabytes(found)} MB instead of {dense:.1f} MB in 16 bits; everything else {others / 1e6:.1f} MB",
            "",
            *table,
        ]
    )


def _bits(group: Iterable[Layer]) -> float:
    group = list(group)
    return 8 * sum(x.spec.nbytes(x.shape) for x in group) / sum(math.prod(x.shape) for x in group)


def _megabytes(group: Iterable[Layer]) -> str:
    return f"{sum(x.spec.nbytes(x.shape) for x in group) / 1e6:.1f}"


def _error(group: Iterable[Layer]) -> str:
    errors = [x.error for x in group if x.error is not None]
    return f"{sum(errors) / len(errors):.2e}" if errors else "-"


def error_plot(model: Any, width: int = 1200, height: int = 640) -> Image.Image:
    """Relative squared error of every layer, in decibels, in the order of the model; a colour for each kind.

    Raises:
        ConfigError: the checkpoint does not say what the errors are.
    """
    found = [layer for layer in layers(model) if layer.error]
    if not found:
        raise ConfigError("this checkpoint does not store its layers' errors")
    levels = [10 * math.log10(layer.error or 1.0) for layer in found]
    step = 5 if max(levels) - min(levels) > 8 else 1
    low, high = (round_(level / step) * step for round_, level in ((math.floor, min(levels)), (math.ceil, max(levels) + 0.01)))
    kinds = list(dict.fromkeys(layer.kind for layer in found))
    image = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=19)
    right, bottom = width - RIGHT - LEGEND, height - BOTTOM

    def place(index: int, level: float) -> tuple[float, float]:
        x = LEFT + (right - LEFT) * (index + 0.5) / len(found)
        return x, bottom - (bottom - TOP) * (level - low) / max(1, high - low)

    draw.text((LEFT, 16), "Squared error of each layer's weights over their squared norm", INK, ImageFont.load_default(size=23))
    for level in range(low, high + 1, step):
        _, y = place(0, level)
        draw.line((LEFT, y, right, y), GRID)
        draw.text((LEFT - 10, y), f"{level} dB", INK, font, anchor="rm")
    draw.text(((LEFT + right) / 2, height - 28), f"{len(found)} layers, first to last", INK, font, anchor="mm")
    for i, (layer, level) in enumerate(zip(found, levels, strict=True)):
        _dot(draw, *place(i, level), kinds.index(layer.kind))
    room = (bottom - TOP) // LINE
    for i, kind in enumerate(kinds[:room]):
        y = TOP + LINE * i
        if i == room - 1 and len(kinds) > room:
            draw.text((right + 22, y), f"and {len(kinds) - i} kinds more", INK, font, anchor="lm")
            break
        _dot(draw, right + 30, y, i)
        draw.text((right + 46, y), kind if len(kind) <= 33 else f"...{kind[-30:]}", INK, font, anchor="lm")
    return image


def _dot(draw: ImageDraw.ImageDraw, x: float, y: float, kind: int) -> None:
    """The mark of a kind of layer: a disc, and in the second round of colours a ring."""
    colour, ring = COLOURS[kind % len(COLOURS)], kind // len(COLOURS) % 2 == 1
    draw.ellipse((x - 5, y - 5, x + 5, y + 5), PAPER if ring else colour, colour, 2)


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
