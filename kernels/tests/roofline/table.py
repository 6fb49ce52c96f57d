"""Rows: one layer, its activations, a shape, a number of tokens, one device. And what its kernels look like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from compile_kernels import Specialisation
from qdiff_kernels.gpu.weights import DENSE

from .cases import Case
from .compiled import Failure, Library, Machine, digest
from .devices import Device
from .model import Prediction, analyse, ctas_per_multiprocessor, cycles, predict_kernel, predict_vendor, tile_of
from .record import Kernel, Recording, record

Row = dict[str, Any]
Facts = dict[str, Any]
Advance = Callable[[str, int, int], None]
KEY = ("target", "layer", "activations", "rows", "columns", "tokens")


def quiet(name: str, done: int, total: int) -> None:
    """No progress."""


def rows_of(
    device: Device, wanted: Sequence[Case], library: Library, advance: Advance = quiet
) -> tuple[list[Row], dict[str, Facts]]:
    """Predict cases; compile what they need.

    Returns:
        The rows, and the facts of all kernels by the keys that rows name them by.
    """
    recordings = _recordings(device, wanted, library, advance)
    rows, kernels = [], {}
    for case, recording in recordings.items():
        row, found = _row(device, case, recording, library)
        rows.append(row)
        kernels |= found
    return rows, kernels


def _recordings(device: Device, wanted: Sequence[Case], library: Library, advance: Advance) -> dict[Case, Recording | str]:
    """What each case launches where kernels that the device cannot hold are refused, as they are there."""

    def refuse(kernel: Specialisation) -> str | None:
        machine = library.known(kernel, device.target)
        return "shared memory" if machine is not None and not ctas_per_multiprocessor(machine, device) else None

    found: dict[Case, Recording | str] = {}
    pending = list(wanted)
    while pending:
        for case in pending:
            try:
                found[case] = record(device, case.prepare, refuse)
            except Exception as error:  # what a user would see is a row of the table
                found[case] = f"{type(error).__name__}: {error}"
        launched = {case: [step.specialisation for step in _kernels(found[case])] for case in pending}
        library.compile((kernel for kernels in launched.values() for kernel in kernels), device.target, advance)
        pending = [case for case, kernels in launched.items() if any(map(refuse, kernels))]
    return found


def _kernels(recording: Recording | str) -> list[Kernel]:
    return [] if isinstance(recording, str) else [step for step in recording.steps if isinstance(step, Kernel)]


def _row(device: Device, case: Case, recording: Recording | str, library: Library) -> tuple[Row, dict[str, Facts]]:
    row: Row = {"target": device.version, "layer": case.layer.name, "stored": case.spec.format.describe()}
    row |= {"activations": case.activations, "rows": case.shape[0], "columns": case.shape[1], "tokens": case.tokens}
    kernels: dict[str, Facts] = {}
    if isinstance(recording, str):
        return row | {"failure": recording}, kernels
    steps: list[tuple[Prediction, str | None]] = []
    for step in recording.steps:
        if not isinstance(step, Kernel):
            steps.append((predict_vendor(step, device), None))
            continue
        try:
            machine = library.get(step.specialisation, device.target)
        except Failure as failure:
            return row | {"failure": f"{step.name}: {failure}"}, kernels
        key = digest(step.specialisation, device.target)[:12]
        try:
            kernels[key] = kernel_facts(step, machine, device)
            steps.append((predict_kernel(step, machine, device), key))
        except LookupError as error:  # a new kernel that the model has yet to learn
            return row | {"failure": f"{step.name}: {error}"}, {}
    seconds, dense = sum(found.seconds for found, _ in steps), predict_vendor(case.dense, device).seconds
    row |= {"us": _short(seconds * 1e6), "dense_us": _short(dense * 1e6), "ratio": _short(dense / seconds)}
    row |= {"of_ideal": _short(case.ideal(device) / seconds), "limit": max(steps, key=lambda s: s[0].seconds)[0].limit}
    row["steps"] = [[found.name, _short(found.seconds * 1e6), found.limit, found.ctas, key] for found, key in steps]
    return row | ({"waits": recording.waits} if recording.waits else {}), kernels


def kernel_facts(step: Kernel, machine: Machine, device: Device) -> Facts:
    """What a kernel's machine code is like; of one with products, its main loop, of any other all of its code."""
    analysis, tile = analyse(machine), tile_of(step)
    counts = analysis.main or analysis.whole
    need = cycles(counts, step, machine, device, tile)
    facts: Facts = {"target": device.version, "kernel": step.name, "registers": machine.registers}
    facts |= {"spilled": analysis.whole.spilled, "shared": machine.shared, "ctas": ctas_per_multiprocessor(machine, device)}
    facts |= {"warps": machine.warps, "stages": step.sizes.get("num_stages"), "tile": [tile.rows, tile.tokens, tile.columns]}
    facts |= {"loop": analysis.main is not None, "counts": {k: v for k, v in counts._asdict().items() if v and k != "spilled"}}
    facts |= {"matrix_cycles": _short(need.matrix), "issue_cycles": _short(need.issue), "lookup_cycles": _short(need.lookups)}
    if tile.rows and tile.columns:
        lanes = 32 * machine.warps / (tile.rows * tile.columns)
        facts["per_weight"] = _short(counts.all * lanes)
        facts["decode_per_weight"] = _short((counts.decode + counts.conversions) * lanes)
    if need.matrix:
        facts["issue_over_matrix"] = _short(need.issue / need.matrix)
    if analysis.main is not None:
        facts["narrow_loads"] = sum(t.get("8", 0) for t in (counts.loads, counts.copies, counts.shared_loads))
    sizes = step.sizes
    if sizes.get("LAYOUT.kind") == DENSE:
        facts["ready"] = True
    if step.name == "prepare":
        tiles = -(-sizes["tokens"] // sizes["BM"]) * -(-sizes["source.columns"] // sizes["BK"]) if "source.columns" in sizes else 1
        facts["wanted_ctas"] = min(device.multiprocessors, tiles)
    return facts


def _short(value: float) -> float:
    return float(f"{value:.3g}")


def merge(old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
    """``new`` rows in place of ``old`` ones of the same case."""
    kept = {tuple(row[name] for name in KEY): row for row in old}
    return list((kept | {tuple(row[name] for name in KEY): row for row in new}).values())
