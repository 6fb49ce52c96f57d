"""Measurements in a JSON file, which a later run can continue."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.writing import write_text
from ..errors import ConfigError
from ..formats import dtype_name
from ..measuring.machine import commit, machine_facts, package_version
from ..measuring.peers import distributions

Cell = dict[str, Any]
# Facts that may differ between the cells of one file.
INCIDENTAL = ("date", "busy_cores", "budget")
BUSY = 0.25
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def facts(device: torch.device, dtype: torch.dtype, budget: float) -> dict[str, Any]:
    """Machine, versions, date, commit, threads, and how many cores other programs keep busy before the run."""
    peers = {name: found for name in distributions() if (found := package_version(name))}
    return machine_facts(device) | {
        "date": date.today().isoformat(),
        "commit": commit(),
        "dtype": dtype_name(dtype),
        "threads": torch.get_num_threads(),
        "peers": peers,
        "busy_cores": round(busy_cores(), 2),
        "budget": budget,
    }


def busy(run: dict[str, Any]) -> bool:
    """Whether other programs kept more than a quarter of a core busy when the run began."""
    return run["busy_cores"] > BUSY


def busy_cores(seconds: float = 1.0) -> float:
    """Number of cores in use while this process is idle for a moment; the load average where the system does not report it."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0

    def used() -> int:
        user, nice, system, _, _, irq, softirq, *_ = map(int, stat.read_text().splitlines()[0].split()[1:])
        return user + nice + system + irq + softirq

    before = used()
    time.sleep(seconds)
    return (used() - before) / TICKS / seconds


class Results:
    """Cells of one run by their keys, written after every group.

    Args:
        path: path of the JSON file, without its suffix.
        run: the facts of this run.
        resume: keep the cells of an earlier run with the same facts.

    Raises:
        ConfigError: the file to resume is not one of this benchmark's.
    """

    def __init__(self, path: Path, run: dict[str, Any], resume: bool = False) -> None:
        self.path, self.facts = path, run
        self.cells: dict[tuple[str, ...], Cell] = {}
        self.dropped: list[str] = []
        if resume and self.json.exists():
            self._resume()

    @property
    def json(self) -> Path:
        return self.path.with_name(self.path.name + ".json")

    def _resume(self) -> None:
        try:
            stored = json.loads(self.json.read_text())
            before, cells = stored["facts"], stored["cells"]
            keyed = {tuple(cell["key"]): cell for cell in cells}
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.json} is not a file of this benchmark; move it away or leave out --resume") from error
        names = sorted((set(before) | set(self.facts)) - set(INCIDENTAL))
        self.dropped = [name for name in names if before.get(name) != self.facts.get(name)]
        if not self.dropped:
            self.cells = keyed

    def missing(self, key: Sequence[str]) -> bool:
        return tuple(key) not in self.cells

    def add(self, key: Sequence[str], **cell: Any) -> None:
        self.cells[tuple(key)] = {"key": list(key)} | cell

    def write(self) -> None:
        """Write the JSON file."""
        write_text(self.json, json.dumps({"facts": self.facts, "cells": list(self.cells.values())}, indent=1) + "\n")
