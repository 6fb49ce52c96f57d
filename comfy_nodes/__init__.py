"""qdiff for ComfyUI: quantized models as ordinary MODELs, and everything to make, save, compare and inspect them."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .folders import add_folders
from .package import find_package

WEB_DIRECTORY = "./web"


class QDiffExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        from .nodes import NODES

        return NODES


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI calls."""
    find_package()
    add_folders()
    return QDiffExtension()
