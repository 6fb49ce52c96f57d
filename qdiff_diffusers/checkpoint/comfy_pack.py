"""Where the ComfyUI node pack lies, and its tables of names, which know nothing of ComfyUI and serve here too."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import ConfigError

PACKAGE = Path(__file__).resolve().parents[1]
SOURCES = (PACKAGE / "comfy_pack", PACKAGE.parent)  # in a wheel, in a clone
PARTS = ("comfy_nodes", "example_workflows", "locales")
FAMILIES = "qdiff_comfy_families"


def find_pack(sources: tuple[Path, ...] = SOURCES) -> Path:
    """The folder that holds the pack's :data:`PARTS`.

    Raises:
        ConfigError: this installation lacks them.
    """
    for source in sources:
        if all((source / part).is_dir() for part in PARTS):
            return source
    raise ConfigError(
        "this installation lacks the node pack's files; install it again: pip install --force-reinstall --no-deps qdiff-diffusers"
    )


@cache
def families() -> ModuleType:
    """The pack's ``families``: which diffusers classes ComfyUI runs natively, and how their tensors lie in ComfyUI's.

    Raises:
        ConfigError: see :func:`find_pack`.
    """
    folder = find_pack() / "comfy_nodes" / "families"
    spec = spec_from_file_location(FAMILIES, folder / "__init__.py", submodule_search_locations=[str(folder)])
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[FAMILIES] = module
    spec.loader.exec_module(module)
    return module


def native_family(model_class: str) -> Any:
    """ComfyUI's family of a diffusers class.

    Raises:
        ConfigError: ComfyUI has no class for it.
    """
    family = families().family_of_class(model_class)
    if family is None:
        native = ", ".join(family.name for family in families().FAMILIES)
        raise ConfigError(f"ComfyUI has no native class for a {model_class or 'model without a class name'}; native are {native}")
    return family
