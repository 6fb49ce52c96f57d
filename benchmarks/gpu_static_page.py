"""results/gpu_static.{json,md}: the page that gpu_static.py writes.

python benchmarks/gpu_static_page.py    # the page alone, out of the JSON files
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from common import RESULTS, facts, markdown

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels" / "tests"))

import triton
from roofline import budgets
from roofline.cases import SHAPES
from roofline.devices import DEVICES, L2_BYTES, LATENCY, LAUNCH, REACHED, READ
from roofline.model import SLOW_LANES
from roofline.table import KEY, Row

NOW, BEFORE = "gpu_static", "gpu_static_before"
DEVICE_COLUMNS = (
    ("version", "target", ""),
    ("name", "as", ""),
    ("multiprocessors", "multiprocessors", ""),
    ("ghz", "GHz", ".2f"),
    ("bits16", "16-bit", ""),
    ("int8", "INT8", ""),
    ("fp8", "FP8", ""),
    ("gbs", "GB/s", ".0f"),
)
KERNEL_COLUMNS = (
    ("layer", "layer", ""),
    ("activations", "activations", ""),
    ("tokens", "M", ""),
    ("kernel", "kernel", ""),
    ("us", "us", ".1f"),
    ("grid", "CTAs", ""),
    ("ctas", "CTAs / MP", ""),
    ("registers", "registers", ""),
    ("spilled", "spilled", ""),
    ("shared", "shared", ""),
    ("all", "instructions", ""),
    ("matrix", "matrix", ""),
    ("decode", "decode", ""),
    ("conversions", "conversions", ""),
    ("loads", "LDG", ""),
    ("copies", "LDGSTS", ""),
    ("shared_loads", "LDS", ""),
    ("shared_stores", "STS", ""),
    ("barriers", "barriers", ""),
    ("per_weight", "per weight", ""),
    ("decode_per_weight", "decode per weight", ""),
    ("matrix_cycles", "matrix cycles", ".0f"),
    ("issue_cycles", "issue cycles", ".0f"),
)
TABLES = ("matrix", "loads", "copies", "shared_loads", "shared_stores")


def load(name: str) -> dict[str, Any]:
    """A results file of ours, empty where there is none."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.is_file() else {"facts": None, "rows": [], "kernels": {}}


def write(name: str, rows: list[Row], kernels: dict[str, Any]) -> None:
    """The JSON file, one row to a line, and the page."""
    made = {key: value for key, value in facts().items() if key in ("date", "commit", "versions")}
    made["versions"] = made["versions"] | {"triton": triton.__version__}
    lines = [f'{{"facts": {json.dumps(made)},\n"rows": [', ",\n".join(map(json.dumps, rows)), '],\n"kernels": {']
    lines += [",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in kernels.items()), "}}\n"]
    _replace(RESULTS / f"{name}.json", "\n".join(lines))
    write_page()


def write_page() -> None:
    _replace(RESULTS / f"{NOW}.md", page())


def _replace(file: Path, text: str) -> None:
    beside = file.with_suffix(".part")
    beside.write_text(text)
    beside.replace(file)


def page() -> str:
    """What was found last, each ratio beside the one before; until there is such a run, the first one alone."""
    before, now = load(BEFORE), load(NOW)
    shown = now if now["rows"] else before
    parts = [introduction(before["facts"], now["facts"])]
    for target in dict.fromkeys(row["target"] for row in shown["rows"]):
        parts.append(page_of(target, shown["rows"], shown["kernels"], before["rows"] if now["rows"] else []))
    return "\n\n".join([*parts, missed(shown)]) + "\n"


