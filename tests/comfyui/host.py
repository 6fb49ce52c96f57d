"""The ComfyUI that the tests run in, and our pack loaded into it as ComfyUI loads it.

``QDIFF_COMFYUI`` names the folder of a ComfyUI (the one with main.py) whose requirements are installed in the running interpreter;
``scripts/comfy.sh`` makes one. Without it these tests are skipped.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = os.environ.get("QDIFF_COMFYUI", "")
needs_comfyui = pytest.mark.skipif(not FOLDER, reason="no ComfyUI: run scripts/comfy.sh, or set QDIFF_COMFYUI to its folder")


@cache
def pack() -> ModuleType:
    """The node pack, imported under the name of its folder with ComfyUI on the path."""
    sys.path.insert(0, FOLDER)
    sys.modules.pop("comfy", None)  # what pytest calls this repository in a folder of that name
    from comfy.cli_args import args

    args.cpu = True  # before anything else of ComfyUI is imported
    spec = importlib.util.spec_from_file_location("qdiff_pack", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["qdiff_pack"] = module
    spec.loader.exec_module(module)
    return module


def version() -> tuple[int, ...]:
    """The version of the ComfyUI."""
    pack()
    from comfyui_version import __version__

    return tuple(int(number) for number in __version__.split("."))


def part(name: str) -> ModuleType:
    """A module of ``comfy_nodes``."""
    pack()
    return importlib.import_module(f"qdiff_pack.comfy_nodes.{name}")
