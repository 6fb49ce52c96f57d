"""Plots of the layers' errors: a large one of a finished model, and a small one that grows during quantization."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from qdiff_diffusers.errors import ConfigError
from qdiff_diffusers.formats.layer_table import StoredLayer

from .report import Layer, bits_per_weight, layers

INK, PAPER, GRID = "#1f2328", "#ffffff", "#d0d7de"
COLOURS = ("#3b82f6", "#d18616", "#16a34a", "#a855f7", "#dc2626", "#0891b2", "#8b949e", "#ca8a04", "#db2777", "#4b5563")
LEFT, TOP, RIGHT, BOTTOM = 100, 64, 24, 72  # margins of the finished plot, pixels
LEGEND, LINE = 340, 27  # width of its legend and height of the legend's lines, pixels
SMALL = (512, 320)  # size of the growing plot, pixels: a node shows it about half as large
INTERVAL, SHARE = 0.5, 0.01  # least seconds between two growing plots, and the largest share of the whole time that they may take

Place = Callable[[int, float], tuple[float, float]]


def error_plot(model: Any, width: int = 1200, height: int = 640) -> Image.Image:
    """Relative squared error of every layer, in decibels, in the order of the model; a colour for each kind.

    Raises:
        ConfigError: the checkpoint does not store the errors.
    """
    found = [layer for layer in layers(model) if layer.error]
    if not found:
        raise ConfigError("this checkpoint does not store its layers' errors")
    image = Image.new("RGB", (width, height), PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=19)
    right, bottom = width - RIGHT - LEGEND, height - BOTTOM
    draw.text((LEFT, 16), "Squared error of each layer's weights over their squared norm", INK, ImageFont.load_default(size=23))
    draw.text(((LEFT + right) / 2, height - 28), f"{len(found)} layers, first to last", INK, font, anchor="mm")
    place = _axes(draw, (LEFT, TOP, right, bottom), _levels(found), len(found), font)
    kinds = _draw_layers(draw, found, place)
    room = (bottom - TOP) // LINE
    for i, kind in enumerate(kinds[:room]):
        y = TOP + LINE * i
        if i == room - 1 and len(kinds) > room:
            draw.text((right + 22, y), f"and {len(kinds) - i} kinds more", INK, font, anchor="lm")
            break
        _dot(draw, right + 30, y, i)
        draw.text((right + 46, y), kind if len(kind) <= 33 else f"...{kind[-30:]}", INK, font, anchor="lm")
    return image


def progress_plot(done: Sequence[Layer], total: int) -> Image.Image:
    """The errors of the layers so far, out of ``total``, for the size at which a node shows a preview.

    Raises:
        ValueError: no layer is done.
    """
    if not done:
        raise ValueError("there is nothing to plot before the first layer is done")
    width, height = SMALL
    image = Image.new("RGB", SMALL, PAPER)
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(size=26)
    draw.text((16, 10), f"error of {len(done)} of {total} layers", INK, font)
    draw.text((width - 16, 10), f"{bits_per_weight(done):.2f} bits", INK, font, anchor="ra")
    place = _axes(draw, (112, 70, width - 16, height - 24), _levels(done), total, font)
    _draw_layers(draw, [layer for layer in done if layer.error], place, radius=max(3, min(9, 150 // total)))
    return image


class GrowingPlot:
    """Calls :func:`progress_plot` so seldom that it costs next to nothing beside the quantization (32 ms for 500 layers)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.due = clock, -math.inf

    def __call__(self, done: Mapping[str, StoredLayer], total: int) -> Image.Image | None:
        """The plot, if it is time for one: after the first layer, after the last, and now and then between them."""
        start = self.clock()
        if not done or (start < self.due and len(done) < total):
            return None
        image = progress_plot([Layer(name, *layer) for name, layer in done.items()], total)
        end = self.clock()
        self.due = end + max(INTERVAL, (end - start) / SHARE)
        return image


def _levels(found: Sequence[Layer]) -> list[float]:
    """Errors in decibels."""
    return [10 * math.log10(layer.error) for layer in found if layer.error]


def _axes(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], levels: list[float], count: int, font: Any) -> Place:
    """Draw lines at round levels across ``box``. Returns where the layer of a number and a level is."""
    left, top, right, bottom = box
    lowest, highest = min(levels, default=-1.0), max(levels, default=0.0)
    lines = (bottom - top) // (2 * font.size)  # how many there is room for
    step = next(s for s in (1, 5, 10, 20, 50, 100, 1000) if (highest - lowest) / s <= lines - 2 or s == 1000)
    low, high = math.floor(lowest / step) * step, math.ceil((highest + 0.01) / step) * step

    def place(index: int, level: float) -> tuple[float, float]:
        return left + (right - left) * (index + 0.5) / count, bottom - (bottom - top) * (level - low) / (high - low)

    for level in range(low, high + 1, step):
        _, y = place(0, level)
        draw.line((left, y, right, y), GRID)
        draw.text((left - 10, y), f"{level} dB", INK, font, anchor="rm")
    return place


def _draw_layers(draw: ImageDraw.ImageDraw, found: Sequence[Layer], place: Place, radius: int = 5) -> list[str]:
    """A mark for every layer. Returns the kinds of layers, in the order of their marks' colours."""
    kinds = list(dict.fromkeys(layer.kind for layer in found))
    for i, (layer, level) in enumerate(zip(found, _levels(found), strict=True)):
        _dot(draw, *place(i, level), kinds.index(layer.kind), radius)
    return kinds


def _dot(draw: ImageDraw.ImageDraw, x: float, y: float, kind: int, radius: int = 5) -> None:
    """The mark of a kind of layer: a disc, and in the second round of colours a ring."""
    colour, ring = COLOURS[kind % len(COLOURS)], kind // len(COLOURS) % 2 == 1
    draw.ellipse((x - radius, y - radius, x + radius, y + radius), PAPER if ring else colour, colour, 2)
