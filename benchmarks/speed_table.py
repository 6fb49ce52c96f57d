"""The short speed tables of README.md and docs/benchmarks.md, picked from results/layers_cpu.json and results/models_cpu.json.

    python benchmarks/speed_table.py

The whole tables, with spreads and every contender, are results/layers_cpu.md and results/models_cpu.md.
"""

from __future__ import annotations

import json
from typing import Any

from common import RESULTS, markdown

SHAPE = "3072x3072"
TOKENS = (1, 2, 16, 64, 256, 1024, 4096)
OURS = "int4 int4-a8 fp4 fp4-a8 fp6 int8-a8 aq2 aq2-a8 vq2 vq3 aq4 aq4-a8 svd4 svd4-a8 svd4-a4"
PEERS = (
    "torch-compile torchao-int4 torchao-int8 torchao-int8-a8-compile bitsandbytes-nf4 bitsandbytes-int8-a8 quanto-int4 gguf-Q4_0 "
    "gguf-Q2_K sdnq-int4 sdnq-uint4 sdnq-uint2 sdnq-uint4-svd sdnq-int8-a8 orbitquant-w4a4 orbitquant-w2a4"
)
OURS_SHORT = "int4-a8 fp4-a8 aq2-a8 svd4-a8 fp4 aq2"
PEERS_SHORT = "torchao-int8-a8-compile sdnq-int8-a8 bitsandbytes-nf4 torchao-int4 gguf-Q4_0"
SHORT = ["torch", *(f"qdiff-{name}" for name in OURS_SHORT.split()), *PEERS_SHORT.split()]
ROWS = [f"qdiff-{name}" for name in OURS.split()] + PEERS.split()


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def layers(record: dict[str, Any]) -> str:
    """Speed relative to dense bfloat16 at every number of tokens."""
    cells = {(c["contender"], c["tokens"]): c for c in record["cells"] if c["shape"] == SHAPE and "ratio" in c}
    tokens = [t for t in TOKENS if any(key[1] == t for key in cells)]
    rows = []
    for name in ROWS:
        found = [cells[name, t] for t in tokens if (name, t) in cells]
        if not found:
            continue
        own = any("own weight" in c["note"] for c in found)  # random codes: the error says nothing beside the others'
        error = None if own else max(c["error"] for c in found)
        row = {"name": name, "stored": found[0].get("stored_bits"), "error": error}
        rows.append(row | {str(c["tokens"]): c["ratio"]["median"] for c in found})
    columns = [("name", SHAPE, ""), ("stored", "stored bits", ".2f"), ("error", "error", ".3f")]
    return markdown(rows, columns + [(str(t), f"M={t}", ".2f") for t in tokens])


def models(record: dict[str, Any]) -> str:
    """Speed and memory of whole models."""
    rows = []
    for cell in record["cells"]:
        if "ratio" in cell:
            share = cell["bytes"] / cell["dense_bytes"]
            rows.append({"name": cell["contender"], "share": share, "speed": cell["ratio"]["median"], "ms": cell["ms"]["median"]})
    title = next(c["what"] for c in record["cells"] if "what" in c)
    columns = (("name", title, ""), ("speed", "speed", ".2f"), ("ms", "ms per step", ".0f"), ("share", "weight memory", ".2f"))
    return markdown(rows, columns)


def page(name: str) -> str:
    """``results/speed_<name>.md`` from the committed run, with the machine it was measured on below."""
    table, run = TABLES[name]
    record = load(f"{run}_cpu")
    whole = f"[benchmarks/results/{run}_cpu.md](../benchmarks/results/{run}_cpu.md)"
    return f"{table(record)}\n\n{source(record, whole)}\n"


def source(record: dict[str, Any], whole: str) -> str:
    run = record["facts"]
    machine = f"{run['processor']}, {run['threads']} threads, {run['date']}, commit {run['commit']}"
    return f"{machine}, {run['busy_cores']:.2f} cores busy with other programs at the start; all rows and spreads: {whole}"


def short(record: dict[str, Any]) -> str:
    """The README's: some rows of ``models``."""
    cells = sorted(record["cells"], key=lambda cell: -cell.get("ratio", {}).get("median", 0))
    return models(record | {"cells": [cell for cell in cells if cell["contender"] in SHORT]})


TABLES = {"layers": (layers, "layers"), "models": (models, "models"), "short": (short, "models")}


if __name__ == "__main__":
    for name in TABLES:
        (RESULTS / f"speed_{name}.md").write_text(page(name))
        print(page(name))
