"""The dial between quantization time and quality: python benchmarks/quality.py dit effort WORK first, then

    python benchmarks/effort.py

writes ``results/effort.md`` and ``docs/images/effort.png`` from ``results/quality/dit_effort.json``.
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib.pyplot as plt
from common import RESULTS, markdown

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "effort.png"
COLUMNS = [("name", "setting", ""), ("bits", "stored bits", ".2f"), ("minutes", "minutes", ".2f"), ("psnr", "PSNR dB", ".1f")]

TICKS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)


def main() -> None:
    results = json.loads((RESULTS / "quality" / "dit_effort.json").read_text())
    rows = [
        {
            "name": row["name"],
            "bits": row["bits_per_weight"],
            "minutes": row["quantize_seconds"] / 60,
            "psnr": row["scores"]["psnr"][0],
        }
        for row in results["rows"]
        if row["kind"] == "config" and "failed" not in row
    ]
    rows.sort(key=lambda row: row["minutes"])
    (RESULTS / "effort.md").write_text(markdown(rows, COLUMNS) + "\n")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot([row["minutes"] for row in rows], [row["psnr"] for row in rows], "o", color="#3b6fb6")
    for number, row in enumerate(rows):  # neighbours' names on different sides
        offset, side = ((-6, 4), "right") if number % 2 else ((6, -10), "left")
        axes.annotate(row["name"], (row["minutes"], row["psnr"]), xytext=offset, textcoords="offset points", fontsize=8, ha=side)
    axes.set(xscale="log", xlabel="minutes to quantize (one core)", ylabel="PSNR against 16 bits, dB")
    axes.set_title("AQ at 2 bits: quality against quantization time", fontsize=11)
    axes.margins(x=0.3, y=0.12)
    axes.set_xticks(TICKS, [f"{minutes:g}" for minutes in TICKS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(PICTURE, dpi=150)


if __name__ == "__main__":
    main()