def introduction(before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    runs = [(what, run) for what, run in (("before", before), ("after", now)) if run]
    made = [f"{what}: commit {run['commit']}, {run['date']}, Triton {run['versions']['triton']}" for what, run in runs]
    scaled = [{"version": d.version, "gbs": d.bandwidth / 1e9, "ghz": d.clock / 1e9} for d in DEVICES.values()]
    devices = [vars(d) | more | d.rates._asdict() for d, more in zip(DEVICES.values(), scaled, strict=True)]
    return f"""# Static roofline of the GPU kernels

**Every time and ratio here is a prediction of a model; no GPU has run these kernels.** Registers, shared memory and instructions
are counted in the machine code that Triton compiled. Made by `python benchmarks/gpu_static.py`; {"; ".join(made)}.

A ratio is the time of the vendor's bfloat16 product over the layer's, everything that the layer launches counted: preparing
inputs, decoding, products, sums of splits, low-rank passes. Above 1 is faster than bfloat16. The Python before a launch is not
counted.

What the model assumes: the devices below (multiply-adds per multiprocessor and cycle; 0: 16-bit operands instead); a vendor's
product reaches {REACHED:.0%} of the matrix rate where its tiles fill the device; memory gives {READ:.0%} of its bandwidth; L2
{L2_BYTES} bytes per multiprocessor and cycle; every kernel takes {LAUNCH * 1e6:g} us besides its work; a tile arrives {LATENCY}
cycles after it is asked for; I2F and F2I run on {SLOW_LANES} lanes. Single numbers may be wrong by half, those of codebooks by a
factor of two; the order of kernels is safer. `kernels/tests/roofline/model.py` has the formulas.

{markdown(devices, DEVICE_COLUMNS)}"""


def page_of(target: str, rows: list[Row], kernels: dict[str, Any], before: list[Row]) -> str:
    """The tables of one target."""
    own = [row for row in rows if row["target"] == target]
    parts = [f"## {target}"]
    for shape in SHAPES:
        if found := [row for row in own if (row["rows"], row["columns"]) == shape]:
            heading = f"### {target}, {shape[1]} -> {shape[0]}: predicted speed relative to bfloat16"
            parts.append(f"{heading}{', before → after' if before else ''}\n\n{ratios(found, before)}")
    parts.append(f"### {target}: kernels of {SHAPES[0][1]} -> {SHAPES[0][0]}\n\n{machine_code(own, kernels)}")
    return "\n\n".join(parts)


def ratios(rows: list[Row], before: list[Row]) -> str:
    """One line per layer and kind of activations, one column per number of tokens."""
    old = {tuple(row[name] for name in KEY): row for row in before}
    counts = sorted({row["tokens"] for row in rows})
    last = counts[-1]
    lines: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        named = {name: row[name] for name in ("layer", "stored", "activations")}
        line = lines.setdefault((row["layer"], row["activations"]), named)
        was = old.get(tuple(row[name] for name in KEY))
        line[str(row["tokens"])] = f"{_ratio(was)} → {_ratio(row)}" if was else _ratio(row)
        if row["tokens"] == last and "failure" not in row:
            line |= {"ideal": row["of_ideal"], "limit": row["limit"]}
    columns = [("layer", "layer", ""), ("stored", "stored", ""), ("activations", "activations", "")]
    columns += [(str(count), f"M={count}", "") for count in counts]
    columns += [("ideal", f"of the roof, M={last}", ".2f"), ("limit", f"limit, M={last}", "")]
    failures = dict.fromkeys(f"- {row['layer']}, {row['activations']}: {row['failure']}" for row in rows if "failure" in row)
    return "\n".join([markdown(list(lines.values()), columns), *([""] if failures else []), *failures])


def _ratio(row: Row) -> str:
    return "fails" if "failure" in row else f"{row['ratio']:.2f}"


def machine_code(rows: list[Row], kernels: dict[str, Any]) -> str:
    """One line per layer and kernel; one that serves several numbers of tokens stands at the first."""
    lines, seen = [], set()
    for row in rows:
        if (row["rows"], row["columns"]) != SHAPES[0]:
            continue
        for name, microseconds, _, ctas, key in row.get("steps", ()):
            mark = (row["layer"], row["activations"], key)
            if key is None or mark in seen or name == "sum_splits":
                continue
            seen.add(mark)
            line = {what: row[what] for what in ("layer", "activations", "tokens")} | {"us": microseconds, "grid": ctas}
            lines.append(line | kernels[key] | loop_columns(kernels[key]))
    text = "Of a kernel with products, its main loop, per warp; of any other, all of it. `n x bits` are loads of a thread."
    return f"{text}\n\n{markdown(lines, KERNEL_COLUMNS)}"


def loop_columns(found: dict[str, Any]) -> dict[str, Any]:
    """Counts of instructions as cells of a table."""
    counts = found["counts"]
    flat = {name: value for name, value in counts.items() if name not in TABLES}
    return flat | {name: ", ".join(f"{n} x {kind}" for kind, n in counts[name].items()) for name in TABLES if name in counts}


def missed(shown: dict[str, Any]) -> str:
    """How many kernels miss a goal, and each that does."""
    findings = list(budgets.findings(shown["rows"], shown["kernels"]))
    lines = []
    for metric, unit in budgets.UNITS.items():
        own = [f for f in findings if f.metric == metric]
        over = [f for f in own if f.value > f.goal]
        worst = max((f.value for f in over), default=None)
        goals = ", ".join(f"{goal:g}" for goal in sorted({f.goal for f in own}))
        lines.append({"unit": unit, "goals": goals, "of": len(own), "missed": len(over), "worst": worst})
    columns = (("unit", "", ""), ("goals", "goal", ""), ("of", "kernels", ""), ("missed", "miss it", ""), ("worst", "worst", "g"))
    each = (("key", "kernel", ""), ("unit", "", ""), ("value", "is", "g"), ("goal", "goal", "g"))
    over = [f for f in findings if f.value > f.goal]
    rows = [f._asdict() | {"key": f.key.replace(" | ", ", "), "unit": budgets.UNITS[f.metric]} for f in over]
    return f"""## Goals

`kernels/tests/roofline/budgets.json` holds the ceilings that CI compares a part of these with: the goal, or where it is missed the
number that was found, which may only go down.

{markdown(lines, columns)}

### Kernels that miss a goal

{markdown(rows, each)}"""


if __name__ == "__main__":
    write_page()
