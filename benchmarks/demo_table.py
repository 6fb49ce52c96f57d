"""Keep a demo run as a committed result: ``qdiff demo -o DIR`` first, then

    python benchmarks/demo_table.py DIR

writes ``results/demo.json`` and ``results/demo.md`` and copies the picture into ``docs/images/``.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from common import RESULTS, facts, markdown

COLUMNS = [
    ("name", "row", ""),
    ("bits_per_weight", "stored bits", ".2f"),
    ("size_mb", "file MB", ".1f"),
    ("load_seconds", "quantize + load s", ".1f"),
    ("reload_seconds", "reload s", ".2f"),
    ("psnr", "PSNR dB", ".1f"),
    ("ssim", "SSIM", ".3f"),
    ("frechet", "Frechet", ".2f"),
    ("accuracy", "accuracy", ".2f"),
    ("seconds_per_image", "s / image", ".2f"),
]


def main() -> None:
    folder = Path(sys.argv[1])
    results = json.loads((folder / "results.json").read_text())
    results["run"]["commit"] = facts()["commit"]
    (RESULTS / "demo.json").write_text(json.dumps(results, indent=1) + "\n")
    rows = [row | {"size_mb": row["size_bytes"] / 1e6} for row in results["rows"]]
    run = results["run"]
    images = f"{run['images']} images per row, {run['steps']} DDIM steps, guidance {run['guidance_scale']:g}"
    about = f"{images}, {facts()['cpu']}, {run['workers']} workers of one thread, commit {run['commit']}"
    (RESULTS / "demo.md").write_text(f"{markdown(rows, COLUMNS)}\n\n{about}\n")
    pictures = RESULTS.parents[1] / "docs" / "images"
    pictures.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / "grid.png", pictures / "demo.png")


if __name__ == "__main__":
    main()
