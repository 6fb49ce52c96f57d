"""Facts about the machine and the software of a measurement."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

DISTRIBUTION = "qdiff-diffusers"


def package_version(name: str) -> str | None:
    """Version of an installed distribution, ``None`` if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor_name() -> str:
    """The CPU's marketing name, where the system has it."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def cpu_count() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_facts(device: torch.device) -> dict[str, str | int]:
    """Versions, hardware and date of a run."""
    facts: dict[str, str | int] = {
        "qdiff": package_version(DISTRIBUTION) or "source tree",
        "torch": torch.__version__,
        "diffusers": package_version("diffusers") or "",
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor_name(),
        "cores": cpu_count(),
        "device": str(device),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
    return facts


def commit() -> str | None:
    """Commit of the checkout that contains this package, with a + if there are changes; ``None`` for an installed package."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=root).stdout.strip()

    try:
        head, changed = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "--untracked-files=no", "--", "*.py")
    except OSError:
        return None
    return f"{head}+" if head and changed else head or None
