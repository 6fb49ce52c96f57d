"""A labelled picture of many configurations: a row for each, with images of the same seed in one column."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..checkpoint.writing import written_file

PAPER, INK, FAINT, RULE, BEST = "#ffffff", "#1b1f24", "#6a737d", "#d0d7de", "#0a7d33"
TILE_GAP, MARGIN, GROUP_GAP = 6, 24, 18
TEXT_SIZE, SMALL_SIZE, TITLE_SIZE = 22, 18, 28
NAME_WIDTH, WIDEST_NAME, NUMBER_WIDTH = 245, 480, 105


@dataclass(frozen=True)
class GridRow:
    """One configuration: its name, the numbers to print beside it, and ``[images, channels, height, width]`` in [0, 1].

    ``opens_group`` draws a rule above it; ``best`` prints its quality as the best of the group.
    """

    name: str
    bits: str
    quality: str
    images: Tensor
    opens_group: bool = False
    best: bool = False


def draw_grid(rows: Sequence[GridRow], columns: Sequence[str], *, title: str, subtitle: str, zoom: int = 3) -> Image.Image:
    """Draw the rows under one another, names and numbers at the left, a label above each column of images.

    Args:
        rows: as many images in each as there are ``columns``.
        title, subtitle: texts above the rows.
        zoom: screen pixels per image pixel.
    """
    tile = zoom * rows[0].images.shape[-1]
    names = min(max(NAME_WIDTH, *(_width(row.name, TEXT_SIZE) for row in rows)), WIDEST_NAME)
    left = MARGIN + names + 2 * NUMBER_WIDTH + MARGIN
    headings = _width(title, TITLE_SIZE), _width(subtitle, SMALL_SIZE)
    width = max(left + len(columns) * (tile + TILE_GAP) - TILE_GAP, *(MARGIN + heading for heading in headings)) + MARGIN
    top = MARGIN + TITLE_SIZE + SMALL_SIZE + 3 * MARGIN
    groups = sum(row.opens_group for row in rows)
    height = top + len(rows) * (tile + TILE_GAP) + groups * GROUP_GAP + MARGIN
    canvas = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    _text(draw, (MARGIN, MARGIN), title, TITLE_SIZE, INK, bold=True)
    _text(draw, (MARGIN, MARGIN + TITLE_SIZE + 12), subtitle, SMALL_SIZE, FAINT)
    for x, label in zip((left + i * (tile + TILE_GAP) for i in range(len(columns))), columns, strict=True):
        _text(draw, (x + tile / 2, top - 8), label, SMALL_SIZE, FAINT, anchor="ms", fit=tile)
    for x, label in ((left - MARGIN - NUMBER_WIDTH, "bits/weight"), (left - MARGIN, "PSNR, dB")):
        _text(draw, (x, top - 8), label, SMALL_SIZE, FAINT, anchor="rs")
    y = top
    for row in rows:
        if row.opens_group:
            rule = y + (GROUP_GAP - TILE_GAP) // 2
            draw.line((MARGIN, rule, width - MARGIN, rule), RULE, 2)
            y += GROUP_GAP
        _draw_row(canvas, draw, row, left, names, y, tile)
        y += tile + TILE_GAP
    return canvas


def save_png(image: Image.Image, path: Path) -> None:
    """Write a PNG that is never half-written."""
    with written_file(path) as part:
        image.save(part, format="PNG", optimize=True)


def _draw_row(canvas: Image.Image, draw: ImageDraw.ImageDraw, row: GridRow, left: int, names: int, y: int, tile: int) -> None:
    middle = y + tile / 2
    colour = BEST if row.best else INK
    _text(draw, (MARGIN, middle), row.name, TEXT_SIZE, INK, anchor="lm", bold=row.best, fit=names)
    _text(draw, (left - MARGIN - NUMBER_WIDTH, middle), row.bits, TEXT_SIZE, INK, anchor="rm")
    _text(draw, (left - MARGIN, middle), row.quality, TEXT_SIZE, colour, anchor="rm", bold=row.best)
    for i, picture in enumerate(row.images):
        canvas.paste(_to_pil(picture, tile), (left + i * (tile + TILE_GAP), y))


def _to_pil(picture: Tensor, size: int) -> Image.Image:
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    return image.resize((size, size), Image.Resampling.NEAREST).convert("RGB")


def _width(text: str, size: float) -> int:
    """Pixels that a line of text takes, a little more where it is bold."""
    return math.ceil(ImageFont.load_default(size).getlength(text)) + 2


def _text(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: float,
    colour: str,
    *,
    anchor: str = "la",
    bold: bool = False,
    fit: float | None = None,
) -> None:
    """Text in Pillow's own font, made smaller where it is wider than ``fit``."""
    font = ImageFont.load_default(size)
    if fit and (wide := draw.textlength(text, font)) > fit:
        font = ImageFont.load_default(size * fit / wide)
    for shift in (0, 1) if bold else (0,):  # the font has one weight only
        draw.text((at[0] + shift, at[1]), text, colour, font, anchor=anchor)
