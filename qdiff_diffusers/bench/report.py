"""Tables of measurements, in markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ..measuring.tables import markdown_table
from .results import Cell, Results, busy

Rows = dict[str, list[Cell]]


def layers_markdown(results: Results) -> str:
    """One table per shape: a row for each contender, a column for each number of tokens."""
    cells = [cell for cell in results.cells.values() if cell["key"][0] == "layer"]
    rough = busy(results.facts)
    parts = [_layer_table(shape, [c for c in cells if c["shape"] == shape], rough) for shape in _unique(cells, "shape")]
    return "\n\n".join([_head(results, cells), *parts]) + "\n"


def models_markdown(results: Results) -> str:
    """One table per model."""
    cells = [cell for cell in results.cells.values() if cell["key"][0] == "model"]
    rough = busy(results.facts)
    parts = [_model_table(model, [c for c in cells if c["model"] == model], rough) for model in _unique(cells, "model")]
    return "\n\n".join([_head(results, cells), *parts]) + "\n"


def _head(results: Results, cells: Sequence[Cell]) -> str:
    run = results.facts
    where = run.get("gpu") or run["processor"]
    versions = ", ".join(f"{name} {version}" for name, version in {"torch": run["torch"], **run["peers"]}.items())
    commit = f", commit {run['commit']}" if run.get("commit") else ""
    lines = [
        f"{where}, {run['threads']} threads, {run['dtype']}, {run['date']}, qdiff {run['qdiff']}{commit}; {versions}.",
        f"Speed relative to torch {run['dtype']} in the same round (above 1 is faster): median of all rounds. "
        "Spread: distance of the quartiles over the median, the largest of the row.",
    ]
    if busy(run):
        lines.append(
            f"**The machine was busy: other programs used {run['busy_cores']} cores when the run began.** The second number of a "
            "cell is the fastest call over the baseline's fastest, which load disturbs least; read no more than that."
        )
    spreads = [_spread(cell) for cell in cells if cell.get("ratio")]
    if spreads:
        lines.append(f"Median spread of all cells {100 * statistics.median(spreads):.0f} %.")
    return "\n".join(lines)


def _layer_table(shape: str, cells: Sequence[Cell], rough: bool) -> str:
    counts = _unique(cells, "tokens")
    graphs = [count for count in counts if any("graph" in c for c in cells if c["tokens"] == count)]
    lookups = any(cell.get("lookup_share") is not None for cell in cells)
    heads = ["contender", "bits", "stored bits", "error"]
    for count in counts:
        heads += [f"M={count}", *([f"M={count} graph"] if count in graphs else [])]
    heads += ["spread", *(["look-up multiplications / operations"] if lookups else []), "note"]
    base = {count: _baseline([c for c in cells if c["tokens"] == count]) for count in counts}
    rows = [["dense", "16", "16.00", "", *_dense(counts, graphs, base), "", *([""] if lookups else []), "the baseline"]]
    failed = []
    for name, own in _by_contender(cells).items():
        measured = [cell for cell in own if cell.get("ratio")]
        if not measured:
            failed.append(f"- {name}: {own[0]['reason']}")
            continue
        rows.append(_layer_row(own, measured, counts, graphs, lookups, rough))
    return "\n".join([f"### {shape}", "", markdown_table(heads, rows), *(["", "Without a time:", ""] if failed else []), *failed])


def _layer_row(
    own: list[Cell], measured: list[Cell], counts: Sequence[int], graphs: Sequence[int], lookups: bool, rough: bool
) -> list[str]:
    by_count = {cell["tokens"]: cell for cell in own}
    errors = [cell["error"] for cell in measured if cell.get("error") is not None]
    row = [own[0]["contender"], f"{own[0]['bits']:g}", f"{measured[0]['stored_bits']:.2f}", f"{max(errors):.4f}"]
    for count in counts:
        cell = by_count.get(count, {})
        row.append(_ratio(cell, rough))
        if count in graphs:
            row.append(_ratio(cell.get("graph", {}), rough))
    row.append(f"{100 * max(map(_spread, measured)):.0f} %")
    if lookups:
        share = measured[0].get("lookup_share")
        row.append("" if share is None else f"{share['multiplications']:.2f} / {share['operations']:.2f}")
    notes = [measured[0].get("format"), measured[0].get("note")]
    notes += [f"M={c['tokens']}: {c['reason']}" for c in own if c.get("reason")]
    return [*row, "; ".join(note for note in notes if note)]


def _model_table(model: str, cells: Sequence[Cell], rough: bool) -> str:
    heads = ["contender", "bits", "ms per step", "speed", "spread", "rounds", "weights MB", "share", "first call s", "note"]
    rows, failed = [], []
    for cell in cells:
        if not cell.get("ratio"):
            failed.append(f"- {cell['contender']}: {cell['reason']}")
            continue
        size, dense = cell["bytes"], cell["dense_bytes"]
        rows.append(
            [
                cell["contender"],
                f"{cell['bits']:g}",
                f"{cell['ms']['median']:.0f} ({cell['ms']['q1']:.0f} to {cell['ms']['q3']:.0f})",
                _ratio(cell, rough),
                f"{100 * _spread(cell):.0f} %",
                str(cell["rounds"]),
                f"{size / 1e6:.0f}",
                f"{size / dense:.2f}",
                f"{cell['first_seconds']:.1f}",
                "; ".join(note for note in (cell.get("format"), cell.get("note")) if note),
            ]
        )
    table = markdown_table(heads, rows) if rows else ""
    return "\n".join([f"### {model}", "", table, *(["", "Without a time:", ""] if failed else []), *failed])


def _dense(counts: Sequence[int], graphs: Sequence[int], base: dict[int, tuple[str, str]]) -> list[str]:
    out = []
    for count in counts:
        out += [base[count][0], *([base[count][1]] if count in graphs else [])]
    return out


def _baseline(cells: Sequence[Cell]) -> tuple[str, str]:
    """Milliseconds of the dense layer, eager and from a graph."""

    def ms(read: Callable[[Cell], Any]) -> str:
        found = [read(cell)["baseline_ms"]["median"] for cell in cells if "baseline_ms" in (read(cell) or {})]
        return f"{statistics.median(found):.3g} ms" if found else "-"

    return ms(lambda cell: cell), ms(lambda cell: cell.get("graph"))


def _ratio(cell: dict[str, Any], rough: bool) -> str:
    if not cell.get("ratio"):
        return "-"
    return f"{cell['ratio']['median']:.2f}" + (f" / {cell['best_ratio']:.2f}" if rough else "")


def _spread(cell: Cell) -> float:
    ratio = cell["ratio"]
    return (ratio["q3"] - ratio["q1"]) / ratio["median"]


def _by_contender(cells: Sequence[Cell]) -> Rows:
    out: Rows = {}
    for cell in cells:
        out.setdefault(cell["contender"], []).append(cell)
    return out


def _unique(cells: Sequence[Cell], name: str) -> list[Any]:
    found = list(dict.fromkeys(cell[name] for cell in cells))
    return sorted(found) if name == "tokens" else found
