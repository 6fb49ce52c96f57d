"""What diffusers does to a model, tried under every method: docs/compatibility.md, whose every cell is a test in tests/compat.

python benchmarks/compatibility.py [pytest arguments, for example -k rtn]

Outcomes are added to those of earlier runs with the same diffusers, so that a slow machine may go in steps.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import pytest
from common import RESULTS, facts, markdown

ROOT = Path(__file__).parent.parent
METHODS = ("aq", "vq", "fp", "svdquant", "rtn")
FILE = RESULTS / "compatibility.json"
WORST_FIRST = ("fails", "skipped", "refused", "works")
HEADER = f"""# Compatibility

What diffusers {diffusers.__version__} does to a model, and what becomes of a quantized one. Every cell is a test in
`tests/compat/`, made into this page by `python benchmarks/compatibility.py`.

- **works**: the output is that of the quantized model left alone, bit for bit or within the rounding of the computation
- **refused**: ends in an error that says what to do instead, before anything is changed
- **skipped**: cannot be tried on this machine

LoRA with offloading: an adapter loaded before it and after it, active, fused, and taken out again. DoRA and other variants read
the layer under them between its calls, and are refused where sequential or leaf-level offloading or layerwise casting move it away.
`dequantize()` leaves adapters, hooks and offloading in place. A model that accelerate offloads is saved once its hooks are off.
"""


class Cells:
    """A pytest plugin that notes each test's row, method and outcome."""

    def __init__(self) -> None:
        self.cells: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found = dict(report.user_properties)
        if "row" not in found or (report.when != "call" and report.passed):
            return
        cell = {"outcome": "works", "text": "", "note": found.get("note", ""), "test": report.nodeid.split("[")[0]}
        if report.failed:
            cell |= {"outcome": "fails", "text": str(report.longrepr).strip().splitlines()[-1]}
        elif report.skipped:
            cell |= {"outcome": "skipped", "text": str(report.longrepr[-1]).removeprefix("Skipped: ")}
        elif "refused" in found:
            cell |= {"outcome": "refused", "text": found["refused"]}
        key = f"{found['row']} | {found['method']}"
        earlier = self.cells.get(key, cell)  # several tests may fill one cell: the worst counts
        self.cells[key] = min(cell, earlier, key=lambda c: WORST_FIRST.index(c["outcome"]))


def load() -> dict[str, dict[str, Any]]:
    """Cells of earlier runs with this diffusers."""
    record = json.loads(FILE.read_text()) if FILE.is_file() else {}
    same = record.get("facts", {}).get("versions", {}).get("diffusers") == diffusers.__version__
    return record["cells"] if same else {}


def render(cells: dict[str, dict[str, Any]]) -> str:
    rows = list(dict.fromkeys(key.split(" | ")[0] for key in sorted(cells, key=lambda key: cells[key]["test"])))
    table, footnotes = [], []
    for row in rows:
        found = {method: cells.get(f"{row} | {method}") for method in METHODS}
        texts = list(dict.fromkeys(text for cell in found.values() if cell for text in (cell["text"], cell["note"]) if text))
        mark = ""
        if texts:
            footnotes.append(f"{len(footnotes) + 1}. {row}: {'; '.join(texts)}")
            mark = f" <sup>{len(footnotes)}</sup>"
        table.append({"row": row + mark} | {method: cell and cell["outcome"] for method, cell in found.items()})
    outcomes = [cell["outcome"] for cell in cells.values()]
    summary = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in reversed(WORST_FIRST))
    body = markdown(table, [("row", "", ""), *((method, method, "") for method in METHODS)])
    return f"{HEADER}\n{len(outcomes)} cells: {summary}.\n\n{body}\n\n" + "\n".join(footnotes) + "\n"


def main() -> int:
    plugin = Cells()
    code = pytest.main([str(ROOT / "tests" / "compat"), "-p", "no:cacheprovider", *sys.argv[1:]], plugins=[plugin])
    cells = load() | plugin.cells
    FILE.write_text(json.dumps({"facts": facts(), "cells": dict(sorted(cells.items()))}, indent=1) + "\n")
    text = render(cells)
    (RESULTS / "compatibility.md").write_text(text)
    (ROOT / "docs" / "compatibility.md").write_text(text)
    return int(code)


if __name__ == "__main__":
    raise SystemExit(main())
