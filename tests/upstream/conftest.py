"""Registers the markers of diffusers' own tests, which --strict-markers would refuse."""

from __future__ import annotations

import re

import pytest
from upstream.mixins import checkout


def pytest_configure(config: pytest.Config) -> None:
    root = checkout()
    for file in (root / "tests").glob("*.py") if root else ():
        for marker in re.findall(r'addinivalue_line\("markers", "([^"]+)"\)', file.read_text()):
            config.addinivalue_line("markers", marker)
        for name in re.findall(r"pytest\.mark\.([a-z_]+)\(", file.read_text()):
            config.addinivalue_line("markers", f"{name}: of diffusers")
