"""Rows of the list second_moments beside the earlier results of the rows with the same names and settings.

    python benchmarks/quality.py dit second_moments WORK && python benchmarks/quality.py unet second_moments WORK
    python benchmarks/quality_change.py

writes ``results/quality_change.md``. Earlier results are those of the other lists, at whatever commit they were made.
"""

from __future__ import annotations

import json
from typing import Any

from common import RESULTS, markdown

LIST = "second_moments"
EARLIER = ("fp_and_svdquant", "svdquant", "aq")
COLUMNS = [("model", "model", ""), ("name", "row", ""), ("bits", "stored bits", ".2f"), ("before", "PSNR before", "")]
COLUMNS += [("after", "PSNR after", ""), ("seconds_before", "quantize s, before", ".0f"), ("seconds", "after", ".0f")]


def rows_of(model: str, name: str) -> dict[str, dict[str, Any]]:
    """The finished rows of a list's results by name; none where it has not been run."""
    path = RESULTS / "quality" / f"{model}_{name}.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    return {row["name"]: row for row in rows if row["kind"] == "config" and "failed" not in row}


def psnr(row: dict[str, Any]) -> str:
    """Mean and half the width of its 95 % interval, in decibels."""
    mean, half = row["scores"]["psnr"][:2]
    return f"{mean:.1f} ± {half:.1f}"


def main() -> None:
    table = []
    for model in ("dit", "unet"):
        earlier = {key: row for name in reversed(EARLIER) for key, row in rows_of(model, name).items()}
        for name, row in rows_of(model, LIST).items():
            if before := earlier.get(name):
                times = {"seconds_before": before["quantize_seconds"], "seconds": row["quantize_seconds"]}
                facts = {"model": model, "name": name, "bits": row["bits_per_weight"], "before": psnr(before), "after": psnr(row)}
                table.append(facts | times)
    (RESULTS / "quality_change.md").write_text(markdown(table, COLUMNS) + "\n")
    print(markdown(table, COLUMNS))


if __name__ == "__main__":
    main()
