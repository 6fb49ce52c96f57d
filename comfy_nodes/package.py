"""Finds the qdiff package for the node pack, and explains what is missing.

An installed ``qdiff-diffusers`` is used if there is one; a clone of the repository brings its own copy.
"""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PACK = "qdiff_pack.json"  # what ``qdiff comfy install`` writes beside the nodes
BUNDLED = {
    "qdiff_diffusers": ROOT / "qdiff_diffusers",
    "qdiff_diffusers.hub_cards": ROOT / "hub_cards",
    "qdiff_kernels": ROOT / "kernels" / "torch-ext" / "qdiff_kernels",
}


class BundledFinder:
    """Finds the packages of the clone, after everything that is installed."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        folder = BUNDLED.get(name)
        if folder is None or not (folder / "__init__.py").is_file():
            return None
        return spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=[str(folder)])


class MissingPackage(RuntimeError):
    """Something that the nodes need is not installed."""


def find_package() -> None:
    """Let ``import qdiff_diffusers`` find the clone's copy. Nothing is imported yet, so that ComfyUI starts quickly and always."""
    if not any(finder is BundledFinder for finder in sys.meta_path):
        sys.meta_path.append(BundledFinder)


def problem() -> str | None:
    """Why the nodes cannot work and what to do about it; ``None`` if they can."""
    try:
        if reason := _other_version(importlib.import_module("qdiff_diffusers")):
            return reason
        importlib.import_module("qdiff_diffusers.checkpoint.stored_model")
        importlib.import_module("comfy_kitchen.tensor")
    except ImportError as error:
        needs = f'-r "{ROOT / "requirements.txt"}"' if (ROOT / "requirements.txt").is_file() else "qdiff-diffusers"
        return (
            f"qdiff cannot run here: {error}. Install what it needs into ComfyUI's Python and start ComfyUI again: "
            f'"{sys.executable}" -m pip install {needs}'
        )
    return None


def _other_version(package: Any) -> str | None:
    """Error message if the nodes and the package are of different versions; ``None`` if they fit."""
    nodes = nodes_version(ROOT)
    if nodes is None or nodes == package.__version__:
        return None
    way_out = (
        f'Make the nodes those of the package: "{sys.executable}" -m qdiff_diffusers.cli comfy install --overwrite "{ROOT.parent}"'
        if (ROOT / PACK).is_file()
        else f'The nodes bring their own copy, so uninstall the package: "{sys.executable}" -m pip uninstall qdiff-diffusers'
    )
    return (
        f"qdiff cannot run here: the nodes in {ROOT} are version {nodes}, the package in {Path(package.__file__).parent} is "
        f"{package.__version__}. {way_out}, and start ComfyUI again"
    )


@cache
def nodes_version(root: Path) -> str | None:
    """The version of the nodes in a folder: what ``qdiff comfy install`` has written, or a clone's; ``None`` without either."""
    for name, pattern in ((PACK, r'"version":\s*"([^"]+)"'), ("pyproject.toml", r'(?m)^version\s*=\s*"([^"]+)"')):
        if (root / name).is_file() and (found := re.search(pattern, (root / name).read_text(encoding="utf-8"))):
            return found[1]
    return None


def require() -> None:
    """Check that the nodes can work, before anything that needs the package.

    Raises:
        MissingPackage: says what to install.
    """
    if reason := problem():
        raise MissingPackage(reason)
