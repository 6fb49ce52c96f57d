"""Ceilings of what kernels may need. They only go down: a row that misses its goal has today's number as its ceiling.

``budgets.json`` is written by ``python benchmarks/gpu_static.py --write-budgets``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .table import Facts, Row

FILE = Path(__file__).with_name("budgets.json")
SHAPE, TOKENS = (3072, 3072), (16, 256, 4096)  # of the rows that have budgets: each kernel of a layer occurs in one of them
LARGE_TILE = 128  # tokens
READY = 0.5  # instructions per weight that addresses and pipelining take where there is nothing to decode
GOALS = {"spilled": 0.0, "issue_over_matrix": 1.2, "decode_per_weight": 4.0, "narrow_loads": 0.0, "missing_ctas": 0.0}
UNITS = {
    "spilled": "bytes of spilled registers",
    "issue_over_matrix": "cycles of issue over cycles of the matrix unit, in large tiles",
    "decode_per_weight": "instructions per weight that decode and scale",
    "narrow_loads": "single-byte loads in the main loop",
    "missing_ctas": "CTAs that the prepare kernel lacks of min(multiprocessors, tiles)",
}
Ceilings = dict[str, float]


class Finding(NamedTuple):
    """One number of one kernel."""

    key: str
    metric: str
    value: float
    goal: float


def findings(rows: Iterable[Row], kernels: dict[str, Facts]) -> Iterator[Finding]:
    """Every number that has a budget, of the rows that have budgets."""
    for row in rows:
        if (row["rows"], row["columns"]) != SHAPE or row["tokens"] not in TOKENS or "failure" in row:
            continue
        for name, _, _, ctas, key in row["steps"]:
            if key is None:
                continue
            facts = kernels[key]
            where = f"{row['target']} | {row['layer']} | {row['activations']} | M={row['tokens']} | {name}"
            yield Finding(where, "spilled", facts["spilled"], GOALS["spilled"])
            if "issue_over_matrix" in facts and facts["tile"][1] >= LARGE_TILE:
                yield Finding(where, "issue_over_matrix", facts["issue_over_matrix"], GOALS["issue_over_matrix"])
            if "decode_per_weight" in facts:
                yield Finding(where, "decode_per_weight", facts["decode_per_weight"], decode_goal(row, facts))
            if "narrow_loads" in facts:
                yield Finding(where, "narrow_loads", facts["narrow_loads"], GOALS["narrow_loads"])
            if "wanted_ctas" in facts:
                yield Finding(where, "missing_ctas", max(0, facts["wanted_ctas"] - ctas), GOALS["missing_ctas"])


def decode_goal(row: Row, facts: Facts) -> float:
    """Nothing for operands that are ready, two instructions for int4 and E2M1, else four."""
    stored, same = row["stored"], {"int8": "int8", "fp8": "e4m3"}.get(row["activations"])
    if facts.get("ready") or (same is not None and stored.startswith(same) and "per row" in stored):
        return READY
    return 2.0 if stored.startswith(("int4", "e2m1 ")) else GOALS["decode_per_weight"]


def load(file: Path = FILE) -> dict[str, Any]:
    """``{"triton": version, "rows": {key: {metric: ceiling}}}``; without a file, no rows."""
    return json.loads(file.read_text()) if file.is_file() else {"triton": None, "rows": {}}


def violations(found: Iterable[Finding], budgets: dict[str, Any], triton: str) -> list[str]:
    """What exceeds its ceiling, or has none.

    Under another release of Triton than the ceilings are of, only spills count: it schedules differently.
    """
    out = []
    for key, metric, value, _ in found:
        if triton != budgets["triton"] and metric != "spilled":
            continue
        ceiling = budgets["rows"].get(key, {}).get(metric)
        if ceiling is None:
            out.append(f"{key}: no budget for {metric}; python benchmarks/gpu_static.py --write-budgets makes one")
        elif value > ceiling:
            out.append(f"{key}: {value:g} {UNITS[metric]}, the budget is {ceiling:g}")
    return out


def updated(found: Iterable[Finding], budgets: dict[str, Any], triton: str, accept_worse: bool = False) -> dict[str, Any]:
    """Budgets with today's numbers; whatever meets its goal has the goal as its ceiling.

    Raises:
        ValueError: a number is above its ceiling, and ``accept_worse`` is not set.
    """
    rows: dict[str, Ceilings] = {}
    worse = []
    for key, metric, value, goal in found:
        ceiling = max(value, goal)
        before = budgets["rows"].get(key, {}).get(metric)
        if before is not None and ceiling > before:
            worse.append(f"{key}: {ceiling:g} {UNITS[metric]}, the budget is {before:g}")
        rows.setdefault(key, {})[metric] = ceiling
    if worse and not accept_worse:
        raise ValueError("budgets only go down; with --accept-worse these would rise:\n" + "\n".join(worse))
    return {"triton": triton, "rows": rows}


def write(budgets: dict[str, Any], file: Path = FILE) -> None:
    """One row to a line."""
    rows = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(budgets["rows"].items()))
    file.write_text(f'{{"triton": {json.dumps(budgets["triton"])}, "rows": {{\n{rows}\n}}}}\n')
