"""The table of ComfyUI versions, from the outcomes of their tests: called by scripts/comfy.sh, which runs them.

python benchmarks/comfyui.py FOLDER VERSION ...      FOLDER has VERSION.xml (pytest's) and ComfyUI-VERSION for each
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

RESULTS = Path(__file__).parent / "results"
REQUIRED = ("comfyui-frontend-package", "comfy-kitchen", "comfy-aimdo")  # pinned by ComfyUI
OUTCOMES = ("passed", "failed", "skipped")


def outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    return "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"


def row(folder: Path, version: str) -> dict[str, Any]:
    """Counts, failures and what was installed for one version."""
    suite = ElementTree.parse(folder / f"{version}.xml").getroot().find("testsuite")
    assert suite is not None
    cases = [(f"{case.get('classname')}::{case.get('name')}", outcome(case)) for case in suite.iter("testcase")]
    pins = (folder / f"ComfyUI-{version}" / "requirements.txt").read_text().split()
    return {
        "requires": {name: pin.partition("==")[2] for name in REQUIRED for pin in pins if pin.startswith(f"{name}==")},
        **{kind: sum(found == kind for _, found in cases) for kind in OUTCOMES},
        "failures": [name for name, found in cases if found == "failed"],
        "seconds": round(float(suite.get("time", 0))),
    }


def render(record: dict[str, Any]) -> str:
    lines = ["| ComfyUI | frontend | comfy-kitchen | passed | failed | skipped |", "|---" * 6 + "|"]
    for version, found in record["versions"].items():
        pins = [found["requires"].get(name, "-") for name in REQUIRED[:2]]
        lines.append(f"| {' | '.join(map(str, (version, *pins, *(found[kind] for kind in OUTCOMES))))} |")
    notes = [f"- {version}: {name}" for version, found in record["versions"].items() for name in found["failures"]]
    environment = ", ".join(f"{name} {value}" for name, value in record["environment"].items())
    return "\n".join([*lines, "", *notes, *([""] if notes else []), f"{environment}, {record['date']}", ""])


def main(folder: Path, versions: list[str]) -> None:
    packages = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "transformers")}
    record = {
        "date": date.today().isoformat(),
        "environment": {"Python": platform.python_version()} | packages,
        "versions": {version: row(folder, version) for version in versions},
    }
    (RESULTS / "comfyui.json").write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "comfyui.md").write_text(render(record))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
