"""A self-contained HTML page about a set of results."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

from jinja2 import Environment, PackageLoader

from ..methods import METHODS
from .plot import quality_plot

DENSE_LABEL = "16-bit"  # name of the reference, whose method is "none"
# Metrics that a few images can rank (unlike a Frechet distance or an accuracy), and the digits that are shown of them.
COMPARED = {"psnr": 1, "ssim": 3}
Row = dict[str, Any]


def best_of_group(rows: Sequence[Row], metric: str) -> set[str]:
    """Names of the rows with the highest ``metric``, as shown, among those of equal ``nominal_bits``, where they differ."""
    best: set[str] = set()
    for _, group in groupby((r for r in rows if r["method"] != "none"), key=lambda r: r["nominal_bits"]):
        values = {r["name"]: round(r[metric], COMPARED[metric]) for r in group if r[metric] is not None}
        if len(set(values.values())) > 1:
            best |= {name for name, value in values.items() if value == max(values.values())}
    return best


def render_report(rows: Sequence[Row], run: dict[str, Any], grid_png: bytes) -> str:
    """The page as text.

    Args:
        rows: results as ``results.json`` holds them, those of equal ``nominal_bits`` together.
        run: facts about the run: versions, machine, date, seeds.
        grid_png: the picture, embedded.
    """
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html.j2").render(
        rows=rows,
        run=run,
        groups=[list(group) for _, group in groupby(rows, key=lambda r: r["nominal_bits"])],
        digits=COMPARED,
        best={metric: best_of_group(rows, metric) for metric in COMPARED},
        notes={METHODS[name].label: METHODS[name].summary for name in _methods(rows)},
        grid=base64.b64encode(grid_png).decode(),
        plot=quality_plot(_points(rows)),
    )


def _methods(rows: Iterable[Row]) -> list[str]:
    present = {row["method"] for row in rows}
    return [name for name in METHODS if name in present]


def _points(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    quantized = [row for row in rows if row["psnr"] is not None]
    return {
        method: [(r["bits_per_weight"], r["psnr"]) for r in quantized if r["method"] == method] for method in _methods(quantized)
    }
