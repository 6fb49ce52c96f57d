"""Plots of quality over stored bits, as SVGs in the text colours of the page around them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..methods import METHODS

GREY = "#8b949e"  # colour of the baseline
# Stand-ins that matplotlib draws with; the page's own colours replace them.
TEXT, LINES = "#010203", "#040506"


def colour_of(method: str) -> str | None:
    """The colour of a registered method; ``None`` for a method without one, and for peers."""
    return METHODS[method].colour if method in METHODS else None


def quality_plot(points: Mapping[str, Sequence[tuple[float, float]]]) -> str | None:
    """PSNR over stored bits per weight, one line per method.

    Args:
        points: method -> ``(bits per weight, PSNR in dB)``.

    Returns:
        An ``<svg>`` element whose text and axes are ``currentColor`` and ``var(--line)``; ``None`` without matplotlib.
    """

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for name, line in points.items():
            bits, quality = zip(*sorted(line), strict=True)
            method = METHODS[name]
            dashes = "--" if method.is_baseline else "-"
            axes.plot(bits, quality, dashes, marker="o", lw=2, ms=6, color=method.colour, label=method.label)
        axes.set_xlabel("stored bits per weight")
        axes.set_ylabel("PSNR, dB")
        axes.grid(lw=0.6)
        axes.legend(frameon=False)

    return svg_figure(draw)


def svg_figure(draw: Callable[[Any], None]) -> str | None:
    """The ``<svg>`` of the figure that ``draw`` fills, with text and axes in the page's colours; ``None`` without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None
    from matplotlib import rc_context

    style: Any = {"svg.fonttype": "none", "svg.hashsalt": "qdiff", "text.color": TEXT, "axes.labelcolor": TEXT, "font.size": 11}
    style |= {"axes.edgecolor": LINES, "xtick.color": LINES, "ytick.color": LINES, "grid.color": LINES}
    style |= {"xtick.labelcolor": TEXT, "ytick.labelcolor": TEXT, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(style):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        draw(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True)
    return _inline(buffer.getvalue())


def _inline(svg: str) -> str:
    """The ``<svg>`` element alone, metadata and fixed size dropped, stand-in colours replaced."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    svg = re.sub(r'^(<svg\b[^>]*?) height="[^"]*"', r"\1", svg)
    svg = re.sub(r'^(<svg\b[^>]*?) width="[^"]*"', r"\1", svg)
    return svg.replace(TEXT, "currentColor").replace(LINES, "var(--line)")
