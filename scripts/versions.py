"""Notes one row of the version matrix in benchmarks/results/versions.json and renders versions.md; see versions.sh.

python scripts/versions.py ROW LOG [REASON]     run with the row's interpreter; LOG is what pytest printed
"""

from __future__ import annotations

import json
import platform
import sys
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
PACKAGES = ("torch", "diffusers", "transformers", "huggingface_hub", "accelerate", "peft", "triton", "safetensors", "numpy")


def installed(name: str) -> str:
    """The version of a package here, or a dash."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "-"


def outcome(log: str, reason: str) -> str:
    """pytest's own last line, or why there is none."""
    lines = Path(log).read_text().strip().splitlines() if log else []
    return lines[-1].strip("= ") if lines else reason


def main(row: str, log: str, reason: str = "") -> None:
    file = RESULTS / "versions.json"
    rows = json.loads(file.read_text()) if file.is_file() else {}
    found = {name: installed(name) if log else "-" for name in PACKAGES}
    rows[row] = {"python": platform.python_version(), **found, "outcome": outcome(log, reason), "date": date.today().isoformat()}
    file.write_text(json.dumps(rows, indent=1) + "\n")
    columns = ("python", *PACKAGES, "outcome", "date")
    lines = ["| row | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(cells[column] for column in columns) + " |" for name, cells in rows.items()]
    (RESULTS / "versions.md").write_text("\n".join(lines) + "\n\nMade by `bash scripts/versions.sh`.\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
