"""The columns of a table of qualities, for markdown, the page and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ..measuring.tables import markdown_table

Row = dict[str, Any]
DASH = "–"


class Column(NamedTuple):
    """A column: the key of its number, its heading, and its format.

    ``better`` is 1 where more is better, -1 where less is, 0 where neither. A score is shown with its interval.
    """

    key: str
    heading: str
    note: str
    digits: int
    better: int
    is_score: bool = True
    factor: float = 1.0

    def value(self, row: Row) -> float | None:
        """The number as shown, without its interval."""
        found = (row.get("scores") or {}).get(self.key) if self.is_score else row.get(self.key)
        if self.is_score and found is not None:
            found = found[0]
        return None if found is None else found * self.factor

    def margin(self, row: Row) -> float | None:
        """Half the width of its 95 % interval."""
        found = (row.get("scores") or {}).get(self.key) if self.is_score else None
        return found[1] * self.factor if found and found[1] is not None else None

    def show(self, row: Row, with_margin: bool = True) -> str:
        """The cell's text."""
        value, margin = self.value(row), self.margin(row)
        if value is None:
            return DASH
        text = f"{value:.{self.digits}f}"
        return f"{text} ± {margin:.{self.digits}f}" if with_margin and margin is not None else text


COLUMNS = (
    Column("bits_per_weight", "Bits", "per weight", 2, 0, is_score=False),
    Column("size_bytes", "Size", "MB", 2, 0, is_score=False, factor=1e-6),
    Column("sparsity", "Zeros", "%", 1, 0, is_score=False, factor=100),
    Column("quantize_seconds", "Quantize", "s", 1, 0, is_score=False),
    Column("psnr", "PSNR", "dB", 1, 1),
    Column("ssim", "SSIM", "", 3, 1),
    Column("lpips", "LPIPS", "", 3, -1),
    Column("frechet", "Fréchet", "to real", 2, -1),
    Column("frechet_16bit", "Fréchet", "to 16-bit", 3, -1),
    Column("precision", "Precision", "real", 3, 1),
    Column("recall", "Recall", "real", 3, 1),
    Column("precision_16bit", "Precision", "16-bit", 3, 1),
    Column("recall_16bit", "Recall", "16-bit", 3, 1),
    Column("accuracy", "Right class", "%", 1, 1, factor=100),
    Column("seconds_per_image", "Sampling", "s/image", 2, 0, is_score=False),
)


def columns_of(rows: Sequence[Row]) -> list[Column]:
    """The columns that some row has a number for."""
    return [column for column in COLUMNS if any(column.value(row) is not None for row in rows)]


def notes(row: Row) -> str:
    """Remarks on a row: its failure, or layers that it does not quantize."""
    if "failed" in row:
        return f"failed: {row['failed']}"
    missing = row["target_layers"] - row["layers"]
    if row["kind"] == "reference" or not missing:
        return ""
    return f"{row['layers']} of {row['target_layers']} layers, the others stay in 16 bits"


def markdown(results: dict[str, Any]) -> str:
    """The table, and a line on how it was measured."""
    rows, run = results["rows"], results["run"]
    columns = columns_of(rows)
    headings = ["row", *(f"{column.heading} {column.note}".strip() for column in columns), ""]
    cells = [[row["name"], *(column.show(row) for column in columns), notes(row)] for row in rows]
    return "\n".join([markdown_table(headings, cells), "", about(run), ""])


def about(run: dict[str, Any]) -> str:
    """One line on how the numbers were measured."""
    paired = min(run["paired"], run["images"])
    parts = [f"{run['model']}: {run['images']} images per row, {paired} of them compared one by one (PSNR, SSIM, LPIPS)"]
    if run["steps"] is not None:
        parts.append(f"{run['steps']} steps")
    if run["guidance_scale"] is not None:
        parts.append(f"guidance {run['guidance_scale']:g}")
    rest = run.get("rest_dtype")
    arithmetic = f"{run['dtype']} arithmetic" + (f" ({rest} beyond the compared images)" if rest else "")
    return ", ".join([*parts, f"seed {run['seed']}", arithmetic, "± 95 % bootstrap intervals"]) + "."
