"""Every transformer and UNet class of the installed diffusers under every method: docs/model_classes.md.

python benchmarks/model_classes.py [--methods rtn,fp] [--classes Flux] [--seconds 80]

Results are added to those of earlier runs with the same diffusers, so that a slow machine may go in steps; classes that have none
yet come first.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import diffusers
from common import RESULTS, facts, markdown

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests" / "classes"))
import class_walk  # noqa: E402

FILE = RESULTS / "model_classes.json"
HEADER = f"""# Model classes

Every transformer and UNet class that diffusers {diffusers.__version__} exports, tiny and with random weights: quantized while
loading, saved, reloaded, run. A cell is the relative error of the output against the dense model (8 bits for rtn, fp and svdquant,
2 bits for aq and vq); the reloaded model gives the same output. Made by `python benchmarks/model_classes.py`; the configurations
(`tests/classes/tiny_configs.json`) are those of diffusers' own tests or in their likeness, and a class that is new in diffusers
appears below by itself.
"""


def load() -> dict[str, Any]:
    """Outcomes of earlier runs with this diffusers; what only lacked a configuration then is tried again."""
    record = json.loads(FILE.read_text()) if FILE.is_file() else {}
    if record.get("facts", {}).get("versions", {}).get("diffusers") != diffusers.__version__:
        return {}
    names = set(class_walk.class_names())
    return {
        name: {method: outcome for method, outcome in found.items() if not outcome["status"].startswith("no tiny")}
        for name, found in record["classes"].items()
        if name in names
    }


def show(outcome: dict[str, Any] | None) -> str:
    if outcome is None:
        return "not run"
    return f"{outcome['error']:.3f}" if outcome["status"] == "works" else outcome["status"]


def render(results: dict[str, Any], known: dict[str, Any]) -> str:
    names, methods = class_walk.class_names(), list(class_walk.METHODS)
    rows = []
    for name in names:
        if name in known:
            found = results.get(name, {})
            packed = max((outcome["packed"] for outcome in found.values()), default=0)
            rows.append({"name": f"`{name}`", "packed": packed or None} | {m: show(found.get(m)) for m in methods})
    table = markdown(rows, [("name", "class", ""), ("packed", "packed layers", ""), *((m, m, "") for m in methods)])
    exceptions: dict[str, list[str]] = {}
    for name, found in results.items():
        for method, outcome in found.items():
            if name in known and outcome["status"] != "works":
                exceptions.setdefault(f"`{name}`: {outcome['status']}, {outcome['reason']}", []).append(method)
    lines = [f"- {reason} ({', '.join(found)})" for reason, found in sorted(exceptions.items())]
    cells = [o["status"] for name, found in results.items() for o in found.values() if name in known]
    work = sum(any(o["status"] == "works" for o in results.get(name, {}).values()) for name in names)
    missing = ", ".join(f"`{name}`" for name in names if name not in known)
    summary = f"{work} of {len(names)} classes work, {cells.count('works')} of {len(cells)} cells."
    return (
        f"{HEADER}\n{summary}\n\n{table}\n\n## Exceptions\n\n"
        + ("\n".join(lines) or "None.")
        + f"\n\n## No tiny configuration yet\n\n{missing or 'None.'}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--methods", default=",".join(class_walk.METHODS))
    parser.add_argument("--classes", default="", help="part of a class name")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after this long")
    arguments = parser.parse_args()
    results, known, start = load(), class_walk.configurations(), time.monotonic()
    jobs = [(m, n) for m in arguments.methods.split(",") for n in class_walk.class_names() if arguments.classes in n]
    for method, name in sorted(jobs, key=lambda job: job[0] in results.get(job[1], {})):
        if time.monotonic() - start > arguments.seconds:
            break
        outcome = class_walk.walk(name, method, known)
        print(f"{name:45} {method:9} {outcome.status} {outcome.reason}", flush=True)
        results.setdefault(name, {})[method] = outcome._asdict()
    FILE.write_text(json.dumps({"facts": facts(), "classes": results}, indent=1) + "\n")
    text = render(results, known)
    (RESULTS / "model_classes.md").write_text(text)
    (ROOT / "docs" / "model_classes.md").write_text(text)


if __name__ == "__main__":
    main()
