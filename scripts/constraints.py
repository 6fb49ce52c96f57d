"""Writes constraints.txt: the versions installed in the environment whose interpreter runs this, for the next one like it.

.venv-test/bin/python scripts/constraints.py      after everything has passed with QDIFF_UNPINNED=1

scripts/environment.sh reads the file. A line holds for this Python only, for versions of other Pythons differ. What a build of
torch brings along or decides (triton, CUDA's libraries) is left out: environment.sh names the torch.
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
from pathlib import Path

FILE = Path(__file__).parents[1] / "constraints.txt"
LEFT_OUT = re.compile(r"torch|triton|nvidia-.*|cuda-.*|pip|setuptools|wheel|qdiff-diffusers")
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
HEADER = """# The versions with which the tests have passed, read by scripts/environment.sh. Written by scripts/constraints.py;
# QDIFF_UNPINNED=1 does without.
"""


def normalized(name: str) -> str:
    """As PEP 503 says."""
    return re.sub(r"[-_.]+", "-", name).lower()


def lines() -> list[str]:
    """One requirement for each installed package, in alphabetical order."""
    found = {normalized(found.metadata["Name"]): found.version for found in importlib.metadata.distributions()}
    return [
        f'{name}=={version}; python_version == "{PYTHON}"'
        for name, version in sorted(found.items())
        if not LEFT_OUT.fullmatch(name)
    ]


def other_pythons() -> list[str]:
    """Lines of the present file for other Pythons, which stay."""
    if not FILE.is_file():
        return []
    marker = f'python_version == "{PYTHON}"'
    return [line for line in FILE.read_text().splitlines() if line and not line.startswith("#") and marker not in line]


if __name__ == "__main__":
    FILE.write_text(HEADER + "\n".join([*lines(), *other_pythons()]) + "\n")
