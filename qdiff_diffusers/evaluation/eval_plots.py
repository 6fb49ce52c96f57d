"""Plots for the page of ``qdiff eval``, as SVGs in the page's text colours. Without matplotlib there are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .plot import GREY, colour_of, svg_figure
from .tables import COLUMNS, Column, Row

PLOTTED = ("psnr", "frechet_16bit", "frechet", "accuracy")
MARKERS = "osD^vP*X<>hp"
MAX_LINES = 14  # more lines than this cannot be told apart; the table of errors stays complete in results.json
LINE_MAP, ERROR_MAP = "viridis_r", "magma"


def quality_plots(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """``(caption, svg)`` of each score over stored bits per weight, a colour and a marker per method."""
    made = [row for row in rows if "failed" not in row]
    plots = []
    for column in COLUMNS:
        points = [row for row in made if column.value(row) is not None and row["kind"] != "reference"]
        if column.key in PLOTTED and points and (svg := svg_figure(_quality_drawer(column, points, made[0]))):
            trend = "Higher is better." if column.better > 0 else "Lower is better."
            plots.append((f"{column.heading} {column.note} against stored bits per weight. {trend}", svg))
    return plots


def steps_plot(rows: Sequence[Row]) -> str | None:
    """Relative error of the denoiser's output over its timesteps, a line per row."""
    lines = [row for row in rows if row.get("step_errors") and "failed" not in row]
    chosen = _thinned(lines)

    def draw(figure: Any) -> None:
        import matplotlib

        axes = figure.add_subplot()
        for i, row in enumerate(chosen):
            timesteps, errors = zip(*row["step_errors"], strict=True)
            colour = matplotlib.colormaps[LINE_MAP](i / max(1, len(chosen) - 1))
            axes.semilogy(timesteps, [max(e, 1e-9) for e in errors], marker=".", lw=1.6, color=colour, label=_label(row))
        axes.invert_xaxis()
        axes.set_xlabel("timestep, from noise to image")
        axes.set_ylabel("relative error")
        axes.grid(lw=0.6)
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))

    return svg_figure(draw) if lines else None


def layers_plot(rows: Sequence[Row]) -> str | None:
    """Relative error of every layer's output, a line of cells per row."""
    shown = [row for row in rows if row.get("layer_errors") and "failed" not in row]
    names = list(dict.fromkeys(name for row in shown for name in row["layer_errors"]))

    def draw(figure: Any) -> None:
        import numpy as np

        figure.set_size_inches(9, 1.6 + 0.26 * len(shown))
        values = np.array([[max(row["layer_errors"].get(name, 0.0), 1e-9) for name in names] for row in shown])
        axes = figure.add_subplot()
        mesh = axes.pcolormesh(np.log10(values), cmap=ERROR_MAP, rasterized=False, vmin=max(-4.0, float(np.log10(values).min())))
        axes.invert_yaxis()
        axes.set_yticks(np.arange(len(shown)) + 0.5, [_label(row) for row in shown], fontsize=9)
        axes.set_xlabel("layers, from the input to the output")
        axes.set_xticks([])
        bar = figure.colorbar(mesh, ax=axes)
        bar.set_label("log10 of the relative error")

    return svg_figure(draw) if shown and names else None


def _quality_drawer(column: Column, points: Sequence[Row], reference: Row) -> Callable[[Any], None]:
    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        methods = list(dict.fromkeys(row["method"] for row in points))
        for i, method in enumerate(methods):
            mine = sorted((r for r in points if r["method"] == method), key=lambda r: r["bits_per_weight"])
            x, y = [r["bits_per_weight"] for r in mine], [column.value(r) for r in mine]
            margins = [column.margin(r) or 0.0 for r in mine]
            colour = colour_of(method) or f"C{i}"
            marker = MARKERS[i % len(MARKERS)]
            axes.errorbar(x, y, margins, fmt=marker, ms=6, lw=0, elinewidth=1.2, capsize=2, color=colour, label=method)
        value = column.value(reference)
        if value is not None:
            axes.axhline(value, ls="--", lw=1.2, color=GREY, label="16-bit")
        axes.set_xlabel("stored bits per weight")
        axes.set_ylabel(f"{column.heading} {column.note}".strip())
        if column.better < 0 and max(column.value(r) or 0 for r in points) > 20 * _smallest(column, points):
            axes.set_yscale("log")
        axes.grid(lw=0.6)
        axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))

    return draw


def _smallest(column: Column, points: Sequence[Row]) -> float:
    return max(1e-6, min(column.value(row) or 0.0 for row in points))


def _thinned(rows: Sequence[Row]) -> list[Row]:
    """At most ``MAX_LINES`` rows, evenly spaced by error, from the smallest to the largest."""
    ordered = sorted(rows, key=lambda row: sum(error for _, error in row["step_errors"]))
    if len(ordered) <= MAX_LINES:
        return ordered
    return [ordered[round(i * (len(ordered) - 1) / (MAX_LINES - 1))] for i in range(MAX_LINES)]


def _label(row: Row) -> str:
    return f"{row['name']} ({row['bits_per_weight']:.2f})"
