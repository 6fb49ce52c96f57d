"""Put on PYTHONPATH by the tests: the packages named in QDIFF_TEST_HIDDEN cannot be imported, as if they were not installed."""

from __future__ import annotations

import importlib.abc
import os
import sys
from typing import Any


class Hidden(importlib.abc.MetaPathFinder):
    """Stands before what would find the packages, and lets those through that a node pack brings along."""

    names = tuple(filter(None, os.environ.get("QDIFF_TEST_HIDDEN", "").split(",")))

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self.names:
            return None
        for finder in sys.meta_path:
            if getattr(finder, "__name__", "") == "BundledFinder" and (spec := finder.find_spec(name, path, target)):
                return spec
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)


if Hidden.names:
    sys.meta_path.insert(0, Hidden())
