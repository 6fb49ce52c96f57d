"""diffusers' own quantization tests over eight models and every method: benchmarks/results/upstream_tests.md.

QDIFF_DIFFUSERS_CHECKOUT=path/to/diffusers python benchmarks/upstream_tests.py [--missing] [pytest arguments, for example -k rtn]

Outcomes are added to those of earlier runs of the same versions, so that a slow machine may go in steps (a run that is stopped
keeps what has run); with --missing only what has no outcome yet is run.
"""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import pytest
from common import RESULTS, facts, markdown

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))
from upstream import mixins  # noqa: E402

FILE = RESULTS / "upstream_tests.json"
OUTCOMES = ("passed", "failed", "upstream", "skipped")


class Results:
    """A pytest plugin that files every outcome at once among ``tests``; ``missing``: only what these lack is run."""

    def __init__(self, tests: dict[str, dict[str, str]], missing: bool) -> None:
        self.tests, self.missing = tests, missing

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        if self.missing:
            items[:] = [item for item in items if cell(getattr(item, "callspec", None)) not in self.tests]

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        found: dict[str, Any] = dict(report.user_properties)
        if report.when != "call" or "row" not in found:
            return
        outcome, reason = "passed", ""
        if hasattr(report, "wasxfail"):
            outcome, reason = "upstream", report.wasxfail.removeprefix("reason: ")
        elif report.skipped:
            outcome, reason = "skipped", str(report.longrepr[-1]).removeprefix("Skipped: ")  # type: ignore[index]
        elif report.failed:
            outcome, reason = "failed", str(report.longrepr).strip().splitlines()[-1]
        self.tests[" | ".join(found[part] for part in ("row", "model", "method"))] = {"outcome": outcome, "reason": reason}
        save(self.tests)


def cell(callspec: Any) -> str:
    """Where a parametrized test's outcome is filed."""
    found = callspec.params if callspec else {}
    return " | ".join(found.get(part, "") for part in ("test", "model", "method"))


@functools.cache
def versions() -> dict[str, str]:
    """diffusers as installed, and the version of the checkout whose tests run."""
    root = mixins.checkout()
    assert root is not None
    init = root / "src" / "diffusers" / "__init__.py"
    stated = re.search(r'__version__ = "([^"]+)"', init.read_text()) if init.is_file() else None
    git = subprocess.run(["git", "-C", str(root), "describe", "--tags", "--always"], capture_output=True, text=True)
    checkout = stated[1] if stated else git.stdout.strip() or "unknown"
    return {"diffusers": diffusers.__version__, "tests": checkout}


def load(current: dict[str, str]) -> dict[str, dict[str, str]]:
    record = json.loads(FILE.read_text()) if FILE.is_file() else {}
    return record["tests"] if record.get("versions") == current else {}


def save(tests: dict[str, dict[str, str]]) -> None:
    """Write the record and the table."""
    current = versions()
    FILE.write_text(json.dumps({"facts": facts(), "versions": current, "tests": tests}, indent=1) + "\n")
    (RESULTS / "upstream_tests.md").write_text(render(tests, current))


def render(tests: dict[str, dict[str, str]], current: dict[str, str]) -> str:
    rows = []
    for model in mixins.MODELS:
        row: dict[str, Any] = {"model": model}
        for method in mixins.METHODS:
            ending = f" | {model} | {method}"
            counts = Counter(test["outcome"] for key, test in tests.items() if key.endswith(ending))
            row[method] = " / ".join(str(counts[outcome]) for outcome in OUTCOMES) if counts else None
        rows.append(row)
    totals = Counter(test["outcome"] for test in tests.values())
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for key, test in sorted(tests.items()):
        if test["outcome"] != "passed":
            name, model, method = key.split(" | ")
            reasons.setdefault((test["outcome"], name, test["reason"]), []).append(f"{model} {method}")
    lines = [
        f"- {kind}, `{name}`, {len(where)} x: {reason} ({', '.join(where)})" for (kind, name, reason), where in reasons.items()
    ]
    return (
        f"QuantizationTesterMixin and QuantizationCompileTesterMixin of diffusers ({current['tests']}) with diffusers "
        f"{current['diffusers']}, on a CPU, compiling with {mixins.BACKEND}. A cell is passed / failed / failed for an upstream "
        f"reason / skipped.\n\n{', '.join(f'{totals[outcome]} {outcome}' for outcome in OUTCOMES)}.\n\n"
        f"{markdown(rows, [('model', '', ''), *((method, method, '') for method in mixins.METHODS)])}\n\n" + "\n".join(lines) + "\n"
    )


def main() -> int:
    if mixins.checkout() is None:
        raise SystemExit(f"set {mixins.VARIABLE} to a checkout of diffusers' repository")
    plugin = Results(load(versions()), "--missing" in sys.argv)
    arguments = [argument for argument in sys.argv[1:] if argument != "--missing"]
    return int(pytest.main([str(ROOT / "tests" / "upstream"), "-p", "no:cacheprovider", *arguments], plugins=[plugin]))


if __name__ == "__main__":
    raise SystemExit(main())
