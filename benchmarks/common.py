"""What every benchmark writes: facts about the machine, JSON, and a markdown table."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def facts() -> dict[str, Any]:
    """Machine, versions, date and commit of a run."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RESULTS.parent).stdout
    return {
        "date": date.today().isoformat(),
        "commit": commit.strip() or "unknown",
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in ("torch", "diffusers", "qdiff-diffusers")},
    }


def write(name: str, rows: list[dict[str, Any]], columns: Sequence[tuple[str, str, str]], **more: Any) -> None:
    """Write ``results/<name>.json`` and ``results/<name>.md``.

    Args:
        columns: (key, heading, format spec) of the markdown table.
        more: further facts for the JSON file.
    """
    RESULTS.mkdir(exist_ok=True)
    record = {"facts": facts() | more, "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    table = markdown(rows, columns)
    run = record["facts"]
    source = f"{run['cpu']}, {run['threads']} threads, {run['date']}, commit {run['commit']}, torch {run['versions']['torch']}"
    (RESULTS / f"{name}.md").write_text(f"{table}\n\n{source}\n")
    print(table)


def markdown(rows: list[dict[str, Any]], columns: Sequence[tuple[str, str, str]]) -> str:
    """A markdown table; a value that is missing or None shows as a dash."""
    lines = ["| " + " | ".join(heading for _, heading, _ in columns) + " |", "|---" * len(columns) + "|"]
    for row in rows:
        cells = ["-" if row.get(key) is None else format(row[key], spec) for key, _, spec in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cpu() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
