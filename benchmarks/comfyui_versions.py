"""A row of the table of ComfyUI versions, from the outcomes of its tests: called by scripts/comfy.sh, which runs them. The table
also goes into docs/comfyui.md; rows of other versions keep their earlier outcome.

python benchmarks/comfyui_versions.py FOLDER VERSION      FOLDER has VERSION.xml (pytest's) and ComfyUI-VERSION
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from update_readme import filled

from qdiff_diffusers.measuring.tables import markdown_table

RESULTS = Path(__file__).parent / "results"
PAGE = Path(__file__).parents[1] / "docs" / "comfyui.md"
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
    rows = [
        [version, *(found["requires"].get(name, "-") for name in REQUIRED[:2]), *(str(found[kind]) for kind in OUTCOMES)]
        for version, found in record.items()
    ]
    table = markdown_table(["ComfyUI", "frontend", "comfy-kitchen", "passed", "failed", "skipped"], rows)
    notes = [f"- {version}: {name}" for version, found in record.items() for name in found["failures"]]
    tested = sorted({found["with"] for found in record.values()})
    return "\n".join([table, "", *notes, *([""] if notes else []), "; ".join(tested), ""])


def main(folder: Path, version: str) -> None:
    file = RESULTS / "comfyui.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    packages = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "diffusers", "transformers"))
    record[version] = row(folder, version) | {"with": f"Python {platform.python_version()}, {packages}"}
    record = dict(sorted(record.items()))
    file.write_text(json.dumps(record, indent=1) + "\n")
    (RESULTS / "comfyui.md").write_text(render(record))
    PAGE.write_text(filled(PAGE))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
