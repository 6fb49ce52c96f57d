"""The files that ``qdiff eval`` writes for readers: JSON, a markdown table, a picture and a page."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from ..checkpoint.writing import write_text
from .eval_plots import layers_plot, quality_plots, steps_plot
from .grid import GridRow, draw_grid, save_png
from .rows import EvalRow
from .store import RowStore
from .subject import Subject, class_names
from .tables import Row, about, columns_of, markdown, notes

GRID_COLUMNS = 10
GRID_PIXELS = 96  # pixels of an image's longer side


def write_outputs(folder: Path, results: dict[str, Any], made: Sequence[tuple[EvalRow, RowStore]], subject: Subject) -> None:
    """Write ``results.json``, ``table.md``, ``grid.png`` and ``report.html``."""
    write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    write_text(folder / "table.md", markdown(results))
    save_png(_grid(results, made, subject), folder / "grid.png")
    write_text(folder / "report.html", render(results, (folder / "grid.png").read_bytes()))


def render(results: dict[str, Any], grid_png: bytes) -> str:
    """The page as text, everything in it embedded."""
    environment = Environment(loader=PackageLoader(__package__, "."), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    rows, run = results["rows"], results["run"]
    columns = columns_of(rows)
    return environment.get_template("eval.html.j2").render(
        rows=[(row, [(c.show(row, False), c.margin(row), c.digits) for c in columns], notes(row)) for row in rows],
        columns=columns,
        run=run,
        about=about(run),
        plots=quality_plots(rows),
        steps=steps_plot(rows),
        layers=layers_plot(rows),
        machines=_machines(rows),
        grid=base64.b64encode(grid_png).decode(),
    )


def _grid(results: dict[str, Any], made: Sequence[tuple[EvalRow, RowStore]], subject: Subject) -> Any:
    """The first images of every row that has some."""
    run = results["run"]
    count = min(GRID_COLUMNS, run["images"])
    rows = []
    for row, (_, store) in zip(results["rows"], made, strict=True):
        if row["images"] >= count and "failed" not in row:
            psnr = (row.get("scores") or {}).get("psnr")
            quality = "" if psnr is None else f"{psnr[0]:.1f}"
            rows.append(GridRow(row["name"], f"{row['bits_per_weight']:.2f}", quality, store.images(count)))
    names = class_names(Path(subject.source)) if subject.by_class else []
    labels = subject.labels_of(count) or list(range(count))
    columns = [names[label].partition("/")[0] if isinstance(label, int) and label < len(names) else str(label) for label in labels]
    zoom = max(1, round(GRID_PIXELS / max(rows[0].images.shape[2:])))
    title = f"{subject.name}: the same seeds in every row"
    return draw_grid(rows, columns, title=title, subtitle="PSNR against the 16-bit model's images.", zoom=zoom)


def _machines(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The machines and versions that the rows were made with, each once, with the names of its rows."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if "machine" in row:
            facts = {key: value for key, value in row["machine"].items() if key != "date"}
            facts |= {"commit": row["commit"] or "an installed package", "threads": row["threads"]}
            entry = found.setdefault(json.dumps(facts, sort_keys=True), facts | {"rows": []})
            entry["rows"].append(row["name"])
    return list(found.values())
