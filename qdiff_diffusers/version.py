"""The version, which is written in pyproject.toml and nowhere else."""

from __future__ import annotations

import importlib.metadata
import re
from pathlib import Path

NAME = "qdiff-diffusers"
UNKNOWN = "0+unknown"  # PEP 440: a copy of the package without what it was built from


def package_version(package: Path = Path(__file__).parent) -> str:
    """Version of this package: in a clone (ComfyUI may run one) that of its pyproject.toml, else the installed one.

    Args:
        package: folder of the package.
    """
    project = package.parent / "pyproject.toml"
    if project.is_file():
        lines = re.search(rf'^name = "{NAME}"\nversion = "([^"]+)"$', project.read_text(encoding="utf-8"), re.MULTILINE)
        if lines:
            return lines[1]
    try:
        return importlib.metadata.version(NAME)
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN
